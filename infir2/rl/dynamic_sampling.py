"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): draw prompts until enough groups have
right and wrong responses, within a budget.

    PromptStream.draw -> RunningGroup -> GroupGenerator.generate -> Group -> collect_rollouts

With `rl.chunk_tokens` responses are generated a chunk at a time. After each chunk, groups that have
finished make room for new prompts, and sampling stops once enough have signal: which groups these
are depends on neither the engine's speed nor on how many engines there are. Groups that are not
finished then are dropped, or continue in the next step with its weights (`rl.partial`).
"""

import bisect
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from infir2.config.schema import RlSection
from infir2.data import ChatTokenizer
from infir2.engines.generate import (
    continue_completion,
    continue_request,
    generate_groups,
    group_requests,
    items_of_rank,
)
from infir2.engines.native import NativeEngine
from infir2.engines.types import Completion, Engine, Request, SamplingParams
from infir2.faults import fault
from infir2.parallel.ranks import Ranks
from infir2.rl.groups import Group, Response
from infir2.rl.journal import OF_TRAINING, Journal
from infir2.rl.prompts import DrawnPrompt, PromptStream
from infir2.rl.rewards import FailureBudget, rate
from infir2.rl.turns import Episodes, turn_spans

Check = Callable[[], None]
CARRIED = "carried"  # in place of the weights' digest


@dataclass
class Rollouts:
    """One step's groups: those to train on, and those that were sampled to find them.

    Attributes:
        num_unfinished: groups that were not finished when enough had signal.
        state: where the prompts of the next step begin; what a checkpoint stores.
    """

    trained: list[Group] = field(default_factory=list)
    without_signal: list[Group] = field(default_factory=list)
    num_unfinished: int = 0
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> list[Group]:
        return self.trained + self.without_signal


@dataclass(frozen=True)
class RunningGroup:
    """A group that is not finished: its prompt, and each response so far, None before its start."""

    drawn: DrawnPrompt
    responses: Sequence[Completion | None]

    @property
    def name(self) -> str:
        return self.drawn.name


Sampled = list[Group | RunningGroup]
# Runs a function on every rank and returns the results by rank (Supervisor.all_gather_results).
# The function calls its argument often; that raises when the run has to stop.
RunOnRanks = Callable[[Callable[[Check], Sampled]], list[Sampled]]


class GroupGenerator:
    """Samples, checks and records groups. The ranks share the prompts and receive all groups.

    A thread checks a group and writes it to the journal as soon as its last response has ended; a
    group that is in the journal is not sampled again.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: ChatTokenizer,
        rl: RlSection,
        seed: int,
        journal: Journal,
        ranks: Ranks,
    ) -> None:
        self._engine, self._tokenizer, self._rl, self._seed = engine, tokenizer, rl, seed
        self._journal, self._ranks = journal, ranks
        self._checker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="infir2-verify")
        self._failures = FailureBudget(rl.reward_failures)
        self._episodes = Episodes(rl, tokenizer)
        self._generate_seconds = self._verify_seconds = 0.0

    def begin(self) -> None:
        """The sampling of a step begins."""
        self._failures.begin()

    def start(self, drawn: DrawnPrompt) -> RunningGroup:
        """A group of which nothing is generated."""
        return RunningGroup(drawn, [None] * self._rl.group_size)

    def generate(
        self, running: Sequence[RunningGroup], digests: Sequence[str], run_on_ranks: RunOnRanks
    ) -> Sampled:
        """Generate the next chunk of each group's unfinished responses, or all of them.

        The last of `digests` is that of the engine's weights; what the journal has of these or of
        the weights of an earlier digest is reused. Returns one group per group, in order.
        """
        sampled: dict[str, Group | RunningGroup] = {}
        for digest in digests:
            sampled |= self._recorded(running, digest)
        missing = [each for each in running if each.name not in sampled]
        own = items_of_rank(self._engine, self._ranks, missing)
        for part in run_on_ranks(lambda check: self._sample(own, digests[-1], check)):
            sampled |= {group.name: group for group in part}
        return [sampled[each.name] for each in running]

    def take_seconds(self) -> dict[str, float]:
        """Since the last call: how long the engine has generated (generate_seconds), and how long
        this rank has waited for the checks after that (verify_seconds)."""
        seconds = {
            "generate_seconds": self._generate_seconds,
            "verify_seconds": self._verify_seconds,
        }
        self._generate_seconds = self._verify_seconds = 0.0
        return seconds

    def carry(self, step: int, groups: Sequence[RunningGroup]) -> None:
        """Write the groups that `step` continues, so that a resumed run has them."""
        keys = {self.journal_key(self.start(group.drawn), CARRIED): group for group in groups}
        begun = {key: [r for r in group.responses if r] for key, group in keys.items()}
        if self._ranks.is_rank0:
            self._journal.write_carried(step, begun)

    def carried(self, drawn: DrawnPrompt) -> RunningGroup:
        """A group that an earlier run had carried, as far as the journal has it."""
        start = self.start(drawn)
        begun = self._journal.get_unfinished(self.journal_key(start, CARRIED))
        return RunningGroup(drawn, begun) if begun else start

    def _recorded(
        self, running: Sequence[RunningGroup], digest: str
    ) -> dict[str, Group | RunningGroup]:
        """What the journal holds of the next chunk of these groups and weights, by name."""
        found: dict[str, Group | RunningGroup] = {}
        for each in running:
            key = self.journal_key(each, digest)
            responses, begun = self._journal.get(key), self._journal.get_unfinished(key)
            if responses is not None:
                found[each.name] = _group(each.drawn, responses)
            elif begun is not None:
                found[each.name] = RunningGroup(each.drawn, begun)
        return found

    def _sample(self, running: Sequence[RunningGroup], digest: str, check: Check) -> Sampled:
        """Sample this rank's groups. `check` is called after each step of the engine."""
        requests = [self._requests(each) for each in running]
        recorded: list[Future[Group | RunningGroup]] = []
        start = time.monotonic()
        for index, completions in generate_groups(self._engine, requests, check):
            group = running[index]
            key, begun = self.journal_key(group, digest), self._continue(group, completions)
            recorded.append(self._checker.submit(self._record, key, begun, group))
        generated = time.monotonic()
        sampled = [future.result() for future in recorded]
        self._generate_seconds += generated - start
        self._verify_seconds += time.monotonic() - generated
        return sampled

    def _requests(self, group: RunningGroup) -> list[Request]:
        """Requests for the next chunk of the responses that are not finished."""
        rl, stop_ids = self._rl, self._tokenizer.eos_token_ids
        # Servers have no tokenizer: `_until_stop` cuts their responses.
        stop = rl.stop if isinstance(self._engine, NativeEngine) else ()
        params = SamplingParams(rl.temperature, rl.max_response_tokens, stop_ids, stop_texts=stop)
        prompts, version = [(group.name, group.drawn.token_ids)], self._engine.policy_version
        requests = group_requests(prompts, rl.group_size, params, self._seed, version)
        chunk = rl.chunk_tokens or rl.max_response_tokens
        return [
            continue_request(request, response, chunk)
            for request, response in zip(requests, group.responses, strict=True)
            if not self._is_finished(response)
        ]

    def _is_finished(self, response: Completion | None) -> bool:
        if response is None:
            return False
        return response.finish == "stop" or len(response.token_ids) >= self._rl.max_response_tokens

    def _continue(self, group: RunningGroup, completions: Sequence[Completion]) -> list[Completion]:
        """All responses of the group, with the chunks of those that were not finished."""
        new = iter(completions)
        return [
            response
            if response is not None and self._is_finished(response)
            else self._until_stop(continue_completion(response, next(new)))
            for response in group.responses
        ]

    def _until_stop(self, response: Completion) -> Completion:
        """A response up to the first token of its last turn that completes a text of `rl.stop`."""
        start, _ = turn_spans(response)[-1]

        def has_stop(count: int) -> bool:
            text = self._tokenizer.decode(response.token_ids[start:count])
            return any(stop in text for stop in self._rl.stop)

        num_tokens = len(response.token_ids)
        if not self._rl.stop or not has_stop(num_tokens):
            return response
        end = bisect.bisect_left(range(num_tokens), True, lo=start, key=has_stop)
        return replace(
            response,
            token_ids=response.token_ids[:end],
            rollout_logprobs=response.rollout_logprobs[:end],
            finish="stop",
        )

    def _record(
        self, key: str, begun: list[Completion], before: RunningGroup
    ) -> Group | RunningGroup:
        """Write a chunk to the journal; reward a group whose responses are all finished."""
        fault("rollout.group")
        drawn = before.drawn
        if self._rl.environment:
            new = [i for i, each in enumerate(before.responses) if not self._is_finished(each)]
            asked = [begun[i] for i in new]
            answered = self._episodes.answer(asked, drawn.prompt, drawn.opened_thought)
            for i, response in zip(new, answered, strict=True):
                begun[i] = response
        if all(map(self._is_finished, begun)):
            return _group(drawn, self._finish(key, begun, drawn))
        self._journal.add_unfinished(key, begun)
        return RunningGroup(drawn, begun)

    def _finish(
        self, key: str, completions: list[Completion], drawn: DrawnPrompt
    ) -> list[Response]:
        """Reward a group and write it to the journal."""
        texts = [drawn.opened_thought + self._tokenizer.decode(c.token_ids) for c in completions]
        last = [self._episodes.turns(c, drawn.opened_thought)[-1] for c in completions]
        rated = rate(completions, last, drawn.prompt, self._rl)
        responses = [replace(each, text=text) for each, text in zip(rated, texts, strict=True)]
        self._failures.spend(drawn.prompt, responses)
        self._journal.add(key, responses)
        return responses

    def journal_key(self, group: RunningGroup, digest: str) -> str:
        """Hash of everything that determines the next chunk of a group and its rewards."""
        rl, drawn = self._rl.model_dump_json(exclude=OF_TRAINING), group.drawn
        begun = [(r.token_ids, r.policy_version, r.earlier) for r in group.responses if r]
        text = f"{self._seed}/{drawn.name}/{drawn.token_ids}/{digest}/{rl}/{json.dumps(begun)}"
        return hashlib.sha256(text.encode()).hexdigest()


def _group(drawn: DrawnPrompt, responses: list[Response]) -> Group:
    return Group(drawn.name, drawn.prompt, drawn.token_ids, responses)


def collect_rollouts(
    prompts: PromptStream,
    generator: GroupGenerator,
    rl: RlSection,
    carried: Sequence[RunningGroup],
    digests: Sequence[str],
    run_on_ranks: RunOnRanks,
) -> tuple[Rollouts, list[RunningGroup]]:
    """Sample `prompts_per_step` prompts at a time until that many groups have signal.

    `carried` come first. At most `over_sample_prompts` prompts are sampled. Digests as in
    `GroupGenerator.generate`. Returns the rollouts, and the groups to carry into the next step.
    """
    generator.begin()
    rollouts, running = Rollouts(), list(carried)
    order = [group.name for group in running]
    while len(rollouts.trained) < rl.prompts_per_step:
        room = min(rl.prompts_per_step - len(running), rl.over_sample_prompts - len(order))
        drawn = prompts.draw(room)
        running += map(generator.start, drawn)
        order += [each.name for each in drawn]
        if not running:
            break
        sampled, running = generator.generate(running, digests, run_on_ranks), []
        for group in sampled:
            if isinstance(group, RunningGroup):
                running.append(group)
                continue
            is_needed = group.has_signal and len(rollouts.trained) < rl.prompts_per_step
            (rollouts.trained if is_needed else rollouts.without_signal).append(group)
    rollouts.trained.sort(key=lambda group: order.index(group.name))
    rollouts.num_unfinished = len(running)
    running = running if rl.partial else []
    prompts.observe(rollouts.groups)
    rollouts.state = prompts.state | {"carried": [group.name for group in running]}
    return rollouts, running
