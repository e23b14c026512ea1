"""Goes the whole way in a few minutes, no download: text → corpus → three runs → export → scores → table.

Every step is a command of this project, printed as it is run: the same ones work on your own text.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ctcd_ds import cli
from ctcd_ds.cli import command
from ctcd_ds.cluster.ranks import free_port
from ctcd_ds.commands.recipes import SHIPPED
from ctcd_ds.demo.data import data_commands
from ctcd_ds.experiments.wording import METRICS, Metric

RUNS = {
    "teacher_alone": "demo_teacher_alone.yaml",
    "student_alone": "demo_student_alone.yaml",
    "together": "demo.yaml",
}
SENTENCES = (
    "The function returns a [MASK] of the given object.",
    "If the argument is [MASK], an exception is raised.",
    "The default [MASK] is used when no value is given.",
)


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="everything goes there")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a run")
    parser.add_argument("--steps", type=int, default=None, help="steps of each run, in place of the recipes'")
    parser.add_argument("--size_megabytes", type=float, default=6.0, help="MB of text to collect")
    arguments = parser.parse_args()

    place = arguments.output_dir
    if place.exists():
        if any(place.iterdir()) and not (place / "data").exists():
            raise cli.UserError(f"--output_dir {place} holds other files than a demo's: name another")
        shutil.rmtree(place)  # an earlier demo's
    place.mkdir(parents=True)
    started = time.monotonic()
    for line in data_commands(place / "data", place, arguments.size_megabytes):
        run(line)
    for name, recipe in RUNS.items():
        pretrain(place, name, recipe, arguments.ranks, arguments.steps)
    models = export(place)
    glue = place / "glue"
    options = ["--data_dir", place / "data" / "glue", "--output_dir", glue, "--tasks", "rte", "--epochs", 2]
    run(command("glue", "--model", *models, *options, "--max_train_samples", 1500, "--learning_rate", 5e-4))
    report(place, models, glue, time.monotonic() - started)


def pretrain(place: Path, name: str, recipe: str, ranks: int, steps: int | None) -> None:
    """One run under the deepspeed launcher."""
    changes = [f"corpus.path={place / 'corpus'}"]
    if steps is not None:
        changes += [f"training.steps={steps}", f"training.valid_every={steps}"]
    launcher = ["deepspeed", "--quiet", "--num_accelerators", str(ranks), "--master_port", str(free_port()), "--module"]
    files = ["--recipe", SHIPPED / "recipes" / recipe, "--deepspeed_config", SHIPPED / "cpu.json"]
    line = command("pretrain", *files, "--output_dir", place / name, "--set", *changes)
    run([*launcher, *line[2:]])


def export(place: Path) -> list[Path]:
    """The four models: teacher and student, alone and together. The latter two are the demo's product."""
    run(command("export", "--checkpoint", place / "together", "--peer", "all", "--output_dir", place / "hf"))
    for peer in ("teacher", "student"):
        source, target = place / f"{peer}_alone", place / "hf_alone" / peer
        run(command("export", "--checkpoint", source, "--peer", peer, "--output_dir", target))
    return [place / folder / peer for folder in ("hf_alone", "hf") for peer in ("teacher", "student")]


def run(line: list[str]) -> None:
    """Prints and runs a command of this environment; ends the demo where it fails."""
    print(f"\n$ {cli.as_typed(line)}", flush=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # On the CPU everywhere: one GPU could not hold two ranks. Models this small gain nothing from threads.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PATH": path, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(line, env=environment, check=False)
    if done.returncode:
        raise cli.RunFailure(f"the demo ends here: exit code {done.returncode}")


def report(place: Path, models: list[Path], glue: Path, seconds: float) -> None:
    """Prints the table alone against together, writes table.json, and shows what the models fill in."""
    scores = json.loads((glue / "results.json").read_text())["models"]
    table: dict[str, dict[str, dict[str, float]]] = {"alone": {}, "together": {}}
    for model, kind in zip(models, ("alone", "alone", "together", "together"), strict=True):
        peer = model.name
        summary = json.loads(
            (place / (f"{peer}_alone" if kind == "alone" else "together") / "summary.json").read_text()
        )
        table[kind][peer] = {
            "valid_loss": summary[f"valid/{peer}/loss"],
            "valid_accuracy": summary[f"valid/{peer}/accuracy"],
            "standin_rte": score_of(scores, model),
        }
    (place / "table.json").write_text(json.dumps(table, indent=1) + "\n")

    fill_masks(models)
    print("\nalone against together: same text, same rows, same steps, one seed\n")
    lines = [["", "alone", "together", "difference"]]
    task = Metric("stand-in task", "stand-in task", 1, unit=" %")
    metrics = {name: METRICS[name] for name in ("valid_loss", "valid_accuracy")} | {"standin_rte": task}
    for peer in ("teacher", "student"):
        for key, metric in metrics.items():
            alone, together = table["alone"][peer][key], table["together"][peer][key]
            values = (metric.shown(alone), metric.shown(together), metric.signed(together - alone))
            lines.append([f"{peer} {metric.name}", *values])
    print(*cli.aligned(lines), sep="\n")
    page = command("report", *(place / run for run in RUNS), "--output_dir", place / "report")
    print(
        "\nA lower loss and a higher accuracy are better. One seed, a minute of training: a difference may be chance,"
        "\nand so early the soft losses can hold both peers back; the paper's gain is one of full runs."
        "\nThe stand-in task is made from held-out text in RTE's file format; it is not RTE."
        f"\n\nmodels: {place}/hf/teacher, {place}/hf/student · curves: tensorboard --logdir {place}"
        f"\none page of all runs: {cli.as_typed(page)}"
        f"\nthe whole demo took {seconds / 60:.1f} minutes"
    )


def score_of(scores: Any, model: Path) -> float:
    """The stand-in task's accuracy in percent, from GLUE's results.json."""
    entry = next(entry for entry in scores.values() if Path(entry["path"]).resolve() == model.resolve())
    return float(entry["tasks"]["rte"]["median"])


def fill_masks(models: list[Path]) -> None:
    """What each model puts in place of [MASK]."""
    from transformers import AutoTokenizer, logging, pipeline

    from ctcd_ds.tasks import TASKS

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for sentence in SENTENCES:
        print(f"\n{sentence}")
        for model in models:
            loaded = TASKS["mlm"].auto_class().from_pretrained(model)
            fill = pipeline(
                TASKS["mlm"].words.pipeline, model=loaded, tokenizer=AutoTokenizer.from_pretrained(model), top_k=4
            )
            words = ", ".join(f"{guess['token_str']} {guess['score']:.2f}" for guess in fill(sentence))
            print(f"  {model.parent.name + '/' + model.name:<18} {words}")


if __name__ == "__main__":
    cli.run(main)
