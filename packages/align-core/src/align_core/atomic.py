"""Files and directories that appear whole or not at all: written beside their place, then renamed."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from align_core.errors import DataError

_MOUNTS = Path("/proc/self/mountinfo")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `out` when the block ends and vanishes when it fails.

    A symbolic link stands for the directory it points to.

    Raises:
        DataError: `out` exists and is not an empty directory, as nothing is ever overwritten; or it is a mount point.
    """
    shown, out = out, out.resolve()
    if is_mount_point(out):
        raise DataError(f"{str(shown)!r} is a mount point, which cannot be replaced; choose a directory below it")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{str(shown.absolute())!r} exists already; remove it or choose another directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as box:
        staging = Path(box) / out.name  # a level below, because mkdtemp's own mode shuts out other users
        staging.mkdir()
        yield staging
        staging.replace(out)


def replace_directory(temporary: Path, path: Path) -> None:
    """Renames `temporary` to `path`; what stood there is removed after it has been moved aside."""
    temporary.chmod(0o755)
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
        path.rename(old / path.name)
        temporary.rename(path)
        shutil.rmtree(old)
    else:
        temporary.rename(path)


@contextmanager
def new_file(out: Path) -> Iterator[IO[bytes]]:
    """A file to write, which gets its name when the block ends and vanishes when it fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a small file in one piece: readers see the old text or the new."""
    with new_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """`write_text` of `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


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
