"""The training loop. Everything a step does stands in `train`, top to bottom."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ctcd_ds.cli import RunFailure, UserError, count
from ctcd_ds.cluster.ranks import Ranks
from ctcd_ds.tasks.loader import Cut, TrainLoader
from ctcd_ds.training import checkpoint, loading
from ctcd_ds.training.clock import Clock
from ctcd_ds.training.engine import build_engine, start_processes
from ctcd_ds.training.evaluate import evaluate
from ctcd_ds.training.finite import FiniteGuard
from ctcd_ds.training.hardware import peak_flops, peak_memory_bytes
from ctcd_ds.training.metrics import MetricsLog
from ctcd_ds.training.optimizer import PeerGradients
from ctcd_ds.training.plan import Plan
from ctcd_ds.training.rank_zero import on_rank_zero
from ctcd_ds.training.run_directory import RunDirectory
from ctcd_ds.training.saving import save
from ctcd_ds.training.schedule import lr_factor
from ctcd_ds.training.signals import StopSignals
from ctcd_ds.training.step import exchange, forward_and_backward, with_global_soft_count
from ctcd_ds.training.watchdog import Watchdog


def train(plan: Plan, ranks: Ranks, run: RunDirectory, ending: ExitStack) -> str | None:
    """Runs the plan to its end, from the newest checkpoint of the run directory if there is one.

    Called by all ranks, after the plan and the directory were found good. Returns None where all steps are done, else
    why the run stopped early, with everything saved. Raises RunFailure where a loss or gradient is not finite.
    What must be undone whatever the end is left in `ending`.
    """
    training, config = plan.recipe.training, plan.deepspeed
    signals = StopSignals(has_launcher=ranks.source != "alone")
    ending.callback(signals.restore)
    device = start_processes(ranks)
    watchdog = Watchdog(training.step_timeout_s, run.write_failure)
    ending.callback(watchdog.stop)
    newest, best = on_rank_zero(lambda: _begin(plan, run, ranks, device), device)
    engine = build_engine(plan, universal=newest is not None and newest[1]["world"] != ranks.world)
    watchdog.outlast_collectives()  # ZeRO's groups are there now
    step = first_step = loading.load(engine, *newest) if newest is not None else 0
    cut = Cut(config.micro_batch, config.accumulation, ranks.rank, ranks.world)
    ahead = device if device.type == "cuda" else None
    loader = TrainLoader(plan.rows, plan.task, plan.recipe.seed, cut, step, ahead, plan.teachers)
    ending.callback(loader.close)
    whole, settings = plan.recipe.graph(), {name: plan.recipe.optimizer_of(name) for name in plan.recipe.peers}
    gradients = PeerGradients(engine.optimizer, [n for n in settings if not plan.recipe.peers[n].frozen], device)
    peak = peak_flops(device, config.precision)
    log = MetricsLog(run.metrics, engine.monitor, plan, step, peak) if ranks.first else None
    guard = FiniteGuard(engine.optimizer, config.precision, training.on_nonfinite)
    clock = Clock(training.checkpoint_minutes, training.time_limit_minutes, log.earlier_s if log is not None else 0.0)
    stop: str | None = None
    losses: dict[str, float] = {}
    held_out: dict[str, float] = {}

    while step < plan.steps and stop is None:
        watchdog.enter("first step" if step == first_step else f"step {step + 1}")
        factor, graph = lr_factor(plan.recipe.schedule, step, plan.steps), whole.at(step / plan.steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = settings[group["peer"]].lr * factor

        batches = next(loader)
        if plan.task.soft_count_varies:
            batches = with_global_soft_count(batches, device)
        seen = forward_and_backward(engine, batches, step, ranks.rank, graph)

        wish = signals.reason or clock.over()
        losses, grad_norms, norms, save_due, stop = exchange(seen, gradients, clock.save_due(), wish)
        bad = guard.judge({**losses, **grad_norms}, step + 1, seen, batches)
        gradients.clip(norms, settings)
        gradients.allow_step(bad is None)
        engine.step()
        step += 1

        last = step == plan.steps
        validates = bool(plan.valid) and (last or step % training.valid_every == 0)
        held_out, improved = {}, False
        if validates:
            watchdog.enter("validation")
            with clock.paused("validation"):
                held_out = evaluate(engine, plan, device)
            improved = training.keep_best and _improve(best, _valid_losses(held_out, gradients.groups))
        if log is not None:
            log.advance(step, bad)
        if log is not None and (last or validates or bad or step == first_step + 1 or step % training.log_every == 0):
            lrs = {f"lr/{name}": settings[name].lr * factor for name in gradients.groups}
            scaling = {"loss_scale": float(engine.optimizer.loss_scale)} if config.precision == "fp16" else {}
            row = {**losses, **grad_norms, **lrs, **held_out, **scaling, "skipped_steps": engine.skipped_steps}
            row["seconds"] = clock.of_the_run()
            log.row(step, row, clock.seconds(), loader.waited_s, peak_memory_bytes(device))
        due = save_due or (training.checkpoint_every and step % training.checkpoint_every == 0)
        if last or stop or due or improved:
            watchdog.enter("saving")
            with clock.paused("saving"):
                save(engine, plan, run.checkpoints, step, _valid_losses(held_out, gradients.groups))
            clock.saved()

    if log is not None:
        log.close()
        _write_end(run, plan, step, first_step, {**losses, **held_out}, clock, stop)
    return stop if step < plan.steps else None


def _write_end(
    run: RunDirectory, plan: Plan, step: int, first_step: int, values: dict[str, float], clock: Clock, stop: str | None
) -> None:
    """summary.json where all steps are done, and exit.json."""
    if step < plan.steps:
        run.prove(ended=True)
        run.write_exit("saved", step, str(stop))
        return
    rows, length = plan.recipe.training.global_batch_rows, plan.recipe.corpus.sequence_length
    pace = (step - first_step) * rows / clock.seconds() if step > first_step else 0.0
    summary = {
        "steps": step,
        "rows": step * rows,
        "tokens": step * rows * length,
        **{key: value if math.isfinite(value) else None for key, value in values.items()},
        "seconds": clock.of_the_run(),
        "unigram_loss": plan.corpus.unigram_loss,
        **{f"{what}_s": seconds for what, seconds in clock.paused_s.items()},
        "rows_per_s": pace,
        "tokens_per_s": pace * length,
    }
    run.write_json("summary.json", summary)
    run.prove(ended=True)
    run.write_exit("finished", step, f"all {step} steps are done")


def _begin(
    plan: Plan, run: RunDirectory, ranks: Ranks, device: torch.device
) -> tuple[tuple[Path, dict[str, Any]] | None, dict[str, float]]:
    """Rank 0's part of the start: makes the run directory, clears what a killed process left, looks for a checkpoint.

    Returns the newest good checkpoint with its manifest, where there is one, and each peer's best held-out loss so far.
    """
    found = checkpoint.newest(run.checkpoints)
    checkpoint.clean(run.checkpoints)
    run.create(plan, ranks, device.type)
    if found is not None:
        world = found[1]["world"]
        then = "" if world == plan.world else f", saved by {count(world, 'rank')}, now {plan.world}"
        print(f"going on from {found[0]} (step {found[1]['step']} of {plan.steps}{then})", flush=True)
    return found, checkpoint.best_losses(run.checkpoints)


def _valid_losses(held_out: dict[str, float], peers: Iterable[str]) -> dict[str, float]:
    """The held-out loss of each peer, where it is a number."""
    losses = {name: held_out.get(f"valid/{name}/loss", math.nan) for name in peers}
    return {name: loss for name, loss in losses.items() if math.isfinite(loss)}


def _improve(best: dict[str, float], losses: dict[str, float]) -> bool:
    """Whether a peer was never as good; `best` then knows."""
    better = {name: loss for name, loss in losses.items() if loss < best.get(name, math.inf)}
    best.update(better)
    return bool(better)


def start(plan: Plan, ranks: Ranks, run: RunDirectory) -> str | None:
    """`train`, with its end written to exit.json whatever it is."""
    try:
        with ExitStack() as ending:
            return train(plan, ranks, run, ending)
    except UserError:
        raise
    except RunFailure as failure:
        run.write_failure(str(failure))
        raise
    except BaseException as failure:
        run.write_failure(f"[rank {ranks.rank}] {type(failure).__name__}: {failure}")
        if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise RunFailure(f"{failure}. What is in {run.checkpoints} is whole; go on with --resume") from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
