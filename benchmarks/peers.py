"""gptedge and its peers at one model, on this machine: peers.py WORK --output FOLDER [--rounds 5] [--only NAME ...].

The model has the sizes of GPT-2 124M with an output head of its own, and random weights of a fixed seed; WORK keeps it
in each tool's own form (about 6 GB) for the next run. Each measurement is a process of its own, the rounds go A B C A B
C, and the median of the rounds is told with the least and the most. Nothing is installed: ``pip install
"gptedge[export,peers]"`` brings the peers, and one that cannot run is listed with its reason. FOLDER gets peers.md,
peers.svg and peers.json, anew after each round.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from peer_models import (
    CHECKS,
    CONTEXT,
    LOOP,
    REPETITIVE,
    STEPS,
    TEXTBOOK_STEPS,
    random_ids,
    stateful_openvino,
    write_gguf,
    write_model,
)
from peer_report import Results, write_report

MAX_S = 3600  # of one process; an export at int4 takes minutes


class Peer(Protocol):
    """A tool at one precision; making one loads the model, so that imports count as loading."""

    precisions: tuple[str, ...]
    packages: tuple[str, ...]

    def __init__(self, work: Path, precision: str, threads: int) -> None: ...

    @staticmethod
    def write(work: Path, precision: str) -> None:
        """Write the model in the tool's form."""

    def prefill(self, ids: list[int]) -> int:
        """Read a new prompt and return the most likely next id."""

    def decode(self, count: int) -> list[int]:
        """Return ``count`` further ids, each the most likely one."""


class Stepwise:
    """A peer whose decode is one ``step`` after the other."""

    next_id: int

    def decode(self, count: int) -> list[int]:
        return [self.step() for _ in range(count)]

    def step(self) -> int:
        raise NotImplementedError


class Gptedge:
    precisions = ("fp32", "int8", "int4")
    packages = ("onnxruntime",)

    def __init__(self, work: Path, precision: str, threads: int) -> None:
        from gptedge_runtime import load

        self.gpt = load(work / f"bundle-{precision}", threads=threads)

    @staticmethod
    def write(work: Path, precision: str) -> None:
        from gptedge_export.cli import command
        from gptedge_runtime.command import run

        out = str(work / f"bundle-{precision}")
        if code := run(
            command, "export-onnx", [str(work / "hf"), "-o", out, "--precision", precision, "--force", "-q"]
        ):
            sys.exit(code)

    def prefill(self, ids: list[int]) -> int:
        from gptedge_runtime.generate import generate
        from gptedge_runtime.limits import never

        steps = [CONTEXT - len(ids)]
        self.steps = generate(self.gpt._session, [ids], steps, sampling=None, should_stop=never)
        return next(self.steps)[0]

    def decode(self, count: int) -> list[int]:
        return [next(self.steps)[0] for _ in range(count)]


class LlamaCpp(Stepwise):
    """``fa-off`` is its option that is slower at reading prompts and faster behind long texts on some CPUs."""

    precisions = ("f32", "q8_0", "q4_0", "f32 fa-off", "q8_0 fa-off", "q4_0 fa-off")
    packages = ("llama-cpp-python", "gguf")

    def __init__(self, work: Path, precision: str, threads: int) -> None:
        import llama_cpp

        self.lib = llama_cpp
        self.log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.log, ctypes.c_void_p())
        weights, _, option = precision.partition(" ")
        path = str(work / f"{weights}.gguf").encode()
        self.model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = CONTEXT
        params.n_threads = params.n_threads_batch = threads
        if option:
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.greedy = llama_cpp.llama_sampler_init_greedy()

    @staticmethod
    def write(work: Path, precision: str) -> None:
        import llama_cpp

        weights = precision.partition(" ")[0]
        base, target = work / "f32.gguf", work / f"{weights}.gguf"
        if not base.exists():
            write_gguf(work, base)
        if not target.exists():
            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{weights.upper()}")
            assert llama_cpp.llama_model_quantize(str(base).encode(), str(target).encode(), ctypes.byref(params)) == 0

    def read(self, ids: list[int]) -> int:
        array = (self.lib.llama_token * len(ids))(*ids)
        assert self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(ids))) == 0
        self.next_id = self.lib.llama_sampler_sample(self.greedy, self.context, -1)
        return self.next_id

    def prefill(self, ids: list[int]) -> int:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        return self.read(ids)

    def step(self) -> int:
        return self.read([self.next_id])


class OpenVino(Stepwise):
    precisions = ("fp32", "bf16", "int8", "int4")
    packages = ("openvino", "nncf")

    def __init__(self, work: Path, precision: str, threads: int) -> None:
        import openvino

        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if precision == "fp32":  # else it computes in bfloat16 where the processor can
            options["INFERENCE_PRECISION_HINT"] = "f32"
        compiled = openvino.Core().compile_model(work / f"openvino-{precision}.xml", "CPU", options)
        self.request = compiled.create_infer_request()

    @staticmethod
    def write(work: Path, precision: str) -> None:
        import openvino

        model = stateful_openvino(work)
        if precision.startswith("int"):
            import nncf

            mode = {"int8": nncf.CompressWeightsMode.INT8_ASYM, "int4": nncf.CompressWeightsMode.INT4_SYM}[precision]
            model = nncf.compress_weights(model, mode=mode)
        openvino.save_model(model, work / f"openvino-{precision}.xml", compress_to_fp16=False)

    def read(self, ids: list[int]) -> int:
        positions = np.arange(self.length, self.length + len(ids))[None]
        feeds = {"input_ids": np.array([ids]), "position_ids": positions, "beam_idx": np.zeros(1, np.int32)}
        logits = self.request.infer(feeds, share_inputs=True, share_outputs=True)["logits"]
        self.length += len(ids)
        self.next_id = int(logits[0, -1].argmax())
        return self.next_id

    def prefill(self, ids: list[int]) -> int:
        self.request.reset_state()
        self.length = 0
        return self.read(ids)

    def step(self) -> int:
        return self.read([self.next_id])


class CTranslate2(Stepwise):
    precisions = ("float32", "int8")
    packages = ("ctranslate2",)
    steps: Any = None

    def __init__(self, work: Path, precision: str, threads: int) -> None:
        import ctranslate2

        folder = str(work / f"ctranslate2-{precision}")
        self.generator = ctranslate2.Generator(folder, intra_threads=threads, compute_type=precision)
        self.tokens = json.loads((Path(folder) / "vocabulary.json").read_text("utf-8"))

    @staticmethod
    def write(work: Path, precision: str) -> None:
        from ctranslate2.converters import TransformersConverter

        folder = str(work / f"ctranslate2-{precision}")
        TransformersConverter(str(work / "hf")).convert(folder, quantization=precision, force=True)

    def prefill(self, ids: list[int]) -> int:
        if self.steps is not None:
            self.steps.close()
        prompt = [self.tokens[i] for i in ids]
        rest = CONTEXT - len(ids)
        self.steps = self.generator.generate_tokens(prompt, max_length=rest, min_length=rest)
        return self.step()

    def step(self) -> int:
        return int(next(self.steps).token_id)


class GenAi(Stepwise):
    """Reads gptedge's bundles; its own model builder knows no GPT-2."""

    precisions = ("fp32", "int8", "int4")
    packages = ("onnxruntime-genai",)

    def __init__(self, work: Path, precision: str, threads: int) -> None:
        import onnxruntime_genai

        self.lib = onnxruntime_genai
        config = onnxruntime_genai.Config(str(work / f"bundle-{precision}"))
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self.model = onnxruntime_genai.Model(config)

    @staticmethod
    def write(work: Path, precision: str) -> None:
        assert (work / f"bundle-{precision}").exists(), "there is no such bundle"

    def prefill(self, ids: list[int]) -> int:
        params = self.lib.GeneratorParams(self.model)
        params.set_search_options(max_length=CONTEXT, do_sample=False)
        self.generator = self.lib.Generator(self.model, params)
        self.generator.append_tokens(np.array([ids], np.int32))
        return self.step()

    def step(self) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])


class Transformers(Stepwise):
    """Eager PyTorch with a key/value cache."""

    precisions = ("fp32",)
    packages = ("transformers", "torch")

    def __init__(self, work: Path, precision: str, threads: int) -> None:
        import torch
        from transformers import GPT2LMHeadModel

        self.torch = torch
        torch.set_num_threads(threads)
        self.model = GPT2LMHeadModel.from_pretrained(work / "hf").eval()

    @staticmethod
    def write(work: Path, precision: str) -> None:
        assert (work / "hf").exists(), "there is no such folder"

    def read(self, ids: list[int]) -> int:
        with self.torch.inference_mode():
            out = self.model(self.torch.tensor([ids]), past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past, self.next_id = out.past_key_values, int(out.logits[0, -1].argmax())
        return self.next_id

    def prefill(self, ids: list[int]) -> int:
        self.past = None
        return self.read(ids)

    def step(self) -> int:
        return self.read([self.next_id])


class Textbook:
    """The book's model and loop, which reads the whole text again for each token."""

    precisions = ("fp32",)
    packages = ("torch",)

    def __init__(self, work: Path, precision: str, threads: int) -> None:
        import torch
        from gptedge_models import load_checkpoint

        self.torch = torch
        torch.set_num_threads(threads)
        self.model = load_checkpoint(str(work / "hf"))

    @staticmethod
    def write(work: Path, precision: str) -> None:
        assert (work / "hf").exists(), "there is no such folder"

    def prefill(self, ids: list[int]) -> int:
        self.ids = self.torch.tensor([ids])
        return self.decode(1)[0]

    def decode(self, count: int) -> list[int]:
        from gptedge_models import generate_text_simple

        self.ids = generate_text_simple(self.model, self.ids, count, CONTEXT)
        return self.ids[0, -count:].tolist()  # type: ignore[no-any-return]


PEERS: dict[str, type[Peer]] = {
    "gptedge": Gptedge,
    "llama.cpp": LlamaCpp,
    "OpenVINO": OpenVino,
    "CTranslate2": CTranslate2,
    "onnxruntime-genai": GenAi,
    "transformers": Transformers,
    "textbook": Textbook,
}


def measure(name: str, precision: str, work: Path, threads: int, spawned: float) -> dict[str, Any]:
    """Return one round's figures of one peer, which this process has to itself."""
    steps = TEXTBOOK_STEPS if name == "textbook" else STEPS
    started = time.perf_counter()
    peer = PEERS[name](work, precision, threads)
    load_s = time.perf_counter() - started
    ids = [peer.prefill(random_ids(64))]
    first_token_s = time.time() - spawned
    figures = {"load_s": load_s, "first_token_s": first_token_s}
    ids += peer.decode(STEPS)
    figures["prefill_512_tokens_per_s"] = 512 / statistics.median(seconds(peer.prefill, random_ids(512)) for _ in "123")
    prompts = {"decode_64": random_ids(64), "decode_832": random_ids(832), "repetitive": REPETITIVE}
    for what, prompt in prompts.items():
        count = 8 * steps if what == "repetitive" else steps
        peer.prefill(prompt)
        peer.decode(2)  # what is built at a new length is built here
        figures[f"{what}_tokens_per_s"] = count / seconds(peer.decode, count)
    figures["peak_rss_mb"] = peak_rss_mb()
    return {**figures, **check(peer, ids, json.loads((work / "expected.json").read_text()))}


def check(peer: Peer, ids: list[int], expected: dict[str, Any]) -> dict[str, Any]:
    """Hold the peer's answers against the book's loop in PyTorch."""
    agreed = [peer.prefill(prompt) == answer for prompt, answer in zip(CHECKS, expected["next"], strict=True)]
    return {
        "same_ids": ids == expected["ids"],
        "top1_agreement": sum(agreed) / len(agreed),
        "loops": [peer.prefill(REPETITIVE), *peer.decode(31)] == LOOP * 2,
    }


def seconds(function: Any, argument: Any) -> float:
    started = time.perf_counter()
    function(argument)
    return time.perf_counter() - started


def peak_rss_mb() -> float:
    """Of this process alone: getrusage would also count what its parent held when it started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6


def child(*arguments: str) -> dict[str, Any]:
    """Run one verb of this file in a process of its own; where it fails, the answer is its ``reason``."""
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MAX_S)
    except subprocess.TimeoutExpired:
        return {"reason": f"not done after {MAX_S} s"}
    if done.returncode == 0:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"reason": f"exit code {done.returncode}: {last}"[:200]}


def prepare(work: Path, wanted: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Write what is not there yet, each in a process of its own; return the reasons of those that failed."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "expected.json").exists():
        print("writing the model", file=sys.stderr)
        if reason := child("model", str(work)).get("reason"):
            raise SystemExit(f"error: {reason}")
    reasons = {}
    for name, precision in wanted:
        ready = work / f"{name}-{precision}.ready"
        if ready.exists():
            continue
        print(f"writing {name} {precision}", file=sys.stderr)
        if reason := child("write", str(work), name, precision).get("reason"):
            reasons[name, precision] = reason
        else:
            ready.touch()
    return reasons


def run(work: Path, output: Path, rounds: int, threads: int, only: list[str]) -> None:
    """Measure round after round, and write the report anew after each."""
    wanted = [(name, p) for name, peer in PEERS.items() for p in peer.precisions if not only or name in only]
    reasons = prepare(work, wanted)
    results: Results = {f"{n} {p}": [{"reason": r}] for (n, p), r in reasons.items()}
    for turn in range(rounds):
        for name, precision in wanted:
            key = f"{name} {precision}"
            if (name, precision) in reasons:
                continue
            figures = child("measure", str(work), name, precision, str(threads), str(time.time()))
            results.setdefault(key, []).append(figures)
            print(f"round {turn + 1}: {key}: {json.dumps(figures)}", file=sys.stderr)
        packages = sorted({"numpy", *(package for peer in PEERS.values() for package in peer.packages)})
        write_report({f"{n} {p}": results[f"{n} {p}"] for n, p in wanted}, output, threads, packages)


def main() -> None:
    match sys.argv[1:]:  # the verbs of child()
        case ["model", work]:
            write_model(Path(work))
            print("{}")
        case ["write", work, name, precision]:
            PEERS[name].write(Path(work), precision)
            print("{}")
        case ["measure", work, name, precision, threads, spawned]:
            print(json.dumps(measure(name, precision, Path(work), int(threads), float(spawned))))
        case _:
            parser = argparse.ArgumentParser(description=__doc__)
            parser.add_argument("work", type=Path)
            parser.add_argument("--output", type=Path, required=True)
            parser.add_argument("--rounds", type=int, default=5)
            parser.add_argument("--threads", type=int, default=2)
            parser.add_argument("--only", nargs="+", default=[], choices=PEERS)
            options = parser.parse_args()
            run(options.work, options.output, options.rounds, options.threads, options.only)


if __name__ == "__main__":
    main()
