"""The recipe: one reading of numbers, all mistakes at once, each with its cure."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctcd_ds.cli import UserError
from ctcd_ds.objective.course import Course
from ctcd_ds.objective.divergences import Divergence
from ctcd_ds.objective.signals import Hidden, Relations
from ctcd_ds.plain import from_yaml
from ctcd_ds.recipe.mistakes import recipe_mistakes
from ctcd_ds.recipe.reading import load_recipe
from ctcd_ds.recipe.schema import Mistakes
from ctcd_ds.recipe.sections import Recipe

GOOD: dict[str, Any] = {
    "corpus": {"path": "corpora/text"},
    "peers": {
        "teacher": {"model": {"model_type": "bert"}, "soft": {"student": 1.0}},
        "student": {"model": {"model_type": "bert"}, "soft": {"teacher": 4.0}, "optimizer": {"lr": 1e-3}},
    },
    "training": {"steps": 10},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(GOOD)
    *sections, key = path.split(".")
    place = raw
    for section in sections:
        place = place.setdefault(section, {})
    place[key] = value
    return raw


def test_a_good_recipe_has_defaults_and_a_graph() -> None:
    recipe = Recipe.model_validate(GOOD)
    assert recipe_mistakes(GOOD) == []
    assert (recipe.corpus.sequence_length, recipe.optimizer.lr, recipe.training.checkpoint_minutes) == (128, 5e-4, 15)
    assert recipe.graph().soft == ((0.0, 1.0), (4.0, 0.0))
    assert recipe.optimizer_of("teacher").lr == 5e-4
    assert recipe.optimizer_of("student").lr == 1e-3
    assert recipe.optimizer_of("student").betas == (0.9, 0.98)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("seed", -1, "seed = -1: must be greater than or equal to 0"),
        ("seeed", 1, "did you mean 'seed'?"),
        (
            "corpus",
            {"sources": {"a": {"path": "x", "weight": 1.0}}, "train_rows": 9},
            "train_rows = 9: reduces one corpus",
        ),
        ("corpus.train_rows", 0, "corpus.train_rows = 0: must be greater than or equal to 1"),
        ("corpus.sequence_length", 128.5, "corpus.sequence_length = 128.5: must be a valid integer"),
        ("training.global_batch_rows", 1e3, "training.global_batch_rows = 1000.0: must be a valid integer; write 1000"),
        ("corpus.mask_fraction", 1.5, "corpus.mask_fraction = 1.5: must be less than 1"),
        ("optimizer.lr", "5e-4", "optimizer.lr = '5e-4': must be a valid number; write 5e-4, without quotes"),
        ("training.compile", "on", "training.compile = 'on': must be true or false"),
        ("training.compile", "true", "training.compile = 'true': must be true or false; write true, without quotes"),
        ("optimizer.lr", 0, "optimizer.lr = 0: must be greater than 0"),
        ("optimizer.learning_rate", 1, "optimizer.learning_rate = 1: unknown key"),
        ("peers.student.optimiser", {}, "did you mean 'optimizer'?"),
        ("peers.student.soft.techer", 1.0, "no peer has this name; did you mean 'teacher'?"),
        ("peers.student.soft.student", 1.0, "a peer does not learn from itself"),
        ("peers.student.soft.teacher", -4.0, "peers.student.soft.teacher = -4.0: must be greater than or equal to 0"),
        ("peers.student.hard", -1, "peers.student.hard = -1: must be greater"),
        ("peers.student.pretrained", "x", "exactly one of model"),
        ("peers.student.model", {}, "model_type = None"),
        ("peers.student.model.vocab_size", 99, "comes from the corpus's tokenizer"),
        ("peers.student.frozen", True, "a frozen peer learns nothing"),
        ("peers.student.soft.teacher", {}, "peers.student.soft.teacher.then: missing"),
        ("peers.student.soft.teacher", "much", "peers.student.soft.teacher = 'much': must be a valid number"),
        ("peers.student.soft.teacher", {"then": 4, "afer": 0.5}, "afer = 0.5: unknown key; did you mean 'after'?"),
        ("peers.student.soft.teacher", {"then": 4, "after": 1.0}, "soft.teacher.after = 1.0: must be less than 1"),
        ("peers.student.soft.teacher", {"then": -4}, "soft.teacher.then = -4: must be greater than or equal to 0"),
        ("peers.student.soft.teacher", {"then": 4, "after": 0.6, "over": 0.5}, "after 0.6 and over 0.5 make more than"),
        ("peers.student.soft.techer", {"then": 4}, "no peer has this name; did you mean 'teacher'?"),
        ("peers.student.soft_start_fraction", {"techer": 0.5}, "unknown key; did you mean"),
        ("peers.student.label_noise", 1.5, "peers.student.label_noise = 1.5: must be less than or equal to 1"),
        ("peers.student.mask_fraction", 0, "peers.student.mask_fraction = 0: must be greater than 0"),
        ("peers.a/b", {"model": {"model_type": "bert"}}, "a peer's name is letters"),
        ("peers", {}, "at least one peer"),
        ("peers.Teacher", {"model": {"model_type": "bert"}}, "teacher and Teacher would be one folder"),
        ("objective.temperature", 0, "objective.temperature = 0: must be greater than 0"),
        ("objective.temperature", {"then": 2}, "objective.temperature: 0 until 0% of the steps, then 2: logits are"),
        (
            "objective.temperature",
            {"first": 4, "then": 1, "after": 0.9, "over": 0.2},
            "after 0.9 and over 0.2 make more",
        ),
        ("peers.student.temperature", {"teacher": 0}, "student.temperature.teacher = 0: must be greater than 0"),
        ("peers.student.temperature", {"teacher": {"then": 2}}, "temperature.teacher: 0 until 0% of the steps, then 2"),
        ("peers.student.temperature", {"techer": 2}, "temperature.techer = 2: peers.student.soft has no weight for it"),
        (
            "peers.student.hidden",
            {"techer": {"weight": 1}},
            "student.hidden.techer = …: no peer has this name; did you",
        ),
        ("peers.student.hidden", {"student": {"weight": 1}}, "student.hidden.student = …: a peer does not learn from"),
        ("peers.student.hidden", {"teacher": 1.0}, "peers.student.hidden.teacher = 1.0: must be a mapping"),
        ("peers.student.hidden", {"teacher": {"layers": "even"}}, "peers.student.hidden.teacher.weight: missing"),
        ("peers.student.hidden.teacher", {"weight": -1}, "hidden.teacher.weight = -1: must be greater than or equal"),
        ("peers.student.hidden.teacher", {"weight": 1, "layers": "all"}, "layers = 'all': must be 'last' or 'even'"),
        ("peers.student.hidden.teacher", {"weight": 1, "layers": [[1, -2]]}, "layers.0.1 = -2: must be greater than"),
        (
            "peers.student.hidden.teacher",
            {"weight": 1, "layers": []},
            "hidden.teacher.layers = []: must have at least 1",
        ),
        ("peers.student.hidden.teacher", {"weight": 1, "layers": [2, 3]}, "teacher.layers.0 = 2: must be a list"),
        ("peers.student.hidden.teacher", {"weight": {"then": 1, "after": 0.6, "over": 0.6}}, "after 0.6 and over 0.6"),
        ("peers.student.relations.teacher", {"weight": 1}, "peers.student.relations.teacher.heads: missing"),
        (
            "peers.student.relations.teacher",
            {"weight": 1, "heads": 4, "of": ["qery"]},
            "of.0 = 'qery': must be 'query'",
        ),
        (
            "peers.student.relations.teacher",
            {"weight": 1, "heads": 4, "layer": [1]},
            "relations.teacher.layer.1: missing",
        ),
        ("objective.task", "cml", "objective.task = 'cml': must be 'mlm', 'clm' or 'span'"),
        ("objective.soft_positions", "some", "must be 'targets' or 'all'"),
        ("schedule.type", "stepwise", "must be 'linear', 'cosine' or 'constant'"),
        ("training.epochs", 1, "exactly one of steps and epochs"),
        ("training.steps", None, "exactly one of steps and epochs"),
        ("training.global_batch_rows", 0, "must be greater than or equal to 1"),
        ("training.checkpoint_every", 0, "must be greater than or equal to 1"),
    ],
)
def test_each_mistake_is_named_with_its_cure(path: str, value: Any, said: str) -> None:
    mistakes = recipe_mistakes(changed(path, value))
    assert any(said in mistake for mistake in mistakes), mistakes


def test_a_list_with_a_wrong_item_has_one_mistake() -> None:
    wrong = {"weight": 1, "layers": [[1, 2.5], [2, 4]]}
    [said] = recipe_mistakes(changed("peers.student.hidden.teacher", wrong))
    assert said.startswith("peers.student.hidden.teacher.layers.0.1 = 2.5: must be a valid integer")


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    raw = changed("optimizer.lr", -1)
    raw["peers"]["student"]["soft"]["nobody"] = 1.0
    raw["shedule"] = {}
    path = tmp_path / "three.yaml"
    path.write_text(json.dumps(raw))
    with pytest.raises(Mistakes) as problem:
        load_recipe(path)
    assert len(problem.value.mistakes) == 3
    for word in ("three.yaml", "optimizer.lr = -1", "nobody", "did you mean 'schedule'?"):
        assert word in str(problem.value)


def test_a_frozen_peer_with_a_hard_loss_or_without_weights_is_refused() -> None:
    raw = changed("peers.teacher", {"frozen": True, "hard": 1.0})
    said = "\n".join(recipe_mistakes(raw))
    assert "peers.teacher.hard = 1.0: a frozen peer learns nothing" in said
    assert "say which with pretrained" in said
    raw = changed("peers.teacher", {"frozen": True, "pretrained": "some/dir"})
    assert recipe_mistakes(raw) == []
    assert Recipe.model_validate(raw).graph().trained == (False, True)


def test_noise_that_makes_no_sense_is_refused() -> None:
    frozen = {"frozen": True, "pretrained": "some/dir", "label_noise": 0.1}
    assert any("no hard loss that noise" in mistake for mistake in recipe_mistakes(changed("peers.teacher", frozen)))


@pytest.mark.parametrize(
    ("course", "nothing_at"),
    [
        ({"then": 4, "after": 0.3}, "0%"),
        ({"then": 4, "over": 0.3}, "0%"),
        ({"first": 4, "then": 0, "after": 0.2, "over": 0.5}, "70%"),
        ({"first": 1, "then": 4, "over": 0.3}, None),
        ({"first": 4, "then": 0, "over": 1}, None),  # 0 only when all is over
    ],
)
def test_a_peer_must_learn_from_something_at_every_step(course: dict[str, float], nothing_at: str | None) -> None:
    student = {**GOOD["peers"]["student"], "hard": 0.0, "soft": {"teacher": course}}
    said = recipe_mistakes(changed("peers.student", student))
    assert [f"when {nothing_at} of the steps are done" in mistake for mistake in said] == [True] * bool(nothing_at)
    assert recipe_mistakes(changed("peers.student", {**student, "hard": 1.0})) == []


def test_a_late_start_as_earlier_versions_wrote_it_is_read() -> None:
    peers = {name: {**peer, "soft_start_fraction": {}} for name, peer in GOOD["peers"].items()}
    assert Recipe.model_validate({**GOOD, "peers": peers}) == Recipe.model_validate(GOOD)
    peers["student"]["soft_start_fraction"] = {"teacher": 0.3}
    assert recipe_mistakes({**GOOD, "peers": peers}) == []
    now = changed("peers.student.soft.teacher", {"then": 4.0, "after": 0.3})
    assert Recipe.model_validate({**GOOD, "peers": peers}) == Recipe.model_validate(now)


@settings(max_examples=100, deadline=None)
@given(
    first=st.floats(0, 9), then=st.floats(0, 9), steps=st.integers(1, 40), after=st.integers(0, 10),
    over=st.integers(0, 10),
)  # fmt: skip
def test_weights_and_temperatures_are_on_their_course_at_every_step(
    first: float, then: float, steps: int, after: int, over: int
) -> None:
    """Against numpy's line between two points; shares are tenths of the run. A weight of 0 is no edge."""
    begins, lasts = min(after, 9) / 10, min(over, 10 - min(after, 9)) / 10
    raw = changed("peers.student.soft.teacher", {"first": first, "then": then, "after": begins, "over": lasts})
    cooling = {"first": first + 1, "then": then + 1, "after": begins, "over": lasts}
    raw["objective"] = {"temperature": cooling}
    raw["peers"]["teacher"]["temperature"] = {"student": 2.5}
    raw["peers"]["student"]["temperature"] = {"teacher": cooling | {"first": then + 1, "then": first + 1}}
    assert recipe_mistakes(raw) == []
    whole = Recipe.model_validate(raw).graph()
    for step in range(steps):
        done = step / steps
        graph = whole.at(done)
        jumps = then if done >= begins else first
        expected = np.interp(done, [begins, begins + lasts], [first, then]) if lasts else jumps
        assert graph.soft[1][0] == pytest.approx(expected, abs=1e-12) and graph.soft[0][1] == 1.0
        assert graph.temperature == pytest.approx(expected + 1, abs=1e-12)
        assert graph.tau(0, 1) == 2.5 and graph.tau(1, 0) == pytest.approx(first + then - expected + 1, abs=1e-12)
        assert ((1, 0) in [(i, j) for i, j, _ in graph.edges()]) == (graph.soft[1][0] != 0)
        assert graph.at(0.5) == graph, "what holds at a step is a graph without courses"
    assert whole.distilling() == {"teacher", "student"}
    said = recipe_mistakes({**raw, "training": {**raw["training"], "compile": True}})
    assert ["objective.temperature changes" in said[0], "peers.student.temperature.teacher changes" in said[1]] == [
        1,
        1,
    ]


def test_courses_are_said_in_words() -> None:
    for course, said in (
        ({"then": 4, "after": 0.25}, "weight 0 until 25% of the steps, then 4"),
        ({"then": 4, "over": 0.3}, "weight 0 to 4 from 0% to 30% of the steps"),
        ({"first": 4, "then": 0.5, "after": 0.1, "over": 0.9}, "weight 4 to 0.5 from 10% to 100% of the steps"),
    ):
        graph = Recipe.model_validate(changed("peers.student.soft.teacher", course)).graph()
        assert graph.describe()[-1].endswith(said)


def test_a_peer_that_learns_from_nothing_is_refused() -> None:
    raw = changed("peers.teacher", {"model": {"model_type": "bert"}, "hard": 0.0})
    assert any("learns from nothing" in mistake for mistake in recipe_mistakes(raw))


@pytest.mark.parametrize(
    ("text", "value"),
    [("5e-4", 5e-4), ("1e-06", 1e-6), ("5.0e-4", 5e-4), ("yes", "yes"), ("true", True), ("1e3", 1000.0), ("~", None)],
)
def test_numbers_are_yaml_1_2_in_files_and_in_set(tmp_path: Path, text: str, value: Any) -> None:
    assert from_yaml(text) == value and type(from_yaml(text)) is type(value)
    if isinstance(value, float) and value < 1:
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps(GOOD))
        recipe = load_recipe(path, [f"optimizer.lr={text}", "peers.student.soft.teacher=2"])
        assert recipe.optimizer.lr == value
        assert recipe.peers["student"].soft == {"teacher": 2}


def test_what_set_cannot_do_is_said(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(GOOD))
    with pytest.raises(Mistakes) as problem:
        load_recipe(path, ["nonsense", "training.steps.x=1", "training.stepps=3"])
    assert [m.split(":")[0] for m in problem.value.mistakes[:2]] == ["--set nonsense", "--set training.steps.x=1"]
    assert "did you mean 'steps'" in problem.value.mistakes[2]


@pytest.mark.parametrize("text", ["a: [1", "a: 1\na: 2", "\x00", "- 1\n- 2", "just words", "", "a: " + "[" * 5000])
def test_a_file_that_is_no_recipe_is_one_clear_message(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_recipe(path)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    for name in ("recipe.json", "recipe.yaml"):
        (tmp_path / name).write_text("\ufeff" + json.dumps(GOOD), encoding="utf-8")
        assert list(load_recipe(tmp_path / name).peers) == list(GOOD["peers"])


def test_a_missing_or_binary_file_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, said in (
        ("absent.yaml", "no such file"),
        ("binary.yaml", "is not UTF-8, byte 0: save it as UTF-8"),
    ):
        with pytest.raises(UserError, match=rf"{name}.*{said}"):
            load_recipe(tmp_path / name)


@settings(max_examples=40, deadline=None)
@given(
    lr=st.floats(1e-8, 1.0),
    weight=st.floats(0.001, 100),
    seed=st.integers(0, 2**63 - 1),
    kind=st.sampled_from(["linear", "cosine"]),
)
def test_the_resolved_recipe_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, lr: float, weight: float, seed: int, kind: str
) -> None:
    raw = changed("optimizer.lr", lr)
    raw["peers"]["student"]["soft"]["teacher"] = weight
    raw |= {"seed": seed, "schedule": {"type": kind}}
    recipe = Recipe.model_validate(raw)
    path = tmp_path_factory.mktemp("recipe") / "resolved.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe
    assert list(load_recipe(path).peers) == ["teacher", "student"]  # their order is the graph's


def test_null_takes_a_peer_away_with_what_points_at_it(tmp_path: Path) -> None:
    raw = changed("peers.student.soft.teacher", {"then": 4, "after": 0.5})
    (tmp_path / "r.json").write_text(json.dumps(raw))
    alone = load_recipe(tmp_path / "r.json", ["peers.teacher=null"])
    assert list(alone.peers) == ["student"] and not list(alone.graph().edges())
    with pytest.raises(UserError, match=r"peers.techer = null: no peer has this name; did you mean 'teacher'\?"):
        load_recipe(tmp_path / "r.json", ["peers.techer=null"])
    with pytest.raises(UserError, match="a run needs at least one peer"):
        load_recipe(tmp_path / "r.json", ["peers.teacher=null", "peers.student=null"])
    (tmp_path / "r.json").write_text(json.dumps(changed("peers.teacher", None)))
    with pytest.raises(UserError, match=r"peers\.teacher = None"):
        load_recipe(tmp_path / "r.json")


def test_a_key_of_a_mistyped_peer_is_no_new_peer(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(GOOD))
    with pytest.raises(UserError, match=r"peers.studnet: no peer has this name; did you mean 'student'\?") as problem:
        load_recipe(tmp_path / "r.json", ["peers.studnet.soft.teacher=2", "peers.studnet.hard=0.5"])
    assert str(problem.value).startswith("one mistake")
    model = json.dumps(GOOD["peers"]["student"]["model"])
    assert list(load_recipe(tmp_path / "r.json", [f"peers.third.model={model}"]).peers)[2:] == ["third"]


def test_null_takes_away_what_a_peer_learns_from_others(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(changed("seed", 2)))
    alone = load_recipe(tmp_path / "r.json", ["peers.teacher.soft=null", "peers.student.soft=null"])
    assert not alone.graph().distilling() and set(alone.peers) == {"teacher", "student"}


_KEYS = ("peers", "corpus", "training", "soft", "hard", "model", "teacher", "frozen", "optimizer", "x")
_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(_ANYTHING)
def test_anything_at_all_gives_mistakes_and_never_a_crash(raw: Any) -> None:
    assert recipe_mistakes(raw)


def test_signals_are_edges_of_the_graph_and_causal_where_models_are() -> None:
    raw = changed("peers.student.hidden", {"teacher": {"weight": {"then": 2, "over": 0.5}, "layers": [[2, 3], [4, 6]]}})
    raw["peers"]["teacher"]["relations"] = {"student": {"weight": 3, "heads": 8, "layer": [6, 4], "of": ["value"]}}
    raw["peers"]["teacher"]["hidden"] = {"student": {"weight": 0}}
    assert recipe_mistakes(raw) == []
    graph = Recipe.model_validate(raw).graph()
    relations = Relations(0, 1, 3.0, None, (6, 4), 8, ("value",))
    assert graph.signals == (relations, Hidden(1, 0, 2.0, Course(0.0, 2.0, over=0.5), ((2, 3), (4, 6))))
    assert [s.weight for s in graph.at(0.25).signals] == [3.0, 1.0]
    assert [graph.name_of(s) for s in graph.signals] == [
        "loss/teacher/relations/student",
        "loss/student/hidden/teacher",
    ]
    assert graph.distilling() == {"teacher", "student"} and len(graph.terms()) == 4
    said = recipe_mistakes({**raw, "training": {**raw["training"], "compile": True}})
    assert len(said) == 1 and "peers.teacher.relations looks into layers" in said[0]
    raw["objective"] = {"task": "clm"}
    assert Recipe.model_validate(raw).graph().signals[0] == replace(relations, causal=True)
    raw["objective"] = {"task": "span"}
    assert any("peers.teacher.relations = " in m and "for objective.task mlm or clm" in m for m in recipe_mistakes(raw))


def test_a_peer_may_learn_from_a_signal_alone() -> None:
    student = {**GOOD["peers"]["student"], "hard": 0.0, "soft": {}, "hidden": {"teacher": {"weight": 1}}}
    assert recipe_mistakes(changed("peers.student", student)) == []
    student["hidden"] = {"teacher": {"weight": 0}}
    assert any("the peer learns from nothing" in said for said in recipe_mistakes(changed("peers.student", student)))
    cached = {**changed("objective.temperature", {"first": 4, "then": 1}), "cached_teachers": {"old": "some/dir"}}
    cached["peers"]["student"] |= {"hidden": {"old": {"weight": 1}}, "soft": {"old": 1}, "temperature": {"old": 2}}
    said = recipe_mistakes(cached)
    assert len(said) == 3 and "hidden.old = …: of a cached teacher only predictions are kept" in said[0]
    assert "cached teachers were asked at one temperature" in said[1]
    assert "student.temperature.old: cached teachers were asked at objective.temperature" in said[2]
    taken = {"frozen": True, "pretrained": "some/dir", "hidden": {"student": {"weight": 1}}}
    said = recipe_mistakes(changed("peers.teacher", taken))
    assert len(said) == 1 and "a frozen peer learns nothing; remove hidden" in said[0]


def test_divergences_are_the_recipes_or_an_edges_own() -> None:
    peers = {
        "a": {"model": {"model_type": "bert"}, "soft": {"b": 1.0}},
        "b": {"model": {"model_type": "bert"}, "soft": {"a": 4.0}, "divergence": {"a": "jsd"}},
    }
    raw = {"corpus": {"path": "x"}, "peers": peers, "training": {"steps": 1}}
    raw["objective"] = {"divergence": "reverse_kl", "jsd_beta": 0.1}
    graph = Recipe.model_validate(raw).graph()
    assert (graph.divergence(0, 1), graph.divergence(1, 0)) == (Divergence("reverse_kl"), Divergence("jsd", 0.1))
    assert "b            learns from a                  weight 4 (JSD, β 0.1)" in graph.describe()
    peers["b"]["divergence"] = {"c": "kl", "a": "hellinger"}
    raw["objective"]["jsd_beta"] = 1.0
    said = recipe_mistakes(raw)
    assert len(said) == 3 and "peers.b.divergence.c = kl: peers.b.soft has no weight for it" in said[2]
    assert "objective.jsd_beta = 1.0" in said[0] or "objective.jsd_beta = 1.0" in said[1]
