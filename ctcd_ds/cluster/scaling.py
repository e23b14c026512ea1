"""How long a step takes on N nodes × G GPUs: a model of computation, communication and memory, by arithmetic alone.

One optimizer step is `accumulation` micro-steps on every GPU. Its parts, in seconds:

    compute    micro-batch × accumulation × length × FLOPs per token / achieved FLOP/s of a GPU
    reduce     all-reduce of the gradients, bucket by bucket: once a step (ZeRO 1), each micro-step (ZeRO 2)
    gather     all-gather of the weights that each rank has updated, once a step
    exchange   the small all-reduce of losses and norms, once a step
    memory     copies of gradients into buckets, and AdamW over this rank's share, at the memory's bandwidth

ZeRO's paper (Rajbhandari et al. 2020, arXiv 1910.02054, §7) reduce-scatters gradients: Ψ values on the wire. DeepSpeed
0.19's stages 1 and 2 all-reduce each bucket by default (`use_multi_rank_bucket_allreduce`), 2Ψ, and keep their share:
what is modelled is what DeepSpeed does. With `overlap_comm` a bucket is reduced while backward fills the next one;
the last bucket has nothing left to hide behind.

Collectives cost α + bytes/β for each message (Hockney 1994; Thakur, Rabenseifner, Gropp 2005): a ring within a node,
then all GPUs of the same place in their nodes together, each with 1/G of the data over its own link, and log2(N) rounds
(NCCL's trees). Latencies are NCCL's own (src/graph/tuning.cc, protocol Simple).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, log2

BUCKET_PASSES = 6  # reads and writes of a gradient a reduction: into the bucket, ÷ ranks, flattened, back
ADAMW_BYTES = 28  # a parameter: master, two moments, gradient read, the first three written, fp32 each


@dataclass(frozen=True)
class Work:
    """What one GPU does in one optimizer step, and how DeepSpeed is told to do it.

    trained, frozen: parameters over all peers. flops_per_token: forward and backward over all peers.
    weight_bytes, wire_bytes, gradient_bytes: of one weight in the model, one gradient in communication
    (`communication_data_type`) and one accumulated gradient (`grad_accum_dtype`).
    bucket: elements of `reduce_bucket_size`; largest: elements of the largest weight, which no bucket cuts.
    contiguous: whether gradients are copied into buckets that are kept (`contiguous_gradients`), or flattened in turn.
    activation_bytes: of one row of a micro-batch.
    """

    micro_batch: int
    accumulation: int
    sequence_length: int
    flops_per_token: float
    trained: int
    frozen: int = 0
    stage: int = 2
    weight_bytes: int = 2
    wire_bytes: int = 2
    gradient_bytes: int = 2
    overlap: bool = False
    bucket: int = 500_000_000
    largest: int = 0
    contiguous: bool = True
    activation_bytes: float = 0.0

    @property
    def buckets(self) -> int:
        """All-reduces that one reduction of all gradients takes."""
        return max(1, ceil(self.trained / max(self.bucket, self.largest)))


@dataclass(frozen=True)
class Cluster:
    """`nodes` × `gpus` equal GPUs. Rates are what one GPU reaches, bandwidths are one direction of one GPU's link.

    flops: FLOP/s achieved. node_link, link: bytes/s within a node and between nodes. memory: bytes/s of its memory.
    node_latency, latency: seconds a message within a node and between nodes.
    """

    nodes: int
    gpus: int
    flops: float
    link: float
    node_link: float = 450e9
    memory: float = 2e12
    latency: float = 14e-6
    node_latency: float = 3.4e-6

    @property
    def world(self) -> int:
        """Ranks: one a GPU."""
        return self.nodes * self.gpus

    def all_gather_s(self, size: float) -> float:
        """Seconds until each GPU has `size` bytes, of which each brought its share."""
        within = (self.gpus - 1) * (self.node_latency + size / self.gpus / self.node_link)
        share = size / self.gpus * (self.nodes - 1) / self.nodes
        return within + ceil(log2(self.nodes)) * self.latency + share / self.link

    def all_reduce_s(self, size: float) -> float:
        """Seconds until each GPU has the sum of `size` bytes: a reduce-scatter, which costs as much, and a gather."""
        return 2 * self.all_gather_s(size)


@dataclass(frozen=True)
class StepTime:
    """A predicted step. Seconds of a step, bytes of a GPU; `reduce_s` is all of it, `hidden_s` what backward hides.

    efficiency: tokens/s of a GPU, of what one GPU alone reaches that does all micro-steps and then one update.
    """

    rows: int
    compute_s: float
    memory_s: float
    reduce_s: float
    hidden_s: float
    gather_s: float
    exchange_s: float
    tokens_per_s: float
    efficiency: float
    state_bytes: float
    bucket_bytes: float
    activation_bytes: float

    @property
    def communication_s(self) -> float:
        """What communication adds to the step."""
        return self.reduce_s - self.hidden_s + self.gather_s + self.exchange_s

    @property
    def step_s(self) -> float:
        """The whole step."""
        return self.compute_s + self.memory_s + self.communication_s

    @property
    def gpu_bytes(self) -> float:
        """Memory of a GPU; activations are a rough estimate, and fragments and CUDA's own are not in it."""
        return self.state_bytes + self.bucket_bytes + self.activation_bytes


def predict(work: Work, cluster: Cluster) -> StepTime:
    """The step of `work` on every GPU of `cluster`."""
    step = _step(work, cluster)
    alone = replace(work, accumulation=work.accumulation * cluster.world, stage=1)
    return replace(
        step, efficiency=_step(alone, replace(cluster, nodes=1, gpus=1)).step_s / cluster.world / step.step_s
    )


def _step(work: Work, cluster: Cluster) -> StepTime:
    tokens = work.micro_batch * work.accumulation * work.sequence_length
    compute_s = tokens * work.flops_per_token / cluster.flops
    reductions = 1 if work.stage == 1 else work.accumulation
    one_reduction = work.buckets * cluster.all_reduce_s(work.wire_bytes * work.trained / work.buckets)
    backward_s = compute_s / work.accumulation * 2 / 3  # of one micro-step; backward is two forwards of three
    hidden_s = 0.0
    if work.overlap:
        before_the_last = (work.buckets - 1) / work.buckets
        hidden_s = min(before_the_last * one_reduction, before_the_last * backward_s)
    copied = reductions * BUCKET_PASSES * work.weight_bytes * work.trained
    updated = (ADAMW_BYTES + work.weight_bytes) * work.trained / cluster.world
    step = StepTime(
        rows=work.micro_batch * work.accumulation * cluster.world,
        compute_s=compute_s,
        memory_s=(copied + updated) / cluster.memory,
        reduce_s=reductions * one_reduction,
        hidden_s=reductions * hidden_s,
        gather_s=cluster.all_gather_s(work.weight_bytes * work.trained),
        exchange_s=cluster.all_reduce_s(0),
        tokens_per_s=0.0,
        efficiency=1.0,
        state_bytes=state_bytes(work, cluster.world),
        bucket_bytes=_bucket_bytes(work),
        activation_bytes=work.micro_batch * work.activation_bytes,
    )
    return replace(step, tokens_per_s=tokens * cluster.world / step.step_s)


def state_bytes(work: Work, world: int) -> float:
    """Weights, gradients, fp32 masters and two Adam moments on one of `world` ranks (ZeRO's paper, §5).

    Masters and moments are cut by the number of ranks, gradients too at stage 2.
    """
    gradients = work.gradient_bytes * work.trained / (world if work.stage == 2 else 1)
    return work.weight_bytes * (work.trained + work.frozen) + gradients + 12 * work.trained / world


def _bucket_bytes(work: Work) -> float:
    """Contiguous buckets are allocated in full, whatever the peers' size; two of them where communication overlaps."""
    held = work.gradient_bytes if work.stage == 1 else work.weight_bytes
    if not work.contiguous:
        return held * min(work.bucket, work.trained)
    return held * work.bucket * (2 if work.overlap else 1)
