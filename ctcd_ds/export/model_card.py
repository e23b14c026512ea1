"""The README.md of an exported peer: what it is, how it was made, how to load it, its scores, what not to expect.

The metadata (model-index included) is huggingface_hub's, so that the hub and its tools read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig

from ctcd_ds import __version__
from ctcd_ds.export.curves import LoggedRows, draw
from ctcd_ds.manifest import read_json, write_atomic
from ctcd_ds.recipe.sections import Recipe
from ctcd_ds.tasks import TASKS
from ctcd_ds.tasks.task import Words
from ctcd_ds.training.metrics import held_out_values
from ctcd_ds.training.run_directory import RunDirectory, at_word_frequencies

FILE, CURVES = "README.md", "curves.png"
_BEGIN, _END = "<!-- scores: `ctcd glue` and `ctcd lm-eval` write them here -->", "<!-- end of scores -->"
_BODY = """
# {name}

A {model_type} {kind} with {layers} layers, trained from {origin} by
[CTCD-DS](https://arxiv.org/abs/2311.02849) {version}: {how}.

```python
from transformers import {auto_class}, AutoTokenizer, pipeline

directory = "."  # this folder; on the hub, the repository's name
model = {auto_class}.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
{example}
```

To fine-tune it, load it with `AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2)`.

## Scores

{scores}

## Training

{steps}, {tokens:,} tokens in rows of {row_length}{read}. Corpus `{corpus}`, fingerprint `{fingerprint}`.
{curves}
Licence of the training text: {data_license}

The recipe that repeats it:

```yaml
{recipe}```

## Limits

{plateau}- It knows the text it was trained on, with its mistakes and biases; nobody has looked for those here.
- It {longest}was trained on rows of {row_length}.
- {limit}, and its facts are not to be relied on.
- Held-out values are those of at most {valid_rows:,} rows, the same ones all along, of held-out documents of the same
  corpus where no other set is named; they say nothing of other text.
- Scores of tasks are those of fine-tuned copies (but for N-shot ones); a difference within the spread of a few seeds
  is none.
"""


def write_card(
    place: Path, run: RunDirectory, recipe: Recipe, name: str, manifest: dict[str, Any], data_license: str | None = None
) -> None:
    """Writes README.md and curves.png of one trained peer, as of one checkpoint, into its export.

    `data_license`: the licence of the training text in the user's words; without it the card says it was not stated.
    """
    config = AutoConfig.from_pretrained(run.peers / name)
    places = getattr(config, "max_position_embeddings", None)
    rows = [row for row in run.logged() if row["step"] <= manifest["step"]]
    section, task, unfinished = recipe.peers[name], TASKS[recipe.objective.task], manifest["step"] < manifest["steps"]
    terms = [f"hard loss with weight {section.hard_weight:g}"] if section.hard_weight else []
    graph = recipe.graph()
    terms += [f"soft loss from `{graph.names[j]}` with weight {graph.said(i, j)}"
              for i, j, _ in graph.edges() if graph.names[i] == name]  # fmt: skip
    terms += [f"{signal} of `{graph.names[signal.teacher]}` with weight {signal.said()}"
              for signal in graph.signals if graph.names[signal.learner] == name]  # fmt: skip
    drawn = draw(place / CURVES, rows, name, recipe.peers)
    results = _held_out(rows, manifest["step"], name, recipe.corpus.title, task.words)
    body = _BODY.format(
        name=name,
        model_type=config.model_type,
        kind=task.words.model,
        auto_class=task.auto_class().__name__,
        example=task.words.example,
        limit=task.words.limit,
        layers=getattr(config, "num_hidden_layers", "?"),
        origin=f"`{section.origin}`" if section.origin else "scratch",
        version=__version__,
        how=", ".join(terms),
        scores=_scores(results),
        steps=f"{manifest['step']:,} steps" + (f" of {manifest['steps']:,}; the run goes on" if unfinished else ""),
        tokens=manifest["step"] * recipe.training.global_batch_rows * recipe.corpus.sequence_length,
        read=_read(recipe, manifest),
        valid_rows=recipe.training.valid_rows,
        plateau=_plateau(run, rows, manifest["step"], name),
        corpus=recipe.corpus.title,
        fingerprint=manifest["corpus"][:16],
        curves=f"\n![Losses of {', '.join(recipe.peers)} by step]({CURVES})\n" if drawn else "",
        data_license=data_license or "not stated by whoever exported this model.",
        recipe=recipe.to_yaml(),
        longest=f"reads rows of at most {places} tokens; it " if places else "",
        row_length=recipe.corpus.sequence_length,
    )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task.words.pipeline,
        tags=["ctcd", "co-training", "co-distillation", recipe.objective.task],
        model_name=name if results else None,
        eval_results=results or None,
    )
    (place / FILE).write_text(f"---\n{data.to_yaml()}\n---\n{body}", encoding="utf-8")


def add_scores(model: Path, results: Sequence[EvalResult]) -> list[str] | None:
    """Adds results to the card of a model directory; of the same data and metric the new one counts.

    Returns the others that it replaced, in words. What else stands in the card stays. None, and nothing is touched,
    where the card is none of `write_card`'s. Raises OSError where it cannot be written.
    """
    path = model / FILE
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
        data: Any = card.data
        tags, before, name = data.tags or [], data.eval_results or [], data.model_name
    except (OSError, ValueError, AttributeError, TypeError):  # no card, or one that its owner has rewritten
        return None
    section = re.compile(f"<!-- scores: .*?{re.escape(_END)}", re.DOTALL)
    if "ctcd" not in tags or not section.search(card.text):
        return None
    merged = {_key(result): result for result in before} | {_key(result): result for result in results}
    replaced = [_words(result) for result in before if _words(merged[_key(result)]) != _words(result)]
    data.model_name = name or model.name
    data.eval_results = list(merged.values())
    card.text = section.sub(lambda _: _scores(data.eval_results), card.text)
    write_atomic(path, str(card))
    return replaced


def _read(recipe: Recipe, manifest: dict[str, Any]) -> str:
    """How much text the tokens are, where the recipe says it: the same row read again is no new text."""
    if rows := recipe.corpus.train_rows:
        times = manifest["step"] * recipe.training.global_batch_rows / rows
        return f" ({rows:,} of the corpus's rows, {times:.1f} times each)"
    if epochs := recipe.training.epochs:
        return f" (the whole corpus {epochs * manifest['step'] / manifest['steps']:.1f} times)"
    return ""


def _plateau(run: RunDirectory, rows: LoggedRows, step: int, name: str) -> str:
    """A warning, where the peer has learned no more than how often each word occurs."""
    found = _last(rows, step).get(f"valid/{name}/loss")
    unigram_loss = read_json(run.path / "summary.json").get("unigram_loss")
    said = at_word_frequencies({"it": found} if isinstance(found, float) else {}, unigram_loss)
    return f"- {said[0].upper()}{said[1:]}.\n" if said else ""


def _last(rows: LoggedRows, step: int) -> Mapping[str, Any]:
    """What was logged at the exported step: values of another are other weights'."""
    return rows[-1] if rows and rows[-1]["step"] == step else {}


def _key(result: EvalResult) -> tuple[Any, ...]:
    return (*result.unique_identifier, result.metric_type)


def _words(result: EvalResult) -> str:
    return f"{result.dataset_name}: {result.metric_name or result.metric_type}: {_shown(result)}"


def _shown(result: EvalResult) -> str:
    """A value as people read it; the card's metadata has fractions, as the hub wants them."""
    unit = {"loss": " nats", "bits_per_byte": " bits"}.get(result.metric_type)
    if unit is not None or "perplexity" in result.metric_type:
        return f"{result.metric_value}{unit or ''}"
    return f"{100 * result.metric_value:.2f} %"


def _scores(results: Sequence[EvalResult]) -> str:
    """The section between the marks: a line for each result."""
    lines = [f"| {r.dataset_name} | {r.metric_name or r.metric_type} | {_shown(r)} |" for r in results]
    return "\n".join([_BEGIN, "| data | metric | value |", "|---|---|---|", *(lines or ["| none yet | | |"]), _END])


def _held_out(rows: LoggedRows, step: int, name: str, corpus: str, words: Words) -> list[EvalResult]:
    """The peer's held-out values as results."""
    return [
        EvalResult(
            task_type=words.pipeline,
            dataset_type=corpus,
            dataset_config=of or None,
            dataset_name=f"held-out rows of {corpus}{f', {of}' if of else ''}",
            metric_type=metric,
            metric_name=f"{metric} at {words.target}",
            metric_value=round(value, 4),
        )
        for of, found in held_out_values(_last(rows, step), name).items()
        for metric, value in found.items()
    ]
