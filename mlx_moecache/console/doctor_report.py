"""The doctor's findings as lines to paste into a bug report, and as one JSON object. Plain Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .. import __version__
from .doctor_check import Check

_STATE, _NAME = 9, 11  # columns


def heading(packages: Mapping[str, str | None], machine: str, *, quick: bool) -> list[str]:
    """What was checked: versions and the machine."""
    versions = ", ".join(f"{name} {number or 'missing'}" for name, number in packages.items())
    return [f"mlx_moecache {__version__} doctor{' --quick' if quick else ''}, {machine}", versions]


def check_line(check: Check) -> str:
    return f"{check.state:<{_STATE}}{check.name:<{_NAME}}{check.text}"


def verdict(checks: Sequence[Check]) -> str:
    """The last line: how many checks did not pass, and how long all took."""
    seconds = sum(c.seconds for c in checks)
    failed = [c.name for c in checks if c.failed]
    warnings = [c.name for c in checks if c.state == "warning"]
    if failed:
        text = f"{len(failed)} of {len(checks)} checks FAILED ({', '.join(failed)}); please report these lines"
    else:
        text = f"all {len(checks)} checks passed"
        if warnings:
            text += f", {len(warnings)} with a warning ({', '.join(warnings)})"
    return f"{text}, {seconds:.0f} s"


def as_json(
    packages: Mapping[str, str | None], machine: str, checks: Sequence[Check], *, quick: bool
) -> dict[str, Any]:
    """The same, unrounded. What could not be measured is missing from a check's figures or null."""
    return {
        "version": __version__,
        "packages": dict(packages),
        "machine": machine,
        "quick": quick,
        "passed": not any(c.failed for c in checks),
        "checks": [asdict(c) for c in checks],
        "seconds": sum(c.seconds for c in checks),
    }
