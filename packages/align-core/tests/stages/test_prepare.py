"""Which tokens may be compared with the trainer, and what a comparison within the update leads to."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from align_core.config import ClusterConfig, GrpoConfig, ScheduleConfig
from align_core.errors import SyncError
from align_core.stages.prepare import check_fused_canary, fresh_tokens
from align_core.stages.rewards import Scored
from align_core.stages.rollout import Rollout, rollout_batch
from align_core.types import Completion, Prompt


def scored(*versions: Sequence[int]) -> Scored:
    """A completion of a prompt of two tokens for each sequence of versions, one a token."""
    prompts = [Prompt(id=id, tokens=np.array([1, 2], np.int32)) for id in range(len(versions))]
    completions = [
        Completion(
            prompt_id=id,
            sample=0,
            tokens=np.full(len(own), 5, np.int32),
            logprobs=np.zeros(len(own), np.float32),
            finish_reason="stop",
            version=own[0],
            versions=np.asarray(own, np.int32) if len(set(own)) > 1 else None,
        )
        for id, own in enumerate(versions)
    ]
    rollout = Rollout(questions=[], completions=completions, batch=rollout_batch(prompts, completions))
    return Scored(rollout=rollout, rewards=np.zeros(len(versions), np.float32), parts={}, extracted=[], failures=())


def test_fresh_tokens_are_those_of_the_version() -> None:
    """Two tokens of prompt before each; of the second completion only what came after the new weights."""
    assert fresh_tokens(scored([3, 3], [2, 3, 3], [2]), 3).tolist() == [
        *(False, False, True, True),
        *(False, False, False, True, True),
        *(False, False, False),
    ]


SCHEDULES = [ScheduleConfig(), ScheduleConfig(kind="async", max_staleness=0), ScheduleConfig(kind="one_step_off")]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["sync", "async", "one_step_off"])
def test_the_updates_own_comparison_counts_where_every_token_is_fresh(
    make_config: Callable[..., GrpoConfig], schedule: ScheduleConfig
) -> None:
    config: Any = make_config(
        "grpo", old_logprobs="fused", schedule=schedule, cluster=ClusterConfig(placement="disaggregated")
    )
    for bad in (0.2, float("nan"), float("inf")):
        with pytest.raises(SyncError, match="weight version 3"):
            check_fused_canary({"canary_mean": bad}, scored([3, 3], [3]), config, version=3)
    for older in ([2, 2], [2, 3]):
        check_fused_canary({"canary_mean": 0.2}, scored(older, [3]), config, version=3)
    check_fused_canary({"canary_mean": 0.1}, scored([3, 3], [3]), config, version=3)
