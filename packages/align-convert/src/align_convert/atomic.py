"""Directories and files that appear whole or not at all: written beside their place, fsynced, renamed.

A symbolic link stands for the directory it points to: it stays, and the new directory is made beside its target.
Knows nothing about checkpoints but how to recognise one, so that `overwrite` can never remove anything else.
"""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from align_convert.errors import FormatError

_MOUNTS = Path("/proc/self/mountinfo")
TRACKER = "latest_checkpointed_iteration.txt"


def check_destination(path: Path, *, overwrite: bool) -> None:
    """Refuse a destination that holds something, unless it holds a checkpoint and `overwrite` is given.

    Raises:
        FormatError: with the remedy.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise FormatError(f"{str(path)!r} exists and is not a directory; give another name")
    if is_mount_point(path):  # a directory is put there by renaming, which no system allows
        raise FormatError(f"{str(path)!r} is a mount point, which cannot be replaced; give a folder below it")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise FormatError(f"{str(path)!r} exists and is not empty; pass --overwrite to replace it")
    if not _holds_a_checkpoint(path):
        raise FormatError(f"{str(path)!r} does not look like a checkpoint, so it is not replaced; remove it yourself")


def check_apart(source: Path, destination: Path) -> None:
    """Refuse to write into, over or around the directory that is read."""
    a, b = source.resolve(), destination.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise FormatError(f"output {str(destination)!r} and input {str(source)!r} overlap; give a separate output")


def check_space(path: Path, num_bytes: int) -> None:
    """Refuse an output larger than the free space of the disk that `path` will be on."""
    path = path.resolve()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise FormatError(
            f"{str(path)!r} needs {num_bytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
            "free some space or give another output"
        )


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of `path` when the block ends well, and is removed when it does not."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path, "partial")
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, _ in os.walk(temporary):
            _sync_directory(Path(folder))
        _replace_directory(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_directory(path.parent)


@contextmanager
def unfinished_directory(path: Path, *, resume: bool) -> Iterator[Path]:
    """Where a copy to `path` is written, kept to this process for the block; no end of the block removes it.

    Args:
        resume: keep what an earlier run has left; otherwise begin with an empty directory.
    Raises:
        FormatError: another process is writing it.
    """
    temporary = unfinished(path)
    temporary.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock(descriptor, path)
        if not resume:
            _empty(temporary)
        yield temporary
    finally:
        os.close(descriptor)


@contextmanager
def becoming(path: Path, temporary: Path) -> Iterator[None]:
    """`temporary` takes the place of `path` when the block ends well; an error removes it, an interrupt keeps it."""
    path = path.resolve()
    try:
        yield
        for folder, _, _ in os.walk(temporary):
            _sync_directory(Path(folder))
        _replace_directory(temporary, path)
    except Exception:  # whatever failed, the half-written directory must go
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_directory(path.parent)


def unfinished(path: Path) -> Path:
    """Where a resumable copy to `path` is until it is whole."""
    path = path.resolve()
    return path.with_name(f".{path.name}.partial")


def is_mount_point(path: Path) -> bool:
    """Whether something is mounted at `path`, so that it cannot be renamed, nor another directory to it.

    `os.path.ismount` compares devices: it does not see a directory of the same disk that is mounted (`mount --bind`, a
    container's volume). Linux lists those too.
    """
    path = path.resolve()
    return os.path.ismount(path) or str(path) in _mounted()


def _mounted() -> set[str]:
    """Where Linux has mounted something; elsewhere nothing is known. Source: proc(5), /proc/pid/mountinfo, field 5."""
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return set()
    octal = re.compile(rb"\\([0-7]{3})")  # how a space, a tab, a line end or a backslash is written
    places = (line.split(b" ")[4] for line in lines)
    return {os.fsdecode(octal.sub(lambda found: bytes([int(found[1], 8)]), place)) for place in places}


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FormatError(f"another process is writing {str(path)!r}; wait for it or give another output") from None


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing that appears under its name, fsynced, when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path, "partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _replace_directory(new: Path, old: Path) -> None:
    """Rename `new` to `old`; what was at `old` is moved aside first and removed last."""
    if not old.exists() or not any(old.iterdir()):
        new.rename(old)
        return
    aside = _sibling(old, "replaced")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    shutil.rmtree(aside)


def _sibling(path: Path, purpose: str) -> Path:
    """A hidden name beside `path`, on the same disk, that no other process uses."""
    return path.with_name(f".{path.name}.{purpose}-{secrets.token_hex(4)}")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _holds_a_checkpoint(path: Path) -> bool:
    weights = any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
    return (path / TRACKER).is_file() or ((path / "config.json").is_file() and weights)
