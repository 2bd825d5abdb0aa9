"""Writing an expert-major copy of a checkpoint as planned by repack_plan.py: write, read back, compare, go on.

Every file is written under a temporary name, read back and compared by hash, and only then named and recorded, so an
interrupted run can be continued. Knows byte ranges only: tensors are copied as they are.
"""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..budget import format_bytes
from ..errors import CheckpointError, MoeCacheError, UsageError
from .checkpoint import INDEX_NAME
from .direct_io import drop_from_page_cache
from .expert_major import (
    PARTIAL_SUFFIX,
    FileRecord,
    Manifest,
    read_manifest,
    save_manifest,
    save_text,
)
from .hub import MODEL_FILES
from .repack_plan import FilePlan, RepackPlan

CHUNK_BYTES = 8 * 1024 * 1024
SPARE_BYTES = 50_000_000  # for the small files, and so as not to fill the disk to the last byte
SMALL_FILES = (*MODEL_FILES, "*.md", "LICENSE*")

Advance = Callable[[int], None]  # told the number of bytes that are done


class Repacker:
    """Writes the files of `plan` into the folder `out`, going on where an earlier run stopped.

    Raises UsageError at once if `out` cannot be used: it is the original, or holds something else.
    """

    def __init__(self, plan: RepackPlan, out: Path) -> None:
        self.plan, self.out = plan, out
        self.manifest = plan.manifest
        earlier = self._read_earlier()
        if earlier is not None:
            self.manifest = earlier

    @property
    def recorded(self) -> list[str]:
        """Files that the manifest calls finished."""
        return [name for name, record in self.manifest.files.items() if record.sha256 is not None]

    def check_recorded(self, advance: Advance) -> list[str]:
        """Hash the files that an earlier run finished; returns those that are damaged and will be written again."""
        damaged = []
        for name in self.recorded:
            record = self.manifest.files[name]
            if hash_file(self.out / name, advance) != record.sha256:
                self.manifest = self.manifest.with_file(name, FileRecord(record.nbytes))
                damaged.append(name)
        return damaged

    @property
    def pending(self) -> list[FilePlan]:
        """Files that are still to be written."""
        return [f for f in self.plan.files if self.manifest.files[f.name].sha256 is None]

    def check_space(self) -> None:
        """Raises UsageError if the disk has too little space for the pending files. Nothing is written."""
        needed = sum(f.nbytes for f in self.pending)
        if not needed:
            return
        place = self.out.absolute()
        while not place.exists():
            place = place.parent
        reusable = sum(p.stat().st_size for p in self._partial_files())
        free = shutil.disk_usage(place).free + reusable
        if free < needed + SPARE_BYTES:
            raise UsageError(
                f"{self.out}: the copy needs {format_bytes(needed + SPARE_BYTES, up=True)}, but only "
                f"{format_bytes(free)} are free there; free some space or choose a folder on another disk"
            )

    def run(self, advance: Advance) -> None:
        """Write what is pending and check it; each byte counts twice, once written and once read back.

        Raises MoeCacheError when the disk is full or fails, CheckpointError when the original cannot be read. What is
        finished by then is kept, as after KeyboardInterrupt.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with _locked(self.out), _descriptors(self.plan.index.shards) as sources:
                for leftover in self._partial_files():
                    leftover.unlink()
                if self.pending:
                    save_manifest(self.out, self.manifest)
                self._copy_small_files()
                for file in self.pending:
                    record = _write_file(file, self.plan.index.shards, sources, self.out / file.name, advance)
                    manifest = self.manifest.with_file(file.name, record)
                    save_manifest(self.out, manifest)
                    self.manifest = manifest
        except OSError as error:
            raise MoeCacheError(self._explain(error)) from error

    def _read_earlier(self) -> Manifest | None:
        source = self.plan.index.folder
        try:
            entries = os.listdir(self.out)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageError(
                f"{self.out}: cannot be used as a folder ({error.strerror}); choose another folder"
            ) from error
        if os.path.samefile(self.out, source):
            raise UsageError(f"{self.out}: is the model itself; choose another folder for the copy")
        earlier = read_manifest(self.out)
        if earlier is None:
            if any(not name.endswith(PARTIAL_SUFFIX) for name in entries):
                raise UsageError(
                    f"{self.out}: is not empty and was not made by mlx_moecache repack; choose a new or an empty folder"
                )
            return None
        mine = self.plan.manifest
        sizes = [{name: record.nbytes for name, record in m.files.items()} for m in (earlier, mine)]
        if earlier.fingerprint != mine.fingerprint or sizes[0] != sizes[1]:
            raise UsageError(
                f"{self.out}: holds a copy of another model ({earlier.source}), or of other files of this one; choose "
                "another folder or delete this one"
            )
        return earlier

    def _partial_files(self) -> list[Path]:
        return [p for p in self.out.glob(f"*{PARTIAL_SUFFIX}") if p.is_file()]

    def _copy_small_files(self) -> None:
        source = self.plan.index.folder
        for name in sorted(os.listdir(source)):
            wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in SMALL_FILES)
            is_weights = name.endswith((".safetensors", ".safetensors.index.json"))
            target = self.out / name
            # What is there already may have been edited by its owner.
            if wanted and not is_weights and (source / name).is_file() and not target.exists():
                partial = target.with_name(name + PARTIAL_SUFFIX)
                shutil.copyfile(source / name, partial)
                os.replace(partial, target)
        if len(self.plan.resident) > 1 and not (self.out / INDEX_NAME).exists():
            weight_map = {e.name: f.name for f in self.plan.resident for e in f.entries}
            total = sum(e.nbytes for f in self.plan.resident for e in f.entries)
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            save_text(self.out / INDEX_NAME, json.dumps(content, indent=1))

    def _explain(self, error: OSError) -> str:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "the disk is full"
        elif error.errno == errno.EWOULDBLOCK:
            return f"{self.out}: another mlx_moecache repack is writing there; wait until it has ended"
        else:
            what = f"cannot be written ({error.strerror or error})"
        done = f"{len(self.recorded)} of {len(self.manifest.files)} files are finished and kept"
        return f"{self.out}: {what}; {done}; once this is mended, run the same command again and it goes on"


def verify(folder: Path, manifest: Manifest, advance: Advance) -> list[str]:
    """Names of the finished files of `folder` whose size or SHA-256 is not that of the manifest, or that are gone."""
    return [name for name, record in manifest.files.items() if hash_file(folder / name, advance) != record.sha256]


def hash_file(path: Path, advance: Advance) -> str | None:
    """SHA-256 of a file's content as hexadecimal digits; None if there is no such file."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                advance(len(chunk))
    except FileNotFoundError:
        return None
    return digest.hexdigest()


def _write_file(
    plan: FilePlan, shards: Sequence[Path], sources: Sequence[int], target: Path, advance: Advance
) -> FileRecord:
    """Write, read back, compare, rename."""
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    digest = hashlib.sha256()
    try:
        with open(partial, "wb", buffering=CHUNK_BYTES) as file:
            for chunk in _content(plan, shards, sources):
                file.write(chunk)
                digest.update(chunk)
                advance(len(chunk))
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                # Reading back from memory would prove nothing about the disk.
                drop_from_page_cache(file.fileno(), 0, plan.nbytes)
        written = digest.hexdigest()
        if hash_file(partial, advance) != written:
            raise MoeCacheError(f"{target}: the disk gave back other bytes than were written; check it, use another")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return FileRecord(plan.nbytes, written)


def _content(plan: FilePlan, shards: Sequence[Path], sources: Sequence[int]) -> Iterator[bytes]:
    yield plan.header
    for e in plan.entries:
        if e.shard is None:
            yield bytes(e.nbytes)
            continue
        done = 0
        while done < e.nbytes:
            try:
                chunk = os.pread(sources[e.shard], min(CHUNK_BYTES, e.nbytes - done), e.offset + done)
            except OSError as error:
                raise _unreadable(shards[e.shard], error) from error
            if not chunk:
                raise CheckpointError(f"{shards[e.shard]}: became shorter while it was read; download it again")
            yield chunk
            done += len(chunk)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions and the disk")


@contextmanager
def _descriptors(paths: Sequence[Path]) -> Iterator[list[int]]:
    opened: list[int] = []
    try:
        for path in paths:
            try:
                opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                raise _unreadable(path, error) from error
        yield opened
    finally:
        for descriptor in opened:
            os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder against a second run: both would write the same temporary names."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Network file systems without locks are no reason to refuse.
            if error.errno == errno.EWOULDBLOCK:
                raise
        yield
    finally:
        os.close(descriptor)
