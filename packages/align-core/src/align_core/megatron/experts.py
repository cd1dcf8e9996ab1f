"""A mixture of experts in the place of a layer's MLP: megatron-core's layer with a router that says how it spreads.

Tokens travel to the ranks that hold their experts and back (all-to-all); no token is ever dropped. Each rank computes
its experts one after another. How balanced the routing is, is counted in training passes only, over real tokens only.
Knows nothing about losses and checkpoints.

Legend: T tokens of this rank in a micro-batch, E experts, K experts a token.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from align_convert.config import ModelConfig
from align_core.config import ParallelConfig, TrainingConfig
from align_core.megatron.layers import swiglu
from align_core.megatron.microbatch import MicroBatch


class _Attached(torch.autograd.Function):
    """Its first input, unchanged; the second is added to the loss, wherever that is computed."""

    @staticmethod
    def forward(ctx: Any, passed: Tensor, term: Tensor) -> Tensor:
        return passed.view_as(passed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        return gradient, gradient.new_ones((), dtype=torch.float32)


_attach: Callable[[Tensor, Tensor], Tensor] = _Attached.apply


class BalancedRouter(TopKRouter):  # type: ignore[misc]
    """megatron-core's router, with a load-balancing loss over the real tokens of each micro-batch, and its counts.

    E sum_i f_i P_i of a layer: f_i the share of choices that fell on expert i, P_i the mean of its softmax over all
    experts; 1 where both are even. Micro-batches weigh as much as they have of the batch's tokens, layers the same.
    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 4 to 6, whose f counts one choice a token.
    """

    def __init__(self, config: Any, pg_collection: Any = None, *, coef: float) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self._coef = coef
        self._batch_tokens = 1
        self._counts: Tensor | None = None

    def start_step(self, tokens: int) -> None:
        """Forget the counts; `tokens` are those of the whole batch, over all ranks."""
        self._batch_tokens, self._counts = tokens, None

    def counted(self) -> Tensor:
        """float32 [2, E], choices of each expert, and its part of the mean softmax of the batch; of this rank."""
        return torch.zeros(2, self.num_experts, device=self.weight.device) if self._counts is None else self._counts

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[P, 1, E] logits to [T, E] weights and the choices; `padding_mask` is True where there is no real token."""
        weights_TE, chosen_TE = super().routing(logits)
        # A pass that is computed again for its gradient has none the first time.
        if not (torch.is_grad_enabled() and self.training):
            return weights_TE, chosen_TE
        real_T = logits.new_ones(len(chosen_TE), dtype=torch.bool) if padding_mask is None else ~padding_mask.view(-1)
        with torch.set_grad_enabled(self._coef > 0):
            term = self._term(logits.view(-1, self.num_experts), chosen_TE & real_T[:, None], real_T)
        if self._coef > 0:
            weights_TE = _attach(weights_TE, self._coef * term)
        return weights_TE, chosen_TE

    def _term(self, logits_TE: Tensor, chosen_TE: Tensor, real_T: Tensor) -> Tensor:
        """This micro-batch's and rank's part of the loss; also counts."""
        own_E = chosen_TE.sum(0).float()
        all_E = own_E.clone()
        if self.tp_cp_group.size() > 1:  # whose ranks have parts of the same micro-batch
            dist.all_reduce(all_E, group=self.tp_cp_group)
        shares_E = (torch.softmax(logits_TE.float(), dim=-1) * real_T[:, None]).sum(0) / self._batch_tokens
        term: Tensor = self.num_experts * (all_E / all_E.sum().clamp(min=1) * shares_E).sum() / self.config.num_layers
        self._counts = self.counted() + torch.stack([own_E, shares_E.detach()])
        return term


def expert_layer(training: TrainingConfig) -> ModuleSpec:
    """Router and experts, whose weights have the names of megatron-core's SequentialMLP."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 forgets to, where there is no Transformer Engine
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=swiglu)
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=SequentialMLP, submodules=linear),
            router=partial(BalancedRouter, coef=training.balance_coef),
        ),
    )


def expert_settings(config: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> dict[str, Any]:
    """megatron-core's settings of a mixture of experts; none for a dense model."""
    if config.num_experts is None:
        return {}
    found: dict[str, Any] = {
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.expert_ffn_size,
        "moe_router_topk": config.experts_per_token,
        "moe_router_pre_softmax": not config.renormalizes_experts,
        "moe_router_load_balancing_type": "none",  # `BalancedRouter` has its own
        "moe_router_dtype": "fp32" if training.router_float32 else None,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.tensor,
    }
    if training.recomputed & {"mlp", "activation"}:
        found |= {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    return found


def padding_mask(chunk: Any, micro: MicroBatch) -> Tensor | None:
    """bool [1, P], True where this rank's layers see no real token; None for a dense model."""
    model = getattr(chunk, "module", chunk)  # a chunk that trains is wrapped
    config = model.config
    if config.num_moe_experts is None:
        return None
    mask = micro.own_padding
    if config.sequence_parallel and not model.pre_process:  # the first stage cuts it beside the embedding
        ranks = config.tensor_model_parallel_size
        mask = mask.chunk(ranks, dim=1)[model.pg_collection.tp.rank()]
    return mask


def start_routing(chunks: Sequence[Any], tokens: int) -> None:
    """To be called before a step on a batch of so many tokens."""
    for router in _routers(chunks):
        router.start_step(tokens)


def routing_metrics(chunks: Sequence[Any], config: ModelConfig) -> dict[str, float]:
    """How a step's tokens spread over the experts, over all ranks, which all must call it; nothing for a dense model.

    `expert_load` is what the busiest expert of a layer has to do, in terms of the mean (1 at best), on average over the
    layers, `expert_load_max` in the worst layer; `experts_idle` the share of experts without a token; `balance_loss`
    the load-balancing loss before its weight, of the batch as a whole, which no cut into micro-batches changes.
    """
    if config.num_experts is None:
        return {}
    found = torch.zeros(config.num_layers, 2, config.num_experts, device=next(chunks[0].parameters()).device)
    for router in _routers(chunks):
        found[router.layer_number - 1] = router.counted()
    dist.all_reduce(found)
    counts, shares = found.cpu().unbind(1)
    balance = config.num_experts * (counts / counts.sum(1, keepdim=True).clamp(min=1) * shares).sum(1)
    load = counts.amax(1) / counts.mean(1).clamp(min=1e-9)
    return {
        "expert_load": float(load.mean()),
        "expert_load_max": float(load.max()),
        "experts_idle": float((counts == 0).float().mean()),
        "balance_loss": float(balance.mean()),
    }


def _routers(chunks: Sequence[Any]) -> Iterator[BalancedRouter]:
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, BalancedRouter))
