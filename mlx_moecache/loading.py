"""Opening a checkpoint without ever materialising its experts, and putting the parts together.

mlx-lm builds the model lazily; expert tensors are replaced by empty ones before anything is evaluated. Then, in this
order: routers are tested, memory is planned (or refused), resident weights are read, slots are made.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from . import architectures, footprint, system
from .budget import OVERHEAD, ForwardShape, LayerShape, MemoryPlan, parse_memory, plan_memory
from .checkpoints.checkpoint import explain_missing, read_index
from .checkpoints.expert_layout import LayerExtents, locate_experts
from .checkpoints.hub import resolve_model
from .checkpoints.open_files import allow_open_files
from .checkpoints.reader import EmulatedFlash, ExpertReader
from .elastic import ElasticSlots, Stage, stage_contexts
from .errors import CheckpointError, UnsupportedModelError, UsageError
from .expert_cache import ExpertCache
from .footprint import KVOptions
from .guess import watching_norms
from .kv_growth import install_growth
from .layer_experts import LayerExperts
from .lazy_model import build_lazily, one_line, read_weights
from .look_ahead import LookAhead, buffers_for
from .moe_block import NO_SEAM, MoeBlock, find_blocks
from .optimistic import Optimist
from .pressure import system_pressure
from .routing import Original, Strategy, parse_routing
from .span import SpanChooser

LENGTH_WARNING = "sequence-length-is-longer-than-the-specified-maximum"  # what transformers calls it
LONGEST_CONTEXT = 2**30  # tokens
DEFAULT_MAX_CONTEXT = 4096  # tokens of KV cache that are reserved where the need is not known


@dataclass(frozen=True)
class MemoryOptions:
    """How much memory the model may use, and what of it is reserved."""

    memory: str | int | None = None  # "4GB", "60%", "auto", bytes; None and no slots: auto
    slots: int | Sequence[int] | None = None  # experts per layer (one number, or one for each), instead of a budget
    max_context: int = DEFAULT_MAX_CONTEXT  # tokens for which KV cache is reserved
    max_prompt: int | None = None  # tokens of the longest prompt, if known: no prefill chunk is longer
    prefill_step_size: int | None = None  # tokens per chunk; None: the planner chooses
    kv: KVOptions = field(default_factory=KVOptions)
    elastic: bool = False  # slots give way to the KV cache as it grows, and under memory pressure (elastic.py)


@dataclass(frozen=True)
class CacheOptions:
    """How the expert cache behaves."""

    routing: str | Strategy = "cache-prior"
    strength: float | None = None  # lambda; None: 0.1 * min(1, 3 * slots / experts)
    top_j: int | None = None  # J; None: 2 if k >= 4, else 1
    eviction: str = "lru"
    direct_io: bool = False  # bypass the page cache
    threads: int = 4
    flash: EmulatedFlash | None = None  # slow reads down to an emulated device


class OpenedModel:
    """A checkpoint whose model is built and whose experts are located; nothing is in memory yet.

    Raises CheckpointError, UnsupportedModelError or UsageError for models that cannot be opened.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self.folder = folder
        self.index = read_index(folder)
        allow_open_files(2 * len(self.index.shards))  # MLX holds one for each shard, and our reader another
        try:
            self.model, self.config = build_lazily(folder, trust_remote_code=trust_remote_code)
        except CheckpointError as e:
            raise explain_missing(self.index, e) from e
        self.blocks: list[MoeBlock] = find_blocks(self.model)
        known = architectures.find(type(self.model).__module__.rpartition(".")[2])
        self.extents: list[LayerExtents] = [
            locate_experts(
                self.index, b.path, b.components, b.num_experts, fused_halves=known is not None and known.fused_halves
            )
            for b in self.blocks
        ]
        self._refuse_gpu_formats()
        self._probe_shape = footprint.activation_dtype(self.model), footprint.hidden_dims(self.config, self.blocks)
        # A forward pass that is built and thrown away shows every switch its k, and which norm is before which block.
        with watching_norms(self.model, self.blocks) as norms:
            self.model(mx.zeros((1, 1), dtype=mx.int32), cache=make_prompt_cache(self.model))
        self.guessers = norms.guessers(self.blocks, self._probe_shape[1])
        self.resident = footprint.resident_bytes(self.model)
        self.trust_remote_code = trust_remote_code

    def tokenizer(self, *, extra_eos_tokens: tuple[str, ...] = ()) -> TokenizerWrapper:
        """The checkpoint's tokenizer. Raises CheckpointError if it has none, UsageError for an unknown extra token."""
        try:
            tokenizer = load_tokenizer(
                self.folder, {"trust_remote_code": self.trust_remote_code}, self.config.get("eos_token_id")
            )
        except Exception as e:  # transformers raises whatever a broken file makes it stumble over
            if "trust_remote_code" in str(e):
                raise UsageError(
                    f"{self.folder} brings its own tokenizer code; add --trust-remote-code if you trust it"
                ) from e
            raise CheckpointError(
                f"no usable tokenizer in {self.folder}: {one_line(e)}; download the model again"
            ) from e
        # transformers would warn once of texts beyond the length that it knows, and of errors that do not come here.
        getattr(tokenizer, "deprecation_warnings", {})[LENGTH_WARNING] = True
        try:
            for token in extra_eos_tokens:
                tokenizer.add_eos_token(token)
        except ValueError as e:
            raise UsageError(f"the tokenizer in {self.folder} cannot end at this token: {one_line(e)}") from e
        return tokenizer

    @property
    def layer_shapes(self) -> list[LayerShape]:
        return [
            LayerShape(b.path, b.num_experts, b.k, b.bytes_per_expert, max(c.nbytes for c in b.components))
            for b in self.blocks
        ]

    def plan(self, options: MemoryOptions, *, host_buffers: int = 0) -> MemoryPlan:
        """The memory plan that `load` follows; of an elastic model, the first. Raises BudgetError or UsageError."""
        if options.elastic:
            return self.stages(options, host_buffers=host_buffers)[0].prefill
        self._check(options)
        budget = None if options.slots is not None else _budget(options)
        need = self._estimate(options, options.max_context)
        return self._plan(options, options.max_context, need, host_buffers=host_buffers, budget=budget)

    def stages(self, options: MemoryOptions, *, host_buffers: int = 0) -> list[Stage]:
        """The plans of an elastic model as its context grows from the prompt to `max_context` tokens.

        Raises BudgetError if the last one does not fit, UsageError without a budget.
        """
        return self._stager(options, host_buffers)(_budget(options))

    def _stager(self, options: MemoryOptions, host_buffers: int) -> Callable[[int], list[Stage]]:
        """Budget -> stages, also when the model has been loaded and can be asked for no shapes any more."""
        self._check(options)
        if options.slots is not None:
            raise UsageError("elastic slots need a memory budget to stay within, not a number of slots; give memory")
        first = min(options.max_context, options.max_prompt or footprint.KV_STEP)
        contexts = stage_contexts(first, options.max_context, footprint.KV_STEP)
        # Caches other than plain ones may keep more of a long chunk than of single tokens.
        plain = all(type(c) is KVCache for c in make_prompt_cache(self.model, max_kv_size=options.kv.max_size))
        needs = {context: self._estimate(options, context) for context in contexts}

        def stages(budget: int) -> list[Stage]:
            found = []
            for context in reversed(contexts):  # the longest first: if any does not fit, it is that one

                def plan(o: MemoryOptions, context: int = context) -> MemoryPlan:
                    return self._plan(o, context, needs[context], host_buffers=host_buffers, budget=budget)

                prefill = plan(options)
                decode = plan(replace(options, prefill_step_size=1)) if plain else prefill
                found.append(Stage(context, prefill, decode))
            return found[::-1]

        return stages

    @property
    def _buffers(self) -> int:
        """Experts that may be read ahead at once, each into a host buffer; 0 also if nobody could guess them."""
        return buffers_for([b.num_experts for b in self.blocks]) if any(self.guessers) else 0

    def _check(self, options: MemoryOptions) -> None:
        if options.memory is not None and options.slots is not None:
            raise UsageError("give either memory or slots, not both: slots say how much memory the experts take")
        if not 1 <= options.max_context <= LONGEST_CONTEXT:
            raise UsageError(
                f"max context must be at least 1 token and at most {LONGEST_CONTEXT:,}, not {options.max_context:,}"
            )

    def _estimate(self, options: MemoryOptions, context: int) -> tuple[int, ForwardShape]:
        return footprint.estimate(
            self.model,
            self.config,
            self.blocks,
            options.kv,
            context=context,
            chunk=options.prefill_step_size,
            prompt=options.max_prompt,
        )

    def _plan(
        self,
        options: MemoryOptions,
        context: int,
        need: tuple[int, ForwardShape],
        *,
        host_buffers: int,
        budget: int | None,
    ) -> MemoryPlan:
        kv, forward = need
        return plan_memory(
            self.layer_shapes,
            forward,
            resident=self.resident,
            kv=kv,
            host_buffers=host_buffers + self._buffers * max(b.bytes_per_expert for b in self.blocks),
            overhead=OVERHEAD,
            budget=budget,
            slots=options.slots,
            prefill_step_size=options.prefill_step_size,
            max_chunk=min(context, options.max_prompt or context),
            movable=options.elastic,
        )

    def load(self, memory: MemoryOptions, cache: CacheOptions) -> nn.Module:
        """Read the resident weights, make the slots and attach the cache as ``model.expert_cache``.

        Raises BudgetError before anything is read, ReadError if reading fails. May be called once.
        """
        reader = ExpertReader(self.index.shards, threads=cache.threads, direct_io=cache.direct_io, flash=cache.flash)
        try:
            stager = self._stager(memory, reader.host_buffer_bytes) if memory.elastic else None
            stages = stager(_budget(memory)) if stager is not None else []
            plan = stages[0].prefill if stages else self.plan(memory, host_buffers=reader.host_buffer_bytes)
            strategy = self._strategy(cache.routing, cache.strength, cache.top_j, plan.slots_per_layer)
            self._refuse_unreachable(strategy, {b.path: NO_SEAM for b in self.blocks if b.seam is None})
            system.limit_buffer_cache()
            if plan.budget is not None:
                system.return_freed_memory()
            read_weights(self.model, self.folder)
            tested = {b.path: b.self_test(*self._probe_shape) for b in self.blocks}
            self._refuse_unreachable(strategy, {path: reason for path, reason in tested.items() if reason})
            layers = [
                LayerExperts(
                    b.path,
                    extents,
                    b.components,
                    num_experts=b.num_experts,
                    k=b.k,
                    slots=slots,
                    eviction=cache.eviction,
                    running_range=b.running_range,
                )
                for b, extents, slots in zip(self.blocks, self.extents, plan.slots_per_layer, strict=True)
            ]
            expert_cache = ExpertCache(layers, reader, strategy)
            expert_cache.plan_slots = self._slot_planner(plan)
            expert_cache.adopt_plan = self._adopt_plan
            expert_cache.choose_strategy = self._strategy_chooser(expert_cache, tested)
            for number, (block, layer) in enumerate(zip(self.blocks, layers, strict=True)):
                block.attach(expert_cache, layer, number)
        except BaseException:
            reader.close()
            raise
        install_growth(self.model)
        host_read = statistics.median(system.time_host_reads()[0])
        expert_cache.optimist = Optimist(
            self.model.layers, self.blocks, expert_cache, SpanChooser(len(layers), host_read)
        )
        if self._buffers:
            expert_cache.look_ahead = LookAhead(layers, reader, self.guessers, buffers=self._buffers)
        self.model.expert_cache = expert_cache
        self.model.memory_plan = plan
        self.model.elastic_slots = None
        if stager is not None:
            self._make_elastic(stages, stager, expert_cache)
        return self.model

    def _strategy(
        self, routing: str | Strategy, strength: float | None, top_j: int | None, slots: Sequence[int]
    ) -> Strategy:
        return parse_routing(
            routing,
            strength=strength,
            top_j=top_j,
            k=min(b.k for b in self.blocks),
            slots=sum(slots),
            experts=sum(b.num_experts for b in self.blocks),
        )

    def _strategy_chooser(
        self, cache: ExpertCache, tested: dict[str, str | None]
    ) -> Callable[[Strategy | str], Strategy]:
        unreachable = {path: reason for path, reason in tested.items() if reason}

        def choose(routing: Strategy | str) -> Strategy:
            strategy = self._strategy(routing, None, None, cache.slots_per_layer)
            self._refuse_unreachable(strategy, unreachable)
            return strategy

        return choose

    def _make_elastic(self, stages: Sequence[Stage], stager: Callable[[int], list[Stage]], cache: ExpertCache) -> None:
        def apply(plan: MemoryPlan, slots: Sequence[int]) -> None:
            cache.mend()
            if list(slots) != cache.slots_per_layer:
                cache.resize(slots=slots)
            self.model.memory_plan = plan

        elastic = ElasticSlots(stages, [b.k for b in self.blocks], apply, system_pressure())
        planned: list[Stage] = []

        def plan_slots(memory: str | int) -> MemoryPlan:
            planned[:] = stager(budget_here(memory, held=self._held(cache)))
            return elastic.plan_in(planned)

        def adopt_plan(plan: MemoryPlan) -> None:
            elastic.replan(tuple(planned))
            self.model.memory_plan = plan

        cache.plan_slots, cache.adopt_plan = plan_slots, adopt_plan
        self.model.elastic_slots = elastic

    def _held(self, cache: ExpertCache) -> int:
        """Bytes that the model has already and that a plan charges; a conversation's KV cache is not known here."""
        return self.resident + cache.nbytes + cache.reader.host_buffer_bytes

    def _refuse_gpu_formats(self) -> None:
        """MLX's CPU backend multiplies unquantised experts in float32 only; it would fail at the first token.

        So it would with nvfp4 that has a global scale for each expert.
        """
        for b in self.blocks:
            for c in b.components:
                if system.on_cpu() and c.name.endswith(".global_scale"):
                    raise UnsupportedModelError(
                        f"the experts of {b.path} have global scales ({c.name}), which MLX computes only on a GPU; on "
                        "this machine use a model that was quantised without them"
                    )
                if system.on_cpu() and c.dtype in ("bfloat16", "float16") and c.name.endswith(".weight"):
                    raise UnsupportedModelError(
                        f"the experts of {b.path} are {c.dtype}, which MLX computes only on a GPU; on this machine use "
                        f"a quantised model: mlx_lm.convert --hf-path {self.folder} -q --dtype float32 --mlx-path OUT"
                    )

    def _refuse_unreachable(self, strategy: Strategy, unreachable: dict[str, str]) -> None:
        if unreachable and not isinstance(strategy, Original):
            path, reason = next(iter(unreachable.items()))
            raise UnsupportedModelError(
                f"the router of {path} ({self.config.get('model_type')}) cannot be biased: {reason}; "
                "use --exact (routing='original') to stream this model without the bias"
            )

    def _adopt_plan(self, plan: MemoryPlan) -> None:
        self.model.memory_plan = plan

    def _slot_planner(self, first: MemoryPlan) -> Callable[[str | int], MemoryPlan]:
        shapes = self.layer_shapes

        def plan(memory: str | int) -> MemoryPlan:
            return plan_memory(
                shapes,
                first.forward,
                resident=first.resident,
                kv=first.kv,
                host_buffers=first.host_buffers,
                overhead=first.overhead,
                budget=budget_here(memory, held=self._held(self.model.expert_cache)),
                prefill_step_size=first.prefill_step_size,
            )

        return plan


def load(
    path_or_repo: str,
    *,
    memory: str | int | None = None,
    slots: int | Sequence[int] | None = None,
    max_context: int = DEFAULT_MAX_CONTEXT,
    elastic: bool = False,
    routing: str | Strategy = "cache-prior",
    strength: float | None = None,
    top_j: int | None = None,
    eviction: str = "lru",
    direct_io: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a Mixture-of-Experts model within a memory budget; experts beyond it stay on disk.

    path_or_repo: a model folder or a Hugging Face repo id (downloaded once, with progress bars on a terminal).
    memory: "6GB", "60%" (of RAM), "auto" or bytes, for everything that the model causes; slots: experts per layer,
    instead (one number, or one for each layer). max_context: tokens for which KV cache is reserved. elastic: start with
    more slots, and give them back as the KV cache grows or while the system is short of memory (this package's
    generate and stream_generate do that; mlx_lm's do not). routing: a name, a spec such as
    "cache-prior:strength=0.05,j=1", or a strategy of mlx_moecache.routing; "original" is exact. strength, top_j: the
    paper's lambda and J. eviction: "lru", "lfu", "lfru", "decay" or "decay:0.98". direct_io: bypass the page cache.

    Returns (model, tokenizer). ``model.expert_cache`` has statistics, resize, reset and close; the model also works
    with mlx_lm's own generate and stream_generate, where one row counts as decode.

        model, tokenizer = load("mlx-community/Qwen1.5-MoE-A2.7B-Chat-4bit", memory="4GB")

    Raises HubError, CheckpointError, UnsupportedModelError, BudgetError, UsageError or ReadError.
    """
    opened = OpenedModel(resolve_model(path_or_repo, revision=revision), trust_remote_code=trust_remote_code)
    tokenizer = opened.tokenizer()
    model = opened.load(
        MemoryOptions(memory=memory, slots=slots, max_context=max_context, elastic=elastic),
        CacheOptions(routing=routing, strength=strength, top_j=top_j, eviction=eviction, direct_io=direct_io),
    )
    return model, tokenizer


def _budget(options: MemoryOptions) -> int:
    return budget_here("auto" if options.memory is None else options.memory)


def budget_here(memory: str | int, *, held: int = 0) -> int:
    """Bytes that `memory` means on this machine (see parse_memory). held: bytes that are ours already and part of it.

    Raises UsageError if it is not a size.
    """
    available = system.available_memory()
    return parse_memory(
        memory,
        physical=system.physical_memory(),
        recommended=system.recommended_working_set(),
        available=None if available is None else available + held,
        baseline=max(0, (system.process_footprint() or 0) - held),
    )
