"""The part of a weight update that runs inside each vLLM worker: takes hold of weights, then puts them in the model.

vLLM adds this class to its worker (`worker_extension_cls`), so `self` has the worker's attributes too. Three ways in:
whole weights from the host's memory are staged and loaded by vLLM's own reload; parts are copied from a trainer's
tensors on the same device straight into the model's, or come from the trainer's ranks. Knows nothing of versions.
"""

import dataclasses
import functools
import gc
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from align_core.errors import AlignError, SyncError
from align_core.transfer.rectangles import Copy, Part, Rows, copies, slices
from align_core.transfer.seats import Seat
from align_core.types import ParamMeta, WeightTensor
from align_rollout.parts import model_parts, world_rank

if TYPE_CHECKING:
    import torch

    from align_core.transfer.checksums import PartSums
    from align_core.transfer.ends import LinkEnd


R = TypeVar("R")
P = ParamSpec("P")


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """An error of ours as an answer: raised, or as itself, it would reach the engine as text of vLLM's."""

    error: AlignError


def _answered(method: Callable[P, R]) -> Callable[P, R | Refused]:
    @functools.wraps(method)
    def answer(*arguments: P.args, **named: P.kwargs) -> R | Refused:
        try:
            return method(*arguments, **named)
        except AlignError as error:
            return Refused(error=error)

    return answer


Arrived = tuple[dict[str, int], dict[str, float]]
"""The checksums of what a worker now holds of each weight, and seconds by phase."""


class WeightReceiver:
    """Methods that `collective_rpc` calls by name; the prefix keeps them apart from vLLM's own.

    Those that may refuse answer with a `Refused`.
    """

    model_runner: Any
    reload_weights: Callable[..., None]

    @_answered
    def align_stage(self, weights: list[WeightTensor]) -> None:
        """Maps `weights` and holds on to them; a mapped file may be deleted from now on."""
        staged = self._align().staged
        for weight in weights:
            staged[weight.meta.name] = as_tensor(weight)

    def align_discard(self) -> None:
        """Lets go of what was staged."""
        self._align().staged.clear()

    @_answered
    def align_commit(self) -> None:
        """Loads everything staged into the model, in place, and lets go of it."""
        staged = self._align().staged
        if not staged:
            return
        model = self.model_runner.get_model()
        tied = bool(getattr(model.config, "tie_word_embeddings", False))
        self.reload_weights(weights_iterator=iter(staged.items()))
        if tied:
            _repack_tied_head(model)
        staged.clear()

    def align_release(self) -> None:
        """Gives cached but unused device memory back."""
        import torch  # noqa: PLC0415

        gc.collect()
        torch.cuda.empty_cache()

    @_answered
    def align_parts(self, expected: Sequence[ParamMeta]) -> list[Part]:
        """Which parts of which weights this worker holds."""
        own = self._align()
        parts = model_parts(self.model_runner.get_model(), expected)
        if own.packs(self.model_runner.get_model()):
            # Parts cannot be written into packed layers: whole weights are staged, of which only the parts are filled.
            parts = [_staged_part(part) for part in parts]
        own.parts = parts
        return parts

    @_answered
    def align_connect(self, layout: Sequence[Sequence[Part]]) -> None:
        """Learns who of the trainer's ranks holds what."""
        own = self._align()
        own.copies = copies(layout, own.parts)

    @_answered
    def align_pull(self, memory: Sequence[Mapping[str, object]], rows: Rows | None) -> Arrived:
        """Copies this worker's parts from the trainer's memory; returns their checksums, and seconds by phase."""
        own = self._align()
        clock = _Clock()
        sources = own.open(memory)
        clock.lap("open")
        targets = own.targets(self.model_runner.get_model())
        _copy_all(own.pairs(sources, targets))
        clock.lap("copy")
        del sources  # while this process holds the trainer's memory, the trainer cannot give it back
        sums = own.sums().compute(targets, rows) if rows else {}
        clock.lap("sum")
        return sums, clock.seconds

    @_answered
    def align_expect(self, seat: Seat | None, dtypes: frozenset[str]) -> None:
        """Sits down where the trainer's ranks will send to, `seat` being that of the first worker; waits for nobody."""
        own = self._align()
        model = self.model_runner.get_model()
        held = str(next(model.parameters()).dtype).removeprefix("torch.")
        if dtypes != {held}:
            raise SyncError(
                f"weights are {', '.join(sorted(dtypes))} in the trainer and {held} in the engine; set engine.dtype to "
                "training.dtype"
            )
        if seat is not None:
            own.end().sit(dataclasses.replace(seat, rank=seat.rank + world_rank()))

    @_answered
    def align_receive(self, rows: Rows | None) -> Arrived:
        """Fills this worker's parts with what the trainer's ranks send; see `align_pull`."""
        own = self._align()
        clock = _Clock()
        own.end().join()
        clock.lap("join")
        targets = own.targets(self.model_runner.get_model())
        own.end().receive(targets)
        clock.lap("receive")
        sums = own.sums().compute(targets, rows) if rows else {}
        clock.lap("sum")
        return sums, clock.seconds

    def align_leave(self) -> None:
        """Leaves the trainer's ranks."""
        self._align().end().close()

    def _align(self) -> "_Own":
        # Not in __init__: vLLM adds this class to the bases of a worker class that does not call it.
        if "_align_own" not in self.__dict__:
            self._align_own = _Own()
        return self._align_own


class _Own:
    """What the receiver remembers between calls."""

    def __init__(self) -> None:
        self.staged: dict[str, torch.Tensor] = {}
        self.parts: list[Part] = []
        self.copies: list[Copy] = []
        self._sums: PartSums | None = None
        self._end: LinkEnd | None = None

    def end(self) -> "LinkEnd":
        """This worker's end of the links to a trainer."""
        from align_core.transfer.ends import LinkEnd  # noqa: PLC0415  (brings torch)

        if self._end is None:
            self._end = LinkEnd()
        return self._end

    def packs(self, model: Any) -> bool:
        """Whether layers keep their weights in another form than the parameter's (vLLM on CPU)."""
        return any(parameter.device.type == "cpu" for parameter in model.parameters())

    def open(self, memory: Sequence[Mapping[str, object]]) -> Sequence[Mapping[str, "torch.Tensor"]]:
        """The trainer's tensors, rank by rank."""
        from align_core.transfer.memory import open_tensors  # noqa: PLC0415  (brings torch)

        return [open_tensors(handles) for handles in memory]

    def targets(self, model: Any) -> Mapping[str, "torch.Tensor"]:
        """The tensors that the parts lie in: the model's own, or whole staged weights."""
        import torch  # noqa: PLC0415

        if not self.packs(model):
            return {name: parameter.detach() for name, parameter in model.named_parameters()}
        dtype = next(model.parameters()).dtype
        for part in self.parts:
            if part.name not in self.staged:
                self.staged[part.name] = torch.zeros(part.shape, dtype=dtype)
        return self.staged

    def pairs(
        self, sources: Sequence[Mapping[str, "torch.Tensor"]], targets: Mapping[str, "torch.Tensor"]
    ) -> "list[tuple[list[torch.Tensor], list[torch.Tensor]]]":
        """Views to copy, as (targets, sources), in groups that one call can take."""
        found: dict[bool, tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
        for copy in self.copies:
            source = sources[copy.rank][copy.source_tensor].detach()
            target = targets[copy.target_tensor]
            if source.dtype != target.dtype:
                raise SyncError(
                    f"weight {copy.name!r} is {source.dtype} in the trainer and {target.dtype} in the engine; "
                    "set engine.dtype to training.dtype"
                )
            pair = target[slices(copy.target)], source[slices(copy.source)]
            dense = all(view.is_contiguous() for view in pair)
            found[dense][0].append(pair[0])
            found[dense][1].append(pair[1])
        return list(found.values())

    def sums(self) -> "PartSums":
        """What computes the checksums of this worker's parts."""
        from align_core.transfer.checksums import PartSums  # noqa: PLC0415

        if self._sums is None:
            self._sums = PartSums(self.parts)
        return self._sums


class _Clock:
    """Seconds by phase, with the device's work included."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        import torch  # noqa: PLC0415

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def _staged_part(part: Part) -> Part:
    return Part(
        name=part.name, shape=part.shape, index=part.index, tensor=part.name, local=part.index, primary=part.primary
    )


def _copy_all(pairs: "list[tuple[list[torch.Tensor], list[torch.Tensor]]]") -> None:
    import torch  # noqa: PLC0415

    with torch.no_grad():
        for targets, sources in pairs:
            torch._foreach_copy_(targets, sources)


def _repack_tied_head(model: Any) -> None:
    """Packs a tied output layer anew.

    On x86 each linear layer keeps its weight packed for oneDNN. Reloading (vLLM 0.32) packs those whose weights come by
    name; a tied lm_head has no name of its own and would go on with the old embedding, silently. On CUDA nothing is
    packed and this call does nothing.
    """
    head = model.lm_head
    head.quant_method.process_weights_after_loading(head)


def as_tensor(weight: WeightTensor) -> "torch.Tensor":
    """The weight as a tensor over its very bytes, which are only to be read."""
    import torch  # noqa: PLC0415  - comes with the extra; without it this module still imports

    dtype: torch.dtype = getattr(torch, weight.meta.dtype)
    with warnings.catch_warnings():
        # The mapping is read-only and so is what we do with it: the loader copies from this tensor.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        flat = torch.from_numpy(weight.bytes())
    return flat.view(dtype).reshape(weight.meta.shape)
