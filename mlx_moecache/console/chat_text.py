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
    """Token ids of prompts with the replies that the model gave to them.

    A reply is made of the tokens that the model chose, which are not always those that its text would be cut into. A
    later prompt that begins with the same text has to begin with the same tokens, or the KV cache would be of no use.

    What holds: from a reply's end on, and in prompts, all tokens are those that the tokenizer gives for the whole text,
    whatever was asked before. Those of a reply are the ones that the model chose, if an added token, such as that of an
    end of turn, follows it: there text is cut whatever comes before, anywhere else a word may go on. Without such a
    token the whole text is cut anew, and the KV cache is of use as far as the tokens are the same.
    """

    def __init__(self) -> None:
        self._known: list[tuple[str, list[int]]] = []

    def add(self, text: str, tokens: Sequence[int]) -> None:
        """Know `text`, which ends with a reply. `tokens`: those that `encode` gave for its prompt, and the reply's."""
        # What is no beginning of the latest text belongs to a past that was cleared or answered again.
        self._known = [x for x in self._known if text.startswith(x[0]) and x[0] != text]
        self._known.append((text, list(tokens)))

    def encode(self, text: str, tokenizer: Any, *, add_special_tokens: bool) -> list[int]:
        """The tokens of `text`, in which known replies keep their own."""
        whole = list(tokenizer.encode(text, add_special_tokens=add_special_tokens))
        for known, tokens in sorted(self._known, key=lambda x: -len(x[0])):
            if not text.startswith(known):
                continue
            rest = list(tokenizer.encode(text[len(known) :], add_special_tokens=False))
            if rest and rest[0] in getattr(tokenizer, "added_tokens_decoder", ()) and whole[-len(rest) :] == rest:
                return [*tokens, *rest]
        return whole
