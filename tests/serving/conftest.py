"""A tiny real model, and a real server on loopback."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_window import SWHConfig, SWHForCausalLM
from spectral_window.data.tokenizers import load_tokenizer

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed")

END = 256  # <|endoftext|> of the bytes tokenizer
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny(seed: int = 0, **changes: Any) -> SWHForCausalLM:
    torch.manual_seed(seed)
    fields = {
        "vocab_size": 257,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "window": 4,
        "initializer_range": 0.3,
        "bos_token_id": END,
        "eos_token_id": END,
    }
    return SWHForCausalLM(SWHConfig(**{**fields, **changes})).eval()


def bytes_tokenizer(chat: bool = False) -> Any:
    tokenizer = load_tokenizer("bytes")
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_model(folder: Path, **changes: Any) -> Path:
    tiny(**changes).save_pretrained(folder)
    bytes_tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model() -> SWHForCausalLM:
    return tiny()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return bytes_tokenizer(chat=True)


@pytest.fixture
def serve(model, tokenizer):
    """Start a server for the test: `serve(limits=..., sessions=..., api_key=...)` is (its address,
    its service)."""
    from spectral_window.serving.server import in_background
    from spectral_window.serving.service import Service

    with ExitStack() as stack:

        def start(*, api_key: str | None = None, **options: Any) -> tuple[str, Service]:
            given = {"model": model, "tokenizer": tokenizer, "name": "tiny", **options}
            service = Service(given.pop("model"), given.pop("tokenizer"), **given)
            return stack.enter_context(in_background(service, api_key=api_key)), service

        yield start
