"""Reads of experts that go wrong, however they were begun: a look at every batch as it arrives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from mlx_moecache.checkpoints.reader import ExpertReader, Pending, ReadRequest

WRONG = b"\xa5"


def after_each_read(monkeypatch: pytest.MonkeyPatch, action: Callable[[int, Sequence[ReadRequest]], None]) -> None:
    """Call action(n, requests) when the n-th batch (from 1) has landed; what it raises, the read raises."""
    start, wait = ExpertReader._start, Pending.wait
    asked: dict[int, Sequence[ReadRequest]] = {}
    batches = 0

    def remember(self: ExpertReader, requests: Sequence[ReadRequest], **how: Any) -> Pending:
        pending = start(self, requests, **how)
        asked[id(pending)] = requests
        return pending

    def look(self: Pending) -> None:
        nonlocal batches
        wait(self)
        batches += 1
        action(batches, asked.pop(id(self)))

    monkeypatch.setattr(ExpertReader, "_start", remember)
    monkeypatch.setattr(Pending, "wait", look)


def scribble(requests: Sequence[ReadRequest]) -> None:
    """Write wrong bytes over what was read."""
    for request in requests:
        request.view[:] = WRONG * len(request.view)
