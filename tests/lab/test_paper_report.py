"""The page of the paper's reproduction: complete, honest about what is missing, quick or wrong, and
a page that stands alone."""

from __future__ import annotations

import html
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from spectral_window.commands import report as command
from spectral_window.errors import UserError
from spectral_window.lab.estimates import Estimate
from spectral_window.lab.experiments import ablate, lm, synthetic
from spectral_window.lab.paper import claims, figures
from spectral_window.lab.paper import page as paper_page
from tests.lab.test_report import Outline, make_run, open_in_browser

HERE = {"environment": {"processor": "a <fast> one", "threads": 1, "date": "2026-01-01 00:00 UTC"}}


def hits(model: str, training: str, task: str, times: float) -> float:
    """Some share of right answers: these rows are input of the tests and no result."""
    best = {"published-associative": 0.85, "published-induction": 0.80, "published-sorting": 0.96}
    if task in best and times == 1:
        return best[task]
    start = {"SWH": 0.97, "Transformer": 0.98}.get(model, 0.5)
    slope = {"SWH": -0.45, "Transformer": -0.9}.get(model, -1.0)
    return max(0.04, start * max(1.0, times / (4 if training == "mixed" else 1)) ** slope)


def synthetic_rows() -> list[dict[str, Any]]:
    rows = []
    for trial in synthetic.trials():
        probe, base = trial.run, trial.run.lengths[0]
        model, training = trial.labels["model"], trial.labels["training"]
        tests = []
        for test in probe.tests:
            share = hits(model, training, test.task, test.length / base)
            right = round(test.rows * min(1.0, share + 0.01 * probe.seed))
            tests.append(
                {"task": test.task, "length": test.length, "right": right, "asked": test.rows}
            )
        rows.append(
            trial.labels | {"tests": tests,
             "probe": {"task": probe.task, "seed": probe.seed}, "parameters": 450_000,
             "batch_right": 54, "batch_asked": 64, **HERE}
        )  # fmt: skip
    return rows


def language_rows() -> list[dict[str, Any]]:
    ends = {"SWH": 3.4, "Transformer": 3.5, "window only": 3.6, "spectral only": 4.1}
    size = lm.SIZES["small"]
    stages = [("sweep", model, 0, rate, width) for model in ends for rate, width in size.swept]
    stages += [("branches", model, 0, 4e-3, 0.05) for model in lm.BRANCHES]
    stages += [("main", model, seed, 4e-3, 0.05) for model in lm.BOTH for seed in (0, 1)]
    stages += [("published", model, 0, 6e-4, 0.02) for model in lm.BOTH]
    rows = []
    for part, model, seed, lr, width in stages:
        loss = ends[model] + 0.01 * seed + 0.1 * abs(math.log2(lr / 4e-3))
        loss += 0.8 * (part == "sweep") + 0.2 * (width == 0.02)
        curve = [[k * 2e5, loss + 4 * math.exp(-k / 12)] for k in range(1, 101)]
        rows.append(
            {"part": part, "variant": model, "seed": seed, "lr": lr,
             "initializer_range": width, "eval_loss": loss,
             "train_loss": loss - 0.1, "parameters": 3_100_000, "tokens": 20_000_000,
             "train_curve": curve, "eval_curve": curve[3::4], "bits_per_byte": loss / 2.5,
             "tokens_per_second": 5000.0, "wall_seconds": 4000.0, "peak_memory_bytes": 2**30,
             **HERE}
        )  # fmt: skip
    return rows


def efficiency_rows() -> list[dict[str, Any]]:
    rows = []
    for form, power in (("published", 1.8), ("posed", 1.3)):
        for length in (512, 1024, 2048, 4096):
            for name, slope in (("transformer", power), ("swh", 1.0)):
                spent = 100 * (length / 512) ** slope
                ratio = spent / (100 * (length / 512) ** power)
                rows.append(
                    {"form": form, "contestant": name, "length": length, "layers": 12,
                     "status": "ok", "milliseconds": spent, "p10": spent * 0.9, "p90": spent * 1.1,
                     "ratio": ratio, "ratio_p10": ratio * 0.9, "ratio_p90": ratio * 1.1,
                     "parameters": 163_000_000, "peak_bytes": 1e9 * (length / 512) ** (slope - 0.5)}
                )  # fmt: skip
    return rows


def ablation_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for k, overrides in enumerate(ablate.unique(ablate.GROUPS)):
        for trial in ablate.probes_of(overrides):
            tests = [
                {"task": t.task, "length": t.length, "asked": t.rows,
                 "right": round(t.rows * max(0.06, 0.9 - 0.02 * k - 0.1 * (t.length / 64 - 1)))}
                for t in trial.run.tests
            ]  # fmt: skip
            rows.append(trial.labels | {"tests": tests, "parameters": 150_000})
        for trial in ablate.trainings_of(overrides):
            loss = 4.9 + 0.02 * k + 0.005 * trial.labels["seed"]
            rows.append(trial.labels | {"eval_loss": loss, "parameters": 1_500_000})
    return rows


def suite(folder: Path, name: str, rows: list[Any], *, quick: bool = False, **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"suite": name, "quick": quick, "command": f"spectral-window reproduce {name} <x>"}
    (folder / f"{name}.json").write_text(json.dumps({**content, **more, "rows": rows}))


def ceilings() -> list[dict[str, Any]]:
    best = {"published-associative": {32: 0.864, 128: 0.574}, "published-induction": {32: 0.817},
            "published-sorting": {32: 0.978}, "published-needle": {256: 0.276}}  # fmt: skip
    tests = {(t.task, t.length) for trial in synthetic.trials() for t in trial.run.tests}
    return [
        {"task": task, "length": length, "ceiling": best.get(task, {}).get(length, 1.0)}
        for task, length in tests
    ]


def fill(folder: Path) -> Path:
    """Every suite, complete."""
    suite(folder, "synthetic", synthetic_rows(), ceilings=ceilings())
    suite(folder, "lm-small", language_rows())
    suite(folder, "efficiency", efficiency_rows(), **HERE)
    suite(folder, "ablate", ablation_rows())
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fill(tmp_path_factory.mktemp("full"))
    return paper_page.write(folder, folder / "report.html")


@pytest.fixture(scope="module")
def poor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of everything that can be amiss: a quick suite, an absent one, rows that cannot be true,
    rows that were not run, markup where a name should be."""
    folder = tmp_path_factory.mktemp("poor")
    suite(folder, "synthetic", synthetic_rows(), quick=True, ceilings=ceilings())
    rows: list[Any] = [row for row in language_rows() if row["part"] != "branches"]
    rows[0]["variant"] = "<script>alert('x')</script>"
    rows.append(rows[-1] | {"seed": 7, "eval_loss": math.nan})
    rows += [rows[1] | {"train_curve": [[1, None]]}, ["no row"]]
    suite(folder, "lm-small", rows, failed=["main/swh <seed1>"])
    slow = [row for row in efficiency_rows() if row["length"] != 2048]
    slow[0] = {key: slow[0][key] for key in ("form", "contestant", "length", "layers")}
    slow[0]["status"] = "does not fit: needs 900 GB"
    suite(folder, "efficiency", slow)
    return paper_page.write(folder, folder / "page" / "report.html")


def section(page: Path, title: str) -> str:
    """The source of the section with this heading."""
    parts = page.read_text().split("<section")
    return next(part for part in parts if f">{title}</h2>" in part)


def line(source: str, *names: str) -> list[str]:
    """The texts of the first table line that holds all `names`, without the smaller notes."""
    for row in re.findall(r"<tr>(.*?)</tr>", source, flags=re.S):
        cells = re.findall(r"<t[hd][^>]*>([^<]*)", row)
        if set(names) <= set(cells):
            return cells
    raise AssertionError(f"no line with {names}")


def test_the_headline_counts_the_verdicts_of_the_table(full: Path) -> None:
    judged = claims.evaluate(claims.read(full.parent))
    counts = Counter(claim.verdict for claim in judged)
    assert counts[claims.HOLDS] > 1
    source = full.read_text()
    heading = re.findall(r"<h1>(.*?)</h1>", source)[0]
    assert heading.startswith(f"{counts[claims.HOLDS]} of {len(judged)} claims hold")
    chips = re.findall(r'<span class="chip [^"]*">(.*?)</span>', source)
    assert chips == [claim.verdict for claim in judged]


def test_printed_values_stand_beside_ours_and_the_ceiling(full: Path) -> None:
    tasks = section(full, "The diagnostic tasks, as published")
    assert line(tasks, "Sorting", "Transformer")[2:6] == ["0.97", "0.84", "0.97", "0.978"]
    assert line(tasks, "Needle, 8 times", "SWH")[2:4] == ["0.05", "not taken so"]
    assert "The scores printed for SWH at T = 32 are the ceilings" in tasks


def test_wide_intervals_make_no_two_models_alike() -> None:
    first = Estimate(0.67, 0.0, 1.0, 3)
    assert claims._matches(first, Estimate(0.70, 0.6, 0.8, 3))
    assert not claims._matches(first, Estimate(0.99, 0.94, 1.0, 3))


def test_who_is_above_matches_however_far() -> None:
    ahead, behind = Estimate(0.9, 0.85, 0.95, 3), Estimate(0.5, 0.4, 0.6, 3)
    assert claims._matches(ahead, behind)
    assert not claims._matches(behind, ahead)


def test_the_finding_about_ceilings_is_not_said_where_they_differ(tmp_path: Path) -> None:
    low = [one | {"ceiling": 0.5} for one in ceilings()]
    suite(tmp_path, "synthetic", synthetic_rows(), ceilings=low)
    panel = figures.published_panel(paper_page.read(tmp_path).suites)
    assert panel.title == "As published: scores beside their ceilings"


def test_a_suite_that_is_absent_says_missing_and_how_to_make_it(poor: Path) -> None:
    source = section(poor, "Ablations: one part of the layer changed")
    assert "missing: <code>spectral-window ablate" in source
    assert "<svg" not in source
    assert set(line(source, "gated", "fusion")[2:]) == {"missing"}


def test_a_row_that_was_not_run_is_a_line_that_says_missing(poor: Path) -> None:
    source = section(poor, "Language modelling, at CPU size")
    assert line(source, "window only", "branches")[2:7] == ["missing"] * 5
    times = section(poor, "Time and memory against length")
    assert line(times, "SWH", "well-posed", "2,048")[3:] == ["missing"] * 5
    assert "does not fit: needs 900 GB" in line(times, "Transformer", "as published", "512")


def test_a_quick_suite_is_marked_and_decides_no_claim(poor: Path) -> None:
    source = poor.read_text()
    assert source.split("</header>")[0].count(paper_page.QUICK_NOTE) == 1
    for title in ("The diagnostic tasks, as published", "The same abilities, well-posed"):
        assert paper_page.QUICK_NOTE in section(poor, title)
    verdicts = dict(re.findall(r'<tr><th scope="row">([^<]*)</th><td><span[^>]*>(.*?)</', source))
    assert (
        verdicts["Associative recall: above"]
        == verdicts["Needle in a haystack, 8 times"]
        == "quick"
    )
    assert verdicts["Language modelling"] == claims.HOLDS
    assert "7 have quick numbers only" in source.split("</h1>")[0]


def test_rows_that_cannot_be_true_are_named_and_left_out(poor: Path) -> None:
    reading = paper_page.read(poor.parent.parent)
    assert reading.faults["lm-small"] == [
        "published, Transformer, seed 7, lr 0.0006: eval_loss is nan",
        f"sweep, SWH, seed 0, lr {lm.SIZES['small'].rates[1]:g}: train_curve is [[1, None]]",
        "a row: not an object",
    ]
    source = section(poor, "Language modelling, at CPU size")
    assert all(fault in html.unescape(source) for fault in reading.faults["lm-small"])
    assert "nan" not in re.sub(r"<li>.*?</li>", "", source)
    assert "<li>main/swh &lt;seed1&gt;</li>" in source


@pytest.mark.parametrize(
    ("name", "rows", "change", "said"),
    [
        ("synthetic", synthetic_rows, {"tests": [{"task": "recall", "length": 32, "right": 9,
                                                  "asked": 8}]}, "tests is"),
        ("synthetic", synthetic_rows, {"batch_right": None}, "batch_right is null"),
        ("efficiency", efficiency_rows, {"milliseconds": -1.0}, "milliseconds is -1.0"),
        ("efficiency", efficiency_rows, {"contestant": []}, "contestant is []"),
        ("ablate", ablation_rows, {"tests": None}, "tests is null"),
    ],
)  # fmt: skip
def test_a_wrong_value_in_any_suite_is_a_fault_of_its_row_alone(
    tmp_path: Path, name: str, rows: Any, change: dict[str, Any], said: str
) -> None:
    good = rows()
    suite(tmp_path, name, [*good, good[0] | change])
    reading = paper_page.read(tmp_path)
    assert [said in fault for fault in reading.faults[name]] == [True]
    assert (reading.suites[name] or {})["rows"] == json.loads(json.dumps(good))
    assert len(reading.claims()) == 13


def test_text_from_results_is_escaped(poor: Path) -> None:
    source = poor.read_text()
    assert "<script>alert" not in source
    assert "&lt;script&gt;alert" in source
    assert "a &lt;fast&gt; one" in source


def test_the_page_asks_the_network_for_nothing_and_is_well_formed(full: Path, poor: Path) -> None:
    for page in (full, poor):
        source = page.read_text()
        seen = Outline(source)
        assert seen.open == []
        assert len(seen.ids) == len(set(seen.ids))
        assert all(link.startswith(("#", "data:")) for link in seen.links)
        assert not re.search(r"@import|url\((?!#)", source)
        assert "default-src 'none'" in source


def test_figures_take_the_themes_colours_and_describe_themselves(full: Path) -> None:
    svgs = re.findall(r"<svg.*?</svg>", full.read_text(), flags=re.S)
    assert len(svgs) == 1 + 5 + 4 + 4 + 8
    for svg in svgs:
        assert re.search(r"<desc [^>]*>\w", svg)
        without = re.sub(r"var\([^)]*\)", "", svg)
        assert set(re.findall(r"#[0-9a-f]{6}", without)) <= {"#000000"}  # of clip paths


def test_each_suite_leaves_a_picture_beside_the_page(full: Path, poor: Path) -> None:
    for page in (full, poor):
        for name in ("synthetic", "lm", "ablate"):
            assert (page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_results_of_both_sizes_are_both_shown(tmp_path: Path) -> None:
    for name in ("lm-small", "lm-125m"):
        suite(tmp_path, name, language_rows())
    source = paper_page.write(tmp_path, tmp_path / "report.html").read_text()
    assert "Language modelling, at the paper&#39;s size" in source
    assert "Language modelling, at CPU size" in source
    assert Outline(source).open == []


def test_the_command_writes_the_page_and_prints_the_claims(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite(tmp_path, "efficiency", efficiency_rows(), **HERE)
    command.run(folders=[tmp_path], out=tmp_path / "out" / "page.html")
    shown = capsys.readouterr().out
    assert "2 of 13 claims hold" in shown
    assert "Constant memory" in shown
    assert str(tmp_path / "out" / "page.html") in shown.replace("\n", "")
    assert "9 are missing" in (tmp_path / "out" / "page.html").read_text()


def test_the_command_reports_runs_where_it_is_given_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", "attention", 4.5)]
    command.run(folders=runs, out=None)
    assert "report of 2 runs" in (tmp_path / "report.html").read_text()


def test_the_command_refuses_what_it_cannot_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    for folders, said in (
        ([tmp_path / "none"], "no such folder"),
        ([tmp_path], "holds neither a run"),
        ([run, tmp_path], "not a run folder"),
    ):
        with pytest.raises(UserError, match=said):
            command.run(folders=folders, out=None)
    assert not (tmp_path / "report.html").exists()


PROBE = """
document.querySelectorAll("details").forEach((one) => { one.open = true; });
const table = document.querySelector("#efficiency-rows");
const button = table.tHead.rows[0].cells[4].querySelector("button");
button.focus();
const focused = document.activeElement === button;
const column = () => [...table.tBodies[0].rows].map((row) => row.cells[4].dataset.sort ?? "");
const state = () => [button.parentElement.getAttribute("aria-sort"), column()];
button.click();
const up = state();
button.click();
const down = state();
const root = document.documentElement;
const box = document.querySelector("#ablations").parentElement;
parent.document.title = JSON.stringify({
  width: innerWidth, over: root.scrollWidth - root.clientWidth, focused, up, down,
  scrolls: box.scrollWidth > box.clientWidth,
});
"""


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_overflow_or_errors_and_sorts(
    full: Path, tmp_path: Path, width: int
) -> None:
    seen = open_in_browser(full, tmp_path, width, PROBE)
    assert seen["width"] == width
    assert seen["over"] == 0
    assert seen["scrolls"]
    assert seen["focused"]
    for (order, texts), way in ((seen["up"], "ascending"), (seen["down"], "descending")):
        assert order == way
        values = [float(text) for text in texts if text]
        assert len(set(values)) >= 10
        assert values == sorted(values, reverse=way == "descending")
        assert set(texts[: len(values)]).isdisjoint([""])  # what is missing stays below
        assert len(values) < len(texts)
