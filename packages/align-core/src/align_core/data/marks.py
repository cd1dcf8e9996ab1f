"""Pairs of responses as single responses that are marked as wanted or not."""

from collections.abc import Iterable, Mapping

Row = Mapping[str, object]


def marked_rows(pairs: Iterable[Row]) -> list[Row]:
    """Two rows a pair: what was chosen, then what was rejected."""
    return [
        {"prompt": row["prompt"], "response": row[key], "label": key == "chosen"}
        for row in pairs
        for key in ("chosen", "rejected")
    ]
