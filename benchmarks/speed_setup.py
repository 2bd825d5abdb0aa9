"""What is compared: a configuration as text, and the model that it makes, ready to be timed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step as stock_step
from mlx_lm.generate import generation_stream
from mlx_lm.utils import load_model
from speed_replay import Clock, Recording, install, mapped
from speed_waits import SlowHostReads

from mlx_moecache.calls import replace_call
from mlx_moecache.checkpoints.reader import EmulatedFlash
from mlx_moecache.errors import UsageError
from mlx_moecache.expert_cache import ExpertCache
from mlx_moecache.generation import StepOptions, generate_step
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel

STOCK, DENSE = "stock", "dense"  # beside routing specs: mlx-lm's own model; ours with experts that compute nothing
WARM = 256  # tokens before the first one, from whose routing the cache is filled
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}
_SECONDS = {"us": 1e-6, "ms": 1e-3}
_KEPT = ("routing", "flash", "strength", "top_j")  # not engine options
_OURS = ("slots", "routing", "flash", "hostread", "span", "lookahead")  # settings beside engine options


@dataclass(frozen=True)
class Flash:
    """Emulated reads: a speed in bytes per second, or a multiple of compute for the baseline's misses."""

    bytes_per_second: float | None = None
    times_compute: float | None = None
    latency_seconds: float = 0.0


@dataclass(frozen=True)
class Configuration:
    """One side of a comparison."""

    text: str  # as given, its name in the report
    slots: str = "50%"  # per layer: "30", "50%", "all", "all-1"
    routing: str = "original"  # a spec, "stock" or "dense"
    flash: Flash | None = None
    host_read: float = 0.0  # seconds that are added to each look at the device
    engine: tuple[tuple[str, str], ...] = ()  # fields of CacheOptions, or attributes of the expert cache


def parse_configuration(text: str) -> Configuration:
    """ "slots=50% routing=cache-prior:strength=0.1 flash=4x overlaps=off". Raises UsageError."""
    found = Configuration(" ".join(text.split()))
    for part in text.split():
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise UsageError(
                f"{part!r} in {text!r} is no setting; write name=value, as in "
                "'slots=50% routing=cache-prior:strength=0.1 flash=4x overlaps=off'"
            )
        if key == "slots":
            slot_count(value, 60)
            found = replace(found, slots=value)
        elif key == "routing":
            found = replace(found, routing=value)
        elif key == "flash":
            found = replace(found, flash=parse_flash(value))
        elif key == "hostread":
            found = replace(found, host_read=parse_time(value))
        else:
            found = replace(found, engine=(*found.engine, (key, value)))
    return found


def parse_flash(text: str) -> Flash | None:
    """ "4x" (of the baseline's compute), "500MB/s", either with "+100us" of latency; "none". Raises UsageError."""
    if text == "none":
        return None
    match = re.fullmatch(r"(?:([\d.]+)x|([\d.]+)([KMG]?)B/s)(?:\+([\d.]+)us)?", text)
    if match is None or not float(match[1] or match[2]):
        raise UsageError(f"{text!r} is no flash; write 4x (times compute), 500MB/s or none, perhaps +100us of latency")
    latency = 1e-6 * float(match[4] or 0)
    if match[1]:
        return Flash(times_compute=float(match[1]), latency_seconds=latency)
    return Flash(bytes_per_second=float(match[2]) * _UNITS[match[3]], latency_seconds=latency)


def parse_time(text: str) -> float:
    """ "2ms", "100us" or "0", in seconds. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms)|0", text)
    if match is None:
        raise UsageError(f"{text!r} is no time; write 2ms, 100us or 0")
    return float(match[1]) * _SECONDS[match[2]] if match[1] else 0.0


def slot_count(text: str, experts: int) -> int:
    """Slots of a layer with so many experts. Raises UsageError."""
    match = re.fullmatch(r"(\d+)(%?)|all(?:-(\d+))?", text)
    if match is None:
        raise UsageError(f"{text!r} is no number of slots; write 30, 50%, all or all-1")
    if match[1] is None:
        return experts - int(match[3] or 0)
    return int(match[1]) * experts // 100 if match[2] else min(experts, int(match[1]))


class Side:
    """A loaded configuration, its place in the text, and the reply that it is in the middle of."""

    def __init__(
        self, configuration: Configuration, folder: Path, recording: Recording, *, context: int, replayed: bool
    ) -> None:
        """context: tokens of the longest sequence. Raises what loading raises, UsageError for unknown settings."""
        self.configuration = configuration
        self._recording = recording
        self._base = WARM
        self.clock: Clock | None = None
        self.cache: ExpertCache | None = None
        self.switches: list[nn.Module] = []  # of the MoE layers; none of mlx-lm's own model
        self._slow: SlowHostReads | None = None
        self._reply: Iterator[Any] = iter(())
        if configuration.routing == STOCK:
            self.model, config = load_model(folder)
            self._install(replayed, int(config["num_experts_per_tok"]))
        else:
            opened = OpenedModel(folder)
            config = opened.config
            shape = opened.layer_shapes[0]
            self.model = opened.model
            self._install(replayed, shape.k)
            options, later = cache_options(configuration)
            count = slot_count(configuration.slots, shape.num_experts)
            self.model = opened.load(MemoryOptions(slots=count, max_context=context), options)
            self.cache = self.model.expert_cache
            self.switches = [block.switch for block in opened.blocks]
            if configuration.host_read:
                self._slow = SlowHostReads(configuration.host_read, self.cache, [b.cached for b in opened.blocks])
            for name, value in later:
                set_attribute(self.cache, name, value)
            if configuration.routing == DENSE:
                for switch in self.switches:
                    _compute_nothing(switch)
        self.vocabulary = int(config["vocab_size"])

    @property
    def name(self) -> str:
        return self.configuration.text

    @property
    def layers(self) -> int:
        """MoE layers."""
        return len(self.model.layers) if self.cache is None else len(self.cache.layers)

    @property
    def waited(self) -> float:
        """Seconds so far in which it waited for experts or, if these are lengthened, for the device."""
        reads = 0.0 if self.cache is None else self.cache.reader.wait_seconds
        return reads + (0.0 if self._slow is None else self._slow.slept)

    @property
    def span(self) -> int | None:
        """How many layers share a look at the device now; None where there is none."""
        if self.cache is None or self.cache.optimist is None or not self.cache.has_host_reads:
            return None
        return self.cache.optimist.chooser.span

    def _install(self, replayed: bool, k: int) -> None:
        if replayed:
            self.clock = install(self.model, self._recording, k)

    def warm(self) -> None:
        """Make resident what original routing used last in the WARM tokens before the first, at the disk's speed."""
        if self.cache is None:
            return
        lists = []
        for i, layer in enumerate(self.cache.layers):
            z = mapped(self._recording.z, i, layer.num_experts, layer.k)[:WARM]
            order = np.argsort(z, axis=-1)[:, ::-1][:, : layer.k]  # best first: touched in this order
            lists.append([int(e) for row in order for e in row])
        reader = self.cache.reader
        flash, reader._flash = reader._flash, None  # a slow one would need minutes for this
        try:
            self.cache.warm([list(dict.fromkeys(reversed(x)))[::-1] for x in lists])
        finally:
            reader._flash = flash

    def begin(self, prompt: int, *, tokens: int, at: int | None = None) -> None:
        """Start a reply to `prompt` tokens of the text, from position `at` on; it runs as `advance` asks for tokens."""
        self._reply = self.reply(prompt, tokens=tokens, at=at)

    def reply(self, prompt: int, *, tokens: int, at: int | None = None) -> Iterator[Any]:
        """The tokens of such a reply. Several may be under way at once if all begin at one position of the text."""
        start = self._base if at is None else at
        if self.clock is not None:
            self.clock.base = start
        n = self._recording.tokens
        ids = self._recording.ids[(start + np.arange(prompt + tokens + 2)) % n] % self.vocabulary
        given = mx.array(ids[:prompt].astype(np.uint32))
        sampler = forced(mx.array(ids[prompt:].astype(np.uint32)))
        if self.cache is None:
            return iter(stock_step(given, self.model, max_tokens=tokens, sampler=sampler))
        return generate_step(given, self.model, StepOptions(max_tokens=tokens, sampler=sampler))

    def advance(self, tokens: int) -> None:
        """Compute so many tokens more, completely: what a model looks ahead is awaited, too."""
        for _ in range(tokens):
            next(self._reply)
        mx.synchronize(generation_stream if self.cache is None else mx.default_stream(mx.default_device()))

    def close(self) -> None:
        if self.cache is not None:
            self.cache.close()


def forced(ids: mx.array) -> Callable[[mx.array], mx.array]:
    """A sampler that returns the given `ids` one by one, after whatever greedy sampling would have computed."""
    position = -1

    def sampler(logprobs: mx.array) -> mx.array:
        nonlocal position
        position += 1
        return ids[position : position + 1] + 0 * mx.argmax(logprobs, axis=-1)

    return sampler


def cache_options(configuration: Configuration) -> tuple[CacheOptions, list[tuple[str, str]]]:
    """The options of `load`, and those settings that are attributes of the loaded cache. Raises UsageError."""
    routing = "original" if configuration.routing in (STOCK, DENSE) else configuration.routing
    flash = configuration.flash
    options = CacheOptions(routing=routing, direct_io=True)
    if flash is not None:
        assert flash.bytes_per_second is not None  # resolved by the calibration
        options = replace(options, flash=EmulatedFlash(flash.bytes_per_second, flash.latency_seconds))
    known = {f.name: f for f in fields(CacheOptions) if f.name not in _KEPT}
    later = []
    for name, value in configuration.engine:
        if name in known:
            changed: Any = {name: like(getattr(options, name), name, value)}
            options = replace(options, **changed)
        else:
            later.append((name, value))
    return options, later


def set_attribute(cache: ExpertCache, name: str, value: str) -> None:
    """Set an engine switch of a loaded cache. Raises UsageError if it has none of that name."""
    if name == "span" and cache.optimist is not None:
        if value != "auto":
            cache.optimist.chooser = FixedSpan(int(like(1, name, value)))  # type: ignore[assignment]
        return
    if name == "lookahead":
        wanted = like(True, name, value)
        if cache.look_ahead is not None:
            cache.look_ahead.enabled = wanted
        elif wanted:
            raise UsageError("this model has no look-ahead here; leave lookahead=on out")
        return
    settable = {k: v for k, v in vars(cache).items() if isinstance(v, bool | int | float | str) and k[0] != "_"}
    if name not in settable:
        options = [*_OURS, *sorted({f.name for f in fields(CacheOptions)} - set(_KEPT)), *sorted(settable)]
        raise UsageError(f"the engine has no option {name!r}; there are {', '.join(options)}")
    setattr(cache, name, like(settable[name], name, value))


@dataclass
class FixedSpan:
    """In the place of the engine's own choice of how many layers share one host read."""

    span: int

    def observe(self, missed: int, run: int, host_reads: int, seconds: float) -> None:
        pass


def like(example: Any, name: str, value: str) -> Any:
    """`value` as what `example` is: on/off, a number or text. Raises UsageError."""
    try:
        if isinstance(example, bool):
            return {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}[value]
        return type(example)(value) if isinstance(example, int | float) else value
    except (KeyError, ValueError):
        wanted = "on or off" if isinstance(example, bool) else "a number"
        raise UsageError(f"{name} takes {wanted}, not {value!r}") from None


def _compute_nothing(switch: nn.Module) -> None:
    """Replace a switch by one whose experts give zeros, so that a token takes the time of everything else."""

    def call(module: nn.Module, x: mx.array, indices: mx.array) -> mx.array:
        return mx.zeros((*indices.shape, x.shape[-1]), dtype=x.dtype)

    replace_call(switch, call)
