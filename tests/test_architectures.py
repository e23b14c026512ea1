"""Every architecture of transformers 5 trains beside another, is exported and gives the same logits when loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from architectures import LENGTH, tiny
from ctcd_ds.corpus.rows import Corpus
from ctcd_ds.export.hf import export
from ctcd_ds.peers.accounting import cost
from ctcd_ds.peers.build import build_peer, config_mistakes, peer_config
from ctcd_ds.peers.rehearsal import rehearse
from ctcd_ds.recipe import PeerSection
from runs import Job, bert, chain_corpus, drop_checkpoint, final_weights, run_jobs

# A dozen heads that differ: in `make test`; the others in `make test-architectures`.
QUICK = (
    "albert", "bart", "deberta-v2", "distilbert", "electra", "esm", "fnet", "longformer", "mobilebert", "perceiver",
    "roformer", "xlm",
)  # fmt: skip

# task → its Auto class and the types that have it
TASKS: dict[str, tuple[Any, Any]] = {"mlm": (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING_NAMES)}

KINDS = [
    pytest.param(
        task, kind, marks=() if kind in QUICK else (pytest.mark.architectures, pytest.mark.nightly), id=f"{task}-{kind}"
    )
    for task, (_, kinds) in TASKS.items()
    for kind in kinds
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain_corpus(tmp_path_factory.mktemp("architectures") / "corpus")


def recipe(corpus: Path, task: str, kind: str) -> dict[str, Any]:
    """The architecture and a peer of another, which learn from each other."""
    other = bert(32, 1) if kind != "bert" else {**bert(32, 1), "model_type": "electra", "embedding_size": 16}
    return {
        "corpus": {"path": str(corpus), "sequence_length": LENGTH},
        "objective": {"task": task},
        "peers": {"it": {"model": tiny(kind), "soft": {"other": 1.0}}, "other": {"model": other, "soft": {"it": 1.0}}},
        "training": {"global_batch_rows": 4, "steps": 2, "valid_rows": 8, "checkpoint_every": 1},
    }


@pytest.mark.parametrize(("task", "kind"), KINDS)
def test_it_passes_the_rehearsal_and_its_cost_is_counted(corpus: Path, task: str, kind: str) -> None:
    """FLOPs against torch's profiler, a counter of its own, over a real model with logits everywhere."""
    auto, section, opened = TASKS[task][0], PeerSection(model=tiny(kind)), Corpus.open(corpus)
    assert not list(config_mistakes(section, opened, LENGTH, auto))
    config = peer_config(section, opened, auto)
    assert rehearse(config, auto, LENGTH, "fp32", "cpu") is None
    found, config._attn_implementation = cost(config, LENGTH, 1.0, auto), "eager"
    model = auto.from_config(config).eval()
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.largest == max(p.numel() for p in model.parameters())
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiled:
        model(input_ids=torch.full((1, LENGTH), 200))
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::conv2d")
    expected = sum(event.flops for event in profiled.key_averages() if event.key in products)
    one_dimensional = _convolutions(model)  # the profiler leaves them out
    if kind == "perceiver":  # its own head runs at all positions that it has, and is cut afterwards
        expected -= 2 * (config.max_position_embeddings - LENGTH) * config.d_model * config.vocab_size
    assert found.forward_flops * LENGTH == pytest.approx(expected + one_dimensional, rel=1e-6)


def _convolutions(model: Any) -> int:
    flops = []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv1d):
            layer.register_forward_hook(lambda conv, _, out: flops.append(2 * out.numel() * conv.weight[0].numel()))
    with torch.no_grad():
        model(input_ids=torch.full((1, LENGTH), 200))
    return sum(flops)


@pytest.mark.parametrize(("task", "kind"), KINDS)
def test_it_trains_beside_another_and_its_export_has_the_same_logits(
    corpus: Path, tmp_path: Path, task: str, kind: str
) -> None:
    run_jobs([Job(recipe(corpus, task, kind), tmp_path / "run")], 1, tmp_path)
    exported = export(tmp_path / "run", "it", tmp_path / "hf")["it"]
    auto, opened = TASKS[task][0], Corpus.open(corpus)
    inside = build_peer("it", PeerSection(model=tiny(kind)), opened, 7, auto).eval()
    inside.load_state_dict(final_weights(tmp_path / "run")["it"])
    ids = torch.randint(5, opened.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))

    def logits(model: Any) -> torch.Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    found = logits(auto.from_pretrained(exported))
    assert found.shape[-1] == opened.vocab_size
    torch.testing.assert_close(found, logits(inside)[..., : opened.vocab_size], rtol=1e-4, atol=1e-4)


def test_positions_that_do_not_learn_are_resumed_and_exported(corpus: Path, tmp_path: Path) -> None:
    """RoFormer's sinusoids are a parameter without gradient, which DeepSpeed would not save."""
    run, plan = tmp_path / "run", recipe(corpus, "mlm", "roformer")
    run_jobs([Job(plan, run)], 1, tmp_path)
    before = final_weights(run)["it"]
    drop_checkpoint(run, 2)
    run_jobs([Job(plan, run, resume=True)], 1, tmp_path)
    after = final_weights(run)["it"]
    assert any("embed_positions" in name for name in after)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
