// Continue a text with a bundle: node generate.mjs BUNDLE PROMPT [MAX_NEW_TOKENS] [--one-call]
import { existsSync, readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { Tiktoken } from "js-tiktoken/lite";

process.env.ORT_DISABLE_TELEMETRY = "1"; // read when onnxruntime is loaded, so before that
const { default: ort } = await import("onnxruntime-node");

const int64 = (dims, values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);

export function readManifest(bundle) {
  if (!existsSync(`${bundle}/manifest.json`)) throw new Error(`${bundle} holds no manifest.json: give a bundle`);
  return JSON.parse(readFileSync(`${bundle}/manifest.json`, "utf8"));
}

export const open = (bundle, graph) => ort.InferenceSession.create(`${bundle}/onnx/${graph}.onnx`);

export function readTokenizer(bundle, { path, pattern, special_tokens }) {
  const tokens = readFileSync(`${bundle}/${path}`, "utf8").trimEnd().split("\n").map((line) => line.split(" ")[0]);
  // JavaScript has no possessive quantifiers, and its \s is not Unicode's white space (U+0085, U+FEFF)
  const spaces = { "\\s": "\\p{White_Space}", "\\S": "\\P{White_Space}" };
  const pat_str = pattern.replace(/([+*?}])\+/g, "$1").replace(/\\s/gi, (class_) => spaces[class_]);
  const bpe = new Tiktoken({ pat_str, special_tokens, bpe_ranks: `! 0 ${tokens.join(" ")}` });
  return { encode: (text) => bpe.encode(text, [], []), decode: (ids) => bpe.decode(ids) };
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
    ids.push(logits.reduce((best, logit, id) => (logit > logits[best] ? id : best), 0));
    yield ids.at(-1);
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

async function main(bundle, prompt, maxNewTokens = 40, flag = "") {
  if (!prompt || !/^\d+$/.test(maxNewTokens) || !["", "--one-call"].includes(flag)) {
    throw new Error("usage: node generate.mjs BUNDLE PROMPT [MAX_NEW_TOKENS] [--one-call]");
  }
  const manifest = readManifest(bundle);
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

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  await main(...process.argv.slice(2)).catch(({ message }) => {
    console.error(message.split("\n")[0]);
    process.exitCode = 2;
  });
}
