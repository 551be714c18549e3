"""The paper's claims and what was measured, on one page that stands alone.

The page reads the suites that `reproduce` and `ablate` left in a folder and nothing else. What is
not there is "missing"; a row that cannot be true is named and left out of every number; a quick
version decides no claim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spectral_window.files import write_bytes
from spectral_window.lab import results
from spectral_window.lab.experiments import lm
from spectral_window.lab.figures import Panel, sheet, svg
from spectral_window.lab.paper import claims, figures, tables
from spectral_window.lab.paper.claims import FAILS, HOLDS, MISSING, ONLY_PUBLISHED, Claim
from spectral_window.lab.paper.rows import sound
from spectral_window.lab.paper.tables import Table
from spectral_window.lab.report import render

QUICK = "quick"  # stands where a verdict would
QUICK_NOTE = "Quick version: it shows the way, and its numbers mean nothing."
STYLES = {HOLDS: "s2", ONLY_PUBLISHED: "s4", FAILS: "s1", MISSING: "muted", QUICK: "muted"}
ABOUT = {  # the last line of a sheet
    "synthetic": "bars and bands: 95 % intervals over seeds and held-out examples",
    "lm": "loss in nats a token",
    "ablate": "bars: 95 % intervals over seeds; dashed: the paper's layer",
}
COMMANDS = {  # what makes each suite
    "synthetic": "spectral-window reproduce synthetic",
    "lm-small": "spectral-window reproduce lm --data TEXT",
    "lm-125m": "spectral-window reproduce lm --size 125m",
    "lm-quick": "spectral-window reproduce lm --quick",
    "efficiency": "spectral-window reproduce efficiency",
    "ablate": "spectral-window ablate --data TEXT",
}
LANGUAGE = {"lm-125m": "at the paper's size", "lm-small": "at CPU size", "lm-quick": "quick"}


@dataclass(frozen=True)
class Reading:
    """The suites of a folder: what of them can be counted on, and what could not be.

    suites: name -> the suite with its sound rows, or None where it is missing.
    faults: name -> a line for each row left out of the numbers.
    """

    suites: dict[str, dict[str, Any] | None]
    faults: dict[str, list[str]]

    def quick(self, suite: str) -> bool:
        return bool((self.suites.get(suite) or {}).get("quick"))

    def claims(self) -> list[tuple[Claim, str]]:
        """Every claim with the verdict to print: "quick" where only a quick version speaks."""
        real = {name: None if self.quick(name) else suite for name, suite in self.suites.items()}
        return [
            (claim, decided.verdict if claim == decided else QUICK)
            for claim, decided in zip(
                claims.evaluate(self.suites), claims.evaluate(real), strict=True
            )
        ]


@dataclass(frozen=True)
class Section:
    """A suite on the page."""

    suite: str
    title: str
    intro: str
    marks: str  # how to read the figures
    models: Sequence[str]  # that the figures show, in their colours
    panels: Sequence[Panel]
    tables: Sequence[Table]
    grid: str = "pair"  # how the figures stand: side by side, or "trio"
    leads: bool = True  # the first section of its suite, which names the rows left out


def read(folder: Path) -> Reading:
    """The suites in `folder`, with the language models' quick version where there is one."""
    results_of = claims.read(folder) | {"lm-quick": results.load(folder, "lm-quick")}
    suites, faults = {}, {}
    for name, suite in results_of.items():
        suites[name], faults[name] = sound(name, suite)
    return Reading(suites, faults)


def headline(verdicts: Sequence[tuple[Claim, str]]) -> str:
    """'3 of 11 claims hold, 2 hold only as published, 4 do not hold, 2 are missing'."""
    counts = Counter(verdict for _, verdict in verdicts)
    parts = [
        f"{counts[HOLDS]} of {len(verdicts)} claims {'holds' if counts[HOLDS] == 1 else 'hold'}"
    ]
    for verdict, one, many in (
        (ONLY_PUBLISHED, "holds only as published", "hold only as published"),
        (FAILS, "does not hold", "do not hold"),
        (QUICK, "has quick numbers only", "have quick numbers only"),
        (MISSING, "is missing", "are missing"),
    ):
        if counts[verdict]:
            parts.append(f"{counts[verdict]} {one if counts[verdict] == 1 else many}")
    return ", ".join(parts)


def write(folder: Path, out_html: Path) -> Path:
    """Write the page of the suites in `folder` to `out_html`, beside it its figures as PNG and the
    table of claims as claims.md; returns the page's path."""
    reading = read(folder)
    verdicts = reading.claims()
    out_html.parent.mkdir(parents=True, exist_ok=True)
    table = claims.markdown([replace(claim, verdict=verdict) for claim, verdict in verdicts])
    markdown = f"{table}\n".encode(errors="backslashreplace")
    write_bytes(out_html.parent / "claims.md", markdown)
    sections = _sections(reading)
    _sheets(reading, sections, out_html.parent)
    counts = Counter(verdict for _, verdict in verdicts)
    shown = [v for v in STYLES if counts[v] or v in (HOLDS, ONLY_PUBLISHED, FAILS)]
    return render(
        "paper.html.j2",
        out_html,
        title=headline(verdicts),
        counts=[(verdict, STYLES[verdict], counts[verdict]) for verdict in shown],
        quick_note=QUICK_NOTE,
        quick_suites=[name for name in reading.suites if reading.quick(name)],
        claims=[(claim, verdict, STYLES[verdict]) for claim, verdict in verdicts],
        sections=[_content(reading, section) for section in sections],
        made=_made(reading),
    )


def _content(reading: Reading, section: Section) -> dict[str, Any]:
    """What the template needs of a section."""
    suite = reading.suites.get(section.suite)
    return {
        "about": section,
        "inks": [(name, f"s{tables.MODELS.index(name)}") for name in section.models],
        "figures": [(panel, svg(panel)) for panel in section.panels],
        "command": COMMANDS[section.suite],
        "absent": suite is None,
        "quick": reading.quick(section.suite),
        "faults": reading.faults.get(section.suite, []) if section.leads else [],
        "failed": (suite or {}).get("failed", []) if section.leads else [],
    }


def _sheets(reading: Reading, sections: Sequence[Section], folder: Path) -> None:
    """A PNG for each suite; that of efficiency the suite draws itself."""
    panels: dict[str, list[Panel]] = {}
    about = dict(ABOUT)
    for section in sections:
        name = "lm" if section.suite.startswith("lm-") else section.suite
        panels.setdefault(name, []).extend(section.panels)
        if reading.quick(section.suite):
            about[name] = QUICK_NOTE
    for name, columns in (("synthetic", 3), ("lm", 2), ("ablate", 2)):
        sheet(panels[name], columns, about[name], folder / f"{name}.png")


# ------------------------------------------------------------------------------------- the sections


def _sections(reading: Reading) -> list[Section]:
    return [
        *_synthetic(reading),
        *(_language(reading, name) for name in _sizes(reading)),
        _efficiency(reading),
        _ablations(reading),
    ]


def _synthetic(reading: Reading) -> list[Section]:
    suites = reading.suites
    published, *well_posed = tables.synthetic_tables(suites)
    return [
        Section(
            "synthetic",
            "The diagnostic tasks, as published",
            "Five tasks of 32 to 256 tokens. Keys, values and noise share one vocabulary, so the "
            "key that is asked for also occurs by chance, and no solver can know which occurrence "
            "is meant; sorting asks for the largest of 32 tokens, one of which is hidden. The "
            "ceiling is what the best possible solver reaches. A score at the ceiling is perfect: "
            "two models that are there cannot be ranked.",
            "Dots are our models on 4,096 held-out examples, bars 95 % intervals, hollow diamonds "
            "what the paper prints, the upright line the ceiling.",
            lm.BOTH,
            [figures.published_panel(suites)],
            [published],
        ),
        Section(
            "synthetic",
            "The same abilities, well-posed",
            "Keys, values and noise come from disjoint vocabularies and a key occurs once, so each "
            "question has one answer and the ceiling is 1 at any length. Equal parameters, a "
            "window of 8 that is shorter than the sequences, 2,048 held-out examples at each "
            "length. The published tasks train at 32 tokens with a window of 32, so attention sees "
            "everything and the global branch is never needed.",
            "Solid: trained at one length. Dashed: trained at 1 to 8 times that length, so only 16 "
            "and 32 times are new. Bands are 95 % intervals over seeds and examples, the dotted "
            "line is chance.",
            ("SWH", "Transformer", "window only"),
            figures.well_posed_panels(suites),
            well_posed,
            grid="trio",
            leads=False,
        ),
    ]


def _sizes(reading: Reading) -> list[str]:
    """The language-model suites to show: those that are there, else the one anybody can run."""
    return [name for name in LANGUAGE if reading.suites.get(name)] or ["lm-small"]


def _language(reading: Reading, name: str) -> Section:
    suite = reading.suites[name]
    return Section(
        name,
        f"Language modelling, {LANGUAGE[name]}",
        "Which model predicts unseen text better? The paper's curve, which falls from 1.1 to 0.6, "
        "is called validation loss; it is the training loss divided by 8, of models of unequal "
        "size, at one constant learning rate and one width of the initial weights for both. "
        "Well-posed: equal parameters, the same sweep of rates and widths for each, equal tokens, "
        "loss on held-out text. What the sweep prefers early need not be better at the end: a "
        "model that chose another width than SWH is trained at both, and its better end counts.",
        "A line is a seed, the second one paler. In the sweep, a model's strong line is its best "
        "width of the initial weights, the pale ones are the others, a dot alone is a width "
        "beyond them tried at one rate, and a ring marks the best rate.",
        tuple(lm.VARIANTS),
        figures.language_panels(suite, name),
        tables.language_tables(suite, name),
    )


def _efficiency(reading: Reading) -> Section:
    suite = reading.suites["efficiency"]
    return Section(
        "efficiency",
        "Time and memory against length",
        "One forward pass of one sequence. In the paper the Transformer keeps all T x T scores and "
        "every layer's mixer is evaluated twice; memory is a peak counter that is never reset and "
        "SWH is read after the Transformer, so its line is flat whatever it uses. Well-posed: "
        "PyTorch's fused attention, equal parameters, each peak in a process of its own.",
        "Both axes logarithmic. The titles give the exponent of time against T, and the peak at "
        "4,096 tokens over that at 512.",
        lm.BOTH,
        figures.efficiency_panels(suite),
        tables.efficiency_tables(suite),
    )


def _ablations(reading: Reading) -> Section:
    suite = reading.suites["ablate"]
    return Section(
        "ablate",
        "Ablations: one part of the layer changed",
        "The paper shows none. Window, branches, fusion and kernel are changed one at a time, at "
        "equal parameters: recall among 64 tokens, asked again at up to 16 times that, and the "
        "loss of a small language model, in which the window alone begins with narrower weights. "
        "One learning rate for all, the best for the paper's layer.",
        "Dashed lines are the paper's layer. Filled dots are recall at the training length, hollow "
        "ones at 4 times that; bars are 95 % intervals (of two seeds for text, which is wide).",
        (),
        figures.ablation_panels(suite),
        tables.ablation_tables(suite),
    )


# --------------------------------------------------------------------------------- how it was made


def _made(reading: Reading) -> list[dict[str, Any]]:
    """For every suite its command (or the one that would make it) and what it ran on."""
    made = []
    for name in ("synthetic", *_sizes(reading), "efficiency", "ablate"):
        suite = reading.suites.get(name) or {}
        made.append(
            {
                "suite": name,
                "command": str(suite.get("command") or MISSING),
                "again": COMMANDS[name],
                "environment": _environment(suite),
            }
        )
    return made


def _environment(suite: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the suite's rows were measured on, every value that occurs."""
    seen: dict[str, dict[str, None]] = {}
    for source in (suite, *suite.get("rows", ())):
        about = source.get("environment")
        for key, value in about.items() if isinstance(about, Mapping) else ():
            seen.setdefault(str(key).replace("_", " "), {})[str(value)] = None
    return [(key, _all_of(key, sorted(values))) for key, values in seen.items()]


def _all_of(key: str, values: Sequence[str]) -> str:
    if key == "date" and len(values) > 1:
        return f"{values[0]} to {values[-1]}"
    return "; ".join(values)
