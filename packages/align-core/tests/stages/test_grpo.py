"""GRPO: what it asks of the engine, what it hands to the trainer, and what makes it stop."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_core.config import EngineConfig, GrpoConfig, GrpoLoss, OptimizerConfig, SamplingConfig
from align_core.data.order import indices_of_step
from align_core.errors import DataError, SyncError
from align_core.stages.grpo import run_grpo
from align_core.stages.rollout import rollout_batch
from align_core.stages.run import read_metrics
from align_core.text import load_tokenizer
from align_core.types import Completion, Prompt

pytestmark = pytest.mark.usefixtures("length")


def completion(prompt_id: int, tokens: list[int], logprobs: list[float]) -> Completion:
    return Completion(
        prompt_id=prompt_id,
        sample=0,
        tokens=np.array(tokens, np.int32),
        logprobs=np.array(logprobs, np.float32),
        finish_reason="length",
        version=0,
    )


def test_rollout_batch_by_hand() -> None:
    """Equal prompts with different ids stay two groups; the mask is on the sampled tokens."""
    prompts = [Prompt(id=7, tokens=np.array([1, 2], np.int32)), Prompt(id=9, tokens=np.array([1, 2], np.int32))]
    batch = rollout_batch(prompts, [completion(7, [3], [-0.5]), completion(9, [4, 5], [-1.0, -2.0])])
    assert batch.tokens.tolist() == [1, 2, 3, 1, 2, 4, 5]
    assert batch.mask.tolist() == [False, False, True, False, False, True, True]
    assert batch.token_column("engine_logprobs").tolist() == [0, 0, -0.5, 0, 0, -1, -2]
    assert batch.sequence_column("group").tolist() == [7, 9]


def test_engine_is_asked_with_the_weights_and_prompts_of_each_step(
    make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any]
) -> None:
    config, world = make_config("grpo", sampling=SamplingConfig(n=3, max_tokens=5, seed=11)), fake_world()
    run_grpo(config, world)
    (engine,) = world.engines
    tokenizer = load_tokenizer(config.model)
    assert [{c.version for c in answer} for answer in engine.answered] == [{step} for step in range(6)]
    for step, (prompts, sampling) in enumerate(engine.asked):
        chosen = indices_of_step(step, records=10, batch_size=4, seed=3)
        assert [p.id for p in prompts] == [4 * step + k for k in range(4)]
        texts = [tokenizer.decode(p.tokens) for p in prompts]
        assert texts == [f"\n\nHuman: What is {n}?\n\nAssistant:" for n in chosen]
        assert (sampling.n, sampling.max_tokens, sampling.seed) == (3, 5, 11 + 3)


def test_trainer_gets_the_engines_own_tokens_in_groups_by_prompt_id(
    make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any]
) -> None:
    world = fake_world()
    run_grpo(make_config("grpo"), world)
    for step, (batch, answer) in enumerate(zip(world.trainers[0].seen, world.engines[0].answered, strict=True)):
        assert batch.tokens[batch.mask].tolist() == [token for c in answer for token in c.tokens.tolist()]
        assert batch.sequence_column("group").tolist() == [4 * step + k for k in range(4) for _ in range(3)]
        np.testing.assert_allclose(
            batch.token_column("old_logprobs")[batch.mask], np.concatenate([c.logprobs for c in answer]), atol=1e-5
        )


def test_same_prompt_drawn_twice_is_two_groups(
    tmp_path: Path, make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any]
) -> None:
    data = tmp_path / "twins.jsonl"
    data.write_text('{"prompt": "1"}\n' * 2, encoding="utf-8")
    world = fake_world()
    run_grpo(make_config("grpo", data=data, batch_size=2, steps=1), world)
    (batch,) = world.trainers[0].seen
    assert batch.sequence_column("group").tolist() == [0, 0, 0, 1, 1, 1]
    tokens = [c.tokens.tolist() for c in world.engines[0].answered[0]]
    assert tokens[:3] != tokens[3:]


def test_reward_sees_texts_and_columns_of_each_completion(
    make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any], length: Any
) -> None:
    config, world = make_config("grpo", steps=1), fake_world()
    run_grpo(config, world)
    ((prompts, texts, columns),) = length.last.calls
    chosen = indices_of_step(0, records=10, batch_size=4, seed=3)
    assert prompts == [f"What is {n}?" for n in chosen for _ in range(3)]
    assert columns == {"answer": [str(n) for n in chosen for _ in range(3)]}
    (batch,) = world.trainers[0].seen
    assert batch.sequence_column("reward").tolist() == [float(len(text)) for text in texts]
    (line,) = read_metrics(config.out)
    assert line["reward"] == pytest.approx(np.mean([len(text) for text in texts]))


def test_metrics_of_a_step_by_hand(
    make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any], length: Any
) -> None:
    config, world = make_config("grpo", steps=1), fake_world()
    run_grpo(config, world)
    rewards = np.array([len(text) for text in length.last.calls[0][1]], float).reshape(4, 3)
    answer = world.engines[0].answered[0]
    (line,) = read_metrics(config.out)
    assert line["reward_std"] == pytest.approx(rewards.std())
    assert line["tied_groups"] == np.mean([len(set(group)) == 1 for group in rewards.tolist()])
    assert line["length"] == np.mean([len(c.tokens) for c in answer])
    assert line["truncated"] == np.mean([c.finish_reason == "length" for c in answer])
    assert line["canary_mean"] <= line["canary_p99"] <= line["canary_max"] < 1e-5
    assert {f"seconds_{phase}" for phase in ("sync", "generate", "score", "logprobs", "train")} <= line.keys()


def test_policy_learns_to_earn_more(make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any]) -> None:
    config = make_config("grpo", steps=40, optimizer=OptimizerConfig(lr=10.0, schedule="linear"))
    run_grpo(config, fake_world())
    rewards = [line["reward"] for line in read_metrics(config.out)]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 1


def test_reference_is_made_and_scored_only_with_a_kl_term(
    make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any]
) -> None:
    without, with_kl = fake_world(), fake_world()
    run_grpo(make_config("grpo", out="without"), without)
    run_grpo(make_config("grpo", out="with", loss=GrpoLoss(kl_coef=0.1)), with_kl)
    assert len(without.trainers) == 1
    assert "reference_logprobs" not in without.trainers[0].seen[0].token_columns
    policy, reference = with_kl.trainers
    assert (policy.config.trainable, reference.config.trainable) == (True, False)
    untrained = fake_world().trainer(policy.config)
    for batch in policy.seen:
        np.testing.assert_array_equal(batch.token_column("reference_logprobs"), untrained.logprobs(batch))


def test_updates_of_a_rollout_share_its_prompts_and_its_old_logprobs(
    make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any]
) -> None:
    config, world = make_config("grpo", updates_per_rollout=2), fake_world()
    run_grpo(config, world)
    (trainer,) = world.trainers
    assert trainer.config.steps == 12  # updates, for the learning-rate schedule
    assert len(trainer.seen) == 12
    assert trainer.seen[0].sequence_column("group").tolist() == [0, 0, 0, 1, 1, 1]
    assert trainer.seen[1].sequence_column("group").tolist() == [2, 2, 2, 3, 3, 3]
    untrained = fake_world().trainer(trainer.config)
    second = trainer.seen[1]  # scored before the first update, not between the two
    np.testing.assert_array_equal(second.token_column("old_logprobs"), untrained.logprobs(second))
    lines = read_metrics(config.out)
    assert lines[0]["lr"] == pytest.approx((1 + 11 / 12) / 2)


def test_reward_model_scores_whole_sequences(
    tiny_model: Path, make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any]
) -> None:
    world = fake_world()
    run_grpo(make_config("grpo", steps=1, reward="model", reward_model=tiny_model), world)
    model, policy = world.trainers
    assert (model.config.head, model.config.trainable, model.config.model) == ("score", False, tiny_model)
    (batch,) = policy.seen
    assert world.operations.index("scores") < world.operations.index("step")
    assert batch.sequence_column("reward").tolist() == model.scores(batch).tolist()


def test_reward_model_of_another_tokenizer_is_refused(
    chat_model: Path, make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any]
) -> None:
    world = fake_world()
    with pytest.raises(Exception, match="must share the policy's tokenizer"):
        run_grpo(make_config("grpo", reward="model", reward_model=chat_model), world)
    assert world.trainers == []


def test_canary_beyond_the_threshold_stops_before_the_update(
    make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any]
) -> None:
    world = fake_world(lie=lambda c: replace(c, logprobs=c.logprobs - np.float32(0.2)))
    with pytest.raises(SyncError, match=r"weight version 0: mean 0.2, .* allowed mean 0.1"):
        run_grpo(make_config("grpo"), world)
    assert "step" not in world.operations
    run_grpo(make_config("grpo", canary_threshold=0.3), fake_world(lie=world.lie))


def test_engine_that_sampled_with_old_weights_stops_the_run(
    make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any]
) -> None:
    with pytest.raises(SyncError, match=r"sampled with weight versions \[0\] after version 1 was committed"):
        run_grpo(make_config("grpo"), fake_world(lie=lambda c: replace(c, version=0)))


def test_damaged_weights_stop_the_run(make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any]) -> None:
    with pytest.raises(SyncError, match="'bias'"):
        run_grpo(make_config("grpo"), fake_world(damages_weights=True))


def test_completion_that_cannot_be_scored_stops_with_the_reason(
    make_config: Callable[..., GrpoConfig],
    fake_world: Callable[..., Any],
    length: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(length, "forbidden", "")
    world = fake_world()
    with pytest.raises(
        DataError, match=r"reward 'length' could not score a reply: a forbidden text; .* the prompt 'What is \d\?'"
    ):
        run_grpo(make_config("grpo"), world)
    assert "step" not in world.operations


def test_unknown_reward_is_found_before_anything_starts(
    make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any]
) -> None:
    world = fake_world()
    with pytest.raises(Exception, match=r"unknown reward 'lenght'; did you mean 'length'\?"):
        run_grpo(make_config("grpo", reward="lenght"), world)
    assert world.trainers == []


def test_prompts_leave_room_for_the_answer(
    tmp_path: Path, make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any]
) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} + " * 60 + "1?"}) + "\n" for n in range(4)), encoding="utf-8")
    config, world = make_config("grpo", data=data, steps=1, engine=EngineConfig(name="fake", context=40)), fake_world()
    run_grpo(config, world)
    tokenizer = load_tokenizer(config.model)
    for prompt in world.engines[0].asked[0][0]:
        assert 30 <= len(prompt.tokens) <= 35
        assert tokenizer.decode(prompt.tokens).endswith("1?\n\nAssistant:")
    with pytest.raises(DataError, match=r"max_tokens 5 leaves no room .* max_length 64 and engine.context 5; lower it"):
        run_grpo(make_config("grpo", out="other", engine=EngineConfig(name="fake", context=5)), fake_world())


def test_evaluation_is_greedy_on_the_held_out_prompts_by_the_weights_of_its_step(
    tmp_path: Path, make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any], length: Any
) -> None:
    """Every 4 of 6 steps: before steps 0 and 4, and by the finished model, whose weights are version 6."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "1 + 1"}\n{"prompt": "2 + 2"}\n', encoding="utf-8")
    config, world = make_config("grpo", eval_data=held_out, eval_every=4), fake_world()
    run_grpo(config, world)
    engine = world.engines[0]
    evaluations = [i for i, (_, sampling) in enumerate(engine.asked) if sampling.temperature == 0]
    assert evaluations == [0, 5, 8]
    assert [engine.answered[i][0].version for i in evaluations] == [0, 4, 6]
    trained = {p.id for i, (prompts, _) in enumerate(engine.asked) if i not in evaluations for p in prompts}
    for i in evaluations:
        prompts, sampling = engine.asked[i]
        assert sampling.n == 1
        assert len(prompts) == 2
        assert not {p.id for p in prompts} & trained
    means = [float(np.mean([len(text) for text in length.last.calls[i][1]])) for i in evaluations]
    lines = read_metrics(config.out)
    assert [line["eval_reward"] for line in lines if "eval_reward" in line] == means[:2]
    assert [line["step"] for line in lines if "eval_reward" in line] == [0, 4]
    result = json.loads((config.out / "result.json").read_text())
    assert result["eval_reward"] == means[2]
    assert result["reward_function"] == config.reward  # not `reward`, the name of a metric
    assert not set(result) & set(read_metrics(config.out)[0]) - {"eval_reward"}


def test_evaluation_changes_nothing_in_training(
    make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any]
) -> None:
    plain = make_config("grpo", out="plain")
    evaluated = make_config("grpo", out="evaluated", eval_data=plain.data, eval_every=1)
    for config in (plain, evaluated):
        run_grpo(config, fake_world())
    for left, right in zip(read_metrics(plain.out), read_metrics(evaluated.out), strict=True):
        assert (left["reward"], left["loss"]) == (right["reward"], right["loss"])
    assert "eval_reward" not in json.loads((plain.out / "result.json").read_text())


def test_without_held_out_prompts_the_finished_weights_are_not_sent(
    make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any]
) -> None:
    world = fake_world()
    run_grpo(make_config("grpo"), world)
    assert world.engines[0].weight_sink().version == 5
