"""Likely mistakes with chat, plan, doctor and bench; those of the other verbs are in
test_mistakes.py, and more of these in test_planner.py and test_doctor.py."""

import http.server
import shlex
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mistakes import each, sentence_of
from stages import make_model, make_world

from infir2.engines.http_client import KEY_VARIABLE

# In {braces}: the address of a web server that is none of OpenAI's API.
CHAT = [
    ("chat", 2, "infir2 chat needs MODEL, or --url of a running server, and not both."),
    ("chat hf --url {web}", 2, "infir2 chat needs MODEL, or --url of a running server, and not bo"),
    ("chat {web}", 2, "is the address of a server; write --url http://127.0.0.1:"),
    ("chat hf hello", 2, "unrecognized arguments: hello; see `infir2 chat --help`."),
    ("chat hf --max-new-tokens 9", 2, "did you mean --max-tokens?"),
    ("chat nope", 2, "MODEL: nope does not exist; run the stage that writes it"),
    ("chat Qwen/Q", 2, "hf download Qwen/Q --local-dir models/Q; then name models/Q instead."),
    ("chat https://huggingface.co/Qwen/Q", 2, "MODEL: Qwen/Q is not a local directory, and infir"),
    ("chat ~/hf", 2, "~/hf: only a shell knows ~"),
    ("chat hf/config.json", 2, "hf/config.json is a file of a model; name its directory, hf."),
    ("chat file.gguf", 2, "convert the file first: infir2 import hf file.gguf --to DIR."),
    ("chat empty", 3, "empty/config.json is missing; name a complete Hugging Face model direct"),
    ("chat adapter", 3, "adapter is a LoRA adapter, not a model; merge it into its base model"),
    ("chat gpt2", 3, "model_type 'gpt2' is not supported; use a model of qwen2, qwen3, llama"),
    ("chat pickle", 3, "pickle has only pickled weights (.bin, .pt), which can run code and are"),
    ("chat lfs", 3, "is a pointer of Git LFS, not the weights; run git lfs pull in lfs"),
    ("chat torn", 3, "torn/model.safetensors is not a complete safetensors file"),
    ("chat hf --beside lfs", 3, "lfs/model.safetensors is a pointer of Git LFS"),
    ("chat hf --beside ./hf", 2, "--beside names MODEL itself; name another, such as its BF16 exp"),
    ("chat --url 127.0.0.1:8000", 2, "'127.0.0.1:8000' is not of the form http://HOST:PORT."),
    ("chat --url http://127.0.0.1:9", 2, "no server answers (http://127.0.0.1:9/v1/models: All co"),
    ("chat --url http://127.0.0.1:9/v1", 2, "start one with infir2 serve MODEL, or write the addr"),
    (
        "chat --url {web}",
        2,
        "/v1/models: status 404); name one, such as that of infir2 serve MODEL.",
    ),
    ("chat --url {web}/nothing", 2, "is no server of OpenAI's API (it lists no model); name one"),
    ("chat --url {web}/key", 2, "the server refuses the key; set INFIR2_ENGINE_KEY to its own."),
    ("chat --url {web}/moved", 2, "it redirects (status 302); name the server itself"),
    ("chat --url http://10.0.0.7:8000", 2, "is not on this machine and there is no key: start the"),
    ("chat --url http://me:key@127.0.0.1:9", 2, "the URL of 127.0.0.1 has a key; set INFIR2_ENGIN"),
    ("chat --url {web} --engine vllm", 2, "--engine and its options are for MODEL; leave them out"),
    ("chat hf --engine vllm", 2, "--engine vllm needs --python, the interpreter of an environment"),
    ("chat hf --memory-fraction 0.5", 2, "are for --engine sglang or vllm; leave them out, or nam"),
    ("chat hf --temperature=-1", 2, "argument --temperature: invalid temperature value: '-1'"),
    ("chat hf --top-p 95", 2, "argument --top-p: invalid fraction value: '95'"),
    ("chat hf --max-tokens 0", 2, "argument --max-tokens: invalid positive integer value: '0'"),
    ("chat hf --seed 1e3", 2, "argument --seed: invalid int value: '1e3'"),
]
PLAN = [
    ("plan", 2, "the following arguments are required: --gpu; see `infir2 plan --help`."),
    ("plan sft.toml -gpu h100", 2, "-gpu is not an option, did you mean --gpu?"),
    ("plan --gpu h100", 2, "infir2 plan needs a recipe, such as one in recipes/demo"),
    ("plan sft --gpu h100", 2, "there is no such recipe file; did you mean sft.toml?"),
    ("plan hf --gpu h100", 2, "hf: this is a directory; name a recipe, a .toml file"),
    ("plan broken.toml --gpu h100", 2, "broken.toml: this is not valid TOML"),
    ("plan sft.toml --gpu v100", 2, "--gpu v100 is not one of h100, h200, a100; did you mean h100"),
    ("plan sft.toml --gpu none.json", 2, "not a file of infir2 bench (No such file or directory,"),
    ("plan sft.toml --gpu file.gguf", 2, "not a file of infir2 bench (it is no JSON); `infir2 ben"),
    ("plan sft.toml --gpu hf/config.json", 2, "not a file of infir2 bench (it has no name); `infi"),
    ("plan sft.toml --gpu list.json", 2, "not a file of infir2 bench (it has no name); `infir2 be"),
    ("plan sft.toml --gpu h100 --gpus 8.5", 2, "invalid positive integer value: '8.5'"),
    ("plan sft.toml --gpu h100 gpus=8", 2, "Did you mean --gpus=8?"),
    ("plan sft.toml --gpu h100 --node 2", 2, "Did you mean --nodes?"),
    ("plan sft.toml --gpu h100 --json=yes", 2, "argument --json: takes no value, and has 'yes'"),
    ("plan sft.toml --gpu h100 --nodes 0", 2, "argument --nodes: invalid positive integer value"),
    ("plan sft.toml --gpu h100 --model.pth=hf", 2, "is not a key; did you mean model.path?"),
    ("plan sft.toml --gpu h100 --model.path=nope", 2, "nope is not here and its name is none of q"),
    ("plan sft.toml --gpu h100 --model.path=adapter", 3, "adapter is a LoRA adapter, not a model;"),
    ("plan sft.toml --gpu h100 --model.path=empty", 3, "empty/config.json is missing; name a comp"),
    ("plan sft.toml --gpu h100 --model.path=gpt2", 3, "model_type 'gpt2' is not supported; use a"),
    ("plan sft.toml --gpu h100 --model.path=file.gguf", 2, "infir2 import hf file.gguf --to DIR."),
    ("plan sft.toml --gpu h100 --model.path=hf/config.json", 2, "name its directory, hf."),
    ("plan sft.toml --gpu h100 --run.seed 5", 2, "option --run.seed: write it as --run.seed=5."),
    ("plan sft.toml --gpu h100 --run.dir=~/x", 2, "only a shell knows ~"),
    ("plan sft.toml --gpu h100 --parallel.cp=2", 2, "start 2 processes, or change one of these s"),
]
# doctor has one option and bench has --to: they have fewer than twenty different mistakes.
DOCTOR = [
    ("doctor sft.toml", 2, "infir2 doctor takes no recipe, infir2 check and infir2 plan do; see"),
    ("doctor hf", 2, "unrecognized arguments: hf; see `infir2 doctor --help`."),
    ("doctor --jsn", 2, "did you mean --json?"),
    ("doctor --json=yes", 2, "argument --json: takes no value, and has 'yes'"),
    ("doctor --fix", 2, "unrecognized arguments: --fix; see `infir2 doctor --help`."),
    ("doctor --device cuda", 2, "unrecognized arguments: --device cuda; see `infir2 doctor --hel"),
    ("doctor ~/hf", 2, "~/hf: only a shell knows ~"),
    ("docter", 2, "docter is not a verb; did you mean doctor?"),
]
BENCH = [
    ("bench", 2, "the following arguments are required: --to; see `infir2 bench --help`."),
    ("bench --to", 2, "argument --to: expected one argument"),
    ("bench -to gpu.json", 2, "-to is not an option, did you mean --to?"),
    ("bench --out gpu.json", 2, "--out is not an option, did you mean --to?"),
    ("bench gpu.json", 2, "the following arguments are required: --to"),
    ("bench sft.toml --to gpu.json", 2, "infir2 bench takes no recipe, infir2 check and infir2 pl"),
    ("bench --to gpu.json more.json", 2, "unrecognized arguments: more.json"),
    ("bench --to gpu.json --gpus 8", 2, "unrecognized arguments: --gpus 8"),
    ("bench --to ~/gpu.json", 2, "~/gpu.json: only a shell knows ~"),
    ("bench --to hf", 2, "--to hf: is a directory; name a file, such as hf/gpu.json."),
    ("bench --to h100", 2, "--to h100: the file is JSON; name it h100.json."),
    ("bench --to no/gpu.json", 2, "no/gpu.json: no is no directory; make it first."),
    ("bench --to hf/config.json", 2, "exists and is not a file of infir2 bench; name another fil"),
    (
        "bench --to gpu.json",
        2,
        "infir2 bench measures a GPU, and torch sees none here; `infir2 plan",
    ),
]
MISTAKES = [*CHAT, *PLAN, *DOCTOR, *BENCH]
SFT = """[run]
dir = "new"
[data]
tokenizer = "world/tokenizer"
sequence_tokens = 128
micro_batch_tokens = 256
batch_samples = 4
[[data.sources]]
path = "world/sft1.jsonl"
[model]
path = "hf"
[schedule]
learning_rate = 1e-3
total_steps = 4
"""


class _Web(http.server.BaseHTTPRequestHandler):
    """Answers as the path says; else with the page of an error."""

    def do_GET(self) -> None:
        statuses = {"nothing": 200, "key": 401, "moved": 302}
        status = statuses.get(self.path.split("/")[1])
        if status is None:
            self.send_error(404)
            return
        self.send_response(status)
        self.send_header("Location", "http://127.0.0.1:9/")
        self.end_headers()
        self.wfile.write(b'{"data": []}')

    def log_message(self, *_: object) -> None:
        """A test's stderr is the command's."""


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and copies of it named for what is wrong with them."""
    directory = tmp_path_factory.mktemp("mistakes")
    make_model(make_world(directory / "world"), directory / "hf")
    for name in ("pickle", "gpt2", "torn", "lfs"):
        shutil.copytree(directory / "hf", directory / name)
    (directory / "pickle/model.safetensors").rename(directory / "pickle/pytorch_model.bin")
    (directory / "gpt2/config.json").write_text('{"model_type": "gpt2"}')
    (directory / "torn/model.safetensors").write_bytes(b"torn")
    (directory / "lfs/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name in ("empty", "adapter"):
        (directory / name).mkdir()
    (directory / "adapter/adapter_config.json").write_text("{}")
    files = {"file.gguf": "x", "list.json": "[]", "sft.toml": SFT, "broken.toml": "dir = new"}
    for name, text in files.items():
        (directory / name).write_text(text)
    return directory


@each(MISTAKES)
def test_a_mistake_gets_one_sentence_at_once(
    place: Path,
    web: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    code: int,
    sentence: str,
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    command = shlex.split(words.replace("{web}", web))
    assert sentence in sentence_of(capsys, place, command, code)
