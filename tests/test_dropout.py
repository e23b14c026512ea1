"""Our dropout on the CPU does what torch's does: the share, the scale, the gradient; and it repeats with its seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.peers.cotrain import CoTraining
from ctcd_ds.peers.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1 / 65536])
@pytest.mark.parametrize("shape", [(1000, 1000), (999, 1001), (7,)])
def test_each_value_is_dropped_with_p_and_the_mean_stays(p: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    out = Dropout(p)(torch.ones(shape, dtype=torch.float64))
    kept, number = out != 0, out.numel()
    spread = (p * (1 - p) / number) ** 0.5  # of the share, over masks
    assert abs((1 - kept.double().mean().item()) - p) < 5 * spread + 1 / 65536
    assert torch.allclose(out[kept], torch.tensor(1 / (1 - round(p * 65536) / 65536), dtype=torch.float64))
    assert out.shape == torch.Size(shape)


@pytest.mark.parametrize("lag", range(1, 9))
def test_neighbours_are_dropped_independently(lag: int) -> None:
    """Four neighbours come of one draw."""
    torch.manual_seed(1)
    dropped = (Dropout(0.3)(torch.ones(400_000)) == 0).double()
    both = (dropped[:-lag] * dropped[lag:]).mean().item()
    assert both == pytest.approx(0.09, abs=5 * (0.09 * 0.91 / 400_000) ** 0.5)


def test_the_gradient_goes_where_the_value_went() -> None:
    x = torch.randn(64, 65, dtype=torch.float64, requires_grad=True)
    out = Dropout(0.25)(x)
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad * x, out)


def test_the_seed_decides_and_evaluation_changes_nothing() -> None:
    x, dropout = torch.randn(50, 50), Dropout(0.1)
    masks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        masks.append(dropout(x))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_at_the_ends_it_is_torchs(p: float) -> None:
    x = torch.randn(5, 5)
    assert torch.equal(Dropout(p)(x), nn.Dropout(p)(x))


def test_every_dropout_of_a_peer_that_trains_is_ours() -> None:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForMaskedLM(BertConfig(vocab_size=32, hidden_dropout_prob=0.2, **sizes))
    before = list(model.state_dict())
    CoTraining({"only": model}, DistillationGraph(("only",), (1.0,), ((0.0,),), (True,)), 10)
    found = [part for part in model.modules() if isinstance(part, nn.Dropout)]
    assert found and {(type(part), part.p) for part in found} <= {(Dropout, 0.2), (Dropout, 0.1)}
    assert list(model.state_dict()) == before
