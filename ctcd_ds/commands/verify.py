"""Checks every byte of a run's checkpoints, of one checkpoint, or of a corpus against its manifest.

Exit code 0: all is as it was written. 1: damage was found, and is listed with both hashes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ctcd_ds import cli
from ctcd_ds.manifest import file_problems, read_manifest


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("path", type=Path, help="RUN, RUN/checkpoints/TAG or CORPUS")
    path = parser.parse_args().path
    places = list(find(path))
    damage = [problem for place in places for problem in problems(place)]
    damage += pointer_damage(path / "checkpoints")
    for problem in damage:
        print(problem)
    print(f"{path}: {cli.count(len(places), 'manifest')}, {cli.count(len(damage), 'problem')}")
    return cli.EXIT_FAILED if damage else cli.EXIT_DONE


def find(path: Path) -> Iterator[Path]:
    """The directories below `path` that have, or should have, a manifest."""
    if (path / "manifest.json").exists():
        yield path
    elif found := sorted((path / "checkpoints").glob("step-*")):
        yield from found
    else:
        raise cli.UserError(
            f"{path}: neither a run with checkpoints, nor a checkpoint, nor a corpus (no manifest.json)"
        )


def pointer_damage(checkpoints: Path) -> Iterator[str]:
    """Whether the file that names the newest checkpoint, for people, names one that is there."""
    latest = checkpoints / "latest"
    if latest.exists():
        content = latest.read_bytes()
        if content not in [f"{place.name}\n".encode() for place in checkpoints.glob("step-*")]:
            yield f"{latest}: names {content!r}, and there is no such checkpoint"


def problems(place: Path) -> Iterator[str]:
    """What is wrong with one directory."""
    from ctcd_ds.corpus.damage import corpus_damage
    from ctcd_ds.corpus.rows import read_corpus_manifest
    from ctcd_ds.training import checkpoint

    try:
        if read_manifest(place / "manifest.json").get("format") == checkpoint.FORMAT:
            yield from file_problems(place, checkpoint.read(place)["files"])
        else:
            yield from corpus_damage(place, read_corpus_manifest(place))
    except cli.UserError as problem:
        yield str(problem)


if __name__ == "__main__":
    cli.run(main)
