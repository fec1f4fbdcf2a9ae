"""Write the bundles that tests/runtime reads, and what the eager model says about them: make_bundles.py FOLDER.

With --cuda instead FOLDER/fp32, FOLDER/fp16 and FOLDER/bf16, the model of FOLDER/tiny with the graph for GPUs, for
tests/gpu, and FOLDER/outliers, one layer of it with a large value in every token's embedding.
It needs PyTorch; the tests of the runtime do not. FOLDER/tiny is a random model whose context ends soon, FOLDER/odd one
of unusual sizes, FOLDER/demo the demo model; beside each stands a .npz with what the book's own functions answer.
FOLDER/close is a model whose every choice the last bits of the logits decide; FOLDER/int8 and FOLDER/int4 are tiny at
those precisions, FOLDER/long-int8 and FOLDER/long-int4 with contexts in which prompts are long.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gptedge_export import Vocabulary, export_bundle, load_vocabulary
from gptedge_models import GPTConfig, GPTModel, generate_text_simple, load_checkpoint
from gptedge_models import demo as demo_model
from numpy.typing import NDArray

TINY = GPTConfig(vocab_size=270, context_length=32, emb_dim=32, n_heads=4, n_layers=2, drop_rate=0.0, qkv_bias=True)
ODD = GPTConfig(vocab_size=257, context_length=7, emb_dim=15, n_heads=3, n_layers=1, drop_rate=0.0)
LONG = {"int8": replace(TINY, context_length=160), "int4": replace(TINY, context_length=320)}
LENGTHS = (1, 2, 5, 17, 31, 32, 40)  # of prompts: up to the context, at it, beyond it
MIN_MARGIN = 1e-3  # between the two largest logits of every choice, far above the rounding of any CPU


def tiny_vocabulary() -> Vocabulary:
    """Single bytes, merges within and across characters of several bytes; ids 262 to 269 stand for nothing."""
    merges = [b"he", b"ll", b"hell", b"\xf0\x9f", b"\xf0\x9f\x98"]
    return Vocabulary([bytes([byte]) for byte in range(256)] + merges, {"<|endoftext|>": 261})


def random_model(config: GPTConfig, gain: float = 4) -> GPTModel:
    torch.manual_seed(123)
    model = GPTModel(config).eval()
    for name, weight in model.named_parameters():
        if ".att." in name and name.endswith("weight"):
            weight.data *= gain  # attention counts, so that a fault in the cache changes ids
    model.out_head.weight.data *= 8  # choices are clear
    return model


def write_oracle(path: Path, model: GPTModel, lengths: tuple[int, ...], new_tokens: int) -> None:
    """Store ``prompt_i``, ``new_i`` of each length; ``ids`` (2, T), their ``logits``, the last ones of each prefix."""
    random, vocab_size = np.random.default_rng(5), model.config.vocab_size
    answers: dict[str, NDArray[Any]] = {}
    for i, length in enumerate(lengths):
        prompt = random.integers(vocab_size, size=length).tolist()
        while (ids := _clear_choices(model, prompt, new_tokens)) is None:
            prompt = random.integers(vocab_size, size=length).tolist()
        answers |= {f"prompt_{i}": np.array(prompt), f"new_{i}": np.array(ids[length:])}
    batch = torch.from_numpy(random.integers(vocab_size, size=(2, min(model.config.context_length, 64))))
    with torch.no_grad():
        last = [model(batch[:, :length])[:, -1].numpy() for length in range(1, batch.shape[1] + 1)]
        answers |= {"ids": batch.numpy(), "logits": model(batch).numpy(), "last_logits": np.stack(last)}
    np.savez(path, allow_pickle=False, **answers)


@torch.no_grad()
def _clear_choices(model: GPTModel, prompt: list[int], new_tokens: int) -> list[int] | None:
    """The prompt with its greedy ids; None where a choice is so close that rounding may turn it."""
    context = model.config.context_length
    ids = generate_text_simple(model, torch.tensor([prompt]), new_tokens, context)[0].tolist()
    for end in range(len(prompt), len(ids)):
        first, second = torch.topk(model(torch.tensor([ids[:end][-context:]]))[0, -1], 2).values
        if first - second < MIN_MARGIN:
            return None
    return ids


def write_tiny(folder: Path) -> None:
    model = random_model(TINY)
    export_bundle(model, folder / "tiny", vocabulary=tiny_vocabulary(), force=True)
    write_oracle(folder / "tiny.npz", model, LENGTHS, new_tokens=72)


def write_rounded(folder: Path, precision: str) -> None:
    model, out = random_model(TINY), folder / precision
    export_bundle(model, out, vocabulary=tiny_vocabulary(), precision=precision, force=True)


def write_long(folder: Path, precision: str) -> None:
    model, out = random_model(LONG[precision], gain=1), folder / f"long-{precision}"
    export_bundle(model, out, vocabulary=tiny_vocabulary(), precision=precision, force=True)


def write_close(folder: Path) -> None:
    model = random_model(TINY)
    head = model.out_head.weight.data
    head[1:4] = head[0] * torch.tensor([[1.0], [-1.0], [-1.0]]) * (1 + 1e-7 * torch.randn(3, TINY.emb_dim))
    head[4:] = 0  # 0 or 1, 2 or 3 are the most likely, and all but alike
    export_bundle(model, folder / "close", vocabulary=tiny_vocabulary(), force=True)


def write_odd(folder: Path) -> None:
    model = random_model(ODD)
    export_bundle(model, folder / "odd", vocabulary=load_vocabulary("bytes"), force=True)
    write_oracle(folder / "odd.npz", model, (3, 9), new_tokens=24)


def write_demo(folder: Path) -> None:
    model = load_checkpoint("demo")
    vocabulary = load_vocabulary(str(Path(demo_model.__path__[0]) / "tokenizer.tiktoken"))
    export_bundle(model, folder / "demo", vocabulary=vocabulary, force=True)
    write_oracle(folder / "demo.npz", model, (3, 30), new_tokens=24)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rounded = [partial(write, precision=precision) for precision in LONG for write in (write_long, write_rounded)]
    writers: list[Callable[[Path], None]] = [write_demo, *rounded, write_tiny, write_close, write_odd]
    with ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for done in [pool.submit(write, folder) for write in writers]:
            done.result()


def write_cuda(folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    for precision in ("fp32", "fp16", "bf16"):
        model, vocabulary = random_model(TINY), tiny_vocabulary()
        export_bundle(model, folder / precision, vocabulary=vocabulary, precision=precision, cuda=True, force=True)
    model = random_model(replace(TINY, n_layers=1))
    model.tok_emb.weight.data[:, 3] += 3000
    export_bundle(model, folder / "outliers", vocabulary=tiny_vocabulary(), precision="fp16", cuda=True, force=True)
    ids = torch.randint(TINY.vocab_size, (2, TINY.context_length))
    with torch.no_grad():
        np.savez(folder / "outliers.npz", allow_pickle=False, ids=ids.numpy(), logits=model(ids).numpy())


if __name__ == "__main__":
    (write_cuda if "--cuda" in sys.argv else main)(Path(sys.argv[1]))
