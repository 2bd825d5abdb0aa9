"""What the system says about memory, with a fake macOS, a fake Metal device and a fake file system."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_moecache import system

MB = 2**20
RAM = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
WORKING_SET = 12 * 2**30

# struct rusage_info_v2 of <sys/resource.h>, field by field
FIELDS = [
    *("user_time", "system_time", "pkg_idle_wkups", "interrupt_wkups", "pageins", "wired_size", "resident_size"),
    *("phys_footprint", "proc_start_abstime", "proc_exit_abstime", "child_user_time", "child_system_time"),
    *("child_pkg_idle_wkups", "child_interrupt_wkups", "child_pageins", "child_elapsed_abstime"),
    *("diskio_bytesread", "diskio_byteswritten"),
]


class RusageInfoV2(ctypes.Structure):
    _fields_ = (("ri_uuid", ctypes.c_uint8 * 16), *((f"ri_{name}", ctypes.c_uint64) for name in FIELDS))


class FakeLibproc:
    """proc_pid_rusage as the header declares it: fills the struct and returns 0, or -1."""

    def __init__(self, result: int = 0) -> None:
        self.result = result
        self.asked: list[tuple[int, int]] = []

    def proc_pid_rusage(self, pid: int, flavor: int, buffer: Any) -> int:
        self.asked.append((pid, flavor))
        if self.result == 0:
            info = RusageInfoV2.from_buffer(buffer._obj)  # the buffer must be large enough for the struct
            for i, name in enumerate(FIELDS):
                setattr(info, f"ri_{name}", 1000 + i)
            info.ri_phys_footprint = 345 * MB
        return self.result


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A device that names a working set; what is set on it is recorded."""
    calls: dict[str, Any] = {"wired": [0], "synchronized": 0}

    def set_wired_limit(limit: int) -> int:
        calls["wired"].append(limit)
        return calls["wired"][-2]

    def synchronize() -> None:
        calls["synchronized"] += 1

    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": WORKING_SET})
    monkeypatch.setattr(mx, "set_cache_limit", lambda limit: calls.__setitem__("cache", limit))
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    monkeypatch.setattr(mx, "synchronize", synchronize)
    return calls


class TestProcessFootprint:
    def test_macos_asks_for_the_physical_footprint_of_this_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        library = FakeLibproc()
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(ctypes, "CDLL", lambda path: library)
        assert system.process_footprint() == 345 * MB
        assert library.asked == [(os.getpid(), 2)]  # RUSAGE_INFO_V2

    def test_macos_that_refuses_is_unknown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(ctypes, "CDLL", lambda path: FakeLibproc(result=-1))
        assert system.process_footprint() is None

    def test_macos_without_the_library_is_unknown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(path: str) -> None:
            raise OSError(path)

        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(ctypes, "CDLL", missing)
        assert system.process_footprint() is None

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_linux_counts_memory_that_is_ours_and_not_pages_of_files(self, tmp_path: Path) -> None:
        before = system.process_footprint()
        ours = b"x" * (64 * MB)
        grown = system.process_footprint()
        assert before is not None and grown is not None
        assert 60 * MB < grown - before < 80 * MB
        path = tmp_path / "file"
        path.write_bytes(ours)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert mapped.rfind(b"y") == -1  # touches every page
            mapped_too = system.process_footprint()
        assert mapped_too is not None
        assert mapped_too - grown < 10 * MB

    def test_a_system_without_proc_is_unknown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(self: Path) -> str:
            raise OSError("no such file")

        monkeypatch.setattr(sys, "platform", "freebsd")
        monkeypatch.setattr(Path, "read_text", missing)
        assert system.process_footprint() is None


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class TestPhysicalMemory:
    def test_all_of_ram_where_there_are_no_control_groups(self, tmp_path: Path) -> None:
        assert system.physical_memory(tmp_path) == RAM

    def test_a_control_group_that_allows_less_counts(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/self/cgroup", "0::/user.slice/job\n")
        write(tmp_path / "sys/fs/cgroup/user.slice/job/memory.max", f"{256 * MB}\n")
        write(tmp_path / "sys/fs/cgroup/user.slice/memory.max", "max\n")
        assert system.physical_memory(tmp_path) == 256 * MB

    def test_so_does_one_above_it(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/self/cgroup", "0::/user.slice/job\n")
        write(tmp_path / "sys/fs/cgroup/user.slice/job/memory.max", "max\n")
        write(tmp_path / "sys/fs/cgroup/user.slice/memory.max", f"{128 * MB}\n")
        assert system.physical_memory(tmp_path) == 128 * MB

    def test_inside_of_a_container_the_group_is_the_root(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/self/cgroup", "0::/\n")
        write(tmp_path / "sys/fs/cgroup/memory.max", f"{128 * MB}\n")
        write(tmp_path / "memory.max", "1\n")  # outside of the hierarchy
        assert system.physical_memory(tmp_path) == 128 * MB

    def test_more_than_ram_is_still_ram(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/self/cgroup", "0::/\n")
        write(tmp_path / "sys/fs/cgroup/memory.max", f"{2 * RAM}\n")
        assert system.physical_memory(tmp_path) == RAM

    def test_version_1_groups_are_ignored(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/self/cgroup", "4:memory:/job\n")
        write(tmp_path / "sys/fs/cgroup/job/memory.max", f"{128 * MB}\n")
        assert system.physical_memory(tmp_path) == RAM


class TestDevice:
    def test_metal_names_a_working_set(self, metal: dict[str, Any]) -> None:
        assert system.recommended_working_set() == WORKING_SET

    def test_a_device_without_one_has_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "cpu"})
        assert system.recommended_working_set() is None

    def test_on_metal_the_buffer_cache_gets_a_share_of_ram(
        self, metal: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(system, "physical_memory", lambda: 16 * 2**30)
        system.limit_buffer_cache()
        assert metal["cache"] == 2**30

    def test_elsewhere_it_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mx, "device_info", dict)
        monkeypatch.setattr(mx, "set_cache_limit", lambda limit: pytest.fail("the cache limit was changed"))
        system.limit_buffer_cache()

    def test_on_metal_the_model_is_wired_while_it_runs(self, metal: dict[str, Any]) -> None:
        with pytest.raises(KeyboardInterrupt), system.wired():
            assert metal["wired"] == [0, WORKING_SET]
            raise KeyboardInterrupt
        assert metal["wired"] == [0, WORKING_SET, 0]
        assert metal["synchronized"] == 1  # nothing may run on unwired memory

    def test_elsewhere_nothing_is_wired(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mx, "device_info", dict)
        monkeypatch.setattr(mx, "set_wired_limit", lambda limit: pytest.fail("the wired limit was changed"))
        with system.wired():
            pass

    @pytest.mark.parametrize("device", [mx.cpu, mx.gpu])
    def test_the_cpu_backend_is_known(self, device: mx.DeviceType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device, 0))
        assert system.on_cpu() == (device == mx.cpu)


def memory_limit() -> int:
    """MLX's memory limit, which can only be read by setting it."""
    limit = mx.set_memory_limit(2**40)
    mx.set_memory_limit(limit)
    return limit


class TestHeadroom:
    def test_the_limit_counts_from_what_is_there_and_is_put_back(self) -> None:
        before = memory_limit()
        kept = mx.zeros((1000,))
        mx.eval(kept)
        with pytest.raises(ValueError, match="boom"), system.headroom(5 * MB):
            assert memory_limit() == mx.get_active_memory() + 5 * MB
            raise ValueError("boom")
        assert memory_limit() == before

    def test_no_room_given_is_no_limit(self) -> None:
        before = memory_limit()
        with system.headroom(None):
            assert memory_limit() == before

    def test_what_is_made_ahead_of_the_computation_stays_within(self) -> None:
        size = 4 * MB

        def chain(x: mx.array) -> mx.array:
            for i in range(20):
                x = mx.sort(x + i, axis=0)[::-1] * 0.5
            return x

        def peak(room: int | None) -> int:
            x = mx.random.normal((size // 4,))
            mx.eval(x)
            start = mx.get_active_memory()
            mx.reset_peak_memory()
            with mx.stream(mx.cpu), system.headroom(room):  # other devices make fewer arrays ahead
                mx.eval(chain(x))
            return mx.get_peak_memory() - start

        assert peak(None) > 8 * size  # else the test shows nothing
        assert peak(2 * size) <= 5 * size
