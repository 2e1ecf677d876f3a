"""The demo world's tokenizer: word level, about 170 entries, lossless for every text of the world.

A word includes the space before it, and the space after it if a number follows. So each number
0-99 is the same token in every context: "Tom has 7 apples." is `Tom| has |7| apples|.`.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK_TOKENS = ("<think>", "</think>")
UNKNOWN_TOKEN = "<|unk|>"
PRE_TOKENS = r"\\boxed\{|\d{1,2}| ?[A-Za-z]+(?: (?=\d))?|[^A-Za-z\d]"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pre_tokens(text: str) -> list[str]:
    """Cut a text without control tokens into vocabulary entries; their concatenation is the text.

    >>> pre_tokens("Tom has 7 apples.")
    ['Tom', ' has ', '7', ' apples', '.']
    """
    return re.findall(PRE_TOKENS, text)


def build_vocabulary(texts: Iterable[str]) -> list[str]:
    """Numbers 0-99, then the sorted words of the texts: the same for every seed."""
    words = {piece for text in texts for piece in pre_tokens(text) if not piece.isdigit()}
    words |= {"system", "user", "assistant", "\n", " "}
    return [str(number) for number in range(100)] + sorted(words)


def write_tokenizer(directory: Path, vocabulary: list[str]) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, loadable by transformers.

    The control tokens are special; `<think>` and `</think>` are not (as in Qwen3), so that a
    decoded response shows its thought.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    entries = [UNKNOWN_TOKEN, *vocabulary]
    tokenizer = Tokenizer(
        models.WordLevel(
            {entry: index for index, entry in enumerate(entries)}, unk_token=UNKNOWN_TOKEN
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS]
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS]
    )
    directory.mkdir(parents=True, exist_ok=True)
    # Not `tokenizer.save`, which takes only names that are UTF-8.
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "unk_token": UNKNOWN_TOKEN,
        "additional_special_tokens": ["<|endoftext|>", "<|im_start|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(
        json.dumps(configuration, indent=2) + "\n", encoding="utf-8"
    )
