// Digits by class with the released diffusion model: DPM-Solver++ in 12 steps, with guidance.

import { booleans, describe, floats, integers, load, run } from "./nets.js";
import { noiseOf } from "./noise.js";
import { byId, drawImage, makeCanvas, numberIn, oneAtATime, secondsSince } from "./page.js";
import { clamp, dpmSolverStep, guide, imageOf } from "./samplers.js";

const NET = "ddpm_digits";
const SHAPE = [3, 28, 28];

/**
 * The digits after each step: yields { t, x } for the noise and then for every step. `label` is the
 * digit plus 10 times the number of its domain.
 */
export async function* sampleDigit(noise, label, w) {
  const { sampling } = await describe(NET);
  let x = noise;
  let before = null;
  yield { t: sampling.timesteps, x };
  for (const [number, step] of sampling.steps.entries()) {
    const output = await predict(x, step.time, label, w);
    const x0 = clamp(imageOf(x, output, step.alpha_bar, sampling.prediction), sampling.clamp);
    x = dpmSolverStep(x, x0, step.alpha_bar, step.previous_alpha_bar, before);
    before = { alphaBar: step.alpha_bar, x0 };
    yield { t: sampling.steps[number + 1]?.t ?? 0, x };
  }
}

/** The network's output for x at one time, guided: both halves are computed in one batch. */
async function predict(x, time, label, w) {
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
  const strength = byId("digits-strength");
  const showStrength = () => (byId("digits-strength-value").value = strength.value);
  strength.addEventListener("input", showStrength);
  showStrength();

  const draw = oneAtATime(status, async (isStale) => {
    const digit = Number(byId("digits-digit").value);
    const domain = byId("digits-domain").value;
    const number = numberIn(byId("digits-number"));
    status.textContent = "Loading the network (13 MB) …";
    const { domains, sampling } = await describe(NET);
    await load(`${NET}.onnx`);

    const began = performance.now();
    const label = digit + 10 * domains.indexOf(domain);
    const noise = await noiseOf(NET, number);
    film.replaceChildren();
    let done = 0;
    for await (const { t, x } of sampleDigit(noise, label, Number(strength.value))) {
      drawImage(byId("digits-now"), x);
      const figure = document.createElement("figure");
      const canvas = makeCanvas(28, `The digit ${digit} at step ${t} of ${sampling.timesteps}`);
      drawImage(canvas, x);
      const caption = document.createElement("figcaption");
      caption.textContent = `t = ${t}`;
      figure.append(canvas, caption);
      film.append(figure);
      if (done > 0) status.textContent = `Step ${done} of ${sampling.steps.length}`;
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
