"""`mlx_moecache chat`, also `python -m mlx_moecache.chat`: a conversation, and commands that look into the cache."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .console import arguments
from .console.command import run
from .console.emulation import add_device_arguments, check_device
from .console.open_conversation import open_conversation
from .console.terminal import StatusLine
from .console.warm_start_options import WarmStart, add_warm_start_arguments
from .demo import DEMO
from .errors import UsageError

if TYPE_CHECKING:
    from .console.chat_session import ChatSession

EXAMPLES = """examples:
  mlx_moecache chat --slots 30
  mlx_moecache chat mlx-community/Qwen3-30B-A3B-4bit --memory 6GB --temp 0.7
  printf 'What is a fox?\\nAnd a wolf?\\n' | mlx_moecache chat mlx-community/Qwen3-30B-A3B-4bit --exact

Several lines are one message between two lines with \"\"\", or pasted. A line that begins with / is a command: /help
lists them. Ctrl-C ends a reply and keeps the conversation, twice in one reply it ends the program; Ctrl-D leaves.
Without a terminal every line of standard input is a message."""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The parser of this command; MLX is not imported for it."""
    parser = arguments.Parser(
        prog="mlx_moecache chat",
        usage="%(prog)s [MODEL] [--memory SIZE | --slots N] [flags]",
        description="Talk to a Mixture-of-Experts model whose experts stay on disk.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "position", nargs="?", metavar="MODEL", help=f"the same as --model (default: {DEMO}, the bundled model)"
    )
    arguments.add_model_arguments(parser)
    _add_chat_arguments(parser)
    arguments.add_memory_arguments(parser)
    add_warm_start_arguments(parser, default=True, why="as it is read while you type")
    add_device_arguments(parser)
    arguments.add_routing_arguments(parser)
    arguments.add_sampling_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (default: off)")
    arguments.add_refused_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (see command.py)."""
    given = sys.argv[1:] if argv is None else list(argv)
    return run(lambda: _chat(given), debug="--debug" in given)


@dataclass(frozen=True)
class _Ready:
    session: ChatSession
    warm: WarmStart


def _chat(argv: list[str]) -> int:
    args = setup_arg_parser().parse_args(argv)
    _check(args)
    with StatusLine(sys.stderr) as status:
        status.show("loading ...")
        with redirect_stdout(sys.stderr):  # model code that users trust may print
            ready = _load(args, status)
    from .console.chat_loop import Console, completions, converse
    from .console.line_editor import open_editor
    from .console.line_history import LineHistory, state_folder

    session, warm = ready.session, ready.warm
    console = Console(debug=args.debug)
    folder = state_folder()
    history = LineHistory(None if folder is None else folder / "chat_history")
    editor = open_editor(lambda line: completions(line, session), history)
    console.welcome(session, interactive=editor.interactive)
    if editor.interactive:  # else the first line is there already
        warm.begin()
    try:
        with session.emulated.explained():
            return converse(session, console, editor, warm.finish)
    finally:
        warm.save()
        console.note(warm.notes)


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be refused without importing MLX."""
    if args.position is not None and args.model is not None:
        raise UsageError(f"the model is given twice, {args.position} and --model {args.model}; leave one of them out")
    args.model = args.position if args.model is None else args.model
    args.dry_run_strength = None  # what belongs to one reply has no flag here
    arguments.check_contradictions(args)
    check_device(args)


def _load(args: argparse.Namespace, status: StatusLine) -> _Ready:
    from .console import options
    from .console.chat_session import ChatSession, ReplySettings

    def check(tokenizer: Any) -> None:
        if args.system_prompt is not None and not tokenizer.has_chat_template:
            raise UsageError("this model has no chat template, so --system-prompt has no use; leave it out")

    opened = open_conversation(args, status, check)
    settings = ReplySettings(
        max_tokens=args.max_tokens,
        temp=args.temp,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        min_tokens_to_keep=args.min_tokens_to_keep,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        seed=options.seed_of(args),
        verbose=args.verbose,
    )
    session = ChatSession(
        opened.name,
        opened.folder,
        opened.conversation,
        settings,
        opened.emulated,
        system=args.system_prompt,
        vocabulary=opened.vocabulary,
    )
    return _Ready(session, opened.warm)


def _add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("conversation")
    group.add_argument("--system-prompt", help="system message for the chat template (default: none)")
    group.add_argument(
        "--max-tokens",
        "-m",
        type=arguments.whole(1, also=-1),
        default=1024,
        metavar="N",
        help="end a reply after so many tokens; -1: when the context is full (default: %(default)s)",
    )
    group.add_argument(
        "--max-context",
        type=arguments.whole(2),
        default=4096,
        metavar="TOKENS",
        help="the longest conversation, replies included: memory for it is reserved up front (default: %(default)s)",
    )
    group.add_argument(
        "--verbose",
        action="store_true",
        help="all statistics after a reply, not one line; /set verbose (default: one line)",
    )


if __name__ == "__main__":
    sys.exit(main())
