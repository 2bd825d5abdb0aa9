"""The flags --device, --flash and --flash-latency: what is emulated of another device, and what is not.

Plain Python, so that mistyped flags are answered without importing MLX.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from ..budget import format_bytes
from ..checkpoints.reader import EmulatedFlash
from ..devices import Device, find_device
from ..errors import BudgetError, UsageError
from . import arguments

NOT_EMULATED = ("compute speed", "memory bandwidth")


@dataclass(frozen=True)
class Emulation:
    """Another device, or only its flash."""

    device: Device | None
    flash: EmulatedFlash

    @property
    def limit(self) -> int | None:
        """Bytes that the process may have, everything counted; None if only flash is emulated."""
        return None if self.device is None else self.device.app_limit_bytes

    def budget(self, not_charged: int | None) -> int | None:
        """Bytes for what we cause, if the interpreter and its libraries take `not_charged`; None: no limit.

        Raises BudgetError if nothing is left.
        """
        if self.device is None:
            return None
        limit = self.device.app_limit_bytes
        size = limit - reserve(limit) - (not_charged or 0)
        if size <= 0:
            raise BudgetError(f"{self.whose_limit(not_charged)}, which leaves nothing for a model; choose another")
        return size

    def whose_limit(self, not_charged: int | None) -> str:
        """The device and its limit, as the beginning of a message."""
        assert self.device is not None
        taken = f", of which {format_bytes(not_charged)} hold interpreter and libraries" if not_charged else ""
        return f"{self.device.title} gives one app {format_bytes(self.device.app_limit_bytes)}{taken}"

    @property
    def speed(self) -> str:
        """As in 2.00 GB/s + 100 us."""
        latency = f" + {self.flash.latency_seconds * 1e6:.0f} us" if self.flash.latency_seconds else ""
        return f"{format_bytes(round(self.flash.bytes_per_second))}/s{latency}"

    def lines(self) -> list[str]:
        """What is emulated and what is not."""
        parts = [f"flash {self.speed}"]
        if self.device is not None:
            memory = f"{format_bytes(self.device.app_limit_bytes)} per app"
            parts = [self.device.title, memory, *parts, "no page cache"]
        return [f"emulated {' · '.join(parts)}", f"not emulated: {', '.join(NOT_EMULATED)}"]

    def as_json(self) -> dict[str, Any]:
        d = self.device
        return {
            "device": None if d is None else d.name,
            "title": None if d is None else d.title,
            "memory_bytes": None if d is None else d.memory_bytes,
            "limit_bytes": self.limit,
            "flash_bytes_per_second": self.flash.bytes_per_second,
            "flash_latency_seconds": self.flash.latency_seconds,
            "page_cache_bypassed": d is not None,
            "not_emulated": list(NOT_EMULATED),
            "sources": {} if d is None else {name: figure.source for name, figure in d.figures.items()},
            "estimates": [] if d is None else d.estimates,
            "note": None if d is None else d.note,
        }


def reserve(limit: int) -> int:
    """Bytes of a limit for what grows beside the plan: waste of allocators, Python objects, MLX's freed buffers.

    In runs of small models it was 2 to 6 MB, and grows with what passes through the allocators.
    """
    return 8_000_000 + limit // 100


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("emulated device")
    group.add_argument(
        "--device",
        metavar="NAME",
        help="a phone, tablet or laptop such as iphone-16-pro or macbook-air-16gb: its memory limit for one app ends "
        "the run if it is exceeded, and experts are read as slowly as from its flash; a wrong name lists all "
        "(default: none)",
    )
    add_flash_arguments(group, otherwise="that of --device, else this disk's")


def add_flash_arguments(group: argparse._ArgumentGroup, *, otherwise: str) -> None:
    """--flash and --flash-latency; `otherwise`: what is taken without --flash."""
    group.add_argument(
        "--flash",
        type=arguments.flash_speed,
        metavar="SPEED",
        help=f"how fast experts are read, such as 2GB/s (default: {otherwise})",
    )
    group.add_argument(
        "--flash-latency",
        type=arguments.duration,
        metavar="TIME",
        help="what a layer that has to read waits beside, such as 100us (default: that of --device, else 0us)",
    )


def check_flash(args: argparse.Namespace) -> None:
    """Refuse a latency without a flash. Raises UsageError."""
    if args.flash_latency is not None and args.flash is None and args.device is None:
        raise UsageError("--flash-latency is part of an emulated flash, so give its speed, too, such as --flash 2GB/s")


def check_device(args: argparse.Namespace) -> None:
    """Refuse --device with flags that contradict it, and names without a profile. Raises UsageError."""
    check_flash(args)
    if args.device is None:
        return
    find_device(args.device)
    for flag in ("memory", "sim_memory", "slots"):
        if getattr(args, flag, None) is not None:
            raise UsageError(
                f"--device {args.device} and --{flag.replace('_', '-')}: give one of them; the device says how much "
                "memory there is"
            )


def emulation_of(args: argparse.Namespace) -> Emulation | None:
    """What the flags ask for; --flash and --flash-latency replace those of the device.

    Raises UsageError for a name without a profile and for a latency of no flash.
    """
    check_flash(args)
    device = None if args.device is None else find_device(args.device)
    if device is None and args.flash is None:
        return None
    speed = args.flash
    latency = args.flash_latency
    if device is not None:
        speed = device.flash_bytes_per_second if speed is None else speed
        latency = device.flash_latency_seconds if latency is None else latency
    return Emulation(device, EmulatedFlash(float(speed), latency or 0.0))
