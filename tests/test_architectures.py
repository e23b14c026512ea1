"""Every architecture of transformers 5 trains beside others, is exported and gives the same logits when loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from architectures import LENGTH, REFUSED, tiny
from ctcd_ds.corpus.rows import Corpus
from ctcd_ds.export.hf import export
from ctcd_ds.peers.accounting import cost
from ctcd_ds.peers.build import build_peer, peer_config
from ctcd_ds.peers.reading import as_inputs, uncached
from ctcd_ds.peers.states import planned_shapes, shapes_of
from ctcd_ds.recipe.sections import PeerSection
from ctcd_ds.tasks import TASKS
from runs import Job, chain_corpus, drop_checkpoint, final_weights, run_jobs
from survey import KINDS, PAGE, PREFACE, ROOT, SENTINELS, insides, line, look, recipe

# Some of each task that differ most, one that is refused among them: in `make test`; the others in
# `make test-architectures`.
QUICK = {
    "mlm": ("deberta-v2", "esm", "mobilebert", "perceiver", "xlm"),
    "clm": ("bert", "gemma2", "mamba", "qwen2", "qwen3_moe"),
    "span": ("bart", "encoder-decoder", "m2m_100", "t5gemma", "voxtral"),
}
SLOW = (pytest.mark.architectures, pytest.mark.nightly)


def every_kind() -> Iterator[Any]:
    for task, kinds in KINDS.items():
        for kind in kinds:
            yield pytest.param(task, kind, marks=() if kind in QUICK[task] else SLOW, id=f"{task}-{kind}")


def together(size: int = 8) -> Iterator[Any]:
    """Those of a task that are trained in one run: the quick ones, and the others eight at a time."""
    for task, kinds in KINDS.items():
        good = [kind for kind in kinds if (task, kind) not in REFUSED]
        quick, others = ([kind for kind in good if (kind in QUICK[task]) == wanted] for wanted in (True, False))
        yield pytest.param(task, quick, id=f"{task}-quick")
        for start in range(0, len(others), size):
            part = others[start : start + size]
            yield pytest.param(task, part, marks=SLOW, id=f"{task}-{part[0]}-to-{part[-1]}")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain_corpus(tmp_path_factory.mktemp("architectures") / "corpus", sentinels=SENTINELS)


@pytest.mark.parametrize(("task", "kind"), every_kind())
def test_it_is_what_the_page_says_and_its_cost_is_counted(corpus: Path, task: str, kind: str) -> None:
    opened = Corpus.open(corpus)
    found = look(opened, task, kind)
    assert line(task, kind, found) in PAGE.read_text().splitlines(), "`make architectures` writes the page anew"
    assert REFUSED.get((task, kind), "") in (found.reason or "") and (found.reason is None) == (
        (task, kind) not in REFUSED
    )
    if found.reason is None:
        section, auto = PeerSection(model=tiny(kind)), TASKS[task].auto_class()
        config = peer_config(section, opened, auto)
        cost_is_the_profilers(config, auto)
        model = build_peer("it", section, opened, 1, auto)
        at_the_start = insides(lambda: shapes_of(model))
        assert at_the_start == insides(lambda: planned_shapes(config, auto)), "the model itself shows what the plan saw"
        assert at_the_start[0] == found.hidden and found.relations in (None, at_the_start[1])


def cost_is_the_profilers(config: Any, auto: Any) -> None:
    """FLOPs against torch's profiler, a counter of its own, over a real model with logits everywhere."""
    found = cost(config, LENGTH, LENGTH, auto)
    model = auto.from_config(config, attn_implementation="eager", experts_implementation="batched_mm").eval()
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.largest == max(p.numel() for p in model.parameters())
    inputs = as_inputs(model.config, torch.full((1, LENGTH), 200))
    with (
        torch.no_grad(),
        Convolutions() as others,
        profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiled,
    ):
        model(**inputs, **uncached(model))
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::conv2d")
    expected = sum(event.flops for event in profiled.key_averages() if event.key in products)
    if config.model_type == "perceiver":  # its own head runs at all positions that it has, and is cut afterwards
        expected -= 2 * (config.max_position_embeddings - LENGTH) * config.d_model * config.vocab_size
    if config.model_type == "longcat_flash":  # some of its experts do nothing; as if no token were sent to them
        assert found.forward_flops * LENGTH >= expected
    else:
        assert found.forward_flops * LENGTH == pytest.approx(expected + others.flops, rel=1e-6)


class Convolutions(TorchFunctionMode):
    """Counts those over one dimension, which the profiler leaves out."""

    flops = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is torch.conv1d:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.flops += 2 * output.numel() * weight[0].numel()
        return output


@pytest.mark.parametrize(("task", "kinds"), together())
def test_they_train_together_and_their_exports_have_the_plain_models_logits(
    corpus: Path, tmp_path: Path, task: str, kinds: list[str]
) -> None:
    """In a ring: each learns from the next one too."""
    peers = {
        kind: {"model": tiny(kind), "soft": {other: 1.0}}
        for kind, other in zip(kinds, kinds[1:] + kinds[:1], strict=True)
    }
    run_jobs([Job(recipe(corpus, task, peers), tmp_path / "run")], 1, tmp_path)
    exported, weights = export(tmp_path / "run", "all", tmp_path / "hf"), final_weights(tmp_path / "run")
    auto, opened = TASKS[task].auto_class(), Corpus.open(corpus)
    ids = torch.randint(5, opened.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    for kind in kinds:
        inside = build_peer(kind, PeerSection(model=tiny(kind)), opened, 1, auto)
        begun = {name: tensor.clone() for name, tensor in inside.state_dict().items()}
        inside.load_state_dict(weights[kind])
        assert any(not torch.equal(begun[name], tensor) for name, tensor in inside.state_dict().items()), kind
        found, expected = (logits(model, ids) for model in (auto.from_pretrained(exported[kind]), inside))
        assert found.shape[-1] == opened.vocab_size
        torch.testing.assert_close(found, expected[..., : opened.vocab_size], rtol=1e-4, atol=1e-4, msg=kind)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)  # Reformer hashes by random numbers
    return model.eval()(**as_inputs(model.config, ids), **uncached(model)).logits


PEERS_WITH_SINUSOIDS = {
    "roformer": {"model": tiny("roformer")},
    "distilbert": {"model": {**tiny("distilbert"), "sinusoidal_pos_embds": True}},
}


def test_positions_that_do_not_learn_are_resumed_and_exported(corpus: Path, tmp_path: Path) -> None:
    """Sinusoids are a parameter without gradient (RoFormer's, DistilBERT's), which DeepSpeed would not save."""
    run = tmp_path / "run"
    plan = recipe(corpus, "mlm", PEERS_WITH_SINUSOIDS)
    plan["training"]["checkpoint_every"] = 1
    run_jobs([Job(plan, run)], 1, tmp_path)
    before = final_weights(run)
    drop_checkpoint(run, 2)
    run_jobs([Job(plan, run, resume=True)], 1, tmp_path)
    after = final_weights(run)
    for peer, name in (("roformer", "embed_positions"), ("distilbert", "position_embeddings")):
        assert any(name in key for key in after[peer]) and before[peer].keys() == after[peer].keys()
        assert all(torch.equal(before[peer][key], after[peer][key]) for key in before[peer])


def test_the_readme_states_what_the_page_counts() -> None:
    """And the page has a line for each type of this version of transformers, and no other."""
    page, readme = PAGE.read_text(), " ".join((ROOT / "README.md").read_text().split())
    assert page.startswith(PREFACE)
    assert re.findall(r"^\| `(.+?)` \|", page, re.M) == [kind for kinds in KINDS.values() for kind in kinds]
    counts = re.findall(r"^(\d+) of (\d+) types; of these ", page, re.M)
    words = ("masked", "causal", "sequence-to-sequence")
    for (good, of), (task, kinds), word in zip(counts, KINDS.items(), words, strict=True):
        refused = sum(refused_task == task for refused_task, _ in REFUSED)
        assert (int(good), int(of)) == (len(kinds) - refused, len(kinds))
        assert f"{good} of {of} {word}" in readme
