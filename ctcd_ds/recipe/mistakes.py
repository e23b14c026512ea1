"""What is wrong with a recipe: what no single section's types can tell, as its keys must make sense together.

All on the raw mapping, so that one section's mistake does not hide another's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from ctcd_ds.cli import did_you_mean, one_folder
from ctcd_ds.recipe.schema import explained
from ctcd_ds.recipe.sections import NAME, TASKS_OF, CourseSection, PeerSection, Recipe, foreign


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
        caches = named(raw, "cached_teachers")
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
    caches, peers, objective = named(raw, "cached_teachers"), named(raw, "peers"), named(raw, "objective")
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
        for other in caches.keys() & named(peer, "temperature").keys():
            yield (
                f"peers.{name}.temperature.{other}: cached teachers were asked at objective.temperature; remove it, or "
                "let the teacher be a frozen peer"
            )
        for other, weight in named(peer, "soft").items():
            kind = named(peer, "divergence").get(other, objective.get("divergence", "kl"))
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
    places = [("objective.temperature", named(raw, "objective").get("temperature"))]
    for name, peer in named(raw, "peers").items():
        own = named(peer, "temperature").items()
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
    init_from = init_section(peers[name])
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
            other = init_section(peers[other]).get("peer")
        if other == name == min(chain):
            yield f"{here}.init_from.peer = {(*chain, name)[1]!r}: a circle ({' from '.join([*chain, name])})"
    if layers == []:
        yield f"{here}.init_from.layers = []: name at least one layer, from 0"
    elif isinstance(layers, list) and all(isinstance(layer, int) for layer in layers) and layers != sorted(set(layers)):
        yield f"{here}.init_from.layers = {layers}: name each layer once, from the first to the last"


def init_section(peer: Any) -> dict[str, Any]:
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
    for name, section, key in foreign(raw, task):
        if section[key] is not None:
            readers = " or ".join(TASKS_OF[re.sub(r"^peers\.[^.]+", "peers.*", name)])
            yield f"{name} = {section[key]!r}: for objective.task {readers}, and it is {task} here; remove it"


def named(raw: Any, *keys: str) -> dict[str, Any]:
    """The mapping at a place of a raw recipe; empty where there is none."""
    for key in keys:
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw if isinstance(raw, dict) else {}


def set_name_mistake(name: str) -> str:
    """What is wrong with the name of a source or a held-out set (valid/NAME/PEER/loss); "" where nothing is."""
    if not re.fullmatch(NAME, name):
        return "a name is letters, digits, _ and -, and begins with a letter"
    return "this name is taken: valid/agreement is what peers answer alike" if name == "agreement" else ""
