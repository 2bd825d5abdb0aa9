"""What the server did, in Prometheus' text format."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

from .engine_state import EngineState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Sample = tuple[str, float]  # labels as they are written, value


class RequestCounts:
    """Answers by path and status; threads of the HTTP server add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, int]] = Counter()
        self._abandoned = 0
        self.open = 0  # completions that are in line, being made or being sent

    def begin(self) -> None:
        with self._lock:
            self.open += 1

    def end(self) -> None:
        with self._lock:
            self.open -= 1

    def add(self, path: str, status: int) -> None:
        """path: one of those that exist, or "other": clients must not be able to make up new ones."""
        with self._lock:
            self._counts[path, status] += 1

    def add_abandoned(self) -> None:
        """A client went away before its reply was complete."""
        with self._lock:
            self._abandoned += 1

    def samples(self) -> tuple[list[Sample], int]:
        with self._lock:
            counts = [(f'path="{p}",code="{c}"', float(n)) for (p, c), n in sorted(self._counts.items())]
            return counts, self._abandoned


def exposition(state: EngineState, requests: RequestCounts, *, waiting: int, busy: bool) -> str:
    """The page /metrics."""
    answered, abandoned = requests.samples()
    phases = {"prefill": state.stats.prefill, "decode": state.stats.decode}
    m = state.memory

    def by_phase(name: str) -> list[Sample]:
        return [(f'phase="{phase}"', float(getattr(stats, name))) for phase, stats in phases.items()]

    memory = {
        "weights": m.resident,
        "slots": m.slots,
        "kv_cache": m.kv,
        "transients": m.transients,
        "read_buffers": m.host_buffers,
    }
    families: list[tuple[str, str, str, list[Sample]]] = [
        ("requests_total", "counter", "Answered HTTP requests.", answered),
        ("requests_abandoned_total", "counter", "Clients that left before their reply was complete.", _one(abandoned)),
        ("requests_waiting", "gauge", "Requests in line.", _one(waiting)),
        ("requests_running", "gauge", "Requests that are being answered: 0 or 1.", _one(busy)),
        ("prompt_tokens_total", "counter", "Prompt tokens that were computed.", _one(state.prompt_tokens)),
        ("prompt_tokens_cached_total", "counter", "Prompt tokens found in the KV cache.", _one(state.cached_tokens)),
        ("completion_tokens_total", "counter", "Generated tokens.", _one(state.completion_tokens)),
        ("prompt_seconds_total", "counter", "Time for prompts, first tokens included.", _one(state.prompt_seconds)),
        ("decode_seconds_total", "counter", "Time for all further tokens.", _one(state.decode_seconds)),
        (
            "decode_tokens_per_second",
            "gauge",
            "Of the last reply.",
            [] if state.decode_tps is None else _one(state.decode_tps),
        ),
        ("expert_selections_total", "counter", "Selections in partly resident layers.", by_phase("selections")),
        ("expert_hits_total", "counter", "Selections whose expert was in memory.", by_phase("hits")),
        ("expert_misses_total", "counter", "Selections whose expert was not in memory.", by_phase("misses")),
        ("expert_swapped_total", "counter", "Selections that routing changed.", by_phase("swapped")),
        ("expert_loads_total", "counter", "Experts read.", by_phase("loads")),
        ("expert_evictions_total", "counter", "Experts that gave up their slot.", by_phase("evictions")),
        ("expert_read_bytes_total", "counter", "Bytes of experts read.", by_phase("bytes_read")),
        ("expert_read_seconds_total", "counter", "Time in which experts were being read.", by_phase("read_seconds")),
        ("expert_slots", "gauge", "Experts that fit into memory, over all layers.", _one(state.slots)),
        ("experts", "gauge", "Experts of all layers.", _one(state.experts)),
        (
            "memory_bytes",
            "gauge",
            "Memory by part; transients at their peak.",
            [(f'part="{part}"', float(n)) for part, n in memory.items()],
        ),
        ("memory_peak_bytes", "gauge", "The most that MLX and the read buffers ever held.", _one(m.measured)),
    ]
    return "".join(_family(*f) for f in families)


def _one(value: float) -> list[Sample]:
    return [("", float(value))]


def _family(name: str, kind: str, text: str, samples: Iterable[Sample]) -> str:
    lines = [f"# HELP moecache_{name} {text}", f"# TYPE moecache_{name} {kind}"]
    for labels, value in samples:
        number = repr(int(value)) if value.is_integer() else repr(value)
        lines.append(f"moecache_{name}{'{' + labels + '}' if labels else ''} {number}")
    return "\n".join(lines) + "\n"
