"""What an evaluation measures on: the request as the user made it, and the data that it names, read and checked.

Knows files and text only: no model, no tokens, so that wrong data are refused before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from .tasks import ChoiceDocument, ReplyDocument, ReplyTask, Scope
from .tasks_gsm8k import Gsm8k
from .tasks_mmlu import Mmlu
from .text_windows import WINDOW, join_wikitext, read_text, sha256_of

if TYPE_CHECKING:
    from .harness_tasks import HarnessTask

HARNESS = "harness:"  # before the name of a task of lm-evaluation-harness
TASKS = {  # name -> what its data are
    "wikitext": "a raw WikiText file such as wiki.valid.raw",
    "text": "any UTF-8 text file",
    "gsm8k": "GSM8K's JSON Lines files",
    "mmlu": "the folder with MMLU's dev/ and test/",
}


@dataclass(frozen=True)
class Request:
    """What to measure on; None: the task's default."""

    task: str  # a key of TASKS, or HARNESS and a name
    path: Path | None  # None: the harness's own data
    window: int = WINDOW
    stride: int | None = None
    scope: Scope | None = None
    accounting: str = "engine"
    initial: str = "empty"
    limit: int | None = None
    seed: int = 0
    shots: int | None = None
    shots_data: Path | None = None
    subjects: tuple[str, ...] = ()
    max_tokens: int | None = None

    @property
    def overlaps(self) -> bool:
        """True if windows share tokens; then each unit scores and counts only those that are new."""
        return self.stride is not None and self.stride < self.window


@dataclass(frozen=True)
class Material:
    """The data of a request, read and checked: a text, questions of one of the two kinds, or a task of the harness."""

    request: Request
    sha256: str
    scope: Scope
    text: str | None = None
    choices: Sequence[ChoiceDocument] = ()
    replies: Sequence[ReplyDocument] = ()
    reply_task: ReplyTask | None = None
    harness: HarnessTask | None = None
    shots: int | None = None

    @property
    def max_tokens(self) -> int | None:
        """Of a reply."""
        if self.reply_task is None:
            return None
        return self.request.max_tokens or self.reply_task.max_tokens


def read_material(request: Request) -> Material:
    """Read the data. Raises UsageError for data that are missing, empty or of another kind, and for a wrong scope."""
    if request.task.startswith(HARNESS):
        from .harness_tasks import HarnessTask

        name = request.task.removeprefix(HARNESS)
        harness = HarnessTask(name, shots=request.shots, seed=request.seed, folder=request.path)
        return Material(request, harness.sha256, request.scope or "all", harness=harness, shots=harness.shots)
    if request.path is None or not request.path.exists():
        raise UsageError(f"there is no {request.path}; give the data of task {request.task} with --data")
    if request.task in ("wikitext", "text"):
        text = read_text(request.path)
        if request.task == "wikitext":
            text = join_wikitext(text)
        return Material(request, sha256_of([request.path]), request.scope or "all", text=text)
    if request.task == "mmlu":
        mmlu = Mmlu(subjects=request.subjects) if request.shots is None else Mmlu(request.subjects, request.shots)
        choices = mmlu.documents(request.path, seed=request.seed)
        scope = request.scope or mmlu.default_scope
        return Material(request, _sha256(request, request.path), scope, choices=choices, shots=mmlu.shots)
    gsm8k = Gsm8k(request.shots_data) if request.shots is None else Gsm8k(request.shots_data, request.shots)
    if request.scope == "all":
        raise UsageError("the prompts of gsm8k are never biased, only what is generated; use --bias-scope decode")
    if request.initial != "empty" or request.accounting != "engine":
        raise UsageError("gsm8k runs on the real cache, empty before each question; use --initial empty and "
                         "--accounting engine")  # fmt: skip
    replies = gsm8k.documents(request.path, seed=request.seed)
    sha256 = _sha256(request, request.path)
    return Material(request, sha256, "decode", replies=replies, reply_task=gsm8k, shots=gsm8k.shots)


def _sha256(request: Request, path: Path) -> str:
    """Of the data file; of a folder, of the data files in it by name."""
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in (".csv", ".jsonl"))
    return sha256_of([*files, *([request.shots_data] if request.shots_data else [])])
