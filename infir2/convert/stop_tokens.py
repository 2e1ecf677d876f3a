"""The end tokens of an exported model, in the three files that inference engines read.

transformers and vLLM stop at the ids of `generation_config.json`, other tools at those of
`config.json`, and clients read the `eos_token` of `tokenizer_config.json`. A base model's files
name the end of a document; after SFT an answer ends with the chat template's end of turn.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from infir2.convert.weights import Weights
from infir2.errors import ConfigError
from infir2.model.safetensors_io import read_json
from infir2.terminal import log

_CHAT_KINDS = ("sft", "rl")  # runs that train answers of the chat template
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def with_stop_tokens(weights: Weights) -> Weights:
    """Weights of a run whose files name every token at which its rollouts and evaluation stop.

    Example, after SFT of Qwen2.5: `eos_token_id` is [151643, 151645] in `config.json` and
    `generation_config.json`, and `eos_token` is `<|im_end|>` in `tokenizer_config.json`. CPT keeps
    the tokenizer's `eos_token`. Without a tokenizer the files stay as they are; one that cannot be
    loaded keeps them too, with a message.

    Raises:
        CheckpointError: a JSON file of the tokenizer is damaged.
    """
    source = weights.side_files
    needed = ("tokenizer.json", "tokenizer_config.json")
    if source is None or not all((source / name).is_file() for name in needed):
        return weights
    from infir2.data import load_tokenizer

    try:
        tokenizer = load_tokenizer(source)
        ends = set(tokenizer.eos_token_ids)
    except ConfigError as error:
        if weights.kind in _CHAT_KINDS:  # documents end as the tokenizer's files already say
            log(f"the exported files keep their end tokens; {error}")
        return weights
    ends |= set(filter(tokenizer.is_control, _as_list(weights.config.get("eos_token_id"))))
    if not ends:
        return weights
    eos = {"eos_token_id": min(ends) if len(ends) == 1 else sorted(ends)}
    files = {"generation_config.json": _read(source / "generation_config.json") | eos}
    if weights.kind in _CHAT_KINDS and tokenizer.turn_end is not None:
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                files[name] = read_json(source / name) | {"eos_token": tokenizer.turn_end}
    return replace(weights, config=weights.config | eos, changed_files=files)


def _as_list(eos: Any) -> list[int]:
    return [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
