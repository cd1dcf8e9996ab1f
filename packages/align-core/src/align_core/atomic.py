"""Files and directories that appear whole or not at all: written beside their place, then renamed."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from align_core.errors import DataError


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `out` when the block ends and vanishes when it fails.

    Raises:
        DataError: `out` exists and is not an empty directory; nothing is ever overwritten.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{str(out)!r} exists already; remove it or choose another directory")
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
