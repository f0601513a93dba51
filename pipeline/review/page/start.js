// Unpacks what the page holds, and shows it: what needs no chart first.

// From a blob the browser compiles it beside what the page does meanwhile.
async function runLibrary() {
  const address = URL.createObjectURL(new Blob([await (await unpacked("plotly")).blob()], { type: "text/javascript" }));
  const library = el("script", { src: address });
  library.nonce = document.querySelector("script[nonce]").nonce;
  const loaded = new Promise((good, bad) => { library.onload = good; library.onerror = () => bad(new Error("Plotly did not start")); });
  document.head.append(library);
  await loaded;
  URL.revokeObjectURL(address);
}

async function start() {
  const library = runLibrary();
  const runBlocks = [...document.querySelectorAll("script[id^=run-]")].map((block) => block.id);
  const [shared, pictures, ...runs] = (await Promise.all(["shared", "pictures", ...runBlocks].map(async (id) => (await unpacked(id)).json())));
  runs.forEach(unfold);
  if (runs.length === 1) document.querySelector("h1").textContent = runs[0].name;
  const about = byId("about");
  about.textContent = `${runs.length} run${runs.length === 1 ? "" : "s"}, as of ${date(shared.created)}. This page is one file: it loads nothing.`;
  if (shared.mlflow) about.append(" In MLflow: ", el("a", { href: shared.mlflow, rel: "noreferrer" }, shared.mlflow));
  showRuns(runs);
  showCurves(runs);
  showTime(runs);
  showEvaluations(shared.evaluations, pictures);
  showConfiguration(runs, shared.differences, shared.configured);
  showLineage(shared.lineage);
  await library;
  refresh();
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  byId("about").textContent = typeof DecompressionStream === "undefined"
    ? "This browser is too old to open the page: it needs one of 2023 or later." : `The page could not be opened: ${error.message}`;
});
