"""Text to a corpus directory: documents are chosen, tokenised by several threads, and written in order.

What a corpus holds depends on the text, the tokenizer and the settings alone: not on the number of workers, and
not on how often the work was interrupted. Documents are numbered over the whole input, and a hash of (seed,
number) decides which of them are taken and which are held out.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
from tqdm import tqdm

from ctcd_ds.cli import UserError
from ctcd_ds.corpus.encode import Block, Encoded, Encoder, encode_in_order
from ctcd_ds.corpus.frequencies import unigram_loss
from ctcd_ds.corpus.rows import FORMAT, VERSION
from ctcd_ds.corpus.sentencepiece_model import native_beside
from ctcd_ds.corpus.shards import ShardWriter, Step
from ctcd_ds.corpus.sources import Reading, Source, documents, find_sources, sample_lines
from ctcd_ds.corpus.tokenizer import (
    bring_tokenizer,
    layout,
    lowercases,
    save_tokenizer,
    tokenizer_identity,
    unknown_pieces,
)
from ctcd_ds.corpus.workplace import Workplace, workplace
from ctcd_ds.manifest import canonical_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK_CHARACTERS = 500_000  # what a thread takes at once: 0.3 s of WordPiece, 0.03 s of SentencePiece
SAMPLE = 5000  # lines of text on which a SentencePiece .model is compared with native SentencePiece
ROW = 128  # the sequence length for which the summary counts rows
FEW_ROWS = 100  # held out: below, their loss says little


@dataclass(frozen=True)
class Settings:
    """What decides the content of a corpus beside its text and tokenizer; stands in the manifest."""

    seed: int = 1
    fraction: float = 1.0  # share of the documents that are taken
    valid_fraction: float = 0.01  # share of those that are held out
    shard_megabytes: float = 256  # 2**20 characters of text after which a shard ends

    def validate(self) -> None:
        """Raises UserError for a value out of its range."""
        if not 0 < self.fraction <= 1:
            raise UserError(f"--fraction {self.fraction} is not in (0, 1]")
        if not 0 <= self.valid_fraction < 1:
            raise UserError(f"--valid_fraction {self.valid_fraction} is not in [0, 1)")
        if not self.shard_megabytes > 0:
            raise UserError(f"--shard_megabytes {self.shard_megabytes} is not greater than 0")


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share(seed: int, purpose: str, number: int) -> float:
    """A hash of (seed, purpose, document number) in [0, 1): a document is chosen where it is below a fraction.

    A larger fraction therefore takes the same documents and more, and what is held out of a part is held out of
    the whole.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def chosen_texts(
    sources: Sequence[Source], reading: Reading, fraction: float, seed: int
) -> Callable[[str], Iterator[str]]:
    """A function that reads the chosen documents from the start, under a progress bar with its caption."""
    Settings(fraction=fraction).validate()

    def texts(caption: str) -> Iterator[str]:
        with _bar(caption, sources) as bar:
            for number, text in enumerate(documents(sources, reading, bar.update)):
                if fraction == 1 or share(seed, "take", number) < fraction:
                    yield text

    return texts


def prepare(
    inputs: Sequence[str],
    tokenizer_source: str,
    output_dir: Path,
    settings: Settings,
    reading: Reading,
    lowercase: bool | None = None,
    workers: int = 1,
    add_special_tokens: bool = True,
    valid_inputs: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> None:
    """Makes the corpus directory `output_dir` of `inputs`, or goes on with one that was begun by the same call.

    `valid_inputs`: held-out sets of other text, by name; all their documents are taken. Raises UserError for a mistake
    in any argument or in the text; then nothing is left behind.
    """
    settings.validate()
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1 is needed")
    sources = find_sources(inputs, reading.format)
    sets = {name: find_sources(own, reading.format, f"--valid_input {name}:") for name, own in valid_inputs.items()}
    tokenizer = bring_tokenizer(
        tokenizer_source, lowercase, lambda: sample_lines(sources, reading, SAMPLE), add_special_tokens
    )
    plan: dict[str, Any] = {
        "sources": _identities(sources),
        "reading": asdict(reading),
        "tokenizer": tokenizer_identity(tokenizer),
        "settings": asdict(settings),
    }
    if sets:
        plan["valid_sources"] = {name: _identities(own) for name, own in sets.items()}
        _refuse_trained(plan["sources"], plan["valid_sources"])
    with workplace(output_dir, plan) as place:
        if place is None:
            print(f"{output_dir}: this corpus is finished already")
            return
        start, before = time.monotonic(), _tokens(place)
        if not place.complete:
            encoder = _encoder(tokenizer, tokenizer_source)
            for name, own in sets.items():
                if f"valid.{name}" not in place.shards:
                    _tokenise_set(place, name, own, reading, encoder, workers)
            _tokenise(place, sources, reading, settings, encoder, workers)
        speed = (_tokens(place) - before) / (time.monotonic() - start)
        finish(place, tokenizer, {**asdict(settings), "lowercase": lowercases(tokenizer)}, f"{speed:,.0f} tokens/s")
        _warn(place, tokenizer, sources, reading)


def finish(place: Workplace, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], speed: str) -> None:
    """Checks that every split that was asked for holds something, publishes the corpus, and sums it up."""
    _check_splits(place, settings)
    place.complete = True
    place.save()
    if not (place.output_dir / "tokenizer").exists():
        save_tokenizer(tokenizer, place.folder / "tokenizer")
    identity = tokenizer_identity(tokenizer)
    place.publish(
        {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": identity,
            "dtype": dtype_for(identity["vocab_size"]),
            "settings": settings,
            "splits": place.shards,
            "unigram_loss": unigram_loss(
                (place.folder, place.output_dir), place.shards, dtype_for(identity["vocab_size"]), identity
            ),
            **layout(tokenizer),
        }
    )
    _report(place, speed)


def dtype_for(vocab_size: int) -> str:
    """The dtype of the shards, by megatron-core's rule (DType.optimal_dtype)."""
    return "uint16" if vocab_size < 65500 else "int32"


def _tokenise(
    place: Workplace,
    sources: Sequence[Source],
    reading: Reading,
    settings: Settings,
    encoder: Encoder,
    workers: int,
) -> None:
    """Reads what `place` has not got yet, and records a step (one shard a split) whenever its text is long enough."""
    shard_characters = int(settings.shard_megabytes * 2**20)
    held_out = partial(share, settings.seed, "hold out")

    def new_step() -> tuple[Step, Counter[str]]:
        return Step(place.folder, encoder.dtype, place.shards, settings.valid_fraction, held_out), Counter()

    with _bar("tokenising", sources) as bar:
        blocks = _blocks(
            documents(sources, reading, bar.update), place.documents, settings, min(BLOCK_CHARACTERS, shard_characters)
        )
        step, counts = new_step()
        tokens = 0
        for block, encoded in encode_in_order(blocks, encoder, workers):
            for number, ids, text_bytes in _documents(block, encoded):
                step.add(number, ids, text_bytes)
            counts.update(characters=block.characters, unknown=encoded.unknown)
            tokens += len(encoded.ids)
            bar.set_postfix_str(f"{tokens / max(1e-9, bar.format_dict['elapsed']) / 1e6:.2f} M tokens/s", refresh=False)
            if counts["characters"] >= shard_characters:
                place.record(step.finish(), block.next, counts)
                step, counts = new_step()
            last = block.next
        place.record(step.finish(), last, counts)


def _tokenise_set(
    place: Workplace, name: str, sources: Sequence[Source], reading: Reading, encoder: Encoder, workers: int
) -> None:
    """All documents of a held-out set, as one shard: a kill costs the whole of it."""
    with _bar(f"tokenising {name}", sources) as bar:
        blocks = _blocks(documents(sources, reading, bar.update), 0, Settings(), BLOCK_CHARACTERS)
        writer, counts = ShardWriter(place.folder, f"valid-{name}-00000", encoder.dtype), Counter[str]()
        for block, encoded in encode_in_order(blocks, encoder, workers):
            for _, ids, text_bytes in _documents(block, encoded):
                writer.add(ids, text_bytes)
            counts.update(characters=block.characters, unknown=encoded.unknown)
    if not writer.documents:
        raise UserError(f"--valid_input {name}: no text in any of its files")
    place.record({f"valid.{name}": [writer.finish()]}, place.documents, counts)


def _encoder(tokenizer: PreTrainedTokenizerBase, source: str) -> Encoder:
    native = native_beside(Path(source), tokenizer) if Path(source).suffix == ".model" else None
    return Encoder(tokenizer, native, dtype_for(len(tokenizer)))


def _documents(block: Block, encoded: Encoded) -> Iterator[tuple[int, npt.NDArray[Any], int]]:
    """(number, ids, bytes of text) of the documents of which the tokenizer leaves something."""
    start = 0
    sizes = zip(block.numbers, encoded.lengths.tolist(), encoded.text_bytes.tolist(), strict=True)
    for number, length, text_bytes in sizes:
        if length:
            yield number, encoded.ids[start : start + length], text_bytes
        start += length


def _blocks(texts: Iterator[str], first: int, settings: Settings, size: int) -> Iterator[Block]:
    """The chosen documents from number `first` on, in blocks of at least `size` characters; the last may be empty."""
    numbers: list[int] = []
    chosen: list[str] = []
    characters = number = 0
    for number, text in enumerate(texts, 1):
        if number <= first or share(settings.seed, "take", number - 1) >= settings.fraction:
            continue
        numbers.append(number - 1)
        chosen.append(text)
        characters += len(text)
        if characters >= size:
            yield Block(numbers, chosen, characters, number)
            numbers, chosen, characters = [], [], 0
    yield Block(numbers, chosen, characters, number)


def _check_splits(place: Workplace, settings: dict[str, Any]) -> None:
    train, valid = (sum(entry["documents"] for entry in place.shards[split]) for split in ("train", "valid"))
    if place.documents == 0:
        raise UserError("--input holds no text: no document in any of its files")
    if train + valid == 0:
        raise UserError(
            f"nothing of the input's {place.documents} documents is left: --fraction {settings['fraction']} took "
            f"none with text in it; take a larger fraction or another --seed"
        )
    if train == 0 or (valid == 0 and settings["valid_fraction"] > 0):
        raise UserError(
            f"{train + valid} document(s) cannot be divided into train and valid by --valid_fraction "
            f"{settings['valid_fraction']}; give more documents (in txt files a blank line ends a document, see "
            f"--text_layout), or --valid_fraction 0"
        )


def _identities(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Of every source what tells it from others; says where two have the same content."""
    identities = [source.identity() for source in tqdm(sources, "hashing", unit=" sources", delay=2)]
    first: dict[str, str] = {}
    for source, identity in zip(sources, identities, strict=True):
        same = first.setdefault(canonical_sha256(identity), source.name)
        if same != source.name:
            print(f"warning: {same} and {source.name} hold the same; their text is read twice", flush=True)
    return identities


def _refuse_trained(sources: Sequence[dict[str, Any]], sets: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Raises UserError where a held-out set has a source that is trained on."""
    trained = {canonical_sha256(identity) for identity in sources}
    for name, own in sets.items():
        if any(canonical_sha256(identity) in trained for identity in own):
            raise UserError(f"--valid_input {name}: holds a file of --input: what is trained on is not held out")


def _tokens(place: Workplace) -> int:
    return sum(entry["tokens"] for entry in place.entries())


def _bar(caption: str, sources: Sequence[Source]) -> tqdm[Any]:
    known = all(source.bytes for source in sources)
    return tqdm(
        total=sum(source.bytes for source in sources) if known else None,
        desc=caption,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        mininterval=0.5,
    )


def _report(place: Workplace, speed: str) -> None:
    print(f"{place.output_dir}:")
    for split, entries in place.shards.items():
        total, tokens = (sum(entry[key] for entry in entries) for key in ("documents", "tokens"))
        rows = tokens // (ROW - 2)
        shards = f"{len(entries)} shard{'' if len(entries) == 1 else 's'}"
        print(f"  {split}: {total:,} documents, {tokens:,} tokens, {shards}, {rows:,} rows of {ROW}")
    unknown = place.counts.get("unknown", 0) / max(1, _tokens(place))
    print(f"  unknown tokens: {unknown:.3%}; {speed}", flush=True)


def _warn(place: Workplace, tokenizer: PreTrainedTokenizerBase, sources: Sequence[Source], reading: Reading) -> None:
    """Says what makes a corpus worth less than it looks: text that the tokenizer does not know, little held out."""
    unknown = place.counts.get("unknown", 0) / max(1, _tokens(place))
    if unknown > 0.01:
        lines = sample_lines(sources, reading, SAMPLE)
        most = ", ".join(f"{piece!r} ({count:,})" for piece, count in unknown_pieces(tokenizer, lines))
        names = {*tokenizer.all_special_tokens, "<unk>"}
        written = [name for name in sorted(names) if sum(name in line for line in lines) * 100 > len(lines)]
        print(
            f"warning: {unknown:.1%} of the tokens are unknown; in {len(lines):,} lines, most often {most}. "
            + (
                f"The text itself has {', '.join(written)} written in it, which becomes no special token"
                if written
                else "The tokenizer does not fit this text (its language, its script, or --lowercase)"
            ),
            flush=True,
        )
    for split, entries in place.shards.items():
        held_out, name = sum(entry["tokens"] for entry in entries) // (ROW - 2), split.partition(".")[2]
        if split != "train" and entries and held_out < FEW_ROWS:
            print(
                f"warning: {held_out} held-out rows of {ROW}{f' of {name}' if name else ''} are few, and what is "
                f"measured on them will be noisy; from {FEW_ROWS} on it is steady: give more text"
                f"{'' if name else ', or a larger --valid_fraction'}",
                flush=True,
            )
