"""The loader: the same rows at every cut into ranks and micro-batches, and a thread that ends in time."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import SPECIAL, random_documents, small_rows, write_corpus
from ctcd_ds.cli import UserError
from ctcd_ds.corpus.loader import MicroBatch, TrainLoader, valid_batches
from ctcd_ds.corpus.masking import VALID_SEED, Masking
from ctcd_ds.corpus.rows import Corpus, Rows, batch_rows

MASKING = Masking(0.15, SPECIAL, 1000)
BATCH = 24
CUTS = [
    (m, a, w)
    for m in (1, 2, 3, 4, 8, 12, 24)
    for w in (1, 2, 3, 4, 6)
    for a in (BATCH // m // w,)
    if m * a * w == BATCH
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return small_rows(tmp_path_factory.mktemp("loader") / "c")


def loader(rows: Rows, cut: tuple[int, int, int] = (BATCH, 1, 1), rank: int = 0, **options: Any) -> TrainLoader:
    micro_batch, accumulation, world = cut
    options = {"start_step": 0, "seed": 1} | options
    return TrainLoader(
        rows,
        MASKING,
        global_batch=BATCH,
        micro_batch=micro_batch,
        accumulation=accumulation,
        rank=rank,
        world=world,
        **options,
    )


def steps(rows: Rows, number: int, **options: Any) -> list[list[MicroBatch]]:
    source = loader(rows, **options)
    taken = list(itertools.islice(source, number))
    source.close()
    return taken


def same(one: MicroBatch, other: MicroBatch) -> bool:
    tensors = ("input_ids", "target_positions", "targets")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors) and (
        one.rows.tolist() == other.rows.tolist()
    )


def joined(batches: list[MicroBatch]) -> MicroBatch:
    """Micro-batches put one under another."""
    starts = np.cumsum([0, *(batch.input_ids.numel() for batch in batches)]).tolist()
    flat = zip(starts, batches, strict=False)
    return MicroBatch(
        input_ids=torch.cat([batch.input_ids for batch in batches]),
        target_positions=torch.cat([start + batch.target_positions for start, batch in flat]),
        targets=torch.cat([batch.targets for batch in batches]),
        rows=np.concatenate([batch.rows for batch in batches]),
        soft_positions=None,
    )


# --- what a batch holds --------------------------------------------------------------------------------


def test_a_batch_is_the_masked_rows_of_its_step(rows: Rows) -> None:
    for step, [batch] in enumerate(steps(rows, 12)):  # more than an epoch
        epochs, numbers = batch_rows(1, len(rows), step, BATCH)
        tokens = rows.read(numbers)
        input_ids, positions, targets = MASKING.apply(tokens, 1, epochs, numbers)
        assert batch.rows.tolist() == numbers.tolist()
        assert batch.input_ids.numpy().tolist() == input_ids.tolist()
        assert batch.targets.tolist() == targets.ravel().tolist()
        assert tokens.ravel()[batch.target_positions.numpy()].tolist() == batch.targets.tolist()
        row, position = np.divmod(batch.target_positions.numpy().reshape(BATCH, -1), rows.sequence_length)
        assert (row == np.arange(BATCH)[:, None]).all() and (position == positions).all()
        for tensor in (batch.input_ids, batch.target_positions, batch.targets):
            assert tensor.dtype == torch.int64 and tensor.is_contiguous()
        assert batch.soft_positions is None


def test_all_soft_positions_are_those_of_text(rows: Rows) -> None:
    for [batch] in steps(rows, 3, soft_positions="all"):
        text = rows.read(batch.rows) >= 5
        assert batch.soft_positions is not None and batch.soft_positions.dtype == torch.int64
        assert batch.soft_positions.tolist() == np.flatnonzero(text).tolist()
        assert set(batch.target_positions.tolist()) <= set(batch.soft_positions.tolist())


# --- the same rows at every cut ------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_ranks_and_micro_batches_make_up_the_global_batch(rows: Rows, cut: tuple[int, int, int]) -> None:
    micro_batch, accumulation, world = cut
    ranks = [steps(rows, 6, cut=cut, rank=rank) for rank in range(world)]
    for step, whole in enumerate(steps(rows, 6)):
        parts = [batch for rank in ranks for batch in rank[step]]
        assert len(parts) == accumulation * world and all(len(part.rows) == micro_batch for part in parts)
        assert same(joined(parts), whole[0])


@given(start=st.integers(0, 40), seed=st.integers(0, 2**63))
@settings(max_examples=15, deadline=None)
def test_a_resumed_loader_goes_on_where_it_was(rows: Rows, start: int, seed: int) -> None:
    straight = steps(rows, 3, start_step=start, seed=seed)
    resumed = steps(rows, 2, start_step=start + 1, seed=seed)
    assert all(same(a[0], b[0]) for a, b in zip(straight[1:], resumed, strict=True))


def test_an_epoch_reads_every_row_once(tmp_path: Path) -> None:
    rows = Corpus.open(write_corpus(tmp_path / "c", [[5] * (30 * BATCH * 2 - 1)])).rows("train", 32)
    assert len(rows) == 2 * BATCH
    seen = [batch.rows for step in steps(rows, 4) for batch in step]
    for epoch in (seen[:2], seen[2:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(2 * BATCH))
    assert np.concatenate(seen[:2]).tolist() != np.concatenate(seen[2:]).tolist()


# --- held-out rows -------------------------------------------------------------------------------------


@given(world=st.integers(1, 7), micro_batch=st.integers(1, 40), max_rows=st.none() | st.integers(1, 400))
@settings(max_examples=30, deadline=None)
def test_each_held_out_row_comes_once(rows: Rows, world: int, micro_batch: int, max_rows: int | None) -> None:
    batches = [
        batch
        for rank in range(world)
        for batch in valid_batches(rows, MASKING, VALID_SEED, micro_batch, rank, world, max_rows)
    ]
    numbers = [number for batch in batches for number in batch.rows.tolist()]
    assert len(numbers) == min(max_rows or len(rows), len(rows))
    assert sorted(set(numbers)) == numbers and numbers[-1] < len(rows)
    assert all(1 <= len(batch.rows) <= micro_batch for batch in batches)
    if len(numbers) == len(rows):
        assert numbers == list(range(len(rows)))
    else:  # spread over the split: no two neighbours are much farther apart than others
        assert np.ptp(np.diff(numbers)) <= 1 if len(numbers) > 1 else True


def test_held_out_rows_are_masked_alike_at_any_cut(rows: Rows) -> None:
    [whole] = valid_batches(rows, MASKING, VALID_SEED, len(rows), 0, 1)
    parts = [batch for rank in range(3) for batch in valid_batches(rows, MASKING, VALID_SEED, 7, rank, 3)]
    assert same(joined(parts), whole)


def test_more_ranks_than_held_out_rows(rows: Rows) -> None:
    counts = [len(list(valid_batches(rows, MASKING, VALID_SEED, 4, rank, 5, max_rows=3))) for rank in range(5)]
    assert sum(counts) == 3 and 0 in counts


# --- the thread ----------------------------------------------------------------------------------------


def loader_threads() -> int:
    return sum("_prepare_steps" in thread.name for thread in threading.enumerate())


def test_close_ends_the_thread_at_once(rows: Rows) -> None:
    for taken in (0, 1, 5):
        source = loader(rows)
        list(itertools.islice(source, taken))
        started = time.perf_counter()
        source.close()
        source.close()
        assert time.perf_counter() - started < 1 and loader_threads() == 0
        with pytest.raises(StopIteration):
            next(source)


def test_a_forgotten_loader_ends_its_thread(rows: Rows) -> None:
    source = loader(rows)
    next(source)
    assert loader_threads() == 1
    del source
    gc.collect()
    assert loader_threads() == 0


def test_what_goes_wrong_in_the_thread_is_raised(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "c", [[5] * 2000])
    np.full(2001, 1000, np.uint16).tofile(path / "train-00000.bin")  # ids that the tokenizer does not have
    source = loader(Corpus.open(path).rows("train", 32))
    with pytest.raises(UserError, match=r"corpus .* is damaged"):
        next(source)
    with pytest.raises(StopIteration):
        next(source)
    assert loader_threads() == 0


def test_two_steps_are_ready_ahead_and_waiting_is_counted(rows: Rows) -> None:
    source = loader(rows)
    next(source)
    time.sleep(0.5)
    before = source.waited_s
    next(source), next(source)
    assert before > 0 and source.waited_s - before < 0.1
    source.close()


@pytest.mark.parametrize("ending", ["pass", "raise ValueError", "import sys; sys.exit(3)", "source.close()"])
def test_a_process_ends_with_its_loader(tmp_path: Path, ending: str) -> None:
    path = write_corpus(tmp_path / "c", random_documents(100))
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_loader import Corpus, loader
source = loader(Corpus.open(Path({str(path)!r})).rows("train", 32))
next(source)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == {"pass": 0, "raise ValueError": 1, "source.close()": 0}.get(ending, 3), done.stderr
    assert "Fatal" not in done.stderr and "terminate" not in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_arrive_on_the_gpu(rows: Rows) -> None:
    device = torch.device("cuda", 0)
    for ours, [there] in zip(steps(rows, 5), steps(rows, 5, device=device), strict=True):
        assert there.input_ids.device == device and same(ours[0], there.to(torch.device("cpu")))
