"""Generation with any `Engine`: submit requests, step until they finish, group them by prompt."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain
from typing import TypeVar

import numpy as np

from infir2.engines.sampling import advance_key, sampling_key
from infir2.engines.types import Completion, Engine, Request, SamplingParams
from infir2.parallel.ranks import Ranks

Item = TypeVar("Item")


def _no_check() -> None:
    pass


def generate_batches(
    engine: Engine, requests: Sequence[Request], check: Callable[[], None] = _no_check
) -> Generator[list[Completion], None, None]:
    """Yield the completions of the requests, as many as finish in one step of the engine.

    `check` is called after each step. When it raises, or the caller closes the iterator, the
    requests that are not finished are canceled. The engine must have no requests of other callers.
    """
    assert not engine.num_unfinished, "the engine has requests of another caller"
    unfinished = set[str]()
    try:
        # Longest prompts first: similar lengths run side by side, which keeps padding small.
        for request in sorted(requests, key=lambda request: len(request.token_ids), reverse=True):
            engine.submit(request)
            unfinished.add(request.id)
        while unfinished:
            if completions := engine.step():
                unfinished.difference_update(completion.id for completion in completions)
                yield completions
            check()
    finally:
        engine.cancel(unfinished)


def generate(
    engine: Engine, requests: Sequence[Request], check: Callable[[], None] = _no_check
) -> Iterator[Completion]:
    """Yield the completion of each request as it finishes; otherwise as `generate_batches`."""
    with closing(generate_batches(engine, requests, check)) as batches:
        yield from chain.from_iterable(batches)


def generate_all(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """The completion of each request, in their order."""
    completions = {completion.id: completion for completion in generate(engine, requests)}
    return [completions[request.id] for request in requests]


def group_requests(
    prompts: Sequence[tuple[str, list[int]]],
    group_size: int,
    params: SamplingParams,
    seed: int,
    policy_version: int,
) -> list[Request]:
    """`group_size` requests for each prompt, in order; their ids are "PROMPT_ID/SAMPLE".

    `prompts` are pairs of an id and token ids; the ids differ.
    """
    return [
        Request(
            f"{prompt_id}/{sample}",
            token_ids,
            params,
            sampling_key(seed, prompt_id, sample, policy_version),
        )
        for prompt_id, token_ids in prompts
        for sample in range(group_size)
    ]


def generate_groups(
    engine: Engine,
    groups: Sequence[Sequence[Request]],
    check: Callable[[], None] = _no_check,
) -> Iterator[tuple[int, list[Completion]]]:
    """Yield (index of a group, the completions of its requests) as the last of them finishes.

    No group is empty. `check` as in `generate_batches`.
    """
    requests = list(chain.from_iterable(groups))
    group_of = {request.id: i for i, group in enumerate(groups) for request in group}
    finished: list[dict[str, Completion]] = [{} for _ in groups]
    for completion in generate(engine, requests, check):
        index = group_of[completion.id]
        finished[index][completion.id] = completion
        if len(finished[index]) == len(groups[index]):
            yield index, [finished[index][request.id] for request in groups[index]]


def continue_request(request: Request, begun: Completion | None, max_tokens: int) -> Request:
    """A request for at most `max_tokens` more tokens of a response, or for its first ones.

    With the same weights, an engine whose log-probabilities do not depend on chunks generates the
    tokens that it would have generated without a break.
    """
    if begun is None:
        return replace(request, params=replace(request.params, max_tokens=max_tokens))
    num_tokens = len(begun.token_ids)
    left = min(max_tokens, request.params.max_tokens - num_tokens)
    return replace(
        request,
        token_ids=[*request.token_ids, *begun.token_ids],
        params=replace(request.params, max_tokens=left),
        key=advance_key(request.key, num_tokens),
    )


def continue_completion(begun: Completion | None, rest: Completion) -> Completion:
    """The response of `begun` and of the completion that continues it."""
    if begun is None:
        return rest
    earlier = begun.earlier
    if begun.policy_version != rest.policy_version:
        num_tokens = len(begun.token_ids) - sum(count for _, count in earlier)
        earlier = (*earlier, (begun.policy_version, num_tokens))
    logprobs = np.concatenate([begun.rollout_logprobs, rest.rollout_logprobs])
    token_ids = [*begun.token_ids, *rest.token_ids]
    whole = replace(rest, token_ids=token_ids, rollout_logprobs=logprobs)
    return replace(whole, earlier=earlier, outside=begun.outside)


def items_of_rank(engine: Engine, ranks: Ranks, items: Sequence[Item]) -> Sequence[Item]:
    """This rank's part of `items`, which all ranks know: what it should have `engine` generate."""
    if engine.shared_by_ranks:
        return items if ranks.is_rank0 else items[:0]
    return items[ranks.rank :: ranks.size]
