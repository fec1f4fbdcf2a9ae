"""Vocabularies against tiktoken and the tokenizers library, on the real GPT-2 files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from gptedge_export import ExportError, Vocabulary, load_vocabulary
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from .patterns import CL100K, O200K

SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
TEXT = "Hello, I'm 2017  hello!\n"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}

Load = Callable[[dict[str, Any]], Vocabulary]


def train(*special_tokens: str) -> dict[str, Any]:
    """A tokenizer.json of 300 tokens, as the tokenizers library writes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special_tokens), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(Path(__file__).read_text("utf-8").splitlines(), trainer)
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    return document


@pytest.fixture
def document() -> dict[str, Any]:
    return train()


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(document: dict[str, Any]) -> Vocabulary:
        (tmp_path / "tokenizer.json").write_text(json.dumps(document))
        return load_vocabulary(str(tmp_path / "tokenizer.json"))

    return load


@pytest.fixture(scope="session")
def hugging_face(gpt2: Vocabulary) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(gpt2.to_hugging_face()))


def encoding(vocabulary: Vocabulary) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "test",
        pat_str=vocabulary.pattern,
        mergeable_ranks={token: rank for rank, token in enumerate(vocabulary.ranks)},
        special_tokens=dict(vocabulary.special_tokens),
    )


def test_gpt2_has_the_books_ids(gpt2: Vocabulary) -> None:
    assert gpt2.size == 50257
    assert gpt2.eos_token_id == 50256
    assert encoding(gpt2).encode_ordinary("Hello, I am") == [15496, 11, 314, 716]


@settings(deadline=None)
@given(text=st.text())
def test_tokenizer_json_encodes_as_tiktoken_does(text: str, gpt2: Vocabulary, hugging_face: Tokenizer) -> None:
    assert hugging_face.encode(text, add_special_tokens=False).ids == encoding(gpt2).encode_ordinary(text)


@pytest.fixture(scope="session", params=[CL100K, O200K], ids=["cl100k", "o200k"])
def other_split(gpt2: Vocabulary, request: pytest.FixtureRequest) -> tuple[Vocabulary, Tokenizer]:
    vocabulary = Vocabulary(gpt2.ranks, {}, request.param)
    return vocabulary, Tokenizer.from_str(json.dumps(vocabulary.to_hugging_face()))


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("2017 \n\r'sSlLaZ")))
@example(text="in 2017")
def test_tokenizer_json_splits_by_the_pattern(text: str, other_split: tuple[Vocabulary, Tokenizer]) -> None:
    vocabulary, tokenizer = other_split
    assert tokenizer.encode(text, add_special_tokens=False).ids == encoding(vocabulary).encode_ordinary(text)


def test_a_pattern_that_tokenizer_json_cannot_say_is_refused(gpt2: Vocabulary) -> None:
    with pytest.raises(ExportError, match=r"has '\{1,2\}\+' .* write it as an atomic group"):
        Vocabulary(gpt2.ranks, {}, r"[ab]{1,2}+|[^ab]").to_hugging_face()


def test_ranks_file_and_tokenizer_json_read_back_equal(gpt2: Vocabulary, tmp_path: Path) -> None:
    (tmp_path / "ranks.tiktoken").write_bytes(gpt2.to_tiktoken())
    (tmp_path / "tokenizer.json").write_text(json.dumps(gpt2.to_hugging_face()))
    assert load_vocabulary(str(tmp_path / "ranks.tiktoken")) == gpt2
    assert load_vocabulary(str(tmp_path / "tokenizer.json")) == gpt2


def test_openais_names_of_the_files_are_known(gpt2: Vocabulary, gpt2_folder: Path, tmp_path: Path) -> None:
    shutil.copy(gpt2_folder / "vocab.json", tmp_path / "encoder.json")
    shutil.copy(gpt2_folder / "merges.txt", tmp_path / "vocab.bpe")
    assert load_vocabulary(str(tmp_path)) == gpt2


def test_a_folder_that_splits_otherwise_is_not_read_by_its_ranks_alone(tmp_path: Path) -> None:
    vocabulary = Vocabulary(load_vocabulary("bytes").ranks, {}, CL100K)
    (tmp_path / "tokenizer.tiktoken").write_bytes(vocabulary.to_tiktoken())
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary.to_hugging_face()))
    with pytest.raises(ExportError, match="pre_tokenizer"):
        load_vocabulary(str(tmp_path))


def test_bytes_is_one_token_a_byte() -> None:
    assert encoding(load_vocabulary("bytes")).encode_ordinary("é") == [0xC3, 0xA9]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("", "single bytes are no tokens"),
        ("IQ== 0\nIQ== 1\n", "a token occurs twice"),
        ("IQ== 1\n", "line 1 is not a token"),
        ("IQ==\n", "line 1 is not a token"),
        ("*** 0\n", "line 1 is not a token"),
        ("<html>\n", "line 1 is not a token"),
    ],
)
def test_a_broken_ranks_file_is_refused(content: str, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "ranks.tiktoken"
    path.write_text(content)
    with pytest.raises(ExportError, match=cause):
        load_vocabulary(str(path))


@pytest.mark.parametrize("content", ["[]", "{", '{"model": {"type": "WordPiece"}}', '{"model": {"type": "BPE"}}'])
def test_a_foreign_tokenizer_json_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ExportError, match=r"tokenizer\.json"):
        load_vocabulary(str(path))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"pre_tokenizer": BYTE_LEVEL},  # as older versions wrote it
        {"post_processor": BYTE_LEVEL | {"add_prefix_space": True}},
        {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}},
        {"decoder": None},
        {"added_tokens": [{"id": 300, "content": "<|endoftext|>", **SPECIAL}]},
        {"added_tokens": [{"id": 310, "content": "<|endoftext|>", **SPECIAL}]},
    ],
    ids=str,
)
def test_ids_of_a_tokenizer_json_are_tokenizers(document: dict[str, Any], change: dict[str, Any], load: Load) -> None:
    ids = Tokenizer.from_str(json.dumps(document)).encode(TEXT).ids
    assert load(document | change).encode(TEXT) == ids


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("normalizer", {"type": "Lowercase"}, r"normalizer is \{"),
        ("normalizer", {"type": "NFC"}, r"normalizer is \{"),
        ("pre_tokenizer", None, r"pre_tokenizer\.type is null"),
        ("pre_tokenizer", {"add_prefix_space": True}, r"pre_tokenizer\.add_prefix_space is true"),
        ("pre_tokenizer", {"use_regex": False}, r"pre_tokenizer\.use_regex is false"),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, BYTE_LEVEL]},
            r"pre_tokenizer\.type is \"Sequence\"",
        ),
        (
            "post_processor",
            {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [5], "tokens": ["<s>"]}}},
            r"post_processor\.special_tokens is",
        ),
        ("post_processor", {"type": "RobertaProcessing"}, r"post_processor\.type"),
        ("post_processor", {"sep": ["<s>", 5], "cls": ["<s>", 5]}, r"post_processor\.type"),
        ("model", {"dropout": 0.5}, r"model\.dropout is 0\.5, only null"),
        ("model", {"end_of_word_suffix": "</w>"}, r"model\.end_of_word_suffix is"),
        ("model", {"continuing_subword_prefix": "##"}, r"model\.continuing_subword_prefix is"),
        ("model", {"ignore_merges": True}, r"model\.ignore_merges is true"),
    ],
    ids=str,
)
def test_a_setting_that_changes_ids_is_refused(
    document: dict[str, Any], part: str, change: dict[str, Any] | None, said: str, load: Load
) -> None:
    document[part] = change and {**(document[part] or {}), **change}
    with pytest.raises(ExportError, match=rf"{said}.*: give a --tokenizer with GPT-2's settings"):
        load(document)


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ([{"id": 300, "content": "foo", **SPECIAL, "special": False}], "added token .*foo.* give another"),
        ([{"id": 5, "content": "<x>", **SPECIAL}], "special token '<x>' has id 5: give it one from 300 on"),
        ([{"id": -1, "content": "<x>", **SPECIAL}], "'<x>' has id -1"),
        ([{"id": 64, "content": "a", **SPECIAL}], "'a' has id 64"),
        ([{"id": 300, "content": "a", **SPECIAL}], "'a' has ids 64 and 300"),
        ([{"id": 300, "content": name, **SPECIAL} for name in ("<x>", "<y>")], "'<x>' and '<y>' both have id 300"),
        ([{"id": 300.5, "content": "<x>", **SPECIAL}], "'<x>' has id 300.5, not a whole number"),
        ([{"id": "300", "content": "<x>", **SPECIAL}], "'<x>' has id \"300\", not a whole number"),
        ([{"id": None, "content": "<x>", **SPECIAL}], "'<x>' has id null, not a whole number"),
        ([{"id": True, "content": "<x>", **SPECIAL}], "'<x>' has id true, not a whole number"),
        ([{"content": "<x>", **SPECIAL}], "added token .*<x>"),
        ([{"id": 300, "content": "", **SPECIAL}], "added token"),
        ([{"id": 300, "content": 7, **SPECIAL}], "added token"),
        ([{"id": 300, **SPECIAL}], "added token"),
        (["<x>"], 'added token "<x>"'),
        (None, "not a BPE tokenizer.json"),
    ],
    ids=str,
)
def test_an_added_token_that_no_bundle_can_hold_is_refused(
    document: dict[str, Any], added: Any, said: str, load: Load
) -> None:
    with pytest.raises(ExportError, match=rf"tokenizer\.json: .*{said}"):
        load(document | {"added_tokens": added})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab": None}, "not a BPE tokenizer.json"),
        ({"vocab": [["a", 0]]}, "not a BPE tokenizer.json"),
        ({"vocab": {"a": None}}, "'a' has id null"),
        ({"vocab": {"a": "0"}}, "'a' has id \"0\""),
        ({"merges": None}, "not a BPE tokenizer.json"),
        ({"merges": [1]}, "merge 1 is not a pair"),
        ({"merges": [["a", "b", "c"]]}, "is not a pair"),
        ({"merges": ["ab"]}, "is not a pair"),
        ({"merges": [[["a"], "b"]]}, "is not a pair"),
    ],
    ids=str,
)
def test_a_malformed_model_is_refused(document: dict[str, Any], change: dict[str, Any], said: str, load: Load) -> None:
    with pytest.raises(ExportError, match=rf"tokenizer\.json: .*{said}"):
        load(document | {"model": document["model"] | change})


def test_special_tokens_before_the_bytes_are_refused(load: Load) -> None:
    with pytest.raises(ExportError, match=r"'!' has id 1, not 0: .* without special tokens, then add them"):
        load(train("<|endoftext|>"))


def test_a_gap_in_tiktokens_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 257}
    gap = tiktoken.Encoding("gap", pat_str=CL100K, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: gap)
    with pytest.raises(ExportError, match=r"'p50k_base' has no token of rank 256.*give another --tokenizer"):
        load_vocabulary("p50k_base")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ExportError, match="no tokenizer 'gpt9'"):
        load_vocabulary("gpt9")
