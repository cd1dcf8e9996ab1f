"""The model families: one file each, of one shape (a docstring and `FAMILY`), found by name or by HF `model_type`.

To add a family, write `families/<name>.py` with its `FAMILY` and list it here.
"""

from collections.abc import Mapping

from align_convert.errors import ConfigError
from align_convert.families import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from align_convert.rules import Family

_MODULES = (llama, mistral, qwen2, qwen3, mixtral, qwen3_moe)

FAMILIES: Mapping[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}
"""By name; where args alone must tell, the first that fits is taken."""


def family_of_model_type(model_type: object) -> Family:
    """The family whose config.json says `"model_type": model_type`.

    Raises:
        ConfigError: no family does.
    """
    for family in FAMILIES.values():
        if family.model_type == model_type:
            return family
    known = ", ".join(sorted(repr(family.model_type) for family in FAMILIES.values()))
    raise ConfigError(f"model_type {model_type!r} in config.json is not supported; supported: {known}")
