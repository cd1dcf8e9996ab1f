"""Directories that appear complete or not at all: written beside their place under another name, then renamed."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align_core.errors import DataError


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `out` when the block ends and vanishes when it fails.

    Raises:
        DataError: `out` exists and is not an empty directory; nothing is ever overwritten.
    """
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"'{out}' exists already; remove it or choose another directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as box:
        staging = Path(box) / out.name  # a level below, because mkdtemp's own mode shuts out other users
        staging.mkdir()
        yield staging
        os.replace(staging, out)
