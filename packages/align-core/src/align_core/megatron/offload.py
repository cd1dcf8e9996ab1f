"""Moves what a trainer keeps on its GPU to the host and back, so that an engine on the same GPU can have the memory.

Works on storages, not on tensors: views (parameters inside a flat buffer, shards of main weights) stay valid, their
storage is emptied and filled again. Host copies are pinned and kept, because allocating them anew costs more than the
transfer. Where tensors live on the CPU, it does nothing. Knows nothing about models and optimizers.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


class Shelf:
    """The tensors of one kind (weights, optimizer state, gradients) and their place on the host."""

    def __init__(self, *, keep: bool = True) -> None:
        """`keep` False: the contents are not needed again (gradients between steps) and come back as zeros."""
        self._keep = keep
        self._free_host: dict[int, list[Tensor]] = {}
        self._away: list[tuple[torch.UntypedStorage, int, Tensor | None]] = []

    @property
    def is_away(self) -> bool:
        """Whether the tensors are on the host now."""
        return bool(self._away)

    def put_away(self, tensors: Iterable[Tensor]) -> int:
        """Copy to the host and free the device; returns the bytes freed. What is away already stays so."""
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors if t.is_cuda}
        leaving = [(storage, storage.nbytes()) for storage in storages.values() if storage.nbytes()]
        for storage, size in leaving:
            host = self._host(size) if self._keep else None
            if host is not None:
                host.copy_(_bytes_of(storage), non_blocking=True)
            self._away.append((storage, size, host))
        if leaving:
            torch.cuda.synchronize()
        for storage, _ in leaving:
            storage.resize_(0)
        return sum(size for _, size in leaving)

    def bring_back(self) -> None:
        """Fill the same storages again."""
        if not self._away:
            return
        for storage, size, host in self._away:
            storage.resize_(size)
            if host is None:
                _bytes_of(storage).zero_()
            else:
                _bytes_of(storage).copy_(host, non_blocking=True)
                self._free_host.setdefault(size, []).append(host)
        torch.cuda.synchronize()
        self._away.clear()

    def _host(self, size: int) -> Tensor:
        free = self._free_host.get(size)
        return free.pop() if free else torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
