"""An interrupted job continues: what the journal holds is not asked for again, and nothing is lost or doubled."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from align_core.config import SamplingConfig
from align_core.errors import ConfigError, DataError
from align_core.types import Completion, Prompt
from align_rollout.fake import FakeEngine
from align_rollout.jobs import Journal, complete, read_records

_SAMPLING = SamplingConfig(n=2, max_tokens=5, seed=3)
_PROMPTS = [Prompt(id=i, tokens=np.array([i], np.int32)) for i in range(6)]


def engine() -> FakeEngine:
    table = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    return FakeEngine(weights={"bigram.weight": table, "bias": np.zeros(8, np.float32)})


def keys(completions: list[Completion]) -> list[tuple[int, int, list[int]]]:
    return [(c.prompt_id, c.sample, c.tokens.tolist()) for c in completions]


def run(out: Path) -> list[Completion]:
    journal = Journal(out, {"seed": 3})
    try:
        return complete(engine(), _PROMPTS, _SAMPLING, journal, at_once=4, console=Console(quiet=True))
    finally:
        journal.close()


def test_what_an_interrupted_job_had_is_kept(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole.jsonl")
    journal = Journal(tmp_path / "out.jsonl", {"seed": 3})
    journal.add([whole[0], whole[5], whole[6]])
    journal.close()
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text(partial.read_text() + '{"prompt": 5, "sam')  # cut off by the crash
    asked: list[int] = []
    fake = engine()
    submit = fake.submit
    fake.submit = lambda prompts, sampling: (asked.extend(p.id for p in prompts), submit(prompts, sampling))[1]  # type: ignore[method-assign]
    continued = Journal(tmp_path / "out.jsonl", {"seed": 3})
    found = complete(fake, _PROMPTS, _SAMPLING, continued, at_once=4, console=Console(quiet=True))
    assert keys(found) == keys(whole)
    assert asked == [0, 1, 2, 3, 4, 5]
    continued.remove()
    assert not partial.exists()


def test_finished_prompts_are_not_asked_again(tmp_path: Path) -> None:
    whole = run(tmp_path / "out.jsonl")
    assert keys(run(tmp_path / "out.jsonl")) == keys(whole)


def test_a_job_with_other_settings_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="other settings"):
        Journal(tmp_path / "out.jsonl", {"seed": 4})


@pytest.mark.parametrize("left", ["", '{"seed"'])
def test_a_journal_that_a_crash_cut_at_its_beginning_counts_as_none(tmp_path: Path, left: str) -> None:
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text(left)
    journal = Journal(tmp_path / "out.jsonl", {"seed": 3})
    assert journal.found == []
    assert partial.read_text() == '{"seed": 3}\n'
    journal.close()


def test_a_journal_is_written_by_one_job_at_a_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out.jsonl", {"seed": 3})
    with pytest.raises(ConfigError, match="in use by another process"):
        Journal(tmp_path / "out.jsonl", {"seed": 3})
    journal.close()
    Journal(tmp_path / "out.jsonl", {"seed": 3}).close()


def test_prompts_that_are_not_utf8_are_told_with_their_line(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:2: not JSON \('utf-8' codec"):
        read_records(prompts)
