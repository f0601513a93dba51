// What `evaluate-segment` and `evaluate-detect` measured: scores, precision over recall, classes, the best and worst images.

function stripOf(which, picture, pictures, kind) {
  const uri = pictures[`${which}/${picture.file}`], name = picture.name || picture.file;
  const told = { segment: "the image, its mask, what was found", detect: "what is true, what was found" }[kind];
  const key = picture.classes.flatMap(([text, colour]) => [" ", el("span", { class: "key" }, el("i", { style: { background: colour } }), text)]);
  return el("figure", { class: "strip" }, el("div", { class: "frame" }, uri ? el("img", { src: uri, alt: `${name}: ${told}`, loading: "lazy" }) : "not in this page"),
    el("figcaption", {}, el("b", {}, `${number(picture.score, 1)} %`), ` ${name}`, key));
}

function showDense(place, evaluations, chosen, pictures) {
  const evaluation = evaluations[chosen], { data, protocol, checkpoint } = evaluation;
  const asked = Object.entries(protocol).filter(([, value]) => value !== false && value !== null).map(([key, value]) => (value === true ? key : `${key.replaceAll("_", " ")} ${value}`));
  const about = [weightsOf(checkpoint), `${data.name ?? data.path ?? ""}`, ...asked, evaluation.created && date(Date.parse(evaluation.created))];
  const card = el("div", { class: "card" }, el("p", { class: "note" }, about.filter(Boolean).join(" · ")),
    el("div", { class: "figures" }, evaluation.figures.map(([text, value, digits, share]) => figure(`${number(value, digits)}${share ? " %" : ""}`, text))));
  const made = evaluation.curves.map((curve) => chart(`Precision over recall, ${curve.title}`, () => ({
    data: Object.entries(curve.lines).map(([name, values], i) => ({ type: "scatter", mode: "lines", x: curve.recall, y: values, name, line: { color: colourOf(i), width: 1.8 }, hovertemplate: "recall %{x:.2f}, precision %{y:.3f}" })),
    layout: { showlegend: true, legend: { orientation: "h", y: 1.12 }, xaxis: { range: [0, 1], title: { text: "recall" }, fixedrange: true }, yaxis: { range: [0, 1.02], title: { text: "precision" }, fixedrange: true } },
  })));
  const columns = evaluation.columns.map(([head, digits], i) => (digits === null ? [head, i] : [head, i, digits]));
  const told = { segment: "Best and worst images: the image, its mask, what was found, and its IoU", detect: "Best and worst images: what is true, what was found, and its AP" }[evaluation.kind];
  const strips = evaluation.pictures.length > 0 && el("div", { class: "card", id: "predictions" }, el("h3", {}, told), el("div", { class: "strips" }, evaluation.pictures.map((picture) => stripOf(chosen, picture, pictures, evaluation.kind))));
  place.replaceChildren(...[card, made.length > 0 && el("div", { class: "grid" }, made.map((each) => each.node)), strips, evaluation.classes.length > 0 && classTable(evaluation, columns, 1, "name")].filter(Boolean));
  return made;
}
