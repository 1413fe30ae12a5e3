// Faces by attribute: a diffusion model in latents, with classifier-free guidance and DDIM.

import { describe, floats, load, run } from "./nets.js";
import { noiseOf } from "./noise.js";
import { byId, drawImage, numberIn, oneAtATime, secondsSince } from "./page.js";
import { clamp, ddimStep, guide, imageOf, noiseIn } from "./samplers.js";

const NET = "guided_faces";
// The shape of the latents.
const SHAPE = [4, 16, 16];
const WORDS = { "-1": "absent", 0: "not asked", 1: "present" };

/**
 * The latents after each step: yields { done, x, x0 }. `asked` has 1, -1 or 0 for each attribute;
 * w = 1 is the network's own answer, as in p2_guided.py.
 */
export async function* sampleFace(noise, asked, w) {
  const { sampling } = await describe(NET);
  let x = noise;
  for (const [number, step] of sampling.steps.entries()) {
    const output = await predict(x, step.time, asked, w);
    const x0 = clamp(imageOf(x, output, step.alpha_bar, sampling.prediction), sampling.clamp);
    x = ddimStep(x0, noiseIn(x, x0, step.alpha_bar), step.previous_alpha_bar);
    yield { done: number + 1, x, x0 };
  }
}

/** The network's output for x at one time: ε_0 + w (ε - ε_0), where ε_0 knows no attribute. */
async function predict(x, time, asked, w) {
  const unknown = asked.map(() => 0);
  const { data } = await run(`${NET}.onnx`, {
    x: floats([...x, ...x], [2, ...SHAPE]),
    t: floats([time, time], [2]),
    attributes: floats([...asked, ...unknown], [2, asked.length]),
  });
  return guide(data.subarray(0, x.length), data.subarray(x.length), w - 1);
}

/** The image (3, 64, 64) of latents. */
export async function decode(latents) {
  const { data } = await run(`${NET}_decoder.onnx`, { latents: floats(latents, [1, ...SHAPE]) });
  return data;
}

/** A slider with three places for each attribute. */
function makeSlider(name) {
  const label = document.createElement("label");
  const words = document.createElement("span");
  words.textContent = name.replaceAll("_", " ").toLowerCase();
  const slider = document.createElement("input");
  Object.assign(slider, { type: "range", min: "-1", max: "1", step: "1", value: "0" });
  slider.dataset.attribute = name;
  const value = document.createElement("output");
  function show() {
    value.value = WORDS[slider.value];
    slider.setAttribute("aria-valuetext", value.value);
  }
  slider.addEventListener("input", show);
  show();
  label.append(words, slider, value);
  return { label, slider, show };
}

export async function startAttributes() {
  const status = byId("attributes-status");
  const strength = byId("attributes-strength");
  const showStrength = () => (byId("attributes-strength-value").value = strength.value);
  strength.addEventListener("input", showStrength);
  showStrength();

  const { attributes } = await describe(NET);
  const sliders = attributes.map(makeSlider);
  byId("attributes-sliders").append(...sliders.map(({ label }) => label));
  const smiling = sliders[attributes.indexOf("Smiling")];
  smiling.slider.value = "1";
  smiling.show();

  const draw = oneAtATime(status, async (isStale) => {
    const asked = sliders.map(({ slider }) => Number(slider.value));
    const noise = await noiseOf(NET, numberIn(byId("attributes-number")));
    status.textContent = "Loading the network (11 MB) …";
    await load(`${NET}.onnx`);
    await load(`${NET}_decoder.onnx`);
    const { sampling } = await describe(NET);
    const began = performance.now();
    const canvas = byId("attributes-face");
    for await (const { done, x0 } of sampleFace(noise, asked, Number(strength.value))) {
      if (isStale()) return;
      const isLast = done === sampling.steps.length;
      if (done % 4 === 0 || isLast) drawImage(canvas, await decode(x0));
      status.textContent = `Step ${done} of ${sampling.steps.length}`;
    }
    status.textContent = `A face in ${secondsSince(began)}.`;
  });
  byId("attributes-form").addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
}
