"""The tools that peers.py compares: how each writes the model in its own form, reads a prompt and decodes."""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from peer_models import CONTEXT, stateful_openvino, write_gguf, write_plain


class Peer:
    """A tool at one precision; making one loads the model, so that imports count as loading."""

    precisions: ClassVar[dict[str, int]]
    """The tool's names for them, and the bits of a weight."""
    packages: tuple[str, ...]
    next_id: int

    def __init__(self, work: Path, precision: str, threads: int) -> None: ...

    @staticmethod
    def write(work: Path, precision: str) -> None:
        """Write the model in the tool's form."""
        raise NotImplementedError

    def prefill(self, ids: list[int]) -> int:
        """Read a new prompt and return the most likely next id."""
        raise NotImplementedError

    def decode(self, count: int) -> list[int]:
        """Return ``count`` further ids, each the most likely one."""
        return [self.step() for _ in range(count)]

    def step(self) -> int:
        """Return one further id."""
        raise NotImplementedError

    def rest(self) -> None:
        """End what a decode goes on with in the background; a ``prefill`` follows."""


class Gptedge(Peer):
    precisions: ClassVar = {"fp32": 32, "int8": 8, "int4": 4}
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


class LlamaCpp(Peer):
    """``fa-off`` is its option that is slower at reading prompts and faster behind long texts on some CPUs."""

    precisions: ClassVar = {"f32": 32, "f32 fa-off": 32, "q8_0": 8, "q8_0 fa-off": 8, "q4_0": 4, "q4_0 fa-off": 4}
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


class OpenVino(Peer):
    precisions: ClassVar = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
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


class CTranslate2(Peer):
    precisions: ClassVar = {"float32": 32, "int8": 8}
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
        self.rest()
        prompt = [self.tokens[i] for i in ids]
        rest = CONTEXT - len(ids)
        self.steps = self.generator.generate_tokens(prompt, max_length=rest, min_length=rest)
        return self.step()

    def step(self) -> int:
        return int(next(self.steps).token_id)

    def rest(self) -> None:
        if self.steps is not None:
            self.steps.close()


class GenAi(Peer):
    """Its own builder knows no GPT-2: it reads gptedge's bundles, and ``plain`` exports rounded by ONNX Runtime."""

    precisions: ClassVar = {"fp32": 32, "int8": 8, "int8 plain": 8, "int4": 4, "int4 plain": 4}
    packages = ("onnxruntime-genai",)

    def __init__(self, work: Path, precision: str, threads: int) -> None:
        import onnxruntime_genai

        self.lib = onnxruntime_genai
        bits, _, plain = precision.partition(" ")
        config = onnxruntime_genai.Config(str(work / f"{plain or 'bundle'}-{bits}"))
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self.model = onnxruntime_genai.Model(config)

    @staticmethod
    def write(work: Path, precision: str) -> None:
        bits, _, plain = precision.partition(" ")
        if plain:
            write_plain(work / "bundle-fp32", work / f"plain-{bits}", GenAi.precisions[precision])
        assert (work / f"bundle-{bits}").exists(), "there is no such bundle"

    def prefill(self, ids: list[int]) -> int:
        params = self.lib.GeneratorParams(self.model)
        params.set_search_options(max_length=CONTEXT, do_sample=False)
        self.generator = self.lib.Generator(self.model, params)
        self.generator.append_tokens(np.array([ids], np.int32))
        return self.step()

    def step(self) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])


class Transformers(Peer):
    """Eager PyTorch with a key/value cache."""

    precisions: ClassVar = {"fp32": 32}
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


class Textbook(Peer):
    """The book's model and loop, which reads the whole text again for each token."""

    precisions: ClassVar = {"fp32": 32}
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
