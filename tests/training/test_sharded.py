"""`shard=full`: processes that hold a part each train, save and resume as one process does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from spectral_window.errors import UserError
from spectral_window.training import checkpoints, train
from spectral_window.training.loading import load
from spectral_window.training.parallel import World
from spectral_window.training.recipes import Recipe
from spectral_window.training.sharded import pieces
from tests.processes import THREADS
from tests.training.runs import Crash, Stopper, crash, rows

ROOT = Path(__file__).parent.parent.parent
STEPS, GROUPS = 24, 5  # of the model: two layers, their kernels, and the rest


@dataclass(frozen=True)
class Place:
    """Where runs are kept, and what the processes of each have seen, by rank."""

    folder: Path
    corpus: Path
    recipe: Recipe
    seen: list[dict[str, Any]]

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


def job(place: Path, corpus: Path, recipe: Recipe, name: str, **more: Any) -> dict[str, Any]:
    recipe = recipe.replace(**more.pop("changes", {}))
    out, text = str(place / name), str(corpus)
    return {"name": name, "recipe": recipe.to_dict(), "out": out, "corpus": text, **more}


def launch(place: Path, jobs: list[dict[str, Any]], processes: int = 2) -> list[dict[str, Any]]:
    """What each of the processes saw in `jobs`, by rank; nothing if one was killed."""
    name = jobs[0]["name"]
    (place / f"{name}-jobs.json").write_text(json.dumps(jobs))
    words = ["tests.training.sharded_ranks", str(place / f"{name}-jobs.json"), str(place / name)]
    how = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    done = subprocess.run(
        [sys.executable, *how, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(THREADS)},
        capture_output=True,
        text=True,
    )
    if any(each.get("stop") == "kill" for each in jobs):
        assert "SIGKILL" in done.stderr, done.stderr
        return []
    assert done.returncode == 0, done.stderr
    ranks = range(processes)
    return [json.loads((place / f"{name}-{rank}.json").read_text()) for rank in ranks]


def sharded_recipe(recipe: Recipe) -> Recipe:
    """Two micro-batches a step in each of two processes. A step does not depend on how many come
    after it, so shorter trainings are compared with the beginning of longer ones."""
    return recipe.replace(micro_batch_size=2, steps=STEPS, shard="full", schedule="constant")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, corpus: Path) -> Place:
    """All trainings of two processes, in two launches: one is killed, the other ends well."""
    folder, recipe = tmp_path_factory.mktemp("sharded"), sharded_recipe(recipe)
    whole, stopper = recipe.replace(shard="none"), Stopper(10, crash)
    train(whole, folder / "alone", corpus=corpus)
    with pytest.raises(Crash):
        train(whole, folder / "began-whole", corpus=corpus, progress=stopper)

    launch(folder, [job(folder, corpus, recipe, "killed", stop="kill", at=10)])
    for name in ("resumed", "damaged", "alone-after"):
        shutil.copytree(folder / "killed", folder / name)
    damaged = folder / "damaged/checkpoints/step-8/optimizer-00002-of-00002.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)

    changes: dict[str, dict[str, Any]] = {
        "whole": {},
        "resumed": {},
        "damaged": {},
        "began-whole": {},
        "recomputed": {"gradient_checkpointing": True, "eval_tokens": 1, "steps": 6},
        "bfloat16": {"dtype": "bfloat16", "steps": 6},
        "diverged": {"lr": 1e30, "clip": 0.0, "weight_decay": 0.0},
    }
    jobs = [job(folder, corpus, recipe, name, changes=each) for name, each in changes.items()]
    jobs.append(job(folder, corpus, recipe, "full", stop="occupy", at=6))
    return Place(folder, corpus, recipe, launch(folder, jobs))


def assert_close(ours: Path, theirs: Path, *keys: str, rel: float = 1e-6) -> None:
    """Every number that both have, of each of `keys`."""
    mine, others = numbers(ours, keys), numbers(theirs, keys)
    both = mine.keys() & others.keys()
    assert {key for _, key in both} == set(keys)
    for place in both:
        assert mine[place] == pytest.approx(others[place], rel=rel), place


def numbers(run: Path, keys: tuple[str, ...]) -> dict[tuple[int, str], float]:
    """By step and key."""
    return {(row["step"], key): row[key] for row in rows(run) for key in keys if key in row}


def stored(run: Path, step: int = STEPS) -> dict[str, str]:
    """SHA-256 of every file of tensors in a checkpoint."""
    files = checkpoints.verify(run / f"checkpoints/step-{step}")["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith("safetensors")}


LOSSES = ("loss", "grad_norm", "eval_loss")


def test_two_processes_have_the_losses_of_one_and_hold_half_each(place: Place) -> None:
    assert len(numbers(place / "whole", ("loss",))) * place.recipe.log_every == STEPS
    assert_close(place / "whole", place / "alone", *LOSSES)
    ends = [json.loads((place / run / "result.json").read_text()) for run in ("whole", "alone")]
    assert ends[0]["eval_loss"] == pytest.approx(ends[1]["eval_loss"], rel=1e-6)
    assert ends[0]["eval_tokens"] == ends[1]["eval_tokens"]
    for seen in place.seen:
        assert seen["whole"]["numbers"] == pytest.approx(ends[1]["parameters"] / 2, rel=0.02)


def test_gradients_are_exchanged_once_a_step_whatever_is_accumulated(place: Place) -> None:
    for seen in place.seen:
        assert seen["whole"]["calls"]["reduce_scatter_base"] == STEPS * GROUPS


def test_recomputed_activations_change_no_loss(place: Place) -> None:
    """And an evaluation of less text than there are processes keeps them together."""
    assert_close(place / "recomputed", place / "whole", "loss", "grad_norm")
    for seen in place.seen:
        assert seen["recomputed"]["kernels"] > 1.5 * seen["bfloat16"]["kernels"]


def test_bfloat16_computes_products_and_neither_dynamics_nor_weights(place: Place) -> None:
    assert_close(place / "bfloat16", place / "alone", "loss", "eval_loss", rel=0.01)
    for seen in place.seen:
        dtypes = seen["bfloat16"]["dtypes"]
        assert dtypes["products"] == ["torch.bfloat16"]
        assert dtypes["dynamics"] == dtypes["held"] == ["torch.float32"]


def test_a_killed_run_resumes_to_the_same_bits(place: Place) -> None:
    assert stored(place / "resumed") == stored(place / "whole")
    assert rows(place / "resumed") == rows(place / "whole")
    assert not list((place / "resumed").rglob(".tmp-*"))


def test_a_flipped_byte_in_one_part_is_named_and_the_checkpoint_before_it_used(
    place: Place,
) -> None:
    said = "\n".join(place.seen[0]["damaged"]["notes"])
    assert "step-8 is refused: optimizer-00002-of-00002.safetensors does not match" in said
    assert stored(place / "damaged") == stored(place / "whole")


def test_one_process_resumes_what_two_began_and_two_what_one_began(place: Place) -> None:
    run, recipe = place / "alone-after", place.recipe.replace(shard="none")
    with pytest.warns(UserWarning, match="2 processes saved step-8 and 1 resume it"):
        train(recipe, run, corpus=place.corpus, resume=True)
    for name in ("alone-after", "began-whole"):
        assert_close(place / name, place / "alone", *LOSSES)
    assert set(stored(place / "alone-after")) == {
        f"{kind}.safetensors" for kind in ("model", "optimizer", "rng")
    }


def test_a_model_in_parts_loads_like_any_other(place: Place) -> None:
    run = place / "whole"
    assert sorted(path.name for path in (run / "model").glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    last = load(run / f"checkpoints/step-{STEPS}").model.state_dict()
    alone = load(place / "alone").model.state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    for name, tensor in load(run).model.state_dict().items():
        assert torch.equal(tensor, last[name]), name
        assert torch.equal(tensor, theirs[name]), name
        torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-6)
    card = (run / "model/README.md").read_text()
    assert "SWHForCausalLM" in card
    assert "FSDP" not in card + (run / "model/config.json").read_text()


def test_what_diverges_in_parts_ends_every_process_with_its_name(place: Place) -> None:
    for seen in place.seen:
        name, text = seen["diverged"]["error"]
        assert name == "DivergedError"
        assert "lower lr" in text


def test_a_process_that_cannot_write_fails_the_save_in_all_and_the_older_one_stays(
    place: Place,
) -> None:
    for seen in place.seen:
        name, text = seen["full"]["error"]
        assert name == "ResourceError"
        assert "cannot write: File exists" in text
    assert [path.is_file() for path in (place / "full").rglob(".tmp-*")] == [True]  # the obstacle
    newest, refused = checkpoints.newest(place / "full/checkpoints")
    assert newest is not None
    assert (newest.name, refused) == ("step-4", [])


def test_one_process_holds_all_whatever_is_asked(recipe: Recipe) -> None:
    assert [pieces(kind, World()) for kind in ("none", "full", "hybrid")] == [1, 1, 1]
    assert [pieces(kind, World(0, 8, 4)) for kind in ("none", "full", "hybrid")] == [1, 8, 4]
    with pytest.raises(UserError, match=r"shard=hybrid .*: 6 processes are not 4 on each machine"):
        pieces("hybrid", World(0, 6, 4))


@pytest.mark.slow
def test_four_processes_and_three_have_the_losses_of_one(
    tmp_path: Path, recipe: Recipe, corpus: Path
) -> None:
    """In one group, in two machines of two, and where parameters do not divide evenly."""
    recipe = sharded_recipe(recipe).replace(batch_size=24)
    train(recipe.replace(shard="none"), tmp_path / "alone", corpus=corpus)
    jobs = [
        job(tmp_path, corpus, recipe, "four", stop="crash", at=10),
        job(tmp_path, corpus, recipe, "two-of-two", local=2, changes={"shard": "hybrid"}),
    ]
    seen = launch(tmp_path, jobs, 4)
    whole = json.loads((tmp_path / "alone/result.json").read_text())["parameters"]
    assert sum(each["four"]["numbers"] for each in seen) == whole
    assert sum(each["two-of-two"]["numbers"] for each in seen) == 2 * whole
    launch(tmp_path, [job(tmp_path, corpus, recipe, "four")], 3)
    for name in ("four", "two-of-two"):
        assert_close(tmp_path / name, tmp_path / "alone", *LOSSES)
