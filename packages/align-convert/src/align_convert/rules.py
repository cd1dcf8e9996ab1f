"""The words in which a model family's weight table is written; see `families/llama.py` for a whole one.

A rule says how one Megatron tensor is made of Hugging Face tensors. Layouts, ranks and both directions follow from it,
so nothing is said twice. Knows nothing about files, torch or numbers: sizes are named, not given.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

Dim = Literal["one", "hidden", "query", "kv", "head", "ffn", "expert_ffn", "experts", "vocab"]
"""A named size: `query` is heads x head size, `kv` is KV heads x head size, `one` is the width of a scalar head."""


class Split(Enum):
    """How tensor parallelism cuts a Megatron tensor."""

    NONE = "every rank holds the whole tensor"
    ROWS = "rank t holds the t-th contiguous chunk of dimension 0"
    COLUMNS = "rank t holds the t-th contiguous chunk of dimension 1"


class Place(Enum):
    """Which pipeline chunks hold a tensor."""

    FIRST = "the first chunk of the pipeline"
    LAYER = "the chunk that holds the layer; the name contains {layer}"
    LAST = "the last chunk of the pipeline"


class When(Enum):
    """For which heads a rule holds."""

    ALWAYS = "any head"
    UNTIED = "a language-model head with weights of its own"
    TIED = "a language-model head sharing the embedding; its second copy exists only when the pipeline has 2+ stages"
    SCORE = "a scalar reward or value head"
    POOLER = "a scalar head of two layers with a ReLU between them, as ChatLearn's reward and value models have"


class Interleave(Enum):
    """In how many rounds the rows of several sources alternate in the Megatron tensor.

    With n rounds, round i takes the i-th n-th of the rows of each source in turn, before round i+1 begins.
    """

    WHOLE = "one round: the sources follow each other"
    KV_GROUPS = "one round a KV group: [queries of the group, its key, its value]"
    TENSOR_PARALLEL = "one round a tensor-parallel rank, so that every rank holds its slice of each source"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One Hugging Face tensor by name (`{layer}`, `{expert}` are global indices) and named shape."""

    name: str
    dims: tuple[Dim, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One Megatron tensor and the sources it is made of.

    `{layer}` in its name is the layer index within the pipeline chunk; `{expert}`, the expert's index within the
    expert-parallel rank, makes it one tensor an expert.
    """

    megatron: str
    sources: tuple[Source, ...]
    place: Place
    split: Split = Split.NONE
    interleave: Interleave = Interleave.WHOLE
    when: When = When.ALWAYS

    @property
    def per_expert(self) -> bool:
        """Whether there is one such tensor an expert, on the expert-parallel rank that holds the expert."""
        return "{expert}" in self.megatron


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Everything that distinguishes one model family from another, as data."""

    name: str
    model_type: str
    """`model_type` in config.json."""
    lm_architecture: str
    """`architectures` entry of the language model."""
    score_architecture: str
    """`architectures` entry of the model with a scalar head."""
    rules: tuple[Rule, ...]
    """In the order in which Hugging Face lists the sources."""
    derived: tuple[str, ...] = ()
    """Regular expressions of HF tensors that are computed from the config and need not be copied."""
    tied_alias: tuple[str, str] | None = ("lm_head.weight", "model.embed_tokens.weight")
    """(alias, original): a copy that some HF checkpoints with tied embeddings still store."""
    required_settings: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """config.json keys whose value, where present, must be one of these; others would need rules not written here."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """What transformers takes for keys that config.json does not have, where that differs from Llama."""
    megatron_args: Mapping[str, object] = field(default_factory=dict)
    """Megatron's args that differ from a Llama's; they also tell the family where there is no config.json."""
    experts_keys: tuple[str, ...] = ()
    """config.json keys of the number of experts, the first for writing; none for dense models."""
    expert_ffn_key: str = "moe_intermediate_size"
    """config.json key of an expert's MLP width."""

    @property
    def has_experts(self) -> bool:
        """Whether the MLP is a mixture of experts."""
        return bool(self.experts_keys)
