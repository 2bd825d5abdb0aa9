"""From what the user typed to token ids: standard input, chat template, prefilled response, saved prefixes."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError

_MARK = "<query>"  # stands in for the user's text, to find what a saved prompt already covers


@dataclass(frozen=True)
class Prompt:
    """One request as text, before a tokenizer is known."""

    text: str
    system: str | None = None
    prefill: str | None = None  # the beginning of the reply
    use_template: bool = True
    template_options: dict[str, Any] = field(default_factory=dict)


def read_text(argument: str) -> str:
    r"""The prompt meant by --prompt: "-" is standard input, "\n" and "\t" are line break and tab, as in mlx-lm.

    Raises UsageError if it is empty or not text.
    """
    text = argument.replace("\\n", "\n").replace("\\t", "\t")
    source = "--prompt"
    if text == "-":
        source = "standard input"
        try:
            text = sys.stdin.buffer.read().decode("utf-8") if sys.stdin is not None else ""
        except UnicodeDecodeError:
            raise UsageError("standard input is not UTF-8 text; convert it first, for example with iconv") from None
    _check_text(text, source)
    if not text:
        raise UsageError(f"the prompt is empty ({source}): give some text")
    return text


def parse_template_options(text: str | None) -> dict[str, Any]:
    """--chat-template-config: a JSON object. Raises UsageError."""
    if text is None:
        return {}
    try:
        options = json.loads(text)
    except ValueError as e:
        raise UsageError(
            f"--chat-template-config is not JSON ({e}); write for example '{{\"thinking\": false}}'"
        ) from None
    if not isinstance(options, dict):
        raise UsageError(f"--chat-template-config must be a JSON object such as '{{\"thinking\": false}}', not {text}")
    return options


def check_prompt(prompt: Prompt) -> None:
    """Raise UsageError for parts that would have no effect without a chat template, or are not text."""
    for flag, text in (("--system-prompt", prompt.system), ("--prefill-response", prompt.prefill)):
        if text is None:
            continue
        _check_text(text, flag)
        if not prompt.use_template:
            raise UsageError(f"{flag} is used by the chat template, which --ignore-chat-template turns off; drop one")


def tokenise(prompt: Prompt, tokenizer: Any, *, is_suffix: bool = False) -> list[int]:
    """Token ids of `prompt` for an mlx-lm tokenizer.

    is_suffix: what comes before the user's text is in a saved KV cache, so only the rest of the template follows.
    Raises UsageError if the template cannot be applied or nothing is left.
    """
    use_template = prompt.use_template and tokenizer.has_chat_template
    text = prompt.text
    if use_template:
        text = _apply_template(prompt, tokenizer, prompt.text)
        if is_suffix:
            start = _apply_template(prompt, tokenizer, _MARK).find(_MARK)
            if start < 0:
                raise UsageError("this model's chat template changes the prompt; use --ignore-chat-template")
            text = text[start:]
    elif prompt.system is not None or prompt.prefill is not None:
        flag = "--prefill-response" if prompt.system is None else "--system-prompt"
        raise UsageError(f"this model has no chat template, so {flag} has no use; put the text into --prompt")
    ids: list[int] = tokenizer.encode(text, add_special_tokens=not use_template)
    if not ids:
        raise UsageError("the prompt is empty: it has no tokens for this model; give some text")
    return ids


def _apply_template(prompt: Prompt, tokenizer: Any, user: str) -> str:
    messages = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
    messages.append({"role": "user", "content": user})
    has_prefill = prompt.prefill is not None
    if prompt.prefill is not None:
        messages.append({"role": "assistant", "content": prompt.prefill})
    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            continue_final_message=has_prefill,
            add_generation_prompt=not has_prefill,
            **prompt.template_options,
        )
    except Exception as e:  # a template is a program of the model's author and may raise anything
        raise UsageError(f"the model's chat template fails ({e}); try without it: --ignore-chat-template") from e
    return text


def _check_text(text: str, source: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of the command line that are no UTF-8 arrive as lone surrogates
        raise UsageError(f"{source} is not UTF-8 text") from None
