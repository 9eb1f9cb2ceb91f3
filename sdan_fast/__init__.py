"""Fast, trustworthy kernels for large-kernel and star-product networks in PyTorch, and SDAN built from them."""

from . import functional, reference
from .accelerate import accelerate
from .backends import current_backend, explain, status, use_backend

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "accelerate",
    "current_backend",
    "explain",
    "functional",
    "reference",
    "status",
    "use_backend",
]
