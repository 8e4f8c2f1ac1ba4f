// Heat maps of selection probabilities, as tables: what is coloured for the eye is text to a screen reader.

const NUMBERS_UP_TO = 12;

// Texts of the pairs of an article, as far as some trajectory drew them.
function keysOf(run, { source, article }) {
  const keys = new Map();
  for (const row of run.trajectories) {
    if (row.source === source && row.article === article) row.order.forEach((pair, step) => keys.set(pair, row.keys[step]));
  }
  return keys;
}

// The largest probability among several pairs left, as the last pair of all has 1.
function largest(rows) {
  let found = 0;
  for (const { pairs, probabilities } of rows) {
    probabilities.forEach((step, index) => { if (pairs.length - index > 1) found = Math.max(found, ...step); });
  }
  return found || 1;
}

function heatTable(run, row, top, caption) {
  const keys = keysOf(run, row);
  const columns = row.pairs.map((pair, column) => ({ pair, column })).sort((one, other) => one.pair - other.pair);
  const isNumbered = columns.length <= NUMBERS_UP_TO;
  const name = (pair) => (keys.has(pair) ? `pair ${pair}: ${visible(keys.get(pair)).trim()}` : `pair ${pair}`);
  const head = element("tr", {}, element("th", { scope: "col" }, "query"), columns.map(({ pair }) => element("th", { scope: "col", title: name(pair) }, String(pair))));
  const body = row.order.map((drawn, step) => {
    const read = new Set(row.order.slice(0, step));
    const query = visible(row.queries[step]).trim() || "(blank)";
    return element("tr", {}, element("th", { scope: "row", title: query }, `${step + 1} ${query}`), columns.map(({ pair, column }) => {
      if (read.has(pair)) return element("td", { class: "read", title: `${name(pair)}, read before` }, element("span", { class: "hidden" }, "read before"));
      const probability = row.probabilities[step][column];
      const share = Math.min(100, 100 * Math.sqrt(probability / top));
      const text = probability.toFixed(2).replace(/^0/, "");
      return element("td", { class: [pair === drawn ? "drawn" : "", share > 78 ? "full" : share > 51 ? "half" : ""].join(" ").trim(), "--p": share.toFixed(1), title: `${name(pair)}: ${probability.toFixed(3)}` },
        isNumbered ? text : element("span", { class: "hidden" }, text), pair === drawn ? element("span", { class: "hidden" }, " drawn") : null);
    }));
  });
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element("table", { class: isNumbered ? "heat" : "heat dense" }, element("caption", {}, caption), element("thead", {}, head), element("tbody", {}, body)));
}

const scaleOf = (top) => element("p", { class: "scale" }, "0", element("i"), `${top.toFixed(2)} and above, square-root scale`);

function drawHeat(container, runIndex) {
  const run = runs[runIndex];
  const byEpisode = new Map(run.trajectories.map((row) => [row.episode, row]));
  const body = element("div", { class: "card", id: `heat-${runIndex}` });
  container.append(body);
  if (isComparison) body.append(element("h3", { class: `run ${KINDS[runIndex]}` }, run.name));
  if (!byEpisode.size) {
    body.append(element("p", { class: "nothing" }, "The ledger holds no trajectory yet."));
    return;
  }
  const describe = ({ first, last, same }) => {
    const row = byEpisode.get(first);
    return `${visible(row.title)} – episodes ${first} and ${last}${same ? "" : ", other pairs of it"}`;
  };
  const episodes = run.trajectories.map(({ episode }) => episode);
  const both = run.meetings.length ? run.meetings[0] : { first: episodes[0], last: episodes[episodes.length - 1] };
  const chosen = [both.first, both.last];
  const panels = element("div", { class: "panels" });
  const scale = element("div", {});
  const show = () => {
    const rows = chosen.map((episode) => byEpisode.get(episode));
    const top = largest(rows);
    panels.replaceChildren(...rows.map((row) =>
      heatTable(run, row, top, `${visible(row.title)}, episode ${row.episode}, step ${row.step}, reward ${signed(row.reward)}`)));
    scale.replaceChildren(scaleOf(top));
    inputs.forEach((input, index) => { input.value = chosen[index]; });
  };
  const inputs = [0, 1].map((index) => element("input", {
    type: "number", min: episodes[0], max: episodes[episodes.length - 1], step: 1,
    onchange(event) {
      const wanted = Number(event.target.value);
      chosen[index] = episodes.reduce((best, episode) => (Math.abs(episode - wanted) < Math.abs(best - wanted) ? episode : best));
      show();
    },
  }));
  const controls = element("div", { class: "controls" });
  if (run.meetings.length) {
    const isSame = run.meetings.some(({ same }) => same);
    const memory = element("select", { onchange(event) { const meeting = run.meetings[event.target.value]; chosen[0] = meeting.first; chosen[1] = meeting.last; show(); } },
      run.meetings.map((meeting, index) => option(index, describe(meeting))));
    controls.append(element("label", {}, isSame ? "Same memory, first and last" : "Same article, first and last", memory));
  } else {
    controls.append(element("span", { class: "about" }, "No memory was read in more than one step; here are two trajectories of the first and the last one."));
  }
  controls.append(element("label", {}, "Episode", inputs[0]), element("label", {}, "and episode", inputs[1]));
  body.append(controls, panels, scale);
  show();
}
