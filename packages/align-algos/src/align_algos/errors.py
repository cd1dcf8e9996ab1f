"""The errors of this package: an argument that no formula here can accept. Picklable, to cross processes."""


class InputError(ValueError):
    """An argument has the wrong shape, type or value; the message names the argument, what it held and the remedy."""


class NonFiniteError(InputError):
    """An argument, or what was computed from it, is NaN or infinite: what training meets, where other InputErrors are
    mistakes of whoever called."""
