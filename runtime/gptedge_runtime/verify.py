"""Prove that every graph of a bundle still computes what the model computed that it was exported from."""

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import cuda, prefill
from .bundle import Bundle, open_bundle
from .cache import Logits
from .errors import BundleError, VerificationError
from .gpt import GPT
from .graphs import Graph, forward_logits, generated_ids, model_logits
from .limits import TimeLimit, check_timeout, count_threads
from .provider import why_not_cuda
from .session import Session
from .strict_json import JsonObject, parse_json
from .tokenizer import load_tokenizer


@dataclass(frozen=True)
class Verified:
    """How much of a bundle was checked; ``skipped`` are the graphs that this machine cannot run."""

    files: int
    graphs: int
    prompts: int
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """A prompt, the ids that follow it, and some of the logits of its last position.

    ``rounded_logits`` are those of kernels that round their inputs to 8 bits; without such they are the same.
    """

    name: str
    token_ids: list[int]
    new_token_ids: list[int]
    logit_ids: NDArray[np.int64]
    logits: NDArray[np.float64]
    rounded_logits: NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """Known answers, and by how much logits may differ from them."""

    prompts: list[Answer]
    atol: float
    rounded_atol: float


def verify(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    timeout_s: float | None = None,
    progress: bool = False,
) -> Verified:
    """Check files and graphs, and the known answers with each graph. The arguments are those of ``load``.

    Kernels that round their inputs hide small changes of the weights: so each graph of an int8 or int4 bundle computes
    without them and is held against narrow bounds, and ``decode`` with them once more, against a wide one, as is what
    it gives behind ``prefill``. ``timeout_s`` is for each of these runs. A bf16 bundle's graph for CUDA needs a GPU,
    and is skipped where there is none.
    Raises ``BundleError`` for a damaged bundle and ``VerificationError`` where an answer is not the stored one.
    """
    check_timeout(timeout_s)
    bundle = open_bundle(path, progress=progress)
    answers = _read_answers(bundle)
    n_threads = count_threads(threads)
    session = Session(bundle, provider="cpu", threads=n_threads, timeout_s=timeout_s, exact=True)
    _check_decode(session, bundle, answers.prompts, answers.atol)
    device = "cuda" if bundle.precision == "bf16" else "cpu"  # which has no kernels for bfloat16
    has_graph = cuda.GRAPH in bundle.graphs
    skipped = (cuda.GRAPH,) if has_graph and device == "cuda" and why_not_cuda() else ()
    if has_graph and not skipped:
        session = cuda.CudaSession(bundle, threads=n_threads, timeout_s=timeout_s, device=device)
        if bundle.precision in cuda.HALF_ERROR:  # activations of 16 bits may turn a choice: only logits are held
            prompts = [replace(answer, new_token_ids=[]) for answer in answers.prompts]
            _check_decode(session, bundle, prompts, answers.atol * cuda.HALF_ERROR[bundle.precision])
        else:
            _check_decode(session, bundle, answers.prompts, answers.atol)
    for name in sorted(bundle.graphs.keys() - {"decode", cuda.GRAPH, prefill.GRAPH}):
        graph = Graph(bundle, name, n_threads, timeout_s)
        for answer in answers.prompts:
            _check(graph, bundle, answer, answers.atol)
    if not bundle.rounds_finely:
        session = Session(bundle, provider="cpu", threads=n_threads, timeout_s=timeout_s)
        for answer in answers.prompts:
            logits = session.forward(np.array([answer.token_ids]))[0, -1]
            _hold(answer.name, "decode", logits[answer.logit_ids], answer.rounded_logits, answers.rounded_atol)
        if prefill.GRAPH in bundle.graphs:
            _check_prefill(session, bundle, answers, n_threads)
    return Verified(len(bundle.files), len(bundle.graphs) - len(skipped), len(answers.prompts), skipped)


def _check_decode(session: Session, bundle: Bundle, answers: list[Answer], atol: float) -> None:
    with GPT(load_tokenizer(bundle), session) as gpt:
        for answer in answers:
            _compare(answer, gpt.logits(_ids_in_context(bundle, answer))[0], atol, session.graph)
            if gpt.generate_ids(answer.token_ids, max_new_tokens=len(answer.new_token_ids)) != answer.new_token_ids:
                raise _other_ids(answer, session.graph)


def _check_prefill(session: Session, bundle: Bundle, answers: Answers, n_threads: int) -> None:
    """Let it read all but the last token of each prompt, at least two, and ``decode`` that one."""
    should_stop = TimeLimit(session.timeout_s)
    graph = prefill.Prefill(bundle, n_threads)
    for answer in answers.prompts:
        *before, last = answer.token_ids
        if len(before) > 1:
            cache = session.new_cache(1, len(answer.token_ids))
            graph.read(before, cache.key_values, should_stop)
            cache.shorten(len(before))
            cache.decode([last], should_stop)
            logits = cache.logits[0, answer.logit_ids]
            _hold(answer.name, prefill.GRAPH, logits, answer.rounded_logits, answers.rounded_atol)


def _check(graph: Graph, bundle: Bundle, answer: Answer, atol: float) -> None:
    if graph.name != "generate":
        _compare(answer, _run(graph, _ids_in_context(bundle, answer), len(answer.token_ids)), atol, graph.name)
    elif generated_ids(graph, answer.token_ids, len(answer.new_token_ids)) != answer.new_token_ids:
        raise _other_ids(answer, graph.name)


def _run(graph: Graph, ids: list[int], n_prompt: int) -> Logits:
    """Return logits float32 (T, V) of these ids, the ones after the prompt in a second run where the graph has two."""
    return forward_logits(graph, ids) if graph.name == "forward" else model_logits(graph, ids, n_prompt)


def _ids_in_context(bundle: Bundle, answer: Answer) -> list[int]:
    """The prompt and those of the new ids but the last that fit the context: each one's logits choose the next."""
    return (answer.token_ids + answer.new_token_ids[:-1])[: bundle.model.context_length]


def _compare(answer: Answer, logits: Logits, atol: float, graph: str) -> None:
    """Hold logits float32 (T, V) of the prompt and the new ids against the stored ones."""
    logits = logits[len(answer.token_ids) - 1 :]
    _hold(answer.name, graph, logits[0, answer.logit_ids], answer.logits, atol)
    new_ids = answer.new_token_ids[: len(logits)]
    if logits.argmax(axis=1)[: len(new_ids)].tolist() != new_ids:
        raise _other_ids(answer, graph)


def _hold(name: str, graph: str, logits: Logits, stored: NDArray[np.float64], atol: float) -> None:
    difference = np.abs(logits - stored).max()
    if not difference <= atol:
        raise VerificationError(
            f"{name}: in the graph {graph} logits differ by {difference:.3g}, above {atol:.3g}: export the bundle again"
        )


def _other_ids(answer: Answer, graph: str) -> VerificationError:
    return VerificationError(
        f"{answer.name}: in the graph {graph} the new token ids are not the stored ones: export the bundle again"
    )


def _read_answers(bundle: Bundle) -> Answers:
    document = parse_json(bundle.read(bundle.known_answers), bundle.known_answers)
    prompts, atol = document.children("prompts"), document.number("atol")
    if not prompts:
        raise BundleError(f"{bundle.known_answers} holds no prompts: export the bundle again")
    rounded_atol = atol if bundle.rounds_finely else document.number("rounded_atol")
    answers = [_read_answer(bundle, prompt, f"known answer {i}") for i, prompt in enumerate(prompts)]
    return Answers(answers, atol, rounded_atol)


def _read_answer(bundle: Bundle, prompt: JsonObject, name: str) -> Answer:
    ids, new_ids, logit_ids, logits = (prompt.array(k) for k in ("token_ids", "new_token_ids", "logit_ids", "logits"))
    rounded = logits if bundle.rounds_finely else prompt.array("rounded_logits")
    whole = all(_is_id(value, bundle) for value in [*ids, *new_ids, *logit_ids])
    numbers = all(isinstance(value, float) for value in [*logits, *rounded])
    whole = whole and all(logit_id < bundle.model.n_outputs for logit_id in logit_ids)
    fits = 1 <= len(ids) <= bundle.model.context_length and 1 <= len(logit_ids) == len(logits) == len(rounded)
    if not (whole and numbers and fits):
        raise BundleError(f"{name} is not a prompt with its logits: export the bundle again")
    stored = np.array([logits, rounded], np.float64)
    return Answer(name, ids, new_ids, np.array(logit_ids, np.int64), stored[0], stored[1])


def _is_id(value: Any, bundle: Bundle) -> bool:
    return type(value) is int and 0 <= value < bundle.model.vocab_size
