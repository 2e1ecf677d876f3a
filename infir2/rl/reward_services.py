"""Rewards from other processes: functions of one's own, reasoning-gym's scorers, servers."""

import asyncio
import json
import os
import urllib.parse
from collections.abc import Sequence
from typing import Any, cast

from infir2.config.reward_rules import GYM, KEY_VARIABLE
from infir2.config.schema import RlSection
from infir2.data import Prompt
from infir2.data.labels import GYM_FIELD
from infir2.engines.http_client import HttpClient
from infir2.engines.remote import BadAnswerError, EngineGoneError
from infir2.errors import ConfigError, first_line
from infir2.rl.reward_score import Score, failure, score_of_value
from infir2.verify.answers import extract_answer
from infir2.verify.functions import call_function
from infir2.verify.gym import SCORER, make_problem
from infir2.verify.pool import Outcome
from infir2.verify.verdict import Reason

ATTEMPTS, PAUSE_SECONDS = 3, 0.5
MAX_CONNECTIONS = 16


def function_reward(name: str, texts: Sequence[str], prompt: Prompt, rl: RlSection) -> list[Score]:
    """What `module:function` returns for each response and the prompt's row."""
    items = [(text, prompt.fields) for text in texts]
    return [_score_of_outcome(each) for each in call_function(name, items, rl.reward_seconds)]


def gym_reward(texts: Sequence[str], prompt: Prompt, task: str, rl: RlSection) -> list[Score]:
    """What reasoning-gym's scorer gives for the final answer of each response."""
    answers = [extract_answer(text, "answer_line") for text in texts]
    problem = (prompt.messages[-1]["content"], task, *prompt.fields[GYM_FIELD]["problem"])
    items = [(answer, *problem) for answer in answers if answer is not None]
    outcomes = iter(call_function(SCORER, items, rl.reward_seconds, is_own=False))
    return [
        Score(0.0, "no_answer") if answer is None else _gym_score(task, next(outcomes))
        for answer in answers
    ]


def _gym_score(task: str, outcome: Outcome) -> Score:
    if outcome.reason == "timeout":  # it may have made the problem so long
        return _score_of_outcome(outcome)
    if outcome.reason:  # the answer's fault: the scorer has accepted that of a problem
        return Score(0.0, cast(Reason, outcome.reason), outcome.detail)
    if outcome.value is None:
        return failure(f"{task} makes another problem in another process")
    return score_of_value(outcome.value)


def make_prompt(name: str, seed: int, level: int, number: int, system_prompt: str = "") -> Prompt:
    """A problem of the task `reasoning_gym:NAME`, which is a function of the other arguments."""
    problem = make_problem(name.removeprefix(GYM), seed, level, number)
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": problem["question"]})
    fields = {GYM_FIELD: {"task": name, "problem": [seed, level, number]}}
    prompt_id = f"{name}/{level}/{number}"
    return Prompt(prompt_id, messages, str(problem["answer"]), level, prompt_id, fields)


def _score_of_outcome(outcome: Outcome) -> Score:
    if outcome.reason:
        return failure(f"{outcome.reason}: {outcome.detail}", outcome.reason == "timeout")
    return score_of_value(outcome.value)


def server_reward(url: str, texts: Sequence[str], prompt: Prompt, rl: RlSection) -> list[Score]:
    """What a server returns for each response. Raises ConfigError for a refused key."""
    row = {"prompt": prompt.messages, "label": prompt.answer, "row": prompt.fields}
    bodies = [{"response": text, **row} for text in texts]
    return asyncio.run(_ask_all(url, bodies, rl.reward_seconds))


async def _ask_all(url: str, bodies: Sequence[Any], seconds: float) -> list[Score]:
    address = urllib.parse.urlsplit(url)
    client = HttpClient(f"{address.scheme}://{address.netloc}", os.environ.get(KEY_VARIABLE, ""))
    slots = asyncio.Semaphore(MAX_CONNECTIONS)
    try:
        asked = (_ask(client, address.path or "/", body, seconds, slots) for body in bodies)
        return list(await asyncio.gather(*asked))
    except ConfigError as error:
        raise ConfigError(f"rl.reward: {url} refuses the key; set {KEY_VARIABLE}.") from error
    finally:
        await client.close()


async def _ask(
    client: HttpClient, route: str, body: Any, seconds: float, slots: asyncio.Semaphore
) -> Score:
    """Ask until there is an answer, at most ATTEMPTS times, `seconds` each."""
    detail, is_timeout = "", False
    for attempt in range(ATTEMPTS):
        await asyncio.sleep(PAUSE_SECONDS * attempt)
        is_timeout = False
        try:
            async with slots, asyncio.timeout(seconds):
                return _score_of_reply(await client.post(route, body))
        except TimeoutError:
            detail, is_timeout = f"{client.url}{route}: no whole answer in {seconds:g} s", True
        except BadAnswerError as error:
            detail = first_line(error)
            if error.status < 500:
                break
        except EngineGoneError as error:
            detail = first_line(error)
    return failure(detail, is_timeout)


def _score_of_reply(reply: Any) -> Score:
    if isinstance(reply, str):  # no content type of JSON
        try:
            reply = json.loads(reply)
        except (ValueError, RecursionError):
            reply = None
    if not isinstance(reply, dict) or "reward" not in reply:
        return failure('the server\'s answer is not {"reward": number}')
    return score_of_value(reply["reward"])
