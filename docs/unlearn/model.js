/* A small Llama, forward and backward, by hand: plain JavaScript with Float32Array, no library, no DOM.
 *
 * A batch's texts lie one after the other in one matrix of T rows, a row per token. Only attention looks at
 * more than one row, so only it needs to know where a text begins. Every matrix product of the model is one
 * function, `multiply`. Every layer is a function, and its backward pass is the function below it.
 *
 * Shapes, row-major: T tokens, H hidden size (192), A heads of D numbers (6 of 32), F width of the MLP
 * (512), V vocabulary (2,048), P places at which the next token is predicted. A weight is (out, in), as in
 * PyTorch. Sums run in float64 and are stored in float32. / */
"use strict";

const OBJECTIVES = typeof module === "object" ? require("./unlearn.js") : globalThis;

// ------------------------------------------------------------------------------------------ the weights
/** The number that 16 bits mean as an IEEE half-precision float. */
function halfToNumber(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** data.js -> {transformers' parameter name: Float32Array}, values of float16. `config` is a hidden property.
 */
function loadWeights(data) {
  const text = atob(data.weights.base64), weights = {};
  let at = 0;
  for (const {name, shape} of data.weights.names) {
    const values = weights[name] = new Float32Array(shape.reduce((a, b) => a * b, 1));
    for (let i = 0; i < values.length; i++, at += 2) {
      values[i] = halfToNumber(text.charCodeAt(at) | text.charCodeAt(at + 1) << 8);
    }
  }
  return withConfig(weights, data.config);
}

/** The same weights with the model's config beside them, where a loop over the names does not meet it. */
function withConfig(weights, config) {
  return Object.defineProperty(weights, "config", {value: config});
}

/** A copy that can be trained. */
function copyWeights(weights) {
  const copy = {};
  for (const name in weights) copy[name] = weights[name].slice();
  return withConfig(copy, weights.config);
}

// -------------------------------------------------------------------------------------- matrix products
/** A B^T: A (m, k), B (n, k) -> (m, n). Four rows of each at a time, so that a number read is used four
 * times. */
function multiply(A, B, m, n, k) {
  const C = new Float32Array(m * n);
  const whole = m - m % 4, wide = n - n % 4;
  for (let i = 0; i < whole; i += 4) {
    for (let j = 0; j < wide; j += 4) {
      let c00 = 0, c01 = 0, c02 = 0, c03 = 0, c10 = 0, c11 = 0, c12 = 0, c13 = 0;
      let c20 = 0, c21 = 0, c22 = 0, c23 = 0, c30 = 0, c31 = 0, c32 = 0, c33 = 0;
      let a = i * k, b = j * k;
      for (const end = a + k; a < end; a++, b++) {
        const a0 = A[a], a1 = A[a + k], a2 = A[a + 2 * k], a3 = A[a + 3 * k];
        const b0 = B[b], b1 = B[b + k], b2 = B[b + 2 * k], b3 = B[b + 3 * k];
        c00 += a0 * b0; c01 += a0 * b1; c02 += a0 * b2; c03 += a0 * b3;
        c10 += a1 * b0; c11 += a1 * b1; c12 += a1 * b2; c13 += a1 * b3;
        c20 += a2 * b0; c21 += a2 * b1; c22 += a2 * b2; c23 += a2 * b3;
        c30 += a3 * b0; c31 += a3 * b1; c32 += a3 * b2; c33 += a3 * b3;
      }
      let c = i * n + j;
      C[c] = c00; C[c + 1] = c01; C[c + 2] = c02; C[c + 3] = c03; c += n;
      C[c] = c10; C[c + 1] = c11; C[c + 2] = c12; C[c + 3] = c13; c += n;
      C[c] = c20; C[c + 1] = c21; C[c + 2] = c22; C[c + 3] = c23; c += n;
      C[c] = c30; C[c + 1] = c31; C[c + 2] = c32; C[c + 3] = c33;
    }
  }
  for (let i = 0; i < m; i++) {  // what four does not divide
    for (let j = i < whole ? wide : 0; j < n; j++) {
      let sum = 0;
      for (let x = 0; x < k; x++) sum += A[i * k + x] * B[j * k + x];
      C[i * n + j] = sum;
    }
  }
  return C;
}

/** A (m, n) -> A^T (n, m). */
function transpose(A, m, n) {
  const B = new Float32Array(m * n);
  for (let i = 0; i < m; i++) for (let j = 0; j < n; j++) B[j * m + i] = A[i * n + j];
  return B;
}

/** target += values, both of one shape. */
function addTo(target, values) {
  for (let i = 0; i < target.length; i++) target[i] += values[i];
}

/** The sum of two arrays of one shape. */
function sum(a, b) {
  const c = a.slice();
  addTo(c, b);
  return c;
}

// --------------------------------------------------------------------- the layers, each with its backward
/** y = x W^T: x (T, in), W (out, in) -> (T, out). */
function linear(x, W, inputs) {
  return multiply(x, W, x.length / inputs, W.length / inputs, inputs);
}

/** From dy (T, out): adds dy^T x to gradient (out, in), and returns dx = dy W, (T, in). */
function linearBackward(dy, x, W, gradient, inputs) {
  const tokens = x.length / inputs, outputs = W.length / inputs;
  const dyT = transpose(dy, tokens, outputs), xT = transpose(x, tokens, inputs);
  addTo(gradient, multiply(dyT, xT, outputs, inputs, tokens));
  return multiply(dy, transpose(W, outputs, inputs), tokens, inputs, outputs);
}

/** E[ids]: E (V, H) -> (T, H). */
function embedding(E, ids, H) {
  const x = new Float32Array(ids.length * H);
  ids.forEach((id, t) => x.set(E.subarray(id * H, (id + 1) * H), t * H));
  return x;
}

/** Adds dx (T, H) to the rows `ids` of the gradient (V, H). */
function embeddingBackward(dx, ids, gradient, H) {
  ids.forEach((id, t) => {
    for (let h = 0; h < H; h++) gradient[id * H + h] += dx[t * H + h];
  });
}

/** 1 / sqrt(mean x^2 + eps) of each row: x (T, H) -> (T,). */
function inverseNorms(x, H, eps) {
  return Float64Array.from({length: x.length / H}, (_, t) => {
    let squares = 0;
    for (let h = 0; h < H; h++) squares += x[t * H + h] ** 2;
    return 1 / Math.sqrt(squares / H + eps);
  });
}

/** RMS norm: x (T, H) divided by its root mean square, times g (H,). */
function rmsNorm(x, g, eps) {
  const H = g.length, y = new Float32Array(x.length), inverse = inverseNorms(x, H, eps);
  for (let i = 0; i < x.length; i++) y[i] = x[i] * inverse[Math.floor(i / H)] * g[i % H];
  return y;
}

/** From dy (T, H): adds to gradient (H,), and returns dx (T, H). */
function rmsNormBackward(dy, x, g, gradient, eps) {
  const H = g.length, dx = new Float32Array(x.length), inverse = inverseNorms(x, H, eps);
  for (let t = 0, at = 0; t < inverse.length; t++, at += H) {
    const r = inverse[t];
    let dot = 0;
    for (let h = 0; h < H; h++) {
      gradient[h] += dy[at + h] * x[at + h] * r;
      dot += dy[at + h] * g[h] * x[at + h];
    }
    for (let h = 0; h < H; h++) dx[at + h] = r * (dy[at + h] * g[h] - x[at + h] * r * r * dot / H);
  }
  return dx;
}

/** Rotary positions: turns the pairs (d, d + D/2) of every head of x (T, H) by an angle that grows with the
 * token's position. sign = 1 turns, sign = -1 turns back, which is also the backward pass. */
function rotate(x, positions, config, sign) {
  const {head_dim: D, rope_theta: base} = config, H = x.length / positions.length;
  const y = new Float32Array(x.length);
  for (let d = 0; d < D / 2; d++) {
    const frequency = base ** (-2 * d / D);
    positions.forEach((position, t) => {
      const cos = Math.cos(position * frequency), sin = sign * Math.sin(position * frequency);
      for (let i = t * H + d, end = (t + 1) * H; i < end; i += D) {
        y[i] = x[i] * cos - x[i + D / 2] * sin;
        y[i + D / 2] = x[i + D / 2] * cos + x[i] * sin;
      }
    });
  }
  return y;
}

/** Causal attention within each text: q (T, H), k and v (S, H) -> {y (T, H), probs}. A text has `length`
 * queries, from row `at`, and `past` keys before its first query, so its keys are the rows 0 ... past +
 * length of k from row `at`; past > 0 only where one text is generated. probs holds a Float32Array (length,
 * past + length) per text and head. */
function attention(q, k, v, texts, config) {
  const {num_attention_heads: A, head_dim: D} = config, H = A * D, scale = 1 / Math.sqrt(D);
  const y = new Float32Array(q.length), probs = [];
  for (const {at, length, past} of texts) {
    for (let head = 0; head < A; head++) {
      const first = at * H + head * D, keys = past + length, p = new Float32Array(length * keys);
      for (let i = 0; i < length; i++) {
        const row = first + i * H, seen = past + i + 1, scores = new Float64Array(seen);
        let largest = -Infinity, total = 0;
        for (let j = 0; j < seen; j++) {
          let dot = 0;
          for (let d = 0; d < D; d++) dot += q[row + d] * k[first + j * H + d];
          scores[j] = dot * scale;
          largest = Math.max(largest, scores[j]);
        }
        for (let j = 0; j < seen; j++) total += scores[j] = Math.exp(scores[j] - largest);
        for (let j = 0; j < seen; j++) {
          const weight = p[i * keys + j] = scores[j] / total;
          for (let d = 0; d < D; d++) y[row + d] += weight * v[first + j * H + d];
        }
      }
      probs.push(p);
    }
  }
  return {y, probs};
}

/** From dy (T, H), for texts without a past: [dq, dk, dv], (T, H) each. */
function attentionBackward(dy, q, k, v, probs, texts, config) {
  const {num_attention_heads: A, head_dim: D} = config, H = A * D, scale = 1 / Math.sqrt(D);
  const [dq, dk, dv] = [q, k, v].map(x => new Float32Array(x.length));
  texts.forEach(({at, length}, s) => {
    for (let head = 0; head < A; head++) {
      const first = at * H + head * D, p = probs[s * A + head];
      for (let i = 0; i < length; i++) {
        const row = first + i * H, dp = new Float64Array(i + 1);
        let mean = 0;  // of dp under p
        for (let j = 0; j <= i; j++) {
          const key = first + j * H, weight = p[i * length + j];
          for (let d = 0; d < D; d++) {
            dp[j] += dy[row + d] * v[key + d];
            dv[key + d] += weight * dy[row + d];
          }
          mean += weight * dp[j];
        }
        for (let j = 0; j <= i; j++) {
          const key = first + j * H, ds = p[i * length + j] * (dp[j] - mean) * scale;
          for (let d = 0; d < D; d++) {
            dq[row + d] += ds * k[key + d];
            dk[key + d] += ds * q[row + d];
          }
        }
      }
    }
  });
  return [dq, dk, dv];
}

/** silu(gate) * up, elementwise, (T, F); silu(x) = x sigmoid(x). */
function gated(gate, up) {
  return gate.map((x, i) => x / (1 + Math.exp(-x)) * up[i]);
}

/** From dy (T, F): [dgate, dup]. */
function gatedBackward(dy, gate, up) {
  const dgate = new Float32Array(dy.length), dup = new Float32Array(dy.length);
  for (let i = 0; i < dy.length; i++) {
    const sigmoid = 1 / (1 + Math.exp(-gate[i]));
    dup[i] = dy[i] * gate[i] * sigmoid;
    dgate[i] = dy[i] * up[i] * sigmoid * (1 + gate[i] * (1 - sigmoid));
  }
  return [dgate, dup];
}

// ------------------------------------------------------------------------------------------- the model
/** One layer: x (T, H) -> {y (T, H), kept}, where kept is what the backward pass needs. `cache`, if given, is
 * {k, v} of the tokens before, and is extended. */
function decoderLayer(weights, l, x, positions, texts, cache) {
  const {config} = weights, {hidden_size: H, intermediate_size: F, rms_norm_eps: eps} = config;
  const W = name => weights[`model.layers.${l}.${name}.weight`];
  const h1 = rmsNorm(x, W("input_layernorm"), eps);
  const q = rotate(linear(h1, W("self_attn.q_proj"), H), positions, config, 1);
  let k = rotate(linear(h1, W("self_attn.k_proj"), H), positions, config, 1);
  let v = linear(h1, W("self_attn.v_proj"), H);
  if (cache) {
    k = cache.k = Float32Array.of(...cache.k, ...k);
    v = cache.v = Float32Array.of(...cache.v, ...v);
  }
  const {y: mixed, probs} = attention(q, k, v, texts, config);
  const middle = sum(x, linear(mixed, W("self_attn.o_proj"), H));
  const h2 = rmsNorm(middle, W("post_attention_layernorm"), eps);
  const gate = linear(h2, W("mlp.gate_proj"), H), up = linear(h2, W("mlp.up_proj"), H);
  const act = gated(gate, up);
  const y = sum(middle, linear(act, W("mlp.down_proj"), F));
  return {y, kept: {x, h1, q, k, v, probs, mixed, middle, h2, gate, up, act}};
}

/** From dy (T, H): adds to the layer's gradients, and returns dx (T, H). */
function decoderLayerBackward(dy, weights, gradients, l, kept, positions, texts) {
  const {config} = weights, {hidden_size: H, intermediate_size: F, rms_norm_eps: eps} = config;
  const {x, h1, q, k, v, probs, mixed, middle, h2, gate, up, act} = kept;
  const of = name => [weights, gradients].map(set => set[`model.layers.${l}.${name}.weight`]);
  const through = (name, dOut, input, inputs) => linearBackward(dOut, input, ...of(name), inputs);

  const [dgate, dup] = gatedBackward(through("mlp.down_proj", dy, act, F), gate, up);
  const dh2 = sum(through("mlp.gate_proj", dgate, h2, H), through("mlp.up_proj", dup, h2, H));
  const dmiddle = sum(dy, rmsNormBackward(dh2, middle, ...of("post_attention_layernorm"), eps));

  const dmixed = through("self_attn.o_proj", dmiddle, mixed, H);
  const [dq, dk, dv] = attentionBackward(dmixed, q, k, v, probs, texts, config);
  const dh1 = through("self_attn.v_proj", dv, h1, H);
  addTo(dh1, through("self_attn.q_proj", rotate(dq, positions, config, -1), h1, H));
  addTo(dh1, through("self_attn.k_proj", rotate(dk, positions, config, -1), h1, H));
  return sum(dmiddle, rmsNormBackward(dh1, x, ...of("input_layernorm"), eps));
}

/** The rows `places` of x (T, H) -> (P, H). */
function takeRows(x, places, H) {
  return embedding(x, places, H);
}

/** Texts' ids, one after the other -> {logits (P, V) at `places`, kept}. The head is the embedding,
 * transposed. */
function run(weights, ids, positions, texts, places, caches) {
  const {config} = weights, H = config.hidden_size, E = weights["model.embed_tokens.weight"];
  let x = embedding(E, ids, H);
  const layers = [];
  for (let l = 0; l < config.num_hidden_layers; l++) {
    const {y, kept} = decoderLayer(weights, l, x, positions, texts, caches?.[l]);
    layers.push(kept);
    x = y;
  }
  const last = takeRows(x, places, H);
  const hidden = rmsNorm(last, weights["model.norm.weight"], config.rms_norm_eps);
  return {logits: linear(hidden, E, H), kept: {ids, positions, texts, places, layers, last, hidden}};
}

/** From dlogits (P, V): adds the gradients of all weights to `gradients`, which begin at 0. */
function runBackward(dlogits, weights, gradients, kept) {
  const {config} = weights, H = config.hidden_size, name = "model.embed_tokens.weight";
  const {ids, positions, texts, places, layers, last, hidden} = kept;
  const dhidden = linearBackward(dlogits, hidden, weights[name], gradients[name], H);
  const norm = "model.norm.weight";
  const dlast = rmsNormBackward(dhidden, last, weights[norm], gradients[norm], config.rms_norm_eps);
  let dx = new Float32Array(ids.length * H);
  embeddingBackward(dlast, places, dx, H);  // back to the places' rows, 0 elsewhere
  for (let l = layers.length - 1; l >= 0; l--) {
    dx = decoderLayerBackward(dx, weights, gradients, l, layers[l], positions, texts);
  }
  embeddingBackward(dx, ids, gradients[name], H);
}

/** ids of one text (T,) and places (P,) -> logits (P, V) of the token that follows each place. */
function forward(weights, ids, places) {
  ids = Array.from(ids);
  const text = {at: 0, length: ids.length, past: 0};
  return run(weights, ids, [...ids.keys()], [text], Array.from(places)).logits;
}

/** Greedy continuation of `ids` by at most newTokens ids; the end-of-sequence token ends it and is included.
 */
function generate(weights, ids, newTokens) {
  const {config} = weights, V = config.vocab_size, answer = [];
  const caches = Array.from({length: config.num_hidden_layers}, () => ({k: [], v: []}));
  let next = Array.from(ids), past = 0;
  while (answer.length < newTokens && answer.at(-1) !== config.eos_token_id) {
    const positions = next.map((_, i) => past + i);
    const texts = [{at: 0, length: next.length, past}];
    const {logits} = run(weights, next, positions, texts, [next.length - 1], caches);
    past += next.length;
    let best = 0;
    for (let i = 1; i < V; i++) if (logits[i] > logits[best]) best = i;
    answer.push(best);
    next = [best];
  }
  return answer;
}

// ------------------------------------------------------------------- log-probabilities, and the gradient
/** [{ids, start}] -> {logps (B,) of the answers in nats, tokens (B,) of the answers, logits, targets, owner,
 * kept}: logits (P, V) at the places before each answer token, and the text that each place belongs to. */
function answers(weights, rows) {
  const V = weights.config.vocab_size;
  const ids = [], positions = [], texts = [], places = [], targets = [], owner = [];
  rows.forEach((row, b) => {
    texts.push({at: ids.length, length: row.ids.length, past: 0});
    for (let t = row.start; t < row.ids.length; t++) {
      places.push(ids.length + t - 1);
      targets.push(row.ids[t]);
      owner.push(b);
    }
    row.ids.forEach((id, t) => { ids.push(id); positions.push(t); });
  });
  const {logits, kept} = run(weights, ids, positions, texts, places);
  const logps = new Array(rows.length).fill(0);
  const logSums = targets.map((target, p) => {
    const logSum = logSumExp(logits.subarray(p * V, (p + 1) * V));
    logps[owner[p]] += logits[p * V + target] - logSum;
    return logSum;
  });
  return {logps, tokens: rows.map(row => row.ids.length - row.start), logits, logSums, targets, owner, kept};
}

/** log sum exp of an array, in float64. */
function logSumExp(values) {
  let largest = -Infinity, total = 0;
  for (const value of values) largest = Math.max(largest, value);
  for (const value of values) total += Math.exp(value - largest);
  return largest + Math.log(total);
}

/** [{ids, start}] -> log pi(answer | question) in nats, (B,): the sum over the answer's tokens. */
function answerLogps(weights, rows) {
  return answers(weights, rows).logps;
}

/** Adds to `gradients` those of sum_b slopes[b] * logps[b]: slopes (B,) is the loss's derivative by logps. */
function logpsBackward(slopes, weights, gradients, read) {
  const V = weights.config.vocab_size, {logits, logSums, targets, owner, kept} = read;
  const dlogits = new Float32Array(logits.length);
  targets.forEach((target, p) => {
    const slope = slopes[owner[p]];
    for (let i = p * V; i < (p + 1) * V; i++) dlogits[i] = -slope * Math.exp(logits[i] - logSums[p]);
    dlogits[p * V + target] += slope;
  });
  runBackward(dlogits, weights, gradients, kept);
}

/** The objective on a batch, and its gradient.
 * batch {forget: [{ids, start}], retain: [{ids, start}], referenceLogps: (forget rows,) in nats, for npo};
 * objective {loss: "ga" | "npo", beta, retainWeight}. NPO is a mean over rows, ga and RT over answer tokens.
 * -> {loss, parts: {forget, retain, meanWeight}, gradients: {name: Float32Array}}. meanWeight is W's mean. */
function lossAndGradients(weights, batch, {loss, beta, retainWeight = 0}) {
  const {nllLoss, gaLoss, npoLoss, npoWeight} = OBJECTIVES;
  const total = values => values.reduce((a, b) => a + b, 0);
  const gradients = {}, parts = {forget: 0, retain: 0, meanWeight: 1};
  for (const name in weights) gradients[name] = new Float32Array(weights[name].length);
  if (batch.forget?.length) {
    const read = answers(weights, batch.forget), B = batch.forget.length;
    let slopes = read.logps.map(() => 1 / total(read.tokens));
    if (loss === "npo") {
      const W = npoWeight(read.logps, batch.referenceLogps, beta);
      parts.forget = total(npoLoss(read.logps, batch.referenceLogps, beta)) / B;
      parts.meanWeight = total(W) / B;
      slopes = W.map(w => w / B);  // Eq. 5: NPO's gradient is gradient ascent's times W
    } else if (loss === "ga") {
      parts.forget = total(gaLoss(read.logps)) / total(read.tokens);
    } else {
      throw new Error(`loss must be ga or npo, got ${loss}`);
    }
    logpsBackward(slopes, weights, gradients, read);
  }
  if (retainWeight && batch.retain?.length) {
    const read = answers(weights, batch.retain), tokens = total(read.tokens);
    parts.retain = total(nllLoss(read.logps)) / tokens;
    logpsBackward(read.logps.map(() => -retainWeight / tokens), weights, gradients, read);
  }
  return {loss: parts.forget + retainWeight * parts.retain, parts, gradients};
}

if (typeof module === "object") {
  module.exports = {loadWeights, withConfig, copyWeights, forward, generate, answerLogps, lossAndGradients};
}
