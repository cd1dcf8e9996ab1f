"""What each `align-convert` command does with its parsed arguments, and what it shows.

The work itself is in `copy.py`, `verify.py` and `describe.py`; here it is only announced, on standard output, with a
progress bar on standard error where that is a terminal.
"""

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from align_convert.copy import (
    CopyPlan,
    plan_to_hf,
    plan_to_megatron,
)
from align_convert.copy import (
    to_hf as copy_to_hf,
)
from align_convert.copy import (
    to_megatron as copy_to_megatron,
)
from align_convert.describe import describe, weight_bytes
from align_convert.dtypes import DTYPES, dtype_name
from align_convert.layout import Layout
from align_convert.source import load_any
from align_convert.verify import first_difference


def to_megatron(arguments: Namespace) -> int:
    """`align-convert to-megatron DIR OUT`."""
    layout = Layout(tp=arguments.tp, pp=arguments.pp, vp=arguments.vp, vocab_divisor=arguments.vocab_divisor)
    source, destination, overwrite = load_any(arguments.source), arguments.destination, arguments.overwrite
    dtype = DTYPES.get(arguments.dtype)
    if arguments.dry_run:
        _say_plan(plan_to_megatron(source, destination, layout=layout, dtype=dtype, overwrite=overwrite), destination)
        return 0
    with _bar("to Megatron") as (start, progress):
        plan = copy_to_megatron(
            source, destination, layout=layout, dtype=dtype, overwrite=overwrite, start=start, progress=progress
        )
    _say_done(plan, destination)
    return 0


def to_hf(arguments: Namespace) -> int:
    """`align-convert to-hf DIR OUT`."""
    source, destination, overwrite = load_any(arguments.source), arguments.destination, arguments.overwrite
    dtype, size = DTYPES.get(arguments.dtype), arguments.max_shard_size
    if arguments.dry_run:
        plan = plan_to_hf(source, destination, dtype=dtype, max_shard_size=size, overwrite=overwrite)
        _say_plan(plan, destination)
        return 0
    with _bar("to Hugging Face") as (start, progress):
        plan = copy_to_hf(
            source, destination, dtype=dtype, max_shard_size=size, overwrite=overwrite, start=start, progress=progress
        )
    _say_done(plan, destination)
    return 0


def inspect(arguments: Namespace) -> int:
    """`align-convert inspect DIR`."""
    found = describe(load_any(arguments.source))
    if arguments.json:
        _say(json.dumps(found, indent=2))
        return 0
    _say(f"{found['directory']}: {found['format']}")
    for title, settings in (("layout", found["layout"]), ("model", found["model"])):
        for key, value in settings.items():
            _say(f"  {title} {key}: {value}")
    _say(f"  {found['parameters']:,} parameters, {_bytes(found['bytes'])}")
    table = Table("tensor", "shape", "type")
    for tensor in found["tensors"]:
        table.add_row(tensor["name"], " x ".join(map(str, tensor["shape"])), tensor["dtype"])
    Console().print(table)
    return 0


def verify(arguments: Namespace) -> int:
    """`align-convert verify A B`."""
    a, b = load_any(arguments.a), load_any(arguments.b)
    with _bar("verify") as (start, progress):
        start(weight_bytes(a))
        difference = first_difference(a, b, progress=progress)
    if difference is not None:
        _say(f"different: {difference}")
        return 1
    _say(f"equal: {len(a.config.tensors())} tensors, {_bytes(weight_bytes(a))}, bit for bit")
    return 0


@contextmanager
def _bar(title: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """(start with the total bytes, advance by bytes) of a progress bar; silent where standard error is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield (lambda total: bar.update(task, total=total)), (lambda step: bar.advance(task, step))


def _say_plan(plan: CopyPlan, destination: Path) -> None:
    _say(f"would write {destination}: {_summary(plan)}")
    for name, size in plan.files:
        _say(f"  {name}  {_bytes(size)}")
    for name in plan.carried:
        _say(f"  {name}")
    _say(f"weights in memory at once: {_bytes(plan.peak_bytes)}; nothing was written")


def _say_done(plan: CopyPlan, destination: Path) -> None:
    _say(f"wrote {destination}: {_summary(plan)}")


def _summary(plan: CopyPlan) -> str:
    files = f"{len(plan.files)} file{'' if len(plan.files) == 1 else 's'}"
    return f"{files} of weights, {_bytes(plan.total_bytes)}, {dtype_name(plan.dtype)}"


def _bytes(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} bytes"


def _say(text: str) -> None:
    """A line as it is: no markup, no wrapping, so that paths can be copied and output parsed."""
    Console(soft_wrap=True, markup=False, highlight=False).print(text)
