"""A memory limit that ends the run, as a phone ends an app, with an account of who held what.

Checked between tokens and between chunks of a prompt, against peaks, so that what comes and goes in between counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import system
from .budget import format_bytes
from .errors import BudgetError

INTERPRETER = "interpreter and libraries"
FREED = "freed buffers"
OTHER = "anything else"


class OverLimitError(BudgetError):
    """A run took more memory than its device gives to one app."""

    def __init__(self, message: str, account: Account) -> None:
        super().__init__(message)
        self.account = account


@dataclass(frozen=True)
class Holder:
    """Bytes of one part, and what was planned for it; None: it was not planned."""

    name: str
    held: int
    planned: int | None

    @property
    def excess(self) -> int:
        return self.held - (self.planned or 0)


@dataclass(frozen=True)
class Account:
    """Who held what at the peak. Bytes."""

    limit: int
    holders: tuple[Holder, ...]

    @property
    def total(self) -> int:
        return sum(h.held for h in self.holders)

    @property
    def worst(self) -> Holder:
        """Who is furthest above its plan."""
        return max(self.holders, key=lambda h: h.excess)

    def lines(self) -> list[str]:
        """A small table."""
        rows = [("held by", "bytes", "planned")]
        rows += [
            (h.name, format_bytes(h.held), "-" if h.planned is None else format_bytes(h.planned)) for h in self.holders
        ]
        rows += [("in all", format_bytes(self.total), f"limit {format_bytes(self.limit)}")]
        width = max(len(name) for name, _, _ in rows)
        return [f"{name:<{width}}  {size:>8}  {planned:>8}" for name, size, planned in rows]


class Enforcer:
    """The limit of an emulated device, for one model that was loaded under it."""

    def __init__(
        self, title: str, limit: int, not_charged: int | None, model: nn.Module, *, held_before: int = 0
    ) -> None:
        """`title`: of the device. not_charged: bytes of interpreter, libraries and all else, measured before loading.

        held_before: those of them that MLX held.
        """
        self._title, self._limit, self._baseline, self._model = title, limit, not_charged or 0, model
        self._held_before = held_before

    def check(self, kv_cache: Sequence[Any] = ()) -> None:
        """Raise OverLimitError if the process, or MLX and what else we hold, ever had more than the limit."""
        account = self.account(kv_cache)
        if account.total <= self._limit:
            return
        worst = account.worst
        planned = "not planned" if worst.planned is None else f"planned {format_bytes(worst.planned)}"
        most = f"{worst.name}, {format_bytes(worst.held)} ({planned})"
        raise OverLimitError(
            f"ended, as {self._title} would: {format_bytes(account.total, up=True)} in use, and its limit for one app "
            f"is {format_bytes(self._limit)}; most above the plan: {most}; "
            "try a shorter prompt or a smaller --prefill-step-size, else report this with the account above",
            account,
        )

    def account(self, kv_cache: Sequence[Any] = ()) -> Account:
        cache, plan = self._model.expert_cache, self._model.memory_plan
        return account_of(
            self._limit,
            planned=plan.parts(),
            mlx_peak=mx.get_peak_memory() - self._held_before,
            resident=plan.resident,
            slots=cache.nbytes,
            kv=sum(int(c.nbytes) for c in kv_cache),
            host_buffers=cache.reader.host_buffer_bytes,
            baseline=self._baseline,
            freed=mx.get_cache_memory(),
            footprint=max(system.process_footprint() or 0, system.peak_footprint() or 0),
        )


def account_of(
    limit: int,
    *,
    planned: dict[str, int],
    mlx_peak: int,
    resident: int,
    slots: int,
    kv: int,
    host_buffers: int,
    baseline: int,
    freed: int,
    footprint: int,
) -> Account:
    """Split what is held: MLX's peak by what we know of it, and what the process has beside MLX and the interpreter.

    freed: buffers that MLX keeps for later. footprint: the most that the system ever charged the process with; 0 if it
    does not say.
    """
    transients = max(0, mlx_peak - resident - slots - kv)
    known = resident + slots + kv + transients + host_buffers + baseline
    beside = max(0, footprint - known)
    freed = min(freed, beside)  # part of the footprint, but not of MLX's peak
    return Account(
        limit,
        (
            Holder("weights", resident, planned["resident_weights"]),
            Holder("slots", slots, planned["slots"]),
            Holder("KV cache", kv, planned["kv_cache"]),
            Holder("transients", transients, planned["transients"]),
            Holder("read buffers", host_buffers, planned["host_buffers"]),
            Holder(INTERPRETER, baseline, baseline),
            *([Holder(FREED, freed, None)] if freed else []),
            Holder(OTHER, beside - freed, planned["overhead"]),
        ),
    )
