"""lm-evaluation-harness on local rows: its own numbers, offline, in results.json, the table and cards."""

from __future__ import annotations

import importlib
import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from commands import command
from ctcd_ds.cluster.slurm import SlurmSettings
from ctcd_ds.evaluation import glue, harness
from ctcd_ds.evaluation.claims import called
from ctcd_ds.evaluation.finetune import FinetuneSettings
from ctcd_ds.experiments import collecting, queueing, running
from ctcd_ds.experiments.grid import expand
from ctcd_ds.experiments.planning import ExperimentPlan, PlannedCell, plan_cells
from ctcd_ds.experiments.specification import load_experiment
from ctcd_ds.export.hf import export
from glue_files import sentence, write_causal, write_model, write_tsv
from runs import FP32, Job, chain_corpus, run_jobs
from test_tasks import GPT2, LLAMA

lm_eval = pytest.importorskip("lm_eval", reason="the extra is not installed: pip install 'ctcd-ds[lm-eval]'")

ABOUT = {"experiment": "e", "size": "full", "recipe": "", "corpus": "", "command": [], "git_commit": None}
TASKS = ("hellaswag", "piqa", "arc_easy", "lambada", "wikitext")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two causal models and a masked one, and rows of five tasks in the columns of their data sets."""
    home = tmp_path_factory.mktemp("harness")
    write_causal(home / "hf/gpt2", "gpt2")
    write_causal(home / "hf/llama", "llama", seed=2)
    write_model(home / "hf/bert")
    draw = random.Random(0)

    def said() -> str:
        return sentence(draw, draw.randrange(2))

    rows: dict[str, list[dict[str, Any]]] = {
        "hellaswag/validation": [
            {"ctx_a": said(), "ctx_b": "it", "activity_label": "a", "endings": [said(), said()], "label": str(n % 2)}
            for n in range(6)
        ],
        "piqa/validation": [{"goal": said(), "sol1": said(), "sol2": said(), "label": n % 2} for n in range(6)],
        "arc_easy/test": [
            {"question": said(), "choices": {"text": [said(), said()], "label": ["A", "B"]}, "answerKey": "AB"[n % 2]}
            for n in range(6)
        ],
        "lambada_openai/test": [{"text": said()} for _ in range(6)],
        "wikitext/test": [{"page": " ".join(said() for _ in range(9))} for _ in range(3)],
    }  # fmt: skip
    for name, content in rows.items():
        write_rows(home / f"rows/{name}.jsonl", content)
    return home


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.fixture(scope="module")
def done(home: Path) -> dict[str, Any]:
    return harness.run([home / "hf/gpt2", home / "hf/llama"], TASKS, home / "rows", home / "out")


def test_every_task_is_measured_for_every_model(done: dict[str, Any]) -> None:
    names = ["hellaswag", "piqa", "arc_easy", "lambada_openai", "wikitext"]
    assert list(done["tasks"]) == [f"{name}@0-shot" for name in names]
    for model in done["models"].values():
        cells = {name: model["tasks"][f"{name}@0-shot"]["seeds"]["0"] for name in names}
        assert cells["wikitext"]["metrics"].keys() == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
        assert cells["lambada_openai"]["metrics"].keys() == {"acc", "perplexity"}
        assert cells["hellaswag"]["score"] == 100 * cells["hellaswag"]["metrics"]["acc_norm"]
        assert "score" not in cells["wikitext"] and "median" not in model["tasks"]["wikitext@0-shot"]
        assert model["average"]["tasks"] == []
    gpt2, llama = (model["tasks"]["wikitext@0-shot"]["seeds"]["0"]["metrics"] for model in done["models"].values())
    assert gpt2 != llama


def test_bits_per_byte_are_the_models_own(home: Path, done: dict[str, Any]) -> None:
    """Against transformers' loss: the harness begins each text with the end token, and cuts none of these."""
    model = AutoModelForCausalLM.from_pretrained(home / "hf/llama").eval()
    tokenizer = AutoTokenizer.from_pretrained(home / "hf/llama")
    bits, size = 0.0, 0
    for line in (home / "rows/lambada_openai/test.jsonl").read_text().splitlines():
        context, _, word = json.loads(line)["text"].rpartition(" ")
        ids = tokenizer(context).input_ids
        whole = torch.tensor([ids + tokenizer(f" {word}").input_ids])
        with torch.no_grad():
            logs = model(whole).logits.log_softmax(-1)[0, :-1].gather(-1, whole[0, 1:, None])
        bits, size = bits - float(logs[len(ids) - 1 :].sum()), size + 1
    measured = done["models"]["llama"]["tasks"]["lambada_openai@0-shot"]["seeds"]["0"]["metrics"]["perplexity"]
    assert measured == pytest.approx(torch.tensor(bits / size).exp().item(), rel=1e-4)


def test_what_is_done_is_not_done_again_and_more_may_be_added(home: Path, done: dict[str, Any]) -> None:
    models = [home / "hf/gpt2", home / "hf/llama"]
    assert harness.run(models, ["piqa"], home / "rows", home / "out") == done
    more = harness.run(models, ["piqa"], home / "rows", home / "out", harness.HarnessSettings(num_fewshot=1))
    assert called("piqa@1-shot", more["tasks"]["piqa@1-shot"], more["settings"]) == "piqa 1-shot"


def test_scores_reach_the_report_and_say_how_they_were_made(home: Path, done: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lm_eval").symlink_to(home / "out")
    scores = collecting.task_scores(tmp_path / "run", home / "hf/llama")
    expected = done["models"]["llama"]["tasks"]["piqa@0-shot"]["median"]
    assert scores["piqa 0-shot"].median == expected and "wikitext 0-shot" not in scores
    kinds = {(r.dataset_type, r.metric_type): r for r in harness.eval_results("llama", done)}
    assert kinds["piqa", "accuracy"].dataset_config == "0-shot"
    assert "lm-evaluation-harness 0." in (kinds["wikitext", "bits_per_byte"].metric_name or "")
    assert len({(*r.unique_identifier, r.metric_type) for r in kinds.values()}) == len(kinds) == 11


@pytest.mark.nightly
def test_it_is_what_the_harness_says_by_itself(home: Path, tmp_path: Path) -> None:
    """Its simple_evaluate takes half a minute to describe the machine."""
    own = harness.run([home / "hf/llama"], TASKS, home / "rows", tmp_path / "out", harness.HarnessSettings(2))
    (tmp_path / "files").mkdir()
    loaded = harness.load(TASKS, home / "rows", tmp_path / "files")
    its = lm_eval.simple_evaluate(
        "hf", {"pretrained": str(home / "hf/llama"), "device": "cpu"}, [one.task for one in loaded], num_fewshot=2
    )
    for name, found in its["results"].items():
        measured = own["models"]["llama"]["tasks"][f"{name}@2-shot"]["seeds"]["0"]["metrics"]
        assert measured == {metric: pytest.approx(found[f"{metric},none"]) for metric in measured}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> PlannedCell:
    """The only cell of an experiment, trained."""
    place = tmp_path_factory.mktemp("trained")
    recipe = {
        "corpus": {"path": str(chain_corpus(place / "tales")), "sequence_length": 32},
        "objective": {"task": "clm"},
        "peers": {"a": {"model": LLAMA, "soft": {"b": 1.0}}, "b": {"model": GPT2, "soft": {"a": 1.0}}},
        "training": {"global_batch_rows": 8, "steps": 4, "valid_rows": 8},
    }
    (place / "recipe.json").write_text(json.dumps(recipe))
    asked = {"question": "What do they know?", "recipe": "recipe.json", "deepspeed_config": "cpu.json", "seeds": [1]}
    (place / "experiment.json").write_text(json.dumps({**asked, "cells": {"both": {}}}))
    (place / "cpu.json").write_text(json.dumps(FP32))
    experiment = load_experiment(place / "experiment.json")
    [cell] = plan_cells(experiment, expand(experiment, recipe, place / "out"), place / "out", 1, "cpu")
    cell.run.parent.mkdir(parents=True)
    run_jobs([Job(cell.cell.recipe, cell.run)], 1, place)
    return cell


def test_an_exported_peer_is_asked_and_fine_tuned_and_its_card_says_both(trained: PlannedCell, tmp_path: Path) -> None:
    export(trained.run, "a", tmp_path / "hf")
    pages = ["w5 w6 w7 w8", "w9 w10"]
    write_rows(tmp_path / "rows/wikitext/test.jsonl", [{"page": page} for page in pages])
    labelled = [[f"w{5 + n} w7", n % 2] for n in range(16)]
    for name in ("train", "dev"):
        write_tsv(
            tmp_path / f"glue/SST-2/{name}.tsv", ["sentence", "label"], labelled if name == "train" else labelled[::-1]
        )
    models = [tmp_path / "hf"]
    asked = harness.run(models, ["wikitext"], tmp_path / "rows", tmp_path / "asked")
    glue.run(models, ("sst2",), tmp_path / "glue", tmp_path / "tuned", (1,), FinetuneSettings(epochs=1))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models[0]), AutoTokenizer.from_pretrained(models[0])
    ids = [torch.tensor([tokenizer(f"[SEP] {page}", add_special_tokens=False).input_ids]) for page in pages]
    nats = sum(model(row, labels=row).loss.item() * (row.shape[1] - 1) for row in ids)
    cell = asked["models"]["hf"]["tasks"]["wikitext@0-shot"]["seeds"]["0"]
    assert cell["metrics"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / len("".join(pages)), rel=1e-3)
    card = ModelCard.load(tmp_path / "hf/README.md")
    lines = {line.split(" | ")[1]: line for line in card.text.splitlines() if line.startswith("| ") and " | " in line}
    [bits] = [line for said, line in lines.items() if said.startswith("bits_per_byte, 0-shot, lm-evaluation-harness")]
    assert bits.startswith("| wikitext 0-shot |") and bits.endswith(" bits |")
    assert any(said.startswith("word_perplexity") and "%" not in line for said, line in lines.items())
    assert any(said.startswith("accuracy, fine-tuned for 1 epoch") for said in lines)


@pytest.fixture(scope="module")
def own_task(trained: PlannedCell) -> Path:
    """A task file beside the experiment's."""
    place = trained.run.parents[2]
    write_rows(place / "rows.jsonl", [{"q": "it was", "a": ["good", "bad"], "is": n % 2} for n in range(4)])
    own = {
        "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{place}/rows.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{a}}",
        "doc_to_target": "{{is}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (place / "mine.yaml").write_text(json.dumps(own))
    return place / "mine.yaml"


def test_a_task_file_of_ones_own_says_where_its_rows_are(home: Path, own_task: Path, tmp_path: Path) -> None:
    content = harness.run([home / "hf/gpt2"], [str(own_task)], None, tmp_path / "out")
    assert content["models"]["gpt2"]["tasks"]["mine@0-shot"]["median"] == 50.0
    assert content["tasks"]["mine@0-shot"]["dev_rows"] == 4


class InProcess(running.Machine):
    """A place where commands run in this process, which has imported what they need."""

    def __init__(self, directory: Path, monkeypatch: Any) -> None:
        super().__init__([{}], directory)
        self.lines: list[Sequence[str]] = []
        self._monkeypatch = monkeypatch

    def call(self, cell: str, line: Sequence[str], environment: Any) -> None:
        self.lines.append(line)
        self._monkeypatch.setattr(sys, "argv", line[2:])
        assert not importlib.import_module(line[2]).main()


def test_an_experiment_asks_its_exports_once_and_again_where_something_else_is_asked(
    trained: PlannedCell, own_task: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out = trained.run.parents[1]
    raw = json.loads((out.parent / "experiment.json").read_text())

    def scored(**asked: Any) -> tuple[ExperimentPlan, list[Sequence[str]]]:
        (out.parent / "experiment.json").write_text(json.dumps({**raw, "lm_eval": {"tasks": own_task.name, **asked}}))
        experiment = load_experiment(out.parent / "experiment.json")
        machine, plan = InProcess(out, monkeypatch), ExperimentPlan(experiment, [trained], out, ABOUT)
        assert running.do_cell(trained, plan, machine) == running.found_ending(trained, experiment)
        return plan, machine.lines

    plan, lines = scored()
    assert [line[2].rpartition(".")[2] for line in lines] == ["export", "lm_eval"]
    results = collecting.collect(plan, {trained.name: running.Outcome("finished")}, 1.0)
    assert {name: peer.glue["mine 0-shot"].median for name, peer in results.cells[0].peers.items()} == {
        "a": 50,
        "b": 50,
    }
    assert results.conditions["both"].peers["a"]["glue/mine 0-shot"].values == [50.0]
    assert not scored()[1], "what is done is not done again"
    plan, lines = scored(num_fewshot=1)
    assert [line[2].rpartition(".")[2] for line in lines] == ["lm_eval"]
    assert "mine 1-shot" in collecting.task_scores(trained.run, trained.run / "hf/b")

    job = queueing.submission(trained, plan.experiment, SlurmSettings(), 1, "{}", ["7"])
    (trained.run / "lm_eval/asked.json").unlink()
    script = job.scripts()["lm_eval"].replace("$PYTHON", "true")
    subprocess.run(["bash", "-c", script], check=True)
    assert list(job.scripts()) == ["pretrain", "lm_eval"] and running.is_done(trained, plan.experiment)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(
            ["--tasks", "hellaswg"],
            "'hellaswg' is no task of lm-evaluation-harness; did you mean 'hellaswag'?",
            marks=pytest.mark.nightly,  # reads all 14,000 of its task files, as the next one
        ),
        (["--tasks", "winogrande"], "winogrande needs {home}/rows/winogrande/validation.jsonl, which does"),
        pytest.param(
            ["--tasks", "ai2_arc", "--data_dir", "{home}"],
            "ai2_arc stands for arc_challenge, arc_easy; {home} has",
            marks=pytest.mark.nightly,
        ),
        (["--tasks", "lambada", "--data_dir", "{home}"], "lambada stands for lambada_openai, lambada_standard; {home}"),
        (["--tasks", "nowhere.yaml"], "--tasks: nowhere.yaml does not exist"),
        (["--tasks", "piqa,piqa"], "--tasks: piqa is named twice"),
        (["--tasks", "piqa", "--num_fewshot", "-1"], "--num_fewshot: -1 is below 0"),
        (["--tasks", "piqa", "--data_dir", "{home}/torn"], "piqa: its rows do not fit the task: "),
        (["--tasks", "piqa", "--model", "{home}/hf/bert"], "is no causal language model (BertForMaskedLM): it"),
        (["--tasks", "piqa", "--output_dir", "{home}/rows/piqa/validation.jsonl/x"], "cannot be made"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message(
    home: Path, monkeypatch: Any, capsys: Any, tmp_path: Path, words: list[str], said: str
) -> None:
    write_rows(home / "torn/piqa/validation.jsonl", [{"goal": "a", "sol1": "b"}])
    line = ["--model", home / "hf/gpt2", "--data_dir", home / "rows", "--output_dir", tmp_path / "out"]
    line += [word.format(home=home) for word in words]
    code, _, err = command(monkeypatch, capsys, "tools/run_lm_eval.py", *line)
    message = err.strip().splitlines()[-1]
    assert code == 2 and message.startswith("error: ") and said.format(home=home) in message, err
    assert not (tmp_path / "out").exists() and "Traceback" not in err


def test_the_command_prints_a_table(home: Path, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    line = ["--model", home / "hf/gpt2", "--data_dir", home / "rows", "--output_dir", tmp_path, "--tasks", "piqa"]
    code, out, err = command(monkeypatch, capsys, "tools/run_lm_eval.py", *line, "--max_eval_samples", 4)
    assert code == 0, err
    assert "piqa in part 0-shot  6     acc " in out and "scored on 4 of 6 dev rows" in out


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("tools/run_lm_eval.py", ["--model", "{home}/hf/gpt2", "--tasks", "piqa"]),
        ("tools/run_experiment.py", ["--experiment", "ds_configs/experiments/causal_baselines.yaml"]),
    ],
)
def test_without_the_extra_it_is_said(
    home: Path, monkeypatch: Any, capsys: Any, tmp_path: Path, script: str, words: list[str]
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    line = [word.format(home=home) for word in words]
    code, _, err = command(monkeypatch, capsys, script, *line, "--output_dir", tmp_path / "out")
    assert (code, err) == (2, "error: lm-evaluation-harness is not installed: pip install 'ctcd-ds[lm-eval]'\n")
    assert not (tmp_path / "out").exists()
