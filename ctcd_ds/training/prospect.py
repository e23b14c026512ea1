"""What a job will be, as one rank understands it from its files: for the preflight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ctcd_ds.cli import UserError
from ctcd_ds.cluster.checks import Job
from ctcd_ds.cluster.ranks import Ranks
from ctcd_ds.corpus.rows import Corpus
from ctcd_ds.recipe import flat, load_recipe
from ctcd_ds.training.deepspeed_config import read_json
from ctcd_ds.training.engine import communication_backend, device_number, device_type
from ctcd_ds.training.plan import Plan, checkpoint_bytes, make_plan
from ctcd_ds.training.run_directory import RunDirectory


def job(recipe_file: Path, changes: Sequence[str], config_file: Path, ranks: Ranks, output_dir: Path) -> Job:
    """Reads recipe, DeepSpeed config and corpus. A mistake in them is an answer too: it may be this host's only."""
    check = "recipe"
    try:
        recipe, given = load_recipe(recipe_file, changes), read_json(config_file)
        check = "corpus"
        Corpus.open(Path(recipe.corpus.path))
        check = "recipe"
        plan = make_plan(recipe, given, ranks.world, device_type(), output_dir)
    except UserError as mistake:
        return Job(mistake=(check, str(mistake)))
    return Job(
        settings=flat({"recipe": recipe.resolved(), "deepspeed": given}),
        corpus=plan.corpus.fingerprint,
        checkpoint_bytes=checkpoint_bytes(plan),
        checkpoints=checkpoints_to_come(plan, output_dir),
        accelerator=device_type(),
        gpu=device_number(ranks),
        backend=communication_backend(),
        precision=plan.deepspeed.precision,
        work=plan.work,
    )


def checkpoints_to_come(plan: Plan, output_dir: Path) -> int:
    """How many checkpoints will lie there at the same time, at most, beyond those that do; the next one at least."""
    training = plan.recipe.training
    trained = sum(not section.frozen for section in plan.recipe.peers.values())
    kept = training.keep_checkpoints + (plan.steps // training.keep_every if training.keep_every else 0)
    there = len(list(RunDirectory(output_dir).checkpoints.glob("step-*")))
    return max(1, kept + (trained if training.keep_best else 0) + 1 - there)
