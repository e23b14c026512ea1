"""Masks and labels of single peers: a pure function of the row, soft positions where all that distil are masked."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import SPECIAL, small_rows
from ctcd_ds.corpus.loader import MicroBatch, TrainLoader
from ctcd_ds.corpus.masking import Masking
from ctcd_ds.corpus.rows import Rows
from ctcd_ds.corpus.views import PeerMasks, peer_views

VOCAB = 1000
MASKING = Masking(0.15, SPECIAL, VOCAB)


def masks(fraction: float = 0.15, seed: int | None = None, noise: float = 0.0, distils: bool = True) -> PeerMasks:
    return PeerMasks(Masking(fraction, SPECIAL, VOCAB), seed, noise, distils)


def tokens_of(rows: int, length: int = 66) -> np.ndarray:
    tokens = np.random.default_rng(rows).integers(5, VOCAB, (rows, length), dtype=np.int32)
    tokens[:, 0], tokens[:, -1] = SPECIAL.cls, SPECIAL.sep
    return tokens


def views_of(rows: int, everywhere: bool = False, seed: int = 1, **peers: PeerMasks) -> Any:
    tokens, numbers = tokens_of(rows), np.arange(rows)
    views, soft = peer_views(peers, everywhere, tokens, seed, np.zeros_like(numbers), numbers)
    return tokens, views, soft


@given(
    fractions=st.tuples(*[st.floats(0.02, 0.6)] * 2),
    seeds=st.tuples(*[st.none() | st.integers(0, 3)] * 2),
    everywhere=st.booleans(),
    rows=st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_each_peer_is_asked_for_its_targets_and_both_for_the_common_ones(
    fractions: tuple[float, float], seeds: tuple[int | None, int | None], everywhere: bool, rows: int
) -> None:
    peers = {name: masks(f, s) for name, f, s in zip("ab", fractions, seeds, strict=True)}
    tokens, views, soft = views_of(rows, everywhere, **peers)
    chosen = {}
    for name, own in peers.items():
        input_ids, positions, targets = own.apply(name, tokens, 1, np.zeros(rows, np.int64), np.arange(rows))
        flat = (positions + np.arange(rows)[:, None] * tokens.shape[1]).ravel()
        chosen[name] = set(flat.tolist())
        view = views[name]
        labelled = view.targets >= 0
        assert view.input_ids.tolist() == input_ids.tolist()
        assert view.hard_count == targets.size == int(labelled.sum())
        assert set(view.positions[labelled].tolist()) == chosen[name]
        assert len(set(view.positions.tolist())) == len(view.positions)
        assert (tokens.ravel()[view.positions] == view.targets.numpy())[labelled.numpy()].all()
        assert view.positions[: len(soft)].tolist() == soft.tolist()
    text = set(np.flatnonzero(~SPECIAL.reserved(tokens)).tolist())
    assert set(soft.tolist()) == (text if everywhere else chosen["a"] & chosen["b"])


def test_equal_mask_seeds_give_equal_masks_and_others_independent_ones() -> None:
    _, views, soft = views_of(200, a=masks(seed=5), b=masks(seed=5))
    assert torch.equal(views["a"].input_ids, views["b"].input_ids) and len(soft) == views["a"].hard_count
    _, views, soft = views_of(2000, a=masks(), b=masks(seed=5))
    expected = 2000 * 10 * 10 / 64  # k = 10 of 64 places
    assert abs(len(soft) - expected) < 6 * expected**0.5


def test_with_one_seed_the_fewer_targets_lie_among_the_more() -> None:
    _, views, soft = views_of(50, a=masks(0.1), b=masks(0.4))
    assert len(soft) == views["a"].hard_count < views["b"].hard_count
    both = views["a"].input_ids.ravel()[soft] == views["b"].input_ids.ravel()[soft]
    assert bool(both.all()), "what is masked for both looks the same to both"


def test_a_peer_that_does_not_distil_has_its_targets_in_their_own_order() -> None:
    alone = views_of(7, c=masks(seed=3, distils=False))[1]["c"]
    beside = views_of(7, a=masks(), b=masks(seed=5), c=masks(seed=3, distils=False))[1]["c"]
    assert torch.equal(alone.positions, beside.positions) and torch.equal(alone.targets, beside.targets)
    assert bool((alone.positions.diff() > 0).all())


def test_label_noise_is_a_share_of_the_labels_and_the_peers_own() -> None:
    tokens, views, _ = views_of(3000, a=masks(noise=0.3), b=masks(noise=0.3), c=masks())
    wrong = {name: view.targets.numpy() != tokens.ravel()[view.positions] for name, view in views.items()}
    trials, share = wrong["a"].size, 0.3 * (1 - 1 / (VOCAB - 5))
    assert not wrong["c"].any()
    for name in "ab":
        assert abs(wrong[name].sum() - trials * share) < 5 * (trials * share * (1 - share)) ** 0.5
    together = (wrong["a"] & wrong["b"]).sum()  # independent of each other
    assert abs(together - trials * share**2) < 5 * (trials * share**2) ** 0.5
    noise = views["a"].targets.numpy()[wrong["a"]]
    assert noise.min() >= 5 and len(np.unique(noise)) > 0.95 * (VOCAB - 5)
    again = views_of(3000, a=masks(noise=0.3))[1]["a"]
    assert torch.equal(again.targets, views["a"].targets)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return small_rows(tmp_path_factory.mktemp("views") / "c")


def steps(rows: Rows, cut: tuple[int, int, int], rank: int = 0, start: int = 0) -> list[list[MicroBatch]]:
    peers = {"a": masks(noise=0.2), "b": masks(0.3, seed=5)}
    micro_batch, accumulation, world = cut
    source = TrainLoader(rows, MASKING, 1, 24, micro_batch, accumulation, rank, world, start, peers=peers)
    taken = list(itertools.islice(source, 4))
    source.close()
    return taken


@pytest.mark.parametrize("cut", [(24, 1, 1), (6, 4, 1), (4, 2, 3), (12, 1, 2)], ids=str)
def test_views_do_not_depend_on_ranks_micro_batches_and_where_a_run_began(
    rows: Rows, cut: tuple[int, int, int]
) -> None:
    """Labels by (row, position), and how many positions the soft losses of a step have, are the same at every cut."""

    def labels(batches: list[MicroBatch], name: str) -> dict[tuple[int, int], int]:
        found = {}
        for batch in batches:
            view, length = batch.views[name], batch.input_ids.shape[1]
            for flat, target in zip(view.positions.tolist(), view.targets.tolist(), strict=True):
                found[int(batch.rows[flat // length]), flat % length] = target
        return found

    ranks = [steps(rows, cut, rank) for rank in range(cut[2])]
    for step, whole in enumerate(steps(rows, (24, 1, 1))):
        parts = [batch for rank in ranks for batch in rank[step]]
        assert all(labels(parts, name) == labels(whole, name) for name in "ab")
        soft = [sum(len(b.soft_positions) for b in some if b.soft_positions is not None) for some in (parts, whole)]
        assert soft[0] == soft[1] > 0
    resumed = steps(rows, (24, 1, 1), start=2)
    assert labels(resumed[0], "a") == labels(steps(rows, (24, 1, 1))[2], "a")
