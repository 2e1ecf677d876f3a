"""Every reader of files that a stranger may have written, with its hostile cases."""

import hashlib
import itertools
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import mutate_config
import mutate_gguf
import mutate_pickles
import mutate_programs
import mutate_safetensors
import mutate_template
import mutate_tokenizer
import mutate_torch_dist
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bounded import Case, Reader, nothing_else_below, run_command
from mutate_data import mutate_bytes, mutate_index, mutate_json, mutate_parquet, mutate_recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from hostile_answers import hostile_answers
from report_runs import demo_recipe
from test_code_cases import CHEATS, HONEST

from infir2.checkpoint.manifest import FileEntry, encode_manifest, read_manifest
from infir2.checkpoint.reader import open_checkpoint
from infir2.checkpoint.store import Store
from infir2.config.load import load
from infir2.config.schema import (
    ModelSection,
    RlRecipe,
    ShapeSection,
    SourceSection,
    TrainRecipe,
)
from infir2.convert import export_fp8, export_megatron
from infir2.data import load_tokenizer, template
from infir2.data.indexed import IndexedDocuments, write_index
from infir2.data.json_rows import JsonRows
from infir2.data.parquet import ParquetConverter, ParquetRows
from infir2.data.rows import parse_conversation, parse_document, parse_prompt
from infir2.data.template_check import check_chat_template
from infir2.data.types import RowError, Rows
from infir2.demo.tokenizer import write_tokenizer
from infir2.demo.world import build_vocabulary, every_phrase
from infir2.errors import DataError
from infir2.model import Decoder, exported_weights, write_hf
from infir2.pickles import read_pickle
from infir2.preflight.model import model_facts
from infir2.report import write_report
from infir2.verify import Limits, check_math_batch, run_code

T = TypeVar("T")
Cases = Iterator[Case]
SEED = 17
RECIPES = Path(__file__).parents[2] / "recipes" / "demo"
CHAT = [{"role": "user", "content": "2+3=?"}, {"role": "assistant", "content": "5"}]
ROWS = [
    {"text": f'a "{n}"', "messages": CHAT, "prompt": "2+3", "label": 5, "difficulty": n}
    for n in range(6)
]
REFERENCES = ("8", "\\frac12", "2\\sqrt{3}", "x^2+1", "(1,2)", "x<4", "100!", "1-2^{-2030}")
PICKLED = {
    "numbers": [1, 300, 70_000, 2**40, 1.5, True, None],
    "text": ("a", "b" * 300, b"bytes"),
    "nested": {"a": {"b": {}}, (1, "key"): [3, 4]},
}
LIMITS = Limits(seconds=2.0, total_seconds=4.0, memory_bytes=1 << 28)


def files_of(path: Path, mutants: Iterator[tuple[str, bytes]], read: Callable[[], object]) -> Cases:
    """Cases that write each mutant to `path` before they read it."""
    for label, data in mutants:
        path.write_bytes(data)
        yield label, read


def read_all(rows: Rows) -> None:
    section = SourceSection(path="x")
    for index in range(min(len(rows), 1000)):
        assert rows.number(index) > 0
        for parse in (parse_document, parse_conversation, parse_prompt):
            with suppress(RowError):
                parse(rows.read(index), section)


def _recipe(name: str, kind: type[TrainRecipe]) -> Callable[[Path], Cases]:
    def cases(directory: Path) -> Cases:
        good = (RECIPES / name).read_bytes()
        good = good.replace(b'extends = "', f'extends = "{RECIPES}/'.encode())
        path = directory / "recipe.toml"
        return files_of(path, mutate_recipe(good, SEED), lambda: load(kind, [path]))

    return cases


def json_file(form: str) -> bytes:
    lines = [json.dumps(row) for row in ROWS]
    return {
        "lines": "\n".join(lines),
        "array": f"[{', '.join(lines)}]",
        "pretty": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    }[form].encode()


def _json_rows(directory: Path) -> Cases:
    path = directory / "rows.jsonl"
    forms = [mutate_json(json_file(form), SEED) for form in ("lines", "array", "pretty")]
    return files_of(path, _in_turn(*forms), lambda: read_all(JsonRows(path)))


def compressed_file(suffix: str) -> bytes:
    codec = pa.Codec({".gz": "gzip", ".zst": "zstd"}[suffix])
    return codec.compress(json_file("lines"), asbytes=True)


def _compressed(suffix: str) -> Callable[[Path], Cases]:
    def cases(directory: Path) -> Cases:
        path, good = directory / f"rows.jsonl{suffix}", compressed_file(suffix)
        return files_of(path, mutate_bytes(good, SEED), lambda: read_all(JsonRows(path)))

    return cases


def _parquet(directory: Path) -> Cases:
    path = directory / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=4)
    with ParquetConverter() as converter:

        def read() -> None:
            read_all(ParquetRows(path, {"text", "messages"}, converter))

        yield from files_of(path, mutate_parquet(path.read_bytes(), SEED), read)


def write_tokens(directory: Path) -> Path:
    """An index with its tokens and what describes them."""
    path, lengths = directory / "tokens.idx", np.array([4, 0, 3, 9])
    write_index(path, np.uint16, lengths)
    path.with_suffix(".bin").write_bytes(bytes(2 * int(lengths.sum())))
    return path


def _index(directory: Path) -> Cases:
    path = write_tokens(directory)

    def read() -> None:
        documents = IndexedDocuments(path)
        assert sum(len(documents.read(n)["token_ids"]) for n in range(len(documents))) <= 16

    return files_of(path, mutate_index(path.read_bytes(), SEED), read)


def _side_file(directory: Path) -> Cases:
    path = write_tokens(directory)
    about = b'{"tokenizer": "abc", "documents": 4, "tokens": 16, "source_bytes": 64}'
    mutants = mutate_json(about, SEED)
    return files_of(path.with_suffix(".json"), mutants, lambda: IndexedDocuments(path).num_bytes)


def small_models(root: Path) -> Path:
    """A small model in BF16, in FP8, and with the weights in a pickle."""
    sizes = {"hidden_size": 128, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    decoder = Decoder.from_shape(ShapeSection(**sizes, ffn_size=128), vocab_size=32, seed=0)
    write_hf(root / "bf16", exported_weights(decoder), decoder.config.to_hf())
    export_fp8(root / "bf16", root / "fp8")
    (root / "bin").mkdir()
    shutil.copy(root / "bf16/config.json", root / "bin")
    (root / "bin/pytorch_model.bin").write_bytes(b"x")
    return root


def _config(kind: str, verb: tuple[str, str]) -> Callable[[Path], Cases]:
    def cases(directory: Path) -> Cases:
        model, out = small_models(directory) / kind, directory / "out"
        path = model / "config.json"
        actions = itertools.cycle(
            (
                lambda: run_command([*verb, str(model), "--to", str(out)]),
                lambda: model_facts(ModelSection(path=str(model)), 1),
                lambda: Decoder.from_hf(model),
            )
        )

        def read() -> None:
            with nothing_else_below(directory, out):
                next(actions)()

        return files_of(path, mutate_config.mutants(json.loads(path.read_text()), SEED), read)

    return cases


def _safetensors(directory: Path) -> Cases:
    shape = ShapeSection(
        architecture="llama", hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, ffn_size=64
    )
    decoder = Decoder.from_shape(shape, vocab_size=40, seed=0)
    model, out = directory / "a/model", directory / "a/out"
    write_hf(model, exported_weights(decoder), decoder.config.to_hf())
    path = model / "model.safetensors"

    def read() -> None:
        with nothing_else_below(directory, out):
            run_command(["export", "megatron", str(model), "--to", str(out)])

    return files_of(path, mutate_safetensors.mutants(path.read_bytes(), SEED), read)


def megatron_export(root: Path) -> Path:
    """A directory with `hf`, a model, and `torch_dist`, its export."""
    shape = ShapeSection(
        architecture="qwen2", hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=96
    )
    decoder = Decoder.from_shape(shape, vocab_size=50, seed=0)
    write_hf(root / "hf", exported_weights(decoder), decoder.config.to_hf())
    export_megatron(root / "hf", root / "torch_dist")
    return root


def _gguf(directory: Path) -> Cases:
    path, out = directory / "m.gguf", directory / "out"

    def read() -> None:
        with nothing_else_below(directory, out):
            run_command(["import", "hf", str(path), "--to", str(out)])

    return files_of(path, mutate_gguf.mutants(mutate_gguf.good_gguf(), SEED), read)


def _torch_dist(directory: Path) -> Cases:
    good = megatron_export(directory / "good")
    files = {path.name: path.read_bytes() for path in (good / "torch_dist/release").iterdir()}
    source, out = directory / "a/b/source", directory / "a/b/out"
    command = ["import", "megatron", str(source), "--to", str(out)]
    likes = itertools.cycle(([], [], ["--like", str(good / "hf")]))

    def read() -> None:
        with nothing_else_below(directory, out):
            run_command([*command, *next(likes)])

    for label, mutant in mutate_torch_dist.mutants(files, SEED):
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir(parents=True)
        for name, data in mutant.items():
            (source / name).write_bytes(data)
        yield label, read


def _pickles(_: Path) -> Cases:
    def read(data: bytes) -> None:
        try:
            read_pickle(data, lambda name: not name.startswith(("os.", "posix.", "builtins.")))
        except ValueError as error:
            raise DataError(str(error)) from error

    for label, data in mutate_pickles.mutants(pickle.dumps(PICKLED), SEED):
        yield label, lambda data=data: read(data)  # type: ignore[misc]


def _checkpoint(directory: Path) -> Cases:
    """A checkpoint whose manifest matches its damaged index, as only an attacker writes it."""
    path = Store(directory / "run").save(1, {"a": torch.ones(3)}, {}) / ".metadata"
    step, files = read_manifest(path.parent)
    for label, data in mutate_pickles.mutants(path.read_bytes(), SEED):
        path.write_bytes(data)
        changed = dict(files) | {path.name: FileEntry(len(data), _sha256(data))}
        (path.parent / "manifest.json").write_bytes(encode_manifest(step, changed))
        yield label, lambda: open_checkpoint(path.parent).tensors()["a"]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tokenizer(directory: Path) -> Cases:
    write_tokenizer(directory, build_vocabulary(every_phrase()))
    path = directory / "tokenizer.json"

    def read() -> None:
        tokenizer = load_tokenizer(str(directory))
        assert tokenizer.document_fingerprint
        assert isinstance(tokenizer.eos_token_ids, tuple)

    return files_of(path, mutate_tokenizer.mutants(json.loads(path.read_text()), SEED), read)


def _template(directory: Path) -> Cases:
    template.ROW_SECONDS = 1.0  # a busy machine refuses more
    write_tokenizer(directory, build_vocabulary(every_phrase()))
    path = directory / "tokenizer_config.json"
    good = json.loads(path.read_text())
    mutants = (
        (label, json.dumps(good | {"chat_template": text}).encode())
        for label, text in mutate_template.mutants(mutate_template.GOOD, SEED)
    )
    return files_of(path, mutants, lambda: check_chat_template(load_tokenizer(str(directory))))


def _answers(_: Path) -> Cases:
    def check(answer: str, reference: str) -> None:
        (verdict,) = check_math_batch([(f"\\boxed{{{answer}}}", reference)], 1.0)
        assert verdict.reason in ("wrong", "no_answer", "timeout", "oom"), verdict
        raise DataError(verdict.reason)

    answers = hostile_answers(100_000, SEED)
    for answer, reference in zip(answers, itertools.cycle(REFERENCES), strict=False):
        yield (
            f"{answer[:60]!r} for {reference}",
            lambda answer=answer, reference=reference: check(answer, reference),  # type: ignore[misc]
        )


def _programs(honest: bool) -> Callable[[Path], Cases]:
    """Programs that must earn nothing, or honest ones with lines that attack the jail."""

    def check(program: str, test: dict[str, object]) -> None:
        verdict = run_code(program, [test], LIMITS)
        assert verdict.reason != "jail_error", verdict
        assert honest or not verdict.correct, f"a reward for\n{program}"
        if not verdict.correct:
            raise DataError(f"{verdict.reason}")

    def cases(_: Path) -> Cases:
        programs = (HONEST if honest else CHEATS).items()
        mutants = [
            zip(mutate_programs.mutants(program, SEED), itertools.repeat((name, test)))
            for name, (program, test) in programs
        ]
        for (label, program), (name, test) in _in_turn(*mutants):
            yield f"{name}: {label}", lambda p=program, t=test: check(p, t)  # type: ignore[misc]

    return cases


def _run_directory(directory: Path) -> Cases:
    """What `infir2 report` reads of a run."""
    run = demo_recipe(directory / "runs") / "rl1"
    names = ("metrics.jsonl", "samples.jsonl", "recipe.toml", "environment.json")
    paths = [run / name for name in names] + [run / "checkpoints/step-100/state.json"]
    good = {path: path.read_bytes() for path in paths}
    write_report([run], directory / "page.html")  # what a first report imports is no case's
    mutants = [
        zip(
            itertools.repeat(path),
            (mutate_recipe if path.suffix == ".toml" else mutate_json)(data, SEED),
        )
        for path, data in good.items()
    ]
    for path, (label, data) in _in_turn(*mutants):
        path.write_bytes(data)
        yield f"{path.name}: {label}", lambda: write_report([run], directory / "page.html")
        path.write_bytes(good[path])


def _in_turn(*iterators: Iterator[T]) -> Iterator[T]:
    return itertools.chain.from_iterable(zip(*iterators, strict=True))


READERS = (
    Reader("recipe, pre-training (TOML)", _recipe("cpt.toml", TrainRecipe)),
    Reader("recipe, RL (TOML)", _recipe("rl1.toml", RlRecipe)),
    Reader("rows (JSON)", _json_rows),
    Reader("rows (JSON, gzip)", _compressed(".gz")),
    Reader("rows (JSON, Zstandard)", _compressed(".zst")),
    Reader("rows (Parquet)", _parquet),
    Reader("tokens (Megatron index)", _index),
    Reader("tokens (side file, JSON)", _side_file),
    Reader("`config.json`, BF16", _config("bf16", ("export", "fp8"))),
    Reader("`config.json`, FP8", _config("fp8", ("import", "fp8"))),
    Reader("weights (safetensors)", _safetensors),
    Reader("weights (GGUF)", _gguf),
    Reader("Megatron checkpoint", _torch_dist),
    Reader("checkpoint of a run, index", _checkpoint),
    Reader("pickle", _pickles),
    Reader("`tokenizer.json`", _tokenizer, 0.5),
    Reader("chat template (Jinja)", _template, 0.25),
    Reader("answers", _answers),
    Reader("programs that cheat", _programs(honest=False), 0.5),
    Reader("programs that attack", _programs(honest=True), 0.5),
    Reader("run directory, by `infir2 report`", _run_directory),
)
