"""optimum's ORTModelForCausalLM as a host: a task in JSON on stdin, ids in JSON on stdout."""

import json
import sys

from optimum.onnxruntime import ORTModelForCausalLM  # type: ignore[import-not-found,unused-ignore]
from transformers import AutoTokenizer

task = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(task["bundle"], padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
model = ORTModelForCausalLM.from_pretrained(task["bundle"])


def new_ids(prompts: list[str]) -> list[list[int]]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=task["max_new_tokens"], do_sample=False)
    ids: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
    return ids


encoded = tokenizer(task["prompts"])["input_ids"]
single = [new_ids([prompt])[0] for prompt in task["prompts"]]
print(json.dumps({"encoded": encoded, "single": single, "batch": new_ids(task["prompts"])}))
