"""Options that say what generates, for the verbs that start a server."""

import importlib.util
import math
from typing import TYPE_CHECKING, Any

from infir2.cli.arguments import Parser
from infir2.errors import ConfigError

if TYPE_CHECKING:
    from infir2.engines.engine_options import EngineOptions

_NAMES = ("engine", "python", "server_option", "tensor_parallel", "memory_fraction")


def add_engine_options(parser: Parser) -> None:
    """Those of `EngineOptions`."""
    parser.add_argument(
        "--engine",
        choices=("native", "sglang", "vllm"),
        default="native",
        help="what generates (default native); SGLang and vLLM have an environment of their own",
    )
    python_help = "interpreter of that environment, such as sglang-env/bin/python"
    parser.add_argument("--python", default="", metavar="FILE", help=python_help)
    option_help = "for SGLang's or vLLM's own command line; may be repeated"
    parser.add_argument(
        "--server-option", action="append", default=[], metavar="OPTION", help=option_help
    )
    parallel_help = "GPUs of one SGLang or vLLM (default 1)"
    parser.add_argument(
        "--tensor-parallel", type=positive_integer, default=1, metavar="N", help=parallel_help
    )
    fraction_help = "of a GPU's memory for SGLang or vLLM (default: its own)"
    parser.add_argument(
        "--memory-fraction", type=_below_one, default=0.0, metavar="F", help=fraction_help
    )


def require_server_packages(command: str) -> None:
    """Raise ConfigError where the packages of our server are not installed."""
    for name in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"infir2 {command} needs {name}, which is not installed: "
                "pip install 'infir2[serve]'."
            )


def take_engine_options(values: dict[str, Any]) -> "EngineOptions":
    """Those of a parsed command line, which are removed from `values`."""
    from infir2.engines.engine_options import EngineOptions

    taken = {name: values.pop(name) for name in _NAMES}
    return EngineOptions(**taken | {"server_option": tuple(taken["server_option"])})


def positive_integer(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ValueError
    return int(text)


def _below_one(text: str) -> float:
    if fraction(text) == 1:
        raise ValueError
    return float(text)


_below_one.__name__ = "fraction below 1"  # what argparse calls it


def fraction(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise ValueError
    return float(text)


def temperature(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)
