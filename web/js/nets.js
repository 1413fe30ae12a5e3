// The exported networks: their descriptions, and running them in the worker.

const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const waiting = new Map(); // id → the two functions of a promise
let lastId = 0;
let broken = null; // why the worker did not start

worker.onmessage = ({ data: { id, error, ...answer } }) => {
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (error) reject(new Error(error));
  else resolve(answer);
};
worker.onerror = (event) => {
  broken = new Error(event.message || "this browser cannot run the networks");
  for (const { reject } of waiting.values()) reject(broken);
  waiting.clear();
};

function ask(message) {
  if (broken) return Promise.reject(broken);
  return new Promise((resolve, reject) => {
    lastId += 1;
    waiting.set(lastId, { resolve, reject });
    worker.postMessage({ id: lastId, ...message });
  });
}

/** Download a network and get it ready. It is done once; `run` does it too. */
export async function load(file) {
  await ask({ file });
}

/** Run a network: { name: tensor } → { data: Float32Array, dims }. */
export function run(file, inputs) {
  return ask({ file, inputs });
}

/** A tensor of numbers; `dims` starts with the batch. */
export const floats = (data, dims) => ({ type: "float32", data: Float32Array.from(data), dims });

/** A tensor of whole numbers (batch,), such as classes. */
export const integers = (values) => ({
  type: "int64",
  data: BigInt64Array.from(values, BigInt),
  dims: [values.length],
});

/** A tensor of true and false (batch,). */
export const booleans = (values) => ({
  type: "bool",
  data: Uint8Array.from(values),
  dims: [values.length],
});

const descriptions = new Map();

/** NAME.json as tools/export.py wrote it. */
export function describe(name) {
  if (!descriptions.has(name)) {
    const found = fetchFile(`${name}.json`).then((response) => response.json());
    found.catch(() => descriptions.delete(name));
    descriptions.set(name, found);
  }
  return descriptions.get(name);
}

/** A file of the folder nets/. */
export async function fetchFile(file) {
  const response = await fetch(new URL(`../nets/${file}`, import.meta.url));
  if (!response.ok) throw new Error(`${file}: ${response.status} ${response.statusText}`);
  return response;
}
