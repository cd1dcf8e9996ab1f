"""Names of files and folders in a Megatron directory of the `torch` format, and of what is inside them.

    root/latest_checkpointed_iteration.txt           "1" or "release"
    root/iter_0000001/mp_rank_00[_000][_000]/model_optim_rng.pt     tensor, pipeline, expert
    root/config.json, tokenizer files ...            ours: what is needed to know the model again

Knows nothing about tensors' contents.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from align_convert.atomic import TRACKER
from align_convert.errors import FormatError
from align_convert.formats.dist_names import is_dist_folder
from align_convert.layout import Layout, Rank

RANK_FILE = "model_optim_rng.pt"
_RANK_FOLDER = re.compile(r"mp_rank_\d{2,}(?:_\d{3,}){0,2}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """A Megatron checkpoint: its root, the folder of one iteration, and that iteration (0 for a release)."""

    root: Path
    folder: Path
    iteration: int


def iteration_folder(root: Path, iteration: int) -> Path:
    """Where the rank folders of an iteration are."""
    return root / f"iter_{iteration:07d}"


def rank_file(folder: Path, layout: Layout, rank: Rank) -> Path:
    """The file of one rank; its pipeline and expert numbers are in the name only where there are several."""
    name = f"mp_rank_{rank.tp:02d}"
    if layout.pp > 1:
        name += f"_{rank.pp:03d}"
    if layout.ep > 1:
        name += f"_{rank.ep:03d}"
    return folder / name / RANK_FILE


def model_keys(layout: Layout) -> list[str]:
    """Keys of the model chunks in a rank's file."""
    return ["model"] if layout.vp == 1 else [f"model{chunk}" for chunk in range(layout.vp)]


def is_megatron_directory(path: Path) -> bool:
    """Whether `path` is the root of such a checkpoint or one of its iterations."""
    return (path / TRACKER).is_file() or bool(rank_folders(path))


def is_dist_directory(path: Path) -> bool:
    """Whether `path` is the root of a `torch_dist` checkpoint or one of its iterations."""
    if is_dist_folder(path):
        return True
    return (path / TRACKER).is_file() and is_dist_folder(_tracked(path)[0])


def locate(path: Path) -> Location:
    """Find the newest iteration under a root, or the root above an iteration's folder.

    Raises:
        FormatError: the tracker is unreadable, or what it names is not there.
    """
    if rank_folders(path):
        return _above(path)
    folder, iteration = _tracked(path)
    if not rank_folders(folder):
        named = str(iteration) if iteration else "release"
        raise FormatError(f"{str(path / TRACKER)!r} names {named!r}, but {str(folder)!r} has no mp_rank_* folders")
    return Location(root=path, folder=folder, iteration=iteration)


def locate_dist(path: Path) -> Location:
    """As `locate`, for a `torch_dist` checkpoint."""
    if is_dist_folder(path):
        return _above(path)
    folder, iteration = _tracked(path)
    return Location(root=path, folder=folder, iteration=iteration)


def _above(folder: Path) -> Location:
    number = re.fullmatch(r"iter_(\d+)", folder.name)
    root = folder.parent if (folder.parent / TRACKER).is_file() else folder
    return Location(root=root, folder=folder, iteration=int(number.group(1)) if number else 0)


def _tracked(root: Path) -> tuple[Path, int]:
    """(folder, number) of the iteration that the tracker names; 0 for a release."""
    text = (root / TRACKER).read_text(encoding="ascii", errors="replace").strip()
    if text == "release":
        return root / "release", 0
    if not (text.isdigit() and text.isascii()) or len(text) > 18:
        raise FormatError(f"{str(root / TRACKER)!r} says {text!r}; it must be an iteration number or 'release'")
    return iteration_folder(root, int(text)), int(text)


def rank_folders(folder: Path) -> list[str]:
    """Names of the rank folders there, sorted: the first is that of rank 0 in everything.

    What a second number means, pipeline or expert, only the args inside can tell.
    """
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path.name for path in paths if _RANK_FOLDER.fullmatch(path.name) and path.is_dir()]
