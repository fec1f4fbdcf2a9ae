// Run in the page: the text of a task to ids, and its ragged batch through generate.onnx in one call.
async ({ prompts, max_new_tokens }) => {
  const read = async (name) => new Uint8Array(await (await fetch(`bundle/${name}`)).arrayBuffer());
  const text = async (name) => new TextDecoder().decode(await read(name));

  const { Tokenizer } = await import("./tokenizer.js");
  const manifest = JSON.parse(await text("manifest.json"));
  const tokenizer = new Tokenizer(manifest.tokenizer, await text(manifest.tokenizer.path));
  const encoded = prompts.map((prompt) => tokenizer.encode(prompt));

  const ort = await import("./ort/ort.wasm.min.mjs");
  ort.env.wasm.wasmPaths = new URL("ort/", location.href).href;
  const session = await ort.InferenceSession.create(await read("onnx/generate.onnx"), {
    externalData: [{ path: "model.onnx_data", data: await read("onnx/model.onnx_data") }],
  });
  const width = Math.max(...encoded.map((ids) => ids.length));
  const int64 = (dims, values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
  const padded = (rows) =>
    int64([rows.length, width], rows.flatMap((row) => [...Array(width - row.length).fill(0), ...row]));
  const { output_ids } = await session.run({
    input_ids: padded(encoded),
    attention_mask: padded(encoded.map((ids) => ids.map(() => 1))),
    max_new_tokens: int64([], [max_new_tokens]),
    eos_token_id: int64([], [-1]),
  });
  const length = output_ids.dims[1];
  const ids = Array.from(output_ids.data, Number);
  return { encoded, batch: encoded.map((_, row) => ids.slice(row * length + width, (row + 1) * length)) };
};
