"""What a run trusts on disk: what is listed, makes sense, and belongs together. Never a right hash
alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectral_window.errors import IntegrityError
from spectral_window.training import manifest, train
from spectral_window.training.loading import load

STEP = "checkpoints/step-12"


@pytest.fixture
def run(uninterrupted, tmp_path):
    return shutil.copytree(uninterrupted, tmp_path / "run")


def resume(recipe, corpus, run):
    """Go on from the newest checkpoint, which `changed` has damaged: there is no other."""
    shutil.rmtree(run / "checkpoints/step-8", ignore_errors=True)
    (run / "result.json").unlink(missing_ok=True)  # so that the checkpoint is read
    return train(recipe, run, corpus=corpus, resume=True)


def resign(folder, change=lambda listed: None):
    """Seal `folder` anew after `change` to its manifest: every hash is right."""
    listed = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    facts = {key: listed[key] for key in listed.keys() - {"schema", "files", "sha256"}}
    manifest.seal(folder, **facts)
    listed = json.loads((folder / "manifest.json").read_text())
    change(listed)
    listed.pop("sha256")
    listed["sha256"] = manifest._own_hash(listed)
    (folder / "manifest.json").write_text(json.dumps(listed))


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# ------------------------------------------------------------------- only what is listed


@pytest.mark.parametrize("place", ["model", STEP])
def test_a_runs_model_without_its_manifest_is_refused(run, place):
    (run / place / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match=r"manifest\.json is missing"):
        load(run / place)


def test_a_model_copied_out_of_its_run_may_go_without_a_manifest(run, tmp_path):
    copy = shutil.copytree(run / "model", tmp_path / "mine")
    (copy / "manifest.json").unlink()
    load(copy)


@pytest.mark.parametrize("place", ["model", STEP])
@pytest.mark.parametrize(
    "name",
    ["model.safetensors.index.json", "added_tokens.json", "special_tokens_map.json", "vocab.json",
     "chat_template.jinja", "merges.txt", "adapter_config.json", "more.safetensors"],
)  # fmt: skip
def test_an_unlisted_file_that_a_library_would_read_is_refused(run, place, name):
    (run / place / name).write_text("{}")
    with pytest.raises(IntegrityError, match=f"{name} is not listed.*remove it"):
        load(run / place)


def test_a_note_beside_the_weights_harms_nobody(run):
    (run / "model/NOTES.md").write_text("mine")
    load(run)


# ------------------------------------------------------------------- a right hash, no sense

MANIFESTS = {
    "no files": lambda m: m.pop("files"),
    "files are a list": lambda m: m.update(files=[]),
    "an entry is a number": lambda m: m["files"].update({"config.json": 1}),
    "no size": lambda m: m["files"]["config.json"].pop("bytes"),
    "a negative size": lambda m: m["files"]["config.json"].update(bytes=-1),
    "a huge size": lambda m: m["files"]["config.json"].update(bytes=10**30),
    "NaN for a size": lambda m: m["files"]["config.json"].update(bytes=float("nan")),
    "a hash of another kind": lambda m: m["files"]["config.json"].update(sha256=7),
    "a path for a name": lambda m: m["files"].update({"../x": m["files"]["config.json"]}),
    "weights not listed": lambda m: m["files"].pop("optimizer.safetensors"),
    "no step": lambda m: m.pop("step"),
    "a negative step": lambda m: m.update(step=-12),
    "a step that is text": lambda m: m.update(step="12 "),
    "nothing about the run": lambda m: m.pop("about"),
    "a list about the run": lambda m: m.update(about=[1]),
    "a recipe that is a number": lambda m: m["about"].update(recipe=3),
    "a schema that is text": lambda m: m.update(schema="1"),
}


@pytest.mark.filterwarnings("ignore:checkpoint step-12 is refused")  # told, and then there is none
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_senseless_manifest_is_refused_with_one_line(name, recipe, corpus, run):
    resign(run / STEP, MANIFESTS[name])
    with pytest.raises(IntegrityError) as caught:
        resume(recipe, corpus, run)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


TRAINING = {
    "a negative step": lambda c: c.update(step=-1),
    "another step": lambda c: c.update(step=8),
    "a step that is true": lambda c: c.update(step=True),
    "no step": lambda c: c.pop("step"),
    "a huge count of samples": lambda c: c.update(samples=10**40),
    "seconds that are NaN": lambda c: c.update(seconds=float("nan")),
    "seconds below 0": lambda c: c.update(seconds=-5.0),
    "seconds that are text": lambda c: c.update(seconds="5"),
    "a sum of losses that is Inf": lambda c: c.update(loss_sum=float("inf")),
    "logged later than trained": lambda c: c.update(logged_step=99),
    "no schedule": lambda c: c.pop("schedule"),
    "another rate": lambda c: c["schedule"].update(_last_lr=[1.0, 1.0]),
    "a rate that is NaN": lambda c: c["schedule"].update(_last_lr=[float("nan")] * 2),
    "one rate": lambda c: c["schedule"].update(_last_lr=[3e-4]),
    "another first rate": lambda c: c["schedule"].update(base_lrs=[9.0, 9.0]),
    "another place in the schedule": lambda c: c["schedule"].update(last_epoch=3),
}
GENERATORS = {
    "none": lambda v: v.update(generators=[]),
    "a number": lambda v: v.update(generators=5),
    "python's too short": lambda v: v["generators"][0]["python"][1].pop(),
    "numpy's of another kind": lambda v: v["generators"][0].update(numpy=["X", [1], 0, 0, 0.0]),
    "numpy's negative": lambda v: v["generators"][0]["numpy"].__setitem__(2, -(10**12)),
}


@pytest.mark.parametrize("name", [*TRAINING, *GENERATORS])
def test_counters_that_no_training_has_are_refused(name, recipe, corpus, run):
    def change(values):
        if name in TRAINING:
            TRAINING[name](values["counters"])
        else:
            GENERATORS[name](values)

    edit(run / STEP / "training.json", change)
    resign(run / STEP)
    with pytest.raises(IntegrityError) as caught:
        resume(recipe, corpus, run)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------- pieces of a checkpoint


@pytest.mark.parametrize("file", ["model", "optimizer", "rng"])
@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "dtype", "not finite"])
def test_each_piece_missing_extra_or_misshaped_is_named(fault, file, recipe, corpus, run):
    if file == "rng" and fault in ("extra", "not finite"):
        return  # a generator that this machine lacks is passed over, and a byte is always finite
    path = run / STEP / f"{file}.safetensors"
    stored = load_file(path)
    name = "torch.0" if file == "rng" else next(n for n in sorted(stored) if stored[n].dim() == 2)
    if fault == "missing":
        del stored[name]
    elif fault == "extra":
        name = "x"
        stored["x"] = torch.zeros(3)
    elif fault == "shape":
        stored[name] = stored[name][1:].clone()
    elif fault == "dtype":
        stored[name] = stored[name].to(
            torch.float16 if stored[name].is_floating_point() else torch.int32
        )
    else:
        stored[name].view(-1)[0] = float("nan")
    save_file(stored, path, {"format": "pt"})
    resign(run / STEP)
    with pytest.raises(IntegrityError) as caught:
        resume(recipe, corpus, run)
    assert name in str(caught.value) or (file == "rng" and "generator" in str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["optimizer", "model"])
def test_at_most_ten_names_are_listed(file, recipe, corpus, run):
    save_file({"x": torch.zeros(1)}, run / STEP / f"{file}.safetensors", {"format": "pt"})
    resign(run / STEP)
    with pytest.raises(IntegrityError, match=r"and \d+ more") as caught:
        resume(recipe, corpus, run)
    assert str(caught.value).count(" missing") + str(caught.value).count(" unexpected") == 10


@pytest.mark.parametrize("name", ["optimizer.safetensors", "rng.safetensors", "training.json"])
def test_a_file_that_is_gone_from_folder_and_manifest_is_refused(name, recipe, corpus, run):
    (run / STEP / name).unlink()
    resign(run / STEP)
    with pytest.raises(IntegrityError, match=name.partition(".")[0]):
        resume(recipe, corpus, run)


# ------------------------------------------------------------------- a finished run


def test_a_result_that_is_not_the_models_is_made_again(recipe, corpus, uninterrupted, run):
    right = json.loads((uninterrupted / "result.json").read_text())
    edit(run / "result.json", lambda result: result.update(eval_loss=0.01))
    with pytest.warns(UserWarning, match="the result is made again"):
        again = train(recipe, run, corpus=corpus, resume=True)
    assert again["eval_loss"] == right["eval_loss"]
    assert json.loads((run / "result.json").read_text()) == again
    weights = load_file(run / "model/model.safetensors")
    assert all(
        torch.equal(tensor, weights[name])
        for name, tensor in load_file(uninterrupted / "model/model.safetensors").items()
    )


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/manifest.json", "result.json"])
def test_what_is_damaged_at_the_end_of_a_run_is_made_again(name, recipe, corpus, run):
    (run / name).write_bytes(b"{}")
    with pytest.warns(UserWarning, match="the result is made again"):
        train(recipe, run, corpus=corpus, resume=True)
    load(run)


def test_a_run_finished_before_results_were_sealed_is_believed(recipe, corpus, run):
    resign(run / "model", lambda listed: listed.pop("result"))
    before = (run / "result.json").read_bytes()
    train(recipe, run, corpus=corpus, resume=True)
    assert (run / "result.json").read_bytes() == before
