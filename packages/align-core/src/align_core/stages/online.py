"""What the stages that sample begin with: the run's directory, once their data is opened and checked.

`align_core.stages.offline` is the same for stages that learn from a file.
"""

import logging
from pathlib import Path

from align_core.config import PolicyConfig
from align_core.stages.directory import Fingerprinted
from align_core.stages.preflight import reward_names
from align_core.stages.prepare import Demonstrations
from align_core.stages.rollout import Prompts
from align_core.stages.run import Run

logger = logging.getLogger(__name__)


def open_run(config: PolicyConfig, prompts: Prompts, demonstrations: Demonstrations | None) -> Run:
    """The run's directory; raises what `Run` raises, for instance when the data is not what the run began with."""
    run = Run(config, data=all_data(prompts, demonstrations), code=reward_files(config))
    if not run.finished and config.sampling_bias:
        logger.warning("%s", config.sampling_bias)
    return run


def all_data(prompts: Prompts, demonstrations: Demonstrations | None) -> dict[str, Fingerprinted]:
    """What a continued run must find again."""
    return prompts.data | ({"sft_data": demonstrations.records} if demonstrations else {})


def reward_files(config: PolicyConfig) -> list[Path]:
    """The files of rewards that are written `FILE.py:NAME`, as far as they are there."""
    files = dict.fromkeys(name.rpartition(":")[0] for name in reward_names(config))
    return [path for path in map(Path, filter(None, files)) if path.is_file()]
