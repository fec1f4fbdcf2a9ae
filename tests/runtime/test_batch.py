"""``gptedge batch``: what each row gives alone, in order, and the same bytes however often the run was killed."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gptedge_runtime import GPT, InputError, load
from gptedge_runtime.batch import Job, Summary, answer_here, run_batch
from gptedge_runtime.batch_files import Source, Target
from gptedge_runtime.batch_rows import Answer, Defaults

from .test_cli import COMMAND, gptedge, refused

Row = dict[str, Any]
WORDS = ["hell", "hello", "he", "ll", "😀", "grüß", "a", "bc", "def,", "ghi.", "\n"]


def make_rows(count: int, *, longest: int = 12, new_tokens: int = 12) -> list[Row]:
    rng = random.Random(count)
    rows: list[Row] = []
    for number in range(count):
        row: Row = {"id": f"row {number}", "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))}
        row |= {"max_new_tokens": rng.randint(0, new_tokens)} if rng.random() < 0.5 else {}
        row |= {"stop": rng.choice(["a", "e", "\n"])} if rng.random() < 0.3 else {}
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def alone(gpt: GPT, row: Row, on_overflow: str = "slide") -> Row:
    """What ``gptedge generate`` gives for the row."""
    asked = {"max_new_tokens": 9} | {name: row[name] for name in ("max_new_tokens", "stop") if name in row}
    stream = gpt.stream(row["prompt"], on_overflow=on_overflow, **asked)
    text = "".join(stream)
    return {"id": row["id"], "text": text, "token_ids": stream.token_ids, "finish_reason": stream.finish_reason}


@pytest.fixture
def batch(bundles: Path) -> Callable[..., Summary]:
    def run(source: Path, target: Path, *, batch_size: int = 4, bundle: str = "tiny", **defaults: Any) -> Summary:
        job = Job(str(bundles / bundle), Defaults(**{"max_new_tokens": 9} | defaults), batch_size=batch_size)
        return run_batch(job, str(source), str(target))

    return run


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_each_row_is_what_it_gives_alone_in_the_order_of_the_input(
    tiny: GPT, batch: Callable[..., Summary], tmp_path: Path, batch_size: int
) -> None:
    rows = make_rows(70, longest=20, new_tokens=40)  # up to and far past the context of 32
    summary = batch(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", batch_size=batch_size)
    assert read_rows(tmp_path / "out.jsonl") == [alone(tiny, row) for row in rows]
    assert (summary.rows, summary.errors) == (70, 0)


def test_a_run_has_the_answers_of_one_bundle(bundles: Path, tmp_path: Path) -> None:
    """A worker that takes the place of a dead one opens what stands there by then."""
    bundle, target = shutil.copytree(bundles / "tiny", tmp_path / "bundle"), tmp_path / "out.jsonl"
    source = write_rows(tmp_path / "in.jsonl", make_rows(10, longest=20, new_tokens=9))

    def late(job: Job, source: Source, first: int) -> Iterator[Answer]:
        shutil.rmtree(bundle)
        shutil.copytree(bundles / "odd", bundle)
        return answer_here(job, source, first)

    with pytest.raises(InputError, match="was replaced since this run began: give another OUT"):
        run_batch(Job(str(bundle), Defaults(9)), str(source), str(target), engine=late)
    assert target.read_bytes() == b""


@pytest.mark.parametrize("name", ["demo", "odd"])
def test_rows_of_other_models_are_what_they_give_alone(
    bundles: Path, batch: Callable[..., Summary], tmp_path: Path, name: str
) -> None:
    rows = make_rows(100, new_tokens=60)
    batch(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", bundle=name, batch_size=32)
    with load(bundles / name) as gpt:
        assert read_rows(tmp_path / "out.jsonl") == [alone(gpt, row) for row in rows]


def test_where_the_context_is_full_a_row_stops_by_itself(
    tiny: GPT, batch: Callable[..., Summary], tmp_path: Path
) -> None:
    rows = [{"id": n, "prompt": "x" * n, "max_new_tokens": 20} for n in range(1, 33)]
    batch(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", on_overflow="stop")
    assert read_rows(tmp_path / "out.jsonl") == [alone(tiny, row, "stop") for row in rows]


@pytest.mark.parametrize(
    ("line", "answer_id", "said"),
    [
        (b"", None, "line 2: not JSON"),
        (b'{"id": 1, "prompt"', None, "line 2: not JSON"),
        (b'{"id": 1, "prompt": "\xff"}', None, "line 2: not JSON in UTF-8"),
        (b'{"id": "\\ud800", "prompt": "x"}', None, "line 2: not JSON in UTF-8"),
        (b"[" * 100_000, None, "line 2: not JSON"),
        (b'["id"]', None, "line 2: the row is a list"),
        (b'{"id": 1, "prompt": "' + b"x" * (3 << 20) + b'"}', None, "line 2: the row has more than 1,048,576 bytes"),
        (b'{"prompt": "x"}', None, "line 2: id is missing"),
        (b'{"id": 1.5, "prompt": "x"}', None, "line 2: id is 1.5"),
        (b'{"id": true, "prompt": "x"}', None, "line 2: id is true"),
        (b'{"id": 1}', 1, "prompt is missing"),
        (b'{"id": "a", "prompt": 5}', "a", "prompt is 5"),
        (b'{"id": 1, "prompt": ""}', 1, "no tokens"),
        (b'{"id": 1, "prompt": "x", "tokens": 3}', 1, "field 'tokens' is unknown"),
        (b'{"id": 1, "prompt": "x", "max_new_tokens": -1}', 1, "max_new_tokens is -1"),
        (b'{"id": 1, "prompt": "x", "max_new_tokens": "9"}', 1, "max_new_tokens is '9'"),
        (b'{"id": 1, "prompt": "x", "max_new_tokens": true}', 1, "max_new_tokens is True"),
        (b'{"id": 1, "prompt": "x", "stop": ""}', 1, "stop is ''"),
        (b'{"id": 1, "prompt": "x", "stop": 5}', 1, "stop is 5"),
        (b'{"id": 1, "prompt": "x", "max_new_tokens": 32}', 1, "exceed the context of 32"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_bad_row_is_answered_with_its_error_and_the_others_as_ever(
    tiny: GPT, batch: Callable[..., Summary], tmp_path: Path, line: bytes, answer_id: object, said: str
) -> None:
    good: Row = {"id": "good", "prompt": "hello"}
    data = json.dumps(good).encode()
    (tmp_path / "in.jsonl").write_bytes(data + b"\n" + line + b"\n" + data)  # the last line without its newline
    summary = batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", on_overflow="error")
    first, second, third = read_rows(tmp_path / "out.jsonl")
    assert first == third == alone(tiny, good)
    assert second["id"] == answer_id
    assert said in second["error"]
    assert second.keys() == {"id", "error"}
    assert (summary.rows, summary.errors) == (3, 1)


def test_nulls_are_as_good_as_fields_that_are_not_there(
    tiny: GPT, batch: Callable[..., Summary], tmp_path: Path
) -> None:
    row: Row = {"id": 7, "prompt": "hello", "max_new_tokens": None, "stop": None}
    batch(write_rows(tmp_path / "in.jsonl", [row]), tmp_path / "out.jsonl")
    assert read_rows(tmp_path / "out.jsonl") == [alone(tiny, {"id": 7, "prompt": "hello"})]


def test_wherever_the_file_was_cut_off_the_next_run_ends_in_the_same_bytes(
    batch: Callable[..., Summary], tmp_path: Path
) -> None:
    source, target = write_rows(tmp_path / "in.jsonl", make_rows(80)), tmp_path / "out.jsonl"  # windows of 32
    batch(source, target)
    whole = target.read_bytes()
    for size in random.Random(1).sample(range(len(whole)), 30):
        target.write_bytes(whole[:size])
        summary = batch(source, target)
        assert target.read_bytes() == whole
        assert summary.rows == 80 - whole[:size].count(b"\n")


def test_a_run_that_is_complete_adds_nothing_and_appended_rows_are_all_that_is_added(
    batch: Callable[..., Summary], tmp_path: Path
) -> None:
    rows = make_rows(40)
    source, target = write_rows(tmp_path / "in.jsonl", rows[:33]), tmp_path / "out.jsonl"
    assert (batch(source, target).rows, batch(source, target).rows) == (33, 0)
    write_rows(source, rows)
    summary = batch(source, target)
    assert (summary.rows_before, summary.rows) == (33, 7)
    batch(source, tmp_path / "at_once.jsonl")
    assert target.read_bytes() == (tmp_path / "at_once.jsonl").read_bytes()


def test_rows_with_one_id_are_rows_of_their_own(batch: Callable[..., Summary], tmp_path: Path) -> None:
    rows: list[Row] = [{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}]
    batch(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert [row["id"] for row in read_rows(tmp_path / "out.jsonl")] == [1, 1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": make_rows(9)[1:]}, "line 1 of .* belongs to another input"),
        ({"rows": make_rows(9)[:5]}, "line 6 of .* belongs to another input"),
        ({"max_new_tokens": 8}, "begun with max_new_tokens '9', now it is '8'"),
        ({"stop": "x"}, "begun with stop 'None', now it is 'x'"),
        ({"on_overflow": "stop"}, "begun with on_overflow"),
        ({"bundle": "odd"}, "begun with bundle_sha256"),
    ],
    ids=["other rows", "fewer rows", "other count", "other stop", "other overflow", "other bundle"],
)
def test_answers_of_another_job_are_left_as_they_are(
    batch: Callable[..., Summary], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    source, target = write_rows(tmp_path / "in.jsonl", make_rows(9)), tmp_path / "out.jsonl"
    batch(source, target)
    before = target.read_bytes()
    write_rows(source, change.pop("rows", make_rows(9)))
    with pytest.raises(InputError, match=said):
        batch(source, target, **change)
    assert target.read_bytes() == before


def test_a_file_of_other_origin_is_left_as_it_is(batch: Callable[..., Summary], tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", make_rows(3))
    before = source.read_bytes()
    with pytest.raises(InputError, match=r"holds something, and no .*\.job\.json says what"):
        batch(source, source)
    assert source.read_bytes() == before


def test_the_second_of_two_runs_on_one_file_is_refused(bundles: Path, tmp_path: Path) -> None:
    source, target = write_rows(tmp_path / "in.jsonl", make_rows(3)), tmp_path / "out.jsonl"
    with Target(target, {}):
        assert "another run writes" in refused(gptedge("batch", bundles / "tiny", source, target))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on a file's size")
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(bundles: Path, tmp_path: Path) -> None:
    source, target = write_rows(tmp_path / "in.jsonl", make_rows(300)), tmp_path / "out.jsonl"
    command = ["batch", bundles / "tiny", source, target, "-n", 9, "--batch-size", 4]
    limited = subprocess.run(
        ["prlimit", "--fsize=9000", *COMMAND, *map(str, command)], capture_output=True, check=False
    )
    assert "cannot write" in refused(limited)
    assert target.stat().st_size == 9000
    assert gptedge(*command).returncode == 0
    assert len(read_rows(target)) == 300


def test_the_summary_is_on_stderr_and_stdout_is_empty(bundles: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", make_rows(3))
    done = gptedge("batch", bundles / "tiny", source, tmp_path / "out.jsonl")
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"out.jsonl: 3 rows, 0 of them errors; " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{in}", "{out}", "--batch-size", "0"], "batch size is 0"),
        (["{in}", "{out}", "-n", "-1"], "max_new_tokens is -1"),
        (["{in}", "{out}", "--stop", ""], "stop is ''"),
        (["{in}", "{out}", "--threads", "0"], "threads is 0"),
        (["/nowhere/in.jsonl", "{out}"], "no file /nowhere/in.jsonl"),
        (["{in}", "/nowhere/out.jsonl"], "cannot write /nowhere/out.jsonl"),
        (["{in}", "/dev/full"], "/dev/full is no plain file"),
        (["{in}", "/"], "/ is no plain file"),
        (["{in}", "{fifo}"], "fifo is no plain file"),
        (["{in}"], "OUT"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(bundles: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    source = write_rows(tmp_path / "in.jsonl", make_rows(3))
    os.mkfifo(tmp_path / "fifo")
    names = {"{in}": str(source), "{out}": str(tmp_path / "out.jsonl"), "{fifo}": str(tmp_path / "fifo")}
    given = [names.get(argument, argument) for argument in arguments]
    assert said in refused(gptedge("batch", bundles / "tiny", *given))
    assert not (tmp_path / "out.jsonl").exists() or not (tmp_path / "out.jsonl").read_bytes()


def test_parquet_holds_what_json_lines_hold(batch: Callable[..., Summary], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    rows = [*make_rows(50), {"id": "bad", "prompt": ""}]
    batch(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    names = ("id", "prompt", "max_new_tokens", "stop")
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=7)
    summary = batch(tmp_path / "in.parquet", tmp_path / "out.parquet")
    found = [
        {name: value for name, value in row.items() if value is not None}
        for row in parquet.read_table(tmp_path / "out.parquet").to_pylist()
    ]
    assert found == read_rows(tmp_path / "out.jsonl")
    assert (summary.rows, summary.errors) == (51, 1)


def test_whole_numbers_stay_whole_numbers_in_parquet(batch: Callable[..., Summary], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    batch(write_rows(tmp_path / "in.jsonl", [{"id": 3, "prompt": "a"}]), tmp_path / "out.parquet")
    assert str(parquet.read_schema(tmp_path / "out.parquet").field("id").type) == "int64"


def test_what_is_no_parquet_file_is_refused(batch: Callable[..., Summary], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow.parquet")
    write_rows(tmp_path / "in.parquet", make_rows(3))
    with pytest.raises(InputError, match=r"in\.parquet is not a Parquet file"):
        batch(tmp_path / "in.parquet", tmp_path / "out.jsonl")


def test_parquet_without_pyarrow_names_the_remedy(bundles: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from gptedge_runtime.cli import main\n"
        "sys.argv[0] = 'gptedge'; main()"
    )
    source = write_rows(tmp_path / "in.jsonl", make_rows(3))
    command = [sys.executable, "-c", code, "batch", bundles / "tiny", source, tmp_path / "out.parquet"]
    line = refused(subprocess.run(list(map(str, command)), capture_output=True, check=False))
    assert 'pip install "gptedge[parquet]"' in line


def test_ten_thousand_rows_killed_three_times_are_byte_for_byte_those_of_an_undisturbed_run(
    bundles: Path, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "in.jsonl", make_rows(10_000))
    quiet, killed = tmp_path / "quiet.jsonl", tmp_path / "killed.jsonl"
    command = ["batch", str(bundles / "tiny"), str(source)]
    assert gptedge(*command, quiet, "-n", 9).returncode == 0
    rng = random.Random(os.urandom(8))
    for size in sorted(rng.sample(range(1, quiet.stat().st_size), 3)):
        with subprocess.Popen([*COMMAND, *command, str(killed), "-n", "9"], stderr=subprocess.PIPE) as running:
            while running.poll() is None and (not killed.exists() or killed.stat().st_size < size):
                time.sleep(0.001)
            time.sleep(rng.random() / 20)
            running.kill()
    done = gptedge(*command, killed, "-n", 9)
    assert done.returncode == 0, done.stderr
    assert killed.read_bytes() == quiet.read_bytes()


@pytest.mark.parametrize("beside", ["job.json", "rows.jsonl", "tmp"])
def test_an_input_that_the_run_would_write_over_is_refused(
    batch: Callable[..., Summary], tmp_path: Path, beside: str
) -> None:
    source = write_rows(tmp_path / f"out.parquet.{beside}", make_rows(3))
    before = source.read_bytes()
    with pytest.raises(InputError, match="give another OUT"):
        batch(source, tmp_path / "out.parquet")
    assert source.read_bytes() == before


@pytest.mark.parametrize("content", ['{"my": "file"}', "mine", "[]", "[" * 10**5])
def test_a_job_file_of_other_origin_is_left_as_it_is(
    batch: Callable[..., Summary], tmp_path: Path, content: str
) -> None:
    job = tmp_path / "out.jsonl.job.json"
    job.write_text(content)
    with pytest.raises(InputError, match="no job of this command"):
        batch(write_rows(tmp_path / "in.jsonl", make_rows(3)), tmp_path / "out.jsonl")
    assert job.read_text() == content


@pytest.mark.parametrize("length", [0, 1, 40])
def test_a_job_file_that_was_cut_off_is_written_anew(
    batch: Callable[..., Summary], tmp_path: Path, length: int
) -> None:
    source, target = write_rows(tmp_path / "in.jsonl", make_rows(3)), tmp_path / "out.jsonl"
    batch(source, target)
    job = tmp_path / "out.jsonl.job.json"
    whole = job.read_bytes()
    job.write_bytes(whole[:length])
    target.unlink()
    batch(source, target)
    assert job.read_bytes() == whole


@pytest.mark.parametrize("row", [b"nonsense", b"", b"[]", b'{"x": 1}', b"[" * 10**5])
def test_an_answer_that_was_changed_is_named(batch: Callable[..., Summary], tmp_path: Path, row: bytes) -> None:
    source, target = write_rows(tmp_path / "in.jsonl", make_rows(5)), tmp_path / "out.jsonl"
    batch(source, target)
    lines = target.read_bytes().splitlines()
    target.write_bytes(b"\n".join([*lines[:2], row, *lines[3:]]) + b"\n")
    with pytest.raises(InputError, match=r"line 3 of .*out\.jsonl is no answer"):
        batch(source, target)


def test_a_parquet_file_with_a_row_that_cannot_be_read_is_named(batch: Callable[..., Summary], tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    prompts = pa.array([b"a\xff"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"id": [1], "prompt": prompts}), tmp_path / "in.parquet")
    with pytest.raises(InputError, match=r"cannot read a row of .*in\.parquet \(UnicodeDecodeError\)"):
        batch(tmp_path / "in.parquet", tmp_path / "out.jsonl")
