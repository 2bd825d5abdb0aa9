"""mlx_moecache: Mixture-of-Experts models larger than memory, on MLX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .generation import generate as generate
    from .generation import stream_generate as stream_generate
    from .loading import load as load

__version__ = "0.2.0"
__all__ = ["__version__", "generate", "load", "stream_generate"]

_HOMES = {"load": "loading", "generate": "generation", "stream_generate": "generation"}


def __getattr__(name: str) -> Any:
    """Import the public functions when they are first used: MLX and mlx-lm take a second to import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
