"""Jobs: what is there is skipped, one failure stops no other, a signal lets the running ones
save."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from spectral_window.errors import UserError
from spectral_window.lab.jobs import Job, run_all, workers_here
from spectral_window.training.interrupt import Interrupted


def formatting(folder: Path, name: str, text: str = '{"a": 1}') -> Job:
    """A job that anyone can run: Python's own JSON formatter."""
    given = folder / f"{name}.in"
    given.write_text(text)
    result = folder / f"{name}.out"
    return Job(name, (str(given), str(result)), result, module="json.tool")


def test_jobs_run_and_one_that_has_its_result_is_skipped(tmp_path):
    jobs = [formatting(tmp_path, name) for name in "abc"]
    jobs[1].result.write_text("from an earlier day")
    said: list[str] = []
    assert run_all(jobs, workers=2, log=said.append) == []
    assert jobs[1].result.read_text() == "from an earlier day"
    assert all('"a": 1' in jobs[i].result.read_text() for i in (0, 2))
    assert said[0] == "1 of 3 are there already"
    assert any(line.startswith("3 of 3") for line in said)


def test_a_failed_job_is_named_with_its_last_words_and_stops_no_other(tmp_path):
    jobs = [formatting(tmp_path, "bad", "{"), formatting(tmp_path, "good")]
    said: list[str] = []
    assert run_all(jobs, workers=1, log=said.append) == ["bad"]
    assert jobs[1].result.exists()
    assert any("bad failed: " in line and "line 1 column" in line for line in said)


def slow(folder: Path, signum: int) -> Job:
    """A job that, when it has begun, sends us the signal that stops all jobs."""
    return Job(
        "slow",
        (str(folder), str(int(signum))),
        folder / "result",
        module="tests.lab.slow_job",
        begun=folder / "begun",
        resume=("--resume",),
    )


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_running_job_save_and_the_next_call_resumes_it(
    tmp_path, signum, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    jobs = [slow(tmp_path, signum), formatting(tmp_path, "next")]
    with pytest.raises(Interrupted) as stopped:
        run_all(jobs, workers=1, log=lambda line: None)
    assert stopped.value.exit_code == 128 + signum
    assert (tmp_path / "saved").exists(), "the job was killed before it had saved"
    assert not jobs[1].result.exists(), "a job was started after the signal"
    assert run_all(jobs, workers=1, log=lambda line: None) == []
    assert (tmp_path / "result").read_text() == "done"


def test_no_fewer_than_one_worker():
    with pytest.raises(UserError, match="--jobs 0"):
        workers_here(0)
    assert workers_here(3) == 3
    assert workers_here(None) >= 1
