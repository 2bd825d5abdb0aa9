"""What the operating system and the device say about memory. All that is particular to macOS or Metal stands here.

The Metal and macOS branches are tested behind fakes; they have not been run on a Mac by the authors.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

RUSAGE_INFO_V2 = 2  # <sys/resource.h>; in its struct ri_phys_footprint is the 8th uint64 after a 16-byte uuid
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
        return _phys_footprint()
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_limits(root: Path) -> Iterator[int]:
    """memory.max of the control group of this process and of those above it (version 2; nothing elsewhere)."""
    top = root / "sys/fs/cgroup"
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for path in (line.removeprefix("0::").lstrip("/") for line in groups if line.startswith("0::")):
        for folder in (top / path, *(top / path).parents):
            if not folder.is_relative_to(top):
                break
            try:
                limit = int((folder / "memory.max").read_text())
            except (OSError, ValueError):  # no such file, or "max"
                continue
            yield limit


def _phys_footprint() -> int | None:
    buffer = (ctypes.c_uint64 * 64)()
    try:
        library = ctypes.CDLL("/usr/lib/libproc.dylib")
        failed = library.proc_pid_rusage(os.getpid(), RUSAGE_INFO_V2, ctypes.byref(buffer))
    except (OSError, AttributeError):
        return None
    return None if failed else int(buffer[2 + 7])


def limit_buffer_cache() -> None:
    """Keep MLX from hoarding freed buffers on Metal, where its default limit is nearly all memory."""
    if recommended_working_set() is not None:
        mx.set_cache_limit(int(CACHE_SHARE * physical_memory()))


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
    (and on Metal it gives cached buffers back), which is slower but needs less.
    """
    if room is None:
        yield
        return
    before = mx.set_memory_limit(mx.get_active_memory() + room)
    try:
        yield
    finally:
        mx.set_memory_limit(before)
