"""How Megatron's versions and layer specs spell the same tensors; ours is megatron-core's local spec throughout.

`te`: Transformer Engine fuses each norm into the linear layer behind it. `te-grouped`: its experts share one module
besides. `legacy`: the models that left Megatron-LM with core 0.18, nested dictionaries under older names.
Source: dictionaries written by NVIDIA's converter (core_r0.8.0 with --saver megatron, core_v0.17.0) and mcore 0.16.1.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal, TypeVar, get_args

from align_convert.errors import FormatError

Naming = Literal["local", "te", "te-grouped", "legacy"]
NAMINGS: tuple[str, ...] = get_args(Naming)

_T = TypeVar("_T")

_TE = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_LEGACY_LAYER = {
    "input_layernorm.": "input_norm.",
    "self_attention.linear_qkv.": "self_attention.query_key_value.",
    "self_attention.linear_proj.": "self_attention.dense.",
    "pre_mlp_layernorm.": "post_attention_norm.",
    "mlp.linear_fc1.": "mlp.dense_h_to_4h.",
    "mlp.linear_fc2.": "mlp.dense_4h_to_h.",
}
_OLDER_LAYER = {  # read only: Megatrons before core
    "attention.query_key_value.": "self_attention.linear_qkv.",
    "attention.dense.": "self_attention.linear_proj.",
    "post_attention_layernorm.": "pre_mlp_layernorm.",
}
_LOCAL_EXPERT = re.compile(r"(.*\.mlp\.experts\.)local_experts\.(\d+)\.(linear_fc[12])\.weight")
_GROUPED_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(linear_fc[12])\.weight(\d+)")
_EMBEDDING, _OUTPUT, _FINAL = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "decoder.final_layernorm.weight",
)


def flat_names(model: Mapping[str, object], kind: type[_T]) -> dict[str, _T]:
    """The tensors of a rank's model, whatever its spelling, under the local spec's names.

    Args:
        kind: what a tensor is; anything else, such as `_extra_state`, is left out.
    Raises:
        FormatError: two spellings of one tensor.
    """
    found: dict[str, _T] = {}
    given = _from_legacy(model) if "language_model" in model else model
    for spelled, value in given.items():
        if not isinstance(value, kind) or "_extra_state" in str(spelled):
            continue
        name = _local_name(str(spelled))
        if name in found:
            raise FormatError(f"tensor {name!r} is stored under two names, one of them {spelled!r}")
        found[name] = value
    return found


def spelled(name: str, naming: Naming, *, has_experts: bool) -> str:
    """A local-spec name in a flat spelling; experts keep the norm before them apart also in Transformer Engine's."""
    if naming in ("te", "te-grouped"):
        for ours, theirs in _TE.items():
            if name.endswith("." + ours) and not (has_experts and ours.startswith("pre_mlp")):
                return name.removesuffix(ours) + theirs
    if naming == "te-grouped" and (match := _LOCAL_EXPERT.fullmatch(name)):
        return f"{match[1]}{match[3]}.weight{match[2]}"
    return name


def nested_legacy(tensors: Mapping[str, _T], *, tied: bool) -> "OrderedDict[str, object]":
    """A rank's model as legacy Megatron stores it; a tied head's copy has a place of its own."""
    language: OrderedDict[str, object] = OrderedDict()
    model: OrderedDict[str, object] = OrderedDict(language_model=language)
    encoder: OrderedDict[str, object] = OrderedDict()
    for name, value in tensors.items():
        if name == _EMBEDDING:
            language["embedding"] = OrderedDict(word_embeddings=OrderedDict(weight=value))
        elif name == _OUTPUT and tied:
            model["word_embeddings_for_head"] = OrderedDict(weight=value)
        elif name == _OUTPUT:
            language["output_layer"] = OrderedDict(weight=value, _extra_state=None)
        elif name.startswith("pooler_head."):
            head = model.setdefault("pooler_head", OrderedDict())
            head[name.removeprefix("pooler_head.")] = value  # type: ignore[index]
        else:
            encoder[_to_legacy(name)] = value
    language["encoder"] = encoder
    return model


def _to_legacy(name: str) -> str:
    if name == _FINAL:
        return "final_norm.weight"
    name = name.removeprefix("decoder.")
    for ours, theirs in _LEGACY_LAYER.items():
        if ours in name:
            return name.replace(ours, theirs)
    return name


def _from_legacy(model: Mapping[str, object]) -> dict[str, object]:
    """Flatten the nested dictionaries of a legacy model."""
    language = model["language_model"]
    if not isinstance(language, Mapping):
        raise FormatError("the checkpoint's 'language_model' is not a dictionary")
    found: dict[str, object] = {}
    _take(found, _EMBEDDING, language, "embedding", "word_embeddings", "weight")
    encoder = language.get("encoder", language.get("transformer"))
    for name, value in (encoder if isinstance(encoder, Mapping) else {}).items():
        found[_from_legacy_layer(str(name))] = value
    head = model.get("pooler_head")
    if isinstance(head, Mapping):
        found |= {f"pooler_head.{name}": value for name, value in head.items()}
    else:  # beside a pooler head the language-model head is not computed
        _take(found, _OUTPUT, language, "output_layer", "weight")
        _take(found, _OUTPUT, model, "word_embeddings_for_head", "weight")
    known = {"embedding", "encoder", "transformer", "output_layer"}
    for name in language:
        if name not in known:
            found[f"language_model.{name}"] = language[name]
    return found


def _take(found: dict[str, object], name: str, mapping: Mapping[str, object], *path: str) -> None:
    value: object = mapping
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return
        value = value[key]
    found[name] = value


def _from_legacy_layer(name: str) -> str:
    if name in ("final_norm.weight", "final_layernorm.weight"):
        return _FINAL
    for older, ours in _OLDER_LAYER.items():
        if f".{older}" in name:
            name = name.replace(f".{older}", f".{ours}")
    for ours, theirs in _LEGACY_LAYER.items():
        if f".{theirs}" in name:
            name = name.replace(f".{theirs}", f".{ours}")
    return f"decoder.{name}"


def _local_name(name: str) -> str:
    for ours, theirs in _TE.items():
        if name.endswith("." + theirs):
            return name.removesuffix(theirs) + ours
    if match := _GROUPED_EXPERT.fullmatch(name):
        return f"{match[1]}local_experts.{match[3]}.{match[2]}.weight"
    return name
