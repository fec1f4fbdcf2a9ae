import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from gptedge_models import CONFIGS, CheckpointError, GPTConfig, GPTModel, load_checkpoint
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor
from torch.nn import DataParallel, Module

State = dict[str, Tensor]
Save = Callable[[GPTModel, Path], Path]
Refusal = Callable[..., CheckpointError]


def save_bare(model: GPTModel, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "model.pth")
    return folder / "model.pth"


def save_training(model: GPTModel, folder: Path) -> Path:
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 1, dtype=torch.int64)).sum().backward()
    optimizer.step()
    state = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "epoch": 3}
    torch.save(state, folder / "training.pt")
    return folder / "training.pt"


def save_legacy(model: GPTModel, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder / "old.pth"


def save_without_masks(model: GPTModel, folder: Path) -> Path:
    torch.save({name: t for name, t in model.state_dict().items() if not name.endswith("mask")}, folder / "model.pth")
    return folder / "model.pth"


def save_bool_masks(model: GPTModel, folder: Path) -> Path:
    state = {name: t.bool() if name.endswith("mask") else t for name, t in model.state_dict().items()}
    torch.save(state, folder / "model.pth")
    return folder / "model.pth"


def save_compiled(model: GPTModel, folder: Path) -> Path:
    state = cast(Module, torch.compile(model)).state_dict()
    assert all(name.startswith("_orig_mod.") for name in state)
    torch.save(state, folder / "model.pth")
    return folder / "model.pth"


def save_parallel(model: GPTModel, folder: Path) -> Path:
    state = DataParallel(cast(Module, torch.compile(model))).state_dict()
    assert all(name.startswith("module._orig_mod.") for name in state)
    torch.save(state, folder / "model.pth")
    return folder / "model.pth"


def save_safetensors(model: GPTModel, folder: Path) -> Path:
    save_file(model.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def save_folder(model: GPTModel, folder: Path) -> Path:
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder


def save_shards(model: GPTModel, folder: Path) -> Path:
    state = list(model.state_dict().items())
    save_file(dict(state[:9]), folder / "model-00001-of-00002.safetensors")
    save_file(dict(state[9:]), folder / "model-00002-of-00002.safetensors")
    return folder


SAVERS = [
    save_bare,
    save_training,
    save_legacy,
    save_without_masks,
    save_bool_masks,
    save_compiled,
    save_parallel,
    save_safetensors,
    save_folder,
    save_shards,
]


def equal(ours: State, theirs: State) -> bool:
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("save", SAVERS)
def test_saved_model_comes_back(model: GPTModel, tmp_path: Path, save: Save) -> None:
    loaded = load_checkpoint(save(model, tmp_path), config=model.config)
    assert equal(loaded.state_dict(), model.state_dict())
    assert loaded.config == model.config


@pytest.mark.parametrize("save", [save_bare, save_safetensors])
def test_loaded_model_runs_as_the_saved_one(model: GPTModel, ids: Tensor, tmp_path: Path, save: Save) -> None:
    loaded = load_checkpoint(save(model, tmp_path), config={"n_heads": 4})
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(ids), model(ids))


@pytest.mark.parametrize("save", [save_bare, save_safetensors])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(model: GPTModel, tmp_path: Path, save: Save, dtype: torch.dtype) -> None:
    expected = {name: tensor.to(dtype).to(torch.float32) for name, tensor in model.state_dict().items()}
    loaded = load_checkpoint(save(model.to(dtype), tmp_path), config=model.config).state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert equal(loaded, expected)


@pytest.mark.parametrize("save", [save_bare, save_safetensors])
def test_loaded_weights_can_be_trained(model: GPTModel, ids: Tensor, tmp_path: Path, save: Save) -> None:
    path = save(model, tmp_path)
    before = path.read_bytes()
    loaded = load_checkpoint(path, config=model.config)
    loaded(ids).sum().backward()
    torch.optim.SGD(loaded.parameters(), lr=1.0).step()
    assert not torch.equal(loaded.out_head.weight, model.out_head.weight)
    assert path.read_bytes() == before


@pytest.mark.parametrize("save", [save_bare, save_safetensors])
def test_head_equal_to_the_embedding_shares_its_memory(model: GPTModel, tmp_path: Path, save: Save) -> None:
    model.out_head.weight.data = model.tok_emb.weight.detach().clone()
    loaded = load_checkpoint(save(model, tmp_path), config=model.config)
    assert loaded.out_head.weight.data_ptr() == loaded.tok_emb.weight.data_ptr()


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
def test_tied_head_that_safetensors_stores_once_comes_back(
    model: GPTModel, tmp_path: Path, wrap: Callable[[GPTModel], Module]
) -> None:
    model.out_head.weight = model.tok_emb.weight
    save_model(wrap(model), str(tmp_path / "model.safetensors"))
    assert len(load_file(tmp_path / "model.safetensors")) == len(model.state_dict()) - 1
    assert equal(load_checkpoint(tmp_path / "model.safetensors", config=model.config).state_dict(), model.state_dict())


def test_checkpoint_saved_on_a_gpu_loads_without_one(model: GPTModel, tmp_path: Path) -> None:
    path = save_bare(model, tmp_path)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:  # the device of each tensor is a string in the pickle
        for name, content in files.items():
            archive.writestr(name, content.replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0"))
    with pytest.raises(RuntimeError, match="cuda"):
        torch.load(path, map_location={}, weights_only=True)
    assert equal(load_checkpoint(path, config=model.config).state_dict(), model.state_dict())


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["model's", "reversed"])
def test_strides_and_order_of_the_file_do_not_matter(model: GPTModel, tmp_path: Path, order: slice) -> None:
    state = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in [*model.state_dict().items()][order]}
    torch.save(state, tmp_path / "model.pth")
    loaded = load_checkpoint(tmp_path / "model.pth", config=model.config).state_dict()
    assert equal(loaded, model.state_dict())
    assert all(tensor.is_contiguous() for tensor in loaded.values())


def test_demo_is_the_model_of_its_files() -> None:
    folder = Path(sys.modules["gptedge_models"].__file__ or "").parent / "demo"
    stored = load_file(folder / "model.safetensors")
    demo = load_checkpoint("demo")
    assert demo.config.to_dict().items() >= json.loads((folder / "config.json").read_text()).items()
    assert all(torch.equal(tensor.float(), demo.state_dict()[name]) for name, tensor in stored.items())


@pytest.mark.parametrize("seed", [0, 123, 2**63 - 1])
def test_random_is_the_model_of_the_seed(tiny: GPTConfig, seed: int) -> None:
    loaded = load_checkpoint("random", config=tiny, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        assert equal(loaded.state_dict(), GPTModel(tiny).state_dict())
    assert not any(module.training for module in loaded.modules())


def test_random_uses_the_seed_of_the_book_by_default(tiny: GPTConfig) -> None:
    by_default, with_123 = load_checkpoint("random", config=tiny), load_checkpoint("random", config=tiny, seed=123)
    assert equal(by_default.state_dict(), with_123.state_dict())


@pytest.mark.parametrize("save", [None, *SAVERS])
def test_loading_draws_nothing_from_the_callers_generator(model: GPTModel, tmp_path: Path, save: Save | None) -> None:
    source = save(model, tmp_path) if save else "random"
    torch.rand(1)  # away from where a seed leaves the generator
    before = torch.get_rng_state()
    load_checkpoint(source, config=model.config)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "1"])
def test_random_refuses_a_seed_that_is_none(refusal: Refusal, tiny: GPTConfig, seed: Any) -> None:
    assert f"seed is {seed!r}" in str(refusal("random", config=tiny, seed=seed))


def test_random_asks_for_a_config(refusal: Refusal) -> None:
    assert "--config" in str(refusal("random"))


@pytest.mark.parametrize("vocab_size", [2**50, 2**70])
def test_random_too_large_for_the_machine_is_refused(refusal: Refusal, tiny: GPTConfig, vocab_size: int) -> None:
    assert "no memory" in str(refusal("random", config={**tiny.to_dict(), "vocab_size": vocab_size}))


@pytest.mark.parametrize("form", ["config", "dict", "file", "path", "only heads"])
def test_config_is_taken_in_every_form(model: GPTModel, tmp_path: Path, form: str) -> None:
    config = model.config
    file = tmp_path / "sizes.json"
    file.write_text(json.dumps(config.to_dict()))
    forms: dict[str, Any] = {"config": config, "dict": config.to_dict(), "only heads": {"n_heads": 4}}
    forms |= {"file": str(file), "path": file}
    loaded = load_checkpoint(save_bare(model, tmp_path), config=forms[form])
    assert loaded.config == (GPTConfig(**{**config.to_dict(), "drop_rate": 0.1}) if form == "only heads" else config)


def thin_state(config: GPTConfig) -> State:
    """Return a state dict of zeros that takes no room in a file, for sizes that count."""
    with torch.device("meta"):
        state = GPTModel(config).state_dict()
    return {n: torch.zeros(()).expand(t.shape) for n, t in state.items() if not n.endswith("mask")}


@pytest.mark.parametrize("config", [None, "gpt2-small"])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_sizes_of_gpt2_imply_its_heads(tmp_path: Path, config: str | None, qkv_bias: bool) -> None:
    expected = GPTConfig(qkv_bias=qkv_bias)
    torch.save(thin_state(expected), tmp_path / "model.pth")
    assert load_checkpoint(tmp_path / "model.pth", config=config).config == expected


@pytest.mark.parametrize("changes", [{"n_layers": 11}, {"context_length": 256}, {"vocab_size": 50258}], ids=str)
def test_heads_of_other_sizes_are_asked_for(refusal: Refusal, tmp_path: Path, changes: dict[str, Any]) -> None:
    torch.save(thin_state(GPTConfig(**changes)), tmp_path / "model.pth")
    message = str(refusal(tmp_path / "model.pth"))
    assert "n_heads" in message
    assert "--config" in message


@pytest.mark.parametrize(
    ("name", "value", "actual"),
    [
        ("vocab_size", 64, 65),
        ("context_length", 32, 16),
        ("emb_dim", 48, 24),
        ("n_layers", 3, 2),
        ("qkv_bias", False, True),
    ],
)
def test_config_that_contradicts_the_tensors_is_refused(
    refusal: Refusal, model: GPTModel, tmp_path: Path, name: str, value: Any, actual: Any
) -> None:
    message = str(refusal(save_bare(model, tmp_path), config={**model.config.to_dict(), name: value}))
    assert f"the given config says {name} {value}, the tensors {actual}" in message


def test_config_that_contradicts_the_folder_is_refused(refusal: Refusal, model: GPTModel, tmp_path: Path) -> None:
    message = str(refusal(save_folder(model, tmp_path), config={**model.config.to_dict(), "n_heads": 2}))
    assert "the given config says n_heads 2, config.json 4" in message


def test_drop_rate_of_the_given_config_counts(model: GPTModel, tmp_path: Path) -> None:
    config = GPTConfig(**{**model.config.to_dict(), "drop_rate": 0.25})
    assert load_checkpoint(save_folder(model, tmp_path), config=config).config == config


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "JSONDecodeError"),
        ("{", "JSONDecodeError"),
        ("[1]", "JSON list"),
        ("[" * 100_000, "RecursionError"),
        ('"gpt2-small"', "JSON str"),
        ('{"n_heads": 4, "heads": 4}', "unknown keys heads"),
        ('{"n_heads": 5}', "not a multiple of n_heads 5"),
        ('{"n_heads": "4"}', "n_heads is '4'"),
        ('{"n_heads": null}', "n_heads is None"),
    ],
    ids=range(9),
)
def test_config_file_is_refused_with_the_cause(
    refusal: Refusal, model: GPTModel, tmp_path: Path, text: str, cause: str
) -> None:
    (tmp_path / "c.json").write_text(text)
    assert cause in str(refusal(save_bare(model, tmp_path), config=tmp_path / "c.json"))


@pytest.mark.parametrize("config", ["gpt2-tiny", "", "a\0b", "x" * 5000])
def test_config_of_an_unknown_name_lists_the_known_ones(refusal: Refusal, config: str) -> None:
    assert all(name in str(refusal("random", config=config)) for name in CONFIGS)


def test_missing_config_file_is_a_file_not_found(refusal: Refusal, tmp_path: Path) -> None:
    assert isinstance(refusal("random", config=tmp_path / "none.json"), FileNotFoundError)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("save", [save_bare, save_training, save_safetensors])
def test_weights_are_not_held_twice(tmp_path: Path, peak_kib: Callable[[Path], int], save: Save) -> None:
    config = GPTConfig(vocab_size=30_000, context_length=8, emb_dim=384, n_heads=4, n_layers=12)
    model = load_checkpoint("random", config=config)
    weights_kib = sum(parameter.nbytes for parameter in model.parameters()) // 1024
    path = save(model, tmp_path)
    added_kib = peak_kib(path)
    path.unlink()  # up to 500 MB, with the optimizer's state, which a load never reads
    assert added_kib < 1.35 * weights_kib  # one copy, and the largest tensor, a quarter of it, while it is read
