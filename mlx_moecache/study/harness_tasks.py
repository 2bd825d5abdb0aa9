"""One task of lm-evaluation-harness, document by document, as units of a run.

Data, prompts, answer extraction and judgement are the harness's own, in its order, so that a whole run gives the
figures of `lm_eval.simple_evaluate`; that it advances by documents makes it resumable and comparable in pairs.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from itertools import groupby
from pathlib import Path
from typing import Any

from ..console.terminal import is_terminal
from ..errors import UsageError
from .harness import Counted, MoeCacheLM
from .result_metrics import Unit

try:
    from lm_eval.tasks import TaskManager
except ImportError as e:  # harness.py has been imported, so its core is there
    raise UsageError(f"lm-evaluation-harness lacks a package ({e}); install it again: pip install -U lm_eval") from e

MEASURES = ("acc", "exact_match", "acc_norm")  # per document 0 or 1; the first that a task has is its accuracy


class HarnessTask:
    """A task by its name in the harness, with its data loaded.

    folder: the user's own task definitions (YAML), searched before the harness's. shots: worked examples, None: as the
    task says; `seed` draws them. Raises UsageError for a name that is unknown or of a group, and for data that cannot
    be loaded.
    """

    def __init__(self, name: str, *, shots: int | None = None, seed: int = 0, folder: Path | None = None) -> None:
        manager = _manager_of(name, folder)
        try:
            with _bars_on_terminals_only():
                tasks = list(manager.load([name])["tasks"].values())
            self.documents = len(tasks[0].eval_docs)
        except Exception as e:  # whatever data that cannot be fetched or a faulty definition raises
            raise UsageError(f"cannot load the data of {name}: {type(e).__name__}: {_one_line(e)}") from e
        if len(tasks) > 1:
            names = ", ".join(t.config.task for t in tasks[:3])
            raise UsageError(f"{name} is a group of {len(tasks)} tasks ({names}, ...); give one of them at a time")
        self.name, self.seed, self._task = name, seed, tasks[0]
        if shots is not None or self._task.get_config("num_fewshot") is None:
            self._task.set_config(key="num_fewshot", value=shots or 0)
        self.shots = int(self._task.get_config("num_fewshot"))

    @property
    def sha256(self) -> str:
        """Of all documents and of what the task makes of them: prompts, examples, judgement."""
        digest = hashlib.sha256(json.dumps(self._task.dump_config(), default=_named, sort_keys=True).encode())
        for document in self._task.eval_docs:
            digest.update(json.dumps(document, default=_named, sort_keys=True).encode())
        return digest.hexdigest()

    def units(self, lm: MoeCacheLM, *, limit: int | None = None, skip: Collection[int] = ()) -> Iterator[Unit]:
        """Measure the first `limit` documents but those in `skip`, one by one.

        Raises UsageError for a task that is neither judged by accuracy nor by perplexity, ReadError if expert bytes
        cannot be read.
        """
        self._task.set_fewshot_seed(seed=self.seed)
        with _bars_on_terminals_only():
            self._task.build_all_requests(limit=limit)
        instances = list(self._task.instances)
        for document, group in groupby(instances, key=lambda i: i.doc_id):
            if document not in skip:
                before = lm.counted
                requests = list(group)
                for kind, same in groupby(requests, key=lambda i: i.request_type):
                    asked = list(same)
                    for request, response in zip(asked, getattr(lm, kind)(asked, disable_tqdm=True), strict=True):
                        request.resps = [response] * (request.repeats or 1)  # greedy: repeating it changes nothing
                yield self._unit(document, requests, lm.counted - before)

    def _unit(self, document: int, requests: list[Any], c: Counted) -> Unit:
        self._task._instances = requests
        self._task.apply_filters()
        scores: dict[str, int] = {}
        filters = list(requests[0].filtered_resps)
        for name in filters:
            values = self._task.process_results(requests[0].doc, [r.filtered_resps[name] for r in requests])
            for m in (m for m in MEASURES if m in values):
                scores[m if len(filters) == 1 else f"{m}_{name}"] = int(values[m])
        nll = None
        if all(r.request_type == "loglikelihood_rolling" for r in requests):
            nll = -sum(float(r.resps[0]) for r in requests)
        if not scores and nll is None:
            raise UsageError(
                f"{self.name} is judged neither by {', '.join(MEASURES)} nor by perplexity; "
                "run it with lm_eval.simple_evaluate and mlx_moecache.study.harness.MoeCacheLM"
            )
        return Unit(
            id=document,
            tokens=c.tokens,
            nll=nll,
            selections=c.selections,
            misses=c.misses,
            loads=c.loads,
            swapped=c.swapped,
            token_layers=c.token_layers,
            correct=next(iter(scores.values()), None),
            scores=scores if len(scores) > 1 else None,
        )


def _manager_of(name: str, folder: Path | None) -> Any:
    """The harness's task manager that knows `name`. Raises UsageError."""
    if folder is not None:
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder; give the one with your task definitions (YAML)")
        # Alone first: the harness's own definitions are thousands, and take seconds to read.
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if name in manager.all_tasks:
            return manager
    manager = TaskManager()
    if name not in manager.all_tasks:
        own = "" if folder is None else f", nor is it defined in {folder}"
        raise UsageError(f"lm-evaluation-harness has no task {name!r}{own}; `lm_eval ls tasks` lists what it has")
    return manager


def _bars_on_terminals_only() -> AbstractContextManager[Any]:
    """The harness and its data sets draw progress bars wherever stderr goes."""
    return nullcontext() if is_terminal(sys.stderr) else redirect_stderr(io.StringIO())


def _named(value: Any) -> str:
    """For what JSON does not know. A function is its name: its address differs from run to run."""
    return str(getattr(value, "__name__", type(value).__name__ if callable(value) else value))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
