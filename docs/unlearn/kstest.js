/* The two-sample Kolmogorov-Smirnov test, exact, as `scipy.stats.ks_2samp` computes it for samples of one
 * size up to 10,000. `metrics.py` calls its p-value forget quality. */
"use strict";

/** Samples x and y of n numbers each -> {rows, at, p}: the largest gap between the two cumulative curves is
 * rows/n, first reached at the value `at`, and p is the chance of such a gap between two samples from one
 * distribution. */
function ksTest(x, y) {
  const n = x.length, [a, b] = [x, y].map(values => Float64Array.from(values).sort());
  if (y.length !== n) throw new Error(`need two samples of one size, got ${n} and ${y.length}`);
  let i = 0, j = 0, rows = 0, at = 0;
  while (i < n && j < n) {
    const value = Math.min(a[i], b[j]);
    while (a[i] === value) i++;
    while (b[j] === value) j++;
    if (Math.abs(i - j) > rows) [rows, at] = [Math.abs(i - j), value];
  }
  return {rows, at, p: ksProbability(n, rows)};
}

/** P(gap >= rows/n) = 2 sum_{k>=1} (-1)^(k-1) C(2n, n - k rows) / C(2n, n)  (Gnedenko and Korolyuk 1951),
 * summed from its last term, so that no large numbers cancel. */
function ksProbability(n, rows) {
  if (rows === 0) return 1;
  let p = 0;
  for (let k = Math.floor(n / rows) - 1; k >= 0; k--) {
    let ratio = 1;
    for (let j = 0; j < rows; j++) ratio *= (n - k * rows - j) / (n + k * rows + j + 1);
    p = ratio * (1 - p);
  }
  return Math.min(1, 2 * p);
}

if (typeof module === "object") module.exports = {ksTest};
