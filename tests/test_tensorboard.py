"""TensorBoard, read back by its own reader: names in words, the recipe as hparams, scores of finished cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams import metadata as hparams_plugin

from ctcd_ds.experiments.local import show_scores
from ctcd_ds.experiments.results import Cell, GlueScore, PeerResult
from ctcd_ds.training.metrics import shown_as
from runs import Job, bert, chain_corpus, drop_checkpoint, metrics, run_jobs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was cut off after step 3 and went on to step 6."""
    place = tmp_path_factory.mktemp("tensorboard")
    recipe = {
        "corpus": {"path": str(chain_corpus(place / "corpus")), "sequence_length": 32},
        "peers": {
            "teacher": {"model": bert(16, 2), "soft": {"student": 1.0}},
            "student": {"model": bert(16, 1), "soft": {"teacher": 4.0}},
        },
        "training": {"global_batch_rows": 8, "steps": 6, "log_every": 1, "valid_every": 3, "checkpoint_every": 3},
    }
    run_jobs([Job(recipe, place / "run")], 1, place)
    drop_checkpoint(place / "run", 6)
    run_jobs([Job(recipe, place / "run", resume=True)], 1, place)
    return place / "run"


def reader(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory))
    events.Reload()
    return events


def hparams(events: EventAccumulator) -> list[dict[str, Any]]:
    """What TensorBoard's HPARAMS page reads: the values of each session that was begun."""
    content = events.PluginTagToContent(hparams_plugin.PLUGIN_NAME)
    parsed = [hparams_plugin.parse_session_start_info_plugin_data(data) for data in content.values()]
    kinds = ("number_value", "string_value", "bool_value")
    return [{key: getattr(v, v.WhichOneof("kind")) for key, v in p.hparams.items() if v.WhichOneof("kind") in kinds}
            for p in parsed]  # fmt: skip


def test_every_value_of_metrics_jsonl_is_there_under_a_name_in_words(run: Path) -> None:
    events, rows = reader(run / "tensorboard"), metrics(run)
    names = {
        "loss/teacher/hard": "Hard loss/teacher",
        "loss/student/soft/teacher": "Soft loss/student learning from teacher",
        "valid/student/accuracy": "Held-out accuracy/student",
        "valid/agreement/teacher/student": "Same answer on held-out rows/teacher and student",
        "grad_norm/student": "Gradient norm before clipping/student",
        "lr/teacher": "Learning rate/teacher",
        "tokens_per_s": "Pace/tokens per second",
    }
    for key, name in names.items():
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found and found == pytest.approx({step: row[key] for step, row in rows.items() if key in row}), name
    unnamed = {key for row in rows.values() for key in row if not shown_as(key)}
    assert unnamed == {"step", "consumed_rows", "tokens", "seconds"}
    assert {key for key in names if key in rows[6]} == names.keys(), "metrics.jsonl keeps its own keys"


def test_no_event_goes_back_and_only_ours_are_there(run: Path) -> None:
    """wandb drops whatever is at a lower x than the highest so far. These files hold what every monitor was given."""
    for file in sorted((run / "tensorboard").glob("events.*")):
        events = [e for e in EventFileLoader(str(file)).Load() if e.HasField("summary")]
        steps = [event.step for event in events]
        assert steps == sorted(steps) and max(steps, default=0) <= 6
        assert not [v.tag for event in events for v in event.summary.value if v.tag.startswith("Train/Samples")]


def test_steps_that_were_done_again_are_there_once(run: Path) -> None:
    shown = [event.step for event in reader(run / "tensorboard").Scalars("Hard loss/teacher")]
    rows = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert shown == rows == [1, 2, 3, 4, 5, 6]


def test_a_runs_time_is_that_of_all_its_sittings(run: Path) -> None:
    seconds = [row["seconds"] for row in metrics(run).values()]
    assert seconds == sorted(seconds) and seconds[3] > seconds[2] > 0
    assert json.loads((run / "summary.json").read_text())["seconds"] >= seconds[-1]


def test_the_recipe_stands_beside_the_curves_once(run: Path) -> None:
    (values,) = hparams(reader(run / "tensorboard"))
    assert values["peers.student.soft.teacher"] == 4.0 and values["peers.teacher.model.num_hidden_layers"] == 2.0
    assert values["seed"] == 1.0 and values["schedule.type"] == "linear"
    assert len(list((run / "tensorboard").glob("*.hparams"))) == 1, "a resumed run does not have two"


def test_scores_are_among_the_curves_of_their_cell_and_newer_ones_replace_them(tmp_path: Path) -> None:
    def scored(median: float) -> Cell:
        peer = PeerResult(glue={"rte": GlueScore(median=median, seeds={"1": median})})
        return Cell(name="a", condition="a", seed=1, run="a", state="finished", steps=6, peers={"student": peer})

    for median in (50.0, 62.5):
        show_scores(tmp_path, scored(median))
        (event,) = reader(tmp_path / "tensorboard").Scalars("GLUE rte/student")
        assert (event.step, event.value) == (6, median)
