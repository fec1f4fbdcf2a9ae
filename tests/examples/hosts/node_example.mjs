// The functions of examples/node, as a host: a task in JSON on stdin, ids in JSON on stdout.
import { readFileSync } from "node:fs";
import { generate, open, readTokenizer, stream } from "../../../examples/node/generate.mjs";

const { bundle, prompts, max_new_tokens } = JSON.parse(readFileSync(0, "utf8"));
const manifest = JSON.parse(readFileSync(`${bundle}/manifest.json`, "utf8"));
const encoded = prompts.map(readTokenizer(bundle, manifest.tokenizer).encode);

const session = await open(bundle, "model");
const single = [];
for (const ids of encoded) {
  single.push([]);
  for await (const id of stream(session, manifest.model, ids, max_new_tokens)) single.at(-1).push(id);
}
const batch = await generate(await open(bundle, "generate"), encoded, max_new_tokens, -1);
console.log(JSON.stringify({ encoded, single, batch }));
