"""What a request may ask of the model."""

from infir2.engines.server.errors import ApiError
from infir2.engines.server.served import Served
from infir2.engines.types import Request


def check_tokens(served: Served, request: Request, param: str) -> None:
    """Raise ApiError for tokens that the model does not have, or more than it has positions for.

    `param` is the field that has the prompt.
    """
    lowest, highest = min(request.token_ids), max(request.token_ids)
    if lowest < 0 or highest >= served.vocab_size:
        wrong = lowest if lowest < 0 else highest
        message = f"token {wrong} is outside the vocabulary of {served.vocab_size} tokens"
        raise ApiError(400, f"{param}: {message}", param=param)
    if request.max_total_tokens > served.max_positions:
        raise ApiError(
            400,
            f"the model has {served.max_positions} positions; the prompt has "
            f"{len(request.token_ids)} tokens and max_tokens is {request.params.max_tokens}: "
            "shorten one of them",
            "context_length_exceeded",
            param,
        )
