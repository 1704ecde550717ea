"use strict";
// Draws the map of the layers and the histograms; shows and hides the series of the charts.
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
// Light to dark, so that it also prints in grey: little error to much.
const RAMP = [[255, 247, 219], [253, 208, 117], [244, 138, 69], [203, 62, 62], [110, 25, 85]];
const LEAST = -5; // log10 of the error at the light end; the dark end is 1

function element(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  return node;
}

function bitsOf(entry) {
  return entry.bits === 1 ? "1 bit" : `${entry.bits} bits`;
}

function rampAt(share) {
  const place = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const low = Math.min(Math.floor(place), RAMP.length - 2);
  return RAMP[low].map((c, i) => Math.round(c + (RAMP[low + 1][i] - c) * (place - low)));
}

function shade(error) {
  const share = error > 0 ? (Math.log10(error) - LEAST) / -LEAST : 0;
  const colour = rampAt(share);
  const light = (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]) > 140;
  return { background: `rgb(${colour.join(",")})`, color: light ? "#1d2129" : "#fff" };
}

function percent(error) {
  if (error === null || error === undefined) return "unknown";
  return error >= 0.001 ? `${(100 * error).toFixed(2)} %` : `${(100 * error).toExponential(1)} %`;
}

// bert.encoder.layer.3.attention.self.query -> kind "attention.self.query" of layer 3; without a number, no layer
function place(name) {
  const match = name.match(/^(.*?\.)?(\d+)\.(.+)$/);
  return match ? { kind: match[3], layer: Number(match[2]) } : { kind: name.replace(/^[^.]*\.(?=.*\.)/, ""), layer: null };
}

function fill(select, names) {
  const before = select.value;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.includes(before)) select.value = before;
}

function drawMap(task, number, state) {
  const entries = DATA[task].configurations[state.configuration.value][state.stage.value];
  const kinds = new Map();
  const alone = [];
  let layers = 0;
  for (const name in entries) {
    const where = place(name);
    if (where.layer === null) { alone.push(name); continue; }
    layers = Math.max(layers, where.layer + 1);
    if (!kinds.has(where.kind)) kinds.set(where.kind, new Map());
    kinds.get(where.kind).set(where.layer, name);
  }
  const table = document.createElement("table");
  const cell = (name) => {
    const entry = entries[name];
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = entry.bits;
    Object.assign(button.style, shade(entry.error));
    const text = `${name}: ${bitsOf(entry)}, error ${percent(entry.error)}`;
    button.title = text;
    button.setAttribute("aria-label", text);
    button.setAttribute("aria-pressed", String(name === state.tensor.value));
    button.addEventListener("click", () => { state.tensor.value = name; draw(task, number, state, name); });
    button.dataset.name = name;
    return button;
  };
  const row = (title, names) => {
    const tr = document.createElement("tr");
    const th = document.createElement("th");
    th.scope = "row";
    th.textContent = title;
    tr.append(th);
    for (const name of names) {
      const td = document.createElement("td");
      if (name !== undefined) td.append(cell(name));
      tr.append(td);
    }
    return tr;
  };
  if (layers) {
    const head = document.createElement("thead");
    const tr = document.createElement("tr");
    tr.append(document.createElement("td"));
    for (let i = 0; i < layers; i++) {
      const th = document.createElement("th");
      th.scope = "col";
      th.textContent = `layer ${i}`;
      tr.append(th);
    }
    head.append(tr);
    table.append(head);
  }
  const body = document.createElement("tbody");
  for (const [kind, names] of kinds) body.append(row(kind, Array.from({ length: layers }, (_, i) => names.get(i))));
  for (const name of alone) body.append(row(place(name).kind, [name]));
  table.append(body);
  document.getElementById(`map${number}`).replaceChildren(table);
  const note = document.getElementById(`scale${number}`);
  const ramp = document.createElement("span");
  ramp.className = "ramp";
  ramp.style.background = `linear-gradient(to right, ${[0, .25, .5, .75, 1].map((s) => `rgb(${rampAt(s).join(",")})`).join(",")})`;
  note.replaceChildren("Squared error as a share of the tensor's variance: 0.001 %", ramp, `100 %. Seed ${DATA[task].seed}.`);
}

function drawHistogram(task, number, state) {
  const name = state.tensor.value;
  const weights = DATA[task].weights[name];
  const entry = DATA[task].configurations[state.configuration.value][state.stage.value][name];
  const box = document.getElementById(`histogram${number}`);
  const facts = document.getElementById(`facts${number}`);
  if (!weights || !entry) { box.replaceChildren(); facts.textContent = "This tensor is not in this configuration."; return; }
  const [width, height, left, right, top, bottom] = [760, 320, 84, 16, 14, 62];
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Histogram of ${name}` });
  const counts = weights.counts;
  const most = Math.max(...counts);
  const scale = state.log.checked ? (c) => Math.log10(1 + c) / Math.log10(1 + most) : (c) => c / most;
  const span = weights.high - weights.low || 1;
  const X = (v) => left + (v - weights.low) / span * (width - left - right);
  const Y = (c) => height - bottom - scale(c) * (height - top - bottom);
  const steps = state.log.checked
    ? Array.from({ length: Math.floor(Math.log10(1 + most)) + 1 }, (_, i) => 10 ** i)
    : [0, .25, .5, .75, 1].map((s) => Math.round(s * most));
  for (const c of new Set(steps)) {
    svg.append(element("line", { class: "grid", x1: left, x2: width - right, y1: Y(c), y2: Y(c) }));
    svg.append(element("text", { class: "tick", x: left - 8, y: Y(c) + 4, "text-anchor": "end" }, c.toLocaleString("en")));
  }
  const w = (width - left - right) / counts.length;
  counts.forEach((c, i) => svg.append(element("rect", {
    x: (left + i * w).toFixed(2), y: Y(c).toFixed(2), width: Math.max(w - .5, .5).toFixed(2),
    height: Math.max(height - bottom - Y(c), 0).toFixed(2), fill: "#9db8d2" })));
  for (let i = 0; i <= 4; i++) {
    const v = weights.low + span * i / 4;
    const anchor = i === 4 ? "end" : "middle";
    svg.append(element("text", { class: "tick", x: X(v), y: height - bottom + 30, "text-anchor": anchor }, v.toPrecision(3)));
  }
  svg.append(element("text", { class: "label", x: (left + width - right) / 2, y: height - 10, "text-anchor": "middle" }, "weight"));
  const scheme = DATA[task].configurations[state.configuration.value].scheme;
  const drawable = !entry.scaled;
  if (drawable) {
    const c = entry.centroids.filter((v) => v !== null); // null: not finite
    const equal = scheme === "linear" && entry.codebooks === 1 && !entry.outliers;
    const borders = equal
      ? c.slice(1).map((_, i) => weights.low + span * (i + 1) / c.length)
      : c.slice(1).map((v, i) => (v + c[i]) / 2);
    if (c.length <= 64) {
      for (const v of borders) svg.append(element("line", {
        x1: X(v), x2: X(v), y1: top, y2: height - bottom, stroke: "#5a6270", "stroke-width": .8, "stroke-dasharray": "3 3" }));
    }
    for (const v of c) svg.append(element("line", {
      x1: X(v), x2: X(v), y1: c.length <= 64 ? top : height - bottom, y2: height - bottom + 10, stroke: "#d55e00",
      "stroke-width": c.length <= 64 ? 1.6 : .7 }));
    svg.append(element("text", { class: "tick", x: left, y: height - 10 },
      c.length <= 64 ? `solid: centroids; dashed: ${equal ? "edges of the bins" : "midpoints"}` : "marks below: centroids"));
  }
  box.replaceChildren(svg);
  const books = entry.codebooks > 1 ? `${entry.codebooks} codebooks, the first one is drawn` : "one codebook";
  const more = (entry.outliers ? `, ${entry.outliers} values kept exactly` : "") + (entry.scaled ? ", rows scaled (codebook not drawn)" : "");
  facts.textContent = `${name}: ${weights.shape.join(" x ")}, ${bitsOf(entry)}, ${books}${more}; `
    + `${entry.bytes.toLocaleString("en")} bytes; error ${percent(entry.error)} of the variance.`;
}

function draw(task, number, state, focus) {
  drawMap(task, number, state);
  drawHistogram(task, number, state);
  if (focus) document.getElementById(`map${number}`).querySelector(`button[data-name="${CSS.escape(focus)}"]`).focus();
}

function setUp(section) {
  const number = section.dataset.task;
  const task = Number(number);
  section.querySelectorAll("[data-toggle], [data-stage-toggle]").forEach((box) => box.addEventListener("change", () => {
    const off = (kind) => new Set([...section.querySelectorAll(`[data-${kind}]`)].filter((b) => !b.checked)
      .map((b) => b.getAttribute(`data-${kind}`)));
    const [series, stages] = [off("toggle"), off("stage-toggle")];
    section.querySelectorAll(".series").forEach((g) => {
      g.style.display = series.has(g.dataset.series) || stages.has(g.dataset.stage) ? "none" : "";
    });
  }));
  const configurations = DATA[task].configurations;
  const names = Object.keys(configurations);
  if (!names.length) return;
  const find = (id) => document.getElementById(`${id}${number}`);
  const state = { configuration: find("configuration"), stage: find("stage"), tensor: find("tensor"), log: find("log") };
  const refresh = () => {
    fill(state.stage, ["stage2", "stage3"].filter((s) => configurations[state.configuration.value][s]));
    fill(state.tensor, Object.keys(configurations[state.configuration.value][state.stage.value]));
    draw(task, number, state);
  };
  fill(state.configuration, names);
  for (const control of [state.configuration, state.stage, state.tensor, state.log]) control.addEventListener("change", refresh);
  refresh();
}

document.querySelectorAll("section[data-task]").forEach(setUp);
