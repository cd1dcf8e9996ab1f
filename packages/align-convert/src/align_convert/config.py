"""The neutral description of a model: what the weight plan and Megatron's args need to know.

Read from a Hugging Face config.json, old and new spellings; the raw config is kept, so nothing in it is lost on the
way through Megatron. Knows nothing about parallel layouts or tensors' values, and imports no torch.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, TypeVar

from align_convert.errors import ConfigError
from align_convert.families import FAMILIES, family_of_model_type
from align_convert.rules import Dim, Family, Place, Rule, When

Head = Literal["lm", "score", "pooler"]
"""`lm` gives logits over the vocabulary, `score` one number a position (reward and value models), `pooler` the same
from two layers with a ReLU between them (ChatLearn's reward and value models)."""

_POOLER_KEY = "score_head_layers"  # ours: transformers knows no such head

_Number = TypeVar("_Number", int, float)
_HF_DEFAULT_ROPE_THETA = 10000.0  # what transformers takes where a Llama config.json says nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """One model, in words of neither Hugging Face nor Megatron."""

    family: str
    """Key of `align_convert.families.FAMILIES`."""
    num_layers: int
    hidden_size: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads (Megatron: query groups): `num_heads` for multi-head, 1 for multi-query attention."""
    head_dim: int
    """Width of one head; not always hidden_size / num_heads."""
    ffn_size: int
    """Width of the gated MLP; gate and up each have as many rows."""
    vocab_size: int
    """True size: padding is a matter of the layout."""
    norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, object] | None
    """Hugging Face's scaling mapping with the key `rope_type`; None for plain RoPE."""
    max_positions: int
    tied_embeddings: bool
    """True where the language-model head is the embedding; a score head is never tied."""
    head: Head
    hf: Mapping[str, object]
    """The raw config.json."""
    num_experts: int | None = None
    """Experts a layer; None for dense models."""
    experts_per_token: int | None = None
    """Experts that the router chooses for each token."""
    expert_ffn_size: int | None = None
    """Width of one expert's gated MLP."""

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, object]) -> "ModelConfig":
        """Read a Hugging Face directory, or the contents of its config.json.

        Raises:
            ConfigError: no or unreadable config.json, an unsupported family or setting, a missing or impossible value.
        """
        raw = source if isinstance(source, Mapping) else read_config_json(Path(source))
        family = family_of_model_type(raw.get("model_type"))
        _check_required_settings(raw, family)
        hf = {**family.defaults, **raw}
        head = _read_head(hf, family)
        num_heads = _read_number(hf, "num_attention_heads", int)
        hidden_size = _read_number(hf, "hidden_size", int)
        rope_theta, rope_scaling = _read_rope(hf)
        config = cls(
            family=family.name,
            num_layers=_read_number(hf, "num_hidden_layers", int),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=_read_number(hf, "num_key_value_heads", int, default=num_heads),
            head_dim=_read_number(hf, "head_dim", int, default=hidden_size // num_heads),
            ffn_size=_read_number(hf, "intermediate_size", int),
            vocab_size=_read_number(hf, "vocab_size", int),
            norm_eps=_read_number(hf, "rms_norm_eps", float, default=1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_positions=_read_number(hf, "max_position_embeddings", int, default=2048),
            tied_embeddings=head == "lm" and bool(hf.get("tie_word_embeddings", False)),
            head=head,
            hf=dict(raw),
            **_read_experts(hf, family),
        )
        config._check_heads()
        return config

    def _check_heads(self) -> None:
        if self.num_heads % self.num_kv_heads:
            choices = _one_of([n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0])
            raise ConfigError(
                f"num_key_value_heads {self.num_kv_heads} does not divide {self.num_heads} attention heads; "
                f"use {choices}"
            )
        if {**self.table.defaults, **self.hf}.get("head_dim") is None and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"{self.num_heads} attention heads do not divide hidden_size {self.hidden_size}; "
                "set head_dim in config.json"
            )

    @property
    def table(self) -> Family:
        """The family's weight table."""
        if self.family not in FAMILIES:
            known = ", ".join(sorted(map(repr, FAMILIES)))
            raise ConfigError(f"family {self.family!r} is not known; known: {known}")
        return FAMILIES[self.family]

    @property
    def renormalizes_experts(self) -> bool:
        """Whether the weights of a token's chosen experts are made to add up to 1, or are shares of all experts."""
        return bool({**self.table.defaults, **self.hf}.get("norm_topk_prob", True))

    def size(self, dim: Dim) -> int:
        """The number behind a named size."""
        sizes: dict[Dim, int] = {
            "one": 1,
            "hidden": self.hidden_size,
            "query": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
            "head": self.head_dim,
            "ffn": self.ffn_size,
            "expert_ffn": self.expert_ffn_size or 0,
            "experts": self.num_experts or 0,
            "vocab": self.vocab_size,
        }
        return sizes[dim]

    def holds(self, when: When) -> bool:
        """Whether rules marked `when` apply to this model's head."""
        if when is When.ALWAYS:
            return True
        if self.head != "lm":
            return when is (When.SCORE if self.head == "score" else When.POOLER)
        return when is (When.TIED if self.tied_embeddings else When.UNTIED)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor name with its shape, in Hugging Face's order."""
        shapes: dict[str, tuple[int, ...]] = {}
        rules = [rule for rule in self.table.rules if self.holds(rule.when)]
        for rule in (rule for rule in rules if rule.place is Place.FIRST):
            shapes.update(self._source_shapes(rule, layer=0))
        for layer in range(self.num_layers):
            for rule in (rule for rule in rules if rule.place is Place.LAYER):
                shapes.update(self._source_shapes(rule, layer=layer))
        for rule in (rule for rule in rules if rule.place is Place.LAST):
            shapes.update(self._source_shapes(rule, layer=0))
        return shapes

    def _source_shapes(self, rule: Rule, *, layer: int) -> dict[str, tuple[int, ...]]:
        experts = range(self.num_experts or 0) if rule.per_expert else range(1)
        return {
            source.name.format(layer=layer, expert=expert): tuple(self.size(dim) for dim in source.dims)
            for expert in experts
            for source in rule.sources
        }

    def with_head(self, head: Head) -> "ModelConfig":
        """The same body under another head; the raw config follows, so it can be saved as it is."""
        if head == self.head:
            return self
        of_heads = ("num_labels", "id2label", "label2id", _POOLER_KEY)
        raw = {key: value for key, value in self.hf.items() if key not in of_heads}
        if head != "lm":
            raw |= {
                "architectures": [self.table.score_architecture],
                "id2label": {"0": "LABEL_0"},
                "label2id": {"LABEL_0": 0},
            }
            if head == "pooler":
                raw[_POOLER_KEY] = 2
            return dataclasses.replace(self, head=head, tied_embeddings=False, hf=raw)
        raw["architectures"] = [self.table.lm_architecture]
        tied = bool(raw.get("tie_word_embeddings", False))
        return dataclasses.replace(self, head="lm", tied_embeddings=tied, hf=raw)


def read_config_json(path: Path) -> dict[str, object]:
    """The contents of `path`/config.json.

    Raises:
        ConfigError: it is not there or is not a JSON object.
    """
    file = path / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{str(path)!r} has no config.json; give a Hugging Face model directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{str(file)!r} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{str(file)!r} holds a JSON {type(raw).__name__}, not an object")
    return raw


def _read_number(hf: Mapping[str, object], key: str, kind: type[_Number], *, default: _Number | None = None) -> _Number:
    """A positive number; a missing or null key takes `default`, which is what transformers' LlamaConfig would do."""
    value = hf.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"config.json has no {key!r}; add it (a positive {kind.__name__})")
    accepted = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted) or value <= 0:
        raise ConfigError(f"config.json: {key!r} is {value!r}; it must be a positive {kind.__name__}")
    return kind(value)


def _read_rope(hf: Mapping[str, object]) -> tuple[float, dict[str, object] | None]:
    """(theta, scaling): both in `rope_parameters` since transformers 5, in `rope_theta` and `rope_scaling` before."""
    parameters: dict[str, object] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = hf.get(key)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"config.json: {key!r} is {value!r}; it must be an object or null")
        parameters |= value
    theta = _read_number({**hf, **parameters}, "rope_theta", float, default=_HF_DEFAULT_ROPE_THETA)
    parameters.pop("rope_theta", None)
    old_type = parameters.pop("type", "default")
    parameters.setdefault("rope_type", old_type)
    return theta, None if parameters["rope_type"] == "default" else parameters


def _read_head(hf: Mapping[str, object], family: Family) -> Head:
    """Which head `architectures` names; a config without that key is a language model's."""
    architectures = hf.get("architectures") or [family.lm_architecture]
    known = (family.lm_architecture, family.score_architecture)
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in known:
        raise ConfigError(f"config.json: 'architectures' is {architectures!r}; supported: {_one_of(sorted(known))}")
    if architectures[0] == family.lm_architecture:
        return "lm"
    labels = hf.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else hf.get("num_labels", 2)
    if count != 1:
        raise ConfigError(f"a score head with {count!r} labels is not supported; set num_labels to 1 in config.json")
    layers = hf.get(_POOLER_KEY, 1)
    if layers not in (1, 2):
        raise ConfigError(f"config.json: {_POOLER_KEY!r} is {layers!r}; a score head has 1 or 2 layers")
    return "score" if layers == 1 else "pooler"


class _Experts(TypedDict, total=False):
    num_experts: int
    experts_per_token: int
    expert_ffn_size: int


def _read_experts(hf: Mapping[str, object], family: Family) -> _Experts:
    """The sizes that only a mixture of experts has."""
    if not family.has_experts:
        return {}
    stored = [key for key in family.experts_keys if key in hf and key not in family.defaults]
    return {
        "num_experts": _read_number(hf, [*stored, family.experts_keys[0]][0], int),
        "experts_per_token": _read_number(hf, "num_experts_per_tok", int),
        "expert_ffn_size": _read_number(hf, family.expert_ffn_key, int),
    }


def _check_required_settings(hf: Mapping[str, object], family: Family) -> None:
    for key, allowed in family.required_settings.items():
        if key in hf and hf[key] not in allowed:
            raise ConfigError(
                f"config.json: {key!r} is {hf[key]!r}; family {family.name!r} supports {_one_of(list(allowed))}"
            )


def _one_of(choices: list[int] | list[str] | list[object]) -> str:
    """`1, 2 or 4`."""
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
