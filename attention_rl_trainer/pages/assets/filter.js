// Every trajectory's reward and verdict beside the threshold; a click or Enter opens the trajectory.

const VERDICTS = { kept: "kept, trained on", below_threshold: "below the threshold", warmup: "warm-up, not judged" };

// All are kept where there is none after the warm-up.
const thresholdOf = (threshold, verdict) =>
  threshold !== null ? `threshold ${signed(threshold)}` : verdict === "warmup" ? "no threshold yet" : "no threshold";

function drawFilter(container, runIndex, open) {
  const run = runs[runIndex], { episode: episodes, reward: rewards, verdict: verdicts } = run.points;
  const title = isComparison ? `Filter of ${run.name}` : "Rewards and threshold";
  const body = element("figure", { class: "card chart", id: `filter-${runIndex}` });
  container.append(body);
  const titleId = `title-filter-${runIndex}`;
  const samples = Object.entries(VERDICTS).map(([verdict, name]) => element("li", {}, shape("svg", { viewBox: "0 0 22 10", "aria-hidden": "true" }, shape("path", { class: `dots ${verdict}`, d: mark(verdict, 11, 5) })), name));
  samples.push(element("li", {}, shape("svg", { viewBox: "0 0 22 10", "aria-hidden": "true" }, shape("path", { class: "curve extra dashed warn", d: "M1 5H21" })), "threshold"));
  body.append(element("figcaption", {}, element("h3", { id: titleId }, title), element("ul", { class: "legend" }, samples), element("p", { class: "about" }, "A point per trajectory. Unit: nats per value token.")));
  if (!episodes.length) {
    body.append(element("p", { class: "nothing" }, "The ledger holds no trajectory yet."));
    return;
  }
  const readout = element("p", { class: "readout", role: "status" });
  const stage = element("div", { class: "stage", tabindex: "0", role: "group", "aria-labelledby": titleId, "aria-roledescription": "chart, read with the arrow keys, Enter opens a trajectory" });
  const { steps } = run;
  body.append(stage, readout, asTable(title, ["steps to", "episodes", "trajectories", "mean reward", "mean before", "SD before", "threshold", "kept", "of judged"], () =>
    steps.step.map((step, index) => [String(step), `${steps.first[index]}–${steps.last[index]}`, String(steps.count[index]), figure(steps.series.reward.mean[index]),
      figure(steps.history_mean[index]), figure(steps.history_std[index]), figure(steps.threshold[index]), String(steps.kept[index]), String(steps.judged[index])])));
  const sum = (column) => column.reduce((total, number) => total + number, 0);
  const [numAll, numJudged, numKept] = [steps.count, steps.judged, steps.kept].map(sum);
  const totals = { kept: numKept, below_threshold: numJudged - numKept, warmup: numAll - numJudged };
  const counts = Object.entries(VERDICTS).map(([verdict, name]) => `${totals[verdict].toLocaleString("en")} ${name}`).join("; ");
  let place = episodes.length - 1;

  onWidth(stage, (width) => {
    const height = 250;
    const thresholds = steps.threshold.map((value, index) => ({ value, from: steps.first[index], to: steps.last[index] })).filter(({ value }) => value !== null);
    const ys = [...rewards, ...thresholds.map(({ value }) => value)];
    const xRange = [episodes[0] - 0.5, episodes[episodes.length - 1] + 0.5];
    const { picture, x, y } = frame(width, height, xRange, rangeOf(ys, false, false), "episode");
    for (const verdict of Object.keys(VERDICTS)) {
      const d = episodes.map((episode, index) => (verdicts[index] === verdict ? mark(verdict, x(episode), y(rewards[index])) : "")).join("");
      if (d) picture.append(shape("path", { class: `dots ${verdict}`, d }));
    }
    const d = thresholds.map(({ value, from, to }, index) => `${index ? `H${x(from).toFixed(1)}V` : `M${x(from).toFixed(1)} `}${y(value).toFixed(1)}H${x(to).toFixed(1)}`).join("");
    picture.append(shape("path", { class: "curve extra dashed warn", d }));
    picture.setAttribute("aria-label", `${title}: ${counts}`);
    const ring = shape("circle", { class: "ring", r: 6, visibility: "hidden" });
    picture.append(ring);
    stage.replaceChildren(picture);
    const show = (index) => {
      place = Math.max(0, Math.min(episodes.length - 1, index));
      ring.setAttribute("cx", x(episodes[place]));
      ring.setAttribute("cy", y(rewards[place]));
      ring.setAttribute("visibility", "visible");
      const group = steps.last.findIndex((last) => episodes[place] <= last);
      const threshold = steps.threshold[group];
      readout.textContent = `Episode ${episodes[place]}: reward ${signed(rewards[place])}, ${thresholdOf(threshold, verdicts[place])}: ${VERDICTS[verdicts[place]]}. Enter or a click shows it.`;
    };
    const nearest = (event) => {
      const box = picture.getBoundingClientRect(), factor = width / box.width;
      const px = (event.clientX - box.left) * factor, py = (event.clientY - box.top) * factor;
      let best = 0, least = Infinity;
      episodes.forEach((episode, index) => {
        const distance = (x(episode) - px) ** 2 + (y(rewards[index]) - py) ** 2;
        if (distance < least) [best, least] = [index, distance];
      });
      return best;
    };
    picture.addEventListener("pointermove", (event) => show(nearest(event)));
    picture.addEventListener("click", (event) => { show(nearest(event)); open(runIndex, episodes[place]); });
    stage.onkeydown = (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity, Enter: 0 }[event.key];
      if (move === undefined) return;
      event.preventDefault();
      show(place + move);
      if (event.key === "Enter") open(runIndex, episodes[place]);
    };
    readout.textContent = `${counts}.`;
  });
}

function mark(verdict, x, y) {
  const [left, middle] = [x.toFixed(1), y.toFixed(1)];
  return verdict === "warmup" ? `M${(x - 2.5).toFixed(1)} ${(y - 2.5).toFixed(1)}l5 5m0-5l-5 5` : `M${left} ${middle}h0`;
}
