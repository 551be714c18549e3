"""The fresh process of `measure_in_child`: its one argument is the job, as JSON."""

from __future__ import annotations

import json
import sys

from spectral_window.lab.bench import child

child(json.loads(sys.argv[1]))
