"""Batches for training, prepared one step ahead of the model, and batches of held-out rows.

Which rows a step reads is decided for the global batch (`Rows.batch`) and only then cut: rank 0 has the
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ctcd_ds.corpus.rows import Rows
from ctcd_ds.objective.batch import Batch
from ctcd_ds.tasks.cache import CachedTeachers
from ctcd_ds.tasks.task import VALID_SEED, Task

_STEPS_AHEAD = 2


@dataclass(frozen=True)
class Cut:
    """How a step's rows are cut: each rank has its share of the global batch, in `accumulation` micro-batches."""

    micro_batch: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1

    @property
    def global_batch(self) -> int:
        """Rows of a step, all ranks together."""
        return self.micro_batch * self.accumulation * self.world

    def batches(
        self, rows: Rows, task: Task, seed: int, step: int, teachers: CachedTeachers | None = None
    ) -> list[Batch]:
        """This rank's micro-batches of a step, with what the cached teachers say to them."""
        epochs, numbers = rows.batch(seed, step, self.global_batch)
        share = self.micro_batch * self.accumulation
        mine = slice(self.rank * share, (self.rank + 1) * share)
        made = task.batches(rows.read(numbers[mine]), seed, epochs[mine], numbers[mine], self.micro_batch)
        first = step * self.global_batch + mine.start
        return [
            batch if teachers is None else teachers.teach(batch, first + k * self.micro_batch)
            for k, batch in enumerate(made)
        ]


_Queue = queue.Queue["list[Batch] | BaseException"]


class TrainLoader(Iterator[list[Batch]]):
    """The endless sequence of this rank's steps, from `start_step` on, prepared by a thread of its own.

    Each `next` gives the micro-batches of one step on `device` (None: in ordinary memory), and raises what went wrong
    in the thread, if anything did. The next two steps are kept ready; `waited_s` is the time in seconds that the caller
    has spent waiting for one in all.
    """

    def __init__(
        self,
        rows: Rows,
        task: Task,
        seed: int,
        cut: Cut,
        start_step: int,
        device: torch.device | None = None,
        teachers: CachedTeachers | None = None,
    ) -> None:
        self.waited_s = 0.0
        self._device = device
        self._ready: _Queue = queue.Queue(_STEPS_AHEAD)
        prepare = partial(cut.batches, rows, task, seed, teachers=teachers)
        stop = threading.Event()
        thread = threading.Thread(
            target=_prepare_steps, args=(prepare, start_step, device, self._ready, stop), daemon=True
        )
        # Ends the thread at close(), when the loader is garbage, or before the interpreter ends: a thread
        # still inside torch at that last moment would take the process with it.
        self._end = weakref.finalize(self, _end_thread, thread, self._ready, stop)
        thread.start()

    def __next__(self) -> list[Batch]:
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
    prepare: Callable[[int], list[Batch]],
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
            ready.put([batch.mapped(torch.Tensor.pin_memory) for batch in batches] if cuda else batches)
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


def valid_batches(rows: Rows, task: Task, cut: Cut, max_rows: int | None = None) -> Iterator[Batch]:
    """The held-out rows of this rank in order, each row on exactly one rank; the last batch may be smaller.

    They are asked with a seed of their own, and the epoch is always 0. With `max_rows` that many rows, evenly spread
    over the split and always the same ones. Ranks may have different numbers of batches, or none: add up sums and
    counts after the loop, no collective inside it.
    """
    count, task = min(len(rows), max_rows or len(rows)), task.held_out()
    for start in range(count * cut.rank // cut.world, end := count * (cut.rank + 1) // cut.world, cut.micro_batch):
        numbers = np.arange(start, min(start + cut.micro_batch, end), dtype=np.int64) * len(rows) // count
        yield from task.batches(rows.read(numbers), VALID_SEED, np.zeros_like(numbers), numbers, cut.micro_batch)
