"""``gptedge bench``: what it prints, never how long something takes."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from gptedge_runtime import InputError
from gptedge_runtime.bench import Bench, bench, check_plot
from gptedge_runtime.bundle import open_bundle

QUICK = ["--repeats", 2, "-n", 3]
WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None
sys.argv = ["gptedge", "bench", *sys.argv[1:]]
from gptedge_runtime.cli import main
main()
"""


def gptedge_bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gptedge_runtime", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def done(bundles: Path) -> Bench:
    return bench(bundles / "tiny", lengths=[4, 16], batches=[1, 2], new_tokens=3, repeats=3, threads=1)


def test_a_row_for_each_batch_and_length(done: Bench) -> None:
    assert [(row.batch, row.context_tokens) for row in done.rows] == [(1, 4), (1, 16), (2, 4), (2, 16)]


def test_the_median_lies_between_the_least_and_the_most(done: Bench) -> None:
    for row in done.rows:
        assert 0 < row.prefill_tokens_per_s_min <= row.prefill_tokens_per_s <= row.prefill_tokens_per_s_max
        assert 0 < row.decode_tokens_per_s_min <= row.decode_tokens_per_s <= row.decode_tokens_per_s_max


def test_a_step_reads_the_matrices_and_the_cache(bundles: Path, done: Bench) -> None:
    """Counted otherwise: the weights file of an untied fp32 bundle holds the matrices and the two tables.

    Biases and norms of so small a model lie in the graphs.
    """
    bundle = open_bundle(bundles / "tiny")
    model, width = bundle.model, bundle.model.emb_dim
    tables = (model.vocab_size + model.context_length) * width
    weights = bundle.files["onnx/model.onnx_data"].size // 4 - tables
    cached = 2 * model.n_layers * width * (4 + 2)  # floats: 4 tokens, and 1, 2 and 3 in the three steps
    assert done.rows[0].mb_per_step == pytest.approx((weights + cached) * 4 / 1e6)


def test_the_bandwidth_share_is_bytes_by_time(done: Bench) -> None:
    row = done.rows[-1]
    steps_per_s = row.decode_tokens_per_s / row.batch
    assert row.bandwidth_share == pytest.approx(row.mb_per_step * steps_per_s / 1e3 / done.read_gb_per_s)


def test_json_has_these_keys(bundles: Path) -> None:
    run = gptedge_bench(bundles / "tiny", "--lengths", 5, *QUICK, "-o", "json")
    answer: dict[str, Any] = json.loads(run.stdout)
    assert [*answer] == [
        "bundle", "precision", "provider", "threads", "repeats", "new_tokens", "load_s", "peak_rss_mb",
        "read_gb_per_s", "rows",
    ]  # fmt: skip
    assert [*answer["rows"][0]] == [
        "context_tokens", "batch", "prefill_tokens_per_s", "prefill_tokens_per_s_min", "prefill_tokens_per_s_max",
        "decode_tokens_per_s", "decode_tokens_per_s_min", "decode_tokens_per_s_max", "mb_per_step", "bandwidth_share",
    ]  # fmt: skip
    assert (answer["provider"], answer["precision"], answer["repeats"], answer["new_tokens"]) == ("cpu", "fp32", 2, 3)


def test_csv_is_a_line_for_each_row(bundles: Path) -> None:
    run = gptedge_bench(bundles / "tiny", "--lengths", "5,6", "--batch", "1,2", *QUICK, "-o", "csv")
    rows = list(csv.DictReader(io.StringIO(run.stdout)))
    found = [(row["batch"], row["context_tokens"], row["bundle"]) for row in rows]
    where = str(bundles / "tiny")
    assert found == [("1", "5", where), ("1", "6", where), ("2", "5", where), ("2", "6", where)]
    assert all(float(row["decode_tokens_per_s"]) > 0 for row in rows)


def test_the_default_is_a_markdown_table(bundles: Path) -> None:
    run = gptedge_bench(bundles / "tiny", "--lengths", "5,6", *QUICK)
    head, rule, *rows = [line for line in run.stdout.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in (head, rule, *rows)} == {7}
    assert [row.split("|")[1].strip() for row in rows] == ["5", "6"]
    assert (run.returncode, run.stderr) == (0, "")


def test_lengths_beyond_the_context_are_cut_with_a_note(bundles: Path) -> None:
    run = gptedge_bench(bundles / "tiny", "--lengths", "8,64,832", *QUICK, "-o", "csv")
    rows = csv.DictReader(io.StringIO(run.stdout))
    assert [row["context_tokens"] for row in rows] == ["8", "29"]  # a context of 32 holds 29 and 3 new ones
    assert run.stderr == "note: lengths above 29 are cut to 29: the context holds 32 tokens, 3 of them new\n"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--lengths", "5,x"], "'5,x'"),
        (["--lengths", "0"], "length is 0"),
        (["--batch", "-1"], "batch is -1"),
        (["--repeats", "0"], "repeats is 0"),
        (["--new-tokens", "0"], "new_tokens is 0"),
        (["--threads", "0"], "threads is 0"),
        (["--output-format", "xml"], "'xml'"),
        (["--plot", "speed.pdf"], "speed.pdf"),
        (["--plot", "no-such-folder/speed.svg"], "no-such-folder"),
    ],
)
def test_a_bad_option_is_one_line(bundles: Path, options: list[str], named: str) -> None:
    run = gptedge_bench(bundles / "tiny", *options)
    assert (run.returncode, run.stdout) == (2, "")
    assert named in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_a_missing_bundle_is_one_line(tmp_path: Path) -> None:
    run = gptedge_bench(tmp_path / "nothing")
    assert (run.returncode, run.stdout, len(run.stderr.splitlines())) == (2, "", 1)


def test_a_plot_without_matplotlib_names_the_pip_command(bundles: Path, tmp_path: Path) -> None:
    arguments = [str(bundles / "tiny"), "--plot", str(tmp_path / "speed.svg")]
    run = subprocess.run([sys.executable, "-c", WITHOUT_MATPLOTLIB, *arguments], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.splitlines() == [
        'error: a plot needs matplotlib, which is not installed: pip install "gptedge[bench]"'
    ]


def test_the_plot_is_an_svg(bundles: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = gptedge_bench(bundles / "tiny", "--lengths", "5,6", *QUICK, "--plot", tmp_path / "speed.svg")
    assert (run.returncode, run.stderr) == (0, "")
    assert ElementTree.parse(tmp_path / "speed.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_plot_is_a_png(bundles: Path, tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    gptedge_bench(bundles / "tiny", "--lengths", "5,6", *QUICK, "--plot", tmp_path / "speed.png")
    assert np.asarray(pyplot.imread(tmp_path / "speed.png")).ndim == 3


def test_a_name_that_would_be_a_formula_is_drawn_as_it_is(bundles: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shutil.copytree(bundles / "tiny", tmp_path / "b$^$x")
    run = gptedge_bench(tmp_path / "b$^$x", "--lengths", "5", *QUICK, "--plot", tmp_path / "speed.svg")
    assert (run.returncode, run.stderr) == (0, "")


def test_a_plot_that_cannot_be_written_is_refused_before_the_measurement(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "speed.svg").mkdir()
    with pytest.raises(InputError, match=r"cannot plot into .*speed\.svg"):
        check_plot(tmp_path / "speed.svg")
    check_plot(tmp_path / "other.svg")
    assert not (tmp_path / "other.svg").exists()
