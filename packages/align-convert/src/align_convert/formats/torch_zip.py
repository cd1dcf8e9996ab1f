"""The archive that `torch.save` writes: an uncompressed zip of one pickle and one record a tensor's bytes.

Written here from a plan, before any tensor is read: every record's offset is known, so the bytes can be put there
later, in any order and by any thread. Read here only far enough to find the records. Nothing is unpickled in this file.
The checksum of a tensor's record is left 0, as torch does under `set_crc32_options(False)`; torch does not look at it.
Source: the zip format (PKWARE APPNOTE 6.3.9, sections 4.3 and 4.5.3 for zip64), and files written by torch 2.6 to 2.13.
"""

import io
import os
import pickle
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from align_convert.errors import FormatError

_ALIGNMENT = 4096  # of tensor bytes: a page, so that they can be written past the page cache
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
_MAX_32 = 0xFFFFFFFF  # marks a number that is in the zip64 field instead
_LOCAL, _CENTRAL, _END, _END_64, _LOCATOR = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"
_MAX_TAIL = 66_000  # an end record may be followed by a comment of up to 65535 bytes


class Stub:
    """Stands in a dictionary to be pickled for a tensor whose bytes come later."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Nothing is allocated."""
        self.shape = shape
        self.dtype = dtype

    @property
    def num_bytes(self) -> int:
        """Of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Archive:
    """The bytes of an archive but for its tensors, relative to its beginning."""

    size: int
    literals: tuple[tuple[int, bytes], ...]
    """(offset, bytes) of everything that is not a tensor; together with the tensors they leave no gap."""
    offsets: tuple[int, ...]
    """Where each `Stub`'s bytes belong, in the order in which they were met."""


def plan_archive(content: object, *, alignment: int = _ALIGNMENT) -> tuple[Archive, list[Stub]]:
    """Lay out the archive of `content`, a structure of plain values, Namespaces, torch dtypes and `Stub`s.

    Returns:
        The archive, and the stubs in the order of its `offsets`.
    """
    data, stubs = _pickled(content)
    names = ["data.pkl", "byteorder", *(f"data/{key}" for key in range(len(stubs))), "version"]
    blobs: list[bytes | None] = [data, b"little", *([None] * len(stubs)), b"3\n"]
    literals, offsets, central = [], [], []
    pending, at = b"", 0  # bytes not yet in `literals`, and where they begin
    sizes = [len(blob) if blob is not None else stubs[i - 2].num_bytes for i, blob in enumerate(blobs)]
    for name, blob, size in zip(names, blobs, sizes, strict=True):
        start = at + len(pending)
        path = f"archive/{name}".encode("ascii")
        checksum = 0 if blob is None else zlib.crc32(blob)
        pending += _local_header(path, size, checksum, start=start, alignment=1 if blob is not None else alignment)
        central.append(_central_header(path, size, checksum, start=start))
        if blob is not None:
            pending += blob
            continue
        literals.append((at, pending))
        offsets.append(at + len(pending))
        pending, at = b"", offsets[-1] + size
    start = at + len(pending)
    directory = b"".join(central)
    pending += directory + _end_records(len(names), len(directory), start)
    literals.append((at, pending))
    return Archive(size=at + len(pending), literals=tuple(literals), offsets=tuple(offsets)), stubs


@dataclass(frozen=True, slots=True)
class Record:
    """A stored record: where its local header begins, and its size."""

    header: int
    size: int


class Directory:
    """The records of an archive that begins somewhere in an open file."""

    def __init__(self, descriptor: int, *, where: str, start: int = 0, length: int | None = None) -> None:
        """Read the archive's directory.

        Args:
            where: the file, for errors.
            start, length: the archive's place in the file; by default all of it.
        Raises:
            FormatError: the archive is damaged or compressed.
        """
        self._descriptor = descriptor
        self._where = where
        self._start = start
        self._length = os.fstat(descriptor).st_size - start if length is None else length
        self.records = self._read_records()

    def locate(self, name: str) -> tuple[int, int]:
        """(offset in the file, size) of a record's bytes; `name` is without the archive's own folder."""
        record = self.records.get(name)
        if record is None:
            raise self._damaged(f"it has no record {name!r}")
        header = self._read(record.header, 30)
        if len(header) < 30 or header[:4] != _LOCAL:
            raise self._damaged(f"the header of record {name!r} is not where the directory says")
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        offset = record.header + 30 + name_length + extra_length
        if offset + record.size > self._length:
            raise self._damaged(f"record {name!r} reaches beyond its end")
        return self._start + offset, record.size

    def read(self, name: str) -> bytes:
        """The bytes of a small record."""
        offset, size = self.locate(name)
        return self._read(offset - self._start, size)

    def _read_records(self) -> dict[str, Record]:
        tail_start = max(0, self._length - _MAX_TAIL)
        tail = self._read(tail_start, self._length - tail_start)
        end = tail.rfind(_END)
        if end < 0 or end + 22 > len(tail):
            raise self._damaged("it is not a zip archive, or its end is missing")
        count, size, start = struct.unpack_from("<HII", tail, end + 10)
        if tail[max(0, end - 20) : end][:4] == _LOCATOR:
            (at,) = struct.unpack_from("<Q", tail, end - 20 + 8)
            record = self._read(at, 56)
            if len(record) < 56 or record[:4] != _END_64:
                raise self._damaged("its zip64 end record is missing")
            count, size, start = struct.unpack_from("<QQQ", record, 32)
        if start + size > self._length:
            raise self._damaged("its directory reaches beyond its end")
        return self._parse(self._read(start, size), count)

    def _parse(self, directory: bytes, count: int) -> dict[str, Record]:
        records: dict[str, Record] = {}
        at = 0
        for _ in range(count):
            if directory[at : at + 4] != _CENTRAL or at + 46 > len(directory):
                raise self._damaged("its directory is cut off")
            (method,) = struct.unpack_from("<H", directory, at + 10)
            size, stored, name_len, extra_len, comment_len = struct.unpack_from("<IIHHH", directory, at + 20)
            (header,) = struct.unpack_from("<I", directory, at + 42)
            name = directory[at + 46 : at + 46 + name_len].decode("utf-8", errors="replace")
            extra = directory[at + 46 + name_len : at + 46 + name_len + extra_len]
            size, stored, header = self._wide(extra, size, stored, header)
            if method != 0 or size != stored:
                raise self._damaged(f"record {name!r} is compressed")
            records[name.partition("/")[2]] = Record(header=header, size=size)
            at += 46 + name_len + extra_len + comment_len
        return records

    def _wide(self, extra: bytes, *numbers: int) -> tuple[int, int, int]:
        """The numbers that do not fit 32 bits come from the zip64 field: uncompressed, compressed size, header."""
        order = [numbers[1], numbers[0], numbers[2]]
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<HH", extra, at)
            if kind == 1:
                field = at + 4
                for place, number in enumerate(order):
                    if number == _MAX_32:
                        if field + 8 > min(at + 4 + length, len(extra)):
                            raise self._damaged("a zip64 field is cut off")
                        (order[place],) = struct.unpack_from("<Q", extra, field)
                        field += 8
            at += 4 + length
        return order[1], order[0], order[2]

    def _read(self, offset: int, size: int) -> bytes:
        size = min(size, self._length - offset)
        if size <= 0:
            return b""
        return os.pread(self._descriptor, size, self._start + offset)

    def _damaged(self, what: str) -> FormatError:
        return FormatError(f"{self._where!r} is not a whole torch.save file: {what}")


class _Storage:
    """What a `Stub` looks into; pickled by reference to a record."""

    def __init__(self, key: int, stub: Stub) -> None:
        self.key = key
        self.stub = stub


class _Pickler(pickle.Pickler):
    """Writes a `Stub` the way torch writes a contiguous tensor that is alone in its storage."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.stubs: list[Stub] = []

    def persistent_id(self, value: object) -> tuple[object, ...] | None:
        if not isinstance(value, _Storage):
            return None
        return "storage", _STORAGES[value.stub.dtype], str(value.key), "cpu", prod(value.stub.shape)

    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, Stub):
            return NotImplemented
        self.stubs.append(value)
        stride = tuple(prod(value.shape[axis + 1 :]) for axis in range(len(value.shape)))
        storage = _Storage(len(self.stubs) - 1, value)
        return torch._utils._rebuild_tensor_v2, (storage, 0, value.shape, stride, False, OrderedDict())


def _pickled(content: object) -> tuple[bytes, list[Stub]]:
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(content)
    return buffer.getvalue(), pickler.stubs


def _local_header(path: bytes, size: int, checksum: int, *, start: int, alignment: int) -> bytes:
    """With a zip64 field where needed, and a field of zeros that moves the data to a multiple of `alignment`."""
    wide = size >= _MAX_32
    extra = struct.pack("<HHQQ", 1, 16, size, size) if wide else b""
    fixed = start + 30 + len(path) + len(extra)
    if alignment > 1:
        gap = -(fixed + 4) % alignment
        extra += b"FB" + struct.pack("<H", gap) + b"\0" * gap
    shown = _MAX_32 if wide else size
    return (
        _LOCAL
        + struct.pack("<HHHHHIIIHH", 45 if wide else 20, 0, 0, 0, 0x21, checksum, shown, shown, len(path), len(extra))
        + path
        + extra
    )


def _central_header(path: bytes, size: int, checksum: int, *, start: int) -> bytes:
    numbers = [number for number in (size, size, start) if number >= _MAX_32]
    if size >= _MAX_32 > start:
        numbers = [size, size]
    extra = struct.pack("<HH", 1, 8 * len(numbers)) + struct.pack(f"<{len(numbers)}Q", *numbers) if numbers else b""
    shown, at = min(size, _MAX_32), min(start, _MAX_32)
    need = 45 if numbers else 20
    return (
        _CENTRAL
        + struct.pack(
            "<HHHHHHIIIHHHHHII",
            need,
            need,
            0,
            0,
            0,
            0x21,
            checksum,
            shown,
            shown,
            len(path),
            len(extra),
            0,
            0,
            0,
            0,
            at,
        )
        + path
        + extra
    )


def _end_records(count: int, size: int, start: int) -> bytes:
    wide = b""
    if count >= 0xFFFF or size >= _MAX_32 or start >= _MAX_32:
        wide = _END_64 + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start)
        wide += _LOCATOR + struct.pack("<IQI", 0, start + size, 1)
    few = min(count, 0xFFFF)
    end = _END + struct.pack("<HHHHIIH", 0, 0, few, few, min(size, _MAX_32), min(start, _MAX_32), 0)
    return wide + end
