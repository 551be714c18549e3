"""`spectral-window warm-up`: what it promises is that later commands compile nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

from numba.core.caching import UserProvidedCacheLocator

from spectral_window.ops.compiled import ahead

SOURCE = Path(ahead.__file__)


def child(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SOURCE.parents[3])} | environment,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A folder as `warm-up` leaves it. Compiling everything takes minutes, so the files are copied
    from where all tests have them."""
    ahead.compile_all()
    cache = tmp_path_factory.mktemp("numba")
    place = cache / UserProvidedCacheLocator.get_suitable_cache_subpath(str(SOURCE))
    place.mkdir()
    for kernel in ahead.package_kernels().values():
        shutil.copy(kernel.compiled.file, place)
    return cache


def stored(cache: Path, kernel: str = "") -> set[Path]:
    return {path for path in cache.rglob("*.nbc") if path.name.startswith(kernel)}


def test_what_is_missing_is_compiled_and_nothing_else(cache):
    everything = set(ahead.package_kernels())
    (path,) = stored(cache, "pointwise._swiglu-")
    path.unlink()
    for missing in ({"pointwise._swiglu"}, set()):
        done = child("-m", "spectral_window", "warm-up", "--json", NUMBA_CACHE_DIR=str(cache))
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert set(said["compiled"]) == missing
        assert set(said["stored_before"]) == everything - missing
        assert said["folders"] == [str(path.parent)]
        assert all(seconds > 0 for seconds in said["compiled"].values())
        assert path.exists()


REAL = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
from spectral_window import SWHConfig, SWHForCausalLM
from spectral_window.hf.rehearsal import rehearse
from spectral_window.ops.compiled.threads import KERNELS

sizes = {"hidden_size": 64, "vocab_size": 99, "num_hidden_layers": 2}
for mixer in ("memory", "spectral_window"):
    for dtype in (torch.float32, torch.bfloat16):
        model = SWHForCausalLM(SWHConfig(mixer=mixer, **sizes))
        tokens = torch.randint(99, (3, 150))
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            model(tokens, labels=tokens).loss.backward()
        torch.nn.Module.to(model, dtype).generate(tokens[:, :70], max_new_tokens=3)
called = {name for name, kernel in KERNELS.items() if kernel.compiled}
for mixer in ("memory", "spectral_window"):
    rehearse(SWHConfig(mixer=mixer, **sizes))
rehearsed = {name for name, kernel in KERNELS.items() if kernel.compiled}
assert called and called == rehearsed, called ^ rehearsed
"""


def test_after_it_training_and_generating_compile_nothing(cache):
    """And call the kernels that a rehearsal of their config calls, which `warm-up MODEL` does."""
    before = stored(cache)
    done = child("-c", REAL, NUMBA_CACHE_DIR=str(cache))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert stored(cache) == before


def test_where_nothing_can_be_stored_it_says_what_to_do(tmp_path):
    """A read-only home: every start would compile again, so warming up has not worked."""
    blocked = tmp_path / "a file"
    blocked.write_text("")
    locators = {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    done = child("-m", "spectral_window", "warm-up", NUMBA_CACHE_DIR=str(blocked), **locators)
    assert done.returncode == 5
    assert "cannot be stored" in done.stderr.splitlines()[-1]
    assert "set NUMBA_CACHE_DIR" in done.stderr.splitlines()[-1]
