// What `evaluate` measured: scores, calibration, classes, worst pairs, pictures.

function pictureOf(which, picture, pictures, rows) {
  const uri = pictures[`${which}/${picture.file}`];
  const right = picture.correct === true;
  const frame = el("div", { class: "frame" }, uri ? el("img", { src: uri, alt: picture.name ?? "", loading: "lazy" }) : "not in this page");
  if (!rows) return el("figure", { class: "picture", title: picture.predictions?.map((each) => `${each.name} ${percent(each.probability)}`).join("\n") }, frame);
  const guesses = picture.predictions.slice(0, rows).map((each) => el("div", { class: right && each.wnid === picture.wnid ? "guess right" : "guess" },
    el("i", { style: { width: `${Math.min(Math.max((each.probability ?? 0) * 100, 0), 100)}%` } }), el("span", { title: each.name }, each.name ?? "–"), el("span", {}, percent(each.probability))));
  return el("figure", { class: "picture" }, frame, el("figcaption", {}, el("div", { class: right ? "truth" : "truth bad" }, `${right ? "✓" : "✗"} ${picture.name ?? picture.source ?? ""}`), guesses));
}

// Columns of a table of classes: its head, the place in a row, the digits of a number. The first is the row's head.
const CLASS_COLUMNS = [["class", 1], ["images", 2, 0], ["top-1 %", 3, 1], ["top-5 %", 4, 1], ["precision %", 5, 1], ["mostly taken for", 6]];

// `sorted`: the column it is sorted by at first, ascending.
function classTable(evaluation, columns, sorted, searched) {
  let order = [sorted, 1], word = "";
  const body = el("tbody"), count = el("p", { class: "note" });
  const fill = () => {
    const [column, sign] = order, key = columns[column][1];
    const rows = evaluation.classes.filter((row) => !word || row.filter((each) => typeof each === "string").join(" ").toLowerCase().includes(word));
    rows.sort((one, other) => {
      const [a, b] = [one[key], other[key]];
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (typeof a === "string" ? a.localeCompare(b) : a - b);
    });
    const cell = (row, [, place, digits]) => (digits === undefined ? el("td", {}, row[place] || "–") : el("td", { class: "number" }, number(row[place], digits)));
    body.replaceChildren(...rows.slice(0, 300).map((row) => el("tr", {}, el("th", { scope: "row", title: row[0] }, row[columns[0][1]] || row[0]), columns.slice(1).map((column) => cell(row, column)))));
    const left = evaluation.class_count - evaluation.classes.length;
    count.textContent = `${number(Math.min(rows.length, 300), 0)} of ${number(evaluation.class_count, 0)} classes${left > 0 ? `; the page has the worst and the best ${number(evaluation.classes.length, 0)}, per_class.csv has all` : ""}.`;
    head.querySelectorAll("th").forEach((each, i) => each.setAttribute("aria-sort", i === column ? (sign > 0 ? "ascending" : "descending") : "none"));
    head.querySelectorAll("button").forEach((each, i) => { each.textContent = columns[i][0] + (i === column ? (sign > 0 ? " ↑" : " ↓") : ""); });
  };
  const head = el("tr", {}, columns.map(([text, , digits], i) => el("th", { scope: "col", class: digits !== undefined && "number" }, el("button", { type: "button", onclick: () => { order = [i, order[0] === i ? -order[1] : 1]; fill(); } }, text))));
  const search = el("input", { type: "search", placeholder: searched, "aria-label": "classes with this in their name", oninput: () => { word = search.value.toLowerCase(); fill(); } });
  fill();
  return el("div", { class: "card", id: "classes" }, el("div", { class: "controls" }, el("h3", {}, "Classes"), search), scroll("classes", el("table", { class: "first-stays" }, el("thead", {}, head), body), "tall"), count);
}

const weightsOf = (checkpoint) => `${checkpoint.weights === "ema" ? "EMA weights" : checkpoint.weights === "raw" ? "raw weights" : ""} of step ${number(checkpoint.step, 0)}`;
const figure = (value, text) => el("div", {}, el("b", {}, value), el("span", {}, text));

function showEvaluation(place, evaluations, chosen, pictures) {
  const evaluation = evaluations[chosen], { results, data, protocol, checkpoint } = evaluation, made = [];
  const about = [weightsOf(checkpoint), `${data.name ?? data.path ?? ""}`, protocol.resolution && `${protocol.resolution} px, ${protocol.resize ?? ""} ${protocol.crop_ratio ?? ""}`, protocol.precision, evaluation.created && date(Date.parse(evaluation.created))];
  const card = el("div", { class: "card" }, el("p", { class: "note" }, about.filter(Boolean).join(" · ")), el("div", { class: "figures" },
    figure(`${number(results.top1_percent, 2)} %`, "top-1"), figure(`${number(results.top5_percent, 2)} %`, "top-5"), figure(number(results.loss, 3), "loss"), figure(number(results.ece, 3), "calibration error"),
    figure(`${number(results.tied_top1_percent, 2)} %`, "tied at the top"), figure(number(results.images, 0), "images"), figure(number(results.images_per_second, 0), "images/s"),
    data.unmatched > 0 && figure(number(data.unmatched, 0), "classes without an output"), data.left_out > 0 && figure(number(data.left_out, 0), "images left out")));

  const bins = evaluation.reliability.filter((bin) => bin.images > 0);
  if (bins.length) made.push(chart("Calibration", () => ({
    data: [
      { type: "bar", x: bins.map((bin) => (bin.low + bin.high) / 2), y: bins.map((bin) => bin.accuracy), width: bins.map((bin) => (bin.high - bin.low) * 0.92), marker: { color: "#3b7ddd" },
        customdata: bins.map((bin) => [number(bin.images, 0), short(bin.confidence)]), hovertemplate: "accuracy %{y:.3f}, confidence %{customdata[1]}<br>%{customdata[0]} images<extra></extra>" },
      { type: "scatter", mode: "lines", x: [0, 1], y: [0, 1], line: { dash: "dot", color: "#8a93a0", width: 1.5 }, hoverinfo: "skip" }],
    layout: { xaxis: { range: [0, 1], title: { text: "confidence" }, fixedrange: true }, yaxis: { range: [0, 1.02], title: { text: "accuracy" }, fixedrange: true } },
  })));
  if (evaluation.histogram.some(Boolean)) made.push(chart("Top-1 over classes", () => ({
    data: [{ type: "bar", x: evaluation.histogram.map((_, i) => i * 5 + 2.5), y: evaluation.histogram, width: 4.6, marker: { color: "#2ca46a" }, customdata: evaluation.histogram.map((_, i) => `${i * 5} to ${i * 5 + 5} %`), hovertemplate: "%{y} classes with %{customdata}<extra></extra>" }],
    layout: { xaxis: { range: [0, 100], title: { text: "top-1 of the class (%)" }, fixedrange: true }, yaxis: { title: { text: "classes" }, rangemode: "tozero", fixedrange: true } },
  })));
  const confusion = evaluation.confusion;
  if (confusion) {
    const names = confusion.groups.map((group) => plain(cut(group.name ?? group.wnid ?? "", innerWidth < 700 ? 12 : 24))), count = names.length;
    const shares = confusion.matrix.map((row) => { const sum = row.reduce((total, each) => total + each, 0) || 1; return row.map((each) => (each / sum) * 100); });
    const ticks = { tickmode: "array", tickvals: names.map((_, i) => i), ticktext: names, fixedrange: true, showgrid: false, zeroline: false };
    made.push(chart(confusion.by === "wordnet" ? "Confusion, rolled up the WordNet tree" : "Confusion", () => ({
      data: [{ type: "heatmap", z: shares, customdata: confusion.matrix, text: shares.map((row, i) => row.map((_, j) => `${names[i]} taken for ${names[j]}`)), hovertemplate: "%{text}<br>%{customdata} images, %{z:.1f} %<extra></extra>",
        colorscale: dark.matches ? [[0, "#1a1e24"], [0.02, "#22344f"], [1, "#7fb0ff"]] : [[0, "#ffffff"], [0.02, "#dfeafb"], [1, "#1f5fd0"]], zmin: 0, zmax: 100, xgap: 1, ygap: 1, showscale: false }],
      layout: { xaxis: { ...ticks, tickangle: -45, title: { text: "predicted" } }, yaxis: { ...ticks, autorange: "reversed", title: { text: "class" } } },
    }), { height: Math.min(Math.max(290, 140 + count * 22), 720) }));
  }
  const pairs = evaluation.pairs.length > 0 && el("div", { class: "card", id: "pairs" }, el("h3", {}, "Worst pairs"), evaluation.pairs.map((pair) => el("div", { class: "pair" },
    el("div", {}, el("div", {}, el("b", {}, pair.name ?? pair.wnid), " taken for ", el("b", { class: "bad" }, pair.predicted_name ?? pair.predicted_wnid)), el("div", { class: "note" }, `${number(pair.images, 0)} images, ${number(pair.share_percent, 1)} % of the class`)),
    el("div", { class: "pictures" }, pair.pictures.map((picture) => pictureOf(chosen, picture, pictures, 0))))));
  const first = innerWidth < 700 ? 8 : 14, drawn = evaluation.samples.map((picture) => pictureOf(chosen, picture, pictures, 3));
  drawn.slice(first).forEach((each) => { each.hidden = true; });
  const more = drawn.length > first && el("button", { type: "button", class: "plain", onclick: () => { drawn.forEach((each) => { each.hidden = false; }); more.remove(); } }, `all ${drawn.length}`);
  const samples = drawn.length > 0 && el("div", { class: "card", id: "samples" }, el("div", { class: "controls" }, el("h3", {}, "Sample predictions"), more), el("div", { class: "pictures" }, drawn));
  place.replaceChildren(...[card, el("div", { class: "grid" }, made.map((each) => each.node)), evaluation.classes.length > 0 && classTable(evaluation, CLASS_COLUMNS, 2, "name or WordNet id"), pairs, samples].filter(Boolean));
  return made;
}

function showEvaluations(evaluations, pictures) {
  if (!evaluations.length) return;
  const place = el("div", { id: "evaluation" });
  const classified = evaluations.every((each) => each.kind === "classify");
  const scores = classified ? [["top-1 %", 1], ["top-5 %", 1], ["calibration", 1]] : [["score %", 1], ["of"]];
  const heads = [["evaluation"], ["run"], ["data"], ["weights"], ["step", 1], ...scores, ["images", 1]];
  const rows = evaluations.map((each, i) => [el("button", { type: "button", class: "plain", onclick: () => choose(i) }, each.name), each.run, each.data.name ?? each.data.path ?? "–", each.checkpoint.weights, number(each.checkpoint.step, 0),
    ...(classified ? [number(each.score[1], 2), number(each.results.top5_percent, 2), number(each.results.ece, 3)] : [number(each.score[1], 2), each.score[0]]), number(each.results.images ?? each.results.val_samples, 0)]);
  const list = table(heads.map(([text, number]) => ({ text, number })), rows, { class: "first-stays" });
  let made = [];
  const choose = (chosen) => {
    remove(made);
    list.querySelectorAll("tbody tr").forEach((row, i) => { row.className = i === chosen ? "chosen" : ""; row.querySelector("button").setAttribute("aria-pressed", String(i === chosen)); });
    made = (evaluations[chosen].kind === "classify" ? showEvaluation : showDense)(place, evaluations, chosen, pictures);
  };
  section("evaluations", "Evaluations", evaluations.length > 1 && el("div", { class: "card" }, scroll("evaluations", list, "tall")), place);
  choose(evaluations.length - 1);
}
