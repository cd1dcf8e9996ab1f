"""The settings behind the published curves are those that the recipe gives."""

from align_core.config import RewardConfig
from align_core.settings import parse


def test_recipe_gives_the_measured_settings() -> None:
    words = ["--recipe", "smollm2-gpu", "--model", "m", "--data", "d", "--out", "o", "--eval_data", "e"]
    config = parse(RewardConfig, words, stage="reward")
    assert (config.steps, config.batch_size, config.optimizer.lr, config.loss.centre_coef) == (126, 32, 5e-5, 0.01)
    assert (config.training.dtype, config.template, config.eval_every) == ("bfloat16", "human-assistant", 14)
