"""The flag --warm-start: what the cache held last time is read before the first reply, and stored at the end.

    warm = WarmStart(args, folder, model)   # after loading
    warm.begin()                            # or warm.read(), where a prompt is there already
    warm.finish()                           # before anything else looks at the cache
    warm.save()                             # at the end

Nothing here fails: a warm start that cannot be had is a line in `notes`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..budget import format_bytes
from ..errors import MoeCacheError

if TYPE_CHECKING:
    import mlx.nn as nn

    from ..expert_cache import ExpertCache
    from ..warm_start import Experts, Warming, WarmSetFile


def add_warm_start_arguments(parser: argparse.ArgumentParser, *, default: bool, why: str) -> None:
    """`default`: what happens without the flag, and `why`, a few words."""
    group = parser.add_argument_group("warm start")
    group.add_argument(
        "--warm-start",
        action=argparse.BooleanOptionalAction,
        default=default,
        help="read the experts that were in memory at the end of the last run of this model before the first reply, "
        f"and note at the end which are now (default: {'on' if default else 'off'}, {why})",
    )
    group.add_argument(
        "--warm-start-folder",
        type=Path,
        metavar="DIR",
        help="where expert numbers are noted (default: mlx_moecache in the user's cache folder)",
    )


@dataclass(frozen=True)
class WarmRead:
    """What a warm start read."""

    experts: int
    nbytes: int
    seconds: float


class WarmStart:
    """One run's warm start; without the flag, or with all experts in memory, it does nothing."""

    def __init__(self, args: argparse.Namespace, folder: Path, model: nn.Module) -> None:
        self.notes: list[str] = []
        self.done: WarmRead | None = None  # what was read, once it is; None: nothing was to be read
        self._cache: ExpertCache = model.expert_cache
        self._file: WarmSetFile | None = None
        self._earlier: Experts | None = None
        self._warming: Warming | None = None
        if not args.warm_start or not self._cache.has_host_reads:
            return
        from ..warm_start import WarmSetFile, cache_folder

        try:
            self._file = WarmSetFile.of(folder, args.warm_start_folder or cache_folder())
            self._earlier = self._file.read(self._cache.experts_per_layer)
        except (MoeCacheError, OSError) as error:
            self.notes.append(f"no warm start: {error}")

    def begin(self) -> None:
        """Read what was resident last time on another thread; the cache is busy until `finish`."""
        from ..warm_start import Warming

        if self._earlier is not None:
            self._warming = Warming(self._cache, self._earlier)

    def read(self) -> None:
        """Read all of it now, in one batch."""
        if self._earlier is None:
            return
        started, before = time.perf_counter(), self._cache.reader.bytes_read
        try:
            experts = self._cache.warm(self._earlier)
        except MoeCacheError as error:
            self.notes.append(f"no warm start: {error}")
            return
        self.done = WarmRead(experts, self._cache.reader.bytes_read - before, time.perf_counter() - started)

    def finish(self) -> None:
        """Stop reading if it goes on; from now on the cache may be used. Calling it again costs nothing."""
        if self._warming is None:
            return
        w = self._warming
        w.finish()
        self._warming = None  # only now: Ctrl-C may have ended the wait, and the thread would still read
        self.done = WarmRead(w.experts, w.nbytes, w.seconds)
        if w.error is not None:
            self.notes.append(f"the warm start ended early: {w.error}")

    def lines(self) -> list[str]:
        """What was read, or that there was nothing yet, and the notes."""
        if self.done is not None:
            size = format_bytes(self.done.nbytes)
            return [
                f"warm     {self.done.experts:,} experts read ahead · {size} in {self.done.seconds:.2f} s",
                *self.notes,
            ]
        if self._file is not None and not self.notes:
            return ["warm     nothing to read ahead yet; the next run has"]
        return self.notes

    def as_json(self) -> dict[str, Any] | None:
        """None if nothing was asked for."""
        if self._file is None and not self.notes:
            return None
        done = self.done or WarmRead(0, 0, 0.0)
        return {"experts": done.experts, "bytes": done.nbytes, "seconds": done.seconds, "notes": self.notes}

    def save(self) -> None:
        """Note what is resident now."""
        from ..warm_start import warm_set

        self.finish()
        try:
            known = None if self._file is None else warm_set(self._cache, self._earlier)
            if self._file is not None and known is not None:
                self._file.write(known)
        except MoeCacheError as error:
            self.notes.append(f"the next start will be cold: {error}")
