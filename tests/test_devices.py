"""Profiles of devices: every figure is plausible and has a source, and a wrong name leads to the right one."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_moecache.devices import DEVICES, GB, GIB, WITHOUT_ENTITLEMENT, Device, find_device
from mlx_moecache.errors import UsageError


@pytest.fixture(params=DEVICES, ids=str)
def device(request: pytest.FixtureRequest) -> Device:
    return DEVICES[request.param]


def test_every_figure_has_a_source_or_says_how_it_was_estimated(device: Device) -> None:
    for name, figure in device.figures.items():
        if figure.is_estimate:
            assert len(figure.source) > len("estimate: ") + 20, (name, figure)
        else:
            assert figure.source.startswith("https://"), (name, figure)
    assert set(device.estimates) <= set(device.figures)


def test_figures_are_of_the_right_order(device: Device) -> None:
    assert 6 * GIB <= device.memory_bytes <= 32 * GIB
    assert device.memory_bytes % GIB == 0
    assert 0.29 * device.memory_bytes < device.app_limit_bytes < 0.8 * device.memory_bytes
    assert 1 * GB < device.flash_bytes_per_second < 8 * GB
    assert 10e-6 < device.flash_latency_seconds < 1e-3


def test_names_are_those_of_the_command_line(device: Device) -> None:
    assert DEVICES[device.name] is device
    assert device.name == device.name.lower() and " " not in device.name
    assert find_device(device.name.upper().replace("-", " ")) is device


def test_the_devices_that_people_ask_for_are_there() -> None:
    sizes = {family: set[int]() for family in ("iphone", "ipad", "snapdragon", "macbook")}
    for device in DEVICES.values():
        sizes[device.name.partition("-")[0]].add(device.memory_bytes // GIB)
    assert sizes["iphone"] == {6, 8, 12}
    assert sizes["snapdragon"] == {12, 16}
    assert {8, 16} <= sizes["ipad"] and {8, 16, 24, 32} <= sizes["macbook"]


def test_without_the_entitlement_an_app_gets_less_and_nothing_else_changes() -> None:
    plain = [d for d in DEVICES.values() if d.name.endswith(WITHOUT_ENTITLEMENT)]
    assert len(plain) >= 5
    for device in plain:
        entitled = DEVICES[device.name.removesuffix(WITHOUT_ENTITLEMENT)]
        assert device.app_limit_bytes < entitled.app_limit_bytes
        assert (device.memory, device.flash_speed) == (entitled.memory, entitled.flash_speed)


def test_ipados_26_4_halved_what_an_app_gets() -> None:
    now, before = DEVICES["ipad-air-m2"], DEVICES["ipad-air-m2-ipados-26.3"]
    assert 2 * now.app_limit_bytes == before.app_limit_bytes == 6 * GB
    assert not now.app_limit.is_estimate


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("iphone16pro", "iphone-16-pro"), ("macbook-air-16", "macbook-air-16gb"), ("snapdragon-8-gen3", "snapdragon-8-")],
)
def test_a_wrong_name_is_answered_with_the_closest_and_all(wrong: str, meant: str) -> None:
    with pytest.raises(UsageError) as error:
        find_device(wrong)
    message = str(error.value)
    assert f"did you mean {meant}" in message and "\n" not in message
    assert all(name in message for name in DEVICES if not name.endswith(WITHOUT_ENTITLEMENT))


@given(
    st.text(max_size=30).filter(lambda text: text.strip().lower().replace(" ", "-").replace("_", "-") not in DEVICES)
)
def test_no_name_is_anything_but_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError):
        find_device(name)


def test_profiles_are_plain_data_without_mlx() -> None:
    code = "import sys, mlx_moecache.devices; sys.exit(any(m.split('.')[0] == 'mlx' for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
