"""The assembler of CUDA 12.8 compiles wrongly for Hopper; where a newer one is, it is used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spectral_window.ops.triton_launch import (
    CHOSEN,
    choose_assembler,
    installed,
    newer_assembler,
)

OTHER = Path("/opt/ptxas")


def test_an_old_assembler_gives_way_to_a_newer_one_and_no_other_choice_is_touched():
    assert newer_assembler(None, "12.8", [OTHER]) == OTHER
    assert newer_assembler("", "12.9", [OTHER]) == OTHER
    assert newer_assembler(None, "12.8", []) is None
    assert newer_assembler(None, "13.0", [OTHER]) is None
    assert newer_assembler("/my/ptxas", "12.8", [OTHER]) is None


def test_the_assembler_of_an_installed_package_is_found_and_triton_is_told(tmp_path, monkeypatch):
    """Where nothing is installed, nothing is found; a file that cannot run is no assembler."""
    knobs = pytest.importorskip("triton.knobs", reason="triton is not installed")
    monkeypatch.setenv(CHOSEN, "")  # so that what the call sets is taken back
    before = installed()
    place = tmp_path / "nvidia" / "cu13" / "bin" / "ptxas"
    place.parent.mkdir(parents=True)
    place.write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed() == before
    place.chmod(0o755)
    assert place in installed()
    monkeypatch.delenv(CHOSEN)
    old = int(knobs.nvidia.ptxas.version.split(".")[0]) < 13
    choose_assembler()
    assert os.environ.get(CHOSEN) == (str(installed()[0]) if old else None)
