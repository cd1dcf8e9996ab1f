"""A model directory with a real tokenizer, and an engine that adds the numbers of a prompt: no model, no luck."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from align_core import registry
from align_core.config import EngineConfig, SamplingConfig
from align_core.contracts import RolloutEngine, WeightSink
from align_core.text import Tokenizer, load_tokenizer
from align_core.types import Completion, FinishReason, Prompt


class AddingEngine:
    """Answers `a+b` with `#### sum`; one too many where sum + sample is a multiple of the model's `mistakes`."""

    asked: ClassVar[int] = 0
    fail_after: ClassVar[int | None] = None
    live: ClassVar[int] = 0
    finish_reason: ClassVar[FinishReason] = "stop"

    def __init__(self, tokenizer: Tokenizer, *, mistakes: int, reply: str) -> None:
        AddingEngine.live += 1
        self._closed = False
        self._tokenizer = tokenizer
        self._mistakes = mistakes
        self._reply = reply

    @classmethod
    def from_model(cls, model: Path, config: EngineConfig) -> "AddingEngine":
        return cls(load_tokenizer(model), **json.loads((model / "skill.json").read_text()))

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        AddingEngine.asked += len(prompts) * sampling.n
        if AddingEngine.fail_after is not None and AddingEngine.asked > AddingEngine.fail_after:
            raise RuntimeError("the engine died")
        return [self._answer(prompt, sample) for prompt in prompts for sample in range(sampling.n)]

    def _answer(self, prompt: Prompt, sample: int) -> Completion:
        left, _, right = self._tokenizer.decode(prompt.tokens).strip().partition("+")
        total = int(left) + int(right)
        if (total + sample) % self._mistakes == 0:
            total += 1
        tokens = np.asarray(self._tokenizer.encode(self._reply.format(total)), dtype=np.int32)
        return Completion(
            prompt_id=prompt.id,
            sample=sample,
            tokens=tokens,
            logprobs=np.zeros(len(tokens), np.float32),
            finish_reason=self.finish_reason,
            version=0,
        )

    def weight_sink(self) -> WeightSink:
        raise NotImplementedError("the evaluation never updates weights")

    def close(self) -> None:
        if not self._closed:
            AddingEngine.live -= 1
        self._closed = True


_conforms: type[RolloutEngine] = AddingEngine


class _Point:
    """The part of an entry point that the registry uses."""

    name = "adding"

    def load(self) -> object:
        return AddingEngine


@pytest.fixture
def adding(monkeypatch: pytest.MonkeyPatch) -> type[AddingEngine]:
    """Registers the engine as `adding`, the only one there is."""
    monkeypatch.setattr(registry, "entry_points", lambda group: [_Point()] if group == "align.engines" else [])
    monkeypatch.setattr(AddingEngine, "live", 0)
    monkeypatch.setattr(AddingEngine, "asked", 0)
    monkeypatch.setattr(AddingEngine, "fail_after", None)
    return AddingEngine


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer without merges: one token a character."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "<eos>"])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    directory = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(directory)
    return directory


@pytest.fixture
def make_model(tmp_path: Path, tokenizer_files: Path) -> Callable[..., Path]:
    """Makes a model directory for the adding engine."""

    def make(name: str, *, mistakes: int, reply: str = "#### {}") -> Path:
        directory = tmp_path / name
        directory.mkdir(parents=True)
        for file in tokenizer_files.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        (directory / "skill.json").write_text(json.dumps({"mistakes": mistakes, "reply": reply}))
        return directory

    return make


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """Ten tasks, `1+1` to `10+1`: sums 2 to 11."""
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a}+1", "answer": str(a + 1)}) + "\n" for a in range(1, 11)))
    return path
