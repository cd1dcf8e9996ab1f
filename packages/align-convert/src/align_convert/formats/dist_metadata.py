"""The `.metadata` of a `torch_dist` checkpoint: torch.distributed.checkpoint's own classes, pickled.

Apart from the rest because importing them takes a second that no other format needs.
"""

import pickle
from collections.abc import Sequence

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from align_convert.formats.dist_names import Item, aliases, extra_states


def metadata(items: Sequence[Item], none: Item, dtype: torch.dtype) -> bytes:
    """The description that torch.distributed.checkpoint reads first; `none` serves every empty extra state."""
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    stored = {}
    stacks: dict[str, tuple[int, ...]] = {}
    for item in items:
        stacks[item.place.key] = item.place.stack
        offsets = torch.Size((*item.place.at, *[0] * len(item.shape)))
        sizes = torch.Size((*[1] * len(item.place.at), *item.shape))
        for key in (item.place.key, *aliases(item.place.key)):
            whole = described.setdefault(
                key,
                TensorStorageMetadata(
                    properties=TensorProperties(dtype=dtype),
                    size=torch.Size((*item.place.stack, *item.shape)),
                    chunks=[],
                ),
            )
            assert isinstance(whole, TensorStorageMetadata)
            whole.chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=sizes))
            stored[MetadataIndex(key, offsets)] = _StorageInfo(item.file, item.offset, item.length)
    for key in extra_states(stacks):
        described[key] = BytesStorageMetadata()
        stored[MetadataIndex(key)] = _StorageInfo(none.file, none.offset, none.length)
    return pickle.dumps(Metadata(state_dict_metadata=described, planner_data={}, storage_data=stored))
