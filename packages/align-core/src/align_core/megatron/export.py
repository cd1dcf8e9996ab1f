"""A finished model as a Hugging Face directory: on the CPU, tensor by tensor, without a process group."""

from pathlib import Path

from align_convert.copy import to_hf
from align_convert.source import load_any
from align_core.megatron.source import translated_errors


def export_hf(model: Path, out: Path) -> None:
    """Writes `out` from the Megatron checkpoint `model`, in the precision that it has; replaces an older `out`.

    Raises:
        CheckpointError: `model` is no complete checkpoint.
    """
    with translated_errors():
        to_hf(load_any(model), out, overwrite=True)
