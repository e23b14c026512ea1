"""A recipe from its file and `--set`. Numbers are read as in YAML 1.2 (5e-4 is a float), in both."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctcd_ds.cli import did_you_mean
from ctcd_ds.plain import from_yaml, read_file
from ctcd_ds.recipe.mistakes import init_section, named, recipe_mistakes
from ctcd_ds.recipe.schema import Mistakes
from ctcd_ds.recipe.sections import Recipe

SOURCES = {"model", "pretrained", "init_from"}  # keys of a peer that say what it is
EDGES = ("soft", "divergence", "temperature", "hidden", "relations")  # keys of a peer that name others


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML or JSON recipe, applies `a.b=c` overrides, validates everything.

    `peers.NAME=null` takes a peer away, and what the others would learn from it (a cached teacher may take its place);
    `peers.NAME.soft=null` what it learns from others.
    Relative paths in it are relative to the current directory and come out absolute where they exist.
    Raises UserError (unreadable file) or Mistakes (all that is wrong, at once).
    """
    raw = read_file(path, "recipe")
    peers, sources = dict(named(raw, "peers")), dict(named(raw, "corpus", "sources"))
    caches = dict(named(raw, "cached_teachers"))
    mistakes = [m for override in overrides if (m := apply_override(raw, override))]
    mistakes += _mistyped_peers(raw, peers)
    mistakes += _take_away(raw, "peers", peers)
    mistakes += _take_away(raw, "cached_teachers", caches)
    mistakes += _take_sources_away(raw, sources)
    for peer in named(raw, "peers").values():
        for key in [key for key in EDGES if isinstance(peer, dict) and key in peer and peer[key] is None]:
            del peer[key]
    mistakes += recipe_mistakes(raw)
    if mistakes:
        raise Mistakes(f"recipe {path}", mistakes)
    corpora = [raw["corpus"], *named(raw, "corpus", "sources").values()]
    starts = [*raw["peers"].values(), *map(init_section, raw["peers"].values())]
    given = named(raw, "cached_teachers")
    places = [*((c, "path") for c in corpora), *((p, "pretrained") for p in starts), *((given, name) for name in given)]
    for section, key in places:
        if isinstance(value := section.get(key), str) and Path(value).exists():
            section[key] = str(Path(value).resolve())
    return Recipe.model_validate(raw)


def _mistyped_peers(raw: Any, known: Mapping[str, Any]) -> Iterator[str]:
    """Removes the peers that overrides made without saying what they are; says which are `known`."""
    for name, peer in list(named(raw, "peers").items()):
        if known and name not in known and isinstance(peer, dict) and not SOURCES & peer.keys():
            del raw["peers"][name]
            near = did_you_mean(name, known)
            yield f"peers.{name}: no peer has this name; {near} (a new one needs {' or '.join(sorted(SOURCES))})"


def _take_sources_away(raw: Any, known: Mapping[str, Any]) -> Iterator[str]:
    """Removes the sources that an override made null; says which are not `known`, those without a path too."""
    sources = named(raw, "corpus", "sources")
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
    peers, caches = named(raw, "peers"), named(raw, "cached_teachers")
    members = peers if section == "peers" else caches
    for name in [name for name, one in members.items() if one is None and (known.get(name) or name not in known)]:
        del members[name]
        if name not in known:
            what = "peer" if section == "peers" else "cached teacher"
            yield f"{section}.{name} = null: no {what} has this name; {did_you_mean(name, known)}"
        for peer in peers.values() if name not in peers.keys() | caches.keys() else ():
            for key in EDGES if isinstance(peer, dict) else ():
                if isinstance(edges := peer.get(key), dict):
                    edges.pop(name, None)


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


def is_corpus_place(key: str) -> bool:
    """Whether a key (see `flat`) says where a corpus lies: it may be moved, what it holds has a fingerprint."""
    return re.fullmatch(r"corpus\.(sources\.[^.]+\.)?path", key) is not None
