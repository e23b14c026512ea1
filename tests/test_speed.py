"""tools/speed.py: what it measures of real models, and the file that the report reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from commands import command
from ctcd_ds.cli import UserError
from ctcd_ds.evaluation import speed
from ctcd_ds.tasks import TASKS
from glue_files import write_causal
from runs import bert
from test_tasks import BART, LLAMA, T5

CPU = torch.device("cpu")
SPECIAL = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}


def write_model(folder: Path, layers: int, task: str = "mlm", **model: Any) -> Path:
    from transformers import AutoConfig, BertTokenizer

    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(95))])
    )
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = AutoConfig.for_model(**(model or bert(64, layers)), vocab_size=100, **SPECIAL)
    TASKS[task].auto_class().from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of the same width, of 10 layers and of one."""
    home = tmp_path_factory.mktemp("speed")
    return [write_model(home / "teacher", 10), write_model(home / "student", 1)]


@pytest.fixture(scope="module")
def found(models: list[Path]) -> speed.Speed:
    return speed.measure_speed(models, [1, 8], [16, 64], CPU, seconds=0.5)


def test_a_model_with_a_tenth_of_the_layers_is_faster_and_smaller(found: speed.Speed) -> None:
    teacher, student = found.models
    assert (teacher.name, teacher.layers, student.name, student.layers) == ("teacher", 10, "student", 1)
    assert student.parameters < teacher.parameters / 5 and student.bytes_on_disk < teacher.bytes_on_disk / 5
    for slow, fast in zip(teacher.timings, student.timings, strict=True):
        assert slow.speedup == 1.0 and fast.speedup > 2
        assert fast.latency_ms < slow.latency_ms
        assert fast.peak_memory_bytes < slow.peak_memory_bytes


def test_models_of_all_tasks_are_measured_that_transformers_can_make_classifiers(tmp_path: Path) -> None:
    """BART and T5 classify at a row's end of text, of which each row must have one; Mamba has no classifier."""
    written = [
        write_model(tmp_path / model["model_type"], 1, task, **model)
        for task, model in (("clm", LLAMA), ("span", BART), ("span", T5))
    ]
    assert all(speed.can_classify(path) for path in written)
    found = speed.measure_speed(written, [4], None, CPU, seconds=0.1)
    measured = found.models
    assert found.sizes == [(4, 64)], "as long as all can read"
    assert [model.parameters for model in measured] == [
        sum(p.numel() for p in TASKS[task].auto_class().from_pretrained(path).parameters())
        for task, path in zip(("clm", "span", "span"), written, strict=True)
    ]
    mamba = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1}
    assert not speed.can_classify(write_model(tmp_path / "mamba", 1, "clm", **mamba))


def test_sizes_are_those_of_the_files_and_the_weights(models: list[Path], found: speed.Speed) -> None:
    from transformers import AutoModelForMaskedLM

    for path, model in zip(models, found.models, strict=True):
        assert model.bytes_on_disk == (path / "model.safetensors").stat().st_size
        assert model.parameters == sum(p.numel() for p in AutoModelForMaskedLM.from_pretrained(path).parameters())
        weights = 4 * model.parameters
        small, large = model.timings[0].peak_memory_bytes, model.timings[3].peak_memory_bytes
        assert weights * 0.9 < small < large
        assert large - small > 8 * 64 * 128 * 4  # one activation of the widest layer at the largest batch


def test_rates_follow_from_the_latency(found: speed.Speed) -> None:
    assert found.sizes == [(1, 16), (8, 16), (1, 64), (8, 64)]
    for model in found.models:
        for (batch_size, length), timing in zip(found.sizes, model.timings, strict=True):
            assert (timing.batch_size, timing.sequence_length) == (batch_size, length)
            assert timing.rows_per_s == pytest.approx(1000 * batch_size / timing.latency_ms)
            assert timing.tokens_per_s == pytest.approx(length * timing.rows_per_s)
            assert (timing.latency_p95_ms is None) == (timing.rounds < 20)
            assert timing.latency_p95_ms is None or timing.latency_p95_ms >= timing.latency_ms


def test_the_file_comes_back_as_it_was_written(found: speed.Speed, tmp_path: Path) -> None:
    speed.write_speed(tmp_path / "new", found)
    assert speed.read_speed(tmp_path / "new") == found
    content = json.loads((tmp_path / "new/speed.json").read_text())
    assert content["hardware"]["cores"] and content["versions"]["torch"] == torch.__version__
    del content["models"][0]["timings"][0]["rounds"]
    (tmp_path / "new/speed.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"models\.0\.timings\.0\.rounds"):
        speed.read_speed(tmp_path / "new")
    with pytest.raises(UserError, match="cannot be read"):
        speed.read_speed(tmp_path / "nowhere")


def test_the_command_prints_a_table_and_names_mistakes(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    line = ("tools/speed.py", "--model", *models, "--output_dir", tmp_path / "out", "--seconds", 0.1)
    code, out, err = command(
        monkeypatch, capsys, *line, "--batch_sizes", "1,4", "--sequence_lengths", "32", "--device", "cpu"
    )
    assert code == 0, err
    assert "1 x 32" in out and "4 x 32" in out and "speed-up against teacher" in out
    assert speed.speed_table(speed.read_speed(tmp_path / "out")) in out
    for wrong, said in (
        (("--sequence_lengths", "65"), "teacher reads at most 64 tokens"),
        (("--batch_sizes", "0"), "--batch_sizes: whole numbers from 1"),
        (("--model", tmp_path), "no config.json): it is a folder"),
        (("--model", models[0], models[0]), "given twice"),
    ):
        code, _, err = command(monkeypatch, capsys, *line, *wrong, "--output_dir", tmp_path / "other")
        assert code == 2 and said in err, err
        assert not (tmp_path / "other").exists()


def test_a_causal_model_is_measured_too(tmp_path: Path) -> None:
    path = write_causal(tmp_path / "gpt2", "gpt2")
    [model] = speed.measure_speed([path], [2], [16], CPU, seconds=0.1).models
    assert model.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(path).parameters())
