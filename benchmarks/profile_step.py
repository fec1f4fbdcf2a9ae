"""Where a token's time goes, by operator: profile_step.py BUNDLE [--lengths 64,832] [--threads 2] [--steps 40].

ONNX Runtime's profiler times every operator of decode steps behind that many tokens, and of the prefill of as many.
Printed are medians by kind of operator, those in the body of a ``Scan`` among them, and what they do not explain. The
profiler itself makes a step longer by some tenths of a millisecond: read the shares, and take the speed from ``gptedge
bench``.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import onnxruntime
from gptedge_runtime.bundle import open_bundle
from gptedge_runtime.session import Session

plain_options = onnxruntime.SessionOptions


def events(bundle: str, length: int, steps: int, threads: int) -> list[list[dict[str, Any]]]:
    """Return the profiler's events of a prefill and of ``steps`` decode steps behind it: decode's, then prefill's."""
    with tempfile.TemporaryDirectory() as folder:

        def profiling_options() -> Any:
            options = plain_options()
            options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
            return options

        onnxruntime.SessionOptions = profiling_options
        session = Session(open_bundle(bundle), provider="cpu", threads=threads)
        cache = session.new_cache(1, length + steps)
        cache.prefill([[7] * length], lambda: False)
        for _ in range(steps):
            cache.decode([7], lambda: False)
        graphs = [session, prefill] if (prefill := session.prefill_of(length)) else [session]
        return [json.loads(Path(graph._session.end_profiling()).read_text("utf-8")) for graph in graphs]


def runs(found: list[dict[str, Any]]) -> list[tuple[float, dict[str, float]]]:
    """Return for each run its milliseconds, and those of each kind of operator."""
    ends = sorted((e["ts"], e["ts"] + e["dur"]) for e in found if e["name"] == "model_run")
    sums: list[dict[str, float]] = [defaultdict(float) for _ in ends]
    for event in found:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["args"]["op_name"] != "Scan":
            place = next(i for i, (start, end) in enumerate(ends) if start <= event["ts"] <= end)
            sums[place][event["args"]["op_name"]] += event["dur"] / 1e3
    return [((end - start) / 1e3, ms) for (start, end), ms in zip(ends, sums, strict=True)]


def rows(what: str, some: list[tuple[float, dict[str, float]]]) -> list[str]:
    """Lines of a table: kind of operator, milliseconds, share."""
    total = statistics.median(ms for ms, _ in some)
    kinds = {kind: statistics.median(ms.get(kind, 0.0) for _, ms in some) for kind in some[0][1]}
    between = max(0.0, total - sum(kinds.values()))
    large = {kind: ms for kind, ms in sorted(kinds.items(), key=lambda kind: -kind[1]) if ms > total / 100}
    large |= {"other operators": sum(kinds.values()) - sum(large.values()), "between operators": between}
    return [f"| {what} | {kind} | {ms:.3f} | {ms / total:.1%} |" for kind, ms in large.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--lengths", default="64,832")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    print("| step | operator | ms | share |\n|---|---|---:|---:|")
    for length in map(int, options.lengths.split(",")):
        found, *prompt = events(options.bundle, length, options.steps, options.threads)
        _, *done = runs(found)  # the first is load's own
        chunks, steps = done[: -options.steps] + [run for part in prompt for run in runs(part)], done[-options.steps :]
        prefill = (
            sum(ms for ms, _ in chunks),
            {kind: sum(ms.get(kind, 0.0) for _, ms in chunks) for _, kinds in chunks for kind in kinds},
        )
        print("\n".join(rows(f"prefill of {length}", [prefill]) + rows(f"decode after {length}", steps)))


if __name__ == "__main__":
    main()
