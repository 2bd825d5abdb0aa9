"""Opening shards so that reads do, or do not, go through the page cache: the only OS-specific I/O code.

Linux bypasses the cache with O_DIRECT, which wants aligned offsets, lengths and memory. Safetensors offsets
and MLX arrays are not aligned, so a `BounceBuffer` reads whole blocks and copies the wanted part out. Where
the file system refuses O_DIRECT, reads are buffered and the pages are dropped afterwards. macOS has
F_NOCACHE, which needs no alignment: it keeps new pages out of the cache, but evicts none that are there.

This module knows descriptors and bytes. Threads, pieces and error messages belong to `reader.py`.
"""

import contextlib
import fcntl
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ALIGNMENT = 4096
HUGE_PAGE = 2 * 1024 * 1024
_LARGEST_ALIGNMENT = 65536
_F_NOCACHE = 48  # the number on macOS, for the case that the fcntl module was built without the name
_MAX_IOVECS = 1024  # IOV_MAX on Linux and macOS


@dataclass(frozen=True)
class OpenShards:
    descriptors: tuple[int, ...]  # one per shard, in the order of the paths
    mode: str  # "buffered" | "direct" | "fadvise" | "nocache"
    note: str | None = None  # why `mode` is not the best that was asked for
    alignment: int = 1  # bytes; offsets and lengths of reads are multiples of it (1 unless direct)


def open_shards(paths: Sequence[Path], *, direct: bool) -> OpenShards:
    """Open every shard for reading, past the page cache if `direct`; raises OSError that names the file."""
    if not direct:
        return OpenShards(_open_buffered(paths), "buffered")
    if sys.platform == "darwin":
        return _open_nocache(paths)
    if hasattr(os, "O_DIRECT"):
        try:
            return _open_o_direct(paths)
        except OSError as error:
            # Also reached for a missing file: the buffered open below then raises for it.
            refusal = f"the file system refuses O_DIRECT ({error.strerror})"
    else:
        refusal = f"{sys.platform} has no O_DIRECT"
    descriptors = _open_buffered(paths)
    if hasattr(os, "posix_fadvise"):
        note = f"direct I/O: {refusal}; reads go through the page cache and are dropped from it afterwards"
        return OpenShards(descriptors, "fadvise", note)
    return OpenShards(descriptors, "buffered", f"direct I/O: {refusal}; reads go through the page cache")


def drop_from_page_cache(descriptor: int, offset: int, nbytes: int) -> None:
    """Drop the pages that hold bytes [offset, offset + nbytes), those at its edges included."""
    # The kernel keeps partly covered pages, so the range grows to whole ones.
    start = offset - offset % mmap.PAGESIZE
    end = -(-(offset + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)


def read_into(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
    """Fill `views` one after the other from `offset` on; returns the bytes read, fewer only at end of file.

    OSError passes through. Interrupted calls are repeated by `os.preadv` itself.
    """
    pending = list(views)
    done = 0
    while pending:
        got = os.preadv(descriptor, pending[:_MAX_IOVECS], offset + done)
        if got == 0:
            break
        done += got
        while pending and got >= len(pending[0]):
            got -= len(pending.pop(0))
        if got:
            pending[0] = pending[0][got:]
    return done


class BounceBuffer:
    """Aligned memory through which one thread at a time reads from an O_DIRECT descriptor.

    It takes reads of up to `capacity` bytes at any offset: the rest of it is padding to whole blocks.
    """

    def __init__(self, memory: memoryview, alignment: int) -> None:
        self.capacity = len(memory) - alignment
        self._memory = memory
        self._alignment = alignment

    def read_into(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        """As the function `read_into`; the views together must not be longer than the capacity."""
        wanted = sum(map(len, views))
        padding = offset % self._alignment
        blocks = -(-(padding + wanted) // self._alignment) * self._alignment
        filled = 0
        while filled < padding + wanted:
            # After a short read the next one must start on a block again, so a partial block is read anew.
            start = filled - filled % self._alignment
            got = os.preadv(descriptor, [self._memory[start:blocks]], offset - padding + start)
            if start + got <= filled:
                break
            filled = start + got
        done = max(0, min(filled - padding, wanted))
        at = padding
        for view in views:
            part = self._memory[at : min(at + len(view), padding + done)]
            view[: len(part)] = part
            at += len(view)
        return done

    def close(self) -> None:
        self._memory.release()


class BounceArena:
    """The memory of `count` bounce buffers of `size` bytes each, in one mapping; `nbytes` is all of it."""

    def __init__(self, count: int, size: int, alignment: int) -> None:
        self.nbytes = -(-count * size // HUGE_PAGE) * HUGE_PAGE
        # A shared mapping, Python's default, gets no huge pages.
        self._mapping = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # A device request takes few memory segments. Scattered 4 KiB pages cut reads into small requests:
            # on a virtio disk huge pages doubled the speed.
            with contextlib.suppress(OSError):
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
        with memoryview(self._mapping) as memory:
            self.buffers = [
                BounceBuffer(memory[start : start + size], alignment) for start in range(0, count * size, size)
            ]

    def close(self) -> None:
        """Give the memory back; the buffers cannot be used any more."""
        for buffer in self.buffers:
            buffer.close()
        self.buffers.clear()
        # The traceback of a failed read may still hold a part; the memory then goes with it.
        with contextlib.suppress(BufferError):
            self._mapping.close()


def _open_buffered(paths: Sequence[Path]) -> tuple[int, ...]:
    descriptors = _open_each(paths, os.O_RDONLY)
    if hasattr(os, "posix_fadvise"):
        for descriptor in descriptors:
            # Experts lie scattered: read-ahead past the end of each would fetch up to twice the bytes wanted.
            with contextlib.suppress(OSError):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptors


def _open_nocache(paths: Sequence[Path]) -> OpenShards:
    descriptors = _open_each(paths, os.O_RDONLY)
    try:
        for descriptor in descriptors:
            fcntl.fcntl(descriptor, getattr(fcntl, "F_NOCACHE", _F_NOCACHE), 1)
    except OSError as error:
        refusal = f"the file system refuses F_NOCACHE ({error.strerror})"
        return OpenShards(descriptors, "buffered", f"direct I/O: {refusal}; reads go through the page cache")
    return OpenShards(descriptors, "nocache")


def _open_o_direct(paths: Sequence[Path]) -> OpenShards:
    descriptors = _open_each(paths, os.O_RDONLY | os.O_DIRECT)
    try:
        alignment = max(map(_block_size, descriptors), default=DEFAULT_ALIGNMENT)
        with mmap.mmap(-1, alignment) as block:
            for descriptor in descriptors:
                # Some file systems accept the flag and refuse the reads.
                os.preadv(descriptor, [block], 0)
    except OSError:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return OpenShards(descriptors, "direct", alignment=alignment)


def _open_each(paths: Sequence[Path], flags: int) -> tuple[int, ...]:
    descriptors: list[int] = []
    try:
        for path in paths:
            descriptors.append(os.open(path, flags | os.O_CLOEXEC))
    except OSError:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return tuple(descriptors)


def _block_size(descriptor: int) -> int:
    """Bytes to which O_DIRECT reads are aligned: the file system's block size where it is a sensible one."""
    size = os.fstatvfs(descriptor).f_bsize
    # Network file systems report their preferred transfer size here, which can be megabytes.
    sensible = DEFAULT_ALIGNMENT <= size <= _LARGEST_ALIGNMENT and size & (size - 1) == 0
    return size if sensible else DEFAULT_ALIGNMENT
