"""Experiments: every shipped one builds, mistakes are named before anything starts, failures stay with their cell."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from commands import ROOT, command, run
from ctcd_ds.experiments.collecting import outcome
from ctcd_ds.experiments.experiment import with_data
from ctcd_ds.experiments.grid import CellPlan, expand
from ctcd_ds.experiments.planning import PlannedCell, plan_cells
from ctcd_ds.experiments.results import PeerResult, read_results, write_results
from ctcd_ds.experiments.running import failure_message, places
from ctcd_ds.experiments.specification import base_recipe, load_experiment, only
from ctcd_ds.recipe.schema import Mistakes
from runs import bert, chain_corpus

SHIPPED = sorted((ROOT / "ds_configs" / "experiments").glob("*.yaml"))
RECIPE: dict[str, Any] = {
    "corpus": {"path": "", "sequence_length": 32},
    "peers": {
        "teacher": {"model": bert(32, 2), "soft": {"student": 1.0}},
        "student": {"model": bert(16, 1), "soft": {"teacher": 4.0}},
    },
    "optimizer": {"lr": 1e-3},
    "training": {"global_batch_rows": 8, "steps": 6},
}
EXPERIMENT: dict[str, Any] = {
    "question": "Does it run?",
    "recipe": "recipe.json",
    "deepspeed_config": str(ROOT / "ds_configs" / "cpu.json"),
    "ranks": 1,
    "seeds": [1],
    "cells": {
        "alone": {"set": {"peers.student": None, "peers.teacher.soft": None}},
        "frozen": {"set": {"peers.teacher": {"pretrained": {"cell": "alone", "peer": "teacher"}, "frozen": True}}},
        "ctcd": {"grid": {"weight": {"key": "peers.student.soft.teacher", "values": [0, 4]}}},
    },
    "compare": [{"peer": "teacher", "against": "alone"}],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain_corpus(tmp_path_factory.mktemp("experiments") / "corpus")


@pytest.fixture(scope="module")
def large_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many rows as the experiments of little text ask for in their grids."""
    return chain_corpus(tmp_path_factory.mktemp("large") / "corpus", documents=1700, sentinels=16)


def written(folder: Path, corpus: Path, **changes: Any) -> Path:
    """An experiment file with its base recipe beside it; `changes` are laid over, dotted keys inside."""
    experiment = copy.deepcopy(EXPERIMENT)
    for key, value in changes.items():
        experiment[key] = value
    recipe = {**RECIPE, "corpus": {**RECIPE["corpus"], "path": str(corpus)}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "experiment.json").write_text(json.dumps(experiment))
    return folder / "experiment.json"


def cells_of(path: Path, size: str = "full", overrides: tuple[str, ...] = ()) -> list[CellPlan]:
    experiment = load_experiment(path, size)
    return expand(experiment, base_recipe(experiment, overrides), path.parent / "out")


def planned_of(path: Path, size: str = "full", overrides: tuple[str, ...] = ()) -> list[PlannedCell]:
    experiment = load_experiment(path, size)
    cells = expand(experiment, base_recipe(experiment, overrides), path.parent / "out")
    return plan_cells(experiment, cells, path.parent / "out", 1, "cpu")


# --- what is shipped -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["full", "tiny"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_experiment_builds(path: Path, size: str, tmp_path: Path, large_corpus: Path) -> None:
    """All cells' recipes, models and costs; at least three seeds, and a question that stands in the report."""
    experiment = load_experiment(path, size)
    seeds = experiment.seeds[:1]
    one_seed = experiment.model_copy(update={"seeds": seeds, "deepspeed_config": str(ROOT / "ds_configs" / "cpu.json")})
    given = [f"corpus.path={large_corpus}"]
    given += ["corpus.train_rows=900"] if "corpus.train_rows" in experiment.set else []  # a GPU's share is more
    cells = expand(one_seed, base_recipe(one_seed, given), tmp_path)
    planned = plan_cells(one_seed, cells, tmp_path, 1, "cpu")
    assert len(planned) == len(cells) and all(cell.steps >= 1 and cell.flops > 0 for cell in planned)
    assert len(experiment.seeds) >= (2 if size == "tiny" else 3)
    assert experiment.question.endswith("?") and experiment.compare
    small = size == "tiny" or path.stem in ("paper_cpu", "regime", "regime_masked", "signals")
    assert bool(experiment.note) == small, "results of a small size say so"
    if size == "tiny":
        assert (experiment.ranks, experiment.demo_data) == (1, True)


def test_the_experiments_of_the_plan_are_shipped() -> None:
    names = {path.stem for path in SHIPPED}
    assert names == {
        *("baselines", "weights", "length", "size_ratio", "negative_transfer", "community", "augmentation", "paper"),
        *("paper_cpu", "regime", "regime_masked", "regime_bert", "causal_baselines", "cross_architecture", "signals"),
    }


# --- the grid ------------------------------------------------------------------------------------------


def test_a_cell_is_a_point_of_the_grid_with_a_seed(tmp_path: Path, corpus: Path) -> None:
    cells = {cell.name: cell for cell in cells_of(written(tmp_path, corpus, seeds=[1, 7]))}
    assert list(cells) == [
        *("alone-seed-1", "alone-seed-7", "frozen-seed-1", "frozen-seed-7"),
        *("ctcd-weight-0-seed-1", "ctcd-weight-0-seed-7", "ctcd-weight-4-seed-1", "ctcd-weight-4-seed-7"),
    ]
    assert cells["ctcd-weight-4-seed-7"].recipe["peers"]["student"]["soft"] == {"teacher": 4}
    assert cells["ctcd-weight-4-seed-7"].recipe["seed"] == 7
    assert list(cells["alone-seed-1"].recipe["peers"]) == ["teacher"]
    frozen = cells["frozen-seed-7"]
    assert frozen.needs == ("alone-seed-7",) and frozen.sources == {"teacher": ("alone-seed-7", "teacher")}
    assert frozen.recipe["peers"]["teacher"]["pretrained"].endswith("out/cells/alone-seed-7/hf/teacher")


def test_a_grid_of_pairs_serves_each_of_their_models_alone(tmp_path: Path, corpus: Path) -> None:
    """A peer that is taken away stays away whatever the grid sets there; a model in several pairs is trained once."""
    layers = {f"{t}:{s}": {f"peers.{peer}.model.num_hidden_layers": n for peer, n in (("teacher", t), ("student", s))}
              for t, s in ((3, 1), (3, 2))}  # fmt: skip
    grid = {"grid": {"layers": {"points": layers}}}
    alone = {"set": {"peers.student": None, "peers.teacher.soft": None}, **grid}
    path = written(tmp_path, corpus, cells={"alone": alone, "pairs": grid})
    cells = {cell.name: cell for cell in planned_of(path)}
    assert [cell.recipe["peers"].keys() for cell in cells_of(path)][:2] == [{"teacher"}, {"teacher"}]
    assert cells["alone-layers-3-2-seed-1"].owner == "alone-layers-3-1-seed-1"
    assert cells["pairs-layers-3-2-seed-1"].owner == "pairs-layers-3-2-seed-1"
    useless = {**alone, "grid": {"weight": {"key": "peers.student.soft.teacher", "values": [1, 4]}}}
    with pytest.raises(Mistakes, match="sets only what this cell takes away: peers"):
        cells_of(written(tmp_path, corpus, cells={"alone": useless, "pairs": grid}))
    edges = {"set": {"peers.student.soft": None}, "grid": useless["grid"]}  # away with all edges, then one
    first = cells_of(written(tmp_path, corpus, cells={"edges": edges}, compare=[]))[0]
    assert first.recipe["peers"]["student"]["soft"] == {"teacher": 1}


def test_cells_that_others_need_come_first_and_equal_recipes_share_a_run(tmp_path: Path, corpus: Path) -> None:
    groups = {
        "frozen": EXPERIMENT["cells"]["frozen"],
        "alone": EXPERIMENT["cells"]["alone"],
        "apart": {"set": {"peers.teacher.soft": None, "peers.student.soft": None}},
        "zero": {"set": {"peers.teacher.soft.student": 0, "peers.student.soft.teacher": 0}},
    }
    groups["again"] = {**groups["alone"]}
    finished = {"pretrained": {"cell": "again", "peer": "teacher"}, "frozen": True}
    groups["frozen_again"] = {"set": {"peers.teacher": finished}}
    planned = {cell.name: cell for cell in planned_of(written(tmp_path, corpus, cells=groups, compare=[]))}
    assert list(planned).index("alone-seed-1") < list(planned).index("frozen-seed-1")
    assert planned["zero-seed-1"].owner == "apart-seed-1" and planned["zero-seed-1"].run == planned["apart-seed-1"].run
    assert planned["again-seed-1"].owner == "alone-seed-1" and planned["frozen_again-seed-1"].owner == "frozen-seed-1"
    assert planned["frozen-seed-1"].peers["teacher"].parameters == planned["alone-seed-1"].peers["teacher"].parameters


def test_a_student_of_a_finished_teachers_layers_is_planned_and_named_where_it_cannot_be(
    tmp_path: Path, corpus: Path
) -> None:
    layers = {"init_from": {"peer": "teacher", "layers": [1]}, "soft": {"teacher": 4.0}}
    frozen = EXPERIMENT["cells"]["frozen"]["set"]
    groups = {
        "alone": EXPERIMENT["cells"]["alone"],
        "layers": {"set": {**frozen, "peers.student": layers}},
    }
    planned = {cell.name: cell for cell in planned_of(written(tmp_path, corpus, cells=groups, compare=[]))}
    peers = planned["layers-seed-1"].peers
    assert peers["student"].layers == 1 and peers["student"].hidden_size == peers["teacher"].hidden_size == 32
    finished = {"pretrained": {"cell": "layers", "peer": "student"}, "frozen": True}
    groups["after"] = {"set": {"peers.teacher": finished}}
    (tmp_path / "again").mkdir()
    with pytest.raises(Mistakes, match="layers-seed-1's student begins as layers of another peer of its own run"):
        planned_of(written(tmp_path / "again", corpus, cells=groups, compare=[]))


def test_equal_compute_counts_what_a_cell_needs(tmp_path: Path, corpus: Path) -> None:
    groups = {**EXPERIMENT["cells"], "equal": {**EXPERIMENT["cells"]["frozen"], "compute_of": "goal"}, "goal": {}}
    path = written(tmp_path, corpus, cells=groups)
    planned = {cell.name: cell for cell in planned_of(path, overrides=("training.steps=2000",))}
    goal, equal, alone = (planned[f"{name}-seed-1"] for name in ("goal", "equal", "alone"))
    per_step = equal.flops / equal.steps
    assert equal.total_flops == pytest.approx(alone.flops + equal.flops)
    assert 0 <= goal.total_flops - equal.total_flops < per_step
    assert equal.recipe.training.steps == equal.steps != 2000
    with pytest.raises(Mistakes, match="what this cell needs costs as much already"):
        planned_of(
            written(
                tmp_path, corpus, cells={**groups, "goal": {"set": {"peers.teacher": None, "peers.student.soft": None}}}
            )
        )


def test_a_size_is_laid_over_the_rest(tmp_path: Path, corpus: Path) -> None:
    tiny = {
        "seeds": [5],
        "note": "small",
        "set": {"training.steps": 2},
        "cells": {"frozen": None, "ctcd": {"grid": None}},
    }
    path = written(tmp_path, corpus, tiny=tiny)
    assert [cell.name for cell in cells_of(path, "tiny")] == ["alone-seed-5", "ctcd-seed-5"]
    assert {cell.recipe["training"]["steps"] for cell in cells_of(path, "tiny")} == {2}
    assert {cell.recipe["training"]["steps"] for cell in cells_of(path)} == {6}


def test_some_cells_come_with_what_they_need_and_the_comparisons_among_them(tmp_path: Path, corpus: Path) -> None:
    experiment = load_experiment(written(tmp_path, corpus))
    some = only(experiment, ["frozen"])
    assert list(some.cells) == ["alone", "frozen"] and [c.cells for c in some.compare] == [["alone", "frozen"]]
    assert not only(experiment, ["ctcd"]).compare, "what they were held against is not there"
    with pytest.raises(Mistakes, match="--cells frzen: did you mean 'frozen'"):
        only(experiment, ["ctcd", "frzen"])


# --- mistakes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qestion": "?"}, "qestion = '?': unknown key; did you mean 'question'?"),
        ({"seeds": []}, "seeds = []"),
        ({"seeds": [1, 1]}, "one is there twice"),
        ({"cells": {"a": {"gird": {}}}}, "cells.a.gird = {}: unknown key; did you mean 'grid'?"),
        ({"cells": {"a": {"grid": {"w": {"key": "seed", "values": []}}}}}, "cells.a.grid.w: give key and values, or"),
        ({"cells": {"a": {"needs": "b"}}}, "cells.a needs 'b': no other cell has this name"),
        ({"cells": {"a": {"needs": "b"}, "b": {"needs": ["a"]}}}, "need each other in a circle"),
        ({"compare": [{"peer": "teacher", "against": "alon"}]}, "compare.0.against = 'alon': no cell has this name"),
        ({"lm_eval": {"tasks": "piqa", "num_fewshot": -1}}, "lm_eval.num_fewshot = -1"),
        ({"lm_eval": {"tasks": "piqa"}}, "lm_eval: the harness asks causal language models, and alone-seed-1 has"),
        ({"lm_eval": {"tasks": "no.yaml"}, "set": {"objective.task": "clm"}}, "/no.yaml does not exist"),
        (
            {"cells": {"a": {}, "b": {"set": {"peers.teacher.pretrained": {"cell": "a", "peer": "s"}}}}, "compare": []},
            "a-seed-1 has no peer 's'",
        ),
        (
            {"cells": {"a": {"grid": {"w": {"points": {"x/y": {"seed": 1}, "x y": {"seed": 2}}}}}}, "compare": []},
            "a/w=x/y and a/w=x y would be one folder",
        ),
        ({"cells": {"a": {}, "A": {}}, "compare": []}, "cells: a and A would be one folder"),
        ({"cells": {**EXPERIMENT["cells"], "b": {"needs": "ctcd"}}}, "no single condition belongs to b"),
        ({"cells": {"alone": {"set": {"training.stepz": 3}}}}, "did you mean 'steps'?"),
        ({"cells": {"alone": {"set": {"peers.student.soft.techer": 3}}}}, "did you mean 'teacher'?"),
        ({"cells": {"alone": {"set": {"peers.student.model.hiden_size": 3}}}}, "did you mean 'hidden_size'?"),
    ],
)  # fmt: skip
def test_each_mistake_is_named_and_nothing_is_started(
    changes: dict[str, Any], said: str, tmp_path: Path, corpus: Path, monkeypatch: Any, capsys: Any
) -> None:
    path = written(tmp_path, corpus, **changes)
    arguments = ("--experiment", path, "--output_dir", tmp_path / "out")
    code, _, error = command(monkeypatch, capsys, "tools/run_experiment.py", *arguments)
    assert code == 2 and said in error and "Traceback" not in error, error
    assert not (tmp_path / "out").exists()


def test_sizes_seeds_and_directories_are_checked(tmp_path: Path, corpus: Path, monkeypatch: Any, capsys: Any) -> None:
    path = written(tmp_path, corpus)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    for options, said in (
        (("--size", "tini"), "--size tini: allowed: full"),
        (("--seeds", "1,x"), "no comma-separated list"),
        (("--max_parallel", "0"), "is not a whole number from 1"),
        (("--set", "training.steps"), "write key=value"),
        (("--output_dir", tmp_path / "full"), "holds other files"),
        (("--experiment", tmp_path / "no.yaml"), "no such file"),
    ):
        given = {"--experiment": path, "--output_dir": tmp_path / "out"} | {options[0]: options[1]}
        words = [word for pair in given.items() for word in pair]
        code, _, error = command(monkeypatch, capsys, "tools/run_experiment.py", *words)
        assert code == 2 and said in error, error


def test_places_share_out_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [p["OMP_NUM_THREADS"] for p in places(1, None, gpus=0, cores=4)] == ["1"] * 4
    assert [p["OMP_NUM_THREADS"] for p in places(1, 2, gpus=0, cores=4)] == ["2"] * 2
    assert len(places(2, None, gpus=0, cores=4)) == 1
    assert [p["CUDA_VISIBLE_DEVICES"] for p in places(1, 3, gpus=2, cores=4)] == ["0", "1", "0"]
    assert all("CUDA_VISIBLE_DEVICES" not in p for p in places(None, None, gpus=8, cores=4))


def test_demo_data_gives_way_to_a_corpus_of_ones_own(tmp_path: Path) -> None:
    baselines = load_experiment(ROOT / "ds_configs" / "experiments" / "baselines.yaml", "tiny")
    ours, overrides = with_data(baselines, tmp_path, [], None)
    assert overrides == [f"corpus.path={tmp_path / 'corpus'}"] and ours.demo_data
    assert ours.glue is not None and ours.glue.data_dir == str(tmp_path / "glue")
    theirs, overrides = with_data(baselines, tmp_path, ["corpus.path=mine"], None)
    assert overrides == ["corpus.path=mine"] and not theirs.demo_data and theirs.glue is None
    scored, _ = with_data(baselines, tmp_path, ["corpus.path=mine"], "glue_data")
    assert scored.glue is not None and scored.glue.data_dir == str(Path("glue_data").resolve())


def test_a_run_with_several_looks_at_the_held_out_rows_has_a_lowest_one(tmp_path: Path) -> None:
    for name, losses in (("several", [3.0, 2.5, 2.0, 2.25]), ("few", [3.0, 2.0])):
        rows = [{"step": 10 * n, "loss/a/hard": 1.0, "valid/a/loss": loss} for n, loss in enumerate(losses, 1)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (tmp_path / name / "summary.json").write_text(json.dumps({"valid/a/loss": losses[-1]}))
    known = {"a": PeerResult()}
    several, few = (outcome(tmp_path / name, known, tmp_path)["peers"]["a"] for name in ("several", "few"))
    assert (several.valid_loss, several.lowest_loss) == (2.25, 2.0)
    assert (few.valid_loss, few.lowest_loss) == (2.0, None)


def test_the_last_words_of_a_log_are_its_error() -> None:
    assert failure_message("a\nerror: two mistakes\n  - one\n  - two\n") == "error: two mistakes - one - two"
    assert failure_message("\r 0% [?step/s]failed: step 2: nan\n\r 17% [6step/s]\n") == "failed: step 2: nan"
    assert (
        failure_message("Traceback\n  x\nValueError: no\n\n") == "ValueError: no"
        and failure_message("") == "it said nothing"
    )


# --- a real one ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Path, list[subprocess.CompletedProcess[str]]]:
    """Four cells with exports and GLUE: one diverges, one needs that one; run, and run again with --resume."""
    folder = tmp_path_factory.mktemp("real")
    task = folder / "glue" / "RTE"
    task.mkdir(parents=True)
    for split, first in (("train", 5), ("dev", 15)):
        rows = [f"{n}\tw{n + first} w6 w7\tw8 w{n + 9}\t{('entailment', 'not_entailment')[n % 2]}" for n in range(8)]
        (task / f"{split}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    frozen = {"peers.teacher": {"pretrained": {"cell": "alone", "peer": "teacher"}, "frozen": True}}
    cells = {
        "alone": EXPERIMENT["cells"]["alone"],
        "frozen": {"set": frozen},
        "diverging": {"set": {"optimizer.lr": 1e30, "schedule.warmup_fraction": 0.0, "optimizer.max_grad_norm": 0}},
        "after": {"needs": "diverging"},
    }
    glue = {"tasks": "rte", "data_dir": str(folder / "glue"), "epochs": 1.0}
    path = written(folder, corpus, cells=cells, glue=glue)
    line = ["tools/run_experiment.py", "--experiment", path, "--output_dir", folder / "out"]
    done = [run(*line, *more) for more in ([], [], ["--resume"])]
    return folder / "out", done


@pytest.mark.timeout(1200)  # three experiments
def test_a_failing_cell_is_shown_and_the_others_go_on(real: tuple[Path, list[Any]]) -> None:
    out, (first, again, _) = real
    assert first.returncode == 1, first.stdout + first.stderr
    assert again.returncode == 2 and "holds an experiment already" in again.stderr
    cells = {cell.condition: cell for cell in read_results(out).cells}
    assert {name: cell.state for name, cell in cells.items()} == {
        **{"alone": "finished", "frozen": "finished"},
        **{"diverging": "failed", "after": "waiting"},
    }
    assert "pretrain ended with 1" in cells["diverging"].reason and "loss/" in cells["diverging"].reason
    assert "diverging" in cells["after"].reason and cells["diverging"].reason in first.stdout


def test_a_cell_gives_losses_scores_exports_and_costs(real: tuple[Path, list[Any]]) -> None:
    out, _ = real
    results = read_results(out)
    cells = {cell.condition: cell for cell in results.cells}
    for name, peers in (("alone", ["teacher"]), ("frozen", ["student"])):
        for peer in peers:
            found = cells[name].peers[peer]
            assert found.valid_loss is not None and 0 < found.valid_loss < 10
            assert 0 <= found.glue["rte stand-in"].median <= 100 and list(found.glue["rte stand-in"].seeds) == ["1"]
            assert found.export is not None and (out / found.export / "config.json").exists()
    assert cells["frozen"].peers["teacher"].frozen and cells["frozen"].peers["teacher"].export is None
    teacher = [cells[name].peers["teacher"].valid_loss for name in ("alone", "frozen")]
    assert teacher[0] == pytest.approx(teacher[1], abs=1e-4), "the frozen teacher is the finished one"
    alone, frozen = cells["alone"], cells["frozen"]
    assert alone.steps == 6 and alone.rows == 48 and alone.total_flops == alone.flops
    assert frozen.total_flops == pytest.approx(alone.flops + frozen.flops)
    assert results.conditions["alone"].peers["teacher"]["valid_loss"].seeds == [1]
    assert "teacher" not in results.conditions["frozen"].peers
    assert any(said.startswith("Not finished: ") for said in results.caveats)
    write_results(out.parent, results)
    assert read_results(out.parent) == results


def test_its_report_shows_scores_and_what_failed(real: tuple[Path, list[Any]]) -> None:
    out, _ = real
    page = (out / "report" / "report.html").read_text()
    (table,) = re.findall(r'<table id="table-glue">.*?</table>', page, flags=re.DOTALL)
    score = read_results(out).conditions["alone"].peers["teacher"]["glue/rte stand-in"].median
    assert f">{score:.1f}" in table and "rte stand-in" in table and "GLUE rte" not in page
    assert "rte stand-in: a stand-in of" in page.split("<nav")[0], "the first screen says what the scores are of"
    assert "pretrain ended with 1" in page and "Not finished: " in page


def test_tensorboard_compares_cells_by_recipe_and_scores(real: tuple[Path, list[Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = real
    for cell, peer in (("alone-seed-1", "teacher"), ("frozen-seed-1", "student")):
        events = EventAccumulator(str(out / "cells" / cell / "tensorboard"))
        events.Reload()
        (score,) = events.Scalars(f"rte stand-in/{peer}")
        assert 0 <= score.value <= 100 and score.step == 6
        assert events.PluginTagToContent("hparams")


def test_resume_runs_no_finished_cell_again_and_tries_the_failed_one(real: tuple[Path, list[Any]]) -> None:
    out, (_, _, resumed) = real
    assert resumed.returncode == 1, resumed.stdout + resumed.stderr
    logs = {path.stem: path.read_text() for path in (out / "logs").iterdir()}
    assert logs["alone-seed-1"].count("commands.pretrain ") == logs["alone-seed-1"].count("commands.export ") == 1
    assert logs["diverging-seed-1"].count("$ ") == 2


def test_cells_of_several_ranks_start_through_the_launcher(tmp_path: Path, corpus: Path) -> None:
    path = written(tmp_path, corpus, cells={"ctcd": {}}, compare=[], ranks=2)
    done = run("tools/run_experiment.py", "--experiment", path, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    [cell] = read_results(tmp_path / "out").cells
    assert cell.state == "finished" and set(cell.peers) == {"teacher", "student"}
    known = json.loads((tmp_path / "out" / cell.run / "environment.json").read_text())
    assert known["world"] == 2 and "deepspeed" in known["ranks"]
    page = (tmp_path / "out" / "report" / "report.html").read_text()
    assert 'id="table-speed"' in page, "an experiment measures the speed of its models"
