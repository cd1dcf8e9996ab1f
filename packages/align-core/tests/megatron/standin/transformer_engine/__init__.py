"""A stand-in for NVIDIA's Transformer Engine on CPU: the modules that megatron-core's wrappers derive from, with its
constructors' arguments, parameter names and tensor layouts, computed by plain torch. It shows that names, shapes and
arguments fit together; it shows nothing about Transformer Engine's own numbers.
"""

from transformer_engine import common, pytorch

__version__ = "2.6.0"
__all__ = ["common", "pytorch"]
