"""Keeps megatron-core's warnings to itself: they speak of its own old habits, of Transformer Engine and of Apex.

Warnings of other code, ours included, pass. Knows nothing else, and imports nothing heavy.
"""

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_megatron() -> Iterator[None]:
    """Within it, warnings raised for megatron-core's code are dropped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"megatron\.")
        # Its calls of collectives and of torch's sharded tensors by names that torch 2.13 deprecates.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
        yield
