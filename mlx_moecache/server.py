"""`mlx_moecache server`, also `python -m mlx_moecache.server`: OpenAI's API for one model over HTTP.

Of mlx-lm it uses what is the same in all versions that we support: samplers, logits processors, the tokenizer with its
chat templates, tool parsers and marks of reasoning. mlx_lm.server itself cannot serve here: its generation thread
loads models of its own and runs mlx-lm's step, which knows no phases, its line is unlimited, a client that waits or
does not stream is not missed when it leaves, a body is read however large and slow it is, any web page may use it, and
what goes wrong after the first byte ends in a broken stream. So line, HTTP and formats are ours, in `serving`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from .console import arguments
from .console.command import INTERRUPTED, run
from .console.emulation import add_device_arguments, check_device
from .console.open_conversation import OpenedConversation, open_conversation
from .console.prompt import parse_template_options
from .console.terminal import StatusLine, write_notes
from .console.warm_start_options import add_warm_start_arguments
from .demo import DEMO
from .errors import UsageError

if TYPE_CHECKING:
    from .serving.access import Access
    from .serving.http_server import HttpServer
    from .serving.json_handler import App

KEY_VARIABLE = "MLX_MOECACHE_API_KEY"
CONNECTIONS = 64  # beside those of requests in line
FAREWELL_SECONDS = 2.0  # for clients to be told that the server stops

EXAMPLES = f"""examples:
  mlx_moecache server --slots 30
  mlx_moecache server --model mlx-community/Qwen3-30B-A3B-4bit --memory 6GB --max-context 8192
  {KEY_VARIABLE}=... mlx_moecache server --host 0.0.0.0

  curl http://127.0.0.1:8080/v1/chat/completions -d '{{"messages": [{{"role": "user", "content": "Hello"}}]}}'

/v1/chat/completions, /v1/completions and /v1/models as OpenAI's clients know them, /health, /metrics for Prometheus,
and / to watch the expert cache. One reply is made at a time, and a request that goes on with the conversation before
it computes only what is new. Ctrl-C ends the server."""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The parser of this command; MLX is not imported for it."""
    parser = arguments.Parser(
        prog="mlx_moecache server",
        usage="%(prog)s [--model MODEL] [--memory SIZE | --slots N] [--port N] [flags]",
        description="Answer requests of OpenAI's API with a Mixture-of-Experts model whose experts stay on disk.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_model_arguments(parser)
    _add_server_arguments(parser)
    _add_limit_arguments(parser)
    arguments.add_memory_arguments(parser)
    add_warm_start_arguments(parser, default=True, why="as it is read before the first request comes")
    add_device_arguments(parser)
    arguments.add_routing_arguments(parser)
    arguments.add_sampling_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no line per request (default: one, on stderr)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (default: off)")
    arguments.add_refused_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (see command.py); 0 after SIGTERM."""
    given = sys.argv[1:] if argv is None else list(argv)
    return run(lambda: _serve(given), debug="--debug" in given)


def _serve(argv: list[str]) -> int:
    args = setup_arg_parser().parse_args(argv)
    access = _check(args)
    import mlx.core as mx

    from .console import options
    from .serving.handler import Handler
    from .serving.http_server import HttpServer

    handler = type("BoundHandler", (Handler,), {})
    # The address is taken before the model is loaded, which may last; connections are accepted after it.
    server = HttpServer(args.host, args.port, handler, max_connections=CONNECTIONS + args.max_waiting)
    try:
        with StatusLine(sys.stderr) as status:
            status.show("loading ...")
            with redirect_stdout(sys.stderr):  # model code that users trust may print
                mx.random.seed(options.seed_of(args))
                opened = open_conversation(args, status)
        with opened.emulated.explained():
            return _answer(args, access, server, handler, opened)
    finally:
        server.server_close()


def _check(args: argparse.Namespace) -> Access:
    """Refuse what can be refused without importing MLX."""
    from .serving.access import Access, is_loopback, is_origin

    args.dry_run_strength = None  # what belongs to one reply has no flag here
    arguments.check_contradictions(args)
    check_device(args)
    args.chat_template_config = parse_template_options(args.chat_template_config)
    key = args.api_key if args.api_key is not None else os.environ.get(KEY_VARIABLE)
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise UsageError("the API key must be printable ASCII characters without blanks around them")
    if key is None and not is_loopback(args.host):
        raise UsageError(
            f"--host {args.host} lets other machines use this server, so it needs an API key: set {KEY_VARIABLE}, or "
            "leave --host out to serve this machine only"
        )
    for origin in args.allow_origin:
        if not is_origin(origin):
            raise UsageError(f"--allow-origin needs an origin such as https://example.org, not {origin!r}")
    return Access(args.host, tuple(o.lower() for o in args.allow_origin), key)


def _answer(
    args: argparse.Namespace,
    access: Access,
    server: HttpServer,
    handler: Any,
    opened: OpenedConversation,
) -> int:
    """Serve until a signal comes. This thread, the one that loaded the model, makes the replies."""
    from .enforce import OverLimitError
    from .serving.engine import Engine
    from .serving.json_handler import App
    from .serving.live import LiveView
    from .serving.prompts import Prompts
    from .serving.worker import Worker

    conversation, emulated, warm = opened.conversation, opened.emulated, opened.warm
    tokenizer, model = conversation.tokenizer, conversation.model
    limits = _limits(args, opened, tokenizer)
    live = LiveView(model, name=limits.model, has_template=bool(tokenizer.has_chat_template))
    engine = Engine(
        conversation,
        Prompts(tokenizer, args.chat_template_config),
        live=live,
        check=lambda: emulated.check(model, conversation.kv_cache),
        before_use=warm.finish,
    )
    worker = Worker(engine, max_waiting=args.max_waiting, fatal=OverLimitError)
    app = App(
        worker,
        limits,
        access,
        live,
        args.max_context,
        args.max_request_bytes,
        log=(lambda line: None) if args.quiet else _log,
    )
    handler.app = app
    url = _url(args.host, server.port)
    notes = [f"{limits.model} at {url}/v1 · page {url}/ · metrics {url}/metrics · Ctrl-C ends"]
    if emulated.emulation is not None:
        notes += emulated.emulation.lines()
    with _signals(worker.stop) as received:
        live.start()
        server.open()
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        try:
            write_notes(notes, sys.stderr)
            warm.begin()
            worker.run()
        finally:
            worker.stop()
            _say_goodbye(app)
            server.shutdown()
            live.stop()
            warm.save()
            write_notes(warm.notes, sys.stderr)
    return INTERRUPTED if signal.SIGINT in received else 0


def _say_goodbye(app: App) -> None:
    """Wait, not for long, until the clients of unfinished replies know."""
    until = time.monotonic() + FAREWELL_SECONDS
    while app.requests.open and time.monotonic() < until:
        time.sleep(0.02)


@contextmanager
def _signals(stop: Any) -> Iterator[list[int]]:
    """Inside, the first SIGINT or SIGTERM calls `stop` and is noted, the second one ends the process at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        stop()
        for s in previous:
            signal.signal(s, signal.SIG_DFL)

    wanted = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
    previous = {s: signal.signal(s, handle) for s in wanted}
    try:
        yield received
    finally:
        for s, old in previous.items():
            signal.signal(s, old)


def _limits(args: argparse.Namespace, opened: OpenedConversation, tokenizer: Any) -> Any:
    from .serving.requests import Limits, Sampling

    name = opened.name
    # A folder on this machine is nobody's business: clients see its last part.
    shown = Path(name).resolve().name if Path(name).exists() else name
    return Limits(
        model=shown,
        aliases=tuple({name, args.model or DEMO, "default", "default_model"}),
        max_tokens=args.max_tokens,
        vocabulary=opened.vocabulary or len(tokenizer.get_vocab()),
        has_tools=bool(tokenizer.has_chat_template and tokenizer.has_tool_calling),
        sampling=Sampling(
            temperature=args.temp,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            min_tokens_to_keep=args.min_tokens_to_keep,
            xtc_probability=args.xtc_probability,
            xtc_threshold=args.xtc_threshold,
        ),
    )


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log(line: str) -> None:
    try:
        print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # nobody reads the log; the server goes on
        return


def _add_server_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    group.add_argument(
        "--port", type=arguments.whole(0, most=65535), default=8080, help="0 takes a free one (default: %(default)s)"
    )
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"what clients must send as Authorization: Bearer KEY; other users of this machine can see flags, so "
        f"rather set {KEY_VARIABLE} (default: none)",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages of this origin, such as https://example.org, use the server; may be repeated (default: "
        "only its own page)",
    )
    group.add_argument(
        "--chat-template-config", metavar="JSON", help="values for the chat template, a JSON object (default: {})"
    )


def _add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max-tokens",
        "-m",
        type=arguments.whole(1),
        default=1024,
        metavar="N",
        help="end a reply after so many tokens, or fewer if the request says so (default: %(default)s)",
    )
    group.add_argument(
        "--max-context",
        type=arguments.whole(2),
        default=4096,
        metavar="TOKENS",
        help="the longest prompt and reply together: memory for it is reserved up front (default: %(default)s)",
    )
    group.add_argument(
        "--max-waiting",
        type=arguments.whole(0, most=10_000),
        default=16,
        metavar="N",
        help="requests that may wait while one is answered; more are sent away (default: %(default)s)",
    )
    group.add_argument(
        "--max-request-bytes",
        type=arguments.whole(1, most=1 << 30),
        default=4 << 20,
        metavar="N",
        help="the largest request body (default: %(default)s)",
    )


if __name__ == "__main__":
    sys.exit(main())
