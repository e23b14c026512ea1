"""How far a learner's distribution p is from its teacher's q, and the gradient of that by the learner's logits.

All have one form. With the summand l(p, q) over the vocabulary and u = p · ∂l/∂p, the loss is τ² Σ l, and its gradient
by the learner's logits is τ (u − p Σ u), where p and q are softened by τ. With m = β q + (1−β) p:

    kl           l = q log(q/p)                              u = −q                  Hinton et al., 2015
    reverse_kl   l = p log(p/q)                              u = l (+ p, which changes nothing)
    jsd          l = β q log(q/m) + (1−β) p log(p/m)         u = (1−β) p log(p/m)    GKD, arXiv 2306.13649
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # recipes know divergences, and are read without torch
    from torch import Tensor

Kind = Literal["kl", "reverse_kl", "jsd"]


@dataclass(frozen=True)
class Divergence:
    """A kind, and the teacher's share β (0 < β < 1) in the mixture of a Jensen-Shannon divergence."""

    kind: Kind = "kl"
    beta: float = 0.5

    def pair(self, learner: int, teacher: int) -> tuple[int, int] | None:
        """(a, b) where it is KL(p_a ‖ p_b), of which the sum can be had before the normalisers are known; else None."""
        return {"kl": (teacher, learner), "reverse_kl": (learner, teacher), "jsd": None}[self.kind]

    def summands(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """(l, u) at each token, from the learner's and the teacher's log-probabilities of any one shape."""
        p = log_p.exp()
        if self.kind == "kl":
            q = log_q.exp()
            return q * (log_q - log_p), -q
        if self.kind == "reverse_kl":
            lost = p * (log_p - log_q)
            return lost, lost
        # As logarithms: products of probabilities would end as 0 · ∞ where logits are sharp.
        log_m = (log_q + math.log(self.beta)).logaddexp(log_p + math.log1p(-self.beta))
        own = (1 - self.beta) * p * (log_p - log_m)
        return own + self.beta * log_q.exp() * (log_q - log_m), own

    def __str__(self) -> str:
        return {"kl": "KL", "reverse_kl": "reverse KL", "jsd": f"JSD, β {self.beta:g}"}[self.kind]


KL = Divergence()
