"""Writes the tables of docs/scaling.md with the model of step time; with --check, says whether they are as it says.

The plans are real ones: the shipped recipe and DeepSpeed JSONs, and a corpus of a few rows that is made for them.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import workload

from ctcd_ds import cli
from ctcd_ds.cluster.peaks import stated_peak
from ctcd_ds.cluster.scaling import Cluster, Work
from ctcd_ds.cluster.scaling_table import improve, step_table
from ctcd_ds.recipe.reading import load_recipe
from ctcd_ds.training.deepspeed_config import read_config
from ctcd_ds.training.plan import make_plan

PAGE = common.ROOT / "docs" / "scaling.md"
RESULTS = common.ROOT / "benchmarks" / "results" / "scaling-cpu-2-cores-amd-epyc.json"
VOCABULARY = 30522
PEAK = stated_peak("H100", "bf16") or 0.0
CLUSTER = Cluster(nodes=1, gpus=8, flops=0.4 * PEAK, link=400e9 / 8, node_link=450e9)
GPUS = (8, 64, 512, 4096)

PAPER = common.ROOT / "ds_configs" / "recipes" / "paper.yaml"
BILLION: dict[str, Any] = {  # the paper's recipe with peers of 0.98 and 0.33 billion parameters, on rows of 512
    "corpus.sequence_length": 512,
    **{
        f"peers.{peer}.model.{key}": value
        for peer, width in (("teacher", 1792), ("student", 1024))
        for key, value in {
            "hidden_size": width,
            "num_hidden_layers": 24,
            "num_attention_heads": width // 64,
            "intermediate_size": 4 * width,
        }.items()
    },
}


def sizes(corpus: Path, rows: int, most: int, changes: dict[str, Any]) -> Iterator[tuple[Work, Cluster]]:
    """What each size does under ZeRO 1 and 2 with a batch of `rows`, at most `most` of them in a micro-batch."""
    settings = {"corpus.path": corpus, "training.global_batch_rows": rows, "training.epochs": "null"}
    settings |= {"training.steps": 1, **changes}
    recipe = load_recipe(PAPER, [f"{key}={value}" for key, value in settings.items()])
    for gpus in GPUS:
        for stage in (1, 2):
            config = read_config(common.ROOT / "ds_configs" / f"zero{stage}_bf16.json")
            if rows % gpus == 0:
                config["train_micro_batch_size_per_gpu"] = min(most, rows // gpus)
                plan = make_plan(recipe, config, gpus, "cuda", corpus / "run")
                yield plan.work, replace(CLUSTER, nodes=gpus // CLUSTER.gpus)


def advice(found: list[tuple[Work, Cluster]]) -> str:
    """What to change at each size, from ZeRO 2 as shipped."""
    lines = []
    for work, cluster in found:
        if work.stage == 2:
            said = improve(work, cluster)[1] or ["nothing worth changing"]
            lines += [f"- **{cluster.world:,} GPUs**", *(f"  - {text}" for text in said)]
    return "\n".join(lines)


def measured() -> str:
    """The committed run of benchmarks/scaling.py, predicted against measured."""
    row = json.loads(RESULTS.read_text())
    lines = [
        "| processes | ZeRO | accumulation | measured s | predicted s | predicted / measured | of it communication s |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for step in row["steps"]:
        times = f"{step['measured_s']:.2f} | {step['predicted_s']:.2f} | {step['predicted_over_measured']:.2f}"
        head = f"| {step['processes']} | {step['stage']} | {step['accumulation']} | "
        lines.append(f"{head}{times} | {step['communication_s']:.2f} |")
    return "\n".join(lines)


def parts() -> dict[str, str]:
    """Each part of the page that is written here, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = workload.write_corpus(Path(folder) / "corpus", VOCABULARY, 256, 512)
        pairs = {
            "paper": list(sizes(corpus, 128, 128, {})),
            "paper-8192": list(sizes(corpus, 8192, 64, {})),
            "billion": list(sizes(corpus, 4096, 8, BILLION)),
        }
    found = {f"{name}-table": step_table(pair) for name, pair in pairs.items()}
    return found | {f"{name}-advice": advice(pair) for name, pair in pairs.items()} | {"measured": measured()}


def filled(page: str, found: dict[str, str]) -> str:
    """The page with each part between its marks. Raises KeyError where the page has a mark that is no part."""
    mark = re.compile(r"(<!-- (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return mark.sub(lambda match: f"{match[1]}\n{found[match[2]]}\n\n{match[3]}", page)


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--check", action="store_true", help="writes nothing; exit code 1 where the page is out of date"
    )
    arguments = parser.parse_args()
    page = PAGE.read_text()
    new = filled(page, parts())
    if arguments.check:
        print("the tables are as the model says" if new == page else f"{PAGE} is out of date: run this without --check")
        return cli.EXIT_DONE if new == page else cli.EXIT_FAILED
    PAGE.write_text(new)
    return cli.EXIT_DONE


if __name__ == "__main__":
    cli.run(main)
