// What the hours were spent on, and what happened when.

const PARTS = { training: ["training", "#3b7ddd"], data: ["waiting for data", "#e08214"], evaluation: ["evaluation", "#2ca46a"], other: ["checkpoints, start, other", "#8f6bd1"], stopped: ["stopped, or done again", "#9aa3ad"] };
const KINDS = { skipped: ["step left out", "triangle-down", "#e08214"], rewind: ["rewind", "triangle-left", "#8f6bd1"], resumed: ["resumed", "triangle-right", "#2ca46a"], stopped: ["stopped", "square", "#7d8894"], "not-finite": ["not finite", "x", "#d2505c"], other: ["other", "circle", "#1fa5b8"] };

function legend(entries) {
  return el("div", { class: "controls", style: { margin: "0 .25rem .3rem" } }, entries.map(([name, colour]) =>
    el("span", { style: { display: "inline-flex", gap: ".4rem", "align-items": "center" } }, el("span", { style: { width: ".75rem", height: ".75rem", background: colour, "border-radius": "3px" } }), name)));
}

function showTime(runs) {
  const timed = runs.map((run, i) => [run, i]).filter(([run]) => run.lines || run.timeline.events.length);
  if (!timed.length) return;
  const drawn = () => timed.filter(([, i]) => shown.has(i)).reverse();
  const label = ([run]) => plain(middle(run.name, innerWidth < 700 ? 16 : 28));
  const height = Math.max(150, 70 + 30 * timed.length);
  // Two runs may have the same name: places are numbers, and the names are written beside them.
  const names = () => ({ tickmode: "array", tickvals: drawn().map((_, place) => place), ticktext: drawn().map(label), range: [-0.7, drawn().length - 0.3], fixedrange: true, showgrid: false, zeroline: false });

  const most = Math.max(...timed.map(([run]) => Object.values(run.timeline.spent).reduce((sum, part) => sum + part, 0)));
  const [unit, seconds] = most > 5400 ? ["hours", 3600] : most > 90 ? ["minutes", 60] : ["seconds", 1];
  const bars = chart("Where the time went", () => ({
    data: Object.entries(PARTS).map(([part, [name, color]]) => ({
      type: "bar", orientation: "h", name, marker: { color }, y: drawn().map((_, place) => place), x: drawn().map(([run]) => run.timeline.spent[part] / seconds),
      customdata: drawn().map(([run]) => duration(run.timeline.spent[part])), hovertemplate: `${name}: %{customdata}<extra></extra>`,
    })),
    layout: { barmode: "stack", bargap: 0.35, xaxis: { title: { text: unit }, fixedrange: true, nticks: 7 }, yaxis: names() },
  }), { height });
  bars.plot.before(legend(Object.values(PARTS)));

  const begins = timed.map(([run]) => run.timeline.running[0]?.[0]).filter(Boolean);
  const lengths = timed.map(([run]) => (run.timeline.running.at(-1)?.[1] ?? 0) - (run.timeline.running[0]?.[0] ?? 0));
  let since = Math.max(...begins) - Math.min(...begins) > 3 * Math.max(...lengths) ? "hours" : "date";
  const when = (run, time) => (since === "date" ? new Date(time).toISOString() : (time - (run.timeline.running[0]?.[0] ?? run.timeline.events[0]?.[0] ?? 0)) / 3.6e6);
  const line = chart("Time line", () => {
    const data = drawn().map(([run, i], place) => {
      const points = run.timeline.running.flatMap(([begin, end]) => [begin, end, null]);
      return {
        type: "scatter", mode: "lines", x: points.map((time) => (time === null ? null : when(run, time))), y: points.map((time) => (time === null ? null : place)),
        line: { color: colourOf(timed.length > 1 ? i : 0), width: 12 }, opacity: 0.55, hovertemplate: `${plain(run.name).replaceAll("%", "%&#8203;")}<extra></extra>`,
      };
    });
    for (const [kind, [name, symbol, color]] of Object.entries(KINDS)) {
      const events = drawn().flatMap(([run], place) => run.timeline.events.filter((event) => event[2] === kind).map((event) => [run, place, event]));
      if (!events.length) continue;
      data.push({
        type: "scatter", mode: "markers", name, x: events.map(([run, , event]) => when(run, event[0])), y: events.map(([, place]) => place),
        marker: { symbol, color, size: 11, line: { width: 1, color: getComputedStyle(document.documentElement).getPropertyValue("--card").trim() } },
        text: events.map(([, , event]) => `step ${number(event[1], 0)}<br>${plain(cut(event[3], 90))}`), hovertemplate: "%{text}<extra></extra>",
        meta: { name, read: (point) => `${events[point][0].name}, step ${number(events[point][2][1], 0)}: ${events[point][2][3]}` },
      });
    }
    return { data, layout: { xaxis: since === "date" ? { type: "date", nticks: 6 } : { type: "linear", title: { text: "hours since the run began" }, nticks: 7 }, yaxis: names() } };
  }, { zooms: true, height });
  const kinds = Object.entries(KINDS).filter(([kind]) => timed.some(([run]) => run.timeline.events.some((event) => event[2] === kind)));
  if (kinds.length) line.plot.before(legend(kinds.map(([, [name, , colour]]) => [name, colour])));
  line.plot.before(el("div", { class: "controls", style: { margin: ".2rem .25rem" } }, choices("time", "radio", [["date", "date"], ["hours", "hours since the start"]], [since], ([chosen]) => {
    since = chosen;
    line.zoomed = false;
    line.plot.layout && Plotly.purge(line.plot);
    line.heard = false;
    refresh([line]);
  })));

  const events = timed.flatMap(([run, i]) => run.timeline.events.map((event) => [event[0], runLabel(run, i), number(event[1], 0), KINDS[event[2]]?.[0] ?? event[2], event[3]]));
  events.sort((one, other) => one[0] - other[0]);
  const more = runs.reduce((sum, run) => sum + run.timeline.left_out, 0);
  const list = events.length
    ? scroll("events", table([{ text: "run" }, { text: "when" }, { text: "step", number: true }, { text: "what" }, { text: "in its words" }],
      events.map(([time, run, step, kind, text]) => [run, { text: date(time), class: "when" }, step, { text: kind, class: "when" }, { text, class: "text" }])), "tall")
    : el("p", { class: "note" }, "Nothing but steps: no step was left out, nothing was stopped or resumed.");
  section("time", "Time", bars.node, line.node,
    el("div", { class: "card", id: "events" }, el("h3", {}, "What happened"), list, more > 0 && el("p", { class: "note" }, `${number(more, 0)} older events are in events.txt of the runs alone.`)));
}
