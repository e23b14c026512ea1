"""The model of step time as people read it: a table of sizes, and what to change at one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, sqrt

from ctcd_ds.cluster.scaling import Cluster, Work, predict

BUCKETS = 8  # enough that little is left for the last, few enough that latency does not count
WORTHWHILE = 1.03  # times the efficiency: a change that brings less is not named
ENOUGH = 0.85  # the efficiency that a larger batch is looked for
LARGEST_GROWTH = 16  # times the batch; beyond that it is another experiment
COLUMNS = (
    *("GPUs", "ZeRO", "rows", "a GPU", "compute ms", "memory ms", "reduce ms", "hidden ms", "gather ms", "step ms"),
    *("tokens/s", "efficiency", "GiB a GPU"),
)


def step_table(sizes: Sequence[tuple[Work, Cluster]]) -> str:
    """One line a size, as a Markdown table. `a GPU`: micro-batch × accumulation; times are those of one step."""
    return _aligned([COLUMNS, *(_line(work, cluster) for work, cluster in sizes)])


def _line(work: Work, cluster: Cluster) -> tuple[str, ...]:
    step = predict(work, cluster)
    times = (step.compute_s, step.memory_s, step.reduce_s, step.hidden_s, step.gather_s, step.step_s)
    return (
        *(f"{cluster.world:,}", str(work.stage), f"{step.rows:,}", f"{work.micro_batch} × {work.accumulation}"),
        *(_three_digits(1000 * seconds) for seconds in times),
        *(_pace(step.tokens_per_s), f"{step.efficiency:.0%}", f"{step.gpu_bytes / 2**30:.1f}"),
    )


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _pace(tokens_per_s: float) -> str:
    return f"{tokens_per_s / 1e6:,.2f} M" if tokens_per_s >= 1e6 else f"{tokens_per_s:,.0f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *lines = ("| " + " | ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows)
    return "\n".join([head, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|", *lines])


def improve(work: Work, cluster: Cluster) -> tuple[Work, list[str]]:
    """The work with the changes that help, one on top of the other, and each in words with what it brings.

    First how DeepSpeed communicates; then, where that is not enough, the batch, which changes the training.
    """
    work, said = _communicate_better(work, cluster)
    for growth in (2**k for k in range(LARGEST_GROWTH.bit_length())):
        larger = replace(work, micro_batch=work.micro_batch * growth)
        tuned, more = _communicate_better(larger, cluster)
        if predict(tuned, cluster).efficiency >= ENOUGH:
            if growth > 1:
                rows = f"training.global_batch_rows = {predict(larger, cluster).rows} (× {growth}), optimizer.lr × "
                text = f"{rows}{sqrt(growth):.2g}, warm-up over as many rows as before"
                said += [_in_words(text, work, larger, cluster), *more]
            return tuned, said
    growth = f"a batch {LARGEST_GROWTH} times as large would not fill {cluster.world:,} GPUs"
    return work, [*said, f"{growth}: take fewer for a run, and run seeds or recipes beside each other"]


def _communicate_better(work: Work, cluster: Cluster) -> tuple[Work, list[str]]:
    said = []
    for change in (_buckets, _reduce_once, _short_gradients):
        changed, text = change(work)
        if predict(changed, cluster).efficiency >= WORTHWHILE * predict(work, cluster).efficiency:
            said.append(_in_words(text, work, changed, cluster))
            work = changed
    return work, said


def _in_words(text: str, work: Work, changed: Work, cluster: Cluster) -> str:
    before, after = predict(work, cluster), predict(changed, cluster)
    memory = f"{before.gpu_bytes / 2**30:.1f} → {after.gpu_bytes / 2**30:.1f} GiB a GPU"
    return f"{text}: efficiency {before.efficiency:.0%} → {after.efficiency:.0%}, {memory}"


def _buckets(work: Work) -> tuple[Work, str]:
    bucket = min(work.bucket, max(work.largest, ceil(work.trained / BUCKETS)))
    # Without contiguous buckets DeepSpeed waits for the device before each reduction that could overlap.
    settings = f'"overlap_comm": true, "contiguous_gradients": true, "reduce_bucket_size": {bucket}'
    text = f"zero_optimization: {settings} (backward hides a part of the reduction)"
    return replace(work, overlap=True, contiguous=True, bucket=bucket), text


def _reduce_once(work: Work) -> tuple[Work, str]:
    return replace(work, stage=1), 'zero_optimization: "stage": 1 (it reduces once a step, not each micro-step)'


def _short_gradients(work: Work) -> tuple[Work, str]:
    text = '"communication_data_type": "bf16" (with fp16: "fp16"; sums over ranks are then rounded to 16 bits)'
    return replace(work, wire_bytes=min(work.wire_bytes, work.weight_bytes)), text
