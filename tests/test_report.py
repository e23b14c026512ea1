"""The report: made from real runs, read as people read it (in a browser, on a phone, in the dark, on paper)."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from commands import ROOT, command, run
from ctcd_ds.evaluation.speed import ModelSpeed, Speed, Timing, write_speed
from ctcd_ds.experiments.report.build import write_report
from ctcd_ds.experiments.report.curves import Curves
from ctcd_ds.experiments.report.drawing import HEIGHT, draw
from ctcd_ds.experiments.report.grids import grid_pictures
from ctcd_ds.experiments.report.logs import slug
from ctcd_ds.experiments.report.study import Study, read_study
from ctcd_ds.experiments.report.words import answer, opening, role, setting, statements
from ctcd_ds.experiments.results import Condition, Results, write_results
from ctcd_ds.experiments.statistics import compare, spread
from ctcd_ds.objective.graph import DistillationGraph
from runs import Job, bert, chain_corpus, run_jobs

SEEDS, STEPS = (1, 2, 3), 20
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


# --- real runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Each model alone and both together, three seeds each. A name is what a careless user may give."""
    place = tmp_path_factory.mktemp("runs")
    corpus = {"path": str(chain_corpus(place / "corpus")), "sequence_length": 32}
    teacher, student = {"model": bert(32, 2)}, {"model": bert(16, 1)}
    together = {"teacher": {**teacher, "soft": {"student": 1.0}}, "student": {**student, "soft": {"teacher": 4.0}}}
    kinds = {"together <b>$1": together, "teacher_alone": {"teacher": teacher}, "student_alone": {"student": student}}
    training = {"global_batch_rows": 16, "steps": STEPS, "log_every": 1, "valid_every": 5, "valid_rows": 32}
    common = {"corpus": corpus, "optimizer": {"lr": 3e-3}, "training": training}
    jobs = {
        place / f"{name}-seed-{seed}": {"seed": seed, "peers": peers, **common}
        for name, peers in kinds.items()
        for seed in SEEDS
    }
    run_jobs([Job(recipe, output) for output, recipe in jobs.items()], 1, place)
    return list(jobs)


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of these runs, by the command."""
    place = tmp_path_factory.mktemp("report")
    done = run("tools/report.py", *runs, "--output_dir", place, "--agreement_rows", 32)
    assert done.returncode == 0, done.stderr
    return place / "report.html"


def test_the_first_screen_says_what_came_out(page: Path) -> None:
    text = re.sub(r"<[^>]+>", "", page.read_text().split("<nav")[0])
    for peer in ("teacher", "student"):
        name = r"\(together &lt;b&gt;\$1\)"
        ends = r"ends at a median held-out loss of (\S+) nats; alone, at (\S+) nats\."
        said = re.search(rf"The {peer}, taught and teaching {name}, {ends}", text)
        assert said and 0 < float(said[1]) < 10 and 0 < float(said[2]) < 10, text
    assert re.search(
        r"As “together &lt;b&gt;\$1”, the teacher \w+ .* and the student \w+ .*, against training alone", text
    )
    assert text.index("Mind") < text.index("ends at a median"), "what to mind stands before what was found"
    assert "20 steps of 16 rows of 32 tokens; corpus corpus" in text and "M parameters, 2 layers" in text
    assert "the teacher, alone, at" in text, "the student is held against the larger model too"
    assert len(re.findall(r"(Better|Worse|No evidence of a difference): mean difference [+−]\d", text)) == 3, text
    assert "3 seeds: only large differences can be told from chance" in text


def test_only_what_was_trained_alike_is_compared(runs: list[Path], tmp_path: Path) -> None:
    """The same names, one with another learning rate: no comparison, and Mind names the key with both values."""
    places = {path.name: path for path in runs}
    together, alone = places["together <b>$1-seed-1"], places["teacher_alone-seed-1"]
    alike = read_study([together, alone])
    assert alike.results.comparisons and "(held-out loss; one seed cannot tell it from chance)" in answer(alike)
    changes = (("lr", "lr: 0.003", "lr: 0.001"), ("length", "sequence_length: 32", "sequence_length: 16"))
    for name, old, new in (*changes, ("text", "/corpus\n", "/tales\n  train_rows: 40\n")):
        other = tmp_path / f"teacher_alone_{name}"
        shutil.copytree(alone, other)
        text = (other / "recipe.yaml").read_text()
        assert old in text
        (other / "recipe.yaml").write_text(text.replace(old, new))
    study = read_study([together, *tmp_path.iterdir()])
    assert "same text" not in opening(study) and "holds them against" not in opening(study)
    assert "rows of 16 tokens" in setting(study) and "corpus and tales, 40 of its rows or all" in setting(study)
    results = study.results
    assert results.comparisons == []
    said = "\n".join(results.caveats)
    assert "corpus.train_rows (None and 40)" in said, "a reduced corpus, on one side only"
    assert "optimizer.lr (0.003 and 0.001)" in said and "corpus.sequence_length (32 and 16)" in said
    assert "seed" not in said, "nothing is compared, so no number of seeds is claimed"


def test_the_page_needs_nothing_else(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", text), "a link to another file"
    assert "default-src 'none'" in text and "<b>$1" not in text, "what users wrote is text, never markup"
    assert len(text) < 3_000_000


def test_the_commands_that_repeat_the_runs_are_there_with_their_folder(page: Path) -> None:
    commands = re.findall(r'<pre class="command">(.*?)</pre>', page.read_text())
    assert commands and all(line.startswith(f"cd {ROOT} &amp;&amp; python {ROOT}/tests/runs.py ") for line in commands)


def test_every_picture_is_drawn_inline_and_as_png(page: Path) -> None:
    found = re.findall(r'<figure id="([^"]+)">.*?(<svg.*?</svg>)', page.read_text(), flags=re.DOTALL)
    names = {name for name, _ in found}
    wanted = {f"learning-{peer}-by-{axis}" for peer in ("teacher", "student") for axis in ("step", "compute")}
    wanted |= {"soft-student-learning-from-teacher", "agreement-teacher-student", "gradient-norm-student"}
    assert names >= wanted | {"throughput", "ends-valid-loss-teacher", "ends-valid-loss-student"}
    assert {path.stem for path in page.parent.glob("*.png")} == names
    for name, svg in found:
        ElementTree.fromstring(svg.replace("xlink:", ""))
        assert "var(--ink)" in svg and not re.search("#22211f", svg, re.IGNORECASE), "colours follow the page"
        colours = Image.open(page.parent / f"{name}.png").convert("RGB").getcolors(10**6)
        assert colours is not None and len(colours) > 20, name
    ids = re.findall(r'\bid="([^"]+)"', page.read_text())
    assert len(ids) == len(set(ids)), "ids of different pictures do not meet"


def test_alone_and_together_share_their_axes(page: Path) -> None:
    svg = re.search(r'<figure id="learning-student-by-compute">.*?</svg>', page.read_text(), flags=re.DOTALL)
    assert svg is not None
    assert "student alone" in svg[0] and "together" in svg[0] and "training FLOPs" in svg[0]


def test_common_mistakes_are_held_against_each_alone(page: Path) -> None:
    text = page.read_text()
    table = re.search(r'<table id="table-mistakes">.*?</table>', text, flags=re.DOTALL)
    assert table is not None
    rows = [re.findall(r'data-value="([^"]*)"', row) for row in table[0].split("<tr>")[2:]]
    assert len(rows) == 2 and "each alone" in table[0]
    for seeds, *shares in rows:
        assert seeds == "3"
        assert sum(map(float, shares[:5])) == pytest.approx(100, abs=25), "five medians: near the whole"
    assert re.search(r"same wrong answer in [\d.]+ % of the cases when trained as “together", text)


def test_speed_has_its_table_and_a_sentence(runs: list[Path], tmp_path: Path) -> None:
    def model(name: str, layers: int, parameters: int, latency: float) -> ModelSpeed:
        timings = [
            Timing(batch_size=size, sequence_length=32, rounds=5, latency_ms=size * latency, latency_p95_ms=None,
                   rows_per_s=1000 / latency, tokens_per_s=32000 / latency, speedup=30.0 / latency,
                   peak_memory_bytes=2**20)
            for size in (1, 8)
        ]  # fmt: skip
        return ModelSpeed(name=name, path=f"/{name}", sha256="0", layers=layers, hidden_size=32, parameters=parameters,
                          bytes_on_disk=4 * parameters, timings=timings)  # fmt: skip

    hardware = {"device": "a <machine>", "cores": 2, "threads": 2, "host": "h"}
    models = [model("large", 4, 1000, 30.0), model("small", 2, 500, 12.0)]
    measured = Speed(command=[], hardware=hardware, versions={}, git_commit=None, dtype="float32",
                     sizes=[(1, 32), (8, 32)], models=models)  # fmt: skip
    write_speed(tmp_path / "speed", measured)
    page = write_report(runs[:1], tmp_path / "report", 0, tmp_path / "speed").read_text()
    said = "Against large, small is 2.50 times as fast (1 row at once) and 2.50 times as fast (8 rows at once)"
    assert said in page and "has 50% of the size on disk" in page and "a &lt;machine&gt;" in page
    (table,) = re.findall(r'<table id="table-speed">.*?</table>', page, flags=re.DOTALL)
    assert table.count("<tr>") == 1 + 4 and 'data-value="2.5"' in table
    assert "table-speed" not in write_report(runs[:1], tmp_path / "report", 0).read_text()


def test_mistakes_are_named(tmp_path: Path, runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "experiment").mkdir()
    write_results(tmp_path / "experiment", _grid())
    for words, expected in (
        ((tmp_path,), "is neither a run nor an experiment: it is a folder with an experiment's directory in it; give "),
        ((runs[0], tmp_path / "experiment"), "is an experiment: give it alone"),
        ((tmp_path / "experiment",), "no run has logged a step yet"),
        ((runs[0], "--agreement_rows", "-1"), "must be 0 or more"),
        ((runs[0], "--output_dir", tmp_path / "file"), "cannot be made"),
    ):
        line = ("tools/report.py", *words, *(() if "--output_dir" in words else ("--output_dir", tmp_path / "out")))
        code, _, error = command(monkeypatch, capsys, *line)
        assert code == 2 and expected in error, error
        assert not (tmp_path / "out").exists()


def test_a_run_without_its_corpus_still_has_a_report(
    tmp_path: Path, runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(re.sub(r"path: .*corpus", "path: /gone", recipe.read_text()))
    (tmp_path / "run" / "exit.json").write_text('{"state": "finished", "step": 20, "reason": ""}')
    line = ("tools/report.py", tmp_path / "run", "--output_dir", tmp_path / "out")
    code, _, error = command(monkeypatch, capsys, *line)
    text = (tmp_path / "out" / "report.html").read_text()
    assert code == 0, error
    assert "Not compared" in text and "/gone" in text


# --- words ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("soft", "trained", "said"),
    [
        (((0, 1), (4, 0)), (True, True), ["taught and teaching", "taught and teaching"]),
        (((0, 0), (4, 0)), (True, True), ["teaching", "taught"]),
        (((0, 0), (4, 0)), (False, True), ["teaching", "taught by the finished a"]),
        (((0, 0), (0, 0)), (True, True), ["beside the others, untaught"] * 2),
        (((0,),), (True,), ["alone"]),
    ],
)
def test_roles_are_read_off_the_graph(soft: Any, trained: tuple[bool, ...], said: list[str]) -> None:
    names = ("a", "b")[: len(trained)]
    graph = DistillationGraph(names=names, hard=tuple(map(float, trained)), soft=soft, trained=trained)
    assert [role(graph, name) for name in names] == said


# --- grids, with numbers made by hand ------------------------------------------------------------------

NOISE = {"0.1": (0.0, 0.02, -0.01), "0.4": (0.1, 0.12, 0.11), "0.8": (0.3, 0.33, 0.31)}  # teacher's harm, three seeds


def _grid() -> Results:
    """Nine weightings, of which one helps for certain, and three strengths of label noise, of which two harm."""
    base = {1: 5.0, 2: 5.1, 3: 4.9}
    values: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {"alone": ("alone", {}, (0.0, 0.0, 0.0))}
    for teacher in (0, 1, 4):
        for student in (0, 1, 4):
            gain = (-0.5, -0.51, -0.49) if (teacher, student) == (1, 4) else (0.2, -0.1, -0.2)
            at = {"teacher_soft": teacher, "student_soft": student}
            values[f"weights/{teacher}-{student}"] = ("weights", at, gain)
    values |= {f"label_noise/{noise}": ("label_noise", {"noise": float(noise)}, d) for noise, d in NOISE.items()}
    measured = {
        name: spread({seed: base[seed] + more for seed, more in zip(SEEDS, by, strict=True)})
        for name, (_, _, by) in values.items()
    }
    conditions = {
        name: Condition(group=group, coordinates=at, cells=[], peers={"teacher": {"valid_loss": measured[name]}})
        for name, (group, at, _) in values.items()
    }
    comparisons = [
        compare(name, "teacher", "alone", "teacher", "valid_loss", measured[name], measured["alone"])
        for name in values
        if name != "alone"
    ]
    return Results(
        experiment="grid", question="How much?", size="full", recipe="r.yaml", corpus="c", command=[], seeds=[1, 2, 3],
        cells=[], conditions=conditions, comparisons=comparisons,
    )  # fmt: skip


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("grids")
    study = Study(_grid(), place, {}, True)
    return {p.title: p for p in grid_pictures(study, Curves(study, place).looks, place, "valid_loss")}


def test_each_grid_has_its_picture(grids: dict[str, Any]) -> None:
    assert list(grids) == [
        "teacher: weights against alone",
        "teacher: label noise",
        "teacher: label noise against alone",
    ]


def test_a_heat_map_has_every_cell_and_stars_what_is_certain(grids: dict[str, Any]) -> None:
    svg = grids["teacher: weights against alone"].svg
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert texts.count("−0.033") == 8 and texts.count("−0.500*") == 1
    assert {"teacher soft", "student soft"} <= set(texts)


def test_the_threshold_of_harm_is_said(grids: dict[str, Any]) -> None:
    caption = grids["teacher: label noise against alone"].caption
    assert "Worse than that with noise = 0.4, 0.8." in caption


def test_many_comparisons_are_counted_on_the_first_screen(tmp_path: Path) -> None:
    (said,) = statements(Study(_grid(), tmp_path, {}, True))
    assert "better in 1, worse in 2, no evidence of a difference in 9" in said.text
    assert said.detail.startswith(
        "Furthest ahead: weights (teacher soft 1, student soft 4). Better: mean difference −0.500"
    )


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    picture = draw(tmp_path, "odd", "odd", 'a "quoted" <caption>', lambda axes: axes.set_title("$x_1 & <y>") and None)
    ElementTree.fromstring(picture.svg.replace("xlink:", ""))
    assert "$x_1 &amp; &lt;y&gt;" in picture.svg


def test_a_png_stands_alone_with_its_title_and_the_page_says_it_once(tmp_path: Path) -> None:
    short, long = "Held-out loss", "Held-out loss of the teacher, alone against together, at every step that has one"
    pictures = [draw(tmp_path, slug(title), title, "", lambda axes: None) for title in (short, long)]
    heights = [Image.open(tmp_path / f"{slug(title)}.png").height for title in (short, long)]
    assert HEIGHT * 200 < heights[0] < heights[1], "room for each line of the title is added, not taken"
    for picture in pictures:
        size, drawing = re.findall(r'viewBox="0 0 \S+ (\S+)"', picture.svg), picture.svg.split(">", 1)[1]
        assert [float(height) for height in size] == pytest.approx([HEIGHT * 72]) and "Held-out" not in drawing


# --- in a browser --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (make test-report installs Debian's)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def opened(browser: Any, page: Path, **context: Any) -> tuple[Any, list[str]]:
    """The page in a fresh window, and what went wrong or was asked of a network."""
    tab = browser.new_context(**context).new_page()
    trouble: list[str] = []
    tab.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    tab.on("console", lambda said: trouble.append(f"console: {said.text}"))
    tab.on("request", lambda r: trouble.append(f"request: {r.url}") if r.url != page.as_uri() else None)
    tab.goto(page.as_uri())
    return tab, [entry for entry in trouble if not entry.startswith("request: data:")]


def shot(tab: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert("RGB"))


@pytest.mark.browser
def test_it_opens_without_errors_and_without_a_network(browser: Any, page: Path) -> None:
    tab, trouble = opened(browser, page)
    assert trouble == []
    assert "report" in tab.title() and tab.locator("figure svg").count() >= 9


@pytest.mark.browser
def test_pictures_are_drawn_in_their_colours(browser: Any, page: Path) -> None:
    tab, _ = opened(browser, page)
    figure = tab.locator("#learning-student-by-step svg")
    pixels = np.asarray(Image.open(io.BytesIO(figure.screenshot())).convert("RGB")).reshape(-1, 3).astype(int)
    for colour in ((0, 0x72, 0xB2), (0x00, 0x9E, 0x73)):  # together's and the student's own
        assert (np.abs(pixels - colour).sum(axis=1) < 12).sum() > 50, f"no line in {colour}"


@pytest.mark.browser
def test_a_table_sorts_on_a_click_and_back_on_the_next(browser: Any, page: Path) -> None:
    tab, _ = opened(browser, page)
    table = tab.locator("#table-results")
    heads = table.locator("th").all_inner_texts()
    column = next(n for n, text in enumerate(heads) if "held-out loss" in text)
    cells = table.locator(f"tbody td:nth-child({column + 1})")

    def shown() -> list[float]:
        return [float(value.split()[0]) for value in cells.all_inner_texts()]

    head = table.locator("th").nth(column)
    head.locator("button").click()
    assert shown() == sorted(shown()) and head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    assert shown() == sorted(shown(), reverse=True) and len(set(shown())) > 1
    table.locator("th button").first.click()
    names = table.locator("tbody tr > :first-child").all_inner_texts()
    assert names == sorted(names) and len(set(names)) > 1 and head.get_attribute("aria-sort") is None


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, *(pytest.param(width, marks=pytest.mark.nightly) for width in (390, 768))])
def test_no_screen_scrolls_sideways(browser: Any, page: Path, width: int) -> None:
    tab, _ = opened(browser, page, viewport={"width": width, "height": 800})
    tab.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("figure svg").first.bounding_box()["width"] > 0.8 * min(width, 640) - 60


@pytest.mark.browser
def test_a_phone_shows_the_first_number_of_every_row(browser: Any, page: Path) -> None:
    tab, _ = opened(browser, page, viewport={"width": 390, "height": 800})
    for table in tab.locator("table").all():
        first = table.locator("tbody tr td.n:not(.n ~ .n)")
        boxes = [cell.bounding_box() for cell in first.all()]
        assert boxes and all(box["x"] + box["width"] <= 390 for box in boxes), table.get_attribute("id")


@pytest.mark.browser
def test_a_table_that_goes_on_beyond_the_screen_shows_it_at_that_edge(browser: Any, tmp_path: Path) -> None:
    style = (ROOT / "ctcd_ds" / "experiments" / "report" / "page" / "report.css").read_text()
    row = f"<tr>{'<td style=min-width:9rem>&nbsp;</td>' * 6}</tr>"
    table = f'<main><div class="scrolls"><table>{row * 3}</table></div></main>'
    (tmp_path / "table.html").write_text(f"<meta charset=utf-8><style>{style}</style>{table}")
    tab, _ = opened(browser, tmp_path / "table.html", viewport={"width": 390, "height": 300})
    box = tab.locator(".scrolls")

    def edges() -> list[bool]:
        """Whether the left and the right edge are darker than the paper."""
        pixels = np.asarray(Image.open(io.BytesIO(box.screenshot())).convert("L")).astype(int)[10]
        return [bool(pixels[at] < 230) for at in (1, -2)]

    shown = []
    for place in (0, 150, 10_000):
        box.evaluate(f"box => box.scrollLeft = {place}")
        shown.append(edges())
    assert shown == [[False, True], [True, True], [True, False]]


@pytest.mark.browser
def test_the_dark_page_is_dark_with_readable_text(browser: Any, page: Path) -> None:
    tab, _ = opened(browser, page, color_scheme="dark")
    assert np.median(shot(tab)) < 60
    ink, paper = (tab.evaluate(f"getComputedStyle(document.body).{key}") for key in ("color", "backgroundColor"))
    assert contrast(ink, paper) > 7
    label = tab.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert contrast(label, paper) > 7, "text in pictures too"


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio of two colours as the browser states them."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.browser
def test_paper_is_white_with_all_folds_open(browser: Any, page: Path) -> None:
    tab, _ = opened(browser, page, color_scheme="dark")
    tab.emulate_media(media="print")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.locator("details:not([open])").count() == 0 and not tab.locator("nav").is_visible()
    assert tab.pdf(format="A4").startswith(b"%PDF")
