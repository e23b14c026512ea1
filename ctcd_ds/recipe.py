"""The recipe: everything about a run except how DeepSpeed runs it. Typed, frozen, validated as a whole.

Numbers are read as in YAML 1.2 (5e-4 is a float), in files and in --set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from ruamel.yaml import YAML

from ctcd_ds.cli import UserError, count, did_you_mean, one_folder
from ctcd_ds.objective.course import Course
from ctcd_ds.objective.divergences import KL, Divergence, Kind
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.objective.signals import Hidden, Relation, Relations, Signal
from ctcd_ds.plain import from_yaml, read_file


class Mistakes(UserError):
    """All mistakes found at once: one line each, with field, value, and what to do."""

    def __init__(self, where: str, mistakes: Sequence[str]) -> None:
        self.mistakes = list(mistakes)
        super().__init__(
            f"{count(len(mistakes), 'mistake')} in {where}:\n" + "\n".join(f"  - {mistake}" for mistake in mistakes)
        )


class Section(BaseModel):
    """A typed part of a YAML file: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Fraction, Fraction], Field(strict=False)]  # YAML has lists only
Count = Annotated[int, Field(ge=1)]
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
_TASKS_OF = {
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
        for _, section, key in _foreign(raw, self.objective.task):
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


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML or JSON recipe, applies `a.b=c` overrides, validates everything.

    `peers.NAME=null` takes a peer away, and what the others would learn from it (a cached teacher may take its place);
    `peers.NAME.soft=null` what it learns from others.
    Relative paths in it are relative to the current directory and come out absolute where they exist.
    Raises UserError (unreadable file) or Mistakes (all that is wrong, at once).
    """
    raw = read_file(path, "recipe")
    peers, sources = dict(_named(raw, "peers")), dict(_named(raw, "corpus", "sources"))
    caches = dict(_named(raw, "cached_teachers"))
    mistakes = [m for override in overrides if (m := apply_override(raw, override))]
    mistakes += _mistyped_peers(raw, peers)
    mistakes += _take_away(raw, "peers", peers)
    mistakes += _take_away(raw, "cached_teachers", caches)
    mistakes += _take_sources_away(raw, sources)
    for peer in _named(raw, "peers").values():
        for key in [key for key in _EDGES if isinstance(peer, dict) and key in peer and peer[key] is None]:
            del peer[key]
    mistakes += recipe_mistakes(raw)
    if mistakes:
        raise Mistakes(f"recipe {path}", mistakes)
    corpora = [raw["corpus"], *_named(raw, "corpus", "sources").values()]
    starts = [*raw["peers"].values(), *map(_init_from, raw["peers"].values())]
    given = _named(raw, "cached_teachers")
    places = [*((c, "path") for c in corpora), *((p, "pretrained") for p in starts), *((given, name) for name in given)]
    for section, key in places:
        if isinstance(value := section.get(key), str) and Path(value).exists():
            section[key] = str(Path(value).resolve())
    return Recipe.model_validate(raw)


def _named(raw: Any, *keys: str) -> dict[str, Any]:
    """The mapping at a place of a raw recipe; empty where there is none."""
    for key in keys:
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw if isinstance(raw, dict) else {}


def _mistyped_peers(raw: Any, known: Mapping[str, Any]) -> Iterator[str]:
    """Removes the peers that overrides made without saying what they are; says which are `known`."""
    for name, peer in list(_named(raw, "peers").items()):
        if known and name not in known and isinstance(peer, dict) and not _SOURCES & peer.keys():
            del raw["peers"][name]
            near = did_you_mean(name, known)
            yield f"peers.{name}: no peer has this name; {near} (a new one needs {' or '.join(sorted(_SOURCES))})"


def _take_sources_away(raw: Any, known: Mapping[str, Any]) -> Iterator[str]:
    """Removes the sources that an override made null; says which are not `known`, those without a path too."""
    sources = _named(raw, "corpus", "sources")
    for name, source in list(sources.items()):
        new = name not in known
        if (source is None and (new or known[name])) or (new and isinstance(source, dict) and "path" not in source):
            del sources[name]
            if new:
                near = did_you_mean(name, known)
                yield f"corpus.sources.{name}: no source has this name; {near} (a new one needs a path)"


def _take_away(raw: Any, section: str, known: Mapping[str, Any]) -> Iterator[str]:
    """Removes the members of `section` (peers or cached_teachers) that an override made null, and what is learned from
    them unless the other section has the name too; says which are not `known`.
    """
    peers, caches = _named(raw, "peers"), _named(raw, "cached_teachers")
    members = peers if section == "peers" else caches
    for name in [name for name, one in members.items() if one is None and (known.get(name) or name not in known)]:
        del members[name]
        if name not in known:
            what = "peer" if section == "peers" else "cached teacher"
            yield f"{section}.{name} = null: no {what} has this name; {did_you_mean(name, known)}"
        for peer in peers.values() if name not in peers.keys() | caches.keys() else ():
            for key in _EDGES if isinstance(peer, dict) else ():
                if isinstance(edges := peer.get(key), dict):
                    edges.pop(name, None)


_SOURCES = {"model", "pretrained", "init_from"}  # keys of a peer that say what it is
_EDGES = ("soft", "divergence", "temperature", "hidden", "relations")  # keys of a peer that name others


def recipe_mistakes(raw: Any) -> list[str]:
    """What is wrong with a recipe as read from a file: structure and types, then what the keys mean together."""
    if not isinstance(raw, dict):
        return [f"a recipe is a mapping of sections ({', '.join(Recipe.model_fields)}), found {type(raw).__name__}"]
    mistakes = []
    try:
        Recipe.model_validate(raw)
    except ValidationError as problem:
        mistakes = explained(problem, Recipe)
    for more in (
        _corpus_mistakes,
        _peer_mistakes,
        _cache_mistakes,
        _temperature_mistakes,
        _training_mistakes,
        _task_mistakes,
        _compile_mistakes,
    ):
        mistakes += more(raw)
    return mistakes


def _corpus_mistakes(raw: dict[str, Any]) -> Iterator[str]:
    corpus = raw.get("corpus")
    if not isinstance(corpus, dict):
        return
    path, sources, alpha = (corpus.get(key) for key in ("path", "sources", "sampling_alpha"))
    if (path is None) == (sources is None):
        both = "both are given" if path is not None else "neither is given"
        yield (
            f"corpus: exactly one of path (a corpus) and sources (several); {both} "
            "(with --set, null takes one away: corpus.path=null)"
        )
    if sources is None and alpha is not None:
        yield f"corpus.sampling_alpha = {alpha}: is for several corpora; give corpus.sources, or remove it"
    if sources is not None and (fewer := corpus.get("train_rows")) is not None:
        yield f"corpus.train_rows = {fewer}: reduces one corpus; with corpus.sources remove it"
    if not isinstance(sources, dict):
        return
    if not sources:
        yield "corpus.sources = {}: at least one source, NAME: {path: DIR, weight: W}"
    for name in sources:
        if said := set_name_mistake(str(name)):
            yield f"corpus.sources.{name}: {said}"
    given = [name for name, source in sources.items() if isinstance(source, dict) and source.get("weight") is not None]
    if alpha is not None and given:
        yield f"corpus.sampling_alpha = {alpha}: is in place of weights, and {', '.join(given)} has one; remove either"
    if alpha is None and (without := [name for name in sources if name not in given]):
        yield (
            f"corpus.sources: {', '.join(map(str, without))} without weight; give every source one, or none and "
            "corpus.sampling_alpha"
        )
    if isinstance(training := raw.get("training"), dict) and (epochs := training.get("epochs")) is not None:
        yield f"training.epochs = {epochs}: the corpora of a mixture end at different times; give training.steps"


def set_name_mistake(name: str) -> str:
    """What is wrong with the name of a source or a held-out set (valid/NAME/PEER/loss); "" where nothing is."""
    if not re.fullmatch(NAME, name):
        return "a name is letters, digits, _ and -, and begins with a letter"
    return "this name is taken: valid/agreement is what peers answer alike" if name == "agreement" else ""


def is_corpus_place(key: str) -> bool:
    """Whether a key (see `flat`) says where a corpus lies: it may be moved, what it holds has a fingerprint."""
    return re.fullmatch(r"corpus\.(sources\.[^.]+\.)?path", key) is not None


def _peer_mistakes(raw: dict[str, Any]) -> Iterator[str]:
    # On the raw mapping, so that one section's mistake does not hide another's.
    peers = raw.get("peers")
    if not isinstance(peers, dict):
        return
    if not peers:
        yield "peers = {}: a run needs at least one peer"
    if same := one_folder(map(str, peers)):
        yield f"peers: {same} would be one folder where a disk does not tell capitals from small letters; rename one"
    for name, peer in peers.items():
        here = f"peers.{name}"
        if not re.fullmatch(NAME, str(name)):
            yield f"{here}: a peer's name is letters, digits, _ and -, and begins with a letter"
        if not isinstance(peer, dict):
            continue
        yield from _source_mistakes(here, peer)
        yield from _layer_mistakes(here, name, peers)
        learned = {key: edges for key in ("soft", "hidden", "relations") if (edges := peer.get(key))}
        hard, frozen = peer.get("hard"), peer.get("frozen") is True
        caches = _named(raw, "cached_teachers")
        for key, edges in learned.items():
            for other, edge in edges.items() if isinstance(edges, dict) else ():
                said = edge if key == "soft" else "…"
                if other == name:
                    yield f"{here}.{key}.{other} = {said}: a peer does not learn from itself"
                elif other in caches and key != "soft":
                    yield f"{here}.{key}.{other} = {said}: of a cached teacher only predictions are kept; remove it"
                elif other not in peers and other not in caches:
                    others = did_you_mean(other, {*peers, *caches} - {name})
                    yield f"{here}.{key}.{other} = {said}: no peer has this name; {others}"
        weighted = [key for key, edges in learned.items() if _weighs(edges)]
        yield from _course_mistakes(here, peer)
        for key in ("divergence", "temperature"):
            soft, of = learned.get("soft", {}), peer.get(key) or {}
            for other in of.keys() - soft.keys() if isinstance(of, dict) and isinstance(soft, dict) else ():
                near = did_you_mean(other, soft)
                yield f"{here}.{key}.{other} = {of[other]}: {here}.soft has no weight for it; {near}"
        if peer.get("label_noise") and (frozen or hard == 0):
            yield f"{here}.label_noise = {peer['label_noise']}: the peer has no hard loss that noise could harm"
        if frozen:
            if hard:
                yield f"{here}.hard = {hard}: a frozen peer learns nothing; remove hard, or remove frozen"
            for key in weighted:
                yield f"{here}.{key} = {learned[key]}: a frozen peer learns nothing; remove {key}, or remove frozen"
            if not peer.get("pretrained"):
                yield f"{here}.frozen = true: a frozen peer is a finished model; say which with pretrained: DIR"
        elif hard == 0 and not weighted:
            yield f"{here}.hard = 0: with no soft weight either, the peer learns from nothing; give it one"
    if peers and all(isinstance(p, dict) and p.get("frozen") is True for p in peers.values()):
        yield "peers: all are frozen, so there is nothing to train"


def _weighs(edges: Any) -> bool:
    """Whether any of these edges may have a weight; what has none, or no sense, is said elsewhere."""
    if not isinstance(edges, dict):
        return True
    return any(edge.get("weight", True) if isinstance(edge, dict) else edge for edge in edges.values())


def _cache_mistakes(raw: dict[str, Any]) -> Iterator[str]:
    """What cannot be together with cached teachers: they were asked once, all alike, and few tokens are kept."""
    caches, peers, objective = _named(raw, "cached_teachers"), _named(raw, "peers"), _named(raw, "objective")
    if caches and isinstance(objective.get("temperature"), dict):
        yield "objective.temperature: cached teachers were asked at one temperature; write it, or let them be peers"
    for name in caches:
        if not re.fullmatch(NAME, str(name)):
            yield f"cached_teachers.{name}: a teacher's name is letters, digits, _ and -, and begins with a letter"
        if name in peers:
            yield f"cached_teachers.{name} = {caches[name]!r}: a peer has this name too; remove it (peers.{name}=null)"
    for name, peer in peers.items() if caches else ():
        if not isinstance(peer, dict):
            continue
        for key in ("mask_seed", "mask_fraction"):
            if peer.get(key) is not None:
                yield (
                    f"peers.{name}.{key} = {peer[key]}: cached teachers were asked where the recipe masks; remove "
                    "it, or let the teacher be a frozen peer"
                )
        for other in caches.keys() & _named(peer, "temperature").keys():
            yield (
                f"peers.{name}.temperature.{other}: cached teachers were asked at objective.temperature; remove it, or "
                "let the teacher be a frozen peer"
            )
        for other, weight in _named(peer, "soft").items():
            kind = _named(peer, "divergence").get(other, objective.get("divergence", "kl"))
            if other in caches and weight and kind != "kl":
                yield (
                    f"peers.{name}.divergence.{other} = {kind!r}: a cache's few tokens give KL's gradient only; write "
                    "kl, or let the teacher be a frozen peer"
                )


def _course_mistakes(here: str, raw: dict[str, Any]) -> Iterator[str]:
    try:
        peer = PeerSection.model_validate(raw)
    except ValidationError:
        return  # said already
    courses = {key: weight for key, weight in peer.weights.items() if isinstance(weight, CourseSection)}
    for key, course in courses.items():
        yield from _length_mistakes(f"{here}.{key}", course)
    # Between two such moments weights are on lines and not below 0: a sum that is 0 anywhere is 0 at one of them.
    moments = sorted({0.0, *(c.after for c in courses.values()), *(c.after + c.over for c in courses.values())})
    for done in moments if courses and peer.hard == 0 else ():
        then = (w.course.at(done) if isinstance(w, CourseSection) else w for w in peer.weights.values())
        if done < 1 and not any(then):
            yield (
                f"{here}.hard = {peer.hard:g}: when {done:.0%} of the steps are done its other weights are 0 too, and "
                "the peer learns from nothing; give it a hard weight"
            )
            return


def _length_mistakes(key: str, course: CourseSection) -> Iterator[str]:
    if round(course.after + course.over, 9) > 1:
        yield (
            f"{key}: after {course.after:g} and over {course.over:g} make more than the whole run, which is 1: lower "
            "one of them"
        )


def _temperature_mistakes(raw: dict[str, Any]) -> Iterator[str]:
    for key, written in _changing_temperatures(raw):
        try:
            course = CourseSection.model_validate(written)
        except ValidationError:
            continue  # said already
        if not (course.first and course.then):
            yield (
                f"{key}: {course.course}: logits are divided by it, so that it must be greater than 0 all along; give "
                "first and then"
            )
        yield from _length_mistakes(key, course)


def _changing_temperatures(raw: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, what is written there) of every temperature that is on a course."""
    places = [("objective.temperature", _named(raw, "objective").get("temperature"))]
    for name, peer in _named(raw, "peers").items():
        own = _named(peer, "temperature").items()
        places += [(f"peers.{name}.temperature.{other}", written) for other, written in own]
    return ((key, written) for key, written in places if isinstance(written, dict))


def _compile_mistakes(raw: dict[str, Any]) -> Iterator[str]:
    """What compiled code would have to be made for again and again."""
    training, peers = raw.get("training"), raw.get("peers")
    if not isinstance(training, dict) or training.get("compile") is not True:
        return
    for key, _ in _changing_temperatures(raw):
        yield (
            f"training.compile = true: {key} changes, and the objective would be compiled anew for each; write false, "
            "or one temperature"
        )
    for name, peer in peers.items() if isinstance(peers, dict) else ():
        if isinstance(peer, dict) and peer.get("relations"):
            yield (
                f"training.compile = true: peers.{name}.relations looks into layers, which would be compiled one by "
                "one; write false, or learn from hidden states"
            )


def _source_mistakes(here: str, peer: dict[str, Any]) -> Iterator[str]:
    model = peer.get("model")
    given = [key for key in ("model", "pretrained", "init_from") if peer.get(key) is not None]
    if given != ["model", "init_from"] and len(given) != 1:
        yield (
            f"{here}: exactly one of model (a Hugging Face config), pretrained (a checkpoint) and init_from (layers of "
            f"a model, whose config model may repeat); given: {' and '.join(given) or 'none'}"
        )
    if isinstance(model, dict):
        if not isinstance(kind := model.get("model_type"), str):
            yield f"{here}.model.model_type = {kind!r}: name an architecture of transformers, e.g. bert"
        if "vocab_size" in model:
            yield f"{here}.model.vocab_size = {model['vocab_size']}: comes from the corpus's tokenizer; remove it"


def _layer_mistakes(here: str, name: str, peers: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a peer's init_from, as far as the recipe alone can tell."""
    init_from = _init_from(peers[name])
    layers, other = init_from.get("layers"), init_from.get("peer")
    if not init_from:
        return
    if (other is None) == (init_from.get("pretrained") is None):
        yield f"{here}.init_from: exactly one of peer (of this run) and pretrained (a checkpoint)"
    elif isinstance(other, str) and other not in peers:
        yield f"{here}.init_from.peer = {other!r}: no peer has this name; {did_you_mean(other, set(peers) - {name})}"
    elif other is not None:
        chain = [name]
        while isinstance(other, str) and other in peers and other not in chain:
            chain.append(other)
            other = _init_from(peers[other]).get("peer")
        if other == name == min(chain):
            yield f"{here}.init_from.peer = {(*chain, name)[1]!r}: a circle ({' from '.join([*chain, name])})"
    if layers == []:
        yield f"{here}.init_from.layers = []: name at least one layer, from 0"
    elif isinstance(layers, list) and all(isinstance(layer, int) for layer in layers) and layers != sorted(set(layers)):
        yield f"{here}.init_from.layers = {layers}: name each layer once, from the first to the last"


def _init_from(peer: Any) -> dict[str, Any]:
    found = peer.get("init_from") if isinstance(peer, dict) else None
    return found if isinstance(found, dict) else {}


def _training_mistakes(raw: dict[str, Any]) -> Iterator[str]:
    training = raw.get("training")
    if isinstance(training, dict):
        steps, epochs = training.get("steps"), training.get("epochs")
        if (steps is None) == (epochs is None):
            yield (
                f"training: exactly one of steps and epochs; found steps = {steps}, epochs = {epochs} "
                "(with --set, null takes one away: training.epochs=null)"
            )
        if training.get("checkpoint_every") is not None and training.get("checkpoint_every_minutes") is not None:
            yield "training: only one of checkpoint_every (steps) and checkpoint_every_minutes"


def _task_mistakes(raw: dict[str, Any]) -> Iterator[str]:
    objective = raw.get("objective")
    task = objective.get("task", "mlm") if isinstance(objective, dict) else "mlm"
    for name, section, key in _foreign(raw, task):
        if section[key] is not None:
            readers = " or ".join(_TASKS_OF[re.sub(r"^peers\.[^.]+", "peers.*", name)])
            yield f"{name} = {section[key]!r}: for objective.task {readers}, and it is {task} here; remove it"


def _foreign(raw: Mapping[str, Any], task: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name, section, key) of all keys that are there and say nothing to this task."""
    if task not in get_args(Task):
        return
    for name, tasks in _TASKS_OF.items():
        first, *_, key = name.split(".")
        sections = {first: raw.get(first)}
        if first == "peers":
            sections = {f"peers.{n}": p for n, p in top.items()} if isinstance(top := raw.get(first), dict) else {}
        for place, section in sections.items():
            if task not in tasks and isinstance(section, dict) and key in section:
                yield f"{place}.{key}", section, key


def explained(problem: ValidationError, root: type[BaseModel]) -> list[str]:
    """What pydantic found wrong with a file of type `root`, in the house's words."""
    # A list whose items are wrong is "too short" besides: it has none left.
    return [
        _explained(error, root)
        for error in problem.errors()
        if error["type"] != "too_short" or len(error["input"]) < error["ctx"]["min_length"]
    ]


_FORMS = {
    **dict.fromkeys(("tuple_type", "list_type"), "must be a list"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),  # YAML 1.2 has no yes, no, on and off
    "dict_type": "must be a mapping, KEY: VALUE",
}


def _explained(error: Any, root: type[BaseModel]) -> str:
    location = [str(part) for part in error["loc"] if not (isinstance(part, str) and "[" in part)]
    field, value = ".".join(location), error["input"]
    if error["type"] == "extra_forbidden":
        return f"{field} = {value!r}: unknown key; {did_you_mean(location[-1], _keys_beside(location, root))}"
    if error["type"] == "missing":
        return f"{field}: missing; it has no default"
    said = _FORMS.get(error["type"].replace("model_type", "dict_type")) or error["msg"].replace("Input should", "must")
    said = re.sub(r"^\w+ should (have .*) after validation, not \d+$", r"must \1", said)
    return f"{field} = {value!r}: {said[0].lower() + said[1:]}{_as_it_is_written(error)}"


def _as_it_is_written(error: Any) -> str:
    """A cure where a number or a truth value was given as text, and a whole number as 1e3."""
    if isinstance(number := error["input"], float) and error["type"] == "int_type" and number.is_integer():
        return f"; write {number:.0f}"
    if not isinstance(text := error["input"], str) or not error["type"].startswith(("bool_", "float_", "int_")):
        return ""
    value = from_yaml(text) if re.fullmatch(r"[\w.+-]+", text) else None
    return f"; write {text}, without quotes" if isinstance(value, bool | int | float) else ""


def _keys_beside(location: Sequence[str], root: type[BaseModel]) -> list[str]:
    """The keys that are known at the place of an unknown one."""
    section: Any = root
    for part in location[:-1]:
        if _is_section(section):
            section = section.model_fields[part].annotation
        elif get_origin(section) is dict:
            section = get_args(section)[1]
        while get_origin(section) in (Union, UnionType, Annotated):
            section = next((arg for arg in get_args(section) if _is_section(arg)), get_args(section)[0])
    return list(section.model_fields) if _is_section(section) else []


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def apply_override(raw: Any, override: str) -> str | None:
    """Puts one `a.b.c=value` into the raw recipe. Returns what is wrong with it, or None."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        return f"--set {override}: write key=value, e.g. --set training.steps=100"
    try:
        value = from_yaml(text)
    except ValueError:
        return f"--set {override}: {text!r} is not a YAML value"
    place = raw
    for depth, key in enumerate(keys):
        if not isinstance(place, dict):
            return f"--set {override}: {'.'.join(keys[:depth])} = {place!r} is no section"
        if depth + 1 == len(keys):
            place[key] = value
        elif place.get(key) is None:
            place[key] = {}
        place = place[key]
    return None


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"training": {"steps": 3}} → {"training.steps": 3}: the names under which `--set` and messages know the keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves
