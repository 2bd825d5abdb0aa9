"""A model folder for commands that only look: the real one, or a skeleton of a repo whose weights stay on the hub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import MoeCacheError
from .terminal import StatusLine, is_terminal


@contextmanager
def model_headers(source: str, args: argparse.Namespace, status: StatusLine) -> Iterator[Path]:
    """The folder of the model, or a skeleton of it in which errors name the repo instead of the temporary folder.

    args: revision, trust_remote_code and json are looked at.
    """
    from ..checkpoints.hub_headers import resolve_headers
    from ..checkpoints.skeleton import skeleton

    status.clear()  # fetching draws its own bar
    found = resolve_headers(
        source,
        revision=args.revision,
        with_code=args.trust_remote_code,
        progress=is_terminal(sys.stderr) and not args.json,
    )
    if isinstance(found, Path):
        yield found
        return
    with skeleton(found.files, found.shards) as folder:
        try:
            yield folder
        except MoeCacheError as error:
            raise type(error)(str(error).replace(str(folder), found.repo_id)) from error
