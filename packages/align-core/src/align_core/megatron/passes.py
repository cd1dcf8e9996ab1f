"""Sends micro-batches through the model and its pipeline stages: forward only, or forward and backward.

Knows the schedule of megatron-core and the shapes at the head; knows nothing about losses, optimizers and files.

Legend: B sequences, N tokens of a micro-batch, P with padding, V this rank's share of the vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from align_algos.errors import InputError, NonFiniteError
from align_algos.fused import KEPT_SHARE, fused_logprobs
from align_algos.losses import LossOutput
from align_core.megatron.agreement import Agreement
from align_core.megatron.experts import padding_mask
from align_core.megatron.microbatch import MicroBatch
from align_core.megatron.quiet import quiet_megatron

# Logits of a micro-batch that are kept from the forward to the backward pass, so that they need not be computed again:
# all of 16k tokens over 32k rows of the vocabulary (the head then costs three matrix products, as with `fused_loss`,
# which would have to know where a micro-batch may be cut), and a share of what is larger. The rest, and all float32
# copies, exist a block at a time.
_KEPT_LOGITS = 1 << 30

Read = Callable[[Tensor, MicroBatch], Tensor]
"""What is read off the head's output: (output [1, P, ...], micro-batch) to log-probs [N], values [N] or scores [B]."""

Loss = Callable[[Tensor, MicroBatch], LossOutput]
"""(What was read, micro-batch) to its share of loss and metrics; communicates with no other rank."""


def read_logprobs(chunk: Any, vocab_size: int, agreement: Agreement, *, for_loss: bool = False) -> Read:
    """Log-prob of each token given those before it in its sequence, 0 for the first, over the real vocabulary; NaN
    where logits are not finite.

    Args:
        chunk: the last chunk of the model, which holds the head's weight where this rank has it.
        agreement: keeps what the head refuses, which is the same on all tensor-parallel ranks; all is NaN then.
        for_loss: 0 for tokens that no loss looks at too: a prompt then costs nothing at the head, which in a small
            model with a large vocabulary is a good part of all.
    """

    def next_logprobs(hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
        try:
            return _next_logprobs(hidden_NH, chunk, targets_N, vocab_size)
        except InputError as error:
            agreement.keep(error)
            return hidden_NH.float().sum(-1) * math.nan  # with a backward pass, as the other ranks have

    def read(hidden_1PH: Tensor, micro: MicroBatch) -> Tensor:
        share = micro.packed.share
        if share is not None:
            padded_P = torch.nn.functional.pad(micro.targets, (0, micro.tokens.shape[1] - len(micro.targets)))
            own_L = next_logprobs(hidden_1PH[0], padded_P[share.own])
            of_next_N = share.whole(own_L, shared_work=False)[: len(micro.targets)]
        elif for_loss:
            rows = micro.target_rows()
            found = next_logprobs(hidden_1PH[0, rows - 1], micro.tokens[0, rows])
            return found.new_zeros(len(micro.targets)).index_put((rows,), found)
        else:
            of_next_N = next_logprobs(hidden_1PH[0, : len(micro.targets)], micro.targets)
        shifted_N = torch.cat([of_next_N.new_zeros(1), of_next_N[:-1]])
        return torch.where(micro.is_first, 0.0, shifted_N)

    return read


def _next_logprobs(hidden_NH: Tensor, chunk: Any, targets_N: Tensor, vocab_size: int) -> Tensor:
    group, weight_VH = parallel_state.get_tensor_model_parallel_group(), chunk.head_weight
    logits_bytes = len(hidden_NH) * len(weight_VH) * hidden_NH.element_size()
    keep = max(_KEPT_LOGITS, int(KEPT_SHARE * logits_bytes))
    return fused_logprobs(
        hidden_NH,
        weight_VH,
        targets_N,
        vocab_size=vocab_size,
        tp_group=group,
        keep_bytes=keep,
        check_finite=False,  # whoever gets the log-probs looks, after the last exchange with other ranks
    ).logprobs_N


def read_scores(output_1P1: Tensor, micro: MicroBatch) -> Tensor:
    """The scalar at the last token of each sequence, float32 [B]."""
    return _whole(output_1P1, micro)[micro.last].float()


def read_values(output_1P1: Tensor, micro: MicroBatch) -> Tensor:
    """The scalar before each token is chosen, at the token before it, float32 [N]; 0 for the first of a sequence."""
    after_N = _whole(output_1P1, micro)[: len(micro.targets)].float()
    shifted_N = torch.cat([after_N.new_zeros(1), after_N[:-1]])
    return torch.where(micro.is_first, 0.0, shifted_N)


def _whole(output_1P1: Tensor, micro: MicroBatch) -> Tensor:
    """[P], the scalars of all ranks' tokens."""
    share, own = micro.packed.share, output_1P1[0, :, 0]
    return own if share is None else share.whole(own, shared_work=False)


@torch.no_grad()
def forward(chunks: Sequence[Any], micros: Sequence[MicroBatch], read: Read) -> list[Tensor]:
    """What `read` finds in each micro-batch; an empty list on all but the last pipeline stage."""

    def collect(micro: MicroBatch, output: Tensor, non_loss_data: bool = True) -> Tensor:
        del non_loss_data  # how the schedule calls it
        return read(output, micro) if len(micro.indices) else output.new_zeros(0)

    return _run(chunks, micros, collect, forward_only=True)


@torch.no_grad()
def forward_losses(
    chunks: Sequence[Any], micros: Sequence[MicroBatch], read: Read, loss: Loss, agreement: Agreement
) -> list[dict[str, Tensor]]:
    """`loss` and metrics of each micro-batch; what the loss refuses is kept, the model's own NaN too."""

    def with_place(values: Tensor, micro: MicroBatch) -> LossOutput:
        try:
            return loss(values, micro)
        except NonFiniteError as error:
            raise micro.not_finite(values) or error from error

    parts = []
    for micro, values in zip(micros, forward(chunks, micros, read)):
        if len(micro.indices):
            value, metrics = _attempted(with_place, values, micro, agreement)
            parts.append({"loss": value, **metrics})
    return parts


def forward_backward(
    chunks: Sequence[Any], micros: Sequence[MicroBatch], read: Read, loss: Loss, agreement: Agreement
) -> list[dict[str, Tensor]]:
    """Add the gradient of every micro-batch's loss, then the other ranks'; returns `loss` and metrics of each.

    They are NaN where the model's own numbers are not finite, and where the loss fails, which is kept: every rank comes
    to the end of the schedule.
    """

    def evaluate(micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        no_count = torch.zeros((), dtype=torch.int)  # losses are divided already; megatron-core shall not divide
        if not len(micro.indices):
            return output.float().sum() * 0.0, no_count, {}
        value, metrics = _attempted(loss_or_nan, read(output, micro), micro, agreement)
        return value, no_count, {"loss": value.detach(), **metrics}

    def loss_or_nan(values: Tensor, micro: MicroBatch) -> LossOutput:
        try:
            return loss(values, micro)
        except NonFiniteError:
            if bool(torch.isfinite(values).all()):
                raise
            with torch.no_grad():  # of sound values, so that what is wrong with the batch itself is an error even now
                metrics = loss(torch.full_like(values, -1.0), micro).metrics
            return LossOutput(values.sum() * math.nan, {name: metric * math.nan for name, metric in metrics.items()})

    return _run(chunks, micros, evaluate, forward_only=False)


def _attempted(loss: Loss, values: Tensor, micro: MicroBatch, agreement: Agreement) -> LossOutput:
    try:
        return loss(values, micro)
    except Exception as error:  # a loss may be another package's; whatever it is, all ranks shall hear of it
        agreement.keep(error)
        return LossOutput(values.sum() * math.nan, {})


@quiet_megatron()
def _run(
    chunks: Sequence[Any], micros: Sequence[MicroBatch], finish: Callable[..., Any], *, forward_only: bool
) -> list[Any]:
    def step(batches: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        micro = next(batches)
        output = chunk(
            input_ids=micro.own_tokens,
            position_ids=None,
            attention_mask=None,
            packed_seq_params=micro.packed,
            padding_mask=padding_mask(chunk, micro),
        )
        return output, lambda out, **how: finish(micro, out, **how)

    interleaved = len(chunks) > 1
    schedule = get_forward_backward_func(
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(), vp_size=len(chunks) if interleaved else None
    )
    results: list[Any] = schedule(
        forward_step_func=step,
        data_iterator=[iter(micros) for _ in chunks] if interleaved else iter(micros),
        model=list(chunks),
        num_microbatches=len(micros),
        seq_length=micros[0].tokens.shape[1],  # of all in interleaved stages; others tell each other
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return results
