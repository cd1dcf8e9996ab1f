"""Completions for a file of prompts: read records, encode, generate in portions, write records. No arguments here.

The one module of the package that knows text; any engine will do.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from align_core.config import SamplingConfig
from align_core.contracts import RolloutEngine
from align_core.errors import DataError
from align_core.text import Tokenizer, render_prompt
from align_core.types import Completion, Prompt

Record = Mapping[str, object]
_EXPECTED = '{"prompt": "...", ...} or {"messages": [{"role": "...", "content": "..."}], ...}'


def read_records(path: Path) -> list[Record]:
    """The JSON lines of `path`; raises DataError naming file, line and what was expected."""
    if not path.is_file():
        raise DataError(f"prompt file {str(path)!r} does not exist; give a JSON-lines file of {_EXPECTED}")
    records: list[Record] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON ({error}); expected {_EXPECTED}") from error
            if not isinstance(record, dict) or not _is_content(record):
                raise DataError(f"{path}:{number}: expected {_EXPECTED}, got {line.strip()[:80]}")
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


def complete(
    engine: RolloutEngine, prompts: Sequence[Prompt], sampling: SamplingConfig, *, at_once: int, console: Console
) -> list[Completion]:
    """Generates in portions of about `at_once` completions, with a progress bar where `console` is a terminal."""
    portion = max(1, at_once // sampling.n)
    completions: list[Completion] = []
    tokens, started = 0, time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("generating", total=len(prompts))
        for first in range(0, len(prompts), portion):
            part = prompts[first : first + portion]
            found = engine.generate(part, sampling)
            completions.extend(found)
            tokens += sum(len(completion.tokens) for completion in found)
            rate = tokens / (time.perf_counter() - started)
            progress.update(task, advance=len(part), description=f"generating ({rate:.0f} tokens/s)")
    return completions


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
