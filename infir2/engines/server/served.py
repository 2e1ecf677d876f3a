"""What a server serves."""

from dataclasses import dataclass, field
from time import time

from infir2.data import ChatTokenizer
from infir2.engines.server.driver import EngineDriver
from infir2.engines.server.errors import ApiError


@dataclass(frozen=True)
class Served:
    """A model behind an API.

    Attributes:
        name: by which clients ask for it.
        tokenizer: that of the model.
        max_positions: tokens of a prompt and its response, at most.
        vocab_size: rows of the model's embedding.
        driver: of its engine.
        created: Unix time.
    """

    name: str
    tokenizer: ChatTokenizer
    max_positions: int
    vocab_size: int
    driver: EngineDriver
    created: int = field(default_factory=lambda: int(time()))

    def require_ready(self) -> None:
        """Raise ApiError 503 until the engine has generated a token."""
        if not self.driver.is_ready:
            raise ApiError(503, "the model is being loaded; try again", "not_ready")
