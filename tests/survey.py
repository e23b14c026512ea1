"""What each architecture of transformers is as a peer, tried in small. As a script it writes docs/architectures.md."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import __version__
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from architectures import LENGTH, tiny
from ctcd_ds.cli import UserError
from ctcd_ds.corpus.rows import Corpus
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.objective.signals import Hidden, Relations
from ctcd_ds.peers.accounting import cost
from ctcd_ds.peers.build import build_peer, config_mistakes, peer_config, quiet_transformers
from ctcd_ds.peers.heads import Way, way_of
from ctcd_ds.peers.rehearsal import rehearse, tokenizer_mistake
from ctcd_ds.peers.signals import signal_mistakes
from ctcd_ds.peers.states import Shapes, planned_shapes
from ctcd_ds.recipe.sections import PeerSection, Recipe
from ctcd_ds.tasks import TASKS
from ctcd_ds.tasks.task import Task
from runs import bert, chain_corpus

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architectures.md"
SENTINELS = 16  # of the corpus that they all read

# task → the types that transformers has for it
KINDS: dict[str, list[str]] = {
    "mlm": list(MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "clm": list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "span": list(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
}
_HEADINGS = {"mlm": "Masked (`mlm`)", "clm": "Causal (`clm`)", "span": "Sequence to sequence (`span`)"}
PREFACE = f"""# Architectures

Every type that transformers {__version__} has for the Auto class of a task, tried as a peer in small: built, rehearsed
(it reads a row, learns, is saved, loaded and compared), counted. `make architectures` writes this page; `make
test-architectures` finds every line again, trains each type that is checked beside others, exports it, and compares its
logits with those of the plain model.

**logits**: how those at the asked positions are had ([architecture.md](architecture.md#any-architecture)). *cut*: the
head runs at the positions only; *tap*: the output embedding is left to the objective, which works in tiles of the
vocabulary (and knows the *scale*, soft *cap* or *bias* that the model puts after it); *all*: all logits are made, and
then gathered. **apart**: whether `corpus.documents: apart` can be had. Routers of experts learn from the objective
alone: losses that balance them are no part of it. **hidden**, **relations**: whether the recipe keys of these names
([recipes.md](recipes.md#more-than-predictions)) can be had, as learner and as teacher: the type gives out a state for
each token, and shows the queries, keys and values of each layer's attention; *encoder + decoder*: among types that have
both.
"""


@dataclass(frozen=True)
class Found:
    """`logits`, `hidden`: as the page says it. `apart`: of causal models. `relations`: where the task has them.

    `reason`: why it can be no peer, None where it can.
    """

    logits: str = ""
    apart: bool | None = None
    hidden: str = ""
    relations: bool | None = None
    reason: str | None = None


def recipe(corpus: Path, task: str, peers: dict[str, Any], **corpus_keys: Any) -> dict[str, Any]:
    """Two steps."""
    return {
        "corpus": {"path": str(corpus), "sequence_length": LENGTH, **corpus_keys},
        "objective": {"task": task},
        "peers": peers,
        "training": {"global_batch_rows": 4, "steps": 2, "valid_rows": 8},
    }


def look(corpus: Corpus, task: str, kind: str) -> Found:
    """Tries a type as a run would before its start, and asks how its logits are had."""
    section, asked = PeerSection(model=tiny(kind)), _task(corpus, task)
    auto = asked.auto_class()
    if mistakes := list(config_mistakes(section, corpus, LENGTH, auto)):
        return Found(reason=mistakes[0])
    config = peer_config(section, corpus, auto)
    try:
        cost(config, LENGTH, LENGTH, auto)
    except UserError as mistake:
        return Found(reason=str(mistake))
    said = rehearse(config, auto, LENGTH, "fp32", "cpu", asked.unfit)
    if said := said or tokenizer_mistake(config, corpus.tokenizer_path):
        return Found(reason=said)
    way, apart = way_of(build_peer("it", section, corpus, 1, auto)), None
    if task == "clm":
        unfit = _task(corpus, task, documents="apart").unfit
        apart = rehearse(config, auto, LENGTH, "fp32", "cpu", unfit) is None
    hidden, relations = insides(lambda: planned_shapes(config, auto))
    return Found(_words(way), apart, hidden, None if task == "span" else relations)


def insides(look_inside: Callable[[], Shapes]) -> tuple[str, bool]:
    """(what of its hidden states can be learned, whether its attention's relations can), as a run decides it."""
    try:
        shapes = look_inside()
    except UserError:
        return "no", False
    between = {"it": shapes, "its like": shapes}
    asked = (Hidden(0, 1, 1.0), Relations(0, 1, 1.0))
    graphs = (DistillationGraph.of({name: {} for name in between}, signals=[signal]) for signal in asked)
    hidden, relations = (not list(signal_mistakes(graph, between)) for graph in graphs)
    stacks = "encoder + decoder" if len(shapes.hidden) == 2 else "yes"
    return stacks if hidden else "no", relations


def _task(corpus: Corpus, task: str, **corpus_keys: Any) -> Task:
    raw = recipe(corpus.path, task, {"it": {"model": bert(32, 1)}}, **corpus_keys)
    return TASKS[task].of(Recipe.model_validate(raw), corpus)


def _words(way: Way) -> str:
    names = [name for name, taken in (("cut", way.cut), ("tap", way.tap)) if taken] or ["all"]
    if way.scale != 1:
        names.append("scale")
    if way.cap is not None:
        names.append("cap")
    if way.bias is not None:
        names.append("bias")
    return " + ".join(names)


def line(task: str, kind: str, found: Found) -> str:
    """Its line on the page."""
    checked = "yes" if found.reason is None else f"no: {found.reason.replace('|', '/')}"
    said = {None: "", True: "yes", False: "no"}
    apart = [said[found.apart]] if task == "clm" else []
    relations = [said[found.relations]] if task != "span" else []
    return f"| {' | '.join([f'`{kind}`', found.logits, *apart, found.hidden, *relations, checked])} |"


def page(found: dict[str, dict[str, Found]]) -> str:
    """docs/architectures.md: task → type → what was found."""
    return "\n".join([PREFACE, *(text for task, kinds in found.items() for text in _section(task, kinds))])


def _section(task: str, kinds: dict[str, Found]) -> Iterator[str]:
    checked = sum(found.reason is None for found in kinds.values())
    apart, relations = (["apart"] if task == "clm" else []), (["relations"] if task != "span" else [])
    columns = ["type", "logits", *apart, "hidden", *relations, "checked"]
    states = sum(found.hidden not in ("", "no") for found in kinds.values())
    attention = f", {sum(found.relations or False for found in kinds.values())} relations" if relations else ""
    yield f"## {_HEADINGS[task]}\n"
    yield f"{checked} of {len(kinds)} types; of these {states} have hidden states{attention}.\n"
    yield f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    yield from (line(task, kind, found) for kind, found in kinds.items())
    yield ""


def main() -> None:
    """Tries all and writes the page."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        corpus = Corpus.open(chain_corpus(Path(folder) / "corpus", sentinels=SENTINELS))
        PAGE.write_text(page({task: {k: look(corpus, task, k) for k in kinds} for task, kinds in KINDS.items()}))


if __name__ == "__main__":
    main()
