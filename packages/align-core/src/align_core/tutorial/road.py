"""Which commands make up the road: from a Hugging Face directory to models, accuracies and curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align_core.tutorial.walk import Step

# A reward model can be fooled, a verifiable reward cannot: the pull to the SFT model keeps the policy where the reward
# model has seen answers. Without it the tiny policy finds wrong sums that the reward model likes better.
_REWARD_MODEL_KL = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class Road:
    """What distinguishes one walk from another."""

    recipe: str
    """Recipe of every stage, and name of the model."""
    out: Path
    """Directory of the whole walk."""
    seed: int
    """Seed of data, initial weights, order and sampling."""
    tensor: int
    """Tensor parallel size of the Megatron checkpoint that the walk starts from, and of training."""
    steps: int | None
    """Updates of every stage; None keeps the recipe's."""
    limit: int | None
    """Held-out questions to evaluate on; None takes all."""
    max_tokens: int
    """Most new tokens of an answer in the evaluation."""
    context: int
    """Longest prompt plus answer in the evaluation."""
    dtype: str
    """Precision of training and generation."""
    make_model: tuple[str, ...]
    """Command that makes the Hugging Face directory."""
    make_data: tuple[str, ...]
    """Command that writes the data files."""
    reward_data: str
    """Which of them the reward model learns from: `ratings`, or `preferences` where there are only pairs."""

    @property
    def start(self) -> Path:
        """The Hugging Face directory that the walk starts from."""
        return self.out / "hf" / "start"

    @property
    def trained(self) -> tuple[str, ...]:
        """Its stages whose result is a language model; SmolLM2's walk is long enough without PPO and online DPO."""
        return TRAINED if self.recipe == "tiny" else tuple(name for name in TRAINED if name not in _TINY_ONLY)

    @property
    def data(self) -> Path:
        """The directory of the data files."""
        return self.out / "data"


TRAINED = ("sft", "rlhf", "online_dpo", "grpo", "grpo_reward_model", "dpo")
"""Stages whose result is a language model, in the order of the report."""
_TINY_ONLY = ("rlhf", "online_dpo")


def steps_of(road: Road) -> list[Step]:
    """Every command, in order."""
    out = road.out
    return [
        Step(name="model", title="Make the model", argv=road.make_model, done=road.start / "config.json"),
        Step(name="data", title="Write the data", argv=road.make_data, done=road.data / "test.jsonl"),
        Step(
            name="to-megatron",
            title=f"Convert to Megatron, tensor parallel {road.tensor}",
            argv=("align-convert", "to-megatron", str(road.start), str(out / "megatron"), "--tp", str(road.tensor)),
            done=out / "megatron" / "latest_checkpointed_iteration.txt",
        ),
        _stage(road, "sft", "sft", "Supervised fine-tuning", model=out / "megatron", data="sft"),
        _stage(
            road,
            "reward",
            "reward",
            "Reward model",
            model=_model(road, "sft"),
            data=road.reward_data,
            extra=("--eval_data", str(road.data / "test_preferences.jsonl")),
        ),
        *(_policy(road, name) for name in road.trained if name in _POLICIES),
        _stage(road, "dpo", "dpo", "DPO", model=_model(road, "sft"), data="preferences"),
        *(
            Step(
                name=f"to-hf-{name}",
                title=f"Convert {name} to Hugging Face",
                argv=("align-convert", "to-hf", str(_model(road, name)), str(out / "hf" / name)),
                done=out / "hf" / name / "config.json",
            )
            for name in road.trained
        ),
        Step(
            name="accuracy",
            title="Accuracy on held-out questions",
            argv=_accuracy(road),
            done=out / "accuracy" / "accuracy.json",
        ),
    ]


# Stage, its title, and what it is told besides; with the reward model, held-out answers are graded by the right sums.
_POLICIES = {
    "rlhf": ("rlhf", "RLHF (PPO), reward model", ("--steps", "20")),
    "online_dpo": ("online-dpo", "Online DPO, reward model", ("--steps", "20")),
    "grpo": ("grpo", "GRPO, verifiable reward", ()),
    "grpo_reward_model": ("grpo", "GRPO, reward model", ("--loss.kl_coef", str(_REWARD_MODEL_KL))),
}


def _policy(road: Road, name: str) -> Step:
    """A stage that samples; all but the one with the verifiable reward learn from the reward model."""
    command, title, words = _POLICIES[name]
    extra = ("--eval_data", str(road.data / "test.jsonl"), *(words if road.steps is None or command == "grpo" else ()))
    if name != "grpo":
        extra += ("--reward", "model", "--eval_reward", "math", "--reward_model", str(_model(road, "reward")))
    if name == "rlhf":
        extra += ("--value_parallel.tensor", str(road.tensor))
    return _stage(road, name, command, title, model=_model(road, "sft"), data="prompts", extra=extra)


def _model(road: Road, stage: str) -> Path:
    return road.out / stage / "model"


def _stage(
    road: Road, name: str, command: str, title: str, *, model: Path, data: str, extra: Sequence[str] = ()
) -> Step:
    out = road.out / name
    words = ["align", command, "--recipe", road.recipe, "--model", str(model)]
    words += ["--data", str(road.data / f"{data}.jsonl"), "--out", str(out), "--seed", str(road.seed)]
    words += ["--parallel.tensor", str(road.tensor), "--training.dtype", road.dtype]
    if name in _POLICIES:
        words += ["--engine.dtype", road.dtype, "--reward_model_parallel.tensor", str(road.tensor)]
    if road.steps is not None:
        words += ["--steps", str(road.steps), "--optimizer.warmup_steps", str(road.steps // 10)]
        if command == "rlhf":
            warmup = ["--value_optimizer.warmup_steps", "--value_warmup"]
            words += [word for name in warmup for word in (name, str(road.steps // 10))]
    return Step(name=name, title=title, argv=(*words, *extra), done=out / "result.json")


def _accuracy(road: Road) -> tuple[str, ...]:
    models = [word for name in ("start", *road.trained) for word in ("--model", str(road.out / "hf" / name))]
    limit = ["--limit", str(road.limit)] if road.limit is not None else []
    return (
        *("align-eval", "accuracy", *models, "--data", str(road.data / "test.jsonl")),
        *("--out", str(road.out / "accuracy"), "--max_tokens", str(road.max_tokens)),
        *("--context", str(road.context), "--dtype", road.dtype, "--kv_cache_mib", "400", "--enforce_eager", *limit),
    )
