"""The report: honest about what is missing, whichever model wins, and a page that stands alone."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectral_window.hf import SWHConfig, SWHForCausalLM
from spectral_window.lab import figures, report, summary
from spectral_window.lab.runs import read, read_all
from spectral_window.nn.mixers import MIXERS, Mixer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
VOID = {
    "meta",
    "link",
    "br",
    "use",
    "path",
    "rect",
    "line",
    "circle",
    "polygon",
    "img",
    "hr",
    "col",
}


def make_run(
    folder: Path,
    mixer: str = "spectral_window",
    loss: float = 4.0,
    *,
    data: str = "x",
    **result: object,
) -> Path:
    """A small finished run in the format that training writes, with a real (untrained) model."""
    config = SWHConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        window=4,
        mixer=mixer,
    )
    SWHForCausalLM(config).save_pretrained(folder / "model")
    rows = []
    for step in range(1, 41):
        at = {"step": step, "tokens": step * 1000, "seconds": step * 0.5}
        rows.append(at | {"loss": loss + 3 * math.exp(-step / 8)})
        if step % 10 == 0:
            rows.append(at | {"eval_loss": loss + 3 * math.exp(-step / 8), "bits_per_byte": 2.0})
    final = {
        "eval_loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 2,
        "parameters": 10_000, "tokens": 40_000, "tokens_per_second": 2000.0,
        "peak_memory_bytes": 2**28, "wall_seconds": 20.0,
        "environment": {"python": "3.11", "cpu": "a <fast> one"},
    } | result  # fmt: skip
    (folder / "config.json").write_text(
        json.dumps(
            {
                "recipe": {"seed": 0},
                "data": {"fingerprint": data},
                "model": {"mixer": mixer},
                "command": f"train tiny mixer={mixer}",
            }
        )
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "result.json").write_text(json.dumps(final))
    sample = {
        "prompt": "def f(",
        "text": "<script>alert('x')</script> & more\n",
        "settings": "seed 0",
    }
    (folder / "samples.json").write_text(json.dumps([sample]))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [make_run(root / "swh", loss=4.0), make_run(root / "transformer", "attention", 4.25)]


@pytest.fixture(scope="module")
def page(pair: list[Path]) -> Path:
    return report.write(pair, pair[0].parent / "report.html")


class Outline(HTMLParser):
    """Ids, unclosed tags, links and the text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("src", "href", "xlink:href", "srcset", "action"):
                self.links.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_verdict_gives_winner_margin_and_common_size(pair: list[Path]) -> None:
    verdict = summary.compare(read_all(pair))
    assert verdict.headline == "SWH predicts unseen text better, by 0.250 nats per token"
    assert "4.000 against 4.250" in verdict.detail
    assert "at 10k parameters each" in verdict.detail
    assert "the same 40k training tokens" in verdict.detail


def test_verdict_says_so_when_the_transformer_wins(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", loss=4.1), make_run(tmp_path / "b", "attention", 4.0)]
    assert summary.compare(read_all(runs)).headline.startswith(
        "Transformer predicts unseen text better"
    )
    assert summary.compare(read_all(runs[::-1])).headline.startswith("Transformer predicts")


def test_verdict_calls_a_small_difference_a_tie(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", loss=4.001), make_run(tmp_path / "b", "attention", 4.0)]
    assert "equally well" in summary.compare(read_all(runs)).headline


def test_verdict_does_not_hide_an_unfair_comparison(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", loss=3.0, parameters=20_000, tokens=80_000),
        make_run(tmp_path / "b", "attention", 4.0, data="y"),
    ]
    verdict = summary.compare(read_all(runs))
    assert "unequal size (20k and 10k parameters)" in verdict.detail
    assert any("different amounts of text" in caveat for caveat in verdict.caveats)
    assert any("different data" in caveat for caveat in verdict.caveats)


def test_a_missing_run_says_missing_and_nothing_is_invented(
    pair: list[Path], tmp_path: Path
) -> None:
    out = report.write([pair[0], tmp_path / "transformer"], tmp_path / "report.html")
    seen = Outline(out.read_text())
    assert "transformer: held-out loss missing." in seen.text
    cells = re.findall(r'<td class="[^"]*">([^<]*)', out.read_text().split("</table>")[0])
    assert cells[1::2] == ["missing"] * (len(cells) // 2)
    assert "missing: config.json, result.json, metrics.jsonl, samples.json, model" in seen.text
    assert "better" not in seen.text.split("Side by side")[0]


def test_no_run_at_all_still_gives_a_page(tmp_path: Path) -> None:
    out = report.write([tmp_path / "a", tmp_path / "b"], tmp_path / "r" / "report.html")
    assert "Held-out loss: missing" in out.read_text()
    report.summary_figure([tmp_path / "a"], tmp_path / "report.png")
    report.training_figure(tmp_path / "a", tmp_path / "training.png")


def test_damaged_files_count_as_missing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "swh")
    (folder / "result.json").write_text('{"eval_loss": 4.0')
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "tokens": 41000, "sec')  # killed while writing
    (folder / "model" / "model.safetensors").write_bytes(b"\xff" * 100)
    run = read(folder)
    assert run.missing == ("result.json (unreadable)",)
    assert len(run.train()) == 40
    assert summary.oscillators(run) == ([], [])
    assert "missing" in report.write([folder], tmp_path / "report.html").read_text()


def test_timings_within_five_percent_have_no_winner(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", wall_seconds=100.0, tokens_per_second=1000.0),
        make_run(tmp_path / "b", "attention", wall_seconds=104.0, tokens_per_second=500.0),
    ]
    source = report.write(runs, tmp_path / "report.html").read_text()
    rows = dict(re.findall(r'<th scope="row">([\w -]+) <span.*?</th>(.*?)</tr>', source))
    assert "better" not in rows["Wall time"]
    assert rows["Training speed"].index("better") < rows["Training speed"].index("500")


def test_numbers_that_are_not_finite_are_missing(tmp_path: Path) -> None:
    run = read(make_run(tmp_path / "swh", loss=math.nan))
    assert summary.held_out_loss(run) is None
    assert len(run.evaluations()) == 0


def test_state_bytes_are_the_models_own_and_constant_for_swh_only(pair: list[Path]) -> None:
    swh, transformer = (summary.state_bytes(run) for run in read_all(pair))
    model = SWHForCausalLM.from_pretrained(pair[0] / "model")
    assert dict(swh)[1024] == model.state_bytes(1024)
    assert len({size for _, size in swh}) == 1
    context, size = transformer[-1]
    assert context == 1_048_576
    assert size / transformer[0][1] == pytest.approx(context / transformer[0][0], rel=0.01)


def test_oscillators_are_read_from_the_saved_weights(pair: list[Path]) -> None:
    decays, frequencies = summary.oscillators(read(pair[0]))
    kernel = SWHForCausalLM.from_pretrained(pair[0] / "model").model.layers[1].mixer.kernel
    np.testing.assert_allclose(decays[1], np.abs(kernel.decay.detach().numpy().ravel()))
    np.testing.assert_allclose(frequencies[1], kernel.frequency.detach().numpy().ravel())
    assert summary.oscillators(read(pair[1])) == ([], [])


def test_page_asks_the_network_for_nothing_and_is_well_formed(page: Path) -> None:
    source = page.read_text()
    seen = Outline(source)
    assert seen.open == []
    assert len(seen.ids) == len(set(seen.ids))
    assert all(link.startswith(("#", "data:")) for link in seen.links)
    assert not re.search(r"@import|url\((?!#)", source)
    assert "default-src 'none'" in source


def test_text_from_runs_is_escaped(page: Path) -> None:
    source = page.read_text()
    assert "<script>alert" not in source
    assert "&lt;script&gt;alert" in source
    assert "a &lt;fast&gt; one" in source


def test_a_run_folder_name_cannot_break_a_figure(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("$\\frac{<b>", "x & y")]
    seen = Outline(report.write(folders, tmp_path / "report.html").read_text())
    assert "SWH ($\\frac{<b>)" in seen.text
    assert seen.open == []


def test_figures_have_names_and_take_the_themes_colours(page: Path) -> None:
    svgs = re.findall(r"<svg.*?</svg>", page.read_text(), flags=re.S)
    assert len(svgs) == 5
    for svg in svgs:
        assert re.search(r"<title [^>]*>\w", svg)
        assert re.search(r"<desc [^>]*>\w", svg)
        without = re.sub(r"var\([^)]*\)", "", svg)
        assert set(re.findall(r"#[0-9a-f]{6}", without)) <= {
            "#000000"
        }  # only the default of clip paths


def test_svg_is_the_same_for_the_same_data() -> None:
    def svg() -> str:
        return figures.to_svg(figures.draw(figures.write_missing), "x", "t", "d")

    assert svg() == svg()


def test_training_figure_marks_resumes_and_ends_in_bits_per_byte(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "swh")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "tokens": 20000, "seconds": 10.2, "event": "resume"}\n')
    png = report.training_figure(folder, tmp_path / "fig" / "training.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert read(folder).resumes() == [20_000]
    assert "<svg" in png.with_suffix(".svg").read_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1024, "1 KiB"),
        (401_408, "392 KiB"),
        (1_054_326_784, "1005 MiB"),
        (1023.9 * 1024, "1 MiB"),
        (5 * 2**30, "5 GiB"),
    ],
)
def test_sizes_are_short_and_binary(value: float, text: str) -> None:
    assert figures.size(value).replace("\N{NO-BREAK SPACE}", " ") == text


def test_smoothing_keeps_a_straight_line_straight() -> None:
    line = np.linspace(3.0, 1.0, 200)
    np.testing.assert_allclose(figures.smooth(line), line)


PROBE = """
const heads = [...document.querySelectorAll("table[data-sortable] th button")];
document.querySelector("details").open = true;
heads[3].click();
const rows = [...document.querySelectorAll("table[data-sortable] tbody tr")];
const losses = rows.map((row) => Number(row.cells[3].textContent));
const root = document.documentElement;
const over = root.scrollWidth - root.clientWidth;
parent.document.title = JSON.stringify({width: innerWidth, over, losses});
"""


def open_in_browser(page: Path, scratch: Path, width: int, probe: str) -> Any:
    """What the script `probe` found in the page, `width` pixels wide, in headless Chromium: it puts
    JSON into the title of `parent.document`. Skips where there is no browser."""
    if CHROMIUM is None:
        pytest.skip("no chromium (Debian package chromium) to open it in")
    # In a frame, because a headless window is never narrower than 500 pixels.
    source = page.read_text().replace("</body>", f"<script>{probe}</script></body>")
    inner = html.escape(source, quote=True)
    frame = scratch / "frame.html"
    frame.write_text(
        f'<title>none</title><iframe srcdoc="{inner}" width="{width}" height="800" frameborder="0">'
    )
    flags = (
        "headless no-sandbox disable-gpu no-first-run disable-extensions disable-sync dump-dom "
        "disable-background-networking disable-component-update enable-logging=stderr"
    )
    done = subprocess.run(
        [
            str(CHROMIUM),
            *(f"--{flag}" for flag in flags.split()),
            f"--user-data-dir={scratch / 'profile'}",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"HOME": str(scratch)},
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    return json.loads(html.unescape(title[1]))


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_overflow_or_errors_and_sorts(
    page: Path, tmp_path: Path, width: int
) -> None:
    seen = open_in_browser(page, tmp_path, width, PROBE)
    assert seen["width"] == width
    assert seen["over"] == 0
    assert len(seen["losses"]) == 8
    assert seen["losses"] == sorted(seen["losses"])


def test_a_mixer_says_how_its_models_are_called(tmp_path, monkeypatch):
    class Toy(Mixer):
        label = "A toy"

    class Nameless(Mixer):
        pass

    monkeypatch.setitem(MIXERS, "toy", Toy)
    monkeypatch.setitem(MIXERS, "nameless", Nameless)
    called = {"spectral_window": "SWH", "attention": "Transformer", "memory": "SWH with memory"}
    called |= {"toy": "A toy", "nameless": "run", "unknown": "run", "": "run"}
    for mixer, label in called.items():
        folder = tmp_path / f"of {mixer}" / "run"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model": {"mixer": mixer}}))
        assert read(folder).label == label


@pytest.mark.parametrize("lost", ["prompt", "text", "settings"])
def test_what_a_sample_lacks_is_empty(lost, tmp_path):
    folder = make_run(tmp_path / "run")
    sample = {"prompt": "Once", "text": " upon a time", "settings": "seed 0"}
    del sample[lost]
    (folder / "samples.json").write_text(json.dumps([sample, "no sample"]))
    page = report.write([folder], tmp_path / "page.html").read_text(encoding="utf-8")
    for kept in sample.values():
        assert kept in page


def test_half_a_surrogate_pair_in_a_runs_files_is_shown_and_no_bug(tmp_path):
    folder = make_run(tmp_path / "run", environment={"cpu": "half \udc80"})
    page = report.write([folder], tmp_path / "page.html").read_text(encoding="utf-8")
    assert r"half \udc80" in page
