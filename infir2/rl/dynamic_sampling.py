"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): draw prompts until enough groups have
right and wrong responses, within a budget.

    PromptStream.draw -> DrawnPrompt -> GroupGenerator.generate -> Group -> collect_rollouts
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from infir2.config.schema import RlSection
from infir2.data import ChatTokenizer
from infir2.engines.generate import generate_groups, items_of_rank
from infir2.engines.types import Completion, Engine, SamplingParams
from infir2.faults import fault
from infir2.parallel.ranks import Ranks
from infir2.rl.groups import Group, Response
from infir2.rl.journal import Journal
from infir2.rl.prompts import DrawnPrompt, PromptStream
from infir2.rl.rewards import rate

Check = Callable[[], None]
# Runs a function on every rank and returns the results by rank (Supervisor.all_gather_results).
# The function calls its argument often; that raises when the run has to stop.
RunOnRanks = Callable[[Callable[[Check], list[Group]]], list[list[Group]]]


@dataclass
class Rollouts:
    """One step's groups: those to train on, and those that were sampled to find them."""

    trained: list[Group] = field(default_factory=list)
    without_signal: list[Group] = field(default_factory=list)

    @property
    def groups(self) -> list[Group]:
        return self.trained + self.without_signal


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
        self._generate_seconds = self._verify_seconds = 0.0

    def generate(
        self,
        drawn: Sequence[DrawnPrompt],
        weights_digest: str,
        earlier_digest: str,
        run_on_ranks: RunOnRanks,
    ) -> list[Group]:
        """One group per prompt, in order.

        `weights_digest` is that of the engine's weights; groups in the journal that were sampled
        with these or with the weights of `earlier_digest` ("" for none) are reused.
        """
        groups: dict[str, Group] = {}
        for digest in filter(None, (earlier_digest, weights_digest)):
            groups |= self._recorded(drawn, digest)
        missing = [each for each in drawn if each.name not in groups]
        own = items_of_rank(self._engine, self._ranks, missing)
        for part in run_on_ranks(lambda check: self._sample(own, weights_digest, check)):
            groups |= {group.name: group for group in part}
        return [groups[each.name] for each in drawn]

    def take_seconds(self) -> dict[str, float]:
        """Since the last call: how long the engine has generated (generate_seconds), and how long
        this rank has waited for the checks after that (verify_seconds)."""
        seconds = {
            "generate_seconds": self._generate_seconds,
            "verify_seconds": self._verify_seconds,
        }
        self._generate_seconds = self._verify_seconds = 0.0
        return seconds

    def _recorded(self, drawn: Sequence[DrawnPrompt], digest: str) -> dict[str, Group]:
        """Groups of these prompts and weights that the journal holds, by name."""
        found = {}
        for each in drawn:
            responses = self._journal.get(self._journal_key(each, digest))
            if responses is not None:
                found[each.name] = Group(each.name, each.prompt, each.token_ids, responses)
        return found

    def _sample(self, drawn: Sequence[DrawnPrompt], digest: str, check: Check) -> list[Group]:
        """Sample this rank's prompts. `check` is called after each step of the engine."""
        prompts = [(each.name, each.token_ids) for each in drawn]
        stop_ids = self._tokenizer.eos_token_ids
        params = SamplingParams(self._rl.temperature, self._rl.max_response_tokens, stop_ids)
        checked: dict[int, Future[list[Response]]] = {}
        start = time.monotonic()
        for index, completions in generate_groups(
            self._engine, prompts, self._rl.group_size, params, self._seed, check
        ):
            key = self._journal_key(drawn[index], digest)
            checked[index] = self._checker.submit(self._finish, key, completions, drawn[index])
        generated = time.monotonic()
        groups = [
            Group(drawn[i].name, drawn[i].prompt, drawn[i].token_ids, responses.result())
            for i, responses in checked.items()
        ]
        self._generate_seconds += generated - start
        self._verify_seconds += time.monotonic() - generated
        return groups

    def _finish(
        self, key: str, completions: list[Completion], drawn: DrawnPrompt
    ) -> list[Response]:
        """Reward a group and write it to the journal."""
        fault("rollout.group")
        texts = [drawn.opened_thought + self._tokenizer.decode(c.token_ids) for c in completions]
        responses = rate(completions, texts, drawn.prompt, self._rl)
        self._journal.add(key, responses)
        return responses

    def _journal_key(self, drawn: DrawnPrompt, digest: str) -> str:
        """Hash of everything that determines a group's responses, log-probabilities and rewards."""
        rl = self._rl.model_dump_json()
        text = f"{self._seed}/{drawn.name}/{drawn.token_ids}/{digest}/{rl}"
        return hashlib.sha256(text.encode()).hexdigest()


def collect_rollouts(
    prompts: PromptStream,
    generator: GroupGenerator,
    rl: RlSection,
    weights_digest: str,
    earlier_digest: str,
    run_on_ranks: RunOnRanks,
) -> Rollouts:
    """Sample rounds of `prompts_per_step` prompts until that many groups have signal.

    At most `over_sample_prompts` prompts are drawn. Digests as in `GroupGenerator.generate`.
    """
    rollouts, num_drawn = Rollouts(), 0
    while len(rollouts.trained) < rl.prompts_per_step and num_drawn < rl.over_sample_prompts:
        drawn = prompts.draw(min(rl.prompts_per_step, rl.over_sample_prompts - num_drawn))
        num_drawn += len(drawn)
        for group in generator.generate(drawn, weights_digest, earlier_digest, run_on_ranks):
            is_needed = group.has_signal and len(rollouts.trained) < rl.prompts_per_step
            (rollouts.trained if is_needed else rollouts.without_signal).append(group)
    return rollouts
