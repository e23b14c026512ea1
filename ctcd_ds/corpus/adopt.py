"""Takes over pairs of .bin and .idx that Megatron's own preprocess_data made, which come without a manifest.

They become a corpus like any other: one sequence a document, each ended by the tokenizer's [SEP] or end of text
(preprocess_data writes one only with --append-eod), in our dtype. The pairs themselves stay untouched.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from ctcd_ds.cli import UserError
from ctcd_ds.corpus.prepare import Settings, dtype_for, finish, share
from ctcd_ds.corpus.shards import Entry, Pair, Step, open_pair, shard_entry
from ctcd_ds.corpus.tokenizer import begin_role, bring_tokenizer, lowercases, special_ids, tokenizer_identity
from ctcd_ds.corpus.workplace import Workplace, workplace
from ctcd_ds.manifest import file_entry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1 << 24  # ids that are looked at together


def adopt(
    prefixes: Sequence[str],
    tokenizer_source: str,
    output_dir: Path,
    settings: Settings,
    lowercase: bool | None = None,
    add_special_tokens: bool = True,
) -> None:
    """Makes the corpus directory `output_dir` of Megatron's pairs PREFIX.bin/.idx; every pair becomes one shard.

    Raises UserError where a pair is damaged, or was made with a larger vocabulary than the tokenizer has; then
    nothing is left behind.
    """
    settings.validate()
    given = dict.fromkeys(prefixes)  # the shell gives x.bin and x.idx for x*: one pair
    for name in [name for name in given if name.endswith(".idx") and f"{name[:-4]}.bin" in given]:
        del given[name]
    names = sorted(prefix.removesuffix(".bin").removesuffix(".idx") for prefix in given)
    if again := next((name for name, other in pairwise(names) if name == other), None):
        raise UserError(f"--adopt names {again} twice")
    pairs = [open_pair(name) for name in names]
    tokenizer = bring_tokenizer(tokenizer_source, lowercase, add_special_tokens=add_special_tokens)
    identity = tokenizer_identity(tokenizer)
    plan = {
        "sources": [{end: file_entry(Path(f"{name}.{end}")) for end in ("bin", "idx")} for name in names],
        "tokenizer": identity,
        "settings": {**asdict(settings), "adopted": True},
    }
    with workplace(output_dir, plan) as place:
        if place is None:
            print(f"{output_dir}: this corpus is finished already")
            return
        if not place.shards["train"]:
            for pair in pairs:
                _check_ids(pair, identity["vocab_size"])
        start = time.monotonic()
        with tqdm(total=sum(map(len, pairs)), desc="adopting", unit=" documents", unit_scale=True) as bar:
            first = 0
            for pair in pairs:
                if first >= place.documents:
                    _adopt_pair(place, pair, first, settings, tokenizer)
                first += len(pair)
                bar.update(len(pair))
        manifest = {**asdict(settings), "adopted": True, "lowercase": lowercases(tokenizer)}
        finish(place, tokenizer, manifest, f"{time.monotonic() - start:.1f} s")


def _check_ids(pair: Pair, vocab_size: int) -> None:
    for start in tqdm(range(0, len(pair.tokens), CHUNK), desc=f"checking {pair.prefix}", disable=None):
        chunk = pair.tokens[start : start + CHUNK]
        for extreme in (int(chunk.min()), int(chunk.max())):
            if not 0 <= extreme < vocab_size:
                raise UserError(
                    f"{pair.prefix}.bin holds the id {extreme}, the tokenizer has {vocab_size} tokens: it was made "
                    f"with another tokenizer; name that one with --tokenizer"
                )


def _adopt_pair(
    place: Workplace, pair: Pair, first: int, settings: Settings, tokenizer: PreTrainedTokenizerBase
) -> None:
    dtype, special, begin = dtype_for(len(tokenizer)), special_ids(tokenizer), begin_role(tokenizer)
    whole = settings.fraction == 1 and settings.valid_fraction == 0
    if whole and pair.tokens.dtype == dtype and _fits(pair, special.end) and begin is None:
        counts = {"unknown": int(np.count_nonzero(pair.tokens == special.unk))}
        place.record({"train": [_copy(place, pair)]}, first + len(pair), counts)
        return
    step = Step(place.folder, dtype, place.shards, settings.valid_fraction, partial(share, settings.seed, "hold out"))
    unknown = 0
    for number in range(len(pair)):
        if share(settings.seed, "take", first + number) >= settings.fraction:
            continue
        ids = pair.document(number).astype(dtype)
        if len(ids) and ids[-1] == special.end:
            ids = ids[:-1]
        if len(ids):
            before = [] if begin is None or ids[0] == special.bos else [special.bos]
            text = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
            step.add(first + number, np.array([*before, *ids, special.end], dtype), len(text.encode()))
            unknown += int(np.count_nonzero(ids == special.unk))
    place.record(step.finish(), first + len(pair), {"unknown": unknown})


def _fits(pair: Pair, end: int) -> bool:
    """Whether the pair is already as we write it: packed, one sequence a document, each with its end."""
    ends = np.cumsum(pair.lengths, dtype=np.int64)
    return (
        len(pair) == len(pair.lengths) > 0
        and bool((pair.lengths > 1).all())
        and bool((np.diff(pair.documents) == 1).all())
        and bool((pair.starts == ends - pair.lengths).all())
        and len(pair.tokens) == ends[-1]
        and bool((pair.tokens[ends - 1] == end).all())
    )


def _copy(place: Workplace, pair: Pair) -> Entry:
    name = f"train-{len(place.shards['train']):05d}"
    for suffix in ("bin", "idx"):
        shutil.copyfile(f"{pair.prefix}.{suffix}", place.folder / f"{name}.{suffix}")
    return shard_entry(place.folder, name, len(pair), len(pair.tokens))
