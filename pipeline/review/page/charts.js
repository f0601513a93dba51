// Charts by Plotly: drawn when they come into view, by mouse, touch and keyboard, in the colours of the page.

const COLOURS = ["#3b7ddd", "#e08214", "#2ca46a", "#d2505c", "#8f6bd1", "#1fa5b8", "#d565ab", "#8a8f1f", "#a9714f", "#7d8894"];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const dark = matchMedia("(prefers-color-scheme: dark)");
const coarse = matchMedia("(pointer: coarse)");
const charts = [];

const colourOf = (i) => COLOURS[i % COLOURS.length];
const dashOf = (i) => DASHES[Math.floor(i / COLOURS.length) % DASHES.length];
// Plotly reads some markup in texts, and %{...} in templates.
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const cut = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
// Runs differ in how their names end, as often as in how they begin.
const middle = (text, length) => (text.length > length ? `${text.slice(0, Math.ceil(length / 2) - 1)}…${text.slice(-Math.floor(length / 2))}` : text);

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const chart = charts.find((each) => each.node === entry.target);
    if (chart) {
      chart.visible = entry.isIntersecting;
      if (chart.visible && chart.stale) draw(chart);
    }
  }
}, { rootMargin: "200px" });

// A chart: describe() returns {data, layout}, and is asked again at each `refresh`. `zooms`: along x, by its buttons.
function chart(title, describe, { zooms = false, height, note } = {}) {
  const plot = el("div", { class: "plot", style: height ? { height: `${height}px` } : {} });
  const reading = el("output", { "aria-live": "polite" });
  const made = { title, describe, plot, reading, zooms, stale: true, visible: false, at: null };
  const buttons = [];
  if (zooms) {
    const button = (text, label, act) => el("button", { type: "button", class: "plain", title: label, "aria-label": `${label}: ${title}`, onclick: act }, text);
    buttons.push(button("+", "zoom in", () => zoom(made, 0.5)), button("−", "zoom out", () => zoom(made, 2)), button("reset", "show all", () => zoom(made, null)));
  }
  const head = el("div", { class: "head" }, el("h3", {}, title), zooms && reading, buttons);
  made.node = el("figure", {
    class: "card chart", tabindex: zooms ? 0 : undefined, onkeydown: zooms && ((event) => onKey(made, event)),
    "aria-label": zooms ? `${title}. Arrow keys read values, plus and minus zoom, 0 shows all.` : title,
  }, head, note && el("p", { class: "note" }, note), plot);
  charts.push(made);
  seen.observe(made.node);
  return made;
}

function refresh(which = charts) {
  for (const each of which) {
    each.stale = true;
    if (each.visible) draw(each);
  }
}

function remove(which) {
  for (const each of which) {
    seen.unobserve(each.node);
    if (each.plot.data) Plotly.purge(each.plot);
    each.node.remove();
    charts.splice(charts.indexOf(each), 1);
  }
}

function draw(each) {
  if (!globalThis.Plotly) return;
  each.stale = false;
  const { data, layout } = each.describe();
  const style = getComputedStyle(document.documentElement);
  const [text, muted, line, card] = ["--text", "--muted", "--line", "--card"].map((name) => style.getPropertyValue(name).trim());
  const axis = (own) => ({
    gridcolor: line, zerolinecolor: line, linecolor: line, tickcolor: line, automargin: true, ...own,
    tickfont: { color: muted, size: 12, ...own?.tickfont }, title: { standoff: 8, ...own?.title, font: { size: 12, color: muted } },
  });
  const kept = each.plot.layout?.xaxis;
  const range = each.zooms && each.zoomed && kept ? { range: kept.range, autorange: false } : {};
  const full = {
    margin: { l: 8, r: 12, t: 10, b: 8 }, paper_bgcolor: card, plot_bgcolor: card, showlegend: false,
    font: { family: style.fontFamily, color: text, size: 13 }, hovermode: "closest", dragmode: coarse.matches || !each.zooms ? false : "zoom",
    hoverlabel: { bgcolor: card, bordercolor: line, font: { color: text, family: style.fontFamily }, align: "left", namelength: 40 },
    ...layout, xaxis: { ...axis(layout.xaxis), ...range }, yaxis: axis(layout.yaxis),
  };
  Plotly.react(each.plot, data, full, { responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "reset" });
  if (!each.heard) {
    each.heard = true;
    each.plot.on("plotly_relayout", (change) => { if ("xaxis.range[0]" in change) each.zoomed = true; else if (change["xaxis.autorange"]) each.zoomed = false; });
    each.plot.on("plotly_hover", (event) => { each.at = { curve: event.points[0].curveNumber, point: event.points[0].pointNumber }; });
  }
}

function zoom(each, factor) {
  const axis = each.plot.layout?.xaxis;
  if (!axis) return;
  if (factor === null) {
    each.zoomed = false;
    Plotly.relayout(each.plot, { "xaxis.autorange": true, "yaxis.autorange": true });
    return;
  }
  const [low, high] = axis.range.map((value) => (axis.type === "date" ? new Date(value).getTime() : Number(value)));
  const trace = each.at && each.plot.data[each.at.curve];
  const value = trace?.x[each.at.point];
  const at = value === undefined ? NaN : axis.type === "date" ? new Date(value).getTime() : Number(value);
  const middle = at >= low && at <= high ? at : (low + high) / 2;
  Plotly.relayout(each.plot, { "xaxis.range[0]": middle - (middle - low) * factor, "xaxis.range[1]": middle + (high - middle) * factor });
}

// Left and right go from value to value, up and down from run to run; what is read stands under the chart.
function onKey(each, event) {
  const act = { "+": () => zoom(each, 0.5), "=": () => zoom(each, 0.5), "-": () => zoom(each, 2), 0: () => zoom(each, null), Escape: () => { Plotly.Fx.unhover(each.plot); each.reading.value = ""; } }[event.key];
  const [along, across] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-Infinity, 0], End: [Infinity, 0] }[event.key] ?? [0, 0];
  if (event.target !== each.node || event.ctrlKey || event.metaKey || event.altKey || (!act && !along && !across)) return;
  event.preventDefault();
  if (act) return void act();
  const readable = (each.plot.data ?? []).map((trace, i) => (trace.meta?.read ? i : -1)).filter((i) => i >= 0);
  if (!readable.length) return;
  const place = readable.indexOf(each.at?.curve);
  const curve = readable[place < 0 ? 0 : (place + across + readable.length) % readable.length];
  const { x, y } = each.plot.data[curve];
  let point = place < 0 ? (along > 0 ? -1 : x.length) : across ? x.findIndex((value) => value >= each.plot.data[each.at.curve].x[each.at.point]) : each.at.point;
  if (across && point < 0) point = x.length - 1;
  point = Math.min(Math.max(point + along, 0), x.length - 1);
  while (along && y[point] === null && point + Math.sign(along) in x) point += Math.sign(along);
  each.at = { curve, point };
  const { name, read } = each.plot.data[curve].meta;
  each.reading.value = each.reading.title = `${name}: ${read(point)}`;
  try { Plotly.Fx.hover(each.plot, [{ curveNumber: curve, pointNumber: point }]); } catch { /* out of the part that is shown */ }
}

dark.addEventListener("change", () => refresh());
