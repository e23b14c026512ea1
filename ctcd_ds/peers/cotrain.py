"""The container of all peers: one forward each, one summed loss. This is the module that DeepSpeed wraps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ctcd_ds.objective.batch import Batch
from ctcd_ds.objective.cached import with_cached
from ctcd_ds.objective.fused import Losses, fused_objective
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.peers.build import seed_of
from ctcd_ds.peers.checkpointing import checkpoint_layers
from ctcd_ds.peers.dropout import use_fast_dropout
from ctcd_ds.peers.heads import compilable, project_positions, way_of
from ctcd_ds.peers.signals import Signals
from ctcd_ds.peers.states import States


class Peers(nn.ModuleDict):
    """Peers by name; a name may be that of a method (half, train, eval), which nn.ModuleDict refuses."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Without asking whether the name is an attribute: peers are asked for by [name] only."""
        assert module is not None
        self._modules[name] = module


class CoTraining(nn.Module):
    """N peers and their distillation graph.

    Peers meet in the losses only, through detached targets. Dropout streams are keyed by `seed` and the peer's name,
    so a peer draws the same numbers whoever else is in the run.

    Args:
        peers: Hugging Face models with a language-modelling head and one vocabulary, by the names of the graph.
        vocab_size: columns of their logits from here on are padding.
    Raises UserError where a model gives no logits that could be learned from, or none of the insides that the graph's
    signals are about.
    """

    def __init__(
        self,
        peers: Mapping[str, nn.Module],
        graph: DistillationGraph,
        vocab_size: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.peers = Peers(peers)
        use_fast_dropout(self)
        for peer in self.peers.values():
            way_of(peer)  # found before the first step, in fp32 for whoever learns
        self.signals = Signals(dict(self.peers.items()), graph, seed) if graph.signals else None
        self.graph = graph
        self.vocab_size, self.seed = vocab_size, seed
        self.compiled = False

    def train(self, mode: bool = True) -> CoTraining:
        """Frozen peers stay in eval mode: a finished teacher has no dropout."""
        super().train(mode)
        for name, trained in self._peers():
            if not trained:
                self.peers[name].eval()
        return self

    def _peers(self) -> Iterator[tuple[str, bool]]:
        """(name, whether it learns) of every peer."""
        return zip(self.peers, self.graph.trained, strict=False)  # cached teachers come last in the graph

    def forward(self, batch: Batch, micro_step: int, rank: int = 0, graph: DistillationGraph | None = None) -> Losses:
        """The losses of one micro-batch; `micro_step` counts over the whole run, `graph` is what holds at this step."""
        graph, projections, seen = graph or self.graph, [], []
        live = graph.live
        for n, (name, trained, view) in enumerate(zip(live.names, live.trained, batch.views, strict=True)):
            torch.manual_seed(seed_of(self.seed, "dropout", name, micro_step, rank))
            peer = self.peers[name]
            watch = self.signals.watch(peer, n, graph) if self.signals else nullcontext(States())
            with torch.set_grad_enabled(trained and torch.is_grad_enabled()), watch as states:
                projections.append(project_positions(peer, view.inputs, view.positions))
                seen.append(states)
        losses = fused_objective(projections, batch, live, self.vocab_size, self.compiled)
        losses = with_cached(losses, projections, batch, graph, self.vocab_size)
        return self.signals.added(losses, seen, graph) if self.signals else losses

    def compile_parts(self) -> None:
        """Compiles the objective's functions and each peer's encoder in place; batches have one shape all along.

        An encoder's forward is compiled, not the module: names of weights stay, and hooks run outside of the graph.
        """
        self.compiled = True
        part: Any
        for part in (part for peer in self.peers.values() for part in compilable(peer)):
            part.forward = torch.compile(part.forward, dynamic=False)

    def checkpoint_activations(self) -> None:
        """Of each layer of a trained peer only the input is kept; backward runs the layer again."""
        for name, trained in self._peers():
            if trained:
                checkpoint_layers(self.peers[name])

    def parameter_groups(self, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """AdamW's groups: two a trained peer, with and without weight decay (biases and norms have none).

        `settings[name]` is the peer's OptimizerSection. Groups carry the peer's name under "peer", so that clipping
        and learning rates find it again inside ZeRO.
        """
        groups = []
        for name, trained in self._peers():
            if not trained:
                continue
            own = settings[name]
            parameters = [*self.peers[name].parameters(), *(self.signals.learned_by(name) if self.signals else ())]
            for decay in (True, False):
                members = [p for p in parameters if (p.ndim > 1) == decay]
                common = {"peer": name, "lr": own.lr, "betas": own.betas, "eps": own.eps}
                groups.append({"params": members, "weight_decay": own.weight_decay if decay else 0.0, **common})
        return groups
