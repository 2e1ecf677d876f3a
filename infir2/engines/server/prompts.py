"""From the body of a request to the token ids of its prompts."""

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from infir2.data import ChatTokenizer
from infir2.data.messages import with_reasoning
from infir2.data.types import Message, RowError
from infir2.engines.server.errors import ApiError
from infir2.engines.server.schema import ChatBody, ChatMessage, CompletionBody
from infir2.engines.server.served import Served
from infir2.engines.server.thoughts import CLOSE, OPEN
from infir2.errors import ConfigError

T = TypeVar("T")
_MARKER = re.compile(f"({OPEN}|{CLOSE})")


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the part at its end that belongs to the response's message."""

    token_ids: list[int]
    before: str = ""


async def chat_prompt(served: Served, body: ChatBody) -> Prompt:
    """The conversation up to where the model continues. Raises ApiError."""
    return await _in_thread(served, "messages", lambda: _chat_prompt(served.tokenizer, body))


async def completion_prompts(served: Served, body: CompletionBody) -> list[Prompt]:
    """Each prompt of the body. Raises ApiError."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return await completion_prompts(served, body.model_copy(update={"prompt": [prompt]}))
    if isinstance(prompt[0], int):
        return [Prompt([token for token in prompt if isinstance(token, int)])]
    if isinstance(prompt[0], list):
        return [Prompt(list(token_ids)) for token_ids in prompt if isinstance(token_ids, list)]
    texts = [text for text in prompt if isinstance(text, str)]
    encode = served.tokenizer.encode_raw_prompt
    return await _in_thread(served, "prompt", lambda: [Prompt(encode(text)) for text in texts])


async def _in_thread(served: Served, param: str, encode: Callable[[], T]) -> T:
    """Long texts and templates take a while: beside the event loop, one at a time."""
    loop = asyncio.get_running_loop()
    try:
        return await loop.run_in_executor(served.tokenizer_thread, encode)
    except (RowError, ConfigError) as error:
        raise ApiError(400, f"{param}: {error}", param=param) from error


def _chat_prompt(tokenizer: ChatTokenizer, body: ChatBody) -> Prompt:
    messages = [_message(each) for each in body.messages]
    if not body.continue_final_message:
        token_ids, opened = tokenizer.encode_prompt(messages)
        return Prompt(token_ids, opened)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        message = "continue_final_message needs a last message of the assistant, after another one"
        raise ApiError(400, message, param="continue_final_message")
    token_ids, opened = tokenizer.encode_prompt(messages[:-1])
    begun = _begun(messages[-1])
    if opened and begun.lstrip().startswith(OPEN):
        begun = begun.lstrip().removeprefix(OPEN).lstrip("\n")
    return Prompt([*token_ids, *_encode_begun(tokenizer, begun)], opened + begun)


def _message(message: ChatMessage) -> Message:
    role = "system" if message.role == "developer" else message.role
    shown = {"role": role, "content": message.text}
    if role == "assistant" and message.reasoning_content:
        shown["reasoning_content"] = message.reasoning_content
    return shown


def _begun(message: Message) -> str:
    """The text of an assistant's message that the model continues, thought first."""
    thought, answer = message.get("reasoning_content"), message["content"]
    if thought is None:
        return answer
    return with_reasoning(thought, answer) if answer else f"{OPEN}\n{thought}"


def _encode_begun(tokenizer: ChatTokenizer, text: str) -> Sequence[int]:
    """Its tokens: the think markers are the model's own, no other marker is more than text."""
    parts = [part for part in _MARKER.split(text) if part]
    encoded = (
        tokenizer.encode_with_special_tokens(part)
        if _MARKER.fullmatch(part)
        else tokenizer.encode_text(part)
        for part in parts
    )
    return [token for tokens in encoded for token in tokens]
