"""Pages are shared by prefix, taken when free, and never lost or used twice."""

import random

import pytest

from infir2.engines.pages import PagePool


def fill(pool: PagePool, tokens: list[int]) -> list[int]:
    """The pages of a new sequence, all of whose tokens are computed."""
    shared = pool.share_prefix(tokens)
    pages = shared + pool.allocate(pool.pages_for(len(tokens)) - len(shared))
    pool.index(pages, tokens)
    return pages


def test_a_prefix_is_shared_up_to_its_last_full_page_but_one_token() -> None:
    pool = PagePool(8, 4)
    first = fill(pool, list(range(10)))
    assert len(first) == 3
    assert pool.share_prefix(list(range(8))) == first[:1], "a token must be left to compute"
    assert pool.share_prefix(list(range(9))) == first[:2]
    assert pool.share_prefix([*range(4), 9, 9, 9, 9, 9]) == first[:1]
    assert pool.share_prefix([*range(4, 8), 0]) == [], "the same tokens after another prefix"


def test_a_free_page_is_shared_until_it_is_taken() -> None:
    pool = PagePool(3, 2)
    first = fill(pool, [1, 2, 3, 4, 5])
    pool.release(first)
    assert pool.num_free == 3
    again = pool.share_prefix([1, 2, 3, 4, 9])
    assert again == first[:2]
    assert pool.num_free == 1
    pool.release(again)
    taken = pool.allocate(1)
    assert taken == first[2:], "pages outside the index are taken before those freed later"
    pool.allocate(1)
    assert pool.share_prefix([1, 2, 3, 4, 9]) == first[:1], "the end of a prefix goes first"


def test_a_page_with_other_content_is_not_found_by_its_old_neighbors() -> None:
    """The second page of [1, 2, 3, 4] must not continue whatever its first page holds later."""
    pool = PagePool(4, 2)
    pages = fill(pool, [1, 2, 3, 4])
    pool.release(pages[:1])
    other = pool.allocate(3)
    assert pages[0] in other
    pool.index([pages[0]], [1, 2])
    assert pool.share_prefix([1, 2, 3, 4, 5]) == pages[:1]


def test_equal_prefixes_that_were_computed_twice_are_indexed_once() -> None:
    pool = PagePool(6, 2)
    first, second = pool.allocate(2), pool.allocate(3)
    pool.index(first, [1, 2, 3, 4])
    pool.index(second, [1, 2, 3, 4, 5, 6])
    assert pool.share_prefix([1, 2, 3, 4, 5, 6, 7]) == [*first, second[2]]


def test_new_weights_empty_the_index() -> None:
    pool = PagePool(4, 2)
    pages = fill(pool, [1, 2, 3, 4])
    pool.forget_all()
    assert pool.share_prefix([1, 2, 3, 4, 5]) == []
    pool.release(pages)
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_random_use_never_loses_a_page(seed: int) -> None:
    rng = random.Random(seed)
    pool, live = PagePool(20, 2), list[tuple[list[int], list[int]]]()
    for _ in range(2000):
        if live and (rng.random() < 0.5 or pool.num_free < 5):
            pages, _ = live.pop(rng.randrange(len(live)))
            pool.release(pages)
        else:
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 9))]
            live.append((fill(pool, tokens), tokens))
        content: dict[int, tuple[int, ...]] = {}
        for pages, tokens in live:
            for number, page in enumerate(pages):
                prefix = tuple(tokens[: 2 * number + 2])
                assert content.setdefault(page, prefix) == prefix, "one page, two contents"
        assert pool.num_free == 20 - len(content)
