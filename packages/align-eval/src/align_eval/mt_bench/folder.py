"""The folder of an MT-Bench run: which file lies where. Knows nothing of what is in them.

store/                   append-only stores, what a killed run continues from
model_answer/            answers, and
model_judgment/          judgments, as FastChat writes them: give this folder to its tools as data/mt_bench
answers/, judgments/     the same with all samples, settings and counts, for the report
report.{md,json,html}
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from align_core.errors import DataError

Kind = Literal["single", "pair"]


@dataclass(frozen=True, slots=True)
class Folder:
    """Paths below `root`. A name with characters that a file name should not have gets `_` for them."""

    root: Path

    def answer_store(self, model: str) -> Path:
        """Every turn that the model ever answered."""
        return self.root / "store" / "answers" / f"{_safe(model)}.jsonl"

    def judgment_store(self, judge: str) -> Path:
        """Every verdict that the judge ever gave."""
        return self.root / "store" / "judgments" / f"{_safe(judge)}.jsonl"

    def answers(self, model: str) -> Path:
        """The model's answers in FastChat's format."""
        return self.root / "model_answer" / f"{_safe(model)}.jsonl"

    def answer_summary(self, model: str) -> Path:
        """Settings and counts of the answers."""
        return self.root / "answers" / f"{_safe(model)}.json"

    def fastchat_judgments(self, judge: str, kind: Kind) -> Path:
        """Judgments in FastChat's format."""
        return self.root / "model_judgment" / f"{_safe(judge)}_{kind}.jsonl"

    def judgments(self, judge: str, kind: Kind) -> Path:
        """Judgments with all samples."""
        return self.root / "judgments" / f"{_safe(judge)}_{kind}.jsonl"

    def judge_summary(self, judge: str, kind: Kind) -> Path:
        """Settings and counts of the judgments."""
        return self.root / "judgments" / f"{_safe(judge)}_{kind}.json"

    def converted(self) -> Path:
        """Where Megatron checkpoints are converted to."""
        return self.root / "store" / "converted"

    def answered_models(self) -> list[Path]:
        """The answer files, sorted; raises DataError when there is none."""
        found = sorted((self.root / "model_answer").glob("*.jsonl"))
        if not found:
            raise DataError(
                f"{str(self.root / 'model_answer')!r} holds no answers; run `align-eval mt-bench answer` first, or put "
                "answers of FastChat's there"
            )
        return found

    def judges(self) -> list[str]:
        """The (file) names of judges with judgments here."""
        found = sorted((self.root / "judgments").glob("*_single.json")) + sorted(
            (self.root / "judgments").glob("*_pair.json")
        )
        return list(dict.fromkeys(path.stem.rpartition("_")[0] for path in found))


def _safe(name: str) -> str:
    return re.sub(r"[^\w.+-]", "_", name)
