"""The part of a weight update that runs inside each vLLM worker: maps the weights, then reloads the model from them.

vLLM adds this class to its worker (`worker_extension_cls`), so `self` has the worker's attributes too. Knows nothing of
versions and checksums: the sink in the engine's process has checked the bytes before they get here.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from align_core.types import WeightTensor

if TYPE_CHECKING:
    import torch


class WeightReceiver:
    """Methods that `collective_rpc` calls by name; the prefix keeps them apart from vLLM's own."""

    model_runner: Any
    reload_weights: Callable[..., None]

    def align_stage(self, weights: list[WeightTensor]) -> None:
        """Maps `weights` and holds on to them; a mapped file may be deleted from now on."""
        staged = self._align_staged()
        for weight in weights:
            staged[weight.meta.name] = _as_tensor(weight)

    def align_discard(self) -> None:
        """Lets go of what was staged."""
        self._align_staged().clear()

    def align_commit(self) -> None:
        """Loads everything staged into the model, in place, and lets go of it."""
        staged = self._align_staged()
        model = self.model_runner.get_model()
        tied = bool(getattr(model.config, "tie_word_embeddings", False))
        self.reload_weights(weights_iterator=iter(staged.items()))
        if tied:
            _repack_tied_head(model)
        staged.clear()

    def _align_staged(self) -> "dict[str, torch.Tensor]":
        # Not in __init__: vLLM adds this class to the bases of a worker class that does not call it.
        if "_align_weights" not in self.__dict__:
            self._align_weights: dict[str, torch.Tensor] = {}
        return self._align_weights


def _repack_tied_head(model: Any) -> None:
    """Packs a tied output layer anew.

    On x86 each linear layer keeps its weight packed for oneDNN. Reloading (vLLM 0.32) packs those whose weights come by
    name; a tied lm_head has no name of its own and would go on with the old embedding, silently. On CUDA nothing is
    packed and this call does nothing.
    """
    head = model.lm_head
    head.quant_method.process_weights_after_loading(head)


def _as_tensor(weight: WeightTensor) -> "torch.Tensor":
    import torch  # noqa: PLC0415  - comes with the extra; without it this module still imports

    dtype: torch.dtype = getattr(torch, weight.meta.dtype)
    with warnings.catch_warnings():
        # The mapping is read-only and so is what we do with it: the loader copies from this tensor.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        flat = torch.from_numpy(weight.bytes())
    return flat.view(dtype).reshape(weight.meta.shape)
