r"""What decides whether a completion is right: graders by name, and any reward function of `align.rewards`.

    gsm8k         a number; strict wants `#### N`
    math          LaTeX, compared as text and as a number; strict wants \boxed
    math-verify   the same, and what that leaves open is decided by math-verify (the [math] extra)
    reward:NAME   the reward function NAME; a score above 0.5 is right. There is no strict form.

Knows nothing of models or files.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Protocol, cast

from align_core import registry
from align_core.contracts import RewardFunction
from align_core.errors import ConfigError, DataError, choices, unknown_name
from align_eval.accuracy import latex, math
from align_eval.accuracy.equivalence import EquivalencePool
from align_eval.accuracy.verdict import Verdict

Columns = Mapping[str, object]
"""A record of the data."""

_RIGHT = 0.5  # a reward above it counts as right; verifiable rewards are 0 or 1
_REWARD = "reward:"


class Verifier(Protocol):
    """Grades completions of checked records. A context manager, because some have processes."""

    def gold(self, record: Columns) -> str:
        """The right answer as people read it; raises DataError (without the place) if the record is unusable."""
        ...

    def grade(self, prompts: Sequence[str], completions: Sequence[str], records: Sequence[Columns]) -> list[Verdict]:
        """One verdict a completion."""
        ...

    def __enter__(self) -> "Verifier": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class _Closing:
    """What has nothing to close."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class NumberVerifier(_Closing):
    """`gsm8k`: the column `answer` is a number, or a solution that ends in `#### N`."""

    def gold(self, record: Columns) -> str:
        """The column `answer`."""
        answer = _column(record, "answer")
        if math.parse_gold(answer) is None:
            raise DataError(
                f"the answer {str(answer)[:80]!r} names no number; give a number or a solution ending in '#### N'"
            )
        return str(answer)

    def grade(self, prompts: Sequence[str], completions: Sequence[str], records: Sequence[Columns]) -> list[Verdict]:
        """By `accuracy.math`."""
        verdicts = []
        for completion, record in zip(completions, records, strict=True):
            gold = math.parse_gold(record["answer"])
            assert gold is not None  # checked by `gold`
            verdicts.append(math.grade(completion, gold))
        return verdicts

    def __enter__(self) -> "NumberVerifier":
        return self


class LatexVerifier:
    r"""`math`, `math-verify`: the column `answer` (or `solution`) is LaTeX, or a solution with \boxed."""

    def __init__(self, *, equivalence: bool) -> None:
        self._equivalence = equivalence
        self._pool: EquivalencePool | None = None
        self._stack = ExitStack()

    def gold(self, record: Columns) -> str:
        r"""The short answer: what the last \boxed holds, or the column as it stands."""
        name = "answer" if "answer" in record or "solution" not in record else "solution"
        gold = latex.gold_of(_column(record, name))
        if gold is None:
            raise DataError(f"the {name} {str(record[name])[:80]!r} is no short answer and has no \\boxed{{...}}")
        return gold

    def grade(self, prompts: Sequence[str], completions: Sequence[str], records: Sequence[Columns]) -> list[Verdict]:
        """By `accuracy.latex`."""
        return latex.grade(completions, [self.gold(record) for record in records], pool=self._pool)

    def __enter__(self) -> "LatexVerifier":
        if self._equivalence:
            self._pool = self._stack.enter_context(EquivalencePool())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool = None
        self._stack.close()


class RewardVerifier(_Closing):
    """`reward:NAME`: whatever a reward function of `align.rewards` finds right."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._reward = cast("Callable[[], RewardFunction]", registry.load("align.rewards", name))()

    def gold(self, record: Columns) -> str:
        """The column `answer` if there is one; the function itself knows what it needs."""
        return str(record.get("answer", ""))

    def grade(self, prompts: Sequence[str], completions: Sequence[str], records: Sequence[Columns]) -> list[Verdict]:
        """Raises DataError where the function could not score a completion: that is not a wrong answer."""
        names = dict.fromkeys(name for record in records for name in record)
        columns = {name: [record.get(name) for record in records] for name in names}
        verdicts = []
        for completion, score in zip(completions, self._reward(prompts, completions, columns), strict=True):
            if score.value is None:
                raise DataError(f"reward {self._name!r} could not score {completion[:80]!r}: {score.error}")
            right = score.value > _RIGHT
            verdicts.append(Verdict(strict=right, flexible=right, extracted=score.extracted, method=self._name))
        return verdicts

    def __enter__(self) -> "RewardVerifier":
        return self


def make_verifier(name: str) -> Verifier:
    """The verifier called `name`; raises ConfigError for an unknown one."""
    if name.startswith(_REWARD):
        return RewardVerifier(name.removeprefix(_REWARD))
    makers: Mapping[str, Callable[[], Verifier]] = {
        "gsm8k": NumberVerifier,
        "math": lambda: LatexVerifier(equivalence=False),
        "math-verify": lambda: LatexVerifier(equivalence=True),
    }
    if name not in makers:
        raise ConfigError(unknown_name("verifier", name, [*makers, f"{_REWARD}NAME"]))
    return makers[name]()


def _column(record: Columns, name: str) -> object:
    if name not in record:
        raise DataError(f"no {name!r}, only {choices(record)}")
    return record[name]
