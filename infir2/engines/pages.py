"""The pages of a KV cache: which are free, and which hold a prefix that another request can use.

A sequence owns a list of pages of `page_size` tokens. A full page is indexed by the tokens it holds
and the page before it, so that a request with the same beginning shares it: the samples of one
prompt, or the next turn of a conversation. A shared page is never written again. A page that nobody
uses keeps its content, and stays in the index, until it is needed for other tokens; the page that
was freed first is taken first.
"""

from collections.abc import Iterable, Sequence

# A page in the index: the serial number of the page before it (0: none), and its tokens.
_Key = tuple[int, tuple[int, ...]]


class PagePool:
    """Counts the users of each page. Serial numbers are never used again, page numbers are."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._users = [0] * num_pages
        self._free = dict.fromkeys(range(num_pages))  # ordered: the first is taken first
        self._page_of: dict[_Key, int] = {}
        self._key_of: dict[int, _Key] = {}
        self._serials: dict[int, int] = {}  # of pages in the index
        self._last_serial = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Number of pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages; their content is lost."""
        assert count <= self.num_free, "the pool has fewer free pages"
        pages = [page for page, _ in zip(self._free, range(count), strict=False)]
        for page in pages:
            del self._free[page]
            self._users[page] = 1
            self._forget(page)
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Give up one use of each page; the last pages of a sequence become free first."""
        for page in reversed(list(pages)):
            self._users[page] -= 1
            if not self._users[page]:
                self._free[page] = None

    def share_prefix(self, token_ids: Sequence[int]) -> list[int]:
        """Use the indexed pages that hold the beginning of `token_ids`.

        At least one token is left over: a sequence needs the logits of its last token.
        """
        pages = list[int]()
        serial, size = 0, self.page_size
        for start in range(0, len(token_ids) - size, size):
            page = self._page_of.get((serial, tuple(token_ids[start : start + size])))
            if page is None:
                break
            serial = self._serials[page]
            pages.append(page)
        for page in pages:
            self._users[page] += 1
            self._free.pop(page, None)
        return pages

    def index(self, pages: Sequence[int], token_ids: Sequence[int]) -> None:
        """Index the pages that `token_ids`, the beginning of a sequence, fill.

        Where another page holds the same prefix already, that page stays in the index.
        """
        serial, size = 0, self.page_size
        for number in range(len(token_ids) // size):
            key = serial, tuple(token_ids[number * size : (number + 1) * size])
            page = self._page_of.setdefault(key, pages[number])
            if page not in self._serials:
                self._last_serial += 1
                self._key_of[page], self._serials[page] = key, self._last_serial
            serial = self._serials[page]

    def grow(self, num_pages: int) -> None:
        """Add free pages until there are `num_pages`."""
        self._free |= dict.fromkeys(range(self.num_pages, num_pages))
        self._users += [0] * (num_pages - self.num_pages)
        self.num_pages = num_pages

    def forget_all(self) -> None:
        """Empty the index: the keys and values are those of old weights."""
        for page in list(self._serials):
            self._forget(page)

    def _forget(self, page: int) -> None:
        if self._serials.pop(page, None) is not None:
            del self._page_of[self._key_of.pop(page)]
