"""What the encoding of a data set came to: how many records and tokens, and what did not fit."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from align_core.data.examples import Cut, Example


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """Counts over the records that were encoded."""

    records: int
    """Records encoded."""
    whole: int
    """Records that there are."""
    sequences: int
    tokens: int
    """Of all sequences."""
    learnt: int
    """Tokens that the assistant says."""
    longest: int
    """Tokens of the longest sequence."""
    cut: Mapping[Cut, int]
    """Records of which something was left out, by what it was; a record may count several times."""
    records_cut: int
    """Records of which anything was left out."""


def tally(encoded: Iterable[Sequence[Example]], *, whole: int) -> Tally:
    """Counts while `encoded` is gone through; nothing of it is kept.

    Args:
        encoded: the sequences of each record.
        whole: records that there are, of which `encoded` may be the first ones.
    """
    records = sequences = tokens = learnt = longest = records_cut = 0
    cut: Counter[Cut] = Counter()
    for examples in encoded:
        lengths = [len(example.tokens) for example in examples]
        records += 1
        sequences += len(examples)
        tokens += sum(lengths)
        learnt += sum(int(example.mask.sum()) for example in examples)
        longest = max([longest, *lengths])
        left_out = frozenset[Cut]().union(*(example.cut for example in examples))
        records_cut += bool(left_out)
        cut.update(left_out)
    return Tally(
        records=records,
        whole=whole,
        sequences=sequences,
        tokens=tokens,
        learnt=learnt,
        longest=longest,
        cut=cut,
        records_cut=records_cut,
    )
