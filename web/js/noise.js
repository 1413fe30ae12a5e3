// Standard normal noise by number. An image depends on the number of its noise alone.
//
// The first noises are those that the Python scripts draw for seed 0: tools/export.py writes them to
// NAME_noises.bin. All others are drawn here, by a generator that Python does not have.

import { describe, fetchFile } from "./nets.js";

const files = new Map();

/** All noises of NAME_noises.bin: float32, with the shape [count, ...shape of one]. */
function pythonNoises(name) {
  if (!files.has(name)) files.set(name, readNoises(name));
  return files.get(name);
}

async function readNoises(name) {
  const { noises } = await describe(name);
  const response = await fetchFile(noises.file);
  return { shape: noises.shape, data: new Float32Array(await response.arrayBuffer()) };
}

/** Noise number `number` for the network `name`: Python's, or one that is drawn here. */
export async function noiseOf(name, number) {
  const { shape, data } = await pythonNoises(name);
  const [count, ...one] = shape;
  const size = one.reduce((product, side) => product * side, 1);
  if (number < count) return data.slice(number * size, (number + 1) * size);
  return normals(number, size);
}

/** How many noises of a network are Python's. */
export async function pythonCount(name) {
  const { noises } = await describe(name);
  return noises.shape[0];
}

/** `count` standard normal numbers for a seed: Box and Muller's method on mulberry32's numbers. */
export function normals(seed, count) {
  const uniform = mulberry32(seed);
  const values = new Float32Array(count);
  for (let i = 0; i < count; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(1 - uniform())); // 1 - u is never 0
    const angle = 2 * Math.PI * uniform();
    values[i] = radius * Math.cos(angle);
    if (i + 1 < count) values[i + 1] = radius * Math.sin(angle);
  }
  return values;
}

/** Numbers in [0, 1): mulberry32 by Tommy Ettinger, a generator with a state of 32 bits. */
function mulberry32(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** The noise between a (share = 0) and b (share = 1) along the sphere, as slerp in p2_ddim.py. */
export function slerp(a, b, share) {
  const dot = (u, v) => u.reduce((sum, value, i) => sum + value * v[i], 0);
  const lengthA = Math.sqrt(dot(a, a));
  const lengthB = Math.sqrt(dot(b, b));
  const cosine = dot(a, b) / (lengthA * lengthB);
  const angle = Math.acos(Math.min(1, Math.max(-1, cosine)));
  if (angle < 1e-4) return a.map((value, i) => (1 - share) * value + share * b[i]);

  // The direction moves along the arc between those of a and b; the length changes evenly.
  const length = (1 - share) * lengthA + share * lengthB;
  const ofA = (length * Math.sin((1 - share) * angle)) / Math.sin(angle) / lengthA;
  const ofB = (length * Math.sin(share * angle)) / Math.sin(angle) / lengthB;
  return a.map((value, i) => ofA * value + ofB * b[i]);
}
