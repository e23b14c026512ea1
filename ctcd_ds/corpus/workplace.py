"""Where a corpus is made: a hidden folder inside the output directory, whose progress survives a kill.

Finished shards are recorded in progress.json, so that the same command goes on behind them. At the end everything
moves up into the output directory, the manifest last: a directory without a manifest is not a corpus.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ctcd_ds.cli import Damage, UserError
from ctcd_ds.corpus.shards import Entry
from ctcd_ds.manifest import file_entries, read_manifest, sync_directory, write_atomic, write_manifest

FOLDER = ".unfinished"
PLAN = "preparation.json"  # of what the corpus was made: beside the manifest, as other files may give the same corpus


class Workplace:
    """The folder of an unfinished corpus, and how far it is.

    `documents`: number of the next document to read. `shards`: finished ones by split. `counts`: what is summed up
    over the whole input. `complete`: nothing more is to be read.
    """

    def __init__(self, output_dir: Path, plan: dict[str, Any]) -> None:
        self.output_dir, self.folder, self.plan = output_dir, output_dir / FOLDER, plan
        self.documents = 0
        self.shards: dict[str, list[Entry]] = {"train": [], "valid": []}
        self.counts: dict[str, int] = {}
        self.complete = False

    def record(self, shards: dict[str, list[Entry]], documents: int, counts: dict[str, int]) -> None:
        """Adds finished shards; from now on a kill costs nothing that came before them."""
        for split, entries in shards.items():
            self.shards[split] = [*self.shards.get(split, ()), *entries]
        self.documents = documents
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self.save()

    def entries(self) -> list[Entry]:
        """The finished shards of all splits."""
        return [entry for entries in self.shards.values() for entry in entries]

    def save(self) -> None:
        names = ("plan", "documents", "shards", "counts", "complete")
        sync_directory(self.folder)
        write_atomic(self.folder / "progress.json", json.dumps({name: getattr(self, name) for name in names}))

    def load(self, progress: dict[str, Any]) -> None:
        """Goes on from a saved progress whose plan is this one."""
        for name in ("documents", "shards", "counts", "complete"):
            setattr(self, name, progress[name])
        for entry in self.entries():
            for suffix in ("bin", "idx"):
                name = f"{entry['name']}.{suffix}"
                places = [folder / name for folder in (self.folder, self.output_dir)]
                if not any(p.is_file() and p.stat().st_size == entry[suffix]["bytes"] for p in places):
                    raise UserError(
                        f"{self.folder / name} is missing or damaged; remove {self.output_dir} and start again"
                    )

    def publish(self, manifest: dict[str, Any]) -> None:
        """Moves everything into the output directory, the manifest last. May be repeated after a kill."""
        tokenizers = (folder / "tokenizer" for folder in (self.folder, self.output_dir))
        write_preparation(self.folder, self.plan, next(place for place in tokenizers if place.exists()))
        write_manifest(self.folder / "manifest.json", manifest)
        shards = (f"{entry['name']}.{end}" for entry in self.entries() for end in ("bin", "idx"))
        for name in [*shards, "tokenizer", PLAN]:
            if (self.folder / name).exists():  # else it was moved before a kill
                (self.folder / name).replace(self.output_dir / name)
        sync_directory(self.output_dir)
        (self.folder / "manifest.json").replace(self.output_dir / "manifest.json")
        sync_directory(self.output_dir)
        shutil.rmtree(self.folder)


def write_preparation(directory: Path, plan: Mapping[str, Any], tokenizer: Path) -> None:
    """What a corpus was made of, and the bytes of its tokenizer's files: what other corpora that are equal may have."""
    write_manifest(directory / PLAN, {"plan": dict(plan), "tokenizer": file_entries(tokenizer)})


@contextmanager
def workplace(output_dir: Path, plan: dict[str, Any]) -> Iterator[Workplace | None]:
    """The workplace of the corpus that `plan` describes: new, or as a kill left it; None where it is finished.

    `plan` is JSON: everything that decides the content. Raises UserError where `output_dir` holds something else,
    saying what differs. A UserError inside leaves nothing behind that was not there before, nor does any other failure
    before the first shard.
    """
    plan = json.loads(json.dumps(plan))
    if (output_dir / "manifest.json").exists():
        same_plan(output_dir, _finished_plan(output_dir), plan, "a finished corpus")
        shutil.rmtree(output_dir / FOLDER, ignore_errors=True)
        yield None
        return
    place = Workplace(output_dir, plan)
    resumable = (place.folder / "progress.json").exists()
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file")
    if output_dir.exists() and not resumable and any(p.name != FOLDER for p in output_dir.iterdir()):
        raise UserError(f"--output_dir {output_dir} is not empty and holds no corpus of ours; name a new directory")
    new = [path for path in (place.folder, output_dir, *output_dir.parents) if not path.exists()]
    place.folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(place.folder, f"making a corpus in {output_dir}"):
            if resumable:
                progress = json.loads((place.folder / "progress.json").read_text(encoding="utf-8"))
                same_plan(output_dir, progress["plan"], plan, "an unfinished corpus")
                place.load(progress)
            else:
                place.save()
            yield place
    except Exception as failure:
        if not isinstance(failure, UserError) and place.documents:
            raise  # finished shards are kept for the next attempt
        for path in new:
            shutil.rmtree(path) if path == place.folder else path.rmdir()
        raise


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Keeps a second process out, and tells it what this one does; the lock ends with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another process is {doing} right now") from None
    finally:
        os.close(descriptor)


def _finished_plan(output_dir: Path) -> dict[str, Any]:
    read_manifest(output_dir / "manifest.json")
    try:
        plan: dict[str, Any] = read_manifest(output_dir / PLAN)["plan"]
        return plan
    except Damage:
        raise
    except UserError:
        raise UserError(
            f"--output_dir {output_dir} holds a finished corpus, but {PLAN}, which would say how it was made, "
            f"is missing; name a new directory"
        ) from None


def same_plan(output_dir: Path, there: dict[str, Any], here: dict[str, Any], what: str) -> None:
    """Raises UserError, saying what differs, where `what` lies in a directory and was made by another plan."""
    differences = [
        f"{name} is {there_value} there and {here_value} here"
        for name, there_value, here_value in _differences(there, here)
    ]
    if differences:
        raise UserError(
            f"--output_dir {output_dir} holds {what} that was made otherwise: {'; '.join(differences[:5])}. "
            f"Give the same command again, name a new directory, or remove this one"
        )


def _differences(there: Any, here: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*there, *here]):
            yield from _differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for number, (old, new) in enumerate(zip(there, here, strict=True)):
            yield from _differences(old, new, f"{name}[{number}]")
    elif isinstance(there, list) and isinstance(here, list):
        yield name, f"{len(there)} long", f"{len(here)} long"
    elif there != here:
        yield name, repr(there), repr(here)
