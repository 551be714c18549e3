"""The benchmark of the preparation compares ids before it times."""

from __future__ import annotations

import os

import torch

from spectral_window.lab.bench import data


def test_all_are_measured_with_the_same_ids_and_other_ids_are_not(monkeypatch):
    monkeypatch.setattr(data, "PROCESSES", (2,))
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)  # other libraries set it
    rows = data.bench_data(torch.float32, quick=True)
    for row in rows:
        assert row["status"] == "ok", row
        assert row["MB_per_s_per_core"] > 0
        assert row["tokens_per_s"] > 0
    names = (data.PREPARE, data.DATASETS, data.MAP)
    assert [(row["processes"], row["contestant"]) for row in rows] == [(2, name) for name in names]
    assert "TOKENIZERS_PARALLELISM" not in os.environ

    def shifted(rows, tokenizer):
        ids = [tokenizer(text)["input_ids"] for text in rows["text"]]
        return {"ids": [[*one[1:], 7] for one in ids]}

    monkeypatch.setattr(data, "_tokenize", shifted)
    monkeypatch.setattr(data, "PROCESSES", (1,))
    rows = data.bench_data(torch.float32, quick=True)
    assert [row["status"] for row in rows] == ["ok", "wrong: other ids", "wrong: other ids"]
