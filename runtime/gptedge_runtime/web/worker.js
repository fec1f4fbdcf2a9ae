// The model, in a thread of its own: the page posts {load}, {write} and {stop}, and gets progress, tokens and results.

import { Tokenizer } from "./tokenizer.js";

const ORT = new URL("./ort/", import.meta.url).href; // onnxruntime-web wants an absolute address
const BUNDLE = new URL("./bundle/", import.meta.url).href;
const MAX_BYTES = 2 ** 32; // all that 32-bit WebAssembly can address

let gpt = null;
let stopped = false;

addEventListener("message", async ({ data }) => {
  try {
    if (data.type === "load") postMessage({ type: "ready", ...(await load()) });
    if (data.type === "write") postMessage({ type: "done", ...(await write(data)) });
    if (data.type === "stop") stopped = true;
  } catch (error) {
    postMessage({ type: "error", message: error.message ?? String(error) });
  }
});

async function load() {
  const manifest = await (await get("manifest.json")).json();
  const entry = (path) => manifest.files.find((file) => file.path === path);
  const graph = manifest.graphs.model;
  const folder = graph.path.slice(0, graph.path.lastIndexOf("/") + 1);
  const weights = manifest.files.filter(({ path }) => path.startsWith(folder) && !path.endsWith(".onnx"));
  const total = weights.reduce((sum, file) => sum + file.size, 0);
  if (total >= MAX_BYTES) {
    throw new Error(`the weights take ${(total / 1e9).toFixed(1)} GB, a tab can address 4.2 GB: export a smaller bundle`);
  }
  const [ranks, model, ort] = await Promise.all([
    download(entry(manifest.tokenizer.path)),
    download(entry(graph.path)),
    import(`${ORT}ort.wasm.min.mjs`),
  ]);
  const progress = reportProgress(total);
  const externalData = [];
  for (const file of weights) {
    externalData.push({ path: file.path.slice(folder.length), data: await download(file, progress) });
  }
  ort.env.wasm.wasmPaths = ORT;
  const session = await ort.InferenceSession.create(model, {
    executionProviders: ["wasm"],
    externalData,
  });
  const tokenizer = new Tokenizer(manifest.tokenizer, new TextDecoder().decode(ranks));
  gpt = { ort, session, config: manifest.model, tokenizer };
  gpt.eos = manifest.tokenizer.eos_token_id;
  return { config: manifest.model, precision: manifest.precision, bytes: total, isolated: self.crossOriginIsolated };
}

async function get(path) {
  const response = await fetch(BUNDLE + path, { cache: "no-cache" }); // as it is now, and not as it was before an export
  if (!response.ok) throw new Error(`${path} cannot be read (${response.status}): serve the folder as it was written`);
  return response;
}

// A file's bytes, which have the size and the hash of the manifest: a bundle may be replaced while it is loaded.
async function download({ path, size, sha256 }, progress = () => {}) {
  const bytes = new Uint8Array(size);
  let at = 0;
  for (const reader = (await get(path)).body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (at + value.length > size) break;
    bytes.set(value, at);
    at += value.length;
    progress(value.length);
  }
  if (at !== size) throw new Error(`${path} is not ${size} bytes long: serve the folder as it was written`);
  if (self.isSecureContext) { // https, or this computer: elsewhere browsers compute no hashes
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    const hash = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (hash !== sha256) throw new Error(`${path} is not the file that was exported: load the page again`);
  }
  return bytes;
}

function reportProgress(total) {
  let loaded = 0;
  return (bytes) => postMessage({ type: "progress", loaded: (loaded += bytes), total });
}

async function write({ prompt, count }) {
  stopped = false;
  const { tokenizer, eos } = gpt;
  const ids = tokenizer.encode(prompt);
  if (!ids.length) throw new Error("the text is empty: write a few words first");
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true }); // pieces never split a character
  const start = performance.now();
  const result = { made: 0, prefillMs: 0, decodeMs: 0, reason: "length" };
  let breath = start;
  for await (const { id, probability } of stream(ids, count)) {
    const now = performance.now();
    if (result.made) result.decodeMs = now - start - result.prefillMs;
    else result.prefillMs = now - start;
    if (id === eos) result.reason = "eos";
    if (id === eos) break;
    const bytes = tokenizer.bytes(id);
    const text = decoder.decode(bytes, { stream: true });
    result.made++;
    postMessage({ type: "token", id, bytes, text, probability, ...result });
    if (now - breath > 40) {
      await new Promise((resume) => setTimeout(resume)); // let a stop message in
      breath = performance.now();
    }
    if (stopped) result.reason = "stopped";
    if (stopped) break;
  }
  return { ...result, text: decoder.decode() };
}

// Yield greedy ids with their probabilities. Past the context the oldest id falls out and positions start anew.
async function* stream(prompt, count) {
  const { ort, session, config } = gpt;
  const { context_length: context, n_heads: heads, emb_dim: width, vocab_size: size } = config;
  const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const empty = new ort.Tensor("float32", [], [1, heads, 0, width / heads]);
  const pastNames = session.inputNames.filter((name) => name.startsWith("past_key_values."));
  const ids = [...prompt];
  for (let present, made = 0; made < count; made++) {
    const past = present && ids.length <= context ? ids.length - 1 : 0; // ids that the cache holds
    const fresh = past ? ids.slice(-1) : ids.slice(-context);
    const cache = pastNames.map((name) => [name, past ? present[name.replace("past_key_values", "present")] : empty]);
    present = await session.run({
      input_ids: int64(fresh),
      attention_mask: int64(Array(past + fresh.length).fill(1)),
      position_ids: int64(fresh.map((_, i) => past + i)),
      ...Object.fromEntries(cache),
    });
    const { id, probability } = best(present.logits.data.subarray(-size));
    ids.push(id);
    yield { id, probability };
  }
}

// The most likely id of the last position's logits, and its share of the softmax.
function best(logits) {
  const id = logits.reduce((best, logit, i) => (logit > logits[best] ? i : best), 0);
  if (!Number.isFinite(logits[id])) throw new Error("the logits are not finite: export the bundle again");
  return { id, probability: 1 / logits.reduce((sum, logit) => sum + Math.exp(logit - logits[id]), 0) };
}
