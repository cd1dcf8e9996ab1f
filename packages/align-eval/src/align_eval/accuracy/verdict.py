"""What a verifier says about one completion. Knows nothing of how it came to it."""

from typing import NamedTuple


class Verdict(NamedTuple):
    """Right or wrong by strict and by flexible grading, and what was read as the answer."""

    strict: bool
    """Right, and given in the form that the task asks for (`#### N` in GSM8K, `\\boxed{}` in MATH)."""
    flexible: bool
    """Right, wherever in the text the answer was found."""
    extracted: str
    """The words that were read as the answer; empty when there were none."""
    method: str
    """The rule that found them, for example `hash`, `boxed`, `answer is`, `last number` or `none`."""
    note: str = ""
    """What a person should know about this verdict, for example that the comparison ran out of time."""
