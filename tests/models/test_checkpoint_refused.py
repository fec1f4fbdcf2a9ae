import contextlib
import io
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gptedge_models import CheckpointError, GPTConfig, GPTModel, load_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
Refusal = Callable[..., CheckpointError]


@pytest.fixture
def state(model: GPTModel) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def save(state: State, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization="legacy" not in path.name)
    return path


def thin_state(config: GPTConfig) -> State:
    """Return a state dict of zeros that takes no room in a file, for sizes that count."""
    with torch.device("meta"):
        state = GPTModel(config).state_dict()
    return {n: torch.zeros(()).expand(t.shape) for n, t in state.items() if not n.endswith("mask")}


def spoil(state: State, name: str, fault: str) -> None:
    tensor = state[name]
    if fault == "missing":
        del state[name]
    elif fault == "unexpected":
        state[f"{name}.extra"] = tensor.clone()
    elif fault == "wrong shape":
        state[name] = torch.cat([tensor, tensor[..., -1:]], dim=-1)
    elif fault == "wrong rank":
        state[name] = tensor[None].clone()
    elif fault == "torch.int64":
        state[name] = tensor.to(torch.int64)
    elif fault == "not finite":
        tensor.view(-1)[-1] = torch.inf
    elif fault == "not a number":
        tensor.view(-1)[0] = torch.nan


FAULTS = ["missing", "unexpected", "wrong shape", "wrong rank", "torch.int64", "not finite", "not a number"]
SAME = {"wrong rank": "wrong shape", "not a number": "not finite"}  # in the message
NAMES = list(GPTModel(GPTConfig(emb_dim=8, n_heads=4, n_layers=2, context_length=1, vocab_size=1)).state_dict())
WEIGHTS = [name for name in NAMES if not name.endswith("mask")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(WEIGHTS),
    fault=st.sampled_from(FAULTS),
    config=st.sampled_from(["heads", "full"]),
    file=st.sampled_from(["model.pth", "model.safetensors"]),
)
def test_faulty_tensor_is_named(
    refusal: Refusal, tiny: GPTConfig, tmp_path: Path, name: str, fault: str, config: str, file: str
) -> None:
    state = load_checkpoint("random", config=tiny).state_dict()
    spoil(state, name, fault)
    message = str(refusal(save(state, tmp_path / file), config=tiny if config == "full" else {"n_heads": 4}))
    assert SAME.get(fault, fault) in message
    assert name in message


def test_all_faults_stand_in_one_line(
    refusal: Refusal, tiny: GPTConfig, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    faults = dict(zip(WEIGHTS[2:], ["missing", "wrong shape", "torch.int64"], strict=False))
    faults |= {"out_head.weight": "not finite", "final_norm.scale": "unexpected"}
    for name, fault in faults.items():
        spoil(state, name, fault)
    message = str(refusal(save(state, Path("model.pth")), config=tiny))
    assert all(text in message for text in [*faults, *faults.values()])


def test_long_lists_are_counted(refusal: Refusal, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in thin_state(GPTConfig()).items() if ".norm" not in name}
    message = str(refusal(save(state, tmp_path / "model.pth")))
    assert "missing trf_blocks.0.norm1.scale" in message
    assert "and 45 more" in message  # 12 layers of two norms with scale and shift, three of them shown


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.text(min_size=1, max_size=400), min_size=1, max_size=5, unique=True))
def test_strange_names_stay_one_short_line(
    refusal: Refusal, tiny: GPTConfig, state: State, tmp_path: Path, names: list[str]
) -> None:
    path = save({**state, **{f"x{name}": torch.zeros(1) for name in names}}, tmp_path / "model.pth")
    assert "unexpected" in str(refusal(path, config=tiny))


def test_bias_of_the_head_that_is_a_number_is_named(
    refusal: Refusal, tiny: GPTConfig, state: State, tmp_path: Path
) -> None:
    path = save({**state, "out_head.bias": torch.tensor(1.0)}, tmp_path / "model.pth")
    assert "out_head.bias () not (1,)" in str(refusal(path, config=tiny))


RENAMED = {
    "LoRA": (r"(W_\w+)\.", r"\1.linear."),
    "MultiheadAttention": (r"W_query\.", "multihead_attn.in_proj_"),
    "einsum": (r"W_(\w+)\.(\w+)", r"\2_\1"),
}


@pytest.mark.parametrize("kind", RENAMED)
def test_attention_of_other_names_is_refused_for_its_names(
    refusal: Refusal, tiny: GPTConfig, state: State, tmp_path: Path, kind: str
) -> None:
    """Its biases are unseen, but the config that states them is right."""
    assert tiny.qkv_bias
    others = {re.sub(*RENAMED[kind], name): tensor for name, tensor in state.items()}
    message = str(refusal(save(others, tmp_path / "model.pth"), config=tiny))
    assert "missing trf_blocks.0.att.W_query.weight" in message
    assert f"unexpected {next(name for name in others if name not in state)}" in message


@pytest.mark.parametrize("mask", ["none", "transposed", "one token off", "twice as large", "int"])
def test_mask_that_is_not_causal_is_refused(
    refusal: Refusal, tiny: GPTConfig, state: State, tmp_path: Path, mask: str
) -> None:
    causal = state["trf_blocks.1.att.mask"]
    masks = {
        "none": torch.zeros_like(causal),
        "transposed": causal.t(),
        "one token off": causal.triu(2),
        "twice as large": torch.ones(32, 32).triu(1),
        "int": causal.int(),
    }
    path = save({**state, "trf_blocks.1.att.mask": masks[mask]}, tmp_path / "model.pth")
    assert "trf_blocks.1.att.mask" in str(refusal(path, config=tiny))


@pytest.mark.parametrize("change", [Tensor.to_sparse, lambda tensor: tensor.to("meta")], ids=["sparse", "meta"])
def test_weights_without_plain_values_are_refused(
    refusal: Refusal, tiny: GPTConfig, state: State, tmp_path: Path, change: Callable[[Tensor], Tensor]
) -> None:
    path = save({**state, "out_head.weight": change(state["out_head.weight"])}, tmp_path / "model.pth")
    assert "without values out_head.weight" in str(refusal(path, config=tiny))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4", "F6_E2M3", "C64", "BOOL", "U16"])
def test_other_types_of_safetensors_are_refused(refusal: Refusal, tiny: GPTConfig, tmp_path: Path, dtype: str) -> None:
    n_bytes = tiny.vocab_size * tiny.emb_dim * {"F4": 4, "F6_E2M3": 6, "C64": 64, "U16": 16}.get(dtype, 8) // 8
    shape = [tiny.vocab_size, tiny.emb_dim]
    header = json.dumps({"tok_emb.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, n_bytes]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(n_bytes))
    message = str(refusal(tmp_path / "m.safetensors", config={**tiny.to_dict(), "n_layers": 1, "qkv_bias": False}))
    assert "tok_emb.weight" in message
    assert "float32" in message


class Unsafe:
    """Creates a folder when it is unpickled, as any code might."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("ran",))


def stored_as(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "text")
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize(
    "content",
    [stored_as(Unsafe()), stored_as({"tok_emb.weight": Unsafe()}), pickle.dumps(Unsafe(), 2), pickle.dumps(Unsafe())],
    ids=["whole", "among tensors", "bare pickle", "newer pickle"],
)
def test_unsafe_pickle_is_refused_and_does_not_run(
    refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("unsafe" + suffix).write_bytes(content)
    refusal("unsafe" + suffix)
    assert not Path("ran").exists()


WHOLE = stored_as(thin_state(GPTConfig(emb_dim=24, n_heads=4, n_layers=2)))


@pytest.mark.parametrize(
    ("file", "content", "cause"),
    [
        ("m.pth", stored_as({"a": Unsafe()}), "holds posix.mkdir, which could run code when loaded, and is refused"),
        ("m.pth", stored_as(torch.nn.Linear(1, 1)), "torch.nn.modules.linear.Linear"),
        ("m.pth", b"", "is empty"),
        ("m.safetensors", b"", "is empty"),
        ("m.pth", b"\n<!DOCTYPE html><html></html>", "is a web page"),
        ("m.safetensors", b"<html><body>404</body></html>", "is a web page"),
        ("m.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        ("m.pth", WHOLE[: len(WHOLE) // 2], "is damaged, cut short"),
        ("m.pth", b"PK\3\4", "is damaged, cut short"),
        ("m.pth", zipped("word/document.xml"), "is no PyTorch file"),
        ("m.pth", zipped("text"), "is no PyTorch file"),
        ("m.pth", b"hello", "is no PyTorch file"),
        ("m.pth", bytes(100), "is no PyTorch file"),
        ("m.pth", pickle.dumps({"a": 1}, 2), "is no PyTorch file"),
        ("m.pth", stored_as(torch.zeros(3)), "holds a Tensor"),
        ("m.pth", stored_as([torch.zeros(3)]), "holds a list"),
        ("m.pth", stored_as({}), "holds no tensors"),
        ("m.pth", stored_as({"model_state_dict": 3}), "holds a int"),
        ("m.pth", stored_as({"tok_emb.weight": 3}), "'tok_emb.weight' of type int"),
        ("m.pth", stored_as({0: torch.zeros(3)}), "0 of type Tensor"),
        ("m.pth", stored_as({"fc.weight": torch.zeros(3)}), "holds another model (fc.weight"),
        ("m.safetensors", bytes(8), "no safetensors file"),
        ("m.safetensors", bytes(100), "no safetensors file"),
        ("m.safetensors", b"\xff" * 100, "no safetensors file"),
        ("m.txt", b"hello", "is no checkpoint: give a .pth, .pt, .safetensors or .index file, or a folder"),
    ],
    ids=range(25),
)
def test_file_that_is_no_checkpoint_is_refused_with_the_cause(
    refusal: Refusal, tmp_path: Path, file: str, content: bytes, cause: str
) -> None:
    (tmp_path / file).write_bytes(content)
    assert cause in str(refusal(tmp_path / file))


@pytest.mark.parametrize("file", ["model.pth", "legacy.pth", "model.safetensors"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_file_loads_or_is_refused(tmp_path: Path, file: str, data: st.DataObject) -> None:
    config = GPTConfig(vocab_size=3, context_length=2, emb_dim=2, n_heads=1, n_layers=1)
    path = save(load_checkpoint("random", config=config).state_dict(), tmp_path / file)
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    with contextlib.suppress(CheckpointError):
        load_checkpoint(path, config=config)


@pytest.mark.parametrize("source", ["none.pth", "none.safetensors", "no/such/folder", "none", "a\0b", "x" * 5000])
def test_missing_path_is_refused(
    refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refusal(source)


def test_missing_file_is_a_file_not_found(refusal: Refusal, tmp_path: Path) -> None:
    error = refusal(tmp_path / "none.pth")
    assert isinstance(error, FileNotFoundError)
    assert "none.pth does not exist" in str(error)


def test_folder_without_weights_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    error = refusal(tmp_path)
    assert isinstance(error, FileNotFoundError)
    assert "holds no model.safetensors" in str(error)


def test_folder_with_a_pth_names_it(refusal: Refusal, state: State, tmp_path: Path) -> None:
    save(state, tmp_path / "model.pth")
    assert "give the file model.pth itself" in str(refusal(tmp_path))


def test_missing_shard_leaves_its_tensors_missing(
    refusal: Refusal, tiny: GPTConfig, state: State, tmp_path: Path
) -> None:
    del state["final_norm.shift"], state["out_head.weight"]
    save(state, tmp_path / "model-00001-of-00002.safetensors")
    assert "missing final_norm.shift, out_head.weight" in str(refusal(tmp_path, config=tiny))
