"""Experiments: each a list of runs, and a page made of the rows that they leave.

experiment.py   the shape: trials, their jobs, the rows of earlier results
probes.py       a run that trains a small model on one task
trainings.py    a run that trains a language model by a recipe

synthetic.py    the paper's diagnostic tasks, as published and well-posed
lm.py           the paper's language models, as published and well-posed
efficiency.py   the paper's time and memory against T; `efficiency_measure.py` is what its
                child processes do, `published.py` the models that the paper timed
ablate.py       one part of the layer changed at a time
memory.py       beyond the paper: language models with a memory, against the baselines
recall.py       beyond the paper: what a memory recalls
"""
