"""Train the demo model on the stories of :mod:`gptedge_models.stories`: ``python -m gptedge_models.train_demo -o DIR``.

Writes ``config.json``, ``tokenizer.tiktoken``, ``model.safetensors`` (float16) and the model card ``README.md``. The
seeds and the number of threads are fixed, so that one machine always writes the same files.
"""

import base64
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path

import click
import tiktoken
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .gpt import GPTConfig, GPTModel, generate_text_simple
from .stories import stories, stories_with_slots

END_OF_TEXT = "<|endoftext|>"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
ASCII_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+"""  # the same, for re

CONFIG = GPTConfig(vocab_size=1280, context_length=256, emb_dim=128, n_heads=4, n_layers=4, drop_rate=0.0)
PROMPT = "One windy day, Leo"
TRAIN_SEED, N_STORIES, N_BPE_STORIES = 1, 64_000, 2_000
HELD_OUT_SEED, N_HELD_OUT = 2, 500
BATCH_SIZE, THREADS = 16, 2
MATRIX_LR, OTHER_LR = 0.02, 2e-3
RECALL_WEIGHT = 10.0  # of a token that the story so far determines: looking back is what takes long to learn


def train_bpe(texts: Iterator[str], n_ranks: int) -> dict[bytes, int]:
    """Learn ``n_ranks`` byte pair ranks: the 256 single bytes, then the most frequent pair, time and again."""
    counts = Counter(piece for text in texts for piece in re.findall(ASCII_PATTERN, text))
    pieces = {piece: [bytes([byte]) for byte in piece.encode()] for piece in counts}
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < n_ranks:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for piece, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[piece]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[best[0] + best[1]] = len(ranks)
        pieces = {piece: _merge(parts, best) for piece, parts in pieces.items() if len(parts) > 1}
    return ranks


def _merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged: list[bytes] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def make_encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """Return the tokenizer of the ranks, with GPT-2's pattern and ``<|endoftext|>`` as the last id."""
    special = {END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding("demo", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def encode_story(
    encoding: tiktoken.Encoding, story: str, slots: list[tuple[int, int]]
) -> tuple[list[int], list[float]]:
    """Return the ids of a story, end of text included, and the weight of each in the loss."""
    ids = encoding.encode_ordinary(story)
    weights, start = [], 0
    for token in encoding.decode_tokens_bytes(ids):
        end = start + len(token)
        recalled = any(first < end and start < last for first, last in slots)
        weights.append(RECALL_WEIGHT if recalled else 1.0)
        start = end
    return [*ids, encoding.eot_token], [*weights, 1.0]


def batches(encoding: tiktoken.Encoding, n_stories: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids int64 (B, T) and weights float32 (B, T), a story a row; padding has weight 0."""
    told = (encode_story(encoding, *story) for story in stories_with_slots(TRAIN_SEED, n_stories))
    while batch := list(islice(told, BATCH_SIZE)):
        ids, weights = ([torch.tensor(row) for row in column] for column in zip(*batch, strict=True))
        yield pad_sequence(ids, True, encoding.eot_token), pad_sequence(weights, True)


def train(config: GPTConfig, encoding: tiktoken.Encoding, n_stories: int) -> GPTModel:
    """Train a new model once over the stories, its head tied to its embedding so that it learns to copy.

    The matrices of the blocks follow Muon (Jordan et al., 2024), with which recall rises in about a third of
    the steps that AdamW takes; the rest follows AdamW. Warm-up, then linear decay.
    """
    torch.manual_seed(TRAIN_SEED)
    model = GPTModel(config)
    for embedding in (model.tok_emb, model.pos_emb):
        nn.init.normal_(embedding.weight, std=0.02)  # with PyTorch's 1.0 the model hardly learns to look back
    model.out_head.weight = model.tok_emb.weight
    matrices = [weight for weight in model.trf_blocks.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if not any(weight is matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MATRIX_LR, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    steps = -(-n_stories // BATCH_SIZE)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: _rate(step, steps)) for each in optimizers]
    bar = tqdm(batches(encoding, n_stories), total=steps, unit="step")
    for ids, weights in bar:
        logits = model(ids[:, :-1])  # (B, T, V)
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        model.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return model.eval()


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: 50 steps of warm-up, full until 40 % of the way, then down to 2 %."""
    return min(1.0, (step + 1) / 50) * max(0.02, min(1.0, (steps - step) / (0.6 * steps)))


@torch.no_grad()
def held_out_loss(model: GPTModel, encode: Callable[[str], list[int]], seed: int, n_stories: int) -> float:
    """Return the mean cross-entropy in nats per token, end of text included, over stories told one at a time."""
    end = model.config.vocab_size - 1
    total, count = 0.0, 0
    for story in stories(seed, n_stories):
        ids = torch.tensor([*encode(story), end])
        total += nn.functional.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="sum").item()
        count += len(ids) - 1
    return total / count


@torch.no_grad()
def recall_accuracy(model: GPTModel, encode: Callable[[str], list[int]], seed: int, n_stories: int) -> float:
    """Return the share of recall slots all whose tokens are the most likely ones after the true text before them."""
    right, count = 0, 0
    for story, slots in stories_with_slots(seed, n_stories):
        ids = torch.tensor(encode(story))
        hits = model(ids[None, :-1])[0].argmax(-1) == ids[1:]  # (T - 1)
        for start, end in slots:
            first, last = len(encode(story[:start].rstrip())), len(encode(story[:end]))
            right += int(hits[first - 1 : last - 1].all())
            count += 1
    return right / count


def tell(model: GPTModel, encoding: tiktoken.Encoding, prompt: str) -> str:
    """Return the greedy story that begins with ``prompt``, up to the end of text or until the context is full."""
    ids = torch.tensor([encoding.encode_ordinary(prompt)])  # (1, T)
    size = model.config.context_length
    told = generate_text_simple(model, ids, size - ids.shape[1], size)[0].tolist()
    return encoding.decode(told).split(END_OF_TEXT)[0]


def round_to_half(model: GPTModel) -> dict[str, Tensor]:
    """Round the weights in place to what float16 holds; return them as float16, without the causal masks."""
    half = {name: weight.half() for name, weight in model.state_dict().items() if not name.endswith("att.mask")}
    model.load_state_dict(half, strict=False)
    return half


def save(output: Path, weights: dict[str, Tensor], ranks: dict[bytes, int]) -> None:
    """Write the files that a loader reads: ``config.json``, ``model.safetensors`` and ``tokenizer.tiktoken``."""
    save_file(weights, output / "model.safetensors")
    (output / "config.json").write_text(json.dumps(CONFIG.to_dict(), indent=2) + "\n")
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (output / "tokenizer.tiktoken").write_text("".join(lines))


def write_card(model: GPTModel, encoding: tiktoken.Encoding, minutes: float) -> str:
    """Measure the model on unseen stories and return its model card."""
    encode = encoding.encode_ordinary
    parameters = sum(weight.numel() for weight in model.parameters())
    loss = held_out_loss(model, encode, HELD_OUT_SEED, N_HELD_OUT)
    recall = recall_accuracy(model, encode, HELD_OUT_SEED, N_HELD_OUT)
    return f"""# The demo model

A GPT with {parameters:,} parameters that tells little stories: an ordinary model of the ordinary class, small enough
to live in the package.

- **Made by** `python -m gptedge_models.train_demo -o DIR`, with fixed seeds, in {minutes:.0f} minutes on {THREADS} CPU
  threads.
- **Data**: {N_STORIES:,} stories of the grammar in `gptedge_models/stories.txt` (seed {TRAIN_SEED}) and no other text.
- **Tokenizer**: {CONFIG.vocab_size - 1:,} byte pair ranks learned from {N_BPE_STORIES:,} of the stories; GPT-2's split
  pattern; `{END_OF_TEXT}` is the last id.
- **Training**: one pass, {BATCH_SIZE} stories a step; Muon (learning rate {MATRIX_LR}) for the matrices of the blocks,
  AdamW ({OTHER_LR}) for the rest; what a story recalls weighs {RECALL_WEIGHT:.0f} times in the loss; the head is tied.
- **Weights**: stored as float16, used as float32. The figures below are those of the stored weights.

| on {N_HELD_OUT:,} unseen stories (seed {HELD_OUT_SEED}) | |
|---|---|
| loss, nats per token | {loss:.3f} |
| recall: names, objects, colours, places ... that the story so far determines | {recall:.2%} |

The greedy story after the prompt `{PROMPT}`:

> {tell(model, encoding, PROMPT)}

It knows a dozen plots and some 700 words. Prompts that begin like one of its stories and name the hero work best ("One
morning, Mia"); others lead it astray. Told greedily, it often gives two people or two things of a story the same name.
"""


@click.command()
@click.option("-o", "output", metavar="DIR", required=True, type=click.Path(file_okay=False, path_type=Path))
def main(output: Path) -> None:
    """Write the demo model into DIR."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(f"{output} cannot be made: {error.strerror}; choose another folder") from None
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()
    ranks = train_bpe(stories(TRAIN_SEED, N_BPE_STORIES), CONFIG.vocab_size - 1)
    encoding = make_encoding(ranks)
    model = train(CONFIG, encoding, N_STORIES)
    minutes = (time.monotonic() - started) / 60
    save(output, round_to_half(model), ranks)
    (output / "README.md").write_text(write_card(model, encoding, minutes))


if __name__ == "__main__":
    main()
