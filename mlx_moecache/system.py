"""What the operating system and the device say about memory. All that is particular to macOS or Metal stands here.

The Metal and macOS branches are tested behind fakes; they have not been run on a Mac by the authors.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx
import numpy as np

RUSAGE_INFO_V2, RUSAGE_INFO_V4 = 2, 4  # <sys/resource.h>; both structs are a uuid of 16 bytes and then uint64
FOOTPRINT, PEAK_FOOTPRINT = 7, 28  # which of these are ri_phys_footprint and ri_lifetime_max_phys_footprint
HOST_VM_INFO64, VM_STATISTICS_INTS = 4, 38  # <mach/host_info.h>: the flavor, and the size of its struct in int32
FREE, INACTIVE, PURGEABLE = 0, 2, 22  # which int32 of vm_statistics64 are these page counts
M_MMAP_THRESHOLD = -3  # <malloc.h> of glibc
RETURNED_AT_ONCE = 2**16  # bytes: smaller than the buffers of a prefill chunk, larger than those of most tokens
CACHE_SHARE = 1 / 16  # of RAM: freed buffers that MLX may keep on Metal; its own limit is nearly all memory


def physical_memory(root: Path = Path("/")) -> int:
    """Bytes of RAM, or of this process's control group if that is allowed less (Linux). root: of the file system."""
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([ram, *_cgroup_limits(root)])


def recommended_working_set() -> int | None:
    """Bytes that the GPU should use at most, None where the device does not say (the CPU backend)."""
    value = mx.device_info().get("max_recommended_working_set_size")
    return int(value) if value else None


def on_cpu() -> bool:
    """True if MLX computes on the CPU, where attention is not fused."""
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def process_footprint() -> int | None:
    """Bytes that the system charges this process with, file pages excluded; None where that is unknown."""
    if sys.platform == "darwin":
        return _rusage(RUSAGE_INFO_V2, FOOTPRINT)
    return _status().get("RssAnon")


def reset_peak_footprint() -> None:
    """Let `peak_footprint` count from now on, where the system can do that (Linux)."""
    with suppress(OSError):  # no such file, or a sandbox that does not allow it
        Path("/proc/self/clear_refs").write_text("5")


def peak_footprint() -> int | None:
    """The most that `process_footprint` has been since the last reset (macOS: ever); None where that is unknown.

    Linux keeps the peak of all pages: those of files and shared memory that are there now are taken off.
    """
    if sys.platform == "darwin":
        return _rusage(RUSAGE_INFO_V4, PEAK_FOOTPRINT)
    status = _status()
    if "VmHWM" not in status or "RssAnon" not in status:
        return status.get("RssAnon")
    files = status.get("RssFile", 0) + status.get("RssShmem", 0)
    return max(status["RssAnon"], status["VmHWM"] - files)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that the system could still give to this process without swapping; None where it does not say.

    Pages of files count as available: they can be read again. Linux: MemAvailable, or what the control groups leave.
    macOS: free, inactive and purgeable pages, some of which it would have to compress.
    """
    if sys.platform == "darwin":
        return _mac_available()
    available = [n for name, n in meminfo(root).items() if name == "MemAvailable"]
    for folder in cgroup_folders(root):
        usage = cgroup_usage(folder)
        if usage is not None:
            used, limit = usage
            available.append(max(0, limit - used))
    return min(available, default=None)


def meminfo(root: Path) -> dict[str, int]:
    """Bytes of MemTotal and MemAvailable, as far as the system says (Linux)."""
    return _fields(root / "proc/meminfo", ("MemTotal", "MemAvailable"))


def cgroup_folders(root: Path) -> Iterator[Path]:
    """The control group of this process and those above it (version 2; nothing elsewhere)."""
    top = root / "sys/fs/cgroup"
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for path in (line.removeprefix("0::").lstrip("/") for line in groups if line.startswith("0::")):
        for folder in (top / path, *(top / path).parents):
            if not folder.is_relative_to(top):
                break
            yield folder


def cgroup_usage(folder: Path) -> tuple[int, int] | None:
    """Bytes that a control group uses, pages of files left out, and what it may use; None if it has no limit."""
    limits = [n for n in (_number(folder / name) for name in ("memory.max", "memory.high")) if n is not None]
    used = _number(folder / "memory.current")
    if not limits or used is None:
        return None
    files = 0
    with suppress(OSError):
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            files += int(value) if name in ("active_file", "inactive_file") else 0
    return max(0, used - files), min(limits)


def _cgroup_limits(root: Path) -> Iterator[int]:
    for folder in cgroup_folders(root):
        limit = _number(folder / "memory.max")
        if limit is not None:
            yield limit


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _status() -> dict[str, int]:
    return _fields(Path("/proc/self/status"), ("VmHWM", "RssAnon", "RssFile", "RssShmem"))


def _fields(path: Path, names: tuple[str, ...]) -> dict[str, int]:
    """Bytes by name from lines such as "RssAnon:   1234 kB"; those that are missing are left out."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {name: int(value.split()[0]) * 1024 for name, value in pairs if name in names}


def _rusage(flavor: int, field: int) -> int | None:
    buffer = (ctypes.c_uint64 * 64)()
    try:
        library = ctypes.CDLL("/usr/lib/libproc.dylib")
        failed = library.proc_pid_rusage(os.getpid(), flavor, ctypes.byref(buffer))
    except (OSError, AttributeError):
        return None
    return None if failed else int(buffer[2 + field])


def _mac_available() -> int | None:
    info, count = (ctypes.c_uint32 * 64)(), ctypes.c_uint32(VM_STATISTICS_INTS)
    try:
        library = ctypes.CDLL("/usr/lib/libSystem.B.dylib")
        host = ctypes.c_uint32(library.mach_host_self())
        failed = library.host_statistics64(host, HOST_VM_INFO64, ctypes.byref(info), ctypes.byref(count))
    except (OSError, AttributeError):
        return None
    pages = info[FREE] + info[INACTIVE] + info[PURGEABLE]
    return None if failed else pages * int(os.sysconf("SC_PAGE_SIZE"))


def time_host_reads(repeats: int = 15) -> tuple[list[float], float]:
    """Seconds from starting a tiny operation to its result on the host, each time: what a look at the device costs.

    Also the sum of all operations, which each add 1.
    """
    x, seconds = mx.zeros(8), []
    for _ in range(repeats):
        began = time.perf_counter()
        x = x + 1
        mx.eval(x)
        np.asarray(x)
        seconds.append(time.perf_counter() - began)
    return seconds, float(np.asarray(x)[0])


def limit_buffer_cache() -> None:
    """Keep MLX from hoarding freed buffers on Metal, where its default limit is nearly all memory."""
    if recommended_working_set() is not None:
        mx.set_cache_limit(int(CACHE_SHARE * physical_memory()))


def return_freed_memory() -> None:
    """Have the C allocator give freed buffers back to the system at once (glibc; nothing elsewhere).

    It learns from what is freed to keep blocks of up to 32 MB, and their holes count in the footprint: up to 29 MB more
    than MLX's peak for a prompt of 1,500 tokens. Holds for the process, for good. Costs page faults: 4 to 5 % of the
    CPU time of a prompt of 1,500 tokens.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, RETURNED_AT_ONCE)


@contextmanager
def wired() -> Iterator[None]:
    """Let Metal keep the model wired while it runs; nothing elsewhere."""
    size = recommended_working_set()
    if size is None:
        yield
        return
    before = mx.set_wired_limit(size)
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(before)


@contextmanager
def headroom(room: int | None) -> Iterator[None]:
    """While inside, let MLX use `room` bytes more than now before it waits for running operations; None: no limit.

    MLX makes arrays ahead of those that it computes, to keep the device busy. Above its memory limit it stops doing so
    (and on Metal it gives cached buffers back), which is slower but needs less. The CPU backend keeps freed buffers
    whatever its limit: there they are given back at once, which costs no time that we could measure.
    """
    if room is None:
        yield
        return
    before = mx.set_memory_limit(mx.get_active_memory() + room)
    cache = mx.set_cache_limit(0) if on_cpu() else None
    try:
        yield
    finally:
        mx.set_memory_limit(before)
        if cache is not None:
            mx.set_cache_limit(cache)
