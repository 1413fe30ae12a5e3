// One step of each sampler, as in diffusion/samplers.py. The network, its noise levels ᾱ and the
// steps come from NAME.json, which tools/export.py wrote.
//
// x is x_t = √ᾱ x_0 + √(1-ᾱ) ε (equation 4 of Ho et al., 2020), a Float32Array.

/** Combine arrays of one length, number by number. */
const combine = (f, ...arrays) => arrays[0].map((_, i) => f(...arrays.map((array) => array[i])));

/** Classifier-free guidance w: (1 + w) · with - w · without (equation 6 of Ho and Salimans, 2022). */
export function guide(withClass, withoutClass, w) {
  return combine((c, u) => u + (1 + w) * (c - u), withClass, withoutClass);
}

/** The clean image x_0 that the network's output implies: v = √ᾱ ε - √(1-ᾱ) x_0, or the noise ε. */
export function imageOf(x, output, alphaBar, prediction) {
  const signal = Math.sqrt(alphaBar);
  const sigma = Math.sqrt(1 - alphaBar);
  if (prediction === "x0") return output;
  if (prediction === "eps") return combine((x, eps) => (x - sigma * eps) / signal, x, output);
  return combine((x, v) => signal * x - sigma * v, x, output); // "v"
}

/** The noise ε in x that the clean image x_0 leaves: ε = (x - √ᾱ x_0) / √(1-ᾱ). */
export function noiseIn(x, x0, alphaBar) {
  const signal = Math.sqrt(alphaBar);
  const sigma = Math.sqrt(1 - alphaBar);
  return combine((x, x0) => (x - signal * x0) / sigma, x, x0);
}

/** Keep a predicted image in [-1, 1] ("static"), or leave it as it is ("none"). */
export function clamp(x0, kind) {
  return kind === "static" ? x0.map((value) => Math.min(1, Math.max(-1, value))) : x0;
}

/** λ = log(√ᾱ / √(1-ᾱ)), the time of DPM-Solver++. */
const halfLogSnr = (alphaBar) => 0.5 * Math.log(alphaBar / (1 - alphaBar));

/**
 * DPM-Solver++(2M), algorithm 2 of Lu et al., 2022: from ᾱ to the larger ᾱ' of the step that
 * follows. With h = λ' - λ and D, which is x_0 extrapolated from the step before,
 *
 *     x' = √(1-ᾱ') / √(1-ᾱ) · x - √ᾱ' (e^(-h) - 1) · D.
 *
 * `before` is { alphaBar, x0 } of the step before, or null in the first one, where D = x_0.
 */
export function dpmSolverStep(x, x0, alphaBar, nextAlphaBar, before) {
  if (nextAlphaBar === 1) return x0; // the last step
  const h = halfLogSnr(nextAlphaBar) - halfLogSnr(alphaBar);
  let d = x0;
  if (before) {
    const hBefore = halfLogSnr(alphaBar) - halfLogSnr(before.alphaBar);
    d = combine((now, then) => now + ((now - then) * h) / (2 * hBefore), x0, before.x0);
  }
  const shrink = Math.sqrt((1 - nextAlphaBar) / (1 - alphaBar));
  const grow = Math.sqrt(nextAlphaBar) * Math.expm1(-h);
  return combine((x, d) => shrink * x - grow * d, x, d);
}

/** DDIM without noise, equation 12 of Song et al., 2020: x' = √ᾱ' x_0 + √(1-ᾱ') ε. */
export function ddimStep(x0, eps, nextAlphaBar) {
  const signal = Math.sqrt(nextAlphaBar);
  const sigma = Math.sqrt(1 - nextAlphaBar);
  return combine((x0, eps) => signal * x0 + sigma * eps, x0, eps);
}
