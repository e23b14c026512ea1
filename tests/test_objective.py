"""The working objective against the fp64 oracle, and the properties the method stands on."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ctcd_ds.objective.fused as fused
from ctcd_ds.objective.batch import Batch, View
from ctcd_ds.objective.course import Course
from ctcd_ds.objective.divergences import KL, Divergence
from ctcd_ds.objective.fused import Losses, fused_objective
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.objective.projection import Projection
from ctcd_ds.objective.reference import reference_objective

V, PADDED = 150, 192
KINDS = (KL, Divergence("reverse_kl"), Divergence("jsd"), Divergence("jsd", 0.1))


def random_graph(n: int, seed: int) -> DistillationGraph:
    """Any graph of n peers: some edges missing, some peers frozen (never all), temperatures of some edges' own."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(n, n + 1, generator=g) * 4 * (torch.rand(n, n + 1, generator=g) < 0.7)
    trained = [True] + [bool(x) for x in torch.rand(n - 1, generator=g) < 0.8]
    hard = [float(weights[i, n]) if trained[i] else 0.0 for i in range(n)]
    hard[0] = hard[0] or 1.0
    soft = [[float(weights[i, j]) if i != j and trained[i] else 0.0 for j in range(n)] for i in range(n)]
    kinds = [[KINDS[int(k)] for k in row] for row in torch.randint(len(KINDS), (n, n), generator=g)]
    own = [[(None, 1.0, 3.0)[int(k)] for k in row] for row in torch.randint(3, (n, n), generator=g)]
    return DistillationGraph(
        names=tuple(f"peer{i}" for i in range(n)),
        hard=tuple(hard),
        soft=tuple(map(tuple, soft)),
        trained=tuple(trained),
        divergences=tuple(map(tuple, kinds)),
        temperatures=tuple(map(tuple, own)),
    )


def pair(
    hard: tuple[float, float] = (1, 1), soft: tuple[float, float] = (1, 4), kind: Divergence = KL
) -> DistillationGraph:
    return DistillationGraph(
        ("teacher", "student"), hard, ((0, soft[0]), (soft[1], 0)), (True, True), divergences=((kind, kind),) * 2
    )


def asked(targets: list[Tensor], shared: int | None = None) -> Batch:
    """A batch of nothing but questions: one list of targets a peer; the first `shared` positions distil."""
    shared = len(targets[0]) if shared is None else shared
    nothing = torch.zeros(0, dtype=torch.int64)
    views = tuple(View({}, nothing, own, max(1, int((own >= 0).sum()))) for own in targets)
    return Batch(views, shared, torch.tensor(float(max(1, shared))), np.arange(0))


def objective(
    projections: list[Projection], targets: Tensor, graph: DistillationGraph, temperature: float = 1.0
) -> Losses:
    """All peers asked the same."""
    graph = replace(graph, temperature=temperature)
    return fused_objective(projections, asked([targets] * len(projections)), graph, V)


def named(graph: DistillationGraph, hard: Tensor, soft: Tensor) -> dict[str, Tensor]:
    """The oracle's losses under our names."""
    values = [hard[i] for i in graph.hard_peers()] + [soft[i, j] for i, j, _ in graph.edges()]
    return dict(zip(graph.terms(), values, strict=True))


def padded(logits: Tensor) -> Tensor:
    """The columns beyond the vocabulary are impossible."""
    return logits.index_fill(1, torch.arange(V, PADDED), -torch.inf)


def in_a_loss(graph: DistillationGraph) -> set[int]:
    """The peers that learn from the text, from another, or teach one: all others have no gradient, not even zeros."""
    return {*graph.hard_peers(), *(k for i, j, _ in graph.edges() for k in (i, j))}


def assert_agrees(logits: list[Tensor], targets: Tensor, graph: DistillationGraph, tau: float) -> None:
    """Values within 1e-5, gradients within 1e-5 of their scale, padding columns untouched."""
    ours = [x.clone().requires_grad_(graph.trained[i]) for i, x in enumerate(logits)]
    exact = [x.double().requires_grad_(graph.trained[i]) for i, x in enumerate(logits)]
    losses = objective([Projection(x) for x in ours], targets, graph, tau)
    total, hard, soft = reference_objective(exact, targets, replace(graph, temperature=tau))
    expected = named(graph, hard, soft)
    assert losses.terms.keys() == expected.keys()
    for found, true in [(losses.total, total), *((losses.terms[name], expected[name]) for name in expected)]:
        assert torch.isfinite(found).all()
        assert ((found.double() - true).abs() <= 1e-5 * true.abs().clamp(min=1)).all(), (found, true)
    losses.total.backward()
    total.backward()
    for i in range(len(logits)):
        if not graph.trained[i] or i not in in_a_loss(graph):
            assert ours[i].grad is None
            continue
        found, true = ours[i].grad, exact[i].grad
        assert found is not None and torch.isfinite(found).all()
        true = torch.zeros_like(exact[i]) if true is None else true  # a peer without any loss of its own
        assert (found[:, V:] == 0).all()
        scale = (graph.hard[i] + sum(graph.soft[i])) * torch.softmax(logits[i].double(), -1).norm() / len(targets)
        if any(graph.divergence(i, j) != KL for _, j, _ in graph.edges()):  # theirs grow with the logits
            scale = torch.maximum(scale, true.norm())
        assert (found.double() - true).norm() <= 1e-5 * scale


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.sampled_from([0.5, 1.0, 2.0, 8.0]), st.integers(0, 10_000))
def test_any_graph_agrees_with_the_oracle(n: int, tau: float, seed: int) -> None:
    torch.manual_seed(seed)
    logits = [padded(3 * torch.randn(23, PADDED)) for _ in range(n)]
    assert_agrees(logits, torch.randint(V, (23,)), random_graph(n, seed), tau)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("apart", [1e-2, 1e-4, 0.0])
def test_nearly_equal_peers(tau: float, apart: float) -> None:
    torch.manual_seed(0)
    teacher = 3 * torch.randn(64, PADDED)
    student = teacher + apart * torch.randn(64, PADDED)
    assert_agrees([padded(teacher), padded(student)], torch.randint(V, (64,)), pair(), tau)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("kind", ["plus", "minus", "mixed", "equal", "one_hot_apart"])
@pytest.mark.parametrize("divergence", KINDS[:3], ids=str)
def test_extreme_logits(tau: float, kind: str, divergence: Divergence) -> None:
    torch.manual_seed(1)
    a, b = torch.randn(16, PADDED), torch.randn(16, PADDED)
    if kind == "plus":
        a, b = a + 1e4, b + 1e4
    elif kind == "minus":
        a, b = a - 1e4, b - 1e4
    elif kind == "mixed":
        a, b = 1e4 * a.sign(), 1e4 * b.sign()
    elif kind == "equal":
        a, b = torch.zeros_like(a), torch.full_like(b, 7.0)
    else:
        a[:, 3], b[:, 4] = 1e4, 1e4
    assert_agrees([padded(a), padded(b)], torch.randint(V, (16,)), pair(kind=divergence), tau)


def test_positions_without_a_target_have_a_soft_loss_only() -> None:
    torch.manual_seed(2)
    logits = [padded(3 * torch.randn(40, PADDED)) for _ in range(2)]
    targets = torch.randint(V, (40,))
    targets[torch.rand(40) < 0.6] = -100
    for tau in (1.0, 2.0):
        assert_agrees(logits, targets, pair(), tau)


def projections(seed: int, dtype: torch.dtype = torch.float32) -> list[Projection]:
    g = torch.Generator().manual_seed(seed)
    made = []
    for width in (24, 16):
        shapes = ((50, width), (PADDED, width), (PADDED,))
        tensors = (torch.randn(shape, generator=g) for shape in shapes)
        made.append(Projection(*(t.to(dtype).requires_grad_() for t in tensors)))
    return made


@pytest.mark.parametrize(("cap", "kind"), [(None, KL), (3.0, KL), (3.0, KINDS[1]), (3.0, KINDS[2])], ids=str)
@pytest.mark.parametrize(("tiles", "kept"), [(1, True), (3, True), (1, False), (3, False)])
def test_through_the_projection_in_tiles_of_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch, tiles: int, kept: bool, cap: float | None, kind: Divergence
) -> None:
    """Gradients of hidden states, output embedding and bias equal autograd's through the oracle."""
    monkeypatch.setitem(fused.TILE_BYTES, "cpu", 4 * 50 * PADDED // tiles)
    monkeypatch.setitem(fused.KEPT_BYTES, "cpu", 2**20 if kept else 0)
    torch.manual_seed(3)
    scale = 1.0 if cap is None else 0.7
    targets, ours = torch.randint(V, (50,)), [p._replace(scale=scale, cap=cap) for p in projections(5)]
    exact = [[t.detach().double().requires_grad_() for t in p[:3] if t is not None] for p in ours]
    losses = objective(ours, targets, pair(kind=kind), 2.0)
    losses.total.backward()
    logits = [scale * (h @ w.t()) for h, w, _ in exact]
    capped = [x if cap is None else cap * torch.tanh(x / cap) for x in logits]
    total, *_ = reference_objective(
        [(x + e[2])[:, :V] for x, e in zip(capped, exact, strict=True)],
        targets,
        replace(pair(kind=kind), temperature=2.0),
    )
    total.backward()
    torch.testing.assert_close(losses.total.double(), total, rtol=1e-5, atol=1e-5)
    for mine, true in zip((t for p in ours for t in p[:3]), (t for e in exact for t in e), strict=True):
        assert mine is not None and mine.grad is not None and true.grad is not None
        torch.testing.assert_close(mine.grad.double(), true.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tau", "own", "kind"),
    [(1.0, (), KL), (2.0, (), KL), (2.0, (), KINDS[1]), (2.0, (), KINDS[2]), (1.0, ((None, 3.0), (2.0, None)), KL)],
    ids=str,
)
def test_compiled_it_is_one_graph_a_width_and_what_it_is_uncompiled(
    monkeypatch: pytest.MonkeyPatch, tau: float, own: Any, kind: Divergence, dtype: torch.dtype
) -> None:
    """Traced whole, with weights that change from step to step and targets that are missing; losses and gradients."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = cache(lambda function: torch.compile(function, dynamic=False, fullgraph=True, backend=backend))
    monkeypatch.setattr(fused, "_compiled", compiled)
    monkeypatch.setitem(fused.TILE_BYTES, "cpu", 4 * 50 * 64)
    targets = torch.randint(V, (50,), generator=torch.Generator().manual_seed(4))
    targets[::5] = -100
    for step in range(3):
        graph = replace(pair(soft=(1 + step, 4 - step), kind=kind), temperature=tau, temperatures=own)
        found = []
        for compile_ in (False, True):
            made = projections(5, dtype)
            losses = fused_objective(made, asked([targets] * 2, 50), graph, V, compile_)
            losses.total.backward()
            found.append([losses.total.detach(), *(t.grad for p in made for t in p[:3] if t is not None)])
        tolerance = {} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(found[1], found[0], **tolerance)
    torch._dynamo.reset()
    assert len(graphs) == 2 * len({64, V % 64})  # looking and gradients, of whole tiles and of the last


def test_bf16_projection_gives_fp32_accuracy_on_its_own_inputs() -> None:
    """With 16-bit weights the logits are still fp32: only the gradients' way through the GEMM is rounded."""
    torch.manual_seed(4)
    targets, ours = torch.randint(V, (50,)), projections(6, torch.bfloat16)
    losses = objective(ours, targets, pair())
    exact = [(h.double() @ w.double().t() + b.double())[:, :V] for h, w, b, *_ in ours]  # type: ignore[union-attr]
    assert losses.total.item() == pytest.approx(float(reference_objective(exact, targets, pair())[0]), rel=1e-5)
    losses.total.backward()
    assert all(t.grad.dtype == torch.bfloat16 for p in ours for t in p[:3])  # type: ignore[union-attr]


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_a_peers_loss_has_no_gradient_for_the_other_peer(tau: float) -> None:
    """∂(loss of i)/∂(parameters of j) is exactly zero: the student alone is weighted, the teacher must not move."""
    made = projections(7)
    graph = DistillationGraph(("teacher", "student"), (0, 1), ((0, 0), (4, 0)), (True, True))
    objective(made, torch.randint(V, (50,)), graph, tau).total.backward()
    assert all(t is not None and (t.grad is None or (t.grad == 0).all()) for t in made[0][:3])
    assert all(t is not None and t.grad is not None and (t.grad != 0).any() for t in made[1][:3])


def test_loss_and_gradient_of_a_peer_do_not_depend_on_others_without_edges() -> None:
    """Soft weights 0: bit for bit the peer alone."""
    targets = torch.randint(V, (50,), generator=torch.Generator().manual_seed(8))
    together, alone = projections(9), projections(9)[1:]
    both = objective(together, targets, pair(soft=(0, 0)))
    one = objective(alone, targets, DistillationGraph(("student",), (1,), ((0,),), (True,)))
    both.total.backward()
    one.total.backward()
    assert both.terms["loss/student/hard"] == one.terms["loss/student/hard"]
    for a, b in zip(together[1][:3], alone[0][:3], strict=True):
        assert a is not None and b is not None and torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_small_gradients_survive_fp16_because_the_loss_scale_comes_first() -> None:
    """p/|P| is below fp16's smallest number for most entries; scaled by 2^16 it is not."""
    torch.manual_seed(10)
    logits = torch.randn(2048, V).half().requires_grad_()
    losses = objective([Projection(logits)], torch.randint(V, (2048,)), random_graph(1, 0))
    (losses.total * 2.0**16).backward()
    assert logits.grad is not None and (logits.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("tile_columns", [64, 192])
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3),
    shared=st.integers(0, 12),
    own=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    tau=st.sampled_from([1.0, 2.0]),
    seed=st.integers(0, 10_000),
)
def test_peers_with_targets_of_their_own_agree_with_the_oracle(
    tile_columns: int, n: int, shared: int, own: list[int], tau: float, seed: int
) -> None:
    """Two masks of the same rows: soft losses at the shared positions, hard losses at each peer's own labels."""
    torch.manual_seed(seed)
    logits = [padded(3 * torch.randn(shared + own[i], PADDED)) for i in range(n)]
    targets = [torch.randint(V, (len(x),)) for x in logits]
    for labels in targets:
        labels[: shared // 2] = -100
    graph = replace(random_graph(n, seed), temperature=tau)
    ours = [x.clone().requires_grad_(trained) for x, trained in zip(logits, graph.trained, strict=True)]
    exact = [x.double().requires_grad_(trained) for x, trained in zip(logits, graph.trained, strict=True)]
    moves = any(graph.hard) or (shared > 0 and any(graph.edges()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fused.TILE_BYTES, "cpu", 4 * max(len(x) for x in logits) * tile_columns)
        found = fused_objective([Projection(x) for x in ours], asked(targets, shared), graph, V)
        if moves:
            found.total.backward()
    total, hard, soft = reference_objective(exact, targets, graph, shared)
    torch.testing.assert_close(found.total.double(), total, rtol=1e-5, atol=1e-5)
    for name, true in named(graph, hard, soft).items():
        torch.testing.assert_close(found.terms[name].double(), true, rtol=1e-5, atol=1e-5)
    if not moves:
        return
    total.backward()
    for i, (mine, true) in enumerate(zip(ours, exact, strict=True)):
        assert (mine.grad is not None) == (graph.trained[i] and i in in_a_loss(graph))
        if mine.grad is not None:
            expected = torch.zeros_like(true) if true.grad is None else true.grad
            torch.testing.assert_close(mine.grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_an_edge_that_begins_late_is_no_edge_before() -> None:
    starts = ((None, Course(0, 1, 0.25)), (Course(0, 4, 0.5), None))
    late = DistillationGraph(("a", "b"), (1, 1), ((0, 1), (4, 0)), (True, True), starts)
    assert [list(late.at(done).edges()) for done in (0.0, 0.2, 0.25, 0.49, 0.5, 1.0)] == [
        *([[]] * 2),
        *([[(0, 1, 1)]] * 2),
        *([[(0, 1, 1), (1, 0, 4)]] * 2),
    ]
    assert pair().at(0.0) == pair()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_every_divergence_has_the_gradient_that_autograd_finds(kind: Divergence, tau: float) -> None:
    """τ (u − p Σ u) in fp64; and no divergence is negative, nor anything but 0 between equals."""
    torch.manual_seed(7)
    z = (3 * torch.randn(20, V, dtype=torch.float64)).requires_grad_()
    log_q = torch.log_softmax(3 * torch.randn(20, V, dtype=torch.float64) / tau, -1)
    log_p = torch.log_softmax(z / tau, -1)
    lost, u = kind.summands(log_p, log_q)
    assert (lost.sum(-1) > 0).all()
    (tau**2 * lost.sum()).backward()
    found = tau * (u - log_p.exp() * u.sum(-1, keepdim=True))
    torch.testing.assert_close(found, z.grad, rtol=1e-12, atol=1e-13)
    assert kind.summands(log_q, log_q)[0].sum(-1).abs().max() < 1e-13


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_soft_losses_are_those_of_other_libraries(beta: float, tau: float) -> None:
    """GKD's divergence (arXiv 2306.13649, eq. 1; TRL and Liger-Kernel), β 0 and 1 the two KLs: theirs has no τ².

    DistillKit's is the first KL with τ² in, as ours. Written with torch's own distributions, which they do not use.
    """
    kind = {0.0: KL, 1.0: Divergence("reverse_kl")}.get(beta, Divergence("jsd", beta))
    torch.manual_seed(3)
    logits = [(3 * torch.randn(23, V)).double() for _ in range(2)]
    teacher, student = (torch.distributions.Categorical(logits=x / tau) for x in logits)
    between = torch.distributions.Categorical(probs=beta * teacher.probs + (1 - beta) * student.probs)
    apart = torch.distributions.kl_divergence
    theirs = {0.0: apart(teacher, student), 1.0: apart(student, teacher)}.get(
        beta, beta * apart(teacher, between) + (1 - beta) * apart(student, between)
    )
    losses = objective([Projection(x.float()) for x in logits], torch.zeros(23).long(), pair(kind=kind), tau)
    assert losses.terms["loss/student/soft/teacher"].item() == pytest.approx(tau**2 * theirs.mean().item(), rel=1e-5)
