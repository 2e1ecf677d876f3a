"""Verbs between formats: export, import, verify-weights, tokenize; and report."""

from collections.abc import Sequence
from pathlib import Path

from infir2.cli.arguments import Parser
from infir2.errors import ConfigError
from infir2.terminal import print_result


def export(arguments: Sequence[str]) -> None:
    """infir2 export hf RUN --to DIR | export fp8 HF_DIR --to DIR | export megatron RUN_OR_HF_DIR --to DIR"""
    parser = Parser(
        prog="infir2 export", description="Writes a model in a form that other software loads."
    )
    kinds = parser.add_subparsers(
        dest="kind", required=True, metavar="hf|fp8|megatron", parser_class=Parser
    )
    hf = kinds.add_parser("hf", help="a checkpoint's weights in BF16")
    hf.add_argument(
        "source",
        type=Path,
        metavar="RUN",
        help="run directory (newest checkpoint) or a checkpoint in it",
    )
    fp8 = kinds.add_parser("fp8", help="a BF16 Hugging Face directory in block-wise FP8")
    fp8.add_argument("source", type=Path, metavar="HF_DIR", help="Hugging Face directory in BF16")
    fp8.add_argument(
        "--scale-format",
        choices=("pow2", "fp32"),
        default="pow2",
        help="as in training, fp8.scale_format (default pow2)",
    )
    megatron = kinds.add_parser(
        "megatron", help="BF16 weights as a Megatron-core torch_dist checkpoint"
    )
    megatron.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="run directory, a checkpoint in it, or a BF16 Hugging Face directory",
    )
    for kind in (hf, fp8, megatron):
        kind.add_argument(
            "--to",
            type=Path,
            required=True,
            metavar="DIR",
            help="directory to write; it must not exist",
        )
    words = parser.parse_args(arguments)
    from infir2.convert import export_fp8, export_hf
    from infir2.convert.megatron_export import export_megatron

    if words.kind == "hf":
        export_hf(words.source, words.to)
    elif words.kind == "megatron":
        export_megatron(words.source, words.to)
    else:
        export_fp8(words.source, words.to, words.scale_format)


def import_(arguments: Sequence[str]) -> None:
    """infir2 import hf|fp8|megatron SRC --to DIR"""
    parser = Parser(
        prog="infir2 import",
        description="Writes weights of another format as a BF16 Hugging Face directory.",
    )
    kinds = parser.add_subparsers(
        dest="kind", required=True, metavar="hf|fp8|megatron", parser_class=Parser
    )
    fp8 = kinds.add_parser("fp8", help="a block-wise FP8 Hugging Face directory")
    fp8.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="Hugging Face directory with weight_scale_inv tensors",
    )
    hf = kinds.add_parser(
        "hf", help="what transformers can load: a .gguf file, or a model directory"
    )
    hf.add_argument("source", type=Path, metavar="SRC", help="model directory or .gguf file")
    megatron = kinds.add_parser(
        "megatron",
        help="a Megatron-core checkpoint, or a torch distributed one with Hugging Face's names",
    )
    megatron.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="directory with metadata.json, or the run's with its tracker file",
    )
    megatron.add_argument(
        "--like",
        type=Path,
        metavar="HF_DIR",
        help="Hugging Face directory of this model: tokenizer and settings",
    )
    for kind in (hf, fp8, megatron):
        kind.add_argument(
            "--to",
            type=Path,
            required=True,
            metavar="DIR",
            help="directory to write; it must not exist",
        )
    words = parser.parse_args(arguments)
    from infir2.convert import import_fp8
    from infir2.convert.import_hf import import_hf
    from infir2.convert.megatron_import import import_megatron

    if words.kind == "hf":
        import_hf(words.source, words.to)
    elif words.kind == "fp8":
        import_fp8(words.source, words.to)
    else:
        import_megatron(words.source, words.to, words.like)


def verify_weights(arguments: Sequence[str]) -> None:
    """infir2 verify-weights RUN HF_FP8_DIR [--engine URL]"""
    about = "Compares the FP8 weights of a checkpoint with those of an export, byte by byte; exit code 1 if they differ."
    parser = Parser(prog="infir2 verify-weights", description=about)
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="run directory (newest checkpoint) or a checkpoint in it",
    )
    parser.add_argument(
        "hf_dir", type=Path, metavar="HF_FP8_DIR", help="what `infir2 export fp8` wrote"
    )
    parser.add_argument(
        "--engine",
        metavar="URL",
        help="also compare a server's greedy tokens (OpenAI API; key in INFIR2_ENGINE_KEY)",
    )
    words = parser.parse_args(arguments)
    from infir2.convert import verify_weights as verify

    print_result(
        f"{verify(words.run, words.hf_dir)} tensors of {words.hf_dir} hold the bytes of {words.run}."
    )
    if words.engine:
        from infir2.engines.probe import check_engine

        print_result(check_engine(words.engine, words.hf_dir))


def tokenize(arguments: Sequence[str]) -> None:
    """infir2 tokenize SOURCES --tokenizer DIR --out PREFIX"""
    about = "Writes documents as a Megatron indexed data set, PREFIX.bin and PREFIX.idx. Interrupted, it goes on where it was."
    parser = Parser(prog="infir2 tokenize", description=about)
    parser.add_argument(
        "sources",
        type=Path,
        nargs="+",
        metavar="SOURCE",
        help=".jsonl, .jsonl.gz, .parquet or .txt file, or a directory",
    )
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="directory with tokenizer.json"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="PREFIX",
        help="path of the files to write, without .bin",
    )
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes (default: one per CPU)"
    )
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="field with the text (default text)"
    )
    share = "stop above this share of unusable rows (default 0.01)"
    parser.add_argument(
        "--max-quarantined-fraction", type=float, default=0.01, metavar="X", help=share
    )
    words = parser.parse_args(arguments)
    if words.workers < 0:
        raise ConfigError(
            f"--workers {words.workers}: give the number of processes, or 0 for one per CPU."
        )
    from infir2.data.tokenize import tokenize as write

    done = write(
        words.sources,
        words.tokenizer,
        words.out,
        words.workers,
        words.text_field,
        words.max_quarantined_fraction,
    )
    print_result(
        f"{words.out}.bin: {done.tokens:,} tokens in {done.documents:,} documents"
        + f", {done.chunks_kept} chunks kept of an earlier run" * bool(done.chunks_kept)
        + f", {done.quarantined} rows left out, listed in {words.out}.quarantine.jsonl"
        * bool(done.quarantined)
    )


def report(arguments: Sequence[str]) -> None:
    """infir2 report RUN_DIR... [--to FILE]"""
    parser = Parser(
        prog="infir2 report",
        description="Writes one self-contained HTML page: curves, tables, samples.",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN_DIR",
        help="run directories, the stages in their order",
    )
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FILE",
        help="page to write (default RUN_DIR/report.html, several runs: report.html)",
    )
    words = parser.parse_args(arguments)
    out = words.to or (
        words.runs[0] / "report.html" if len(words.runs) == 1 else Path("report.html")
    )
    from infir2.report import write_report

    print_result(str(write_report(words.runs, out)))
