"""Text to token ids and back, with the vocabulary that the bundle carries."""

import base64
import binascii
import codecs
from collections.abc import Iterable

import tiktoken

from .bundle import Bundle, TokenizerSpec
from .errors import BundleError, InputError, shown
from .ort import out_of_memory

_NO_TOKEN = "\N{REPLACEMENT CHARACTER}".encode()  # ids of a padded vocabulary that stand for nothing


class Tokenizer:
    """Byte-pair encoding as tiktoken does it. Special tokens inside a text are plain text."""

    def __init__(self, spec: TokenizerSpec, ranks: list[bytes], vocab_size: int) -> None:
        _check_ids(spec, len(ranks), vocab_size)
        self.eos_token_id = spec.eos_token_id
        self._bytes = ranks + [_NO_TOKEN] * (vocab_size - len(ranks))
        for token, token_id in spec.special_tokens.items():
            self._bytes[token_id] = token.encode()
        try:
            self._encoding = tiktoken.Encoding(
                spec.path,
                pat_str=_contiguous(spec.pattern),
                mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
                special_tokens=dict(spec.special_tokens),
            )
        except ValueError as error:
            raise BundleError(f"{spec.path}: the pattern is not a regular expression: export it again") from error

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; lone surrogates become U+FFFD.

        Raises :class:`InputError` for other types, and :class:`BundleError` for a pattern that loses some of the text.
        """
        if not isinstance(text, str):
            raise InputError(f"text is {type(text).__name__}: give a str")
        whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        try:
            ids = self._encoding.encode_ordinary(whole)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # tiktoken's; it cannot be imported
                raise
            if "MemoryError" in str(error):
                raise out_of_memory() from None
            raise BundleError("the tokenizer's pattern takes too long: export the bundle again") from None
        if len(self._encoding.decode_bytes(ids)) != len(whole.encode()):
            raise BundleError("the tokenizer's pattern does not match all of the text: export the bundle again")
        return ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of ``token_ids``; bytes that are not UTF-8, and ids without a token, become U+FFFD."""
        try:
            data = b"".join(self.token_bytes(token_id) for token_id in token_ids)
        except TypeError as error:
            raise InputError(f"token ids are {shown(token_ids)}: give whole numbers") from error
        return data.decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one id; raises :class:`InputError` for one outside the vocabulary."""
        if 0 <= token_id < len(self._bytes):
            return self._bytes[token_id]
        raise InputError(
            f"token id {shown(token_id)} is outside the vocabulary 0..{len(self._bytes) - 1}: give ids inside it"
        )


class StreamDecoder:
    """Decode ids one by one: no piece splits a character, and all pieces joined are ``Tokenizer.decode`` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the characters that this id completes, possibly none."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Return what an unfinished character at the end leaves."""
        return self._utf8.decode(b"", final=True)


def _contiguous(pattern: str) -> str:
    """Return a pattern whose matches are never empty and follow each other: tiktoken panics on an empty one."""
    # alone first, so that no ")" in it ends our group
    tiktoken.Encoding("alone", pat_str=pattern, mergeable_ranks={b"a": 0}, special_tokens={})
    return rf"\G(?:{pattern})(?!\G)"


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """Read the bundle's vocabulary; raises :class:`BundleError` where it cannot be one."""
    spec = bundle.tokenizer
    return Tokenizer(spec, parse_ranks(bundle.read(spec.path), spec.path), bundle.model.vocab_size)


def parse_ranks(data: bytes, name: str) -> list[bytes]:
    """Read the lines ``base64 rank`` with ranks 0, 1, 2, ...

    tiktoken panics on a broken vocabulary, past any ``except Exception``: so the tokens are checked here to be unique
    and to hold all 256 single bytes.
    """
    tokens: list[bytes] = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            token, rank = line.split(b" ")
            tokens.append(base64.b64decode(token, validate=True))
        except (ValueError, binascii.Error):
            raise BundleError(f"{name}: line {number} is not 'base64 rank': export the bundle again") from None
        if rank != b"%d" % (number - 1) or not tokens[-1]:
            raise BundleError(f"{name}: line {number} has no token or not rank {number - 1}: export the bundle again")
    unique = set(tokens)
    if len(unique) < len(tokens) or not unique.issuperset(bytes([byte]) for byte in range(256)):
        raise BundleError(f"{name} repeats a token or lacks one of the 256 single bytes: export the bundle again")
    return tokens


def _check_ids(spec: TokenizerSpec, n_ranks: int, vocab_size: int) -> None:
    special = list(spec.special_tokens.values())
    if n_ranks > vocab_size or not all(n_ranks <= token_id < vocab_size for token_id in special):
        raise BundleError(f"{spec.path}: {n_ranks} tokens and {special} do not fit {vocab_size} ids: export again")
    if len(set(special)) < len(special):
        raise BundleError(f"{spec.path}: two special tokens share an id: export the bundle again")
    if spec.eos_token_id is not None and spec.eos_token_id >= vocab_size:
        raise BundleError(f"{spec.path}: eos_token_id {spec.eos_token_id} is outside the vocabulary: export again")
