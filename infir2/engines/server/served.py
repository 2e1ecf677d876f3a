"""What a server serves."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import time
from typing import Any

from infir2.data import ChatTokenizer
from infir2.engines.server.driver import EngineDriver
from infir2.engines.server.errors import ApiError


@dataclass(frozen=True)
class Served:
    """A model behind an API.

    Attributes:
        name: by which clients ask for it.
        tokenizer: that of the model.
        max_positions: that the model was made for.
        vocab_size: rows of the model's embedding.
        driver: of its engine.
        created: Unix time.
        tokenizer_thread: renders templates and tokenizes.
    """

    name: str
    tokenizer: ChatTokenizer
    max_positions: int
    vocab_size: int
    driver: EngineDriver[Any]
    created: int = field(default_factory=lambda: int(time()))
    tokenizer_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    @property
    def context_tokens(self) -> int:
        """Tokens of a prompt and its response, at most: the model's positions, or the engine's."""
        return min(self.max_positions, self.driver.max_request_tokens)

    def require_ready(self) -> None:
        """Raise ApiError 503 until the engine has generated a token."""
        if not self.driver.is_ready:
            raise ApiError(503, "the model is being loaded; try again", "not_ready")

    def require_model(self, name: str | None) -> None:
        """Raise ApiError 404 for another model than this one."""
        if name not in (None, self.name):
            message = f"The model `{name}` does not exist; this server has `{self.name}`"
            raise ApiError(404, message, "model_not_found", "model")
