"""The console script `mlx_moecache`: finds the command and hands over. A command is imported only when it is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .console.arguments import did_you_mean
from .console.command import run
from .errors import UsageError

COMMANDS = {  # name of the command and of its module -> what it does
    "generate": "write a reply to one prompt and say what the expert cache did",
    "chat": "talk to a model, and look into its expert cache meanwhile",
    "server": "answer requests of OpenAI's API over HTTP, and show the expert cache at work",
    "evaluate": "measure what routing strategies cost in quality and save in reads",
    "info": "say what a model is made of and how much memory it needs, without loading it",
    "plan": "say whether a model will run here or on a phone, and how fast it will read",
    "repack": "write a copy of a model in which each expert is one piece on disk",
    "sweep": "measure many strategies, strengths and numbers of slots into one results file",
    "simulate": "replay a recorded trace through other caches: misses, reads, predicted speed",
    "plot": "draw figures from results of evaluate and sweep, and from traces",
    "doctor": "check that it works on this machine, and write a short report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's arguments) names and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return run(lambda: _dispatch(arguments))


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    name, *rest = arguments
    if name == "--version":
        print(f"mlx_moecache {__version__}")
        return 0
    if name not in COMMANDS:
        kind = "flag" if name.startswith("-") else "command"
        advice = did_you_mean(name, [*COMMANDS, "--version", "--help"])
        raise UsageError(f"unknown {kind} {name}{advice} (commands: {', '.join(COMMANDS)})")
    code: int = import_module(f"{__package__}.{name}").main(rest)
    return code


def overview() -> str:
    """What a bare `mlx_moecache` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "Mixture-of-Experts models larger than memory, on MLX.",
            "",
            "usage: mlx_moecache COMMAND [flags]",
            "",
            *lines,
            "",
            "mlx_moecache COMMAND -h shows the flags of a command, mlx_moecache --version the version.",
        ]
    )
