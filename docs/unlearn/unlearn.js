/* The objectives of the paper, AdamW, and one step of unlearning. As `losses.py`: arrays in, arrays out, the
 * sums of an answer's log-probabilities in nats. The caller takes the mean. Shapes: B answers. */
"use strict";

/** log sigmoid(x), without overflow. */
function logSigmoid(x) {
  return Math.min(x, 0) - Math.log1p(Math.exp(-Math.abs(x)));
}

/** -log pi_theta in nats, (B,): RT, the retain term (Section 2). */
function nllLoss(policyLogps) {
  return Array.from(policyLogps, logp => -logp);
}

/** log pi_theta in nats, (B,): gradient ascent (Eq. 1). Not bounded below. */
function gaLoss(policyLogps) {
  return Array.from(policyLogps);
}

/** -(2/beta) log sigmoid(-beta (log pi_theta - log pi_ref)), (B,) (Eq. 3), in nats. Bounded below by 0. */
function npoLoss(policyLogps, referenceLogps, beta) {
  return Array.from(policyLogps, (logp, b) => -2 / beta * logSigmoid(-beta * (logp - referenceLogps[b])));
}

/** W = 2 sigmoid(beta (log pi_theta - log pi_ref)), (B,) in (0, 2) (Eq. 5). */
function npoWeight(policyLogps, referenceLogps, beta) {
  return Array.from(policyLogps, (logp, b) => 2 * Math.exp(logSigmoid(beta * (logp - referenceLogps[b]))));
}

/** One AdamW update in place, betas 0.9 and 0.999, eps 1e-8, as torch's. weights and gradients {name:
 * Float32Array}; state is {} at first, and holds the moments and the number of updates. Norms do not decay.
 */
function adamwStep(weights, gradients, state, {lr, weightDecay = 0}) {
  const BETA1 = 0.9, BETA2 = 0.999, EPS = 1e-8;
  state.step = (state.step ?? 0) + 1;
  state.moments ??= {};
  const correction1 = 1 - BETA1 ** state.step, correction2 = Math.sqrt(1 - BETA2 ** state.step);
  for (const name in gradients) {
    const p = weights[name], g = gradients[name], decay = name.includes("norm") ? 0 : weightDecay;
    state.moments[name] ??= {m: new Float32Array(p.length), v: new Float32Array(p.length)};
    const {m, v} = state.moments[name];
    for (let i = 0; i < p.length; i++) {
      m[i] += (1 - BETA1) * (g[i] - m[i]);
      v[i] = BETA2 * v[i] + (1 - BETA2) * g[i] * g[i];
      p[i] = p[i] * (1 - lr * decay) - lr / correction1 * m[i] / (Math.sqrt(v[i]) / correction2 + EPS);
    }
  }
}

/** The learning rate of update `step` (from 0): up from 0 for `warmup` updates, then down to 0 at `steps`. */
function scheduledRate(lr, step, warmup, steps) {
  return lr * (step < warmup ? step / warmup : (steps - step) / (steps - warmup));
}

/** One step: the gradient of the objective on the batch (see lossAndGradients), then one AdamW update of
 * `weights` in place. -> {loss, parts}, in nats, of the weights before the update. */
function unlearnStep(weights, batch, objective, state, {lr, weightDecay = 0.01}) {
  const model = typeof module === "object" ? require("./model.js") : globalThis;
  const {loss, parts, gradients} = model.lossAndGradients(weights, batch, objective);
  adamwStep(weights, gradients, state, {lr, weightDecay});
  return {loss, parts};
}

if (typeof module === "object") {
  module.exports = {nllLoss, gaLoss, npoLoss, npoWeight, adamwStep, scheduledRate, unlearnStep, logSigmoid};
}
