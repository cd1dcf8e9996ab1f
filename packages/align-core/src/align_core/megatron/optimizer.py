"""Gradients, AdamW and the learning-rate schedule: megatron-core's, set up so that gradients are summed, not averaged.

The optimizer is megatron-core's DistributedOptimizer: each data-parallel rank holds and updates its share of AdamW's
state, and of the float32 main weights that bfloat16 training has. Knows nothing about batches and losses.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import copy_tensor_model_parallel_attributes
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from align_core.config import Dtype, OptimizerConfig
from align_core.errors import AlignError, ConfigError
from align_core.megatron.model import LlamaModel
from align_core.megatron.quiet import quiet_megatron
from align_core.megatron.shards import OwnedRange
from align_core.megatron.spec import DTYPES

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What one optimizer step did."""

    grad_norm: float
    """Global norm of the gradient before clipping."""
    lr: float
    """Learning rate of this step."""
    skipped: bool
    """Loss or gradient was not finite: the weights are as they were."""


class Optimization:
    """One rank's gradients, optimizer and schedule."""

    @quiet_megatron()
    def __init__(self, chunks: Sequence[LlamaModel], config: OptimizerConfig, *, steps: int, dtype: Dtype) -> None:
        check_schedule(config, steps=steps)
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.chunks: list[Any] = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
        chunks[0].config.finalize_model_grads_func = _sum_gradients
        with _torch_adamw():
            self.optimizer: Any = get_megatron_optimizer(
                MegatronOptimizerConfig(
                    optimizer="adam",
                    lr=config.lr,
                    min_lr=config.min_lr,
                    weight_decay=config.weight_decay,
                    adam_beta1=config.beta1,
                    adam_beta2=config.beta2,
                    adam_eps=config.eps,
                    clip_grad=config.clip_grad,
                    bf16=dtype == "bfloat16",
                    params_dtype=DTYPES[dtype],
                    use_distributed_optimizer=True,
                ),
                self.chunks,
                use_gloo_process_groups=False,
            )
        # One, and with experts on different ranks a second for these, whose copies are other ranks than the rest's.
        self._inners: list[Any] = self.optimizer.chained_optimizers
        for inner in self._inners:
            _detach_views(inner)
            for group in inner.optimizer.param_groups:
                if group["params"] and group["params"][0].is_cuda:
                    group.update(fused=True, foreach=False)  # one pass over memory; no temporaries of the model's size
        self.scheduler: Any = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=config.warmup_steps,
            lr_decay_steps=steps,
            lr_decay_style=config.schedule,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        self._clip = config.clip_grad
        self._max_skipped = config.max_skipped
        self._skipped = 0
        self._device = next(chunks[0].parameters()).device

    @property
    def steps_done(self) -> int:
        """Updates so far."""
        return int(self.scheduler.num_steps)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @quiet_megatron()
    def step(self, loss: float) -> Update:
        """Clip, update, move the schedule on; leave the weights alone if loss or gradient is not finite.

        Raises:
            AlignError: too many steps in a row were skipped.
        """
        self.optimizer.prepare_grads()
        norm = self._gradient_norm()
        rate = float(self.optimizer.param_groups[0]["lr"])
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if skipped:
            self._count_skipped(loss, norm)
        else:
            self._skipped = 0
            if 0 < self._clip < norm:
                whole = torch.tensor(norm, device=self._device)
                for inner in self._inners:
                    clip_grads_with_norm_(inner.get_parameters(), self._clip, whole)
            self.optimizer.step_with_ready_grads()
        # The schedule follows the steps of the stage, of which a skipped one is one.
        self.scheduler.step(1)
        return Update(grad_norm=norm, lr=rate, skipped=skipped)

    def _count_skipped(self, loss: float, norm: float) -> None:
        self._skipped += 1
        what = f"step {self.steps_done} has loss {loss:g} and gradient norm {norm:g}"
        if self._skipped > self._max_skipped:
            raise AlignError(
                f"{what}, after {self._skipped - 1} skipped steps before it (optimizer.max_skipped is "
                f"{self._max_skipped}); lower optimizer.lr, or look at the data of these steps"
            )
        logger.warning("%s: skipped, the weights stay as they are", what)

    def state_tensors(self) -> Iterator[Tensor]:
        """Main weights that are not the model's own, and AdamW's averages: what only an update needs."""
        own = {parameter.untyped_storage()._cdata for chunk in self.chunks for parameter in chunk.parameters()}
        for inner in self._inners:
            for main in (main for group in inner.optimizer.param_groups for main in group["params"]):
                if main.untyped_storage()._cdata not in own:
                    yield main
                yield from (v for v in inner.optimizer.state.get(main, {}).values() if isinstance(v, Tensor))

    def gradient_tensors(self) -> Iterator[Tensor]:
        """The flat gradient buffers, whose contents are worthless between steps."""
        for chunk in self.chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                yield buffer.grad_data

    def _gradient_norm(self) -> float:
        """Global norm over all ranks; looked at before any weight moves, clipping or not."""
        grads = [grad for inner in self._inners for grad in inner.get_main_grads_for_grad_norm()]
        own = get_total_norm(grads).to(self._device) if grads else torch.zeros((), device=self._device)
        square = own.float() ** 2
        dist.all_reduce(square, group=self._inners[0].get_grad_stats_parallel_group())
        return math.sqrt(float(square))

    def owned(self) -> list[OwnedRange]:
        """This rank's share of the state, made of zeros if no step has been taken."""
        return [part for inner in self._inners for part in self._owned_of(inner)]

    def _owned_of(self, inner: Any) -> list[OwnedRange]:
        found = []
        for parameter in inner.model_param_gbuf_map:
            tensors = dict(inner._get_main_param_and_optimizer_states(parameter))
            main = tensors.pop("param")
            if "exp_avg" not in tensors:
                tensors = _new_state(inner, main)
            values = {name: tensors[name] for name in ("exp_avg", "exp_avg_sq")}
            if parameter.dtype is not torch.float32:
                values["main_weight"] = main.detach()
            found.append(
                OwnedRange(
                    parameter=parameter,
                    start=inner._get_model_param_range_map(parameter)["param"].start,
                    values=values,
                )
            )
        return found

    @property
    def adam_steps(self) -> int:
        """Updates that AdamW has done, which skipped steps are not."""
        states = (state for inner in self._inners for state in inner.optimizer.state.values())
        return int(next((state["step"] for state in states), 0))

    def restore(self, *, adam_steps: int, schedule: dict[str, Any]) -> None:
        """Continue, after the weights, and the tensors of `owned` if `adam_steps` is not 0, have been loaded.

        Args:
            schedule: its position is taken; its shape is this run's settings.
        """
        for inner in self._inners:
            if not adam_steps:
                inner.optimizer.state.clear()
            for state in inner.optimizer.state.values():
                state["step"].fill_(adam_steps)
        if not adam_steps:
            self.optimizer.reload_model_params()
        self.scheduler.num_steps = 0  # load_state_dict adds to it
        self.scheduler.load_state_dict(schedule)


def check_schedule(config: OptimizerConfig, *, steps: int) -> None:
    """Refuse settings that make no schedule."""
    if config.warmup_steps >= steps:
        raise ConfigError(
            f"optimizer.warmup_steps {config.warmup_steps} leaves none of the {steps} steps at full learning rate; "
            f"use at most {steps - 1}"
        )
    if config.min_lr > config.lr:
        raise ConfigError(f"optimizer.min_lr {config.min_lr} is above optimizer.lr {config.lr}; lower it")


@contextlib.contextmanager
def _torch_adamw() -> Iterator[None]:
    """Within it, megatron-core takes torch's AdamW also where Transformer Engine or Apex is installed: theirs keep the
    number of steps elsewhere, and checkpoints here know torch's."""
    before = megatron_optimizer.USING_PYTORCH_OPTIMIZER
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = True
    try:
        yield
    finally:
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = before


def _new_state(optimizer: Any, main: Tensor) -> dict[str, Tensor]:
    """What AdamW makes at its first step."""
    state = optimizer.optimizer.state[main]
    state["step"] = torch.zeros((), dtype=torch.float32, device=main.device if main.is_cuda else "cpu")
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(main, memory_format=torch.preserve_format)
    return dict(state)


def _detach_views(optimizer: Any) -> None:
    """Make leaves of the ranges of float32 parameters that are updated: torch warns of gradients set on views."""
    leaves: dict[int, Tensor] = {}
    for ranges in optimizer.shard_fp32_groups:
        for position, view in enumerate(ranges):
            leaf = leaves[id(view)] = view.detach()
            copy_tensor_model_parallel_attributes(leaf, view)
            if hasattr(view, "shared"):
                leaf.shared = view.shared
            ranges[position] = leaf
    for group in optimizer.optimizer.param_groups:
        group["params"] = [leaves.get(id(parameter), parameter) for parameter in group["params"]]


def _sum_gradients(models: Sequence[Any], num_tokens: object = None, **groups: Any) -> None:
    """megatron-core's gradient exchange without its division by a token count: our losses are divided already."""
    del num_tokens
    finalize_model_grads(list(models), None, **groups)
