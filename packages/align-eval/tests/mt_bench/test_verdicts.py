"""Reading verdicts: every trap that published judgments and FastChat's parser hold."""

import pytest

from align_eval.mt_bench.verdicts import (
    Winner,
    compatible_rating,
    compatible_winner,
    strict_rating,
    strict_winner,
)

# judgment, what FastChat reads (None: its -1), what the strict parser reads
TRAPS = [
    ("Rating: [[8.5]]", 8.5, 8.5),
    ("Rating: [[7]]", 7.0, 7.0),
    ("[[10/10]]", None, 10.0),
    ("[[ 8 ]]", None, 8.0),
    ("[[rating: 7]]", None, 7.0),
    ('so I say "[[rating: 3]]".', None, 3.0),
    ("[[Rating: 7]]", None, 7.0),
    ("Rating: 8", None, None),
    ("Rating: [8]", 8.0, None),
    ("as in [1]. Rating: 8", 1.0, None),
    ("a[0] is ok ... Rating 9", 0.0, None),
    ("a[0] is ok. Rating: [[9]]", 9.0, 9.0),
    ("[[5]] then final [[9]]", 5.0, 9.0),
    ('The format is "[[rating]]". [[4]]', 4.0, 4.0),
    ("[[4]], in the format [[rating]]", 4.0, None),
    ("[[11]]", 11.0, None),
    ("[[0]]", 0.0, None),
    ("[[0.5]]", 0.5, None),
    ("[[-3]]", None, None),
    ("[[05]]", None, 5.0),
    ("[[05.5]]", 5.5, 5.5),
    ("[[00]]", 0.0, None),
    ("[[5.]]", 5.0, None),
    ("[[8, 9]]", None, None),
    ("[[8 out of 10]]", None, None),
    ("[[8/5]]", None, None),
    ("[[1.0]]", 1.0, 1.0),
    ("[[10.0]]", 10.0, 10.0),
    ("[[10.1]]", 10.1, None),
    ("[[nan]]", None, None),
    ("[[1e1]]", None, None),
    ("[[\u0668]]", None, None),
    ("$ERROR$", None, None),
    ("", None, None),
    ("[[]]", None, None),
    ("[[7]", 7.0, None),
    ("[7]]", 7.0, None),
    ("[[[7]]]", 7.0, 7.0),
    ("[[**7**]]", None, None),
]


@pytest.mark.parametrize(("judgment", "compatible", "strict"), TRAPS)
def test_ratings_of_traps(judgment: str, compatible: float | None, strict: float | None) -> None:
    assert compatible_rating(judgment) == compatible
    assert strict_rating(judgment) == strict


WINNERS: list[tuple[str, Winner | None, Winner | None]] = [
    ("[[A]]", "A", "A"),
    ("[[B]]", "B", "B"),
    ("[[C]]", "tie", "tie"),
    ("not [[A]] but [[B]]", "A", "B"),
    ("[[B]] is wrong, so [[A]]", "A", "A"),
    ("[[C]], no, [[B]]", "B", "B"),
    ("[[ a ]]", None, "A"),
    ("[[D]]", None, None),
    ("[[A]] or [[?]]", "A", None),
    ("[A]", None, None),
    ("A is better", None, None),
    ("$ERROR$", None, None),
]


@pytest.mark.parametrize(("judgment", "compatible", "strict"), WINNERS)
def test_winners_of_traps(judgment: str, compatible: Winner | None, strict: Winner | None) -> None:
    assert compatible_winner(judgment) == compatible
    assert strict_winner(judgment) == strict
