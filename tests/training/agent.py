"""torchrun's agent of one machine, whose workers are forked from a process that imported all.

    python -m tests.training.agent OPTIONS FOLDER train RECIPE.yaml --out RUN ...

OPTIONS are fields of torch's LaunchConfig as JSON. What torchrun does between its command line and
its workers is the same; starting a worker takes milliseconds and not seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.training.mortal import run

if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["spectral_window.training.trainer", run.__module__])
    options = {"monitor_interval": 0.1, "start_method": "forkserver", "rdzv_backend": "c10d"}
    launch = elastic_launch(LaunchConfig(**options | json.loads(sys.argv[1])), run)
    try:
        launch(*sys.argv[2:])
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
