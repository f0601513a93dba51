// Unpacks what the page holds, and shows it: what needs no chart first.

async function start() {
  const runBlocks = [...document.querySelectorAll("script[id^=run-]")].map((block) => block.id);
  const [shared, pictures, ...runs] = (await Promise.all(["shared", "pictures", ...runBlocks].map(unpack))).map((text) => JSON.parse(text));
  runs.forEach(unfold);
  const about = byId("about");
  about.textContent = `${runs.length} run${runs.length === 1 ? "" : "s"}, as of ${date(shared.created)}. This page is one file: it loads nothing.`;
  if (shared.mlflow) about.append(" In MLflow: ", el("a", { href: shared.mlflow, rel: "noreferrer" }, shared.mlflow));
  showRuns(runs);
  showCurves(runs);
  showTime(runs);
  showEvaluations(shared.evaluations, pictures);
  showConfiguration(runs, shared.differences, shared.configured);
  showLineage(shared.lineage);
  const library = document.createElement("script");
  library.nonce = document.currentScript?.nonce || document.querySelector("script[nonce]").nonce;
  library.textContent = await unpack("plotly");
  document.head.append(library);
  refresh();
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  byId("about").textContent = typeof DecompressionStream === "undefined"
    ? "This browser is too old to open the page: it needs one of 2023 or later." : `The page could not be opened: ${error.message}`;
});
