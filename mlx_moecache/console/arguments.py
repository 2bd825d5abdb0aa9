"""The flags that commands share: one function per group, so that names, defaults and checks cannot drift apart.

Plain Python: help and mistyped flags are answered without importing MLX. Names and defaults are those of
mlx_lm.generate; a test compares them with the installed mlx-lm.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..budget import parse_memory
from ..demo import DEMO
from ..errors import UsageError
from ..eviction import EVICTION, make_policy

KV_BITS = (2, 3, 4, 5, 6, 8)
KV_GROUP_SIZES = (32, 64, 128)

# Flags of mlx_lm.generate that we know and refuse: how they are spelled, and why, with what to do instead.
REFUSED: dict[tuple[str, ...], str] = {
    ("--adapter-path",): "adapters are not supported, since experts are read from the checkpoint as they are; fuse "
    "the adapter into the model with mlx_lm.fuse and give the result as --model",
    ("--draft-model",): "speculative decoding is not supported, since checking several tokens at once needs many more "
    "experts in memory; leave it out",
    ("--num-draft-tokens",): "speculative decoding is not supported, since checking several tokens at once needs many "
    "more experts in memory; leave it out",
    ("--image",): "images are not supported, only text prompts; use mlx_lm.generate for models that see",
    ("--quantize-activations", "-qa"): "quantised activations are not supported, since they need other expert layers "
    "than those that are streamed; leave it out",
    ("--use-default-chat-template",): "it does nothing in mlx_lm.generate either: a chat template is used whenever "
    "the tokenizer has one; leave it out",
}


class Parser(argparse.ArgumentParser):
    """argparse, but every error is a UsageError with a one-line message; -h still prints help and exits with 0."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))

    def parse_args(  # type: ignore[override]  # argparse overloads it for typed namespaces, which we do not use
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._explain_unknown(unknown[0]))
        return parsed

    def _explain_unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            advice = "; the text to answer goes after --prompt" if "--prompt" in self._option_string_actions else ""
            return f"unexpected argument {argument!r}{advice}"
        flag = argument.partition("=")[0]
        return f"unknown flag {flag}{did_you_mean(flag, self._option_string_actions)} (-h lists all)"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ ", did you mean X?" if one of the `known` words is close to `word`, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""


# ---- values ----


def whole(least: int, *, most: int | None = None, also: int | None = None) -> Callable[[str], int]:
    """A converter to a whole number of at least `least` and at most `most`, or exactly `also`."""
    limits = f"at least {least}" if most is None else f"between {least} and {most}"
    limits += "" if also is None else f" (or {also})"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"needs a whole number, not {text!r}") from None
        if value != also and (value < least or (most is not None and value > most)):
            raise argparse.ArgumentTypeError(f"must be {limits}, not {value}")
        return value

    return convert


def number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """A converter to a finite number from `least` to `most`."""
    limits = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"needs a number, not {text!r}") from None
        if not (math.isfinite(value) and least <= value <= most):
            raise argparse.ArgumentTypeError(f"must be {limits}, not {text}")
        return value

    return convert


def flash_speed(text: str) -> int:
    """A converter: "2GB/s" -> bytes per second."""
    match = re.fullmatch(r"\s*([0-9.]+\s*[kmgt]?i?b)/s\s*", text.lower())
    try:
        if match is None:
            raise UsageError("no speed")
        return parse_memory(match[1], physical=0, recommended=None)
    except UsageError:
        raise argparse.ArgumentTypeError(f"needs a speed such as 2GB/s or 500MB/s, not {text!r}") from None


def duration(text: str) -> float:
    """A converter: "100us" -> seconds."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(us|µs|ms|s)\s*", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"needs a time such as 100us or 0.2ms, not {text!r}")
    return float(match[1]) * {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}[match[2]]


def slot_counts(text: str) -> int | tuple[int, ...]:
    """A converter: "30" for all layers, or "30,28,35" for each MoE layer."""
    counts = tuple(whole(1)(part.strip()) for part in text.split(","))
    return counts if len(counts) > 1 else counts[0]


def eviction_spec(text: str) -> str:
    """A converter to the spec of an eviction policy, such as lfu or decay:0.98."""
    try:
        make_policy(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def one_of(*allowed: object) -> Callable[[str], Any]:
    """A converter that accepts the `allowed` values only, and proposes the closest."""
    values = {str(value): value for value in allowed}

    def convert(text: str) -> object:
        if text not in values:
            raise argparse.ArgumentTypeError(f"unknown value {text!r} (choose {', '.join(values)})")
        return values[text]

    return convert


def boolean(text: str) -> bool:
    """mlx-lm's reading of --verbose: everything but "false" and "f" is true."""
    return text.lower() not in ("false", "f")


class Refuse(argparse.Action):
    """A flag that is known and refused, whether or not values follow it."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, reason: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)
        self.reason = reason

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        parser.error(f"{option}: {self.reason}")


# ---- groups ----


def add_source_arguments(group: argparse._ActionsContainer) -> None:
    group.add_argument("--revision", help="branch, tag or commit of the Hugging Face repo (default: its main branch)")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the model folder brings along (default: refuse)"
    )


def add_model_position(parser: argparse.ArgumentParser) -> None:
    """MODEL as the first argument, for commands that are about a model; --model is refused and says so."""
    parser.add_argument(
        "model",
        nargs="?",
        default=DEMO,
        metavar="MODEL",
        help="model folder, Hugging Face repo id, or demo, the bundled model (default: %(default)s)",
    )
    reason = f"the model has no flag here: {parser.prog} MODEL, it comes first"
    parser.add_argument("--model", dest="flag", action=Refuse, reason=reason)
    add_source_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", help=f"model folder, Hugging Face repo id, or {DEMO} (default: {DEMO}, the bundled model)"
    )
    add_source_arguments(group)
    group.add_argument(
        "--extra-eos-token", nargs="+", default=(), metavar="TOKEN", help="more tokens that end a reply (default: none)"
    )


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory and cache")
    group.add_argument(
        "--memory",
        metavar="SIZE",
        help="budget for all that the model needs: 4GB, 512MB, 60%% (of RAM) or auto (default: auto, which leaves an "
        "eighth of RAM free, and is at most 0.7 of RAM and the GPU's recommended working set)",
    )
    group.add_argument(
        "--slots",
        type=slot_counts,
        metavar="N",
        help="experts per layer to keep in memory, instead of --memory: one number, or one for each MoE layer as in "
        "30,28,35 (default: what the budget allows)",
    )
    group.add_argument(
        "--elastic",
        action="store_true",
        help="begin with more slots than the longest reply leaves, give them back as the KV cache grows, and fewer "
        "while the system is short of memory (default: the same slots all the time)",
    )
    group.add_argument(
        "--eviction",
        type=eviction_spec,
        default="lru",
        metavar="|".join(EVICTION),
        help="which expert gives up its slot: the least recently used, the least often used (lfu; with decay[:D] "
        "counts fade by D per token), or by both (lfru) (default: %(default)s)",
    )
    group.add_argument(
        "--direct-io",
        action="store_true",
        help="read experts past the system's page cache, to measure the disk itself (default: through it)",
    )
    group.add_argument(
        "--max-kv-size", type=whole(1), metavar="TOKENS", help="tokens that the KV cache keeps at most (default: all)"
    )
    group.add_argument(
        "--prefill-step-size",
        type=whole(1),
        metavar="TOKENS",
        help="prompt tokens per step (default: what the budget allows, at most 2048)",
    )
    group.add_argument(
        "--kv-bits",
        type=one_of(*KV_BITS),
        metavar="BITS",
        help=f"quantise the KV cache to {_listed(KV_BITS)} bits (default: off)",
    )
    group.add_argument(
        "--kv-group-size",
        type=one_of(*KV_GROUP_SIZES),
        default=64,
        metavar="SIZE",
        help=f"values that share a scale in it: {_listed(KV_GROUP_SIZES)} (default: %(default)s)",
    )
    group.add_argument(
        "--quantized-kv-start",
        type=whole(0),
        default=5000,
        metavar="TOKENS",
        help="quantise it from this many tokens on (default: %(default)s)",
    )


def add_routing_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("routing")
    group.add_argument(
        "--routing",
        metavar="NAME",
        help="cache-prior (prefer experts in memory), price, mass-budget, bounded-regret, max-rank, cumsum, pruning "
        "or original (the model's own choice); parameters may follow, as in cache-prior:strength=0.05,j=1 or "
        "price:delta=0.02 (default: cache-prior)",
    )
    group.add_argument(
        "--exact", action="store_true", help="the same as --routing original: replies are those of the unchanged model"
    )
    group.add_argument(
        "--strength",
        type=number(0),
        metavar="LAMBDA",
        help="of the preference, the paper's λ; 0 is exact (default: 0.1, less if under a third of the experts fit); "
        "cache-prior only",
    )
    group.add_argument(
        "--top-j",
        type=whole(0),
        metavar="J",
        help="each token's J best experts are always taken (default: 2; 1 if a token uses 2 or 3 or with "
        "price; 0 if it uses 1)",
    )


def add_trace_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="append every routing decision to this file, for mlx_moecache simulate and plot (default: none)",
    )


def add_watching_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("watching the routing")
    add_trace_argument(group)
    group.add_argument(
        "--dry-run-strength",
        type=number(0),
        metavar="LAMBDA",
        help="reply exactly, and count what cache-prior of this strength would have swapped and saved (default: off)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temp", type=number(0), default=0.0, help="temperature; 0 takes the likeliest token (default: %(default)s)"
    )
    group.add_argument(
        "--top-p",
        type=number(0, 1),
        default=1.0,
        help="sample from the likeliest tokens that make up this share; 0: the likeliest only (default: %(default)s, "
        "all)",
    )
    group.add_argument(
        "--min-p",
        type=number(0, 1),
        default=0.0,
        help="drop tokens less likely than this share of the likeliest (default: %(default)s, none)",
    )
    group.add_argument(
        "--top-k",
        type=whole(0),
        default=0,
        help="sample from this many likeliest tokens (default: %(default)s, all)",
    )
    group.add_argument(
        "--xtc-probability",
        type=number(0, 1),
        default=0.0,
        help="how often XTC drops the likeliest tokens (default: %(default)s)",
    )
    group.add_argument(
        "--xtc-threshold",
        type=number(0, 0.5),
        default=0.1,
        help="probability from which XTC drops them (default: %(default)s)",
    )
    group.add_argument(
        "--min-tokens-to-keep",
        type=whole(1),
        default=1,
        help="tokens that --min-p keeps at least (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=whole(0, most=2**64 - 1), help="of the random numbers (default: a new one, which is reported)"
    )


def add_refused_arguments(parser: argparse.ArgumentParser) -> None:
    """Register the flags of REFUSED; they stay out of the help text, which names them in its last lines."""
    for flags, reason in REFUSED.items():
        parser.add_argument(*flags, action=Refuse, reason=reason)


def check_contradictions(args: argparse.Namespace) -> None:
    """Refuse shared flags that exclude each other. Raises UsageError."""
    if args.memory is not None and args.slots is not None:
        raise UsageError("--memory and --slots: give one of them; slots say how much memory the experts take")
    if args.slots is not None and args.elastic:
        raise UsageError("--slots and --elastic: slots that move need a budget to stay within; give --memory instead")
    if args.exact and args.routing not in (None, "original"):
        raise UsageError(f"--exact means --routing original, but --routing is {args.routing}; leave one of them out")
    if args.exact and (args.strength or args.top_j is not None):
        flag = "--strength" if args.strength else "--top-j"
        raise UsageError(f"--exact leaves routing as it is, so {flag} has no use; leave one of them out")
    if args.kv_bits is not None and args.max_kv_size is not None:
        raise UsageError("--kv-bits and --max-kv-size: mlx-lm cannot quantise a KV cache of limited size; give one")


def _listed(values: Sequence[int]) -> str:
    return f"{', '.join(map(str, values[:-1]))} or {values[-1]}"
