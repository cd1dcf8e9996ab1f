"""Schedules: with which weights each step's completions were sampled, in which order, and what survives a crash.

Weights are stood for by one number, the version: `send` gives the engine version k before step k.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_core.config import ClusterConfig, EngineConfig, GrpoConfig, SamplingConfig, ScheduleConfig
from align_core.contracts import RolloutEngine, SupportsAsyncGenerate, SupportsPartial, WeightSink
from align_core.errors import CheckpointError, ConfigError
from align_core.stages.carried import from_text, to_text
from align_core.stages.clock import Clock
from align_core.stages.rollout import Prompts, Rollout
from align_core.stages.schedule import open_schedule
from align_core.types import Completion, Prompt

pytestmark = pytest.mark.usefixtures("length")
STEPS, SIZE, N = 6, 4, 3


class BackgroundEngine:
    """Samples "tokens" that say by which version; ends requests in a random order, some only after many weights."""

    def __init__(self, *, seed: int = 0, in_flight: str = "drain", slow: Sequence[int] = ()) -> None:
        self.version = 0
        self.submitted: list[tuple[int, int]] = []
        """(prompt id, version then)"""
        self.seed_ids: dict[int, int | None] = {}
        self._rng = np.random.default_rng(seed)
        self._in_flight, self._slow = in_flight, set(slow)
        self._under_way: list[dict[str, Any]] = []
        self._done: list[Completion] = []

    def commit(self, version: int) -> None:
        if self._in_flight == "drain":
            self._done += [self._end(one) for one in self._under_way]
            self._under_way = []
        if self._in_flight == "abort":
            self._done += [self._end(one, "abort") for one in self._under_way]
            self._under_way = []
        self._grow()
        self.version = version

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> None:
        twins = {one["id"] for one in self._under_way} & {prompt.id for prompt in prompts}
        assert not twins, f"prompt ids {twins} are under way already"
        self.submitted += [(prompt.id, self.version) for prompt in prompts]
        self.seed_ids |= {prompt.id: prompt.seed_id for prompt in prompts}
        self._under_way += [
            {"id": prompt.id, "sample": sample, "versions": [self.version]}
            for prompt in prompts
            for sample in range(sampling.n)
        ]

    def partial(self) -> list[Completion]:
        return [self._end(one, "abort") for one in self._under_way]

    def submit_begun(self, prompts: Sequence[Prompt], sampling: SamplingConfig, begun: Sequence[Completion]) -> None:
        self.submit(prompts, sampling)
        for completion in begun:
            (one,) = (o for o in self._under_way if (o["id"], o["sample"]) == (completion.prompt_id, completion.sample))
            one["versions"] = [*completion.token_versions.tolist(), self.version]
            if completion.finish_reason != "abort":
                self._under_way.remove(one)

    def poll(self, timeout_s: float | None = None) -> list[Completion]:
        if timeout_s == 0.0:
            found, self._done = self._done, []
            return found
        self._grow()
        others = [one for one in self._under_way if one["id"] not in self._slow]
        for one in self._rng.permutation(np.asarray(others or self._under_way, dtype=object))[:2]:
            self._under_way.remove(one)
            self._done.append(self._end(one))
        found, self._done = self._done, []
        return found

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        return [
            self._end({"id": prompt.id, "sample": sample, "versions": [self.version]})
            for prompt in prompts
            for sample in range(sampling.n)
        ]

    def abort(self, prompt_ids: Sequence[int] | None = None) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def weight_sink(self) -> WeightSink:
        raise NotImplementedError

    def close(self) -> None: ...

    def _grow(self) -> None:
        for one in self._under_way:
            one["versions"].append(self.version)

    def _end(self, one: Mapping[str, Any], reason: Any = "stop") -> Completion:
        versions = np.asarray(one["versions"], np.int32)
        return Completion(
            prompt_id=one["id"],
            sample=one["sample"],
            tokens=np.arange(len(versions), dtype=np.int32) + 1000 * one["sample"],
            logprobs=-versions.astype(np.float32),
            finish_reason=reason,
            version=int(versions[0]),
            versions=versions if len(set(versions.tolist())) > 1 else None,
        )


_conforms: type[SupportsAsyncGenerate] = BackgroundEngine
_is_saved: type[SupportsPartial] = BackgroundEngine
_engine: type[RolloutEngine] = BackgroundEngine


@pytest.fixture
def make(make_config: Callable[..., GrpoConfig]) -> Callable[..., tuple[GrpoConfig, Prompts]]:
    def make(
        kind: str, staleness: int = 1, *, steps: int = STEPS, in_flight: Any = "drain"
    ) -> tuple[GrpoConfig, Prompts]:
        config = make_config(
            "grpo",
            steps=steps,
            batch_size=SIZE,
            sampling=SamplingConfig(n=N, max_tokens=5),
            schedule=ScheduleConfig(kind=kind, max_staleness=staleness),  # type: ignore[arg-type]
            cluster=ClusterConfig(placement="disaggregated"),
            engine=EngineConfig(name="fake", context=64, in_flight=in_flight),
        )
        return config, Prompts(config)

    return make


def run(config: GrpoConfig, prompts: Prompts, engine: BackgroundEngine, *, save_at: int | None = None) -> list[Rollout]:
    """All steps' rollouts; before step `save_at` a new schedule and engine continue from the old one's state."""
    schedule, rollouts = open_schedule(config, engine, prompts), []
    for step in range(config.steps):
        if step == save_at:
            state = json.loads(json.dumps(dict(schedule.state())))

            engine = BackgroundEngine(seed=99, in_flight=engine._in_flight)
            schedule = open_schedule(config, engine, prompts)
            schedule.restore({"step": str(step), **state})
        rollouts.append(schedule.rollout(step, lambda _: engine.commit(step), Clock()))  # noqa: B023  (called at once)

    return rollouts


def ids(rollout: Rollout) -> list[int]:
    return [completion.prompt_id for completion in rollout.completions]


def oldest(rollout: Rollout) -> int:
    return min(int(completion.token_versions.min()) for completion in rollout.completions)


def check_whole(rollouts: Sequence[Rollout], config: GrpoConfig) -> None:
    """Each prompt of the run once, its samples side by side, whole batches."""
    taken = [id for rollout in rollouts for id in ids(rollout)]
    assert sorted(taken) == sorted(list(range(config.steps * SIZE)) * N)
    for rollout in rollouts:
        assert ids(rollout) == sorted(ids(rollout)) and len(ids(rollout)) == SIZE * N
        assert [completion.sample for completion in rollout.completions] == list(range(N)) * SIZE
        assert [q.prompt.id for q in rollout.questions] == ids(rollout)


def test_sync_and_one_step_off_sample_with_the_weights_they_say(make: Callable[..., Any]) -> None:
    for kind, versions in (("sync", [0, 1, 2, 3, 4, 5]), ("one_step_off", [0, 0, 1, 2, 3, 4])):
        config, prompts = make(kind)
        rollouts = run(config, prompts, BackgroundEngine())
        check_whole(rollouts, config)
        assert [ids(rollout)[0] for rollout in rollouts] == [step * SIZE for step in range(STEPS)]
        assert [{c.version for c in rollout.completions} for rollout in rollouts] == [{v} for v in versions]


@pytest.mark.parametrize("in_flight", ["drain", "abort", "continue"])
def test_async_without_staleness_is_sync(make: Callable[..., Any], in_flight: str) -> None:
    config, prompts = make("async", 0)
    engine = BackgroundEngine(in_flight=in_flight)
    rollouts = run(config, prompts, engine)
    check_whole(rollouts, config)
    assert engine.submitted == [(step * SIZE + k, step) for step in range(STEPS) for k in range(SIZE)]
    for step, rollout in enumerate(rollouts):
        assert {c.prompt_id for c in rollout.completions} == set(range(step * SIZE, (step + 1) * SIZE))
        assert set(np.concatenate([c.token_versions for c in rollout.completions])) == {step}


@pytest.mark.parametrize("in_flight", ["drain", "abort", "continue"])
@pytest.mark.parametrize("staleness", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_async_keeps_the_bound(make: Callable[..., Any], in_flight: str, staleness: int, seed: int) -> None:
    config, prompts = make("async", staleness, steps=12)
    slow = [1, 9, 10, 22]  # these end only when nothing else is left, or when they must
    rollouts = run(config, prompts, BackgroundEngine(seed=seed, in_flight=in_flight, slow=slow))
    check_whole(rollouts, config)
    lags = [step - oldest(rollout) for step, rollout in enumerate(rollouts)]
    assert max(lags) <= staleness
    assert max(lags) > 0, "nothing overlapped, so the bound was not tried"


def test_partial_rollouts_carry_the_version_of_each_token(make: Callable[..., Any]) -> None:
    config, prompts = make("async", 2)
    rollouts = run(config, prompts, BackgroundEngine(in_flight="continue", slow=[9]))
    (slow,) = [c for rollout in rollouts for c in rollout.completions if c.prompt_id == 9 and c.sample == 0]
    assert slow.versions is not None and sorted(set(slow.versions.tolist())) == [0, 1, 2]
    rollout = next(r for r in rollouts if 9 in ids(r))
    row = ids(rollout).index(9)
    batch = rollout.batch
    sampled = batch.token_column("engine_logprobs")[batch.offsets[row] : batch.offsets[row + 1]][-len(slow.tokens) :]
    assert (-sampled).tolist() == slow.versions.tolist()


@pytest.mark.parametrize("kind", ["sync", "one_step_off"])
@pytest.mark.parametrize("save_at", [1, 3, 5])
def test_a_saved_schedule_goes_on_to_the_same_completions(make: Callable[..., Any], kind: str, save_at: int) -> None:
    config, prompts = make(kind)
    whole = run(config, prompts, BackgroundEngine())
    for one, other in zip(whole, run(config, prompts, BackgroundEngine(), save_at=save_at), strict=True):
        assert to_text(one.completions) == to_text(other.completions)


@pytest.mark.parametrize("in_flight", ["drain", "abort", "continue"])
@pytest.mark.parametrize("staleness", [0, 2])
def test_a_saved_stream_loses_and_doubles_nothing(make: Callable[..., Any], staleness: int, in_flight: str) -> None:
    config, prompts = make("async", staleness, in_flight=in_flight)
    for save_at in range(1, STEPS):
        rollouts = run(config, prompts, BackgroundEngine(in_flight=in_flight, slow=[1, 7]), save_at=save_at)
        check_whole(rollouts, config)
        assert max(step - oldest(rollout) for step, rollout in enumerate(rollouts)) <= staleness


@pytest.mark.parametrize("in_flight", ["drain", "abort", "continue"])
@pytest.mark.parametrize("tasks", [3, 3 * SIZE, STEPS * SIZE + 5])
def test_an_evaluation_may_number_its_prompts_like_those_under_way(
    make: Callable[..., Any], in_flight: str, tasks: int
) -> None:
    config, prompts = make("async", 1, in_flight=in_flight)
    engine = BackgroundEngine(in_flight=in_flight)
    schedule, answers, rollouts = open_schedule(config, engine, prompts), [], []
    asked = [Prompt(id=id, tokens=np.asarray([7], np.int32)) for id in range(tasks)]

    def send(sampler: RolloutEngine) -> None:
        engine.commit(len(rollouts))
        if len(rollouts) == 2:
            answers.extend(sampler.generate(asked, SamplingConfig(n=2, max_tokens=5)))

    for step in range(STEPS):
        rollouts.append(schedule.rollout(step, send, Clock()))
    assert [(c.prompt_id, c.sample) for c in answers] == [(id, sample) for id in range(tasks) for sample in range(2)]
    assert {c.version for c in answers} == {2}
    seeds = [engine.seed_ids[id] for id in sorted(engine.seed_ids) if id >= STEPS * SIZE]
    assert seeds == list(range(tasks)), "each is sampled as it is in a synchronous run"
    check_whole(rollouts, config)


def versions_of(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """Of each completion of the run, the versions that sampled it."""
    return [sorted(set(c.token_versions.tolist())) for rollout in rollouts for c in rollout.completions]


def test_where_new_weights_wait_a_checkpoint_waits_too(make: Callable[..., Any]) -> None:
    """So that completions under way end with the weights that began them, as they would have."""
    config, prompts = make("async", 1)
    undisturbed = versions_of(run(config, prompts, BackgroundEngine()))
    assert undisturbed[-1] == [STEPS - 2]
    for save_at in range(1, STEPS):
        assert versions_of(run(config, prompts, BackgroundEngine(), save_at=save_at)) == undisturbed


@pytest.mark.parametrize("save_at", [2, 3])
def test_a_continued_run_keeps_the_tokens_of_partial_rollouts(make: Callable[..., Any], save_at: int) -> None:
    config, prompts = make("async", 2, in_flight="continue")
    rollouts = run(config, prompts, BackgroundEngine(in_flight="continue", slow=[13, 14]), save_at=save_at)
    found = [c for rollout in rollouts for c in rollout.completions if c.prompt_id in (13, 14)]
    assert len(found) == 2 * N
    for completion in found:  # submitted before step 1, taken by step 3
        assert completion.version == 1 and {1, 3} <= set(completion.token_versions.tolist()) <= {1, 2, 3}


def test_an_engine_that_is_not_saved_begins_anew(make: Callable[..., Any]) -> None:
    class Plain:
        """Neither `partial` nor `submit_begun`."""

        def __init__(self, **settings: Any) -> None:
            engine = BackgroundEngine(in_flight="continue", **settings)
            for name in ("submit", "poll", "abort", "pause", "resume", "generate", "weight_sink", "close", "commit"):
                setattr(self, name, getattr(engine, name))

    config, prompts = make("async", 2, in_flight="continue")
    first: Any = Plain(slow=[9])
    schedule = open_schedule(config, first, prompts)
    for step in range(2):
        schedule.rollout(step, lambda _: first.commit(step), Clock())  # noqa: B023  (called at once)
    second: Any = Plain()
    again = open_schedule(config, second, prompts)
    again.restore(schedule.state())
    rollout = again.rollout(2, lambda _: second.commit(2), Clock())
    assert ids(rollout) == sorted(list(range(8, 12)) * N)
    assert {c.version for c in rollout.completions if c.prompt_id == 9} == {2}


def test_groups_are_told_of_as_they_end_and_once(make: Callable[..., Any]) -> None:
    """Those of later steps too, and again after a restart, whose scores are gone."""
    config, prompts = make("async", 2)
    told: list[list[int]] = []
    engine = BackgroundEngine(slow=[1])
    schedule = open_schedule(config, engine, prompts, lambda rollout: told.append(ids(rollout)))
    schedule.rollout(0, lambda _: engine.commit(0), Clock())
    early = {group[0] for group in told}
    assert all(group == [group[0]] * N for group in told) and len(early) == len(told)
    assert set(range(SIZE)) < early and told[-1][0] == 1, "the slow one comes last, others need not wait for it"
    later: list[list[int]] = []
    again = open_schedule(config, BackgroundEngine(), prompts, lambda rollout: later.append(ids(rollout)))
    again.restore(schedule.state())
    assert {group[0] for group in later} >= early - set(range(SIZE))


def test_what_is_sampled_ahead_is_told_of_when_it_is_whole(make: Callable[..., Any]) -> None:
    config, prompts = make("one_step_off")
    told: list[list[int]] = []
    engine = BackgroundEngine()
    schedule = open_schedule(config, engine, prompts, lambda rollout: told.append(ids(rollout)))
    for step in range(STEPS):
        schedule.rollout(step, lambda _: engine.commit(step), Clock())  # noqa: B023  (called at once)
    assert told == [sorted(list(range(step * SIZE, (step + 1) * SIZE)) * N) for step in range(1, STEPS)]


def test_completions_survive_as_text() -> None:
    engine = BackgroundEngine()
    engine.version = 3
    one = engine._end({"id": 2**40, "sample": 1, "versions": [3, 3, 4]}, "length")
    other = engine._end({"id": 7, "sample": 0, "versions": [3]})
    empty = Completion(
        prompt_id=8,
        sample=0,
        tokens=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        finish_reason="abort",
        version=1,
    )
    for before, after in zip([one, other, empty], from_text(to_text([one, other, empty])), strict=True):
        for name in ("prompt_id", "sample", "finish_reason", "version"):
            assert getattr(before, name) == getattr(after, name)
        for name in ("tokens", "logprobs", "versions"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
        assert after.tokens.dtype == np.int32 and after.logprobs.dtype == np.float32
    assert from_text(to_text([])) == []
    with pytest.raises(CheckpointError, match="damaged"):
        from_text("no such thing")


def test_what_overlaps_needs_devices_of_its_own(tmp_path: Path) -> None:
    for kind in ("one_step_off", "async"):
        with pytest.raises(ConfigError, match=r"set cluster\.placement to 'disaggregated'"):
            GrpoConfig(
                model=tmp_path,
                data=tmp_path,
                out=tmp_path,
                schedule=ScheduleConfig(kind=kind),  # type: ignore[arg-type]
            )
    with pytest.raises(ConfigError, match="must not be negative"):
        ScheduleConfig(max_staleness=-1)


def test_an_engine_that_cannot_sample_in_the_background_is_refused(make: Callable[..., Any]) -> None:
    class Plain:
        generate, weight_sink, close = BackgroundEngine.generate, BackgroundEngine.weight_sink, BackgroundEngine.close

    config, prompts = make("async")
    engine: Any = Plain()
    with pytest.raises(ConfigError, match="cannot sample in the background"):
        open_schedule(config, engine, prompts)
