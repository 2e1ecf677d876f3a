"""The thought of a response, apart from its answer.

A response is inside a thought from its beginning if the prompt ends inside one (a template that
opens `<think>`, a final message that is continued), or if the response itself begins with
`<think>`. The thought ends at `</think>`, or with the response. Newlines around a thought belong to
the markers. A `<think>` anywhere else is text of the answer.
"""

from infir2.engines.response_text import overlap

OPEN, CLOSE = "<think>", "</think>"


class Thoughts:
    """Splits the text of a response as it comes.

    Example: "<think>\\nWhy" and " not?\\n</think>\\n\\nYes" give ("Why not?", "Yes").

    Args:
        before: the end of the prompt that belongs to the response's message.
    """

    def __init__(self, before: str = "") -> None:
        self._held = ""
        if CLOSE in before or (before.strip() and OPEN not in before):
            self._state = "answer"
        else:
            self._state = "thought" if OPEN in before else "start"
        self._is_empty = not before.partition(OPEN)[2].strip()  # the thought, so far

    def add(self, text: str) -> tuple[str, str]:
        """(thought, answer): the text that has become certain."""
        self._held += text
        thought = ""
        if self._state == "start":
            self._start()
        if self._state == "thought":
            thought = self._take_thought()
        if self._state == "after":
            self._held = self._held.lstrip("\n")
            self._state = "answer" if self._held else "after"
        answer, self._held = (self._held, "") if self._state == "answer" else ("", self._held)
        return thought, answer

    def finish(self) -> tuple[str, str]:
        """The rest of a response that has ended."""
        rest, self._held = self._held, ""
        if self._state == "thought":
            return rest.rstrip("\n"), ""
        return "", rest if self._state == "start" else ""

    def _start(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(OPEN):
            self._state, self._held = "thought", begun.removeprefix(OPEN)
        elif not OPEN.startswith(begun):
            self._state = "answer"

    def _take_thought(self) -> str:
        if self._is_empty:
            self._held = self._held.lstrip("\n")
        thought, end, answer = self._held.partition(CLOSE)
        if end:
            self._state, self._held = "after", answer
            return thought.rstrip("\n")
        certain = self._held[: len(self._held) - overlap(self._held, CLOSE)].rstrip("\n")
        self._held = self._held[len(certain) :]
        self._is_empty = self._is_empty and not certain
        return certain
