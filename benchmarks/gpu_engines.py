"""What benchmarks/gpu.py compares: each engine reads prompts and continues them, one id for each row and step."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from gptedge_export.graphs import Stack, heads
from gptedge_models import GPTConfig, GPTModel
from gptedge_runtime.bundle import open_bundle
from gptedge_runtime.cuda import CudaSession
from gptedge_runtime.limits import never
from torch import Tensor

Rows = list[list[int]]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def random_rows(config: GPTConfig, batch: int, length: int) -> Rows:
    draw = random.Random(1)
    return [draw.choices(range(config.vocab_size), k=length) for _ in range(batch)]


class Engine(Protocol):
    """A tool at one precision on one device; ``capacity`` is the tokens of a row that it has to hold in the end."""

    def prefill(self, rows: Rows, capacity: int) -> list[int]:
        """Read new prompts of one length and return the most likely next id of each."""

    def step(self) -> list[int]:
        """Append the last ids and return the next ones; they are on the host then, where a program looks at them."""


class GptEdge:
    """The bundle's graph for CUDA."""

    def __init__(self, work: Path, model: GPTModel, precision: str, device: str) -> None:
        bundle = open_bundle(work / f"bundle-{precision}")
        self.session = CudaSession(bundle, threads=2, device=device)

    def prefill(self, rows: Rows, capacity: int) -> list[int]:
        if hasattr(self, "cache"):
            self.cache.close()
        self.rows = list(range(len(rows)))
        self.cache = self.session.new_cache(len(rows), capacity)
        self.cache.prefill(rows, never)
        return self._read()

    def step(self) -> list[int]:
        self.cache.decode(self.next_ids, never)
        return self._read()

    def _read(self) -> list[int]:
        self.next_ids = self.cache.best_ids(self.rows)
        return self.next_ids


class GptEdgeUncaptured(GptEdge):
    """The same with no step captured: onnxruntime starts each kernel."""

    def __init__(self, work: Path, model: GPTModel, precision: str, device: str) -> None:
        super().__init__(work, model, precision, device)
        self.session.max_kept_bytes = 0


class TorchModel(Stack):
    """The same blocks around PyTorch's attention, on a cache that grows or that stays in its buffers."""

    def read(self, ids: Tensor, positions: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        x = self.hidden(ids, positions, attend).view(*ids.shape, -1)[:, -1]  # (B, D)
        return self.out_head(self.final_norm(x)).argmax(-1)  # (B,)

    def split(self, qkv: Tensor, batch: int) -> list[Tensor]:
        return [heads(x, self.config, batch) for x in qkv.chunk(3, dim=-1)]


class TorchEager:
    """PyTorch without compilation; keys and values are joined to those before."""

    def __init__(self, work: Path, model: GPTModel, precision: str, device: str) -> None:
        self.device = device
        self.model = TorchModel(copy.deepcopy(model)).to(device, DTYPES[precision]).eval()

    def prefill(self, rows: Rows, capacity: int) -> list[int]:
        self.past: list[tuple[Tensor, Tensor] | None] = [None] * self.model.config.n_layers
        self.length = 0
        return self._read(torch.tensor(rows, device=self.device))

    def step(self) -> list[int]:
        return self._read(self.next_ids[:, None])

    @torch.inference_mode()
    def _read(self, ids: Tensor) -> list[int]:
        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, k, v = self.model.split(qkv, len(ids))
            if (past := self.past[layer]) is not None:
                k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
            self.past[layer] = k, v
            context = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
            return context.transpose(1, 2).flatten(2).flatten(0, 1)

        positions = torch.arange(self.length, self.length + ids.shape[1], device=self.device)
        self.next_ids = self.model.read(ids, positions, attend)
        self.length += ids.shape[1]
        return self.next_ids.tolist()


class TorchCompiled:
    """PyTorch with ``torch.compile(mode="reduce-overhead")``, which replays CUDA graphs, on a cache in its buffers."""

    def __init__(self, work: Path, model: GPTModel, precision: str, device: str) -> None:
        self.device, self.dtype = device, DTYPES[precision]
        self.model = TorchModel(copy.deepcopy(model)).to(device, self.dtype).eval()
        torch._dynamo.reset()  # what was compiled for another batch does not count against this one
        self.compiled = torch.compile(self._next, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def prefill(self, rows: Rows, capacity: int) -> list[int]:
        config = self.model.config
        shape = (config.n_layers, 2, len(rows), config.n_heads, capacity, config.head_dim)
        if not hasattr(self, "cache") or self.cache.shape != shape:
            self.cache = torch.zeros(shape, device=self.device, dtype=self.dtype)
            torch._dynamo.mark_static_address(self.cache)  # a CUDA graph may write into it
        self.place = torch.zeros(1, dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            ids = torch.tensor(rows, device=self.device)
            self.next_ids = self._next(ids, torch.arange(len(rows[0]), device=self.device), self.cache)
        self.place.fill_(len(rows[0]))
        return self.next_ids.tolist()

    @torch.inference_mode()
    def step(self) -> list[int]:
        self.next_ids = self.compiled(self.next_ids[:, None], self.place, self.cache).clone()
        self.place += 1
        return self.next_ids.tolist()

    def _next(self, ids: Tensor, positions: Tensor, cache: Tensor) -> Tensor:
        allowed = torch.arange(cache.shape[4], device=self.device) <= positions[:, None]  # (S, capacity)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, k, v = self.model.split(qkv, len(ids))
            cache[layer, 0].index_copy_(2, positions, k)
            cache[layer, 1].index_copy_(2, positions, v)
            context = F.scaled_dot_product_attention(q, cache[layer, 0], cache[layer, 1], attn_mask=allowed)
            return context.transpose(1, 2).flatten(2).flatten(0, 1)

        return self.model.read(ids, positions, attend)


class Transformers:
    """Hugging Face's GPT-2 with its default cache."""

    def __init__(self, work: Path, model: GPTModel, precision: str, device: str) -> None:
        from transformers import GPT2LMHeadModel

        self.device = device
        self.model = GPT2LMHeadModel.from_pretrained(work / "hf").to(device, DTYPES[precision]).eval()

    def prefill(self, rows: Rows, capacity: int) -> list[int]:
        self.past = None
        return self._read(torch.tensor(rows, device=self.device))

    def step(self) -> list[int]:
        return self._read(self.next_ids[:, None])

    @torch.inference_mode()
    def _read(self, ids: Tensor) -> list[int]:
        out = self.model(ids, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past, self.next_ids = out.past_key_values, out.logits[:, -1].argmax(-1)
        return self.next_ids.tolist()


class GenAi:
    """onnxruntime-genai over the same bundle's model.onnx, which computes in float32 at every precision."""

    def __init__(self, work: Path, model: GPTModel, precision: str, device: str) -> None:
        import onnxruntime_genai

        self.lib = onnxruntime_genai
        config = onnxruntime_genai.Config(str(work / f"bundle-{precision}"))
        if device == "cuda":
            config.clear_providers()
            config.append_provider("cuda")
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"log_severity_level": 3}}}}))
        self.model = onnxruntime_genai.Model(config)

    def prefill(self, rows: Rows, capacity: int) -> list[int]:
        params = self.lib.GeneratorParams(self.model)
        params.set_search_options(max_length=capacity, batch_size=len(rows), do_sample=False)
        self.generator = self.lib.Generator(self.model, params)
        self.generator.append_tokens(np.array(rows, np.int32))
        return self.step()

    def step(self) -> list[int]:
        self.generator.generate_next_token()
        return [int(token_id) for token_id in self.generator.get_next_tokens()]


ENGINES: dict[str, Callable[[Path, GPTModel, str, str], Engine]] = {
    "gptedge": GptEdge,
    "gptedge, uncaptured": GptEdgeUncaptured,
    "torch eager": TorchEager,
    "torch compiled": TorchCompiled,
    "transformers": Transformers,
    "onnxruntime-genai": GenAi,
}
