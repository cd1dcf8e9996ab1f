"""Bytes from and to files at the speed of the disk: past the page cache where the system allows, else with plain calls.

A direct transfer must begin and end on page boundaries of file and memory; what lies outside goes through the cache.
Knows nothing about tensors. Every call is positional, so threads may share the files.
Asking the page cache first (RWF_NOWAIT) makes it read ahead, which costs a third of the speed; so it is left out.
"""

import errno
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Literal

from align_convert.errors import FormatError

Mode = Literal["direct", "buffered"]
"""`direct` falls back to `buffered` by itself where a file system refuses it."""

PAGE = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux; elsewhere everything is buffered
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)  # file systems without direct transfers, such as tmpfs


def round_up(size: int) -> int:
    """To whole pages."""
    return -(-size // PAGE) * PAGE


class Buffer:
    """Page-aligned memory that grows as needed; used by one thread."""

    def __init__(self) -> None:
        """Nothing is allocated yet."""
        self._memory: mmap.mmap | None = None

    def take(self, size: int) -> memoryview:
        """At least `size` bytes, whatever they held before."""
        if self._memory is None or len(self._memory) < size:
            self._memory = mmap.mmap(-1, max(round_up(size), PAGE))
        return memoryview(self._memory)


class Reader:
    """Files open for reading; shared by threads."""

    def __init__(self, mode: Mode = "direct") -> None:
        """Nothing is opened yet."""
        self._mode = mode
        self._files: dict[Path, tuple[int, int]] = {}

    def open(self, path: Path) -> None:
        """Open a file; not to be called while other threads read."""
        if path not in self._files:
            plain = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._files[path] = (plain, _open_direct(path, os.O_RDONLY) if self._mode != "buffered" else -1)

    def read(self, path: Path, offset: int, size: int, buffer: Buffer) -> memoryview:
        """`size` bytes from `offset`, in `buffer`.

        Raises:
            FormatError: the file ends before them.
        """
        plain, direct = self._files[path]
        if direct < 0:
            target = buffer.take(size)[:size]
            return _filled(plain, target, offset, path)
        start, stop = offset // PAGE * PAGE, round_up(offset + size)
        target = buffer.take(stop - start)[: stop - start]
        done = _read_direct(direct, target, start)
        if start + done < offset + size:
            _filled(plain, target[done : offset + size - start], start + done, path)
        return target[offset - start : offset - start + size]

    def close(self) -> None:
        """Close the files."""
        for plain, direct in self._files.values():
            os.close(plain)
            if direct >= 0:
                os.close(direct)
        self._files.clear()

    def __enter__(self) -> "Reader":
        """Close at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        self.close()


class Writer:
    """Files of known size open for writing; shared by threads."""

    def __init__(self, mode: Mode = "direct") -> None:
        """Nothing is opened yet."""
        self._mode = mode
        self._files: dict[Path, tuple[int, int]] = {}

    def create(self, path: Path, size: int) -> None:
        """Open a file and reserve its space on the disk; what a file of that size holds already stays.

        Raises:
            OSError: the disk is full.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._files[path] = (plain, -1)
        os.ftruncate(plain, size)
        _reserve(plain, size)
        if self._mode != "buffered":
            self._files[path] = (plain, _open_direct(path, os.O_WRONLY))

    def buffer_start(self, path: Path, offset: int) -> int:
        """Where in a page-aligned buffer bytes meant for `offset` should begin, so that they need not be moved."""
        return offset % PAGE if self._files[path][1] >= 0 else 0

    def write(self, path: Path, offset: int, data: memoryview) -> None:
        """Put bytes at `offset`; directly where they begin in memory as `buffer_start` says."""
        plain, direct = self._files[path]
        first, last = round_up(offset) - offset, (offset + len(data)) // PAGE * PAGE - offset
        if direct < 0 or last <= first:
            _write_all(plain, data, offset)
            return
        if first:
            _write_all(plain, data[:first], offset)
        try:
            _write_all(direct, data[first:last], offset + first)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            _write_all(plain, data[first:last], offset + first)
        if last < len(data):
            _write_all(plain, data[last:], offset + last)

    def write_plain(self, path: Path, offset: int, data: bytes) -> None:
        """Put a few bytes at `offset`, wherever they are in memory."""
        _write_all(self._files[path][0], memoryview(data), offset)

    def sync(self) -> None:
        """Wait until every file is on the disk."""
        for plain, _ in self._files.values():
            os.fsync(plain)

    def close(self) -> None:
        """Close the files."""
        for plain, direct in self._files.values():
            os.close(plain)
            if direct >= 0:
                os.close(direct)
        self._files.clear()

    def __enter__(self) -> "Writer":
        """Close at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        self.close()


def _open_direct(path: Path, flags: int) -> int:
    """A descriptor past the page cache, or -1 where there is no such thing."""
    if not _DIRECT:
        return -1
    try:
        return os.open(path, flags | _DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return -1


def _reserve(descriptor: int, size: int) -> None:
    if size == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise


def _read_direct(descriptor: int, target: memoryview, offset: int) -> int:
    """Bytes read; fewer than asked for where the file ends or refuses direct transfers."""
    done = 0
    while done < len(target):
        try:
            step = os.preadv(descriptor, [target[done:]], offset + done)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            break
        done += step
        if step == 0 or step % PAGE:
            break
    return done


def _filled(descriptor: int, target: memoryview, offset: int, path: Path) -> memoryview:
    done = 0
    while done < len(target):
        step = os.preadv(descriptor, [target[done:]], offset + done)
        if step == 0:
            raise FormatError(f"{str(path)!r} ends at byte {offset + done}; more was expected")
        done += step
    return target


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
