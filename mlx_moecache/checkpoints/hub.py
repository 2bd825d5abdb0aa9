"""Turn what the user typed after --model into a local model folder.

A local folder is used as it is. Anything that looks like a path is never looked up on the network, so that a
mistyped folder gives a clear error instead of a request. What is left is a Hugging Face repo id, downloaded
into (or found in) huggingface-hub's own cache. This module knows file names only; what the files hold is
checked by checkpoint.py.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_moecache.checkpoints.expert_major import MANIFEST_NAME
from mlx_moecache.errors import HubError, UsageError

# The files mlx-lm fetches. The two lists must stay equal: a snapshot made by one of them then counts as
# complete for the other when the hub cannot be reached.
MODEL_FILES = (
    "*.json",
    "model*.safetensors",
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
)
# Fetched only where a manifest (one of "*.json") says that the repo is a repacked copy, so that no other is affected.
EXPERT_SHARDS = "experts-*.safetensors"

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"(?:{_NAME}/)?{_NAME}")

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_BAD_TOKEN = "Invalid credentials in Authorization header"  # how the hub words a wrong or expired token
_AGAIN = "run the same command again (finished files are kept, only the rest is downloaded)"
_OTHER_REPO = "choose a repo with config.json and model*.safetensors files (not GGUF, not .bin)"


def resolve_model(path_or_repo: str, *, revision: str | None = None, progress: bool = True) -> Path:
    """Return the folder that holds the model `path_or_repo` names, downloading it first if it has to.

    `path_or_repo` is a local folder with a config.json, or a Hugging Face repo id ("org/name"). `revision`
    is a branch, tag or commit of the repo. Progress bars appear when `progress` is true and stderr is a
    terminal.

    Raises HubError when there is no such folder or the download fails, UsageError for a `revision` that is
    empty or given with a local folder.
    """
    found = find_model(path_or_repo, revision=revision)
    return found if isinstance(found, Path) else _download(found, revision, progress)


def find_model(path_or_repo: str, *, revision: str | None = None) -> Path | str:
    """The local folder that `path_or_repo` names, or the id of the Hugging Face repo; nothing is requested.

    Raises HubError when it is neither, UsageError as resolve_model does.
    """
    if revision is not None and not revision.strip():
        raise UsageError("the revision is empty: give a branch, a tag or a commit hash, or leave it out")
    name = path_or_repo.strip()
    if not name:
        raise HubError("the model name is empty: give a model folder or a Hugging Face repo id (org/name)")
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        return _local_folder(folder, revision)
    if os.path.lexists(folder):
        raise HubError(f"{name!r} is not a folder: give the folder that holds the model's config.json")
    _refuse_path(name, revision)
    _check_repo_id(name)
    return name


def _local_folder(folder: Path, revision: str | None) -> Path:
    if revision is not None:
        raise UsageError(
            f"revision {revision!r} cannot be used with the local folder '{folder}': only Hugging Face repos "
            "have revisions, leave it out"
        )
    if not (folder / "config.json").is_file():
        raise HubError(
            f"'{folder}' has no config.json: give a model folder that holds config.json, the "
            "model*.safetensors files and the tokenizer files"
        )
    return folder


def _refuse_path(name: str, revision: str | None) -> None:
    """Raise HubError for a `name` that was meant as a path; nothing of that name exists."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name:
        raise HubError(f"no such folder: {name!r} (a Hugging Face repo id has the form org/name)")
    # A folder called "org" is no reason to refuse "org/name" at a revision: only the hub has revisions.
    parent, slash, _ = name.partition("/")
    if slash and revision is None and os.path.isdir(parent):
        raise HubError(
            f"no such folder: {name!r} (taken as a path because there is a folder {parent!r} here; for the "
            "Hugging Face repo of that name give a revision too, such as main)"
        )


def _check_repo_id(name: str) -> None:
    # The hub's own rules; checking them here needs neither the import of its library nor a request.
    if not _REPO_ID.fullmatch(name) or ".." in name or "--" in name or name.endswith(".git"):
        raise HubError(
            f"{name!r} is neither a folder nor a Hugging Face repo id: a repo id is name or org/name, each "
            "of at most 96 letters, digits, '-', '_' or '.', not starting or ending with '-' or '.', "
            "without '--' or '..', and not ending in .git"
        )


def _download(repo_id: str, revision: str | None, progress: bool) -> Path:
    """Fetch the missing files of `repo_id` and return the snapshot folder."""
    show_bars = progress and sys.stderr is not None and sys.stderr.isatty()
    folder = _fetch(repo_id, revision, MODEL_FILES, show_bars)
    if not (folder / "config.json").is_file():
        raise HubError(no_config(repo_id, revision))
    if not any(folder.glob("model*.safetensors")):
        raise HubError(no_shards(repo_id, revision))
    if (folder / MANIFEST_NAME).is_file():
        # All patterns again: should the branch have moved meanwhile, this is one commit nevertheless.
        folder = _fetch(repo_id, revision, (*MODEL_FILES, EXPERT_SHARDS), show_bars)
    return folder


def _fetch(repo_id: str, revision: str | None, patterns: Sequence[str], show_bars: bool) -> Path:
    """The snapshot folder with the files of these patterns in it."""
    import huggingface_hub  # slow to import, and not needed for a local folder

    try:
        with progress_bars(show_bars) as bar_class:
            snapshot = huggingface_hub.snapshot_download(
                repo_id, revision=revision, allow_patterns=list(patterns), tqdm_class=bar_class
            )
    # The library lets errors of its HTTP client, of its xet client and of the JSON parser through; whatever
    # it is, the user needs the same thing: one line that says what to do.
    except Exception as error:
        raise HubError(explain_failure(error, repo_id, revision)) from error
    return Path(snapshot)


@contextmanager
def progress_bars(show: bool) -> Iterator[type[Any]]:
    """A progress bar class for one download; its bars are gone from the screen when the block ends.

    Handing over a class leaves huggingface-hub's process-wide setting alone. The library itself leaves bars
    open, and after a failure they would be drawn once more, below the error message.
    """
    from huggingface_hub.utils import tqdm

    opened: list[Any] = []

    class Bar(tqdm):  # type: ignore[misc, unused-ignore]
        def __init__(self, *args: Any, **options: Any) -> None:
            options["leave"] = False
            if not show:
                options["disable"] = True
            super().__init__(*args, **options)
            opened.append(self)

    try:
        yield Bar
    finally:
        for bar in reversed(opened):
            bar.close()


def no_config(repo_id: str, revision: str | None) -> str:
    """The message for a repo without config.json."""
    return f"{_label(repo_id, revision)} has no config.json: {_OTHER_REPO}"


def no_shards(repo_id: str, revision: str | None) -> str:
    """The message for a repo without shards that mlx-lm would load."""
    return f"{_label(repo_id, revision)} has no model*.safetensors files: {_OTHER_REPO}"


def _label(repo_id: str, revision: str | None) -> str:
    return f"Hugging Face repo '{repo_id}'" + (f" at revision {revision!r}" if revision is not None else "")


def explain_failure(error: Exception, repo_id: str, revision: str | None) -> str:
    """One line for an error raised by huggingface-hub: what happened and what to do."""
    from huggingface_hub import constants

    chain = list(_causes(error))
    return (
        _explain_refusal(chain, repo_id, revision, constants.ENDPOINT)
        or _explain_connection(chain, repo_id, revision, constants.ENDPOINT)
        or _explain_disk(chain, repo_id, constants.HF_HUB_CACHE)
        or f"{_label(repo_id, revision)} could not be downloaded ({_one_line(error)}): {_AGAIN}"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and the errors behind it: the library wraps the reason in a cache lookup that failed."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _explain_refusal(chain: list[BaseException], repo_id: str, revision: str | None, endpoint: str) -> str | None:
    """The hub answered, and said no."""
    from huggingface_hub import errors

    page = f"{endpoint}/{repo_id}"
    for error in chain:
        if isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError, so it comes first
            return (
                f"Hugging Face repo '{repo_id}' is gated: accept the licence on the model page ({page}), log "
                "in with `hf auth login`, then run the same command again"
            )
        if isinstance(error, errors.RepositoryNotFoundError) or _hides_repo(error):
            return (
                f"there is no folder '{repo_id}' here, and on {endpoint} no such repo or a private one: "
                "check the spelling; for a private repo log in with `hf auth login`"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return (
                f"Hugging Face repo '{repo_id}' has no revision {revision or 'main'!r}: give a branch, a tag "
                f"or a commit hash; they are listed on {page}/tree/main"
            )
        if isinstance(error, errors.DisabledRepoError):
            return f"Hugging Face repo '{repo_id}' has been disabled on {endpoint}: choose another one"
        if isinstance(error, errors.HfHubHTTPError):
            return _explain_status(error.response.status_code, repo_id, endpoint)
    return None


def _hides_repo(error: BaseException) -> bool:
    """Whether this is the 401 that a caller without a token gets for a missing or private repo.

    The library gives it a class of its own only under https, so a mirror under http would be misread.
    """
    from huggingface_hub import errors

    if not isinstance(error, errors.HfHubHTTPError) or error.response.status_code != 401:
        return False
    return bool(error.response.headers.get("X-Error-Message") != _BAD_TOKEN)


def _explain_status(status: int, repo_id: str, endpoint: str) -> str:
    what = f"{endpoint} answered {status} for Hugging Face repo '{repo_id}'"
    if status == 401:
        return f"{what} (the access token is wrong or expired): log in again with `hf auth login`"
    if status == 403:
        return (
            f"{what} (access refused): accept the licence on the model page ({endpoint}/{repo_id}) and log "
            "in with `hf auth login`, with a token that may read it"
        )
    if status == 429:
        return f"{what} (too many requests): log in with `hf auth login` or wait some minutes, then {_AGAIN}"
    if status >= 500:
        return f"{what} (trouble on the hub's side): wait a little, then {_AGAIN}"
    return f"{what}: check the repo id and, if set, HF_ENDPOINT"


def _explain_connection(chain: list[BaseException], repo_id: str, revision: str | None, endpoint: str) -> str | None:
    """Offline by choice, a hub out of reach, or a connection that broke."""
    from huggingface_hub import errors

    partial = any(isinstance(error, errors.IncompleteSnapshotError) for error in chain)
    missing = f"{_label(repo_id, revision)} is {'only partly' if partial else 'not'} in the local cache"
    lost = f"the connection was lost while downloading '{repo_id}'"
    for error in chain:
        if isinstance(error, errors.OfflineModeIsEnabled):
            return (
                f"{missing}, and HF_HUB_OFFLINE forbids downloading: run once without HF_HUB_OFFLINE, or "
                "give a local model folder"
            )
        if isinstance(error, (errors.FileMetadataError, json.JSONDecodeError)):
            return (
                f"{endpoint} does not answer like a Hugging Face hub for '{repo_id}': check HF_ENDPOINT, the "
                "proxy and the firewall"
            )
        # The HTTP client was httpx and is httpx2 now: the module name fits both, an import would not.
        if type(error).__module__.startswith("httpx"):
            if type(error).__name__.startswith(("Read", "Write", "Remote", "Close")):
                return f"{lost} ({_one_line(error)}): {_AGAIN}"
            return (
                f"cannot reach {endpoint} ({_one_line(error)}), and {missing}: check the network, and "
                f"HF_ENDPOINT and the proxy if set, then {_AGAIN}; or give a local model folder"
            )
    if "Consistency check failed" in str(chain[0]):  # a plain OSError: a file ended early
        return f"{lost} (a file came incomplete): {_AGAIN}"
    return None


def _explain_disk(chain: list[BaseException], repo_id: str, cache: str) -> str | None:
    for error in chain:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return (
                f"the disk is full while downloading '{repo_id}' to {cache}: free some space, or set HF_HOME "
                f"to a folder on a larger disk, then {_AGAIN}"
            )
        if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
            return (
                f"cannot write to the cache folder {cache} while downloading '{repo_id}' ({error.strerror}): "
                "make it writable, or set HF_HOME to another folder"
            )
    return None


def _one_line(error: BaseException, limit: int = 160) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
