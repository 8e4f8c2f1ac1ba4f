// Learning curves: what is drawn of which numbers, and a chart that a mouse, a finger and the arrow keys can read.

const NATS = "nats per value token";

// Numbers of a run in so many points: each with its last episode and an estimate, or null where there is none.
function points(run, source, count) {
  const episodes = source.isLogged ? run.log.episodes ?? [] : run.steps.last.map((episode) => episode + 1);
  const places = source.isLogged && source.x === "step" ? run.log.step ?? [] : episodes;
  const groups = places.map((x, index) => ({ x, index })).filter(({ x, index }) => x !== null && source.has(run, index));
  const number = Math.min(count, groups.length);
  return Array.from({ length: number }, (_, bin) => {
    const start = Math.floor((bin * groups.length) / number), stop = Math.floor(((bin + 1) * groups.length) / number);
    const part = groups.slice(start, stop);
    return { from: part[0].x, x: part[part.length - 1].x, ...source.estimate(run, part.map(({ index }) => index)) };
  });
}

const fromLedger = (name) => ({
  has: (run, index) => run.steps.series[name].n[index] > 0,
  estimate(run, indices) {
    const { n, mean, m2 } = run.steps.series[name];
    return joined(indices.map((index) => ({ n: n[index], mean: mean[index], m2: m2[index] })));
  },
});
const fromLog = (name, x = "episodes") => ({
  isLogged: true,
  x,
  has: (run, index) => (run.log[name]?.[index] ?? null) !== null,
  estimate(run, indices) {
    const found = joined(indices.map((index) => ({ n: 1, mean: run.log[name][index], m2: 0 })));
    // Of two or three logs an interval says nothing but that they are few.
    return found.n < 4 ? { ...found, low: null, high: null } : found;
  },
});
const keptShare = {
  has: (run, index) => run.steps.judged[index] > 0,
  estimate(run, indices) {
    const sum = (column) => indices.reduce((total, index) => total + column[index], 0);
    return shareInterval(sum(run.steps.kept), sum(run.steps.judged));
  },
};
// The latest of each point, without an interval.
const latest = (name) => ({
  has: (run, index) => run.steps[name][index] !== null,
  estimate: (run, indices) => ({ mean: run.steps[name][indices[indices.length - 1]], low: null, high: null, n: 1 }),
});

const CHARTS = [
  { id: "reward", title: "Reward", unit: NATS, source: fromLedger("reward"), zero: true,
    about: "Query gain plus model gain, and any other terms of the run; the threshold is what a trajectory had to exceed.",
    extras: [{ name: "threshold", look: "dashed warn", source: latest("threshold") },
      { name: "mean of all before", look: "dotted soft", source: latest("history_mean") }] },
  { id: "query-gain", title: "Query gain", unit: NATS, source: fromLedger("query_gain"), zero: true, hollow: true, scale: "gain",
    about: "Better queries than the base model's own, judged by the frozen base model." },
  { id: "model-gain", title: "Model gain", unit: NATS, source: fromLedger("model_gain"), zero: true, hollow: true, scale: "gain",
    about: "A better reader than the base model, after the same queries." },
  { id: "order-gain", title: "Order gain", unit: NATS, source: fromLedger("order_gain"), zero: true, hollow: true, optional: true,
    about: "What the pairs read before brought to the base model." },
  { id: "information-gain", title: "Information gain", unit: NATS, source: fromLedger("information_gain"), zero: true, hollow: true, optional: true,
    about: "What a step told the base model about the values that were unread after it." },
  { id: "kept", title: "Kept fraction", unit: "share of the judged trajectories", source: keptShare, floor: true,
    about: "Above the threshold, and trained on." },
  { id: "kl", title: "KL to the reference", unit: "nats per query token", source: fromLog("kl"), floor: true,
    about: "How far an update takes the policy from the adapter before it, or from the base model; in steps that kept something." },
  { id: "query-entropy", title: "Entropy of the queries", unit: "nats per query token", source: fromLog("query_entropy"), floor: true,
    about: "How open it is what the policy writes next; 0 where it is certain." },
  { id: "selector-entropy", title: "Entropy of the selector", unit: "nats per draw", source: fromLedger("selector_entropy"), floor: true,
    about: "How open it is which pair is drawn.",
    extras: [{ name: "uniform draws", look: "dashed warn", source: fromLedger("uniform_entropy") }] },
  { id: "selection-information", title: "Selection information", unit: "nats per draw", source: fromLog("selection_information"), floor: true,
    about: "How much of a draw depends on the query; at most the diversity of the queries.",
    extras: [{ name: "diversity of the queries", look: "dashed soft", source: fromLog("query_diversity") }] },
];

function drawCharts(container, count) {
  container.replaceChildren();
  const has = (spec) => runs.some((run) => points(run, spec.source, 1).length);
  const shared = {};
  for (const spec of CHARTS.filter(({ scale }) => scale)) {
    (shared[spec.scale] ??= []).push(...runs.flatMap((run) => points(run, spec.source, count)));
  }
  for (const spec of CHARTS) {
    if (!spec.optional || has(spec)) container.append(chart(spec, count, shared[spec.scale] ?? []));
  }
  const other = otherNumbers(count);
  if (other) container.append(other);
}

// Whatever else was logged, by its own name.
function otherNumbers(count) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.log)))].filter((name) => !["step", "episodes", "epoch"].includes(name)).sort();
  if (!names.length) return null;
  const choice = element("select", { id: "other-number" }, names.map((name) => option(name, name, name === otherNumbers.chosen)));
  const holder = element("div", {});
  const draw = () => {
    otherNumbers.chosen = choice.value;
    const spec = { id: "other", title: choice.value, unit: "as logged", source: fromLog(choice.value, "step"), x: "step", about: "Any logged number, over the Trainer's steps." };
    holder.replaceChildren(chart(spec, count, []));
    holder.querySelector(".about").after(element("label", { class: "controls" }, "Logged number ", choice));
  };
  choice.addEventListener("change", () => { draw(); choice.focus(); });
  draw();
  return holder;
}
otherNumbers.chosen = "loss";

// ---- A chart ----

function chart(spec, count, alsoInRange) {
  const curves = runs.map((run, index) => ({ run, kind: KINDS[index], points: points(run, spec.source, count) })).filter(({ points: found }) => found.length);
  const extras = curves.flatMap(({ run, kind }) => (spec.extras ?? []).map((extra) => ({ ...extra, kind, run, points: points(run, extra.source, count) })));
  const titleId = `title-${spec.id}`;
  const body = element("figure", { class: "card chart", id: `chart-${spec.id}` },
    element("figcaption", {}, element("h3", { id: titleId }, spec.title), legend(spec, curves, extras), element("p", { class: "about" }, `${spec.about} Unit: ${spec.unit}.`)));
  if (!curves.length) {
    body.append(element("p", { class: "nothing" }, "Nothing of it is in this run's ledger and log yet."));
    return body;
  }
  const readout = element("p", { class: "readout", role: "status" });
  const stage = element("div", { class: "stage", tabindex: "0", role: "group", "aria-labelledby": titleId, "aria-roledescription": "chart, read with the arrow keys" });
  body.append(stage, readout, asTable(spec.title, ["run", "from", "to", "mean", "95% low", "95% high", "values"], () =>
    [...curves, ...extras].flatMap(({ run, name, points: found }) => found.map((point) =>
      [name ? `${run.name}: ${name}` : run.name, figure(point.from), figure(point.x), figure(point.mean), figure(point.low), figure(point.high), String(point.n)]))));
  onWidth(stage, (width) => drawChart(stage, readout, spec, curves, extras, alsoInRange, width));
  return body;
}

function legend(spec, curves, extras) {
  const sample = (look) => shape("svg", { viewBox: "0 0 22 10", "aria-hidden": "true" }, shape("path", { class: `curve ${look}`, d: "M1 5H21" }));
  const entries = isComparison ? curves.map(({ run, kind }) => [kind, run.name]) : [];
  const once = [...new Map(extras.filter(({ points: found }) => found.length).map((extra) => [extra.name, extra])).values()];
  entries.push(...once.map(({ look, name }) => [`extra ${look}`, name]));
  return element("ul", { class: "legend" }, entries.map(([look, name]) => element("li", {}, sample(look), name)));
}

function frame(width, height, xRange, yRange, xName) {
  const left = 50, right = width - 18, top = 8, bottom = height - 34;
  const x = (value) => left + ((value - xRange[0]) / (xRange[1] - xRange[0])) * (right - left);
  const y = (value) => bottom - ((value - yRange[0]) / (yRange[1] - yRange[0])) * (bottom - top);
  const xTicks = ticks(...xRange, Math.max(2, Math.floor(width / 75))), yTicks = ticks(...yRange, 4);
  const digits = Math.max(0, -Math.floor(Math.log10(yTicks.length > 1 ? yTicks[1] - yTicks[0] : 1) + 1e-9));
  const label = (tick) => (digits > 4 ? tick.toExponential(1) : tick.toFixed(digits));
  const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" },
    yTicks.map((tick) => [shape("line", { class: tick === 0 ? "axis" : "gridline", x1: left, x2: right, y1: y(tick), y2: y(tick) }),
      shape("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, label(tick))]),
    xTicks.map((tick) => [shape("line", { class: "axis", x1: x(tick), x2: x(tick), y1: bottom, y2: bottom + 4 }),
      shape("text", { x: x(tick), y: bottom + 17, "text-anchor": "middle" }, tick.toLocaleString("en"))]),
    shape("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
    shape("text", { x: (left + right) / 2, y: height - 2, "text-anchor": "middle" }, xName));
  return { picture, x, y, left, right, top, bottom };
}

function rangeOf(values, includeZero, floor) {
  let low = Math.min(...values, ...(includeZero || floor ? [0] : [])), high = Math.max(...values, ...(includeZero ? [0] : []));
  if (high - low <= 0) [low, high] = floor ? [low, low + 1] : [low - 0.5, high + 0.5];
  const pad = 0.06 * (high - low);
  return [floor && low >= 0 ? 0 : low - pad, high + pad];
}

function drawChart(stage, readout, spec, curves, extras, alsoInRange, width) {
  const height = 210;
  const all = [...curves, ...extras].flatMap(({ points: found }) => found);
  const ends = [...all, ...alsoInRange].flatMap(({ mean, low, high }) => [mean, low, high]).filter((value) => value !== null);
  const xs = all.map(({ x }) => x);
  const xRange = rangeOf(xs, false, false).map((end, index) => (xs.length > 1 ? [Math.min(...xs), Math.max(...xs)][index] : end));
  if (xRange[0] === xRange[1]) { xRange[0] -= 1; xRange[1] += 1; }
  const { picture, x, y, left, right, top, bottom } = frame(width, height, xRange, rangeOf(ends, spec.zero, spec.floor), spec.x ?? "episodes");
  const line = (found) => found.map((point, index) => `${index ? "L" : "M"}${x(point.x).toFixed(1)} ${y(point.mean).toFixed(1)}`).join("");
  for (const { kind, points: found } of curves) {
    const sure = found.filter(({ low }) => low !== null);
    if (sure.length > 1) {
      const edge = (end) => sure.map((point) => `${x(point.x).toFixed(1)} ${y(point[end]).toFixed(1)}`);
      picture.append(shape("path", { class: `band ${kind}`, d: `M${edge("high").join("L")}L${edge("low").reverse().join("L")}Z` }));
    } else if (sure.length) {
      picture.append(shape("line", { class: `curve ${kind}`, x1: x(sure[0].x), x2: x(sure[0].x), y1: y(sure[0].low), y2: y(sure[0].high) }));
    }
  }
  for (const { look, kind, points: found } of extras) {
    // Of two runs each in its own colour.
    picture.append(shape("path", { class: `curve extra ${isComparison ? `${look.split(" ")[0]} ${kind}` : look}`, d: line(found) }));
  }
  for (const { kind, points: found } of curves) {
    picture.append(shape("path", { class: `curve ${kind}`, d: line(found) }));
    if (found.length > 60) continue;
    for (const point of found) {
      const isHollow = spec.hollow && point.low !== null && point.low <= 0 && point.high >= 0;
      const look = `point ${kind}${isHollow ? "" : " full"}`, [left, middle] = [x(point.x), y(point.mean)];
      picture.append(kind === "a"
        ? shape("circle", { class: look, cx: left, cy: middle, r: 3 })
        : shape("rect", { class: look, x: left - 2.5, y: middle - 2.5, width: 5, height: 5 }));
    }
  }
  picture.setAttribute("aria-label", `${spec.title}: ${curves.map((curve) => inWords(spec, curve)).join("; ")}`);
  const cursor = shape("line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" });
  picture.append(cursor);
  stage.replaceChildren(picture);

  const stops = [...new Set(curves.flatMap(({ points: found }) => found.map((point) => point.x)))].sort((one, other) => one - other);
  const read = (at) => { readout.textContent = [...curves, ...extras].map((curve) => atPlace(spec, curve, at)).filter(Boolean).join(" · "); };
  const show = (index) => {
    stage.place = Math.max(0, Math.min(stops.length - 1, index));
    const at = stops[stage.place];
    cursor.setAttribute("x1", x(at));
    cursor.setAttribute("x2", x(at));
    cursor.setAttribute("visibility", "visible");
    read(at);
  };
  const nearest = (event) => {
    const box = picture.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    return stops.reduce((best, stop, index) => (Math.abs(x(stop) - at) < Math.abs(x(stops[best]) - at) ? index : best), 0);
  };
  picture.addEventListener("pointermove", (event) => show(nearest(event)));
  picture.addEventListener("pointerdown", (event) => show(nearest(event)));
  stage.onkeydown = (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    show((stage.place ?? stops.length - 1) + move);
  };
  read(stops[stops.length - 1]);
}

const interval = ({ low, high }) => (low === null ? "" : ` [${figure(low)}, ${figure(high)}]`);

function atPlace(spec, { run, name, points: found }, at) {
  if (!found.length) return null;
  const point = found.reduce((best, candidate) => (Math.abs(candidate.x - at) < Math.abs(best.x - at) ? candidate : best));
  const who = [isComparison ? run.name : null, name].filter(Boolean).join(" ");
  const where = name ? "" : `${spec.x === "step" ? "step" : "episode"} ${figure(point.x)}: `;
  const zero = spec.hollow && !name && point.low !== null && point.low <= 0 && point.high >= 0 ? ", not distinguishable from 0" : "";
  return `${who ? `${who} ` : ""}${where}${figure(point.mean)}${name ? "" : interval(point)}${zero}`;
}

function inWords(spec, { run, points: found }) {
  const first = found[0], last = found[found.length - 1];
  return `${run.name} goes from ${figure(first.mean)}${interval(first)} to ${figure(last.mean)}${interval(last)} ${spec.unit} in ${found.length} points`;
}
