"""Where a policy's rewards come from: a function of the registry, or a reward model."""

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from align_core import registry
from align_core.config import GrpoConfig, TrainerConfig
from align_core.contracts import RewardFunction
from align_core.data.records import Content, PromptRecord
from align_core.errors import ConfigError, DataError
from align_core.stages.world import World
from align_core.text import Tokenizer, load_tokenizer
from align_core.types import Batch, Completion

Reward = Callable[[Sequence[PromptRecord], Sequence[Completion], Batch], NDArray[np.float32]]
"""(the record of each completion, the completions, both as token sequences) -> float32 [B]"""


def make_reward(config: GrpoConfig, world: World, tokenizer: Tokenizer) -> Reward:
    """The reward that `config.reward` names; `model` loads the reward model beside the policy."""
    if config.reward != "model":
        factory = cast("Callable[[], RewardFunction]", registry.load("align.rewards", config.reward))
        return _from_function(factory(), config.reward, tokenizer)
    if config.reward_model and not load_tokenizer(config.reward_model).same_vocabulary(tokenizer):
        raise ConfigError(
            f"the reward model {str(config.reward_model)!r} numbers its tokens otherwise than {str(config.model)!r}; "
            "a reward model must share the policy's tokenizer"
        )
    model = world.trainer(
        TrainerConfig.of_stage(
            config,
            model=config.reward_model,
            head="score",
            trainable=False,
            parallel=config.reward_model_parallel,
        )
    )
    return lambda _records, _completions, batch: model.scores(batch)


def _from_function(function: RewardFunction, name: str, tokenizer: Tokenizer) -> Reward:
    def reward(
        records: Sequence[PromptRecord], completions: Sequence[Completion], _batch: Batch
    ) -> NDArray[np.float32]:
        keys = dict.fromkeys(key for record in records for key in record.columns)
        columns = {key: [record.columns.get(key) for record in records] for key in keys}
        texts = [tokenizer.decode(completion.tokens) for completion in completions]
        scores = function([_words(record.prompt) for record in records], texts, columns)
        if len(scores) != len(texts):
            raise DataError(f"reward {name!r} gave {len(scores)} scores for {len(texts)} completions")
        for record, text, score in zip(records, texts, scores):
            if score.value is None:
                raise DataError(
                    f"reward {name!r} could not score {text!r} for the prompt {_words(record.prompt)!r}: {score.error}"
                )
        return np.asarray([score.value for score in scores], dtype=np.float32)

    return reward


def _words(content: Content) -> str:
    return content if isinstance(content, str) else content[-1]["content"]
