"""One answer from any of several engines, whatever fails: what is retried, where, and how long."""

import asyncio
import math
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

from infir2.engines.http_client import HttpClient
from infir2.engines.remote import BadAnswerError, EngineError, EngineGoneError, HungUpError

LONGEST_SLEEP_SECONDS = 1.0  # an engine may be replaced meanwhile
FULL = (408, 425, 429)  # like 5xx: the same request may succeed later
HANG_UPS = 3  # times Patience.bad_answers: a request may be in flight at an engine's end
CONTEXT = ("context length", "context_length", "maximum context", "max_model_len", "too long")


class NoAnswerError(Exception):
    """No engine gave an answer; `reason` is a word for counts.

    `final`: another run would not get one either, such as for a prompt beyond the context.
    """

    def __init__(self, reason: str, message: str, final: bool = False) -> None:
        super().__init__(message)
        self.reason, self.final = reason, final


@dataclass(frozen=True)
class Patience:
    """How long an answer is tried for.

    Attributes:
        request_seconds: of one request; a hanging engine costs that much.
        bad_answers: as often an engine may answer with nothing usable, or not in time.
        outage_seconds: as long no engine may be there, or all may be full.
        first_wait_seconds, longest_wait_seconds: between two requests; the wait doubles.
    """

    request_seconds: float = 3600.0
    bad_answers: int = 5
    outage_seconds: float = 900.0
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 30.0


class Restarts(Protocol):
    """A server of ours, which is started again when it has ended."""

    @property
    def has_ended(self) -> bool: ...

    async def start(self) -> tuple[str, str]:
        """(base URL, key) once it generates. Raises EngineError, ConfigError."""
        ...

    async def watch(self) -> None:
        """End it whenever it hangs, until this is cancelled."""
        ...


@dataclass
class Engine:
    """A server of OpenAI's API: `url` ends with /v1. `process` is ours, or None."""

    url: str
    model: str
    client: HttpClient
    process: Restarts | None = None
    restarts_left: int = 0
    running: int = 0
    failures: int = 0  # since its last answer
    not_before: float = 0.0  # of the monotonic clock


@dataclass(frozen=True)
class Answer:
    """`response` as OpenAI's API has it; which engine gave it, at which attempt, how fast."""

    response: dict[str, Any]
    engine: str
    attempts: int
    seconds: float


@dataclass
class Upstream:
    """The engines. All methods belong to one event loop.

    `parallel` answers are asked for at one time; others wait, so the engines have work while
    evalscope scores. `faults` counts what was retried, by kind: "429", "503", "gone", "hung up",
    "timeout", "empty", "cut".
    """

    engines: list[Engine]
    patience: Patience = field(default_factory=Patience)
    faults: Counter[str] = field(default_factory=Counter)
    parallel: int = 1024

    def __post_init__(self) -> None:
        self._free = asyncio.Semaphore(self.parallel)

    def replace(self, number: int, url: str, api_key: str = "") -> None:
        """An engine has come back at another address."""
        old = self.engines[number]
        client = HttpClient(url, api_key)
        self.engines[number] = Engine(url, old.model, client, old.process, old.restarts_left)

    async def answer(self, body: dict[str, Any]) -> Answer:
        """The first usable answer. An empty one counts after `bad_answers` attempts.

        Raises NoAnswerError; ConfigError if an engine refuses the key.
        """
        async with self._free:
            return await self._first_usable(body)

    async def _first_usable(self, body: dict[str, Any]) -> Answer:
        start = time.monotonic()
        trial = _Trial(self.patience, start + self.patience.outage_seconds)
        while True:
            engine = await self._choose(trial)
            trial.attempts += 1
            began = time.monotonic()
            fault, message, response = await self._ask(engine, body)
            if not fault or (fault == "empty" and trial.is_last()):
                engine.failures = 0
                assert response is not None
                taken = time.monotonic() - began
                return Answer(response, engine.url, trial.attempts, taken)
            self.faults[fault] += 1
            trial.count(fault, message)
            await self._wait(engine, fault)

    async def _choose(self, trial: "_Trial") -> Engine:
        """The engine with the fewest requests of those that do not wait after a failure."""
        while True:
            now = time.monotonic()
            ready = [each for each in self.engines if each.not_before <= now]
            if ready:
                return min(ready, key=lambda each: each.running)
            trial.check_outage(now)
            soonest = min(each.not_before for each in self.engines) - now
            await asyncio.sleep(min(max(0.001, soonest), LONGEST_SLEEP_SECONDS))

    async def _ask(
        self, engine: Engine, body: dict[str, Any]
    ) -> tuple[str, str, dict[str, Any] | None]:
        """(fault, message, response): one request; the fault is "" for a usable response."""
        engine.running += 1
        try:
            call = engine.client.post("/chat/completions", body | {"model": engine.model})
            response = await asyncio.wait_for(call, self.patience.request_seconds)
        except HungUpError as error:
            return "hung up", str(error), None
        except EngineGoneError as error:
            return "gone", str(error), None
        except TimeoutError:
            seconds = self.patience.request_seconds
            return "timeout", f"{engine.url} did not answer within {seconds:g} s", None
        except BadAnswerError as error:
            if error.reason != "status":
                return "cut", str(error), None
            if error.status in FULL or error.status >= 500:
                return str(error.status), str(error), None
            beyond = any(word in str(error).lower() for word in CONTEXT)
            reason = "beyond_context" if beyond else "refused"
            raise NoAnswerError(reason, str(error), final=beyond) from error
        finally:
            engine.running -= 1
        if not _is_response(response):
            return "cut", f"{engine.url} answered without a choice", None
        is_empty = not response_text(response).strip()
        return (
            ("empty", f"{engine.url} answered with no text", response)
            if is_empty
            else ("", "", response)
        )

    async def _wait(self, engine: Engine, fault: str) -> None:
        """An engine that is gone or full rests; other faults are the answer's."""
        if fault in ("empty", "cut", "timeout"):
            return
        if fault in ("gone", "hung up"):
            await self._restart(engine)
        if engine.not_before > time.monotonic():
            return  # it rests already: many requests that fail together are one failure
        engine.failures += 1
        patience = self.patience
        wait = patience.first_wait_seconds * 2 ** min(engine.failures - 1, 20)
        wait = min(wait, patience.longest_wait_seconds) * random.uniform(0.8, 1.2)
        engine.not_before = max(engine.not_before, time.monotonic() + wait)

    async def _restart(self, engine: Engine) -> None:
        """Start a server of ours again if it has ended; requests of others go on meanwhile."""
        process = engine.process
        if process is None or not process.has_ended or engine not in self.engines:
            return
        number = self.engines.index(engine)
        engine.process = None  # whoever else finds it gone does not start it too
        engine.not_before = math.inf
        if not engine.restarts_left:
            return
        self.faults["restart"] += 1
        try:
            url, api_key = await process.start()
        except EngineError:
            engine.not_before = time.monotonic() + self.patience.longest_wait_seconds
            url, api_key = engine.url, ""
        engine.process, engine.restarts_left = process, engine.restarts_left - 1
        self.replace(number, url, api_key)


@dataclass
class _Trial:
    """How often and how long one answer has been tried."""

    patience: Patience
    outage_ends: float
    attempts: int = 0
    bad: int = 0
    hang_ups: int = 0
    last: tuple[str, str] = ("", "")

    def is_last(self) -> bool:
        return self.bad + 1 >= self.patience.bad_answers

    def count(self, fault: str, message: str) -> None:
        self.last = (fault, message)
        if fault in ("empty", "cut", "timeout"):
            if self.is_last():
                raise NoAnswerError(fault, message)
            self.bad += 1
            return
        self.hang_ups += fault == "hung up"
        if self.hang_ups > HANG_UPS * self.patience.bad_answers:
            raise NoAnswerError(fault, message)
        self.check_outage(time.monotonic())

    def check_outage(self, now: float) -> None:
        if now > self.outage_ends:
            fault, message = self.last if self.last[0] else ("gone", "no engine answers")
            raise NoAnswerError(fault, message)


def response_text(response: dict[str, Any], prefix: str = "") -> str:
    """The whole text of a response, its thought included, after the `prefix` it was given."""
    message = response["choices"][0]["message"]
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    content = message.get("content") or ""
    if thought:
        return f"<think>\n{thought}\n</think>\n{content}"
    return (
        content if not content or content.startswith(prefix.strip() or "\0") else prefix + content
    )


def _is_response(response: Any) -> bool:
    """Whether an answer has the fields that are read later."""
    try:
        choice = response["choices"][0]
        texts = (
            choice["message"].get(key) for key in ("content", "reasoning_content", "reasoning")
        )
        finish = choice.get("finish_reason")
        usage = response.get("usage") or {}
        return all(isinstance(text, str | None) for text in (*texts, finish)) and all(
            isinstance(usage.get(name, 0), int | None)
            for name in ("prompt_tokens", "completion_tokens")
        )
    except (TypeError, KeyError, IndexError, AttributeError):
        return False
