"""Checks every byte of a run, of one of its checkpoints, of a corpus or of a cache against their manifests.

Of a run all but exit.json, TensorBoard's files and what other commands put there; while it trains, not metrics.jsonl.

Exit code 0: all is as it was written. 1: damage was found, and is listed with both hashes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ctcd_ds import cli
from ctcd_ds.kinds import folder_kind, instead
from ctcd_ds.manifest import file_problems, read_manifest


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("path", type=Path, help="RUN, RUN/checkpoints/TAG, CORPUS or CACHE")
    path = parser.parse_args().path
    places = list(find(path))
    damage = [problem for place in places for problem in problems(place)]
    for problem in damage:
        print(problem)
    checked = f"{cli.count(len(places), 'manifest')} and every file they list"
    print(f"{path}: {checked}: {cli.count(len(damage), 'problem') if damage else 'all as it was written'}")
    return cli.EXIT_FAILED if damage else cli.EXIT_DONE


def find(path: Path) -> Iterator[Path]:
    """The directories below `path` that have, or should have, a manifest."""
    found = [path] if (path / "manifest.json").exists() else []
    found += sorted((path / "checkpoints").glob("step-*"))
    if found and path not in found and folder_kind(path) == "run":
        found.insert(0, path)  # its manifest is missing
    yield from found
    if not found and folder_kind(path) == "run":
        raise cli.UserError(f"{path}: the run has no checkpoint yet")
    if not found:
        raise cli.UserError(
            f"{path} is neither a run with checkpoints, nor a checkpoint, nor a corpus, nor a cache: "
            f"{instead(path, 'run', 'corpus', 'checkpoint', 'cache')}"
        )


def problems(place: Path) -> Iterator[str]:
    """What is wrong with one directory."""
    from ctcd_ds.corpus.damage import corpus_damage, damage_beside
    from ctcd_ds.corpus.rows import read_corpus_manifest
    from ctcd_ds.tasks import cache
    from ctcd_ds.training import checkpoint, run_directory

    try:
        match read_manifest(place / "manifest.json").get("format"):
            case checkpoint.FORMAT:
                yield from file_problems(place, checkpoint.read(place)["files"])
            case run_directory.FORMAT:
                yield from run_directory.RunDirectory(place).problems()
            case cache.FORMAT:
                yield from cache.cache_damage(place)
            case _:
                yield from corpus_damage(place, read_corpus_manifest(place))
                yield from damage_beside(place)
    except cli.UserError as problem:
        yield str(problem)


if __name__ == "__main__":
    cli.run(main)
