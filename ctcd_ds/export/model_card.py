"""The README.md of an exported peer: what it is, how it was made, how to load it, what not to expect."""

from __future__ import annotations

import json
from typing import Any

from ctcd_ds import __version__
from ctcd_ds.recipe import Recipe
from ctcd_ds.training.run_directory import RunDirectory

_CARD = """---
library_name: transformers
pipeline_tag: fill-mask
tags: [ctcd, co-training, co-distillation, masked-lm]
---

# {name}

A {model_type} masked language model with {layers} layers, trained from {origin} by
[CTCD-DS](https://arxiv.org/abs/2311.02849) {version}: {how}.

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

model = AutoModelForMaskedLM.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
print(pipeline("fill-mask", model=model, tokenizer=tokenizer)(f"A {{tokenizer.mask_token}} of text."))
```

## Training

{steps} steps, {tokens:,} tokens of {length}; corpus fingerprint `{corpus}`.

| held-out rows | value |
|---|---|
{results}

The recipe that repeats it:

```yaml
{recipe}```

## Limits

It knows the text it was trained on and its mistakes. Held-out loss is measured on the same corpus's held-out
documents with fixed masks; it says nothing of other text. Scores on tasks are to be measured (tools/run_glue.py).
"""


def model_card(run: RunDirectory, recipe: Recipe, name: str, manifest: dict[str, Any]) -> str:
    """The card's text for one trained peer of a run, as of one checkpoint."""
    config = json.loads((run.peers / name / "config.json").read_text())
    layers = next((config[key] for key in ("num_hidden_layers", "n_layers") if key in config), "?")
    section = recipe.peers[name]
    terms = [f"hard loss with weight {section.hard_weight:g}"] if section.hard_weight else []
    terms += [f"soft loss from `{other}` with weight {weight:g}" for other, weight in section.soft.items() if weight]
    found = _held_out(run, name, manifest["step"])
    return _CARD.format(
        name=name,
        model_type=config["model_type"],
        layers=layers,
        origin=f"`{section.pretrained}`" if section.pretrained else "scratch",
        version=__version__,
        how=", ".join(terms),
        steps=manifest["step"],
        tokens=manifest["step"] * recipe.training.global_batch_rows * recipe.corpus.sequence_length,
        length=f"rows of {recipe.corpus.sequence_length}",
        corpus=manifest["corpus"][:16],
        results="\n".join(f"| {key} | {value:.4f} |" for key, value in found.items()) or "| none | – |",
        recipe=recipe.to_yaml(),
    )


def _held_out(run: RunDirectory, name: str, step: int) -> dict[str, float]:
    """The peer's last held-out values up to a step, from metrics.jsonl."""
    found: dict[str, float] = {}
    lines = run.metrics.read_text().splitlines() if run.metrics.exists() else []
    prefix = f"valid/{name}/"
    for row in map(json.loads, lines):
        if row["step"] <= step:
            found |= {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix) and v is not None}
    return found
