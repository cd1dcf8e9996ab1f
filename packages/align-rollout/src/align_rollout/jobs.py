"""Completions for a file of prompts: read records, encode, generate, write records. No arguments here.

The one module of the package that knows text; any engine will do.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from align_core.config import SamplingConfig
from align_core.contracts import RolloutEngine, SupportsAsyncGenerate
from align_core.errors import ConfigError, DataError
from align_core.text import Tokenizer, render_prompt
from align_core.types import Completion, Prompt

Record = Mapping[str, object]
_EXPECTED = '{"prompt": "...", ...} or {"messages": [{"role": "...", "content": "..."}], ...}'


def read_records(path: Path) -> list[Record]:
    """The JSON lines of `path`; raises DataError naming file, line and what was expected."""
    if not path.is_file():
        raise DataError(f"prompt file {str(path)!r} does not exist; give a JSON-lines file of {_EXPECTED}")
    records: list[Record] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except ValueError as error:  # UnicodeDecodeError is one
                raise DataError(f"{path}:{number}: not JSON ({error}); expected {_EXPECTED}") from error
            if not isinstance(record, dict) or not _is_content(record):
                raise DataError(f"{path}:{number}: expected {_EXPECTED}, got {line.decode().strip()[:80]}")
            records.append(record)
    if not records:
        raise DataError(f"prompt file {str(path)!r} is empty; expected lines of {_EXPECTED}")
    return records


def encode(records: Sequence[Record], tokenizer: Tokenizer, *, template: str, max_tokens: int) -> list[Prompt]:
    """The prompts in their template, cut at the left of the content to `max_tokens`; ids count from 0."""
    prompts = []
    for number, record in enumerate(records):
        content = record["messages"] if "messages" in record else record["prompt"]
        tokens = render_prompt(tokenizer, content, template=template, max_tokens=max_tokens)  # type: ignore[arg-type]
        prompts.append(Prompt(id=number, tokens=tokens))
    return prompts


class Journal:
    """The completions of an interrupted job, one JSON line each as they ended; gone when the job is done."""

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        """Opens the journal of the result `path`.

        Raises:
            ConfigError: it is of a job with other settings, or another process writes it.
        """
        self._path = path.with_name(f"{path.name}.partial")
        self._settings = json.loads(json.dumps(settings))
        self.found: list[Completion] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+", encoding="utf-8")
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def add(self, completions: Sequence[Completion]) -> None:
        """Writes them down, for whoever continues."""
        for c in completions:
            line = {"prompt": c.prompt_id, "sample": c.sample, "tokens": c.tokens.tolist(), "reason": c.finish_reason}
            self._file.write(json.dumps({**line, "version": c.version}) + "\n")
        self._file.flush()
        self.found.extend(completions)

    def close(self) -> None:
        """Stops writing; the file stays if there is anything in it to continue from."""
        if not self.found:
            self._path.unlink(missing_ok=True)  # before another process can lock it
        self._file.close()

    def remove(self) -> None:
        """The job is done."""
        self._path.unlink(missing_ok=True)
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{str(self._path)!r} is in use by another process; wait for it, or give another OUT"
            ) from None

    def _read(self) -> None:
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1  # a crash may have cut the last line
        self._file.truncate(whole)
        lines = data[:whole].splitlines()
        if not lines:
            self._file.write(json.dumps(self._settings) + "\n")
            self._file.flush()
            return
        if json.loads(lines[0]) != self._settings:
            raise ConfigError(
                f"{str(self._path)!r} holds the beginning of a job with other settings, or another model; "
                "repeat those to continue it, or remove the file"
            )
        self.found = [_completion(json.loads(line)) for line in lines[1:]]


def _completion(line: Mapping[str, Any]) -> Completion:
    tokens = np.asarray(line["tokens"], dtype=np.int32)
    return Completion(
        prompt_id=line["prompt"],
        sample=line["sample"],
        tokens=tokens,
        logprobs=np.zeros(len(tokens), np.float32),  # of no interest to a file of texts
        finish_reason=line["reason"],
        version=line["version"],
    )


def complete(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    journal: Journal,
    *,
    at_once: int,
    console: Console,
) -> list[Completion]:
    """Generates what `journal` does not hold yet; all completions, ordered by prompt and sample.

    Shows progress and tokens a second where `console` is a terminal.
    """
    done = {(c.prompt_id, c.sample) for c in journal.found}
    open_prompts = [p for p in prompts if any((p.id, sample) not in done for sample in range(sampling.n))]
    tokens, started = 0, time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("generating", total=len(prompts) * sampling.n, completed=len(done))
        for found in _stream(engine, open_prompts, sampling, at_once=at_once):
            new = [c for c in found if (c.prompt_id, c.sample) not in done]
            journal.add(new)
            tokens += sum(len(completion.tokens) for completion in new)
            rate = tokens / (time.perf_counter() - started)
            progress.update(task, advance=len(new), description=f"generating ({rate:.0f} tokens/s)")
    return sorted(journal.found, key=lambda completion: (completion.prompt_id, completion.sample))


def _stream(
    engine: RolloutEngine, prompts: Sequence[Prompt], sampling: SamplingConfig, *, at_once: int
) -> Iterator[list[Completion]]:
    """Completions as they end, or in portions from an engine that does not sample in the background."""
    if not isinstance(engine, SupportsAsyncGenerate):
        portion = max(1, at_once // sampling.n)
        for first in range(0, len(prompts), portion):
            yield engine.generate(prompts[first : first + portion], sampling)
        return
    engine.submit(prompts, sampling)
    left = len(prompts) * sampling.n
    while left:
        found = engine.poll()
        left -= len(found)
        yield found


def write_records(
    path: Path, records: Sequence[Record], completions: Sequence[Completion], tokenizer: Tokenizer
) -> None:
    """One line a completion: its prompt's record, and `response`, `sample`, `finish_reason`, `response_tokens`.

    The file appears whole or not at all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for completion in completions:
                answer = {
                    "response": tokenizer.decode(completion.tokens),
                    "sample": completion.sample,
                    "finish_reason": completion.finish_reason,
                    "response_tokens": len(completion.tokens),
                }
                file.write(json.dumps({**records[completion.prompt_id], **answer}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_content(record: Record) -> bool:
    messages = record.get("messages")
    if messages is None:
        return isinstance(record.get("prompt"), str)
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages)
    )
