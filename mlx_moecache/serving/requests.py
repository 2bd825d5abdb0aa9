"""The bodies of OpenAI's chat and text completions, checked: what is asked for, in the terms of this project.

A field that would change the reply and cannot be honoured is refused; fields that change nothing are accepted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from .api_errors import RequestError, bad, shown
from .fields import Fields, check_text, is_number
from .messages import parse_messages, parse_tools

Kind = Literal["chat", "text"]
MOST_STOPS = 16
MOST_BIASES = 1024
MOST_TOP_LOGPROBS = 20
WITHOUT_EFFECT = {  # what clients send that changes no token
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
}
SHARED = {
    "model",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "n",
    "logprobs",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "repetition_context_size",
    *WITHOUT_EFFECT,
}
CHAT = SHARED | {"messages", "tools", "tool_choice", "top_logprobs", "response_format", "chat_template_kwargs"}
TEXT = SHARED | {"prompt", "best_of", "echo"}
REFUSED = {
    "functions": "use tools instead",
    "function_call": "use tool_choice instead",
    "modalities": "only text is supported; leave it out",
    "audio": "only text is supported; leave it out",
    "prediction": "predicted outputs are not supported; leave it out",
    "reasoning_effort": "not supported; use chat_template_kwargs with what the model's template knows",
    "web_search_options": "not supported; leave it out",
    "suffix": "filling in the middle is not supported; leave it out",
    "draft_model": "speculative decoding is not supported; leave it out",
    "adapters": "adapters are not supported; leave it out",
}
OUR_TEMPLATE_NAMES = frozenset(
    {"messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"}
    | {"continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"}
    | {"return_assistant_tokens_mask", "tokenizer_kwargs"}
)


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; the server's flags give the defaults."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    seed: int | None = None  # None: the random numbers go on from the last reply


@dataclass(frozen=True)
class Penalties:
    """What is added to the logits before a token is chosen, as in mlx-lm."""

    logit_bias: tuple[tuple[int, float], ...] = ()
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 0.0  # 0: none
    repetition_context: int = 20  # tokens

    @property
    def any(self) -> bool:
        return bool(self.logit_bias or self.presence or self.frequency or self.repetition)


@dataclass(frozen=True)
class Request:
    """One completion that was asked for."""

    kind: Kind
    messages: tuple[dict[str, Any], ...] = ()  # chat
    tools: tuple[dict[str, Any], ...] = ()  # chat
    template_options: tuple[tuple[str, Any], ...] = ()  # chat
    prompt: str | tuple[int, ...] = ""  # text: as text or as token ids
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    penalties: Penalties = Penalties()
    top_logprobs: int | None = None  # None: no log-probabilities; 0: of the chosen token only
    stream: bool = False
    include_usage: bool = False


@dataclass(frozen=True)
class Limits:
    """What the model and the server's flags allow."""

    model: str  # its id
    aliases: tuple[str, ...] = ()  # other names that clients may use for it
    max_tokens: int = 1024  # of a reply
    vocabulary: int = 2**31
    has_tools: bool = False  # the chat template knows tools
    sampling: Sampling = Sampling()


def parse_request(kind: Kind, body: dict[str, Any], limits: Limits) -> Request:
    """The request that a body makes. Raises RequestError with the name of the wrong field and what is allowed."""
    f = Fields(body)
    f.check_names(CHAT if kind == "chat" else TEXT, REFUSED)
    _check_model(f, limits)
    _check_single(f)
    stream = f.flag("stream", False)
    asked = f.whole("max_completion_tokens", f.whole("max_tokens", None, 1), 1)
    request = Request(
        kind,
        max_tokens=limits.max_tokens if asked is None else min(asked, limits.max_tokens),
        stop=f.texts("stop", MOST_STOPS),
        sampling=_sampling(f, limits),
        penalties=_penalties(f, limits),
        stream=stream,
        include_usage=_include_usage(f, stream),
    )
    if kind == "text":
        return replace(request, prompt=_prompt(f.get("prompt"), limits), top_logprobs=f.whole("logprobs", None, 0, 5))
    return replace(
        request,
        messages=parse_messages(f.get("messages")),
        tools=_tools(f, limits),
        template_options=_template_options(f),
        top_logprobs=_chat_logprobs(f),
    )


def _check_model(f: Fields, limits: Limits) -> None:
    model = f.text("model")
    if model is not None and model not in (limits.model, *limits.aliases):
        message = f"the model {shown(model)} is not served here; this server has {shown(limits.model)}"
        raise RequestError(404, message, param="model", code="model_not_found")


def _check_single(f: Fields) -> None:
    for name in ("n", "best_of"):
        if f.whole(name, 1, 1) != 1:
            raise bad(f"{name} must be 1: one reply is made at a time; send the request again for more", name)
    if f.flag("echo", False):
        raise bad("echo must be false: the prompt is not repeated in the reply", "echo")
    wanted = f.mapping("response_format").get("type", "text")
    if wanted != "text":
        raise bad(f'response_format.type must be "text", not {shown(wanted)}', "response_format")


def _include_usage(f: Fields, stream: bool) -> bool:
    options = Fields(f.mapping("stream_options"))
    options.check_names({"include_usage", "include_obfuscation"}, {})
    if f.get("stream_options") is not None and not stream:
        raise bad("stream_options is allowed only with stream true", "stream_options")
    return options.flag("include_usage", False)


def _sampling(f: Fields, limits: Limits) -> Sampling:
    d = limits.sampling
    top_k = f.whole("top_k", d.top_k, 0, limits.vocabulary - 1)
    assert top_k is not None
    return Sampling(
        temperature=f.number("temperature", d.temperature, 0, max(2, d.temperature)),
        top_p=f.number("top_p", d.top_p, 0, 1),
        top_k=top_k,
        min_p=f.number("min_p", d.min_p, 0, 1),
        min_tokens_to_keep=d.min_tokens_to_keep,
        xtc_probability=d.xtc_probability,
        xtc_threshold=d.xtc_threshold,
        seed=f.whole("seed", None, -(2**63), 2**64 - 1),
    )


def _penalties(f: Fields, limits: Limits) -> Penalties:
    context = f.whole("repetition_context_size", 20, 1, 2**20)
    assert context is not None
    biases = f.mapping("logit_bias")
    if len(biases) > MOST_BIASES:
        raise bad(f"logit_bias may have {MOST_BIASES} entries, not {len(biases)}", "logit_bias")
    pairs = []
    for key, value in biases.items():
        token = int(key) if key.isascii() and key.isdigit() and len(key) < 12 else -1
        if not 0 <= token < limits.vocabulary or not is_number(value) or not -100 <= value <= 100:
            allowed = f"token ids from 0 to {limits.vocabulary - 1} with numbers from -100 to 100"
            raise bad(f"logit_bias must have {allowed}, not {shown(key)}: {shown(value)}", "logit_bias")
        pairs.append((token, float(value)))
    return Penalties(
        logit_bias=tuple(pairs),
        presence=f.number("presence_penalty", 0.0, -2, 2),
        frequency=f.number("frequency_penalty", 0.0, -2, 2),
        repetition=f.number("repetition_penalty", 0.0, 0, 10),
        repetition_context=context,
    )


def _prompt(prompt: object, limits: Limits) -> str | tuple[int, ...]:
    """A text or token ids; a list of one prompt is that prompt."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return check_text(prompt, "prompt")
    if not isinstance(prompt, list) or not prompt or not all(type(x) is int for x in prompt):
        raise bad(f"prompt must be one string or one list of token ids, not {shown(prompt)}", "prompt")
    wrong = next((x for x in prompt if not 0 <= x < limits.vocabulary), None)
    if wrong is not None:
        raise bad(f"prompt: token ids go from 0 to {limits.vocabulary - 1}, not {shown(wrong)}", "prompt")
    return tuple(prompt)


def _tools(f: Fields, limits: Limits) -> tuple[dict[str, Any], ...]:
    choice = f.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise bad(f'tool_choice must be "auto" or "none", not {shown(choice)}', "tool_choice")
    tools = parse_tools([] if f.get("tools") is None else f.get("tools"))
    if tools and not limits.has_tools:
        raise bad(f"tools: {limits.model} has no chat template for tools; leave them out", "tools")
    return () if choice == "none" else tools


def _template_options(f: Fields) -> tuple[tuple[str, Any], ...]:
    options = f.mapping("chat_template_kwargs")
    for name, value in options.items():
        if name in OUR_TEMPLATE_NAMES or not isinstance(value, str | int | float | bool | None):
            raise bad(
                f"chat_template_kwargs may have the template's own options with simple values, not {shown(name)}",
                "chat_template_kwargs",
            )
        check_text(f"{name}{value}", "chat_template_kwargs")
    return tuple(options.items())


def _chat_logprobs(f: Fields) -> int | None:
    wanted = f.flag("logprobs", False)
    top = f.whole("top_logprobs", None, 0, MOST_TOP_LOGPROBS)
    if top is not None and not wanted:
        raise bad("top_logprobs needs logprobs true", "top_logprobs")
    return (top or 0) if wanted else None
