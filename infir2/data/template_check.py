"""Whether SFT can train the answers of a chat template, tried once before any row is read."""

from infir2.data.chat import ANSWER, QUESTION, THOUGHT, ChatTokenizer
from infir2.data.types import RowError
from infir2.errors import ConfigError


def check_chat_template(tokenizer: ChatTokenizer) -> None:
    """Render an answer without and with a thought.

    One of the two has to be trainable: a reasoning template may refuse the one, any other template
    the other. Rows of that kind are then unusable, each with its reason.

    Raises:
        ConfigError: there is no chat template, or neither answer can be trained.
    """
    name = tokenizer.template.name
    problems = []
    for answer in (ANSWER, THOUGHT):
        try:
            tokenizer.encode_conversation([QUESTION, answer])
            contents = tokenizer.render([QUESTION, answer], False).contents
        except RowError as error:
            problems.append(str(error))
            continue
        if QUESTION["content"] not in contents:
            raise ConfigError(f"data.tokenizer: {name} rewrites the messages: use another.")
    if len(problems) == 2:
        raise ConfigError(f"data.tokenizer: {name} cannot be used ({problems[0]}): use another.")
