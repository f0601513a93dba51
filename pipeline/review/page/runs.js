// The runs, and which of them the charts show.

const shown = new Set();

function runLabel(run, i, input) {
  const swatch = el("span", { class: "swatch", style: { "border-top-color": colourOf(i), "border-top-style": dashOf(i) === "solid" ? "solid" : dashOf(i) === "dot" ? "dotted" : "dashed" } });
  return el(input ? "label" : "span", { class: "run", title: run.name }, input, swatch, el("span", {}, run.name));
}

const twoLines = (first, second) => el("span", {}, first, el("span", { class: "second" }, second));

function faultsOf(run) {
  const names = { bad_samples: "bad images", skipped_steps: "skipped", rewinds: "rewinds", checkpoints_failed: "unsaved" };
  const told = Object.entries(names).map(([key, name]) => [run.last[key], name]);
  told.push([run.timeline.events.filter((event) => event[2] === "not-finite").length, "not finite"]);
  if (run.damaged) told.push([run.damaged, "lines unread"]);
  return told.filter(([count]) => count > 0).map(([count, name]) => `${number(count, 0)} ${name}`).join(", ");
}

function showRuns(runs) {
  runs.forEach((_, i) => shown.add(i));
  const scores = new Set(runs.map((run) => run.score_name)), one = scores.size === 1;
  const score = (run, value) => (one || typeof value !== "number" ? number(value, 2) : twoLines(number(value, 2), run.score_name));
  const heads = [["run"], [`${one ? [...scores][0] : "score"} %`, 1], ["best", 1], ["loss", 1], ["images/s", 1], ["data wait", 1], ["running", 1], ["stage"], ["state"], ["faults"], ["MLflow"]];
  const rows = runs.map((run, i) => {
    const input = el("input", { type: "checkbox", checked: true, "aria-label": `show ${run.name}`, onchange: (event) => {
      if (event.target.checked) shown.add(i); else shown.delete(i);
      refresh();
    } });
    const spent = run.timeline.spent;
    const faults = faultsOf(run);
    return [
      runLabel(run, i, input), score(run, run.score), score(run, run.best_score), number(run.last.loss, 4),
      number(run.images_per_second, 0), percent(run.data_share), duration(spent.training + spent.data + spent.evaluation + spent.other),
      twoLines(run.stage, run.model),
      twoLines(run.state, `step ${number(run.step, 0)}${run.steps_of_all && run.steps_of_all !== run.step ? ` of ${number(run.steps_of_all, 0)}` : ""}`),
      faults ? { text: faults, class: "bad wrap" } : "none",
      run.mlflow ? el("a", { href: run.mlflow, rel: "noreferrer", title: run.mlflow.startsWith("http://127.0.0.1:") ? "where `make review` starts MLflow" : run.mlflow }, "open") : "–",
    ];
  });
  const made = table(heads.map(([text, number]) => ({ text, number })), rows, { class: "first-stays" });
  const all = (checked) => el("button", { type: "button", class: "plain", onclick: () => {
    made.querySelectorAll("input").forEach((input, i) => { input.checked = checked; if (checked) shown.add(i); else shown.delete(i); });
    refresh();
  } }, checked ? "all" : "none");
  const boxes = runs.length > 3 && el("div", { class: "controls", style: { margin: ".6rem 0 0" } }, el("span", { class: "muted" }, "show"), all(true), all(false));
  section("runs", "Runs", el("div", { class: "card" }, scroll("the runs", made, "tall"), boxes));
}
