"""Stop texts, failures of the engine and the thread, on the fake engine and on a stepper made for the purpose."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from align_core.config import SamplingConfig
from align_core.errors import ConfigError, DataError
from align_core.types import Completion, Prompt
from align_rollout.fake import FakeEngine
from align_rollout.stopping import StopTexts
from align_rollout.stream import Delta, Request, Stream, no_decoder

_LETTERS = "abcdefgh"


def decode(ids: Sequence[int]) -> str:
    return "".join(_LETTERS[i] for i in ids)


def counting_engine() -> FakeEngine:
    """Token i is always followed by i + 1, round and round."""
    following = np.full((8, 8), -50, np.float32)
    following[np.arange(8), (np.arange(8) + 1) % 8] = 50
    return FakeEngine(weights={"bigram.weight": following, "bias": np.zeros(8, np.float32)}, decode=decode)


def prompt(last: int, *, identity: int = 0) -> Prompt:
    return Prompt(id=identity, tokens=np.array([last], np.int32))


@pytest.mark.parametrize("texts", [("de",), ("xyz", "cde"), ("e",)])
def test_a_completion_ends_with_the_token_that_completes_a_text(texts: tuple[str, ...]) -> None:
    engine = counting_engine()
    (completion,) = engine.generate([prompt(0)], SamplingConfig(max_tokens=20, stop=texts))
    assert decode(completion.tokens.tolist()) == "bcde"
    assert completion.finish_reason == "stop"
    assert len(completion.logprobs) == 4


def test_other_requests_go_on_when_one_is_stopped() -> None:
    engine = counting_engine()
    engine.submit([prompt(0, identity=1), prompt(3, identity=2)], SamplingConfig(max_tokens=3, stop=("c",)))
    completions: list[Completion] = []
    while len(completions) < 2:
        completions += engine.poll(60)
    found = {c.prompt_id: (decode(c.tokens.tolist()), c.finish_reason) for c in completions}
    assert found == {1: ("bc", "stop"), 2: ("efg", "length")}
    engine.close()


def test_a_text_across_several_tokens_that_come_together_ends_where_it_is_complete() -> None:
    stop = StopTexts(["cd"], decode)
    assert stop.end([1, 2, 3, 4, 5], new=4) == 3
    assert stop.end([1, 2], new=2) is None


def test_stop_texts_without_a_tokenizer_are_refused() -> None:
    engine = FakeEngine(weights={"bigram.weight": np.zeros((8, 8), np.float32), "bias": np.zeros(8, np.float32)})
    with pytest.raises(ConfigError, match="need a tokenizer"):
        engine.generate([prompt(0)], SamplingConfig(max_tokens=4, stop=("a",)))


def test_a_prompt_that_allows_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="prompt 0 allows 0 new tokens"):
        counting_engine().generate([Prompt(id=0, tokens=np.array([1], np.int32), max_tokens=0)], SamplingConfig())


def test_a_completion_is_under_way_until_it_can_be_polled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Polled while the step in which the last one ends is not over: that is no moment at which nothing is left."""
    engine = counting_engine()
    forgets, ending, polled = engine._stream._stepper.abort, threading.Event(), threading.Event()

    def slowly(keys: Sequence[str]) -> None:
        """Called at the end of the step, with the completion that the stop text ends."""
        if keys:
            ending.set()
            polled.wait(0.3)
        forgets(keys)

    monkeypatch.setattr(engine._stream._stepper, "abort", slowly)
    engine.submit([prompt(0)], SamplingConfig(max_tokens=20, stop=("c",)))
    assert ending.wait(60)
    found = engine.poll(60)
    polled.set()
    assert [completion.finish_reason for completion in found] == ["stop"]
    engine.close()


class Breaking:
    """Fails in its second step."""

    def __init__(self) -> None:
        self.steps = 0

    def add(self, request: Request) -> None:
        self.key = request.key

    def step(self) -> list[Delta]:
        self.steps += 1
        if self.steps == 2:
            raise RuntimeError("the device is gone")
        return [Delta(key=self.key, tokens=[1], logprobs=[0.0], finish_reason=None)]

    def abort(self, keys: Sequence[str]) -> None:
        pass


def test_a_failure_in_the_background_reaches_whoever_calls_next() -> None:
    stream = Stream(Breaking(), check=lambda prompts, sampling: None, version=lambda: 0, decode=no_decoder)
    stream.submit([prompt(0)], SamplingConfig(max_tokens=9))
    with pytest.raises(RuntimeError, match="the device is gone"):
        stream.poll(10)
    with pytest.raises(RuntimeError, match="the device is gone"):
        stream.submit([prompt(1, identity=1)], SamplingConfig())


def test_threads_that_submit_and_generate_at_once_each_get_their_own() -> None:
    """Four threads generate while the background samples; every completion arrives once, where it was asked for."""
    engine = counting_engine()
    engine.submit([prompt(0, identity=1000 + i) for i in range(50)], SamplingConfig(max_tokens=50))
    results: dict[int, list[int]] = {}

    def work(number: int) -> None:
        for turn in range(10):
            first = 100 * number + 10 * turn
            found = engine.generate([prompt(1, identity=first + i) for i in range(3)], SamplingConfig(max_tokens=5))
            results[first] = [completion.prompt_id for completion in found]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    found = []
    while len(found) < 50:
        found += engine.poll(10)
    for thread in threads:
        thread.join()
    assert sorted(c.prompt_id for c in found) == list(range(1000, 1050))
    assert results == {first: [first, first + 1, first + 2] for first in range(0, 400, 10)}
    engine.close()
