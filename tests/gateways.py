"""A gateway before scripted servers, and requests as evalscope sends them."""

import http.client
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from infir2.engines.http_client import HttpClient
from infir2.evaluate.gateway import Gateway, Task
from infir2.evaluate.journal import Journal
from infir2.evaluate.upstream import Engine, Patience, Upstream

QUICK = Patience(
    request_seconds=30, bad_answers=3, outage_seconds=20, first_wait_seconds=0.02,
    longest_wait_seconds=0.1,
)  # fmt: skip


@contextmanager
def open_gateway(
    directory: Path,
    urls: Sequence[str],
    patience: Patience = QUICK,
    begin: str = "",
    parallel: int = 64,
) -> Iterator[Gateway]:
    journal = Journal(directory)
    engines = [Engine(url, "tiny", HttpClient(url, "secret")) for url in urls]
    upstream = Upstream(engines, patience, parallel=parallel)
    tasks = {"aime24": Task(samples=4, seed=1, begin=begin)}
    with Gateway(tasks, journal, upstream) as gateway:
        yield gateway
    journal.close()


def post(gateway: Gateway, body: dict[str, Any], key: str = "") -> tuple[int, dict[str, Any]]:
    address = urlsplit(gateway.url("aime24"))
    connection = http.client.HTTPConnection("127.0.0.1", address.port or 0, timeout=60)
    headers = {"Authorization": f"Bearer {key or gateway.key}"}
    connection.request("POST", f"{address.path}/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def ask(gateway: Gateway, question: str = "q", **more: Any) -> tuple[int, str]:
    """(status, text or message)."""
    messages = [{"role": "user", "content": question}]
    status, answer = post(gateway, {"model": "m", "messages": messages, "temperature": 0.6} | more)
    if status == 200:
        return status, answer["choices"][0]["message"]["content"]
    return status, answer["error"]["message"]
