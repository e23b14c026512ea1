"""The experiment file: a grid over a base recipe. Typed, frozen, validated as a whole, like the recipe itself.

    question: Does a larger soft weight help?
    recipe: ../recipes/paper.yaml               # relative to this file
    deepspeed_config: ../zero2_bf16.json
    seeds: [1, 2, 3]
    set: {training.epochs: 5}                   # recipe keys, for all cells; null removes a key
    cells:
      alone: {set: {peers.teacher: null, peers.student.soft: null}}
      soft:
        grid: {weight: {key: peers.student.soft.teacher, values: [1, 2, 4]}}
    compare: [{peer: student, against: alone}]
    glue: {tasks: rte}                          # exports are fine-tuned; lm_eval: {tasks: hellaswag}: asked as they are
    tiny: {recipe: ../recipes/demo.yaml, …}     # laid over the rest by --size tiny

Each entry of `cells` is a group: one condition, or one for every combination of its grid's values; each condition is
run with every seed. A peer that a group takes away stays away whatever its grid sets there, so that one grid of pairs
serves each of their models alone as well; conditions whose recipes mean the same are one run. Wherever a recipe takes
`pretrained: DIR`, a group may say `{cell: GROUP, peer: NAME}`: the export of that peer, from the cell with the same
seed (and the same values on the axes that both groups have).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from ctcd_ds.cli import did_you_mean, names
from ctcd_ds.experiments.results import Value
from ctcd_ds.plain import read_file
from ctcd_ds.recipe.reading import apply_override
from ctcd_ds.recipe.schema import Count, Mistakes, Section, explained

FULL = "full"
_SIZES = ("tiny",)
Seed = Annotated[int, Field(ge=0, lt=2**63)]
FinetuneSeed = Annotated[int, Field(ge=0, lt=2**32)]


class Axis(Section):
    """One direction of a grid.

    `values` that go to the recipe's `key`, or to all of a list of keys; or `points`: label → the recipe keys it sets.
    """

    key: str | list[str] = Field(default_factory=list)
    values: list[Value] = Field(default_factory=list)
    points: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """All recipe keys that it sets."""
        own = [self.key] if isinstance(self.key, str) else self.key
        return list(dict.fromkeys([*own, *(key for settings in self.points.values() for key in settings)]))

    @property
    def steps(self) -> list[tuple[Value, dict[str, Any]]]:
        """(coordinate, recipe keys → values) in order."""
        return [*((value, dict.fromkeys(self.keys, value)) for value in self.values), *self.points.items()]


class Group(Section):
    """One condition, or one for every point of `grid`.

    `needs`: groups whose cells (same seed) must be finished first; those named under `pretrained` need not be said.
    `compute_of`: trains for as many steps as make this cell, with all that it needs, cost what a cell of that group
    costs with all that it needs (FLOPs); the recipe's own length is not used then.
    """

    about: str = ""
    set: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, Axis] = Field(default_factory=dict)
    needs: str | list[str] = Field(default_factory=list)
    compute_of: str | None = None

    @property
    def needed(self) -> list[str]:
        """The groups this one needs, each once, in the order of their mention."""
        stated = [self.needs] if isinstance(self.needs, str) else self.needs
        return list(dict.fromkeys([*stated, *(source["cell"] for source in references(self.set))]))


class Compare(Section):
    """Peer `peer` of every group (or of `cells`) against `against_peer` (default: the same name) of group `against`."""

    peer: str
    against: str
    against_peer: str | None = None
    cells: list[str] | None = None


class Glue(Section):
    """How exports are fine-tuned; keys are the options of `ctcd glue`."""

    tasks: str = "all"
    data_dir: str = "glue_data"
    seeds: list[FinetuneSeed] = Field(default_factory=lambda: [1])
    epochs: float = 3.0
    learning_rate: float = 5e-5
    batch_size: int = 32
    train_examples: list[int] | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None


class LmEval(Section):
    """What causal exports are asked; keys are the options of `ctcd lm-eval`. A task file lies relative to this file."""

    tasks: str
    data_dir: str = "harness_data"
    num_fewshot: Annotated[int, Field(ge=0)] = 0
    batch_size: Count = 8
    max_eval_samples: Count | None = None


class Experiment(Section):
    """A whole experiment at one size. Build it with `load_experiment`.

    `ranks`: processes of a run; 1 starts without a launcher, null lets `deepspeed` take all that it finds.
    `demo_data`: corpus and GLUE stand-in are made from the demo's text, in the experiment's directory.
    `note`: what a reader must know about results of this size.
    """

    question: str
    recipe: str
    deepspeed_config: str
    ranks: Annotated[int, Field(ge=1)] | None = None
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(default_factory=lambda: [1, 2, 3])
    set: dict[str, Any] = Field(default_factory=dict)
    cells: Annotated[dict[str, Group], Field(min_length=1)]
    compare: list[Compare] = Field(default_factory=list)
    glue: Glue | None = None
    lm_eval: LmEval | None = None
    demo_data: bool = False
    note: str = ""
    tiny: dict[str, Any] | None = None

    @property
    def scoring(self) -> dict[str, Glue | LmEval]:
        """The commands that score exports, in the order in which they run, with their options."""
        asked = {"glue": self.glue, "lm_eval": self.lm_eval}
        return {command: options for command, options in asked.items() if options is not None}


def references(settings: Any) -> Iterator[dict[str, str]]:
    """Every {cell: …, peer: …} that stands for a directory, anywhere in a group's settings."""
    if isinstance(settings, dict):
        if set(settings) == {"cell", "peer"}:
            yield settings
        else:
            for value in settings.values():
                yield from references(value)


def load_experiment(path: Path, size: str = FULL) -> Experiment:
    """Reads an experiment file at one of its sizes; paths in it come out absolute.

    Raises UserError (unreadable file) or Mistakes (all that is wrong, at once).
    """
    raw = read_file(path, "experiment")
    if not isinstance(raw, dict):
        raise Mistakes(f"experiment {path}", [f"an experiment is a mapping, found {type(raw).__name__}"])
    if size != FULL:
        if size not in _SIZES or not isinstance(raw.get(size), dict):
            known = [FULL, *(name for name in _SIZES if isinstance(raw.get(name), dict))]
            raise Mistakes(f"experiment {path}", [f"--size {size}: {did_you_mean(size, known)}"])
        raw = overlaid(raw, raw[size])
    try:
        experiment = Experiment.model_validate(raw)
    except ValidationError as problem:
        raise Mistakes(f"experiment {path}", explained(problem, Experiment)) from None
    if mistakes := list(_mistakes(experiment)):
        raise Mistakes(f"experiment {path}", mistakes)
    places: dict[str, Any] = {key: str((path.parent / raw[key]).resolve()) for key in ("recipe", "deepspeed_config")}
    if (asked := experiment.lm_eval) is not None:
        tasks = [
            str((path.parent / task).resolve()) if task.endswith((".yaml", ".yml")) else task
            for task in names(asked.tasks)
        ]
        places["lm_eval"] = asked.model_copy(update={"tasks": ",".join(tasks)})
    return experiment.model_copy(update=places)


def overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on it, mapping by mapping; null takes a key away (in `set` it stays, and means that)."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if key == "set" and isinstance(below, dict) and isinstance(value, dict):
            result[key] = {**below, **value}
        elif value is None:
            result.pop(key, None)
        elif isinstance(below, dict) and isinstance(value, dict):
            result[key] = overlaid(below, value)
        else:
            result[key] = value
    return result


def _mistakes(experiment: Experiment) -> Iterator[str]:
    groups = experiment.cells
    if len(set(experiment.seeds)) < len(experiment.seeds):
        yield f"seeds = {experiment.seeds}: one is there twice"
    unknown = False
    for name, group in groups.items():
        here = f"cells.{name}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_+-]*", name):
            yield f"{here}: a cell's name is letters, digits, _, + and -"
        for axis, values in group.grid.items():
            if bool(values.values) == bool(values.points) or bool(values.values) != bool(values.key):
                yield f"{here}.grid.{axis}: give key and values, or points (label: {{recipe key: value}})"
            if len({repr(value) for value in values.values}) < len(values.values):
                yield f"{here}.grid.{axis}.values = {values.values}: one is there twice"
        for other in prerequisites(groups)[name]:
            if other == name or other not in groups:
                unknown = True
                hint = did_you_mean(other, set(groups) - {name})
                yield f"{here} needs {other!r}: no other cell has this name; {hint}"
    for number, compare in enumerate(experiment.compare):
        for key, named in (("against", [compare.against]), ("cells", compare.cells or [])):
            for name in named:
                if name not in groups:
                    yield f"compare.{number}.{key} = {name!r}: no cell has this name; {did_you_mean(name, groups)}"
    if not unknown:
        yield from _circle(groups)


def _circle(groups: Mapping[str, Group]) -> Iterator[str]:
    try:
        TopologicalSorter(prerequisites(groups)).prepare()
    except CycleError as error:
        yield f"cells need each other in a circle: {' → '.join(error.args[1])}"


def prerequisites(groups: Mapping[str, Group]) -> dict[str, list[str]]:
    """Group → the groups that must be planned before it."""
    return {name: [*group.needed, *([group.compute_of] if group.compute_of else [])] for name, group in groups.items()}


def only(experiment: Experiment, names: Sequence[str]) -> Experiment:
    """These groups with those they need, and the comparisons among them. Raises Mistakes for a name that is none."""
    groups = experiment.cells
    if unknown := [name for name in names if name not in groups]:
        raise Mistakes("the command", [f"--cells {name}: {did_you_mean(name, groups)}" for name in unknown])
    kept, needs = set(names), prerequisites(groups)
    while more := {other for name in kept for other in needs[name]} - kept:
        kept |= more
    compare = []
    for wish in experiment.compare:
        cells = [name for name in wish.cells or groups if name in kept]
        if wish.against in kept and cells:
            compare.append(wish.model_copy(update={"cells": cells}))
    cells_kept = {name: group for name, group in groups.items() if name in kept}
    return experiment.model_copy(update={"cells": cells_kept, "compare": compare})


def base_recipe(experiment: Experiment, overrides: Sequence[str]) -> dict[str, Any]:
    """The base recipe as plain data, with the experiment's `set` and the command's --set in place."""
    raw = read_file(Path(experiment.recipe), "recipe")
    if not isinstance(raw, dict):
        raise Mistakes(f"recipe {experiment.recipe}", [f"a recipe is a mapping, found {type(raw).__name__}"])
    for key, value in experiment.set.items():
        set_key(raw, key, value)
    if mistakes := [said for override in overrides if (said := apply_override(raw, override))]:
        raise Mistakes("the command", mistakes)
    corpus = raw.get("corpus")
    if isinstance(corpus, dict) and isinstance(path := corpus.get("path"), str) and Path(path).exists():
        corpus["path"] = str(Path(path).resolve())  # so that --resume may be said from anywhere
    return raw


def set_key(raw: dict[str, Any], dotted: str, value: Any) -> None:
    """Puts a value at `a.b.c`, making sections on the way; None takes the key away."""
    *sections, key = dotted.split(".")
    place = raw
    for section in sections:
        if not isinstance(place.get(section), dict):
            if value is None:
                return
            place[section] = {}
        place = place[section]
    if value is None:
        place.pop(key, None)
    else:
        place[key] = value
