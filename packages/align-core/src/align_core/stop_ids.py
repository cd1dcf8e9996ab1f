"""The tokens at which engines end a completion, as a model directory names them. Reads JSON only."""

import json
from pathlib import Path

from align_core.errors import CheckpointError


def read_eos_ids(directory: Path) -> tuple[int, ...]:
    """The end-of-sequence ids, sorted: generation_config.json's, where it names any, else config.json's; or none.

    Raises:
        CheckpointError: a file that is there holds no JSON object.
    """
    for path in (directory / "generation_config.json", directory / "config.json"):
        found = read_object(path).get("eos_token_id") if path.is_file() else None
        if isinstance(found, int):
            return (found,)
        if isinstance(found, list) and found:
            return tuple(sorted(int(token) for token in found))
    return ()


def read_object(path: Path) -> dict[str, object]:
    """The JSON object in a file of a model directory; the file is there.

    Raises:
        CheckpointError: it holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{str(path)!r} must hold a JSON object, found {type(found).__name__}")
    return found
