"""Warnings of megatron-core are dropped, others pass, and filters come back when the last thread has left."""

import logging
import threading
import warnings

import pytest

from align_core.megatron.quiet import quiet_megatron


def _warn_as(module: str) -> None:
    warnings.warn_explicit("a habit", UserWarning, "file", 1, module=module)


def test_only_megatron_is_silenced() -> None:
    with quiet_megatron():
        _warn_as("megatron.core.utils")
        with pytest.raises(UserWarning, match="a habit"):
            _warn_as("align_core.types")
        assert not logging.getLogger("megatron.core.transformer").isEnabledFor(logging.WARNING)
    with pytest.raises(UserWarning, match="a habit"):
        _warn_as("megatron.core.utils")
    assert logging.getLogger("megatron.core.transformer").isEnabledFor(logging.WARNING)


def test_threads_leave_in_any_order() -> None:
    """One enters first and leaves last, or first: either way the filters of before are back at the end."""
    before = list(warnings.filters)
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with quiet_megatron():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with quiet_megatron():
        thread.start()
        assert entered.wait(10)
    _warn_as("megatron.core.utils")
    leave.set()
    thread.join()
    assert list(warnings.filters) == before
