"""The commands of docs/checkpoints.md, run as they stand there; a tokenizer of bytes stands in for GPT-2's."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from gptedge_export import load_vocabulary
from gptedge_export.cli import command
from gptedge_export.hugging_face import export_hugging_face
from gptedge_models import GPTConfig, GPTModel
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"`export-onnx ([^`]+ -o bundle)`", (ROOT / "docs" / "checkpoints.md").read_text("utf-8"))
CONFIG = GPTConfig(vocab_size=257, context_length=4, emb_dim=8, n_heads=2, n_layers=1)
NANOGPT = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 4, "bias": False, "vocab_size": 257, "dropout": 0.0}


def fused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state as the book's faster variant has it, compiled."""
    att = "trf_blocks.0.att."
    qkv = torch.cat([state.pop(f"{att}W_{name}.weight") for name in ("query", "key", "value")])
    names = {"scale": "weight", "shift": "bias"}
    state = {re.sub("scale|shift", lambda m: names[m[0]], name): tensor for name, tensor in state.items()}
    state = {name.replace("out_proj", "proj"): tensor for name, tensor in state.items() if not name.endswith("mask")}
    return {f"_orig_mod.{name}": tensor for name, tensor in {**state, f"{att}qkv.weight": qkv}.items()}


def nanogpt() -> dict[str, torch.Tensor]:
    shapes = {"transformer.wte.weight": (257, 8), "transformer.wpe.weight": (4, 8), "transformer.ln_f.weight": (8,)}
    block = {"ln_1": (8,), "attn.c_attn": (24, 8), "attn.c_proj": (8, 8)}
    block |= {"ln_2": (8,), "mlp.c_fc": (32, 8), "mlp.c_proj": (8, 32)}
    shapes |= {f"transformer.h.0.{name}.weight": shape for name, shape in block.items()}
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands name."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(1)
    model = GPTModel(CONFIG).eval()
    (folder / "sizes.json").write_text(json.dumps(CONFIG.to_dict()))
    torch.save(model.state_dict(), folder / "model.pth")
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": {}}, folder / "checkpoint.pth")
    torch.save(fused(dict(model.state_dict())), folder / "fast.pth")
    save_file(model.state_dict(), folder / "model.safetensors")
    export_hugging_face(model, folder / "gpt2-folder", vocabulary=load_vocabulary("bytes"))
    hub = folder / "hub" / "models--openai-community--gpt2"
    shutil.copytree(folder / "gpt2-folder", hub / "snapshots" / ("0" * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0" * 40)
    (folder / "out").mkdir()
    torch.save({"model": nanogpt(), "model_args": NANOGPT, "iter_num": 1}, folder / "out" / "ckpt.pt")
    shutil.copytree(ROOT / "tests" / "golden" / "openai", folder / "models" / "124M")
    return folder


def test_the_document_has_a_row_for_each_source() -> None:
    assert len(COMMANDS) == 10


@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_writes_a_bundle_and_is_quiet(
    sources: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    line: str,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(sources / "hub"))
    monkeypatch.chdir(sources)
    arguments = line.replace("-o bundle", f"-q -o {tmp_path / 'bundle'}").split()
    brings_its_own = arguments[0] in ("demo", "gpt2-folder", "gpt2")
    command.main([*arguments, *([] if brings_its_own else ["--tokenizer", "bytes"])], standalone_mode=False)
    assert (tmp_path / "bundle" / "manifest.json").exists()
    assert capfd.readouterr() == ("", "")
