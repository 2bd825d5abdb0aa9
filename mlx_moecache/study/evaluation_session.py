"""One evaluation: a model, data and settings, and the runs that are measured with them. Used by evaluate and sweep.

material = read_material(request)                      # files only; fails early
session = Session(folder, "name", material, ModelOptions())
session.results.runs = ...                             # of an earlier, interrupted evaluation
runs = [session.plan(spec, slots=30, eviction="lru") for spec in specs]
session.measure(runs, on_unit)                         # may be interrupted and called again
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..budget import format_bytes
from ..checkpoints.reader import BOUNCE_BYTES, BOUNCES_PER_THREAD, EmulatedFlash
from ..errors import BudgetError, UsageError
from ..eviction import make_policy
from ..loading import CacheOptions, MemoryOptions, OpenedModel, budget_here
from ..routing import CachePrior, Original, Strategy, parse_routing
from .belady import belady_misses
from .evaluation import (
    Belady,
    Job,
    OnUnit,
    Reading,
    Scorer,
    choice_readings,
    keep,
    measure,
    resume,
    swapped_nothing,
    window_readings,
)
from .evaluation_data import Material
from .question_scoring import answer_question
from .recorded import recorded
from .results import DataFacts, ModelFacts, Results, Run, Settings
from .tasks import ReplyTask
from .text_windows import Windows, cut

if TYPE_CHECKING:
    from .harness_tasks import HarnessTask


@dataclass(frozen=True)
class ModelOptions:
    """How the model is opened and loaded; simulated caches do not depend on it."""

    memory: str | int | None = None
    direct_io: bool = False
    trust_remote_code: bool = False
    trace: Path | None = None  # where the original routing of texts and choices is recorded
    flash: EmulatedFlash | None = None
    fit_slots: bool = False  # where no number is given, as many slots as fit into `memory`, not half of the experts


class Session:
    """A model and its material, tokenised. `results` holds the runs; `save` it as often as you like."""

    def __init__(self, folder: Path, name: str, material: Material, options: ModelOptions) -> None:
        """`name`: what results call the model. Raises what OpenedModel does; UsageError for too short a text."""
        self.folder, self.material, self.options = folder, material, options
        self._opened: OpenedModel | None = OpenedModel(folder, trust_remote_code=options.trust_remote_code)
        self.tokenizer: TokenizerWrapper = self._opened.tokenizer()
        shapes = self._opened.layer_shapes
        self.experts, self.k = max(x.num_experts for x in shapes), max(x.k for x in shapes)
        request = material.request
        available, readings = self._read(material)
        self._readings = readings
        self.units = min(available, request.limit or available)
        self.results = Results(
            ModelFacts(
                path=name,
                model_type=str(self._opened.config.get("model_type")),
                experts=self.experts,
                k=self.k,
                moe_layers=len(shapes),
                bytes_per_expert=round(sum(x.bytes_per_expert for x in shapes) / len(shapes)),
                config_sha256=hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
            ),
            DataFacts(
                task=":".join([request.task, *([",".join(sorted(request.subjects))] if request.subjects else [])]),
                path=str(request.path or "lm_eval"),
                sha256=material.sha256,
                documents=available,
            ),
            Settings(
                window=request.window if material.text is not None else None,
                stride=(request.stride or request.window) if material.text is not None else None,
                scope=material.scope,
                accounting=request.accounting,
                initial=request.initial,
                limit=request.limit,
                seed=request.seed,
                shots=material.shots,
                max_tokens=material.max_tokens,
                scored="new" if request.overlaps else None,
            ),
        )
        self._strategies: dict[str, Strategy] = {}
        self._model: nn.Module | None = None
        self.loaded: nn.Module | None = None  # the last one

    def plan(self, routing: str, *, slots: int | None = None, eviction: str = "lru") -> Run:
        """The run of this strategy and cache: that in `results`, if it is there, else a new one.

        slots: per layer, None: `default_slots`. Raises UsageError for unknown
        routing or eviction and for slots that cannot work.
        """
        slots = self.default_slots() if slots is None else slots
        if not self.k <= slots <= self.experts:
            raise UsageError(
                f"slots must be between the {self.k} experts that a token uses and the {self.experts} that a layer "
                f"has, not {slots}"
            )
        make_policy(eviction)
        strategy = parse_routing(routing, strength=None, top_j=None, k=self.k, slots=slots, experts=self.experts)
        self._strategies[strategy.spec] = strategy
        run = Run(strategy.spec, strategy.name, strategy.parameters, slots, eviction, self.units)
        return self.results.find_or_append(run)

    def measure(self, runs: Sequence[Run], on_unit: OnUnit = lambda run, unit: None) -> None:
        """Measure what `runs` (of `plan`) lack, and mark those that failed; `on_unit` is called after each unit.

        An exception, also KeyboardInterrupt, leaves whole units only. Raises BudgetError, UnsupportedModelError,
        ReadError, MoeCacheError.
        """
        if self.options.trace is not None and not self._readings:
            raise UsageError("--trace records texts and choices that are read; record written answers with generate")
        unfinished = [r for r in runs if len(r.units) < r.n]
        if unfinished and self.material.reply_task is not None:
            for run in unfinished:
                self._answer(run, self.material.reply_task, on_unit)
        elif unfinished and self.material.harness is not None:
            for run in unfinished:
                self._run_harness(run, self.material.harness, on_unit)
        elif unfinished:
            self._score(unfinished, on_unit)
        for run in runs:
            strategy = self._strategies[run.routing]
            run.failed = swapped_nothing(
                run,
                scope=self.material.scope,
                experts=self.experts,
                is_exact=strategy.is_exact,
                uses_residents=strategy.uses_residents,
            )

    def default_slots(self) -> int:
        """Half of the experts, or as many as fit (`fit_slots`), but never fewer than a token uses."""
        if not self.options.fit_slots or self._opened is None:
            return max(self.k, self.experts // 2)
        buffers = BOUNCES_PER_THREAD * CacheOptions.threads * BOUNCE_BYTES if self.options.direct_io else 0
        plan = self._opened.plan(
            MemoryOptions(memory=self.options.memory, max_context=self._context()), host_buffers=buffers
        )
        return max(self.k, min(plan.slots_per_layer))

    # ---- inside ----

    def _context(self) -> int:
        """Tokens of the longest sequence that is read or written."""
        if self._readings:
            return max(len(tokens) for r in self._readings for tokens in r.inputs)
        task = self.material.reply_task
        if task is None:
            from .harness import MAX_LENGTH

            return MAX_LENGTH
        longest = max(len(self.tokenizer.encode(d.prompt)) for d in self.material.replies)
        return longest + (self.material.max_tokens or task.max_tokens)

    def _read(self, material: Material) -> tuple[int, list[Reading]]:
        """Units that the data hold, and what is read in those that are asked for."""
        request = material.request
        if material.text is not None:
            windows: Windows = cut(
                material.text,
                partial(self.tokenizer.encode, add_special_tokens=False),
                window=request.window,
                stride=request.stride,
                limit=request.limit,
            )
            return windows.available, window_readings(windows, material.scope)
        if material.choices:
            chosen = material.choices[: request.limit]
            return len(material.choices), choice_readings(self.tokenizer, chosen, material.scope)
        if material.harness is not None:
            return material.harness.documents, []
        return len(material.replies), []

    def _score(self, runs: Sequence[Run], on_unit: OnUnit) -> None:
        from .window import WindowScorer

        request = self.material.request
        model = self._resident_model()

        def scorer(run: Run, strategy: Strategy) -> WindowScorer:
            return WindowScorer(
                model,
                strategy,
                slots=run.slots,
                eviction=run.eviction,
                accounting=request.accounting,
                initial=request.initial,
                seed=request.seed,
            )

        jobs = [Job(run, scorer(run, self._strategies[run.routing])) for run in runs]
        own = (j.scorer for j in jobs if isinstance(self._strategies[j.run.routing], Original))
        exact: Scorer = next(own, None) or scorer(runs[0], Original())
        bound: Belady | None = None
        if request.initial == "empty" and not request.overlaps:
            bound = partial(belady_misses, variant="paper" if request.accounting == "paper" else "engine")
        with ExitStack() as stack:
            if self.options.trace is not None:
                cold = request.initial == "empty"
                traced = stack.enter_context(
                    recorded(exact, model, self.options.trace, self.folder, self.results.model.path, cold=cold)
                )
                for job in jobs:
                    job.scorer = traced if job.scorer is exact else job.scorer
                exact = traced
            measure(jobs, exact, self._readings, initial=request.initial, belady=bound, on_unit=on_unit)

    def _resident_model(self) -> nn.Module:
        """The model for simulated caches, with as many experts in memory as the budget allows; loaded once."""
        if self._model is not None:
            return self._model
        longest = self._context()
        opened = self._open()
        config = opened.config.get("text_config") or opened.config
        # Two sets [L, V] float32: those of original routing wait for the strategy's.
        logits = 2 * 4 * longest * int(config.get("vocab_size", 0))
        budget = budget_here("auto" if self.options.memory is None else self.options.memory)
        options = MemoryOptions(
            memory=max(1, budget - logits),
            max_context=longest,
            prefill_step_size=longest,  # a sequence is read in one pass
        )
        try:
            # Strategies are the scorers' affair; but a router that none of them reaches is refused here.
            self._model = self._load(opened, options, CachePrior.name)
        except BudgetError as error:
            raise BudgetError(
                f"of {format_bytes(budget)}, the logits of {longest:,} tokens take {format_bytes(logits)}, and {error}"
                "; use more --memory or shorter texts"
            ) from error
        return self._model

    def _answer(self, run: Run, task: ReplyTask, on_unit: OnUnit) -> None:
        """Reply tasks run on the real cache, so each run loads the model with its slots and its strategy."""
        max_tokens = self.material.max_tokens or task.max_tokens
        documents = self.material.replies[: run.n]
        longest = max(len(self.tokenizer.encode(d.prompt)) for d in documents)
        memory = MemoryOptions(slots=run.slots, max_context=longest + max_tokens, max_prompt=longest)
        model = self._load(self._open(), memory, self._strategies[run.routing], run.eviction)
        try:
            measured = run.measured
            for d in documents:
                if d.id not in measured:
                    unit = answer_question(model, self.tokenizer, task, d, max_tokens)
                    run.units.append(unit)
                    on_unit(run, unit)
        finally:
            model.expert_cache.close()

    def _run_harness(self, run: Run, task: HarnessTask, on_unit: OnUnit) -> None:
        """Log-likelihoods are read with simulated caches, but what is generated needs the real one with its slots."""
        from .harness import MAX_LENGTH, MoeCacheLM
        from .window import WindowScorer

        request, strategy = self.material.request, self._strategies[run.routing]
        memory = MemoryOptions(slots=run.slots, max_context=MAX_LENGTH)
        model = self._load(self._open(), memory, strategy, run.eviction)
        try:
            scorer = WindowScorer(
                model,
                strategy,
                slots=run.slots,
                eviction=run.eviction,
                accounting=request.accounting,
                initial=request.initial,
                seed=request.seed,
            )
            resume(run, scorer, request.initial)
            lm = MoeCacheLM(model, self.tokenizer, scope=self.material.scope, scorer=scorer)
            for unit in task.units(lm, limit=request.limit, skip=run.measured):
                keep(run, scorer, request.initial, unit)
                on_unit(run, unit)
        finally:
            model.expert_cache.close()

    def _load(
        self, opened: OpenedModel, memory: MemoryOptions, routing: str | Strategy, eviction: str = "lru"
    ) -> nn.Module:
        options = self.options
        cache = CacheOptions(routing, eviction=eviction, direct_io=options.direct_io, flash=options.flash)
        self.loaded = opened.load(memory, cache)
        return self.loaded

    def _open(self) -> OpenedModel:
        """A model that was not loaded yet; each can be loaded once."""
        opened, self._opened = self._opened, None
        return opened or OpenedModel(self.folder, trust_remote_code=self.options.trust_remote_code)
