// Draw a digit; two classifiers say what it is. One knows MNIST-M alone, the other was adapted.

import { floats, run } from "./nets.js";
import { byId, oneAtATime } from "./page.js";

// Pixels a side: the drawing, and what the networks read.
const SIDE = 280;
const SMALL = 28;
const SOURCE = "digit_classifier_mnistm";
const PEN = 22;

// Strokes of examples, in tenths of the side. They are for those who cannot draw here.
const EXAMPLES = {
  1: [[[4, 3], [5.2, 2], [5.2, 8]]],
  4: [[[5.8, 2], [2.8, 5.8], [7.2, 5.8]], [[5.8, 2], [5.8, 8.2]]],
  7: [[[3, 2.4], [7, 2.4], [4.6, 8]]],
};
// Paper and ink of each look.
const LOOKS = {
  "white on black": ["#000000", "#ffffff"],
  "black on white": ["#ffffff", "#000000"],
  "yellow on blue": ["#20408a", "#ffd84a"],
  "grey on grey": ["#707070", "#a8a8a8"],
};

/**
 * A canvas as the classifiers read it: float32 (1, 3, 28, 28) in [-1, 1]. Each pixel is the mean of
 * a square of the drawing; common/data.py has the same range, pixel / 127.5 - 1.
 */
export function readDrawing(canvas) {
  const { data } = canvas.getContext("2d").getImageData(0, 0, SIDE, SIDE);
  const square = SIDE / SMALL;
  const image = new Float32Array(3 * SMALL * SMALL);
  for (let channel = 0; channel < 3; channel += 1) {
    for (let y = 0; y < SIDE; y += 1) {
      for (let x = 0; x < SIDE; x += 1) {
        const row = Math.floor(y / square);
        const column = Math.floor(x / square);
        image[(channel * SMALL + row) * SMALL + column] += data[4 * (y * SIDE + x) + channel];
      }
    }
  }
  return image.map((sum) => sum / square ** 2 / 127.5 - 1);
}

/** The probabilities of the ten digits. The outputs are logits, or logarithms of probabilities. */
export async function classify(name, image) {
  const { data } = await run(`${name}.onnx`, { images: floats(image, [1, 3, SMALL, SMALL]) });
  const largest = Math.max(...data);
  const powers = Array.from(data, (value) => Math.exp(value - largest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

/** A table of ten rows with a bar each; `show` puts probabilities in it, `clear` removes them. */
function makeTable(table) {
  const rows = [];
  for (let digit = 0; digit < 10; digit += 1) {
    const row = table.insertRow();
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = String(digit);
    const meter = document.createElement("meter");
    meter.max = 1;
    meter.setAttribute("aria-label", `Probability of ${digit}`);
    row.append(head);
    row.insertCell().append(meter);
    rows.push({ row, meter, share: row.insertCell() });
  }
  function show(probabilities) {
    const best = probabilities.indexOf(Math.max(...probabilities));
    for (const [digit, { row, meter, share }] of rows.entries()) {
      meter.value = probabilities[digit];
      share.textContent = `${(100 * probabilities[digit]).toFixed(0)} %`;
      row.classList.toggle("best", digit === best);
    }
    return best;
  }
  function clear() {
    for (const { row, meter, share } of rows) {
      meter.value = 0;
      share.textContent = "";
      row.classList.remove("best");
    }
  }
  return { show, clear };
}

export function startDraw() {
  const canvas = byId("draw-canvas");
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const status = byId("draw-status");
  const look = byId("draw-look");
  const source = makeTable(byId("draw-source"));
  const adapted = makeTable(byId("draw-adapted"));
  // Each stroke is a list of points.
  let strokes = [];
  // Where the keyboard's pen is, once it is used.
  let cursor = null;

  for (const name of Object.keys(LOOKS)) look.add(new Option(name));

  function paint() {
    const [paper, ink] = LOOKS[look.value];
    context.fillStyle = paper;
    context.fillRect(0, 0, SIDE, SIDE);
    context.strokeStyle = ink;
    context.lineWidth = PEN;
    context.lineCap = "round";
    context.lineJoin = "round";
    for (const [first, ...others] of strokes) {
      context.beginPath();
      context.moveTo(...first);
      for (const point of others.length ? others : [first]) context.lineTo(...point);
      context.stroke();
    }
  }

  /** Paint the drawing, and over it the keyboard's pen: a square that is no part of the drawing. */
  function paintWithPen() {
    paint();
    if (!cursor) return;
    context.strokeStyle = "#e0218a";
    context.lineWidth = 3;
    context.strokeRect(cursor[0] - 8, cursor[1] - 8, 16, 16);
  }

  const answer = oneAtATime(status, async () => {
    if (strokes.length === 0) return;
    paint();
    const image = readDrawing(canvas);
    paintWithPen();
    status.textContent = "Loading the classifiers (2 MB) …";
    const bySource = await classify(SOURCE, image);
    const byAdapted = await classify(byId("draw-net").value, image);
    // "Clear" was pressed meanwhile.
    if (strokes.length === 0) return;
    status.textContent = `Source only: ${source.show(bySource)}. Adapted: ${adapted.show(byAdapted)}.`;
  });

  function change() {
    paintWithPen();
    answer();
  }

  // With a pen, a finger or a mouse
  function place(event) {
    const box = canvas.getBoundingClientRect();
    const scale = SIDE / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  }
  let isDown = false;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    isDown = true;
    cursor = null;
    strokes.push([place(event)]);
    paint();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!isDown) return;
    strokes.at(-1).push(place(event));
    paint();
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, () => {
      isDown = false;
      answer();
    });
  }

  // With the keyboard: arrows move the pen, Shift with them draws.
  const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    const way = ways[event.key];
    if (!way) return;
    event.preventDefault();
    const from = cursor ?? [SIDE / 2, SIDE / 4];
    cursor = from.map((value, axis) => Math.min(270, Math.max(10, value + 14 * way[axis])));
    if (event.shiftKey) {
      const last = strokes.at(-1)?.at(-1);
      const goesOn = last && last[0] === from[0] && last[1] === from[1];
      if (goesOn) strokes.at(-1).push(cursor);
      else strokes.push([from, cursor]);
      change();
      return;
    }
    paintWithPen();
  });

  byId("draw-clear").addEventListener("click", () => {
    strokes = [];
    cursor = null;
    paint();
    source.clear();
    adapted.clear();
    status.textContent = "The paper is empty.";
  });
  for (const digit of Object.keys(EXAMPLES)) {
    byId(`draw-${digit}`).addEventListener("click", () => {
      const scaled = (stroke) => stroke.map((point) => point.map((tenths) => (tenths * SIDE) / 10));
      strokes = EXAMPLES[digit].map(scaled);
      cursor = null;
      change();
    });
  }
  look.addEventListener("change", change);
  byId("draw-net").addEventListener("change", answer);
  paint();
}
