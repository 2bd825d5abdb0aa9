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
# what rusage_info_v4 has beside
FIELDS_V4 = [
    *("cpu_time_qos_default", "cpu_time_qos_maintenance", "cpu_time_qos_background", "cpu_time_qos_utility"),
    *("cpu_time_qos_legacy", "cpu_time_qos_user_initiated", "cpu_time_qos_user_interactive", "billed_system_time"),
    *("serviced_system_time", "logical_writes", "lifetime_max_phys_footprint", "instructions", "cycles"),
    *("billed_energy", "serviced_energy", "interval_max_phys_footprint", "runnable_time"),
]


class RusageInfoV2(ctypes.Structure):
    _fields_ = (("ri_uuid", ctypes.c_uint8 * 16), *((f"ri_{name}", ctypes.c_uint64) for name in FIELDS))


class RusageInfoV4(ctypes.Structure):
    _fields_ = (
        ("ri_uuid", ctypes.c_uint8 * 16),
        *((f"ri_{name}", ctypes.c_uint64) for name in FIELDS + FIELDS_V4),
    )


class VmStatistics64(ctypes.Structure):
    """struct vm_statistics64 of <mach/vm_statistics.h>."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("free_count", "active_count", "inactive_count", "wire_count")),
        *((name, ctypes.c_uint64) for name in ("zero_fill_count", "reactivations", "pageins", "pageouts")),
        *((name, ctypes.c_uint64) for name in ("faults", "cow_faults", "lookups", "hits", "purges")),
        *((name, ctypes.c_uint32) for name in ("purgeable_count", "speculative_count")),
        *((name, ctypes.c_uint64) for name in ("decompressions", "compressions", "swapins", "swapouts")),
        *((name, ctypes.c_uint32) for name in ("compressor_page_count", "throttled_count")),
        *((name, ctypes.c_uint32) for name in ("external_page_count", "internal_page_count")),
        ("total_uncompressed_pages_in_compressor", ctypes.c_uint64),
    )


class FakeLibSystem:
    """host_statistics64(host, flavor, info, count) with 100 free, 20 inactive and 3 purgeable pages, 7 of all else."""

    def __init__(self, result: int = 0) -> None:
        self.result = result

    def mach_host_self(self) -> int:
        return 12

    def host_statistics64(self, host: Any, flavor: int, info: Any, count: Any) -> int:
        assert host.value == 12 and flavor == 4  # HOST_VM_INFO64
        assert count._obj.value == ctypes.sizeof(VmStatistics64) // 4  # HOST_VM_INFO64_COUNT
        statistics = VmStatistics64.from_buffer(info._obj)
        for name, *_ in VmStatistics64._fields_:
            setattr(statistics, name, 7)
        statistics.free_count, statistics.inactive_count, statistics.purgeable_count = 100, 20, 3
        return self.result


class FakeLibproc:
    """proc_pid_rusage as the header declares it: fills the struct and returns 0, or -1."""

    def __init__(self, result: int = 0) -> None:
        self.result = result
        self.asked: list[tuple[int, int]] = []

    def proc_pid_rusage(self, pid: int, flavor: int, buffer: Any) -> int:
        self.asked.append((pid, flavor))
        if self.result == 0:
            # The buffer must be large enough for the struct.
            info = (RusageInfoV2 if flavor == 2 else RusageInfoV4).from_buffer(buffer._obj)
            for i, (name, _) in enumerate(info._fields_[1:]):
                setattr(info, name, 1000 + i)
            info.ri_phys_footprint = 345 * MB
            if flavor == 4:
                info.ri_lifetime_max_phys_footprint = 456 * MB
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


class TestPeakFootprint:
    def test_macos_remembers_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        library = FakeLibproc()
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(ctypes, "CDLL", lambda path: library)
        assert system.peak_footprint() == 456 * MB
        assert library.asked == [(os.getpid(), 4)]  # RUSAGE_INFO_V4

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_linux_remembers_what_is_gone_until_it_is_reset(self) -> None:
        before = system.process_footprint()
        assert before is not None
        ours = b"x" * (96 * MB)
        del ours
        peak = system.peak_footprint()
        assert peak is not None and peak > before + 80 * MB
        system.reset_peak_footprint()
        later = system.peak_footprint()
        assert later is not None and later < before + 40 * MB

    def test_a_system_without_proc_is_unknown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(self: Path, *args: object) -> str:
            raise OSError("no such file")

        monkeypatch.setattr(sys, "platform", "freebsd")
        monkeypatch.setattr(Path, "read_text", missing)
        monkeypatch.setattr(Path, "write_text", missing)
        assert system.peak_footprint() is None
        system.reset_peak_footprint()


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


class TestAvailableMemory:
    @pytest.fixture(autouse=True)
    def linux(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "linux")

    def test_what_the_kernel_says(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/meminfo", "MemTotal: 4000 kB\nMemFree: 1000 kB\nMemAvailable: 3000 kB\n")
        assert system.available_memory(tmp_path) == 3000 * 1024

    @pytest.mark.parametrize("limit", ["memory.max", "memory.high"])
    def test_a_control_group_leaves_less_and_pages_of_files_can_go(self, tmp_path: Path, limit: str) -> None:
        write(tmp_path / "proc/meminfo", "MemTotal: 4000000 kB\nMemAvailable: 3000000 kB\n")
        write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
        write(tmp_path / f"sys/fs/cgroup/a/{limit}", f"{500 * MB}\n")
        write(tmp_path / "sys/fs/cgroup/a/memory.current", f"{400 * MB}\n")
        assert system.available_memory(tmp_path) == 100 * MB
        write(tmp_path / "sys/fs/cgroup/a/memory.stat", f"anon 1\ninactive_file {30 * MB}\nactive_file {20 * MB}\n")
        assert system.available_memory(tmp_path) == 150 * MB

    def test_a_system_that_does_not_say(self, tmp_path: Path) -> None:
        assert system.available_memory(tmp_path) is None

    def test_macos_counts_pages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(ctypes, "CDLL", lambda path: FakeLibSystem())
        assert system.available_memory() == 123 * os.sysconf("SC_PAGE_SIZE")

    def test_macos_that_refuses_is_unknown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(ctypes, "CDLL", lambda path: FakeLibSystem(result=5))
        assert system.available_memory() is None


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

    @pytest.mark.skipif(not system.on_cpu(), reason="other devices give buffers back above their limit")
    def test_freed_buffers_are_not_kept_meanwhile(self) -> None:
        def work() -> int:
            mx.clear_cache()
            mx.eval(mx.zeros((MB,)) + 1)
            return mx.get_cache_memory()

        before = mx.set_cache_limit(32 * MB)
        try:
            kept = work()
            with system.headroom(50 * MB):
                assert work() == 0
            assert work() == kept > MB
        finally:
            mx.set_cache_limit(before)

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
