"""Files that prove themselves: JSON with a sha256 over its own content, and files described by size and sha256.

Corpora and checkpoints carry such a manifest. It is written last and by an atomic rename, so a directory
without a valid one is unfinished, whatever else lies in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from ctcd_ds.cli import Damage, UserError, is_of_the_machine


def canonical_sha256(content: Any) -> str:
    """sha256 of the canonical JSON (sorted keys, no white space) of `content`: 64 hex digits."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file, as a manifest lists it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest.hexdigest()}


def sampled_entry(path: Path) -> dict[str, Any]:
    """`file_entry` with a second sha256, of blocks spread over the file: quick to check, however large the file is."""
    return {**file_entry(path), "sampled_sha256": sampled_sha256(path)}


def sampled_sha256(path: Path) -> str:
    """sha256 of 64 blocks of 16 KiB, evenly spread from the first byte to the last (up to 1 MiB, of the whole file)."""
    digest, blocks, size = hashlib.sha256(), 64, 1 << 14
    with path.open("rb") as file:
        room = os.fstat(file.fileno()).st_size - size
        for number in range(blocks):
            file.seek(max(number * size if room < (blocks - 1) * size else number * room // (blocks - 1), 0))
            digest.update(file.read(size))
    return digest.hexdigest()


def _digest(file: Any) -> Any:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def write_atomic(path: Path, text: str) -> None:
    """Writes `text` so that a reader, or a crash at any moment, sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory durable (a rename is not, before its directory is synced)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def built(place: Path) -> Iterator[Path]:
    """A folder to make a result in. It is at `place` when the context ends, all or, after an exception, nothing.

    Where `place` is there already, and empty, the result is made inside it: it may be a volume of a container, which
    cannot be replaced. Its files are as readable as the user's other ones. Raises UserError where `place` is not empty
    or cannot be written.
    """
    inside = place.is_dir()
    if place.exists() and not (inside and not any(place.iterdir())):
        raise UserError(f"--output_dir {place} is {'not empty' if inside else 'a file'}: name another")
    temporary = place / ".unfinished" if inside else place.with_name(f".{place.name}.unfinished")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as problem:
        raise UserError(f"--output_dir {place} cannot be written: {problem.strerror} ({temporary})") from None
    try:
        yield temporary
        readable = temporary.stat().st_mode & 0o666  # safetensors makes its files for their owner alone
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(readable)
        if inside:
            for path in temporary.iterdir():
                path.rename(place / path.name)
        else:
            temporary.rename(place)
    except Exception as problem:
        if isinstance(problem, UserError) or not is_of_the_machine(problem):
            raise
        raise UserError(f"--output_dir {place} cannot be written: {problem}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def file_entries(directory: Path, names: Iterable[str] = ("",)) -> dict[str, dict[str, Any]]:
    """Relative name → `file_entry` of the files that `names` mean, or that lie in folders of these names."""
    paths = [path for name in names for path in (directory / name, *(directory / name).rglob("*")) if path.is_file()]
    return {path.relative_to(directory).as_posix(): file_entry(path) for path in sorted(paths)}


def file_problems(
    directory: Path, stated: Mapping[str, Mapping[str, Any]], beside: tuple[str, ...] = (), sampled: bool = False
) -> Iterator[str]:
    """How the files below a directory differ from what its manifest lists (relative name → `file_entry`).

    Missing, changed and extra files, each with its path and both sizes or hashes. Files and folders named in `beside`
    stand there outside the manifest. With `sampled`, only the sampled blocks of files that state them are read.
    """
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}
    for name in sorted(found - set(stated)):
        if name.split("/")[0] not in ("manifest.json", *beside):
            yield f"{directory / name}: no file of the manifest's"
    for name, entry in stated.items():
        path = directory / name
        if name not in found:
            yield f"{path}: missing"
        elif (size := path.stat().st_size) != entry["bytes"]:
            yield f"{path}: {size} bytes, the manifest says {entry['bytes']}"
        elif sampled and "sampled_sha256" in entry:
            if (digest := sampled_sha256(path)) != entry["sampled_sha256"]:
                yield f"{path}: sha256 of sampled blocks {digest}, the manifest says {entry['sampled_sha256']}"
        elif (digest := file_entry(path)["sha256"]) != entry["sha256"]:
            yield f"{path}: sha256 {digest}, the manifest says {entry['sha256']}"


class FileEntry(TypedDict):
    """What `file_entry` gives."""

    bytes: int
    sha256: str


def check_shape(path: Path, content: Any, shape: Any) -> None:
    """Raises Damage, naming key and value, where a manifest's content is not of `shape` (a TypedDict)."""
    try:
        TypeAdapter(shape).validate_python(content, strict=True)
    except ValidationError as problem:
        error = problem.errors()[0]
        where, value = ".".join(map(str, error["loc"])), repr(error["input"])
        raise Damage(f"{path}: {where} = {value[:200]}: {error['msg'][0].lower()}{error['msg'][1:]}") from None


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` with its own sha256 under the key "sha256", atomically."""
    write_atomic(path, _as_written({**content, "sha256": canonical_sha256(content)}))


def _as_written(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads a manifest and checks its own sha256.

    Raises UserError, naming the path, where it is missing; Damage where it is no JSON object, or was changed.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as problem:
        raise Damage(f"{path} is not readable as a manifest: {problem}") from None
    if not isinstance(content, dict):
        raise Damage(f"{path} is not a manifest: it holds no JSON object")
    stated = content.pop("sha256", None)
    if stated != (found := canonical_sha256(content)):
        raise Damage(f"{path} was changed or damaged: it states sha256 {stated}, its content has {found}")
    if text != _as_written({**content, "sha256": stated}):
        raise Damage(f"{path} was changed or damaged: its content is good, and not its white space or spelling")
    return {**content, "sha256": stated}
