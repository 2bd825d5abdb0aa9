"""What the doctor measures of the machine: the device, a host read, cold reads from the disk. No model is loaded."""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import shutil
import statistics
import sys
import tempfile
import zlib
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlx.core as mx
import numpy as np

from .. import system
from ..budget import format_bytes
from ..checkpoints.reader import ExpertReader, ReadRequest
from .doctor_check import Check, Figure, Show

PACKAGES = ("mlx", "mlx-lm", "numpy", "transformers")
SLOW_HOST_READ = 1e-3  # seconds: every partly resident layer reads the host once per token
PIECE = 2 * 2**20  # bytes read as one request, about an expert's matrix
BATCH = 8  # requests per read, about the misses of a layer
SPARE = 4  # times the file's size must be free, so that a nearly full disk is left alone
SLOW_DISK = 5e8  # bytes/s; below it a token of a large model waits for seconds
MEMORY_SPEED = 2e10  # bytes/s, more than any SSD gives
IO_MODES = {  # of direct_io.py
    "direct": "O_DIRECT",
    "nocache": "F_NOCACHE",
    "fadvise": "buffered, pages dropped before",
    "buffered": "through the page cache",
}
LONGEST = 8.0  # seconds of reading; slow disks have shown what they are by then


def packages() -> dict[str, str | None]:
    """The versions that matter, None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def machine() -> str:
    """Operating system and architecture; neither host nor user."""
    mac = platform.mac_ver()[0]
    name = f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}"
    return f"{name}, {platform.machine()}"


def check_device(platform_name: str = sys.platform) -> Check:
    """What MLX computes on; a Mac without its GPU is a warning."""
    info = mx.device_info()
    kind = "CPU" if system.on_cpu() else "GPU"
    ram, working_set = system.physical_memory(), system.recommended_working_set()
    text = f"MLX on the {kind}, {info.get('device_name', 'unknown')}, {format_bytes(ram)} of RAM"
    if working_set:
        text += f", working set {format_bytes(working_set)}"
    figures: dict[str, Figure] = {
        "device": kind.lower(),
        "device_name": str(info.get("device_name", "")),
        "ram_bytes": ram,
        "recommended_working_set_bytes": working_set,
    }
    if platform_name == "darwin" and kind == "CPU":
        return Check("device", "warning", f"{text}; Metal is not in use: install the arm64 build of mlx", figures)
    return Check("device", "ok", text, figures)


def check_host_read(repeats: int) -> Check:
    """Time from starting a tiny operation to its result in NumPy: what a layer's look at its selections costs."""
    seconds, total = system.time_host_reads(repeats)
    if total != repeats:
        return Check("host read", "FAILED", f"adding 1 {repeats} times gave {total:g}")
    median, worst = statistics.median(seconds), max(seconds)
    text = f"{_micro(median)} (median of {repeats:,}; longest {_micro(worst)})"
    figures: dict[str, Figure] = {"median_seconds": median, "longest_seconds": worst}
    if median > SLOW_HOST_READ:
        return Check("host read", "warning", f"{text}; slow: each layer of experts does one per token", figures)
    return Check("host read", "ok", text, figures)


def check_cold_read(folder: Path, nbytes: int, show: Show) -> Check:
    """Write a temporary file of `nbytes` random bytes, read it past the page cache as experts are, compare, remove it.

    The speed is that of the disk on which `folder` lies.
    """
    free = shutil.disk_usage(folder).free
    if free < SPARE * nbytes:
        wanted = f"{format_bytes(SPARE * nbytes)} for a file of {format_bytes(nbytes)}"
        return Check("cold read", "warning", f"not measured: {format_bytes(free)} free, wanted {wanted}")
    with ExitStack() as stack:
        try:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlx_moecache-", dir=folder))) / "random"
            checksums = _write_random(path, nbytes // PIECE, show)
        except OSError as error:
            return Check("cold read", "warning", f"not measured: cannot write a file: {error.strerror or error}")
        reader = stack.enter_context(ExpertReader([path], direct_io=True))
        wrong = _read_back(reader, checksums, show)
        speed, mode, done = reader.bytes_read / reader.read_seconds, reader.io_mode, reader.bytes_read
    figures: dict[str, Figure] = {"bytes_per_second": speed, "bytes": done, "io_mode": mode, "wrong_pieces": wrong}
    text = f"{speed / 1e9:.2f} GB/s ({IO_MODES[mode]}, {format_bytes(done)} in pieces of {format_bytes(PIECE)})"
    if wrong:
        return Check("cold read", "FAILED", f"{wrong} pieces differ from what was written; {text}", figures)
    if mode == "buffered" or speed > MEMORY_SPEED:
        return Check("cold read", "warning", f"{text}: this came from memory, not from the disk", figures)
    if speed < SLOW_DISK:
        return Check("cold read", "warning", f"{text}: slow, tokens will wait for it", figures)
    return Check("cold read", "ok", text, figures)


def _write_random(path: Path, pieces: int, show: Show) -> list[int]:
    """Write and return the CRC of each piece. Random bytes, since some disks compress."""
    random, checksums = np.random.default_rng(0), []
    # Page-aligned memory: macOS keeps writes out of its cache only then, and cached pages would be read back.
    with mmap.mmap(-1, PIECE) as memory, path.open("wb", buffering=0) as file:
        if sys.platform == "darwin":
            fcntl.fcntl(file.fileno(), fcntl.F_NOCACHE, 1)
        for i in range(pieces):
            show(f"cold read: writing {i * PIECE / 1e6:,.0f} of {pieces * PIECE / 1e6:,.0f} MB")
            memory[:] = random.bytes(PIECE)
            checksums.append(zlib.crc32(memory))
            written = 0
            with memoryview(memory) as view:
                while written < PIECE:
                    with view[written:] as rest:
                        written += file.write(rest)
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return checksums


def _read_back(reader: ExpertReader, checksums: list[int], show: Show) -> int:
    """Read the pieces in random order, for LONGEST seconds at most; returns how many were not what was written."""
    order = np.random.default_rng(1).permutation(len(checksums)).tolist()
    wrong = 0
    with mmap.mmap(-1, BATCH * PIECE) as memory, memoryview(memory) as view:
        for i in range(0, len(order), BATCH):
            if reader.read_seconds > LONGEST:
                break
            show(f"cold read: {i} of {len(order)} pieces")
            batch = order[i : i + BATCH]
            places = [view[j * PIECE : (j + 1) * PIECE] for j in range(len(batch))]
            reader.read([ReadRequest(0, p * PIECE, place) for p, place in zip(batch, places, strict=True)])
            wrong += sum(zlib.crc32(place) != checksums[p] for p, place in zip(batch, places, strict=True))
            for place in places:
                place.release()
    return wrong


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us"
