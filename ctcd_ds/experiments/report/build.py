"""From runs or an experiment to one HTML file that needs nothing else, with its pictures as PNG files beside it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from importlib.resources import files
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import BaseLoader, Environment, StrictUndefined
from markupsafe import Markup
from ruamel.yaml import YAML

from ctcd_ds import __version__
from ctcd_ds.cli import UserError
from ctcd_ds.evaluation.speed import FILE as SPEED_FILE
from ctcd_ds.evaluation.speed import Speed, read_speed
from ctcd_ds.experiments.report import copying
from ctcd_ds.experiments.report.curves import Curves
from ctcd_ds.experiments.report.grids import grid_pictures
from ctcd_ds.experiments.report.study import Study, plain, read_study
from ctcd_ds.experiments.report.words import answer, difference, opening, role, setting, speed_reading, statements
from ctcd_ds.experiments.results import Comparison
from ctcd_ds.experiments.wording import METRICS

PAGE = "report.html"
_FIRST = ("valid_loss", "lowest_loss", "valid_accuracy", "glue/average")


def write_report(paths: Sequence[Path], output_dir: Path, agreement_rows: int, speed: Path | None = None) -> Path:
    """Writes OUTPUT_DIR/report.html and a PNG for each picture; returns the page's path.

    `agreement_rows`: held-out rows on which peers' answers are compared; with 0 that part is left out. `speed`: where
    `ctcd speed` wrote; left out, an experiment's own DIR/speed. Raises UserError where `paths` are neither runs nor
    one experiment, or where the directory cannot be written.
    """
    study = read_study(paths)
    own = study.directory / "speed"
    measured = read_speed(speed or own) if speed or (study.is_experiment and (own / SPEED_FILE).exists()) else None
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"--output_dir {output_dir} cannot be made: {problem.strerror}") from None
    page = output_dir / PAGE
    page.write_text(render(study, output_dir, agreement_rows, measured), encoding="utf-8")
    return page


def render(study: Study, directory: Path, agreement_rows: int, speed: Speed | None = None) -> str:
    """The page's text; its pictures are also written into the directory."""
    curves = Curves(study, directory)
    pairs, missing = copying.all_pairs(study, agreement_rows) if agreement_rows else ([], [])
    metrics = [m for m in _metrics(study) if m in ("valid_loss", "glue/average")]
    ends = [p for m in metrics for p in curves.ends(m, METRICS[m])]
    grids = [picture for m in metrics for picture in grid_pictures(study, curves.looks, directory, m)]
    environment = Environment(loader=BaseLoader(), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters.update(plain=plain, named=study.title, svg=Markup, number=_number)
    assets = files("ctcd_ds.experiments.report") / "page"
    return environment.from_string((assets / "report.html.jinja").read_text(encoding="utf-8")).render(
        results=study.results,
        title=plain(study.results.experiment),
        opening=opening(study),
        answer=answer(study),
        setting=setting(study),
        statements=statements(study),
        ends=ends,
        grids=grids,
        learning=list(curves.learning()),
        soft_losses=list(curves.soft_losses()),
        pairs=pairs,
        pair_pictures=list(copying.pictures(study, pairs, directory)),
        pair_reading=list(copying.reading(study, pairs)),
        pair_missing=missing,
        agreement_rows=agreement_rows,
        gradient_norms=list(curves.gradient_norms()),
        throughput=list(curves.throughput()),
        pace=list(_pace(study)),
        speed=speed,
        speed_reading=speed_reading(speed) if speed else "",
        columns=[(m, METRICS[m]) for m in _metrics(study) if m in _FIRST or m.startswith("valid_loss/")],
        glue=[(metric, METRICS[metric]) for metric in _metrics(study) if metric.startswith("glue/")],
        glue_rows=list(_glue_rows(study)),
        rows=list(_rows(study)),
        comparisons=[(c, METRICS[c.metric], difference(c)) for c in study.results.comparisons],
        cells=[(cell, study.runs.get(cell.name)) for cell in study.results.cells],
        settings=list(_settings(study)),
        command=_command(study.results.command),
        run_commands=_run_commands(study),
        is_experiment=study.is_experiment,
        version=__version__,
        css=Markup((assets / "report.css").read_text(encoding="utf-8")),
        script=Markup((assets / "report.js").read_text(encoding="utf-8")),
    )


def _metrics(study: Study) -> list[str]:
    """All metrics of the study: held-out values first, then GLUE's average, then its tasks."""
    found = {m for c in study.results.conditions.values() for measured in c.peers.values() for m in measured}
    first = [metric for metric in _FIRST if metric in found]
    return first + sorted(found - set(first))


def _rows(study: Study) -> Iterator[dict[str, Any]]:
    """One row of the table of results: a peer in a condition."""
    for name, condition in study.results.conditions.items():
        for peer, measured in condition.peers.items():
            known = study.cells[condition.cells[0]].peers.get(peer)
            seeds = max((len(spread.seeds) for spread in measured.values()), default=0)
            about = {"layers": known.layers, "parameters": known.parameters} if known else {}
            run = study.example(name)
            yield {"condition": name, "peer": peer, "role": role(run.graph, peer) if run else "", "seeds": seeds,
                   "measured": measured, "layers": None, "parameters": None, **about}  # fmt: skip


def _glue_rows(study: Study) -> Iterator[dict[str, Any]]:
    """One row of the GLUE table: a peer in a condition, against nothing or against one of those it is compared to."""
    for name, condition in study.results.conditions.items():
        for peer, measured in condition.peers.items():
            if not any(metric.startswith("glue/") for metric in measured):
                continue
            compared: dict[tuple[str, str], dict[str, Comparison]] = {}
            for c in study.results.comparisons:
                if (c.condition, c.peer) == (name, peer) and c.metric.startswith("glue/"):
                    compared.setdefault((c.against, c.against_peer), {})[c.metric] = c
            for (against, other), differences in compared.items() or [(("", ""), {})]:
                whom = study.title(against) if other in (peer, "") else f"{other} of {study.title(against)}"
                yield {"peer": peer, "condition": name, "measured": measured, "against": whom,
                       "differences": differences}  # fmt: skip


def _pace(study: Study) -> Iterator[dict[str, Any]]:
    """What a condition's runs took: medians over logged steps and seeds, the most memory of any."""
    for name in study.results.conditions:
        values = {
            key: [y for curve in study.curves(name, key) for _, y in curve]
            for key in ("tokens_per_s", "mfu", "data_wait_share", "memory_gib")
        }
        seconds = [cell.seconds for cell, _ in study.members(name) if cell.seconds is not None]
        if values["tokens_per_s"]:
            yield {
                "condition": name,
                "tokens_per_s": median(values["tokens_per_s"]),
                "mfu": median(values["mfu"]) if values["mfu"] else None,
                "wait": median(values["data_wait_share"]) if values["data_wait_share"] else None,
                "memory": max(values["memory_gib"], default=None),
                "seconds": median(seconds) if seconds else None,
            }


def _settings(study: Study) -> Iterator[tuple[str, str]]:
    """Recipe, DeepSpeed config and environment of the first run of each condition's group, as text."""
    seen = set()
    for name, condition in study.results.conditions.items():
        run = study.example(name)
        if run is not None and condition.group not in seen:
            seen.add(condition.group)
            yield f"Recipe of {study.title(name)} (seed {run.recipe.seed})", run.recipe.to_yaml()
    first = next(iter(study.runs.values()))
    for title, content in (("DeepSpeed config, as resolved", first.deepspeed), ("Environment", first.environment)):
        text = StringIO()
        YAML().dump(json.loads(json.dumps(content)), text)
        yield title, text.getvalue()


def _command(words: Sequence[str]) -> str:
    return shlex.join(words)


def _run_commands(study: Study) -> list[str]:
    """The command of each run that an experiment did not start, each once."""
    if study.is_experiment:
        return []
    found = []
    for run in study.runs.values():
        there = f"cd {shlex.quote(folder)} && " if (folder := run.environment.get("folder")) else ""
        found.append(there + _command(run.environment.get("command", [])))
    return list(dict.fromkeys(found))


def _number(value: float | None, form: str = ",.0f", factor: float = 1.0) -> str:
    return "–" if value is None else format(factor * value, form)
