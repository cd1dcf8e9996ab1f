"""Reads a judge's verdict out of its words: strictly, or as FastChat does. Text in, value out.

Strict: the last `[[x]]` counts (a judge that quotes the format or corrects itself says its verdict last), x must be a
number from 1 to 10, and nothing else will do: no verdict is better than a wrong one. Compatible: what FastChat's
llm_judge reads, kept only to reproduce its figures. It takes the first `[[x]]`, then the first `[x]` of any kind
(an index `a[0]`, a citation `[1]`), checks no range, and turns everything else into -1.
"""

import re
from collections.abc import Callable
from typing import Literal

Winner = Literal["A", "B", "tie"]
ReadRating = Callable[[str], float | None]
ReadWinner = Callable[[str], Winner | None]

LOWEST, HIGHEST = 1.0, 10.0
_BRACKETS = re.compile(r"\[\[([^\[\]]*)\]\]")
_RATING = re.compile(r"\s*(?:rating\s*:\s*)?([0-9]+(?:\.[0-9]+)?)\s*(?:/\s*10\s*)?", re.IGNORECASE)
_FASTCHAT = (re.compile(r"\[\[(\d+\.?\d*)\]\]", re.ASCII), re.compile(r"\[(\d+\.?\d*)\]", re.ASCII))
_WINNERS: dict[str, Winner] = {"A": "A", "B": "B", "C": "tie"}


def strict_rating(judgment: str) -> float | None:
    """The rating in the last `[[x]]`, from 1 to 10; None when there is none.

    `[[8.5]]`, `[[ 8 ]]`, `[[8/10]]` and `[[rating: 8]]` are ratings; `[[11]]`, `[[0]]`, `[[rating]]`, `[8]` and
    "Rating: 8" are not. Where the last brackets hold no rating, there is none: what stands before them is not guessed.
    """
    marks = _BRACKETS.findall(judgment)
    if not marks:
        return None
    match = _RATING.fullmatch(marks[-1])
    if match is None:
        return None
    value = float(match.group(1))
    return value if LOWEST <= value <= HIGHEST else None


def strict_winner(judgment: str) -> Winner | None:
    """The verdict in the last `[[x]]`: A, B or C (a tie); None when it is anything else."""
    marks = _BRACKETS.findall(judgment)
    return _WINNERS.get(marks[-1].strip().upper()) if marks else None


def compatible_rating(judgment: str) -> float | None:
    """The rating that FastChat's parser reads; None stands for its -1.

    One case differs: `[[05]]` (and a digit outside ASCII) ends FastChat's worker with a SyntaxError; here it is no
    rating.
    """
    for pattern in _FASTCHAT:
        match = pattern.search(judgment)
        if match:
            text = match.group(1)
            # FastChat evaluates the text as Python, which knows no integer with a leading zero (but knows 05.5 and 00).
            leading_zero = text.isdigit() and text[0] == "0" and text.strip("0") != ""
            return None if leading_zero else float(text)
    return None


def compatible_winner(judgment: str) -> Winner | None:
    """The winner that FastChat's parser reads: A if `[[A]]` occurs anywhere, else B, else C; None for its `error`."""
    return next((winner for mark, winner in _WINNERS.items() if f"[[{mark}]]" in judgment), None)
