"""Real worker processes without Megatron: what the caller reads when one of them fails, hangs or dies."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError

from align_core.config import ClusterConfig, EngineConfig, ParallelConfig, TrainerConfig
from align_core.errors import AlignError, DataError, WorkerError
from align_core.ray import calls, cluster, shared
from align_core.ray import world as ray_world
from align_core.ray.workers import WorkerGroup
from align_core.ray.world import RayWorld
from align_core.types import Batch

pytestmark = pytest.mark.slow


class Rank:
    """Stands where a rank of Megatron would."""

    def __init__(self, config: TrainerConfig, rank: int) -> None:
        self.rank = rank
        self.config = config

    def hello(self) -> tuple[int, int, str]:
        return self.rank, os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def fail(self, rank: int, kind: str) -> int:
        if self.rank != rank:
            time.sleep(0.5)
            return self.rank
        print(f"last words of rank {rank}", flush=True)
        if kind == "data":
            raise DataError("row 7 is bad")
        if kind == "other":
            raise ValueError("a bug")
        os.kill(os.getpid(), signal.SIGKILL)
        return self.rank

    def lose(self, dead: int) -> None:
        """Rank `dead` dies; the others, in a collective, hear of it a little earlier than the driver may."""
        if self.rank == dead:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("Connection closed by peer [10.0.0.1]:2000")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def secret(self) -> Any:
        return threading.Lock()

    def reduce(self, store: str, late_s: float) -> None:
        """A collective over both ranks, to which rank 1 comes late; rank 0 waits for 3 s, but longer to meet it."""
        import torch.distributed

        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", init_method=store, rank=self.rank, world_size=2)
            torch.distributed.barrier()
            self.group = torch.distributed.new_group(timeout=timedelta(seconds=3))
        time.sleep(late_s * self.rank)
        torch.distributed.all_reduce(torch.ones(1), group=self.group)

    def total(self, batch: Batch) -> int:
        return int(batch.tokens.sum())


def make_rank(config: TrainerConfig, rank: int, meeting: str, timeout_s: float) -> Any:
    return Rank(config, rank)


@pytest.fixture(scope="module", autouse=True)
def a_cluster() -> Iterator[None]:
    cluster.start(ClusterConfig())
    yield
    cluster.stop()


@pytest.fixture
def make_world() -> Iterator[Callable[..., RayWorld]]:
    worlds = []

    def make(**settings: Any) -> RayWorld:
        worlds.append(RayWorld(ClusterConfig(**settings), make_rank=make_rank))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


def wait_for(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def group_of(world: RayWorld, *, trainable: bool = True, tensor: int = 2) -> WorkerGroup:
    config = TrainerConfig(model=Path("m"), trainable=trainable, parallel=ParallelConfig(tensor=tensor))
    trainer: Any = world.trainer(config)
    return trainer._workers  # type: ignore[no-any-return]


def test_frozen_models_live_with_the_trained_one_of_the_same_layout(make_world: Callable[..., RayWorld]) -> None:
    world = make_world()
    reward, policy, reference = group_of(world, trainable=False), group_of(world), group_of(world, trainable=False)
    value, small = group_of(world), group_of(world, trainable=False, tensor=1)
    pids = [tuple(pid for _, pid, _ in group.call("hello")) for group in (reward, policy, reference, value, small)]
    assert pids[0] == pids[1] == pids[2]
    assert len({*pids[0], *pids[3], *pids[4]}) == 5
    assert len({group.role for group in (reward, policy, reference)}) == 3
    reward.close()  # the others go on
    assert policy.call_first("hello")[0] == 0


def test_workers_of_their_own_on_request(make_world: Callable[..., RayWorld]) -> None:
    world = make_world(share_workers=False)
    one, other = group_of(world, tensor=1), group_of(world, tensor=1, trainable=False)
    assert one.call("hello")[0][1] != other.call("hello")[0][1]


def test_an_error_of_ours_arrives_as_it_is(make_world: Callable[..., RayWorld]) -> None:
    with pytest.raises(DataError, match=r"^row 7 is bad$"):
        group_of(make_world()).call("fail", 1, "data")


def test_another_error_brings_rank_traceback_and_log(make_world: Callable[..., RayWorld]) -> None:
    with pytest.raises(WorkerError) as caught:
        group_of(make_world()).call("fail", 1, "other")
    text = str(caught.value)
    assert text.startswith("trainer lm model m rank 1 failed in fail:\n")
    assert 'raise ValueError("a bug")' in text
    assert "  last words of rank 1" in text
    assert "rank 1: failed in fail (call 2)" in text
    assert "\n  rank 0: " in text  # in the call, or never heard of if the first beat of its process has not come yet


@pytest.mark.parametrize("patience_s", [60.0, 0.0], ids=["Ray knows", "Ray does not know yet"])
def test_a_death_is_told_with_the_log_of_the_dead(
    make_world: Callable[..., RayWorld], monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    monkeypatch.setattr(calls, "_DEATH_KNOWN_S", patience_s)
    with pytest.raises(WorkerError) as caught:
        group_of(make_world()).call("fail", 0, "kill")
    text = str(caught.value)
    assert "trainer lm model m rank 0 died in fail: process" in text
    assert "last words of rank 0" in text
    assert "rank 0: dead" in text


def test_the_dead_rank_is_blamed_not_the_one_that_lost_it(make_world: Callable[..., RayWorld]) -> None:
    with pytest.raises(WorkerError, match=r"^trainer lm model m rank 1 died in lose"):
        group_of(make_world()).call("lose", 1)


def test_a_group_that_failed_is_gone(make_world: Callable[..., RayWorld]) -> None:
    group = group_of(make_world())
    pids = [pid for _, pid, _ in group.call("hello")]
    with pytest.raises(AlignError):
        group.call("fail", 1, "other")
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_an_answer_that_cannot_travel_is_a_failure_of_its_rank(make_world: Callable[..., RayWorld]) -> None:
    with pytest.raises(WorkerError, match=r"(?s)rank 0 failed in secret:.*cannot pickle '_thread.lock' object"):
        group_of(make_world()).call("secret")


def test_a_call_that_was_broken_off_leaves_no_answer_for_the_next(make_world: Callable[..., RayWorld]) -> None:
    group = group_of(make_world())

    def interrupt() -> None:
        wait_for(lambda: not group.processes.usable)  # the call has begun
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started us in background
    try:
        with pytest.raises(KeyboardInterrupt):
            threading.Thread(target=interrupt).start()
            group.call("sleep", 60.0)
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(WorkerError, match=r"^trainer lm model m cannot be called any more"):
        group.call("hello")
    group.close()


def test_a_collective_that_times_out_tells_who_waited_for_whom(
    make_world: Callable[..., RayWorld], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    group, store = group_of(make_world()), f"file://{tmp_path / 'store'}"
    group.call("reduce", store, 0.0)
    with pytest.raises(WorkerError) as caught:
        group.call("reduce", store, 60.0)
    text = str(caught.value)
    assert text.startswith("trainer lm model m rank 0 failed in reduce:\n")
    assert "Timed out waiting 3000ms" in text
    assert "rank 0: failed in reduce" in text and "waiting for other ranks in all_reduce" in text
    assert "rank 1: in reduce" in text
    assert "\nrank 0 waited for rank 1\n" in text


@pytest.mark.parametrize("small", [False, True])
def test_a_batch_reaches_every_rank(
    make_world: Callable[..., RayWorld], monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    """Through shared memory, and over the lines where that is too small."""
    if small:
        monkeypatch.setattr(shared, "_write", lambda batch: None)
    group = group_of(make_world())
    with shared.reachable(Batch.of([[1, 2, 3], [4]]), everyone_here=group.on_this_node) as batch:
        assert group.call("total", batch) == [10, 10]


def test_calls_under_way_when_another_thread_closes_the_processes_end_in_deaths(
    make_world: Callable[..., RayWorld],
) -> None:
    """One waits already, the other comes back to waiting only when the lines are closed."""
    processes = group_of(make_world()).processes
    lines = processes._calls
    waiting = lines.start(dict.fromkeys(range(2), ("run", (time.sleep, 60.0))))
    early, late = ({line: rank for line, rank in waiting.items() if rank == wanted} for wanted in range(2))
    found: dict[int, Any] = {}
    caller = threading.Thread(target=lambda: found.update(lines.ended(early, None)))
    caller.start()
    time.sleep(0.5)  # so that it waits; where it does not yet, there are two that come later
    processes.close()
    caller.join(60)
    found |= lines.ended(late, None)
    assert not (early or late)
    assert [type(found[rank]) for rank in range(2)] == [ActorDiedError] * 2


def test_the_board_knows_a_rank_that_was_stopped(make_world: Callable[..., RayWorld]) -> None:
    group = group_of(make_world())
    pid = group.call("hello")[1][1]

    def call() -> None:
        with pytest.raises(WorkerError):
            group.call("sleep", 60.0)

    caller = threading.Thread(target=call)

    def board_says(*states: str) -> bool:
        """Of rank 0 and rank 1, in the call that is under way."""
        told = group.processes._activities([]).splitlines()[1:3]
        expected = ("rank 0: in sleep (call 4) for", "rank 1: in sleep (call 3) for")
        found = ["silent" if "silent since" in line else "heard" for line in told]
        return tuple(found) == states and all(call in line for call, line in zip(expected, told))

    caller.start()
    try:
        wait_for(lambda: board_says("heard", "heard"))
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: board_says("heard", "silent"))
    finally:
        os.kill(pid, signal.SIGKILL)
    group.processes.close()  # the caller hears of it
    caller.join(60)
    assert not caller.is_alive()


_EXPECTED = EngineConfig(name="fake", context=64)


class Engine:
    """Stands where an engine with its sink would."""

    def __init__(self, model: Path, config: EngineConfig) -> None:
        self.seen = os.environ.get("ALIGN_TEST_PRELOADED", "")

    def ask(self, method: str, *arguments: Any) -> Any:
        return (os.getpid(), self.seen) if method == "who" else False

    def close(self) -> None:
        """Nothing to end."""


def patient_preload(released: Path, config: EngineConfig) -> None:
    while not released.exists():
        time.sleep(0.05)
    os.environ["ALIGN_TEST_PRELOADED"] = f"{config.name} in {os.getpid()}"


def failing_preload(config: EngineConfig) -> None:
    raise DataError("no such engine here")


@pytest.fixture
def make_expecting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RayWorld]]:
    worlds = []

    def make(preload: Callable[[EngineConfig], None]) -> RayWorld:
        monkeypatch.setattr(ray_world, "preload", preload)
        make_host: Any = Engine
        worlds.append(RayWorld(ClusterConfig(), expected=_EXPECTED, make_rank=make_rank, make_host=make_host))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


def test_the_engine_that_is_expected_imports_while_models_are_loaded(
    make_expecting: Callable[..., RayWorld], tmp_path: Path
) -> None:
    world = make_expecting(partial(patient_preload, tmp_path / "released"))
    group_of(world).call("hello")
    ((_, imported),) = world._early.values()
    assert not imported.done()  # the model was ready before
    (tmp_path / "released").touch()
    engine: Any = world.engine(Path("m"), _EXPECTED)
    pid, seen = engine._replicas[0].ask("who")
    assert seen == f"fake in {pid}"
    assert not world._early
    other: Any = world.engine(Path("m"), EngineConfig(name="fake", context=32))
    assert other._replicas[0].ask("who")[1] == ""


def test_what_an_expected_engine_could_not_import_is_said_when_it_is_asked_for(
    make_expecting: Callable[..., RayWorld],
) -> None:
    world = make_expecting(failing_preload)
    assert group_of(world).call_first("hello")[0] == 0
    with pytest.raises(DataError, match="no such engine here"):
        world.engine(Path("m"), _EXPECTED)


def test_an_expected_engine_that_is_never_asked_for_ends_with_the_world(
    make_expecting: Callable[..., RayWorld], tmp_path: Path
) -> None:
    world = make_expecting(partial(patient_preload, tmp_path / "never"))
    group_of(world)
    ((processes, imported),) = world._early.values()
    assert not imported.done()
    world.close()
    assert imported.done()  # no thread waits for Ray any more
    assert not processes.usable
