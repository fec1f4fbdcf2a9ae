"""Prompt lookup decoding: the plain loop's ids in fewer steps."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gptedge_runtime import GPT, InputError, Sampling, load, speculate
from gptedge_runtime.cache import Cache, Step
from gptedge_runtime.generate import count_steps, generate
from gptedge_runtime.speculate import SHORT, Lookup, is_close
from hypothesis import given, settings
from hypothesis import strategies as st

from ..signing import sign

Models = dict[str, GPT]
N_RANDOM = 4
NAMES = ["tiny", "odd", "demo", "close", "int8", "int4", "long-int8"]

short = st.lists(st.integers(0, 256), min_size=1, max_size=12)
repetitive = st.builds(lambda head, period, times: head + period * times, short, short, st.integers(1, 8))
prompts = st.one_of(repetitive, st.lists(st.integers(0, 256), min_size=1, max_size=40))


@pytest.fixture(scope="module")
def models(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    """The bundles, and ``tiny`` with other random weights: not all of them fall into a loop."""
    folder = tmp_path_factory.mktemp("random")
    paths = {name: bundles / name for name in NAMES}
    paths |= {f"random {seed}": write_random(bundles / "tiny", folder / str(seed), seed) for seed in range(N_RANDOM)}
    models = {name: load(path) for name, path in paths.items()}
    yield models
    for gpt in models.values():
        gpt.close()


def write_random(tiny: Path, path: Path, seed: int) -> Path:
    shutil.copytree(tiny, path)
    weights = path / "onnx/model.onnx_data"
    values = np.random.default_rng(seed).standard_normal(weights.stat().st_size // 4).astype(np.float32)
    weights.write_bytes((values * 0.3).tobytes())
    return sign(path)


def run(gpt: GPT, prompt: list[int], n_steps: int, *, speculate: bool, sampling: Sampling | None = None) -> list[int]:
    steps = generate(
        gpt._session, [prompt], [n_steps], sampling=sampling, should_stop=lambda: False, speculate=speculate
    )
    return [step[0] for step in steps]


@pytest.fixture
def count_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many decode steps have run so far."""
    runs: list[int] = []
    original = Step.run

    def spy(step: Step, *arguments: Any) -> None:
        runs.append(1)
        original(step, *arguments)

    monkeypatch.setattr(Step, "run", spy)
    return lambda: len(runs)


@pytest.mark.parametrize("name", [*NAMES, *(f"random {seed}" for seed in range(N_RANDOM))])
@given(prompt=prompts, count=st.integers(0, 90), on_overflow=st.sampled_from(["slide", "stop", "error"]))
@settings(max_examples=30, deadline=None)
def test_ids_are_those_of_plain_steps(
    models: Models, name: str, prompt: list[int], count: int, on_overflow: str
) -> None:
    gpt = models[name]
    try:
        (n_steps,) = count_steps([len(prompt)], count, gpt.config.context_length, on_overflow)
    except InputError:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculate, "SHORT_FROM_S", 0)  # also models as small as these
        patch.setattr(speculate, "SHORT_FROM_STEPS", 0)
        with_drafts = run(gpt, prompt, n_steps, speculate=True)
    assert with_drafts == run(gpt, prompt, n_steps, speculate=False)


@pytest.mark.parametrize("room", range(4))
def test_drafts_end_where_the_context_does(models: Models, room: int) -> None:
    gpt = models["demo"]
    prompt = (list(b"one two three ") * 200)[: gpt.config.context_length - 30 - room]
    n_steps = 30 + room + 2
    assert run(gpt, prompt, n_steps, speculate=True) == run(gpt, prompt, n_steps, speculate=False)


def test_text_that_repeats_itself_takes_fewer_steps(models: Models, count_runs: Callable[[], int]) -> None:
    prompt, n_steps = list(b"one two three " * 9), 100
    new_ids = run(models["demo"], prompt, n_steps, speculate=True)
    assert len(new_ids) == n_steps
    assert count_runs() < n_steps - 1


def test_steps_are_plain_where_tokens_are_drawn(models: Models, count_runs: Callable[[], int]) -> None:
    run(models["demo"], list(b"a b c d e f g h " * 8), 32, speculate=True, sampling=Sampling(top_k=1))
    assert count_runs() == 31


@pytest.mark.parametrize("invariant", [True, False])
def test_int8_drafts_where_a_step_of_several_tokens_has_the_bits_of_plain_ones(
    models: Models, invariant: bool, count_runs: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafts are right ones, so that each that is read saves a step."""
    prompt = [1, 2, 3, 4]
    monkeypatch.setattr(models["int8"]._session, "step_difference", lambda n_tokens: 0.0 if invariant else None)
    ids = prompt + run(models["int8"], prompt, 32, speculate=False)
    plain_runs = count_runs()
    monkeypatch.setattr(Lookup, "draft", lambda lookup, count: ids[len(lookup._row) :][:count])
    assert run(models["int8"], prompt, 16, speculate=True) == ids[4:20]
    assert (count_runs() - plain_runs < 15) == invariant


@pytest.mark.parametrize(("name", "is_drafted"), [("int8", True), ("int4", False), ("tiny", False)])
def test_short_drafts_are_made_at_int8(
    models: Models, name: str, is_drafted: bool, count_runs: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculate, "SHORT_FROM_S", 0)
    monkeypatch.setattr(speculate, "SHORT_FROM_STEPS", 0)
    monkeypatch.setattr(models[name]._session, "step_difference", lambda n_tokens: 0.0)
    ids = [1, 2, 3, 4, *run(models[name], [1, 2, 3, 4], 24, speculate=False)]
    plain_runs = count_runs()
    right = lambda lookup, count: ids[len(lookup._row) :][:count] if lookup._ngram == SHORT.ngram else []  # noqa: E731
    monkeypatch.setattr(Lookup, "draft", right)
    assert run(models[name], [1, 2, 3, 4], 21, speculate=True) == ids[4:25]
    assert count_runs() - plain_runs == (11 if is_drafted else 20)  # a plain one, then two tokens a step


def test_short_drafts_are_tried_out_once_a_session_has_made_steps_enough(
    bundles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculate, "SHORT_FROM_S", 0)
    monkeypatch.setattr(speculate, "SHORT_FROM_STEPS", 40)
    monkeypatch.setattr(Lookup, "draft", lambda lookup, count: [0] if count == 1 else [])
    tried: list[int] = []
    with load(bundles / "int8") as gpt:

        def try_out(n_tokens: int) -> None:
            tried.append(gpt._session.n_steps)

        monkeypatch.setattr(gpt._session, "step_difference", try_out)
        for _ in range(3):
            run(gpt, [1, 2, 3, 4], 21, speculate=True)
    assert tried[0] >= 40


def test_steps_grow_while_all_drafts_stay(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [1, 2, 3, 4, *run(models["demo"], [1, 2, 3, 4], 80, speculate=False)]
    sizes: list[int] = []
    original = Cache.decode

    def spy(cache: Cache, next_ids: Any, should_stop: Any, drafts: Any = ()) -> None:
        sizes.append(1 + len(drafts))
        original(cache, next_ids, should_stop, drafts)

    monkeypatch.setattr(Cache, "decode", spy)
    monkeypatch.setattr(Lookup, "draft", lambda lookup, count: ids[len(lookup._row) :][:count])
    assert run(models["demo"], [1, 2, 3, 4], 50, speculate=True) == ids[4:54]
    assert sizes[:5] == [1, 4, 8, 16, 16]


def test_wrong_drafts_come_again_when_plain_steps_have_earned_them(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step with a draft costs two plain ones here: one is lost, which takes 128 to earn."""
    monkeypatch.setattr(speculate, "SHORT_FROM_S", 0)
    monkeypatch.setattr(speculate, "SHORT_FROM_STEPS", 0)
    monkeypatch.setattr(Cache, "cost", lambda cache, n_tokens: 2.0)
    monkeypatch.setattr(models["long-int8"]._session, "step_difference", lambda n_tokens: 0.0)
    plain = run(models["long-int8"], [1, 2], 140, speculate=False)
    drafted: list[int] = []

    def wrong(lookup: Lookup, count: int) -> list[int]:
        drafted.append(len(lookup._row))
        return [(plain[len(lookup._row) - 2] + 1) % 256] * count

    monkeypatch.setattr(Lookup, "draft", lambda lookup, count: [] if count > 1 else wrong(lookup, count))
    assert run(models["long-int8"], [1, 2], 140, speculate=True) == plain
    assert drafted == [4, 133]


def test_a_choice_that_rounding_decides_is_read_again(
    models: Models, count_runs: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafts are right ones, and save nothing."""
    prompt, n_steps = [1, 2, 3, 4], 24
    ids = prompt + run(models["close"], prompt, n_steps, speculate=False)
    plain_runs = count_runs()
    monkeypatch.setattr(Lookup, "draft", lambda lookup, count: ids[len(lookup._row) :][:count])
    assert run(models["close"], prompt, n_steps, speculate=True) == ids[len(prompt) :]
    assert count_runs() - plain_runs > plain_runs


@pytest.mark.parametrize("is_doubtful", [True, False])
def test_at_int4_a_plain_step_makes_each_choice_that_last_bits_may_turn(
    models: Models, is_doubtful: bool, count_runs: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafts are right ones; what a step with drafts says is wrong where it must not be heard."""
    session, prompt, n_steps = models["int4"]._session, [1, 2, 3, 4], 24
    ids = prompt + run(models["int4"], prompt, n_steps, speculate=False)
    plain_runs, original = count_runs(), Step.run

    def run_wrong(step: Step, *arguments: Any) -> None:
        original(step, *arguments)
        if is_doubtful and step.logits.shape[1] > 1:
            step.logits *= -1

    monkeypatch.setattr(session, "step_difference", lambda n_tokens: 0.1)
    monkeypatch.setattr(speculate, "is_close", lambda logits, parity: is_doubtful)
    monkeypatch.setattr(Step, "run", run_wrong)
    monkeypatch.setattr(Lookup, "draft", lambda lookup, count: ids[len(lookup._row) :][:count])
    assert run(models["int4"], prompt, n_steps, speculate=True) == ids[len(prompt) :]
    assert (count_runs() - plain_runs < plain_runs) != is_doubtful


def test_the_first_step_of_a_size_counts_at_most_as_plain_steps_for_its_tokens(models: Models) -> None:
    cache = models["demo"]._session.new_cache(1, 64)
    cache.prefill([[1, 2, 3]], lambda: False)
    cache.decode([4], lambda: False)
    cache.decode([5], lambda: False, [6] * 7)
    assert cache.cost(8) <= 8


@pytest.mark.parametrize("count", range(20, 40))
def test_a_stop_between_tokens_of_one_step_is_heard(models: Models, count: int) -> None:
    prompt = list(b"a b c d e f g h " * 8)
    new_ids: list[int] = []
    for step in generate(
        models["demo"]._session, [prompt], [64], sampling=None, should_stop=lambda: len(new_ids) >= count
    ):
        new_ids.append(step[0])
    assert new_ids == run(models["demo"], prompt, count, speculate=False)


@given(text=repetitive, n_before=st.integers(0, 12), size=st.sampled_from([3, 12]), count=st.integers(1, 20))
def test_drafts_are_what_followed_the_last_ngram(text: list[int], n_before: int, size: int, count: int) -> None:
    row = text[:n_before]
    lookup = Lookup(row, size)
    if n_before < len(text):
        lookup.draft(1)
    row += text[n_before:]
    ngram = row[-size:]
    places = [place for place in range(size, len(row)) if row[place - size : place] == ngram]
    drafts = lookup.draft(count)
    if len(row) > size and places:
        period = len(row) - places[-1]
        assert drafts == [row[places[-1] + i % period] for i in range(count)]
    else:
        assert drafts == []


@pytest.mark.parametrize(
    ("logits", "parity", "close"),
    [
        ([1.0, 0.9, -5.0], 1, False),
        ([1.0, 1.0, -5.0], 0.1, True),
        ([0.0, 10.0, 10.0 - 3.9e-4], 1, True),
        ([0.0, 10.0, 10.0 - 4.1e-4], 1, False),
        ([0.0, 10.0, 10.0 - 0.9e-4], 0.25, True),
        ([0.0, 10.0, 10.0 - 1.1e-4], 0.25, False),
        ([-10.0, 1.0, 1.0 - 3.9e-4], 1, True),
        ([0.0, 1e-6, 2e-6], 1, True),
    ],
)
def test_logits_are_close_within_twice_a_share_of_the_bound_of_parity(
    logits: list[float], parity: float, close: bool
) -> None:
    assert is_close(np.array(logits, np.float32), parity) is close


@pytest.mark.parametrize(("seen", "parity"), [(0.0, 0.1), (0.02, 0.1), (0.05, 0.2), (0.9, 1.0)])
def test_four_times_what_the_export_saw_is_that_share(bundle: Path, seen: float, parity: float) -> None:
    report = bundle / "export_report.json"
    document = json.loads(report.read_text("utf-8"))
    document["worst"]["max_abs_diff"] = seen * document["worst"]["bound"]
    report.write_text(json.dumps(document), "utf-8")
    with load(sign(bundle)) as gpt:
        assert gpt._session.parity == pytest.approx(parity)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_where_activations_are_rounded_it_is_the_whole_bound(models: Models, name: str) -> None:
    """The report's bound is another one there; ``verify`` computes with float32 inputs."""
    assert models[name]._session.parity == 1.0


def test_without_a_report_it_is_the_whole_bound(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != "export_report.json"]
    (bundle / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    (bundle / "export_report.json").unlink()
    with load(bundle) as gpt:
        assert gpt._session.parity == 1.0
