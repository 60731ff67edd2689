/* What the page draws, and what its controls do. The numbers come from the other files: runs and answers from
 * data.js, Section 4 from section4.js, the live model from model.js and unlearn.js in a worker.
 *
 * Colours and lines are those of the study's pictures: red ga, black npo; solid with RT, dotted without. */
"use strict";

const COLORS = {ga: "#d62728", npo: "#000000"}, GREEN = "#2ca02c", BLUE = "#1f77b4", GREY = "#8c8c8c";
const WITH_RT = "", WITHOUT_RT = "2 5";  // stroke-dasharray
const PASSES = Math.log10(0.05);
const element = id => document.getElementById(id);
const mean = values => values.reduce((a, b) => a + b, 0) / values.length;
const escaped = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/"/g, "&quot;");
const weightOf = (delta, beta) => 2 * Math.exp(logSigmoid(beta * delta));

const fail = ({message}) => { element("message").textContent = `This page failed: ${message}`; };

window.addEventListener("error", fail);

/** Two or three digits, as a text. */
function short(x) {
  if (x === 0) return "0";
  return (Math.abs(x) < 1e-3 ? x.toExponential(0) : String(+x.toPrecision(2))).replace("-", "−");
}

// ------------------------------------------------------------------------------------------------- charts
/** A function from numbers to pixels. Numbers outside of the axis's range go to its edge. */
function position({range, scale = x => x}, from, to) {
  const [low, high] = range.map(scale);
  return x => from + (to - from) * Math.min(Math.max((scale(x) - low) / (high - low), 0), 1);
}

/** An SVG chart as a text. x and y are {range: [low, high], ticks: [[value, text], ..], label, scale};
 * draw(X, Y) returns the marks, where X and Y turn numbers into pixels. */
function chart({title, x, y, height = 290}, draw) {
  const width = 480, left = 62, right = width - 22, top = 36, bottom = height - 52;
  const X = position(x, left, right), Y = position(y, bottom, top);
  const text = (x, y, kind, words, anchor) => (
    `<text class="${kind}" x="${x}" y="${y}" text-anchor="${anchor}">${words}</text>`);
  const ticks = [
    ...x.ticks.map(([value, words]) => text(X(value), bottom + 19, "tick", words, "middle")),
    ...y.ticks.map(([value, words]) => `<path d="M${left} ${Y(value)}H${right}" stroke="#ddd"/>`
      + text(left - 6, Y(value) + 5, "tick", words, "end"))];
  return `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${escaped(title)}">${ticks.join("")}`
    + `<path d="M${left} ${top}V${bottom}H${right}" fill="none" stroke="#444"/>${draw(X, Y)}`
    + text(4, 20, "title", title, "start")
    + text((left + right) / 2, height - 10, "label", x.label, "middle") + "</svg>";
}

/** A line through points [[x, y], ..]. */
function line(X, Y, points, {color = "#000", dash = "", width = 2.5} = {}) {
  const path = points.map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`).join(" ");
  return `<polyline points="${path}" fill="none" stroke="${color}" stroke-width="${width}" `
    + `stroke-dasharray="${dash}"/>`;
}

function dot(X, Y, [x, y], {color = "#000", radius = 6} = {}) {
  return `<circle cx="${X(x).toFixed(1)}" cy="${Y(y).toFixed(1)}" r="${radius}" fill="${color}"/>`;
}

function note(X, Y, [x, y], words, {color = "#000", anchor = "start", dx = 8, dy = 5} = {}) {
  return `<text class="note" x="${X(x) + dx}" y="${Y(y) + dy}" fill="${color}" text-anchor="${anchor}">`
    + `${words}</text>`;
}

function band(X, Y, [x0, x1], [y0, y1], opacity) {
  return `<rect x="${X(x0)}" y="${Y(y1)}" width="${X(x1) - X(x0)}" height="${Y(y0) - Y(y1)}" fill="${GREEN}" `
    + `opacity="${opacity}"/>`;
}

const ticksAt = values => values.map(value => [value, String(value).replace("-", "−")]);

// ----------------------------------------------------------------------------------------------- controls
/** A slider over a list of values, with the chosen one beside its label. onChange gets the value. */
function slider(parent, label, values, start, onChange, className = "") {
  const box = document.createElement("label");
  box.className = className;
  box.innerHTML = `${label} <output></output><input type="range" max="${values.length - 1}">`;
  const [output, input] = box.children;
  const show = () => { output.textContent = String(values[input.value]).replace("-", "−"); };
  input.addEventListener("input", () => { show(); onChange(values[input.value]); });
  parent.append(box);
  const control = {box, input, get value() { return values[input.value]; },
                   set value(value) { input.value = values.indexOf(value); show(); }};
  control.value = start;
  return control;
}

function button(parent, words, onClick) {
  const made = document.createElement("button");
  made.textContent = words;
  made.addEventListener("click", onClick);
  parent.append(made);
  return made;
}

/** Buttons of which one is pressed. onChange gets its name. */
function buttons(parent, names, start, onChange) {
  const box = document.createElement("div"), press = name => {
    all.forEach((one, i) => one.setAttribute("aria-pressed", names[i] === name));
  };
  const all = names.map(name => button(box, name, () => { press(name); onChange(name); }));
  parent.append(box);
  press(start);
}

// ------------------------------------------------------------------------------------------- 1. the weight
function setUpWeight() {
  const controls = element("weight-controls"), betas = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4];
  const beta = slider(controls, "β", betas, 0.5, drawWeight);
  drawWeight(beta.value);
}

function drawWeight(beta) {
  const marks = [[1 / 2, Math.log(3) / beta], [0.01, Math.log(199) / beta]];  // [W, u = -Delta]
  const curve = Array.from({length: 121}, (_, i) => [-20 + 0.2 * i, weightOf(-20 + 0.2 * i, beta)]);
  const first = chart({
    title: "W = 2σ(βΔ): how hard npo still pushes", y: {range: [0, 2], ticks: ticksAt([0, 0.5, 1, 1.5, 2])},
    x: {range: [-20, 4], ticks: ticksAt([-20, -15, -10, -5, 0]), label: "Δ, nats: forgotten on the left"}},
  (X, Y) => line(X, Y, [[-20, 1], [4, 1]], {color: COLORS.ga, dash: WITHOUT_RT})
    + note(X, Y, [-19.5, 1], "ga: W = 1", {color: COLORS.ga, dx: 0, dy: -8}) + line(X, Y, curve, {width: 3})
    + dot(X, Y, [0, 1]) + note(X, Y, [0, 1], "start", {dx: 8, dy: 18})
    + marks.filter(([, u]) => u <= 20).map(([W, u]) => dot(X, Y, [-u, W])
      + note(X, Y, [-u, W], `${W} after ${short(u)} nats`, u > 12
        ? {dx: -8, dy: -20} : {anchor: "end", dx: -8, dy: -8})).join(""));
  // The exact solution, by u: t = (beta u + e^(beta u) - 1) / (2 beta), with eta = 1.
  const timeOf = u => (beta * u + Math.expm1(beta * u)) / (2 * beta);
  let end = 0;  // beta u at t = 1000
  for (let i = 0; i < 50; i++) end = Math.log1p(2000 * beta - end);
  const us = Array.from({length: 201}, (_, i) => 0.1 * i), last = Math.min(20, end / beta);
  const npo = us.map(u => [timeOf(u * last / 20), u * last / 20]);
  const second = chart({
    title: "u = −Δ: nats that one answer has lost", y: {range: [0, 20], ticks: ticksAt([0, 5, 10, 15, 20])},
    x: {range: [0.1, 1000], scale: Math.log, ticks: ticksAt([0.1, 1, 10, 100, 1000]),
        label: "ηt: time × learning rate"}},
  (X, Y) => line(X, Y, us.map(u => [u, u]), {color: COLORS.ga, dash: WITHOUT_RT})
    + note(X, Y, [17, 17], "ga: u = ηt", {color: COLORS.ga, anchor: "end", dx: -14})
    + line(X, Y, npo, {width: 3})
    + (last < 20 ? note(X, Y, [1000, last], "npo", {anchor: "end", dx: 0, dy: -14})
      : note(X, Y, npo[150], "npo", {dx: 18}))
    + marks.filter(([, u]) => u <= last).map(([W, u]) => dot(X, Y, [timeOf(u), u])
      + note(X, Y, [timeOf(u), u], `W = ${W}`, timeOf(u) < 1
        ? {anchor: "middle", dx: 0, dy: -14} : {anchor: "end", dx: -8, dy: -10})).join(""));
  element("weight-charts").innerHTML = first + second;
}

// --------------------------------------------------------------------------------------------- 2. Section 4
const LABELS = {ga: 34, "ga+rt": 16, npo: -8, "npo+rt": 22};  // pixels below the end of each path
const METHODS = Object.keys(LABELS), LAST_STEP = 2000, BORDER = 2;
const section4 = {alpha: 0.25, beta: 1, lr: 0.005, retainWeight: 1};

function setUpSection4() {
  const controls = element("section4-controls"), draws = draw(DATA.section4.seed);
  const restart = name => value => { section4[name] = value; resetSection4(draws); };
  const alphas = DATA.section4.instances.map(({alpha}) => alpha);
  slider(controls, "α, half the clusters' distance", alphas, section4.alpha, restart("alpha"));
  slider(controls, "β", [0.1, 0.2, 0.5, 1, 2, 5, 10], 1, restart("beta"));
  slider(controls, "learning rate", [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02], 0.005, restart("lr"));
  section4.weight = slider(controls, "retain weight", WEIGHTS, 1, restart("retainWeight"));
  section4.weight.box.insertAdjacentHTML("beforeend", `<div class="mark"></div>`);
  const go = (running, skip) => {
    if (section4.step >= LAST_STEP) resetSection4(draws);
    if (!section4.running) requestAnimationFrame(walk);
    Object.assign(section4, {running, skip});
  };
  section4.button = button(controls, "Start", () => go(!section4.running, false));
  button(controls, "Skip to the end", () => go(true, true));
  resetSection4(draws);
}

const WEIGHTS = [0.03, 0.1, 0.3, 1, 3, 10, 30, 100];

/** All methods back to the start, with the models of this alpha. */
function resetSection4(draws) {
  const models = DATA.section4.instances.find(({alpha}) => alpha === section4.alpha);
  if (section4.models !== models) section4.instance = makeInstance({...draws, ...models});
  Object.assign(section4, {models, step: 0});
  section4.paths = Object.fromEntries(METHODS.map(name => [name, {
    theta: section4.instance.reference.slice(), points: []}]));
  measure();
  drawSection4();
}

function measure() {
  for (const {theta, points} of Object.values(section4.paths)) {
    points.push(section4.instance.tests.map(test => distance(test, theta)));
  }
}

/** One frame: some steps of gradient descent for each method, then the distances. */
function walk() {
  if (section4.running && section4.step < LAST_STEP) {
    const steps = section4.skip ? Math.min(2 + 2 * (section4.step >> 5), LAST_STEP - section4.step) : 2;
    for (const name of METHODS) {
      const [loss, rt] = name.split("+"), {beta, lr, retainWeight} = section4;
      for (let i = 0; i < steps; i++) {
        descend(section4.instance, section4.paths[name].theta, {
          loss, beta, lr, retainWeight: rt ? retainWeight : 0});
      }
    }
    section4.step += steps;
    measure();
    requestAnimationFrame(walk);
  } else {
    section4.running = false;
  }
  drawSection4();
}

function drawSection4() {
  const {paths, step, running, alpha, lr, retainWeight} = section4;
  const ticks = ticksAt([0, 0.05, 0.2, 0.5, 1, BORDER]);
  const axis = label => ({range: [0, BORDER], ticks, label, scale: Math.sqrt});
  element("section4-plane").innerHTML = chart({
    title: "up: distance on retain points, nats", height: 420,
    x: axis("distance on forget points, nats"), y: axis("")},
  (X, Y) => METHODS.map(name => {
    const [loss, rt] = name.split("+"), look = {color: COLORS[loss], dash: rt ? WITH_RT : WITHOUT_RT};
    const {points} = paths[name], first = points.findIndex(point => Math.max(...point) > BORDER);
    const last = first < 0 ? points.length - 1 : first;  // beyond the border a path is not drawn
    const drawn = points.filter((_, i) => i < last && (i < 100 || i % 8 === 0));  // paths begin fast
    return line(X, Y, [...drawn, points[last]], look) + dot(X, Y, points.at(-1), look);
  }).join("") + METHODS.map(name => {
    const end = paths[name].points.at(-1), [right, up] = end.map(x => x > BORDER);
    const arrow = ["", "↑", "→", "↗"][2 * right + up], far = end.filter(x => x > BORDER).map(short);
    const look = {color: COLORS[name.split("+")[0]], dy: LABELS[name]};
    if (end[0] > 0.8) Object.assign(look, {anchor: "end", dx: right && up ? -40 : -8});
    return step ? note(X, Y, end, `${name} ${arrow} ${far.join(", ")}`, look) : "";
  }).join("") + note(X, Y, paths.ga.points[0], "start", {anchor: "end", dx: -10, dy: -6})
    + `<text x="${X(0)}" y="${Y(0) + 8}" font-size="26" text-anchor="middle" fill="${GREEN}">★</text>`);
  element("section4-text").innerHTML = [`Step ${step} of ${LAST_STEP}. Distances, nats:`,
    ...METHODS.map(name => {
      const [forget, retain] = paths[name].points.at(-1).map(short);
      return `${name}: forget ${forget}, retain ${retain}`;
    })].join("<br>");
  element("look-zero").hidden = alpha > 0;
  element("look-apart").hidden = alpha === 0;
  element("look-jump").hidden = lr * retainWeight <= 0.2;
  const critical = section4.models.criticalAtLeast;
  const place = critical && Math.log(critical / WEIGHTS[0]) / Math.log(WEIGHTS.at(-1) / WEIGHTS[0]);
  element("look-critical").children[1].textContent = !critical ? "above a million, or infinite"
    : `at least ${short(critical)}${place > 1 ? ", beyond this slider" : " (▲)"}`;
  section4.weight.box.querySelector(".mark").innerHTML = critical && place <= 1
    ? `<span style="left:${100 * place}%">▲&nbsp;${short(critical)}</span>` : "";
  section4.button.textContent = running ? "Pause" : step >= LAST_STEP ? "Again" : "Start";
}

// ------------------------------------------------------------------------------ 3. runs of the tiny model
const RUNS = Object.fromEntries(DATA.runs.map(run => [run.name, run]));
const state = {run: "npo", with: "npo+rt", step: 24, predict: 0};  // what the address says
const runs = {steps: DATA.runs[0].steps, predicted: {}, page: 0, timer: null};

const PREDICTIONS = Object.fromEntries(Array.from(element("questions").children, ({dataset, children}) => [
  dataset.run, {question: children[0].innerHTML, right: Number(dataset.right),
                choices: Array.from(children[1].children, ({textContent}) => textContent.trim()),
                explanation: children[2].innerHTML}]));

function setUpRuns() {
  const controls = element("runs-controls");
  const {steps} = runs;
  runs.slider = slider(element("runs-step"), "step", steps, 0, step => goTo(steps.indexOf(step)), "wide");
  runs.play = button(controls, "Play", playOrPause);
  button(controls, "Other questions", () => { runs.page ^= 1; drawRuns(); });
  runs.predict = button(controls, "Predict first", () => {
    Object.assign(state, {predict: 1 - state.predict});
    runs.predicted = {};
    drawRuns();
  });
  for (const side of ["run", "with"]) {
    const column = element(side === "run" ? "run-0" : "run-1"), select = document.createElement("select");
    select.innerHTML = DATA.runs.map(({name}) => `<option value="${name}">${nameOf(name)}</option>`).join("");
    select.setAttribute("aria-label", "run");
    select.addEventListener("change", () => { state[side] = select.value; drawRuns(); });
    runs[side] = {select, box: document.createElement("div"), charts: document.createElement("div")};
    runs[side].box.className = "predict";
    column.append(select, runs[side].box, runs[side].charts);
  }
  document.addEventListener("keydown", moveByKey);
  window.addEventListener("hashchange", openAddress);
  openAddress();
}

function nameOf(name) {
  return name === "ga" ? "ga: gradient ascent" : `${name.split("@")[0]}, β ${RUNS[name].beta}`;
}

/** Shows the address, such as #run=npo&with=npo+rt&step=25, at its nearest evaluated step. The page changes
 * the address by itself too, and only an address from outside scrolls the page. */
function openAddress() {
  const scroll = location.hash !== runs.hash && location.hash.includes("run=");
  for (const part of location.hash.slice(1).split("&")) {
    const [key, value = ""] = part.split("=").map(decodeURIComponent);
    if (key === "run" || key === "with") state[key] = value in RUNS ? value : state[key];
    if (key === "step" || key === "predict") state[key] = Number(value) || 0;
  }
  state.step = runs.steps.reduce((a, b) => Math.abs(b - state.step) < Math.abs(a - state.step) ? b : a);
  drawRuns();
  if (scroll) element("runs").scrollIntoView();
}

function moveByKey(event) {
  const {ctrlKey, altKey, metaKey, target} = event;
  if (/INPUT|SELECT|BUTTON/.test(target.tagName) || ctrlKey || altKey || metaKey) return;
  const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (move) goTo(runs.steps.indexOf(state.step) + move);
  if (event.key === " ") playOrPause();
  if (move || event.key === " ") event.preventDefault();
}

function goTo(place) {
  state.step = runs.steps[Math.min(Math.max(place, 0), runs.steps.length - 1)];
  drawRuns();
}

function playOrPause() {
  const atEnd = () => state.step === runs.steps.at(-1), wasPlaying = runs.timer;
  clearInterval(runs.timer);
  runs.timer = null;
  if (!wasPlaying) {
    if (atEnd()) state.step = 0;
    runs.timer = setInterval(() => {
      if (atEnd()) playOrPause();
      else goTo(runs.steps.indexOf(state.step) + 1);
    }, 700);
  }
  drawRuns();
}

function drawRuns() {
  const {run, with: other, step, predict} = state;
  const hash = `#run=${run}&with=${other}&step=${step}` + (predict ? "&predict=1" : "");
  if (location.hash !== hash && (runs.hash || location.hash.includes("run="))) location.replace(hash);
  runs.hash = hash;
  const at = runs.steps.indexOf(state.step);
  runs.slider.value = state.step;
  runs.play.textContent = runs.timer ? "Pause" : "Play";
  runs.predict.setAttribute("aria-pressed", Boolean(state.predict));
  element("runs-lesson").hidden = Boolean(predict);
  for (const side of ["run", "with"]) {
    const name = state[side], {select, box, charts} = runs[side], choice = runs.predicted[name];
    select.value = name;
    box.hidden = !predict;
    if (hidden(name)) ask(box, name);
    else if (predict) box.innerHTML = verdict(RUNS[name], at, choice);
    charts.innerHTML = hidden(name) ? "" : drawnRun(RUNS[name], at);
  }
  drawAnswers();
}

const hidden = name => state.predict && runs.predicted[name] === undefined;

/** The question of a run; its pictures come when a choice is made. */
function ask(box, name) {
  const {question, choices} = PREDICTIONS[name];
  box.innerHTML = `<p><b>Before you look.</b> ${question}</p>`;
  choices.forEach((words, choice) => button(box, words, () => {
    runs.predicted[name] = choice;
    drawRuns();
  }));
}

/** What is told after a choice, about evaluation `at`. */
function verdict(run, at, choice) {
  const {choices, right, explanation} = PREDICTIONS[run.name], now = {
    STEP: run.steps[at], UTILITY: run.utility[at].toFixed(2), QUALITY: short(10 ** run.qualityLog10[at])};
  return `<p>${choice === right ? "You were right." : "Not so."} The answer is: <b>${choices[right]}.</b> `
    + explanation.replace(/STEP|UTILITY|QUALITY/g, word => now[word]) + "</p>";
}

/** The pictures of a run at evaluation `at`. */
function drawnRun(run, at) {
  return [drawnDots, drawnQuality, drawnUtility, drawnRatios].map(drawn => drawn(run, at)).join("");
}

function drawnDots(run, at) {
  const ga = run.loss === "ga", low = ga ? -480 : -40;  // ga goes further than the others' axis
  const W = delta => ga ? 1 : weightOf(delta, run.beta), forget = run.delta.forget[at];
  const curve = Array.from({length: 177}, (_, i) => low + (4 - low) * i / 176);
  const averageW = mean(forget.map(W)), further = forget.filter(x => x < low).length;
  const jitter = i => -0.4 - 0.26 * (i * 0.618 % 1);  // retained answers lie in a strip of their own
  return chart({
    title: ga ? "W = 1 for every answer" : `W of each forget answer: mean ${short(averageW)}`,
    x: {range: [low, 4], ticks: ticksAt([low, 3 * low / 4, low / 2, low / 4, 0]), label: "Δ, in nats"},
    y: {range: [-0.75, 2], ticks: ticksAt([0, 0.5, 1, 2])}},
  (X, Y) => line(X, Y, curve.map(x => [x, W(x)]), {color: GREY, width: 1.5})
    + run.delta.retain[at].map((x, i) => dot(X, Y, [x, jitter(i)], {color: GREY + "80", radius: 4})).join("")
    + forget.map(x => dot(X, Y, [x, W(x)], {color: COLORS[run.loss] + "50", radius: 5})).join("")
    + note(X, Y, [low, -0.2], "retain answers", {color: "#555", dx: 6})
    + (further ? note(X, Y, [low, 1.3], `← ${further} forget answers are further left`, {dx: 4}) : ""));
}

const QUALITY = {range: [-35, 0], scale: x => -Math.sqrt(-x), note: " (vertical axis stretched near 1)",
                 ticks: [[0, "1"], [PASSES, "0.05"], [-4, "10⁻⁴"], [-10, "10⁻¹⁰"], [-20, "10⁻²⁰"],
                         [-30, "10⁻³⁰"]]};
const SHARE = {range: [0, 1], ticks: ticksAt([0, 0.5, 1])};
const STEPS = {range: [0, 125], ticks: ticksAt([0, 25, 50, 75, 100, 125])};

/** A quantity over the steps, with the point of evaluation `at`. */
function overSteps(run, at, values, title, y, marks) {
  const points = run.steps.map((step, i) => [step, values[i]]);
  const look = {color: COLORS[run.loss], dash: run.retainWeight ? WITH_RT : WITHOUT_RT};
  const x = {...STEPS, label: `step${y.note ?? ""}`};
  return chart({title, x, y, height: 240}, (X, Y) => marks(X, Y) + line(X, Y, points, look)
    + dot(X, Y, points[at], {color: look.color, radius: 9}));
}

function drawnQuality(run, at) {
  const now = run.qualityLog10[at], among = Math.log10(DATA.judge.qualityAmong);
  const title = `Forget quality: p = ${short(10 ** now)}, ${now > PASSES ? "passes" : "fails"} `
    + `(utility ${run.utility[at].toFixed(2)})`;
  return overSteps(run, at, run.qualityLog10, title, QUALITY, (X, Y) => band(X, Y, [0, 125], [PASSES, 0], 0.2)
    + band(X, Y, [0, 125], [among, 0], 0.35));
}

function drawnUtility(run, at) {
  const [low, high] = DATA.judge.utility.toSorted();
  const [now, forget, retain] = [run.utility, run.probability.forget, run.probability.retain].map(
    values => values[at].toFixed(2));
  const title = `Utility ${now}; probability: forget ${forget}, retain ${retain}`;
  return overSteps(run, at, run.utility, title, SHARE, (X, Y) => (
    band(X, Y, [0, 125], [low - 0.005, high + 0.005], 0.5)
      + note(X, Y, [124, high], "retrained models", {color: "#1a7a1a", anchor: "end", dx: 0, dy: -8})));
}

/** The cumulative curves of log R that the test compares. */
function drawnRatios(run, at) {
  const own = run.logR[at], judge = DATA.judge.logR, {rows, at: place, p} = ksTest(own, judge);
  const n = own.length, below = values => values.filter(x => x <= place).length / n;
  const steps = values => values.toSorted((a, b) => a - b).flatMap((x, i) => [[x, i / n], [x, (i + 1) / n]]);
  return chart({
    title: `Largest gap: ${rows} of ${n} rows, p = ${short(p)}`,
    x: {range: [-2.5, 2.5], ticks: ticksAt([-2, -1, 0, 1, 2]), label: "log R: above 0, truth is likelier"},
    y: SHARE},
  (X, Y) => line(X, Y, steps(judge), {color: GREEN, width: 4})
    + line(X, Y, steps(own), {color: COLORS[run.loss], dash: run.retainWeight ? WITH_RT : WITHOUT_RT})
    + line(X, Y, [[place, below(own)], [place, below(judge)]], {width: 5, color: BLUE})
    + note(X, Y, [-2.4, 0.92], "green: retrained model", {color: "#1a7a1a", dx: 0}));
}

/** An answer as HTML. Marked are words that stand neither in the question, nor in the true answer, nor in the
 * wording that all answers share; and words that are repeated or run together. */
function marked(answer, {question, answer: truth}) {
  const plain = word => word.toLowerCase().replace(/'s\b|[^\p{L}\p{N}]/gu, "");
  const words = answer.split(/\s+/).filter(Boolean);
  const right = new Set([...`${question} ${truth}`.split(/\s+/).map(plain), ...DATA.judge.wording, ""]);
  return words.map((word, i) => {
    const repeated = i > 0 && plain(word) === plain(words[i - 1]);
    const garbled = repeated || /\p{Ll}\p{Lu}|[.,?!]\p{L}/u.test(word);
    const kind = garbled ? "garbled" : right.has(plain(word)) ? "" : "wrong";
    return kind ? `<span class="${kind}">${escaped(word)}</span>` : escaped(word);
  }).join(" ") || "(nothing)";
}

/** A question with its true answer, and answers [[who, text], ..]. */
function card(kind, row, answers) {
  const rows = [["truth", row.answer], ...answers].map(([who, text]) => (
    `<p><small>${who}</small><span>${marked(text, row)}</span></p>`));
  return `<div class="card"><h3>${kind}: ${escaped(row.question)}</h3>${rows.join("")}</div>`;
}

function drawAnswers() {
  const at = runs.steps.indexOf(state.step), places = [0, 1, 2].map(i => i + 3 * runs.page);
  const names = [...new Set([state.run, state.with])].filter(name => !hidden(name));
  element("run-answers").innerHTML = ["forget", "retain"].flatMap(kind => places.map(i => {
    const question = DATA.judge.questions[kind][i];
    return card(kind, question, [["retrained", question.retrained],
      ...names.map(name => [name.replace("@", ", β "), RUNS[name].answers[kind][at][i]])]);
  })).join("");
}

// ------------------------------------------------------------------------------------- 4. the live model
/** What runs in the worker. It holds the weights, and takes one step per message. */
function liveWorker() {
  const BATCH = 8, WARMUP = 5, NEW_TOKENS = 20;
  let start, weights, adam, rows, referenceLogps, measured, questions;
  const probability = part => {
    const texts = part.slice(0, measured), tokens = texts.map(({ids, start}) => ids.length - start);
    return mean(answerLogps(weights, texts).map((logp, b) => Math.exp(logp / tokens[b])));
  };
  const batchOf = (part, step) => Array.from({length: BATCH}, (_, i) => (BATCH * step + i) * 7 % part.length);

  onmessage = ({data: {setUp, reset, step, objective, lr}}) => {
    if (setUp) {
      ({rows, measured, questions} = setUp);
      start = withConfig(setUp.weights, setUp.config);
      referenceLogps = answerLogps(start, rows.forget);
    }
    if (setUp || reset) [weights, adam] = [copyWeights(start), {}];
    const began = performance.now(), report = {step: 0};
    if (step) {
      const forget = batchOf(rows.forget, step - 1), batch = {
        forget: forget.map(i => rows.forget[i]), referenceLogps: forget.map(i => referenceLogps[i]),
        retain: batchOf(rows.retain, step - 1).map(i => rows.retain[i])};
      const rate = lr * Math.min(1, step / WARMUP);
      Object.assign(report, {step, ...unlearnStep(weights, batch, objective, adam, {lr: rate})});
      report.seconds = (performance.now() - began) / 1000;
    }
    report.probability = {};
    for (const name in rows) report.probability[name] = probability(rows[name]);
    if (report.step % 4 === 0) {
      report.answers = questions.map(({ids, start: end}) => generate(weights, ids.slice(0, end), NEW_TOKENS));
    }
    postMessage(report);
  };
}

/** A worker with the functions of model.js and unlearn.js. A page from file:// may not load a worker from a
 * file, so their text is handed over: every function that a script of this page declared. */
function makeWorker() {
  const declared = Object.values(Object.getOwnPropertyDescriptors(window)).map(({value}) => value)
    .filter(value => typeof value === "function").map(String)
    .filter(text => text.startsWith("function ") && !text.includes("[native code]"));
  const constants = `"use strict"; const OBJECTIVES = globalThis, mean = ${mean};`;
  const text = [constants, ...declared, "liveWorker();"].join("\n");
  return new Worker(URL.createObjectURL(new Blob([text], {type: "text/javascript"})));
}

const live = {method: "npo+rt", beta: 0.5, lr: 0.001, retainWeight: 1, running: false, busy: true,
              reports: [], answers: []};
const LIVE_LINES = {forget: [COLORS.ga, "6 4"], retain: [GREEN, ""], unseen: [BLUE, "2 4"]};

function setUpLive() {
  const controls = element("live-controls"), set = name => value => { live[name] = value; };
  buttons(controls, ["ga", "npo", "npo+rt"], live.method, method => { live.method = method; drawLive(); });
  live.betas = slider(controls, "β", [0.01, 0.05, 0.1, 0.2, 0.5, 1, 2, 4], 0.5, set("beta"));
  slider(controls, "learning rate", [0.0002, 0.0005, 0.001, 0.002], 0.001, set("lr"));
  live.weights = slider(controls, "retain weight", [0.1, 0.2, 0.5, 1, 2, 5], 1, set("retainWeight"));
  live.button = button(controls, "Start", () => { live.running = !live.running; nextStep(); drawLive(); });
  button(controls, "Step", () => { live.running = false; nextStep(); });
  button(controls, "Reset", () => {
    Object.assign(live, {running: false, busy: true, reports: []});
    live.worker.postMessage({reset: true});
  });
  live.questions = ["forget", "retain"].flatMap(kind => DATA.judge.questions[kind].map(question => (
    {...question, kind, ...DATA.rows[kind].find(row => row.question === question.question)}))
    .filter(({ids}) => ids).slice(0, 3));
  live.worker = makeWorker();
  live.worker.onmessage = ({data}) => receive(data);
  live.worker.onerror = fail;
  live.worker.postMessage({setUp: {weights: loadWeights(DATA), config: DATA.config, rows: DATA.rows,
                                   measured: DATA.live.measured, questions: live.questions}});
  drawLive();
}

function nextStep() {
  if (live.busy) return;
  const [loss, rt] = live.method.split("+"), {beta, lr, retainWeight} = live;
  Object.assign(live, {busy: true, stepped: live.method});
  live.worker.postMessage({step: live.reports.at(-1).step + 1, lr,
                           objective: {loss, beta, retainWeight: rt ? retainWeight : 0}});
}

function receive(report) {
  if (report.step === 0) live.reports = [];
  else if (!live.reports.length) return;  // a step that ended after Reset was pressed
  live.reports.push(report);
  live.answers = report.answers ?? live.answers;
  live.busy = false;
  if (location.hash === "#selftest") selfTest(report);
  if (live.running) nextStep();
  drawLive();
}

/** Under the address #selftest the page takes 20 steps, and writes the last report into its title. */
function selfTest({step, probability}) {
  live.running = step < 20;
  const seconds = mean(live.reports.slice(1).map(report => report.seconds));
  if (step === 20) document.title = `selftest ${JSON.stringify({step, probability, seconds})}`;
}

function textOf(ids) {
  return ids.map(id => DATA.vocabulary[id]).join("").trim()
    .replace(/^(?=.{81})(.{60,80}) .+|^(.{80}).+/su, "$1$2 …");
}

function drawLive() {
  const {reports, running, method, stepped} = live, last = reports.at(-1);
  live.button.textContent = running ? "Pause" : "Start";
  live.betas.input.disabled = method === "ga";
  live.weights.input.disabled = method !== "npo+rt";
  if (!last) { element("live-text").textContent = "The model is being read."; return; }
  const {step, parts, seconds} = last, slow = seconds > 2 ? ", slower than this page was made for" : "";
  const fixed = x => x.toFixed(2).replace("-", "−");
  element("live-text").textContent = `Step ${step}. ` + (!parts ? "Choose a method and press Start."
    : (method === stepped ? "" : `Now ${method}, from step ${step}. `)
      + (stepped === "npo+rt" ? `Loss ${fixed(last.loss)} = forget ${fixed(parts.forget)} + retain weight × `
      + `${fixed(parts.retain)}, in nats.` : `Loss ${fixed(last.loss)} nats.`)
      + ` Mean W ${short(parts.meanWeight)}. A step took ${seconds.toFixed(1)} s${slow}.`);
  const end = 20 * Math.max(1, Math.ceil(step / 20));
  const x = {range: [0, end], ticks: ticksAt([0, end / 2, end]), label: "step"};
  element("live-probability").innerHTML = chart({
    title: "Probability per token; thin lines: retrained model", x, y: {...SHARE, range: [0, 1.2]}},
  (X, Y) => Object.entries(LIVE_LINES).map(([name, [color, dash]], i) => {
    const points = reports.map(({step, probability}) => [step, probability[name]]);
    const level = DATA.live.probability.retrained;
    return line(X, Y, [[0, level[name]], [end, level[name]]], {color, dash, width: 1})
      + line(X, Y, points, {color, dash, width: 3.5}) + dot(X, Y, points.at(-1), {color})
      + note(X, Y, [i * end / 3, 1.1], `${name} ${points.at(-1)[1].toFixed(2)}`, {color});
  }).join(""));
  // A report has W before its step. At the start W is 1.
  const weights = [[0, 1], ...reports.slice(2).map(({step, parts}) => [step - 1, parts.meanWeight])];
  element("live-weight").innerHTML = chart({
    title: "Mean W of the step's forget rows", x, y: {range: [1e-6, 2], scale: Math.log,
      ticks: [[1, "1"], [0.01, "0.01"], [1e-4, "10⁻⁴"], [1e-6, "10⁻⁶"]]}},
  (X, Y) => line(X, Y, weights, {width: 3}) + dot(X, Y, weights.at(-1)));
  element("live-answers").innerHTML = live.questions.map((question, i) => card(question.kind, question, [
    ["retrained", question.retrained], ["this model", textOf(live.answers[i] ?? [])]])).join("");
}

setUpWeight();
setUpSection4();
setUpRuns();
setUpLive();
