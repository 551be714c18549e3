"""Processes that compute a function: order, errors, and that none is left."""

from __future__ import annotations

import os
import signal
import subprocess

import psutil
import pytest

from spectral_window.data.workers import Workers
from spectral_window.errors import ResourceError, SpectralWindowError, UserError
from tests.data.work import square
from tests.processes import python, wait_until


def test_workers_answer_in_order_with_one_thread_each():
    with Workers(2) as workers:
        answers = list(workers.map(square, [1, 2, 8, 4, 0]))
        assert [answer[0] for answer in answers] == [1, 4, 64, 16, 0]
        assert {answer[1] for answer in answers} == {"1"}
        assert os.getpid() not in {answer[2] for answer in answers}
        first = {answer[2] for answer in workers.map(square, [2, 4])}
        assert first <= {answer[2] for answer in answers}  # they are started once
        stopped = workers.map(square, [1, 2, 4])
        next(stopped)
        children = psutil.Process().children()
        stopped.close()
        assert not any(child.is_running() for child in children)
        assert [answer[0] for answer in workers.map(square, [2, 4])] == [4, 16]
        (alone,) = workers.map(square, [1])
        assert alone[2] == os.getpid()
    assert not psutil.Process().children()


def test_workers_outlive_a_map_of_which_every_result_was_taken():
    """Whoever asked for no more than there is got new workers for each pass over the text."""
    with Workers(2) as workers:
        taken = workers.map(square, [1, 2])
        first = {next(taken)[2], next(taken)[2]}
        taken.close()
        assert {answer[2] for answer in workers.map(square, [1, 2])} <= first


@pytest.mark.parametrize(
    ("task", "kind", "words"),
    [
        (3, UserError, "a bad line (a.txt, line 7): repair it"),
        (5, SpectralWindowError, "KeyError in a worker (5): 'surprise'"),
        (6, ResourceError, "a worker ended by signal 9 (Killed) (6): if it ran out of memory"),
        (7, ResourceError, "a worker ran out of memory (7): use fewer workers"),
    ],
)
def test_a_worker_that_fails_or_is_killed_names_its_task(task, kind, words):
    with Workers(2) as workers, pytest.raises(kind) as caught:
        list(workers.map(square, [1, task, 2, 4]))
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert not psutil.Process().children()


def test_of_several_failures_the_first_task_s_is_raised():
    for _ in range(3):
        with Workers(2) as workers, pytest.raises(UserError, match="a bad line"):
            list(workers.map(square, [3, 5, 5, 5]))


@pytest.mark.parametrize("count", [0, -1, True])
def test_no_workers_are_refused(count):
    with pytest.raises(UserError, match=f"workers is {count}: give at least 1"):
        Workers(count)


def test_ctrl_c_ends_all_workers(tmp_path):
    code = (
        "import sys; from tests.data.work import wait_for_ever\n"
        "from spectral_window.data.workers import Workers\n"
        "with Workers(2) as workers: list(workers.map(wait_for_ever, sys.argv[1:] * 3))\n"
    )
    parent = python("-c", code, tmp_path, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2, parent)
    parent.send_signal(signal.SIGINT)
    parent.wait()
    assert "KeyboardInterrupt" in parent.stderr.read()
    assert not any(psutil.pid_exists(int(path.name)) for path in tmp_path.iterdir())


def test_workers_end_when_their_parent_is_killed(tmp_path):
    """They end with the task they are at; these wait for one."""
    code = (
        "import sys, os, signal; from tests.data.work import square\n"
        "from spectral_window.data.workers import Workers\n"
        "with Workers(2) as workers:\n"
        "    for _, _, pid in workers.map(square, [1, 2, 4]): open(f'{sys.argv[1]}/{pid}', 'w')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = python("-c", code, tmp_path)
    assert parent.wait() == -signal.SIGKILL
    for path in tmp_path.iterdir():
        while psutil.pid_exists(int(path.name)):
            if psutil.Process(int(path.name)).status() == psutil.STATUS_ZOMBIE:
                break  # nobody here is its parent
