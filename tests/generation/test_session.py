"""Promises of generation/: the same text however it is made."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import resource

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_window import SWHConfig, SWHForCausalLM
from spectral_window.data.tokenizers import byte_alphabet, load_tokenizer
from spectral_window.errors import DivergedError, IntegrityError, ResourceError, UserError
from spectral_window.generation import decoding, session_file
from spectral_window.generation import session as generate
from spectral_window.generation.decoding import Sampling, StopFilter, TextStream, check_stops
from spectral_window.generation.session import Session

WORDS = ["héllo wörld 世界 🎉👩‍👩‍👧 \ufffd the cat sat on the mat\n"] * 20
TOKENIZERS = {
    "bytes": load_tokenizer("bytes"),
    "bpe": load_tokenizer("bpe:300", train_texts=WORDS),
    "gpt2": load_tokenizer("gpt2"),
}
END = 256  # <|endoftext|> of the bytes tokenizer


def tiny(seed: int = 0, **changes) -> SWHForCausalLM:
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


@pytest.fixture(scope="module")
def model() -> SWHForCausalLM:
    return tiny()


@pytest.fixture(scope="module")
def tokenizer():
    return TOKENIZERS["bytes"]


def begun(model, tokenizer, prompt="hello world", **options) -> Session:
    session = Session(model, tokenizer, **{"seed": 1, **options})
    session.feed(prompt)
    return session


def text(session: Session, n: int, **options) -> str:
    return "".join(session.stream(n, **{"ignore_eos": True, **options}))


# ------------------------------------------------------------------------------- drawing a token


def draws(logits, count=4000, **sampling) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = [Sampling(**sampling).draw(logits, generator) for _ in range(count)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / count


def test_temperature_1_draws_from_the_models_own_distribution():
    logits = torch.tensor([2.0, 0.0, 1.0, -math.inf, -1.0])
    expected = logits.softmax(0)
    frequency = draws(logits, temperature=1.0)
    assert frequency[3] == 0
    assert (frequency - expected).abs().max() < 4 * 0.5 / math.sqrt(4000)


def test_temperature_divides_the_logits():
    logits = torch.tensor([2.0, 0.0, 1.0])
    frequency = draws(logits, temperature=0.5)
    assert (frequency - (logits / 0.5).softmax(0)).abs().max() < 4 * 0.5 / math.sqrt(4000)


def test_top_k_and_top_p_keep_the_likeliest_only():
    logits = torch.tensor([0.1, 3.0, 2.0, 1.0]).log_softmax(0)
    assert draws(logits, temperature=1.0, top_k=2)[[0, 3]].sum() == 0
    assert draws(logits, temperature=1.0, top_k=2)[2] > 0
    # probabilities about .63 .23 .09 .04: the token that crosses top_p is the last to stay
    kept = draws(logits, temperature=1.0, top_p=0.7)
    assert kept[[0, 3]].sum() == 0
    assert kept[2] > 0
    assert draws(logits, temperature=1.0, top_p=1e-9)[1] == 1
    assert draws(logits, temperature=1.0, top_k=1)[1] == 1


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize(
    "sampling", [{}, {"top_p": 0.5}, {"top_p": 0.999}, {"top_k": 2000}, {"top_k": 7, "top_p": 0.9}]
)
def test_a_large_vocabulary_is_drawn_from_as_if_all_of_it_were_sorted(sampling, equal, monkeypatch):
    """The 1,000 likeliest of 5,000 tokens hold a part of the odds, so both ways are taken."""
    logits = 2 * torch.randn(5000, generator=torch.Generator().manual_seed(1))
    logits = logits.round() if equal else logits  # and many as likely as others

    def drawn(likeliest: int) -> list[int]:
        monkeypatch.setattr(decoding, "LIKELIEST", likeliest)
        generator = torch.Generator().manual_seed(2)
        rule = Sampling(temperature=1.0, **sampling)
        return [rule.draw(logits, generator) for _ in range(300)]

    found = drawn(1000)
    assert found == drawn(len(logits))
    assert len(set(found)) > 4


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 5e-324])
def test_a_temperature_towards_0_is_greedy_and_never_nan(temperature):
    logits = torch.tensor([-50.0, 50.0, 49.0, -math.inf])
    assert draws(logits, count=20, temperature=temperature)[1] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": True},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": 258},
        {"max_new_tokens": -1},
        {"max_new_tokens": 10**12},
        {"max_new_tokens": 2.0},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": ["x" * 10_000]},
        {"stop": [str(i) for i in range(1000)]},
    ],
)
def test_a_setting_out_of_range_is_refused_before_the_first_piece(model, tokenizer, wrong):
    session = begun(model, tokenizer)
    arguments = {"max_new_tokens": 1, **wrong}
    with pytest.raises(UserError, match=r"\(.*\): "):
        session.stream(**arguments)  # not even iterated


# ------------------------------------------------------------------------------- tokens to text


def byte_token(tokenizer, byte: int) -> int:
    return tokenizer.convert_tokens_to_ids(byte_alphabet()[byte])


def some_tokens(name: str, seed: int) -> list[int]:
    """Random tokens; or tokens of real text; or bytes that are mostly broken UTF-8."""
    tokenizer, draw = TOKENIZERS[name], random.Random(seed)
    kind, count = draw.randrange(3), draw.randrange(120)
    if kind == 0:
        return [draw.randrange(len(tokenizer)) for _ in range(count)]
    if kind == 1:
        return tokenizer(WORDS[0] * 3)["input_ids"][draw.randrange(5) :][:count]
    broken = [0xF0, 0x9F, 0x98, 0x80, 0xE2, 0x82, 0xAC, 0x41, 0xFE, 0xC3, 0xED, 0xA0]
    return [byte_token(tokenizer, draw.choice(broken)) for _ in range(count)]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(seed=st.integers(0, 2**32))
def test_pieces_joined_are_the_decoded_text_whatever_the_tokens(name, seed):
    tokenizer, tokens = TOKENIZERS[name], some_tokens(name, seed)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    assert len(stream.window) <= 2 * TextStream.WINDOW
    plain = [token for token in tokens if token not in tokenizer.all_special_ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(plain)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 120))
def test_a_stream_that_starts_after_a_prompt_shows_the_rest_only(name, seed, cut):
    tokenizer = TOKENIZERS[name]
    tokens = [t for t in some_tokens(name, seed) if t not in tokenizer.all_special_ids]
    prompt, rest = tokens[:cut], tokens[cut:]
    stream = TextStream(tokenizer)
    stream.skip(prompt)
    shown = "".join(stream.push(token) for token in rest) + stream.finish()
    whole = tokenizer.decode(tokens)
    assert whole.endswith(shown)
    assert len(whole) - len(shown) <= len(tokenizer.decode(prompt))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_piece_holds_half_a_character(name):
    tokenizer = TOKENIZERS[name]
    clean = WORDS[0].replace("\ufffd", "") * 3
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer(clean)["input_ids"]]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == clean
    assert sum(map(bool, pieces)) > 20  # and it does come piece by piece


def first_stop(text: str, stops: list[str]) -> str:
    """The rule, said naively: read letter by letter until a stop string is complete."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@settings(deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_are_exact_however_the_text_is_cut(pieces, stops):
    stream, shown = StopFilter(stops), ""
    for piece in pieces:
        shown += stream.push(piece)
        if stream.stop is not None:
            break
    else:
        shown += stream.finish()
    assert shown == first_stop("".join(pieces), stops)


def test_only_what_may_become_a_stop_string_is_held_back():
    stream = StopFilter(["</end>"])
    assert stream.push("a < b </e") == "a < b "
    assert stream.push("x") == "</ex"
    assert stream.push("</end") == ""
    assert stream.push("> more") == ""
    assert stream.stop == "</end>"


def test_one_stop_string_may_be_given_without_a_list():
    assert check_stops("\n\n") == ("\n\n",)


# ------------------------------------------------------------------------------- a session


@pytest.mark.parametrize("mixer", ["spectral_window", "attention"])
@pytest.mark.parametrize("segment", [1, 3, 7, 4096])
def test_greedy_text_is_that_of_transformers_generate_whatever_the_segments(mixer, segment):
    model, tokenizer = tiny(mixer=mixer), TOKENIZERS["bytes"]
    ids = torch.tensor([[END, *b"the quick brown fox"]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False,
        eos_token_id=None, pad_token_id=END,
    )  # fmt: skip
    session = begun(model, tokenizer, "the quick brown fox", segment=segment)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert text(session, 40, temperature=0) == expected


def test_a_seed_repeats_the_text_and_another_does_not(model, tokenizer):
    first, again, other = (text(begun(model, tokenizer, seed=s), 50) for s in (3, 3, 4))
    assert first == again != other


def test_a_fresh_seed_is_kept_so_that_a_run_can_be_repeated(model, tokenizer):
    session = begun(model, tokenizer, seed=None)
    assert session.seed != begun(model, tokenizer, seed=None).seed
    assert text(session, 30) == text(begun(model, tokenizer, seed=session.seed), 30)


@pytest.mark.parametrize("cut", [0, 1, 2, 17, 49, 50])
def test_two_streams_are_one_stream(model, tokenizer, cut):
    whole = text(begun(model, tokenizer), 50)
    session = begun(model, tokenizer)
    assert text(session, cut, finish=False) + text(session, 50 - cut) == whole


def test_a_reader_may_leave_after_any_piece_and_go_on(model, tokenizer):
    # Pieces of the cut-off stream are single tokens here, so count what it took.
    whole = text(begun(model, tokenizer), 60)
    for leave in (1, 2, 5, 11):
        session = begun(model, tokenizer)
        before, got = session.tokens_seen, ""
        for number, piece in enumerate(session.stream(60, ignore_eos=True), 1):
            got += piece
            if number == leave:
                break
        taken = session.tokens_seen - before
        assert got + text(session, 60 - taken) == whole


def test_ctrl_c_inside_a_forward_leaves_the_session_whole(model, tokenizer):
    """Layer 0 had moved on and layer 1 had not: the cache was half a step ahead."""
    whole = text(begun(model, tokenizer), 20)
    session = begun(model, tokenizer)
    got = text(session, 7, finish=False)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            text(session, 1)
        with pytest.raises(KeyboardInterrupt):
            session.feed("never read")
    finally:
        handle.remove()
    assert got + text(session, 13) == whole


def test_sessions_do_not_touch_each_other(model, tokenizer):
    alone = [text(begun(model, tokenizer, prompt), 30) for prompt in ("one", "two")]
    streams = [
        begun(model, tokenizer, prompt).stream(30, ignore_eos=True) for prompt in ("one", "two")
    ]
    got = ["", ""]
    running = {0, 1}
    while running:
        for index in sorted(running):
            piece = next(streams[index], None)
            if piece is None:
                running.discard(index)
            else:
                got[index] += piece
    assert got == alone


def test_end_of_text_ends_it_and_more_input_goes_on(model, tokenizer):
    session = begun(model, tokenizer)
    list(session.stream(20_000, temperature=5.0))  # nearly uniform: it says end-of-text some day
    assert session.ended
    assert list(session.stream(10)) == []
    before = session.tokens_seen
    assert session.feed(" sat") == 4
    assert not session.ended
    assert session.tokens_seen == before + 4
    # The state has seen all but the newest token, and never the end-of-text.
    assert session.row.state_seen == session.tokens_seen - 1


def test_ignore_eos_goes_on(model, tokenizer):
    ended, session = begun(model, tokenizer), begun(model, tokenizer)
    list(ended.stream(1500, temperature=5.0))
    assert ended.ended
    before = session.tokens_seen
    text(session, 1500, temperature=5.0)
    assert session.tokens_seen - before == 1500
    assert not session.ended


def test_stop_strings_end_the_text_before_them(model, tokenizer):
    whole = text(begun(model, tokenizer), 80)
    for start, length in ((3, 1), (10, 4), (25, 7)):
        stop = whole[start : start + length]
        session = begun(model, tokenizer)
        assert text(session, 80, stop=[stop, "never in it \n\n\n"]) == whole[: whole.index(stop)]


def test_no_new_tokens_is_no_text(model, tokenizer):
    session = begun(model, tokenizer)
    assert text(session, 0) == ""
    assert text(session, 5) == text(begun(model, tokenizer), 5)


def test_a_text_begins_as_in_training_with_the_beginning_token_once(model, tokenizer):
    by_text, by_ids = begun(model, tokenizer, "abc"), Session(model, tokenizer, seed=1)
    by_ids.feed([END, *b"abc"])
    assert by_text.tokens_seen == by_ids.tokens_seen == 4
    assert text(by_text, 30) == text(by_ids, 30)
    by_text.feed("def")
    by_ids.feed(list(b"def"))
    assert text(by_text, 30) == text(by_ids, 30)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_that_a_user_types_are_plain_text(name):
    tokenizer = TOKENIZERS[name]
    ids = generate.encode(tokenizer, "a<|endoftext|>b")
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    prompt=st.text(st.sampled_from("ab  \n\t.,'世🎉"), max_size=80),
    piece=st.integers(1, 9),
)
def test_a_long_prompt_encoded_by_pieces_has_the_tokens_of_the_whole(name, prompt, piece):
    tokenizer = TOKENIZERS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "PIECE", piece)
        assert generate.encode(tokenizer, prompt) == tokenizer(prompt)["input_ids"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ([5, -1], "token 1 is -1"),
        ([257], "token 0 is 257"),
        ([1.5], "whole numbers"),
        ([True], "whole numbers"),
    ],
)
def test_a_bad_prompt_is_refused(model, tokenizer, prompt, message):
    with pytest.raises(UserError, match=message):
        Session(model, tokenizer).feed(prompt)


def test_nothing_to_continue_is_said(model, tokenizer):
    with pytest.raises(UserError, match="feed a prompt"):
        Session(model, tokenizer).stream(5)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True, "7"])
def test_a_bad_seed_is_refused(model, tokenizer, seed):
    with pytest.raises(UserError, match="seed"):
        Session(model, tokenizer, seed=seed)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer):
    with pytest.raises(UserError, match="tokenizer has 257 tokens, the model 200"):
        Session(tiny(vocab_size=200, bos_token_id=None, eos_token_id=None), tokenizer)


def test_rows_of_a_rounded_up_vocabulary_are_never_drawn(tokenizer):
    model = tiny(vocab_size=320)
    with torch.no_grad():
        model.lm_head.weight[257:] *= 100
    session = begun(model, tokenizer)
    text(session, 200, temperature=1.0)
    assert all(token < 257 for token in session.text.window)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logits_that_are_not_finite_name_the_step(tokenizer, poison):
    model = tiny()
    session = begun(model, tokenizer)
    stream = session.stream(10, ignore_eos=True)
    next(stream)
    with torch.no_grad():
        model.lm_head.weight[7] = poison
    with pytest.raises(DivergedError, match=r"non-finite logits at step \d+"):
        list(stream)


def test_bfloat16_models_generate_and_continue(tokenizer, tmp_path):
    model = tiny().to(torch.bfloat16)
    whole = text(begun(model, tokenizer), 30)
    session = begun(model, tokenizer)
    first = text(session, 11, finish=False)
    session.save(tmp_path / "s")
    assert first + text(Session.load(tmp_path / "s", model, tokenizer), 19) == whole


def test_the_short_way_is_the_long_way(model, tokenizer):
    expected = text(begun(model, tokenizer, "abc", seed=5), 25, top_k=9)
    made = generate.generate(model, tokenizer, "abc", 25, seed=5, top_k=9, ignore_eos=True)
    assert made == expected


# ------------------------------------------------------------------------------- constant memory


def test_memory_does_not_grow_with_the_text(model, tokenizer):
    session = begun(model, tokenizer)
    text(session, 20)
    before = session.state_bytes
    for _ in session.stream(2000, ignore_eos=True, temperature=1.5):
        assert len(session.text.window) <= 2 * TextStream.WINDOW
        assert len(session.tail) == 0
    assert session.state_bytes == before
    assert session.tokens_seen > 2000
    # What the model promises, besides the logits' and the generator's own bytes:
    own = sum(t.nbytes for name, t in session._tensors() if name.startswith("layers"))
    assert own == model.state_bytes(2000) == model.state_bytes(20)


def test_the_transformer_baseline_does_grow(tokenizer):
    session = begun(tiny(mixer="attention"), tokenizer)
    before = session.state_bytes
    text(session, 100)
    assert session.state_bytes > 2 * before


@pytest.mark.slow
def test_the_process_does_not_grow_over_twenty_thousand_tokens(model, tokenizer):
    session = begun(model, tokenizer)
    text(session, 2000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text(session, 20_000)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 4096  # kB


# ------------------------------------------------------------------------------- the session file


CHANGES = [
    {},
    {"mixer": "attention"},
    {"branches": ("spectral",)},
    {"branches": ("window",)},
    {"tie_word_embeddings": True},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("cut", [0, 1, 23])
def test_a_saved_session_goes_on_as_if_never_stopped(changes, cut, tokenizer, tmp_path):
    model = tiny(**changes)
    whole = text(begun(model, tokenizer), 50)
    session = begun(model, tokenizer)
    first = text(session, cut, finish=False)
    session.save(tmp_path / "talk.session")
    loaded = Session.load(tmp_path / "talk.session", model, tokenizer)
    assert loaded.tokens_seen == session.tokens_seen
    assert loaded.seed == session.seed
    assert first + text(loaded, 50 - cut) == whole


def test_half_a_character_and_half_a_stop_string_are_kept(tokenizer, tmp_path):
    model = tiny()
    prompt = [END, *"世".encode()[:2]]  # the prompt itself ends within a character
    whole, parts = Session(model, tokenizer, seed=2), Session(model, tokenizer, seed=2)
    whole.feed(prompt)
    expected = text(whole, 60, stop=["zz"])
    parts.feed(prompt)
    got = ""
    for _ in range(60):
        got += text(parts, 1, finish=False, stop=["zz"])
        parts.save(tmp_path / "s")
        parts = Session.load(tmp_path / "s", model, tokenizer)
    assert got + parts.finish() == expected


def test_a_session_that_ended_stays_ended(tokenizer, tmp_path):
    model = tiny()
    session = begun(model, tokenizer)
    list(session.stream(20_000, temperature=5.0))
    assert session.ended
    session.save(tmp_path / "s")
    loaded = Session.load(tmp_path / "s", model, tokenizer)
    assert loaded.ended
    assert list(loaded.stream(5)) == []
    for each in (session, loaded):
        each.feed(" and then")
    assert text(session, 20) == text(loaded, 20)


@pytest.fixture
def saved(model, tokenizer, tmp_path):
    path = tmp_path / "talk.session"
    session = begun(model, tokenizer)
    text(session, 9)
    session.save(path)
    return path


@pytest.mark.parametrize("changes", [{"seed": 1}, {"window": 2}, {"num_attention_heads": 4}])
def test_a_session_of_another_model_is_refused(saved, tokenizer, changes):
    with pytest.raises(IntegrityError, match="another model"):
        Session.load(saved, tiny(**changes), tokenizer)


def test_a_session_of_the_same_model_loaded_again_is_not_refused(saved, model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    again = SWHForCausalLM.from_pretrained(tmp_path / "model")
    assert text(Session.load(saved, again, tokenizer), 9)


def test_a_session_of_another_tokenizer_is_refused(model, saved):
    small = load_tokenizer("bpe:257", train_texts=WORDS)
    with pytest.raises(IntegrityError, match="another tokenizer"):
        Session.load(saved, model, small)


def test_every_flipped_bit_is_found(saved, model, tokenizer):
    content = bytearray(saved.read_bytes())
    draw = random.Random(0)
    for position in draw.sample(range(8 * len(content)), 150):
        broken = bytearray(content)
        broken[position // 8] ^= 1 << position % 8
        saved.write_bytes(broken)
        with pytest.raises(IntegrityError):
            Session.load(saved, model, tokenizer)
    saved.write_bytes(content)
    Session.load(saved, model, tokenizer)


def test_every_truncation_is_found(saved, model, tokenizer):
    content = saved.read_bytes()
    for length in [0, 1, 7, 8, 9, *range(10, len(content), len(content) // 40), len(content) - 1]:
        saved.write_bytes(content[:length])
        with pytest.raises(IntegrityError):
            Session.load(saved, model, tokenizer)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was opened",))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Bomb()),
        b"",
        b"{}",
        b"\xff" * 100,
        safetensors.torch.save({"x": torch.zeros(2)}),
        safetensors.torch.save({"x": torch.zeros(2)}, {session_file.HEADER: "[" * 100_000}),
        safetensors.torch.save({"x": torch.zeros(2)}, {session_file.HEADER: "[1]"}),
        safetensors.torch.save({"x": torch.zeros(2)}, {session_file.HEADER: '{"schema": 1}'}),
    ],
    ids=range(8),
)
def test_what_is_no_session_is_refused_and_never_unpickled(content, model, tokenizer, tmp_path):
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(IntegrityError):
        Session.load(tmp_path / "s", model, tokenizer)


def test_a_newer_schema_is_refused_by_name(saved, model, tokenizer):
    summary, tensors = session_file.read(saved)
    header = {session_file.HEADER: json.dumps({**summary, "schema": 99})}
    saved.write_bytes(safetensors.torch.save(tensors, header))
    with pytest.raises(IntegrityError, match="newer"):
        Session.load(saved, model, tokenizer)


def test_a_state_of_the_wrong_shape_is_refused_even_when_its_hash_is_right(saved, model, tokenizer):
    summary, tensors = session_file.read(saved)
    name = "layers.0.spectral"
    for changed in (tensors[name][:, :1], tensors[name].float().half(), None):
        altered = {k: v for k, v in tensors.items() if k != name}
        if changed is not None:
            altered[name] = changed.contiguous()
        session_file.write(saved, summary, altered)
        with pytest.raises(IntegrityError, match="does not fit"):
            Session.load(saved, model, tokenizer)


def test_a_session_never_takes_the_place_of_a_device_or_a_folder(model, tokenizer, tmp_path):
    """Found by `--save-session /dev/full`: the rename had replaced the device by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(UserError, match="not a regular file"):
            begun(model, tokenizer).save(path)
    assert pipe.is_fifo()


def test_no_file_is_said(model, tokenizer, tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError, match="no session file"):
            Session.load(path, model, tokenizer)


def test_a_session_that_cannot_be_written_leaves_nothing_and_the_old_one(
    saved, model, tokenizer, tmp_path
):
    with pytest.raises(UserError, match="no such folder"):
        begun(model, tokenizer).save(tmp_path / "no" / "such" / "file")
    before = saved.read_bytes()
    session = begun(model, tokenizer)  # beforehand: compiling writes files too
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a disk that is full after 1000 bytes
    try:
        with pytest.raises(ResourceError, match="cannot write"):
            session.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


def test_fingerprints_that_the_caller_took_once_are_those_of_the_file(model, tokenizer, tmp_path):
    owner = session_file.Owner.of(model, tokenizer)
    session = begun(model, tokenizer)
    session.save(tmp_path / "a", owner=owner)
    assert text(Session.load(tmp_path / "a", model, tokenizer), 9) == text(session, 9)
    Session.load(tmp_path / "a", model, tokenizer, owner=owner)
    with pytest.raises(IntegrityError, match="another tokenizer"):
        Session.load(tmp_path / "a", model, tokenizer, owner=owner._replace(tokenizer="0"))
