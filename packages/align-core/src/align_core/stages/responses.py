"""Reads a file of responses, has a frozen model annotate them, and writes the rows with what it found."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from align_core.atomic import new_file
from align_core.config import ResponsesConfig, TrainerConfig
from align_core.data.dataset import each_encoded, encoded
from align_core.data.examples import Example, batch_of, encode_responses
from align_core.data.records import ResponsesRecord, read_responses
from align_core.errors import DataError
from align_core.stages.preflight import open_tokenizer
from align_core.stages.world import Model, World
from align_core.types import Batch, Head

Annotation = Mapping[str, object]
Annotate = Callable[[Model, Batch], list[Annotation]]
"""What a model finds for each sequence of a batch: columns to add to its row."""


def annotate_responses(config: ResponsesConfig, world: World, *, head: Head, annotate: Annotate) -> None:
    """Writes OUT: every row of the data with the columns of `annotate`; lists where `response` is a list.

    Raises:
        DataError: a bad row, or OUT exists.
    """
    if config.out.exists():
        raise DataError(f"{str(config.out)!r} exists already; remove it or choose another --out")
    tokenizer = open_tokenizer(config)

    def encode(record: ResponsesRecord) -> list[Example]:
        return encode_responses(
            tokenizer, record.prompt, record.responses, template=config.template, max_length=config.max_length
        )

    records = read_responses(config.data)
    deque(each_encoded(records, encode), maxlen=0)  # for its errors
    model = world.trainer(
        TrainerConfig(
            model=config.model, head=head, trainable=False, parallel=config.parallel, training=config.training
        )
    )

    def rows() -> Iterator[Mapping[str, object]]:
        for indices in records.index_parts(config.batch_size):
            groups = [encoded(records, i, encode) for i in indices]
            found = annotate(model, batch_of([example for group in groups for example in group]))
            starts = np.cumsum([0, *map(len, groups)])
            for index, first, last in zip(indices, starts[:-1], starts[1:]):
                row = records[index].row
                yield {**row, **_columns(found[first:last], is_list=isinstance(row.get("response"), list))}

    with new_file(config.out) as file:
        for row in rows():
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8"))


def _columns(found: Sequence[Annotation], *, is_list: bool) -> Annotation:
    if not is_list:
        return found[0]
    return {name: [each[name] for each in found] for name in found[0]}
