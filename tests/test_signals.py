"""What is learned from the insides of a peer: values and gradients against plain fp64, and who gets none of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, equal
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM

from architectures import tiny
from ctcd_ds.cli import UserError
from ctcd_ds.export.hf import export
from ctcd_ds.objective import relations
from ctcd_ds.objective.batch import Batch
from ctcd_ds.objective.course import Course
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.objective.hidden import hidden_loss
from ctcd_ds.objective.projection import project
from ctcd_ds.objective.reference import reference_hidden, reference_objective, reference_relations
from ctcd_ds.objective.relations import relations_loss
from ctcd_ds.objective.signals import Hidden, Pairs, Relations, Signal
from ctcd_ds.peers.cotrain import CoTraining
from ctcd_ds.peers.heads import compilable, project_positions
from ctcd_ds.peers.signals import signal_cost
from ctcd_ds.peers.states import shapes_of, watching
from ctcd_ds.recipe.schema import Mistakes
from ctcd_ds.recipe.sections import Recipe
from ctcd_ds.tasks import TASKS
from ctcd_ds.training.plan import describe, make_plan
from runs import BF16, FP32, Job, bert, chain_corpus, drop_checkpoint, final_weights, metrics, run_jobs

SPECIAL = {f"{name}_token_id": n for n, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
KINDS = ("query", "key", "value", "query-key")


def some(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.5).to(dtype)


def near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_loss_is_the_references_and_gives_the_teacher_nothing(dtype: torch.dtype) -> None:
    own = [some(n, 2, 7, 12, dtype=dtype).requires_grad_() for n in range(3)]
    other = [some(9 + n, 2, 7, width, dtype=dtype).requires_grad_() for n, width in enumerate((12, 20, 8))]
    maps = [None, *(some(20 + n, width, 12, dtype=dtype).requires_grad_() for n, width in enumerate((20, 8)))]
    mapped = [
        h if w is None else torch.nn.functional.linear(h.float(), w.float()) for h, w in zip(own, maps, strict=True)
    ]
    learning = [*own, *(w for w in maps if w is not None)]
    found = hidden_loss(list(zip(mapped, other, strict=True)))
    expected = reference_hidden(list(zip(own, maps, other, strict=True)))
    assert near(found, expected, 1e-6)
    for a, b in zip(torch.autograd.grad(found, learning), torch.autograd.grad(expected, learning), strict=True):
        assert near(a, b, 1e-6 if dtype == torch.float32 else 1e-2)  # gradients have their tensors' dtype
    nothing = torch.autograd.grad(hidden_loss(list(zip(mapped, other, strict=True))), other, allow_unused=True)
    assert nothing == (None, None, None)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("of", [*((kind,) for kind in KINDS), KINDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relations_are_the_references_whatever_the_heads(
    dtype: torch.dtype, of: Any, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learner 4 heads of 6, teacher 3 of 16, compared in 2; three rows of the batch, one at a time."""
    own = tuple(some(n, 3, 4, 5, 6, dtype=dtype).requires_grad_() for n in range(3))
    other = tuple(some(9 + n, 3, 3, 5, 16, dtype=dtype).requires_grad_() for n in range(3))
    expected = reference_relations(own, other, 2, of, causal)
    gradients = torch.autograd.grad(expected, own, allow_unused=True)
    for limit in (relations.RELATION_BYTES, 1):
        monkeypatch.setattr(relations, "RELATION_BYTES", limit)
        found = relations_loss(own, other, 2, of, causal)  # type: ignore[arg-type]
        assert near(found, expected, 1e-6)
        for a, b in zip(torch.autograd.grad(found, own, allow_unused=True), gradients, strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or near(a, b, 2e-6 if dtype == torch.float32 else 1e-2)
        found = relations_loss(own, other, 2, of, causal)  # type: ignore[arg-type]
        assert torch.autograd.grad(found, other, allow_unused=True) == (None, None, None)


def test_relations_of_what_is_alike_are_0_whatever_the_heads_and_their_gradient_too() -> None:
    """The same queries in 2 heads of 12 and in 6 of 4 are the same relations."""
    flat = [some(n, 2, 5, 24) for n in range(3)]
    wide, narrow = ([x.unflatten(2, (h, -1)).transpose(1, 2).requires_grad_() for x in flat] for h in (2, 6))
    loss = relations_loss(tuple(wide), tuple(narrow), 3, ("query", "key", "value"), causal=False)  # type: ignore[arg-type]
    assert abs(loss.item()) < 1e-7
    assert all(g.abs().max() < 1e-7 for g in torch.autograd.grad(loss, wide))


@pytest.mark.parametrize(
    ("layers", "own", "other", "pairs"),
    [
        ("last", 4, 6, ((4, 6),)),
        ("even", 2, 6, ((1, 3), (2, 6))),
        ("even", 6, 4, ((2, 1), (3, 2), (4, 3), (6, 4))),
        ("even", 3, 3, ((1, 1), (2, 2), (3, 3))),
        (((0, 0), (2, 5)), 2, 6, ((0, 0), (2, 5))),
    ],
)
def test_layers_that_are_compared(layers: Any, own: int, other: int, pairs: Pairs) -> None:
    assert Hidden(0, 1, 1.0, layers=layers).pairs(own, other) == pairs
    assert all(0 <= a <= own and 0 <= b <= other for a, b in pairs)


def models(*settings: dict[str, Any], task: str = "mlm") -> dict[str, Any]:
    """Peers a, b, … of 64 words, without dropout, with numbers in all weights."""
    from transformers import AutoConfig

    built = {}
    for n, setting in enumerate(settings):
        torch.manual_seed(n)
        config = AutoConfig.for_model(**{**setting, **SPECIAL, "vocab_size": 64})
        for key in [key for key in config.to_dict() if "drop" in key and not key.startswith("is_")]:
            setattr(config, key, 0.0)
        built["abc"[n]] = TASKS[task].auto_class().from_config(config)
        with torch.no_grad():
            for parameter in built["abc"[n]].parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return built


def asked(peers: int, rows: int = 3, length: int = 10) -> Batch:
    ids = torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(3))
    labels = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) < 0.3, ids, -100)
    return Batch.of({"input_ids": ids}, labels, peers)


def graph_of(n: int, signals: tuple[Signal, ...], soft: dict[str, dict[str, float]] | None = None) -> DistillationGraph:
    return DistillationGraph.of({name: (soft or {}).get(name, {}) for name in "abc"[:n]}, signals=signals)


BOTH_WAYS = (
    Hidden(0, 1, 2.0, layers="even"),
    Relations(0, 1, 0.5, heads=2, of=KINDS),
    Hidden(1, 0, 0.25, layers=((0, 0), (2, 1))),
)


@pytest.mark.parametrize(
    ("sizes", "soft", "signals"),
    [
        ([(24, 2)], {}, ()),
        ([(24, 2), (32, 3)], {"a": {"b": 4.0}, "b": {"a": 1.0}}, BOTH_WAYS),
        ([(24, 2), (32, 3)], {}, (Relations(0, 1, 3.0, heads=4), Relations(1, 0, 1.0, layer=(1, 2), heads=8))),
        ([(24, 2), (32, 3), (24, 1)], {"a": {"c": 1.0}}, (*BOTH_WAYS, Hidden(2, 0, 1.0), Hidden(2, 1, 3.0))),
    ],
)
def test_losses_and_gradients_of_a_mixture_are_those_of_plain_fp64(
    sizes: list[tuple[int, int]], soft: Any, signals: tuple[Signal, ...]
) -> None:
    """One to three BERTs of other widths: every gradient of every weight, the maps' too."""
    peers = models(*(bert(*size) for size in sizes))
    cooling = replace(graph_of(len(peers), signals, soft), temperature=Course(4.0, 2.0, over=1.0))
    graph, batch = cooling.at(0.5), asked(len(peers))
    module = CoTraining(peers, graph, 64, seed=1).eval()
    losses = module(batch, 0)
    found = dict(
        zip(
            dict(module.named_parameters()),
            torch.autograd.grad(losses.total, list(module.parameters()), allow_unused=True),
            strict=True,
        )
    )

    module.double()
    logits, hidden, attention = [], [], []
    for peer, view in zip(peers.values(), batch.views, strict=True):
        with watching(peer, None, None) as seen:
            output = peer(**view.inputs)
        logits.append(output.logits.flatten(0, 1)[view.positions])
        hidden.append(seen.hidden[0])
        attention.append(seen.attention)
    expected, *_ = reference_objective(logits, batch.views[0].targets, replace(graph, temperature=3.0))
    for n, signal in enumerate(signals):
        own, other = signal.learner, signal.teacher
        pairs = signal.pairs(sizes[own][1], sizes[other][1])
        if isinstance(signal, Hidden):
            maps = [getattr(part, "weight", None) for part in module.signals.maps[n]]  # type: ignore[union-attr,arg-type]
            value = reference_hidden(
                [(hidden[own][a], w, hidden[other][b]) for (a, b), w in zip(pairs, maps, strict=True)]
            )
        else:
            [(a, b)] = pairs
            value = reference_relations(attention[own][a], attention[other][b], signal.heads, signal.of, causal=False)
        assert losses.terms[graph.name_of(signal)].item() == pytest.approx(value.item(), rel=1e-5)
        expected = expected + signal.weight * value
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = torch.autograd.grad(expected, list(module.parameters()), allow_unused=True)
    for name, gradient in zip(found, gradients, strict=True):
        one = found[name]
        assert (one is None) == (gradient is None), name
        if one is not None and gradient is not None and gradient.abs().max() > 1e-9:
            assert near(one, gradient, 2e-4), name


@pytest.mark.parametrize(
    ("task", "kind", "relations"),
    [
        ("mlm", "bert", True), ("mlm", "distilbert", True), ("mlm", "modernbert", True), ("mlm", "albert", True),
        ("mlm", "deberta-v2", False), ("mlm", "bart", False), ("clm", "llama", True), ("clm", "gpt2", True),
        ("clm", "bloom", False), ("span", "t5", False),
    ],
)  # fmt: skip
def test_insides_are_hugging_faces_own_while_the_head_runs_at_a_few_positions(
    task: str, kind: str, relations: bool
) -> None:
    [model] = models(tiny(kind), task=task).values()
    model.eval()
    ids = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if task == "span" else {})}
    with watching(model, {0, 2}, {2}) as seen:
        projection = project_positions(model, inputs, torch.tensor([1, 5, 20]))
    plain = model(**inputs, output_hidden_states=True)
    assert torch.allclose(project(projection, slice(None)), plain.logits.flatten(0, 1)[[1, 5, 20]], atol=1e-5)
    stacks = [plain[key] for key in sorted(plain, reverse=True) if key.endswith("hidden_states")]  # the encoder's first
    assert len(seen.hidden) == len(stacks) == (2 if model.config.is_encoder_decoder else 1)
    for found, expected in zip(seen.hidden, stacks, strict=True):
        assert found.keys() == {0, 2}
        assert all(torch.equal(found[n], expected[n]) for n in found)
    shapes = shapes_of(model)
    assert [len(stack) for stack in shapes.hidden] == [3] * len(stacks)
    assert (len(shapes.attention) == 2) == relations
    if relations:
        query, key, value = seen.attention[2]
        assert [x.shape[1] * x.shape[3] for x in (query, key, value)] == list(shapes.attention[1])
        assert query.shape[::2] == key.shape[::2] == value.shape[::2] == (2, 12)
        query.sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert not seen.attention.keys() - {2}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("sizes", "signals"),
    [
        ([(24, 2), (24, 3)], (Hidden(0, 1, 2.0, layers="even"),)),  # of one width: no map
        ([(24, 2), (32, 3)], BOTH_WAYS),
        ([(24, 2), (32, 3)], (Relations(1, 0, 1.0, heads=8, of=("value", "query-key")), Hidden(1, 0, 1.0))),
    ],
)
def test_flops_of_signals_are_those_that_torch_counts(
    sizes: list[tuple[int, int]], signals: tuple[Signal, ...], causal: bool
) -> None:
    """A whole step with them, less the same step without them."""
    signals = tuple(replace(s, causal=causal) if isinstance(s, Relations) else s for s in signals)
    peers, batch, counted = models(*(bert(*size) for size in sizes)), asked(2, rows=3, length=10), []
    for some in (signals, ()):
        module = CoTraining(peers, graph_of(2, some), 64)
        with FlopCounterMode(display=False) as counter:
            module(batch, 0).total.backward()
        counted.append(counter.get_total_flops())
    found = signal_cost(graph_of(2, signals), {name: shapes_of(peer) for name, peer in peers.items()}, (10, 10))
    assert 3 * found.flops == counted[0] - counted[1]


def test_a_run_without_signals_is_watched_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from ctcd_ds.peers import signals

    monkeypatch.setattr(signals, "watching", lambda *_: pytest.fail("watched"))
    module = CoTraining(models(bert(24, 2), bert(24, 1)), graph_of(2, (), {"a": {"b": 1.0}}), 64)
    assert module.signals is None and not [name for name, _ in module.named_parameters() if "maps" in name]
    module(asked(2), 0).total.backward()


def test_a_teacher_learns_nothing_from_being_learned_from() -> None:
    """Its hard weight is 0: whatever gradient it had would come through the signals. Exactly none comes."""
    graph = DistillationGraph.of({"a": {}, "b": {}}, {"b": 0.0}, signals=BOTH_WAYS[:2])
    module = CoTraining(models(bert(24, 2), bert(32, 3)), graph, 64)
    module(asked(2), 0).total.backward()
    assert all(p.grad is None or not p.grad.any() for p in module.peers["b"].parameters())
    assert all(p.grad is not None and p.grad.any() for p in module.signals.parameters())  # type: ignore[union-attr]


def test_a_signal_of_weight_0_is_no_edge_and_maps_begin_alike_whoever_else_is_there() -> None:
    late = (Hidden(0, 1, 2.0, Course(0.0, 2.0, after=0.5)), Relations(0, 1, 1.0, Course(1.0, 0.0, after=0.5), heads=2))
    graph = graph_of(2, late)
    module = CoTraining(models(bert(24, 2), bert(32, 3)), graph, 64, seed=5)
    for done, name, other in ((0.2, "relations", "hidden"), (0.7, "hidden", "relations")):
        terms = module(asked(2), 0, 0, graph.at(done)).terms
        assert f"loss/a/{name}/b" in terms and f"loss/a/{other}/b" not in terms
    assert len(list(module.signals.learned_by("a"))) == 1  # type: ignore[union-attr]
    assert not list(module.signals.learned_by("b"))  # type: ignore[union-attr]
    third = CoTraining(
        models(bert(24, 2), bert(32, 3), bert(16, 1)), graph_of(3, (Hidden(2, 1, 1.0), *late)), 64, seed=5
    )
    maps = [next(m.signals.learned_by("a")) for m in (module, third)]  # type: ignore[union-attr]
    assert torch.equal(*maps)


def test_layers_run_again_give_the_same_gradients() -> None:
    """Activation checkpointing and what is seen inside of the layers, dropout on."""
    found = []
    for again in (False, True):
        peers = models(bert(24, 2), bert(32, 3))
        for peer in peers.values():
            for part in peer.modules():
                if isinstance(part, torch.nn.Dropout):
                    part.p = 0.1
        module = CoTraining(peers, graph_of(2, BOTH_WAYS), 64, seed=5).train()
        if again:
            module.checkpoint_activations()
        module(asked(2), 0).total.backward()
        found.append([p.grad for p in module.parameters()])
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]


def test_compiled_layers_show_the_same_hidden_states() -> None:
    found = []
    for compiled in (False, True):
        module = CoTraining(models(bert(24, 2), bert(32, 3)), graph_of(2, (BOTH_WAYS[0], BOTH_WAYS[2])), 64)
        for part in (part for peer in module.peers.values() for part in compilable(peer)) if compiled else ():
            part.forward = torch.compile(part.forward, dynamic=False, backend="eager")
        found += [module(asked(2), 0).total.item()]
        with torch.compiler.set_stance("fail_on_recompile"):
            found += [module(asked(2), 1).total.item()]
    assert found[:2] == found[2:]


@pytest.mark.parametrize(
    ("task", "kinds", "signal", "said"),
    [
        ("mlm", ("funnel", "bert"), Hidden(1, 0, 1.0), "FunnelForMaskedLM gives out no hidden state for each of its"),
        ("mlm", ("fnet", "bert"), Relations(1, 0, 1.0, heads=2), "a shows queries, keys and values of no layer"),
        ("mlm", ("bart", "bart"), Relations(1, 0, 1.0, heads=2), "b has an encoder and a decoder, whose attention is"),
        ("mlm", ("bart", "bert"), Hidden(1, 0, 1.0), "one of the two has an encoder and a decoder"),
        ("mlm", ("bert", "bert"), Hidden(1, 0, 1.0, layers=((1, 1), (2, 3))),
         "peers.b.hidden.a.layers = [[1, 1], [2, 3]]: layer 3 of a: it has 0 to 2"),
        ("mlm", ("bert", "bert"), Relations(1, 0, 1.0, heads=2, layer=(0, 2)), "layer 0 of b: it has 1 to 2"),
        ("mlm", ("bert", "bert"), Relations(1, 0, 1.0, heads=5),
         "peers.b.relations.a.heads = 5: does not divide 32, the width of b's queries, keys or values; take 32"),
        ("clm", ("llama", "gpt2"), Relations(1, 0, 1.0, heads=2, of=("query-key",)),
         "a has queries of 32 values and keys of 16"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_said_before_the_start(
    task: str, kinds: tuple[str, str], signal: Signal, said: str
) -> None:
    grouped = {"num_key_value_heads": 2}
    peers = models(*({**tiny(kind), **(grouped if kind == "llama" else {})} for kind in kinds), task=task)
    with pytest.raises(UserError) as refused:
        CoTraining(peers, graph_of(2, (signal,)), 64)
    assert said in str(refused.value)


PEERS = {
    "teacher": {"model": bert(48, 3)},
    "student": {
        "model": bert(32, 2),
        "hidden": {"teacher": {"weight": 1.0, "layers": "even"}},
        "relations": {"teacher": {"weight": {"then": 2.0, "after": 0.25}, "heads": 8}},
    },
}


def recipe(corpus: Path, peers: dict[str, Any], **training: Any) -> dict[str, Any]:
    steps = {"global_batch_rows": 16, "steps": 6, "log_every": 1, "valid_every": 6, "checkpoint_every": 3}
    return {
        "corpus": {"path": str(corpus), "sequence_length": 32},
        "peers": peers,
        "optimizer": {"lr": 1e-3},
        "training": {**steps, **training},
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real runs of six steps, with dropout: both signals and none at one rank and at two, and what each lacks."""
    folder = tmp_path_factory.mktemp("signals")
    corpus = chain_corpus(folder / "corpus")
    none = {name: {"model": peer["model"]} for name, peer in PEERS.items()}
    late = {**PEERS["student"], "hidden": {"teacher": {"weight": {"then": 1.0, "after": 0.5}}}}
    only = {"model": bert(32, 2), "hard": 0.0, "relations": {"teacher": {"weight": 1.0, "heads": 4}}}
    back = {**PEERS["teacher"], "hidden": {"student": {"weight": 1.0, "layers": [[0, 0], [3, 2]]}}}
    jobs = [Job(recipe(corpus, PEERS), folder / name) for name in ("whole", "cut")]
    jobs += [Job(recipe(corpus, peers), folder / name, config) for name, peers, config in (
        ("none", none, FP32),
        ("late", {**PEERS, "student": late}, {**FP32, "gradient_accumulation_steps": 2}),
        ("only", {**PEERS, "student": only}, {"zero_optimization": {"stage": 1}}),
        ("both", {"teacher": back, "student": PEERS["student"]}, BF16),
    )]  # fmt: skip
    run_jobs(jobs, 1, folder)
    drop_checkpoint(folder / "cut", 6)
    shutil.copytree(folder / "cut", folder / "two")
    run_jobs([Job(recipe(corpus, PEERS), folder / "cut", resume=True)], 1, folder)
    run_jobs([Job(recipe(corpus, PEERS), folder / "two", resume=True)], 2, folder)
    return folder


def losses(run: Path) -> dict[int, dict[str, float]]:
    kept = ("loss/", "grad_norm/", "valid/")
    return {step: {k: v for k, v in row.items() if k.startswith(kept)} for step, row in metrics(run).items()}


def test_a_teacher_trains_as_without_a_learner_and_the_learner_learns(ran: Path) -> None:
    whole, none = losses(ran / "whole"), losses(ran / "none")
    for step, row in none.items():
        assert {k: v for k, v in row.items() if "/teacher" in k}.items() <= whole[step].items()
    assert whole[1]["loss/student/hidden/teacher"] > whole[6]["loss/student/hidden/teacher"] > 0
    assert [step for step, row in whole.items() if "loss/student/relations/teacher" in row] == [3, 4, 5, 6]
    assert whole[6]["loss/student/hard"] != none[6]["loss/student/hard"]
    assert [step for step, row in losses(ran / "late").items() if "loss/student/hidden/teacher" in row] == [4, 5, 6]
    assert "loss/student/hard" not in losses(ran / "only")[6]
    both = losses(ran / "both")
    assert both[6]["loss/teacher/hidden/student"] < both[1]["loss/teacher/hidden/student"]


def test_maps_are_in_checkpoints_also_for_another_number_of_ranks_and_in_no_export(ran: Path) -> None:
    """Each of six values of metrics: bit for bit at as many ranks, to dropout's other draws at two."""
    assert losses(ran / "cut") == losses(ran / "whole")
    assert all(map(equal, *(final_weights(ran / name)["student"].values() for name in ("cut", "whole"))))
    whole, two = losses(ran / "whole")[6], losses(ran / "two")[6]
    assert whole.keys() == two.keys()
    assert two["loss/student/hidden/teacher"] == pytest.approx(whole["loss/student/hidden/teacher"], rel=0.05)
    exported = export(ran / "whole", "student", ran / "hf")["student"]
    config = AutoModelForMaskedLM.from_pretrained(exported)
    assert not [name for name, _ in config.named_parameters() if "maps" in name]
    assert len(list(exported.glob("*.safetensors"))) == 1
    card = (exported / "README.md").read_text()
    assert "hidden states (even) of `teacher` with weight 1" in card


def test_a_plan_says_what_is_learned_and_refuses_what_is_not_there(ran: Path) -> None:
    raw = recipe(ran / "corpus", PEERS)
    plan = make_plan(Recipe.model_validate(raw), FP32, 1, "cpu", ran / "planned")
    said, trained = describe(plan), sum(c.parameters for c in plan.costs.values())
    assert plan.trained == trained + 2 * 32 * 48
    assert plan.flops_beside == 3 * 2 * 2 * 32 * 48 + 3 * 2 * 32 * (3 * 32 + 48)
    assert f"{plan.flops_beside / 1e6:.2f} M for hidden states and relations)" in said
    assert "student      learns from teacher            weight 1: hidden states (even)" in said
    assert "weight 0 until 25% of the steps, then 2: relations of query, key, value (last layer, 8 heads)" in said
    wrong = {"weight": 1.0, "layers": [[3, 1]]}
    peers = {**PEERS, "student": {**PEERS["student"], "hidden": {"teacher": wrong}}}
    with pytest.raises(Mistakes, match=r"peers.student.hidden.teacher.layers = .*: layer 3 of student: it has 0 to 2"):
        make_plan(Recipe.model_validate(recipe(ran / "corpus", peers)), FP32, 1, "cpu", ran / "planned")
