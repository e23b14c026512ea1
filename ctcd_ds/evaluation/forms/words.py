"""A label for each word: names, parts of speech, chunks, from files in the columns of CoNLL."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ctcd_ds.cli import UserError
from ctcd_ds.evaluation.forms.form import Array, Encoded, Form, best_of, labels_of, windows
from ctcd_ds.evaluation.tables import TaskRows, label_id, lines_of
from ctcd_ds.evaluation.tasks import Table, Task

OUTSIDE = "O"
MARKED = re.compile(r"O|[BIES]-.+")  # how entity labels are spelt
CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")


class Words(Form):
    """A row is a sentence: its words and their labels. A word has the label of its last token.

    A causal model has read the whole word only there; to others it is all one.
    """

    metrics = ("entity_f1", "token_accuracy")
    suffixes = (".conll", ".conllu", ".iob2", ".bio", ".tsv", ".txt")
    called = "token-classification"

    @staticmethod
    def auto_class() -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def head(self, task: Task) -> dict[str, Any]:
        return labels_of(task)

    def collator(self, tokenizer: Any) -> Any:
        from transformers import DataCollatorForTokenClassification

        return DataCollatorForTokenClassification(tokenizer)

    def read(self, path: Path, table: Table, task: Task) -> tuple[TaskRows, int]:
        """Columns by tabs or spaces, a word a line, an empty line after a sentence; -DOCSTART- is no sentence.

        In .conllu lines of # and of ids like 3-4 and 3.1 are no words.
        """
        columns, pairs = table.columns or CONLLU, list[tuple[str, Any]]()
        word, label = columns.index(table.text[0]), columns.index(table.label or "")
        texts, labels = list[tuple[str, ...]](), list[Any]()
        for number, line in [*enumerate(lines_of(path), 1), (0, "")]:
            cells = line.removesuffix("\r").split("\t") if "\t" in line else line.split()
            if not cells or cells[0] == "-DOCSTART-":
                if pairs:
                    texts.append(tuple(text for text, _ in pairs))
                    labels.append(tuple(label for _, label in pairs))
                    pairs = []
            elif path.suffix == ".conllu" and not cells[0].isdecimal():
                continue
            elif len(cells) != len(columns):
                wanted = f"{len(columns)} ({', '.join(columns)})"
                raise UserError(f"{path}:{number}: {len(cells)} columns, where there should be {wanted}")
            else:
                pairs.append((cells[word], label_id(cells[label], task, f"{path}:{number}")))
        if not texts:
            raise UserError(f"{path} holds no rows")
        return TaskRows(texts, labels, [str(row) for row in range(len(texts))]), 0

    def encode(self, rows: TaskRows, tokenizer: Any, length: int) -> Encoded:
        """Words are read as the text they make, joined by spaces; a long sentence is several features."""
        encoding = tokenizer(
            [" ".join(words) for words in rows.texts],
            truncation=True,
            max_length=length,
            return_attention_mask=False,
            return_offsets_mapping=True,
            return_overflowing_tokens=True,
        )
        features, last = windows(encoding), dict[tuple[int, int], tuple[int, int]]()
        starts = [word_of_each(words) for words in rows.texts]
        for number, (feature, offsets) in enumerate(zip(features, encoding["offset_mapping"], strict=True)):
            feature["words"] = [-1] * len(offsets)
            for place, (begin, end) in enumerate(offsets):
                word = starts[feature["row"]][end - 1] if end > begin else -1  # the first character may be a space
                if word >= 0:
                    last[feature["row"], word] = number, place
        for (_, word), (number, place) in last.items():
            features[number]["words"][place] = word
        for feature in features:
            known: Any = rows.labels[feature["row"]] if rows.labels else ()
            feature["labels"] = [known[word] if word >= 0 else -100 for word in feature["words"]]
        return Encoded(rows, features)

    def scores(self, task: Task, logits: Array, encoded: Encoded) -> dict[str, float]:
        """A word of which the tokenizer makes nothing is outside."""
        unseen = task.labels.index(OUTSIDE) if OUTSIDE in task.labels else 0
        answers = [[unseen] * len(words) for words in encoded.rows.texts]
        for feature, classes in zip(encoded.features, best_of(task, logits), strict=True):
            for word, found in zip(feature["words"], classes, strict=False):  # padding follows
                if word >= 0:
                    answers[feature["row"]][word] = int(found)
        truth: Any = encoded.rows.labels
        spelt = [[[task.labels[label] for label in row] for row in rows] for rows in (truth, answers)]
        functions = {"entity_f1": entity_f1, "token_accuracy": token_accuracy}
        return {name: functions[name](*spelt) for name in task.metrics}


def word_of_each(words: Sequence[str]) -> list[int]:
    """For each character of the words joined by spaces, the number of its word, −1 for a space."""
    return [number for n, word in enumerate(words) for number in [*[n] * len(word), -1]][:-1]


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(type, first word, word after the last) of each entity in tags like B-PER, counted as conlleval counts them.

    All ways of marking are read alike: IOB2 (B I), IOB1 (B only between two of one type) and IOBES (S alone, E last).
    """
    before, kind, start = OUTSIDE, "", 0
    for place, tag in enumerate([*tags, OUTSIDE]):
        mark, _, of = tag.partition("-")
        if before != OUTSIDE and (before in "ES" or mark in "BSO" or kind != of):
            yield kind, start, place
        if mark != OUTSIDE and (mark in "BS" or before in "ESO" or kind != of):
            start = place
        before, kind = mark, of


def entity_f1(truth: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]) -> float:
    """F1 over all entities of all sentences: one counts where its type and both of its ends are right."""
    true, found = ({(n, *e) for n, tags in enumerate(rows) for e in entities(tags)} for rows in (truth, answers))
    return 2 * len(true & found) / max(1, len(true) + len(found))


def token_accuracy(truth: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]) -> float:
    """The share of words with the right label."""
    right = [a == b for ours, theirs in zip(truth, answers, strict=True) for a, b in zip(ours, theirs, strict=True)]
    return sum(right) / len(right)
