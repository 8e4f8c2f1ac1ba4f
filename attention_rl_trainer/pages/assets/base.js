// Elements, numbers and scales. Text from a run goes into text nodes and attributes only, never into markup.

const runs = JSON.parse(document.getElementById("data").textContent).runs;
const KINDS = ["a", "b"];
const isComparison = runs.length > 1;

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

const element = (tag, properties = {}, ...children) => fill(document.createElement(tag), properties, children);
const shape = (tag, properties = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, children);

// Line breaks and other control characters as a reader can see them.
const visible = (text) =>
  text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu, (sign) =>
    sign === "\n" ? "↵" : sign === "\t" ? "⇥" : `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`);

// Enough digits to distinguish what is drawn.
function figure(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  return value.toLocaleString("en", { maximumFractionDigits: size < 1 ? 4 : size < 10 ? 3 : size < 1000 ? 1 : 0 });
}
const signed = (value) => (value > 0 ? "+" : "") + value.toFixed(3);
const percent = (value) => `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)}%`;

function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw);
  const found = [];
  for (let number = Math.ceil(low / step - 1e-9); number * step <= high + 1e-9 * step; number++) {
    found.push(Number((number * step).toPrecision(12)));
  }
  return found;
}

// Two-sided 95% quantile of Student's t: from a table for 1 to 4 degrees, then by Cornish and Fisher's expansion.
function studentQuantile(degrees) {
  if (degrees < 5) return [NaN, 12.706, 4.303, 3.182, 2.776][degrees];
  const z = 1.959963985;
  return z + (z ** 3 + z) / (4 * degrees) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * degrees ** 2)
    + (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / (384 * degrees ** 3);
}

// Wilson's interval of a share.
function shareInterval(hits, count) {
  const z = 1.959963985;
  const middle = (hits + z * z / 2) / (count + z * z);
  const half = (z / (count + z * z)) * Math.sqrt((hits * (count - hits)) / count + z * z / 4);
  return { mean: hits / count, low: Math.max(0, middle - half), high: Math.min(1, middle + half), n: count };
}

// Joins groups of which n, mean and sum of squares about the mean are known.
function joined(groups) {
  let n = 0, mean = 0, m2 = 0;
  for (const group of groups) {
    if (!group.n) continue;
    const total = n + group.n, shift = group.mean - mean;
    m2 += group.m2 + (shift * shift * n * group.n) / total;
    mean += (shift * group.n) / total;
    n = total;
  }
  if (!n) return null;
  if (n < 2) return { mean, low: null, high: null, n };
  const half = studentQuantile(n - 1) * Math.sqrt(m2 / (n - 1) / n);
  return { mean, low: mean - half, high: mean + half, n };
}

// Calls back with the width, now and whenever it changes.
function onWidth(node, draw) {
  let before = 0;
  new ResizeObserver((entries) => {
    const width = Math.floor(entries[0].contentRect.width);
    if (width > 0 && width !== before) draw((before = width));
  }).observe(node);
}

// A table that is made when it is opened.
function asTable(caption, header, rows) {
  const details = element("details", {}, element("summary", {}, "As a table"));
  details.addEventListener("toggle", () => {
    if (!details.open || details.querySelector("table")) return;
    details.append(element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
      element("table", { class: "listing numbers" },
        element("caption", { class: "hidden" }, caption),
        element("thead", {}, element("tr", {}, header.map((name) => element("th", { scope: "col" }, name)))),
        element("tbody", {}, rows().map((cells) => element("tr", {}, cells.map((cell) => element("td", {}, cell))))))));
  });
  return details;
}

function button(text, onclick) {
  return element("button", { type: "button", onclick }, text);
}

function option(value, text, selected = false) {
  return element("option", { value, selected }, text);
}
