"""`launchers/pretrain.py` as its users meet it: dry runs, clear refusals, and real launches by `deepspeed`."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import ROOT, command, deepspeed, environment, forked_deepspeed, run
from ctcd_ds.cluster.scaling_table import COLUMNS
from ctcd_ds.plain import from_yaml
from runs import bert, chain_corpus, metrics

Pretrain = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain_corpus(tmp_path_factory.mktemp("corpus") / "chain")


@pytest.fixture
def good(corpus: Path) -> dict[str, Any]:
    return {
        "corpus": {"path": str(corpus), "sequence_length": 32},
        "peers": {
            "teacher": {"model": bert(48, 3), "soft": {"student": 1.0}},
            "student": {"model": bert(32, 2), "soft": {"teacher": 4.0}},
        },
        "training": {"global_batch_rows": 16, "steps": 6, "log_every": 2, "valid_every": 3},
    }


@pytest.fixture
def pretrain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Pretrain:
    """pretrain(recipe, extra arguments…, deepspeed={…}) in this process; the run would go to tmp_path/run."""

    def run(recipe: dict[str, Any], *extra: str, deepspeed: dict[str, Any] | None = None) -> tuple[int, str, str]:
        (tmp_path / "recipe.json").write_text(json.dumps(recipe))
        (tmp_path / "d.json").write_text(json.dumps(deepspeed or {"zero_optimization": {"stage": 2}}))
        files = ("--recipe", tmp_path / "recipe.json", "--deepspeed_config", tmp_path / "d.json")
        return command(monkeypatch, capsys, "launchers/pretrain.py", *files, "--output_dir", tmp_path / "run", *extra)

    return run


def test_a_dry_run_says_all_and_writes_nothing(pretrain: Pretrain, good: dict[str, Any], tmp_path: Path) -> None:
    code, out, _ = pretrain(good, "--dry_run", "--set", "peers.student.soft.teacher=2", "training.steps=100")
    assert code == 0
    for word in (
        "w/o embed.",
        "FLOPs/token",
        "distillation graph",
        "weight 2",
        "memory a rank",
        "16 rows = one rank × 16 rows",
        "rows of 32",
        "100 steps",
    ):
        assert word in out, word
    assert not (tmp_path / "run").exists()


CLUSTER = ("--nodes", "2", "--gpus_per_node", "4", "--link_gbps", "100")


def test_a_dry_run_for_a_cluster_says_how_a_step_scales(
    pretrain: Pretrain, good: dict[str, Any], tmp_path: Path
) -> None:
    """The batch divides by 4, 8 and 16 ranks; by 32 it does not, and that is said."""
    json_ = {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}}
    code, out, err = pretrain(good, "--dry_run", *CLUSTER, deepspeed=json_)
    assert code == 0, err
    assert "batch          16 rows = 8 ranks × 2 rows × 1 accumulation" in out
    assert "ZeRO 2, bf16" in out, "auto is what it will be on the GPUs, not on this machine"
    lines = [line for line in out.splitlines() if line.startswith("|")][2:]
    assert [line.split("|")[1].strip() for line in lines] == ["4", "8", "16"]
    assert "not on 32 GPUs: training.global_batch_rows = 16 is not divisible by 32 ranks" in out
    assert "what to change at 8 GPUs" in out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_for_one_gpu_needs_no_link_and_says_how_long_all_steps_take(
    pretrain: Pretrain, good: dict[str, Any]
) -> None:
    hours = {}
    for gpu in ("A100", "H100"):
        code, out, err = pretrain(good, "--dry_run", "--gpu", gpu, "--set", "training.steps=10000000000")
        assert code == 0 and "between nodes" not in out, err
        (line,) = [line for line in out.splitlines() if line.startswith("|")][2:]
        step_ms = float(dict(zip(COLUMNS, map(str.strip, line.strip("|").split("|")), strict=True))["step ms"])
        (said,) = re.findall(r"all 10,000,000,000 steps .*: (\d+) h (\d+) min on one GPU\n", out)
        hours[gpu] = int(said[0]) + int(said[1]) / 60
        assert hours[gpu] == pytest.approx(step_ms * 1e10 / 3.6e6, rel=0.05, abs=0.02)
    assert hours["H100"] < hours["A100"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (CLUSTER, "--nodes describes a cluster to a dry run: add --dry_run"),
        (("--dry_run", *CLUSTER[:4]), "--nodes 2 without --link_gbps: say how fast"),
        (("--gpu", "A100"), "--gpu describes a cluster to a dry run: add --dry_run"),
        (("--dry_run", "--nodes", "3", *CLUSTER[2:]), "16 is not divisible by 12 ranks"),
        (("--dry_run", *CLUSTER, "--gpu", "H10"), "did you mean 'H100'?"),
        (("--dry_run", *CLUSTER, "--mfu", "40"), "'40' is not a share from 0 to 1"),
        (("--dry_run", *CLUSTER[:4], "--link_gbps", "fast"), "'fast' is not a number above 0"),
        (("--dry_run", "--nodes", "0.5", *CLUSTER[2:]), "'0.5' is not a whole number from 1"),
    ],
)
def test_a_cluster_described_wrongly_is_one_message(
    pretrain: Pretrain, good: dict[str, Any], tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    code, out, err = pretrain(good, *options)
    assert code == 2 and said in err and "Traceback" not in out + err
    assert not (tmp_path / "run").exists()


RECIPES = sorted((ROOT / "ds_configs" / "recipes").glob("*.yaml"))
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_good(
    path: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if "task: span" in path.read_text():
        corpus = chain_corpus(tmp_path / "with sentinels", sentinels=100)
    changes = [f"corpus.path={corpus}"]
    if sources := from_yaml(path.read_text())["corpus"].get("sources"):
        made = {name: chain_corpus(tmp_path / name, documents=300 + k) for k, name in enumerate(sources)}
        changes = [f"corpus.sources.{name}.path={place}" for name, place in made.items()]
    if "task: span" in path.read_text() or "train_rows" in path.read_text():
        changes = [f"corpus.path={chain_corpus(tmp_path / 'large', sentinels=32, documents=1200)}"]
    if "pretrained: " in path.read_text():
        from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

        BertForMaskedLM(BertConfig(hidden_size=24, num_attention_heads=12, intermediate_size=16)).save_pretrained(
            tmp_path / "finished"
        )
        AutoTokenizer.from_pretrained(corpus / "tokenizer").save_pretrained(tmp_path / "finished")
        changes.append(f"peers.teacher.pretrained={tmp_path / 'finished'}")
    files = ("--recipe", path, "--deepspeed_config", ROOT / "ds_configs" / "cpu.json", "--output_dir", tmp_path / "run")
    code, out, err = command(monkeypatch, capsys, "launchers/pretrain.py", *files, "--dry_run", "--set", *changes)
    assert code == 0, err
    assert "distillation graph" in out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_deepspeed_config_is_good(path: Path, good: dict[str, Any]) -> None:
    from ctcd_ds.recipe.sections import Recipe
    from ctcd_ds.training.deepspeed_config import read_config, resolve

    for world in (1, 8):
        found, mistakes = resolve(read_config(path), Recipe.model_validate(good), world, "cuda", Path("RUN"))
        assert found is not None and not mistakes
        assert found.precision in (path.stem.split("_")[-1], "fp32")


def with_change(recipe: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = json.loads(json.dumps(recipe))
    *sections, key = path.split(".")
    place = changed
    for section in sections:
        place = place.setdefault(section, {})
    place[key] = value
    return changed


@pytest.mark.parametrize(
    ("change", "value", "said"),
    [
        ("corpus.path", "/no/such/corpus", "no such file or directory"),
        ("corpus.sequence_length", 128, "less than corpus.sequence_length = 128"),
        ("corpus.sequence_length", 100_000, "takes 99998"),
        ("peers.teacher.model.num_attention_heads", 5, "does not divide hidden_size = 48"),
        ("peers.teacher.model.hiden_size", 5, "did you mean 'hidden_size'?"),
        ("peers.teacher.model.model_type", "brt", "did you mean 'bert'?"),
        ("peers.teacher.soft.studnt", 1.0, "did you mean 'student'?"),
        ("peers.teacher.soft.teacher", 1.0, "does not learn from itself"),
        ("peers.teacher.soft.student", -1.0, "greater than or equal to 0"),
        ("peers.teacher.frozen", True, "a frozen peer learns nothing"),
        ("trainning", {}, "did you mean 'training'?"),
        ("training.global_batch_rows", 100_000, None),
        ("objective.task", "cml", "must be 'mlm', 'clm' or 'span'"),
    ],
)
def test_a_mistake_is_one_message_exit_2_and_leaves_nothing(
    pretrain: Pretrain, good: dict[str, Any], tmp_path: Path, change: str, value: Any, said: str | None
) -> None:
    recipe = with_change(good, change, value)
    if said is None:  # epochs too short for one batch
        recipe["training"] |= {"epochs": 0.5}
        del recipe["training"]["steps"]
        said = "less than one batch of 100000"
    code, out, err = pretrain(recipe)
    assert code == 2
    assert said in err and "Traceback" not in err + out
    assert not (tmp_path / "run").exists()


def test_mistakes_in_recipe_corpus_and_json_come_together(pretrain: Pretrain, good: dict[str, Any]) -> None:
    recipe = with_change(good, "peers.teacher.model.num_attention_heads", 5)
    recipe = with_change(recipe, "peers.student.model.max_position_embeddings", 8)
    code, _, err = pretrain(recipe, deepspeed={"train_batch_size": 7, "zero_optimization": {"stage": 3}})
    assert code == 2 and "4 mistakes" in err
    for word in ("train_batch_size = 7", "global_batch_rows = 16", "stage 3", "peers.teacher.model", "peers.student"):
        assert word in err


def test_a_pretrained_peer_with_another_tokenizer_is_refused(
    pretrain: Pretrain, good: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = json.loads((corpus / "tokenizer" / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["w7"], words["w8"] = words["w8"], words["w7"]
    AutoConfig.for_model("bert").save_pretrained(tmp_path / "finished")
    AutoTokenizer.from_pretrained(corpus / "tokenizer").save_pretrained(tmp_path / "finished")
    (tmp_path / "finished" / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = with_change(good, "peers.teacher", {"pretrained": str(tmp_path / "finished"), "frozen": True})
    code, _, err = pretrain(recipe)
    assert code == 2 and "its tokenizer has 'w8' as token 7, the corpus's has 'w7'" in err
    recipe = with_change(good, "peers.teacher", {"pretrained": str(tmp_path / "nowhere"), "frozen": True})
    code, _, err = pretrain(recipe)
    assert code == 2 and err.count("nowhere'") == 1 and "no such file or directory" in err, "the hub is not spoken of"
    recipe = with_change(good, "peers.teacher", {"pretrained": "runs/nowhere", "frozen": True})
    code, _, err = pretrain(recipe)
    assert code == 2 and "peers.teacher.pretrained = 'runs/nowhere': no model of the hub, and here no such file" in err


def test_a_directory_that_holds_something_is_not_touched(
    pretrain: Pretrain, good: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("dear")
    code, _, err = pretrain(good)
    assert code == 2 and "holds other files" in err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_link_to_nowhere_in_place_of_the_checkpoints_is_named(
    pretrain: Pretrain, good: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch")
    code, _, err = pretrain(good)
    assert code == 2 and f"points to {tmp_path / 'scratch'}, which is no directory" in err


def test_a_run_that_compiles_nothing_never_loads_the_compiler(good: dict[str, Any], tmp_path: Path) -> None:
    """Two libraries would load it at every start, for nothing: a third of the start's time."""
    (tmp_path / "recipe.json").write_text(json.dumps(good))
    (tmp_path / "d.json").write_text('{"zero_optimization": {"stage": 2}}')
    (tmp_path / "start.py").write_text(
        "import runpy, sys\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'launchers' / 'pretrain.py')!r}, run_name='__main__')\n"
        "finally:\n"
        "    print('with' if 'torch._inductor.compile_fx' in sys.modules else 'without', 'a compiler')\n"
    )
    files = ("--recipe", tmp_path / "recipe.json", "--deepspeed_config", tmp_path / "d.json")
    done = run(str(tmp_path / "start.py"), *files, "--output_dir", tmp_path / "run")
    assert "finished: 6 steps" in done.stdout and done.stdout.endswith("without a compiler\n"), done.stderr


def test_a_taken_port_is_a_message_with_what_to_write(good: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(good))
    files = ("--recipe", tmp_path / "recipe.json", "--deepspeed_config", "ds_configs/cpu.json")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ranks = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
        port = other.getsockname()[1]
        line = ("launchers/pretrain.py", *files, "--output_dir", tmp_path / "run")
        done = run(*line, **ranks, MASTER_PORT=port, CROSS_SIZE=1)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"port {port} of 127.0.0.1 is taken" in done.stderr and "deepspeed --master_port" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_in_a_bare_and_awkward_place(good: dict[str, Any], tmp_path: Path) -> None:
    """No git, a terminal without UTF-8, signs in the path, checkpoints on another disk, and nothing to resume."""
    place, scratch, bare = tmp_path / "50%d of it" / "größer %s", tmp_path / "scratch", tmp_path / "bin"
    for folder in (place, scratch, bare):
        folder.mkdir(parents=True)
    (place / "checkpoints").symlink_to(scratch)
    (tmp_path / "recipe.json").write_text(json.dumps(with_change(good, "training.steps", 2)))
    files = ("--recipe", tmp_path / "recipe.json", "--deepspeed_config", ROOT / "ds_configs" / "cpu.json")
    line = [sys.executable, ROOT / "launchers" / "pretrain.py", *files, "--output_dir", place, "--resume"]
    (bare / "python").symlink_to(sys.executable)
    for tool in ("c++", "g++", "ninja", "sh", "which", "ldconfig", "gcc", "as", "ld"):
        if found := shutil.which(tool, path=environment()["PATH"]):
            (bare / tool).symlink_to(found)
    bare_place = environment() | {"PATH": str(bare), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([str(word) for word in line], env=bare_place, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no such file or directory; this run begins at step 0" in done.stdout
    assert "?" in done.stdout and "next: ctcd export --checkpoint" in done.stdout
    assert re.search(r"finished: 2 steps in [\d.]+ s, .*\n  teacher: held-out loss \d\.\d{3} nats", done.stdout)
    assert json.loads((place / "environment.json").read_text())["git_commit"] is None
    assert [path.name for path in sorted(scratch.iterdir())] == ["latest", "step-00000002"]
    assert json.loads((place / "exit.json").read_text())["state"] == "finished" and not (place / ".owner").exists()


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run on 2 ranks, started by the deepspeed launcher."""
    folder = tmp_path_factory.mktemp("launched")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
corpus: {{path: {corpus}, sequence_length: 32}}
peers:
  teacher: {{model: {json.dumps(bert(48, 3))}, soft: {{student: 1.0}}}}
  student: {{model: {json.dumps(bert(32, 2))}, soft: {{teacher: 4.0}}}}
training: {{global_batch_rows: 16, steps: 6, log_every: 2, valid_every: 3, checkpoint_every: 2, keep_checkpoints: 2}}
"""
    )
    done = launch(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


def launch(folder: Path, *extra: str, out: str = "run", deepspeed: Callable[..., Any] = deepspeed) -> Any:
    files = (
        "--recipe",
        folder / "recipe.yaml",
        "--deepspeed_config",
        "ds_configs/cpu.json",
        "--output_dir",
        folder / out,
    )
    return deepspeed(2, "--quiet", "launchers/pretrain.py", *files, *extra)


def test_a_run_leaves_what_the_contract_says(finished: Path) -> None:
    run = finished / "run"
    names = {path.name for path in run.iterdir()}
    assert names >= {"recipe.yaml", "ds_config.json", "environment.json", "metrics.jsonl", "exit.json", "summary.json"}
    assert json.loads((run / "exit.json").read_text())["state"] == "finished"
    assert json.loads((run / "environment.json").read_text())["threads_per_rank"] >= 1
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-00000004", "step-00000006"]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-00000006"
    assert list((run / "tensorboard").glob("events.*"))
    rows = metrics(run)
    assert sorted(rows) == [1, 2, 3, 4, 6]
    wanted = {"step", "consumed_rows", "tokens", "rows_per_s", "tokens_per_s", "mfu", "lr/teacher", "grad_norm/student"}
    assert rows[6].keys() >= wanted | {"loss/teacher/hard", "loss/student/soft/teacher", "valid/teacher/loss"}
    assert rows[6]["consumed_rows"] == 96 and rows[6]["tokens"] == 96 * 32
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["valid/student/loss"] == rows[6]["valid/student/loss"]


def test_the_console_has_our_lines_only_and_the_logs_have_the_rest(finished: Path) -> None:
    said = (finished / "stdout").read_text().splitlines()
    assert said[0].startswith("peer ") and said[-1].startswith("next: ctcd export")
    plan_ends = next(number for number, line in enumerate(said) if line.startswith("ranks "))
    assert said[plan_ends + 1].startswith("finished: 6 steps in "), "nothing of a library's between plan and end"
    progress = [line for line in (finished / "stderr").read_text().splitlines() if line]
    assert all("/6 [" in line for line in progress) and "6/6" in progress[-1], "one bar, and nothing else"
    logs = [(finished / "run" / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    assert all("FutureWarning" in log and "built successfully" in log for log in logs)


def test_tensorboard_has_the_losses(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "run" / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("Hard loss/teacher")}
    expected = {step: row["loss/teacher/hard"] for step, row in metrics(finished / "run").items()}
    assert found == pytest.approx(expected)


def test_a_finished_run_is_not_run_again(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    files = ("--recipe", finished / "recipe.yaml", "--deepspeed_config", "ds_configs/cpu.json")
    line = ("launchers/pretrain.py", *files, "--output_dir", finished / "run")
    monkeypatch.chdir(ROOT)
    before = (finished / "run" / "metrics.jsonl").read_bytes()
    code, _, err = command(monkeypatch, capsys, *line)
    assert code == 2 and "holds a run already" in err
    code, out, _ = command(monkeypatch, capsys, *line, "--resume")
    assert code == 0 and "finished already" in out
    code, _, err = command(monkeypatch, capsys, *line, "--resume", "--set", "optimizer.lr=1e-3", "training.log_every=1")
    assert code == 2 and "optimizer.lr: the run has 0.0005, now 0.001" in err and "log_every" not in err
    assert (finished / "run" / "metrics.jsonl").read_bytes() == before


def test_under_the_launcher_a_mistake_is_said_once_with_exit_code_2(finished: Path) -> None:
    done = launch(finished, "--set", "peers.student.soft.techer=4", out="never", deepspeed=forked_deepspeed)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("did you mean 'teacher'?") == 1
    assert not (finished / "never").exists()


def test_export_writes_models_that_load_and_agree(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from ctcd_ds.training.loading import consolidated

    line = ("tools/export_hf.py", "--checkpoint", finished / "run", "--output_dir", finished / "hf")
    code, out, err = command(monkeypatch, capsys, *line)
    assert code == 0, err
    assert out.count("logits agree") == 2
    (following,) = re.findall(r"^next: ctcd (glue .*)", out, re.MULTILINE)
    assert f"{finished / 'hf' / 'teacher'} {finished / 'hf' / 'student'}" in following
    weights = consolidated(finished / "run" / "checkpoints" / "step-00000006")
    for name in ("teacher", "student"):
        model = AutoModelForMaskedLM.from_pretrained(finished / "hf" / name)
        assert model.config.architectures == ["BertForMaskedLM"] and model.config.vocab_size == 300
        key = "bert.encoder.layer.0.attention.self.query.weight"
        assert torch.equal(model.state_dict()[key], weights[name][key])
        assert len(AutoTokenizer.from_pretrained(finished / "hf" / name)) == 300
        card = (finished / "hf" / name / "README.md").read_text()
        assert "library_name: transformers" in card and "soft loss from" in card and "sequence_length: 32" in card
    assert not list(finished.glob(".*"))
    code, _, err = command(monkeypatch, capsys, *line)
    assert code == 2 and "is not empty" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--checkpoint", "run", "--peer", "techer"), "did you mean 'teacher'?"),
        (("--checkpoint", "nowhere"), "neither a run nor one of its checkpoints: no such file or directory"),
    ],
)
def test_an_export_that_cannot_be_is_refused(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(finished)
    code, _, err = command(monkeypatch, capsys, "tools/export_hf.py", *arguments, "--output_dir", "other")
    assert code == 2 and said in err
    assert not (finished / "other").exists()


def test_one_checkpoint_and_one_peer_are_exported_without_the_corpus(
    finished: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    checkpoint = finished / "run" / "checkpoints" / "step-00000004"
    line = ("tools/export_hf.py", "--checkpoint", checkpoint, "--peer", "student", "--output_dir", tmp_path / "student")
    away = corpus.rename(corpus.with_name("away"))
    try:
        code, _, err = command(monkeypatch, capsys, *line)
    finally:
        away.rename(corpus)
    assert code == 0, err
    assert (tmp_path / "student" / "model.safetensors").exists()


def test_a_damaged_checkpoint_is_not_exported(finished: Path, tmp_path: Path) -> None:
    import shutil

    from ctcd_ds.cli import UserError
    from ctcd_ds.export.hf import export

    shutil.copytree(finished / "run", tmp_path / "run")
    victim = tmp_path / "run" / "checkpoints" / "step-00000006" / "deepspeed" / "mp_rank_00_model_states.pt"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        export(tmp_path / "run" / "checkpoints" / "step-00000006", "all", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    export(tmp_path / "run", "student", tmp_path / "hf")  # the run itself still has an older good one
    assert "\n4 steps of 6" in (tmp_path / "hf" / "README.md").read_text()
