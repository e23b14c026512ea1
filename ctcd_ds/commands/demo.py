"""Goes the whole way in a few minutes, no download: text → corpus → three runs → export → table and report.

Little text, many epochs: each model alone, then both together on the same rows. Every step is a command of this
project, printed as it is run: the same ones work on your own text.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctcd_ds import cli
from ctcd_ds.cli import RunFailure, command
from ctcd_ds.cluster.ranks import free_port
from ctcd_ds.commands.recipes import SHIPPED
from ctcd_ds.demo.data import data_commands
from ctcd_ds.experiments.results import PeerResult
from ctcd_ds.experiments.wording import METRICS

RECIPES = {"clm": "demo_causal.yaml", "mlm": "demo.yaml"}
RUNS = {"teacher_alone": ["peers.student=null"], "student_alone": ["peers.teacher=null"], "together": []}
PEERS = ("teacher", "student")
SHOWN = ("valid_loss", "lowest_loss", "valid_accuracy")
PROOF_STEPS = 30
TEXTS = {
    "clm": ("The function returns", "If the argument is", "The default value"),
    "mlm": (
        "The function returns a [MASK] of the given object.",
        "If the argument is [MASK], an exception is raised.",
        "The default [MASK] is used when no value is given.",
    ),
}
ASKED: dict[str, dict[str, Any]] = {
    # Without special tokens: WordPiece would put [SEP] behind the words, and a new text would begin.
    "clm": {"max_new_tokens": 20, "repetition_penalty": 1.2, "do_sample": False, "return_full_text": False,
            "add_special_tokens": False},
    "mlm": {"top_k": 4},
}  # fmt: skip
Table = dict[str, dict[str, dict[str, float]]]  # alone or together → peer → metric → value


def main() -> None:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs/demo"), help="everything goes there")
    add("--task", choices=list(RECIPES), default="clm", help="causal models (clm), or masked ones (mlm)")
    add("--ranks", type=int, default=2, help="processes of a run")
    add("--steps", type=int, default=None, help="steps of each run, in place of the recipe's")
    add("--size_megabytes", type=float, default=6.0, help="MB of text to collect")
    arguments = parser.parse_args()

    place = arguments.output_dir
    if place.exists():
        if any(place.iterdir()) and not (place / "data").exists():
            raise cli.UserError(f"--output_dir {place} holds other files than a demo's: name another")
        shutil.rmtree(place)  # an earlier demo's
    place.mkdir(parents=True)
    started = time.monotonic()
    title("text, tokenizer, corpus")
    for line in data_commands(place / "data", place, arguments.size_megabytes):
        run(line)
    length = [] if arguments.steps is None else [f"training.steps={arguments.steps}"]
    title("each model alone, then both together: three runs on the same rows")
    for name, changes in RUNS.items():
        pretrain(place, name, arguments.task, arguments.ranks, [*changes, *length])
    title("to Hugging Face models")
    models = export(place)
    title(f"the proof: {PROOF_STEPS} steps of the student, beside a teacher it does not learn from, and alone")
    equal = proof(place, arguments.task, arguments.ranks)
    title("what came out")
    run(command("report", *(place / name for name in RUNS), "--output_dir", place / "report"))
    table = measured(place)
    (place / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    show_texts(models, arguments.task)
    show(table, equal, place, time.monotonic() - started)


def title(text: str) -> None:
    print(f"\n===== {text}", flush=True)


def pretrain(place: Path, name: str, task: str, ranks: int, changes: Sequence[str], silent: bool = False) -> None:
    """One run under the deepspeed launcher."""
    launcher = ["deepspeed", "--quiet", "--num_accelerators", str(ranks), "--master_port", str(free_port()), "--module"]
    files = ["--recipe", SHIPPED / "recipes" / RECIPES[task], "--deepspeed_config", SHIPPED / "cpu.json"]
    line = command(
        "pretrain", *files, "--output_dir", place / name, "--set", f"corpus.path={place / 'corpus'}", *changes
    )
    run([*launcher, *line[2:]], silent)


def export(place: Path) -> list[Path]:
    """The four models: teacher and student, alone and together. The latter two are the demo's product."""
    run(command("export", "--checkpoint", place / "together", "--peer", "all", "--output_dir", place / "hf"))
    for peer in PEERS:
        source, target = place / f"{peer}_alone", place / "hf_alone" / peer
        run(command("export", "--checkpoint", source, "--peer", peer, "--output_dir", target))
    return [place / folder / peer for folder in ("hf_alone", "hf") for peer in PEERS]


def proof(place: Path, task: str, ranks: int) -> int:
    """The first steps of the student alone, and beside the teacher with soft weights of 0: how many values are equal.

    Raises RunFailure where one of its losses, gradient norms or held-out values differs in a bit.
    """
    from ctcd_ds.training.run_directory import RunDirectory  # torch comes with it: not for --help

    short = [f"training.steps={PROOF_STEPS}", "training.log_every=1"]
    apart = ["peers.teacher.soft.student=0", "peers.student.soft.teacher=0"]
    for name, changes in (("beside", apart), ("alone", RUNS["student_alone"])):
        pretrain(place, f"proof/{name}", task, ranks, [*changes, *short], silent=True)
    beside, alone = (
        {
            (row["step"], key): value
            for row in RunDirectory(place / "proof" / name).logged()
            for key, value in row.items()
        }
        for name in ("beside", "alone")
    )
    values = [at for at in alone if at[1].split("/")[0] in ("loss", "grad_norm", "valid")]
    if different := [f"{key} at step {step}" for step, key in values if alone[step, key] != beside.get((step, key))]:
        raise RunFailure(f"a student with soft weight 0 is not as alone: {', '.join(different[:3])}")
    return len(values)


def run(line: list[str], silent: bool = False) -> None:
    """Prints and runs a command of this environment, its stdout lost if `silent`; ends the demo where it fails."""
    print(f"\n$ {cli.as_typed(line)}", flush=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # On the CPU everywhere: one GPU could not hold two ranks. Models this small gain nothing from threads.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PATH": path, "DS_ACCELERATOR": "cpu"}
    shown = subprocess.DEVNULL if silent else None
    if (code := subprocess.run(line, env=environment, stdout=shown, check=False).returncode) != 0:
        raise SystemExit(code)


def measured(place: Path) -> Table:
    """What each model came to, alone and together."""
    from ctcd_ds.experiments.collecting import outcome

    table: Table = {"alone": {}, "together": {}}
    for peer in PEERS:
        for kind, name in (("alone", f"{peer}_alone"), ("together", "together")):
            found = outcome(place / name, {peer: PeerResult()}, place)["peers"][peer]
            table[kind][peer] = {key: value for key in SHOWN if (value := getattr(found, key)) is not None}
    return table


def show_texts(models: list[Path], task: str) -> None:
    """What each model puts in place of [MASK], or how it goes on."""
    from transformers import AutoTokenizer, logging, pipeline

    from ctcd_ds.tasks import TASKS

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded = {
        f"{model.parent.name}/{model.name}": pipeline(
            TASKS[task].words.pipeline,
            model=TASKS[task].auto_class().from_pretrained(model),
            tokenizer=AutoTokenizer.from_pretrained(model),
        )
        for model in models
    }
    for text in TEXTS[task]:
        print(f"\n{text}{' …' if task == 'clm' else ''}")
        for name, model in loaded.items():
            said: Any = model(text, **ASKED[task])
            words = [f"{guess['token_str']} {guess['score']:.2f}" if task == "mlm" else guess["generated_text"]
                     for guess in said]  # fmt: skip
            print(f"  {name:<18} {', '.join(words)}")


def show(table: Table, equal: int, place: Path, seconds: float) -> None:
    """Losses alone and together, what the numbers say, and where everything is."""
    print("\nalone against together: same text, same rows, same steps, one seed\n")
    lines = [["", "alone", "together", "difference"]]
    for peer in PEERS:
        for key in (key for key in SHOWN if key in table["alone"][peer] and key in table["together"][peer]):
            metric, alone, together = METRICS[key], table["alone"][peer][key], table["together"][peer][key]
            lines.append([f"{peer} {metric.name}", metric.shown(alone), metric.shown(together),
                          metric.signed(together - alone)])  # fmt: skip
    print(*cli.aligned(lines), sep="\n")
    print(
        "\nA lower loss and a higher accuracy are better. Little text, many epochs: a peer's predictions keep a model"
        "\nfrom learning its text by heart. One seed shows that it ran, not that it holds: more seeds, and what weight"
        "\ndecay does, are in docs/results.md. In one pass over more text it is the other way round."
        f"\nProof that nothing else couples the two: with soft weights of 0, all {equal} losses, gradient norms and"
        "\nheld-out values of the student beside the teacher are those of the student alone, bit for bit."
        f"\n\nmodels: {place}/hf/teacher, {place}/hf/student · curves: tensorboard --logdir {place}"
        f"\none page of all runs, with the curves that cross: {place}/report/report.html"
        f"\nthe whole demo took {seconds / 60:.1f} minutes"
    )


if __name__ == "__main__":
    cli.run(main)
