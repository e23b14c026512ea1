"""All that a run needs to know before it starts: recipe, corpus, DeepSpeed config and ranks, checked together.

Making a plan starts no process group and writes nothing. `--dry_run` prints it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ctcd_ds.cli import Damage, UserError, count, some
from ctcd_ds.cluster.scaling import Work, state_bytes
from ctcd_ds.corpus.mixture import open_corpus
from ctcd_ds.corpus.rows import Corpus, Role, Rows
from ctcd_ds.manifest import read_json
from ctcd_ds.objective.course import in_words
from ctcd_ds.objective.fused import logits_bytes
from ctcd_ds.peers.accounting import Cost, cost
from ctcd_ds.peers.build import config_mistakes, missing_weights, padded, peer_config
from ctcd_ds.peers.rehearsal import rehearse, tokenizer_mistake
from ctcd_ds.peers.signals import SignalCost, signal_cost, signal_mistakes, watched
from ctcd_ds.peers.states import planned_shapes
from ctcd_ds.peers.vocabulary import KEPT, new_tokens
from ctcd_ds.recipe.schema import Mistakes
from ctcd_ds.recipe.sections import PeerSection, Recipe
from ctcd_ds.tasks import TASKS
from ctcd_ds.tasks.cache import Cache, CachedTeachers, what_is_asked
from ctcd_ds.tasks.task import Task
from ctcd_ds.training.deepspeed_config import DeepSpeedConfig, resolve

GIB = 2**30
ENOUGH_EPOCHS = 4  # of one source of a mixture; beyond, the dry run warns


@dataclass(frozen=True)
class Plan:
    """A checked run. `rows` are the training rows, `valid` the held-out ones of each split that the corpus has.

    `sections`: the recipe's peers, or how they begin again in a run that has a checkpoint (`make_plan`).
    `begun`: peer → the weights that its checkpoint does not hold and that begin as random numbers, where there are any.
    `signals`: what is learned, and done, beside the peers (`peers/signals.py`).
    `new_tokens`: peer → the corpus's tokens that its checkpoint does not know, where there are any.
    `teachers`: the cached ones, where the recipe has some.
    """

    recipe: Recipe
    corpus: Corpus
    deepspeed: DeepSpeedConfig
    world: int
    device: str
    rows: Rows
    valid: dict[str, Rows]
    task: Task
    configs: dict[str, Any]
    costs: dict[str, Cost]
    steps: int
    sections: Mapping[str, PeerSection]
    begun: dict[str, list[str]]
    new_tokens: dict[str, list[int]]
    signals: SignalCost
    teachers: CachedTeachers | None

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.training.global_batch_rows * self.recipe.corpus.sequence_length

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs per token: of all peers, and `flops_beside`."""
        return sum(peer_flops(self.recipe, self.costs).values()) + self.flops_beside

    @property
    def flops_beside(self) -> float:
        """Training FLOPs per token of cached teachers, hidden states and relations."""
        return flops_beside(self.recipe, self.costs, self.signals)

    @property
    def work_flops_per_token(self) -> float:
        """`flops_per_token`, and the forward passes that activation checkpointing does again."""
        again = [c.forward_flops for name, c in self.costs.items() if not self.recipe.peers[name].frozen]
        return self.flops_per_token + self.recipe.training.activation_checkpointing * sum(again)

    @property
    def trained(self) -> int:
        """Parameters that are trained, of all peers and maps."""
        peers = (c.parameters for name, c in self.costs.items() if not self.recipe.peers[name].frozen)
        return self.signals.parameters + sum(peers)

    @property
    def work(self) -> Work:
        """A rank's part of one step, for the model of step time."""
        config = self.deepspeed
        return Work(
            micro_batch=config.micro_batch,
            accumulation=config.accumulation,
            sequence_length=self.recipe.corpus.sequence_length,
            flops_per_token=self.work_flops_per_token,
            trained=self.trained,
            frozen=sum(c.parameters for name, c in self.costs.items() if self.recipe.peers[name].frozen),
            stage=config.stage,
            weight_bytes=config.weight_bytes,
            wire_bytes=config.wire_bytes,
            gradient_bytes=config.gradient_bytes,
            overlap=bool(config.zero.overlap_comm),
            bucket=config.zero.reduce_bucket_size,
            contiguous=config.zero.contiguous_gradients,
            largest=max(c.largest for c in self.costs.values()),
            activation_bytes=_activation_bytes(self) / config.micro_batch,
        )


def make_plan(
    recipe: Recipe,
    deepspeed_json: dict[str, Any],
    world: int,
    device: str,
    output_dir: Path,
    saved: Path | None = None,
) -> Plan:
    """Checks everything that can be known before the start. Raises Mistakes with all that is wrong.

    `saved`: the peers' configs in the directory of a run that has a checkpoint. Weights come from there, so that what
    its trained peers began from is not asked for.
    """
    config, mistakes = resolve(deepspeed_json, recipe, world, device, output_dir)
    kind, length = TASKS[recipe.objective.task], recipe.corpus.sequence_length
    try:
        corpus = open_corpus(recipe.corpus)
    except Mistakes as more:
        raise Mistakes("this run", [*mistakes, *more.mistakes]) from None
    if lacking := [role for role in kind.roles if role not in corpus.special.present]:
        raise Mistakes("this run", [*mistakes, _lacking(recipe.objective.task, lacking, corpus)])

    auto, task = kind.auto_class(), kind.of(recipe, corpus)
    sections = {name: _saved(section, saved and saved / name) for name, section in recipe.peers.items()}
    new_tokens = _judged(recipe, sections, corpus, mistakes)
    begun = {} if mistakes else _begun_at_random(sections, auto, mistakes)
    rows, valid, steps = _rows(recipe, task, corpus, mistakes)
    teachers = _cached_teachers(recipe, corpus, steps * recipe.training.global_batch_rows, mistakes)
    if mistakes or config is None or rows is None:
        raise Mistakes("this run", mistakes)

    configs, costs = {n: peer_config(section, corpus, auto, sections) for n, section in sections.items()}, {}
    for name, peer in configs.items():
        with _noting(mistakes, f"peers.{name}:"):
            costs[name] = cost(peer, length, task.asked(recipe, name), auto, task.decoder_length(recipe))
    if recipe.training.activation_checkpointing:
        mistakes += _checkpointing_mistakes(recipe, configs, costs)
    signals, said = signals_of(recipe, configs) if not mistakes else (SignalCost(), [])
    if mistakes := mistakes + said:
        raise Mistakes("this run", mistakes)
    begun_with = (sections, begun, new_tokens, signals, teachers)
    return Plan(recipe, corpus, config, world, device, rows, valid, task, configs, costs, steps, *begun_with)


@contextmanager
def _noting(mistakes: list[str], here: str, cure: str = "") -> Iterator[None]:
    """What a user has done wrong is one mistake more, said between `here` and `cure`; damage ends all."""
    try:
        yield
    except Damage:
        raise
    except UserError as mistake:
        mistakes.append(f"{here} {mistake}{cure}")


def _judged(
    recipe: Recipe, sections: Mapping[str, PeerSection], corpus: Corpus, mistakes: list[str]
) -> dict[str, list[int]]:
    """Judges what is known of peers without making them. Gives the tokens that their checkpoints do not know."""
    autos = {task: kind.auto_class() for task, kind in TASKS.items()}
    auto, length = autos[recipe.objective.task], recipe.corpus.sequence_length
    found: dict[str, list[int]] = {}
    for name, section in sections.items():
        known = section is not recipe.peers[name]  # it was judged when the run began
        said = [] if known else list(config_mistakes(section, corpus, length, auto, sections, autos))
        mistakes += [f"peers.{name}.{mistake}" for mistake in said]
        if not said and section.checkpoint is not None:
            here = f"peers.{name}.{section.checkpoint_key} = {section.checkpoint!r}: its tokenizer"
            with _noting(mistakes, here, "; prepare the corpus with the tokenizer of this checkpoint"):
                found[name] = _new_tokens(section, corpus)
    return found


def _rows(recipe: Recipe, task: Task, corpus: Corpus, mistakes: list[str]) -> tuple[Rows | None, dict[str, Rows], int]:
    """The training rows, the held-out ones of each split, and the steps of the run (1 where they cannot be known)."""
    rows, valid, training = None, {}, recipe.training
    with _noting(mistakes, f"corpus.sequence_length = {recipe.corpus.sequence_length}:"):
        rows = task.rows("train")
        valid = {split: task.rows(split) for split in corpus.held_out}
    if rows is not None and (fewer := recipe.corpus.train_rows) is not None:
        with _noting(mistakes, f"corpus.train_rows = {fewer}:"):
            rows = rows.spread(fewer)
    if training.epochs is None or rows is None:
        return rows, valid, training.steps or 1
    if (steps := int(training.epochs * len(rows) // training.global_batch_rows)) < 1:
        mistakes.append(
            f"training.epochs = {training.epochs}: {training.epochs} × {len(rows)} rows is less than one batch of "
            f"{training.global_batch_rows}"
        )
    return rows, valid, steps


def peer_flops(recipe: Recipe, costs: Mapping[str, Cost]) -> dict[str, float]:
    """Training FLOPs per token of each peer: backward is two forwards; a frozen peer has none."""
    return {name: c.forward_flops * (1 if recipe.peers[name].frozen else 3) for name, c in costs.items()}


def flops_beside(recipe: Recipe, costs: Mapping[str, Cost], signals: SignalCost) -> float:
    """Training FLOPs per token of what is learned beside live peers' predictions.

    For cached teachers a learner's output embedding runs once more, forward and backward (`objective/cached.py`).
    """
    graph = recipe.graph()
    again = sum(3 * costs[graph.names[i]].head_flops for i in graph.lessons())
    return again + signals.flops / recipe.corpus.sequence_length


def signals_of(recipe: Recipe, configs: Mapping[str, Any]) -> tuple[SignalCost, list[str]]:
    """(what a recipe's signals cost, what is to be learned from insides and is not there)."""
    mistakes: list[str] = []
    graph, shapes, task = recipe.graph(), {}, TASKS[recipe.objective.task]
    for name in watched(graph):
        with _noting(mistakes, f"peers.{name}:"):
            shapes[name] = planned_shapes(configs[name], task.auto_class())
    if mistakes := mistakes or list(signal_mistakes(graph, shapes)):
        return SignalCost(), mistakes
    return signal_cost(graph, shapes, (recipe.corpus.sequence_length, task.decoder_length(recipe))), []


def _checkpointing_mistakes(recipe: Recipe, configs: Mapping[str, Any], costs: Mapping[str, Cost]) -> list[str]:
    return [
        f"training.activation_checkpointing = true: peers.{name} is a {configs[name].model_type}, whose layers "
        "transformers does not run again; write false"
        for name, c in costs.items()
        if c.checkpointed is None and not recipe.peers[name].frozen
    ]


def _cached_teachers(recipe: Recipe, corpus: Corpus, rows: int, mistakes: list[str]) -> CachedTeachers | None:
    """The recipe's cached teachers for a run of so many rows, where there are any."""
    asked, caches = what_is_asked(recipe, corpus), {}
    for name, place in recipe.cached_teachers.items():
        here = f"cached_teachers.{name} = {place!r}:"
        with _noting(mistakes, here):
            caches[name] = Cache.open(Path(place))
            mistakes += [f"{here} {said}" for said in caches[name].mistakes(asked, rows)]
    learners = recipe.graph().lessons()
    taught = {name for edges in learners.values() for name in edges}
    return CachedTeachers({n: c for n, c in caches.items() if n in taught}, min(learners)) if learners else None


def _saved(section: PeerSection, place: Path | None) -> PeerSection:
    """How a peer begins in a run that has a checkpoint: with the config that is saved there, and no weights to read."""
    if place is None or section.frozen or section.origin is None:
        return section
    if not (config := read_json(place / "config.json")):
        return section
    return section.model_copy(update={"model": config, "pretrained": None, "init_from": None})


def _lacking(task: str, roles: Sequence[str], corpus: Corpus) -> str:
    return (
        f"objective.task = {task}: the corpus's tokenizer ({corpus.tokenizer_path}) has no "
        f"{' and no '.join(f'{role}_token' for role in roles)}, which the task needs; train one with "
        f"`ctcd tokenizer{' --sentinels 100' if task == 'span' else ''}`, or train causal models (objective.task: clm)"
    )


def rehearse_peers(plan: Plan, device: str) -> None:
    """Tries in small whether each peer will learn on this device, and be saved, loaded and exported.

    Takes a second an architecture. Raises Mistakes with all that would not end well.
    """
    recipe, precision, auto = plan.recipe, plan.deepspeed.precision, plan.task.auto_class()
    said: dict[tuple[str, bool], str | None] = {}
    mistakes = []
    for name, config in plan.configs.items():
        again = recipe.training.activation_checkpointing and not recipe.peers[name].frozen
        if (key := (config.to_json_string(), again)) not in said:
            length = recipe.corpus.sequence_length
            said[key] = rehearse(config, auto, length, precision, device, plan.task.unfit, again)
            said[key] = said[key] or tokenizer_mistake(config, plan.corpus.tokenizer_path)
        if said[key]:
            mistakes.append(f"peers.{name}: {said[key]}")
    if mistakes:
        raise Mistakes("this run", mistakes)


def _begun_at_random(sections: Mapping[str, PeerSection], auto: Any, mistakes: list[str]) -> dict[str, list[str]]:
    """Peer → the weights that its checkpoint does not hold, where there are any."""
    missing = {}
    for name, section in sections.items():
        if section.checkpoint is None:
            continue
        with _noting(mistakes, f"peers.{name}.{section.checkpoint_key} = {section.checkpoint!r}:"):
            if not (weights := missing_weights(section.checkpoint, auto)):
                continue
            if section.frozen:
                raise UserError(
                    f"a frozen peer teaches what it knows, and this checkpoint lacks {some(weights)}: they would be "
                    "random numbers"
                )
            missing[name] = weights
    return missing


def _new_tokens(section: PeerSection, corpus: Corpus) -> list[int]:
    """The corpus's tokens that a peer's checkpoint does not know. Raises UserError where its ids mean other tokens."""
    from transformers import AutoConfig

    from ctcd_ds.corpus.tokenizer import load_tokenizer

    try:
        theirs = load_tokenizer(Path(str(section.checkpoint)))
    except UserError as mistake:
        raise UserError(f"must give the corpus's ids, and cannot be read: {mistake}") from None
    ours = load_tokenizer(corpus.tokenizer_path)
    for role in get_args(Role):
        there, here = (getattr(tokenizer, f"{role}_token_id") for tokenizer in (theirs, ours))
        if None not in (there, here) and there != here:
            raise UserError(f"has {there} as its {role}_token, the corpus's ({corpus.tokenizer_path}) has {here}")
    rows = AutoConfig.from_pretrained(section.checkpoint, trust_remote_code=False).get_text_config().vocab_size
    new = new_tokens(theirs.get_vocab(), ours.get_vocab(), rows)
    if new and section.frozen:
        raise UserError(f"lacks {count(len(new), 'token')} of the corpus's, and a frozen peer teaches what it knows")
    return new


def describe(plan: Plan) -> str:
    """The plan as text: peers, graph, cost, batch, length."""
    recipe, config, graph = plan.recipe, plan.deepspeed, plan.recipe.graph()
    training = recipe.training
    lines = [f"{'peer':<14}{'architecture':<14}{'parameters':>12}{'w/o embed.':>12}  {'FLOPs/token':>12}  source"]
    peers = peer_flops(recipe, plan.costs)
    for name, section in recipe.peers.items():
        c, model_type, flops = plan.costs[name], plan.configs[name].model_type, peers[name]
        source = f"{section.origin or 'from scratch'}{', frozen' if section.frozen else ''}"
        sizes = f"{c.parameters:>12,}{c.without_embeddings:>12,}  {flops / 1e6:>10.1f} M"
        lines.append(f"{name:<14}{model_type:<14}{sizes}  {source}")
    lines += ["", "distillation graph", *(f"  {line}" for line in graph.describe())]
    lines += [f"  {name}: {said}" for name, said in _caches(plan)]
    lines += [f"  {name}: {said}" for name, said in plan.task.exceptions()]
    lines += [f"  {name}: not in its checkpoint, begins at random: {some(new)}" for name, new in plan.begun.items()]
    lines += [f"  {name}: {said}" for name, said in _vocabularies(plan)]
    states, activations = memory_per_rank(plan)
    rows_seen = plan.steps * training.global_batch_rows
    tokens = plan.steps * plan.tokens_per_step
    lines += [
        "",
        *_corpora(plan),
        f"vocabulary     {plan.corpus.vocab_size:,}, {padded(plan.corpus.vocab_size):,} inside the models",
        f"targets        {plan.task.describe()} ({recipe.objective.task}), temperature {in_words(graph.temperature)}",
        f"batch          {training.global_batch_rows} rows = {count(plan.world, 'rank')} × "
        f"{count(config.micro_batch, 'row')} × {config.accumulation} accumulation",
        f"length         {plan.steps:,} steps, {rows_seen:,} rows, "
        f"{tokens:,} tokens, {tokens * plan.flops_per_token:.3g} FLOPs",
        f"FLOPs/token    {plan.flops_per_token / 1e6:.1f} M (forward, backward; heads where logits are needed"
        f"{_beside(plan)})",
        f"DeepSpeed      ZeRO {config.stage}, {config.precision}",
        f"checkpoints    about {_size(checkpoint_bytes(plan))} each",
        f"memory a rank  {_size(states)} model states, about {_size(activations)} activations (estimate)",
    ]
    return "\n".join(lines)


def _size(bytes_: float) -> str:
    return f"{bytes_ / GIB:.2f} GiB" if bytes_ >= GIB else f"{bytes_ / 2**20:.0f} MiB"


def _beside(plan: Plan) -> str:
    """What of the FLOPs is no peer's own."""
    named = (("cached teachers", plan.recipe.cached_teachers), ("hidden states and relations", plan.signals.flops))
    said = ", ".join(name for name, there in named if there)
    return f"; {plan.flops_beside / 1e6:.2f} M for {said}" if said else ""


def _vocabularies(plan: Plan) -> Iterator[tuple[str, str]]:
    """(peer, how its checkpoint's vocabulary differs from the corpus's) where it does."""
    for name, config in plan.configs.items():
        if rows := getattr(config, KEPT, None):
            yield name, f"its {rows:,} rows of the vocabulary stay, {plan.corpus.vocab_size:,} of them are tokens"
        if new := plan.new_tokens.get(name):
            yield name, f"{count(len(new), 'token')} its checkpoint does not know begin as the mean of the others"


def _caches(plan: Plan) -> Iterator[tuple[str, str]]:
    """(cached teacher, what is read of it)."""
    for name, cache in plan.teachers.caches.items() if plan.teachers is not None else ():
        yield name, f"read from {cache.path}: {cache.describe(plan.recipe.corpus.sequence_length)}"


def _corpora(plan: Plan) -> Iterator[str]:
    """A line for each corpus, with how often it is read, and one for what is held out."""
    read, length = plan.steps * plan.recipe.training.global_batch_rows, plan.recipe.corpus.sequence_length
    for name, corpus in plan.corpus.parts.items():
        rows, share = len(plan.rows.parts[name]), plan.corpus.shares[name]
        head, part = (f"source {name}", f" {share:.2%} of what is read,") if name else ("corpus", "")
        epochs = share * read / rows
        yield f"{head:<14} {corpus.path}: {rows:,} rows of {length} tokens,{part} {epochs:.2f} epochs"
        if name and epochs > ENOUGH_EPOCHS:
            yield (
                f"  warning: {name} is small for its share: each of its rows comes {epochs:.1f} times, and beyond "
                f"{ENOUGH_EPOCHS} times they teach little; give it less weight, or more text"
            )
    held_out = {split.partition(".")[2]: f"{len(rows):,} rows" for split, rows in plan.valid.items()}
    said = [f"{rows} of {name}" if name else rows for name, rows in held_out.items()]
    yield f"held out       {', '.join(said) or 'nothing'}"


def checkpoint_bytes(plan: Plan) -> int:
    """Size of one checkpoint, all ranks together: weights, fp32 masters and two Adam moments of every trained peer."""
    return (12 + plan.deepspeed.weight_bytes) * plan.trained + plan.world * 2**20


def memory_per_rank(plan: Plan) -> tuple[float, float]:
    """(bytes of weights, gradients, master weights and Adam states; bytes of activations, a rough estimate)."""
    return state_bytes(plan.work, plan.world), _activation_bytes(plan)


def _activation_bytes(plan: Plan) -> float:
    """What the layers of trained peers put out and is kept, and the objective's fp32 logits."""
    config, recipe = plan.deepspeed, plan.recipe
    tokens = config.micro_batch * recipe.corpus.sequence_length
    trained = [c for name, c in plan.costs.items() if not recipe.peers[name].frozen]
    checkpointing = recipe.training.activation_checkpointing
    values = sum((c.checkpointed or 0.0) if checkpointing else c.activations for c in trained)
    graph = recipe.graph()
    projected = [*plan.configs, *(graph.names[i] for i in graph.lessons())]  # once more for cached teachers
    return config.weight_bytes * tokens * values + sum(
        logits_bytes(config.micro_batch * plan.task.asked(recipe, name), plan.corpus.vocab_size, plan.device)
        for name in projected
    )
