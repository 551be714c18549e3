"""The demo: in a few minutes, on any computer, from text that every Python has to a report.

Two models of equal size learn the same text (source and docstrings of Python's standard library)
for the same number of steps: SWH with a memory, as recommended, and a Transformer. Both are then
measured on files they have never seen, both continue the same text, and a page shows it all.

Each training is a process of its own, started with the very command that the report prints. So
peak memory is that of one model (a process's peak never falls, and the second model in one process
would inherit the first one's), and a number can be checked by running its command.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from spectral_window.errors import ResourceError, UserError, from_exit_code
from spectral_window.files import try_lock, write_json
from spectral_window.lab.jobs import Child
from spectral_window.training.interrupt import Interrupted, catch_signals

# folder -> overrides: the recommended layer but for its window, which must see less than a row; in
# a training this short attention needs narrower initial weights
RUNS = {
    "swh": ("mixer=memory", "write_gate=reflecting", "short_convolution=true"),
    "transformer": ("mixer=attention", "initializer_range=0.02"),
}
OWN = (*RUNS, "report.html", "report.png")
MARK = ".spectral-window-demo"
QUICK = ("steps=20", "warmup_steps=4", "eval_every=10", "save_every=20")
QUICK_VERDICT = (
    "A quick version of 20 steps",
    "It shows the way, and its numbers mean nothing.",
)
PROMPT = 'def read_lines(path, encoding="utf-8"):\n    """Return'
SAMPLING: dict[str, Any] = {"temperature": 0.6, "top_p": 0.95}
NEW_TOKENS = 200


def run(out: Path | str, *, quick: bool = False, progress: bool = True) -> Path:
    """Train, measure, sample and report in the folder `out`; returns the path of the report.

    `out` is new, empty, or the folder of an earlier demo, which is then replaced.
    quick: a version of seconds that shows the way and no result.
    progress: show bars and lines on stderr.

    Writes the run folders `out`/swh and `out`/transformer, report.html and report.png. Raises
    UserError where `out` is something else or a training fails (with that training's exit code),
    Interrupted on Ctrl-C; the next call starts anew.
    """
    out = Path(out)
    console = Console(stderr=True, quiet=not progress, highlight=False)
    with _claim(out):
        started = time.monotonic()
        for index, (name, overrides) in enumerate(RUNS.items()):
            console.print(f"\n[bold]{index + 1} of 4[/]  {_TITLES[name]}")
            _train(_command(out / name, overrides, quick), out / name, progress)
        console.print("\n[bold]3 of 4[/]  Both write: they continue the same beginning.")
        for name in RUNS:
            write_sample(out / name, max_new_tokens=20 if quick else NEW_TOKENS)
        console.print("[bold]4 of 4[/]  The report.")

        from spectral_window.lab import report, summary
        from spectral_window.lab.runs import read_all

        folders = [out / name for name in RUNS]
        verdict = summary.compare(read_all(folders))
        if quick:
            verdict = summary.Verdict(*QUICK_VERDICT, ())
        page = report.write(folders, out / "report.html", verdict=verdict)
        report.summary_figure(folders, out / "report.png", verdict=verdict)
        took = f"{time.monotonic() - started:.0f} s in all. Open the report: {page}"
        for line in ("", verdict.headline, verdict.detail, took, ""):
            console.print(line, markup=False, soft_wrap=True)
    return page


def write_sample(
    folder: Path | str, prompt: str = PROMPT, *, max_new_tokens: int = NEW_TOKENS, seed: int = 0
) -> str:
    """Let the model of the run in `folder` continue `prompt`, and save that in its samples.json.

    Returns the text that follows the prompt. Raises as `training.loading.load` does.
    """
    from spectral_window.generation.session import Session
    from spectral_window.training.loading import load

    loaded = load(folder, device="cpu")
    session = Session(loaded.model, loaded.tokenizer, seed=seed)
    session.feed(prompt)
    text = "".join(session.stream(max_new_tokens, **SAMPLING))
    settings = ", ".join(f"{key.replace('_', '-')} {value:g}" for key, value in SAMPLING.items())
    sample = {"prompt": prompt, "text": text, "settings": f"{settings}, seed {seed}"}
    write_json(Path(folder) / "samples.json", [sample])
    return text


_TITLES = {
    "swh": "SWH with a memory learns from Python's standard library.",
    "transformer": "A Transformer of the same size learns from the same text.",
}


def _command(folder: Path, overrides: Sequence[str], quick: bool) -> list[str]:
    recipe = ["tiny", *QUICK] if quick else ["demo"]
    return ["train", *recipe, *overrides, "--out", str(folder)]


def _train(arguments: Sequence[str], folder: Path, progress: bool) -> None:
    """Run `spectral-window` with `arguments` and wait; Ctrl-C and SIGTERM are passed on to it."""
    with catch_signals() as stop:
        child = Child([sys.executable, "-m", "spectral_window", *arguments], show=progress)
        try:
            while not child.ended(stop.signum):
                time.sleep(0.1)
            code = child.process.returncode
            error = "its error is above" if progress or not code else child.last_line()
        finally:
            child.close()
    if stop.signum:
        raise Interrupted(stop.signum)
    if code:
        raise from_exit_code(code, f"training failed ({folder}): {error}")


@contextlib.contextmanager
def _claim(out: Path) -> Iterator[None]:
    """Make `out` this demo's, without what an earlier one left; no other file is touched."""
    where = shlex.quote(str(out))
    if out.exists() and not out.is_dir():
        raise UserError(f"the output is a file ({where}): choose a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise UserError(f"not empty and not a demo's folder ({where}): choose another with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / MARK).open("w") as mark:
            if not try_lock(mark, out / MARK):  # two demos would delete each other's files
                raise UserError(f"another demo is running there ({out}): wait or choose another")
            for name in OWN:
                path = out / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            yield
    except OSError as error:
        what = f"{error.strerror or error} ({error.filename or where})"
        raise ResourceError(f"{what}: make room or choose another folder") from error
