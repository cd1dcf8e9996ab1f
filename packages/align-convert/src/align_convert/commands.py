"""What each `align-convert` command does with its parsed arguments, and what it shows.

The work itself is in `copy.py`, `verify.py` and `describe.py`; here it is only announced, on standard output, with a
progress bar on standard error where that is a terminal.
"""

import json
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from align_convert.copy import CopyPlan, plan_to_hf, plan_to_megatron, run
from align_convert.describe import describe, weight_bytes
from align_convert.dtypes import DTYPES, dtype_name
from align_convert.errors import FormatError, LayoutError
from align_convert.formats.hf_reader import HfReader
from align_convert.layout import Layout, stages
from align_convert.manifest import first_damage, read_manifest
from align_convert.source import Source, load_any
from align_convert.transfer import Settings
from align_convert.verify import first_difference


def to_megatron(arguments: Namespace) -> int:
    """`align-convert to-megatron DIR OUT`."""
    return _copy(arguments, _plan_megatron(arguments, load_any(arguments.source)), "to Megatron")


def reshard(arguments: Namespace) -> int:
    """`align-convert reshard DIR OUT`."""
    source = load_any(arguments.source)
    if isinstance(source, HfReader):
        raise FormatError(f"{str(arguments.source)!r} is a Hugging Face directory; use to-megatron")
    return _copy(arguments, _plan_megatron(arguments, source), "reshard")


def to_hf(arguments: Namespace) -> int:
    """`align-convert to-hf DIR OUT`."""
    return _copy(arguments, _plan_hf(arguments), "to Hugging Face")


def plan(arguments: Namespace) -> int:
    """`align-convert plan to-megatron|to-hf DIR OUT`."""
    made = _plan_hf(arguments) if arguments.target == "to-hf" else _plan_megatron(arguments, load_any(arguments.source))
    _say_plan(made, _settings(arguments), as_json=arguments.json)
    return 0


def _plan_hf(arguments: Namespace) -> CopyPlan:
    return plan_to_hf(
        load_any(arguments.source),
        arguments.destination,
        dtype=DTYPES.get(arguments.dtype),
        max_shard_size=arguments.max_shard_size,
        overwrite=arguments.overwrite,
    )


def _plan_megatron(arguments: Namespace, source: Source) -> CopyPlan:
    return plan_to_megatron(
        source,
        arguments.destination,
        layout=_layout(arguments, source.config.num_layers),
        dtype=DTYPES.get(arguments.dtype),
        file_format=arguments.format,
        naming=arguments.names,
        overwrite=arguments.overwrite,
    )


def _layout(arguments: Namespace, num_layers: int) -> Layout:
    chunks, first, last = arguments.chunk_layers, arguments.first_stage_layers, arguments.last_stage_layers
    if chunks is not None and (first is not None or last is not None):
        raise LayoutError(
            "--chunk-layers says all of --first-stage-layers and --last-stage-layers; give one or the other"
        )
    if first is not None or last is not None:
        chunks = stages(num_layers, pp=arguments.pp, vp=arguments.vp, first=first, last=last)
    return Layout(
        tp=arguments.tp,
        pp=arguments.pp,
        vp=arguments.vp,
        ep=arguments.ep,
        vocab_divisor=arguments.vocab_divisor,
        chunk_layers=chunks,
    )


def _settings(arguments: Namespace) -> Settings:
    return Settings(memory=arguments.memory, threads=arguments.threads, mode=arguments.io)


def _copy(arguments: Namespace, made: CopyPlan, title: str) -> int:
    settings = _settings(arguments)
    if arguments.dry_run:
        _say_plan(made, settings, as_json=arguments.json)
        return 0
    if not arguments.json:
        _warn(made.warnings)
    began = time.monotonic()
    with _bar(title) as (start, progress):
        run(made, settings=settings, resume=arguments.resume, start=start, progress=progress)
    seconds = time.monotonic() - began
    if arguments.json:
        _say(json.dumps({**_as_json(made, settings), "written": True, "seconds": round(seconds, 3)}))
    else:
        rate = made.total_bytes / max(seconds, 1e-9)
        _say(f"wrote {made.destination}: {_summary(made)}, in {seconds:.1f} s ({_bytes(int(rate))}/s)")
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
            if value is not None:
                _say(f"  {title} {key}: {value}")
    for name, value in found["args"].items():
        _say(f"  args {name}: {value}")
    _say(f"  {found['parameters']:,} parameters, {_bytes(found['bytes'])}")
    table = Table("tensor", "shape", "type", "bytes")
    for tensor in found["tensors"]:
        table.add_row(tensor["name"], " x ".join(map(str, tensor["shape"])), tensor["dtype"], _bytes(tensor["bytes"]))
    Console().print(table)
    return 0


def verify(arguments: Namespace) -> int:
    """`align-convert verify A [B]`."""
    if arguments.b is None:
        if arguments.logits:
            raise FormatError("--logits compares two directories; name the second")
        return _verify_checksums(arguments)
    a, b = load_any(arguments.a), load_any(arguments.b)
    with _bar("verify") as (start, progress):
        start(weight_bytes(a))
        difference = first_difference(a, b, settings=_settings(arguments), progress=progress)
    result: dict[str, object] = {"equal": difference is None, "difference": difference}
    if difference is None:
        result |= {"tensors": len(a.config.tensors()), "bytes": weight_bytes(a)}
        text = f"equal: {len(a.config.tensors())} tensors, {_bytes(weight_bytes(a))}, bit for bit"
    else:
        text = f"different: {difference}"
    status = 0 if difference is None else 1
    if arguments.logits:
        from align_convert.logits.compare import TOLERANCE, logit_difference  # noqa: PLC0415 # imports torch.distributed

        worst = logit_difference(a, b)
        result |= {"logit_difference": worst, "logits_agree": worst <= TOLERANCE}
        text += f"\nlogits differ by at most {worst:.2g} (float32; up to {TOLERANCE:g} is rounding)"
        status = max(status, 0 if worst <= TOLERANCE else 1)
    _say(json.dumps(result) if arguments.json else text)
    return status


def _verify_checksums(arguments: Namespace) -> int:
    damage = first_damage(arguments.a, mode=arguments.io)
    files = read_manifest(arguments.a)
    size = sum(size for size, _ in files.values())
    if arguments.json:
        _say(json.dumps({"whole": damage is None, "damage": damage, "files": len(files), "bytes": size}))
    else:
        _say(f"damaged: {damage}" if damage else f"whole: {len(files)} files, {_bytes(size)}, as they were written")
    return 0 if damage is None else 1


@contextmanager
def _bar(title: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """(start with the total bytes, advance by bytes) of a progress bar; silent where standard error is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield (lambda total: bar.update(task, total=total)), (lambda step: bar.advance(task, step))


def _as_json(made: CopyPlan, settings: Settings) -> dict[str, object]:
    return {
        "destination": str(made.destination),
        "files": [{"path": name, "bytes": size} for name, size in made.files],
        "carried": list(made.carried),
        "dtype": dtype_name(made.dtype),
        "bytes": made.total_bytes,
        "peak_memory_bytes": settings.peak_bytes,
        "warnings": list(made.warnings),
    }


def _say_plan(made: CopyPlan, settings: Settings, *, as_json: bool) -> None:
    if as_json:
        _say(json.dumps({**_as_json(made, settings), "written": False}))
        return
    _say(f"would write {made.destination}: {_summary(made)}")
    for name, size in made.files:
        _say(f"  {name}  {_bytes(size)}")
    for name in made.carried:
        _say(f"  {name}")
    _warn(made.warnings)
    _say(f"buffers in memory: at most {_bytes(settings.peak_bytes)}; nothing was written")


def _warn(warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        _say(f"warning: {warning}")


def _summary(made: CopyPlan) -> str:
    files = f"{len(made.files)} file{'' if len(made.files) == 1 else 's'}"
    return f"{files} of weights, {_bytes(made.total_bytes)}, {dtype_name(made.dtype)}"


def _bytes(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} bytes"


def _say(text: str) -> None:
    """A line as it is: no markup, no wrapping, so that paths can be copied and output parsed."""
    Console(soft_wrap=True, markup=False, highlight=False).print(text)
