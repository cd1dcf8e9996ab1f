"""The errors of this package: each takes one finished sentence, so that all of them survive pickling.

A `ConvertError` is something the user can act on; the command line prints its text and exits with status 2.
"""


class ConvertError(Exception):
    """Any refusal of this package. The text names the values, the choices and the remedy."""


class ConfigError(ConvertError):
    """A model description that is incomplete, contradictory or of an unsupported family."""


class LayoutError(ConvertError):
    """A parallel layout that the model cannot be cut into."""


class FormatError(ConvertError):
    """Files that are missing, damaged, unsafe or not what their index says."""


class PlanError(ConvertError):
    """Tensors that do not match the weight plan: missing, without a rule, or of the wrong shape."""
