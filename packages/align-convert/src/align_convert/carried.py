"""The files that belong to a model beside its weights: config, generation config, tokenizer, chat template, licence.

They travel from directory to directory unchanged, except that config.json names the weights' type and head.
"""

import fnmatch
import json
import shutil
from pathlib import Path

import torch

from align_convert.atomic import new_file
from align_convert.config import ModelConfig
from align_convert.dtypes import dtype_name

_CARRIED = (
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "USE_POLICY*",
)


def carried_files(directory: Path) -> list[Path]:
    """Those files of `directory` that travel with the weights, sorted; config.json is not among them."""
    files = (path for path in sorted(directory.iterdir()) if path.is_file())
    return [path for path in files if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _CARRIED)]


def write_description(
    directory: Path, config: ModelConfig, *, dtype: torch.dtype, carry_from: Path | None = None
) -> None:
    """Write config.json and copy the carried files of `carry_from` into `directory`."""
    with new_file(directory / "config.json") as file:
        raw = json.dumps(config_json(config, dtype=dtype), indent=2, ensure_ascii=False)
        file.write((raw + "\n").encode("utf-8"))
    for source in carried_files(carry_from) if carry_from is not None else []:
        with source.open("rb") as reader, new_file(directory / source.name) as writer:
            shutil.copyfileobj(reader, writer)


def config_json(config: ModelConfig, *, dtype: torch.dtype) -> dict[str, object]:
    """The raw config with the weights' type under the spellings it uses; `torch_dtype`, known to all, if none."""
    spellings = [key for key in ("dtype", "torch_dtype") if key in config.hf] or ["torch_dtype"]
    return {**config.hf, **dict.fromkeys(spellings, dtype_name(dtype))}
