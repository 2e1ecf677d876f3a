"""What a request may ask of the model."""

from infir2.engines.server.errors import ApiError
from infir2.engines.server.served import Served
from infir2.engines.types import Request


def check_tokens(served: Served, request: Request, param: str) -> None:
    """Raise ApiError for tokens that the model does not have, or more than it has positions for.

    `param` is the field that has the prompt.
    """
    if not request.token_ids:
        raise ApiError(400, f"{param}: the prompt has no tokens", param=param)
    lowest, highest = min(request.token_ids), max(request.token_ids)
    if lowest < 0 or highest >= served.vocab_size:
        wrong = lowest if lowest < 0 else highest
        message = f"token {wrong} is outside the vocabulary of {served.vocab_size} tokens"
        raise ApiError(400, f"{param}: {message}", param=param)
    if request.max_total_tokens > served.context_tokens:
        raise ApiError(
            400,
            f"This model's maximum context length is {served.context_tokens} tokens, and you "
            f"requested {request.max_total_tokens}: {len(request.token_ids)} in the prompt, "
            f"{request.params.max_tokens} for the response; shorten one of them",
            "context_length_exceeded",
            param,
        )
