"""All that a run needs to know before it starts: recipe, corpus, DeepSpeed config and ranks, checked together.

Making a plan starts no process group and writes nothing. `--dry_run` prints it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctcd_ds.cli import Damage, UserError
from ctcd_ds.cluster.scaling import Work, state_bytes
from ctcd_ds.corpus.rows import Corpus, Rows
from ctcd_ds.objective.fused import logits_bytes
from ctcd_ds.peers.accounting import Cost, cost
from ctcd_ds.peers.build import config_mistakes, padded, peer_config
from ctcd_ds.recipe import Mistakes, Recipe
from ctcd_ds.tasks import TASKS
from ctcd_ds.tasks.task import Task
from ctcd_ds.training.deepspeed_config import DeepSpeedConfig, resolve

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """A checked run. `rows` are the training rows, `valid` the held-out ones (None: the corpus has none)."""

    recipe: Recipe
    corpus: Corpus
    deepspeed: DeepSpeedConfig
    world: int
    rows: Rows
    valid: Rows | None
    task: Task
    configs: dict[str, Any]
    costs: dict[str, Cost]
    steps: int

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.training.global_batch_rows * self.recipe.corpus.sequence_length

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs per token over all peers: backward is two forwards; a frozen peer has none."""
        return sum(c.forward_flops * (1 if self.recipe.peers[name].frozen else 3) for name, c in self.costs.items())

    @property
    def trained(self) -> int:
        """Parameters of all peers that are trained."""
        return sum(c.parameters for name, c in self.costs.items() if not self.recipe.peers[name].frozen)

    @property
    def work(self) -> Work:
        """A rank's part of one step, for the model of step time."""
        config = self.deepspeed
        return Work(
            micro_batch=config.micro_batch,
            accumulation=config.accumulation,
            sequence_length=self.recipe.corpus.sequence_length,
            flops_per_token=self.flops_per_token,
            trained=self.trained,
            frozen=sum(c.parameters for c in self.costs.values()) - self.trained,
            stage=config.stage,
            weight_bytes=config.weight_bytes,
            wire_bytes=config.wire_bytes,
            gradient_bytes=config.gradient_bytes,
            overlap=bool(config.zero.overlap_comm),
            bucket=config.zero.reduce_bucket_size,
            largest=max(padded(self.corpus.vocab_size) * c.hidden_size for c in self.configs.values()),
            activation_bytes=_activation_bytes(self) / config.micro_batch,
        )


def make_plan(recipe: Recipe, deepspeed_json: dict[str, Any], world: int, device: str, output_dir: Path) -> Plan:
    """Checks everything that can be known before the start. Raises Mistakes with all that is wrong."""
    config, mistakes = resolve(deepspeed_json, recipe, world, device, output_dir)
    try:
        corpus = Corpus.open(Path(recipe.corpus.path))
    except Damage:
        raise
    except UserError as mistake:
        raise Mistakes("this run", [*mistakes, f"corpus.path = {recipe.corpus.path!r}: {mistake}"]) from None
    for name, section in recipe.peers.items():
        said = list(config_mistakes(section, corpus, recipe.corpus.sequence_length))
        said = said or list(_tokenizer_mistakes(section.pretrained, corpus))
        mistakes += [f"peers.{name}.{mistake}" for mistake in said]
    task, rows, valid = TASKS[recipe.objective.task].of(recipe, corpus), None, None
    try:
        rows = task.rows("train")
        valid = task.rows("valid") if corpus.tokens("valid") else None
    except UserError as mistake:
        mistakes.append(f"corpus.sequence_length = {recipe.corpus.sequence_length}: {mistake}")
    steps = _steps(recipe, len(rows)) if rows is not None else 1
    if steps < 1:
        mistakes.append(
            f"training.epochs = {recipe.training.epochs}: {recipe.training.epochs} × {len(rows or ())} rows is less "
            f"than one batch of {recipe.training.global_batch_rows}"
        )
    if mistakes or config is None or rows is None:
        raise Mistakes("this run", mistakes)
    configs = {name: peer_config(section, corpus) for name, section in recipe.peers.items()}
    length = recipe.corpus.sequence_length
    costs = {name: cost(c, length, task.asked(recipe, name) / length) for name, c in configs.items()}
    return Plan(recipe, corpus, config, world, rows, valid, task, configs, costs, steps)


def _steps(recipe: Recipe, rows: int) -> int:
    if recipe.training.steps is not None:
        return recipe.training.steps
    assert recipe.training.epochs is not None
    return int(recipe.training.epochs * rows // recipe.training.global_batch_rows)


def _tokenizer_mistakes(pretrained: str | None, corpus: Corpus) -> Iterator[str]:
    if pretrained is None:
        return
    from ctcd_ds.corpus.tokenizer import load_tokenizer, tokenizer_identity

    try:
        theirs = tokenizer_identity(load_tokenizer(Path(pretrained)))
    except UserError as mistake:
        yield f"pretrained = {pretrained!r}: its tokenizer must be the corpus's, and cannot be read: {mistake}"
        return
    if theirs["vocabulary"] != corpus.vocabulary:
        yield (
            f"pretrained = {pretrained!r}: its tokenizer ({theirs['vocab_size']} tokens) is not the corpus's "
            f"({corpus.vocab_size} tokens, {corpus.tokenizer_path}): all peers must read the same ids"
        )


def describe(plan: Plan) -> str:
    """The plan as text: peers, graph, cost, batch, length."""
    recipe, config = plan.recipe, plan.deepspeed
    training, length = recipe.training, recipe.corpus.sequence_length
    lines = [f"{'peer':<14}{'architecture':<14}{'parameters':>12}{'w/o embed.':>12}  {'FLOPs/token':>12}  source"]
    for name, section in recipe.peers.items():
        c, model_type = plan.costs[name], plan.configs[name].model_type
        flops = c.forward_flops * (1 if section.frozen else 3)
        source = f"{section.pretrained or 'from scratch'}{', frozen' if section.frozen else ''}"
        sizes = f"{c.parameters:>12,}{c.without_embeddings:>12,}  {flops / 1e6:>10.1f} M"
        lines.append(f"{name:<14}{model_type:<14}{sizes}  {source}")
    lines += ["", "distillation graph", *(f"  {line}" for line in recipe.graph().describe())]
    lines += [f"  {name}: {said}" for name, said in plan.task.exceptions()]
    states, activations = memory_per_rank(plan)
    rows_seen = plan.steps * training.global_batch_rows
    epochs, tokens = rows_seen / len(plan.rows), plan.steps * plan.tokens_per_step
    lines += [
        "",
        f"corpus         {plan.corpus.path}: {len(plan.rows):,} rows of {length} tokens, "
        f"{len(plan.valid) if plan.valid else 0:,} held out; vocabulary {plan.corpus.vocab_size:,}, "
        f"{padded(plan.corpus.vocab_size):,} inside the models",
        f"targets        {plan.task.describe()} ({recipe.objective.task}), soft loss at "
        f"{recipe.objective.soft_positions}, temperature {recipe.objective.temperature:g}",
        f"batch          {training.global_batch_rows} rows = {plan.world} ranks × {config.micro_batch} rows "
        f"× {config.accumulation} accumulation",
        f"length         {plan.steps:,} steps, {rows_seen:,} rows ({epochs:.2f} epochs), "
        f"{tokens:,} tokens, {tokens * plan.flops_per_token:.3g} FLOPs",
        f"FLOPs/token    {plan.flops_per_token / 1e6:.1f} M (forward, backward; heads where logits are needed)",
        f"DeepSpeed      ZeRO {config.stage}, {config.precision}",
        f"checkpoints    about {checkpoint_bytes(plan) / GIB:.2f} GiB each",
        f"memory a rank  {states / GIB:.2f} GiB model states, about {activations / GIB:.2f} GiB activations (estimate)",
    ]
    return "\n".join(lines)


def checkpoint_bytes(plan: Plan) -> int:
    """Size of one checkpoint, all ranks together: weights, fp32 masters and two Adam moments of every trained peer."""
    return (12 + plan.deepspeed.weight_bytes) * plan.trained + plan.world * 2**20


def memory_per_rank(plan: Plan) -> tuple[float, float]:
    """(bytes of weights, gradients, master weights and Adam states; bytes of activations, a rough estimate)."""
    return state_bytes(plan.work, plan.world), _activation_bytes(plan)


def _activation_bytes(plan: Plan) -> float:
    """17 values a token, layer and hidden unit, and the objective's fp32 logits."""
    config, recipe = plan.deepspeed, plan.recipe
    tokens = config.micro_batch * recipe.corpus.sequence_length
    widths = [c.hidden_size * c.num_hidden_layers for name, c in plan.configs.items() if not recipe.peers[name].frozen]
    return 17 * config.weight_bytes * tokens * sum(widths) + sum(
        logits_bytes(config.micro_batch * plan.task.asked(recipe, name), plan.corpus.vocab_size)
        for name in plan.configs
    )
