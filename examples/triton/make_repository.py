"""Write a Triton model repository around a bundle's generate.onnx: make_repository.py BUNDLE REPOSITORY [NAME].

Triton puts prompts of any lengths end to end ("ragged") and other inputs one below the other; generate.onnx wants a
rectangle and scalars. The graph written here takes the one and makes the other of it: prompts are padded on the left,
the nodes of generate.onnx follow, over the same weights, and each request gets its new ids. It needs the package onnx.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import onnx

BEFORE = """
before (int64[tokens] prompt_ids, int32[rows] prompt_lengths, int64[rows, 1] max_new_ids)
    => (int64[rows, width] input_ids, int64[rows, width] attention_mask, int64 max_new_tokens) {
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  columns = Constant <value_ints = [1]> ()
  lengths = Cast <to = 7> (prompt_lengths)
  prompt_width = ReduceMax <keepdims = 0> (lengths)
  prompt_ends = CumSum (lengths, zero)
  prompt_starts = Sub (prompt_ends, lengths)
  end_column = Unsqueeze (prompt_ends, columns)
  start_column = Unsqueeze (prompt_starts, columns)
  offsets = Range (zero, prompt_width, one)
  left_column = Sub (end_column, prompt_width)
  places = Add (left_column, offsets)
  is_token = GreaterOrEqual (places, start_column)
  attention_mask = Cast <to = 7> (is_token)
  valid_places = Max (places, zero)
  input_ids = Gather (prompt_ids, valid_places)
  max_new_tokens = ReduceMax <keepdims = 0> (max_new_ids)
}
"""
AFTER = """
after (int64[rows, total] output_ids, int64[rows, 1] max_new_ids,
       int64 prompt_width, int64 zero, int64 one, int64[1] columns)
    => (int64[rows, new_tokens] new_ids) {
  minus_one = Constant <value_int = -1> ()
  last = Constant <value_ints = [9223372036854775807]> ()
  width_list = Unsqueeze (prompt_width, zero)
  written = Slice (output_ids, width_list, last, columns)
  written_shape = Shape <start = 1> (written)
  n_written = Squeeze (written_shape)
  numbers = Range (zero, n_written, one)
  is_wanted = Less (numbers, max_new_ids)
  new_ids = Where (is_wanted, written, minus_one)
}
"""
CONFIG = """\
name: "{name}"
backend: "onnxruntime"
max_batch_size: 32
input [
  {{ name: "prompt_ids" data_type: TYPE_INT64 dims: [ -1 ] allow_ragged_batch: true }},
  {{ name: "max_new_ids" data_type: TYPE_INT64 dims: [ 1 ] }}
]
batch_input [
  {{
    kind: BATCH_ITEM_SHAPE_FLATTEN
    target_name: "prompt_lengths"
    data_type: TYPE_INT32
    source_input: "prompt_ids"
  }}
]
output [ {{ name: "new_ids" data_type: TYPE_INT64 dims: [ -1 ] }} ]
dynamic_batching {{ max_queue_delay_microseconds: 5000 }}
instance_group [ {{ kind: KIND_CPU }} ]
"""


def around(model: onnx.ModelProto, eos_token_id: int) -> None:
    """Give generate.onnx the inputs and the output that Triton's batches have."""
    before, after = onnx.parser.parse_graph(BEFORE), onnx.parser.parse_graph(AFTER)
    eos = onnx.helper.make_node("Constant", [], ["eos_token_id"], value_int=eos_token_id)
    nodes = [eos, *before.node, *model.graph.node, *after.node]
    for field, values in (("node", nodes), ("input", before.input), ("output", after.output)):
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(values)


def main(bundle: Path, repository: Path, name: str = "gptedge") -> None:
    """Write REPOSITORY/NAME: config.pbtxt, and as version 1 the graph and its weights."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"{name!r} is no name of a model: give letters, digits, '.', '_' and '-'")
    eos_token_id = json.loads((bundle / "manifest.json").read_text("utf-8"))["tokenizer"]["eos_token_id"]
    model = onnx.load(bundle / "onnx/generate.onnx", load_external_data=False)
    around(model, -1 if eos_token_id is None else eos_token_id)
    version = repository / name / "1"
    version.mkdir(parents=True)
    shutil.copyfile(bundle / "onnx/model.onnx_data", version / "model.onnx_data")
    onnx.save(model, version / "model.onnx")
    (repository / name / "config.pbtxt").write_text(CONFIG.format(name=name))


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: make_repository.py BUNDLE REPOSITORY [NAME]")
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
