"""Checksums of every byte of a directory, and the journal from which an interrupted copy goes on.

A file is written in pieces, in any order, so its checksum is a list: (offset, length, xxh3-64) of pieces that cover it
without a gap. The journal has a line for each finished task; after a crash every piece it names is read again, and
counts as done only if its checksum still holds.
"""

import json
import os
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import xxhash

from align_convert.atomic import new_file
from align_convert.diskio import Buffer, Mode, Reader
from align_convert.errors import FormatError

MANIFEST = "align-convert.json"
JOURNAL = ".align-convert.journal"
_STEP = 8 << 20  # bytes of a small file read at once


class Chunk(NamedTuple):
    """A piece of a file: as written, or as it should be."""

    path: str
    """Relative to the directory, with forward slashes."""
    offset: int
    length: int
    digest: str
    """xxh3-64, 16 hexadecimal digits."""


def digest_of(data: memoryview | bytes) -> str:
    """xxh3-64 of some bytes."""
    return xxhash.xxh3_64_hexdigest(data)


def digest_file(root: Path, path: Path) -> list[Chunk]:
    """The pieces of a small file, read now."""
    chunks, offset = [], 0
    with (root / path).open("rb") as file:
        while data := file.read(_STEP):
            chunks.append(Chunk(path.as_posix(), offset, len(data), digest_of(data)))
            offset += len(data)
    return chunks


def write_manifest(root: Path, chunks: Iterable[Chunk]) -> None:
    """Write `align-convert.json` into the directory.

    Raises:
        FormatError: the pieces leave a gap, which would be a mistake of the planner.
    """
    files: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        files.setdefault(chunk.path, []).append(chunk)
    entries = {}
    for path in sorted(files):
        pieces = sorted(files[path], key=lambda chunk: chunk.offset)
        size = (root / path).stat().st_size
        _check_whole(path, pieces, size)
        entries[path] = {"bytes": size, "pieces": [[c.offset, c.length, c.digest] for c in pieces]}
    version = metadata.version("align-convert")
    head = json.dumps({"align-convert": version, "manifest": 1, "checksum": "xxh3-64"})[:-1]
    lines = [f"{json.dumps(path)}: {json.dumps(entry, separators=(',', ':'))}" for path, entry in entries.items()]
    with new_file(root / MANIFEST) as file:
        file.write((head + ', "files": {\n' + ",\n".join(lines) + "\n}}\n").encode("utf-8"))


def read_manifest(root: Path) -> dict[str, tuple[int, list[Chunk]]]:
    """File -> (its size, its pieces).

    Raises:
        FormatError: there is no manifest, or it is not one.
    """
    path = root / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        files = {
            str(name): (int(entry["bytes"]), [Chunk(str(name), int(o), int(n), str(d)) for o, n, d in entry["pieces"]])
            for name, entry in raw["files"].items()
        }
    except FileNotFoundError:
        raise FormatError(f"{str(root)!r} has no {MANIFEST!r}: only directories written by align-convert do") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(f"{str(path)!r} is not a manifest: {error}") from error
    for name, (size, chunks) in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise FormatError(f"{str(path)!r} names {name!r}, which is not within the directory")
        _check_whole(name, chunks, size)
    return files


def first_damage(root: Path, *, mode: Mode = "direct") -> str | None:
    """What no longer is as it was written, as a sentence, or None."""
    for name, (size, chunks) in read_manifest(root).items():
        path = root / name
        if not path.is_file():
            return f"{str(path)!r} is missing"
        if path.stat().st_size != size:
            return f"{str(path)!r} has {path.stat().st_size} bytes; it was written with {size}"
        wrong = next((chunk for chunk in chunks if not _holds(root, [chunk], mode)), None)
        if wrong is not None:
            last = wrong.offset + wrong.length - 1
            return f"{str(path)!r} is not as it was written, somewhere in bytes {wrong.offset} to {last}"
    return None


class Journal:
    """Finished tasks of a copy in progress; one line of JSON each, appended in one write."""

    def __init__(self, path: Path, fingerprint: Mapping[str, object], *, tile_bytes: int, resume: bool) -> None:
        """Open the journal in the unfinished directory, or begin one.

        Args:
            fingerprint: what must be the same for a finished task to be of use.
            tile_bytes: by which tasks are cut; an earlier journal's own is kept, as its tasks are numbered by it.
        Raises:
            FormatError: the unfinished copy is of something else.
        """
        self.done: dict[int, list[Chunk]] = {}
        self.tile_bytes = tile_bytes
        whole = 0
        if resume and path.is_file():
            whole = self._read(path, fingerprint)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._descriptor, whole)
        if whole == 0:
            head = json.dumps([self.tile_bytes, fingerprint]) + "\n"
            os.write(self._descriptor, head.encode("utf-8"))

    def add(self, task: int, chunks: list[Chunk]) -> None:
        """Note a finished task."""
        line = json.dumps([task, chunks], separators=(",", ":")) + "\n"
        os.write(self._descriptor, line.encode("utf-8"))

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _read(self, path: Path, fingerprint: Mapping[str, object]) -> int:
        """Collect the finished tasks; returns the bytes of whole lines."""
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines:
            return 0
        try:
            self.tile_bytes, found = json.loads(lines[0])
            if found != json.loads(json.dumps(fingerprint)):
                raise FormatError(
                    f"the unfinished copy in {str(path.parent)!r} is of another source, layout or type, or by another "
                    "version; it stays as it is: run as then to go on, or without --resume to begin anew"
                )
            for line in lines[1:]:
                task, chunks = json.loads(line)
                self.done[int(task)] = [Chunk(*chunk) for chunk in chunks]
        except (ValueError, TypeError) as error:
            raise FormatError(f"{str(path)!r} is damaged: {error}; run without --resume to begin anew") from error
        return len(whole)

    def confirm(self, root: Path, *, mode: Mode = "direct") -> None:
        """Forget the tasks whose pieces are not on the disk as the journal says."""
        self.done = {task: chunks for task, chunks in self.done.items() if _holds(root, chunks, mode)}


def _holds(root: Path, chunks: list[Chunk], mode: Mode) -> bool:
    """Whether all these pieces have their checksum."""
    buffer = Buffer()
    with Reader(mode) as reader:
        for chunk in chunks:
            path = root / chunk.path
            try:
                reader.open(path)
                if digest_of(reader.read(path, chunk.offset, chunk.length, buffer)) != chunk.digest:
                    return False
            except (OSError, FormatError):
                return False
    return True


def _check_whole(path: str, chunks: list[Chunk], size: int) -> None:
    end = 0
    for chunk in chunks:
        if chunk.offset != end or chunk.length < 0:
            raise FormatError(f"the pieces of {path!r} leave a gap at byte {end}")
        end += chunk.length
    if end != size:
        raise FormatError(f"the pieces of {path!r} end at byte {end} of {size}")
