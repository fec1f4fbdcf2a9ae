"""onnxruntime-genai as a host: a task in JSON on stdin, ids in JSON on stdout."""

import json
import sys

import numpy as np
import onnxruntime_genai as og  # type: ignore[import-not-found,unused-ignore]

PAD = 50256

task = json.load(sys.stdin)
model = og.Model(task["bundle"])
tokenizer = og.Tokenizer(model)


def new_ids(prompts: list[list[int]]) -> list[list[int]]:
    width = max(map(len, prompts))
    padded = np.array([ids + [PAD] * (width - len(ids)) for ids in prompts], np.int32)  # it masks pads on the right
    params = og.GeneratorParams(model)
    params.set_search_options(batch_size=len(prompts), max_length=width + task["max_new_tokens"], do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(padded)
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[width:].tolist() for row in range(len(prompts))]


encoded = [tokenizer.encode(text).tolist() for text in task["prompts"]]
single = [new_ids([ids])[0] for ids in encoded]
print(json.dumps({"encoded": encoded, "single": single, "batch": new_ids(encoded)}))
