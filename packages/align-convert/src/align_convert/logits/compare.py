"""The largest difference between what two directories compute for the same tokens."""

from importlib.util import find_spec

import torch

from align_convert.errors import ConfigError, ConvertError
from align_convert.formats.dist_reader import DistReader
from align_convert.formats.hf_reader import HfReader
from align_convert.formats.megatron_reader import MegatronReader
from align_convert.logits.megatron import megatron_logits
from align_convert.source import Source

TOLERANCE = 1e-4  # float32 sums in another order differ by about 1e-6; a wrong layout by about 1
_SEQUENCES, _LENGTH = 2, 16
_REMEDY = "pip install 'align-convert[verify]'"


def logit_difference(a: Source, b: Source) -> float:
    """Largest absolute difference of the float32 logits (or scores) for random tokens.

    Raises:
        ConvertError: transformers or megatron-core is missing, or does not know the model's settings.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, a.config.vocab_size, (_SEQUENCES, _LENGTH), generator=generator)
    return float((logits_of(a, tokens) - logits_of(b, tokens)).abs().max())


def logits_of(source: Source, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (or scores), float32 [sequences, length, vocabulary or 1], by the library the directory is meant for."""
    if isinstance(source, HfReader):
        return huggingface_logits(source, tokens)
    if find_spec("megatron") is None:
        raise ConvertError(f"--logits needs megatron-core: {_REMEDY}")
    if not isinstance(source, MegatronReader | DistReader):
        raise ConvertError(f"--logits does not know {source.format_name} directories")
    return megatron_logits(source, tokens)


@torch.no_grad()
def huggingface_logits(source: Source, tokens: torch.Tensor) -> torch.Tensor:
    """Logits by transformers' own model of a Hugging Face directory, in float32, attention written out."""
    try:
        import transformers  # noqa: PLC0415 # an extra
    except ImportError as error:
        raise ConvertError(f"--logits needs transformers: {_REMEDY}") from error
    if source.config.head == "pooler":
        raise ConfigError("transformers does not know score heads of two layers; compare bits instead")
    kind = "AutoModelForCausalLM" if source.config.head == "lm" else "AutoModelForSequenceClassification"
    loader = getattr(transformers, kind)
    model = loader.from_pretrained(
        source.root, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    if source.config.head == "lm":
        logits: torch.Tensor = model(tokens).logits
        return logits.float()
    hidden = model.model(tokens).last_hidden_state
    scores: torch.Tensor = model.score(hidden)
    return scores.float()
