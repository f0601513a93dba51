// What differs between the configurations, and nothing else.

function showConfiguration(runs, differences, configured) {
  if (runs.length < 2) return;
  const keys = Object.keys(differences);
  const without = runs.filter((_, i) => !configured[i]).map((run) => run.name);
  const body = keys.length
    ? scroll("differences between the configurations", table(
      [{ text: "key" }, ...runs.map((run, i) => ({ text: runLabel(run, i) }))],
      keys.map((name) => [name, ...differences[name].map((text) => {
        const same = differences[name].filter((other) => other === text).length;
        return { text, class: same * 2 <= runs.length && runs.length > 2 ? "wrap differs" : "wrap" };
      })]), { class: "first-stays" }), "tall")
    : el("p", { class: "note" }, "The configurations are the same, but for the names.");
  section("configuration", "Configuration", el("div", { class: "card" },
    el("p", { class: "note" }, "Keys whose values differ; all others are the same in all runs.", runs.length > 2 && " Bold: what few runs have."), body,
    without.length > 0 && el("p", { class: "note" }, `Without a readable config.yaml: ${without.join(", ")}.`)));
}
