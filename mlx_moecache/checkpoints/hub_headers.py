"""What the Hugging Face hub tells of a model without its weights: config files, and the header of every shard.

A header is fetched as a byte range at the start of its file. A model that is complete in the local cache is taken
from there.
"""

from __future__ import annotations

import fnmatch
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import HubError
from .checkpoint import SHARD_PATTERN
from .expert_major import MANIFEST_NAME
from .hub import EXPERT_SHARDS, explain_failure, find_model, no_config, no_shards, progress_bars
from .skeleton import Tensors

# What mlx-lm builds a model from, and the manifest of a repacked copy.
CONFIG_FILES = ("config.json", "generation_config.json", "hf_quant_config.json", MANIFEST_NAME)
CODE_FILES = ("*.py",)  # of models that bring their own
_CONNECTIONS = 8  # headers that are fetched at once


@dataclass(frozen=True)
class RepoHeaders:
    """A repo at one commit: its small files in the local cache, and per shard (by file name) the tensors."""

    repo_id: str
    files: tuple[Path, ...]
    shards: dict[str, Tensors]


def resolve_headers(
    path_or_repo: str, *, revision: str | None = None, with_code: bool = False, progress: bool = True
) -> Path | RepoHeaders:
    """Return the folder of a model that is on this machine, else the headers of the repo, fetched now.

    Names are understood as by resolve_model, and the errors are the same. `with_code` fetches the model's own Python
    files too. A progress bar appears when `progress` is true and stderr is a terminal.
    """
    found = find_model(path_or_repo, revision=revision)
    return found if isinstance(found, Path) else _from_repo(found, revision, with_code, progress)


def _from_repo(repo_id: str, revision: str | None, with_code: bool, progress: bool) -> Path | RepoHeaders:
    patterns = [*CONFIG_FILES, *(CODE_FILES if with_code else ())]
    folder = _fetch_files(repo_id, revision, patterns)
    shards = _list_shards(repo_id, revision, folder)
    if all((folder / shard).is_file() for shard in shards):
        return folder
    headers = _fetch_headers(repo_id, revision, folder.name, shards, progress)
    files = tuple(path for pattern in patterns for path in sorted(folder.glob(pattern)))
    return RepoHeaders(repo_id, files, headers)


def _fetch_files(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    """The snapshot folder, which is called as its commit, with the small files in it."""
    import huggingface_hub  # slow to import, and not needed for a local folder

    try:
        with progress_bars(False) as bar_class:
            snapshot = huggingface_hub.snapshot_download(
                repo_id, revision=revision, allow_patterns=patterns, tqdm_class=bar_class
            )
    except Exception as error:  # as in hub.py: the library lets errors of many kinds through
        raise HubError(explain_failure(error, repo_id, revision)) from error
    folder = Path(snapshot)
    if not (folder / "config.json").is_file():
        raise HubError(no_config(repo_id, revision))
    return folder


def _list_shards(repo_id: str, revision: str | None, folder: Path) -> list[str]:
    """Names of all shards of the snapshot `folder`, in the cache or not; those in the cache if the hub is away."""
    import huggingface_hub

    patterns = [SHARD_PATTERN, *([EXPERT_SHARDS] if (folder / MANIFEST_NAME).is_file() else [])]
    try:
        # list_repo_files would try for half a minute if the hub is out of reach.
        siblings = huggingface_hub.HfApi().model_info(repo_id, revision=folder.name).siblings or ()
        names = [sibling.rfilename for sibling in siblings]
    except Exception as error:
        # building the model says if some are missing
        names = [path.name for pattern in patterns for path in folder.glob(pattern)]
        if not names:
            raise HubError(explain_failure(error, repo_id, revision)) from error
    found = [sorted(n for n in names if "/" not in n and fnmatch.fnmatchcase(n, pattern)) for pattern in patterns]
    if not found[0]:
        raise HubError(no_shards(repo_id, revision))
    return [name for shards in found for name in shards]


def _fetch_headers(
    repo_id: str, revision: str | None, commit: str, shards: list[str], progress: bool
) -> dict[str, Tensors]:
    """The tensors of each shard at `commit`, by a few requests at a time."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, SafetensorsParsingError

    api = huggingface_hub.HfApi()
    show_bar = progress and sys.stderr is not None and sys.stderr.isatty()

    def fetch(shard: str) -> Tensors:
        header = api.parse_safetensors_file_metadata(repo_id, shard, revision=commit)
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in header.tensors.items()}

    try:
        with progress_bars(show_bar) as bar_class, ThreadPoolExecutor(_CONNECTIONS) as pool:
            try:
                headers = list(bar_class(pool.map(fetch, shards), desc="Fetching headers", total=len(shards)))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C need not wait for those that have not begun
                raise
    except (SafetensorsParsingError, EntryNotFoundError) as error:
        raise HubError(
            f"a header of '{repo_id}' cannot be read ({_first_line(error)}): its files are damaged, so choose another "
            "repo or revision"
        ) from error
    except Exception as error:
        raise HubError(explain_failure(error, repo_id, revision)) from error
    return dict(zip(shards, headers, strict=True))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
