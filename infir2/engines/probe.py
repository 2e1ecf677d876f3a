"""Whether a server that speaks the OpenAI API computes what an FP8 directory says.

A server gives no bytes, so this compares behaviour: fixed prompts of token ids, continued greedily, against our engine on the
same directory. It finds wrong or badly loaded weights. It cannot tell weights a small update apart: a server that sums in
another order already differs by up to MAX_DIFFERENCE in log-probability.
"""

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch

from infir2.data import load_tokenizer
from infir2.engines.native import NativeEngine
from infir2.engines.types import Request, SamplingParams
from infir2.errors import CheckFailedError, ConfigError

KEY_VARIABLE = "INFIR2_ENGINE_KEY"
NUM_PROBES, PROBE_TOKENS, NEW_TOKENS = 4, 24, 12
MIN_AGREEMENT = 0.5  # of the tokens, counted up to each probe's first difference
MAX_DIFFERENCE = 0.25  # mean |log-probability difference| of those
TIMEOUT_SECONDS = 120.0


def check_engine(url: str, hf_dir: Path) -> str:
    """One sentence on how far the server at `url` (with or without /v1) agrees; its key comes from INFIR2_ENGINE_KEY.

    Raises ConfigError (no such server, or an answer that is not the API's), CheckFailedError (it computes something else).
    """
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    tokenizer = load_tokenizer(hf_dir)
    engine = NativeEngine.from_hf(hf_dir, NUM_PROBES, torch.bfloat16, torch.device("cpu"))
    vocabulary = tokenizer.vocab_size
    prompts = [
        [(7919 * probe + 104729 * place) % vocabulary for place in range(1, PROBE_TOKENS + 1)]
        for probe in range(1, NUM_PROBES + 1)
    ]
    requests = [Request(str(index), prompt, index) for index, prompt in enumerate(prompts)]
    ours = engine.generate(
        requests, SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, stop_ids=())
    )
    differences: list[float] = []
    try:
        model = _call(f"{base}/models")["data"][0]["id"]
        for prompt, mine in zip(prompts, ours, strict=True):
            words = {
                "prompt": prompt,
                "model": model,
                "max_tokens": NEW_TOKENS,
                "temperature": 0,
                "logprobs": 1,
                "ignore_eos": True,
            }
            theirs = _call(f"{base}/completions", words | {"return_tokens_as_token_ids": True})[
                "choices"
            ][0]["logprobs"]
            for token, logprob, text, value in zip(
                mine.token_ids,
                mine.rollout_logprobs,
                theirs["tokens"],
                theirs["token_logprobs"],
                strict=False,
            ):
                if text not in (f"token_id:{token}", tokenizer.decode([token])):
                    break
                differences.append(abs(float(logprob) - float(value)))
    except (urllib.error.URLError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            f"{base}: gives no completions with log-probabilities ({error}); check the URL and {KEY_VARIABLE}."
        ) from error
    agreed, mean = (
        len(differences) / (NUM_PROBES * NEW_TOKENS),
        sum(differences) / max(1, len(differences)),
    )
    found = f"{agreed:.0%} of {NUM_PROBES * NEW_TOKENS} greedy tokens agree, their log-probabilities within {mean:.3g} on average"
    if agreed < MIN_AGREEMENT or not mean <= MAX_DIFFERENCE:
        raise CheckFailedError(
            f"{url} does not compute what {hf_dir} says: {found} (allowed {MIN_AGREEMENT:.0%}, {MAX_DIFFERENCE})."
        )
    return f"{url}: {found}."


def _call(url: str, body: dict[str, Any] | None = None) -> Any:
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {os.environ.get(KEY_VARIABLE, '')}",
    }
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(
        urllib.request.Request(url, data, headers), timeout=TIMEOUT_SECONDS
    ) as answer:
        return json.loads(answer.read())
