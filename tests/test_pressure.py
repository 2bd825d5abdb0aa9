"""What the system says about being short of memory, with a fake macOS and a fake Linux file system."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_moecache.pressure import (
    LinuxPressure,
    MacPressure,
    NoPressure,
    Pressure,
    system_pressure,
)

MB = 2**20
N, W, C = Pressure.NORMAL, Pressure.WARNING, Pressure.CRITICAL


class FakeLibSystem:
    """sysctlbyname(name, oldp, oldlenp, newp, newlen) as <sys/sysctl.h> declares it."""

    def __init__(self, level: int, result: int = 0) -> None:
        self._level, self._result = level, result
        self.asked: list[bytes] = []

    def sysctlbyname(self, name: bytes, value: Any, size: Any, new: Any, new_size: int) -> int:
        self.asked.append(name)
        assert size._obj.value == ctypes.sizeof(ctypes.c_int) and new is None and new_size == 0
        if self._result == 0:
            value._obj.value = self._level
        return self._result


class TestMac:
    @pytest.mark.parametrize(("kernel", "level"), [(1, N), (2, W), (4, C), (0, N)])
    def test_the_kernels_levels(self, kernel: int, level: Pressure, monkeypatch: pytest.MonkeyPatch) -> None:
        library = FakeLibSystem(kernel)
        monkeypatch.setattr(ctypes, "CDLL", lambda path: library)
        assert MacPressure().level() is level
        assert library.asked == [b"kern.memorystatus_vm_pressure_level"]

    def test_a_kernel_that_does_not_say_is_no_pressure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes, "CDLL", lambda path: FakeLibSystem(4, result=-1))
        assert MacPressure().level() is N

    def test_so_is_a_system_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(path: str) -> None:
            raise OSError(path)

        monkeypatch.setattr(ctypes, "CDLL", missing)
        assert MacPressure().level() is N


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def stalls(some: float, full: float) -> str:
    return f"some avg10={some:.2f} avg60=0.00 total=123\nfull avg10={full:.2f} avg60=99.00 total=9\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A calm system with 8 GB, of which 4 are available, in a control group without a limit."""
    write(tmp_path / "proc/pressure/memory", stalls(0, 0))
    write(tmp_path / "proc/meminfo", f"MemTotal: {8 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {4 * 2**20} kB\n")
    write(tmp_path / "proc/self/cgroup", "0::/job\n")
    write(tmp_path / "sys/fs/cgroup/job/memory.max", "max\n")
    write(tmp_path / "sys/fs/cgroup/job/memory.high", "max\n")
    write(tmp_path / "sys/fs/cgroup/job/memory.current", f"{900 * MB}\n")
    return tmp_path


class TestLinux:
    def test_a_calm_system(self, root: Path) -> None:
        assert LinuxPressure(root).level() is N

    @pytest.mark.parametrize(
        ("some", "full", "level"), [(9.9, 4.9, N), (10, 0, W), (0, 5, W), (40, 0, C), (10, 20, C), (100, 100, C)]
    )
    def test_stalls(self, root: Path, some: float, full: float, level: Pressure) -> None:
        write(root / "proc/pressure/memory", stalls(some, full))
        assert LinuxPressure(root).level() is level
        write(root / "proc/pressure/memory", stalls(0, 0))
        write(root / "sys/fs/cgroup/job/memory.pressure", stalls(some, full))
        assert LinuxPressure(root).level() is level

    @pytest.mark.parametrize(("used", "level"), [(890, N), (900, W), (960, W), (970, C), (2000, C)])
    @pytest.mark.parametrize("limit", ["memory.max", "memory.high"])
    def test_the_limit_of_the_control_group(self, root: Path, used: int, level: Pressure, limit: str) -> None:
        write(root / "sys/fs/cgroup/job/memory.current", f"{used * MB}\n")
        write(root / f"sys/fs/cgroup/job/{limit}", f"{1000 * MB}\n")
        assert LinuxPressure(root).level() is level

    def test_pages_of_files_can_be_dropped_and_do_not_count(self, root: Path) -> None:
        write(root / "sys/fs/cgroup/job/memory.max", f"{1000 * MB}\n")
        write(root / "sys/fs/cgroup/job/memory.current", f"{999 * MB}\n")
        write(
            root / "sys/fs/cgroup/job/memory.stat",
            f"anon {99 * MB}\ninactive_file {500 * MB}\nactive_file {400 * MB}\n",
        )
        assert LinuxPressure(root).level() is N

    @pytest.mark.parametrize(("percent", "level"), [(6, N), (4, W), (1, C), (0, C)])
    def test_what_is_available_at_all(self, root: Path, percent: int, level: Pressure) -> None:
        write(root / "proc/meminfo", f"MemTotal: 1000000 kB\nMemAvailable: {10_000 * percent} kB\n")
        assert LinuxPressure(root).level() is level

    def test_the_worst_counts(self, root: Path) -> None:
        write(root / "proc/pressure/memory", stalls(12, 0))
        write(root / "proc/meminfo", "MemTotal: 1000000 kB\nMemAvailable: 10 kB\n")
        assert LinuxPressure(root).level() is C

    @pytest.mark.parametrize("text", ["", "some avg10=many\n", "some\n", "full avg60=99\n", "\n\n"])
    def test_what_cannot_be_understood_is_no_pressure(self, root: Path, text: str) -> None:
        write(root / "proc/pressure/memory", text)
        assert LinuxPressure(root).level() is N

    def test_a_system_without_any_of_it(self, tmp_path: Path) -> None:
        assert LinuxPressure(tmp_path).level() is N


@pytest.mark.parametrize(
    ("platform", "kind"), [("darwin", MacPressure), ("linux", LinuxPressure), ("win32", NoPressure)]
)
def test_every_system_has_a_source(platform: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert type(system_pressure()) is kind
    assert NoPressure().level() is N


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_system_can_be_asked() -> None:
    assert system_pressure().level() in Pressure
