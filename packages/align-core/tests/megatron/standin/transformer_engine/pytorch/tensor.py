"""What megatron-core imports by name."""


class QuantizedTensor:
    """No tensor here is one."""
