"""Generation with any `Engine`: submit requests, step until they finish, group them by prompt."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import chain
from typing import TypeVar

from infir2.engines.sampling import sampling_key
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
    prompts: Sequence[tuple[str, list[int]]],
    group_size: int,
    params: SamplingParams,
    seed: int,
    check: Callable[[], None] = _no_check,
) -> Iterator[tuple[int, list[Completion]]]:
    """Yield (index of a prompt, its `group_size` completions) as the last of them finishes.

    `prompts` as in `group_requests`, `check` as in `generate`.
    """
    requests = group_requests(prompts, group_size, params, seed, engine.policy_version)
    group_of = {request.id: i // group_size for i, request in enumerate(requests)}
    groups: list[dict[str, Completion]] = [{} for _ in prompts]
    for completion in generate(engine, requests, check):
        index = group_of[completion.id]
        groups[index][completion.id] = completion
        if len(groups[index]) == group_size:
            group = requests[index * group_size : (index + 1) * group_size]
            yield index, [groups[index][request.id] for request in group]


def items_of_rank(engine: Engine, ranks: Ranks, items: Sequence[Item]) -> Sequence[Item]:
    """This rank's part of `items`, which all ranks know: what it should have `engine` generate."""
    if engine.shared_by_ranks:
        return items if ranks.is_rank0 else items[:0]
    return items[ranks.rank :: ranks.size]
