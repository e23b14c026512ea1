"""What tasks may ask of a model. A new form of question is one file here and one line below."""

from __future__ import annotations

from ctcd_ds.evaluation.forms.answers import Answers
from ctcd_ds.evaluation.forms.form import Form
from ctcd_ds.evaluation.forms.sentences import Sentences
from ctcd_ds.evaluation.forms.words import Words
from ctcd_ds.evaluation.tasks import Task

SENTENCES, WORDS, ANSWERS = FORMS = (Sentences(), Words(), Answers())
METRICS = tuple(metric for form in FORMS for metric in form.metrics)


def form_of(task: Task) -> Form:
    """What a task asks: its metrics say it."""
    return form_of_metric(task.metrics[0])


def form_of_metric(metric: str) -> Form:
    """The form of question whose answers are measured so."""
    return next(form for form in FORMS if metric in form.metrics)
