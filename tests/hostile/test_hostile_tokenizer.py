"""A hostile tokenizer.json ends in one sentence, at once; it never aborts the process."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutate_tokenizer import mutants

from infir2.cli import main
from infir2.data import load_tokenizer
from infir2.data.types import RowError
from infir2.demo.tokenizer import write_tokenizer
from infir2.demo.world import build_vocabulary, every_phrase

SECONDS, NUM_MUTANTS = 20, 70
# In a process of its own, because a file that gets through can end it.
LOAD = """
import resource, sys, time
from infir2.data import load_tokenizer
from infir2.errors import UserError
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
for line in sys.stdin:
    started = time.perf_counter()
    try:
        tokenizer = load_tokenizer(line.strip())
        tokenizer.document_fingerprint, tokenizer.eos_token_ids
        said = f"{tokenizer.vocab_size} tokens"
    except UserError as error:
        said = str(error)
    print(f"{time.perf_counter() - started:.1f} {said}", flush=True)
"""
REFUSED = (
    *("padding", "multiple", "100,000 added", "panic", "long text", "no regex", "no chunks"),
    *("square of letters", "square of spaces", "doubled", "decoder doubled"),
    *("no vocabulary", "deep", "id 1000000000", "vocabulary 1000000000", "id -1"),
)


@pytest.mark.parametrize("seed", [0])
def test_mutants_of_a_tokenizer_end_in_a_tokenizer_or_a_sentence(tmp_path: Path, seed: int) -> None:
    write_tokenizer(tmp_path / "good", build_vocabulary(every_phrase()))
    good = json.loads((tmp_path / "good/tokenizer.json").read_text())
    labels = []
    for label, data in itertools.islice(mutants(good, seed), NUM_MUTANTS):
        directory = tmp_path / str(len(labels))
        shutil.copytree(tmp_path / "good", directory)
        (directory / "tokenizer.json").write_bytes(data)
        labels.append(label)
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        input="".join(f"{tmp_path}/{i}\n" for i in range(len(labels))),
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(labels), (labels[len(lines)], done.stderr[-2000:])
    said = {}
    for label, line in zip(labels, lines, strict=True):
        seconds, _, said[label] = line.partition(" ")
        assert float(seconds) < SECONDS, label
        assert len(said[label]) < 1000, label
    for label in REFUSED:
        assert said[label].startswith("data.tokenizer: "), label


@pytest.mark.filterwarnings("ignore")
def test_a_regular_expression_that_gives_up_makes_one_row_unusable(
    demo_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The library panics after ten million steps back, here on 40 letters behind a sign."""
    shutil.copytree(demo_dir, tmp_path / "t")
    path = tmp_path / "t/tokenizer.json"
    content = json.loads(path.read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(?<=>>>)(a+)+$"}, "behavior": "Isolated"}
    pattern["invert"] = False
    parts = [part for part in (pattern, content["pre_tokenizer"]) if part]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    path.write_text(json.dumps(content))
    texts = ["2", ">>>" + "a" * 40 + "!", "3"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = ["tokenize", str(rows), "--tokenizer", str(tmp_path / "t"), "--workers=1"]
    command += ["--out", str(tmp_path / "out"), "--max-quarantined-fraction=0.5"]
    assert main(command) == 0
    assert "in 2 documents, 1 rows left out" in capfd.readouterr().out
    (line,) = (tmp_path / "out.quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "tokenizer_failed"
    with pytest.raises(RowError, match="gives up on the text"):
        load_tokenizer(tmp_path / "t").encode_document(texts[1])
