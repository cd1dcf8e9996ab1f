"""The three storage types of weights, under their names on the command line, in torch and in safetensors headers."""

import torch

from align_convert.errors import FormatError

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SAFETENSORS_NAMES: dict[torch.dtype, str] = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def from_safetensors_name(code: str, *, where: str) -> torch.dtype:
    """The torch type of a code in a safetensors header; `where` names the tensor in the error."""
    for dtype, name in SAFETENSORS_NAMES.items():
        if name == code:
            return dtype
    known = ", ".join(sorted(SAFETENSORS_NAMES.values()))
    raise FormatError(f"{where} has type {code}; weights must be one of {known}")
