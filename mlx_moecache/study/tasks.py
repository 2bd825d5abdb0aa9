"""What a task with questions is: text in, judgement out. Knows no tokens, models or caches (see evaluation.py).

Two kinds. A *choice* task offers continuations of a context, and the likeliest one is the model's answer: the model
reads `context + choice` in one forward pass. A *reply* task gives a prompt and judges the text that the model writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Scope = Literal["all", "decode"]  # which tokens a routing strategy may bias


@dataclass(frozen=True)
class ChoiceDocument:
    """One question with given answers. `context` ends without blank; each choice begins with one (" A")."""

    id: int  # position in the whole data, whatever the limit
    context: str  # worked examples and question
    choices: tuple[str, ...]  # continuations, at least 2
    answer: int  # index of the right one


@dataclass(frozen=True)
class ReplyDocument:
    """One question that is answered in writing."""

    id: int  # position in the whole data, whatever the limit
    prompt: str  # worked examples and question
    answer: str  # what a right reply comes to


class ChoiceTask(Protocol):
    """Answers are compared by log-likelihood. The default scope is "all": nothing is generated."""

    @property
    def name(self) -> str: ...

    @property
    def shots(self) -> int:
        """Worked examples in each context."""

    @property
    def default_scope(self) -> Scope: ...

    def documents(self, path: Path, *, seed: int) -> Sequence[ChoiceDocument]:
        """All questions at `path`, such that the first n are a fair sample. Raises UsageError for unusable data."""


class ReplyTask(Protocol):
    """Answers are generated, greedily. The default scope is "decode": the prompt is not biased."""

    @property
    def name(self) -> str: ...

    @property
    def shots(self) -> int:
        """Worked examples in each prompt."""

    @property
    def default_scope(self) -> Scope: ...

    @property
    def max_tokens(self) -> int:
        """Length at which a reply is cut."""

    @property
    def stops(self) -> tuple[str, ...]:
        """A reply ends before the first of these texts, or where the model ends it."""

    def documents(self, path: Path, *, seed: int) -> Sequence[ReplyDocument]:
        """All questions at `path`, such that the first n are a fair sample. Raises UsageError for unusable data."""

    def judge(self, document: ReplyDocument, reply: str) -> Mapping[str, bool]:
        """Whether the reply is right, by name of the way to judge; the first is the task's accuracy.

        Such as {"strict": False, "flexible": True}.
        """
