"""Phones, tablets and laptops that are emulated: how much memory one app may use, and how fast the flash is.

Every figure has a source. One that nobody has measured begins with "estimate:" and says from what it is derived.
Plain data; nothing of MLX is imported.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .errors import UsageError

GB = 10**9  # what the sources mean by a limit of 6 GB; the smaller reading, so that nothing is promised too much
GIB = 2**30  # what a chip of 8 GB holds
ESTIMATE = "estimate:"
WITHOUT_ENTITLEMENT = "-no-entitlement"


@dataclass(frozen=True)
class Figure:
    """One number and where it comes from: an address, or "estimate: ..." with its derivation."""

    value: float
    source: str

    @property
    def is_estimate(self) -> bool:
        return self.source.startswith(ESTIMATE)


@dataclass(frozen=True)
class Device:
    """What is emulated of a device. How fast it computes is not: it depends on software that does not run here."""

    name: str  # as on the command line
    title: str
    memory: Figure  # bytes of RAM
    app_limit: Figure  # bytes that one app may have, everything counted; the system ends it above
    flash_speed: Figure  # bytes per second, read in pieces as large as experts
    flash_latency: Figure  # seconds that a layer waits beside
    note: str = ""
    plain_limit: Figure | None = None  # bytes for an app without the increased-memory entitlement, where there is one

    @property
    def memory_bytes(self) -> int:
        return int(self.memory.value)

    @property
    def app_limit_bytes(self) -> int:
        return int(self.app_limit.value)

    @property
    def flash_bytes_per_second(self) -> float:
        return self.flash_speed.value

    @property
    def flash_latency_seconds(self) -> float:
        return self.flash_latency.value

    @property
    def figures(self) -> dict[str, Figure]:
        return {
            "memory": self.memory,
            "app_limit": self.app_limit,
            "flash_speed": self.flash_speed,
            "flash_latency": self.flash_latency,
        }

    @property
    def estimates(self) -> list[str]:
        """Names of the figures that were not measured on this device."""
        return [name for name, figure in self.figures.items() if figure.is_estimate]


# ---- figures that several devices share ----

_APPLE_SPECS = "https://support.apple.com/specs (Apple does not print the RAM of iPhones; it is read by benchmarks)"
_MAC_SPECS = "https://support.apple.com/specs"
_IPHONE_8 = Figure(6.0 * GB, "https://github.com/introlab/rtabmap/pull/1446 (iPhone 15 Pro: 6 GB instead of 3 GB)")
_IPHONE_8_PLAIN = Figure(3.0 * GB, "https://github.com/introlab/rtabmap/pull/1446 (iPhone 15 Pro: 3 GB)")
_IPADOS_264 = "https://developer.apple.com/forums/thread/826325 (8 GB iPad: 6 GB up to iPadOS 26.3, 3 GB from 26.4)"
_IPADOS_15 = "https://www.macrumors.com/2021/09/17/ipados-15-up-to-12gb-ram-high-end-ipad-pro/"
_IMORE = (
    "https://www.imore.com/mac/macbook/m3-macbook-air-got-a-massive-ssd-upgrade-over-m2-256gb-models-two-nand-chips-"
    "deliver-83-read-speed-boost"
)
_POWERINFER = "https://arxiv.org/abs/2406.06282 (PowerInfer-2, UFS 4.0: 3.5 GB/s for random reads of 512 KB)"
_IPHONE_FLASH = Figure(
    2.0 * GB,
    "estimate: UFS 4.0 reads at 3.5 GB/s (arXiv 2406.06282), and a phone with it was 75 % faster than an iPhone 15 Pro "
    "Max (https://infosec.pub/comment/5922868)",
)
_NVME_LATENCY = Figure(100e-6, "estimate: usual for a random read of NVMe flash under light load; not measured here")
_UFS_LATENCY = Figure(
    150e-6, "estimate: UFS takes one queue of requests (arXiv 2406.06282), so somewhat above NVMe; not measured here"
)
_UFS_4 = Figure(3.5 * GB, _POWERINFER)
_ANDROID_NOTE = (
    "Android sets no limit per app for native memory; it ends apps when the free memory of all runs out. "
    "The chip and the RAM are of the class used in arXiv 2412.00099, which names no model of phone"
)
_MAC_NOTE = (
    "macOS ends no app at this size: above Metal's recommended working set it slows down and may freeze. The limit is "
    "enforced here all the same"
)
_IOS_NOTE = "limit for an app in the foreground that has the increased-memory entitlement"


def _android(gib: int) -> Figure:
    return Figure(
        int(0.6 * gib * GIB),
        "estimate: 60 % of RAM, since system, services and launcher keep about 4 to 6 GB; no limit is documented",
    )


def _working_set(gib: int, source: str | None = None) -> Figure:
    """Metal's recommended working set, which is two thirds of RAM on Macs of up to 32 GB."""
    return Figure(
        2 * gib * GIB // 3,
        source or "estimate: two thirds of RAM, as measured on Macs of 16 and 32 GB (llama-cpp-python#687, ollama#434)",
    )


def _mac(name: str, title: str, gib: int, flash: Figure, limit: Figure) -> Device:
    return Device(name, title, Figure(gib * GIB, _MAC_SPECS), limit, flash, _NVME_LATENCY, _MAC_NOTE)


def _iphone(name: str, title: str, gib: int, limit: Figure, plain: Figure, flash: Figure) -> Device:
    ram = Figure(gib * GIB, _APPLE_SPECS)
    return Device(name, title, ram, limit, flash, _NVME_LATENCY, _IOS_NOTE, plain)


_WORKING_SET_16 = "https://github.com/abetlen/llama-cpp-python/issues/687 (16 GB: 10922.67 MiB)"
_WORKING_SET_32 = "https://github.com/ollama/ollama/issues/434 (32 GB: 21845.34 MiB)"
_IPAD_FLASH = Figure(2.0 * GB, "estimate: as the iPhones of its time; no measurement found")

_BASE = [
    _iphone(
        "iphone-13-pro",
        "iPhone 13 Pro (6 GB)",
        6,
        Figure(
            4.2 * GB, "https://github.com/a-ghorbani/pocketpal-ai/pull/651 (4.20 GB at launch with the entitlement)"
        ),
        Figure(3.12 * GB, "https://github.com/a-ghorbani/pocketpal-ai/pull/651 (3.12 GB at launch without it)"),
        Figure(1.5 * GB, "estimate: below an iPhone 15 Pro Max, whose 2 GB/s is an estimate itself"),
    ),
    _iphone("iphone-15-pro", "iPhone 15 Pro (8 GB)", 8, _IPHONE_8, _IPHONE_8_PLAIN, _IPHONE_FLASH),
    _iphone(
        "iphone-16-pro",
        "iPhone 16 Pro (8 GB)",
        8,
        Figure(6.0 * GB, f"estimate: as iPhone 15 Pro, which has as much RAM ({_IPHONE_8.source})"),
        Figure(3.0 * GB, f"estimate: as iPhone 15 Pro, which has as much RAM ({_IPHONE_8_PLAIN.source})"),
        _IPHONE_FLASH,
    ),
    _iphone(
        "iphone-17",
        "iPhone 17 (8 GB)",
        8,
        Figure(6.0 * GB, "https://github.com/ml-explore/mlx-swift-lm/pull/343 (not more than 6 GB on an iPhone 17)"),
        Figure(3.0 * GB, f"estimate: as iPhone 15 Pro, which has as much RAM ({_IPHONE_8_PLAIN.source})"),
        _IPHONE_FLASH,
    ),
    _iphone(
        "iphone-17-pro",
        "iPhone 17 Pro (12 GB)",
        12,
        Figure(9.0 * GB, "estimate: three quarters of RAM, as on iPhones of 8 GB; no measurement found"),
        Figure(4.5 * GB, "estimate: three eighths of RAM, as on iPhones of 8 GB; no measurement found"),
        _IPHONE_FLASH,
    ),
    Device(
        "ipad-air-m2",
        "iPad Air M2 (8 GB), iPadOS 26.4 or later",
        Figure(8 * GIB, _APPLE_SPECS),
        Figure(3.0 * GB, _IPADOS_264),
        _IPAD_FLASH,
        _NVME_LATENCY,
        "iPadOS 26.4 halved the limit; up to 26.3 it was 6 GB (ipad-air-m2-ipados-26.3)",
    ),
    Device(
        "ipad-air-m2-ipados-26.3",
        "iPad Air M2 (8 GB), iPadOS 26.3 or earlier",
        Figure(8 * GIB, _APPLE_SPECS),
        Figure(6.0 * GB, _IPADOS_264),
        _IPAD_FLASH,
        _NVME_LATENCY,
        _IOS_NOTE,
        Figure(5.0 * GB, f"estimate: 5 GB as under iPadOS 14, before the entitlement ({_IPADOS_15})"),
    ),
    Device(
        "ipad-pro-m1-16gb",
        "iPad Pro M1 (16 GB), before iPadOS 26.4",
        Figure(16 * GIB, _APPLE_SPECS),
        Figure(12.0 * GB, f"{_IPADOS_15} (12 GB with the entitlement)"),
        _IPAD_FLASH,
        _NVME_LATENCY,
        "whether iPadOS 26.4 cut this limit as on iPads of 8 GB is not known",
        Figure(5.0 * GB, f"estimate: 5 GB as under iPadOS 14, before the entitlement ({_IPADOS_15})"),
    ),
    Device(
        "snapdragon-8-gen3-12gb",
        "Snapdragon 8 Gen 3 phone (12 GB)",
        Figure(12 * GIB, "https://arxiv.org/abs/2412.00099 (the smaller of its phones)"),
        _android(12),
        _UFS_4,
        _UFS_LATENCY,
        _ANDROID_NOTE,
    ),
    Device(
        "snapdragon-8-gen3-16gb",
        "Snapdragon 8 Gen 3 phone (16 GB)",
        Figure(16 * GIB, "https://arxiv.org/abs/2412.00099 (the larger of its phones)"),
        _android(16),
        _UFS_4,
        _UFS_LATENCY,
        _ANDROID_NOTE,
    ),
    _mac(
        "macbook-air-8gb",
        "MacBook Air M2 (8 GB, 256 GB SSD)",
        8,
        Figure(1.58 * GB, f"{_IMORE} (2,880 MB/s of an M3 are 83 % more, so 1,576 MB/s)"),
        _working_set(8),
    ),
    _mac(
        "macbook-air-16gb",
        "MacBook Air M3 (16 GB)",
        16,
        Figure(2.57 * GB, "https://macotakara.jp/macintosh/entry-46351.html (MacBook Air M3: 2,561 and 2,574 MB/s)"),
        _working_set(16, _WORKING_SET_16),
    ),
    _mac(
        "macbook-air-24gb",
        "MacBook Air M3 (24 GB)",
        24,
        Figure(2.57 * GB, "estimate: as with 16 GB (https://macotakara.jp/macintosh/entry-46351.html)"),
        _working_set(24),
    ),
    _mac(
        "macbook-air-32gb",
        "MacBook Air M4 (32 GB)",
        32,
        Figure(2.4 * GB, "https://github.com/srcterm/streamlx (M4 Air 32 GB: about 2.4 GB/s of expert reads)"),
        _working_set(32, _WORKING_SET_32),
    ),
    _mac(
        "macbook-pro-16gb",
        "MacBook Pro M3 (16 GB, 512 GB SSD)",
        16,
        Figure(3.55 * GB, "https://macotakara.jp/macintosh/entry-46351.html (MacBook Pro M3 512 GB: 3,555 MB/s)"),
        _working_set(16, _WORKING_SET_16),
    ),
]


def _with_variants(devices: list[Device]) -> Iterator[Device]:
    """Each device, and where it differs the same one for an app without the increased-memory entitlement."""
    for device in devices:
        yield device
        if device.plain_limit is not None:
            yield replace(
                device,
                name=device.name + WITHOUT_ENTITLEMENT,
                title=f"{device.title}, without the entitlement",
                app_limit=device.plain_limit,
                note="limit for an app in the foreground without the increased-memory entitlement",
                plain_limit=None,
            )


DEVICES: dict[str, Device] = {device.name: device for device in _with_variants(_BASE)}


def find_device(name: str) -> Device:
    """The profile of this name, in any case. Raises UsageError with the closest name and all of them."""
    wanted = name.strip().lower().replace(" ", "-").replace("_", "-")
    if wanted in DEVICES:
        return DEVICES[wanted]
    close = difflib.get_close_matches(wanted, DEVICES, n=1, cutoff=0.5)
    advice = f", did you mean {close[0]}?" if close else ""
    known = ", ".join(n for n in DEVICES if not n.endswith(WITHOUT_ENTITLEMENT))
    raise UsageError(
        f"no profile of a device {name!r}{advice} (known: {known}; add {WITHOUT_ENTITLEMENT} to an iPhone for an app "
        "without the increased-memory entitlement)"
    )
