// What differs between the configurations, and nothing else.

function showConfiguration(runs, differences, configured) {
  if (runs.length < 2) return;
  const keys = Object.keys(differences);
  const without = runs.filter((_, i) => !configured[i]).map((run) => run.name);
  const body = keys.length
    ? scroll("differences between the configurations", table(
      [{ text: "key" }, ...runs.map((run, i) => ({ text: runLabel(run, i) }))],
      keys.map((name) => {
        const values = differences[name], count = (text) => values.filter((other) => other === text).length;
        const usual = values.find((text) => count(text) * 2 > runs.length);
        return [name, ...values.map((text) => ({ text, class: usual !== undefined && text !== usual ? "wrap differs" : "wrap" }))];
      }), { class: "first-stays" }), "tall")
    : el("p", { class: "note" }, "The configurations are the same, but for the names.");
  section("configuration", "Configuration", el("div", { class: "card" },
    el("p", { class: "note" }, "Keys whose values differ; all others are the same in all runs.", runs.length > 2 && " Bold: what is not as in most."), body,
    without.length > 0 && el("p", { class: "note" }, `Without a readable config.yaml: ${without.join(", ")}.`)));
}
