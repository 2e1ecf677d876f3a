"""Measured steps, which ship with the package: what the estimates are fitted to and judged by."""

from dataclasses import dataclass
from typing import Any

from infir2.config.schema import ShapeSection, TrainRecipe
from infir2.model import ModelConfig
from infir2.model.memory import GIB
from infir2.parallel.mesh import Sizes
from infir2.planner.gpus import find_gpu, package_json
from infir2.planner.step_time import step_seconds
from infir2.planner.work import Attention, Load
from infir2.preflight.gpu_memory import gpu_ledger


@dataclass(frozen=True)
class Row:
    """A measured step. `options` are keys of the recipe, `sizes` is (dp_replicate, dp, cp, tp).

    `milliseconds` is of the whole step, `update_ms` of its optimizer; 0 where not measured, as
    `peak_gib`.
    """

    source: str
    name: str
    gpu: str
    shape: dict[str, Any]
    options: dict[str, Any]
    tokens: int
    length: int
    milliseconds: float
    peak_gib: float
    update_ms: float = 0.0
    sizes: tuple[int, int, int, int] = (1, 1, 1, 1)
    micro_batches: int = 1
    attention: Attention = "torch"
    has_optimizer: bool = True

    def load(self) -> Load:
        shape = ShapeSection(**self.shape)
        keys = {"data.micro_batch_tokens": self.tokens, "schedule.learning_rate": 1e-5}
        sections: dict[str, dict[str, Any]] = {}
        for key, value in (keys | self.options).items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
        return Load(
            config=ModelConfig.from_shape(shape, shape.vocab_size),
            recipe=TrainRecipe.model_validate(sections),
            tokens=self.tokens,
            length=self.length,
            sizes=Sizes(*self.sizes),
            micro_batches=self.micro_batches,
            attention=self.attention,
            has_optimizer=self.has_optimizer,
        )

    def predicted_milliseconds(self, constants: dict[str, float] | None = None) -> float:
        return 1e3 * sum(step_seconds(self.load(), find_gpu(self.gpu), constants).values())

    def predicted_gib(self) -> float:
        load = self.load()
        parts = gpu_ledger(load.config, load.recipe, load.sizes)
        if not self.has_optimizer:
            del parts["optimizer"]
        return sum(parts.values()) / GIB


def measured_rows() -> list[Row]:
    """All rows of measured.json."""
    return [Row(**row) for row in package_json("measured.json")]
