"""The one error of this package: an argument that no formula here can accept. Picklable, to cross processes."""


class InputError(ValueError):
    """An argument has the wrong shape, type or value; the message names the argument, what it held and the remedy."""
