"""The recipe: everything about a run except how DeepSpeed runs it. Every key, with its type and default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag, model_validator
from ruamel.yaml import YAML

from ctcd_ds.objective.course import Course
from ctcd_ds.objective.divergences import KL, Divergence, Kind
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.objective.signals import Hidden, Relation, Relations, Signal
from ctcd_ds.recipe.schema import Count, Section

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Fraction, Fraction], Field(strict=False)]  # YAML has lists only
Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]  # YAML has lists only
NAME = r"[A-Za-z][A-Za-z0-9_-]*"  # of a peer, a source or a held-out set: a part of keys


class SourceSection(Section):
    """One corpus of a mixture; `weight`: its part of the rows that are trained on, against those of the others."""

    path: str
    weight: Positive | None = None


class CorpusSection(Section):
    """Which rows are read and what is asked in them. Exactly one of `path`, a directory that `ctcd corpus` made, and
    `sources`, several of them by name, all of one tokenizer.

    `sampling_alpha`: in place of weights, a source's is its number of tokens to this power: 1 is as large as they are,
    0 all alike, 0.3 what multilingual models take.
    `train_rows`: a reduced corpus, so many of its training rows evenly spread over the text; null is all.
    `documents`: what a causal model sees of the documents before the one it is in: all that is in the row (joined) or
    nothing (apart). `mean_span`: tokens of a span that is cut out, on average.
    """

    path: str | None = None
    sources: dict[str, SourceSection] | None = None
    sampling_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    sequence_length: Annotated[int, Field(ge=4)] = 128
    train_rows: Count | None = None
    mask_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    whole_word_masking: bool = False
    documents: Literal["joined", "apart"] = "joined"
    mean_span: Annotated[float, Field(ge=1)] = 3.0

    @property
    def title(self) -> str:
        """What cards and reports call the text: the directory's own name, or the sources' names."""
        return Path(self.path).name if self.path is not None else " + ".join(self.sources or ())


Task = Literal["mlm", "clm", "span"]  # masked and causal language modelling, span corruption
# Keys that say something to some tasks only.
TASKS_OF = {
    "corpus.mask_fraction": ("mlm", "span"),
    "corpus.mean_span": ("span",),
    "corpus.whole_word_masking": ("mlm",),
    "corpus.documents": ("clm",),
    "objective.soft_positions": ("mlm",),
    "peers.*.mask_seed": ("mlm",),
    "peers.*.mask_fraction": ("mlm",),
    "peers.*.relations": ("mlm", "clm"),
}


class OptimizerSection(Section):
    """AdamW. `max_grad_norm` clips each peer by its own norm; 0 is no clipping."""

    lr: Positive = 5e-4
    weight_decay: NotNegative = 0.01
    betas: Betas = (0.9, 0.98)
    eps: Positive = 1e-6
    max_grad_norm: NotNegative = 1.0


class OptimizerOverride(Section):
    """What one peer does differently; null is the recipe's own value."""

    lr: Positive | None = None
    weight_decay: NotNegative | None = None
    betas: Betas | None = None
    eps: Positive | None = None
    max_grad_norm: NotNegative | None = None


class CourseSection(Section):
    """A weight that changes: `first` until the share `after` of the steps, then on a line to `then` over a share."""

    first: NotNegative = 0.0
    then: NotNegative
    after: Fraction = 0.0
    over: Annotated[float, Field(ge=0, le=1)] = 0.0

    @property
    def course(self) -> Course:
        """The same as the graph knows it."""
        return Course(**self.model_dump())


def _number_or_course(value: Any) -> str:
    return "[course]" if isinstance(value, dict | CourseSection) else "[number]"


# Tags are left out of messages, as all parts of a place with a bracket are.
Weight = Annotated[
    Annotated[CourseSection, Tag("[course]")] | Annotated[NotNegative, Tag("[number]")],
    Discriminator(_number_or_course),
]


Layer = Annotated[int, Field(ge=0)]
Pair = Annotated[tuple[Layer, Layer], Field(strict=False)]


def _by_kind(value: Any) -> str:
    return "[words]" if isinstance(value, str) else "[layers]"


class HiddenSection(Section):
    """What is learned from another peer's hidden states. Layers count from 1; 0 is what comes into the first.

    `layers`: of both peers the last, as many pairs evenly spread as the smaller one has layers, or pairs
    [own layer, other's layer]. A model with an encoder and a decoder compares these of both.
    """

    weight: Weight
    layers: Annotated[
        Annotated[Literal["last", "even"], Tag("[words]")]
        | Annotated[tuple[Pair, ...], Field(strict=False, min_length=1), Tag("[layers]")],
        Discriminator(_by_kind),
    ] = "last"


class RelationsSection(Section):
    """What is learned from how another peer relates tokens to each other in one layer's attention.

    `layer`: the last of both, or [own layer, other's layer], from 1. `heads`: into so many parts all widths are cut, of
    whatever number of heads the peers have. `of`: what is compared with itself among tokens; query-key: the attention.
    """

    weight: Weight
    layer: Annotated[
        Annotated[Literal["last"], Tag("[words]")] | Annotated[Pair, Tag("[layers]")], Discriminator(_by_kind)
    ] = "last"
    heads: Count
    of: Annotated[tuple[Relation, ...], Field(strict=False, min_length=1)] = ("query", "key", "value")


# As a weight, but never 0: what is divided by it would be anything.
Temperature = Annotated[
    Annotated[CourseSection, Tag("[course]")] | Annotated[Positive, Tag("[number]")], Discriminator(_number_or_course)
]


class InitFrom(Section):
    """Which layers of which model a peer begins as: those of `pretrained` (as a peer's own), or of another `peer`.

    `layers` count from 0, in their order; a model with an encoder and a decoder takes these of both. Everything else is
    the source's: widths, embeddings, head. A peer of the run gives what it begins with itself.
    """

    peer: str | None = None
    pretrained: str | None = None
    layers: Layers


class PeerSection(Section):
    """One model of the run, and what it learns from.

    It begins as a Hugging Face config (`model`) with random weights, as a checkpoint (`pretrained`), or as some layers
    of a model (`init_from`), whose settings `model` may then repeat.
    `divergence`, `temperature`: other peer → what holds for this soft loss in place of the objective's.
    `hidden`, `relations`: other peer → what is learned from its inside.
    `label_noise`: the share of this peer's hard targets that are replaced by random tokens; held-out targets never are.
    `mask_seed`, `mask_fraction`: masks of its own, of the same rows; null is what the recipe says for all.
    """

    model: dict[str, Any] | None = None
    pretrained: str | None = None
    init_from: InitFrom | None = None
    frozen: bool = False
    hard: NotNegative | None = None
    soft: dict[str, Weight] = {}
    divergence: dict[str, Kind] = {}
    temperature: dict[str, Temperature] = {}
    hidden: dict[str, HiddenSection] = {}
    relations: dict[str, RelationsSection] = {}
    label_noise: Annotated[float, Field(ge=0, le=1)] | None = None
    mask_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    mask_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    optimizer: OptimizerOverride = OptimizerOverride()

    @model_validator(mode="before")
    @classmethod
    def _as_written_before(cls, raw: Any) -> Any:
        """Run directories of earlier versions say `soft_start_fraction: {other: share}`: a course from 0."""
        starts = raw.get("soft_start_fraction") if isinstance(raw, dict) else None
        soft = raw.get("soft") or {} if isinstance(raw, dict) else None
        if not isinstance(starts, dict) or not isinstance(soft, dict) or not starts.keys() <= soft.keys():
            return raw
        late = {other: {"then": soft[other], "after": share} for other, share in starts.items() if share}
        return {key: value for key, value in raw.items() if key != "soft_start_fraction"} | {"soft": {**soft, **late}}

    @property
    def hard_weight(self) -> float:
        """1 unless stated; a frozen peer learns nothing."""
        return 0.0 if self.frozen else 1.0 if self.hard is None else self.hard

    @property
    def weights(self) -> dict[str, float | CourseSection]:
        """Key → weight of all that it learns from others."""
        inner = [("hidden", other, edge.weight) for other, edge in self.hidden.items()]
        inner += [("relations", other, edge.weight) for other, edge in self.relations.items()]
        return {f"soft.{other}": weight for other, weight in self.soft.items()} | {
            f"{key}.{other}.weight": weight for key, other, weight in inner
        }

    @property
    def checkpoint(self) -> str | None:
        """The finished model that its weights are read from, all of them or some layers."""
        return self.pretrained if self.init_from is None else self.init_from.pretrained

    @property
    def checkpoint_key(self) -> str:
        """The key that says it."""
        return "pretrained" if self.init_from is None else "init_from.pretrained"

    @property
    def origin(self) -> str | None:
        """What it begins as, in words; None: random weights."""
        if self.init_from is None:
            return self.pretrained
        return f"layers {', '.join(map(str, self.init_from.layers))} of {self.init_from.peer or self.checkpoint}"


class ObjectiveSection(Section):
    """`temperature`: τ of the soft losses, a number or how it changes over the run.

    `soft_positions`: distil at the target positions, or at all that are not special tokens.

    `divergence`: what the soft losses are, KL(teaching ‖ learning), KL(learning ‖ teaching) (reverse_kl), or
    Jensen-Shannon's (jsd), to whose mixture the teaching peer gives the share `jsd_beta`.
    Where peers have masks of their own, target positions are those that are masked for all peers that distil.
    """

    task: Task = "mlm"
    temperature: Temperature = 1.0
    divergence: Kind = "kl"
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    soft_positions: Literal["targets", "all"] = "targets"


class ScheduleSection(Section):
    """Warm-up from 0 over `warmup_fraction` of the steps, then down to 0 along a line or a cosine, or constant."""

    type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_fraction: Fraction = 0.06


class TrainingSection(Section):
    """How long and how often. Exactly one of `steps` and `epochs`; intervals are in steps.

    `time_limit_minutes`: saves and stops then, exit code 85. `step_timeout_s`: a step that takes longer ends the run
    and names the ranks that did not arrive (the first step, validation and saving have an hour). `compile`:
    layers and objective go through torch.compile with static shapes (for GPUs). `deterministic`: sums on a
    GPU are made in one order, so that a run repeats bit for bit there too, at some speed; on the CPU it always does.
    `activation_checkpointing`: of each layer only the input is kept; backward runs it again, to the same numbers.
    The newest `keep_checkpoints` are kept; with `keep_every` also those of every so many steps; with `keep_best` also
    the one of each peer's lowest held-out loss (then each improvement is saved). `on_nonfinite`: a step with a loss or
    a gradient that is not finite moves nothing; the run stops there, or skips it.
    """

    global_batch_rows: Count = 128
    steps: Count | None = None
    epochs: Positive | None = None
    log_every: Count = 10
    valid_every: Count = 500
    valid_rows: Count = 2048
    checkpoint_every: Count | None = None
    checkpoint_every_minutes: Positive | None = None
    keep_checkpoints: Count = 3
    keep_every: Count | None = None
    keep_best: bool = False
    time_limit_minutes: Positive | None = None
    step_timeout_s: Positive = 600.0
    compile: bool = False
    deterministic: bool = False
    activation_checkpointing: bool = False
    on_nonfinite: Literal["stop", "skip"] = "stop"

    @property
    def checkpoint_minutes(self) -> float | None:
        """The interval in minutes where none in steps is given."""
        if self.checkpoint_every is not None:
            return None
        return 15.0 if self.checkpoint_every_minutes is None else self.checkpoint_every_minutes


class Recipe(Section):
    """A whole run. Build it with `load_recipe`, which reports all mistakes at once.

    `cached_teachers`: name → the directory that `ctcd cache-logits` wrote: a finished model that peers learn from as
    from a frozen one, without its being there.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    corpus: CorpusSection
    peers: dict[str, PeerSection]
    cached_teachers: dict[str, str] = {}
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    training: TrainingSection

    def optimizer_of(self, peer: str) -> OptimizerSection:
        """The optimizer's settings with the peer's own in place."""
        own = self.peers[peer].optimizer.model_dump(exclude_none=True)
        return self.optimizer.model_copy(update=own)

    def graph(self) -> DistillationGraph:
        """The distillation graph, peers in the recipe's order, then the cached teachers."""
        sections = {**self.peers, **dict.fromkeys(self.cached_teachers, PeerSection(frozen=True))}
        weights = [[peer.soft.get(other, 0.0) for other in sections] for peer in sections.values()]
        soft = [[_largest(weight) for weight in row] for row in weights]
        courses = tuple(tuple(course for _, course in row) for row in soft)
        usual, jsd = self.objective.divergence, Divergence("jsd", self.objective.jsd_beta)
        kinds = [[peer.divergence.get(other, usual) for other in sections] for peer in sections.values()]
        divergences = tuple(tuple(jsd if kind == "jsd" else Divergence(kind) for kind in row) for row in kinds)
        own = ([peer.temperature.get(other) for other in sections] for peer in sections.values())
        temperatures = tuple(tuple(tau if tau is None else _known(tau) for tau in row) for row in own)
        return DistillationGraph(
            names=tuple(sections),
            hard=tuple(peer.hard_weight for peer in sections.values()),
            soft=tuple(tuple(weight for weight, _ in row) for row in soft),
            trained=tuple(not peer.frozen for peer in sections.values()),
            courses=courses if any(map(any, courses)) else (),
            divergences=divergences if any(d != KL for row in divergences for d in row) else (),
            temperature=_known(self.objective.temperature),
            temperatures=temperatures if any(tau is not None for row in temperatures for tau in row) else (),
            signals=tuple(signal for signal in self._signals() if signal.weight),
            cached=len(self.cached_teachers),
        )

    def _signals(self) -> Iterator[Signal]:
        numbers = {name: n for n, name in enumerate(self.peers)}
        causal = self.objective.task == "clm"
        for name, peer in self.peers.items():
            for other, h in peer.hidden.items():
                yield Hidden(numbers[name], numbers[other], *_largest(h.weight), h.layers)
            for other, r in peer.relations.items():
                weight, course = _largest(r.weight)
                yield Relations(numbers[name], numbers[other], weight, course, r.layer, r.heads, r.of, causal)

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain JSON-like data; what is null by default or not the task's is left out."""
        raw = self.model_dump(mode="json", exclude_none=True)
        for _, section, key in foreign(raw, self.objective.task):
            del section[key]
        return raw

    def to_yaml(self) -> str:
        """The resolved recipe as a file that `load_recipe` reads back to an equal recipe."""
        yaml, stream = YAML(typ="safe", pure=True), StringIO()
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.dump(self.resolved(), stream)
        return stream.getvalue()


def _known(number: float | CourseSection) -> float | Course:
    """A number, or how it changes, as the graph knows it."""
    return number.course if isinstance(number, CourseSection) else number


def _largest(weight: float | CourseSection) -> tuple[float, Course | None]:
    """The most that a weight ever is, and its course, where it has one."""
    return (weight.course.largest, weight.course) if isinstance(weight, CourseSection) else (weight, None)


def foreign(raw: Mapping[str, Any], task: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name, section, key) of all keys that are there and say nothing to this task."""
    if task not in get_args(Task):
        return
    for name, tasks in TASKS_OF.items():
        first, *_, key = name.split(".")
        sections = {first: raw.get(first)}
        if first == "peers":
            sections = {f"peers.{n}": p for n, p in top.items()} if isinstance(top := raw.get(first), dict) else {}
        for place, section in sections.items():
            if task not in tasks and isinstance(section, dict) and key in section:
                yield f"{place}.{key}", section, key
