"""The base class of all sections of a recipe."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of a recipe: unknown keys, coerced types, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
