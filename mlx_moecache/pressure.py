"""How short the system is of memory, as it says itself: one level, from macOS, Linux or a fake.

macOS: the level that the kernel notifies applications of. Linux: pressure stall information (the share of time in which
tasks wait for memory), what the control groups leave, and what is available at all; the worst of them counts.
"""

from __future__ import annotations

import ctypes
import sys
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from . import system

MAC_LEVEL = b"kern.memorystatus_vm_pressure_level"  # 1 normal, 2 warning, 4 critical (<dispatch/source.h>)
# Percent of the last 10 seconds in which some, or all, tasks waited for memory.
SOME_WARNING, SOME_CRITICAL, FULL_WARNING, FULL_CRITICAL = 10.0, 40.0, 5.0, 20.0
GROUP_WARNING, GROUP_CRITICAL = 0.90, 0.97  # of a control group's limit, pages of files left out
LEFT_WARNING, LEFT_CRITICAL = 0.05, 0.02  # of RAM that is still available


class Pressure(IntEnum):
    NORMAL = 0
    WARNING = 1
    CRITICAL = 2


class PressureSource(Protocol):
    """Whoever knows how short memory is. Cheap: asked about once per second. Never raises."""

    def level(self) -> Pressure: ...


class NoPressure:
    """A system that does not say."""

    def level(self) -> Pressure:
        return Pressure.NORMAL


class MacPressure:
    """macOS and its kin."""

    def level(self) -> Pressure:
        value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
        try:
            library = ctypes.CDLL("/usr/lib/libSystem.B.dylib")
            failed = library.sysctlbyname(MAC_LEVEL, ctypes.byref(value), ctypes.byref(size), None, 0)
        except (OSError, AttributeError):
            return Pressure.NORMAL
        if failed:
            return Pressure.NORMAL
        return Pressure.CRITICAL if value.value >= 4 else Pressure.WARNING if value.value >= 2 else Pressure.NORMAL


class LinuxPressure:
    """root: of the file system."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def level(self) -> Pressure:
        stalls = [_stall_level(self.root / "proc/pressure/memory")]
        shares = []
        for folder in system.cgroup_folders(self.root):
            stalls.append(_stall_level(folder / "memory.pressure"))
            usage = system.cgroup_usage(folder)
            if usage is not None and usage[1] > 0:
                shares.append(_above(usage[0] / usage[1], GROUP_WARNING, GROUP_CRITICAL))
        return max([*stalls, *shares, self._left_level()])

    def _left_level(self) -> Pressure:
        sizes = system.meminfo(self.root)
        if not sizes.get("MemTotal") or "MemAvailable" not in sizes:
            return Pressure.NORMAL
        used = 1 - sizes["MemAvailable"] / sizes["MemTotal"]
        return _above(used, 1 - LEFT_WARNING, 1 - LEFT_CRITICAL)


def system_pressure() -> PressureSource:
    """The source for this system."""
    if sys.platform == "darwin":
        return MacPressure()
    return LinuxPressure() if sys.platform == "linux" else NoPressure()


def _stall_level(path: Path) -> Pressure:
    """From lines such as "some avg10=0.12 avg60=0.05 avg300=0.00 total=1234"."""
    try:
        lines = path.read_text().splitlines()
    except OSError:  # no such file, or an operation that this kernel does not support
        return Pressure.NORMAL
    worst = Pressure.NORMAL
    for line in lines:
        words = line.split()
        limits = {"some": (SOME_WARNING, SOME_CRITICAL), "full": (FULL_WARNING, FULL_CRITICAL)}.get(
            words[0] if words else ""
        )
        average = next((w.removeprefix("avg10=") for w in words if w.startswith("avg10=")), None)
        if limits is None or average is None:
            continue
        try:
            worst = max(worst, _above(float(average), *limits))
        except ValueError:
            continue
    return worst


def _above(value: float, warning: float, critical: float) -> Pressure:
    return Pressure.CRITICAL if value >= critical else Pressure.WARNING if value >= warning else Pressure.NORMAL
