"""Open a bundle: read its manifest strictly and check every file against it (format: docs/bundle.md)."""

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from .errors import BundleError, BundleNotFoundError
from .strict_json import JsonObject, parse_json

FORMAT_VERSION = 1
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
TEMPLATE_PLACE = "{prompt}"
MANIFEST = "manifest.json"
REPORT = "export_report.json"
MANIFEST_MAX_BYTES = 1 << 20
PROGRESS_BYTES = 1 << 30  # smaller bundles are checked in a second or so
MAX_SIZES = {
    "vocab_size": 1 << 24,
    "context_length": 1 << 24,
    "emb_dim": 1 << 20,
    "n_heads": 1 << 12,
    "n_layers": 1 << 12,
}
"""Far above any model, and far below what would fill the memory before the graph is compared."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; ``qkv_bias`` tells whether the query, key and value projections have one."""

    vocab_size: int
    context_length: int
    emb_dim: int
    n_heads: int
    n_layers: int
    qkv_bias: bool
    n_outputs: int
    """Logits of a position: one for each token, or for each class of a classifier."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.emb_dim // self.n_heads

    @property
    def cache_width(self) -> int:
        """Width of a head in the buffers of decode.onnx: its own, rounded up to a multiple of 8."""
        return -(-self.head_dim // 8) * 8

    @property
    def cache_names(self) -> list[str]:
        """``0.key``, ``0.value``, ``1.key``, ..."""
        return [f"{layer}.{kind}" for layer in range(self.n_layers) for kind in ("key", "value")]


Identity = tuple[int, int, int, int]
"""Of a file: device, inode, size, and when it was changed."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph; a dimension is a number, or the name of one that varies."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX file with its inputs and outputs."""

    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class TokenizerSpec:
    """The file of BPE ranks and what belongs to it."""

    path: str
    pattern: str
    special_tokens: Mapping[str, int]
    eos_token_id: int | None


@dataclass(frozen=True)
class ClassifierSpec:
    """The classes of a classifier; its texts are cut or padded to ``max_length`` tokens, where that is not 0."""

    labels: tuple[str, ...]
    max_length: int
    pad_token_id: int


@dataclass(frozen=True)
class FileSpec:
    """Size and hash that a file must have."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files had the manifest's sizes and hashes when it was opened."""

    folder: Path
    gptedge_version: str
    model: ModelConfig
    precision: str
    opset: int
    graphs: Mapping[str, GraphSpec]
    tokenizer: TokenizerSpec
    known_answers: str
    files: Mapping[str, FileSpec]
    prompt_template: str | None
    classifier: ClassifierSpec | None
    hashed: dict[str, Identity] = field(default_factory=dict, compare=False)
    """By name, the files that were hashed."""

    @property
    def rounds_finely(self) -> bool:
        """Whether kernels compute in float32 throughout; those for int8 and int4 round activations to 8 bits."""
        return self.precision in ("fp32", "fp16", "bf16")

    @property
    def cache_dtype(self) -> str:
        """Of the keys and values in the buffers of decode.onnx."""
        return "float32" if self.rounds_finely else "int8"

    def read(self, path: str) -> bytes:
        """Return a file's bytes after checking these very bytes, so that no later change of the file counts."""
        try:
            data = _read(self.folder / path)
        except OSError as error:
            raise _unreadable(error) from error
        if hashlib.sha256(data).hexdigest() != self.files[path].sha256:
            raise _changed(path)
        return data

    @cached_property
    def weights(self) -> list[str]:
        """The files beside the graphs, which onnxruntime opens by name, and reads where they are mapped."""
        graphs = {graph.path for graph in self.graphs.values()}
        folders = {path.rpartition("/")[0] for path in graphs}
        return [path for path in self.files if path.rpartition("/")[0] in folders and path not in graphs]

    def is_in_place(self) -> bool:
        """Whether the names of the weights still stand for the files that were hashed, and not for another bundle's."""
        return all(_identify(self.folder / path) == self.hashed[path] for path in self.weights)

    def check_weights(self) -> None:
        """Raise :class:`BundleError` where others were written over weights; those that were replaced stay mapped."""
        for path in self.weights:
            now, then = _identify(self.folder / path), self.hashed[path]
            if now and now[:2] == then[:2] and now != then:
                raise BundleError(f"{path} was overwritten while it was in use: open the bundle again")

    def read_parity(self) -> float:
        """Return how far the graphs' logits were from the model's at export, as a share of float32's bound.

        1 where that is not known, as at int8 and int4, whose bound is another.
        """
        if not self.rounds_finely or REPORT not in self.files:
            return 1.0
        worst = parse_json(self.read(REPORT), REPORT).child("worst")
        return worst.number("max_abs_diff") / max(1e-5, worst.number("bound"))  # which is the least bound


def open_bundle(path: str | os.PathLike[str], *, progress: bool = False) -> Bundle:
    """Read the manifest and check the size and SHA-256 of every file in the folder.

    ``progress`` shows a bar on stderr for a bundle above 1 GiB. Raises :class:`BundleNotFoundError` where there is no
    bundle, :class:`BundleError` where a file is missing, changed, linked or not listed, or where the manifest breaks a
    rule of its format.
    """
    try:
        folder = Path(path).resolve(strict=True)
        (folder / MANIFEST).lstat()
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, PermissionError):
            raise _unreadable(error) from error
        raise BundleNotFoundError(f"no bundle at {path}: there is no {MANIFEST}: write one with export-onnx") from error
    try:
        bundle = _parse_manifest(folder, _read_manifest(folder / MANIFEST))
        _check_files(bundle, progress)
    except OSError as error:
        if isinstance(error, BundleError):
            raise
        raise _unreadable(error) from error
    return bundle


def _unreadable(error: OSError) -> BundleError:
    return BundleError(f"cannot read {error.filename} ({error.strerror}): check its permissions")


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _identify(path: Path) -> Identity | None:
    try:
        return _identity(path.stat())
    except OSError:
        return None


def _changed(path: str) -> BundleError:
    return BundleError(f"{path} is not the file that was exported, its SHA-256 differs: export or copy it again")


def _read(path: Path, limit: int = -1) -> bytes:
    with path.open("rb") as file:
        return file.read(limit)


def _read_manifest(path: Path) -> JsonObject:
    _check_plain(path)
    data = _read(path, MANIFEST_MAX_BYTES + 1)
    if len(data) > MANIFEST_MAX_BYTES:
        raise BundleError(f"{MANIFEST} is larger than {MANIFEST_MAX_BYTES:,} bytes: export the bundle again")
    return parse_json(data, MANIFEST)


def _parse_manifest(folder: Path, manifest: JsonObject) -> Bundle:
    version = manifest.whole("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(f"the bundle has format {version}, this gptedge reads {FORMAT_VERSION}: upgrade gptedge")
    graphs = manifest.child("graphs")
    classifier = _parse_classifier(manifest.child("classifier")) if "classifier" in manifest.names else None
    bundle = Bundle(
        folder=folder,
        gptedge_version=manifest.text("gptedge_version"),
        model=_parse_model(manifest.child("model"), classifier),
        precision=_parse_precision(manifest.text("precision")),
        opset=manifest.whole("opset"),
        graphs={name: _parse_graph(graphs.child(name)) for name in sorted({"decode", *graphs.names})},
        tokenizer=_parse_tokenizer(manifest.child("tokenizer")),
        known_answers=manifest.child("known_answers").path("path"),
        files=_parse_files(manifest.children("files")),
        prompt_template=_parse_template(manifest) if "prompt_template" in manifest.names else None,
        classifier=classifier,
    )
    used = [graph.path for graph in bundle.graphs.values()] + [bundle.tokenizer.path, bundle.known_answers]
    if unlisted := sorted(set(used) - set(bundle.files)):
        raise BundleError(f"{MANIFEST}: {unlisted[0]} is used but not in files: export the bundle again")
    return bundle


def _parse_precision(name: str) -> str:
    if name not in PRECISIONS:
        raise BundleError(f"{MANIFEST}: precision {name!r:.40} is not known to this gptedge: upgrade gptedge")
    return name


def _parse_template(manifest: JsonObject) -> str:
    template = manifest.text("prompt_template")
    if template.count(TEMPLATE_PLACE) != 1:
        raise BundleError(f"{MANIFEST}: prompt_template does not hold {TEMPLATE_PLACE} once: export the bundle again")
    return template


def _parse_classifier(values: JsonObject) -> ClassifierSpec:
    labels = values.array("labels")
    if not labels or not all(isinstance(label, str) and label for label in labels) or len(set(labels)) < len(labels):
        raise BundleError(f"{MANIFEST}: the classifier's labels are not different names: export the bundle again")
    max_length = values.whole("max_length", low=0, high=MAX_SIZES["context_length"])
    return ClassifierSpec(tuple(labels), max_length, values.whole("pad_token_id", low=0))


def _parse_model(values: JsonObject, classifier: ClassifierSpec | None) -> ModelConfig:
    sizes = {key: values.whole(key, high=high) for key, high in MAX_SIZES.items()}
    n_outputs = sizes["vocab_size"] if classifier is None else len(classifier.labels)
    config = ModelConfig(**sizes, qkv_bias=values.flag("qkv_bias"), n_outputs=n_outputs)
    if config.emb_dim % config.n_heads:
        raise BundleError(
            f"{MANIFEST}: emb_dim {config.emb_dim} is no multiple of {config.n_heads} heads: export again"
        )
    fits = classifier is None or (
        classifier.max_length <= config.context_length and classifier.pad_token_id < config.vocab_size
    )
    if not fits:
        raise BundleError(f"{MANIFEST}: the classifier's padding does not fit the model: export the bundle again")
    return config


def _parse_graph(values: JsonObject) -> GraphSpec:
    return GraphSpec(
        path=values.path("path"),
        inputs=tuple(_parse_tensor(tensor) for tensor in values.children("inputs")),
        outputs=tuple(_parse_tensor(tensor) for tensor in values.children("outputs")),
    )


def _parse_tensor(values: JsonObject) -> TensorSpec:
    shape = values.array("shape")
    if not all(isinstance(size, str) or (type(size) is int and size >= 1) for size in shape):
        raise BundleError(f"{MANIFEST}: shape {shape} of {values.text('name')} is not sizes and names: export again")
    return TensorSpec(values.text("name"), values.text("dtype"), tuple(shape))


def _parse_tokenizer(values: JsonObject) -> TokenizerSpec:
    special = values.child("special_tokens")
    return TokenizerSpec(
        path=values.path("path"),
        pattern=values.text("pattern"),
        special_tokens={token: special.whole(token, low=0) for token in special.names},
        eos_token_id=None if values.is_null("eos_token_id") else values.whole("eos_token_id", low=0),
    )


def _parse_files(entries: list[JsonObject]) -> dict[str, FileSpec]:
    files: dict[str, FileSpec] = {}
    for entry in entries:
        path, sha256 = entry.path("path"), entry.text("sha256")
        if path in files or path == MANIFEST or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise BundleError(f"{MANIFEST}: the entry of {path} in files is wrong or doubled: export the bundle again")
        files[path] = FileSpec(entry.whole("size", low=0, high=2**63 - 1), sha256)
    return files


def _check_files(bundle: Bundle, progress: bool) -> None:
    """Compare the folder with the manifest: names and sizes first, which costs nothing, then the hashes."""
    sizes = _sizes_on_disk(bundle.folder)
    if missing := sorted(set(bundle.files) - set(sizes)):
        raise BundleError(f"{missing[0]} is missing from the bundle: export or copy it again")
    if extra := sorted(set(sizes) - set(bundle.files) - {MANIFEST}):
        raise BundleError(f"{extra[0]} is not a file of the bundle: move it out of {bundle.folder}")
    for path, file in bundle.files.items():
        if sizes[path] != file.size:
            raise BundleError(f"{path} has {sizes[path]:,} bytes, not {file.size:,}: export or copy the bundle again")
    total = sum(sizes.values())
    hidden = not progress or total < PROGRESS_BYTES
    with tqdm(desc="check", total=total, unit="B", unit_scale=True, leave=False, disable=hidden) as bar:
        for path, file in bundle.files.items():
            digest, bundle.hashed[path] = _hash(bundle.folder / path, bar)
            if digest != file.sha256:
                raise _changed(path)


def _hash(path: Path, bar: "tqdm[NoReturn]") -> tuple[str, Identity]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        identity = _identity(os.fstat(file.fileno()))
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest(), identity


def _sizes_on_disk(folder: Path) -> dict[str, int]:
    sizes = {}
    for parent, folders, names in os.walk(folder, onerror=_raise):
        for name in (*folders, *names):
            path = Path(parent, name)
            if not stat.S_ISDIR(path.lstat().st_mode):
                sizes[path.relative_to(folder).as_posix()] = _check_plain(path)
    return sizes


def _check_plain(path: Path) -> int:
    """Return the size of a file that has one name only: through another one its content could change unseen."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path} is a link or a special file: put the plain file there")
    if status.st_nlink > 1:
        raise BundleError(f"{path} has {status.st_nlink} names (hard links): copy the bundle, so that it has one")
    return status.st_size


def _raise(error: OSError) -> NoReturn:
    raise error
