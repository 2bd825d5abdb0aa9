"""One question through a model: continuations scored by log-likelihood, or a written reply as one unit of a run.

Deals in tokens, logits and counters; tasks.py says what a question is, and the tasks judge replies. Continuations are
read by a window scorer, whose virtual caches start anew with every forward pass; replies are generated with the live
cache, which is emptied before each one, so that a unit does not depend on those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UsageError
from ..generation import Sampler, expert_cache_of, stream_generate
from ..stats import CacheStats
from .result_metrics import Unit
from .tasks import ReplyDocument, ReplyTask, Scope

if TYPE_CHECKING:
    from .recurrence import Counts


class Scorer(Protocol):
    """What is used of a WindowScorer."""

    def forward(self, tokens: Sequence[int], *, biased_from: int = 0) -> mx.array: ...

    def take_counts(self) -> Counts: ...


@dataclass(frozen=True)
class Scored:
    """Log-likelihood of some tokens after others."""

    logprob: float  # nats, summed over the tokens
    is_greedy: bool  # each token was the likeliest one


@dataclass(frozen=True)
class Reply:
    """What the model wrote, without the text that stopped it."""

    text: str
    tokens: int  # generated, including those of the stop
    is_cut: bool  # it reached max_tokens: an answer may be missing for that reason only
    stats: CacheStats  # of the expert cache


def score_continuations(
    scorer: Scorer, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], scope: Scope
) -> list[Scored]:
    """Score each continuation after its context; pairs for which the model reads the same share one forward pass.

    A pair is (context, continuation) as token ids, the context not empty. The last token of a continuation is
    predicted but never read, so one-token choices after one context need one pass. Under scope "decode" only tokens
    of continuations are biased, and of one-token choices nothing is.
    """
    read: dict[tuple[tuple[int, ...], int], npt.NDArray[np.float64]] = {}
    result = []
    for context, continuation in pairs:
        if not continuation:
            result.append(Scored(0.0, True))
            continue
        tokens = (*context, *continuation[:-1])
        biased_from = 0 if scope == "all" else len(context)
        key = tokens, len(continuation)  # together they say where biasing begins
        if key not in read:
            read[key] = _logprobs(scorer.forward(tokens, biased_from=biased_from), len(continuation))
        rows = read[key]  # [n, V]
        targets = np.asarray(continuation)
        logprob = float(rows[np.arange(len(targets)), targets].sum())
        result.append(Scored(logprob, bool((rows.argmax(axis=-1) == targets).all())))
    return result


def encode_choices(
    tokenizer: TokenizerWrapper, context: str, choices: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """Token ids of (context, continuation) for each choice, all split after the same tokens.

    Each is encoded as one text, as the model would read it, blanks at the end of the context being joined to what
    follows. A last token of the context that some choice would change is scored with every choice, so that all are
    judged after the same context. Raises UsageError if no token is left before or after the split.
    """
    blanks = len(context) - len(context.rstrip())
    shorter = context[: len(context) - blanks]
    alone: list[int] = tokenizer.encode(shorter)
    whole: list[list[int]] = [tokenizer.encode(context + c) for c in choices]
    n = min(_common_prefix(alone, w) for w in whole)
    for choice, tokens in zip(choices, whole, strict=True):
        if n == 0 or len(tokens) == n:
            raise UsageError(
                f"cannot score {choice[:40]!r} after {shorter[-40:]!r}: this model's tokenizer leaves no token for "
                f"{'the context' if n == 0 else 'it'}"
            )
    return [(w[:n], w[n:]) for w in whole]


def answer_question(
    model: nn.Module, tokenizer: TokenizerWrapper, task: ReplyTask, document: ReplyDocument, max_tokens: int
) -> Unit:
    """Let the model answer one question greedily with its live cache, and judge the reply.

    The counters are those of decode, for the prompt is never biased. Raises ReadError if expert bytes cannot be read.
    """
    written = reply(model, tokenizer, document.prompt, stops=task.stops, max_tokens=max_tokens)
    return judged(task, document, written, moe_layers=len(expert_cache_of(model).layers))


def reply(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int],
    *,
    stops: Sequence[str],
    max_tokens: int,
    sampler: Sampler | None = None,
) -> Reply:
    """Generate until the model ends, one of `stops` has been written, or `max_tokens`; the cache starts empty.

    Raises UsageError for an empty prompt, ReadError if expert bytes cannot be read.
    """
    expert_cache_of(model).reset()
    text, end = "", None
    longest = max((len(s) for s in stops), default=0)
    for response in stream_generate(model, tokenizer, prompt, max_tokens=max_tokens, sampler=sampler):
        searched = max(0, len(text) - longest)
        text += response.text
        end = _first_stop(text, stops, searched)
        if end is not None:
            break
    return Reply(
        text=text if end is None else text[:end],
        tokens=response.generation_tokens,
        is_cut=end is None and response.finish_reason == "length",
        stats=response.stats,
    )


def judged(task: ReplyTask, document: ReplyDocument, written: Reply, *, moe_layers: int) -> Unit:
    """The unit of a reply; `correct` is the first of the task's ways to judge it."""
    scores = {name: int(is_right) for name, is_right in task.judge(document, written.text).items()}
    decode = written.stats.decode
    return Unit(
        id=document.id,
        tokens=written.tokens,
        selections=decode.selections,
        misses=decode.misses,
        loads=decode.loads,
        swapped=decode.swapped,
        token_layers=(written.tokens - 1) * moe_layers,  # the first token comes from the prompt's forward pass
        correct=next(iter(scores.values())),
        scores=scores,
    )


def _logprobs(logits: mx.array, last: int) -> npt.NDArray[np.float64]:
    """Log-probabilities [last, V] of the last rows of `logits` [L, V]."""
    rows = np.array(logits[-last:].astype(mx.float32), dtype=np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    return rows


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _first_stop(text: str, stops: Sequence[str], searched: int) -> int | None:
    """Where the earliest stop begins, or None; none ends before `searched`."""
    found = [i for i in (text.find(s, searched) for s in stops if s) if i >= 0]
    return min(found, default=None)
