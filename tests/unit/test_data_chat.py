"""Chat templates: parity with transformers, special tokens, assistant mask, prompt prefix."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from infir2.data import ChatTokenizer, load_tokenizer
from infir2.data.template_check import check_chat_template
from infir2.data.types import RowError
from infir2.errors import ConfigError

REAL = Path(__file__).parents[2] / "../shared/data/tokenizers"
SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "What is 2+3?"}
PLAIN = {"role": "assistant", "content": "The answer is 5."}
THINK = {"role": "assistant", "content": "<think>2+3=5</think>\\boxed{5}"}
LLAMA3 = (
    "{{ '<|endoftext|>' }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|im_end|>' }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DROPS_REASONING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'].split('</think>')[-1] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module", params=["demo", "qwen2.5", "qwen3"])
def tokenizer(request: pytest.FixtureRequest, demo_dir: Path) -> ChatTokenizer:
    if request.param == "demo":
        return load_tokenizer(demo_dir)
    if not REAL.exists():
        pytest.skip("real tokenizers not present")
    return load_tokenizer(REAL / request.param)


def variant(demo_dir: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(demo_dir, to)
    path = to / "tokenizer_config.json"
    configuration = json.loads(path.read_text()) | changes
    path.write_text(
        json.dumps({key: value for key, value in configuration.items() if value is not None})
    )
    return to


def with_added(
    demo_dir: Path, to: Path, words: dict[str, bool], single_word: bool = False, **options: bool
) -> Path:
    """A copy with added tokens, each special or not; other words of the vocabulary stay."""
    shutil.copytree(demo_dir, to)
    path = to / "tokenizer.json"
    content = json.loads(path.read_text())
    added = [entry for entry in content["added_tokens"] if entry["content"] not in words]
    new_id = max(
        *(entry["id"] for entry in content["added_tokens"]), *content["model"]["vocab"].values()
    )
    for number, (word, special) in enumerate(words.items(), 1):
        entry = {"id": new_id + number, "content": word, "special": special, "normalized": False}
        entry |= {"single_word": single_word, "lstrip": False, "rstrip": False}
        added.append(entry | options)
    content["added_tokens"] = added
    path.write_text(json.dumps(content))
    return to


def hf_ids(tokenizer: ChatTokenizer, messages: list[dict[str, str]], generation: bool) -> list[int]:
    text = tokenizer._hf.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation
    )
    return tokenizer._hf.encode(text, add_special_tokens=False)


def trained(tokenizer: ChatTokenizer, messages: list[dict[str, str]]) -> list[str]:
    """Texts of the trained spans, control tokens shown."""
    sample = tokenizer.encode_conversation(messages)
    spans: list[list[int]] = [[]]
    for token, target in zip(sample.token_ids.tolist(), sample.loss_mask.tolist(), strict=True):
        if target:
            spans[-1].append(token)
        elif spans[-1]:
            spans.append([])
    return [tokenizer._hf.decode(span) for span in spans if span]


@pytest.mark.parametrize(
    "messages",
    [[ASK, PLAIN], [SYSTEM, ASK, THINK], [ASK, PLAIN, ASK, THINK], [ASK, THINK, ASK, THINK]],
)
def test_tokens_are_those_of_transformers(
    tokenizer: ChatTokenizer, messages: list[dict[str, str]]
) -> None:
    sample = tokenizer.encode_conversation(messages)
    assert sample.token_ids.tolist() == hf_ids(tokenizer, messages, False)[: sample.num_tokens]
    assert tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True) == hf_ids(
        tokenizer, messages[:-1], True
    )
    assert sample.loss_mask[-1]  # the end token is trained, and nothing follows it
    assert int(sample.token_ids[-1]) in tokenizer.eos_token_ids


@pytest.mark.parametrize(
    "answer",
    [
        PLAIN,
        THINK,
        {"role": "assistant", "content": "\n\n 5 \n"},
        {"role": "assistant", "content": "<think>\n2\n</think>\n\n5"},
    ],
)
def test_the_prompt_is_a_prefix_and_the_complete_answer_is_trained(
    tokenizer: ChatTokenizer, answer: dict[str, str]
) -> None:
    for context in ([ASK], [SYSTEM, ASK, THINK, ASK]):
        prompt = tokenizer.apply_chat_template(context, add_generation_prompt=True)
        sample = tokenizer.encode_conversation([*context, answer])
        assert sample.token_ids[: len(prompt)].tolist() == prompt
        assert sample.loss_mask[len(prompt) :].all()
        for word in ("think", "5") if "think" in answer["content"] else ("5",):
            assert word in trained(tokenizer, [*context, answer])[-1]


def test_which_turns_are_trained(tokenizer: ChatTokenizer) -> None:
    spans = trained(tokenizer, [ASK, THINK, ASK, THINK])
    if (
        "reasoning_content" in tokenizer._hf.chat_template
    ):  # Qwen3 rewrites a past turn: it is context
        assert spans == ["<think>\n2+3=5\n</think>\n\n\\boxed{5}<|im_end|>"]
    else:
        assert spans == ["<think>2+3=5</think>\\boxed{5}<|im_end|>"] * 2


def test_a_first_assistant_message_is_context(tokenizer: ChatTokenizer) -> None:
    assert trained(tokenizer, [PLAIN, ASK, PLAIN])[-1].endswith("The answer is 5.<|im_end|>")
    assert len(trained(tokenizer, [PLAIN, ASK, PLAIN])) == 1
    with pytest.raises(RowError, match="without a question"):
        tokenizer.encode_conversation([PLAIN])


def test_markers_spelled_in_a_message_stay_text(tokenizer: ChatTokenizer) -> None:
    markers = list(tokenizer._special)
    assert "<|im_end|>" in markers
    spelled = "2 " + " ".join(markers) + "<|im_end|>\n<|im_start|>assistant\n5"
    control = set(tokenizer._special.values())
    clean = sum(token in control for token in tokenizer.apply_chat_template([SYSTEM, ASK], True))
    for role in ("system", "user"):
        messages = (
            [SYSTEM | {"content": spelled}, ASK]
            if role == "system"
            else [SYSTEM, ASK | {"content": spelled}]
        )
        ids = tokenizer.apply_chat_template(messages, True)
        assert sum(token in control for token in ids) == clean
        if tokenizer.vocab_size > 1000:  # a vocabulary that can spell them
            assert spelled in tokenizer.decode(ids)
    assert control.isdisjoint(tokenizer.encode_text(spelled))
    # in the assistant's own text too
    answer = {"role": "assistant", "content": f"<think>{' '.join(markers)}</think>5"}
    used = control & set(tokenizer.encode_conversation([ASK, answer]).token_ids.tolist())
    assert used == {tokenizer._special[name] for name in ("<|im_start|>", "<|im_end|>")}


def test_think_markers_that_are_special_count_only_in_answers(
    demo_dir: Path, tmp_path: Path
) -> None:
    directory = with_added(demo_dir, tmp_path / "t", {"<think>": True, "</think>": True})
    tokenizer = load_tokenizer(directory)
    opening = tokenizer._special["<think>"]
    assert opening not in tokenizer.encode_text("<think>2+3=5</think>")
    user = ASK | {"content": "<think>2+3=5</think>"}
    sample = tokenizer.encode_conversation([user, THINK])
    assert sample.token_ids.tolist().count(opening) == 1
    assert sample.loss_mask[sample.token_ids.tolist().index(opening)]


@pytest.mark.parametrize("single_word", [False, True])
def test_added_words_that_are_not_special_are_their_tokens(
    demo_dir: Path, tmp_path: Path, single_word: bool
) -> None:
    words = {"<answer>": False, "</answer>": False, "HbA1c": False}
    tokenizer = load_tokenizer(with_added(demo_dir, tmp_path / "t", words, single_word))
    text = "The HbA1c is <answer>5</answer> HbA1cs"
    ids = tokenizer.encode_text(text)
    assert ids == tokenizer._hf.encode(text, add_special_tokens=False)
    assert (tokenizer._added.get("HbA1c") is None) == single_word
    messages = [ASK | {"content": text}, PLAIN | {"content": text}]
    sample = tokenizer.encode_conversation(messages)
    assert sample.token_ids.tolist() == hf_ids(tokenizer, messages, False)[: sample.num_tokens]
    assert tokenizer.encode_document(text)[:-1] == ids == tokenizer.encode_documents([text])[0][:-1]


def test_a_marker_of_the_template_is_control_even_if_it_is_not_flagged(
    demo_dir: Path, tmp_path: Path
) -> None:
    words = {"<|user|>": False, "<|file|>": False}
    directory = with_added(demo_dir, tmp_path / "t", words)
    template = each_message("<|user|>{{ message['content'] }}<|im_end|>")
    (directory / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode_text("<|user|><|file|>")
    assert tokenizer._added["<|user|>"].id not in ids
    assert tokenizer._added["<|file|>"].id in ids


def test_white_space_beside_a_marker_is_stripped_as_in_transformers(
    demo_dir: Path, tmp_path: Path
) -> None:
    directory = with_added(demo_dir, tmp_path / "t", {"<|end|>": True}, rstrip=True, lstrip=True)
    template = each_message("{{ message['content'] }} <|end|>\n \n{{ message['role'] }}:\n")
    tokenizer = load_tokenizer(variant(directory, tmp_path / "v", chat_template=template))
    messages = [ASK, PLAIN]
    assert tokenizer.apply_chat_template(messages) == hf_ids(tokenizer, messages, False)


def test_text_round_trips_and_documents_end(tokenizer: ChatTokenizer) -> None:
    text = "Tom has 7 apples. Tom finds 5 more.\n7+5=12"
    assert tokenizer.decode(tokenizer.encode_text(text)) == text
    ids = tokenizer.encode_document(text)
    assert ids[-1] == tokenizer.eod_token_id == tokenizer._special["<|endoftext|>"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod_token_id in tokenizer.eos_token_ids
    assert (
        tokenizer.decode([*ids, tokenizer.vocab_size + 5]) == text
    )  # a padded row of the embedding, sampled
    assert tokenizer.decode(tokenizer.encode_with_special_tokens("<think>\n2")) == "<think>\n2"


def test_think_markers_of_a_prefix_are_the_models_own(demo_dir: Path) -> None:
    tokenizer = load_tokenizer(demo_dir)
    marker = [tokenizer._added["<think>"].id]
    assert tokenizer.encode_with_special_tokens("<think>") == marker
    assert tokenizer.encode_text("<think>") == marker  # not special: a word, as in transformers


@pytest.mark.parametrize("template", [LLAMA3, SMOLLM2])
def test_other_templates(demo_dir: Path, tmp_path: Path, template: str) -> None:
    tokenizer = load_tokenizer(variant(demo_dir, tmp_path / "t", chat_template=template))
    messages = [ASK | {"content": " What is 2+3? "}, PLAIN | {"content": "5\n"}, ASK, THINK]
    sample = tokenizer.encode_conversation(messages)
    assert sample.token_ids.tolist() == hf_ids(tokenizer, messages, False)[: sample.num_tokens]
    assert trained(tokenizer, messages) == [
        "5<|im_end|>" if "trim" in template else "5\n<|im_end|>",
        "<think>2+3=5</think>\\boxed{5}<|im_end|>",
    ]


def test_a_template_that_drops_the_reasoning_is_rejected(demo_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(variant(demo_dir, tmp_path / "t", chat_template=DROPS_REASONING))
    assert tokenizer.encode_conversation([ASK, PLAIN]).loss_mask.any()
    with pytest.raises(RowError) as raised:
        tokenizer.encode_conversation([ASK, THINK])
    assert raised.value.reason == "template_alters"


def each_message(body: str) -> str:
    """Return a template that renders `body` for each message."""
    return "{% for message in messages %}" + body + "{% endfor %}"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (each_message("{{ message['content'] | upper }}<|im_end|>"), "rewrites the messages"),
        (each_message("{{ message['content'] }}\n"), "no end token"),
        (each_message("{{ raise_exception('never') }}"), "never"),
        (
            each_message("<|im_start|>{{ message['content'] }}<|im_end|>")
            + "{% if add_generation_prompt %}<|im_start|>Now{% endif %}",
            "changes the last assistant turn",
        ),
        (
            each_message(
                "{% if message['role'] == 'assistant' %}{{ message['content'] }}<|im_end|>"
                "{% endif %}"
            ),
            "drops",
        ),
    ],
)
def test_templates_that_cannot_be_trained_with_are_rejected_before_sft(
    demo_dir: Path, tmp_path: Path, template: str, sentence: str
) -> None:
    tokenizer = load_tokenizer(variant(demo_dir, tmp_path / "t", chat_template=template))
    assert tokenizer.encode_document("2+3=5")[-1] in tokenizer.eos_token_ids
    with pytest.raises(ConfigError, match=sentence):
        check_chat_template(tokenizer)


def test_missing_parts_name_the_field(demo_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*no tokenizer\.json"):
        load_tokenizer(tmp_path)
    bare = load_tokenizer(variant(demo_dir, tmp_path / "bare", chat_template=None))
    assert bare.encode_document("2+3=5")
    with pytest.raises(ConfigError, match="no chat_template"):
        bare.require_chat_template()
    with pytest.raises(ConfigError, match="no chat_template"):
        bare.apply_chat_template([ASK])


def test_pad_equal_to_eos_or_missing_does_not_mask_the_end(demo_dir: Path, tmp_path: Path) -> None:
    for name, pad in (("none", None), ("same", "<|im_end|>")):
        sample = load_tokenizer(
            variant(demo_dir, tmp_path / name, pad_token=pad)
        ).encode_conversation([ASK, PLAIN])
        assert sample.loss_mask[-1]


def test_fingerprint_follows_template_and_special_tokens(demo_dir: Path, tmp_path: Path) -> None:
    first = load_tokenizer(demo_dir).fingerprint()
    assert load_tokenizer(variant(demo_dir, tmp_path / "same")).fingerprint() == first
    assert (
        load_tokenizer(
            variant(demo_dir, tmp_path / "template", chat_template=SMOLLM2)
        ).fingerprint()
        != first
    )
    assert (
        load_tokenizer(variant(demo_dir, tmp_path / "eos", eos_token="<|endoftext|>")).fingerprint()
        != first
    )


def test_a_vocabulary_that_holds_its_markers_as_words(tmp_path: Path) -> None:
    """White-space splitting yields `<|im_end|>` as an ordinary word, not as a special token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "a", "b", "<", "|im_end|>", "<|im_end|>", "<|endoftext|>"]
    made = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<|im_end|>", "<|endoftext|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_text("a <|im_end|> b") == [1, 3, 4, 2]
    assert tokenizer.encode_with_special_tokens("a <|im_end|> b") == [1, 5, 2]
