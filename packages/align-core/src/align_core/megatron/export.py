"""A finished model as a Hugging Face directory: on the CPU, tensor by tensor, without a process group."""

import json
import shutil
from pathlib import Path

from align_convert.copy import to_hf
from align_convert.source import load_any
from align_core.atomic import replace_directory, write_json
from align_core.layouts import translated_errors
from align_core.text import load_tokenizer


def export_hf(model: Path, out: Path) -> None:
    """Writes `out` from the Megatron checkpoint `model`, in the precision that it has; replaces an older `out`.

    Raises:
        CheckpointError: `model` is no complete checkpoint.
    """
    partial = out.with_name(f".{out.name}.partial")
    with translated_errors():
        source = load_any(model)
        to_hf(source, partial, overwrite=True)
        if source.config.head == "score":
            _set_padding(partial)
    try:
        replace_directory(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _set_padding(directory: Path) -> None:
    """Names a padding token that ends no sequence.

    transformers reads the score at the last token that is not padding. Where the tokenizer pads with its
    end-of-sequence token, that would be the token before the end, and another score, without a word.
    """
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "pad_token_id": load_tokenizer(directory).padding_id})
