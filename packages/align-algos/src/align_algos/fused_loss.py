"""A loss straight from hidden states and the output matrix, piece by piece of the batch, gradient included.

Every loss of this package is a sum over pieces of the batch (tokens, sequences, pairs or groups) divided by counts of
the whole. So it can be computed on a few rows as soon as their logits are there, and its gradient by these logits at
once, while they are still in memory: 3 matrix products, as the unfused way, with the logits of a few rows in memory.
`fused_logprobs` needs a fourth, because it must wait for the gradient.

Legend: N flat tokens, H hidden, V rows of the output matrix on this rank, R rows of a piece.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from align_algos.checks import check_columns, check_offsets
from align_algos.errors import InputError
from align_algos.fused import LOGITS, FusedOutput, ProductSum, check_linear, without_autocast
from align_algos.losses.output import LossOutput
from align_algos.softmax_blocks import RowGradient, empty_statistics, merge, take_block, to_gradient
from align_algos.vocabulary import VocabularySlice, check_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FLOAT16 = (
    "hidden_NH has dtype torch.float16, in which gradients vanish unless the loss is scaled, and here they are "
    "computed before a scale is known; use fused_logprobs and a loss of its log-probs, or torch.bfloat16"
)
PieceLoss = Callable[[FusedOutput, slice], LossOutput]
"""(log-probs and entropy of some rows, which rows) to their share of loss and metrics."""


class FusedLossOutput(NamedTuple):
    """Of the whole batch given."""

    loss: Tensor
    """Scalar with gradient."""
    metrics: dict[str, Tensor]
    """Scalars without gradient."""
    logprobs_N: Tensor
    """Without gradient."""


def fused_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    loss: PieceLoss,
    *,
    cuts: Tensor | None = None,
    vocab_size: int | None = None,
    tp_group: "ProcessGroup | None" = None,
    temperature: float = 1.0,
    entropy: bool = False,
    block_bytes: int | None = None,
    sum_dtype: torch.dtype = torch.float32,
) -> FusedLossOutput:
    """`loss` of the log-probs that `fused_logprobs` would give, computed and differentiated piece by piece.

    The backward pass only scales the gradients, which exist from here on (in the dtype of the inputs). Such as GRPO:

        fused_loss(hidden, weight, targets, lambda output, rows: grpo_loss(output.logprobs_N, old[rows],
                   advantages[rows], mask[rows], num_tokens=num_tokens, clip_low=0.2, clip_high=0.2))

    Args:
        loss: called for each piece, in order, with gradient to its log-probs (and entropy); must give partial sums, as
            all losses here do, and be the same on all ranks of the group. Through these, hidden states and output
            matrix get their gradients, and nothing else can: other tensors in it must not require one.
        cuts: int64 [K+1], rising from 0 to N, the rows at which the batch may be cut (the offsets of sequences, pairs
            or groups, as the loss's `unit` says); None: anywhere. A piece has at least what is between two cuts.
        block_bytes: logits of a piece, at most, where the cuts allow it. None: as many as the float32 sum of the output
            matrix's gradient, which is there anyway; smaller pieces make adding to that sum a large part of the time.
        sum_dtype: in which the pieces' shares of the output matrix's gradient are added up, if it is not narrower than
            the inputs'. bfloat16 is some per cent faster, takes no memory of its own, and rounds after each piece.
        Others and Raises: as in `fused_logprobs`; refused are also a `loss` with a gradient to anything else, and
            float16 inputs that want a gradient, since they need a scaled loss, whose scale comes too late here.
    Source: gradient in the forward pass: Hsu et al. 2024, arXiv:2410.10989, there for cross-entropy.
    """
    part = check_linear(hidden_NH, weight_VH, targets_N, vocab_size=vocab_size, group=tp_group, temperature=temperature)
    grad = torch.is_grad_enabled()
    if grad and hidden_NH.dtype == torch.float16 and (hidden_NH.requires_grad or weight_VH.requires_grad):
        raise InputError(_FLOAT16)
    # From the columns held, padding included, which all ranks have alike: they must cut the batch alike.
    if block_bytes is None:
        block_bytes = 4 * weight_VH.numel()
    rows = max(1, block_bytes // max(1, len(weight_VH) * hidden_NH.element_size()))
    rows = rows // 256 * 256 if rows >= 256 else rows
    pieces = _pieces(len(targets_N), rows, cuts)
    sums = _Sums(
        column_N=targets_N.long() - part.first,
        part=part,
        logprobs_N=torch.zeros(len(targets_N), dtype=_precision(hidden_NH), device=hidden_NH.device),
        log_mass_N=torch.zeros(len(targets_N), dtype=_precision(hidden_NH), device=hidden_NH.device),
        hidden_grad_NH=torch.empty_like(hidden_NH) if grad and hidden_NH.requires_grad else None,
        weight_grad=ProductSum(weight_VH[: part.columns], sum_dtype) if grad and weight_VH.requires_grad else None,
    )
    with torch.no_grad(), without_autocast(hidden_NH):
        outputs = [_piece(sums, hidden_NH, weight_VH, loss, rows=piece, entropy=entropy) for piece in pieces]
        total, metrics = sum_outputs(outputs)
        gradients = sums.gradients(weight_VH)
        check_rows(sums.log_mass_N, LOGITS)  # waits for the device, so after the last of its work is under way
    apply: Callable[..., Tensor] = _Attach.apply  # torch leaves it untyped
    return FusedLossOutput(apply(hidden_NH, weight_VH, total, *gradients), metrics, sums.logprobs_N)


def fused_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    *,
    vocab_size: int | None = None,
    tp_group: "ProcessGroup | None" = None,
    temperature: float = 1.0,
    block_bytes: int | None = None,
    sum_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """- sum of weights_N times the log-probabilities of `fused_logprobs`; rows of weight 0 still cost their share.

    Args:
        weights_N: floating [N], a constant: mask / num_tokens for supervised training.
        Others and Raises: as in `fused_loss`.
    Returns: the scalar with gradient, and the log-probabilities [N] without.
    """
    check_columns("token", hidden_NH.shape[0], weights_N=weights_N)
    weights_N = weights_N.detach().to(_precision(hidden_NH))
    output = fused_loss(
        hidden_NH,
        weight_VH,
        targets_N,
        lambda output, rows: LossOutput(-(weights_N[rows] * output.logprobs_N).sum(), {}),
        vocab_size=vocab_size,
        tp_group=tp_group,
        temperature=temperature,
        block_bytes=block_bytes,
        sum_dtype=sum_dtype,
    )
    return output.loss, output.logprobs_N


def sum_outputs(outputs: list[LossOutput]) -> LossOutput:
    """Losses and metrics of pieces of a batch, added key by key.

    Args:
        outputs: of each piece, over the same global counts and with the same metrics; one at least.
    """
    metrics: dict[str, Tensor] = {}
    for _, piece in outputs:
        metrics = {key: metrics[key] + value if metrics else value for key, value in piece.items()}
    return LossOutput(torch.stack([output.loss for output in outputs]).sum(), metrics)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sums:
    """What the pieces fill."""

    column_N: Tensor
    part: VocabularySlice
    logprobs_N: Tensor
    log_mass_N: Tensor
    hidden_grad_NH: Tensor | None
    weight_grad: ProductSum | None

    def gradients(self, weight_VH: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of hidden states (over the group) and of this rank's output matrix."""
        if self.hidden_grad_NH is not None and self.part.group is not None:
            dist.all_reduce(self.hidden_grad_NH, group=self.part.group)
        if self.weight_grad is None:
            return self.hidden_grad_NH, None
        weight_grad_CH = self.weight_grad.result(None)
        if len(weight_grad_CH) == len(weight_VH):
            return self.hidden_grad_NH, weight_grad_CH
        padded_VH = torch.zeros_like(weight_VH)
        padded_VH[: len(weight_grad_CH)] = weight_grad_CH
        return self.hidden_grad_NH, padded_VH


def _piece(
    sums: _Sums, hidden_NH: Tensor, weight_VH: Tensor, loss: PieceLoss, *, rows: slice, entropy: bool
) -> LossOutput:
    """Loss of some rows, and its gradients added to the sums."""
    part, column_R = sums.part, sums.column_N[rows]
    real_CH, hidden_RH = weight_VH[: part.columns], hidden_NH[rows]
    logits_RC = hidden_RH @ real_CH.T
    statistics = empty_statistics(len(logits_RC), like=hidden_NH, entropy=entropy)
    take_block(logits_RC, column_R, statistics, temperature=part.temperature)
    softmax = merge(statistics, part.group, name=None)
    sums.logprobs_N[rows], sums.log_mass_N[rows] = softmax.logprobs_N, softmax.log_mass_N
    if sums.hidden_grad_NH is None and sums.weight_grad is None:
        return loss(FusedOutput(softmax.logprobs_N, softmax.entropy_N), rows)
    output, weight_R, entropy_weight_R = _differentiate(loss, FusedOutput(softmax.logprobs_N, softmax.entropy_N), rows)
    gradient = RowGradient(softmax.top_N, softmax.log_mass_N, weight_R, softmax.entropy_N, entropy_weight_R)
    to_gradient(logits_RC, column_R, gradient, temperature=part.temperature)
    if sums.hidden_grad_NH is not None:
        torch.mm(logits_RC, real_CH, out=sums.hidden_grad_NH[rows])
    if sums.weight_grad is not None:
        sums.weight_grad.add(logits_RC.T, hidden_RH)
    return output


def _differentiate(loss: PieceLoss, output: FusedOutput, rows: slice) -> tuple[LossOutput, Tensor, Tensor | None]:
    """The loss of the rows, without gradient, and its gradients by log-probs and entropy."""
    leaves = [x for x in output if x is not None]
    with torch.enable_grad():
        tracked = [x.detach().requires_grad_() for x in leaves]
        value, metrics = loss(FusedOutput(tracked[0], tracked[1] if len(tracked) == 2 else None), rows)
        _check_reaches_only(tracked, value)
        found = torch.autograd.grad(value, tracked, allow_unused=True)
    weight_R = torch.zeros_like(leaves[0]) if found[0] is None else found[0]
    # A metric with gradient would keep the graph of its piece in memory.
    output_of_rows = LossOutput(value.detach(), {key: metric.detach() for key, metric in metrics.items()})
    return output_of_rows, weight_R, found[1] if len(found) == 2 else None


def _check_reaches_only(tracked: list[Tensor], value: Tensor) -> None:
    """The loss of a piece has no other tensor to give a gradient to; it would be lost with the graph of the piece."""
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf: Tensor | None = getattr(node, "variable", None)  # only the nodes at the ends of a graph have one
        if leaf is not None and all(leaf is not x for x in tracked):
            raise InputError(
                f"the loss of a piece depends on another tensor that requires grad, of shape {list(leaf.shape)}; only "
                "hidden_NH and weight_VH get a gradient here: detach it, or use fused_logprobs"
            )
        waiting += [following for following, _ in node.next_functions]


class _Attach(torch.autograd.Function):
    """A value whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, value: Tensor, *gradients: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if grad.item() == 1.0:  # the usual case: looking costs less than another pass over both gradients
            return (*ctx.saved_tensors, None, None, None)
        return (*(None if x is None else x * grad.to(x.dtype) for x in ctx.saved_tensors), None, None, None)


def _pieces(length: int, rows: int, cuts: Tensor | None) -> Iterator[slice]:
    """Slices of at most `rows` rows, or of one stretch between cuts where that is longer; of nothing an empty one."""
    if length == 0:
        yield slice(0, 0)
        return
    if cuts is None:
        yield from (slice(start, min(start + rows, length)) for start in range(0, length, rows))
        return
    check_offsets(cuts, length)
    start = stop = 0
    for cut in cuts.tolist()[1:]:
        if cut - start > rows and stop > start:
            yield slice(start, stop)
            start = stop
        stop = cut
    yield slice(start, stop)


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
