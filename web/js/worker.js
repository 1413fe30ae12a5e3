// The networks run here, beside the page, so that the page answers while they compute.
// Messages in: { id, file, inputs }; out: { id, data, dims } or { id, error }.

import * as ort from "../ort/ort.wasm.min.mjs";

ort.env.wasm.wasmPaths = new URL("../ort/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send

const sessions = new Map(); // by file; each is loaded once

function load(file) {
  if (!sessions.has(file)) {
    const url = new URL(`../nets/${file}`, import.meta.url).href;
    const session = ort.InferenceSession.create(url, { executionProviders: ["wasm"] });
    session.catch(() => sessions.delete(file)); // so that a failed download can be tried again
    sessions.set(file, session);
  }
  return sessions.get(file);
}

async function answer({ id, file, inputs }) {
  try {
    const session = await load(file);
    if (!inputs) {
      self.postMessage({ id });
      return;
    }
    const feeds = {};
    for (const [name, { type, data, dims }] of Object.entries(inputs)) {
      feeds[name] = new ort.Tensor(type, data, dims);
    }
    const outputs = await session.run(feeds);
    const { data, dims } = outputs[session.outputNames[0]];
    self.postMessage({ id, data, dims });
  } catch (error) {
    self.postMessage({ id, error: String(error.message ?? error) });
  }
}

let turn = Promise.resolve(); // one after the other
self.onmessage = ({ data }) => {
  turn = turn.then(() => answer(data));
};
