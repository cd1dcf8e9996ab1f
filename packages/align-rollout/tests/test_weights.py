"""The sink by itself, against a recorder in vLLM's place: order of the steps, and what a failure half-way leaves."""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_core.config import SamplingConfig
from align_core.errors import SyncError
from align_core.types import Prompt, WeightTensor
from align_rollout.fake import ArrayWeights
from align_rollout.stream import Delta, Request, Stream, no_decoder
from align_rollout.weights import VllmWeightSink

_SOURCE = ArrayWeights({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)})


class _Llm:
    """Records calls; reads staged weights when they are staged, as a worker in another process would."""

    def __init__(
        self, *, commit_fails: bool = False, cache_resets: bool = True, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        self.calls: list[str] = []
        self.staged: dict[str, bytes] = {}
        self.files: set[Path] = set()
        self.commit_fails, self.cache_resets, self._meanwhile = commit_fails, cache_resets, meanwhile

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[None]:
        self.calls.append(method)
        if method == "align_stage":
            for weight in args[0]:
                self.staged[weight.meta.name] = weight.bytes().tobytes()
                self.files |= {weight.file} if weight.file else set()
        if method == "align_commit":
            self._meanwhile()
        if method == "align_commit" and self.commit_fails:
            raise RuntimeError("out of memory")
        return [None]  # the answer of one worker

    def reset_prefix_cache(self, *, reset_running_requests: bool) -> bool:
        assert reset_running_requests
        self.calls.append("reset_prefix_cache")
        return self.cache_resets


def _sink(llm: _Llm, *, loaded: bool = True, in_process: bool = True) -> VllmWeightSink:
    return VllmWeightSink(llm=llm, expected=_SOURCE.metadata(), loaded=loaded, in_process=in_process)


def _weights() -> list[WeightTensor]:
    return list(_SOURCE.iterate())


def test_an_update_runs_in_order_and_sets_the_version() -> None:
    llm = _Llm()
    sink = _sink(llm)
    sink.begin(_SOURCE.metadata(), 4)
    sink.load(_weights())
    assert sink.version == 0
    sink.commit()
    assert sink.version == 4
    assert llm.calls == ["align_discard", "align_stage", "align_commit", "reset_prefix_cache"]


def test_arrays_reach_other_processes_through_a_file_that_is_then_gone() -> None:
    llm = _Llm()
    sink = _sink(llm, in_process=False)
    sink.begin(_SOURCE.metadata(), 1)
    sink.load(_weights())
    assert llm.staged == {weight.meta.name: weight.bytes().tobytes() for weight in _weights()}
    (file,) = llm.files
    assert not file.exists()


def test_a_failure_inside_commit_makes_the_engine_unusable() -> None:
    """Some layers may hold new weights, some old: no answer of such an engine has a version."""
    sink = _sink(_Llm(commit_fails=True))
    sink.begin(_SOURCE.metadata(), 1)
    sink.load(_weights())
    with pytest.raises(RuntimeError, match="out of memory"):
        sink.commit()
    assert sink.version == 0
    for use in (sink.check_answerable, lambda: sink.begin(_SOURCE.metadata(), 2)):
        with pytest.raises(SyncError, match="its update to version 1 was interrupted; start a new engine"):
            use()


class _Ends:
    """Ends every request with its first token."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def add(self, request: Request) -> None:
        self._requests.append(request)

    def step(self) -> list[Delta]:
        found, self._requests = self._requests, []
        return [Delta(key=each.key, tokens=[1], logprobs=[0.0], finish_reason="stop") for each in found]

    def abort(self, keys: Sequence[str]) -> None:
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_a_request_during_a_commit_waits_for_its_end(fails: bool) -> None:
    """It comes while the workers reload, from another thread: answered by the new weights, or told the failure."""
    answers: list[int | SyncError] = []

    def ask() -> None:
        prompt = Prompt(id=len(answers), tokens=np.zeros(1, np.int32))
        try:
            answers.extend(c.version for c in stream.generate([prompt], SamplingConfig(max_tokens=1)))
        except SyncError as refusal:
            answers.append(refusal)

    client = threading.Thread(target=ask)

    def meanwhile() -> None:
        client.start()
        client.join(0.2)
        assert not answers

    stream = Stream(_Ends(), check=lambda *_: sink.check_answerable(), version=lambda: sink.version, decode=no_decoder)
    sink = VllmWeightSink(
        llm=_Llm(commit_fails=fails, meanwhile=meanwhile),
        expected=_SOURCE.metadata(),
        loaded=True,
        in_process=True,
        hold=partial(stream.hold, "drain"),
        release=stream.release,
        fail=stream.fail,
    )
    sink.begin(_SOURCE.metadata(), 1)
    sink.load(_weights())
    with pytest.raises(RuntimeError, match="out of memory") if fails else nullcontext():
        sink.commit()
    client.join(60)
    (answer,) = answers
    assert "its update to version 1 was interrupted" in str(answer) if fails else answer == 1
    stream.close()


def test_a_prefix_cache_that_does_not_reset_makes_the_engine_unusable() -> None:
    sink = _sink(_Llm(cache_resets=False))
    sink.begin(_SOURCE.metadata(), 1)
    sink.load(_weights())
    with pytest.raises(SyncError, match="did not reset its prefix cache"):
        sink.commit()
    with pytest.raises(SyncError, match="start a new engine"):
        sink.check_answerable()


def test_a_refused_chunk_stages_nothing() -> None:
    llm = _Llm()
    sink = _sink(llm)
    sink.begin(_SOURCE.metadata(), 1)
    first, second = _weights()
    with pytest.raises(SyncError, match="'b' of version 1 came twice"):
        sink.load([first, second, second])
    assert not llm.staged
    with pytest.raises(SyncError, match="2 of 2 weights of version 1 never came: 'a', 'b'"):
        sink.commit()


def test_an_engine_without_weights_takes_version_zero_first() -> None:
    sink = _sink(_Llm(), loaded=False)
    with pytest.raises(SyncError, match="has got no weights yet"):
        sink.check_answerable()
    sink.begin(_SOURCE.metadata(), 0)
    sink.load(_weights())
    sink.commit()
    sink.check_answerable()
    assert sink.version == 0


@pytest.mark.parametrize("step", ["load", "commit"])
def test_a_step_without_begin_is_refused(step: str) -> None:
    sink = _sink(_Llm())
    with pytest.raises(SyncError, match="call begin first"):
        sink.load(_weights()) if step == "load" else sink.commit()


def test_every_difference_of_an_announcement_is_named() -> None:
    wrong = ArrayWeights({"a": np.zeros((3, 2), np.float32), "c": np.zeros(1, np.float32)})
    with pytest.raises(SyncError) as refusal:
        _sink(_Llm()).begin(wrong.metadata(), 1)
    for part in ("not announced: 'b'", "not in the engine's model: 'c'", "'a' is announced as [3, 2]", "has [2, 3]"):
        assert part in str(refusal.value)


def test_a_weight_announced_twice_is_named() -> None:
    metadata = _SOURCE.metadata()
    with pytest.raises(SyncError, match="announced twice: 'a'"):
        _sink(_Llm()).begin([*metadata, metadata[0]], 1)


def test_many_missing_weights_are_counted_and_some_named() -> None:
    many = ArrayWeights({f"w{i:02}": np.zeros(1, np.float32) for i in range(20)})
    sink = VllmWeightSink(llm=_Llm(), expected=many.metadata(), loaded=True, in_process=True)
    with pytest.raises(SyncError, match=r"20 weights .*: 'w00', .*'w07' and 12 more$"):
        sink.begin([], 1)
