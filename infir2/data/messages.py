"""Parse the fields of a row: text, and chat messages in the forms in which people store them."""

import json
from collections.abc import Sequence
from typing import Any

from infir2.data.types import Message, RowError

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Keys that other trainers read to leave a message out of the loss. Every assistant turn is trained.
TRAIN_KEYS = (
    "weight",
    "train",
    "training",
    "trainable",
    "train_on_turn",
    "loss",
    "loss_weight",
    "loss_mask",
    "step_loss_mask",
)
# Keys that leave a message out of the loss or of the context, or the opposite, depending on who
# wrote them.
AMBIGUOUS_KEYS = ("mask", "masked", "ignore", "skip", "exclude", "prefix")
UNSUPPORTED_KEYS = ("tool_calls", "function_call", "tool_call_id")
# Values of a row's field `reasoning` or `thinking` that are no thought but say how much there is.
NO_THOUGHT = ("", "on", "off", "true", "false", "yes", "no", "none", "low", "medium", "high")


def find(row: dict[str, Any], field: str) -> Any:
    """Return a field that is neither missing nor null.

    `reward_model.ground_truth` is a field of that name, or else `ground_truth` of `reward_model`.

    Raises:
        RowError: the field is missing or null.
    """
    value: Any = row
    for name in [field] if field in row else field.split("."):
        if not isinstance(value, dict) or name not in value:
            raise RowError("missing_field", f"no field `{field}`")
        value = value[name]
    if value is None:
        raise RowError("null_field", f"`{field}` is null")
    return value


def text(row: dict[str, Any], field: str) -> str:
    """Return a field with text. Raises RowError for any other value, and for blank text."""
    value = find(row, field)
    if not isinstance(value, str):
        raise RowError("bad_field", f"`{field}` is not text")
    return check_text(value, field)


def check_text(value: str, field: str) -> str:
    """Return `value`; raise RowError if it is blank or is not valid Unicode text."""
    if not value.strip():
        raise RowError("empty", f"`{field}` is empty")
    if "\0" in value:
        raise RowError("nul_byte", f"`{field}` contains a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError("bad_utf8", f"`{field}` contains an unpaired surrogate") from None
    return value


def question(row: dict[str, Any], field: str) -> str:
    """Return the question's text; Alpaca's `input` follows its `instruction` after a blank line."""
    value = text(row, field)
    if field == "instruction" and row.get("input") not in (None, ""):
        extra = row["input"]
        if not isinstance(extra, str) or extra.strip():
            return f"{value}\n\n{text(row, 'input')}"
    return value


def decode_messages(value: Any) -> Any:
    """Return the list of messages that `value` contains as JSON text, or else `value` itself."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        return value
    is_list = isinstance(decoded, list) and all(
        isinstance(item, dict) and ("role" in item or "from" in item) for item in decoded
    )
    return decoded if is_list and decoded else value


def messages(row: dict[str, Any], field: str) -> list[Message]:
    """Return a field's messages: {"role", "content"}, or ShareGPT's {"from", "value"}.

    A system message without content counts as absent.

    Raises:
        RowError: the field is not a list of valid messages, or has none.
    """
    value = decode_messages(find(row, field))
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise RowError("bad_field", f"`{field}` is not a list of messages")
    parsed = [message for item in value if (message := _message(item)) is not None]
    if not parsed:
        raise RowError("empty", f"`{field}` has no message")
    return parsed


def with_reasoning(reasoning: str, answer: str) -> str:
    """Return the text of an answer for templates that read thoughts only there."""
    return f"<think>\n{reasoning}\n</think>\n\n{answer}"


def _message(message: dict[str, Any]) -> Message | None:
    role_key, content_key = ("role", "content")
    if message.get("role") is None and message.get("from") is not None:
        role_key, content_key = ("from", "value")
    role = find(message, role_key)
    role = SHAREGPT_ROLES.get(role, role) if role_key == "from" and isinstance(role, str) else role
    if role not in ROLES:
        raise RowError("bad_role", f"role {role!r} is not one of {', '.join(ROLES)}")
    _check_supported(message, role)
    content = message.get(content_key)
    if isinstance(content, list):
        content = _joined_parts(content, content_key)
        message = message | {content_key: content}
    if role == "system" and (content is None or (isinstance(content, str) and not content.strip())):
        return None
    thought = _thought_fields(message, role)
    return {
        "role": role,
        **_with_thought(text(message, content_key), thought),
    }


def _joined_parts(parts: list[Any], key: str) -> str:
    """Return the text of a content's parts, joined without a separator.

    Raises:
        RowError: a part is no text, such as an image.
    """
    texts = []
    for part in parts:
        kind = part.get("type") or "text" if isinstance(part, dict) else type(part).__name__
        value = part.get("text") if isinstance(part, dict) else None
        if not isinstance(value, str) or kind not in ("text", "input_text", "output_text"):
            raise RowError("bad_field", f"`{key}` has a part of type {kind!r}, which is no text")
        texts.append(value)
    return "".join(texts)


def _check_supported(message: dict[str, Any], role: str) -> None:
    """Raise RowError for a key that asks to train another turn than the assistant's, or less."""
    for key in TRAIN_KEYS:
        value = message.get(key)
        if value is not None and value != (role == "assistant"):
            raise RowError(
                "bad_field",
                f"`{key}`: {value!r} of a message of the {role} is not supported: all turns of "
                "the assistant are trained with equal weight, and no other",
            )
    for key in UNSUPPORTED_KEYS:
        if message.get(key) not in (None, False, "", [], {}):
            raise RowError("bad_field", f"`{key}` of a message is not supported: leave the row out")
    for key in AMBIGUOUS_KEYS:
        if message.get(key) is not None:
            raise RowError(
                "bad_field",
                f"`{key}` of a message is not supported: all turns of the assistant are trained; "
                "remove the key, or leave the row out",
            )


def with_row_thought(
    turns: list[Message], row: dict[str, Any], reasoning_field: str, other_fields: Sequence[str]
) -> list[Message]:
    """Return messages in which a thought beside them in the row belongs to the assistant's message.

    The thought is the field `reasoning_field`, or without one any field that is named as thoughts
    are, unless it is among `other_fields` or only says whether there is a thought ("on").

    Raises:
        RowError: the field is missing or not text, or the assistant has several messages.
    """
    if reasoning_field:
        fields = [(reasoning_field, text(row, reasoning_field))]
    else:
        fields = [
            (key, row[key])
            for key in REASONING_KEYS
            if key not in other_fields
            and not isinstance(row.get(key), bool)
            and str(row.get(key) or "").strip().lower() not in NO_THOUGHT
        ]
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not fields or not answers:
        return turns
    if len(answers) > 1:
        raise RowError(
            "bad_field",
            f"`{fields[0][0]}` beside {len(answers)} messages of the assistant: move it into the "
            "message that it belongs to",
        )
    answer = turns[answers[0]]
    if "reasoning_content" in answer:
        fields.append(("reasoning_content", answer["reasoning_content"]))
    answer = {"role": "assistant", **_with_thought(answer["content"], fields)}
    return [*turns[: answers[0]], answer, *turns[answers[0] + 1 :]]


def _thought_fields(message: dict[str, Any], role: str) -> list[tuple[str, Any]]:
    """Names and values of the thoughts in a message. Raises RowError unless it is an answer."""
    fields = [(key, message[key]) for key in REASONING_KEYS if message.get(key) not in (None, "")]
    if fields and role != "assistant":
        raise RowError("bad_field", f"`{fields[0][0]}` in a message of the {role}")
    return fields


def _with_thought(content: str, fields: list[tuple[str, Any]]) -> Message:
    """Return the content and, unless the content begins with it, the thought of `fields`."""
    thoughts: dict[str, str] = {}
    for key, value in fields:
        if not isinstance(value, str):
            raise RowError("bad_field", f"`{key}` is not text")
        bare = value.strip().removeprefix("<think>").removesuffix("</think>").strip()
        if bare:
            thoughts.setdefault(bare, check_text(value, key))
    if not thoughts:
        return {"content": content}
    if len(thoughts) > 1:
        raise RowError("bad_field", "two different thoughts in one message")
    ((bare, thought),) = thoughts.items()
    if "<think>" not in content and "</think>" not in content:
        return {"content": content, "reasoning_content": bare if "think>" in thought else thought}
    own, _, _ = content.partition("</think>")
    if own.strip().removeprefix("<think>").strip() != bare:
        raise RowError("bad_field", "the content has another thought than the reasoning field")
    return {"content": content}
