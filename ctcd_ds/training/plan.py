"""All that a run needs to know before it starts: recipe, corpus, DeepSpeed config and ranks, checked together.

Making a plan starts no process group and writes nothing. `--dry_run` prints it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctcd_ds.cli import Damage, UserError, count
from ctcd_ds.cluster.scaling import Work, state_bytes
from ctcd_ds.corpus.rows import Corpus, Rows
from ctcd_ds.objective.fused import logits_bytes
from ctcd_ds.peers.accounting import Cost, cost
from ctcd_ds.peers.build import config_mistakes, missing_weights, padded, peer_config
from ctcd_ds.peers.rehearsal import rehearse
from ctcd_ds.recipe import Mistakes, Recipe
from ctcd_ds.tasks import TASKS
from ctcd_ds.tasks.task import Task
from ctcd_ds.training.deepspeed_config import DeepSpeedConfig, resolve

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """A checked run. `rows` are the training rows, `valid` the held-out ones (None: the corpus has none).

    `begun`: peer → the weights that its checkpoint does not hold and that begin as random numbers, where there are any.
    """

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
    begun: dict[str, list[str]]

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
            largest=max(c.largest for c in self.costs.values()),
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
    auto, length = TASKS[recipe.objective.task].auto_class(), recipe.corpus.sequence_length
    if lacking := [role for role in TASKS[recipe.objective.task].roles if role not in corpus.special.present]:
        raise Mistakes("this run", [*mistakes, _lacking(recipe.objective.task, lacking, corpus)])
    for name, section in recipe.peers.items():
        said = list(config_mistakes(section, corpus, length, auto)) or list(
            _tokenizer_mistakes(section.pretrained, corpus)
        )
        mistakes += [f"peers.{name}.{mistake}" for mistake in said]
    begun: dict[str, list[str]] = {}
    if not mistakes:
        begun, mistakes = _begun_at_random(recipe, auto)
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
    configs = {name: peer_config(section, corpus, auto) for name, section in recipe.peers.items()}
    costs: dict[str, Cost] = {}
    for name, peer in configs.items():
        try:
            costs[name] = cost(peer, length, task.asked(recipe, name) / length, auto)
        except UserError as mistake:
            mistakes.append(f"peers.{name}: {mistake}")
    if mistakes:
        raise Mistakes("this run", mistakes)
    return Plan(recipe, corpus, config, world, rows, valid, task, configs, costs, steps, begun)


def _lacking(task: str, roles: Sequence[str], corpus: Corpus) -> str:
    return (
        f"objective.task = {task}: the corpus's tokenizer ({corpus.tokenizer_path}) has no "
        f"{' and no '.join(f'{role}_token' for role in roles)}, which the task needs; train one with `ctcd tokenizer`, "
        "or train causal models (objective.task: clm)"
    )


def rehearse_peers(plan: Plan, device: str) -> None:
    """Tries in small whether each peer will learn on this device, and be saved, loaded and exported.

    Takes a second an architecture. Raises Mistakes with all that would not end well.
    """
    said: dict[str, str | None] = {}
    for config in plan.configs.values():
        if (key := config.to_json_string()) not in said:
            auto, length = plan.task.auto_class(), plan.recipe.corpus.sequence_length
            said[key] = rehearse(config, auto, length, plan.deepspeed.precision, device, plan.task.unfit)
    mistakes = [f"peers.{name}: {said[c.to_json_string()]}" for name, c in plan.configs.items()
                if said[c.to_json_string()]]  # fmt: skip
    if mistakes:
        raise Mistakes("this run", mistakes)


def _steps(recipe: Recipe, rows: int) -> int:
    if recipe.training.steps is not None:
        return recipe.training.steps
    assert recipe.training.epochs is not None
    return int(recipe.training.epochs * rows // recipe.training.global_batch_rows)


def _begun_at_random(recipe: Recipe, auto: Any) -> tuple[dict[str, list[str]], list[str]]:
    """(peer → the weights that its checkpoint does not hold, where there are any; what is wrong with checkpoints)."""
    missing, mistakes = {}, []
    for name, section in recipe.peers.items():
        if section.pretrained is None:
            continue
        here = f"peers.{name}.pretrained = {section.pretrained!r}"
        try:
            weights = missing_weights(section.pretrained, auto)
        except UserError as mistake:
            mistakes.append(f"{here}: {mistake}")
            continue
        if weights and section.frozen:
            mistakes.append(
                f"{here}: a frozen peer teaches what it knows, and this checkpoint lacks {_some(weights)}: they would "
                "be random numbers"
            )
        elif weights:
            missing[name] = weights
    return missing, mistakes


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


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
    lines += [f"  {name}: not in its checkpoint, begins at random: {_some(new)}" for name, new in plan.begun.items()]
    states, activations = memory_per_rank(plan)
    rows_seen = plan.steps * training.global_batch_rows
    epochs, tokens = rows_seen / len(plan.rows), plan.steps * plan.tokens_per_step
    lines += [
        "",
        f"corpus         {plan.corpus.path}: {len(plan.rows):,} rows of {length} tokens, "
        f"{len(plan.valid) if plan.valid else 0:,} held out; vocabulary {plan.corpus.vocab_size:,}, "
        f"{padded(plan.corpus.vocab_size):,} inside the models",
        f"targets        {plan.task.describe()} ({recipe.objective.task}), temperature "
        f"{recipe.objective.temperature:g}",
        f"batch          {training.global_batch_rows} rows = {count(plan.world, 'rank')} × "
        f"{count(config.micro_batch, 'row')} × {config.accumulation} accumulation",
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
    """What the layers of trained peers put out, and the objective's fp32 logits."""
    config, recipe = plan.deepspeed, plan.recipe
    tokens = config.micro_batch * recipe.corpus.sequence_length
    values = sum(c.activations for name, c in plan.costs.items() if not recipe.peers[name].frozen)
    return config.weight_bytes * tokens * values + sum(
        logits_bytes(config.micro_batch * plan.task.asked(recipe, name), plan.corpus.vocab_size)
        for name in plan.configs
    )
