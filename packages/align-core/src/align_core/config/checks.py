"""Checks of a setting's range that the settings share."""

from align_core.errors import ConfigError


def positive(owner: object, *names: str) -> None:
    """Raises ConfigError unless every named field of `owner` is greater than 0."""
    for name in names:
        value = getattr(owner, name)
        if not value > 0:  # catches NaN too
            raise ConfigError(f"{name} must be greater than 0, got {value}")


def between(owner: object, name: str, low: float, high: float) -> None:
    """Raises ConfigError unless the named field of `owner` lies between both bounds, which count."""
    value = getattr(owner, name)
    if not low <= value <= high:
        raise ConfigError(f"{name} must lie between {low} and {high}, got {value}")


def one_of(choices: list[int]) -> str:
    """`1, 2 or 4`, for errors that name what would do."""
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
