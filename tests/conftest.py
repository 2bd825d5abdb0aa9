"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

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


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What commands keep for the user from run to run is not the user's here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield
