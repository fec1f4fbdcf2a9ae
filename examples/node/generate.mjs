// Continue a text with a bundle: node generate.mjs BUNDLE PROMPT [MAX_NEW_TOKENS [--one-call]]
import { createHash } from "node:crypto";
import { createReadStream, existsSync, readFileSync, realpathSync } from "node:fs";
import { pipeline } from "node:stream/promises";
import { fileURLToPath } from "node:url";
import { Tiktoken } from "js-tiktoken/lite";

process.env.ORT_DISABLE_TELEMETRY = "1"; // read when onnxruntime is loaded, so before that
const { default: ort } = await import("onnxruntime-node");

const NO_TOKEN = Buffer.from("\ufffd"); // for ids of a padded vocabulary
const int64 = (dims, values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);

export function readManifest(bundle) {
  if (!existsSync(`${bundle}/manifest.json`)) throw new Error(`${bundle} holds no manifest.json: give a bundle`);
  return JSON.parse(readFileSync(`${bundle}/manifest.json`, "utf8"));
}

// Hold the files that are read here against the manifest: a damaged bundle would give other text.
async function checkFiles(bundle, { files, tokenizer }) {
  for (const { path, sha256 } of files.filter(({ path }) => path.startsWith("onnx/") || path === tokenizer.path)) {
    const hash = createHash("sha256");
    await pipeline(createReadStream(`${bundle}/${path}`), hash);
    if (hash.digest("hex") !== sha256) throw new Error(`${path} is not the file that was exported: copy it again`);
  }
}

export const open = (bundle, graph) => ort.InferenceSession.create(`${bundle}/onnx/${graph}.onnx`);

export function readTokenizer(bundle, { path, pattern, special_tokens }) {
  const tokens = readFileSync(`${bundle}/${path}`, "utf8").trimEnd().split("\n").map((line) => line.split(" ")[0]);
  // JavaScript has no possessive quantifiers, and its \s is not Unicode's white space (U+0085, U+FEFF)
  const spaces = { "\\s": "\\p{White_Space}", "\\S": "\\P{White_Space}" };
  const pat_str = pattern.replace(/([+*?}])\+/g, "$1").replace(/\\s/gi, (class_) => spaces[class_]);
  const bpe = new Tiktoken({ pat_str, special_tokens, bpe_ranks: `! 0 ${tokens.join(" ")}` });
  const special = new Map(Object.entries(special_tokens).map(([token, id]) => [id, Buffer.from(token)]));
  const bytes = (id) => (id < tokens.length ? Buffer.from(tokens[id], "base64") : special.get(id) ?? NO_TOKEN);
  const utf8 = new TextDecoder("utf-8", { ignoreBOM: true }); // which keeps U+FEFF
  return { encode: (text) => bpe.encode(text, [], []), decode: (ids) => utf8.decode(Buffer.concat(ids.map(bytes))) };
}

// Yield greedy ids one by one with onnx/model.onnx. Past the context the oldest id falls out and positions start anew.
export async function* stream(session, { context_length, n_heads, emb_dim, vocab_size }, prompt, maxNewTokens) {
  const empty = new ort.Tensor("float32", [], [1, n_heads, 0, emb_dim / n_heads]);
  const pastNames = session.inputNames.filter((name) => name.startsWith("past_key_values."));
  const ids = [...prompt];
  for (let present, made = 0; made < maxNewTokens; made++) {
    const past = present && ids.length <= context_length ? ids.length - 1 : 0; // ids that the cache holds
    const fresh = past ? ids.slice(-1) : ids.slice(-context_length);
    const cache = pastNames.map((name) => [name, past ? present[name.replace("past_key_values", "present")] : empty]);
    present = await session.run({
      input_ids: int64([1, fresh.length], fresh),
      attention_mask: int64([1, past + fresh.length], Array(past + fresh.length).fill(1)),
      position_ids: int64([1, fresh.length], fresh.map((_, i) => past + i)),
      ...Object.fromEntries(cache),
    });
    const logits = present.logits.data.subarray(-vocab_size); // of the last position
    const best = logits.reduce((best, logit, id) => (logit > logits[best] ? id : best), 0);
    if (!Number.isFinite(logits[best])) throw new Error("the model's logits are not finite: export it again");
    ids.push(best);
    yield best;
  }
}

// The whole loop in one call with onnx/generate.onnx: prompts of any lengths, padded on the left.
export async function generate(session, prompts, maxNewTokens, eos) {
  const width = Math.max(...prompts.map((ids) => ids.length));
  const pad = (ids, filler) => [...Array(width - ids.length).fill(filler), ...ids];
  const { output_ids } = await session.run({
    input_ids: int64([prompts.length, width], prompts.flatMap((ids) => pad(ids, 0))),
    attention_mask: int64([prompts.length, width], prompts.flatMap((ids) => pad(ids.map(() => 1), 0))),
    max_new_tokens: int64([], [maxNewTokens]),
    eos_token_id: int64([], [eos]),
  });
  const length = output_ids.dims[1];
  return prompts.map((_, row) => Array.from(output_ids.data.subarray(row * length + width, (row + 1) * length), Number));
}

async function main(bundle, prompt, maxNewTokens = 40, flag = "", ...others) {
  if (!prompt || !/^\d{1,9}$/.test(maxNewTokens) || !["", "--one-call"].includes(flag) || others.length) {
    throw new Error("usage: node generate.mjs BUNDLE PROMPT [MAX_NEW_TOKENS [--one-call]]");
  }
  const manifest = readManifest(bundle);
  if (manifest.classifier) throw new Error(`${bundle} is a classifier: use gptedge classify`);
  await checkFiles(bundle, manifest);
  const { encode, decode } = readTokenizer(bundle, manifest.tokenizer);
  const eos = manifest.tokenizer.eos_token_id ?? -1;
  if (flag === "--one-call") {
    const [ids] = await generate(await open(bundle, "generate"), [encode(prompt)], +maxNewTokens, eos);
    return console.log(decode(ids.includes(eos) ? ids.slice(0, ids.indexOf(eos)) : ids));
  }
  const session = await open(bundle, "model");
  const ids = [];
  let shown = 0; // characters on the screen; one that still lacks bytes decodes to U+FFFD and waits
  for await (const id of stream(session, manifest.model, encode(prompt), +maxNewTokens)) {
    if (id === eos) break;
    ids.push(id);
    const text = decode(ids).replace(/\ufffd+$/, "");
    process.stdout.write(text.slice(shown));
    shown = Math.max(shown, text.length);
  }
  console.log(decode(ids).slice(shown));
}

if (process.argv[1] && realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  process.stdout.on("error", ({ code, message }) => {
    if (code !== "EPIPE") console.error(message);
    process.exit(code === "EPIPE" ? 0 : 2); // a reader that has seen enough is no error
  });
  await main(...process.argv.slice(2)).catch(({ message }) => {
    console.error(message.split("\n")[0]);
    process.exitCode = 2;
  });
}
