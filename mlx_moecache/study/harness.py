"""A model of ours as lm-evaluation-harness sees it: the harness's model interface over our caches.

The harness is optional: importing this module without it raises UsageError that names the extra. Log-likelihoods are
read with a window scorer, whose caches are simulated token by token; replies are generated with the live cache, which
starts empty for each one and biases no prompt. So load the model with as many slots as are to be measured:

    model, tokenizer = load("mlx-community/Qwen3-30B-A3B-4bit", slots=64, routing="cache-prior", strength=0.1)
    lm = MoeCacheLM(model, tokenizer)
    results = lm_eval.simple_evaluate(model=lm, tasks=["hellaswag"], limit=200)
    print(results["results"], lm.counted.miss_rate)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import groupby
from typing import Any

import mlx.nn as nn
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from ..errors import UsageError
from ..generation import Sampler, expert_cache_of
from .question_scoring import Scored, Scorer, reply, score_continuations
from .tasks import Scope
from .window import WindowScorer

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
except ImportError as e:
    raise UsageError(
        f"harness tasks need lm-evaluation-harness ({e}); install it with: pip install 'mlx-moecache[harness]'"
    ) from e

MAX_LENGTH = 2048  # tokens, what the harness takes where a model names no length
MAX_GEN_TOKS = 256  # the harness's own default
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # in the harness's order

log = logging.getLogger(__name__)
Pair = tuple[Sequence[int], Sequence[int]]  # token ids of (context, continuation)


@dataclass(frozen=True)
class Counted:
    """What went through the cache: all tokens of log-likelihoods under scope "all", and decode of replies."""

    tokens: int = 0  # scored or generated
    selections: int = 0
    misses: int = 0
    loads: int = 0
    swapped: int = 0
    token_layers: int = 0

    @property
    def miss_rate(self) -> float | None:
        return self.misses / self.selections if self.selections else None

    def __add__(self, other: Counted) -> Counted:
        return Counted(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, earlier: Counted) -> Counted:
        return Counted(*(a - b for a, b in zip(astuple(self), astuple(earlier), strict=True)))


class MoeCacheLM(LM):  # type: ignore[misc]  # the harness is untyped
    """A model that `load` returned, as the harness sees it. Batch size one.

    scope: "all" (every token of a log-likelihood is biased) or "decode" (only those of continuations; whole texts are
    continuations of nothing). scorer: instead of one with the model's own strategy and slots. max_length: tokens of
    context and continuation; longer contexts lose their beginning, with a warning. Raises UsageError.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        *,
        scope: Scope = "all",
        scorer: Scorer | None = None,
        max_length: int = MAX_LENGTH,
        max_gen_toks: int = MAX_GEN_TOKS,
    ) -> None:
        super().__init__()
        if max_length < 2 or not 0 < max_gen_toks < max_length:
            raise UsageError(
                f"max length {max_length} must be at least 2 and above the {max_gen_toks} tokens that are generated"
            )
        self.model, self.tokenizer = model, tokenizer
        self.scope, self.max_length, self.max_gen_toks = scope, max_length, max_gen_toks
        self.scorer: Scorer = scorer or _scorer_like(model)
        self.counted = Counted()

    # ---- what the harness asks for ----

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, would greedy decoding write it?) for each (context, continuation)."""
        pairs = [self._encode_pair(*r.args) for r in requests]
        result: list[tuple[float, bool]] = []
        with _bar(len(requests), "log-likelihoods", disable_tqdm) as bar:
            # Choices of one question come one after the other and may share their forward pass.
            for _, same in groupby(range(len(requests)), key=lambda i: (_document(requests[i]), pairs[i][0])):
                together = list(same)
                for i, s in zip(together, self._score([pairs[i] for i in together]), strict=True):
                    result.append((s.logprob, s.is_greedy))
                    self.cache_hook.add_partial("loglikelihood", requests[i].args, result[-1])
                bar.update(len(together))
        return result

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of whole texts, each token predicted once, in windows of `max_length` tokens."""
        result = []
        with _bar(len(requests), "texts", disable_tqdm) as bar:
            for r in requests:
                (text,) = r.args
                tokens = [self._prefix, *self.tokenizer.encode(text, add_special_tokens=False)]
                total = sum(self._score([pair])[0].logprob for pair in rolling_windows(tokens, self.max_length))
                result.append(total)
                self.cache_hook.add_partial("loglikelihood_rolling", r.args, total)
                bar.update()
        return result

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The replies, cut before the first of the texts that the task wants generation to stop at."""
        result = []
        with _bar(len(requests), "replies", disable_tqdm) as bar:
            for r in requests:
                context, options = r.args
                result.append(self._reply(context, options))
                self.cache_hook.add_partial("generate_until", r.args, result[-1])
                bar.update()
        return result

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that `apply_chat_template` uses, for the harness's records."""
        return str(self.tokenizer.chat_template) if chat_template and self.tokenizer.has_chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as one text; without `add_generation_prompt` the last one is left open. Raises UsageError."""
        if not self.tokenizer.has_chat_template:
            raise UsageError("this model has no chat template; run the task without one")
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def get_model_info(self) -> dict[str, Any]:
        """For the `config` of the harness's results."""
        cache = expert_cache_of(self.model)
        return {
            "routing": cache.strategy.spec,
            "slots_per_layer": cache.slots_per_layer,
            "bias_scope": self.scope,
            "max_length": self.max_length,
        }

    # ---- inside ----

    @property
    def _prefix(self) -> int:
        """The token that comes before a text that has nothing before it."""
        bos = self.tokenizer.bos_token_id
        token = self.tokenizer.eos_token_id if bos is None else bos
        return int(min(self.tokenizer.eos_token_ids) if token is None else token)

    def _encode(self, text: str) -> list[int]:
        # A chat template may have written the beginning-of-text token already.
        has_bos = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=not has_bos)
        return ids

    def _encode_pair(self, context: str, continuation: str) -> Pair:
        """Split where the context's tokens would end, as the harness's own models do; kept within `max_length`."""
        if context:
            n = len(context.rstrip())
            context, continuation = context[:n], context[n:] + continuation
        before = self._encode(context) if context else [self._prefix]
        if context:
            after = self._encode(context + continuation)[len(before) :]
        else:
            after = self.tokenizer.encode(continuation, add_special_tokens=False)
        room = self.max_length + 1 - len(after)  # the last token is predicted but not read
        if room < 1:
            raise UsageError(
                f"a continuation of {len(after)} tokens is above the max length {self.max_length}; raise it"
            )
        return self._keep_end(before, room), after

    def _keep_end(self, tokens: list[int], room: int) -> list[int]:
        if len(tokens) > room:
            log.warning("a context of %d tokens lost its first %d: raise max_length", len(tokens), len(tokens) - room)
        return tokens[-room:]

    def _score(self, pairs: Sequence[Pair]) -> list[Scored]:
        self.scorer.take_counts()
        scored = score_continuations(self.scorer, pairs, self.scope)
        c = self.scorer.take_counts()
        tokens = sum(len(continuation) for _, continuation in pairs)
        self.counted += Counted(tokens, c.selections, c.misses, c.loads, c.swapped, c.token_layers)
        return scored

    def _reply(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        limit = int(next((options[n] for n in LENGTH_NAMES if options.get(n) is not None), self.max_gen_toks))
        if limit >= self.max_length:
            raise UsageError(f"the task generates {limit} tokens, above the max length {self.max_length}; raise it")
        prompt = self._keep_end(self._encode(context), self.max_length - limit)
        written = reply(
            self.model,
            self.tokenizer,
            prompt,
            stops=stops,
            max_tokens=limit,
            sampler=_sampler(options),
        )
        c, layers = written.stats.decode, len(expert_cache_of(self.model).layers)
        # The first token comes from the prompt's forward pass.
        token_layers = (written.tokens - 1) * layers
        self.counted += Counted(written.tokens, c.selections, c.misses, c.loads, c.swapped, token_layers)
        return written.text


def rolling_windows(tokens: Sequence[int], max_length: int) -> list[Pair]:
    """Cut `tokens` into (context, continuation) pairs that predict each token but the first once.

    At most `max_length` tokens are read for each pair, and the last pair has as much context as that leaves.
    """
    pairs: list[Pair] = []
    predicted = 1
    while predicted < len(tokens):
        end = min(predicted + max_length, len(tokens))
        # Window k reads tokens [start, end - 1) and predicts [predicted, end).
        start = max(0, end - 1 - max_length)
        pairs.append((tokens[start:predicted], tokens[predicted:end]))
        predicted = end
    return pairs


def _scorer_like(model: nn.Module) -> WindowScorer:
    """A scorer whose simulated caches are as large as the model's own."""
    cache = expert_cache_of(model)
    eviction = cache.layers[0].residents.eviction
    return WindowScorer(model, cache.strategy, slots=cache.slots_per_layer, eviction=eviction)


def _sampler(options: dict[str, Any]) -> Sampler | None:
    """mlx-lm's sampler for the harness's generation options; None: greedy."""
    temperature = float(options.get("temperature") or 0.0)
    if not options.get("do_sample", temperature > 0):
        return None
    sampler: Sampler = make_sampler(
        temperature, float(options.get("top_p") or 0.0), top_k=int(options.get("top_k") or 0)
    )
    return sampler


def _document(request: Instance) -> tuple[str | None, int | None]:
    return request.task_name, request.doc_id


def _bar(total: int, what: str, is_off: bool) -> Any:
    """A progress bar, on a terminal only."""
    return tqdm(total=total, desc=what, disable=True if is_off else None, leave=False)
