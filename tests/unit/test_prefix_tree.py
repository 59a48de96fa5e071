"""Prefixes in memory, as pure bookkeeping: names, bounds, and who goes first."""

import random

import pytest

from worker.prefix_chain import BLOCK_TOKENS, Chain, root_name
from worker.prefix_tree import Block, Tree
from worker.prefix_wear import Wear

SIZE = 10


def names_of(tokens: list[int], salt: str = "", model: bytes = b"m") -> list[bytes]:
    chain = Chain(root_name(model, salt))
    chain.extend(tokens)
    return chain.names


def blocks(names: list[bytes], first: int = 0, end: int | None = None) -> list[Block]:
    return [Block(name, first + n, (), SIZE) for n, name in enumerate(names[first:end])]


def prompt(seed: int, count: int) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(50_000) for _ in range(count * BLOCK_TOKENS)]


# -- names ----------------------------------------------------------------------------------------------------------


def test_equal_beginnings_have_equal_names_up_to_where_they_part() -> None:
    one, other = prompt(1, 4), prompt(1, 4)
    other[2 * BLOCK_TOKENS + 5] += 1
    found, others = names_of(one), names_of(other)
    assert found[:2] == others[:2]
    assert not set(found[2:]) & set(others[2:]), "what follows another block is another prefix, whatever it says"


def test_only_full_blocks_have_names_and_they_grow_with_the_sequence() -> None:
    tokens = prompt(1, 3)
    chain = Chain(root_name(b"m"))
    for end in range(len(tokens) + 1):
        chain.extend(tokens[:end])
        assert len(chain.names) == end // BLOCK_TOKENS
    assert chain.names == names_of(tokens)


def test_models_and_salts_have_no_prefix_in_common() -> None:
    tokens = prompt(1, 2)
    found = [names_of(tokens, salt, model) for salt in ("", "key:a", "key:b") for model in (b"m", b"n")]
    assert len({name for names in found for name in names}) == 12
    # Neither can one be made to look like the other.
    assert root_name(b"m", "n") != root_name(b"mn", "")


# -- the tree -------------------------------------------------------------------------------------------------------


def test_the_longest_known_beginning_is_found() -> None:
    tree = Tree(1000)
    names = names_of(prompt(1, 5))
    assert tree.add(names, blocks(names, 0, 3), 1.0)
    assert [block.name for block in tree.find(names, 2.0)] == names[:3]
    assert tree.find(names_of(prompt(2, 5)), 2.0) == []


def test_a_shared_beginning_is_held_once() -> None:
    tree = Tree(1000)
    system = prompt(1, 3)
    for seed in range(2, 6):
        names = names_of(system + prompt(seed, 1))
        assert tree.add(names, blocks(names), 1.0)
    assert tree.bytes == (3 + 4) * SIZE


def test_the_least_recently_used_goes_first_and_using_is_finding() -> None:
    tree = Tree(4 * SIZE)
    conversations = [names_of(prompt(seed, 2)) for seed in range(3)]
    tree.add(conversations[0], blocks(conversations[0]), 1.0)
    tree.add(conversations[1], blocks(conversations[1]), 2.0)
    assert len(tree.find(conversations[0], 3.0)) == 2
    tree.add(conversations[2], blocks(conversations[2]), 4.0)
    assert [tree.known(names) for names in conversations] == [2, 0, 2]


def test_a_long_prefix_loses_its_end_first() -> None:
    tree = Tree(6 * SIZE)
    long, short = names_of(prompt(1, 5)), names_of(prompt(2, 3))
    tree.add(long, blocks(long), 1.0)
    tree.add(short, blocks(short), 2.0)
    assert (tree.known(long), tree.known(short)) == (3, 3)


def test_a_sequence_longer_than_the_limit_keeps_its_beginning_and_does_not_push_itself_out() -> None:
    tree = Tree(4 * SIZE)
    names = names_of(prompt(1, 9))
    assert not tree.add(names, blocks(names, 0, 3), 1.0) or tree.known(names) == 3
    assert not tree.add(names, blocks(names, 3, 9), 2.0)
    assert (tree.known(names), tree.bytes) == (4, 4 * SIZE)


def test_nothing_is_taken_without_what_comes_before_it() -> None:
    tree = Tree(1000)
    names = names_of(prompt(1, 4))
    assert not tree.add(names, blocks(names, 2), 1.0)
    assert (len(tree), tree.bytes) == (0, 0)


def test_less_memory_and_long_disuse_let_things_go() -> None:
    tree = Tree(1000)
    old, new = names_of(prompt(1, 4)), names_of(prompt(2, 4))
    tree.add(old, blocks(old), 1.0)
    tree.add(new, blocks(new), 9.0)
    assert tree.drop_unused_since(5.0) == 4 * SIZE
    assert (tree.known(old), tree.known(new)) == (0, 4)
    assert tree.shrink(25) == 2 * SIZE
    assert tree.known(new) == 2
    assert tree.shrink(0) == 2 * SIZE
    assert (len(tree), tree.bytes) == (0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_the_bounds_hold_and_no_block_is_without_its_predecessor(seed: int) -> None:
    chooser = random.Random(seed)
    limit = chooser.randrange(3, 40) * SIZE
    tree = Tree(limit)
    stems = [prompt(n, chooser.randrange(1, 8)) for n in range(4)]
    everything = [names_of(chooser.choice(stems) + prompt(100 + n, chooser.randrange(6))) for n in range(12)]
    for now in range(300):
        names = chooser.choice(everything)
        deed = chooser.random()
        if deed < 0.5:
            first = tree.known(names)
            tree.add(names, blocks(names, first, first + chooser.randrange(1, 5)), now)
        elif deed < 0.9:
            tree.find(names, now)
        elif deed < 0.95:
            tree.shrink(chooser.randrange(limit))
        else:
            tree.drop_unused_since(now - 20)
        assert tree.bytes == len(tree) * SIZE <= limit
        for other in everything:
            known = tree.known(other)
            assert not any(name in tree for name in other[known:]), "a block without what comes before it"
        order = [block.name for block in tree.recent()]
        for other in everything:
            places = [order.index(name) for name in other if name in tree]
            assert places == sorted(places), "recent() has each block before what continues it"


# -- wear -----------------------------------------------------------------------------------------------------------


def test_what_nobody_came_back_to_is_written_so_much_a_day() -> None:
    wear = Wear(burst=100, per_day=86_400, now=0.0)
    assert wear.allows(100, 0.0)
    assert not wear.allows(10, 5.0)
    assert wear.allows(10, 10.0)
    assert not wear.allows(1, 10.0)
    assert not wear.allows(101, 1e9), "never more than the burst at once"
    assert wear.allows(100, 1e9)
