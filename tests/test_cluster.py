"""The job files of examples/cluster. No cluster is here: the shell scripts run with stand-ins for
SLURM's commands and torchrun, and what they start is parsed by torchrun and by our own program."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from spectral_window.cli.program import load_command
from spectral_window.training.recipes import resolve

CLUSTER = Path(__file__).parent.parent / "examples" / "cluster"
SLURM = (CLUSTER / "slurm.sh").read_text(encoding="utf-8")
CLAIM, JOBSET = yaml.safe_load_all((CLUSTER / "jobset.yaml").read_text(encoding="utf-8"))
POD = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]

STANDINS = {
    "torchrun": 'printf "%s\\n" "$@" > "$LOG/torchrun"',
    # `srun` runs until it is signalled, if the job is to be preempted; its parent is the job
    "srun": """
        echo $$ > "$LOG/srun"
        trap 'echo saved >> "$LOG/events"; exit 143' TERM
        "$@"
        if [[ $PREEMPTED == no ]]; then exit "$CODE"; fi
        kill -TERM $PPID
        while :; do sleep 0.02; done""",
    "scancel": 'echo "scancel $*" >> "$LOG/events"; kill -TERM "$(cat "$LOG/srun")"',
    "scontrol": """
        if [[ $1 == show ]]; then printf 'node-a\\nnode-b\\n'
        else echo "scontrol $*" >> "$LOG/events"; fi""",
}


class Cluster:
    """A folder as the shared one of a cluster, and commands that stand in for its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.log.mkdir()
        (folder / "bin").mkdir()
        for name, text in STANDINS.items():
            path = folder / "bin" / name
            path.write_text(f"#!/usr/bin/env bash\n{text}\n")
            path.chmod(0o755)

    def run(self, script: str, code: int = 0, preempted: str = "no") -> int:
        activate = self.folder / "spectral-window" / ".venv" / "bin" / "activate"
        activate.parent.mkdir(parents=True, exist_ok=True)
        activate.write_text("")
        slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "8", "SLURM_JOB_NODELIST": "node-[a-b]"}
        environment = os.environ | slurm | {"LOG": str(self.log), "CODE": str(code)}
        environment |= {"PREEMPTED": preempted}
        environment["PATH"] = f"{self.folder / 'bin'}:{environment['PATH']}"
        script = script.replace("/shared", str(self.folder))
        return subprocess.run(["bash", "-c", script], env=environment, cwd=self.folder).returncode

    def started(self) -> list[str]:
        return (self.log / "torchrun").read_text().splitlines()

    def events(self) -> list[str]:
        path = self.log / "events"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path)


def of_kubernetes() -> str:
    (container,) = POD["containers"]
    assert container["command"] == ["bash", "-ceu"]
    (script,) = container["args"]
    return f"set -eu\n{script}"


SCRIPTS = {"slurm": SLURM, "kubernetes": of_kubernetes()}
every_script = pytest.mark.parametrize("name", SCRIPTS)


@every_script
def test_what_it_starts_is_a_training_that_torchrun_and_train_understand(cluster, name):
    assert cluster.run(SCRIPTS[name]) == 0
    launch = get_args_parser().parse_args(cluster.started())
    assert (launch.nnodes, launch.nproc_per_node) == ("8", "8")
    assert launch.rdzv_backend == "c10d"
    assert launch.rdzv_endpoint.endswith(":29400")
    assert (launch.module, launch.training_script) == (True, "spectral_window")
    command, *words = launch.training_script_args
    parsed = load_command(command)
    with parsed.make_context(command, list(words), resilient_parsing=False) as context:
        given = context.params
    assert not given["resume"]
    recipe = resolve(given["recipe"], given["overrides"])
    processes = 8 * int(launch.nproc_per_node)
    groups = processes // recipe.context_parallel
    assert recipe.batch_size % (groups * recipe.micro_batch_size) == 0
    assert (recipe.shard, recipe.dtype, recipe.device) == ("full", "bfloat16", "cuda")


@every_script
def test_the_same_command_goes_on_with_a_run_that_is_there(cluster, name):
    run = cluster.folder / "runs" / "large"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    assert cluster.run(SCRIPTS[name]) == 0
    assert cluster.started()[-1] == "--resume"


def test_slurm_a_job_that_must_go_saves_first_and_is_queued_again(cluster):
    assert cluster.run(SLURM, preempted="yes") == 143
    assert cluster.events() == ["scancel --signal=TERM 7.0", "saved", "scontrol requeue 7"]


def test_slurm_a_training_that_fails_is_not_queued_again(cluster):
    assert cluster.run(SLURM, code=3) == 3
    assert cluster.events() == []


def test_slurm_a_process_has_longer_to_save_than_torchrun_gives_it(cluster):
    """SIGTERM arrives before the time ends, by more than torchrun waits; and the job may return."""
    options = [line.split()[1] for line in SLURM.splitlines() if line.startswith("#SBATCH ")]
    assert {"--requeue", "--signal=B:TERM@300", "--open-mode=append", "--nodes=8"} <= set(options)
    cluster.run(SLURM)
    assert get_args_parser().parse_args(cluster.started()).shutdown_timeout < 300


def test_kubernetes_all_pods_start_again_together_and_have_time_to_save(cluster):
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = JOBSET["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (spec["completionMode"], spec["backoffLimit"]) == ("Indexed", 0)
    assert POD["restartPolicy"] == "Never"
    assert JOBSET["spec"]["failurePolicy"]["maxRestarts"] > 0
    cluster.run(SCRIPTS["kubernetes"])
    launch = get_args_parser().parse_args(cluster.started())
    assert launch.shutdown_timeout < POD["terminationGracePeriodSeconds"]
    assert spec["parallelism"] == spec["completions"] == int(launch.nnodes)
    # pod 0 of the job, by the name that JobSet gives it
    name = JOBSET["metadata"]["name"]
    assert launch.rdzv_endpoint.split(":")[0] == f"{name}-{job['name']}-0-0.{name}"
    (container,) = POD["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(launch.nproc_per_node)


def test_kubernetes_pods_mount_what_is_there(cluster):
    (container,) = POD["containers"]
    assert {each["name"] for each in container["volumeMounts"]} == {
        each["name"] for each in POD["volumes"]
    }
    claims = [v["persistentVolumeClaim"] for v in POD["volumes"] if "persistentVolumeClaim" in v]
    assert [claim["claimName"] for claim in claims] == [CLAIM["metadata"]["name"]]
    assert CLAIM["kind"] == "PersistentVolumeClaim"
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]
