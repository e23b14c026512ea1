"""The file results.json of a GLUE run: what is done, what follows from it, and the printed table.

format       "ctcd-ds-glue-1"
settings     how models were fine-tuned, with the precision (fp32 or bf16)
versions     of the libraries when the run was begun
tasks        NAME → {metrics, base, of_base, examples, train_rows, dev_rows, sha256 of all rows}; a task with a base has
             no training: its base's models were scored (of_base: the label that each class of the base means here);
             sst2@16 is sst2 fine-tuned on examples = 16 of its rows, a point of a curve
models       NAME → {path, sha256, max_length, tasks, average}
             tasks: NAME → {seeds: {SEED: cell}, median, min, max, best_seed, against_base}; scores are 0 to 100
             against_base: {base: its median score, difference: median over seeds of this score minus the base's}, where
             a task has a base with the same metrics
             cell: {metrics: {NAME: value}, score, train_loss, seconds}; metrics are fractions
             average: {with_wnli, without_wnli, tasks, missing}; null where it cannot be said
differences  {against: the first model, models: NAME → {TASK: difference of medians, …, average: {…}}}
rules        how scores, spread and averages are made, in words
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ctcd_ds.cli import UserError, aligned
from ctcd_ds.evaluation import metrics
from ctcd_ds.evaluation.claims import reservation
from ctcd_ds.evaluation.tasks import GLUE
from ctcd_ds.manifest import write_atomic

FORMAT = "ctcd-ds-glue-1"
RULES = {
    "score": "mean of the task's metrics on dev, times 100; MNLI: mean of matched and mismatched",
    "spread": "median over seeds, with min and max",
    "average": "mean of the median scores of the tasks done, MNLI as one task, AX never; with and without WNLI",
}
Cell = tuple[str, str, int]  # model, task, seed


@dataclass(frozen=True)
class Grid:
    """What one output directory is about. `models` and `tasks` hold what is known of each before fine-tuning."""

    settings: dict[str, Any]
    versions: dict[str, str]
    models: dict[str, dict[str, Any]]
    tasks: dict[str, dict[str, Any]]
    rules: dict[str, str] = field(default_factory=lambda: RULES)


def best_seed(cells: Mapping[Cell, dict[str, Any]], model: str, task: str) -> int | None:
    """The seed with the highest dev score (the lowest such seed); None where nothing is scored."""
    scored = [(-cell["score"], seed) for seed, cell in _of(cells, model, task).items() if "score" in cell]
    return min(scored)[1] if scored else None


def _of(cells: Mapping[Cell, dict[str, Any]], model: str, task: str) -> dict[int, dict[str, Any]]:
    return {seed: cell for (of, on, seed), cell in sorted(cells.items()) if (of, on) == (model, task)}


def report(grid: Grid, cells: Mapping[Cell, dict[str, Any]]) -> dict[str, Any]:
    """The whole content of results.json, from the finished cells."""
    models: dict[str, Any] = {}
    for name, known in grid.models.items():
        tasks: dict[str, dict[str, Any]] = {}
        for task in grid.tasks:
            seeds = _of(cells, name, task)
            scores = [cell["score"] for cell in seeds.values() if "score" in cell]
            stated = {**metrics.spread(scores), "best_seed": best_seed(cells, name, task)} if scores else {}
            if seeds:
                tasks[task] = {"seeds": {str(seed): cell for seed, cell in seeds.items()}, **stated}
        for task, base in _with_base(grid.tasks):
            if against := _against_base(tasks.get(task, {}), tasks.get(base, {})):
                tasks[task]["against_base"] = against
        medians = {task: entry["median"] for task, entry in tasks.items() if "median" in entry}
        models[name] = {**known, "tasks": tasks, "average": metrics.average(medians)}
    return {
        "format": FORMAT,
        "settings": grid.settings,
        "versions": grid.versions,
        "tasks": grid.tasks,
        "models": models,
        "differences": _differences(models),
        "rules": grid.rules,
    }


def _with_base(tasks: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The tasks that are scored by another's models with the same metrics, each with that other."""
    return [
        (name, known["base"])
        for name, known in tasks.items()
        if known.get("base") in tasks and tasks[known["base"]]["metrics"] == known["metrics"]
    ]


def _against_base(entry: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    """What the same fine-tuned models lose from the base's dev rows to these, seed by seed."""
    both = [
        (cell["score"], base["seeds"][seed]["score"])
        for seed, cell in entry.get("seeds", {}).items()
        if "score" in cell and "score" in base.get("seeds", {}).get(seed, {})
    ]
    if not both:
        return {}
    clean, difference = (metrics.spread(v)["median"] for v in ([b for _, b in both], [own - b for own, b in both]))
    return {"base": clean, "difference": difference}


def _differences(models: Mapping[str, Any]) -> dict[str, Any]:
    """Each further model minus the first: medians of tasks that both have, averages over the same tasks."""
    (first, base), *others = models.items()
    found = {}
    for name, model in others:
        both = [t for t in model["tasks"] if "median" in model["tasks"][t] and "median" in base["tasks"].get(t, {})]
        difference = {task: model["tasks"][task]["median"] - base["tasks"][task]["median"] for task in both}
        mine, its = model["average"], base["average"]
        average = {
            rule: mine[rule] - its[rule] if mine["tasks"] == its["tasks"] and mine[rule] is not None else None
            for rule in ("with_wnli", "without_wnli")
        }
        found[name] = {**difference, "average": average}
    return {"against": first, "models": found}


def make_directory(output_dir: Path) -> None:
    """Raises UserError where it cannot be made."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"--output_dir: {output_dir} cannot be made: {problem.strerror}") from None


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes results.json whole."""
    write_atomic(path, json.dumps(content, indent=1) + "\n")


def resume(path: Path, grid: Grid) -> tuple[Grid, dict[Cell, dict[str, Any]]]:
    """The finished cells of an earlier run of the same models, data and settings, whose tasks and seeds may differ.

    Returns the grid widened by the earlier tasks. Raises UserError where anything else differs.
    """
    if not path.exists():
        return grid, {}
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise UserError(f"{path} is damaged ({problem}); take another --output_dir") from None
    if not isinstance(earlier, dict) or earlier.get("format") != FORMAT:
        raise UserError(f"{path} is not the results of a GLUE run; take another --output_dir")
    _compare(path, "settings", earlier["settings"], grid.settings)
    _compare(
        path, "models", *({n: m["sha256"] for n, m in every.items()} for every in (earlier["models"], grid.models))
    )
    for task in grid.tasks.keys() & earlier["tasks"].keys():
        _compare(path, f"tasks.{task}", earlier["tasks"][task], grid.tasks[task])
    cells = {
        (model, task, int(seed)): cell
        for model, entry in earlier["models"].items()
        for task, scores in entry["tasks"].items()
        for seed, cell in scores["seeds"].items()
    }
    both = {**earlier["tasks"], **grid.tasks}
    plain = [name.partition("@")[0] for name in both]
    order = list(dict.fromkeys([*(task.name for task in GLUE), *plain]))
    names = sorted(both, key=lambda name: (order.index(name.partition("@")[0]), both[name].get("examples") or math.inf))
    ordered = {name: both[name] for name in names}
    return replace(grid, versions=earlier["versions"], tasks=ordered), cells


def _compare(path: Path, what: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in sorted(earlier.keys() | now.keys()):
        if earlier.get(key) != now.get(key):
            raise UserError(
                f"--output_dir: {path} was begun with {what}.{key} = {earlier.get(key)}, this command has "
                f"{now.get(key)}; repeat the same command, or take another --output_dir"
            )


def score_table(content: Mapping[str, Any]) -> str:
    """The results as plain text: a line for each task, a column for each model, differences to the first one."""
    models: dict[str, Any] = content["models"]
    differences = content["differences"]["models"]
    lines = [["task", "metric", *models]]
    for task, known in content["tasks"].items():
        cells = [
            _score(model["tasks"].get(task, {})) + _signed(differences.get(name, {}).get(task))
            for name, model in models.items()
        ]
        lines.append([task, "/".join(known["metrics"]), *cells])
    first = next(iter(models.values()))
    for rule, words in (("with_wnli", "average"), ("without_wnli", "average without wnli")):
        if any(model["average"][rule] is not None for model in models.values()):
            cells = [
                _number(model["average"][rule]) + _signed(differences.get(name, {}).get("average", {}).get(rule))
                for name, model in models.items()
            ]
            counted = len([t for t in first["average"]["tasks"] if rule == "with_wnli" or t != "wnli"])
            lines.append([words, f"{counted} task{'s' * (counted != 1)}", *cells])
    beside = _beside_base(content)
    return "\n".join([*aligned(lines), "", *([*aligned(beside), ""] if beside else []), *_legend(content)])


def _beside_base(content: Mapping[str, Any]) -> list[list[str]]:
    """A line for each set that was not trained on: the clean task's score, the set's, and the difference."""
    lines = [["scored without training on it", "rows", *content["models"]]]
    for task, base in _with_base(content["tasks"]):
        entries = [model["tasks"].get(task, {}) for model in content["models"].values()]
        against = [(entry, entry.get("against_base")) for entry in entries]
        cells = [f"{b['base']:.1f} -> {_score(e)}{_signed(b['difference'])}" if b else "-" for e, b in against]
        lines.append([f"{base} -> {task}", str(content["tasks"][task]["dev_rows"]), *cells])
    return lines if len(lines) > 1 else []


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"  {value:+.1f}"


def _score(entry: Mapping[str, Any]) -> str:
    if "median" not in entry:
        return "not scored" if entry else "-"
    spread = f" ({entry['min']:.1f}-{entry['max']:.1f})" if len(entry["seeds"]) > 1 else ""
    return _number(entry["median"]) + spread


def _legend(content: Mapping[str, Any]) -> list[str]:
    models: dict[str, Any] = content["models"]
    seeds = {len(task["seeds"]) for model in models.values() for task in model["tasks"].values()}
    lines = [f"score = {RULES['score']}"]
    for name, task in content["tasks"].items():
        if said := reservation(name, task, content["settings"]):
            lines.append(f"{name}: {said}")
    if seeds and max(seeds) > 1:
        counts = str(min(seeds)) if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
        lines.append(f"median of {counts} seeds (min-max)")
    if len(models) > 1:
        lines.append(f"+/- = difference from {content['differences']['against']}")
    if any("against_base" in task for model in models.values() for task in model["tasks"].values()):
        lines.append("a -> b = the same fine-tuned models on the dev rows of a, then of b, and the difference")
    if not any(model["average"]["tasks"] for model in models.values()):
        return lines  # no task of GLUE
    lines.append(f"average = {RULES['average']}")
    missing = {", ".join(model["average"]["missing"]): name for name, model in models.items()}
    for tasks, name in missing.items():
        of = "" if len(missing) == 1 else f" of {name}"
        lines += [f"not in the average{of}, because not done: {tasks}"] * bool(tasks)
    return lines
