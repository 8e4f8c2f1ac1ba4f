// One trajectory at a time: query, the key that it drew, the value that was read, and what that gained.

const MAX_LISTED = 1000;
const ORDERS = {
  episode: ["by episode", (one, other) => one.episode - other.episode],
  best: ["highest reward first", (one, other) => other.reward - one.reward],
  worst: ["lowest reward first", (one, other) => one.reward - other.reward],
  query: ["highest query gain first", (one, other) => mean(other.query_gains) - mean(one.query_gains)],
};
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

// Returns what opens a trajectory from elsewhere on the page.
function drawBrowser(container) {
  const state = { run: 0, listed: [], row: null };
  const view = element("article", { class: "card", id: "trajectory" });
  const list = element("select", { size: "12", id: "episode-list", onchange: () => choose(Number(list.value)) });
  const search = element("input", { type: "search", id: "search", autocomplete: "off", oninput: () => fillList() });
  const verdict = element("select", { id: "verdict-choice", onchange: () => fillList() }, option("", "all"), Object.entries(VERDICTS).map(([name, text]) => option(name, text)));
  const order = element("select", { id: "order-choice", onchange() { state.row = null; fillList(); } }, Object.entries(ORDERS).map(([name, [text]]) => option(name, text)));
  const whose = element("select", { id: "run-choice", onchange() { state.run = Number(whose.value); fillList(); } }, runs.map((run, index) => option(index, run.name)));
  const previous = button("← Previous", () => move(-1)), next = button("Next →", () => move(1));
  const count = element("p", { class: "about", role: "status" });

  function fillList() {
    const wanted = search.value.trim().toLowerCase();
    const matches = (row) => !wanted || [row.title, ...row.queries, ...row.keys, ...row.values].some((text) => text.toLowerCase().includes(wanted));
    const all = runs[state.run].trajectories;
    const found = all.filter((row) => (!verdict.value || row.verdict === verdict.value) && matches(row)).sort(ORDERS[order.value][1]);
    state.listed = found.slice(0, MAX_LISTED);
    list.replaceChildren(...state.listed.map((row, index) => option(index, `${row.episode} · ${signed(row.reward)}${row.verdict === "kept" ? " ✓" : ""} · ${visible(row.title)}`)));
    count.textContent = `${found.length.toLocaleString("en")} of ${all.length.toLocaleString("en")} trajectories${found.length > MAX_LISTED ? `, the first ${MAX_LISTED.toLocaleString("en")} are listed` : ""}`;
    const place = state.listed.indexOf(state.row);
    choose(Math.max(0, place));
  }

  function choose(place) {
    state.row = state.listed[place] ?? null;
    if (state.row) list.value = String(place);
    previous.disabled = place <= 0;
    next.disabled = place >= state.listed.length - 1;
    view.replaceChildren(...(state.row ? trajectory(runs[state.run], state.row) : [element("p", { class: "nothing" }, "No trajectory matches.")]));
  }

  const move = (by) => choose(state.listed.indexOf(state.row) + by);

  container.append(element("div", { class: "browser" },
    element("div", { class: "picker card" },
      isComparison ? element("label", {}, "Run", whose) : null,
      element("label", {}, "Find in titles and texts", search), element("label", {}, "Verdict", verdict), element("label", {}, "Order", order),
      element("label", {}, "Episode · reward · title", list), count, element("div", { class: "row" }, previous, next)),
    view));
  fillList();

  return (runIndex, episode) => {
    if (!runs[runIndex].trajectories.length) return;
    search.value = verdict.value = "";
    order.value = "episode";
    state.run = runIndex;
    whose.value = String(runIndex);
    state.row = null;
    fillList();
    // Not every trajectory of a long run is in the page, nor in the list.
    const rows = runs[runIndex].trajectories;
    const nearest = rows.reduce((best, row) => (Math.abs(row.episode - episode) < Math.abs(best.episode - episode) ? row : best));
    if (!state.listed.includes(nearest)) {
      state.listed = [nearest, ...state.listed.slice(0, MAX_LISTED - 1)];
      list.prepend(option(0, `${nearest.episode} · ${signed(nearest.reward)} · ${visible(nearest.title)}`));
      [...list.options].forEach((item, index) => { item.value = index; });
    }
    choose(state.listed.indexOf(nearest));
    document.getElementById("trajectories").scrollIntoView();
    list.focus({ preventScroll: true });
  };
}

function partsOf(row) {
  const [query, model] = [mean(row.query_gains), mean(row.model_gains)];
  if (Math.abs(row.reward - query - model) <= 1e-4 * Math.max(1, Math.abs(row.reward))) {
    return ` = query gain ${signed(query)} + model gain ${signed(model)}`;
  }
  return `, with other terms than its query gain ${signed(query)} and model gain ${signed(model)}`;
}

function trajectory(run, row) {
  const gains = [...row.rewards, ...row.query_gains, ...row.model_gains];
  const top = Math.max(1e-9, ...gains.map(Math.abs));
  const keys = keysOf(run, row);
  const unread = row.pairs.filter((pair) => !row.order.includes(pair) && keys.has(pair));
  return [
    element("div", { class: "head" }, element("h3", {}, visible(row.title) || "(no title)"), element("span", { class: `badge ${row.verdict}` }, VERDICTS[row.verdict])),
    element("p", { class: "about" }, `${visible(row.source)} · episode ${row.episode} · step ${row.step} · pass ${row.epoch + 1} over the source`),
    element("p", {}, `Reward ${signed(row.reward)}${partsOf(row)}; ${thresholdOf(row.threshold, row.verdict)}.`),
    element("ol", { class: "flow" }, row.order.map((pair, step) => stepOf(row, step, top))),
    heatTable(run, row, largest([row]), "What each query made likely"),
    unread.length ? element("details", {}, element("summary", {}, "Keys that were not drawn here, as far as they are known"), element("ul", { class: "keys" }, unread.map((pair) => element("li", {}, `${pair}: ${visible(keys.get(pair)).trim()}`)))) : null,
  ].filter(Boolean);
}

function stepOf(row, step, top) {
  const probability = row.probabilities[step][row.pairs.indexOf(row.order[step])];
  const left = row.pairs.length - step;
  const highest = Math.max(...row.probabilities[step]) || 1;
  const strip = element("div", { class: "strip", "aria-hidden": "true" }, row.pairs.map((pair, column) => ({ pair, column })).sort((one, other) => one.pair - other.pair).map(({ pair, column }) => {
    const bar = element("i", { class: pair === row.order[step] ? "drawn" : undefined });
    bar.style.height = `${(100 * row.probabilities[step][column]) / highest}%`;
    return bar;
  }));
  const text = (value) => visible(value).trim() || element("span", { class: "blank" }, "(blank)");
  const gain = row.rewards[step];
  const share = (value, largestValue, most) => ((most * Math.min(1, Math.abs(value) / largestValue)) || 0).toFixed(1);
  const tokens = row.tokens?.[step];
  const largestToken = tokens ? Math.max(1e-9, ...tokens.map(([, value]) => Math.abs(value))) : 1;
  const read = tokens
    ? tokens.map(([token, value]) => element("mark", { class: value >= 0 ? "up" : "down", "--share": share(value, largestToken, 40), title: `${signed(value)} nats` }, visible(token)))
    : [text(row.values[step])];
  return element("li", {},
    element("div", { class: "box" }, element("small", {}, `query ${step + 1}`), text(row.queries[step])),
    element("div", { class: "box" }, element("small", {}, `draws pair ${row.order[step]} with ${probability.toFixed(2)}; uniform ${(1 / left).toFixed(2)} of ${left}`), text(row.keys[step]), strip),
    element("div", { class: `box value ${gain >= 0 ? "up" : "down"}`, "--share": tokens ? 0 : share(gain, top, 38) }, element("small", {}, `value, gained ${signed(gain)}`), read,
      element("div", { class: "gains" }, [["query gain", row.query_gains[step]], ["model gain", row.model_gains[step]]].map(([name, value]) => {
        const bar = element("i", { class: value >= 0 ? "up" : "down" });
        bar.style.left = `${value >= 0 ? 50 : 50 - (50 * Math.abs(value)) / top}%`;
        bar.style.width = `${(50 * Math.abs(value)) / top}%`;
        return [element("span", {}, name), element("span", { class: "bar", "aria-hidden": "true" }, bar), element("span", {}, signed(value))];
      }))));
}
