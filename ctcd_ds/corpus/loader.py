"""Batches for training, prepared one step ahead of the model, and batches of held-out rows.

Which rows a step reads is decided for the global batch (`rows.batch_rows`) and only then cut: rank 0 has the
first global_batch / world rows, rank 1 the next, and each rank cuts its share into micro-batches in the same
order. So every world size and every micro-batch size reads the same rows at the same step, masked the same.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from ctcd_ds.corpus.masking import Masking
from ctcd_ds.corpus.rows import Rows, batch_rows
from ctcd_ds.corpus.views import PeerMasks, View, peer_views

SoftPositions = Literal["targets", "all"]
_STEPS_AHEAD = 2


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward needs: b rows of length L with k targets each.

    Flat positions count through the batch row by row: row · L + position.
    """

    input_ids: torch.Tensor  # int64[b, L], masked
    target_positions: torch.Tensor  # int64[b·k], flat, ascending
    targets: torch.Tensor  # int64[b·k], the original tokens there
    rows: np.ndarray  # int64[b], the numbers of the rows, for messages
    soft_positions: torch.Tensor | None  # int64[m], flat: where soft losses are; None: at the targets
    views: Mapping[str, View] = field(default_factory=dict)  # by peer, where not all see the same; else empty

    def to(self, device: torch.device) -> MicroBatch:
        """This batch on `device`; the copies do not wait (from pinned memory, on the caller's stream)."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """This batch in page-locked memory, from which a GPU copies by itself."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        return replace(
            self,
            input_ids=function(self.input_ids),
            target_positions=function(self.target_positions),
            targets=function(self.targets),
            soft_positions=None if self.soft_positions is None else function(self.soft_positions),
            views={name: view.mapped(function) for name, view in self.views.items()},
        )


@dataclass(frozen=True)
class _Source:
    """Reads and masks rows: what training and held-out batches have in common."""

    rows: Rows
    masking: Masking
    seed: int
    micro_batch: int
    soft_positions: SoftPositions
    peers: Mapping[str, PeerMasks] = field(default_factory=dict)

    def batches(self, epochs: np.ndarray, numbers: np.ndarray) -> list[MicroBatch]:
        """The rows of these numbers in micro-batches; the last one may be smaller."""
        tokens = self.rows.read(numbers)
        input_ids, positions, targets = self.masking.apply(tokens, self.seed, epochs, numbers)
        cuts = [slice(at, at + self.micro_batch) for at in range(0, len(numbers), self.micro_batch)]
        batches = [
            MicroBatch(
                input_ids=_int64(input_ids[cut]),
                target_positions=_int64(_flat(positions[cut], tokens.shape[1])),
                targets=_int64(targets[cut].ravel()),
                rows=numbers[cut],
                soft_positions=self._soft_positions(tokens[cut], positions[cut]),
            )
            for cut in cuts
        ]
        if not self.peers:
            return batches
        pieces = [(tokens[cut], self.seed, epochs[cut], numbers[cut]) for cut in cuts]
        return [self._with_views(batch, *piece) for batch, piece in zip(batches, pieces, strict=True)]

    def _with_views(self, batch: MicroBatch, *piece: Any) -> MicroBatch:
        views, soft = peer_views(self.peers, self.soft_positions == "all", *piece)
        return replace(batch, views=views, soft_positions=torch.from_numpy(soft))

    def _soft_positions(self, tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor | None:
        if self.soft_positions == "targets":
            return None
        wanted = ~self.masking.special.reserved(tokens)
        np.put_along_axis(wanted, positions, True, axis=1)  # a row short of text has special tokens among its targets
        return torch.from_numpy(np.flatnonzero(wanted))


def _flat(positions: np.ndarray, length: int) -> np.ndarray:
    return (positions + np.arange(len(positions))[:, None] * length).ravel()


def _int64(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))


_Queue = queue.Queue["list[MicroBatch] | BaseException"]


class TrainLoader(Iterator[list[MicroBatch]]):
    """The endless sequence of this rank's steps, from `start_step` on, prepared by a thread of its own.

    Each `next` gives the `accumulation` micro-batches of one step on `device` (None: in ordinary memory), and
    raises what went wrong in the thread, if anything did. `global_batch` = micro_batch · accumulation ·
    world. The next two steps are kept ready; `waited_s` is the time in seconds that the caller has spent
    waiting for one in all. `peers`: everybody's masks, where not all peers see the same.
    """

    def __init__(
        self,
        rows: Rows,
        masking: Masking,
        seed: int,
        global_batch: int,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world: int,
        start_step: int,
        soft_positions: SoftPositions = "targets",
        device: torch.device | None = None,
        peers: Mapping[str, PeerMasks] | None = None,
    ) -> None:
        assert global_batch == micro_batch * accumulation * world, "the recipe has resolved the batch sizes"
        self.waited_s = 0.0
        self._device = device
        self._ready: _Queue = queue.Queue(_STEPS_AHEAD)
        source = _Source(rows, masking, seed, micro_batch, soft_positions, peers or {})
        share = slice(rank * (global_batch // world), (rank + 1) * (global_batch // world))

        def prepare(step: int) -> list[MicroBatch]:
            epochs, numbers = batch_rows(seed, len(rows), step, global_batch)
            return source.batches(epochs[share], numbers[share])

        stop = threading.Event()
        thread = threading.Thread(
            target=_prepare_steps, args=(prepare, start_step, device, self._ready, stop), daemon=True
        )
        # Ends the thread at close(), when the loader is garbage, or before the interpreter ends: a thread
        # still inside torch at that last moment would take the process with it.
        self._end = weakref.finalize(self, _end_thread, thread, self._ready, stop)
        thread.start()

    def __next__(self) -> list[MicroBatch]:
        if not self._end.alive:
            raise StopIteration
        started = time.perf_counter()
        ready = self._ready.get()
        self.waited_s += time.perf_counter() - started
        if isinstance(ready, BaseException):
            self.close()
            raise ready
        return ready if self._device is None else [batch.to(self._device) for batch in ready]

    def close(self) -> None:
        """Ends the thread and drops what it had prepared: the loader is at its end. May be called again."""
        self._end()


def _prepare_steps(
    prepare: Callable[[int], list[MicroBatch]],
    start_step: int,
    device: torch.device | None,
    ready: _Queue,
    stop: threading.Event,
) -> None:
    """The thread's work. It knows the loader's parts, not the loader, which is thus free to be collected."""
    try:
        cuda = device is not None and device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)  # else pinning would open a context on GPU 0 for every rank
        for step in itertools.count(start_step):
            batches = prepare(step)
            if stop.is_set():
                return
            ready.put([batch.pinned() for batch in batches] if cuda else batches)
    except BaseException as failure:  # handed to the caller, who raises it
        ready.put(failure)


def _end_thread(thread: threading.Thread, ready: _Queue, stop: threading.Event) -> None:
    stop.set()
    if thread is threading.current_thread():  # the garbage collector runs wherever it likes
        return
    while thread.is_alive():  # it may be waiting to put a step: make room for it
        with contextlib.suppress(queue.Empty):
            ready.get_nowait()
        thread.join(0.01)


def valid_batches(
    rows: Rows,
    masking: Masking,
    seed: int,
    micro_batch: int,
    rank: int,
    world: int,
    max_rows: int | None = None,
    soft_positions: SoftPositions = "targets",
    device: torch.device | None = None,
) -> Iterator[MicroBatch]:
    """The held-out rows of this rank in order, each row on exactly one rank; the last batch may be smaller.

    `seed` is the masks' own (`masking.VALID_SEED`), the epoch is always 0. With `max_rows` that many rows,
    evenly spread over the split and always the same ones. Ranks may have different numbers of batches, or
    none: add up sums and counts after the loop, no collective inside it.
    """
    count = min(len(rows), max_rows or len(rows))
    source = _Source(rows, masking, seed, micro_batch, soft_positions)
    for start in range(count * rank // world, end := count * (rank + 1) // world, micro_batch):
        numbers = np.arange(start, min(start + micro_batch, end), dtype=np.int64) * len(rows) // count
        [batch] = source.batches(np.zeros_like(numbers), numbers)
        yield batch if device is None else batch.to(device)
