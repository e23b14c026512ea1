"""A stand-in for RTE, made from held-out prose: do two sentences stand in the order in which they were written?

It has RTE's file format and labels, not its meaning. Both orders of a pair hold the same words, so only how
sentences begin and refer back tells them apart (ALBERT was trained on the same question).
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence

from ctcd_ds.demo.text import Document

Pair = tuple[str, str, str]  # sentence1, sentence2, label
README = """This is not GLUE's RTE. It is a stand-in for the demo, in RTE's file format, made by `ctcd demo-data`
from docstrings that are held out from text.txt:

entailment      sentence2 was written right after sentence1
not_entailment  the two are exchanged: sentence1 was written right after sentence2

Both labels are equally frequent: 50 % is chance. Scores say nothing about the real RTE.
"""
_BOUNDARY = re.compile(r"(?<=[.!?]) (?=[A-Z])")
_WORDS = range(5, 26)  # of one sentence


def sentence_pairs(documents: Sequence[Document], seed: int = 1) -> list[Pair]:
    """Neighbouring sentences of the same paragraph, shuffled; every second pair is exchanged."""
    pairs = set()
    for document in documents:
        for paragraph in document.paragraphs:
            sentences = _BOUNDARY.split(paragraph)
            pairs |= {
                (first, second)
                for first, second in itertools.pairwise(sentences)
                if first != second and len(first.split()) in _WORDS and len(second.split()) in _WORDS
            }
    ordered = sorted(pairs)
    random.Random(seed).shuffle(ordered)
    return [
        (first, second, "entailment") if number % 2 else (second, first, "not_entailment")
        for number, (first, second) in enumerate(ordered)
    ]


def rte_file(pairs: Sequence[Pair]) -> str:
    """The pairs as one of RTE's TSV files."""
    lines = ["index\tsentence1\tsentence2\tlabel", *(f"{n}\t" + "\t".join(pair) for n, pair in enumerate(pairs))]
    return "\n".join(lines) + "\n"
