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

from corpora import SPECIAL, framed, random_documents, small_rows, write_corpus
from ctcd_ds.cli import UserError
from ctcd_ds.corpus.rows import Corpus, Rows, batch_rows
from ctcd_ds.objective.batch import Batch, View
from ctcd_ds.tasks.loader import Cut, TrainLoader, valid_batches
from ctcd_ds.tasks.masking import Masking
from ctcd_ds.tasks.mlm import MaskedLM, PeerMasks

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


def task(rows: Rows, everywhere: bool = False) -> MaskedLM:
    """What two peers are asked that see the same."""
    return MaskedLM(rows.corpus, 32, MASKING, dict.fromkeys("ab", PeerMasks(MASKING)), everywhere)


def loader(rows: Rows, cut: Cut | None = None, everywhere: bool = False, **options: Any) -> TrainLoader:
    return TrainLoader(rows, task(rows, everywhere), **{"start_step": 0, "seed": 1, "cut": cut or Cut(BATCH)} | options)


def steps(rows: Rows, number: int, **options: Any) -> list[list[Batch]]:
    source = loader(rows, **options)
    taken = list(itertools.islice(source, number))
    source.close()
    return taken


def same(one: Batch, other: Batch) -> bool:
    def tensors(batch: Batch) -> list[torch.Tensor]:
        return [tensor for view in batch.views for tensor in (*view.inputs.values(), view.positions, view.targets)]

    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and (
        one.rows.tolist() == other.rows.tolist() and one.shared == other.shared
    )


def joined(batches: list[Batch]) -> Batch:
    """Micro-batches put one under another, of peers that see the same."""
    views = [batch.views[0] for batch in batches]
    starts = np.cumsum([0, *(view.inputs["input_ids"].numel() for view in views)]).tolist()
    view = View(
        inputs={"input_ids": torch.cat([view.inputs["input_ids"] for view in views])},
        positions=torch.cat([start + view.positions for start, view in zip(starts, views, strict=False)]),
        targets=torch.cat([view.targets for view in views]),
        hard_count=sum(view.hard_count for view in views),
    )
    shared = sum(batch.shared for batch in batches)
    numbers = np.concatenate([batch.rows for batch in batches])
    return Batch((view, view), shared, torch.tensor(float(shared)), numbers)


# --- what a batch holds --------------------------------------------------------------------------------


def test_a_batch_is_the_masked_rows_of_its_step(rows: Rows) -> None:
    for step, [batch] in enumerate(steps(rows, 12)):  # more than an epoch
        epochs, numbers = batch_rows(1, len(rows), step, BATCH)
        tokens = rows.read(numbers)
        input_ids, positions, targets = MASKING.apply(tokens, 1, epochs, numbers)
        view = batch.views[0]
        assert batch.views[1] is view, "made once, moved once"
        assert batch.rows.tolist() == numbers.tolist()
        assert view.inputs["input_ids"].numpy().tolist() == input_ids.tolist()
        assert view.targets.tolist() == targets.ravel().tolist()
        assert tokens.ravel()[view.positions.numpy()].tolist() == view.targets.tolist()
        row, position = np.divmod(view.positions.numpy().reshape(BATCH, -1), tokens.shape[1])
        assert (row == np.arange(BATCH)[:, None]).all() and (position == positions).all()
        for tensor in (view.inputs["input_ids"], view.positions, view.targets):
            assert tensor.dtype == torch.int64 and tensor.is_contiguous()
        assert batch.shared == view.hard_count == batch.soft_count.item() == targets.size


def test_all_soft_positions_are_those_of_text(rows: Rows) -> None:
    for whole, [batch] in zip(steps(rows, 3), steps(rows, 3, everywhere=True), strict=True):
        view, text = batch.views[0], rows.read(batch.rows) >= 5
        assert view.positions.tolist() == np.flatnonzero(text).tolist() and batch.shared == text.sum()
        labelled = view.targets >= 0
        assert view.positions[labelled].tolist() == whole[0].views[0].positions.tolist()
        assert view.targets[labelled].tolist() == whole[0].views[0].targets.tolist()


# --- the same rows at every cut ------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_ranks_and_micro_batches_make_up_the_global_batch(rows: Rows, cut: tuple[int, int, int]) -> None:
    micro_batch, accumulation, world = cut
    ranks = [steps(rows, 6, cut=Cut(micro_batch, accumulation, rank, world)) for rank in range(world)]
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
    rows = framed(Corpus.open(write_corpus(tmp_path / "c", [[5] * (30 * BATCH * 2 - 1)])), "train", 32)
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
        for batch in valid_batches(rows, task(rows), Cut(micro_batch, rank=rank, world=world), max_rows)
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
    [whole] = valid_batches(rows, task(rows), Cut(len(rows), rank=0, world=1))
    parts = [batch for rank in range(3) for batch in valid_batches(rows, task(rows), Cut(7, rank=rank, world=3))]
    assert same(joined(parts), whole)


def test_more_ranks_than_held_out_rows(rows: Rows) -> None:
    counts = [len(list(valid_batches(rows, task(rows), Cut(4, rank=rank, world=5), max_rows=3))) for rank in range(5)]
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
    source = loader(framed(Corpus.open(path), "train", 32))
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
from test_loader import Corpus, framed, loader
source = loader(framed(Corpus.open(Path({str(path)!r})), "train", 32))
next(source)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=580)
    assert done.returncode == {"pass": 0, "raise ValueError": 1, "source.close()": 0}.get(ending, 3), done.stderr
    assert "Fatal" not in done.stderr and "terminate" not in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_arrive_on_the_gpu(rows: Rows) -> None:
    device = torch.device("cuda", 0)
    for ours, [there] in zip(steps(rows, 5), steps(rows, 5, device=device), strict=True):
        assert there.soft_count.device == device and same(ours[0], there.to(torch.device("cpu")))
