"""Verbs between formats: export, import, verify-weights, tokenize."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import get_args

from infir2.cli.arguments import Parser
from infir2.cli.outputs import write_once
from infir2.config.data_sections import DocumentBos
from infir2.config.paths import check_model_directory, check_tokenizer_directory
from infir2.errors import CheckpointError, ConfigError
from infir2.terminal import print_result

_PATHS = ("source", "to")


def export(arguments: Sequence[str]) -> None:
    """infir2 export hf RUN --to DIR | fp8 SRC --to DIR | megatron SRC --to DIR"""
    options = _export_parser().parse_args(arguments)
    from infir2.checkpoint.fingerprint import fingerprint, is_run
    from infir2.convert import export_fp8, export_hf, export_megatron

    def write() -> None:
        if options.kind == "hf":
            export_hf(options.source, options.to)
        elif options.kind == "megatron":
            export_megatron(options.source, options.to)
        else:
            # a run knows its own format
            scale_format = options.scale_format or (None if is_run(options.source) else "pow2")
            convert = partial(export_fp8, servable=True) if options.servable else export_fp8
            for finding in convert(options.source, options.to, scale_format):
                print_result(finding)

    settings = {name: value for name, value in vars(options).items() if name not in _PATHS}
    made_by = {"command": "export"} | settings | {"source": fingerprint(options.source)}
    with _explained(options.kind, options.source):
        write_once(options.to, made_by, write)


@contextmanager
def _explained(export: str, source: Path) -> Iterator[None]:
    """Explain a source that is of the wrong kind: missing, on the hub, or converted already.

    `export` is the kind of the export; empty for an import.
    """
    from infir2.checkpoint.fingerprint import is_run

    try:
        yield
    except CheckpointError as error:
        _check_source(export, source, error)
        if export == "hf" and not is_run(source) and (source / "config.json").is_file():
            raise CheckpointError(
                f"{source}: is a Hugging Face directory already; infir2 export hf reads a run."
            ) from error
        if not export and is_run(source):
            raise CheckpointError(
                f"{source}: is a run of infir2, which needs no import; infir2 export hf {source} "
                "--to DIR writes it as a Hugging Face directory."
            ) from error
        raise


def _check_source(export: str, source: Path, error: CheckpointError) -> None:
    """Raise CheckpointError for a source that is no directory, or one of another format."""
    if source.is_file() and (export or source.suffix != ".gguf"):
        wanted = "a run or a model's directory" if export else "a model's directory or a .gguf file"
        raise CheckpointError(f"SRC: {source} is a file; name {wanted}.") from error
    try:
        if not source.is_file():
            check_model_directory("SRC", str(source))
    except ConfigError as missing:
        raise CheckpointError(str(missing)) from error
    if export and not (source / "config.json").exists() and "neither a checkpoint" in str(error):
        raise CheckpointError(
            f"SRC: {source} is neither a run with a checkpoint (checkpoints/step-N) nor a Hugging "
            "Face directory (config.json); name one."
        ) from error


def _export_parser() -> Parser:
    parser = Parser(
        prog="infir2 export", description="Writes a model in a format that other software loads."
    )
    kinds = parser.add_subparsers(
        dest="kind", required=True, metavar="hf|fp8|megatron", parser_class=Parser
    )
    hf = kinds.add_parser("hf", help="a checkpoint's weights in BF16")
    run_help = "run directory (newest checkpoint) or a checkpoint in it"
    _add_source_and_target(hf, "RUN", run_help)
    fp8 = kinds.add_parser("fp8", help="a run or a BF16 directory in block-wise FP8")
    fp8_help = "run directory or a checkpoint in it, in the run's own format; or a BF16 directory"
    _add_source_and_target(fp8, "SRC", fp8_help)
    fp8.add_argument(
        "--scale-format",
        choices=("pow2", "fp32"),
        help="as in training, fp8.scale_format (default: the run's, or pow2)",
    )
    fp8.add_argument(
        "--servable",
        action="store_true",
        help="keep layers in BF16 that vLLM, SGLang and transformers refuse in FP8",
    )
    megatron = kinds.add_parser(
        "megatron", help="BF16 weights as a Megatron-core torch_dist checkpoint"
    )
    source_help = "run directory, a checkpoint in it, or a BF16 Hugging Face directory"
    _add_source_and_target(megatron, "SRC", source_help)
    return parser


def import_(arguments: Sequence[str]) -> None:
    """infir2 import hf|fp8|megatron SRC --to DIR"""
    options = _import_parser().parse_args(arguments)
    from infir2.checkpoint.fingerprint import fingerprint
    from infir2.convert import import_fp8, import_hf, import_megatron
    from infir2.convert.megatron_import import find_iteration

    source, like = options.source, options.like if options.kind == "megatron" else None
    with _explained("", source):
        if options.kind == "megatron":
            source = find_iteration(source)
        converters: dict[str, Callable[[], object]] = {
            "hf": lambda: import_hf(source, options.to),
            "fp8": lambda: import_fp8(source, options.to),
            "megatron": lambda: import_megatron(source, options.to, like),
        }
        made_by = {"command": "import", "kind": options.kind, "source": fingerprint(source)}
        made_by |= {"like": fingerprint(like)} if like else {}
        write_once(options.to, made_by, converters[options.kind], str(source))


def _import_parser() -> Parser:
    parser = Parser(
        prog="infir2 import",
        description="Writes weights of another format as a BF16 Hugging Face directory.",
    )
    kinds = parser.add_subparsers(
        dest="kind", required=True, metavar="hf|fp8|megatron", parser_class=Parser
    )
    fp8 = kinds.add_parser("fp8", help="a block-wise FP8 Hugging Face directory")
    _add_source_and_target(fp8, "SRC", "Hugging Face directory with weight_scale_inv tensors")
    hf = kinds.add_parser(
        "hf", help="what transformers can load: a .gguf file, or a model directory"
    )
    _add_source_and_target(hf, "SRC", "model directory or .gguf file")
    megatron = kinds.add_parser(
        "megatron",
        help="a Megatron-core checkpoint, or a torch distributed one with Hugging Face's names",
    )
    source_help = "directory with metadata.json, or the run's with its tracker file"
    _add_source_and_target(megatron, "SRC", source_help)
    megatron.add_argument(
        "--like",
        type=Path,
        metavar="HF_DIR",
        help="Hugging Face directory of this model: tokenizer and settings",
    )
    return parser


def _add_source_and_target(parser: Parser, metavar: str, source_help: str) -> None:
    parser.add_argument("source", type=Path, metavar=metavar, help=source_help)
    parser.add_argument(
        "--to",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory to write; it must not exist",
    )


def verify_weights(arguments: Sequence[str]) -> None:
    """infir2 verify-weights RUN HF_FP8_DIR [--engine URL]"""
    options = _verify_parser().parse_args(arguments)
    _check_verified(options.run, options.hf_dir)
    if options.engine:  # before many gigabytes are read
        from infir2.engines.probe import check_engine, check_engine_url

        check_engine_url(options.engine)
    from infir2.convert import verify_weights as compare

    num_tensors = compare(options.run, options.hf_dir)
    print_result(f"{num_tensors} tensors of {options.hf_dir} hold the bytes of {options.run}.")
    if options.engine:
        print_result(check_engine(options.engine, options.hf_dir))


def _check_verified(run: Path, export: Path) -> None:
    """Raise ConfigError or CheckpointError unless `run` may be a run and `export` a model."""
    from infir2.checkpoint.fingerprint import is_run

    if is_run(export) and not is_run(run):
        raise ConfigError(f"the run comes first: infir2 verify-weights {export} {run}.")
    if is_run(export):
        raise ConfigError(
            f"HF_FP8_DIR: {export} is a run directory; name what was exported from it: "
            f"infir2 export fp8 {export} --to DIR writes that."
        )
    check_model_directory("HF_FP8_DIR", str(export))
    if is_run(run):
        return
    if not run.exists():
        raise CheckpointError(f"RUN: {run} does not exist; name a run directory or its checkpoint.")
    kind = "a Hugging Face model" if (run / "config.json").is_file() else "no run directory"
    raise CheckpointError(
        f"RUN: {run} is {kind}; name the run, or its checkpoint, that {export} was exported from."
    )


def _verify_parser() -> Parser:
    parser = Parser(
        prog="infir2 verify-weights",
        description=(
            "Compares the FP8 weights of a checkpoint with those of an export, byte by byte; "
            "exit code 1 if they differ."
        ),
    )
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="run directory (newest checkpoint) or a checkpoint in it",
    )
    parser.add_argument(
        "hf_dir", type=Path, metavar="HF_FP8_DIR", help="directory that `infir2 export fp8` wrote"
    )
    parser.add_argument(
        "--engine",
        metavar="URL",
        help="also compare a server's greedy tokens (OpenAI API; key in INFIR2_ENGINE_KEY)",
    )
    return parser


def tokenize(arguments: Sequence[str]) -> None:
    """infir2 tokenize SOURCES --tokenizer DIR --out PREFIX"""
    options = _tokenize_parser().parse_args(arguments)
    if options.workers < 0:
        raise ConfigError(
            f"--workers {options.workers}: set the number of processes, or 0 for one per CPU."
        )
    if not 0 <= options.max_quarantined_fraction <= 1:
        raise ConfigError(
            f"--max-quarantined-fraction {options.max_quarantined_fraction:g}: name a fraction, "
            "0 to 1."
        )
    if options.out.suffix in (".bin", ".idx"):
        raise ConfigError(
            f"--out {options.out}: name the prefix of the files, {options.out.with_suffix('')}."
        )
    check_tokenizer_directory("--tokenizer", options.tokenizer)
    from infir2.data.tokenize import tokenize as write

    written = write(
        options.sources,
        options.tokenizer,
        options.out,
        options.workers,
        options.text_field,
        options.max_quarantined_fraction,
        options.document_bos,
    )
    text = f"{options.out}.bin: {written.tokens:,} tokens in {written.documents:,} documents"
    if written.chunks_kept:
        text += f", {written.chunks_kept} chunks kept of an earlier run"
    if written.quarantined:
        text += f", {written.quarantined} rows left out, listed in {options.out}.quarantine.jsonl"
    print_result(text)


def _tokenize_parser() -> Parser:
    parser = Parser(
        prog="infir2 tokenize",
        description=(
            "Writes documents as a Megatron indexed data set, PREFIX.bin and PREFIX.idx. "
            "An interrupted command resumes when it is run again."
        ),
    )
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
    parser.add_argument(
        "--max-quarantined-fraction",
        type=float,
        default=0.01,
        metavar="X",
        help="stop above this fraction of unusable rows (default 0.01)",
    )
    parser.add_argument(
        "--document-bos",
        choices=get_args(DocumentBos),
        default="tokenizer",
        help="BOS token before each document (default: if transformers writes it there)",
    )
    return parser
