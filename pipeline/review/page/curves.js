// Curves of several runs over each other.

const FIRST = ["loss", "top1", "miou", "box_ap", "mask_ap", "lr", "grad_norm", "images_per_second", "data_wait"];
const ORDER = ["loss", "val_loss", "top1", "top1_model", "top5", "miou", "miou_model", "macc", "pixel_accuracy", "box_ap", "box_ap_model", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75", "lr", "grad_norm", "images_per_second", "mfu", "data_wait", "data_wait_max", "memory_gb", "checkpoint_stall"];
const LABELS = {
  loss: "training loss", val_loss: "validation loss", top1: "top-1 (%)", top1_model: "top-1 without EMA (%)", top5: "top-5 (%)",
  miou: "mIoU (%)", miou_model: "mIoU without EMA (%)", macc: "class accuracy (%)", pixel_accuracy: "pixels (%)", box_ap: "box AP (%)", box_ap_model: "box AP without EMA (%)",
  box_ap50: "box AP at IoU 0.5 (%)", box_ap75: "box AP at IoU 0.75 (%)", mask_ap: "mask AP (%)", mask_ap50: "mask AP at IoU 0.5 (%)", mask_ap75: "mask AP at IoU 0.75 (%)", lr: "learning rate",
  grad_norm: "gradient norm", images_per_second: "images/s", mfu: "MFU", data_wait: "waiting for data (share)", data_wait_max: "waiting for data, slowest rank (share)",
  memory_gb: "memory (GB)", checkpoint_stall: "checkpoint stall (s)", skipped_steps: "skipped steps", bad_samples: "bad images",
};
const view = { x: "step", smoothing: 0, log: false, metrics: [] };
const AXES = { step: "step", images: "images", hours: "hours of running" };

const finite = (value) => (typeof value === "number" ? value : null);
const sums = (differences) => { let sum = 0; return differences.map((each) => (sum += each)); };

// Whole numbers come as differences; `at` of a curve are places in the run's steps and ms.
function unfold(run) {
  run.steps = sums(run.steps);
  run.ms = sums(run.ms);
  for (const curve of Object.values(run.curves)) {
    curve.at = sums(curve.at);
    if (curve.mean_at) curve.mean_at = sums(curve.mean_at);
  }
  return run;
}

function along(run, places) {
  if (view.x === "hours") return places.map((i) => run.ms[i] / 3.6e6);
  const factor = view.x === "images" ? run.batch ?? NaN : 1;
  return places.map((i) => run.steps[i] * factor);
}

// A mean that forgets: over `smoothing` per cent of the run's steps, of every value that was logged.
function smooth(run, curve) {
  const places = curve.mean_at ?? curve.at, values = (curve.means ?? curve.values).map(finite);
  const reach = ((run.steps.at(-1) - run.steps[0]) * view.smoothing) / 100 || 1;
  let weighted = 0, weight = 0, before = run.steps[places[0]];
  return [places, values.map((value, i) => {
    const fade = Math.exp((before - run.steps[places[i]]) / reach);
    before = run.steps[places[i]];
    if (value !== null) { weighted = weighted * fade + value; weight = weight * fade + 1; }
    return weight ? weighted / weight : null;
  })];
}

function traces(runs, metric) {
  const data = [], few = [...shown].length <= 6;
  runs.forEach((run, i) => {
    const curve = run.curves[metric];
    if (!shown.has(i) || !curve) return;
    const x = along(run, curve.at), y = curve.values.map(finite), line = { color: colourOf(i), dash: dashOf(i), width: 1.6 };
    const read = (point) => `${view.x === "hours" ? `${number(x[point], 3)} h` : `${view.x} ${number(x[point], 0)}`}, ${metric} ${short(curve.values[point])}`;
    const marks = x.length < 40 ? "lines+markers" : "lines";
    const name = plain(middle(run.name, 40)), hover = { hovertemplate: "%{y:.7~g}" + (few ? "" : "<br>%{x}") };
    data.push({ type: "scatter", mode: marks, x, y, name, line, marker: { size: 5 }, opacity: view.smoothing ? 0.22 : 1, meta: { name: run.name, read }, ...hover });
    if (view.smoothing && x.length > 2) {
      const [places, values] = smooth(run, curve);
      Object.assign(data.at(-1), { hoverinfo: "skip", hovertemplate: undefined });
      data.push({ type: "scatter", mode: "lines", x: along(run, places), y: values, name, line: { ...line, width: 2.2 }, ...hover });
    }
    const bad = curve.values.map((value, place) => place).filter((place) => typeof curve.values[place] === "string");
    if (bad.length) {
      const near = (place) => { while (place >= 0 && y[place] === null) place -= 1; return place >= 0 ? y[place] : y.find((value) => value !== null) ?? 1; };
      data.push({
        type: "scatter", mode: "markers", x: bad.map((place) => x[place]), y: bad.map(near), name, hovertemplate: "%{text}",
        text: bad.map((place) => `${metric} is ${curve.values[place]}`), marker: { symbol: "x", size: 8, color: colourOf(i) },
      });
    }
  });
  return data;
}

function showCurves(runs) {
  const known = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))];
  const metrics = [...ORDER.filter((metric) => known.includes(metric)), ...known.filter((metric) => !ORDER.includes(metric)).sort()];
  if (!metrics.length) return;
  const first = FIRST.filter((metric) => metrics.includes(metric));
  view.metrics = first.length ? first : metrics.slice(0, 4);
  const grid = el("div", { class: "grid" });
  let made = [];
  const arrange = () => {
    remove(made);
    made = view.metrics.map((metric) => {
      const large = runs.some((run) => run.curves[metric]?.values.some((value) => value >= 1000));
      return chart(LABELS[metric] ?? metric, () => ({ data: traces(runs, metric), layout: {
        hovermode: shown.size <= 6 ? "x unified" : "closest", uirevision: view.x,
        xaxis: { title: { text: AXES[view.x] }, exponentformat: view.x === "hours" ? "none" : "SI", hoverformat: view.x === "hours" ? ".3~f" : ",.0f", nticks: 7 },
        yaxis: { type: view.log ? "log" : "linear", exponentformat: large && !view.log ? "SI" : "power", nticks: 6, hoverformat: ".7~g" },
      } }), { zooms: true });
    });
    grid.replaceChildren(...made.map((each) => each.node));
  };
  const reset = () => made.forEach((each) => { each.zoomed = false; });
  const range = el("input", { type: "range", min: 0, max: 10, step: 0.25, value: 0, id: "smoothing" });
  const said = el("output", { for: "smoothing" }, "off");
  range.addEventListener("input", () => {
    view.smoothing = Number(range.value);
    said.value = view.smoothing ? `${view.smoothing} % of the run` : "off";
    refresh(made);
  });
  const controls = el("div", { class: "controls" },
    choices("x", "radio", Object.keys(AXES).map((x) => [x, x]), ["step"], ([x]) => { view.x = x; reset(); refresh(made); }),
    choices("y", "radio", [["linear", "linear"], ["log", "log"]], ["linear"], ([y]) => { view.log = y === "log"; refresh(made); }),
    el("label", {}, el("span", { class: "muted" }, "smoothing"), range, said));
  const picks = el("div", { class: "controls picks scroll" }, choices("", "checkbox", metrics.map((metric) => [metric, LABELS[metric] ?? metric]), view.metrics, (chosen) => {
    view.metrics = metrics.filter((metric) => chosen.includes(metric));
    arrange();
  }));
  const note = coarse.matches ? "Tap a curve for its values; + and − zoom." : "Drag to zoom, double-click to show all; with the keyboard: arrows read values, + − 0 zoom.";
  section("curves", "Curves", el("div", { class: "card" }, controls, picks, el("p", { class: "note" }, `${note} Of long runs the smallest and the largest value of each stretch are shown, as they were logged.`)), grid);
  arrange();
}
