"""Where the bundled demo model is: what commands use when no --model is given."""

from __future__ import annotations

from pathlib import Path

from .errors import HubError

DEMO_MODEL = Path(__file__).parent / "demo_model"
DEMO = "demo"  # what users type for it
DEMO_NAME = "demo_model"  # what results call it, so that they do not name a place on one machine


def demo_model() -> Path:
    """The folder of the demo model. Raises HubError if this installation lacks it."""
    if not (DEMO_MODEL / "config.json").is_file():
        raise HubError(
            f"the bundled demo model is missing from {DEMO_MODEL}: install the package again, or choose a model "
            "with --model"
        )
    return DEMO_MODEL


def named_model(given: str) -> tuple[str, str]:
    """What to resolve for the model that a user named, and what to call it; a folder of the word's name wins."""
    if given == DEMO and not Path(DEMO).exists():
        return str(demo_model()), DEMO_NAME
    return given, given
