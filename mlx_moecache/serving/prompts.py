"""From a request to token ids: the chat template over all messages, or the prompt as it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..console.chat_text import KnownTexts, render
from ..errors import UsageError
from .api_errors import bad
from .requests import Request


@dataclass(frozen=True)
class Prompt:
    text: str | None  # None: the request gave token ids
    tokens: list[int]
    is_templated: bool  # made by a chat template


@dataclass
class Prompts:
    """Encodes requests; in a chat that goes on replies keep the tokens that they were made of (`KnownTexts`).

    Other prompts are always cut anew: without a template a reply may have begun in the middle of one of their words.
    """

    tokenizer: Any
    template_options: dict[str, Any] = field(default_factory=dict)
    _known: KnownTexts = field(default_factory=KnownTexts)

    def of(self, request: Request) -> Prompt:
        """Raises RequestError for a prompt without tokens and for messages that the template refuses."""
        text = None
        if request.kind == "chat":
            text = self._render(request)
            tokens = self._known.encode(text, self.tokenizer, add_special_tokens=not self.tokenizer.has_chat_template)
        elif isinstance(request.prompt, str):
            text, bos = request.prompt, self.tokenizer.bos_token
            tokens = list(self.tokenizer.encode(text, add_special_tokens=bos is None or not text.startswith(bos)))
        else:
            tokens = list(request.prompt)
        if not tokens:
            raise bad("the prompt is empty: it has no tokens for this model", "prompt")
        return Prompt(text, tokens, request.kind == "chat" and self.tokenizer.has_chat_template)

    def remember(self, prompt: Prompt, reply: str, tokens: list[int]) -> None:
        """`reply`, made of `tokens`, followed `prompt`: a later chat that begins so can use the KV cache."""
        if prompt.is_templated and prompt.text is not None:
            self._known.add(prompt.text + reply, prompt.tokens + tokens)

    def _render(self, request: Request) -> str:
        if not self.tokenizer.has_chat_template:
            try:
                return render(request.messages, None, self.tokenizer, use_template=False)
            except UsageError as e:
                raise bad(str(e), "messages") from e
        options = {**self.template_options, **dict(request.template_options)}
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(m) for m in request.messages],
                tools=list(request.tools) or None,
                tokenize=False,
                add_generation_prompt=True,
                **options,
            )
        except Exception as e:  # a template is a program of the model's author and may raise anything
            what = str(e) or type(e).__name__
            raise bad(f"the model's chat template refuses these messages ({what})", "messages") from e
        return text
