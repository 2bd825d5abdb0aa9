"""A run on an emulated device: its budget, its limit, and what a person is told when it does not fit."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import BudgetError
from .emulation import Emulation, reserve
from .terminal import write_notes

if TYPE_CHECKING:
    import mlx.nn as nn


class EmulatedRun:
    """Without an emulation, or with that of a flash alone, nothing is limited."""

    def __init__(self, emulation: Emulation | None) -> None:
        """Measures what interpreter, libraries and everything else take: what comes from now on is ours."""
        import mlx.core as mx

        from .. import system

        self.emulation = emulation
        self.not_charged = system.process_footprint()
        self._held_before = mx.get_active_memory()
        system.reset_peak_footprint()
        mx.reset_peak_memory()
        self._limit_freed_buffers()

    @property
    def limits(self) -> bool:
        return self.emulation is not None and self.emulation.device is not None

    @property
    def budget(self) -> int | None:
        """Bytes for what we cause; None: no device is emulated. Raises BudgetError if nothing is left."""
        return None if self.emulation is None else self.emulation.budget(self.not_charged)

    def check(self, model: nn.Module, kv_cache: Sequence[Any] = ()) -> None:
        """End the run if it took more than the device gives. Raises OverLimitError."""
        if self.emulation is None or self.emulation.device is None:
            return
        from ..enforce import Enforcer

        self._limit_freed_buffers()
        device = self.emulation.device
        enforcer = Enforcer(
            device.title, device.app_limit_bytes, self.not_charged, model, held_before=self._held_before
        )
        enforcer.check(kv_cache)

    def _limit_freed_buffers(self) -> None:
        """Buffers that MLX keeps for later count in the footprint: let it keep no more than a quarter of the reserve.

        Loading sets a limit of its own, that of this machine, so this is done again and again.
        """
        import mlx.core as mx

        if self.emulation is not None and self.emulation.limit is not None:
            mx.set_cache_limit(reserve(self.emulation.limit) // 4)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Name the device and its limit in the BudgetErrors of what is inside, and write who held what to stderr."""
        from ..enforce import OverLimitError

        try:
            yield
        except OverLimitError as error:
            write_notes(error.account.lines(), sys.stderr)
            raise
        except BudgetError as error:
            if self.emulation is None or self.emulation.device is None:
                raise
            raise BudgetError(f"{self.emulation.whose_limit(self.not_charged)}; {error}") from error
