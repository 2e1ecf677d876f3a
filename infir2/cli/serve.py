"""Verb serve."""

from collections.abc import Sequence
from pathlib import Path

from infir2.cli.arguments import Parser
from infir2.errors import ConfigError


def serve(arguments: Sequence[str]) -> None:
    """infir2 serve MODEL [--port N] ..."""
    options = vars(_parser().parse_args(arguments))
    try:
        from infir2.engines.server.run import ServerOptions, run_server
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn"):
            raise
        raise ConfigError(
            f"infir2 serve needs {error.name}, which is not installed: pip install 'infir2[serve]'."
        ) from error
    run_server(ServerOptions(**options))


def _parser() -> Parser:
    parser = Parser(
        prog="infir2 serve",
        description="Serves a model by OpenAI's API until SIGTERM or Ctrl-C.",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="Hugging Face directory, FP8 or BF16"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address (default 127.0.0.1)")
    parser.add_argument(
        "--port", type=port_number, default=8000, help="0: any free one (default 8000)"
    )
    parser.add_argument(
        "--served-name", default="", metavar="NAME", help="name of the model (default: directory's)"
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="requires its content as the clients' key; needed where --host is not loopback",
    )
    parser.add_argument(
        "--cache-gib",
        type=float,
        default=0.0,
        metavar="GIB",
        help="memory of the KV cache (default: half of a GPU's free memory, 1 GiB on a CPU)",
    )
    for name, default in (("running", 64), ("waiting", 512)):
        parser.add_argument(
            f"--max-{name}-requests",
            type=positive_integer,
            default=default,
            metavar="N",
            help=f"most {name} requests (default {default})",
        )
    parser.add_argument(
        "--weight-updates",
        action="store_true",
        help="lets a trainer with the key send new weights; see docs/serving.md",
    )
    return parser


def port_number(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise ValueError
    return int(text)


def positive_integer(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ValueError
    return int(text)
