"""fp8 is off."""


class FP8GlobalStateManager:
    """What megatron-core asks of it."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Never."""
        return False


def fp8_autocast(*_: object, **__: object) -> None:
    """Never entered."""
    raise AssertionError("fp8 is off")
