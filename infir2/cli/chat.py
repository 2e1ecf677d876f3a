"""Verb chat."""

from collections.abc import Sequence
from pathlib import Path

from infir2.cli.arguments import Parser
from infir2.cli.engine_options import (
    add_engine_options,
    fraction,
    positive_integer,
    require_server_packages,
    take_engine_options,
    temperature,
)
from infir2.errors import ConfigError
from infir2.terminal import pulse

_SAMPLING = ("temperature", "top_p", "max_tokens", "seed")


def chat(arguments: Sequence[str]) -> None:
    """infir2 chat MODEL | --url URL [--beside MODEL]"""
    options = _parser().parse_args(arguments)
    if options.model:
        require_server_packages("chat MODEL")
    with pulse("chat is starting"):
        engine = take_engine_options(vars(options))
        from infir2.engines.chat import ChatOptions, run_chat

    values = {name: getattr(options, name) for name in _SAMPLING}
    sampling = {name: value for name, value in values.items() if value is not None}
    given = (options.model, options.url, options.system, sampling, engine, options.beside)
    run_chat(ChatOptions(*given))


def _parser() -> Parser:
    parser = Parser(
        prog="infir2 chat",
        description=(
            "Talks to a model: each line of the input is a message. /reset begins a new "
            "conversation, /quit or Ctrl-C ends, Ctrl-C during a response stops that."
        ),
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=_model_directory,
        metavar="MODEL",
        help="Hugging Face directory, for which a server is started",
    )
    url_help = "a running server instead; its key is INFIR2_ENGINE_KEY"
    parser.add_argument("--url", default="", metavar="URL", help=url_help)
    parser.add_argument(
        "--beside",
        type=Path,
        metavar="MODEL",
        help="a second model that answers too, such as the BF16 export of an FP8 one",
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="system message")
    parser.add_argument(
        "--temperature", type=temperature, default=0.6, help="default 0.6; 0: greedy"
    )
    parser.add_argument("--top-p", type=fraction, default=0.95, help="default 0.95")
    tokens_help = "of a response (default: the context)"
    parser.add_argument("--max-tokens", type=positive_integer, metavar="N", help=tokens_help)
    parser.add_argument("--seed", type=int, help="makes responses repeatable")
    add_engine_options(parser)
    return parser


def _model_directory(text: str) -> Path:
    if text.startswith(("http://", "https://")) and "huggingface.co/" not in text:
        raise ConfigError(f"MODEL: {text} is the address of a server; write --url {text}.")
    return Path(text)
