"""The roofline of the GPU kernels: what it counts of a layer, and what it compares with.

Its counts of the kernels are compared with compiled code in `tests/ops/test_triton_*.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from spectral_window.cli import main
from spectral_window.hf.model import SWHForCausalLM
from spectral_window.lab.bench import gpu_roofline
from tests.ops.machine_code import moved_in_tiles
from tests.ops.test_triton_delta import KERNELS, build

pytest.importorskip("triton", reason="triton is not installed")
OPS = Path(gpu_roofline.__file__).parents[2] / "ops"


def test_every_kernel_that_is_launched_has_a_row():
    launchers = [
        path for path in OPS.glob("triton_*.py") if not re.search("kernels|grad", path.name)
    ]
    source = "".join(path.read_text() for path in launchers)
    launched = set(re.findall(r"\b(?:forwards|backwards|kernels)\.(\w+)(?:\[|,\s)", source))
    launched |= set(re.findall(r'call\.launch\("(\w+)"', source))
    assert launched >= {"ends", "carry", "outputs", "gradients", "attend_keys", "remember"}
    rows = {row["kernel"].split()[0] for row in gpu_roofline.table()}
    assert launched <= rows


def test_products_are_those_of_the_model():
    config = gpu_roofline.paper("spectral_window")
    with torch.device("meta"):
        model = SWHForCausalLM(config)
    tied = model.get_input_embeddings().weight
    weights = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.dim() == 2 and ".kernel." not in name and p is not tied
    )
    works = config.num_hidden_layers * gpu_roofline.layer(config, 2, 64)
    works += gpu_roofline.ends(config, 2, 64)
    products = [work for work in works if work.part == "products" or work.name == "head"]
    assert sum(work.tensor for work in products if not work.backward) == 2 * 128 * weights
    assert sum(work.tensor for work in products if work.backward) == 4 * 128 * weights


def test_shares_of_a_layer_add_up_to_its_least_time():
    rows = [row for row in gpu_roofline.table(2, 256) if "W=128" not in row["kernel"]]
    layer = next(
        row
        for row in gpu_roofline.sums(2, 256)
        if (row["what"], row["mixer"], row["window"]) == ("layer", "memory", 32)
    )
    own = [row for row in rows if row["part"] != "once"]
    assert sum(row["share"] for row in own) == pytest.approx(1, rel=1e-3)
    assert sum(row["microseconds"] for row in own) == pytest.approx(layer["microseconds"], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_what_the_memorys_compiled_kernels_load_and_store_is_counted(name, dtype):
    """Triton's optimised form of a kernel loads tiles, so the bytes of every load are known, and so
    are the trips of the loops over K and V. `scan` and `retreat` loop over chunks: what stands in
    that loop is a trip's, and outside it are the first and the last state. Times the programs of a
    chunk this is what the table counts per chunk, to the byte."""
    batch, time, heads, size = 16, 1024, 6, 128
    compiled, cut = build(name, "sm_90", dtype=dtype, key=size, value=size)
    found = moved_in_tiles(compiled.asm["ttir"])
    work = next(
        each for each in gpu_roofline.memory(batch, time, heads, size, dtype) if each.name == name
    )
    chunks, state = batch * heads * time // 64, 4 * size * size
    programs = 1 if name in ("prepare", "gradients") else size // cut.columns
    follows = name in ("scan", "retreat")
    inside = " in a loop" if follows else ""
    assert programs * found["load" + inside] == (work.read + work.again) / chunks
    if follows:
        assert programs * found["load"] == programs * found["store"] == state
    last = batch * heads * state if follows else 0
    assert programs * found["store" + inside] == (work.written - last) / chunks


@pytest.fixture
def measured(tmp_path):
    """A folder of results: an H100's, a dry run's and another card's."""
    operator = {"contestant": "triton, CUDA graph", "shape": [1, 512, 64], "dtype": "float32"}
    step = {"batch": 2, "length": 256, "milliseconds": 3.0}
    rows = {
        "spectral": [
            {**operator, "direction": "forward", "milliseconds": 0.5, "status": "ok"},
            {**operator, "direction": "both", "status": "failed"},
            {"what": "T=1", "good": True},
        ],
        "train": [
            {**step, "contestant": "SWH, as called"},
            {**step, "contestant": "SWH, graph", "milliseconds": 2.0},
            {**step, "contestant": "SWH, plain methods, as called", "milliseconds": 1.0},
            {**step, "contestant": "SWH with memory", "milliseconds": 9.0},
            {"status": "out of time"},
        ],
    }
    for folder, dry, card in (("a", False, "H100"), ("b", True, "H100"), ("c", False, "A100")):
        (tmp_path / folder).mkdir()
        for part, content in rows.items():
            about = {"environment": {"processor": f"NVIDIA {card}"}, "dry_run": dry}
            (tmp_path / folder / f"{part}.json").write_text(json.dumps(about | {"rows": content}))
    return tmp_path


def test_only_what_an_h100_measured_stands_beside_its_least(measured):
    (row,) = gpu_roofline.compare(measured)
    works = gpu_roofline.convolution(1, 512, 64, torch.float32)
    floor = gpu_roofline.least([work for work in works if not work.backward])
    assert row["how"] == "graph"
    assert row["times"] == pytest.approx(0.5e-3 / floor, rel=0.01)
    sums = gpu_roofline.sums(2, 256, folder=measured)
    (step,) = [row for row in sums if "times" in row]
    assert (step["mixer"], step["window"], step["how"]) == ("spectral_window", 32, "graph")
    assert step["times"] == pytest.approx(2000 / step["microseconds"], rel=0.01)


def test_the_command_shows_it(capsys, measured):
    words = ["bench", "--roofline", "--shape", "2x256", "--out", str(measured)]
    assert main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["shape"] == [2, 256]
    assert shown["dtypes"]["bfloat16"]["kernels"] == gpu_roofline.table(2, 256)
    assert len(shown["measured"]) == 1
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "attend_queries" in text
    assert "AdamW" in text


@pytest.mark.parametrize("shape", ["16", "0x5", "16x-1", "x"])
def test_a_shape_that_is_none_is_refused(shape, capsys):
    assert main(["bench", "--roofline", "--shape", shape]) == 2
    assert "16x1024" in capsys.readouterr().err
