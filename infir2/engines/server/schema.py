"""Bodies of requests to OpenAI's API: what is supported, and what may be there without effect."""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from infir2.engines.server.errors import ApiError
from infir2.engines.types import MAX_TOP_LOGPROBS

# Fields that are not supported, with the values that mean nothing. Any other value is refused, for
# it would change what is sampled.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "chat_template_kwargs": ({},),
}
# They say who asks, or how an answer is stored and billed.
_WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "parallel_tool_calls", "request_id", "priority"),
)


def _encodable(text: str) -> str:
    """Half of a surrogate pair, which JSON can spell, is no text: ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it is not valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class StreamOptions(BaseModel):
    """`include_usage`: a last chunk counts the tokens."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class _Body(BaseModel, ABC):
    """Fields that both routes have; absent and null mean the same."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: int | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    ignore_eos: bool | None = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    @abstractmethod
    def wants_logprobs(self) -> bool:
        """Whether to report log-probabilities."""

    @property
    @abstractmethod
    def num_top(self) -> int:
        """Most likely tokens to report at each position."""

    @property
    def most_tokens(self) -> int | None:
        """The longest response; None: as long as the route allows."""
        return self.max_tokens

    def check(self) -> None:
        """Raise ApiError for a field that is not supported."""
        for name, value in (self.model_extra or {}).items():
            neutral = _NEUTRAL.get(name, ())
            if value is not None and name not in _WITHOUT_EFFECT and value not in neutral:
                what = f"only {' or '.join(map(repr, neutral))}" if neutral else "leave it out"
                raise ApiError(400, f"{name} is not supported; {what}", "unsupported", name)
        if "" in self.stop_texts:
            raise ApiError(400, "stop: a stop text is empty", param="stop")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream = true", param="stream_options")


class TextPart(BaseModel):
    """A part of a message; other kinds of parts are not supported."""

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """A message of a conversation; `reasoning_content` is an assistant's thought."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart] | None = None
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    @property
    def num_top(self) -> int:
        return self.top_logprobs or 0

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def check(self) -> None:
        super().check()
        if self.add_generation_prompt is False and not self.continue_final_message:
            message = "add_generation_prompt = false is supported with continue_final_message only"
            raise ApiError(400, message, "unsupported", "add_generation_prompt")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs = true", param="top_logprobs")
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise ApiError(400, "max_tokens and max_completion_tokens differ", param="max_tokens")


class CompletionBody(_Body):
    """POST /v1/completions: `prompt` is text or token ids, one prompt or a list of them."""

    prompt: Text | Annotated[list[Text] | list[int] | list[list[int]], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def num_top(self) -> int:
        return self.logprobs or 0

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens or 16  # OpenAI's default
