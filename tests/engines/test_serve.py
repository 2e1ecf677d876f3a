"""`infir2 serve --engine` before the real vLLM, and before SGLang's own HTTP server."""

import contextlib
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from engine_servers import scripted_response
from own_server import KEY, begin_serve

from infir2.data import load_tokenizer
from infir2.engines.http_client import KEY_VARIABLE
from infir2.engines.probe import check_engine
from infir2.engines.process_guard import descendants

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
QUESTION: Any = [{"role": "user", "content": "3+3=?"}]
GREEDY: Any = {"model": "hf", "messages": QUESTION, "temperature": 0}
STARTED: dict[str, int] = {}


@contextlib.contextmanager
def serving(kind: str, python: str, start: Path, directory: Path) -> Iterator[openai.OpenAI]:
    options = ["--engine", kind, "--python", python, "--engine-dir", str(directory / "engine")]
    if kind == "vllm":
        options += ["--cache-gib", "1"]
    process, url = begin_serve(start / "hf", directory, *options)
    try:
        STARTED[kind] = process.pid
        yield openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    finally:
        process.terminate()
        begun = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert time.monotonic() - begun < 5


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def client(
    kind: str,
    request: pytest.FixtureRequest,
    start: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[openai.OpenAI]:
    python = request.getfixturevalue(f"{kind}_python")
    with serving(kind, python, start, tmp_path_factory.mktemp(kind)) as client:
        yield client


@pytest.mark.parametrize("stop", [None, "stop"])
def test_a_stream_is_the_plain_answer_in_pieces(client: openai.OpenAI, stop: str | None) -> None:
    options = {**GREEDY, "max_tokens": 40, "extra_body": {"return_token_ids": True}}
    if stop is not None:
        text = message_text(client.chat.completions.create(**options).choices[0].message)
        assert len(text) > 4
        options["stop"] = text[2:4]
    plain = client.chat.completions.create(**options)
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    chunks: Any = list(client.chat.completions.create(**options, **usage))
    deltas = [choice for chunk in chunks for choice in chunk.choices]
    expected = message_text(plain.choices[0].message)
    assert "".join(message_text(each.delta) for each in deltas) == expected
    token_ids = [i for each in deltas for i in getattr(each, "token_ids", ())]
    assert token_ids == plain.choices[0].token_ids  # type: ignore[attr-defined]
    assert deltas[-1].finish_reason == plain.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == len(token_ids)
    if stop is not None:
        assert plain.choices[0].finish_reason == "stop"
        assert options["stop"] not in expected
    else:
        assert len(deltas) > 5


def message_text(message: Any) -> str:
    return (getattr(message, "reasoning_content", None) or "") + (message.content or "")


def test_log_probabilities_are_the_models(
    kind: str, client: openai.OpenAI, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [5, 6, 7, 9]
    answer = client.completions.create(
        model="hf",
        prompt=prompt,
        max_tokens=6,
        logprobs=20,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    logprobs: Any = answer.choices[0].logprobs
    tops = [list(each.values()) for each in logprobs.top_logprobs]
    assert [len(each) for each in tops] == [20] * 6
    assert tops == [sorted(each, reverse=True) for each in tops]
    if kind == "sglang":  # its answers are scripted
        token_ids = answer.choices[0].token_ids  # type: ignore[attr-defined]
        assert (token_ids, logprobs.token_logprobs) == scripted_response(prompt, 6, [])
    else:
        monkeypatch.setenv(KEY_VARIABLE, KEY)
        assert "greedy tokens agree" in check_engine(str(client.base_url), start / "hf")


def test_errors_are_the_same(kind: str, client: openai.OpenAI) -> None:
    context = client.models.retrieve("hf").max_model_len  # type: ignore[attr-defined]
    assert context == 1024
    for body, said in (
        ({"max_tokens": context}, "maximum context length is 1024"),
        ({"extra_body": {"top_k": 3}}, "top_k is not supported"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            client.chat.completions.create(**GREEDY, **body)
    hot = {**GREEDY, "temperature": 3, "max_tokens": 2}
    if kind == "vllm":
        with pytest.raises(openai.BadRequestError, match="samples at 2 at most"):
            client.chat.completions.create(**hot)
    else:
        assert client.chat.completions.create(**hot).choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot_at_the_server(
    kind: str, client: openai.OpenAI, stream: bool
) -> None:
    with contextlib.suppress(openai.APITimeoutError):
        body = {"max_tokens": 900, "n": 3, "extra_body": {"ignore_eos": True}}
        answer: Any = client.with_options(timeout=1).chat.completions.create(
            **GREEDY, **body, stream=stream
        )
        next(answer)
        assert num_running(kind) == 3
        answer.close()
    begun = time.monotonic()
    while num_running(kind):
        assert time.monotonic() < begun + 1.5, "a request still runs"
        time.sleep(0.02)


def num_running(kind: str) -> int:
    """Requests at the server behind ours, as it says itself."""
    for pid in descendants(STARTED[kind]):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if "--port" in words and "process_guard.py" not in " ".join(words):
            break
    port = words[words.index("--port") + 1]
    if kind == "vllm":
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        key = variables.partition("VLLM_API_KEY=")[2].partition("\0")[0]
        text = ask(port, key, "/metrics")
        return int(float(re.findall(r"^vllm:num_requests_running.* (\S+)$", text, re.M)[0]))
    key = json.loads(Path(words[words.index("--config") + 1]).read_text())["api-key"]
    return int(json.loads(ask(port, key, "/server_info"))["internal_states"][0]["running"])


def ask(port: str, key: str, route: str) -> str:
    headers = {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{route}", headers=headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return str(answer.read().decode())


def test_texts_are_ours(client: openai.OpenAI, start: Path) -> None:
    """Template and decoding: SGLang and vLLM see token ids only."""
    prompt, _ = load_tokenizer(start / "hf").encode_prompt(QUESTION)
    answer = client.chat.completions.create(
        **GREEDY, max_tokens=12, extra_body={"return_token_ids": True}
    )
    choice: Any = answer.choices[0]
    assert choice.prompt_token_ids == prompt
    by_ids = client.completions.create(model="hf", prompt=prompt, temperature=0, max_tokens=12)
    visible = re.sub(r"</?think>|\n", "", by_ids.choices[0].text)
    assert message_text(choice.message).replace("\n", "") == visible
