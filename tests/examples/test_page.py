"""The page of `gptedge web` in a real Chromium: clicks and keys, what it shows, what it refuses, what it asks for."""

import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from gptedge_runtime import GPT, load
from gptedge_runtime.bundle import open_bundle
from gptedge_runtime.web import site, write_site
from playwright.sync_api import Browser, Page, expect

from .conftest import PAGE_TIMEOUT_MS, Task, serving, write_in_page

COMMAND = Path(sys.executable).parent / "gptedge"
PROMPT = "I ❤️ 😀 👩‍🚀"


@pytest.fixture(scope="module")
def gpt(task: Task) -> Iterator[GPT]:
    with load(task.bundle) as gpt:
        yield gpt


@pytest.fixture(scope="module")
def url(task: Task, ort_dist: Path) -> Iterator[str]:
    """Of the command, as a user starts it."""
    command: list[str | Path] = [COMMAND, "web", task.bundle, "--port", "0", "--ort", ort_dist]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as running:
        assert running.stdout is not None
        yield running.stdout.readline().split()[0]
        running.terminate()


@pytest.fixture
def opened(page: Page, url: str) -> Page:
    page.goto(url)
    expect(page.locator("#status")).to_have_text("Ready.", timeout=PAGE_TIMEOUT_MS)
    return page


def test_a_click_writes_the_text_that_the_runtime_writes(opened: Page, gpt: GPT) -> None:
    write_in_page(opened, PROMPT, 40)
    assert opened.text_content("#text") == PROMPT + gpt.generate(PROMPT, max_new_tokens=40)
    expect(opened.locator("#status")).to_have_text(
        re.compile(r"^40 tokens · \d+ tokens/s · first after \d+ ms · done$")
    )


def test_the_chart_shows_the_share_of_each_chosen_token(opened: Page, gpt: GPT) -> None:
    ids = write_in_page(opened, PROMPT, 5)
    prompt = gpt.tokenizer.encode(PROMPT)
    logits = gpt.logits(prompt + ids)[0, len(prompt) - 1 : -1].astype(np.float64)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    expected = (shares / shares.sum(1, keepdims=True))[np.arange(5), ids]
    shown = opened.eval_on_selector_all(
        "#tokens li", "rows => rows.map(row => Number(row.style.getPropertyValue('--share')))"
    )
    np.testing.assert_allclose(shown, expected, rtol=1e-3)  # float32 logits of two programs


def test_control_enter_starts_and_escape_stops(opened: Page, gpt: GPT) -> None:
    opened.fill("#prompt", "Hello")
    opened.fill("#count", "5000")
    opened.press("#prompt", "Control+Enter")
    opened.wait_for_selector("#tokens li >> nth=3", state="attached")
    opened.keyboard.press("Escape")
    expect(opened.locator("#status")).to_have_text(re.compile("stopped"), timeout=PAGE_TIMEOUT_MS)
    made = opened.locator("#tokens li").count()
    assert 4 <= made < 5000
    assert opened.text_content("#continuation") == gpt.generate("Hello", max_new_tokens=made)


def test_it_writes_again_after_a_stop_and_past_the_context(opened: Page, gpt: GPT) -> None:
    opened.press("#prompt", "Control+Enter")
    opened.keyboard.press("Escape")
    expect(opened.locator("#status")).to_have_text(re.compile("stopped|done"), timeout=PAGE_TIMEOUT_MS)
    count = gpt.config.context_length + 8
    assert write_in_page(opened, "Hello", count) == gpt.generate_ids(
        gpt.tokenizer.encode("Hello"), max_new_tokens=count
    )


def test_an_empty_text_is_a_message_and_not_an_end(opened: Page) -> None:
    opened.fill("#prompt", "")
    opened.click("#write")
    expect(opened.locator("#status")).to_have_text("the text is empty: write a few words first.")
    assert len(write_in_page(opened, "Hello", 3)) == 3


def test_all_requests_go_to_the_server_and_threads_are_allowed(page: Page, url: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    write_in_page(page, "Hello", 3)
    assert {address.partition(":")[0] for address in asked} <= {"http", "data", "blob"}
    assert all(address.startswith(url) for address in asked if address.startswith("http"))
    assert page.evaluate("crossOriginIsolated") is True


def test_light_and_dark_are_the_readers_choice(opened: Page, tmp_path: Path) -> None:
    write_in_page(opened, PROMPT, 20)
    brightness = {}
    for scheme in ("light", "dark"):
        opened.emulate_media(color_scheme=scheme)
        opened.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
        colours = opened.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        brightness[scheme] = [sum(map(int, re.findall(r"\d+", colour))) for colour in colours]
    assert brightness["light"][0] < 200 < 600 < brightness["light"][1]
    assert brightness["dark"][1] < 200 < 600 < brightness["dark"][0]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--js-flags=--jitless", "This browser has no WebAssembly"),
        ("--js-flags=--no-enable-sse4-1", "WebAssembly has no SIMD"),  # as on a processor without it
    ],
)
def test_a_browser_that_lacks_webassembly_is_told_so(
    launch: Callable[..., Browser], url: str, flag: str, said: str
) -> None:
    with launch(flag) as browser, browser.new_page() as page:
        page.goto(url)
        expect(page.locator("#status")).to_contain_text(said)
        assert page.is_disabled("#write")


def test_a_written_folder_works_on_any_web_server(
    page: Page, task: Task, gpt: GPT, ort_dist: Path, tmp_path: Path
) -> None:
    """Under a path of its own, and without the headers that threads need."""
    write_site(site(open_bundle(task.bundle), ort_dist), str(tmp_path / "somewhere/page"))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        page.goto(f"http://127.0.0.1:{server.server_port}/somewhere/page/")
        assert write_in_page(page, "Hello", 10) == gpt.generate_ids(gpt.tokenizer.encode("Hello"), max_new_tokens=10)
        expect(page.locator("#model")).to_contain_text("one thread")
        server.shutdown()


@pytest.mark.parametrize("name", ["onnx/model.onnx_data", "onnx/model.onnx", "tokenizer.tiktoken"])
@pytest.mark.parametrize("keeps_its_size", [True, False])
def test_a_damaged_file_is_a_message(
    page: Page, task: Task, ort_dist: Path, tmp_path: Path, name: str, keeps_its_size: bool
) -> None:
    """As it is, too, where the bundle is replaced while the page is loaded."""
    data = bytearray((task.bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "damaged").write_bytes(data if keeps_its_size else data[:-1])
    files = site(open_bundle(task.bundle), ort_dist)
    with serving(files | {f"bundle/{name}": tmp_path / "damaged"}) as url:
        page.goto(url)
        said = "the file that was exported" if keeps_its_size else f"{len(data)} bytes long"
        expect(page.locator("#status")).to_contain_text(f"{name} is not {said}", timeout=PAGE_TIMEOUT_MS)
        assert page.is_disabled("#write")
