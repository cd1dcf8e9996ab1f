"""A short name for what a model directory holds, for keys that must change when the model does."""

import hashlib
from pathlib import Path

_SAMPLED_BYTES = 2**16
_SAMPLES_A_FILE = 32
_LEFT_OUT = frozenset({".md", ".jsonl", ".log", ".partial", ".py"})  # what does not change answers


def fingerprint(directory: Path) -> str:
    """16 hexadecimal digits that change when the model does: from the names, sizes and samples of all its files.

    Each file is read at its ends and at evenly spaced places, 2 MiB in all, so that 70B weights take a second. An
    update of training moves every weight, so samples see it; a copy of the directory has the same fingerprint.
    """
    total = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if not path.is_file() or path.suffix in _LEFT_OUT or any(part.startswith(".") for part in name.parts[:-1]):
            continue
        size = path.stat().st_size
        total.update(f"{name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _SAMPLED_BYTES * _SAMPLES_A_FILE:
                total.update(file.read())
                continue
            for sample in range(_SAMPLES_A_FILE):
                file.seek((size - _SAMPLED_BYTES) * sample // (_SAMPLES_A_FILE - 1))
                total.update(file.read(_SAMPLED_BYTES))
    return total.hexdigest()[:16]
