// The page knows one thing: which part, layer, head and window are chosen. Everything else is drawn from that.

const { parts } = JSON.parse(document.getElementById("page").textContent);
let page = parts[0]; // the part that is shown
const chosen = { layer: null, head: null, window: 0 }; // null stands for all of them
const find = (selector, root = document) => root.querySelector(selector);
const findAll = (selector, root = document) => [...root.querySelectorAll(selector)];

function make(name, text = "", properties = {}) {
  return Object.assign(document.createElement(name), { textContent: text }, properties);
}

// Plotly reads a few HTML tags in its labels, and what we label comes from a model.
function plain(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function short(number) {
  if (number === 0) return "0";
  if (Math.abs(number) >= 100) return Math.round(number).toLocaleString("en");
  return String(Number(number.toPrecision(2)));
}

function percent(share) {
  return short(100 * share) + " %";
}

// ---- Numbers: one byte each, on a logarithmic scale of their row ----

const MISSING = 255;
const STEPS = 253;

function unpack({ codes, low, high, size }) {
  return { codes: Uint8Array.from(atob(codes), (character) => character.charCodeAt(0)), low, high, size };
}

function valuesOfCodes(low, high) {
  const values = new Float32Array(256);
  const growth = Math.log(high / low) / STEPS;
  for (let code = 1; code <= STEPS + 1; code++) values[code] = low * Math.exp(growth * (code - 1));
  return values;
}

function meanOfRows(packed, rows) {
  const { codes, low, high, size } = packed;
  const sums = new Float64Array(size);
  const counts = new Uint32Array(size);
  for (const row of rows) {
    const values = valuesOfCodes(low[row], high[row]);
    for (let at = 0, from = row * size; at < size; at++) {
      const code = codes[from + at];
      if (code === MISSING) continue;
      sums[at] += values[code];
      counts[at] += 1;
    }
  }
  return sums.map((sum, at) => (counts[at] ? sum / counts[at] : NaN));
}

function chosenRows() {
  const rows = [];
  page.present.forEach((heads, layer) => {
    heads.forEach((there, head) => {
      if (!there || (chosen.layer ?? layer) !== layer || (chosen.head ?? head) !== head) return;
      rows.push((chosen.window * page.layers.length + layer) * page.heads.length + head);
    });
  });
  return rows;
}

// ---- The chosen head ----

function choose(change) {
  Object.assign(chosen, change);
  if (chosen.layer === null || (chosen.head !== null && !page.present[chosen.layer][chosen.head])) chosen.head = null;
  showChosen();
  markHeads();
  markTable();
  drawText();
  drawMap();
}

function option(value, label) {
  return make("option", label, { value });
}

// Another part has layers, heads and tokens of its own.
function showPart(number) {
  page = parts[number];
  received = page.text && unpack(page.text.received);
  pictures = page.pictures && unpack(page.pictures.share);
  reading.window = null;
  for (const [name, there] of Object.entries({ kinds: page.kinds, text: page.text, map: page.pictures })) {
    const section = find(`#${name}-section`);
    if (section) section.hidden = !there;
  }
  fillSelects();
  setUpTable();
  drawHeads();
  choose({ layer: null, head: null, window: 0 });
}

function listenToSelects() {
  find("#part").addEventListener("change", (event) => showPart(Number(event.target.value)));
  for (const name of ["layer", "head", "window"]) {
    find("#" + name).addEventListener("change", (event) => {
      choose({ [name]: event.target.value === "" ? null : Number(event.target.value) });
    });
  }
  find(".chosen").addEventListener("submit", (event) => event.preventDefault());
}

function fillSelects() {
  find("#layer").replaceChildren(option("", "all"), ...page.layers.map((path, layer) => option(layer, `${layer} · ${path}`)));
  find("#window").replaceChildren(...Array.from({ length: page.windows }, (_, at) => option(at, `${at + 1} of ${page.windows}`)));
}

function showChosen() {
  const { layer, head, window } = chosen;
  const heads = page.heads.map((label, at) => ({ label, at })).filter(({ at }) => layer !== null && page.present[layer][at]);
  find("#head").replaceChildren(option("", "all"), ...heads.map(({ label, at }) => option(at, label)));
  find("#head").disabled = layer === null;
  find("#layer").value = layer ?? "";
  find("#head").value = head ?? "";
  find("#window").value = window;
  find("#chosen-kind").textContent = page.kinds && head !== null ? describe(layer, head) : "";
  const who = layer === null ? "the mean of all heads" : head === null ? `the mean of layer ${layer}` : `layer ${layer}, head ${page.heads[head]}`;
  for (const element of findAll(".which")) element.textContent = `Shown: ${who}.`;
}

function kindOf(layer, head) {
  const kind = page.kinds.kind[layer][head];
  if (kind === "neighbour") return `${kind}, ${page.kinds.direction[layer][head]}`;
  const offset = page.kinds.offset[layer][head];
  return kind === "positional" ? `${kind} ${offset > 0 ? "+" : "−"}${Math.abs(offset)}` : kind;
}

function describe(layer, head) {
  const score = page.kinds.score[layer][head];
  return score === null ? "" : `${kindOf(layer, head)}, ${score.toFixed(2)}`;
}

// ---- Colours come from the style sheet, so that both schemes have one source ----

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

function ramp() {
  return [0, 1, 2, 3, 4, 5].map((step) => [step / 5, colour("ramp-" + step)]);
}

function layout(extra) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 11, color: colour("quiet") },
    hoverlabel: { bgcolor: colour("ink"), bordercolor: colour("ink"), font: { color: colour("paper"), size: 12 } },
    dragmode: false,
    ...extra,
  };
}

const still = { displayModeBar: false, doubleClick: false, showAxisDragHandles: false };

function axis(title, extra = {}) {
  return { title: { text: title, standoff: 6 }, fixedrange: true, showgrid: false, zeroline: false, ticks: "", ...extra };
}

function everyFew(labels, most) {
  const step = Math.max(1, Math.ceil(labels.length / most));
  const at = labels.map((_, index) => index).filter((index) => index % step === 0);
  return { tickmode: "array", tickvals: at, ticktext: at.map((index) => plain(labels[index])) };
}

function legend(element, least, most) {
  find(".least", element).textContent = least;
  find(".most", element).textContent = most;
}

// ---- Heads at a glance ----

function drawHeads() {
  for (const place of findAll("[data-statistic]")) drawStatistic(place);
  markHeads();
}

function drawStatistic(place) {
  const statistic = page.statistics.find(({ name }) => name === place.dataset.statistic);
  place.closest("figure").hidden = !statistic;
  if (!statistic) return;
  const { name, unit, values } = statistic;
  const known = values.flat().filter((value) => value !== null);
  const shares = unit === "share of attention";
  // A picture of shares that are all next to nothing should look like next to nothing.
  const most = Math.max(...known, shares ? 0.1 : 0);
  const say = shares ? percent : (value) => `${short(value)} ${unit}`;
  const label = (value, layer, head) =>
    value === null ? "" : `layer ${layer}, head ${plain(page.heads[head])}<br>${say(value)}`;
  const margin = { l: 34, r: 2, t: 6, b: 34 };
  const width = Math.min(place.clientWidth, margin.l + margin.r + 44 * page.heads.length);
  const cell = Math.max(8, Math.min(26, (width - margin.l - margin.r) / page.heads.length));
  const gap = cell > 14 ? 1 : 0;
  const trace = {
    type: "heatmap",
    z: values,
    text: values.map((row, layer) => row.map((value, head) => label(value, layer, head))),
    hoverinfo: "text",
    hoverongaps: false,
    colorscale: ramp(),
    zmin: 0,
    zmax: most || 1,
    xgap: gap,
    ygap: gap,
    showscale: false,
  };
  Plotly.react(place, [trace], layout({
    width,
    height: margin.t + margin.b + cell * page.layers.length,
    margin,
    xaxis: axis("head", { range: [-0.6, page.heads.length - 0.4], ...everyFew(page.heads, 12) }),
    yaxis: axis("layer", { range: [page.layers.length - 0.4, -0.6], ...everyFew(page.layers.map((_, layer) => layer), 12) }),
  }), still);
  legend(place.parentElement, "0", shares ? percent(most) : `${short(most)} ${unit}`);
  if (!place.dataset.listens) {
    place.dataset.listens = "yes";
    place.on("plotly_click", ({ points: [point] }) => choose({ layer: point.y, head: point.x }));
  }
}

function markHeads() {
  const { layer, head } = chosen;
  const across = head === null ? [-0.5, page.heads.length - 0.5] : [head - 0.5, head + 0.5];
  const outline = { type: "rect", x0: across[0], x1: across[1], y0: layer - 0.5, y1: layer + 0.5, fillcolor: "rgba(0,0,0,0)" };
  // Two lines, since one colour alone would be lost on some of the cells.
  const lines = [{ color: colour("paper"), width: 5 }, { color: colour("accent"), width: 2 }];
  const shapes = layer === null ? [] : lines.map((line) => ({ ...outline, line }));
  for (const place of findAll("[data-statistic]")) {
    if (!place.closest("figure").hidden) Plotly.relayout(place, { shapes });
  }
}

// ---- What each head does ----

const order = { by: "place", direction: 1, kind: "" };

function headsWithKind() {
  const heads = [];
  page.kinds.kind.forEach((row, layer) => row.forEach((kind, head) => {
    if (kind) heads.push({ layer, head, kind, score: page.kinds.score[layer][head], place: layer * page.heads.length + head });
  }));
  return heads;
}

function listenToTable() {
  for (const button of findAll("#filters button")) {
    button.addEventListener("click", () => { order.kind = button.dataset.kind; fillTable(); });
  }
  for (const button of findAll("#table thead button")) {
    button.addEventListener("click", () => sortBy(button.dataset.sort));
  }
}

function setUpTable() {
  if (!page.kinds) return;
  order.kind = "";
  for (const button of findAll("#filters button")) {
    const { kind } = button.dataset;
    const count = headsWithKind().filter((head) => !kind || head.kind === kind).length;
    find(".count", button).textContent = count;
    button.parentElement.hidden = count === 0;
  }
  fillTable();
}

function sortBy(by) {
  const first = by === "score" ? -1 : 1;
  order.direction = order.by === by ? -order.direction : first;
  order.by = by;
  fillTable();
}

function fillTable() {
  const compare = (a, b) => order.direction * (a[order.by] > b[order.by] ? 1 : a[order.by] < b[order.by] ? -1 : 0) || a.place - b.place;
  const heads = headsWithKind().filter(({ kind }) => !order.kind || kind === order.kind).sort(compare);
  find("#table tbody").replaceChildren(...heads.map(tableRow));
  for (const button of findAll("#filters button")) button.setAttribute("aria-pressed", button.dataset.kind === order.kind);
  for (const button of findAll("#table thead button")) {
    const sorted = button.dataset.sort === order.by ? (order.direction > 0 ? "ascending" : "descending") : "none";
    button.parentElement.setAttribute("aria-sort", sorted);
  }
  markTable();
}

function tableRow({ layer, head, score }) {
  const row = make("tr");
  row.dataset.head = `${layer}/${head}`;
  const button = make("button", "", { type: "button", title: page.layers[layer] });
  button.append(make("span", "layer "), String(layer), make("span", " head "), page.heads[head]);
  const cells = [make("td"), make("td", kindOf(layer, head)), make("td", score.toFixed(2), { className: "number" })];
  cells[0].append(button);
  row.append(...cells);
  row.addEventListener("click", () => choose({ layer, head }));
  return row;
}

function markTable() {
  const now = `${chosen.layer}/${chosen.head}`;
  for (const row of findAll("#table tbody tr")) {
    const selected = row.dataset.head === now;
    row.classList.toggle("selected", selected);
    find("button", row).setAttribute("aria-pressed", selected);
    if (selected) scrollInto(find(".kinds .scroll"), row);
  }
}

// Unlike scrollIntoView this never moves the page itself.
function scrollInto(box, element) {
  const outer = box.getBoundingClientRect();
  const inner = element.getBoundingClientRect();
  if (inner.top < outer.top + 40) box.scrollTop -= outer.top + 40 - inner.top;
  if (inner.bottom > outer.bottom) box.scrollTop += inner.bottom - outer.bottom;
}

// ---- The text ----

let received = null; // what each token of the part that is shown receives
const reading = { window: null, spans: [], values: [], current: null };

function listenToText() {
  if (!find("#text")) return;
  const box = find("#text");
  const point = (event) => showToken(event.target.dataset.at === undefined ? null : Number(event.target.dataset.at));
  box.addEventListener("pointerover", point);
  box.addEventListener("click", point);
  box.addEventListener("pointerleave", () => showToken(null));
  box.addEventListener("blur", () => showToken(null));
  box.addEventListener("scroll", () => showToken(reading.current));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = nextToken(step);
    if (next === null) return;
    scrollInto(box, reading.spans[next]);
    showToken(next);
  });
}

function nextToken(step) {
  let at = reading.current === null ? (step > 0 ? -1 : reading.spans.length) : reading.current;
  do at += step; while (at >= 0 && at < reading.spans.length && !reading.spans[at]);
  return reading.spans[at] ? at : null;
}

// A token is a word of the text, or a patch of the picture, which stands where the first of its patches does.
function writeText() {
  const box = find("#text");
  const { picture } = page.text;
  const patches = new Map(picture && chosen.window === 0 ? picture.positions.map((at, number) => [at, number]) : []);
  const segments = page.text.segments[chosen.window];
  const nodes = [];
  let grid = null;
  let segment = "";
  reading.spans = page.text.windows[chosen.window].map((piece, at) => {
    if (segments[at] && segments[at] !== segment) nodes.push(make("i", (segment = segments[at]), { className: "segment" }));
    if (patches.has(at)) {
      if (!grid) nodes.push((grid = pictureOf(picture)));
      return patchOf(piece, at, patches.get(at), picture, grid);
    }
    const [, before, word, after] = piece.match(/^(\s*)([^]*?)(\s*)$/);
    // A token that is white space alone must still be there to be pointed at.
    const shown = word || (piece.includes("\n") ? "↵" : piece);
    if (!shown) return null;
    const span = make("span", shown);
    span.dataset.at = at;
    if (/^(\[[A-Za-z]+\d*\]|<\|?[\w｜▁ -]+\|?>)$/.test(word)) span.className = "special";
    if (!word && shown === "↵") span.className = "newline";
    nodes.push(word ? before : "", span, word ? after : piece.replace(/[^\n]/g, ""));
    return span;
  });
  box.replaceChildren(...nodes);
  box.scrollTop = 0;
  reading.window = chosen.window;
}

function pictureOf({ source, rows, columns }) {
  const grid = make("div", "", { className: "patches" });
  grid.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
  grid.append(make("img", "", { src: source, alt: "the picture as the model saw it, shaded by patch" }));
  return grid;
}

function patchOf(name, at, number, { columns }, grid) {
  const patch = make("span");
  Object.assign(patch.dataset, { at, name: name.trim() });
  patch.style.gridArea = `${Math.floor(number / columns) + 1} / ${(number % columns) + 1}`;
  grid.append(patch);
  return patch;
}

function nameOf(pieces, at) {
  return (pieces?.[at] ?? "").trim() || "white space";
}

function drawText() {
  if (!page.text) return;
  const there = chosen.window < page.text.windows.length;
  sayCut("#text-cut", there, page.text.windows.length, page.text.tokens_left_out);
  find("#text").hidden = find("#text-legend").hidden = find("#text-most").hidden = !there;
  showToken(null);
  if (!there) return;
  if (reading.window !== chosen.window) writeText();
  reading.values = meanOfRows(received, chosenRows());
  const [low, high] = scale(reading.values);
  reading.spans.forEach((span, at) => {
    const strength = Math.log(reading.values[at] / low) / Math.log(high / low);
    span?.style.setProperty("--strength", Number.isNaN(strength) ? 0 : Math.min(1, Math.max(0, strength)).toFixed(3));
  });
  legend(find("#text-legend"), short(low), short(high));
  showMost();
}

function scale(values) {
  const sorted = [...values].filter((value) => value > 0).sort((a, b) => a - b);
  if (!sorted.length) return [0.5, 2];
  const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
  const [low, high] = [at(0.2), at(0.99)];
  // Where all tokens get nearly the same, the picture should not pretend otherwise.
  const middle = Math.sqrt(low * high);
  return high / low >= 4 ? [low, high] : [middle / 2, middle * 2];
}

function showMost() {
  const most = [...reading.values.keys()]
    .filter((at) => reading.spans[at] && reading.values[at] > 0)
    .sort((a, b) => reading.values[b] - reading.values[a])
    .slice(0, 8);
  const parts = most.flatMap((at, rank) => [rank ? " · " : "", make("b", nameOf(page.text.windows[chosen.window], at)), ` ${short(reading.values[at])}`]);
  find("#text-most").replaceChildren("Most looked at: ", ...parts);
}

function showToken(at) {
  const tip = find("#tip");
  reading.spans[reading.current]?.classList.remove("current");
  reading.current = at;
  tip.hidden = at === null;
  if (at === null) return;
  const span = reading.spans[at];
  span.classList.add("current");
  const value = reading.values[at];
  tip.textContent = `${reading.spans[at].dataset.name || `token ${at}`} receives ${Number.isNaN(value) ? "no number" : short(value)}`;
  const frame = find(".reading").getBoundingClientRect();
  const token = span.getClientRects()[0];
  const left = token.left - frame.left;
  const box = find("#text").getBoundingClientRect();
  tip.hidden = token.bottom < box.top || token.top > box.bottom;
  tip.style.left = `${Math.max(0, Math.min(left, frame.width - tip.offsetWidth))}px`;
  tip.style.top = `${token.top - frame.top - tip.offsetHeight - 4}px`;
}

function sayCut(selector, there, windows, tokens = 0) {
  const parts = [];
  if (windows < page.windows) parts.push(`To keep this page small it holds only the first ${windows} of ${page.windows} windows${there ? "" : "; choose one of those"}.`);
  if (tokens > 0) parts.push(`To keep this page small the last ${tokens.toLocaleString("en")} tokens are left out here.`);
  find(selector).textContent = parts.join(" ");
  find(selector).hidden = parts.length === 0;
}

// ---- The picture ----

let pictures = null; // of the part that is shown

// Where each block of a text begins, and where the last one ends.
function edges(shown, blocks, size, side) {
  const { merged } = page.pictures;
  const edge = (block) => (side ? Math.min(block * side, size) : Math.floor((block * size) / blocks));
  return Array.from({ length: shown + 1 }, (_, at) => edge(Math.min(at * merged, blocks)));
}

function longest(counts) {
  return chosen.layer === null ? Math.max(...counts.map((layer) => layer[chosen.window])) : counts[chosen.layer][chosen.window];
}

function drawMap() {
  if (!page.pictures) return;
  const place = find("#map");
  const there = chosen.window < page.pictures.windows;
  sayCut("#map-cut", there, page.pictures.windows);
  place.hidden = find("#map-legend").hidden = !there;
  if (!there) return;
  const [rows, columns] = page.pictures.shown;
  const share = meanOfRows(pictures, chosenRows());
  const queries = edges(rows, page.pictures.blocks[0], longest(page.pictures.queries) || rows, page.pictures.sides[0]);
  const keys = edges(columns, page.pictures.blocks[1], longest(page.pictures.keys) || columns, page.pictures.sides[1]);
  const [low, high] = range(share);
  const grid = (of) => Array.from({ length: rows }, (_, row) => Array.from({ length: columns }, (_, column) => of(row, column)));
  const at = (row, column) => share[row * columns + column];
  const label = (row, column) =>
    `${sayTokens("quer", "y", "ies", page.text?.queries, queries[row], queries[row + 1])}<br>` +
    `${sayTokens("key", "", "s", page.text?.windows, keys[column], keys[column + 1])}<br>${percent(at(row, column))}`;
  const trace = {
    type: "heatmap",
    x: keys,
    y: queries,
    z: grid((row, column) => (at(row, column) > 0 ? Math.log10(at(row, column)) : null)),
    text: grid(label),
    hoverinfo: "text",
    hoverongaps: false,
    colorscale: ramp(),
    zmin: Math.log10(low),
    zmax: Math.log10(high),
    showscale: false,
  };
  const width = place.clientWidth;
  const margin = { l: 46, r: 2, t: 6, b: 40 };
  Plotly.react(place, [trace], layout({
    width,
    height: width - margin.l - margin.r + margin.t + margin.b,
    margin,
    xaxis: axis("key: position of the token looked at", { nticks: 6, tickformat: "d" }),
    yaxis: axis("query: position of the token that looks", { autorange: "reversed", nticks: 6, tickformat: "d" }),
    shapes: [{ type: "rect", xref: "paper", yref: "paper", x0: 0, x1: 1, y0: 0, y1: 1, line: { color: colour("line"), width: 1 } }],
  }), still);
  legend(find("#map-legend"), percent(low), percent(high));
}

// Several tokens by their positions, one by its name too.
function sayTokens(what, one, several, windows, from, to) {
  if (to - from > 1) return `${what}${several} ${from}–${to - 1}`;
  const pieces = windows?.[chosen.window];
  return `${what}${one} ${from}${pieces ? ": " + plain(nameOf(pieces, from)) : ""}`;
}

function range(share) {
  const positive = share.filter((value) => value > 0).sort();
  if (!positive.length) return [0.001, 1];
  const high = positive.at(-1);
  const low = Math.max(positive[Math.floor(0.02 * positive.length)], high / 1e4);
  return [Math.min(low, high / 4), high];
}

// ---- Begin, and begin again when the colours or the width change ----

function drawAll() {
  drawHeads();
  drawMap();
}

let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === width) return; // phones change the height alone while they scroll
  width = window.innerWidth;
  requestAnimationFrame(drawAll);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

listenToSelects();
listenToTable();
listenToText();
showPart(0);
