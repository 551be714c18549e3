"""The reference run still learns what it learned, on any processor (`reference_run.py` has the
hashes, which hold on one)."""

from __future__ import annotations

import pytest

from tests import reference_run

# of November 2026, one thread on an AMD EPYC (Zen 3)
KNOWN = {
    "paper": {"parameters": 45472, "loss": 4.593968571292972, "packed_loss": 5.568637847900391},
    "attention": {
        "parameters": 45536,
        "loss": 4.672830203249785,
        "packed_loss": 5.602217674255371,
    },
    "memory": {"parameters": 45540, "loss": 4.762818485816602, "packed_loss": 5.574738502502441},
}


def test_losses_and_sizes_are_those_of_the_reference_run():
    found = reference_run.run(list(KNOWN))
    for name, known in KNOWN.items():
        numbers = found[name]["numbers"]
        assert numbers["parameters"] == known["parameters"]
        for loss in ("loss", "packed_loss"):
            assert numbers[loss] == pytest.approx(known[loss], rel=2e-5), (name, loss)
