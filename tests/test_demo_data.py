"""The demo's data: prose only, the same every time, and a task whose sentences are nowhere in the text."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctcd_ds.cli import UserError
from ctcd_ds.demo import data, pairs, text
from ctcd_ds.evaluation import tasks
from ctcd_ds.evaluation.data import from_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo's data."""
    folder = tmp_path_factory.mktemp("demo")
    data.make(folder, 700_000)
    return folder


def test_prose_is_kept_and_all_else_is_dropped() -> None:
    docstring = """Return the *largest* of the values in the given :class:`~array.Array` object.

    Parameters
    ----------
    axis : int, optional
        The axis along which the largest value is
        searched, as in `numpy.max` [1]_.
    keep (bool, optional): Whether the result keeps the axis with a length of one.

    >>> largest([1, 2, 3]) is the largest value of all that stand there.

    ====  =====  Values are shown in this table of all the values.
    """
    assert text.prose(docstring) == [
        "Return the largest of the values in the given array.Array object.",
        "The axis along which the largest value is searched, as in numpy.max.",
        "Whether the result keeps the axis with a length of one.",
    ]


def test_docstrings_are_read_without_running_the_file(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        '"""Module."""\nraise SystemExit\nclass A:\n    """Class."""\n    async def f(self):\n        """Method."""\n'
        'x = """no docstring"""\nadd_docstr(f, """By a call.""")\n'
    )
    assert text.docstrings(file) == ["Module.", "Class.", "Method.", "By a call."]
    file.write_text('"""Not valid Python."""\nprint 1\n')
    assert text.docstrings(file) == []


def test_the_text_has_about_its_size_and_no_paragraph_twice(made: Path) -> None:
    content = (made / "text.txt").read_text(encoding="utf-8")
    assert len(content.encode()) == pytest.approx(700_000, rel=0.1)
    documents = content.removesuffix("\n").split("\n\n")
    paragraphs = [paragraph for document in documents for paragraph in document.split("\n")]
    assert len(documents) > 100 and len(set(paragraphs)) == len(paragraphs)
    assert all(len(paragraph.split()) >= 8 and paragraph[-1] in ".!?" for paragraph in paragraphs)


def test_the_same_installation_gives_the_same_files_with_any_number_of_workers(made: Path) -> None:
    assert text.documents(300_000, workers=1) == text.documents(300_000, workers=2)


def test_the_task_is_in_rte_format_balanced_and_held_out(made: Path) -> None:
    read = from_folder(made / "glue", tasks.RTE)
    assert read.train is not None and len(read.train) > 100 and len(read.dev[""]) > 30
    content = (made / "text.txt").read_text(encoding="utf-8")
    unordered = []
    for rows in (read.train, read.dev[""]):
        assert rows.labels is not None and abs(sum(rows.labels) / len(rows) - 0.5) < 0.01
        assert not any(" ".join(texts) in content or " ".join(texts[::-1]) in content for texts in rows.texts)
        unordered += [frozenset(texts) for texts in rows.texts]
    assert len(set(unordered)) == len(unordered)  # no pair is in train and dev, in either order
    assert "not GLUE's RTE" in (made / "glue/RTE/README.txt").read_text()


def test_pairs_are_neighbours_and_the_label_says_their_order() -> None:
    paragraph = "One is the first of all sentences. Then there comes the second one. Last comes the third of them."
    made = pairs.sentence_pairs([text.Document("x", (paragraph,))])
    assert len(made) == 2
    for first, second, label in made:
        written = f"{first} {second}" if label == "entailment" else f"{second} {first}"
        assert written in paragraph


def test_an_output_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        data.make(tmp_path / "file", 1000)
