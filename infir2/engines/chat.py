"""`infir2 chat`: a conversation with a server of OpenAI's API, ours or another one.

Ctrl-C stops a response, and the server stops generating it; a second one, or one without a
response, ends the chat. What was answered until then stays in the conversation. Thoughts are shown
and not sent again, as the templates of reasoning models expect.
"""

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infir2.engines.engine_options import EngineOptions, ServeClient, check_model, serve_host
from infir2.engines.http_client import KEY_VARIABLE, HttpClient, check_url
from infir2.engines.remote import BadAnswerError, EngineError, EngineGoneError
from infir2.engines.server_process import ServerProcess
from infir2.errors import ConfigError, UserError, first_line
from infir2.model.safetensors_io import HfWeights, read_json
from infir2.terminal import log, log_error, print_part, read_line


class ServerEndedError(UserError):
    """The server of a chat ended."""

    exit_code = 1


class RefusedError(Exception):
    """The server refuses a request; the text is its sentence."""


@dataclass(frozen=True)
class ChatOptions:
    """What `infir2 chat` is told; `sampling` are fields of a request, `engine` is MODEL's.

    `beside` is a second model, which answers every message too.
    """

    model: Path | None
    url: str
    system: str
    sampling: dict[str, Any]
    engine: EngineOptions = field(default_factory=EngineOptions)
    beside: Path | None = None


def run_chat(options: ChatOptions) -> None:
    """Talk until the end of the input, /quit or Ctrl-C.

    Raises ConfigError for options that do not go together, a wrong URL or a refused key, and
    ServerEndedError.
    """
    if bool(options.url) == (options.model is not None):
        raise ConfigError("infir2 chat needs MODEL, or --url of a running server, and not both.")
    if options.url and options.engine != EngineOptions():
        raise ConfigError("--engine and its options are for MODEL; leave them out beside --url.")
    if options.beside is not None and options.beside == options.model:
        raise ConfigError("--beside names MODEL itself; name another, such as its BF16 export.")
    for key, model in (("MODEL", options.model), ("--beside", options.beside)):
        if model is not None:
            check_model(key, model)
            options.engine.check(model)
            if options.engine.engine == "native":
                HfWeights(model)  # its servers would say the same in seconds, and each its own
    with contextlib.ExitStack() as stack:
        conversations = [_conversation(stack, options.model, options)]
        if options.beside is not None:
            conversations.append(_conversation(stack, options.beside, options))
        names = " beside ".join(each.name for each in conversations)
        log(f"{names}; /reset begins anew, /quit ends, Ctrl-C stops a response.", "chat")
        talk(conversations)


def _conversation(
    stack: contextlib.ExitStack, model: Path | None, options: ChatOptions
) -> "Conversation":
    """One with a server of `model`, or with that of `options.url`."""
    if model is not None:
        url, key = stack.enter_context(own_server(model, options.engine))
    else:
        url, key = options.url, os.environ.get(KEY_VARIABLE, "")
        check_url("--url", url, key)
    client = stack.enter_context(ChatClient(url, key))
    name = f"{client.model} ({_precision(model)})" if model else client.model
    return Conversation(client, options.system, options.sampling, name)


def _precision(model: Path) -> str:
    """The precision of a Hugging Face directory's weights: FP8, BF16, ..."""
    config = read_json(model / "config.json")
    if "quantization_config" in config:
        return "FP8"
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}.get(dtype, dtype)


def talk(conversations: "Sequence[Conversation]") -> None:
    """Until the end of the input, /quit or Ctrl-C; each conversation gets every message."""
    while (line := read_line("> ")) is not None:
        match line.strip():
            case "":
                continue
            case "/quit":
                return
            case "/reset":
                for conversation in conversations:
                    conversation.messages = []
                log("a new conversation.", "chat")
            case text:
                answers = []
                for conversation in conversations:
                    if len(conversations) > 1:
                        print_part(f"{conversation.name}:\n")
                    answers.append(conversation.ask({"role": "user", "content": text}))
                given = [answer for answer in answers if answer is not None]
                if len(given) == 2:
                    log(_agreement(*given), "chat")


def _agreement(first: str, second: str) -> str:
    """How far two answers are the same text."""
    if first == second:
        return f"the same {len(first):,} characters."
    pairs = enumerate(zip(first, second, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
    return f"the first {same:,} characters are the same, of {len(first):,} and {len(second):,}."


class ChatClient:
    """Sends conversations to one server, from outside of an event loop."""

    def __init__(self, url: str, key: str) -> None:
        self._http = HttpClient(url.rstrip("/").removesuffix("/v1") + "/v1", key)
        self._runner = asyncio.Runner()
        self.model = self._first_model()

    def __enter__(self) -> "ChatClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._http.close())
        self._runner.close()

    def stream(
        self, messages: list[dict[str, str]], sampling: dict[str, Any]
    ) -> Iterator[tuple[str, str]]:
        """Yield (thought, answer), the next pieces of a response; closing it ends the request.

        Raises RefusedError and ServerEndedError.
        """
        body = {"model": self.model, "messages": messages, "stream": True} | sampling
        events = self._http.events("/chat/completions", body)
        try:
            while (chunk := self._runner.run(_next(events))) is not None:
                yield _pieces(chunk)
        except BadAnswerError as error:
            if error.reason == "status":
                raise RefusedError(error.said or f"status {error.status}") from error
            raise ServerEndedError(f"{first_line(error)}; start it again.") from error
        except EngineError as error:
            raise ServerEndedError(f"{first_line(error)}; start it again.") from error
        finally:
            self._runner.run(events.aclose())

    def _first_model(self) -> str:
        try:
            answer = self._runner.run(self._http.get("/models"))
            return str(answer["data"][0]["id"])
        except EngineGoneError as error:
            raise ConfigError(
                f"--url: no server answers ({first_line(error)}); start one with infir2 serve "
                "MODEL, or write the address that it printed."
            ) from error
        except (EngineError, LookupError, TypeError) as error:
            why = first_line(error) if isinstance(error, EngineError) else "it lists no model"
            raise ConfigError(
                f"--url: {self._http.url} is no server of OpenAI's API ({why}); "
                "name one, such as that of infir2 serve MODEL."
            ) from error


async def _next(events: AsyncGenerator[Any, None]) -> Any:
    return await anext(events, None)


def _pieces(chunk: Any) -> tuple[str, str]:
    if "error" in chunk:
        raise RefusedError(str(chunk["error"].get("message")))
    delta = chunk["choices"][0].get("delta", {}) if chunk.get("choices") else {}
    return delta.get("reasoning_content") or "", delta.get("content") or ""


@dataclass
class Conversation:
    """Messages to one server and its answers.

    Attributes:
        client: of the server.
        system: the system message; "" for none.
        sampling: fields of each request.
        name: of the model.
        messages: those so far, the system message left out.
    """

    client: ChatClient
    system: str
    sampling: dict[str, Any]
    name: str
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, message: dict[str, str]) -> str | None:
        """Send a message, print the answer and return it; None if the server refuses."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        pieces = self.client.stream([*first, *self.messages, message], self.sampling)
        answer, shown = "", _Shown()
        try:
            with contextlib.closing(pieces):  # type: ignore[type-var]
                for thought, text in pieces:
                    shown.add(thought, text)
                    answer += text
        except RefusedError as error:
            log_error(str(error), "chat")
            return None
        except (KeyboardInterrupt, asyncio.CancelledError):  # the latter if Ctrl-C meets Runner.run
            log(" stopped.", "chat")
        shown.end()
        self.messages += [message, {"role": "assistant", "content": answer}]
        return answer


class _Shown:
    """Prints a thought apart from the answer."""

    def __init__(self) -> None:
        self._thinks = False

    def add(self, thought: str, text: str) -> None:
        if thought:
            print_part(thought, dim=True)
            self._thinks = True
        if text:
            if self._thinks:
                print_part("\n\n", dim=True)
                self._thinks = False
            print_part(text)

    def end(self) -> None:
        if self._thinks:
            print_part("\n", dim=True)
        print_part("\n")


@contextlib.contextmanager
def own_server(model: Path, options: EngineOptions) -> Iterator[tuple[str, str]]:
    """URL and key of a server of ours, which ends with this process, however that happens.

    Raises ConfigError with the exit code of a server that does not start.
    """
    addresses: list[tuple[str, str]] = []

    def open_client(url: str, key: str) -> ServeClient:
        addresses.append((url, key))
        return ServeClient(url, key)

    async def start(host: ServerProcess) -> None:
        await (await host.start()).close()

    with tempfile.TemporaryDirectory(prefix="infir2-chat-") as directory:
        host = serve_host(
            "the server",
            model,
            options,
            Path(directory),
            ("--engine-dir", str(Path(directory, "engine"))),
            open_client=open_client,
            shows_log=True,
        )
        try:
            asyncio.run(start(host))
            yield addresses[-1]
        finally:
            host.kill()
