"""The suites: what they ask is what they say, what is done is not done again, a stage follows from
the one before."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from spectral_window.cli import main
from spectral_window.errors import IntegrityError, UserError
from spectral_window.hf.model import count_parameters
from spectral_window.lab import results
from spectral_window.lab.experiments import ablate, lm, memory, probes, synthetic
from spectral_window.lab.experiments.experiment import Experiment
from spectral_window.lab.experiments.trainings import Text, Training
from spectral_window.nn.fusions import FUSIONS
from spectral_window.nn.kernels import KERNELS
from spectral_window.training.trainer import model_config

TRIALS = synthetic.trials()


# ---------------------------------------------------------------------------------- synthetic


def test_the_published_form_has_the_papers_numbers():
    published = [e for e in TRIALS if e.labels["form"] == "published"]
    assert {e.run.task for e in published} == {
        "published-associative", "published-induction", "published-sorting",
    }  # fmt: skip
    for trial in published:
        p = trial.run
        assert (p.rows, p.steps, p.lr, p.weight_decay, p.clip) == (64, 3000, 1e-3, 0.01, 1.0)
        assert p.lengths == (32,)
        assert p.decay_all
        assert not p.match
        shape = p.config()
        assert (shape.hidden_size, shape.num_hidden_layers, shape.window) == (128, 2, 32)
        assert (shape.vocab_size, shape.num_attention_heads, shape.mlp) == (50, 4, "gelu")
        assert shape.initializer_range is None


def test_the_published_models_are_not_equally_large_and_the_posed_are():
    sizes: dict[str, set[int]] = {"published": set(), "posed": set()}
    for trial in TRIALS:
        if trial.run.task in ("published-sorting", "recall"):
            sizes[trial.labels["form"]].add(count_parameters(trial.run.config()))
    assert max(sizes["published"]) > 1.1 * min(sizes["published"])
    assert max(sizes["posed"]) <= 1.01 * min(sizes["posed"])


def test_the_posed_form_has_three_seeds_two_thousand_examples_and_all_distances():
    posed = [e for e in TRIALS if e.labels["form"] == "posed"]
    for task in ("recall", "needle"):
        of_task = [e for e in posed if e.run.task == task and e.labels["training"] == "fixed"]
        assert {e.labels["model"] for e in of_task} == {"SWH", "Transformer", "window only"}
        assert {e.run.seed for e in of_task} == {0, 1, 2}
        lengths = {t.length for e in of_task for t in e.run.tests}
        assert lengths == {32 * k for k in (1, 2, 4, 8, 16, 32)}
    assert all(t.rows >= 2000 for e in TRIALS for t in e.run.tests)
    assert {"induction", "sorting", "mqar"} <= {e.run.task for e in posed}
    for trial in posed:
        reach = 2 * trial.run.config().window
        assert reach < min(trial.run.lengths), "the window sees the whole of a short sequence"


def test_every_probe_of_the_suite_has_its_own_key():
    assert len({trial.run.key for trial in TRIALS}) == len(TRIALS)


def test_a_stopped_suite_goes_on_and_a_finished_one_is_only_read(tmp_path, monkeypatch):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "window": 4}
    probe = probes.Probe(
        "needle", shape, (probes.Exam("needle", 16, 20),), lengths=(16,), steps=2, rows=4
    )
    trials = [
        synthetic._trial("posed", "SWH", "fixed", dataclasses.replace(probe, seed=seed))
        for seed in (0, 1)
    ]
    monkeypatch.setattr(synthetic, "trials", lambda quick: trials)
    first = trials[0].run
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    (work / f"{first.key}.json").write_text(json.dumps(probes.run(first)))
    said: list[str] = []
    options = {"quick": False, "workers": 1, "command": "c", "log": said.append}
    found = synthetic.run(out, work, **options)
    assert [r["key"] for r in found["rows"]] == [trial.run.key for trial in trials]
    assert found["ceilings"] == [{"task": "needle", "length": 16, "ceiling": 1.0}]
    assert any("posed needle, SWH, fixed, seed 1" in line for line in said)
    assert not any("seed 0" in line for line in said)
    # the results alone are enough to know what is done
    again = synthetic.run(out, tmp_path / "elsewhere", **options)
    assert again["rows"] == found["rows"]
    assert not list((tmp_path / "elsewhere").glob("*"))


# ----------------------------------------------------------------------------- language models


def finished(folder: Path, training: Training, loss: float) -> None:
    """A run folder as `train` leaves it, with the numbers that are read."""
    out = folder / training.place
    out.mkdir(parents=True)
    recipe = training.resolved()
    (out / "config.json").write_text(json.dumps({"recipe": recipe.to_dict(), "parameters": 7}))
    (out / "result.json").write_text(
        json.dumps({"eval_loss": loss, "train_loss": loss, "steps": recipe.steps, "parameters": 7})
    )
    lines = [
        {"step": 1, "tokens": 10, "seconds": 1.0, "loss": loss + 1},
        {"step": 2, "tokens": 20, "seconds": 2.0, "loss": loss},
        {"step": 2, "tokens": 20, "seconds": 2.0, "eval_loss": loss},
    ]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def text(tmp_path, monkeypatch) -> Text:
    # no token of it is read here
    monkeypatch.setattr(Text, "prepare", lambda self, recipe: None)
    monkeypatch.setattr(Text, "fingerprint", "of the tokens")
    return Text(("train.txt",), (), tmp_path / "tokens")


WISHES = {  # what shall be the best in the sweep
    "SWH": {"lr": 4e-3, "initializer_range": 0.05},
    "Transformer": {"lr": 8e-3, "initializer_range": 0.02},
    "window only": {"lr": 2e-3, "initializer_range": 0.02},
    "spectral only": {"lr": 2e-3, "initializer_range": 0.05},
}


def swept() -> list[dict]:
    """Rows of the small size's sweep, in which what WISHES says is best."""
    rows = []
    for trial in lm.Suite(lm.SIZES["small"], None).stage("sweep", []):
        wish = WISHES[trial.labels["variant"]]
        wrong = sum(trial.labels[name] != value for name, value in wish.items())
        rows.append({**trial.labels, "eval_loss": 4.0 + wrong})
    return rows


def test_a_variant_goes_on_with_its_best_pair_and_with_the_best_at_the_width_of_swh():
    tried = lm.candidates(swept())
    assert {variant: pairs[0] for variant, pairs in tried.items()} == WISHES
    assert tried["SWH"] == tried["SWH"][:1]
    assert tried["spectral only"] == tried["spectral only"][:1]
    assert tried["Transformer"][1:] == [{"lr": 8e-3, "initializer_range": 0.05}]
    assert tried["window only"][1:] == [{"lr": 2e-3, "initializer_range": 0.05}]


def test_what_is_better_at_the_end_of_the_main_runs_counts_and_gets_the_other_seeds(tmp_path, text):
    suite, work = lm.Suite(lm.SIZES["small"], None, text=text), tmp_path / "work"
    rows = swept()
    late = {"lr": 8e-3, "initializer_range": 0.05}  # the sweep preferred 0.02
    for trial, row in zip(suite.stage("sweep", []), rows, strict=True):
        finished(work, trial.run, row["eval_loss"])
    for stage in ("main", "branches", "published"):
        for trial in suite.stage(stage, rows):
            loss = 3.0 if trial.labels["initializer_range"] == 0.05 else 3.5
            finished(work, trial.run, loss)
            rows.append({**trial.labels, "eval_loss": loss})
    for trial in suite.stage("seeds", rows):
        finished(work, trial.run, 3.1)
    options = {"size": "small", "text": text, "workers": 1, "command": "c", "log": lambda _: None}
    found = lm.run(tmp_path / "out", work, **options)
    assert lm.best(found["rows"]) == WISHES
    assert lm.best(found["rows"], "main") == {"SWH": WISHES["SWH"], "Transformer": late}
    main = [r for r in found["rows"] if r["part"] == "main"]
    assert len(main) == 5  # SWH twice, the Transformer twice, and once at the width that lost
    for variant in lm.BOTH:
        counted = lm.counted(found["rows"], "main", variant)
        assert [(r["seed"], r["eval_loss"]) for r in counted] == [(0, 3.0), (1, 3.1)]
    for row in main:
        assert f"lr={row['lr']}" in row["knobs"]
        assert f"initializer_range={row['initializer_range']}" in row["knobs"]
    assert main[0]["eval_curve"] == [[20.0, 3.0]]
    # with the results alone, nothing is run again
    assert lm.run(tmp_path / "out", tmp_path / "empty", **options)["rows"] == found["rows"]


def test_a_folder_with_another_run_is_refused(tmp_path, text):
    training = lm.Suite(lm.SIZES["small"], None, text=text).stage("published", [])[0].run
    finished(tmp_path, training, 3.0)
    other = dataclasses.replace(training, overrides={**training.overrides, "steps": 7})
    with pytest.raises(IntegrityError, match="differs in steps: choose another --work"):
        other.read(tmp_path)
    assert training.read(tmp_path)["eval_loss"] == 3.0


def test_the_posed_models_are_equally_large_and_the_published_are_not():
    suite = lm.Suite(lm.SIZES["small"], None)

    def sizes(stage: str) -> list[int]:
        found = [t.run.resolved() for t in suite.stage(stage, swept())]
        return [count_parameters(model_config(recipe, 4096)) for recipe in found]

    for stage in ("main", "branches"):
        assert min(sizes(stage)) >= 3_000_000
        assert max(sizes(stage)) <= 1.01 * min(sizes(stage))
    assert max(sizes("published")) > 1.05 * min(sizes("published"))


def test_the_small_comparison_reads_twenty_million_tokens_with_two_seeds():
    suite, rows = lm.Suite(lm.SIZES["small"], None), swept()
    trials = suite.stage("main", rows)
    rows += [{**trial.labels, "eval_loss": 3.0} for trial in trials]
    trials += suite.stage("seeds", rows)
    assert {(t.labels["variant"], t.labels["seed"]) for t in trials} == {
        (variant, seed) for variant in lm.BOTH for seed in (0, 1)
    }
    for trial in trials:
        recipe = trial.run.resolved()
        assert recipe.steps * recipe.tokens_per_step >= 20_000_000


def test_the_papers_own_numbers_stand_in_the_published_form_at_full_size():
    for trial in lm.Suite(lm.SIZES["125m"], None).stage("published", []):
        recipe = trial.run.resolved()
        assert (recipe.model["hidden_size"], recipe.model["num_hidden_layers"]) == (768, 12)
        assert (recipe.sequence_length, recipe.batch_size, recipe.steps) == (1024, 64, 2000)
        assert (recipe.lr, recipe.schedule, recipe.match) == (6e-4, "constant", None)


def test_a_training_is_known_by_its_tokens_and_not_by_where_they_lie(text, monkeypatch):
    training = lm.Suite(lm.SIZES["small"], None, text=text).stage("published", [])[0].run
    key = training.key
    elsewhere = Text(("elsewhere.txt",), ("v.txt",), text.tokens)
    assert dataclasses.replace(training, text=elsewhere).key == key
    monkeypatch.setattr(Text, "fingerprint", "of other tokens")
    assert training.key != key


def test_fewer_tokens_shrink_every_stage():
    suite = lm.Suite(lm.SIZES["small"], 2_000_000)
    assert suite.stage("main", swept())[0].run.resolved().steps == 488
    assert suite.stage("branches", swept())[0].run.resolved().steps == 122


# ----------------------------------------------------------------------------------- ablations


def test_the_ablations_try_every_registered_kernel_and_fusion_and_the_asked_windows():
    kernels = {v.get("kernel", "damped_oscillator") for v in ablate.GROUPS["kernel"].values()}
    fusions = {v.get("fusion", "norm_add") for v in ablate.GROUPS["fusion"].values()}
    windows = {v.get("window", 32) for v in ablate.GROUPS["window"].values()}
    assert kernels == set(KERNELS)
    assert fusions == set(FUSIONS)
    assert windows == {16, 32, 64, 128, 256, 512}


def test_ablated_variants_are_equally_large():
    for overrides in ablate.unique(ablate.GROUPS):
        paper, variant = (ablate.probes_of(o)[0].run.config() for o in ({}, overrides))
        assert count_parameters(variant) == pytest.approx(count_parameters(paper), rel=0.01)
        sizes = [
            count_parameters(model_config(ablate.trainings_of(o)[0].run.resolved(), 4096))
            for o in ({}, overrides)
        ]
        assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


def test_the_table_has_a_line_for_every_variant_and_says_what_is_missing():
    row = {
        "measure": "text", "overrides": {"kernel": "pure_decay"}, "eval_loss": 3.5,
        "parameters": 1, "key": "k",
    }  # fmt: skip
    lines = ablate.table({"rows": [row, {**row, "eval_loss": 3.7}]})
    assert len(lines) == sum(len(variants) for variants in ablate.GROUPS.values())
    decay = next(line for line in lines if line["variant"] == "pure decay")
    assert decay["text"].value == pytest.approx(3.6)
    assert decay["text"].seeds == 2
    assert decay["recall 1x"] is None
    assert all(line["text"] is None for line in lines if line is not decay)


def test_an_ablation_keeps_the_groups_measured_before(tmp_path, text):
    work, out = tmp_path / "work", tmp_path / "out"
    for trial in ablate.trainings_of({"kernel": "pure_decay"}):
        finished(work, trial.run, 3.5)
    results.save(out, "ablate", {"rows": [{"key": "of another group"}]})
    with pytest.raises(UserError, match="did you mean 'kernel'"):
        ablate.run(out, work, groups=["kernels"], text=text, quick=False, workers=1, command="c")
    assert results.load(out, "ablate")["rows"] == [{"key": "of another group"}]


# ----------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("reproduce", "sintetic"), "did you mean 'synthetic'"),
        (("reproduce", "lm", "--size", "125mm"), "did you mean '125m'"),
        (("reproduce", "--jobs", "0"), "--jobs"),
        (("ablate", "windows"), "did you mean 'window'"),
    ],
)
def test_a_wrong_word_is_one_line_and_leaves_nothing(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(list(words)) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        "reproduce synthetic",
        "ablate",
        pytest.param("reproduce lm", marks=pytest.mark.slow),
        pytest.param("reproduce memory", marks=pytest.mark.slow),
        pytest.param("ablate memory", marks=pytest.mark.slow),
    ],
)
def test_a_quick_version_runs_to_its_end_and_is_marked(command, tmp_path, capsys):
    words = [*command.split(), "--quick", "--work", str(tmp_path)]
    assert main(words) == 0
    assert "quick version" in capsys.readouterr().err
    written = [json.loads(p.read_text()) for p in (tmp_path / "results").glob("*.json")]
    assert written
    assert all(suite["quick"] and suite["rows"] for suite in written)


def test_models_that_were_stopped_stand_beside_the_others_where_all_of_them_came():
    def row(variant, points, part="main"):
        tokens = points[-1][0]
        return {
            "part": part, "variant": variant, "seed": 0, "tokens": tokens, "eval_curve": points,
            "eval_loss": points[-1][1],
        }  # fmt: skip

    ended = [row("SWH", [(10, 4.0), (60, 3.0), (100, 2.0)])]
    late = [row("Transformer", [(10, 5.0), (60, 3.5)]), row("SWH", [(10, 1.0), (30, 0.5)])]
    found = memory.stopped(ended, [*late, row("Mamba-2", [(10, 4.5)])])
    assert [(r["variant"], r["part"], r["tokens"], r["eval_loss"]) for r in found] == [
        ("SWH", "stopped", 60, 3.0),
        ("Transformer", "stopped", 60, 3.5),
    ]
    assert memory.stopped([row("SWH", [(10, 3.0)], "branches")], late) == []


def test_the_memory_passes_through_the_sweep_and_both_seeds_beside_the_paper_s_two():
    suite = lm.Suite(lm.SIZES["small"], None, memory.PLAN)
    sweep = suite.stage("sweep", [])
    assert {t.labels["variant"] for t in sweep} == set(memory.PLAN.variants)
    ours = [t for t in sweep if "memory" in t.labels["variant"]]
    assert all({"mixer=memory", "mixer=memory_variant"} & {*t.run.words()} for t in ours)
    rows = [{**t.labels, "eval_loss": 4.0 + sum(t.labels[name] for name in lm.PAIR)} for t in sweep]
    main = suite.stage("main", rows)
    assert [t.labels["variant"] for t in main] == list(memory.PLAN.main)
    seeds = suite.stage("seeds", [{**t.labels, "eval_loss": 3.0} for t in main])
    assert [(t.labels["variant"], t.labels["seed"]) for t in seeds] == [
        (name, 1) for name in memory.PLAN.main
    ]
    quarter = suite.stage("branches", rows)
    assert {t.labels["variant"] for t in quarter} == set(memory.PLAN.variants)


def test_a_single_pair_of_rate_and_width_needs_no_sweep():
    suite = lm.Suite(lm.SIZES["125m-short"], None, memory.PLAN)
    assert suite.stage("sweep", []) == []
    main = suite.stage("main", [])
    assert [t.labels["variant"] for t in main] == list(memory.PLAN.main)
    assert all(t.run.resolved().steps == 305 for t in main if "memory" not in t.labels["variant"])


def test_rows_of_earlier_versions_are_found_by_their_keys(text):
    """A key names all that decides a run: where it changes, days of training would be done anew."""
    assert Training("paper-lm-small", {"seed": 0}, text=text).key == "f68899eb77a2150e"
    named = Training("paper-lm-small", {"seed": 0, "matmul_precision": "highest"}, text=text)
    assert named.key != "f68899eb77a2150e"


@pytest.mark.parametrize(("changes", "refused"), [({}, False), ({"seed": 3}, True)])
def test_a_run_older_than_auto_precision_is_the_same_run(tmp_path, text, changes, refused):
    training = Training("tiny", {"seed": 0}, "run", text)
    finished(tmp_path, training, 3.5)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["recipe"] |= {"matmul_precision": "medium"} | changes
    path.write_text(json.dumps(config))
    if refused:
        with pytest.raises(IntegrityError, match="differs in seed"):
            training.read(tmp_path)
    else:
        row = training.read(tmp_path)
        assert row["eval_loss"] == 3.5


def test_what_the_memory_is_compared_with_is_one_table_a_part_and_a_picture(tmp_path):
    def row(part: str, variant: str, seed: int, lr: float, *losses: float) -> dict:
        curve = [[1e6 * (k + 1), loss] for k, loss in enumerate(losses)]
        return {
            "part": part, "variant": variant, "seed": seed, "lr": lr, "initializer_range": 0.02,
            "eval_loss": losses[-1], "eval_curve": curve, "parameters": 3_000_000,
            "tokens": 20_000_000 if part == "main" else 1_000_000,
        }  # fmt: skip

    rows = [row("sweep", "SWH", 0, lr, loss) for lr, loss in ((1e-3, 4.5), (2e-3, 4.4))]
    rows += [row("sweep", memory.OURS, 0, 1e-3, 4.3), row("sweep", "Mamba-2", 0, 1e-3, 4.2)]
    for seed, worse in ((0, 0.0), (1, 0.1)):
        rows += [row("main", "SWH", seed, 2e-3, 4.0, 3.5, 3.2 + worse)]
        rows += [row("main", memory.OURS, seed, 1e-3, 3.9, 3.4, 3.1 + worse)]
    memory.write({"rows": rows}, tmp_path, "lm-small")
    lines = (tmp_path / "lm-small.md").read_text().splitlines()
    assert "| SWH with memory | 3,000,000 | 0.001, 0.02 | 3.150 (2 seeds) | -9.5% |" in lines
    assert "| SWH | 3,000,000 | 0.002, 0.02 | 4.400 | +22.1% |" in lines, "the better rate counts"
    assert lines.index("20,000,000 tokens a model (all tokens):") == 0
    assert (tmp_path / "lm-small.png").read_bytes().startswith(b"\x89PNG")
    memory.write({"rows": []}, tmp_path, "lm-short")
    assert not list(tmp_path.glob("lm-short*"))


def test_the_short_size_is_a_sweep_alone():
    suite = lm.Suite(lm.SIZES["short"], None, memory.PLAN)
    sweep = suite.stage("sweep", [])
    assert {t.labels["variant"] for t in sweep} == set(memory.PLAN.variants)
    ended = [
        t.labels | {"eval_loss": 4.0, "tokens": 1, "parameters": 1, "eval_curve": []} for t in sweep
    ]
    assert not any(
        suite.stage(stage, ended) for stage in ("main", "seeds", "branches", "published")
    )


def test_the_memory_s_ablation_takes_over_the_papers_rows(tmp_path, text, monkeypatch):
    """Of the variants that are the paper's layer, and no others."""
    out, papers = tmp_path / "out", tmp_path / "paper"
    known = [
        {"key": trial.run.key, **trial.labels, "parameters": 1, "tests": []}
        for overrides in ({}, {"kernel": "pure_decay"})
        for trial in ablate.probes_of(overrides)
    ]
    results.save(papers, "ablate", {"rows": known})
    asked: list[str] = []
    monkeypatch.setattr(Experiment, "run", lambda self, trials, **_: asked.extend(
        trial.run.key for trial in trials if trial.run.key not in self.earlier
    ))  # fmt: skip
    found = ablate.run(
        out, tmp_path / "work", groups=["memory"], text=text, quick=False, workers=1, command="c",
        earlier=papers, log=lambda _: None,
    )  # fmt: skip
    assert found["rows"] == known[:3]
    assert not {row["key"] for row in known} & set(asked)
    assert ablate.probes_of({"mixer": "memory"})[0].run.key in asked


def test_the_memory_s_ablation_has_results_of_its_own():
    assert ablate.is_beyond(["memory"])
    assert not ablate.is_beyond(["kernel", "window"])
    assert not ablate.is_beyond([])
    assert "memory" not in ablate.named([])
    with pytest.raises(UserError, match="results of its own"):
        ablate.is_beyond(["memory", "kernel"])
    row = {"measure": "text", "overrides": {"mixer": "memory"}, "eval_loss": 4.4, "parameters": 5}
    table = ablate.markdown([row, row | {"eval_loss": 4.5}])
    assert "| memory | 5 | 4.450 (2 seeds) | - | - |" in table.splitlines()
    sizes = [
        count_parameters(model_config(ablate.trainings_of(o, beyond=True)[0].run.resolved(), 4096))
        for o in ablate.BEYOND["memory"].values()
    ]
    assert max(sizes) <= 1.001 * min(sizes)
