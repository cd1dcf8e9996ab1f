"""Low-rank adapters on all linear layers of the transformer: y = W x + (alpha / rank) B (A x), where W is frozen.

Under tensor parallelism B is cut where W's rows are, A where its columns are; the small product between them is whole
on every rank. Wherever weights leave training, adapters are merged into them, so nobody else knows of them.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1: A is drawn at random and B is zero, so training begins at the
model itself. A's distribution is PEFT's, uniform within 1 / sqrt(inputs).
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn.functional import linear

from align_core.config import LoraConfig
from align_core.megatron.parallel import RankContext
from align_core.megatron.transformer_engine import plain_name

_ADAPTERS = ("lora_a", "lora_b")


class LoraColumnLinear(ColumnParallelLinear):  # type: ignore[misc]
    """A linear layer whose rows are cut over ranks, with an adapter."""

    def __init__(self, inputs: int, outputs: int, *, lora: LoraConfig, gated: bool = False, **settings: Any) -> None:
        """`gated`: the rows are those of gate and up, which a checkpoint keeps apart."""
        super().__init__(inputs, outputs, **settings)
        self._gated = gated
        _add_adapter(self, lora, inputs=inputs, outputs=self.output_size_per_partition)
        set_tensor_model_parallel_attributes(self.lora_b, True, 0, 2 if gated else 1)
        self.lora_a.sequence_parallel = self.sequence_parallel

    def forward(self, hidden: Tensor, *arguments: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
        """[P, 1, inputs] to this rank's [P, 1, outputs], and the bias."""
        output, bias = super().forward(hidden, *arguments, **settings)
        low = linear(hidden, self.lora_a)
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True)
        else:
            low = copy_to_tensor_model_parallel_region(low)
        return output + self.scale * linear(low, self.lora_b), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """megatron-core's description of the weights in a checkpoint."""
        axes = {"weight": 0, "bias": 0, "lora_b": 0}
        found = _described(self, prefix, axes, sharded_offsets, metadata)
        if self._gated:
            key = f"{prefix}lora_b"
            found[key] = apply_swiglu_sharded_factory(found[key], sharded_offsets)
        return found


class LoraRowLinear(RowParallelLinear):  # type: ignore[misc]
    """A linear layer whose columns are cut over ranks, with an adapter."""

    def __init__(self, inputs: int, outputs: int, *, lora: LoraConfig, **settings: Any) -> None:
        super().__init__(inputs, outputs, **settings)
        _add_adapter(self, lora, inputs=self.input_size_per_partition, outputs=outputs)
        set_tensor_model_parallel_attributes(self.lora_a, True, 1, 1)
        self.lora_b.sequence_parallel = self.sequence_parallel

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """This rank's [P, 1, inputs] to [P, 1, outputs], and the bias."""
        output, bias = super().forward(hidden)
        low = linear(hidden, self.lora_a)
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low)
        else:
            low = reduce_from_tensor_model_parallel_region(low)
        return output + self.scale * linear(low, self.lora_b), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """megatron-core's description of the weights in a checkpoint."""
        return _described(self, prefix, {"weight": 1, "lora_a": 1}, sharded_offsets, metadata)


class ExportedChunk:
    """A chunk's weights as everyone else sees them: adapters merged in, without names of their own.

    Merged weights are kept until `forget`, because an engine may still be copying them.
    """

    def __init__(self, chunk: nn.Module) -> None:
        self._chunk = chunk
        self._merged: dict[str, Tensor] = {}

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight of the plan by name."""
        adapted = {f"{name}.weight": module for name, module in self._chunk.named_modules() if _is_adapted(module)}
        for name, parameter in base_parameters(self._chunk).items():
            if name in adapted and name not in self._merged:
                self._merged[name] = merged_weight(adapted[name])
            yield name, self._merged.get(name, parameter)

    def forget(self) -> None:
        """The weights have changed, or their memory is needed."""
        self._merged.clear()


def base_parameters(chunk: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the weight plan knows, by its names: all but adapters."""
    return {
        plain_name(name): value for name, value in chunk.named_parameters() if name.rsplit(".", 1)[-1] not in _ADAPTERS
    }


@torch.no_grad()
def merged_weight(module: Any) -> Tensor:
    """W + (alpha / rank) B A of this rank, added in float32 and rounded once."""
    delta = module.lora_b.float() @ module.lora_a.float()
    merged: Tensor = (module.weight.float() + module.scale * delta).to(module.weight.dtype)
    return merged


@torch.no_grad()
def start_adapters(chunks: Sequence[Any], context: RankContext, *, seed: int) -> None:
    """Freeze all but adapters and a score head, and draw A, the same whatever the layout."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(name.rsplit(".", 1)[-1] in _ADAPTERS or _is_score_head(chunk, name))
        if chunk.pre_process:
            # Recomputed layers give gradients only if what enters them asks for one, and a frozen embedding does not.
            chunk.embedding.register_forward_hook(_ask_for_gradient)
        for layer in chunk.decoder.layers:
            for name, module in layer.named_modules():
                if _is_adapted(module):
                    _draw(module, context, seed=zlib.crc32(f"{seed} {layer.layer_number} {name}".encode()))


def _draw(module: Any, context: RankContext, *, seed: int) -> None:
    """All of A, of which a rank whose columns are cut keeps its own."""
    rank, inputs = module.lora_a.shape
    cut = isinstance(module, LoraRowLinear)
    whole = torch.empty(rank, inputs * context.parallel.tensor if cut else inputs)
    bound = 1.0 / math.sqrt(whole.shape[1])
    whole.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
    module.lora_a.copy_(whole[:, context.tensor * inputs :][:, :inputs] if cut else whole)
    module.lora_b.zero_()


def _add_adapter(module: Any, lora: LoraConfig, *, inputs: int, outputs: int) -> None:
    weight: Tensor = module.weight
    module.scale = lora.alpha / lora.rank
    module.lora_a = nn.Parameter(weight.new_zeros(lora.rank, inputs))
    module.lora_b = nn.Parameter(weight.new_zeros(outputs, lora.rank))


def _described(module: Any, prefix: str, axes: dict[str, int], offsets: Any, metadata: Any) -> dict[str, Any]:
    found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        module.state_dict(prefix="", keep_vars=True),
        prefix,
        axes,
        offsets,
        tp_group=module.tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
    return found


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, LoraColumnLinear | LoraRowLinear)


def _is_score_head(chunk: Any, name: str) -> bool:
    return name.startswith("output_layer.") and not isinstance(chunk.output_layer, ColumnParallelLinear)


def _ask_for_gradient(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    del module, inputs
    return output.requires_grad_() if torch.is_grad_enabled() and output.is_leaf else output
