"""Generation with any `Engine`: submit requests, step until they finish, group them by prompt."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from infir2.engines.sampling import sampling_key
from infir2.engines.types import Completion, Engine, Request, SamplingParams
from infir2.parallel.ranks import Ranks

Item = TypeVar("Item")


def _no_check() -> None:
    pass


def generate(
    engine: Engine, requests: Sequence[Request], check: Callable[[], None] = _no_check
) -> Iterator[Completion]:
    """Yield the completion of each request as it finishes.

    `check` is called after each step of the engine. When it raises, or the caller closes the
    iterator, the requests that are not finished are canceled. The engine must have no requests of
    other callers.
    """
    assert not engine.num_unfinished, "the engine has requests of another caller"
    unfinished = set[str]()
    try:
        # Longest prompts first: similar lengths run side by side, which keeps padding small.
        for request in sorted(requests, key=lambda request: len(request.token_ids), reverse=True):
            engine.submit(request)
            unfinished.add(request.id)
        while unfinished:
            for completion in engine.step():
                unfinished.remove(completion.id)
                yield completion
            check()
    finally:
        engine.cancel(unfinished)


def generate_all(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """The completion of each request, in their order."""
    completions = {completion.id: completion for completion in generate(engine, requests)}
    return [completions[request.id] for request in requests]


def generate_groups(
    engine: Engine,
    prompts: Sequence[tuple[str, list[int]]],
    group_size: int,
    params: SamplingParams,
    seed: int,
    check: Callable[[], None] = _no_check,
) -> Iterator[tuple[int, list[Completion]]]:
    """Yield (index of a prompt, its `group_size` completions) as the last of them finishes.

    `prompts` are pairs of an id and token ids; the ids differ. `check` as in `generate`.
    """
    requests = [
        Request(
            f"{prompt_id}/{sample}",
            token_ids,
            params,
            sampling_key(seed, prompt_id, sample, engine.policy_version),
        )
        for prompt_id, token_ids in prompts
        for sample in range(group_size)
    ]
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
