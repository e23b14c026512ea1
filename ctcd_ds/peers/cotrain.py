"""The container of all peers: one forward each, one summed loss. This is the module that DeepSpeed wraps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ctcd_ds.corpus.views import View
from ctcd_ds.objective.fused import Losses, fused_objective
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.peers.build import seed_of
from ctcd_ds.peers.dropout import quicken_dropout
from ctcd_ds.peers.heads import compilable, project_positions, way_of


class Batch(NamedTuple):
    """One micro-batch as the peers see it.

    input_ids: int64 [B, L]. positions: int64 [P], flat indices into B·L, where logits are needed.
    targets: int64 [P], −100 where only the soft loss counts.
    hard_count, soft_count: this micro-batch's share of the positions (see `fused_objective`).
    views: peer → what it sees instead, where peers do not all see the same: then one for each, and the first `shared`
    of their positions are those of the soft losses.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    hard_count: float | Tensor
    soft_count: float | Tensor
    views: Mapping[str, View] | None = None
    shared: int | None = None


class CoTraining(nn.Module):
    """N peers and their distillation graph.

    Peers meet in the objective only, through detached targets. Dropout streams are keyed by the peer's name, so a
    peer draws the same numbers whoever else is in the run.
    """

    def __init__(
        self, peers: Mapping[str, nn.Module], graph: DistillationGraph, vocab_size: int, temperature: float, seed: int
    ) -> None:
        super().__init__()
        self.peers = nn.ModuleDict(peers)
        quicken_dropout(self)
        for peer in self.peers.values():
            way_of(peer)  # found in fp32, before the first step
        self.graph = graph
        self.vocab_size, self.temperature, self.seed = vocab_size, temperature, seed

    def train(self, mode: bool = True) -> CoTraining:
        """Frozen peers stay in eval mode: a finished teacher has no dropout."""
        super().train(mode)
        for name, trained in zip(self.graph.names, self.graph.trained, strict=True):
            if not trained:
                self.peers[name].eval()
        return self

    def forward(self, batch: Batch, micro_step: int, rank: int, graph: DistillationGraph | None = None) -> Losses:
        """The losses of one micro-batch; `micro_step` counts over the whole run, `graph` is what holds at this step."""
        views = [batch.views[name] if batch.views else None for name in self.graph.names]
        projections = []
        for name, trained, view in zip(self.graph.names, self.graph.trained, views, strict=True):
            torch.manual_seed(seed_of(self.seed, "dropout", name, micro_step, rank))
            seen = view or batch
            with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                projections.append(project_positions(self.peers[name], {"input_ids": seen.input_ids}, seen.positions))
        return fused_objective(
            projections,
            [(view or batch).targets for view in views],
            self.graph if graph is None else graph,
            self.vocab_size,
            self.temperature,
            [float(view.hard_count) if view else batch.hard_count for view in views],
            batch.soft_count,
            batch.shared,
        )

    def compile_encoders(self) -> None:
        """Compiles each peer's encoder in place (names of weights stay); rows and batches have one shape all along.

        Its forward is compiled, not the module: hooks then run outside of the graph, which stays one.
        """
        part: Any
        for part in (part for peer in self.peers.values() for part in compilable(peer)):
            part.forward = torch.compile(part.forward, dynamic=False)

    def parameter_groups(self, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """AdamW's groups: two a trained peer, with and without weight decay (biases and norms have none).

        `settings[name]` is the peer's OptimizerSection. Groups carry the peer's name under "peer", so that clipping
        and learning rates find it again inside ZeRO.
        """
        groups = []
        for name, trained in zip(self.graph.names, self.graph.trained, strict=True):
            if not trained:
                continue
            own = settings[name]
            parameters = list(self.peers[name].parameters())
            for decay in (True, False):
                members = [p for p in parameters if (p.ndim > 1) == decay]
                common = {"peer": name, "lr": own.lr, "betas": own.betas, "eps": own.eps}
                groups.append({"params": members, "weight_decay": own.weight_decay if decay else 0.0, **common})
        return groups
