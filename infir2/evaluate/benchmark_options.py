"""What `infir2 eval --benchmarks` is told, and the model that it names."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from infir2.checkpoint.fingerprint import fingerprint
from infir2.data import load_tokenizer
from infir2.data.types import RowError
from infir2.engines.engine_options import EngineOptions, check_model
from infir2.engines.http_client import HttpClient, check_url
from infir2.engines.remote import EngineError
from infir2.errors import ConfigError
from infir2.evaluate.benchmarks import Benchmark
from infir2.evaluate.engine_start import check_port
from infir2.evaluate.upstream import Patience
from infir2.terminal import begin_phase


@dataclass(frozen=True)
class BenchmarkOptions:
    """What `infir2 eval --benchmarks` is told.

    Attributes:
        urls: of the engines, each ending with /v1; empty: start engines of `model_directory`.
        model: its name there; empty: the only one that the first engine has.
        benchmarks: to run, in this order.
        data: the user's file or directory with their questions.
        run_dir: of the results.
        samples, max_tokens: per question and response; 0: those of docs/recipe.md.
        parallel: requests at one time.
        engines: to start on each node.
        port: of loopback, of the first engine; 0: a free one.
        profile: of profiles.PROFILES.
        seed: every sample's own seed is drawn from it.
        api_key: of the engines.
    """

    urls: tuple[str, ...]
    benchmarks: tuple[Benchmark, ...]
    data: Path
    run_dir: Path
    model: str = ""
    samples: int = 0
    max_tokens: int = 0
    temperature: float = 0.65
    top_p: float = 0.95
    parallel: int = 64
    seed: int = 0
    api_key: str = ""
    model_directory: Path | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    engines: int = 1
    port: int = 0
    profile: str = "current"
    patience: Patience = field(default_factory=Patience)

    def samples_of(self, benchmark: Benchmark) -> int:
        return self.samples or benchmark.samples

    def max_tokens_of(self, benchmark: Benchmark) -> int:
        return self.max_tokens or benchmark.max_tokens


def identify_model(options: BenchmarkOptions) -> str:
    """The model's name at the engines, or a directory's fingerprint. Raises ConfigError."""
    if options.model_directory is None:
        begin_phase("asking the engines for their models")
        return asyncio.run(_find_model(options))
    options.engine.check(options.model_directory)
    if options.port:
        check_port(options.port)
    _check_model(options.model_directory)
    begin_phase("reading the model's files")
    return fingerprint(options.model_directory)


def _check_model(directory: Path) -> None:
    """Raise ConfigError unless it is a Hugging Face directory with a chat template."""
    check_model("MODEL", directory)
    begin_phase("loading the tokenizer")
    try:
        load_tokenizer(directory).encode_prompt([{"role": "user", "content": "1"}])
    except RowError as error:
        raise ConfigError(
            f"MODEL: {directory} has no chat template that works ({error})."
        ) from None


async def _find_model(options: BenchmarkOptions) -> str:
    """The model's name at the engines. Raises ConfigError."""
    model = options.model
    for url in options.urls:
        check_url("URL", url, options.api_key)
        client = HttpClient(url, options.api_key)
        try:
            answer = await asyncio.wait_for(client.get("/models"), 30)
            names = [str(each["id"]) for each in answer["data"]]
        except (EngineError, TimeoutError) as error:
            raise ConfigError(f"URL: no engine answers at {url} ({error}); start it.") from error
        except (KeyError, TypeError) as error:
            raise ConfigError(f"URL: {url}/models is not the list of an OpenAI API.") from error
        finally:
            await client.close()
        if not model and len(names) == 1:
            model = names[0]
        if model not in names:
            there = ", ".join(names) or "none"
            wanted = f"no model {model!r}" if model else "several models or none"
            raise ConfigError(f"URL: {url} has {wanted} (it has {there}): name one by --model.")
    return model
