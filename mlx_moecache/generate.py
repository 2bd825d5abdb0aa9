"""`mlx_moecache generate`, also `python -m mlx_moecache.generate`: one prompt, its reply, and what the cache did.

The module is callable: `from mlx_moecache import generate` means the function of generation.py, but once this module
is imported the import system binds the same name to it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Generator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from . import __version__
from .console import arguments
from .console.command import INTERRUPTED, run
from .console.emulated_run import EmulatedRun
from .console.emulation import add_device_arguments, check_device, emulation_of
from .console.interrupt import Interrupt, Interrupted
from .console.prompt import Prompt, check_prompt, parse_template_options, read_text, tokenise
from .console.report import Reply, as_json, statistics
from .console.terminal import StatusLine, is_terminal, write_notes
from .console.warm_start_options import WarmStart, add_warm_start_arguments
from .console.watching import check_watching, dry_run_line, watching
from .demo import DEMO_NAME, demo_model, named_model
from .errors import UsageError

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from .footprint import KVOptions
    from .generation import Response, Sampler

EXAMPLES = """examples:
  mlx_moecache generate --slots 30 --prompt "Tell me a story about a fox."
  mlx_moecache generate --model mlx-community/Qwen1.5-MoE-A2.7B-Chat-4bit --memory 4GB -p "Why is the sky blue?"
  cat question.txt | mlx_moecache generate --exact --json -p - | jq -r .text

Statistics follow on stderr. A hit: the selected expert was in memory when its layer ran, counted per token, layer and
expert. Prefill is always exact. "exact": routing changed no selection of this reply.

Flags of mlx_lm.generate that are refused, with the reason when they are given:
  """


def setup_arg_parser() -> argparse.ArgumentParser:
    """The parser of this command; MLX is not imported for it."""
    refused = "\n  ".join("/".join(flags) for flags in arguments.REFUSED)
    parser = arguments.Parser(
        prog="mlx_moecache generate",
        usage="%(prog)s [--model MODEL] [--memory SIZE | --slots N] [--prompt TEXT] [flags]",
        description="Write a reply to one prompt with a Mixture-of-Experts model whose experts stay on disk.",
        epilog=EXAMPLES + refused,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_model_arguments(parser)
    _add_prompt_arguments(parser)
    arguments.add_memory_arguments(parser)
    add_warm_start_arguments(parser, default=False, why="as a prompt that is there already would wait for it")
    add_device_arguments(parser)
    arguments.add_routing_arguments(parser)
    arguments.add_watching_arguments(parser)
    arguments.add_sampling_arguments(parser)
    _add_output_arguments(parser)
    arguments.add_refused_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (see command.py)."""
    given = sys.argv[1:] if argv is None else list(argv)
    return run(lambda: _generate(given), debug="--debug" in given)


@dataclass(frozen=True)
class _Ready:
    """A loaded model and everything the reply needs."""

    name: str
    folder: Path
    model: nn.Module
    tokenizer: TokenizerWrapper
    tokens: list[int]
    cached_tokens: int
    kv: KVOptions
    kv_cache: list[Any]
    sampler: Sampler
    seed: int
    emulated: EmulatedRun
    warm: WarmStart


def _generate(argv: list[str]) -> int:
    args = setup_arg_parser().parse_args(argv)
    prompt = _check(args)
    with StatusLine(sys.stderr, enabled=args.verbose and not args.json) as status:
        status.show("loading ...")
        # Model code that users trust may print; stdout is for the reply alone.
        with redirect_stdout(sys.stderr):
            ready = _load(args, prompt, status)
        with Interrupt() as interrupt:
            return _answer(args, ready, interrupt, status)


def _check(args: argparse.Namespace) -> Prompt:
    """Refuse what can be refused without importing MLX, and read the prompt."""
    arguments.check_contradictions(args)
    check_device(args)
    check_watching(args)
    if args.max_tokens == -1 and args.max_kv_size is None:
        raise UsageError("--max-tokens -1 (no limit) needs --max-kv-size: memory for the KV cache is reserved up front")
    prompt = Prompt(
        read_text(args.prompt),
        args.system_prompt,
        args.prefill_response,
        use_template=not args.ignore_chat_template,
        template_options=parse_template_options(args.chat_template_config),
    )
    check_prompt(prompt)
    return prompt


def _load(args: argparse.Namespace, prompt: Prompt, status: StatusLine) -> _Ready:
    """Open, plan and load. KV cache is reserved for exactly this prompt and the longest reply that was asked for."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from .checkpoints.hub import resolve_model
    from .console import options
    from .console.kv_file import read_saved_prompt
    from .footprint import KV_STEP
    from .loading import MemoryOptions, OpenedModel

    options.check_before_download(args)
    saved = None if args.prompt_cache_file is None else read_saved_prompt(Path(args.prompt_cache_file))
    kv = options.kv_options(args)
    given = args.model if saved is None or args.model is not None else saved.model
    # Without a flag it is the bundled model, whatever folders there are; a folder called demo is what --model demo is.
    source, name = (str(demo_model()), DEMO_NAME) if given is None else named_model(given)
    if saved is not None:
        kv = saved.kv_options(kv)
        saved.check_model(source)
    status.clear()  # a download draws its own bars
    folder = resolve_model(
        source,
        revision=args.revision,
        progress=is_terminal(sys.stderr) and not args.json,
    )
    status.show(f"loading {name} ...")
    seed = options.seed_of(args)
    mx.random.seed(seed)  # before the model is built, which draws numbers: as in mlx-lm, so that replies agree
    opened = OpenedModel(folder, trust_remote_code=args.trust_remote_code)
    extra_eos = (*args.extra_eos_token, *(saved.eos_tokens if saved is not None else ()))
    tokenizer = opened.tokenizer(extra_eos_tokens=extra_eos)
    tokens = tokenise(prompt, tokenizer, is_suffix=saved is not None)
    if saved is not None:
        saved.check_layers(len(make_prompt_cache(opened.model)))
    options.check_kv(opened.model, kv)
    sampler = options.sampler_of(args, tokenizer, options.vocabulary_of(opened.config))
    cached = 0 if saved is None else saved.tokens
    reply_tokens = args.max_tokens if args.max_tokens > 0 else args.max_kv_size
    emulated = EmulatedRun(emulation_of(args))
    memory = MemoryOptions(
        memory=emulated.budget or args.memory,
        slots=args.slots,
        # A saved cache ends inside of a buffer, and the buffers grow from there: up to one step more.
        max_context=cached + len(tokens) + reply_tokens + (KV_STEP - 1 if cached else 0),
        max_prompt=len(tokens),
        prefill_step_size=args.prefill_step_size,
        kv=kv,
        elastic=args.elastic,
    )
    with emulated.explained():
        model = opened.load(memory, options.cache_options(args))
    warm = WarmStart(args, folder, model)
    warm.read()
    kv_cache = make_prompt_cache(model, max_kv_size=kv.max_size) if saved is None else saved.cache
    return _Ready(
        name,
        folder,
        model,
        tokenizer,
        tokens,
        cached,
        kv,
        kv_cache,
        sampler,
        seed,
        emulated,
        warm,
    )


def _answer(args: argparse.Namespace, ready: _Ready, interrupt: Interrupt, status: StatusLine) -> int:
    from .console.usage import cache_use, memory_use

    with ready.emulated.explained(), watching(args, ready.folder, ready.name, ready.model) as dry_run:
        reply = _stream(args, ready, interrupt, status)
    ready.warm.save()
    memory = memory_use(ready.model, ready.kv_cache, not_charged=ready.emulated.not_charged)
    cache, plan = cache_use(ready.model), ready.model.memory_plan
    estimate = None if dry_run is None else dry_run.estimate()
    emulation = ready.emulated.emulation
    if args.json:
        run_facts = {"model": ready.name, "seed": ready.seed, "version": __version__}
        run_facts["emulation"] = None if emulation is None else emulation.as_json()
        run_facts["warm_start"] = ready.warm.as_json()
        run_facts["dry_run"] = None if estimate is None else {**asdict(estimate), "saved": estimate.saved}
        print(json.dumps({**as_json(reply, memory, cache, plan), **run_facts}, allow_nan=False), flush=True)
    elif args.verbose:
        seed = ready.seed if args.temp > 0 else None
        notes = statistics(reply, memory, cache, plan, seed=seed) + ready.warm.lines()
        if emulation is not None:
            notes += emulation.lines()
        if estimate is not None:
            notes.append(dry_run_line(estimate))
        write_notes(notes, sys.stderr)
    return INTERRUPTED if reply.finish_reason == "interrupt" else 0


def _stream(args: argparse.Namespace, ready: _Ready, interrupt: Interrupt, status: StatusLine) -> Reply:
    """Generate; without --json the text goes to stdout as it appears and ends with a line break."""
    from .generation import stream_generate

    status.clear()
    segments: list[str] = []
    last: Response | None = None

    def progress(done: int, total: int) -> None:
        interrupt.check()
        ready.emulated.check(ready.model, ready.kv_cache)
        if 0 < done < total - 1:  # more than one step, so it takes a while
            status.show(f"reading the prompt: {done:,} of {total:,} tokens")

    responses = cast(
        "Generator[Response, None, None]",
        stream_generate(
            ready.model,
            ready.tokenizer,
            ready.tokens,
            max_tokens=args.max_tokens,
            sampler=ready.sampler,
            prompt_cache=ready.kv_cache,
            prefill_step_size=args.prefill_step_size,
            kv_bits=ready.kv.bits,
            kv_group_size=ready.kv.group_size,
            quantized_kv_start=ready.kv.quantized_start,
            prompt_progress=progress,
        ),
    )
    try:
        for last in responses:
            if not segments:
                status.clear()
            segments.append(last.text)
            if not args.json:
                print(last.text, end="", flush=True)
            ready.emulated.check(ready.model, ready.kv_cache)
            if interrupt.requested:
                break
    except Interrupted:
        status.clear()
    finally:
        responses.close()
        text = "".join(segments)
        if not args.json and segments and not text.endswith("\n"):
            print(flush=True)
    if last is None:
        return Reply("", "interrupt", len(ready.tokens), ready.cached_tokens, 0, None, None)
    return Reply(
        text,
        last.finish_reason or "interrupt",
        last.prompt_tokens,
        ready.cached_tokens,
        last.generation_tokens,
        last.prompt_tps,
        last.generation_tps if last.generation_tokens > 1 else None,
    )


def _add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "--prompt", "-p", default="hello", help='the text to answer; "-" reads standard input (default: %(default)s)'
    )
    group.add_argument("--system-prompt", help="system message for the chat template (default: none)")
    group.add_argument("--prefill-response", metavar="TEXT", help="how the reply must begin (default: freely)")
    group.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="continue the prompt as it stands (default: use the tokenizer's chat template if it has one)",
    )
    group.add_argument(
        "--chat-template-config", metavar="JSON", help="values for the chat template, a JSON object (default: {})"
    )
    group.add_argument(
        "--prompt-cache-file",
        metavar="FILE",
        help="KV cache of a text that comes before the prompt, made by mlx_lm.cache_prompt (default: none)",
    )


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--max-tokens",
        "-m",
        type=arguments.whole(1, also=-1),
        default=100,
        metavar="N",
        help="end the reply after so many tokens; -1: no limit, needs --max-kv-size (default: %(default)s)",
    )
    group.add_argument(
        "--verbose",
        type=arguments.boolean,
        default=True,
        metavar="BOOL",
        help="False or F: print only the reply, no statistics (default: %(default)s)",
    )
    group.add_argument(
        "--json", action="store_true", help="print one JSON object instead of text and statistics (default: off)"
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error (default: off)")


class _CallableModule(ModuleType):
    """A module that passes calls on to generation.generate."""

    def __call__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        prompt: str | Sequence[int] | mx.array,
        *,
        max_tokens: int = 256,
        sampler: Sampler | None = None,
    ) -> str:
        from .generation import generate

        return generate(model, tokenizer, prompt, max_tokens=max_tokens, sampler=sampler)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
