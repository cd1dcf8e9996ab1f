"""How a request to a service can end without a reply. Picklable, as all errors of the project."""

from align_core.errors import AlignError


class RefusedError(AlignError):
    """The service refused, and would refuse again: a wrong key, model or request. Everything stops at once."""


class UnansweredError(AlignError):
    """All attempts at one request failed in ways that may pass; other requests go on, and a later run asks again."""

    def __init__(self, message: str, lost_attempts: int = 0) -> None:
        super().__init__(message, lost_attempts)
        self.lost_attempts = lost_attempts
        """Attempts that may have been charged."""

    def __str__(self) -> str:
        return str(self.args[0])


class BudgetError(AlignError):
    """The next request could cost more than is left; what was paid for is kept."""
