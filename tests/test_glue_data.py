"""The real GLUE files of ../shared/data: official sizes, and a fine-tuning on a subsample of every task there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctcd_ds.evaluation import data, finetune, glue, results, tasks

SIZES = {  # train, dev, test (-1: not there)
    "cola": (8551, 1043, 1063),
    "sst2": (67349, 872, -1),
    "mrpc": (3668, 408, 1725),
    "stsb": (5749, 1500, -1),
    "rte": (2490, 277, 3000),
    "wnli": (635, 71, 146),
}


@pytest.fixture(scope="module")
def model(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT with the vocabulary of bert-base-uncased."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = BertTokenizer(vocab=str(shared_data / "vocab/bert-base-uncased-vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.data
@pytest.mark.parametrize("name", SIZES)
def test_the_official_files_have_their_official_sizes(shared_data: Path, name: str) -> None:
    (task,) = tasks.named([name])
    read = data.from_folder(shared_data / "glue", task)
    assert read.train is not None
    sizes = (len(read.train), *(len(rows) for rows in read.dev.values()))
    tests = [len(rows) for rows in read.test.values()] or [-1]
    assert (*sizes, *tests) == SIZES[name]


@pytest.mark.data
def test_every_task_there_goes_through_on_a_subsample(shared_data: Path, model: Path, tmp_path: Path) -> None:
    few = finetune.FinetuneSettings(epochs=1, learning_rate=1e-3, max_train_samples=320)
    content = glue.run([model], ("all",), shared_data / "glue", tmp_path / "out", (1,), few)
    entry = content["models"]["tiny"]
    assert list(entry["tasks"]) == list(SIZES)
    assert entry["average"]["missing"] == ["qqp", "mnli", "qnli"]
    assert 45 < entry["tasks"]["sst2"]["median"] < 100
    assert "not in the average, because not done: qqp, mnli, qnli" in results.score_table(content)
    for name, (_, _, test) in SIZES.items():
        (task,) = tasks.named([name])
        file = tmp_path / f"out/submissions/tiny/{task.folder}.tsv"
        assert file.exists() == (test > 0)
        assert test < 0 or len(file.read_text().splitlines()) == 1 + test
