// What the other files build pages of. All text goes in as text, never as markup.

const byId = (id) => document.getElementById(id);

function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "class") node.className = value;
    else if (key === "style") Object.entries(value).forEach(([name, each]) => node.style.setProperty(name, each));
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// A section of the page, and its entry in the list of sections.
function section(id, title, ...children) {
  document.querySelector("nav").append(el("a", { href: `#${id}` }, title));
  const made = el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), ...children);
  document.querySelector("main").append(made);
  return made;
}

// rows: of cells, each text, a node, or {text, class}; the first of a row is its head.
function table(heads, rows, properties = {}) {
  const cell = (tag, value, i) => {
    const known = value !== null && typeof value === "object" && !(value instanceof Node) ? value : { text: value };
    const scope = tag === "th" ? (properties.head ? "col" : "row") : undefined;
    return el(tag, { class: known.class ?? (heads[i]?.number ? "number" : undefined), scope }, known.text ?? "–");
  };
  const head = el("tr", {}, heads.map((each) => el("th", { scope: "col", class: each.number && "number" }, each.text)));
  const body = el("tbody");
  body.append(...rows.map((row) => el("tr", {}, row.map((value, i) => cell(i ? "td" : "th", value, i)))));
  return el("table", { class: properties.class }, el("thead", {}, head), body);
}

const scroll = (label, child, more = "") => el("div", { class: `scroll ${more}`, tabindex: 0, role: "region", "aria-label": label }, child);

const number = (value, digits) =>
  typeof value === "number" ? value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits })
    : value === null || value === undefined ? "–" : String(value);
const short = (value) => (typeof value === "number" ? String(Number(value.toPrecision(7))) : value === null || value === undefined ? "–" : String(value));
const percent = (value) => (typeof value === "number" ? `${number(value * 100, value < 0.1 ? 1 : 0)} %` : "–");

function duration(seconds) {
  if (!(seconds > 0)) return "0";
  if (seconds < 90) return `${number(seconds, seconds < 10 ? 1 : 0)} s`;
  if (seconds < 5400) return `${number(seconds / 60, 1)} min`;
  return `${number(seconds / 3600, 1)} h`;
}

const date = (milliseconds) => new Date(milliseconds).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });

// Radio buttons or check boxes in a row: choices are [value, text]; `chosen` holds values; `changed` gets the new ones.
function choices(title, type, options, chosen, changed) {
  const name = `choice-${title.replaceAll(/\W/g, "-")}`;
  const inputs = options.map(([value, text]) => {
    const input = el("input", { type, name, value, checked: chosen.includes(value) });
    return el("label", {}, input, el("span", {}, text));
  });
  const set = el("fieldset", { class: "choices" }, title && el("legend", {}, title), inputs);
  set.addEventListener("change", () => changed([...set.querySelectorAll("input:checked")].map((input) => input.value)));
  return set;
}

// What a script element holds: base64 of gzip.
async function unpacked(id) {
  const packed = byId(id).textContent;
  byId(id).remove();
  const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(packed) : Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
}
