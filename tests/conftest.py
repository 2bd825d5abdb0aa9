"""Fixtures that several test files share."""

from __future__ import annotations

import pytest
from hypothesis import settings
from tiny_models import Shelf

# Examples take as long as the machine is busy, and reproducible runs are worth more than fresh examples.
settings.register_profile("mlx_moecache", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("mlx_moecache")


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Tiny checkpoints and their stock models, made when first asked for."""
    return Shelf(tmp_path_factory.mktemp("models"))
