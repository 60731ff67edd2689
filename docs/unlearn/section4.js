/* Section 4 of the paper: a logistic model on random features, unlearned by full-batch gradient descent. It
 * takes the steps of `synthetic.py`, in float64.
 *
 * Shapes, row-major: D inputs (16), N features (128), n rows. Labels are 0 or 1. theta (N,) gives log-odds.
 */
"use strict";

const D = 16, N = 128, ROWS = {x_retain: 1000, x_forget: 200, x_retain_test: 1000, x_forget_test: 1000};
const TRAIN_LR = 0.05, TRAIN_STEPS = 20000;  // of the reference and of the retrained model

function sigmoid(x) {
  return x > 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x));
}

/** Uniform numbers in (0, 1) from a 32-bit seed (mulberry32). */
function uniforms(seed) {
  let state = seed >>> 0;
  return () => {
    state = state + 0x6D2B79F5 >>> 0;
    let t = Math.imul(state ^ state >>> 15, state | 1);
    t ^= t + Math.imul(t ^ t >>> 7, t | 61);
    return ((t ^ t >>> 14) >>> 0) / 4294967296 + 2 ** -33;
  };
}

/** A draw of the inputs without their mean, as `data/synthetic_instances.fresh_instance` (by other numbers):
 * {W (N, D), x_* (n, D), y_* (n,)}, lists of lists. */
function draw(seed) {
  const uniform = uniforms(seed);
  const normal = () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
  const matrix = (n, scale) => Array.from({length: n}, () => Array.from({length: D}, () => scale * normal()));
  const record = {W: matrix(N, 1 / Math.sqrt(D))};
  for (const name in ROWS) record[name] = matrix(ROWS[name], 1);
  const total = x => x.reduce((a, b) => a + b, 0) / Math.sqrt(D) + 1;
  record.y_retain = record.x_retain.map(x => uniform() < sigmoid(-total(x)) ? 1 : 0);
  record.y_forget = record.x_forget.map(x => uniform() < sigmoid(total(x)) ? 1 : 0);
  return record;
}

/** relu(W (x + mean)): W (N, D), x (n, D) -> {values (n, N), n}. */
function features(W, x, mean) {
  const values = new Float64Array(x.length * N);
  x.forEach((row, i) => W.forEach((w, f) => {
    let sum = 0;
    for (let d = 0; d < D; d++) sum += w[d] * (row[d] + mean);
    values[i * N + f] = Math.max(sum, 0);
  }));
  return {values, n: x.length};
}

/** Log-odds of each row: Z (n, N), theta (N,) -> (n,). */
function logOdds(Z, theta) {
  const odds = new Float64Array(Z.n);
  for (let i = 0, at = 0; i < Z.n; i++) {
    let sum = 0;
    for (let f = 0; f < N; f++, at++) sum += Z.values[at] * theta[f];
    odds[i] = sum;
  }
  return odds;
}

/** theta += rate * sum over rows of slopes (n,) * Z (n, N). */
function addRows(theta, Z, slopes, rate) {
  for (let i = 0, at = 0; i < Z.n; i++) {
    const slope = rate * slopes[i];
    for (let f = 0; f < N; f++, at++) theta[f] += slope * Z.values[at];
  }
}

/** Gradient descent on the mean cross-entropy of these [Z, y] sets together, from 0: theta (N,). */
function train(sets, steps) {
  const theta = new Float64Array(N), rows = sets.reduce((sum, [Z]) => sum + Z.n, 0);
  for (let step = 0; step < steps; step++) {
    const slopes = sets.map(([Z, y]) => logOdds(Z, theta).map((odds, i) => y[i] - sigmoid(odds)));
    sets.forEach(([Z], s) => addRows(theta, Z, slopes[s], TRAIN_LR / rows));
  }
  return theta;
}

/** A seed, or a record {W, x_retain, y_retain, x_forget, y_forget, x_retain_test, x_forget_test} with, if
 * they are known, reference and retrained (N,). alpha is the mean of the forget cluster, -alpha the retain
 * cluster's. -> {forget, retain: {Z, y}, tests: [{Z, odds}] of forget and retain, reference, retrained,
 * referenceOdds}: the odds (rows,) are the retrained model's on the test points, and the reference's on the
 * forget points. */
function makeInstance(seedOrRecord, {alpha = seedOrRecord.alpha ?? 1, trainSteps = TRAIN_STEPS} = {}) {
  const record = typeof seedOrRecord === "number" ? draw(seedOrRecord) : seedOrRecord;
  const part = (name, mean) => features(record.W, record[name], mean);
  const forget = {Z: part("x_forget", alpha), y: record.y_forget};
  const retain = {Z: part("x_retain", -alpha), y: record.y_retain};
  const sets = [[retain.Z, retain.y], [forget.Z, forget.y]];
  const reference = Float64Array.from(record.reference ?? train(sets, trainSteps));
  const retrained = Float64Array.from(record.retrained ?? train(sets.slice(0, 1), trainSteps));
  const tests = [part("x_forget_test", alpha), part("x_retain_test", -alpha)].map(
    Z => ({Z, odds: logOdds(Z, retrained)}));
  return {forget, retain, tests, reference, retrained, referenceOdds: logOdds(forget.Z, reference)};
}

/** Mean KL(pi_retr || pi_theta) in nats on a test set. */
function distance({Z, odds}, theta) {
  const logSigmoid = x => Math.min(x, 0) - Math.log1p(Math.exp(-Math.abs(x)));
  let total = 0;
  logOdds(Z, theta).forEach((policy, i) => {
    const p = sigmoid(odds[i]);
    total += p * (logSigmoid(odds[i]) - logSigmoid(policy))
      + (1 - p) * (logSigmoid(-odds[i]) - logSigmoid(-policy));
  });
  return total / Z.n;
}

/** One step of gradient descent on L_forget + retainWeight RT, in place: theta (N,). loss is "ga" or "npo".
 */
function descend(instance, theta, {loss, beta, lr, retainWeight = 0}) {
  const {forget, retain, referenceOdds: before} = instance;
  const logp = (odds, label) => {
    const margin = label ? odds : -odds;
    return Math.min(margin, 0) - Math.log1p(Math.exp(-Math.abs(margin)));
  };
  const odds = logOdds(forget.Z, theta), kept = retainWeight ? logOdds(retain.Z, theta) : [];
  const push = odds.map((x, i) => {
    const y = forget.y[i], slope = y - sigmoid(x);  // of log pi_theta(y|x) by the log-odds
    const W = loss === "npo" ? 2 * sigmoid(beta * (logp(x, y) - logp(before[i], y))) : 1;
    return W * slope;
  });
  const pull = kept.map((x, i) => retain.y[i] - sigmoid(x));
  addRows(theta, forget.Z, push, -lr / forget.Z.n);
  if (retainWeight) addRows(theta, retain.Z, pull, retainWeight * lr / retain.Z.n);
}

/** The path from the reference: {forgetDistance, retainDistance}, nats, of the steps 0 to `steps`. */
function pathOf(instance, {loss, beta = 1, lr, retainWeight = 0, steps}) {
  const theta = instance.reference.slice(), path = {forgetDistance: [], retainDistance: []};
  for (let step = 0; ; step++) {
    path.forgetDistance.push(distance(instance.tests[0], theta));
    path.retainDistance.push(distance(instance.tests[1], theta));
    if (step === steps) return path;
    descend(instance, theta, {loss, beta, lr, retainWeight});
  }
}

if (typeof module === "object") module.exports = {draw, makeInstance, pathOf, descend, distance};
