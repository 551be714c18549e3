"""The laboratory: what measures, compares and shows models. Nothing in the library imports it.

For models of your own:

    analyze.py       what a model has learned; `kernel_figures.py` draws it
    doctor.py        the ways in which the architecture fails, checked on one model
    report.py        a page of runs: `runs.py` reads their folders, `summary.py` compares them
    demo.py          two trainings and their report, in minutes
    bench/           how fast every path is here

For the questions that this package answers:

    experiments/     lists of runs, and pages of their rows: `reproduce` and `ablate`
    paper/           the paper's claims, with verdicts from those rows
    baselines/       what others use: mixers to train in the same block, models to time
    variants.py      the memory with one thing changed

Shared: `jobs.py` (child processes), `results.py` (JSON on disk), `estimates.py` (95 % intervals),
`figures.py` (style, panels).
"""
