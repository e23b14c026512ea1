"""The README's commands, run as they stand there, at small size."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from commands import ROOT, environment
from ctcd_ds.cluster.ranks import free_port

README = (ROOT / "README.md").read_text()

# What makes the paper's run a small one; everything else is as in the README.
SMALLER = [
    *("training.epochs=null", "training.steps=4", "training.global_batch_rows=8", "corpus.sequence_length=32"),
    *(
        f"peers.{peer}.model.{key}"
        for peer in ("teacher", "student")
        for key in ("hidden_size=48", "intermediate_size=64")
    ),
]


def main_job() -> list[str]:
    block = re.search(r"```bash\n(.*?)```", README, re.DOTALL)
    assert block is not None
    return block[1].strip().splitlines()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as after `git clone`, with a user's text and GLUE data."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("tools", "launchers", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    random = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(random.choice(syllables, random.integers(1, 4))) for _ in range(400)]
    (folder / "text").mkdir()
    for number in range(2):
        documents = (
            "\n".join(" ".join(random.choice(words, 12)) + "." for _ in range(random.integers(2, 8)))
            for _ in range(120)
        )
        (folder / "text" / f"{number}.txt").write_text("\n\n".join(documents) + "\n")
    (folder / "glue_data" / "RTE").mkdir(parents=True)
    for split in ("train", "dev"):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for index in range(24):
            pair = "\t".join(" ".join(random.choice(words, 6)) for _ in range(2))
            lines.append(f"{index}\t{pair}\t{('entailment', 'not_entailment')[index % 2]}")
        (folder / "glue_data" / "RTE" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def smaller(line: str) -> str:
    line = line.replace("--vocab_size 30522", "--vocab_size 300")
    if line.startswith("deepspeed"):
        line = line.replace("deepspeed ", f"deepspeed --num_accelerators 2 --master_port {free_port()} ", 1)
        line = line.replace("zero2_bf16.json", "cpu.json") + " --set " + " ".join(map(shlex.quote, SMALLER))
    return line


def test_the_main_job_runs_as_written(workplace: Path) -> None:
    """From text to a GLUE table, by the README's commands."""
    said = ""
    for line in map(smaller, main_job()):
        done = subprocess.run(
            ["bash", "-c", line], cwd=workplace, env=environment(), capture_output=True, text=True, timeout=500
        )
        said += f"$ {line}\n{done.stdout}{done.stderr}"
        assert done.returncode == 0, said[-4000:]
    nexts = re.findall(r"^next: ctcd (\w+) ", said, re.MULTILINE)
    assert nexts == ["pretrain", "export", "glue", "speed"], "each command says what comes after it"
    run = workplace / "runs" / "ctcd"
    assert json.loads((run / "exit.json").read_text())["state"] == "finished"
    results = json.loads((run / "glue" / "results.json").read_text())
    assert len(results["models"]) == 2
    from transformers import AutoModelForMaskedLM

    assert AutoModelForMaskedLM.from_pretrained(run / "hf" / "student").config.num_hidden_layers == 4


def test_every_path_the_readme_names_exists() -> None:
    named = re.findall(r"`?((?:ds_configs|docs|tools|launchers|ctcd_ds)/[\w./-]*\w\.(?:py|md|json|yaml))", README)
    named += [f"ds_configs/recipes/{name}.yaml" for name in re.findall(r"`(\w+)\.yaml`", README)]
    assert len(named) > 10
    missing = sorted({name for name in named if not (ROOT / name).exists()} - {"ds_configs/recipes/recipe.yaml"})
    assert not missing


def test_every_shipped_recipe_is_in_the_readmes_table() -> None:
    for path in (ROOT / "ds_configs" / "recipes").glob("*.yaml"):
        assert path.stem in README, path.name


def test_every_link_of_the_docs_leads_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text())]
    assert len(links) > 50
    for page, link in links:
        path, _, heading = link.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name}: {link}"
        headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE) if heading else []
        slugs = [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings]
        assert not heading or heading in slugs, f"{page.name}: {link}"
