"""Verb serve."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from infir2.cli.arguments import Parser
from infir2.cli.engine_options import (
    add_engine_options,
    positive_integer,
    require_server_packages,
    take_engine_options,
)


def serve(arguments: Sequence[str]) -> None:
    """infir2 serve MODEL [--port N] ..."""
    options = vars(_parser().parse_args(arguments))
    require_server_packages("serve")
    from infir2.convert.serving import require_loadable
    from infir2.engines.server.opening import ServerOptions
    from infir2.engines.server.run import run_server

    checked = ServerOptions(engine=take_engine_options(options), **options)
    checked.check()
    if checked.engine.engine != "native":
        require_loadable("MODEL", checked.model, checked.engine.tensor_parallel)
    run_server(checked)


def _parser() -> Parser:
    parser = Parser(
        prog="infir2 serve",
        description="Serves a model by OpenAI's API until SIGTERM or Ctrl-C.",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="Hugging Face directory, FP8 or BF16"
    )
    _add_address(parser)
    _add_engine(parser)
    return parser


def _add_address(parser: Parser) -> None:
    """Where the server is, and who may use it."""
    parser.add_argument("--host", default="127.0.0.1", help="address (default 127.0.0.1)")
    parser.add_argument("--port", type=port_number, default=8000, help="0: any (default 8000)")
    name_help = "name of the model (default: the directory's)"
    parser.add_argument("--served-name", default="", metavar="NAME", help=name_help)
    key_help = "requires its content as the clients' key; needed where --host is not loopback"
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help=key_help)
    origin_help = "pages of this origin may use the server from a browser; may be repeated"
    parser.add_argument(
        "--allow-origin",
        type=origin,
        action="append",
        default=[],
        metavar="ORIGIN",
        help=origin_help,
    )
    updates_help = "lets a trainer with the key send new weights; see docs/engines.md"
    parser.add_argument("--weight-updates", action="store_true", help=updates_help)


def _add_engine(parser: Parser) -> None:
    """What generates, and how much at a time."""
    add_engine_options(parser)
    directory_help = "for SGLang's or vLLM's log and command line (default: a temporary one)"
    parser.add_argument("--engine-dir", type=Path, metavar="DIR", help=directory_help)
    cache_help = (
        "memory of the native engine's KV cache (default: half of a GPU's free memory, 1 GiB on a "
        "CPU); on a CPU also of vLLM's"
    )
    parser.add_argument("--cache-gib", type=gibibytes, default=0.0, metavar="GIB", help=cache_help)
    for name, default in (("running", 64), ("waiting", 512)):
        parser.add_argument(
            f"--max-{name}-requests",
            type=positive_integer,
            default=default,
            metavar="N",
            help=f"most {name} requests (default {default})",
        )


def gibibytes(text: str) -> float:
    if not 0 < float(text) < 2**20:
        raise ValueError
    return float(text)


def origin(text: str) -> str:
    """As browsers send it. Another text would match no page, without a word."""
    if text not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no origin: write SCHEME://HOST[:PORT], such as https://example.com"
        )
    return text


def port_number(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise ValueError
    return int(text)
