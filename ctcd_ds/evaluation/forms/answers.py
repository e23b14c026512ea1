"""An answer to a question, found in a text: files of SQuAD (1.1, 2.0, and others in its form)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctcd_ds.cli import UserError
from ctcd_ds.evaluation.forms.form import Array, Encoded, Form, windows
from ctcd_ds.evaluation.tables import TaskRows, lines_of, parse_json
from ctcd_ds.evaluation.tasks import Table, Task

LONGEST = 30  # tokens of an answer, as everybody has it


class Answers(Form):
    """A row is a question and its text; its label, the answers that people gave: (first character, words), or none.

    A text that is too long is read in windows that overlap by a quarter of a row. In a window without the answer, [CLS]
    or the last token stands for "not here".
    """

    metrics, suffixes, called = ("exact_match", "answer_f1"), (".json",), "question-answering"

    @staticmethod
    def auto_class() -> Any:
        from transformers import AutoModelForQuestionAnswering

        return AutoModelForQuestionAnswering

    def head(self, task: Task) -> dict[str, Any]:
        return {}

    def collator(self, tokenizer: Any) -> Any:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def read(self, path: Path, table: Table, task: Task) -> tuple[TaskRows, int]:
        """SQuAD's JSON. Raises UserError, naming the question, for an answer that is not where the file says."""
        rows = list(_questions(parse_json("\n".join(lines_of(path)), str(path)), path))
        if not rows:
            raise UserError(f"{path} holds no rows")
        names, texts, labels = zip(*rows, strict=True)
        return TaskRows(list(texts), list(labels), list(names)), 0

    def encode(self, rows: TaskRows, tokenizer: Any, length: int) -> Encoded:
        """Question, then text; `spans` are the characters of the text's tokens, None for all others."""
        questions, texts = zip(*rows.texts, strict=True)
        cut = tokenizer(list(questions), truncation=True, max_length=length // 2, return_offsets_mapping=True)
        ends = [max((end for _, end in offsets), default=0) for offsets in cut["offset_mapping"]]
        encoding = tokenizer(
            [question[:end] for question, end in zip(questions, ends, strict=True)],
            list(texts),
            truncation="only_second",
            max_length=length,
            stride=length // 4,
            return_attention_mask=False,
            return_offsets_mapping=True,
            return_overflowing_tokens=True,
        )
        features = windows(encoding)
        for number, feature in enumerate(features):
            of, offsets = encoding.sequence_ids(number), encoding["offset_mapping"][number]
            feature["spans"] = [
                tuple(o) if side == 1 and o[1] > o[0] else None for o, side in zip(offsets, of, strict=True)
            ]
            known: Any = rows.labels[feature["row"]] if rows.labels else ()
            feature["none"] = _no_answer(feature["input_ids"], tokenizer)
            place = _place(feature["spans"], *known[0]) if known else None
            feature["start_positions"], feature["end_positions"] = place or [feature["none"]] * 2
        return Encoded(rows, features)

    def logits(self, outputs: Any) -> Any:
        """[rows, tokens, 2]: for the first and the last token of the answer."""
        import torch

        return torch.stack(outputs[:2], dim=-1)

    def scores(self, task: Task, logits: Array, encoded: Encoded) -> dict[str, float]:
        """Of several windows the best answer counts, or none where some questions have none and that is likelier."""
        truth: Any = encoded.rows.labels
        found = answers(encoded, logits, may_be_none=not all(truth))
        functions = {"exact_match": exact_match, "answer_f1": answer_f1}
        each: dict[str, list[float]] = {name: [] for name in task.metrics}
        for answer, known in zip(found, truth, strict=True):
            for name in task.metrics:
                each[name].append(max(functions[name](words, answer) for _, words in known or [(0, "")]))
        return {name: float(np.mean(values)) for name, values in each.items()}


def answers(encoded: Encoded, logits: Array, may_be_none: bool) -> list[str]:
    """The answer to each question. logits: [features, tokens, 2]; what lies beyond a feature's tokens is padding."""
    rows = encoded.rows
    best, found = np.full(len(rows), -np.inf), [""] * len(rows)
    none = np.full(len(rows), np.inf)
    for feature, (start, end) in zip(encoded.features, np.moveaxis(logits, -1, 1), strict=True):
        row, spans = feature["row"], feature["spans"]
        none[row] = min(none[row], start[feature["none"]] + end[feature["none"]])
        places = [place for place, span in enumerate(spans) if span is not None]
        if not places:
            continue
        total = start[places][:, None] + end[places][None, :]
        allowed = np.triu(np.ones_like(total, dtype=bool)) & np.tril(np.ones_like(total, dtype=bool), LONGEST - 1)
        first, last = np.unravel_index(np.where(allowed, total, -np.inf).argmax(), total.shape)
        if total[first, last] > best[row]:
            best[row] = total[first, last]
            found[row] = rows.texts[row][1][spans[places[first]][0] : spans[places[last]][1]].strip()
    return [
        answer if not may_be_none or good >= bad else "" for answer, good, bad in zip(found, best, none, strict=True)
    ]


def normalised(text: str) -> list[str]:
    """The words of an answer as SQuAD compares them: no capitals, punctuation or articles."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def exact_match(truth: str, answer: str) -> float:
    """1 where both are the same words."""
    return float(normalised(truth) == normalised(answer))


def answer_f1(truth: str, answer: str) -> float:
    """F1 of the words, each as often as it stands there; of no words at all, whether both are none."""
    known, found = normalised(truth), normalised(answer)
    if not known or not found:
        return float(known == found)
    return 2 * sum((Counter(known) & Counter(found)).values()) / (len(known) + len(found))


def _questions(content: Any, path: Path) -> Iterator[tuple[str, tuple[str, str], tuple[tuple[int, str], ...]]]:
    """(id, (question, text), answers) of each question of a file."""
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                text = paragraph["context"]
                for asked in paragraph["qas"]:
                    known = tuple((answer["answer_start"], answer["text"]) for answer in asked["answers"])
                    for start, words in known:
                        if text[start : start + len(words)] != words:
                            raise UserError(
                                f"{path}: question {asked['id']}: {words[:60]!r} is not at {start} of its text"
                            )
                    yield str(asked["id"]), (asked["question"], text), known
    except (KeyError, TypeError, AttributeError) as problem:
        raise UserError(
            f"{path} is not in SQuAD's form, data > paragraphs > context, qas > id, question, answers > text, "
            f"answer_start: {problem}"
        ) from None


def _no_answer(ids: Sequence[int], tokenizer: Any) -> int:
    """The token that stands for no answer: [CLS], else the last, which alone has read all in a causal model."""
    cls = tokenizer.cls_token_id
    return ids.index(cls) if cls in ids else len(ids) - 1


def _place(spans: Sequence[tuple[int, int] | None], start: int, words: str) -> tuple[int, int] | None:
    """The first and the last token of an answer; None where not all of it is in this window."""
    ends = start + len(words) - len(words.lstrip()), start + len(words.rstrip()) - 1
    found = [n for character in ends for n, span in enumerate(spans) if span and span[0] <= character < span[1]]
    return (found[0], found[-1]) if len(found) >= 2 else None
