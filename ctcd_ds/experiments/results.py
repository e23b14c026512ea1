"""results.json of an experiment: what was run, how it ended, what came out, and what may be said of it.

One file that holds all numbers the report needs besides the learning curves, which stand in each cell's run directory.
It is written anew after every cell, whole, so a reader at any moment finds a consistent one.

    cell        one point of the grid with one seed: one run
    condition   the cells that differ by their seed only; what medians and comparisons are about
    coordinates the values of the grid at a cell, by axis; a condition outside a grid has none
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ctcd_ds.cli import UserError
from ctcd_ds.manifest import write_atomic

FILE = "results.json"

Value = bool | int | float | str | None


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GlueScore(_Part):
    """One task for one exported peer; scores are 0 to 100, as `ctcd glue` and `ctcd lm-eval` define them.

    median: over the fine-tuning seeds (not the experiment's seeds).
    seeds: fine-tuning seed → score.
    """

    median: float
    seeds: dict[str, float]


class PeerResult(_Part):
    """One peer at the end of one cell.

    frozen: a finished teacher that learned nothing in this run; it has no export of its own here.
    layers, hidden_size: of its Hugging Face config; None where the architecture does not say.
    parameters: tied output embeddings count once; the vocabulary is the padded one.
    valid_loss: hard loss (nats per target position) over the held-out rows, whose masks are the same in every run.
    lowest_loss: the lowest of all looks at them during the run, where there were several: the run stopped in time.
    valid_accuracy: share (0 to 1) of held-out target positions where the likeliest token is the right one.
    valid_losses: that loss on each held-out set of other text and each source of a mixture, by name.
    glue: task → score, of `ctcd lm-eval` too; empty where the experiment asks for none.
    export: the Hugging Face model directory, relative to the experiment's directory.
    """

    frozen: bool = False
    layers: int | None = None
    hidden_size: int | None = None
    parameters: int | None = None
    valid_loss: float | None = None
    lowest_loss: float | None = None
    valid_accuracy: float | None = None
    valid_losses: dict[str, float] = {}
    glue: dict[str, GlueScore] = {}
    export: str | None = None


class Cell(_Part):
    """One run.

    name: unique, also the name of its folder: CONDITION-seed-SEED with / and = made plain.
    condition: the condition's name, a key of `Results.conditions`.
    seed: of the recipe.
    run: its run directory, relative to the experiment's directory. Cells with equal recipes share one run.
    state: finished | failed | waiting. A cell is waiting until it was started, and stays so where one it needs failed.
    reason: why it failed or waits; "" where it finished.
    needs: names of the cells whose exports this one starts from.
    changes: the recipe keys that this cell changes, as `--set` writes them (null: the key is removed).
    steps, rows, tokens: trained on in this run; planned values until it is finished.
    flops: what the steps of this run cost (multiply-adds count two; backward is two forwards; heads where logits are
        needed; a frozen peer's forward included).
    total_flops: with those of all cells it needs: what it costs to get this model from nothing.
    seconds: wall time of the run from its first step to its last, validation and saving included, with whatever ran
        beside it on the machine.
    peers: name → result; empty until the cell is finished.
    agreement: "a/b" → share of held-out target positions where peers a and b give the same answer.
    """

    name: str
    condition: str
    seed: int
    run: str
    state: Literal["finished", "failed", "waiting"]
    reason: str = ""
    needs: list[str] = []
    changes: dict[str, Any] = {}
    steps: int | None = None
    rows: int | None = None
    tokens: int | None = None
    flops: float | None = None
    total_flops: float | None = None
    seconds: float | None = None
    peers: dict[str, PeerResult] = {}
    agreement: dict[str, float] = {}


class Spread(_Part):
    """A value over the seeds of a condition: `seeds` and `values` belong together, in order."""

    median: float
    min: float
    max: float
    seeds: list[int]
    values: list[float]


class Condition(_Part):
    """The cells that differ by their seed only.

    group: its key under `cells` in the experiment file; coordinates: axis → value (both also tell the report what
        picture a group can have: one axis is a curve, two are a heat map).
    cells: their names, in the order of the seeds.
    peers: trained peer → metric → values over the finished seeds. Metrics: valid_loss, lowest_loss, valid_accuracy,
        valid_loss/SET, glue/TASK, and glue/average (the mean of the tasks' medians, without WNLI and AX).
    """

    group: str
    coordinates: dict[str, Value] = {}
    cells: list[str]
    peers: dict[str, dict[str, Spread]] = {}


class Comparison(_Part):
    """One peer of one condition against a peer of another, seed by seed (paired: same seed, same rows and masks).

    metric: as in `Condition.peers`; lower_is_better: True for losses.
    seeds: those that both have finished; differences: `condition` minus `against`, in the order of seeds.
    mean: of the differences; None without any.
    interval: at `confidence`, of the mean difference; None with fewer than 3 seeds.
    method: how the interval was made, in words; "" without one.
    verdict: better | worse | no evidence. `words` says it in a sentence that can stand alone.
    """

    condition: str
    peer: str
    against: str
    against_peer: str
    metric: str
    lower_is_better: bool
    seeds: list[int]
    differences: list[float]
    mean: float | None
    interval: tuple[float, float] | None
    confidence: float
    method: str
    verdict: Literal["better", "worse", "no evidence"]
    words: str


class Results(_Part):
    """The whole file.

    experiment: the experiment file's name without suffix; question: what it asks, in plain words.
    size: "full" or the name of the size ("tiny"); note: what a reader must know about results of this size.
    recipe: the base recipe's file; corpus: the corpus directory.
    command: the words that repeat the experiment; git_commit: of the code, None outside a checkout.
    hardware: device, cores and host of the first finished run's environment.json.
    seeds: all seeds asked for.
    axes: axis → the recipe keys it sets, for captions. about: group of cells → what it is, in the experiment's words.
    cells, conditions, comparisons: see there. Conditions by name, in the experiment's order.
    caveats: sentences that must stand beside any reading (few seeds, many comparisons, tiny size, missing cells).
    seconds: wall time of the experiment so far, all its starts together.
    """

    format: Literal["ctcd-ds-experiment-1"] = "ctcd-ds-experiment-1"
    experiment: str
    question: str
    size: str
    note: str = ""
    recipe: str
    corpus: str
    command: list[str]
    git_commit: str | None = None
    hardware: dict[str, Any] = {}
    seeds: list[int]
    axes: dict[str, list[str]] = {}
    about: dict[str, str] = {}
    cells: list[Cell]
    conditions: dict[str, Condition]
    comparisons: list[Comparison]
    caveats: list[str] = []
    seconds: float = 0.0


def write_results(directory: Path, results: Results) -> None:
    """Writes DIR/results.json, atomically."""
    write_atomic(directory / FILE, json.dumps(results.model_dump(mode="json"), indent=1, allow_nan=False) + "\n")


def read_results(directory: Path) -> Results:
    """Reads DIR/results.json. Raises UserError, naming the path, where it is missing or no file of this format."""
    path = directory / FILE
    try:
        return Results.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{directory} is no experiment: it has no {FILE} (`ctcd experiment` makes one)") from None
    except ValidationError as problem:
        error = problem.errors()[0]
        where = ".".join(map(str, error["loc"]))
        raise UserError(f"{path} is not readable: {where}: {error['msg']} (found {error['input']!r})") from None
    except (OSError, ValueError) as problem:
        raise UserError(f"{path} is not readable: {problem}") from None
