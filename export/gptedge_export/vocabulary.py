"""Byte-level BPE vocabularies: read from where people keep them, written in the two forms that a bundle carries."""

import base64
import binascii
import json
import re
import threading
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken

from .errors import ExportError

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
"""How GPT-2 splits text before merging, as tiktoken writes it."""

END_OF_TEXT = "<|endoftext|>"
DOWNLOAD_SECONDS = 60
_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # Hugging Face's, OpenAI's
_LEFT_OUT = ""
_READ: dict[str, list[Any]] = {  # each setting of a tokenizer.json that changes a text's ids: the values that give ours
    "normalizer": [None],
    "pre_tokenizer.type": ["ByteLevel"],
    "pre_tokenizer.add_prefix_space": [False],
    "pre_tokenizer.use_regex": [True, _LEFT_OUT],
    "post_processor.type": ["ByteLevel", "TemplateProcessing", None],
    "post_processor.special_tokens": [{}, None, _LEFT_OUT],
    "model.type": ["BPE", _LEFT_OUT],
    "model.dropout": [None, 0, _LEFT_OUT],
    "model.continuing_subword_prefix": ["", None],
    "model.end_of_word_suffix": ["", None],
    "model.ignore_merges": [False, _LEFT_OUT],
}


@dataclass(frozen=True)
class Vocabulary:
    """``ranks[i]`` holds the bytes of token id i; ``special_tokens`` have the ids after those."""

    ranks: list[bytes]
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    pattern: str = GPT2_PATTERN

    @property
    def size(self) -> int:
        """One more than the largest token id."""
        return max([len(self.ranks) - 1, *self.special_tokens.values()]) + 1

    @property
    def eos_token_id(self) -> int | None:
        """The id of ``<|endoftext|>``, where there is one."""
        return self.special_tokens.get(END_OF_TEXT)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, in which special tokens are plain text."""
        return self._encoding.encode_ordinary(text)

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        ranks = {token: rank for rank, token in enumerate(self.ranks)}
        return tiktoken.Encoding("", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={})

    def to_tiktoken(self) -> bytes:
        """One ``base64 rank`` a line."""
        return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(self.ranks))

    def to_hugging_face(self) -> dict[str, Any]:
        """The same vocabulary as a ``tokenizer.json`` of the ``tokenizers`` library."""
        letters = _byte_letters()
        names = ["".join(letters[byte] for byte in token) for token in self.ranks]
        index = {token: rank for rank, token in enumerate(self.ranks)}
        pairs = (_merged_from(token, index) for token in self.ranks if len(token) > 1)
        merges = [[names[index[left]], names[index[right]]] for left, right in pairs]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        split: dict[str, Any] = byte_level
        if self.pattern != GPT2_PATTERN:
            pattern = {"Regex": _oniguruma(self.pattern)}
            regex = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            split = {"type": "Sequence", "pretokenizers": [regex, {**byte_level, "use_regex": False}]}
        special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": text, **special} for text, i in self.special_tokens.items()],
            "normalizer": None,
            "pre_tokenizer": split,
            "post_processor": byte_level,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {name: rank for rank, name in enumerate(names)} | dict(self.special_tokens),
                "merges": merges,
            },
        }


def load_vocabulary(source: str) -> Vocabulary:
    """Read a vocabulary by name or from a file.

    ``source`` is ``bytes`` (one token a byte), a name that tiktoken knows (``gpt2``; downloaded once), a ``.tiktoken``
    ranks file, a ``tokenizer.json``, or a folder that holds one, ``tokenizer.tiktoken``, ``vocab.json`` and
    ``merges.txt``, or ``encoder.json`` and ``vocab.bpe``. A ranks file carries no special tokens: ``<|endoftext|>`` is
    given the next id. Raises :class:`ExportError` where it cannot be read, is not a byte-level BPE vocabulary, or has
    a setting with which we would give other ids.
    """
    path = Path(source)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_json(path) if path.suffix == ".json" else _from_ranks(path)
    if source == "bytes":
        return _with_end([bytes([byte]) for byte in range(256)])
    if source in tiktoken.list_encoding_names():
        return _from_tiktoken(source)
    raise ExportError(
        f"no tokenizer {source!r}: give a .tiktoken file, a tokenizer.json, a folder that holds one, 'bytes', or a "
        f"name that tiktoken knows, such as 'gpt2'"
    )


def holds_vocabulary(path: Path) -> bool:
    """Tell whether a folder holds the files of a vocabulary."""
    files = (("tokenizer.tiktoken",), ("tokenizer.json",), *_PAIRS)
    return any(all((path / name).is_file() for name in names) for names in files)


def _from_folder(path: Path) -> Vocabulary:
    if (path / "tokenizer.json").is_file():  # first: ranks alone do not tell how text is split
        return _from_json(path / "tokenizer.json")
    if (path / "tokenizer.tiktoken").is_file():
        return _from_ranks(path / "tokenizer.tiktoken")
    for names, merges in _PAIRS:
        if (path / names).is_file() and (path / merges).is_file():
            lines = _text(path / merges).splitlines()
            pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
            return _from_bpe(path, _json(path / names), pairs)
    raise ExportError(f"{path}: no tokenizer.json, tokenizer.tiktoken or vocab.json with merges.txt: use --tokenizer")


def _from_ranks(path: Path) -> Vocabulary:
    ranks: list[bytes] = []
    for number, line in enumerate(_text(path).splitlines()):
        try:
            token, rank = line.split()
            ranks.append(base64.b64decode(token, validate=True))
            if int(rank) != number:
                raise ValueError
        except (ValueError, binascii.Error):
            raise ExportError(f"{path}: line {number + 1} is not a token in base64 and rank {number}") from None
    return _with_end(_checked(ranks, path))


def _from_json(path: Path) -> Vocabulary:
    match {"added_tokens": []} | _json(path):
        case {"model": {"vocab": dict(vocabulary), "merges": list(merges)}, "added_tokens": list(added)} as document:
            _check_settings(path, document)
        case _:
            raise ExportError(
                f"{path}: not a BPE tokenizer.json, which has model.vocab, model.merges and added_tokens: save it again"
            )
    names = set()
    for token in added:
        match token:
            case {"content": str(name), "id": token_id, "special": True} if name:
                if (known := vocabulary.setdefault(name, token_id)) != token_id:
                    raise ExportError(
                        f"{path}: token {name!r} has ids {known} and {_shown(token_id)}: correct the file"
                    )
                names.add(name)
            case _:
                raise ExportError(
                    f"{path}: added token {_shown(token)} is not one with a content and 'special': true, "
                    f"and only such are read: give another --tokenizer"
                )
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    return _from_bpe(path, vocabulary, pairs, names)


def _check_settings(path: Path, document: Mapping[str, Any]) -> None:
    for setting, values in _READ.items():
        part, _, key = setting.partition(".")
        value = document.get(part)
        if key and value is not None:
            value = value.get(key, _LEFT_OUT) if isinstance(value, dict) else value
        if value not in values:
            raise ExportError(
                f"{path}: {setting} is {_shown(value)}, only {_shown(values[0])} is read: "
                f"give a --tokenizer with GPT-2's settings"
            )


def _from_bpe(
    path: Path, vocabulary: Mapping[str, Any], merges: list[Any], added: Set[str] = frozenset()
) -> Vocabulary:
    """Turn GPT-2's letters for bytes into bytes; tokens that no merge makes are special, as those ``added`` are."""
    for name, token_id in vocabulary.items():
        if type(token_id) is not int:
            raise ExportError(f"{path}: token {name!r} has id {_shown(token_id)}, not a whole number: correct the file")
    for pair in merges:
        match pair:
            case [str(), str()]:
                pass
            case _:
                raise ExportError(f"{path}: merge {_shown(pair)} is not a pair of tokens: correct the file")
    byte_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
    order = sorted(byte_of, key=lambda letter: vocabulary.get(letter, -1)) + ["".join(pair) for pair in merges]
    try:
        ranks = [bytes(byte_of[letter] for letter in name) for name in order]
        for rank, name in enumerate(order):
            if vocabulary[name] != rank:
                raise ExportError(
                    f"{path}: token {name!r} has id {vocabulary[name]}, not {rank}: only ids in the order bytes, "
                    f"merges, special tokens are read: train a tokenizer without special tokens, then add them"
                )
    except KeyError as error:
        raise ExportError(f"{path}: token {error.args[0]!r} is not byte-level BPE: give another --tokenizer") from None
    ordinary = set(order) - added
    special = {name: token_id for name, token_id in vocabulary.items() if name not in ordinary}
    _check_special(path, special, len(order))
    return Vocabulary(_checked(ranks, path), special)


def _check_special(path: Path, special: Mapping[str, int], first: int) -> None:
    names: dict[int, str] = {}
    for name, token_id in special.items():
        if token_id < first:
            raise ExportError(f"{path}: special token {name!r} has id {token_id}: give it one from {first} on")
        if names.setdefault(token_id, name) != name:
            raise ExportError(f"{path}: {names[token_id]!r} and {name!r} both have id {token_id}: give each its own")


def _from_tiktoken(name: str) -> Vocabulary:
    """Through tiktoken's own cache; its download has no time limit of its own."""
    found: list[tiktoken.Encoding] = []
    failed: list[Exception] = []

    def fetch() -> None:
        try:
            found.append(tiktoken.get_encoding(name))
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if not found:
        cause = type(failed[0]).__name__ if failed else f"no answer in {DOWNLOAD_SECONDS} s"
        raise ExportError(
            f"tokenizer {name!r} is not in tiktoken's cache and could not be downloaded ({cause}): "
            f"give --tokenizer FILE, a .tiktoken file or a tokenizer.json"
        )
    encoding = found[0]
    token_of = {rank: token for token, rank in encoding._mergeable_ranks.items()}
    if gap := set(range(len(token_of))) - token_of.keys():
        raise ExportError(
            f"tokenizer {name!r} has no token of rank {min(gap)}, and a bundle numbers tokens without a gap: "
            f"give another --tokenizer"
        )
    ranks = [token_of[rank] for rank in range(len(token_of))]
    return Vocabulary(ranks, dict(encoding._special_tokens), encoding._pat_str)


def _with_end(ranks: list[bytes]) -> Vocabulary:
    return Vocabulary(ranks, {END_OF_TEXT: len(ranks)})


def _checked(ranks: list[bytes], path: Path) -> list[bytes]:
    if len(set(ranks)) != len(ranks):
        raise ExportError(f"{path}: a token occurs twice")
    if missing := {bytes([byte]) for byte in range(256)} - set(ranks):
        raise ExportError(f"{path}: {len(missing)} of the 256 single bytes are no tokens, {min(missing)!r} among them")
    return ranks


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{path}: cannot be read as text ({type(error).__name__})") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_text(path))
    except (ValueError, RecursionError):
        raise ExportError(f"{path}: not JSON") from None
    if not isinstance(document, dict):
        raise ExportError(f"{path}: not a JSON object")
    return document


def _byte_letters() -> list[str]:
    """The printable letter by which GPT-2 (Radford et al., 2019) writes each byte in its vocabulary files."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _oniguruma(pattern: str) -> str:
    """The pattern for the engine of ``tokenizers``, to which ``x{1,3}+`` repeats ``x{1,3}`` and is not possessive."""
    written = re.sub(r"(\\p\{\w+\})(\{\d+,\d+\})\+", r"(?>\1\2)", pattern)
    if unknown := re.search(r"\{\d*,?\d*\}\+", written):
        raise ExportError(
            f"the pattern has {unknown[0]!r} after other than \\p{{..}}, which tokenizer.json cannot say: "
            f"write it as an atomic group (?>..)"
        )
    return written


def _merged_from(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that the last merge joined: merge its bytes by the ranks below its own."""
    parts = [token[i : i + 1] for i in range(len(token))]
    limit = ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        best = min(pairs)
        if best == limit:
            raise ExportError(f"token {token!r} cannot be made by merging tokens of lower rank")
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
