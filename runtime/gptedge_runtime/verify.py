"""Prove that a bundle still computes what the model computed that it was exported from."""

import os
from dataclasses import dataclass

import numpy as np

from .bundle import Bundle, open_bundle
from .errors import BundleError, VerificationError
from .gpt import GPT
from .session import Session, choose_provider, count_threads, open_graph
from .strict_json import JsonObject, parse_json
from .tokenizer import load_tokenizer


@dataclass(frozen=True)
class Verified:
    """How much of a bundle was checked."""

    files: int
    graphs: int
    prompts: int


def verify(path: str | os.PathLike[str], *, threads: int | None = None) -> Verified:
    """Check files, graphs and known answers.

    Raises ``BundleError`` for a damaged bundle and ``VerificationError`` where an answer is not the stored one.
    """
    bundle = open_bundle(path)
    n_threads = count_threads(threads)
    for graph in bundle.graphs.values():
        open_graph(bundle, graph, n_threads)
    session = Session(bundle, provider=choose_provider("cpu"), threads=n_threads)
    with GPT(load_tokenizer(bundle), session) as gpt:
        return Verified(len(bundle.files), len(bundle.graphs), _check_answers(bundle, gpt))


def _check_answers(bundle: Bundle, gpt: GPT) -> int:
    answers = parse_json(bundle.read(bundle.known_answers), bundle.known_answers)
    prompts, atol = answers.children("prompts"), answers.number("atol")
    if not prompts:
        raise BundleError(f"{bundle.known_answers} holds no prompts: export the bundle again")
    for number, prompt in enumerate(prompts):
        _check_answer(gpt, prompt, atol, f"known answer {number}")
    return len(prompts)


def _check_answer(gpt: GPT, prompt: JsonObject, atol: float, name: str) -> None:
    ids, new_ids, logit_ids = (prompt.array(key) for key in ("token_ids", "new_token_ids", "logit_ids"))
    try:
        wanted = np.array(prompt.array("logits"), np.float64)
        difference = np.abs(gpt.logits(ids)[0, -1, logit_ids] - wanted).max()
    except (ValueError, TypeError, IndexError) as error:
        raise BundleError(f"{name} is not a prompt with its logits ({error}): export the bundle again") from error
    if not difference <= atol:
        raise VerificationError(f"{name}: logits differ by {difference:.3g}, above {atol:.3g}: export the bundle again")
    if gpt.generate_ids(ids, max_new_tokens=len(new_ids)) != new_ids:
        raise VerificationError(f"{name}: the new token ids are not the stored ones: export the bundle again")
