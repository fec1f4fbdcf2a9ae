"""Change graphs inside otherwise valid bundles: the runtime answers or says what is wrong; it neither dies nor hangs.

    python tests/fuzz/graphs.py BUNDLE [SECONDS] [FIRST_SEED]

Each case runs in a process of its own. What is found is printed with its seed, by which it can be run again.
"""

import contextlib
import hashlib
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnx
from gptedge_runtime import GptEdgeError, load

GRAPH = "onnx/decode.onnx"
TIMEOUT_S = 5.0
HANG_S = 60.0

Mutation = Callable[[onnx.ModelProto, random.Random], None]


def rewire(model: onnx.ModelProto, dice: random.Random) -> None:
    """Let a node read another tensor."""
    names = [name for node in model.graph.node for name in node.output] + [t.name for t in model.graph.initializer]
    node = dice.choice([node for node in model.graph.node if node.input])
    node.input[dice.randrange(len(node.input))] = dice.choice([*names, ""])


def rename_operator(model: onnx.ModelProto, dice: random.Random) -> None:
    """Let a node compute something else."""
    dice.choice(model.graph.node).op_type = dice.choice([node.op_type for node in model.graph.node])


def drop_node(model: onnx.ModelProto, dice: random.Random) -> None:
    """Take a node out."""
    del model.graph.node[dice.randrange(len(model.graph.node))]


def change_attribute(model: onnx.ModelProto, dice: random.Random) -> None:
    """Give an attribute another number."""
    attributes = [attribute for node in model.graph.node for attribute in node.attribute]
    attribute = dice.choice(attributes)
    attribute.i = dice.choice([0, 1, -1, 7, 2**31, 2**62, -(2**63)])
    attribute.f = dice.choice([0.0, -1.0, 1e30, float("nan")])


def change_shape(model: onnx.ModelProto, dice: random.Random) -> None:
    """Give a weight another shape than its bytes have."""
    tensor = dice.choice([tensor for tensor in model.graph.initializer if tensor.dims])
    tensor.dims[dice.randrange(len(tensor.dims))] = dice.choice([0, 1, 3, 2**20, 2**40, -1])


def change_type(model: onnx.ModelProto, dice: random.Random) -> None:
    """Give a weight another type."""
    dice.choice(model.graph.initializer).data_type = dice.randrange(24)


def change_place(model: onnx.ModelProto, dice: random.Random) -> None:
    """Let a weight lie elsewhere: in another place, of another length, or in another file."""
    tensor = dice.choice([tensor for tensor in model.graph.initializer if tensor.external_data])
    entry = dice.choice(tensor.external_data)
    places = ["../manifest.json", "/etc/passwd", "model.onnx", "", "."]
    entry.value = dice.choice([*places, "0", "1", "-1", "64", str(2**40), str(2**64)])


MUTATIONS: list[Mutation] = [
    rewire, rename_operator, drop_node, change_attribute, change_shape, change_type, change_place,
]  # fmt: skip


def mutate(data: bytes, seed: int) -> bytes:
    """Return the graph with one to three changes; every eighth loses or changes a few bytes instead."""
    dice = random.Random(seed)
    if seed % 8 == 7:
        place = dice.randrange(len(data))
        return data[:place] + dice.randbytes(dice.randrange(4)) + data[place + dice.randrange(4) :]
    model = onnx.load_from_string(data)
    for _ in range(dice.randint(1, 3)):
        dice.choice(MUTATIONS)(model, dice)
    changed: bytes = model.SerializeToString()
    return changed


def write(bundle: Path, seed: int) -> None:
    """Change the bundle's graph, and sign it again."""
    path = bundle / GRAPH
    path.write_bytes(data := mutate(path.read_bytes(), seed))
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    entry = next(entry for entry in manifest["files"] if entry["path"] == GRAPH)
    entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def use(bundle: Path) -> None:
    """Load and generate, as an application does."""
    with contextlib.suppress(GptEdgeError), load(bundle, threads=1, timeout_s=TIMEOUT_S) as gpt:
        gpt.generate_ids([1, 2, 3], max_new_tokens=4)
        gpt.logits([[1, 2], [3, 4]])


def find(bundle: Path, seed: int) -> str | None:
    """Run one case in a process of its own; return what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(bundle, Path(folder, "bundle"))
        write(copy, seed)
        process = multiprocessing.get_context("fork").Process(target=use, args=(copy,))
        process.start()
        process.join(HANG_S)
        if process.is_alive():
            process.kill()
            process.join()
            return "hang"
        return None if process.exitcode == 0 else f"exit {process.exitcode}"


def main(bundle: Path, seconds: float, seed: int) -> int:
    """Run cases until the time is over; print what was found, and return how much."""
    first, found, end = seed, 0, time.monotonic() + seconds
    while time.monotonic() < end:
        if fault := find(bundle, seed):
            print(f"seed {seed}: {fault}", flush=True)
            found += 1
        seed += 1
    print(f"{seed - first} graphs, {found} faults")
    return found


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(bool(main(Path(arguments[0]), float((arguments[1:] or ["60"])[0]), int((arguments[2:] or ["0"])[0]))))
