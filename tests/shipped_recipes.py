"""The recipes of the checkout that are run as they are."""

from pathlib import Path

from infir2.config.schema import EvalRecipe, RlRecipe, TrainRecipe

RECIPES = Path(__file__).parents[1] / "recipes"
# Parts that others extend or that change another recipe, and a list of studies.
PARTS = {"base", "study-base", "studies"} | {
    f"parity/{name}"
    for name in ("bf16", "fp32", "moments-8bit", "moments-bf16", "skip-ends", "skip-qkv")
}


def name_of(path: Path) -> str:
    """Such as "demo/rl1"."""
    return f"{path.parent.name}/{path.stem}"


def recipe_files() -> list[Path]:
    """All but `PARTS`."""
    files = sorted(RECIPES.glob("*/*.toml"))
    return [path for path in files if not {path.stem, name_of(path)} & PARTS]


def stage_of(path: Path) -> str:
    """Such as "rl", "eval", "cpt" or "sft"; another word for a recipe that is named otherwise."""
    return path.stem.removeprefix("study-").partition("-")[0].rstrip("12")


def class_of(path: Path) -> type[TrainRecipe] | type[EvalRecipe]:
    """The kind of recipe that a file's name says."""
    kinds: dict[str, type[TrainRecipe] | type[EvalRecipe]] = {"rl": RlRecipe, "eval": EvalRecipe}
    return kinds.get(stage_of(path), TrainRecipe)
