from collections.abc import Callable
from typing import Any

import pytest
import torch
from gptedge_models import CONFIGS, GPTConfig, GPTModel, generate_text_simple, load_checkpoint
from gptedge_models.gpt import GELU
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, layer_norm


class Transcription:
    """Chapter 4 of the book again, as layers in their order of creation and one function over them."""

    def __init__(self, config: GPTConfig) -> None:
        dim, bias = config.emb_dim, config.qkv_bias
        self.config = config
        self.embeddings = [nn.Embedding(config.vocab_size, dim), nn.Embedding(config.context_length, dim)]
        self.blocks = []
        for _ in range(config.n_layers):
            query, key, value = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
            out, widen, narrow = nn.Linear(dim, dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
            self.blocks.append((query, key, value, out, widen, narrow))
        self.head = nn.Linear(dim, config.vocab_size, bias=False)

    def weights(self) -> list[Tensor]:
        """Return the drawn parameters in the order of the state dict; norms are not drawn."""
        layers = [*self.embeddings, *(layer for block in self.blocks for layer in block), self.head]
        return [parameter for layer in layers for parameter in layer.parameters()]

    def logits(self, ids: Tensor, drop_rate: float = 0.0) -> Tensor:
        x = self.embeddings[0](ids) + self.embeddings[1].weight[: ids.shape[1]]
        x = dropout(x, drop_rate)
        for query, key, value, out, widen, narrow in self.blocks:
            h = self.norm(x)
            q, k, v = (self.heads(layer(h)) for layer in (query, key, value))
            scores = q @ k.mT / q.shape[-1] ** 0.5
            future = torch.ones(ids.shape[1], ids.shape[1]).triu(1) == 1
            attention = dropout(scores.masked_fill(future, -torch.inf).softmax(-1), drop_rate)
            x = x + dropout(out((attention @ v).transpose(1, 2).flatten(2)), drop_rate)
            x = x + dropout(narrow(gelu(widen(self.norm(x)), approximate="tanh")), drop_rate)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def norm(self, x: Tensor) -> Tensor:
        return layer_norm(x, (x.shape[-1],), eps=1e-5)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.config.n_heads, -1).transpose(1, 2)


@st.composite
def configs(draw: st.DrawFn) -> GPTConfig:
    heads = draw(st.integers(1, 4))
    return GPTConfig(
        vocab_size=draw(st.integers(1, 70)),
        context_length=draw(st.integers(1, 12)),
        emb_dim=heads * draw(st.integers(1, 6)),
        n_heads=heads,
        n_layers=draw(st.integers(1, 3)),
        drop_rate=draw(st.sampled_from([0.0, 0.1, 0.5])),
        qkv_bias=draw(st.booleans()),
    )


def seeded(seed: int, make: Callable[..., Any], *args: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*args)


def drawn(model: GPTModel) -> list[Tensor]:
    return [parameter for name, parameter in model.named_parameters() if "norm" not in name]


@settings(max_examples=30, deadline=None)
@given(configs(), st.integers(0, 2**32))
def test_seed_draws_the_weights_of_the_transcription(config: GPTConfig, seed: int) -> None:
    ours, theirs = drawn(seeded(seed, GPTModel, config)), seeded(seed, Transcription, config).weights()
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@settings(max_examples=30, deadline=None)
@given(configs(), st.integers(0, 2**32))
def test_train_mode_draws_the_dropout_of_the_transcription(config: GPTConfig, seed: int) -> None:
    model, transcription = seeded(seed, GPTModel, config), seeded(seed, Transcription, config)
    ids = torch.arange(2 * config.context_length).reshape(2, -1) % config.vocab_size
    ours = seeded(seed + 1, model.train(), ids)
    theirs = seeded(seed + 1, transcription.logits, ids, config.drop_rate)
    # torch's fused norm and GELU sum in another order; another draw would differ by more than 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_train_mode_drops_and_eval_mode_does_not(model: GPTModel, ids: Tensor) -> None:
    assert not torch.allclose(seeded(1, model.train(), ids), seeded(2, model, ids), atol=0.01)
    assert torch.equal(seeded(1, model.eval(), ids), seeded(2, model, ids))


def test_norms_start_as_the_identity(model: GPTModel) -> None:
    state = model.state_dict()
    assert all((state[name] == 1).all() for name in state if name.endswith(".scale"))
    assert all((state[name] == 0).all() for name in state if name.endswith(".shift"))


@pytest.mark.parametrize("spread", [10.0, 1.0, 0.001])  # the last one shows the epsilon
def test_norm_is_that_of_torch(tiny: GPTConfig, spread: float) -> None:
    norm = GPTModel(tiny).final_norm
    with torch.no_grad():
        norm.scale.normal_()
        norm.shift.normal_()
    x = spread * torch.randn(3, tiny.emb_dim)
    expected = layer_norm(x, (tiny.emb_dim,), norm.scale, norm.shift, eps=1e-5)
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)  # the order of summation differs


def test_gelu_is_the_tanh_one_of_torch() -> None:
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    # the book's sqrt(2 / pi) is float32; another constant (0.0447) would differ by 8e-6, erf by 5e-4
    torch.testing.assert_close(GELU()(x), gelu(x, approximate="tanh"), atol=1e-6, rtol=0)


def test_state_dict_has_the_names_of_the_book_in_their_order() -> None:
    config = GPTConfig(vocab_size=7, context_length=4, emb_dim=6, n_heads=2, n_layers=2, qkv_bias=True)
    block = [
        "att.mask",
        *(f"att.W_{layer}.{kind}" for layer in ("query", "key", "value") for kind in ("weight", "bias")),
        *(f"{layer}.{kind}" for layer in ("att.out_proj", "ff.layers.0", "ff.layers.2") for kind in ("weight", "bias")),
        *(f"norm{i}.{kind}" for i in (1, 2) for kind in ("scale", "shift")),
    ]
    blocks = [f"trf_blocks.{i}.{name}" for i in range(2) for name in block]
    ends = ["final_norm.scale", "final_norm.shift", "out_head.weight"]
    assert list(GPTModel(config).state_dict()) == ["tok_emb.weight", "pos_emb.weight", *blocks, *ends]


def test_without_qkv_bias_only_those_three_biases_are_gone(tiny: GPTConfig) -> None:
    without = GPTModel({**tiny.to_dict(), "qkv_bias": False}).state_dict().keys()
    gone = {f"trf_blocks.{i}.att.W_{layer}.bias" for i in range(2) for layer in ("query", "key", "value")}
    assert GPTModel(tiny).state_dict().keys() - without == gone


def test_parameter_count_follows_from_the_sizes_layer_by_layer() -> None:
    vocab, context, dim, layers = 50257, 1024, 768, 12
    attention = 3 * dim * dim + dim * dim + dim  # query, key and value without bias; out_proj with
    feed_forward = dim * 4 * dim + 4 * dim + 4 * dim * dim + dim
    norm = dim + dim
    total = vocab * dim + context * dim + layers * (attention + feed_forward + 2 * norm) + norm + dim * vocab
    assert total == 163_009_536
    with torch.device("meta"):
        model = GPTModel(CONFIGS["gpt2-small"])
    assert sum(parameter.numel() for parameter in model.parameters()) == total

    model.out_head.weight = model.tok_emb.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == total - vocab * dim == 124_412_160


@pytest.mark.parametrize(
    ("size", "count"),
    [("small", 124_439_808), ("medium", 354_823_168), ("large", 774_030_080), ("xl", 1_557_611_200)],
)
def test_configs_have_the_published_sizes_of_gpt2(size: str, count: int) -> None:
    with torch.device("meta"):
        model = GPTModel({**CONFIGS[f"gpt2-{size}"].to_dict(), "qkv_bias": True})  # as GPT-2 has, whose head is tied
    model.out_head.weight = model.tok_emb.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.config.head_dim == 64


@pytest.mark.parametrize("length", [1, 2, 15, 16])
def test_logits_have_one_row_a_token(model: GPTModel, ids: Tensor, length: int) -> None:
    logits = model(ids[:, :length])
    assert logits.shape == (2, length, 65)
    assert logits.dtype == torch.float32


def test_later_tokens_leave_earlier_logits_alone(model: GPTModel, ids: Tensor) -> None:
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 65
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=0.01)


@pytest.mark.parametrize(
    ("in_idx", "error", "message"),
    [
        (torch.zeros(1, 3, dtype=torch.int32), TypeError, r"torch\.int32: give int64"),
        (torch.zeros(1, 3), TypeError, r"torch\.float32: give int64"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"shape \(3,\): give \(B, T\)"),
        (torch.zeros(1, 1, 3, dtype=torch.int64), ValueError, r"shape \(1, 1, 3\)"),
        (torch.zeros(0, 3, dtype=torch.int64), ValueError, r"shape \(0, 3\)"),
        (torch.zeros(1, 0, dtype=torch.int64), ValueError, r"shape \(1, 0\)"),
        (torch.zeros(1, 17, dtype=torch.int64), ValueError, "17 tokens; the model reads at most 16: shorten it"),
        (torch.tensor([[0, -1]]), ValueError, r"token id -1 is outside the vocabulary 0\.\.64"),
        (torch.tensor([[0], [65]]), ValueError, r"token id 65 is outside the vocabulary 0\.\.64"),
    ],
    ids=["int32", "float", "one axis", "three axes", "no row", "no token", "too long", "below", "above"],
)
def test_forward_names_what_is_wrong_with_the_ids(
    model: GPTModel, in_idx: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model(in_idx)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16])
def test_generation_reads_the_last_tokens_of_the_context(model: GPTModel, ids: Tensor, length: int) -> None:
    rows = [row.tolist() for row in ids[:, :length]]
    for row in rows:
        for _ in range(10):
            row.append(int(model(torch.tensor([row[-8:]]))[0, -1].argmax()))
    assert generate_text_simple(model, ids[:, :length], 10, context_size=8).tolist() == rows


def test_generating_nothing_returns_the_prompt(model: GPTModel, ids: Tensor) -> None:
    assert torch.equal(generate_text_simple(model, ids, 0, context_size=16), ids)


def test_the_example_of_the_book_comes_out() -> None:
    model = load_checkpoint("random", config="gpt2-small", seed=123)
    hello_i_am = torch.tensor([[15496, 11, 314, 716]])
    printed = [27018, 24086, 47843, 30961, 42348, 7267]  # in section 4.7 of the book
    assert generate_text_simple(model, hello_i_am, 6, context_size=1024)[0, 4:].tolist() == printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({size: 0}, f"{size} is 0") for size in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")),
        ({"n_layers": 1.0}, "n_layers is 1.0: give a whole number"),
        ({"n_layers": True}, "n_layers is True: give a whole number"),
        ({"n_heads": 5}, "emb_dim 24 is not a multiple of n_heads 5"),
        ({"drop_rate": 1.0}, "drop_rate is 1.0"),
        ({"drop_rate": -0.1}, "drop_rate is -0.1"),
        ({"drop_rate": float("nan")}, "drop_rate is nan"),
        ({"drop_rate": "0.1"}, "drop_rate is '0.1'"),
        ({"qkv_bias": 1}, "qkv_bias is 1: give true or false"),
        ({"heads": 4, "ctx": 1}, "unknown keys ctx, heads"),
    ],
    ids=str,
)
def test_config_names_the_setting_that_is_wrong(tiny: GPTConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTModel({**tiny.to_dict(), **changes})


def test_config_names_the_settings_that_are_missing() -> None:
    with pytest.raises(ValueError, match="config lacks n_heads, n_layers: add them"):
        GPTConfig.from_dict({"vocab_size": 5, "context_length": 5, "emb_dim": 4})


@given(configs())
def test_config_survives_the_dict_of_the_book(config: GPTConfig) -> None:
    assert GPTConfig.from_dict(config.to_dict()) == config
