"""`infir2 verify-weights --engine`: compare a server's OpenAI API with an FP8 directory.

A server does not show its bytes, so the check compares behavior: fixed prompts of token ids,
continued greedily by the server and by our engine on the same directory. It finds wrong or badly
loaded weights. It does not find a small update: a server that sums in another order already differs
by up to MAX_DIFFERENCE in log-probability.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infir2.data import ChatTokenizer, load_tokenizer
from infir2.engines.generate import generate_all
from infir2.engines.http_client import KEY_VARIABLE, ask_once, check_url
from infir2.engines.native import NativeEngine
from infir2.engines.remote import EngineError
from infir2.engines.types import Completion, Request, SamplingParams
from infir2.errors import CheckFailedError, ConfigError, first_line
from infir2.model import Decoder

NUM_PROBES, PROBE_TOKENS, NEW_TOKENS = 4, 24, 12
MIN_AGREEMENT = 0.5  # of the tokens, counted up to each probe's first difference
MAX_DIFFERENCE = 0.25  # mean |log-probability difference| of those tokens


def check_engine_url(url: str) -> None:
    """Raise ConfigError for an address that is none, or that is far and has no key."""
    check_url("--engine", url, os.environ.get(KEY_VARIABLE, ""))


def check_engine(url: str, hf_dir: Path) -> str:
    """Compare the server at `url` (with or without /v1) with `hf_dir`; INFIR2_ENGINE_KEY is its
    key.

    Returns one sentence with the agreement. Raises ConfigError for a server that does not answer as
    the API does, CheckFailedError for one that computes something else.
    """
    check_engine_url(url)
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    with _server_errors(base):
        model = _call(base, "/models")["data"][0]["id"]
    tokenizer = load_tokenizer(hf_dir)
    differences: list[float] = []
    for request, completion in _reference_completions(hf_dir, tokenizer.vocab_size):
        with _server_errors(base):
            answer = _server_logprobs(base, model, request)
            differences += _matching_differences(completion, answer, tokenizer)
    return _verdict(url, hf_dir, differences)


@contextlib.contextmanager
def _server_errors(base: str) -> Iterator[None]:
    try:
        yield
    except (EngineError, ValueError, LookupError, TypeError, OverflowError) as error:
        raise ConfigError(
            f"{base}: returned no completions with log-probabilities ({first_line(error)}); check "
            f"the URL and {KEY_VARIABLE}."
        ) from error


def _reference_completions(hf_dir: Path, vocab_size: int) -> list[tuple[Request, Completion]]:
    engine = NativeEngine(Decoder.from_hf(hf_dir), NUM_PROBES)
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, stop_ids=())
    requests = []
    for probe in range(1, NUM_PROBES + 1):
        positions = range(1, PROBE_TOKENS + 1)
        prompt = [(7919 * probe + 104729 * position) % vocab_size for position in positions]
        requests.append(Request(str(probe), prompt, params, key=probe))
    return list(zip(requests, generate_all(engine, requests), strict=True))


def _server_logprobs(base: str, model: str, request: Request) -> dict[str, Any]:
    """The `logprobs` object of the server's completion: lists `tokens` and `token_logprobs`."""
    body = {
        "prompt": list(request.token_ids),
        "model": model,
        "max_tokens": request.params.max_tokens,
        "temperature": 0,
        "logprobs": 1,
        "ignore_eos": True,
        "return_tokens_as_token_ids": True,
    }
    answer: dict[str, Any] = _call(base, "/completions", body)["choices"][0]["logprobs"]
    return answer


def _matching_differences(
    completion: Completion, answer: dict[str, Any], tokenizer: ChatTokenizer
) -> list[float]:
    """|log-probability difference| of each token up to the first that the server chose differently.

    A server that does not know `return_tokens_as_token_ids` answers with the token's text.
    """
    differences = []
    for token, logprob, text, value in zip(
        completion.token_ids,
        completion.rollout_logprobs,
        answer["tokens"],
        answer["token_logprobs"],
        strict=False,
    ):
        if text not in (f"token_id:{token}", tokenizer.decode([token])):
            break
        differences.append(abs(float(logprob) - float(value)))
    return differences


def _verdict(url: str, hf_dir: Path, differences: list[float]) -> str:
    total = NUM_PROBES * NEW_TOKENS
    agreement, mean = len(differences) / total, sum(differences) / max(1, len(differences))
    result = (
        f"{agreement:.0%} of {total} greedy tokens agree, their log-probabilities within "
        f"{mean:.3g} on average"
    )
    if agreement < MIN_AGREEMENT or not mean <= MAX_DIFFERENCE:
        raise CheckFailedError(
            f"{url} does not compute what {hf_dir} defines: {result} (required: "
            f"{MIN_AGREEMENT:.0%}, {MAX_DIFFERENCE})."
        )
    return f"{url}: {result}."


def _call(base: str, route: str, body: dict[str, Any] | None = None) -> Any:
    return ask_once(base, os.environ.get(KEY_VARIABLE, ""), route, body)
