// Puts the page together.

const mostPoints = Math.max(1, ...runs.flatMap((run) => [run.steps.last.length, run.log.step?.length ?? 0]));
const choice = document.getElementById("points");
const charts = document.getElementById("charts");
for (const count of [6, 12, 25, 50, 100].filter((number) => number < mostPoints)) {
  choice.append(option(count, String(count), count === 25));
}
choice.append(option(mostPoints, `${mostPoints}, all`, mostPoints <= 25));
choice.addEventListener("change", () => drawCharts(charts, Number(choice.value)));
drawCharts(charts, Number(choice.value));

const browser = document.getElementById("browser");
const open = runs.some((run) => run.trajectories.length)
  ? drawBrowser(browser)
  : (browser.append(element("p", { class: "card nothing" }, "The ledger holds no trajectory yet.")), () => {});
runs.forEach((_, index) => {
  drawFilter(document.getElementById("filters"), index, open);
  drawHeat(document.getElementById("heat"), index);
});

const find = document.getElementById("find-option");
if (find) {
  const onlyDiffering = document.getElementById("only-differing");
  const rows = [...document.querySelectorAll(".listing.option tbody tr")];
  const narrow = () => {
    const wanted = find.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted) || Boolean(onlyDiffering?.checked && !row.classList.contains("differs"));
      shown += !row.hidden;
    }
    document.getElementById("options-shown").textContent = `${shown} of ${rows.length}`;
  };
  find.addEventListener("input", narrow);
  onlyDiffering?.addEventListener("change", narrow);
  narrow();
}
document.documentElement.dataset.ready = "true";
