"""The likely mistakes with the verbs before a run: each gets one sentence, and nothing is written.

Those of plan are in test_planner.py, those of the other verbs in test_cli_mistakes.py.
"""

import json
import shutil
from pathlib import Path

import pytest
from mistakes import each, sentence_of
from stages import make_model, make_world

SFT, CPT = "world/sft1.jsonl", "world/cpt.jsonl"
TOKENIZER = "--tokenizer world/tokenizer"
NEW = "init new --model hf --task"
MISTAKES = [
    # data inspect
    ("data", 2, "the following arguments are required: inspect|demo"),
    ("data insect x.jsonl", 2, "did you mean inspect?"),
    ("data inspect", 2, "the following arguments are required: SOURCE, --tokenizer"),
    (f"data inspect {SFT}", 2, "are required: --tokenizer; see `infir2 data inspect --help`"),
    (f"data inspect {SFT} --tokeniser x", 2, "--tokeniser is not an option, did you mean --tok"),
    (f"data inspect {SFT} --tokenizer nope", 2, "nope has no tokenizer.json: there is"),
    (f"data inspect {SFT} --tokenizer empty", 2, "name the model's directory."),
    (f"data inspect {SFT} {TOKENIZER}/tokenizer.json", 2, "name its directory, world/tok"),
    (f"data inspect {SFT} --tokenizer nochat", 2, "nochat has no chat_template"),
    (f"data inspect nope.jsonl {TOKENIZER}", 4, "nope.jsonl does not exist; name a file or a dir"),
    (f"data inspect openai/gsm8k {TOKENIZER}", 4, "hf download --repo-type dataset openai/gsm8k"),
    (f"data inspect empty.jsonl {TOKENIZER}", 4, "empty.jsonl has no row"),
    (f"data inspect empty {TOKENIZER}", 4, "directory empty has no .jsonl, .json, .parquet or"),
    (f"data inspect bad.jsonl {TOKENIZER}", 4, "its rows have the fields a, and none of those of"),
    (f"data inspect broken.jsonl {TOKENIZER}", 4, "its first rows are unusable (not a JSON object"),
    (f"data inspect x.exe {TOKENIZER}", 4, "x.exe has an unknown file type"),
    (f"data inspect {SFT} {TOKENIZER} --kind prompt", 2, "did you mean prompts?"),
    (f"data inspect {CPT} {TOKENIZER} --kind prompts", 4, "have the fields text, and none of"),
    (f"data inspect {SFT} {TOKENIZER} --sequence-tokens 4k", 2, "invalid number of tokens value"),
    (f"data inspect {SFT} {TOKENIZER} --rows two", 2, "--rows: invalid int value: 'two'"),
    (f"data inspect {SFT} {TOKENIZER} --problems no", 4, "--problems no does not exist; name test"),
    (f"data inspect {SFT} {TOKENIZER} --problems bad.jsonl", 4, "bad.jsonl:1 has no field"),
    # init
    ("init", 2, "are required: DIR, --model, --task, --data"),
    (f"{NEW} sft", 2, "the following arguments are required: --data"),
    (f"init new --task sft --data {SFT}", 2, "the following arguments are required: --model"),
    (f"init new --model hf --data {SFT}", 2, "the following arguments are required: --task"),
    (f"init new --modle hf --task sft --data {SFT}", 2, "--modle is not an option, did you mean"),
    (f"{NEW} ppo --data {SFT}", 2, "invalid choice: 'ppo' (choose from 'cpt', 'sft', 'rl')"),
    (f"{NEW} stf --data {SFT}", 2, "did you mean sft?"),
    (f"init new --model Qwen/Q --task sft --data {SFT}", 2, "hf download Qwen/Q --local-dir"),
    (f"init new --model empty --task sft --data {SFT}", 2, "--model empty has no config.json"),
    (f"init new --model x.exe --task sft --data {SFT}", 2, "x.exe is a file, not a model's dir"),
    (f"init new --model nochat --task sft --data {SFT}", 2, "nochat has no chat_template"),
    (f"{NEW} sft --data nope.jsonl", 4, "nope.jsonl does not exist; name a file or a directory"),
    (f"{NEW} sft --data {CPT}", 4, "and none of those of conversations (messages or"),
    (f"{NEW} rl --data {SFT}", 4, "and none of those of prompts with answers (prompt or"),
    (f"{NEW} cpt --data {SFT}", 4, "and none of those of documents (text or content or"),
    (f"{NEW} sft --data empty.jsonl", 4, "empty.jsonl has no row"),
    (f"{NEW} sft --data broken.jsonl", 4, "its first rows are unusable"),
    (f"{NEW} sft --data {SFT} --validation nope.jsonl", 4, "nope.jsonl does not exist"),
    (f"{NEW} rl --data world/rl1.jsonl --validation {CPT}", 4, "none of those of prompts with"),
    (f"init new extra --model hf --task sft --data {SFT}", 2, "unrecognized arguments: extra"),
    (f"init done --model hf --task sft --data {SFT}", 2, "done/recipe.toml exists; name a new"),
    (f"init x.exe --model hf --task sft --data {SFT}", 2, "name another DIR."),
    # what has few options
    ("doctor --gpu h100", 2, "unrecognized arguments: --gpu h100; see `infir2 doctor --help`"),
    ("bench --out x.json", 2, "the following arguments are required: --to"),
    ("chat hf --url http://127.0.0.1:1", 2, "and not both"),
    ("chat hf --beside hf", 2, "--beside names MODEL itself; name another"),
    ("chat hf --temprature=0", 2, "did you mean --temperature?"),
    ("chat --url nope", 2, "'nope' is not of the form http://HOST:PORT"),
    ("check sftt x.toml", 2, "sftt is not a verb of check; did you mean sft?"),
    # verbs
    ("doctr", 2, "did you mean doctor?"),
    ("paln x.toml", 2, "did you mean plan?"),
    ("inspect x.jsonl", 2, "did you mean data inspect?"),
    ("estimate x.toml", 2, "did you mean plan?"),
    ("benchmark", 2, "did you mean bench?"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("verbs")
    make_model(make_world(directory / "world"), directory / "hf")
    shutil.copytree(directory / "hf", directory / "nochat")
    config = directory / "nochat" / "tokenizer_config.json"
    config.write_text(
        json.dumps({k: v for k, v in json.loads(config.read_text()).items() if "chat" not in k})
    )
    for path in config.parent.glob("chat_template*"):
        path.unlink()
    (directory / "empty").mkdir()
    (directory / "done").mkdir()
    files = {
        "done/recipe.toml": "",
        "empty.jsonl": "",
        "bad.jsonl": '{"a": 1}\n',
        "broken.jsonl": "not json\n" * 3,
        "x.exe": "MZ",
    }
    for name, text in files.items():
        (directory / name).write_text(text)
    return directory


@each(MISTAKES)
def test_a_mistake_gets_one_sentence_and_leaves_nothing_behind(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    code: int,
    sentence: str,
) -> None:
    monkeypatch.chdir(place)
    assert sentence in sentence_of(capsys, place, words.split(), code)
