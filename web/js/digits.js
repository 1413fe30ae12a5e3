// Digits by class with the released diffusion model: DPM-Solver++ in 12 steps, with guidance.

import { booleans, describe, floats, integers, load, run } from "./nets.js";
import { noiseOf } from "./noise.js";
import { byId, drawImage, makeCanvas, numberIn, oneAtATime, secondsSince } from "./page.js";
import { clamp, dpmSolverStep, guide, imageOf } from "./samplers.js";

const NET = "ddpm_digits";
const SHAPE = [3, 28, 28];
// Guidance for 12 steps: docs/ddpm.md has a row for each domain.
const USUAL = { mnistm: { w: 8, upTo: 0.5 }, svhn: { w: 8, upTo: 0.3 } };

/**
 * The digits after each step: yields { t, x } for the noise and then for every step. `label` is the
 * digit plus 10 times the number of its domain. Guidance of strength w is on where t / T ≤ upTo.
 */
export async function* sampleDigit(noise, label, w, upTo) {
  const { sampling } = await describe(NET);
  let x = noise;
  let before = null;
  yield { t: sampling.timesteps, x };
  for (const [number, step] of sampling.steps.entries()) {
    const isGuided = step.t / sampling.timesteps <= upTo;
    const output = await predict(x, step.time, label, isGuided ? w : 0);
    const x0 = clamp(imageOf(x, output, step.alpha_bar, sampling.prediction), sampling.clamp);
    x = dpmSolverStep(x, x0, step.alpha_bar, step.previous_alpha_bar, before);
    before = { alphaBar: step.alpha_bar, x0 };
    yield { t: sampling.steps[number + 1]?.t ?? 0, x };
  }
}

/** The network's output for x at one time; with guidance, both halves are computed in one batch. */
async function predict(x, time, label, w) {
  if (w === 0) {
    const inputs = { x: floats(x, [1, ...SHAPE]), t: floats([time], [1]) };
    Object.assign(inputs, { classes: integers([label]), drop: booleans([false]) });
    return (await run(`${NET}.onnx`, inputs)).data;
  }
  const { data } = await run(`${NET}.onnx`, {
    x: floats([...x, ...x], [2, ...SHAPE]),
    t: floats([time, time], [2]),
    classes: integers([label, label]),
    drop: booleans([false, true]), // the second has no class
  });
  return guide(data.subarray(0, x.length), data.subarray(x.length), w);
}

export function startDigits() {
  const status = byId("digits-status");
  const film = byId("digits-film");
  const domains = byId("digits-domain");
  const strength = byId("digits-strength");
  const upTo = byId("digits-upto");
  function show() {
    byId("digits-strength-value").value = strength.value;
    byId("digits-upto-value").value = upTo.value;
  }
  function takeUsual() {
    strength.value = USUAL[domains.value].w;
    upTo.value = USUAL[domains.value].upTo;
    show();
  }
  strength.addEventListener("input", show);
  upTo.addEventListener("input", show);
  domains.addEventListener("change", takeUsual);
  takeUsual();

  const draw = oneAtATime(status, async (isStale) => {
    const digit = Number(byId("digits-digit").value);
    const number = numberIn(byId("digits-number"));
    status.textContent = "Loading the network (13 MB) …";
    const about = await describe(NET);
    const { timesteps, steps } = about.sampling;
    await load(`${NET}.onnx`);

    const began = performance.now();
    const label = digit + 10 * about.domains.indexOf(domains.value);
    const noise = await noiseOf(NET, number);
    film.replaceChildren();
    let done = 0;
    const states = sampleDigit(noise, label, Number(strength.value), Number(upTo.value));
    for await (const { t, x } of states) {
      drawImage(byId("digits-now"), x);
      const figure = document.createElement("figure");
      const canvas = makeCanvas(28, `The digit ${digit} at step ${t} of ${timesteps}`);
      drawImage(canvas, x);
      const caption = document.createElement("figcaption");
      caption.textContent = `t = ${t}`;
      figure.append(canvas, caption);
      film.append(figure);
      if (done > 0) status.textContent = `Step ${done} of ${steps.length}`;
      done += 1;
      if (isStale()) return;
    }
    status.textContent = `A ${digit} in ${secondsSince(began)}.`;
  });
  byId("digits-form").addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
}
