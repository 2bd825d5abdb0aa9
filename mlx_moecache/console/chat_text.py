"""From messages to token ids: the chat template over the whole conversation, or plain text without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UsageError

Message = dict[str, str]  # role and content


def render(messages: Sequence[Message], system: str | None, tokenizer: Any, *, use_template: bool) -> str:
    """The text of a conversation up to where the reply begins. Raises UsageError if the template cannot be applied.

    Without a template the messages follow each other, a line break between them.
    """
    if not use_template:
        return "\n".join(m["content"] for m in messages)
    head = [] if system is None else [{"role": "system", "content": system}]
    try:
        text: str = tokenizer.apply_chat_template([*head, *messages], tokenize=False, add_generation_prompt=True)
    except Exception as e:  # a template is a program of the model's author and may raise anything
        what = " ".join(str(e).split()) or type(e).__name__
        raise UsageError(f"the model's chat template refuses this conversation ({what})") from e
    return text


class KnownTexts:
    """Token ids of texts that were a prompt, or a prompt and its reply.

    A reply is made of the tokens that the model chose, which are not always those that its text would be cut into. A
    later prompt that begins with the same text has to begin with the same tokens, or the KV cache would be of no use.
    """

    def __init__(self) -> None:
        self._known: list[tuple[str, list[int]]] = []

    def add(self, text: str, tokens: Sequence[int]) -> None:
        # What is no beginning of the latest text belongs to a past that was cleared or answered again.
        self._known = [x for x in self._known if text.startswith(x[0]) and x[0] != text]
        self._known.append((text, list(tokens)))

    def encode(self, text: str, tokenizer: Any, *, add_special_tokens: bool) -> list[int]:
        """The tokens of `text`; of the longest known beginning, those that it has already."""
        beginnings = [x for x in self._known if text.startswith(x[0])]
        if not beginnings:
            return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))
        known, tokens = max(beginnings, key=lambda x: len(x[0]))
        rest = text[len(known) :]
        return [*tokens, *tokenizer.encode(rest, add_special_tokens=False)] if rest else list(tokens)
