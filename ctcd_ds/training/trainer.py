"""The training loop. Everything a step does stands in `train`, top to bottom."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ctcd_ds.cli import RunFailure, UserError
from ctcd_ds.cluster.ranks import Ranks
from ctcd_ds.corpus.loader import MicroBatch, TrainLoader
from ctcd_ds.objective.fused import Losses
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.peers.cotrain import Batch
from ctcd_ds.training import checkpoint
from ctcd_ds.training.clock import Clock
from ctcd_ds.training.engine import build_engine, start_processes
from ctcd_ds.training.evaluate import evaluate
from ctcd_ds.training.hardware import peak_flops, peak_memory_bytes
from ctcd_ds.training.metrics import MetricsLog
from ctcd_ds.training.optimizer import PeerGradients
from ctcd_ds.training.plan import Plan
from ctcd_ds.training.run_directory import RunDirectory
from ctcd_ds.training.schedule import lr_factor
from ctcd_ds.training.signals import REASONS, StopSignals
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
    watchdog = Watchdog(training.step_timeout_s, lambda why: run.write_exit("failed", -1, why))
    ending.callback(watchdog.stop)
    found = _begin(plan, run, ranks, device)
    engine = build_engine(plan, universal=found is not None and found[1]["world"] != ranks.world)
    step = first_step = checkpoint.load(engine, *found) if found is not None else 0
    loader = TrainLoader(
        plan.rows,
        plan.masking,
        plan.recipe.seed,
        training.global_batch_rows,
        config.micro_batch,
        config.accumulation,
        ranks.rank,
        ranks.world,
        start_step=step,
        soft_positions=plan.recipe.objective.soft_positions,
        device=device if device.type == "cuda" else None,
    )
    ending.callback(loader.close)
    graph, settings = plan.recipe.graph(), {name: plan.recipe.optimizer_of(name) for name in plan.recipe.peers}
    gradients = PeerGradients(engine.optimizer, [n for n in settings if not plan.recipe.peers[n].frozen], device)
    peak = peak_flops(device, config.precision)
    log = MetricsLog(run.metrics, engine.monitor, plan, step, peak) if ranks.first else None
    clock = Clock(training.checkpoint_minutes, training.time_limit_minutes)
    stop: str | None = None
    losses: dict[str, float] = {}
    held_out: dict[str, float] = {}
    skipped = 0

    while step < plan.steps and stop is None:
        watchdog.enter("first step" if step == first_step else f"step {step + 1}")
        factor = lr_factor(plan.recipe.schedule, step, plan.steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = settings[group["peer"]].lr * factor

        micro_batches, seen = next(loader), []
        soft_count = _soft_count(micro_batches, ranks.world, device)
        for k, micro_batch in enumerate(micro_batches):
            micro_step = step * config.accumulation + k
            terms = engine(_batch(micro_batch, soft_count), micro_step, ranks.rank)
            engine.backward(terms.total)
            seen.append(terms)
            if k + 1 < config.accumulation:
                engine.step()  # counts a micro-step; the optimizer moves at the last one

        values, norms, save_due, stop = _exchange(
            seen, gradients, graph, clock.save_due(), signals.reason or clock.over()
        )
        gradients.clip(norms, settings)
        losses, grad_norms = _named(values, graph, list(gradients.groups))
        overflow = _check_finite({**losses, **grad_norms}, config.precision, step, micro_batches, ranks)
        engine.step()
        skipped += overflow
        step += 1

        last = step == plan.steps
        validates = plan.valid is not None and (last or step % training.valid_every == 0)
        held_out = {}
        if validates:
            watchdog.enter("validation")
            with clock.paused():
                held_out = evaluate(engine, plan, device)
        if log is not None:
            log.advance(step)
        if log is not None and (last or validates or step == first_step + 1 or step % training.log_every == 0):
            lrs = {f"lr/{name}": settings[name].lr * factor for name in gradients.groups}
            scaling = {"loss_scale": float(engine.optimizer.loss_scale), "skipped_steps": skipped}
            row = {**losses, **grad_norms, **lrs, **held_out, **(scaling if config.precision == "fp16" else {})}
            log.row(step, row, clock.seconds(), loader.waited_s, peak_memory_bytes(device))
        if last or stop or save_due or (training.checkpoint_every and step % training.checkpoint_every == 0):
            watchdog.enter("saving")
            with clock.paused():
                checkpoint.save(engine, plan, run.checkpoints, step)
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
        run.write_exit("saved", step, str(stop))
        return
    rows, length = plan.recipe.training.global_batch_rows, plan.recipe.corpus.sequence_length
    pace = (step - first_step) * rows / clock.seconds() if step > first_step else 0.0
    summary = {
        "steps": step,
        "rows": step * rows,
        "tokens": step * rows * length,
        **{key: value if math.isfinite(value) else None for key, value in values.items()},
        "seconds": clock.since_start(),
        "rows_per_s": pace,
        "tokens_per_s": pace * length,
    }
    run.write_json("summary.json", summary)
    run.write_exit("finished", step, f"all {step} steps are done")


def _begin(plan: Plan, run: RunDirectory, ranks: Ranks, device: torch.device) -> tuple[Path, dict[str, Any]] | None:
    """Makes the run directory. Returns the newest good checkpoint with its manifest, where there is one.

    Rank 0 looks and writes; all ranks hear of it.
    """
    heard: list[Any] = [None]
    if ranks.first:
        heard = [checkpoint.newest(run.checkpoints) if run.checkpoints.is_dir() else None]
    dist.broadcast_object_list(heard, src=0, device=device)
    found: tuple[Path, dict[str, Any]] | None = heard[0]
    if found is not None:
        checkpoint.refuse_another_run(found[1], plan)
    if ranks.first:
        run.create(plan, torch.get_num_threads(), device.type)
        if found is not None:
            then = (
                "" if found[1]["world"] == ranks.world else f", saved by {found[1]['world']} ranks, now {ranks.world}"
            )
            print(f"going on from {found[0]} (step {found[1]['step']} of {plan.steps}{then})", flush=True)
    return found


def _soft_count(micro_batches: list[MicroBatch], world: int, device: torch.device) -> Tensor | None:
    """A micro-batch's share of the step's soft positions over all ranks; None where they are the targets."""
    if micro_batches[0].soft_positions is None:
        return None
    own = sum(len(b.soft_positions) for b in micro_batches if b.soft_positions is not None)
    count = torch.tensor(float(own), device=device)
    dist.all_reduce(count)
    return count / (world * len(micro_batches))


def _batch(micro_batch: MicroBatch, soft_count: Tensor | None) -> Batch:
    """The positions of a micro-batch with what each is divided by: DeepSpeed averages over ranks and accumulation."""
    ids, targets, count = micro_batch.input_ids, micro_batch.targets, float(len(micro_batch.targets))
    if micro_batch.soft_positions is None or soft_count is None:
        return Batch(ids, micro_batch.target_positions, targets, count, count)
    everywhere = torch.full((ids.numel(),), -100, dtype=targets.dtype, device=targets.device)
    everywhere[micro_batch.target_positions] = targets
    return Batch(ids, micro_batch.soft_positions, everywhere[micro_batch.soft_positions], count, soft_count)


def _exchange(
    seen: list[Losses], gradients: PeerGradients, graph: DistillationGraph, save_due: bool, stop: str | None
) -> tuple[list[float], Tensor, bool, str | None]:
    """The step's global values, and what any rank wishes, in one all-reduce and one host sync.

    Returns (hard losses, soft losses by edge, gradient norms by trained peer) as one flat list, the norms as a
    tensor on the device, whether a checkpoint is due, and why to stop (None: go on).
    """
    hard = torch.stack([terms.hard for terms in seen]).mean(dim=0)
    soft = torch.stack([terms.soft for terms in seen]).mean(dim=0)
    edges = [soft[i, j] for i, j, _ in graph.edges()]
    terms = torch.stack([*(hard[i] for i in graph.hard_peers()), *edges]).double() / dist.get_world_size()
    wishes = torch.tensor([save_due, *(stop == reason for reason in REASONS)], dtype=torch.float64).to(terms.device)
    packed = torch.cat([terms, gradients.squared_norms(), wishes])
    dist.all_reduce(packed)
    first, last = len(terms), len(packed) - len(wishes)
    norms = packed[first:last].sqrt()
    host = torch.cat([packed[:first], norms, packed[last:]]).tolist()
    reason = next((reason for reason, count in zip(REASONS, host[last + 1 :], strict=True) if count), None)
    return host[:last], norms, host[last] > 0, reason


def _named(
    values: list[float], graph: DistillationGraph, trained: list[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """The exchanged values under their names in metrics.jsonl: losses, gradient norms (before clipping)."""
    keys = [f"loss/{graph.names[i]}/hard" for i in graph.hard_peers()]
    keys += [f"loss/{graph.names[i]}/soft/{graph.names[j]}" for i, j, _ in graph.edges()]
    losses = dict(zip(keys, values, strict=False))
    norms = {f"grad_norm/{name}": norm for name, norm in zip(trained, values[len(keys) :], strict=True)}
    return losses, norms


def _check_finite(
    values: dict[str, float], precision: str, step: int, micro_batches: list[MicroBatch], ranks: Ranks
) -> bool:
    """Whether this step overflowed (fp16, where DeepSpeed then skips it and lowers the loss scale).

    Raises RunFailure at any other precision: the optimizer must not move, and nothing later can mend it.
    """
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if bad and precision != "fp16":
        rows = [int(row) for batch in micro_batches for row in batch.rows[:4]]
        raise RunFailure(
            f"step {step + 1}: {', '.join(f'{name} = {value}' for name, value in bad.items())}; the optimizer did not "
            f"move. Rank {ranks.rank} had rows {rows} …. Lower the learning rate, or lengthen the warm-up"
        )
    return bool(bad)


def start(plan: Plan, ranks: Ranks, run: RunDirectory) -> str | None:
    """`train`, with its end written to exit.json whatever it is."""
    try:
        with ExitStack() as ending:
            return train(plan, ranks, run, ending)
    except UserError:
        raise
    except BaseException as failure:
        if ranks.first:
            run.write_exit("failed", -1, f"{type(failure).__name__}: {failure}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
