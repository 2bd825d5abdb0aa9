"""Warm start: the experts that the cache held at the end of a run are read before the first reply of the next one.

Stored are expert numbers only, in one small file per checkpoint; nothing of what was asked or answered. What a prompt
needs is not known before it is there, and a prompt touches most experts, so the warm set is worth its bytes only where
nobody waits for them: while a person types, or before a server has a request. `Warming` reads it there and can be
stopped; benchmarks/warm_start.py has the figures.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoints.checkpoint import MAX_HEADER_BYTES, SHARD_PATTERN
from .checkpoints.hub import EXPERT_SHARDS
from .errors import MoeCacheError, UsageError
from .expert_cache import ExpertCache

FORMAT = "mlx_moecache.warm_start"
VERSION = 1
MOST_BYTES = 16_000_000  # of a file: numbers of far more experts than any model has
SHORT_KEY = 32  # hex digits of the key that name its file

Experts = tuple[tuple[int, ...], ...]  # per MoE layer, the first to be evicted first


def cache_folder(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path:
    """Where this user's programs keep what can be made again. Raises UsageError for a user without a home."""
    try:
        if platform == "darwin":
            return Path.home() / "Library" / "Caches" / "mlx_moecache"
        given = environment.get("XDG_CACHE_HOME", "")
        base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"  # relative ones are to be ignored
        return base / "mlx_moecache"
    except RuntimeError as error:
        raise UsageError(f"there is no cache folder ({error}); name one with --warm-start-folder") from error


def checkpoint_key(folder: Path) -> str:
    """64 hex digits that identify the checkpoint in `folder` wherever it lies: its config and its shards' headers.

    Headers are hashed, not understood: who loads the model has checked them. Raises OSError if a file cannot be read.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for shard in [path for pattern in (SHARD_PATTERN, EXPERT_SHARDS) for path in sorted(folder.glob(pattern))]:
        digest.update(f"\0{shard.name}\0{shard.stat().st_size}\0".encode())
        with open(shard, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(length, MAX_HEADER_BYTES)))
    return digest.hexdigest()


@dataclass(frozen=True)
class WarmSetFile:
    """What was resident when this checkpoint was used last."""

    path: Path
    key: str  # of the checkpoint

    @classmethod
    def of(cls, model_folder: Path, cache_folder: Path) -> WarmSetFile:
        """The file for the checkpoint in `model_folder`, there or not. Raises OSError."""
        key = checkpoint_key(model_folder)
        return cls(cache_folder / "warm_start" / f"{key[:SHORT_KEY]}.json", key)

    def read(self, experts_per_layer: Sequence[int]) -> Experts | None:
        """The stored experts; None if none were stored.

        Raises UsageError if the file is damaged, of another version or of another checkpoint.
        """
        try:
            if self.path.stat().st_size > MOST_BYTES:
                raise UsageError(f"{self.path} is far too large for a warm start; it will be replaced")
            content = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read ({error.strerror or error}); it will be replaced") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{self.path} is damaged ({error}); it will be replaced") from error
        return self._check(content, experts_per_layer)

    def write(self, experts: Sequence[Sequence[int]]) -> None:
        """Store `experts`; an earlier file is replaced at once or not at all. Raises UsageError."""
        content = {"format": FORMAT, "version": VERSION, "checkpoint": self.key, "experts": [list(x) for x in experts]}
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content, separators=(",", ":")) + "\n")
            os.replace(partial, self.path)
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error.strerror or error}") from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _check(self, content: Any, experts_per_layer: Sequence[int]) -> Experts:
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UsageError(f"{self.path} is no warm start of mlx_moecache; it will be replaced")
        if content.get("version") != VERSION:
            raise UsageError(
                f"{self.path} has version {content.get('version')!r} of the format, this mlx_moecache knows {VERSION}; "
                "it will be replaced"
            )
        if content.get("checkpoint") != self.key:
            raise UsageError(f"{self.path} is of another checkpoint; it will be replaced")
        layers = content.get("experts")
        if not isinstance(layers, list) or len(layers) != len(experts_per_layer):
            raise UsageError(f"{self.path} has other layers than the model; it will be replaced")
        for ids, experts in zip(layers, experts_per_layer, strict=True):
            # type() and not isinstance(): JSON's true is an int to Python.
            if not isinstance(ids, list) or not all(type(e) is int and 0 <= e < experts for e in ids):
                raise UsageError(f"{self.path} has experts that the model lacks; it will be replaced")
        return tuple(tuple(ids) for ids in layers)


def warm_set(cache: ExpertCache, earlier: Experts | None = None) -> Experts | None:
    """What to store: per layer who is resident, and before them whom only the `earlier` set has.

    So a short run does not forget, and a later one with more slots finds enough. Layers whose experts are all resident
    know nothing of use. None if no layer does.
    """
    layers = []
    for number, layer in enumerate(cache.layers):
        now = () if layer.residents.is_complete else tuple(layer.residents.eviction_order())
        before = earlier[number] if earlier else ()
        layers.append((*(e for e in dict.fromkeys(before) if e not in now), *now))
    return tuple(layers) if any(layers) else None


class Warming:
    """Reads a warm set on a thread of its own, layer by layer, until `finish`; until then nobody may use the cache.

    The thread moves bytes and keeps books; it calls nothing of MLX, since nothing was computed with the slots yet.
    """

    def __init__(self, cache: ExpertCache, experts: Experts) -> None:
        self.experts = 0  # read so far
        self.nbytes = 0
        self.seconds = 0.0  # that the reads took
        self.error: MoeCacheError | None = None  # what stopped it; what was read before is resident
        self._cache, self._wanted = cache, experts
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="warm-start")
        self._thread.start()

    def finish(self) -> None:
        """Stop after the layer that is being read; the cache can be used now. Again: nothing happens."""
        self._stop.set()
        self._thread.join()

    def _read(self) -> None:
        started, before = time.perf_counter(), self._cache.reader.bytes_read
        for number, ids in enumerate(self._wanted):
            if self._stop.is_set():
                break
            try:
                self.experts += self._cache.warm([ids if i == number else () for i in range(len(self._wanted))])
            except MoeCacheError as error:
                self.error = error
                break
            self.nbytes = self._cache.reader.bytes_read - before
            self.seconds = time.perf_counter() - started
