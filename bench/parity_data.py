"""The data of recipes/parity: documents and Python code, a tokenizer of their own, two token files.

    python bench/parity_data.py --corpus DIR --to data/parity [--vocab-size 16384]

DIR has *.jsonl.gz files of documents with `text`. Code comes from packages that this environment
has anyway (PACKAGES): their versions change the text a little, so runs are comparable only where
they read the same files. A document that occurs twice is used once. One document in HELD_OUT, by
the checksum of its text, is for validation, cut after HELD_OUT_CHARACTERS: one file of sympy, with
polynomials of 40 variables, would be a quarter of the validation and drown it in noise. Writes
tokenizer/, train.{bin,idx,json}, validation.{bin,idx,json} and about.json. Documents are cut into
pieces of at most PIECE_TOKENS, so that a batch is of many documents. Refuses a directory that
exists.
"""

import argparse
import gzip
import importlib.util
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from infir2.data.indexed import IndexedDocuments, write_index
from infir2.data.tokenize import tokenize

PACKAGES = ("networkx", "numpy", "sympy", "torch")
HELD_OUT = 50
HELD_OUT_CHARACTERS = 32_768
TOKENIZER_SAMPLE = 4  # the tokenizer is trained on one document in this many
MIN_CHARACTERS = 200
PIECE_TOKENS = 1024
END = "<|endoftext|>"
# The split of Qwen2.5's tokenizer, but up to three digits stay together.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def documents(corpus: Path) -> Iterator[tuple[str, str]]:
    """(name of the source, text) of every document and file of code, in a fixed order."""
    for file in sorted(corpus.glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield file.name.removesuffix(".jsonl.gz"), json.loads(line)["text"]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations
        for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
            yield package, path.read_text(encoding="utf-8", errors="replace")


def split(corpus: Path, work: Path) -> dict[str, Counter[str]]:
    """Write train.jsonl and validation.jsonl; return the characters of each source in both."""
    seen: set[int] = set()
    counts: dict[str, Counter[str]] = {"train": Counter(), "validation": Counter()}
    files = {name: (work / f"{name}.jsonl").open("w", encoding="utf-8") for name in counts}
    for source, text in documents(corpus):
        checksum = zlib.crc32(text.encode("utf-8", errors="replace"))
        if len(text) < MIN_CHARACTERS or checksum in seen:
            continue
        seen.add(checksum)
        name = "train" if checksum % HELD_OUT else "validation"
        if name == "validation":
            text = text[:HELD_OUT_CHARACTERS]
        files[name].write(json.dumps({"text": text}) + "\n")
        counts[name][source] += len(text)
    for file in files.values():
        file.close()
    return counts


def train_tokenizer(texts: Path, vocab_size: int, directory: Path) -> None:
    """Train a byte-level BPE tokenizer of `vocab_size` entries on a sample of the documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with texts.open(encoding="utf-8") as lines:
        sample = (json.loads(x)["text"] for i, x in enumerate(lines) if not i % TOKENIZER_SAMPLE)
        tokenizer.train_from_iterator(sample, trainer)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def cut_documents(prefix: Path) -> int:
    """Rewrite the index of `prefix`, with pieces of PIECE_TOKENS as documents; returns how many."""
    documents = IndexedDocuments(prefix)
    lengths = [len(documents.read(index)["token_ids"]) for index in range(len(documents))]
    pieces = [min(PIECE_TOKENS, n - start) for n in lengths for start in range(0, n, PIECE_TOKENS)]
    dtype = documents.read(0)["token_ids"].dtype.type
    index = prefix.with_suffix(".idx")
    index.unlink()
    write_index(index, dtype, np.asarray(pieces))
    return len(pieces)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=16384)
    options = parser.parse_args(arguments)
    work: Path = options.to
    work.mkdir(parents=True)
    characters = split(options.corpus, work)
    train_tokenizer(work / "train.jsonl", options.vocab_size, work / "tokenizer")
    about: dict[str, object] = {
        "packages": {name: version(name) for name in PACKAGES},
        "characters": characters,
    }
    for name in characters:
        result = tokenize([work / f"{name}.jsonl"], work / "tokenizer", work / name)
        pieces = cut_documents(work / name)
        about[name] = {
            "documents": result.documents,
            "pieces": pieces,
            "tokens": result.tokens,
        }
        (work / f"{name}.jsonl").unlink()
    (work / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
