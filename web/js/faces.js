// Faces by number with the two GANs, and the way from one face to another.

import { floats, load, run } from "./nets.js";
import { noiseOf, slerp } from "./noise.js";
import { byId, drawImage, makeCanvas, numberIn, oneAtATime, secondsSince } from "./page.js";

// How many faces the grid shows.
const COUNT = 16;
const LATENT = 100;

const chosenNet = () => document.querySelector("input[name=generator]:checked").value;

/** The face of a latent: G(z), float32 (3, 64, 64) in [-1, 1]. */
export async function makeFace(name, latent) {
  const { data } = await run(`${name}.onnx`, { latents: floats(latent, [1, LATENT]) });
  return data;
}

function startGrid() {
  const status = byId("faces-status");
  const first = byId("faces-first");
  const canvases = [];
  for (let i = 0; i < COUNT; i += 1) {
    const figure = document.createElement("figure");
    const canvas = makeCanvas(64, "");
    const caption = document.createElement("figcaption");
    figure.append(canvas, caption);
    byId("faces-grid").append(figure);
    canvases.push({ canvas, caption });
  }

  let firstAfter = ""; // how long the first face of the page took, loading included
  const draw = oneAtATime(status, async (isStale) => {
    const name = chosenNet();
    const start = numberIn(first);
    status.textContent = "Loading the generator (7 MB) …";
    await load(`${name}.onnx`);
    const began = performance.now();
    for (const [i, { canvas, caption }] of canvases.entries()) {
      if (isStale()) return;
      const number = start + i;
      drawImage(canvas, await makeFace(name, await noiseOf(name, number)));
      canvas.setAttribute("aria-label", `Generated face number ${number}`);
      caption.textContent = String(number);
      firstAfter ||= secondsSince(0); // since the page was opened
    }
    status.textContent =
      `${COUNT} faces in ${secondsSince(began)}. ` +
      `The first one was there ${firstAfter} after the page was opened.`;
  });

  function move(by) {
    first.value = String(Number(first.value) + by);
    draw();
  }
  first.addEventListener("change", draw);
  byId("faces-back").addEventListener("click", () => move(-COUNT));
  byId("faces-next").addEventListener("click", () => move(COUNT));
  return draw;
}

function startWay() {
  const canvas = byId("way-face");
  const share = byId("way-share");
  const draw = oneAtATime(byId("way-status"), async () => {
    const name = chosenNet();
    const from = await noiseOf(name, numberIn(byId("way-from")));
    const to = await noiseOf(name, numberIn(byId("way-to")));
    drawImage(canvas, await makeFace(name, slerp(from, to, Number(share.value) / 100)));
    byId("way-status").textContent = `${share.value} % of the way`;
  });
  share.addEventListener("input", draw);
  byId("way-from").addEventListener("change", draw);
  byId("way-to").addEventListener("change", draw);
  return draw;
}

export function startFaces() {
  const drawGrid = startGrid();
  const drawWay = startWay();
  async function drawAll() {
    await drawGrid();
    await drawWay();
  }
  for (const radio of document.querySelectorAll("input[name=generator]")) {
    radio.addEventListener("change", drawAll);
  }
  drawAll();
}
