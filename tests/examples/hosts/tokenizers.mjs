// Both of our tokenizers in JavaScript: {bundle, prompts} in JSON on stdin, the ids of each in JSON on stdout.
import { readFileSync } from "node:fs";
import { readTokenizer } from "../../../examples/node/generate.mjs";
import { Tokenizer } from "../../../runtime/gptedge_runtime/web/tokenizer.js";

const { bundle, prompts } = JSON.parse(readFileSync(0, "utf8"));
const { tokenizer } = JSON.parse(readFileSync(`${bundle}/manifest.json`, "utf8"));
const example = readTokenizer(bundle, tokenizer);
const page = new Tokenizer(tokenizer, readFileSync(`${bundle}/${tokenizer.path}`, "utf8"));
const bytes = page.tokens.map((_, id) => Array.from(page.bytes(id)));
console.log(JSON.stringify({ example: prompts.map(example.encode), page: prompts.map((text) => page.encode(text)), bytes }));
