"""What megatron-core imports by name."""


class Sequential:
    """Never made."""


class FusibleOperation:
    """Never made."""
