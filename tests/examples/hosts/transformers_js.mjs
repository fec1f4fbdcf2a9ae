// transformers.js as a host: a task in JSON on stdin, ids in JSON on stdout.
import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";

const { bundle, prompts, max_new_tokens } = JSON.parse(readFileSync(0, "utf8"));
Object.assign(env, { allowRemoteModels: false, localModelPath: `${dirname(bundle)}/` });
const tokenizer = await AutoTokenizer.from_pretrained(basename(bundle));
const model = await AutoModelForCausalLM.from_pretrained(basename(bundle));
tokenizer.padding_side = "left";

async function newIds(texts) {
  const inputs = tokenizer(texts, { padding: true });
  const output = await model.generate({ ...inputs, max_new_tokens, do_sample: false });
  return output.tolist().map((row) => row.slice(inputs.input_ids.dims[1]).map(Number));
}

const encoded = prompts.map((text) => tokenizer.encode(text));
const single = [];
for (const text of prompts) single.push((await newIds([text]))[0]);
console.log(JSON.stringify({ encoded, single, batch: await newIds(prompts) }));
