"""TensorFlow's checkpoint files, read without TensorFlow: ``NAME.index``, a table of tensors, and ``NAME.data-*``.

The table is LevelDB's: blocks of sorted keys that share prefixes, each with a checksum, found through a block of blocks
that the footer finds. The values are protocol buffers of a few fields (tensor_bundle.proto).
"""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from .weights import CheckpointError, Stored, Weights, check_file, label

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_DTYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 9: torch.int64, 14: torch.bfloat16, 19: torch.float16}
Fields = dict[int, list[int | bytes]]


def latest_checkpoint(folder: Path) -> Path:
    """Return the ``.index`` file of the checkpoint that the folder's file ``checkpoint`` names."""
    named = re.match(r'model_checkpoint_path: "([^"\n]+)"', (folder / "checkpoint").read_text("utf-8", "replace"))
    if not named:
        raise CheckpointError(f"{label(folder / 'checkpoint')} names no checkpoint: give the .index file itself")
    return folder / f"{Path(named[1]).name}.index"  # a path is the one on the machine that wrote it


def open_tensor_bundle(path: Path) -> Weights:
    """List the tensors of a ``.index`` file and the data files beside it; raises :class:`CheckpointError`.

    A tensor of three axes whose first has length 1, as a linear layer of OpenAI's has, is listed as a matrix.
    """
    try:
        table = dict(_read_table(path.read_bytes()))
        header = _fields(table.pop(b""))
        n_shards = _number(header, 1)
        if _number(header, 2) != 0:
            raise ValueError("big-endian")
        entries = {key.decode(errors="backslashreplace"): _read_entry(_fields(value)) for key, value in table.items()}
    except (ValueError, TypeError, KeyError, IndexError, struct.error):
        raise CheckpointError(f"{label(path)} is damaged or no TensorFlow checkpoint: copy it again") from None
    sizes = {}
    for shard in range(n_shards):
        data = path.with_suffix(f".data-{shard:05d}-of-{n_shards:05d}")
        check_file(data)
        sizes[shard] = data.stat().st_size
    weights: Weights = {}
    for name, entry in entries.items():
        if entry.shard not in sizes or entry.offset + entry.size > sizes[entry.shard]:
            raise CheckpointError(f"{label(path)}: the data of {name:.100} is cut short: copy the checkpoint again")
        data = path.with_suffix(f".data-{entry.shard:05d}-of-{n_shards:05d}")
        shape = entry.shape[1:] if len(entry.shape) == 3 and entry.shape[0] == 1 else entry.shape
        weights[name] = Stored(shape, _reader(data, name, entry, shape), lasting=True)
    return weights


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: BundleEntryProto."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    is_sliced: bool


def _read_entry(entry: Fields) -> _Entry:
    axes = _fields(_bytes(entry, 2)).get(2, [])
    shape = tuple(_number(_fields(axis), 1) for axis in axes if isinstance(axis, bytes))
    return _Entry(_number(entry, 1), shape, _number(entry, 3), _number(entry, 4), _number(entry, 5), 7 in entry)


def _reader(data: Path, name: str, entry: _Entry, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None or entry.is_sliced:
            what = "stored in slices" if entry.is_sliced else f"of TensorFlow's type {entry.dtype}"
            raise CheckpointError(f"{label(data)}: {name:.100} is {what}: save it as one float32 tensor")
        if entry.size == 0 or entry.size != prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{label(data)}: {name:.100} has {entry.size} bytes for {shape}: save it again")
        content = bytearray(entry.size)
        with data.open("rb") as file:
            file.seek(entry.offset)
            file.readinto(content)
        return torch.frombuffer(content, dtype=dtype).reshape(shape)

    return read


def _read_table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the table's keys and values; raises ``ValueError``, ``IndexError`` or ``struct.error`` where it is none."""
    footer = data[-_FOOTER:]
    if len(footer) < _FOOTER or struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
        raise ValueError("no table")
    _, position = _handle(footer, 0)  # of a block of metadata, which checkpoints leave empty
    blocks, _ = _handle(footer, position)
    for _, value in _read_block(data, blocks):
        yield from _read_block(data, _handle(value, 0)[0])


def _handle(data: bytes, position: int) -> tuple[slice, int]:
    """Read where a block lies."""
    offset, position = _varint(data, position)
    size, position = _varint(data, position)
    return slice(offset, offset + size), position


def _read_block(data: bytes, place: slice) -> Iterator[tuple[bytes, bytes]]:
    block, (compression, checksum) = data[place], struct.unpack_from("<BI", data, place.stop)
    crc = _crc32c(data[place.start : place.stop + 1])
    if compression or checksum != ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF:
        raise ValueError("compressed or damaged")
    (n_restarts,) = struct.unpack("<I", block[-4:])
    end, position, key = len(block) - 4 - 4 * n_restarts, 0, b""
    while position < end:
        shared, position = _varint(block, position)
        own, position = _varint(block, position)
        size, position = _varint(block, position)
        key = key[:shared] + block[position : position + own]
        position += own
        yield key, block[position : position + size]
        position += size


def _fields(message: bytes) -> Fields:
    """Read a protocol buffer: field number -> values, numbers or bytes."""
    fields: Fields = {}
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, position = _varint(message, position)
            fields.setdefault(number, []).append(value)
        elif kind in (2, 5):
            size, position = _varint(message, position) if kind == 2 else (4, position)
            fields.setdefault(number, []).append(message[position : position + size])
            position += size
        else:
            raise ValueError("unknown kind of field")
    return fields


def _number(fields: Fields, field: int) -> int:
    value = fields.get(field, [0])[-1]
    if isinstance(value, bytes):
        raise TypeError("bytes where a number belongs")
    return value


def _bytes(fields: Fields, field: int) -> bytes:
    value = fields.get(field, [b""])[-1]
    if isinstance(value, int):
        raise TypeError("a number where bytes belong")
    return value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Read a number of 7 bits a byte; return it and the position behind it."""
    value = 0
    for shift in range(0, 64, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number of more than 64 bits")


def _make_crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC_TABLE = _make_crc_table()


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF
