// Where everything came from: boxes, and lines between them; a box opens what is known of it.

const KIND_COLOURS = { archive: "#7d8894", "data set": "#2ca46a", pretrain: "#3b7ddd", finetune: "#8f6bd1", adapt: "#1fa5b8", checkpoint: "#e08214", weights: "#e08214", evaluation: "#d565ab", export: "#d2505c" };

function showLineage({ nodes, edges }) {
  if (!nodes.length) return;
  const svgName = "http://www.w3.org/2000/svg";
  const lines = document.createElementNS(svgName, "svg");
  lines.setAttribute("aria-hidden", "true");
  const details = el("div", { class: "details", id: "lineage-details", "aria-live": "polite", hidden: true });
  const boxes = new Map();
  const open = (node) => {
    for (const [id, box] of boxes) box.setAttribute("aria-expanded", String(id === node.id));
    const near = (from, to, words) => {
      const ids = edges.filter((edge) => edge[from] === node.id).map((edge) => edge[to]);
      return ids.length ? [el("dt", {}, words), el("dd", {}, ids.map((id) => nodes.find((each) => each.id === id).title).join(", "))] : [];
    };
    details.replaceChildren(el("h3", {}, `${node.kind}: ${node.title}`),
      el("dl", {}, node.details.flatMap(([what, value]) => [el("dt", {}, what), el("dd", {}, value)]), near(1, 0, "made from"), near(0, 1, "went into")));
    details.hidden = false;
    connect(node.id);
  };
  const drawing = el("div", { class: "lineage" }, lines);
  const columns = Math.max(...nodes.map((node) => node.level)) + 1;
  for (let level = 0; level < columns; level += 1) {
    drawing.append(el("div", { class: "level" }, nodes.filter((node) => node.level === level).map((node) => {
      const box = el("button", { type: "button", class: "box", "aria-expanded": "false", "aria-controls": "lineage-details", style: { "--kind": KIND_COLOURS[node.kind] ?? "var(--muted)" }, onclick: () => open(node) },
        el("span", { class: "kind" }, node.kind), el("span", { class: "title" }, node.title), node.about && el("span", { class: "about" }, node.about));
      boxes.set(node.id, box);
      return box;
    })));
  }
  const related = (id) => { // all that it came from, and all that came from it
    const found = new Set([id]);
    for (const [from, to] of [[0, 1], [1, 0]]) {
      const queue = [id];
      while (queue.length) {
        const now = queue.pop();
        for (const edge of edges) if (edge[from] === now && !found.has(edge[to])) { found.add(edge[to]); queue.push(edge[to]); }
      }
    }
    return found;
  };
  function connect(chosen) {
    const ground = drawing.getBoundingClientRect(), tall = getComputedStyle(drawing).flexDirection === "column", on = chosen ? related(chosen) : new Set();
    lines.setAttribute("width", ground.width);
    lines.setAttribute("height", ground.height);
    lines.replaceChildren(...edges.map(([from, to]) => {
      const one = boxes.get(from).getBoundingClientRect(), other = boxes.get(to).getBoundingClientRect(), path = document.createElementNS(svgName, "path");
      const [x1, y1] = tall ? [one.left + one.width / 2, one.bottom] : [one.right, one.top + one.height / 2];
      const [x2, y2] = tall ? [other.left + other.width / 2, other.top] : [other.left, other.top + other.height / 2];
      const [a, b, c, d] = [x1 - ground.left, y1 - ground.top, x2 - ground.left, y2 - ground.top];
      path.setAttribute("d", tall ? `M${a} ${b} C${a} ${(b + d) / 2} ${c} ${(b + d) / 2} ${c} ${d}` : `M${a} ${b} C${c - 26} ${b} ${c - 26} ${d} ${c} ${d}`);
      if (on.has(from) && on.has(to)) path.setAttribute("class", "on");
      return path;
    }));
    drawing.dataset.chosen = chosen ?? "";
  }
  section("lineage", "Lineage", el("div", { class: "card" }, el("p", { class: "note" }, "From the archive to what came of it. A box opens what is known of it: ledger counts, dataset_id, checkpoints."), scroll("lineage", drawing, "high"), details));
  new ResizeObserver(() => connect(drawing.dataset.chosen || null)).observe(drawing);
  connect(null);
}
