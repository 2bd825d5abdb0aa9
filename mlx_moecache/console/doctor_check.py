"""What `mlx_moecache doctor` finds: one result per check, and the frame in which a check runs."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

State = Literal["ok", "warning", "FAILED"]
Figure = float | int | str | bool | None
Show = Callable[[str], None]  # how far a check is, for the status line


@dataclass(frozen=True)
class Check:
    """One finding. text: the figure, or what is wrong, in one line; figures: the same for programs, in SI units."""

    name: str
    state: State
    text: str
    figures: Mapping[str, Figure] = field(default_factory=dict)
    seconds: float = 0.0  # that the check took

    @property
    def failed(self) -> bool:
        return self.state == "FAILED"


def run_check(name: str, body: Callable[[], Check]) -> Check:
    """`body()` with its time; whatever it raises is a finding too, so that the other checks still run."""
    began = time.perf_counter()
    try:
        found = body()
    except Exception as error:  # a doctor reports what is broken, whatever it is
        reason = " ".join(str(error).split())
        found = Check(name, "FAILED", f"{type(error).__name__}: {reason}" if reason else type(error).__name__)
    return replace(found, text=without_folders(found.text), seconds=time.perf_counter() - began)


def without_folders(text: str) -> str:
    """`text` with only the last part of every absolute path: a report is made to be shown to others."""
    package = Path(__file__).parents[1]
    places = {str(p) for p in (package, package.parent, Path(tempfile.gettempdir()), Path.cwd(), Path.home())}
    for place in sorted(places - {"/"}, key=len, reverse=True):  # these may contain blanks
        text = text.replace(f"{place}/", "/")
    return re.sub(r"(?<![\w.:/])/(?:[^/\s'\",:;]+/)*(?=[^/\s])", "", text)
