"""Promises of named sessions: a text goes on from request to request, in constant bytes."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
from pathlib import Path

import httpx
import pytest

from spectral_window.errors import IntegrityError, UserError
from spectral_window.generation.session import Session
from spectral_window.serving.service import Limits
from spectral_window.serving.sessions import NoSuchSession, SessionBusy, Sessions
from tests.serving.conftest import END, bytes_tokenizer, tiny
from tests.serving.test_http import NO_DEADLINE, post, until


@pytest.fixture
def store(tmp_path, model, tokenizer):
    with contextlib.closing(Sessions(tmp_path / "sessions", model, tokenizer)) as sessions:
        yield sessions


# ------------------------------------------------------------------------------- over HTTP


def go_on(address: str, prompt: str, name: str = "mine", count: int = 30, **options) -> str:
    body = {"prompt": prompt, "session_id": name, "max_tokens": count, "ignore_eos": True}
    answer = post(address, **{**body, **options})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_requests_of_one_session_write_what_one_session_writes(serve, tmp_path, model, tokenizer):
    """Also where a request ends within a character: the next one has it whole."""
    address, _ = serve(sessions=tmp_path)
    found = go_on(address, "hello", seed=7)
    found += go_on(address, "") + go_on(address, "", count=1) + go_on(address, "", count=29)
    session = Session(model, tokenizer, seed=7)
    session.feed("hello")
    options = {"temperature": 1.0, "ignore_eos": True, "finish": False}
    assert found == "".join(session.stream(90, **options))
    more = go_on(address, " and then")
    session.feed(" and then")
    assert more == "".join(session.stream(30, **options))


def test_a_session_costs_its_new_tokens_and_constant_bytes(serve, tmp_path):
    address, _ = serve(sessions=tmp_path)
    sizes, counts = set(), []
    for length in (5, 300, 7, 0):
        body = {"prompt": "a" * length, "session_id": "mine", "max_tokens": 20}
        answer = post(address, ignore_eos=True, seed=1, **body).json()
        counts.append(answer["usage"]["prompt_tokens"])
        (file,) = tmp_path.glob("*.session")
        sizes.add(file.stat().st_size)
    assert counts == [6, 300, 7, 0]  # the first has the beginning of a text
    assert max(sizes) - min(sizes) < 64  # digits of counts


def test_a_conversation_goes_on_with_new_messages_alone(serve, tmp_path, model, tokenizer):
    """What the template writes after an answer is read too: here, the end of its turn."""
    address, _ = serve(sessions=tmp_path)

    def say(*messages: dict[str, str]) -> str:
        answer = post(
            address, "/v1/chat/completions", messages=messages, session_id="chat", max_tokens=9,
            temperature=0, ignore_eos=True,
        )  # fmt: skip
        return answer.json()["choices"][0]["message"]["content"]

    session = Session(model, tokenizer)
    options = {"temperature": 0, "ignore_eos": True, "finish": False}
    first = say({"role": "system", "content": "be"}, {"role": "user", "content": "hi"})
    session.feed([*b"<system>be", END, *b"<user>hi", END, *b"<assistant>"])
    assert first == "".join(session.stream(9, **options))
    second = say({"role": "user", "content": "why?"})
    session.feed([END, *b"<user>why?", END, *b"<assistant>"])
    assert second == "".join(session.stream(9, **options))


def test_a_session_moves_to_another_server_and_to_generate(serve, tmp_path, model, tokenizer):
    first, second = tmp_path / "one", tmp_path / "two"
    address, _ = serve(sessions=first)
    go_on(address, "hello", seed=7)
    second.mkdir()
    shutil.copy(first / "mine.session", second / "mine.session")
    loaded = Session.load(second / "mine.session", model, tokenizer)
    whole = "".join(loaded.stream(30, temperature=1.0, ignore_eos=True, finish=False))
    moved, _ = serve(sessions=second)
    assert go_on(moved, "") == whole
    assert go_on(address, "") == whole


def test_an_ended_text_stays_ended_until_it_gets_more(serve, tmp_path):
    ends = tiny()
    ends.lm_head.weight.data.zero_()
    ends.model.norm.weight.data.zero_()  # all tokens are as likely: the end is drawn greedily by id
    address, _ = serve(sessions=tmp_path, model=ends, tokenizer=bytes_tokenizer())
    options = {"temperature": 0, "ignore_eos": False, "stop": "\x00"}
    assert go_on(address, "a", **options) == ""
    assert go_on(address, "", **options) == ""


def test_two_requests_at_once_for_one_session_are_409(serve, tmp_path):
    address, service = serve(sessions=tmp_path, limits=Limits(new_tokens=10**6))
    body = {"prompt": "a", "session_id": "mine", "max_tokens": 10**6, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{address}/v1/completions", json={**body, "stream": True}, **NO_DEADLINE
    ) as running:
        lines = running.iter_lines()
        next(lines)
        busy = post(address, **body)
        assert busy.status_code == 409
        assert busy.json()["error"]["code"] == "session_busy"
        deleted = httpx.delete(f"{address}/v1/sessions/mine", **NO_DEADLINE)
        assert deleted.status_code == 409
        assert go_on(address, "a", "another")
        lines.close()
    until(lambda: service.scheduler.idle)
    # The client went: what it was sent is kept, and the session is free.
    assert go_on(address, "")


def test_a_client_that_goes_before_its_answer_finds_the_session_as_it_was(serve, tmp_path):
    """It saw nothing and asks again: the prompt is not read twice."""
    address, service = serve(sessions=tmp_path, limits=Limits(new_tokens=10**6))
    go_on(address, "hello", seed=1)
    (file,) = tmp_path.glob("*.session")
    before = file.read_bytes()
    body = {"prompt": "lost", "session_id": "mine", "max_tokens": 10**6, "ignore_eos": True}
    content = json.dumps(body)
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", content, headers)
    until(lambda: any(job.made for job in service.scheduler.running))
    connection.close()
    until(lambda: service.scheduler.idle)
    assert file.read_bytes() == before
    assert go_on(address, "")


def test_a_request_that_fails_leaves_its_session_as_it_was(serve, tmp_path):
    broken = tiny()
    broken.model.embed_tokens.weight.data[ord("!")] = float("inf")
    address, _ = serve(model=broken, sessions=tmp_path)
    go_on(address, "hello", seed=1)
    (file,) = tmp_path.glob("*.session")
    before = file.read_bytes()
    assert post(address, prompt="a!b", session_id="mine").status_code == 500
    assert post(address, prompt=[999], session_id="mine").status_code == 400
    assert post(address, prompt="x" * 10, n=2, session_id="mine").status_code == 400
    assert post(address, prompt="x", echo=True, session_id="mine").status_code == 400
    assert file.read_bytes() == before
    assert go_on(address, "")


def test_sessions_are_listed_and_deleted(serve, tmp_path):
    address, _ = serve(sessions=tmp_path)
    for name in ("a/../b", "A", "a", "50%"):
        go_on(address, "hello", name, count=1)
    listed = httpx.get(f"{address}/v1/sessions", **NO_DEADLINE).json()["data"]
    assert {entry["id"] for entry in listed} == {"a/../b", "A", "a", "50%"}
    assert all(entry["bytes"] > 1000 for entry in listed)
    for status in (200, 404):
        assert httpx.delete(f"{address}/v1/sessions/A", **NO_DEADLINE).status_code == status
    assert {path.parent for path in tmp_path.rglob("*.session")} == {tmp_path}


def test_a_damaged_session_is_422_and_can_be_deleted(serve, tmp_path):
    address, _ = serve(sessions=tmp_path)
    go_on(address, "hello")
    (file,) = tmp_path.glob("*.session")
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    answer = post(address, prompt="", session_id="mine")
    assert answer.status_code == 422
    assert "damaged" in answer.json()["error"]["message"]
    assert httpx.delete(f"{address}/v1/sessions/mine", **NO_DEADLINE).status_code == 200
    assert go_on(address, "hello")


# ------------------------------------------------------------------------------- the folder


def test_names_become_files_of_the_folder_that_no_file_system_mixes_up(store):
    names = ["a", "A", ".", "..", "a/b", "a b", "%41", "con", "x" * 80, "~" * 80]
    paths = [store.path(name) for name in names]
    assert {path.parent for path in paths} == {store.folder}
    assert len({path.name.lower() for path in paths}) == len(names)
    assert max(len(path.name) for path in paths) < 255
    for path in paths:
        path.touch()
    assert set(store.sizes()) == set(names)
    for name in ("", "x" * 81, "é", "a\n", "\x00"):
        with pytest.raises(UserError, match="names no session"):
            store.path(name)


def test_a_session_in_use_is_refused_until_it_is_released(store):
    store.claim("a")
    with pytest.raises(SessionBusy):
        store.claim("a")
    store.claim("b")
    store.release("a")
    store.claim("a")
    store.release("a")
    with pytest.raises(NoSuchSession):
        store.delete("a")
    store.claim("a")  # what failed has released it


def test_a_session_of_another_model_is_refused(store, tmp_path, tokenizer):
    session = Session(tiny(seed=1), tokenizer)
    session.feed("hello")
    session.save(store.path("a"))
    with pytest.raises(IntegrityError, match="another model"):
        store.open("a")


def test_one_server_at_a_time_uses_a_folder(store, model, tokenizer):
    with pytest.raises(UserError, match="another server uses these sessions"):
        Sessions(store.folder, model, tokenizer)
    store.close()
    Sessions(store.folder, model, tokenizer).close()


def test_a_file_is_no_folder_of_sessions(tmp_path: Path, model, tokenizer):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a folder"):
        Sessions(tmp_path / "file", model, tokenizer)
