"""Whether a run may go on as something: what a checkpoint knows of its run, against what is asked for now.

Whatever would change a loss of the steps still to come, or would have changed one of the steps behind, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctcd_ds.recipe.reading import flat, is_corpus_place
from ctcd_ds.recipe.sections import Recipe, ScheduleSection
from ctcd_ds.training.plan import Plan
from ctcd_ds.training.schedule import lr_factor

# What never changes what a run computes: how often it speaks, looks and saves, and when it gives up.
_FREE = {
    "training." + key
    for key in (
        "log_every",
        "valid_every",
        "valid_rows",
        "checkpoint_every",
        "checkpoint_every_minutes",
        "keep_checkpoints",
        "keep_every",
        "keep_best",
        "time_limit_minutes",
        "activation_checkpointing",
        "step_timeout_s",
        "on_nonfinite",
    )
}
# Judged together, by what they make of the steps behind.
_LENGTH = {"training.steps", "training.epochs", "schedule.type", "schedule.warmup_fraction"}


def identity(plan: Plan) -> dict[str, Any]:
    """Who a run is, as plain data: recipe, corpus, tokenizer, vocabulary, precision, number of steps, caches."""
    return {
        "recipe": plan.recipe.resolved(),
        "corpus": plan.corpus.fingerprint,
        "tokenizer": plan.corpus.tokenizer_fingerprint,
        "vocab_size": plan.corpus.vocab_size,
        "precision": plan.deepspeed.precision,
        "steps": plan.steps,
        **({"caches": plan.teachers.fingerprints} if plan.teachers is not None else {}),
    }


def changes(then: Mapping[str, Any], plan: Plan, step: int) -> tuple[list[str], list[str]]:
    """(what forbids to go on, what is different and harmless), one line each with both values.

    `then`: the identity of the run as it was saved; `step`: how many steps it has behind it.
    """
    now = identity(plan)
    # As this program reads it: a key that was not there yet has its default.
    old, new = flat(Recipe.model_validate(then["recipe"]).resolved()), flat(now["recipe"])
    refused: list[str] = []
    allowed: list[str] = []
    same_past = _same_past(then, plan, step)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) == new.get(key) or _same_place(key, old.get(key), new.get(key)):
            continue
        line = f"{key}: the run has {_shown(old.get(key))}, now {_shown(new.get(key))}"
        if key in _LENGTH:
            (allowed if same_past else refused).append(
                line if same_past else f"{line} (the learning rate of the {step} steps done would have been another)"
            )
        else:
            (allowed if key in _FREE or _proven_otherwise(key, plan.recipe) else refused).append(line)
    refused += [
        f"{what}: the run has {then.get(what)}, now {now.get(what)}"
        for what in ("corpus", "tokenizer", "vocab_size", "precision", "caches")
        if then.get(what) != now.get(what)
    ]
    return refused, allowed


def _same_past(then: Mapping[str, Any], plan: Plan, step: int) -> bool:
    """Whether the steps done would have had the same learning rates and edges, and are no more than there are now."""
    before = ScheduleSection.model_validate(then["recipe"]["schedule"])
    graph = plan.recipe.graph()
    return step <= plan.steps and all(
        lr_factor(before, s, then["steps"]) == lr_factor(plan.recipe.schedule, s, plan.steps)
        and graph.at(s / then["steps"]) == graph.at(s / plan.steps)
        for s in range(step)
    )


def _proven_otherwise(key: str, recipe: Recipe) -> bool:
    """Places of files whose content has a fingerprint of its own: a corpus, a cache or a frozen peer may have moved."""
    if is_corpus_place(key) or key.startswith("cached_teachers."):
        return True
    section, _, field = key.rpartition(".")
    name = section.removeprefix("peers.")
    return field == "pretrained" and name in recipe.peers and recipe.peers[name].frozen


def _same_place(key: str, then: object, now: object) -> bool:
    """A checkpoint's directory that has gone since the start: a relative path to what is not there stays as it is."""
    return key.endswith(".pretrained") and isinstance(now, str) and then == str(Path(now).resolve())


def _shown(value: object) -> str:
    return "none" if value is None else repr(value)
