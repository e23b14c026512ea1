"""Cached teachers: what is drawn is right on average, is read everywhere alike, and teaches as the teacher does."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

import ctcd_ds.objective.fused as fused
import ctcd_ds.training.caching as caching
from commands import command
from ctcd_ds.cli import Damage, UserError
from ctcd_ds.corpus.tokenizer import load_tokenizer
from ctcd_ds.export.hf import export
from ctcd_ds.objective.batch import Batch, Drawn, View
from ctcd_ds.objective.cached import draw, with_cached
from ctcd_ds.objective.fused import Losses, fused_objective
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.objective.projection import Projection, project
from ctcd_ds.objective.reference import reference_objective
from ctcd_ds.peers.build import build_peers
from ctcd_ds.peers.cotrain import CoTraining
from ctcd_ds.peers.heads import project_positions
from ctcd_ds.recipe.mistakes import recipe_mistakes
from ctcd_ds.recipe.schema import Mistakes
from ctcd_ds.recipe.sections import Recipe
from ctcd_ds.tasks import TASKS
from ctcd_ds.tasks.cache import Cache, record
from ctcd_ds.tasks.loader import Cut
from ctcd_ds.training.caching import refuse_recipe, write_cache
from ctcd_ds.training.plan import Plan, describe, make_plan
from runs import FP32, Job, bert, chain_corpus, final_weights, metrics, run_jobs

V, PADDED = 150, 192
NONE = Losses(torch.zeros(()), {})  # without what is learned from models


# What is drawn


def shares(drawn: Drawn, vocab_size: int = V) -> Tensor:
    """q̂: the share of each token among the drawn ones, fp64 [P, V]."""
    counts = torch.zeros(len(drawn.tokens), vocab_size, dtype=torch.float64)
    return (
        counts.scatter_add_(1, drawn.tokens, torch.ones_like(drawn.tokens, dtype=torch.float64)) / drawn.tokens.shape[1]
    )


def largest(q: Tensor, k: int) -> Tensor:
    """What keeping the k largest of q makes of it: their share among themselves."""
    top = q.topk(k, dim=1)
    return torch.zeros_like(q).scatter_(1, top.indices, top.values / top.values.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("draws", [1, 4, 50])
def test_the_gradient_is_right_on_average_and_that_of_the_largest_few_is_not(draws: int, tau: float) -> None:
    """One position, as often as there are numbers it may be drawn with."""
    torch.manual_seed(0)
    many, logits = 10_000, 2 * torch.randn(1, V)
    shifts = (torch.arange(many, dtype=torch.float64) + 0.5) / many
    drawn = {"big0": draw(logits.expand(many, V), shifts, draws, tau)}
    student = torch.randn(1, V).expand(many, V).clone().requires_grad_()
    batch = Batch((View({}, None, torch.zeros(0), 1),), many, torch.tensor(1.0), np.arange(0), drawn)
    losses = with_cached(NONE, [Projection(student)], batch, replace(taught(1, [{0: 1.0}], False), temperature=tau), V)
    losses.total.backward()
    assert student.grad is not None
    p, q = (torch.softmax(z.detach().double() / tau, dim=1) for z in (student[:1], logits))
    mean, bound = student.grad.double().mean(dim=0), 1.1 / (many * draws) + 1e-6
    assert (mean / tau - (p - q)).abs().max() < bound
    assert float(losses.total.detach()) / many == pytest.approx(float(tau**2 * (q * (q / p).log()).sum()), rel=1e-3)
    assert (largest(q, draws) - q).abs().max() > 20 * bound, "what no average takes away"


def test_a_token_comes_as_often_as_it_should_to_less_than_once() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(64, V)
    drawn = draw(logits, torch.rand(64), 40)
    assert (shares(drawn) - torch.softmax(logits.double(), dim=1)).abs().max() < 1 / 40
    torch.testing.assert_close(drawn.entropy, torch.distributions.Categorical(logits=logits).entropy())


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((3, V), -torch.inf)
    logits[:, [0, 7, 99]] = 1.0
    for shift in (2.0**-33, 0.5, 1 - 2.0**-33):
        drawn = draw(logits, torch.full((3,), shift, dtype=torch.float64), 1000)
        assert set(drawn.tokens.unique().tolist()) == {0, 7, 99} and torch.isfinite(drawn.entropy).all()


# What is made of it


def taught(n: int, cached_weights: Sequence[dict[int, float]], live: bool) -> DistillationGraph:
    """n peers, the first also taught by the second where `live`; cached teacher j teaches peer i with its weight."""
    names = tuple(f"peer{i}" for i in range(n)) + tuple(f"big{j}" for j in range(len(cached_weights)))
    soft = [[0.0] * len(names) for _ in names]
    for j, weights in enumerate(cached_weights):
        for i, weight in weights.items():
            soft[i][n + j] = weight
    if live:
        soft[0][1] = 1.5
    hard = tuple(1.0 if i != 1 else 0.0 for i in range(n)) + (0.0,) * len(cached_weights)
    trained = (True,) * n + (False,) * len(cached_weights)
    return DistillationGraph(names, hard, tuple(map(tuple, soft)), trained, cached=len(cached_weights))


def oracle(
    logits: list[Tensor], targets: Tensor, graph: DistillationGraph, tau: float, shared: int, drawn: list[Drawn]
) -> Tensor:
    """`reference_objective` with log q̂ for the logits of a cached teacher; the entropies put right."""
    everything = [*logits, *(shares(d).log().mul(tau) for d in drawn)]
    everything = [torch.cat([z, torch.zeros(len(targets) - len(z), V)]) if len(z) == shared else z for z in everything]
    total, _, _ = reference_objective(everything, targets, replace(graph, cached=0, temperature=tau), shared)
    for i, lessons in graph.lessons().items():
        for name, weight in lessons.items():
            d = drawn[graph.names.index(name) - len(logits)]
            own = torch.special.entr(shares(d)).sum(dim=1)
            total = total + weight * tau**2 * (own - d.entropy).mean()
        assert i < len(logits)
    return total


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("tile_bytes", [4 * 19 * 64, 2**24])  # of 64 columns, three a pass; one
@pytest.mark.parametrize("kept_bytes", [0, 2**26])
@pytest.mark.parametrize(
    ("n", "weights", "live"),
    [
        (1, [{0: 1.0}], False),
        (2, [{1: 2.0}], False),
        (2, [{0: 0.7, 1: 4.0}], True),
        (3, [{1: 1.0}, {1: 2.0, 2: 0.5}], True),
    ],
)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "cap", "logits"])
def test_values_and_gradients_are_the_oracles(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    n: int,
    weights: list[dict[int, float]],
    live: bool,
    kept_bytes: int,
    tile_bytes: int,
    tau: float,
) -> None:
    """Peer 1 has no hard loss. Gradients by hidden states, output embedding and bias, against autograd's in fp64."""
    monkeypatch.setitem(fused.TILE_BYTES, "cpu", tile_bytes)
    monkeypatch.setitem(fused.KEPT_BYTES, "cpu", kept_bytes)
    torch.manual_seed(n)
    positions, shared, width, graph = 19, 13, 16, taught(n, weights, live)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    cap = 5.0 if kind == "cap" else None
    made: list[Projection] = []
    for _ in range(n):
        if kind == "logits":
            made.append(Projection(3 * torch.randn(positions, PADDED)))
            continue
        parts = torch.randn(positions, width), torch.randn(PADDED, width), torch.randn(PADDED)
        made.append(Projection(*(part.to(dtype) for part in parts), scale=0.5 if cap else 1.0, cap=cap))
    drawn = [draw(3 * torch.randn(shared, V), torch.rand(shared), 12, tau) for _ in weights]
    targets = torch.randint(V, (positions,))
    view = View({}, None, targets, positions)
    names = {f"big{j}": d for j, d in enumerate(drawn)}
    batch = Batch((view,) * n, shared, torch.tensor(float(shared)), np.arange(0), names)

    ours = [[t.clone().requires_grad_() if t is not None else None for t in p[:3]] for p in made]
    exact = [[t.double().requires_grad_() if t is not None else None for t in p[:3]] for p in made]
    projections = [Projection(*parts, *p[3:]) for parts, p in zip(ours, made, strict=True)]  # type: ignore[arg-type]
    graph = replace(graph, temperature=tau)
    losses = fused_objective(projections, batch, graph.live, V)
    losses = with_cached(losses, projections, batch, graph, V)
    true = oracle(
        [exact_logits(parts, p) for parts, p in zip(exact, made, strict=True)], targets, graph, tau, shared, drawn
    )
    assert abs(float(losses.total.detach()) - float(true.detach())) < 1e-5 * max(1.0, abs(float(true.detach())))
    assert set(losses.terms) == set(graph.terms()), "named as those of a live teacher"
    (1024 * losses.total).backward()  # a loss scale
    true.backward()
    for mine, theirs in zip(ours, exact, strict=True):
        for found, expected in zip(mine, theirs, strict=True):
            if found is not None:
                assert found.grad is not None and expected.grad is not None
                error = (found.grad.double() / 1024 - expected.grad).norm()
                assert error <= (1e-2 if kind == "bf16" else 1e-5) * expected.grad.norm()


def exact_logits(parts: Sequence[Tensor | None], projection: Projection) -> Tensor:
    hidden, weight, bias = parts
    assert hidden is not None
    if weight is None or bias is None:
        return hidden[:, :V]
    logits = projection.scale * hidden @ weight.T
    return ((logits if projection.cap is None else projection.cap * torch.tanh(logits / projection.cap)) + bias)[:, :V]


def test_a_batch_without_shared_positions_teaches_nothing() -> None:
    hidden = torch.randn(4, PADDED, requires_grad=True)
    nothing = {"big0": Drawn(torch.zeros(0, 8, dtype=torch.int64), torch.zeros(0))}
    batch = Batch((View({}, None, torch.zeros(4, dtype=torch.int64), 4),), 0, torch.tensor(1.0), np.arange(0), nothing)
    losses = with_cached(NONE, [Projection(hidden)], batch, taught(1, [{0: 1.0}], False), V)
    losses.total.backward()
    assert float(losses.total.detach()) == 0 and float(hidden.grad.abs().sum()) == 0  # type: ignore[union-attr]


# What is written and read

GPT = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
MODELS = {"mlm": bert(32, 2), "clm": GPT, "span": T5}
STEPS, BATCH = 7, 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora of one tokenizer, and a finished teacher for each task (its predictions are far from flat)."""
    place = tmp_path_factory.mktemp("cached")
    chain_corpus(place / "corpus", sentinels=8), chain_corpus(place / "other", sentinels=8, documents=200)
    for task, kind in TASKS.items():
        settings = {key: value for key, value in MODELS[task].items() if key != "model_type"}
        config = AutoConfig.for_model(MODELS[task]["model_type"], vocab_size=320, pad_token_id=0, **settings)
        torch.manual_seed(5)
        config.is_decoder = task == "clm"
        model = kind.auto_class().from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1))
        model.save_pretrained(place / task)
        load_tokenizer(place / "corpus" / "tokenizer").save_pretrained(place / task)
    return place


def live(place: Path, task: str = "mlm", **changes: Any) -> dict[str, Any]:
    """A recipe with the finished teacher as a frozen peer."""
    raw: dict[str, Any] = {
        "corpus": {"path": str(place / "corpus"), "sequence_length": 32},
        "peers": {
            "student": {"model": MODELS[task], "soft": {"teacher": 4.0}},
            "teacher": {"pretrained": str(place / task), "frozen": True},
        },
        "objective": {"task": task},
        "optimizer": {"lr": 2e-3},
        "training": {
            "global_batch_rows": BATCH,
            "steps": STEPS,
            "valid_every": STEPS,
            "valid_rows": 32,
            "log_every": 1,
        },
    }
    if task == "mlm":
        raw["peers"]["third"] = {"model": bert(16, 1), "label_noise": 0.3}  # no edge, other labels
    return with_changes(raw, changes)


def with_changes(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        section = raw
        *parts, last = key.split("__")
        for part in parts:
            section = section.setdefault(part, {})
        section[last] = value
    return raw


def cached_form(raw: dict[str, Any], cache: Path) -> dict[str, Any]:
    """The same recipe with the cache in the teacher's place."""
    peers = {name: peer for name, peer in raw["peers"].items() if name != "teacher"}
    return {**raw, "peers": peers, "cached_teachers": {"teacher": str(cache)}}


def planned(raw: dict[str, Any], accumulation: int = 2) -> Plan:
    config = {**FP32, "gradient_accumulation_steps": accumulation}
    return make_plan(Recipe.model_validate(raw), config, 1, "cpu", Path("run"))


def written(raw: dict[str, Any], output_dir: Path, draws: int = 6) -> Cache:
    refuse_recipe(Recipe.model_validate(raw), "teacher", output_dir)
    return write_cache(planned(raw), "teacher", draws, output_dir, torch.device("cpu"))


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlm": ("mlm", {}),
    "mlm everywhere, τ 2": ("mlm", {"objective__soft_positions": "all", "objective__temperature": 2.0}),
    "whole words of a reduced corpus": ("mlm", {"corpus__whole_word_masking": True, "corpus__train_rows": 40}),
    "clm": ("clm", {"corpus__documents": "apart"}),
    "span": ("span", {}),
    "mixture": ("clm", {"corpus__path": None, "corpus__sources": {}}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_reads_what_the_live_teacher_would_say(place: Path, tmp_path: Path, kind: str,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Two epochs' borders, several files; whatever the number of ranks and micro-batches."""
    task, changes = KINDS[kind]
    raw = live(place, task, **changes)
    if kind == "mixture":
        sources = {
            "a": {"path": str(place / "corpus"), "weight": 1.0},
            "b": {"path": str(place / "other"), "weight": 2.0},
        }
        raw["corpus"] = {"sources": sources, "sequence_length": 32}
    monkeypatch.setattr(caching, "FILE_BYTES", 1)
    cache = written(raw, tmp_path / "cache")
    assert len(list(cache.path.glob("draws-*.bin"))) > 2
    plan = planned(cached_form(raw, cache.path))
    assert plan.teachers is not None and "6 draws a position" in describe(plan)

    teacher = caching._teacher(planned(raw), "teacher")
    for step in (0, STEPS - 1):
        whole = Cut(4, 2).batches(plan.rows, plan.task, plan.recipe.seed, step, plan.teachers)
        for ranks, micro, accumulation in ((2, 4, 1), (4, 1, 2), (1, 8, 1)):
            cut = [Cut(micro, accumulation, rank, ranks) for rank in range(ranks)]
            parts = [b for c in cut for b in c.batches(plan.rows, plan.task, plan.recipe.seed, step, plan.teachers)]
            for field in (0, 1):
                found, expected = (torch.cat([b.drawn["teacher"][field] for b in bs]) for bs in (parts, whole))
                assert torch.equal(found, expected)
        for number, batch in enumerate(whole):
            view = batch.views[0]
            with torch.no_grad():
                projection = project_positions(teacher, view.inputs, view.positions)
            logits = project(projection, slice(0, batch.shared))[:, : plan.corpus.vocab_size]
            q = torch.softmax(logits.double() / plan.recipe.objective.temperature, dim=1)
            drawn = batch.drawn["teacher"]
            assert len(drawn.tokens) == batch.shared > 0, number
            assert (shares(drawn, plan.corpus.vocab_size) - q).abs().max() < 1 / 6 + 1e-5
            torch.testing.assert_close(drawn.entropy, torch.special.entr(q).sum(dim=1).float(), rtol=1e-3, atol=1e-4)


def test_the_learners_head_that_runs_again_is_in_the_flops(place: Path, cache: Path) -> None:
    """A step with what is cached, less the same without it, as torch counts them."""
    plan = planned(cached_form(live(place), cache), accumulation=1)
    graph, rows = plan.recipe.graph(), plan.recipe.training.global_batch_rows
    peers = build_peers(plan.recipe.peers, plan.corpus, 1, plan.task.auto_class())
    module = CoTraining(peers, graph, plan.corpus.vocab_size)
    [batch] = Cut(rows).batches(plan.rows, plan.task, 1, 0, plan.teachers)
    counted = []
    for some in (graph, graph.live):
        with FlopCounterMode(display=False) as counter:
            module(batch, 0, 0, some).total.backward()
        counted.append(counter.get_total_flops())
    assert plan.flops_beside * plan.tokens_per_step == pytest.approx(counted[0] - counted[1], rel=1e-9)
    assert f"{plan.flops_beside / 1e6:.2f} M for cached teachers)" in describe(plan)


def test_a_kill_in_the_middle_changes_no_byte(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "FILE_BYTES", 1000)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    written(live(place), whole)
    count, write = 0, caching._write

    def dies(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(caching, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        written(live(place), cut)
    (cut / ".draws-00003.bin.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match="unfinished cache"):
        Cache.open(cut)
    with pytest.raises(UserError, match="draws is 6 there and 7 here"):
        written(live(place), cut, draws=7)
    started, count = count, 100
    written(live(place), cut)
    assert started == 4 and count - 100 == len(list(whole.glob("draws-*"))) - 3, "three files were there"
    assert contents(cut) == contents(whole)
    written(live(place), cut)  # finished: nothing to do
    assert count - 100 == len(list(whole.glob("draws-*"))) - 3
    with pytest.raises(UserError, match=r"asked.seed is 1 there and 2 here"):
        written(live(place, seed=2), cut)
    with pytest.raises(UserError, match="holds no cache"):
        written(live(place), place / "mlm")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def cache(place: Path) -> Path:
    return written(live(place), place / "cache").path


@pytest.mark.parametrize("how", ["flip", "cut", "remove", "manifest", "extra"])
def test_damage_is_named_and_refused(
    cache: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    file = copy / "draws-00000.bin"
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "cut":
        file.write_bytes(content[:-1])
    elif how == "remove":
        file.unlink()
    elif how == "manifest":
        (copy / "manifest.json").write_text((copy / "manifest.json").read_text().replace('"draws": 6', '"draws": 7'))
    else:
        (copy / "draws-99999.bin").write_bytes(b"")
    with pytest.raises(Damage, match="manifest.json" if how == "manifest" else "draws-"):
        Cache.open(copy).refuse_damage()
    assert command(monkeypatch, capsys, "tools/verify.py", copy)[0] == 1
    assert command(monkeypatch, capsys, "tools/verify.py", cache)[0] == 0


def test_tokens_beyond_the_vocabulary_are_damage(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "copy")
    there = Cache.open(tmp_path / "copy")
    (there.path / "draws-00000.bin").write_bytes(b"\xff" * there.rows * there.row_bytes)
    with pytest.raises(Damage, match="beyond the vocabulary"):
        there.read(0, 2)
    assert record(6, 70_000).itemsize == 4 + 6 * 4 and record(6, 65_536).itemsize == 4 + 6 * 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 2}, "it was written for seed = 1, and here it is 2"),
        ({"corpus__path": "other"}, "it was written for the corpus's sha256 = "),
        ({"corpus__mask_fraction": 0.2}, "corpus.mask_fraction = 0.15, and here it is 0.2"),
        ({"corpus__sequence_length": 30}, "corpus.sequence_length = 32, and here it is 30"),
        ({"corpus__train_rows": 64}, "corpus.train_rows = None, and here it is 64"),
        ({"objective__temperature": 2.0}, "objective.temperature = 1.0, and here it is 2.0"),
        ({"objective__soft_positions": "all"}, "objective.soft_positions = 'targets', and here it is 'all'"),
        ({"training__steps": 8}, "it holds 56 rows, and the run reads 64: train for fewer steps"),
        ({"cached_teachers": {"teacher": "nowhere"}}, "is no cache: no such file or directory"),
        ({"cached_teachers": {"teacher": "corpus"}}, "is no cache: it is a corpus; "),
        ({"objective__divergence": "jsd"}, "peers.student.divergence.teacher = 'jsd': a cache's few tokens give KL's"),
        (
            {"peers__third__mask_seed": 7},
            "peers.third.mask_seed = 7: cached teachers were asked where the recipe masks",
        ),
        ({"peers__teacher": {"model": bert(16, 1)}}, "a peer has this name too; remove it (peers.teacher=null)"),
        ({"peers__student__soft": {"teacer": 1.0}}, "no peer has this name; did you mean 'teacher'?"),
        ({"cached_teachers": {"a b": "cache"}, "peers__student__soft": {}}, "cached_teachers.a b: a teacher's name is"),
    ],
    ids=str,
)
def test_a_cache_that_does_not_fit_is_one_message(
    place: Path, cache: Path, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    raw = with_changes(cached_form(live(place), cache), changes)
    found = recipe_mistakes(raw)
    if not found:
        with pytest.raises(Mistakes) as mistakes:
            planned(raw)
        found = mistakes.value.mistakes
    assert len(found) == 1 and said in found[0], found


@pytest.mark.parametrize(
    ("changes", "peer", "said"),
    [
        ({}, "student", "no frozen peer of the recipe; allowed: teacher"),
        ({"peers__student__soft": {}}, "teacher", "nobody learns from it"),
        ({"peers__student__init_from": {"peer": "teacher", "layers": [0]}, "peers__student__model": None}, "teacher",
         "peers.student.init_from.peer = 'teacher': no peer has this name"),
        ({"peers__student__divergence": {"teacher": "reverse_kl"}}, "teacher", "write kl"),
    ],
    ids=str,
)  # fmt: skip
def test_what_no_cache_could_serve_is_refused_before_it_is_written(
    place: Path, tmp_path: Path, changes: dict[str, Any], peer: str, said: str
) -> None:
    with pytest.raises(UserError) as mistake:
        refuse_recipe(Recipe.model_validate(live(place, **changes)), peer, tmp_path / "cache")
    assert said in str(mistake.value) and not (tmp_path / "cache").exists()


def test_the_command_writes_it_and_says_how_to_train_with_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(live(place)))
    (tmp_path / "d.json").write_text(json.dumps(FP32))
    files = ["--recipe", tmp_path / "recipe.json", "--deepspeed_config", tmp_path / "d.json", "--peer", "teacher"]
    line = ["tools/cache_logits.py", *files, "--output_dir", tmp_path / "cache"]
    code, out, err = command(monkeypatch, capsys, *line, "--draws", 3)
    assert code == 0, err
    assert "56 rows, 3 draws a position, 1.2 bytes a token of text" in out  # 10 bytes at 4 of 32 tokens
    words = shlex.split(out.splitlines()[-1])
    assert words[:3] == ["next:", "ctcd", "pretrain"]
    words[words.index("RUN")] = str(tmp_path / "run")
    code, out, err = command(monkeypatch, capsys, "launchers/pretrain.py", *words[3:], "--dry_run")
    assert code == 0 and f"teacher: read from {tmp_path / 'cache'}: 3 draws a position" in out, err
    assert "student      learns from teacher            weight 4" in out
    code, _, err = command(monkeypatch, capsys, *line, "--draws", 4)
    assert code == 2 and "draws is 3 there and 4 here" in err
    file = tmp_path / "cache" / "draws-00000.bin"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    code, _, err = command(monkeypatch, capsys, "launchers/pretrain.py", *words[3:])
    assert code == 1 and "is damaged; copy it again" in err and "draws-00000.bin: sha256" in err
    assert not (tmp_path / "run" / "checkpoints").exists()
    for variable, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,
    }.items():
        monkeypatch.setenv(variable, str(value))
    code, _, err = command(monkeypatch, capsys, *line)
    assert code == 2 and "a cache is written by one process" in err


# What is learned from it


@pytest.fixture(scope="module")
def runs(place: Path) -> Path:
    """The live frozen teacher, caches of few and of many draws, and one run in two halves."""
    raw = live(place, training__steps=30, schedule={"type": "constant", "warmup_fraction": 0.0})
    del raw["peers"]["third"]
    jobs = [Job(raw, place / "live")]
    for draws in (4, 128):
        cache = written(raw, place / f"cache-{draws}", draws).path
        jobs.append(Job(cached_form(raw, cache), place / f"cached-{draws}"))
    half = {**raw, "training": {**raw["training"], "steps": 15}}
    moved = shutil.copytree(place / "cache-4", place / "moved")
    jobs.append(Job(cached_form(half, place / "cache-4"), place / "resumed"))
    jobs.append(Job(cached_form(raw, moved), place / "resumed", resume=True))
    run_jobs(jobs, 1, place)
    return place


def test_few_draws_and_many_teach_as_the_live_teacher_does(runs: Path) -> None:
    live, few, many = (metrics(runs / name) for name in ("live", "cached-4", "cached-128"))
    soft, held_out = "loss/student/soft/teacher", "valid/student/loss"
    for rows, apart in ((few, 0.05), (many, 0.005)):
        assert rows[1]["loss/student/hard"] == live[1]["loss/student/hard"]
        assert abs(sum(rows[step][soft] - live[step][soft] for step in live) / 30) < apart
        assert rows[30][held_out] == pytest.approx(live[30][held_out], abs=apart)
        assert "valid/teacher/loss" not in rows[30] and "valid/teacher/loss" in live[30]


def test_a_cached_run_goes_on_bit_for_bit_from_a_cache_that_was_moved(runs: Path) -> None:
    one, resumed = (metrics(runs / name) for name in ("cached-4", "resumed"))
    for step in one:
        for key in ("loss/student/hard", "loss/student/soft/teacher", "grad_norm/student"):
            assert one[step][key] == resumed[step][key]
    assert final_weights(runs / "cached-4").keys() == {"student"}
    for name, tensor in final_weights(runs / "cached-4")["student"].items():
        assert torch.equal(tensor, final_weights(runs / "resumed")["student"][name])


def test_a_cached_teacher_is_not_exported_and_the_card_names_it(runs: Path, tmp_path: Path) -> None:
    export(runs / "cached-4", "all", tmp_path / "hf")
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["student"]
    assert "soft loss from `teacher` with weight 4" in (tmp_path / "hf" / "student" / "README.md").read_text()
    with pytest.raises(UserError, match="no trained peer of this run"):
        export(runs / "cached-4", "teacher", tmp_path / "none")
