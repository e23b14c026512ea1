"""Masks and labels of single peers: a pure function of the row, soft positions where all that distil are masked."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import SPECIAL, small_rows
from ctcd_ds.corpus.rows import Corpus, Rows
from ctcd_ds.objective.batch import Batch
from ctcd_ds.tasks.loader import Cut, TrainLoader
from ctcd_ds.tasks.masking import Masking
from ctcd_ds.tasks.mlm import MaskedLM, PeerMasks
from ctcd_ds.tasks.noise import LabelNoise

VOCAB = 1000
MASKING = Masking(0.15, SPECIAL, VOCAB)


def masks(fraction: float = 0.15, seed: int | None = None, noise: float = 0.0, distils: bool = True) -> PeerMasks:
    return PeerMasks(
        Masking(fraction, SPECIAL, VOCAB), seed, LabelNoise(noise, "", SPECIAL, VOCAB) if noise else None, distils
    )


def tokens_of(rows: int, length: int = 66) -> np.ndarray:
    tokens = np.random.default_rng(rows).integers(5, VOCAB, (rows, length), dtype=np.int32)
    tokens[:, 0], tokens[:, -1] = SPECIAL.cls, SPECIAL.sep
    return tokens


def task(peers: dict[str, PeerMasks], everywhere: bool = False) -> MaskedLM:
    """What these peers are asked; each one's noise is keyed by its name."""
    corpus = Corpus(Path(), "", SPECIAL, VOCAB, "", "", "uint16", {}, ((), ()))
    named = {name: replace(own, noise=own.noise and replace(own.noise, peer=name)) for name, own in peers.items()}
    return MaskedLM(corpus, 66, MASKING, named, everywhere)


def views_of(rows: int, everywhere: bool = False, seed: int = 1, **peers: PeerMasks) -> Any:
    """The rows' tokens, each peer's view of them by name, and the positions of the soft losses."""
    tokens, numbers = tokens_of(rows), np.arange(rows)
    [batch] = task(peers, everywhere).batches(tokens, seed, np.zeros_like(numbers), numbers, rows)
    views = dict(zip(peers, batch.views, strict=True))
    soft = next((v.positions[: batch.shared] for n, v in views.items() if peers[n].distils), torch.zeros(0))
    return tokens, views, soft.numpy()


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
        input_ids, positions, targets = own.apply(tokens, 1, np.zeros(rows, np.int64), np.arange(rows))
        flat = (positions + np.arange(rows)[:, None] * tokens.shape[1]).ravel()
        chosen[name] = set(flat.tolist())
        view = views[name]
        labelled = view.targets >= 0
        assert view.inputs["input_ids"].tolist() == input_ids.tolist()
        assert view.hard_count == targets.size == int(labelled.sum())
        assert set(view.positions[labelled].tolist()) == chosen[name]
        assert len(set(view.positions.tolist())) == len(view.positions)
        assert (tokens.ravel()[view.positions] == view.targets.numpy())[labelled.numpy()].all()
        assert view.positions[: len(soft)].tolist() == soft.tolist()
    text = set(np.flatnonzero(~SPECIAL.reserved(tokens)).tolist())
    assert set(soft.tolist()) == (text if everywhere else chosen["a"] & chosen["b"])


def test_equal_mask_seeds_give_equal_masks_and_others_independent_ones() -> None:
    _, views, soft = views_of(200, a=masks(seed=5), b=masks(seed=5))
    assert (
        torch.equal(views["a"].inputs["input_ids"], views["b"].inputs["input_ids"])
        and len(soft) == views["a"].hard_count
    )
    _, views, soft = views_of(2000, a=masks(), b=masks(seed=5))
    expected = 2000 * 10 * 10 / 64  # k = 10 of 64 places
    assert abs(len(soft) - expected) < 6 * expected**0.5


def test_with_one_seed_the_fewer_targets_lie_among_the_more() -> None:
    _, views, soft = views_of(50, a=masks(0.1), b=masks(0.4))
    assert len(soft) == views["a"].hard_count < views["b"].hard_count
    both = views["a"].inputs["input_ids"].ravel()[soft] == views["b"].inputs["input_ids"].ravel()[soft]
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


def steps(rows: Rows, cut: Cut, start: int = 0) -> list[list[Batch]]:
    asked = task({"a": masks(noise=0.2), "b": masks(0.3, seed=5)})
    source = TrainLoader(rows, asked, 1, cut, start)
    taken = list(itertools.islice(source, 4))
    source.close()
    return taken


@pytest.mark.parametrize("cut", [Cut(24), Cut(6, 4), Cut(4, 2, 0, 3), Cut(12, 1, 0, 2)], ids=str)
def test_views_do_not_depend_on_ranks_micro_batches_and_where_a_run_began(rows: Rows, cut: Cut) -> None:
    """Labels by (row, position), and how many positions the soft losses of a step have, are the same at every cut."""

    def labels(batches: list[Batch], peer: int) -> dict[tuple[int, int], int]:
        found = {}
        for batch in batches:
            view = batch.views[peer]
            length = view.inputs["input_ids"].shape[1]
            for flat, target in zip(view.positions.tolist(), view.targets.tolist(), strict=True):
                found[int(batch.rows[flat // length]), flat % length] = target
        return found

    ranks = [steps(rows, replace(cut, rank=rank)) for rank in range(cut.world)]
    for step, whole in enumerate(steps(rows, Cut(24))):
        parts = [batch for rank in ranks for batch in rank[step]]
        assert all(labels(parts, peer) == labels(whole, peer) for peer in (0, 1))
        soft = [sum(batch.shared for batch in some) for some in (parts, whole)]
        assert soft[0] == soft[1] > 0
    resumed = steps(rows, Cut(24), start=2)
    assert labels(resumed[0], 0) == labels(steps(rows, Cut(24))[2], 0)
