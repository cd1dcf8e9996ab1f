"""Which part of which Hugging Face weight each tensor of a vLLM worker holds, read off the live model's layers.

vLLM fuses query, key and value, and gate and up; cuts rows or columns over tensor-parallel workers; pads the
vocabulary; and copies key-value heads where there are fewer of them than workers. All of it is declared by the layers
themselves, so nothing here knows a model family.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align_core.errors import LayoutError
from align_core.transfer.rectangles import Index, Part, whole
from align_core.types import ParamMeta

_QKV = ("q", "k", "v")


def model_parts(model: Any, expected: Sequence[ParamMeta]) -> list[Part]:
    """The parts of this worker's `model`, which together with the other workers' hold all weights of `expected`.

    Raises:
        LayoutError: names the parameters that correspond to no weight.
    """
    shapes = {meta.name: meta.shape for meta in expected}
    packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
    parts: list[Part] = []
    for tensor in dict(model.named_parameters()):
        path, _, kind = tensor.rpartition(".")
        parts += _layer_parts(model.get_submodule(path), path, kind, packed, shapes)
    unknown = sorted({part.tensor for part in parts if not part.shape})
    if unknown:
        raise LayoutError(f"{len(unknown)} parameters of vLLM's model have no weight in Hugging Face's: {unknown[:8]}")
    return parts


def _layer_parts(
    layer: Any, path: str, kind: str, packed: Mapping[str, Sequence[str]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Part]:
    """The parts of one parameter: one, or several where weights are fused."""
    parent, _, last = path.rpartition(".")
    prefix = f"{parent}." if parent else ""
    names = [f"{prefix}{name}.{kind}" for name in packed.get(last, (last,))]
    start = 0
    for place, name in enumerate(names):
        shape = shapes.get(name, ())
        index, primary = _held(layer, kind, place, shape)
        rows = index[0][1] - index[0][0] if index else 0
        local = ((start, start + rows), *((0, stop - first) for first, stop in index[1:]))
        yield Part(name=name, shape=shape, index=index, tensor=f"{path}.{kind}", local=local, primary=primary)
        start += rows


def _held(layer: Any, kind: str, place: int, shape: tuple[int, ...]) -> tuple[Index, bool]:
    """This worker's rectangle of the `place`-th weight fused in `layer`, and whether no worker before has it too."""
    from vllm.model_executor.layers import linear  # noqa: PLC0415  (optional dependency)
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding  # noqa: PLC0415

    rank = int(getattr(layer, "tp_rank", 0))
    if isinstance(layer, linear.QKVParallelLinear):
        heads, copies = (layer.num_heads, 1) if place == 0 else (layer.num_kv_heads, layer.num_kv_head_replicas)
        return _rows(shape, rank // copies, heads * layer.head_size), rank % copies == 0
    if isinstance(layer, linear.ColumnParallelLinear):  # fused ones too; PyTorch's weights are [out, in]
        return _rows(shape, rank, shape[0] // layer.tp_size if shape else 0), True
    if isinstance(layer, linear.RowParallelLinear) and kind == "weight":
        width = shape[1] // layer.tp_size if shape else 0
        return ((0, shape[0]), (rank * width, (rank + 1) * width)) if shape else (), True
    if isinstance(layer, VocabParallelEmbedding):
        indices = layer.shard_indices
        rows = (indices.org_vocab_start_index, indices.org_vocab_end_index)
        return ((rows, *whole(shape[1:])) if shape else ()), True
    return whole(shape), world_rank() == 0


def _rows(shape: tuple[int, ...], turn: int, rows: int) -> Index:
    return ((turn * rows, (turn + 1) * rows), *whole(shape[1:])) if shape else ()


def world_rank() -> int:
    """Which of its engine's workers this is."""
    from vllm.distributed import get_tensor_model_parallel_rank  # noqa: PLC0415

    return int(get_tensor_model_parallel_rank())
