"""Disjoint parts, drawn by seed and size alone."""

from itertools import chain, combinations

import pytest
import torch

from gm_probe.data.examples import Examples, Source
from gm_probe.data.splits import Splits, split
from gm_probe.errors import DataError


def numbered(size: int, labels: torch.Tensor | None = None) -> Examples:
    """Examples whose x is their position."""
    y = torch.arange(size) % 3 if labels is None else labels
    return Examples(torch.arange(size).unsqueeze(1), y, ("a", "b", "c"), "numbers")


def cut(source: Source, seed: int = 0, **sizes: int | None) -> Splits:
    everything = {"num_train": None, "num_unlabeled": None, "num_test": None, **sizes}
    return split(source, **everything, seed=seed)


def positions(splits: Splits) -> dict[str, list[int]]:
    parts = {"train": splits.train, "unlabeled": splits.unlabeled, "test": splits.test}
    return {name: part.x.squeeze(1).tolist() for name, part in parts.items()}


def test_default_parts_are_disjoint_and_whole() -> None:
    splits = cut(Source(numbered(103), None))
    found = positions(splits)
    assert {name: len(part) for name, part in found.items()} == {"unlabeled": 25, "test": 25, "train": 53}
    for one, other in combinations(found.values(), 2):
        assert not set(one) & set(other)
    assert sorted(chain.from_iterable(found.values())) == list(range(103))


def test_indices_are_the_positions() -> None:
    splits = cut(Source(numbered(50), numbered(20)), num_train=10, num_unlabeled=5, num_test=4)
    assert splits.indices == positions(splits)
    assert all(part == sorted(part) for part in splits.indices.values())
    assert splits.unlabeled.y.tolist() == [n % 3 for n in splits.indices["unlabeled"]]


def test_unlabeled_part_is_capped() -> None:
    assert len(cut(Source(numbered(30_000), None)).unlabeled) == 5000


def test_given_sizes() -> None:
    splits = cut(Source(numbered(100), None), num_train=10, num_unlabeled=60, num_test=30)
    assert [len(splits.train), len(splits.unlabeled), len(splits.test)] == [10, 60, 30]


def test_the_seed_alone_draws() -> None:
    source = Source(numbered(200), None)
    first = cut(source, seed=1).indices
    torch.manual_seed(1234)
    assert cut(source, seed=1).indices == first
    assert cut(source, seed=2).indices != first
    for part in first.values():
        assert part != list(range(min(part), min(part) + len(part)))  # no run of neighbours


def test_labels_do_not_matter() -> None:
    labeled = Source(numbered(200), None)
    shuffled = Source(numbered(200, torch.arange(200).flip(0) % 3), None)
    bare = Source(numbered(200).unlabeled(), None)
    assert cut(labeled).indices == cut(shuffled).indices == cut(bare).indices


def test_more_training_keeps_the_unlabeled_part() -> None:
    source = Source(numbered(200), None)
    few = cut(source, num_train=20, num_unlabeled=50, num_test=50).indices
    many = cut(source, num_train=100, num_unlabeled=50, num_test=50).indices
    assert few["unlabeled"] == many["unlabeled"]
    assert few["test"] == many["test"]
    assert set(few["train"]) < set(many["train"])


def test_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    cut(Source(numbered(50), numbered(10)))
    assert torch.equal(torch.get_rng_state(), before)


def test_own_test_part() -> None:
    own = Examples(torch.arange(1000, 1040).unsqueeze(1), torch.zeros(40, dtype=torch.int64), (), "own")
    whole = cut(Source(numbered(100), own))
    assert whole.test.x.squeeze(1).tolist() == list(range(1000, 1040))
    assert len(whole.train) + len(whole.unlabeled) == 100
    some = cut(Source(numbered(100), own), num_test=10)
    assert len(some.test) == 10
    assert some.indices["test"] != list(range(10))
    assert some.indices["train"] == whole.indices["train"]


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"num_train": 0}, "each part needs at least one"),
        ({"num_train": -5}, "each part needs at least one"),
        ({"num_unlabeled": 0}, "each part needs at least one"),
        ({"num_unlabeled": -1}, "each part needs at least one"),
        ({"num_test": 0}, "each part needs at least one"),
        ({"num_unlabeled": 100}, "each part needs at least one"),
        ({"num_train": 51}, "numbers has 100 examples, fewer than 51 train + 25 unlabeled + 25 test"),
        ({"num_train": 90, "num_unlabeled": 5, "num_test": 6}, "lower --num-train"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], reason: str) -> None:
    with pytest.raises(DataError) as caught:
        cut(Source(numbered(100), None), **sizes)
    assert reason in str(caught.value)


@pytest.mark.parametrize("size", [0, -1, 41])
def test_own_test_part_too_small(size: int) -> None:
    with pytest.raises(DataError, match=f"numbers has 40 test examples, not {size}"):
        cut(Source(numbered(100), numbered(40)), num_test=size)


def test_a_pool_too_small_to_cut() -> None:
    with pytest.raises(DataError, match="out of 3"):
        cut(Source(numbered(3), None))
