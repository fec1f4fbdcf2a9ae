"""The installed command ``gptedge``, in a process of its own."""

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gptedge_runtime import GPT, Sampling, load

Edit = Callable[[Callable[[dict[str, Any]], object]], Path]

INSTALLED = Path(sys.executable).parent / "gptedge"
COMMAND = [str(INSTALLED)] if INSTALLED.exists() else [sys.executable, "-m", "gptedge_runtime"]


def gptedge(*arguments: object, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, env=os.environ | environment, check=False)


def refused(done: subprocess.CompletedProcess[bytes], exit_code: int = 2) -> str:
    """Hold the error contract: exit code, nothing on stdout, one line of at most 300 characters on stderr."""
    assert done.returncode == exit_code
    assert done.stdout == b""
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("error: ")
    assert len(line) <= 300
    return line


def test_generate_prints_the_continuation_and_one_newline(bundles: Path, tiny: GPT) -> None:
    done = gptedge("generate", bundles / "tiny", "hello", "-n", 40)
    assert done.stdout.decode() == tiny.generate("hello", max_new_tokens=40) + "\n"
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("options", [["--no-stream"], ["--threads", 1], ["--provider", "cpu"], ["--temperature", 0]])
def test_options_that_change_no_token(bundles: Path, tiny: GPT, options: list[object]) -> None:
    done = gptedge("generate", bundles / "tiny", "hello", "-n", 40, *options)
    assert done.stdout.decode() == tiny.generate("hello", max_new_tokens=40) + "\n"


def test_json_tells_ids_text_reason_and_times(bundles: Path, tiny: GPT) -> None:
    done = gptedge("generate", bundles / "tiny", "hello", "-n", 6, "--json")
    answer = json.loads(done.stdout)
    stream = tiny.stream("hello", max_new_tokens=6)
    assert answer["text"] == "".join(stream)
    assert answer["token_ids"] == stream.token_ids
    assert answer["prompt_token_ids"] == tiny.tokenizer.encode("hello")
    assert (answer["finish_reason"], answer["provider"]) == ("length", "cpu")
    assert {"prefill_ms", "decode_ms", "tokens_per_s"} == set(answer) - {
        "text", "token_ids", "prompt_token_ids", "finish_reason", "provider",
    }  # fmt: skip


def test_sampling_options_reach_the_model(bundles: Path) -> None:
    options = [
        "generate",
        bundles / "tiny",
        "hello",
        "-n",
        20,
        "--json",
        "--temperature",
        2,
        "--top-k",
        50,
        "--top-p",
        0.9,
    ]
    first, again, other = (json.loads(gptedge(*options, "--seed", seed).stdout)["token_ids"] for seed in (1, 1, 2))
    assert first == again != other


def test_stop_cuts_the_text(bundles: Path, tiny: GPT) -> None:
    whole = tiny.generate("hello", max_new_tokens=40)
    stop = next(letter for letter in whole[3:] if letter.isalnum())
    done = gptedge("generate", bundles / "tiny", "hello", "-n", 40, "--stop", stop)
    assert done.stdout.decode() == whole.partition(stop)[0] + "\n"


def test_terminal_sequences_in_the_text_go_through_a_pipe(bundle: Path, edit: Edit) -> None:
    ranks = bundle / "tokenizer.tiktoken"
    red = base64.b64encode(b"\x1b[31m")
    ranks.write_bytes(b"".join(red + b" 256\n" if i == 256 else line for i, line in enumerate(ranks.open("rb"))))
    edit(lambda manifest: manifest["tokenizer"].update(eos_token_id=None))
    done = gptedge("generate", bundle, "hi", "-n", 2000, "--temperature", 100, "--seed", 1)
    with load(bundle) as gpt:
        text = gpt.generate("hi", max_new_tokens=2000, sampling=Sampling(temperature=100, seed=1))
    assert "\x1b[31m" in text
    assert done.stdout.decode() == text + "\n"


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("prompt", [[], ["-"]])
def test_a_prompt_comes_from_standard_input_without_its_last_newline(
    bundles: Path, tiny: GPT, prompt: list[str], end: bytes
) -> None:
    done = gptedge("generate", bundles / "tiny", *prompt, "-n", 9, stdin="grüß 😀".encode() + end)
    assert done.stdout.decode() == tiny.generate("grüß 😀", max_new_tokens=9) + "\n"


def test_only_one_newline_is_taken_from_a_prompt(bundles: Path, tmp_path: Path, tiny: GPT) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"hello\n\n")
    done = gptedge("generate", bundles / "tiny", "-f", tmp_path / "prompt.txt", "-n", 9)
    assert done.stdout.decode() == tiny.generate("hello\n", max_new_tokens=9) + "\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate"], "BUNDLE"),
        (["generate", "{tiny}", "a", "b"], "unexpected extra argument"),
        (["generate", "{tiny}", "a", "-n", "-1"], "max_new_tokens is -1"),
        (["generate", "{tiny}", "a", "-n", "x"], "'-n'"),
        (["generate", "{tiny}", "a", "-n", "1" * 5000], "'-n'"),
        (["generate", "{tiny}", "a", "--provider", "cuda"], "provider cuda"),
        (["generate", "{tiny}", "a", "--provider", "gpu"], "'--provider'"),
        (["generate", "{tiny}", "a", "--threads", "0"], "threads is 0"),
        (["generate", "{tiny}", "a", "--on-overflow", "wrap"], "'--on-overflow'"),
        (["generate", "{tiny}", "a", "-n", "99", "--on-overflow", "error"], "exceed the context of 32"),
        (["generate", "{tiny}", "a", "--stop", ""], "stop is ''"),
        (["generate", "{tiny}", "a", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "{tiny}", "a", "--top-k", "0"], "top_k is 0"),
        (["generate", "{tiny}", "a", "--top-p", "2"], "top_p is 2.0"),
        (["generate", "{tiny}", "a", "--seed", "-1"], "seed is -1"),
        (["generate", "{tiny}", "a", "--bogus"], "--bogus"),
        (["generate", "{tiny}", ""], "no tokens"),
        (["generate", "{tiny}", "a", "-f", "x"], "give one of them"),
        (["generate", "{tiny}", "-f", "/nowhere/x"], "cannot read /nowhere/x"),
        (["generate", "{tiny}", "-f", "/"], "cannot read /"),
        (["generate", "/nowhere", "a"], "no bundle at /nowhere"),
        (["info", "/nowhere"], "no bundle at /nowhere"),
        (["verify", "/nowhere"], "no bundle at /nowhere"),
        (["bogus"], "bogus"),
        (["--bogus"], "--bogus"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_with_exit_code_2(bundles: Path, arguments: list[str], said: str) -> None:
    assert said in refused(gptedge(*(argument.replace("{tiny}", str(bundles / "tiny")) for argument in arguments)))


def test_a_prompt_that_is_not_utf_8_is_refused(bundles: Path) -> None:
    assert "not UTF-8 at byte 2" in refused(gptedge("generate", bundles / "tiny", stdin=b"ab\xff"))


def test_an_empty_standard_input_is_refused(bundles: Path) -> None:
    assert "no tokens" in refused(gptedge("generate", bundles / "tiny"))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16"])
def test_text_is_utf_8_whatever_the_locale(bundles: Path, tiny: GPT, encoding: str) -> None:
    done = gptedge("generate", bundles / "tiny", "hello", "-n", 40, PYTHONIOENCODING=encoding)
    assert done.stdout.decode() == tiny.generate("hello", max_new_tokens=40) + "\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_with_130_after_the_text_so_far(bundles: Path) -> None:
    command = [*COMMAND, "generate", str(bundles / "tiny"), "hello", "-n", "10000000"]
    with subprocess.Popen(command, bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        first = running.stdout.read(1)
        running.send_signal(signal.SIGINT)
        rest, err = running.communicate()
    assert running.returncode == 130
    assert err == b"error: interrupted\n"
    assert (first + rest).decode()


@pytest.mark.skipif(os.name == "nt", reason="no pipes of this kind on Windows")
def test_a_reader_that_leaves_is_no_error(bundles: Path) -> None:
    command = [*COMMAND, "generate", str(bundles / "tiny"), "hello", "-n", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.read(1)
        running.stdout.close()
        assert running.stderr is not None
        assert running.stderr.read() == b""
    assert running.returncode == 0


def test_a_full_disk_is_one_line(bundles: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("the system has no /dev/full")
    with Path("/dev/full").open("wb") as full:
        command = [*COMMAND, "generate", str(bundles / "tiny"), "hello", "-n", "5"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert "No space left" in line


def test_verify_says_what_it_checked(bundles: Path) -> None:
    done = gptedge("verify", bundles / "tiny")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"ok: 14 files, 4 graphs, 3 known answers\n"


def test_verify_fails_with_3_where_the_answers_are_others(bundle: Path, edit: Edit) -> None:
    path = bundle / "known_answers.json"
    answers = json.loads(path.read_text("utf-8"))
    answers["prompts"][0]["logits"][0] += 1.0
    path.write_text(json.dumps(answers), "utf-8")
    assert "known answer 0" in refused(gptedge("verify", edit(lambda manifest: None)), exit_code=3)


def test_a_damaged_bundle_is_refused_by_every_command(bundle: Path) -> None:
    (bundle / "onnx/model.onnx_data").write_bytes(b"short")
    for command in (["generate", bundle, "a"], ["info", bundle], ["verify", bundle]):
        assert "onnx/model.onnx_data has 5 bytes" in refused(gptedge(*command))


def test_info_prints_the_sizes(bundles: Path) -> None:
    done = gptedge("info", bundles / "tiny")
    facts = dict(line.split(maxsplit=1) for line in done.stdout.decode().splitlines())
    assert facts["model"] == "2 layers, 4 heads, width 32"
    assert facts["context"] == "32 tokens"
    assert facts["precision"] == "fp32"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["generate", "-h"], ["verify", "-h"], ["info", "-h"]])
def test_help_is_on_stdout(arguments: list[str]) -> None:
    done = gptedge(*arguments)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"Usage: ")


def test_version_is_told() -> None:
    assert gptedge("--version").stdout == b"gptedge, version 0.1.0\n"
