"""Episodes of several turns: the policy writes, an environment answers, the policy writes on.

Tokens in, tokens out: what the policy has written stays as it was sampled. The environment's answer
is a message of the user, in the tokens of the chat template between two turns of the assistant;
`Completion.outside` says which tokens these are, and they are not trained.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from infir2.config.schema import RlSection
from infir2.data import ChatTokenizer, Prompt
from infir2.data.types import RowError
from infir2.engines.types import Completion
from infir2.errors import DataError
from infir2.verify.environments import Calculator, observe
from infir2.verify.functions import call_function

OBSERVE = "infir2.verify.environments:observe"
BUILT_IN = {"calculator": f"{Calculator.__module__}:{Calculator.__name__}"}


class Episodes:
    """Answers the turns of responses, for recipes with `rl.environment`."""

    def __init__(self, rl: RlSection, tokenizer: ChatTokenizer) -> None:
        self._rl, self._tokenizer = rl, tokenizer

    def answer(
        self, responses: Sequence[Completion], prompt: Prompt, opened: str = ""
    ) -> list[Completion]:
        """The responses with the environment's answers to their last turns, to be continued.

        A response itself if its last turn is not finished, the last one (`rl.max_turns`), the end
        of its tokens, or without an answer. `opened` is the beginning of the responses that the
        prompt ends with.

        Raises:
            DataError: the environment failed, which names the prompt's row.
        """
        asked = [each for each in responses if self._is_asked(each)]
        texts = iter(self._observe(prompt, [self.turns(each, opened) for each in asked]))
        return [
            self._with_answer(each, next(texts), prompt) if self._is_asked(each) else each
            for each in responses
        ]

    def _is_asked(self, response: Completion) -> bool:
        has_room = len(response.token_ids) < self._rl.max_response_tokens
        num_turns = len(turn_spans(response))
        return response.finish == "stop" and num_turns < self._rl.max_turns and has_room

    def turns(self, response: Completion, opened: str = "") -> list[str]:
        """The texts of the policy's turns."""
        texts = [self._tokenizer.decode(response.token_ids[a:b]) for a, b in turn_spans(response)]
        return [opened + texts[0], *texts[1:]]

    def _observe(self, prompt: Prompt, episodes: Sequence[list[str]]) -> list[str | None]:
        """The answers to the last of each episode's turns."""
        name = self._rl.environment
        if name in BUILT_IN:
            return [observe(BUILT_IN[name], prompt.fields, turns) for turns in episodes]
        items = [(name, prompt.fields, turns) for turns in episodes]
        outcomes = call_function(OBSERVE, items, self._rl.reward_seconds)
        if failed := next((each for each in outcomes if each.reason), None):
            raise DataError(
                f"{prompt.origin}: rl.environment = {name} failed ({failed.reason}: "
                f"{failed.detail}); fix it, or the row"
            )
        return [each.value for each in outcomes]

    def _with_answer(self, response: Completion, text: str | None, prompt: Prompt) -> Completion:
        if text is None:
            return response
        start = len(response.token_ids)
        ended = response.token_ids[-1] in self._tokenizer.eos_token_ids
        try:
            answer = self._tokenizer.encode_answer(text or " ", with_end=not ended)
        except RowError as error:
            raise DataError(f"{prompt.origin}: the environment's answer: {error}") from None
        answer = answer[: self._rl.max_response_tokens - start]
        logprobs = [response.rollout_logprobs, np.zeros(len(answer), dtype=np.float32)]
        return replace(
            response,
            token_ids=[*response.token_ids, *answer],
            rollout_logprobs=np.concatenate(logprobs),
            finish="length",
            outside=(*response.outside, (start, start + len(answer))),
        )


def turn_spans(response: Completion) -> list[tuple[int, int]]:
    """[start, end) of each of the policy's turns in the response's tokens."""
    bounds = [0, *(bound for span in response.outside for bound in span), len(response.token_ids)]
    return list(zip(bounds[::2], bounds[1::2], strict=True))
