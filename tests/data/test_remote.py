"""Prepared text on an object store: the same blocks, a cache of bounded size, and every fault."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import pickle
import shutil
import threading

import fsspec
import numpy as np
import pytest

from spectral_window.data import remote
from spectral_window.data.blocks import PackedBlocks, ShuffledBlocks
from spectral_window.data.remote import PieceCache, Store, publish
from spectral_window.data.text import open_corpus, prepare
from spectral_window.errors import IntegrityError, NetworkError, UserError
from tests.processes import python

PIECE = 4096


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote")
    rng = np.random.default_rng(0)
    texts = [" ".join(f"{w:x}" for w in rng.integers(0, 999, i % 60 + 1)) for i in range(2000)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepare([str(folder / "a.jsonl")], "bytes", folder / "t", valid_fraction=0.1)


@pytest.fixture(scope="module")
def published(local):
    """The URL of a copy in memory."""
    url = "memory://bucket/run"
    publish(local.folder, url, piece=PIECE)
    return url


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)


def held(cache):
    return {
        path.name: path.stat().st_size
        for path in cache.folder.iterdir()
        if not path.name.startswith(".")
    }


def same_blocks(one, other, length=100):
    blocks, others = PackedBlocks(one, length), PackedBlocks(other, length)
    assert len(blocks) == len(others)
    for index in list(ShuffledBlocks(len(blocks), seed=3))[::5]:
        for name, values in blocks[index].items():
            assert values.tolist() == others[index][name].tolist()


def test_blocks_in_shuffled_order_are_those_of_the_disk_through_a_small_cache(
    local, published, tmp_path
):
    cache = PieceCache(tmp_path / "cache", 10 * PIECE)
    corpus = open_corpus(published, cache=cache)
    assert corpus.fingerprint == local.fingerprint
    assert corpus.tokenizer.get_vocab() == local.tokenizer.get_vocab()
    assert corpus.sizes() == local.sizes()
    for split in ("train", "valid"):
        mine, theirs = getattr(corpus, split), getattr(local, split)
        same_blocks(mine, theirs)
        assert mine.documents.tolist() == theirs.documents.tolist()
        values = [-1, 0, 1, 5000, len(mine) - 1, len(mine) + 9, *theirs.documents[3:2000:97]]
        found = mine.documents.searchsorted(values)
        assert found.tolist() == theirs.documents.searchsorted(values).tolist()
        assert mine.tokens[5:5].tolist() == []
        assert mine.tokens[-1] == theirs.tokens[-1]
        assert mine.tokens[::3].tolist() == theirs.tokens[::3].tolist()
    assert sum(held(cache).values()) <= cache.limit
    assert len(local.train.tokens) * 2 > 3 * cache.limit  # it did not fit


def test_the_pieces_that_were_used_last_are_kept(tmp_path):
    cache = PieceCache(tmp_path, 1000)
    contents = [bytes([i]) * 300 for i in range(8)]
    sums = [remote.hashlib.sha256(content).hexdigest() for content in contents]
    fetched = []

    def get(i):
        cache._reset()  # what is held in memory is not asked for here
        return cache.get(sums[i], lambda: (fetched.append(i), contents[i])[1], "x")

    for i in (0, 1, 0, 2, 0, 3):  # 2 + 3 + 0 are the latest three
        assert get(i) == contents[i]
        assert sum(held(cache).values()) <= 1000
    assert fetched[:3] == [0, 1, 2]
    assert sums[1] not in held(cache)
    assert sums[3] in held(cache)
    fetched.clear()
    damaged = tmp_path / sums[3]
    damaged.write_bytes(b"x" * 300)
    assert get(3) == contents[3]
    assert fetched == [3]
    assert damaged.read_bytes() == contents[3]
    (tmp_path / ".used").write_text("garbage")
    for i in range(8):
        get(i)
        assert sum(held(cache).values()) <= 1000


def test_a_pickled_stream_reads_in_another_process(local, published, tmp_path):
    corpus = open_corpus(published, cache=PieceCache(tmp_path, 50 * PIECE))
    again = pickle.loads(pickle.dumps(corpus.train))
    same_blocks(again, local.train)


def test_reads_are_tried_again_and_then_it_is_a_network_error(published, tmp_path, monkeypatch):
    store = fsspec.filesystem("memory")
    real, faults = type(store).cat_file, []

    def flaky(self, path, start=None, end=None, **options):
        if faults:
            raise faults.pop()
        return real(self, path, start=start, end=end, **options)

    monkeypatch.setattr(type(store), "cat_file", flaky)
    faults += [ConnectionResetError("reset"), TimeoutError(), RuntimeError("503 Slow Down")]
    corpus = open_corpus(published, cache=PieceCache(tmp_path, 50 * PIECE))
    assert not faults
    faults += [ConnectionResetError("reset by peer")] * remote.ATTEMPTS
    with pytest.raises(NetworkError, match=r"6 times \(memory.*tokens\): reset by peer") as caught:
        corpus.train.tokens[0]
    assert caught.value.exit_code == 6
    corpus.train.tokens[0]
    monkeypatch.setattr(type(store), "cat_file", lambda *a, **o: real(*a, **o)[:-1])
    with pytest.raises(NetworkError, match="part of the answer is missing"):
        corpus.train.tokens[9000]


def test_blocks_that_come_next_are_fetched_in_the_same_order(local, published, tmp_path):
    cache = PieceCache(tmp_path, 800 * PIECE)
    blocks = PackedBlocks(open_corpus(published, cache=cache).train, 300)
    order = list(ShuffledBlocks(len(blocks), seed=1))
    ahead = iter(remote.read_ahead(order, blocks))
    assert [next(ahead) for _ in range(50)] == order[:50]
    while not held(cache):  # by threads: nobody asked for a block
        pass
    assert list(ahead) == order[50:]
    mine = PackedBlocks(local.train, 300)
    assert remote.read_ahead(order, mine) is order


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("train.tokens", "its content changed"),
        ("train.tokens.pieces", "not the table"),
        ("valid.documents.pieces", "not the table"),
        ("pieces.json", "not a table of pieces, or it was changed"),
        ("corpus.json", "unreadable|it was changed"),  # as the byte falls
        ("tokenizer/tokenizer.json", "its content changed"),
    ],
)
def test_a_changed_byte_is_found(local, tmp_path, name, what):
    url = f"memory://damaged/{name}"
    publish(local.folder, url, piece=PIECE)
    store = fsspec.filesystem("memory")
    content = store.cat_file(f"/damaged/{name}/{name}")
    half = len(content) // 2
    store.pipe_file(f"/damaged/{name}/{name}", content[:half] + b"~" + content[half + 1 :])
    with pytest.raises(IntegrityError, match=what):
        open_corpus(url, cache=PieceCache(tmp_path, 50 * PIECE)).train.tokens[:]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nothing://bucket/run", "not a usable URL (nothing://bucket/run), Protocol not known"),
        ("memory://bucket/missing", "no such file (memory://bucket/missing/pieces.json): publish"),
    ],
)
def test_bad_urls_are_refused_with_what_to_do(tmp_path, url, words):
    with pytest.raises(UserError) as caught:
        open_corpus(url, cache=PieceCache(tmp_path))
    assert words in str(caught.value)


def test_a_missing_library_says_what_to_install(monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"pip install 'spectral-window\[s3\]'"):
        Store("s3://bucket/run")
    with pytest.raises(UserError, match=r"pip install 'what fsspec needs for abfs://'"):
        Store("abfs://bucket/run")


def test_a_cache_below_a_piece_and_pieces_of_odd_sizes_are_refused(local, published, tmp_path):
    with pytest.raises(UserError, match="a cache of 4,095 bytes for pieces of 4,096"):
        open_corpus(published, cache=PieceCache(tmp_path, PIECE - 1))
    with pytest.raises(UserError, match="a cache of 0 bytes"):
        PieceCache(tmp_path, 0)
    for piece in (0, 1000, 5000):
        with pytest.raises(UserError, match=f"a piece of {piece} bytes: give a multiple of 4096"):
            publish(local.folder, "memory://x", piece=piece)


# ---------------------------------------------------------------------------- servers

SHARED = """
import sys
from spectral_window.data.remote import PieceCache
from spectral_window.data.text import open_corpus
corpus = open_corpus(sys.argv[1], cache=PieceCache(sys.argv[2], int(sys.argv[3])))
print(int(corpus.train.tokens[:].astype("int64").sum()))
"""


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A server of files that answers a range, as object stores do."""

    def do_GET(self):
        wanted = self.headers.get("Range")
        if wanted is None:
            super().do_GET()
            return
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        with open(self.translate_path(self.path), "rb") as file:
            file.seek(first)
            content = file.read(last + 1 - first)
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def test_processes_share_a_cache_over_http(local, tmp_path):
    publish(local.folder, f"file://{tmp_path}/run", piece=PIECE)
    handler = functools.partial(Ranges, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            words = [f"http://127.0.0.1:{server.server_port}/run", tmp_path / "cache", 9 * PIECE]
            children = [python("-c", SHARED, *words, stdout=-1, text=True) for _ in range(2)]
            sums = {int(child.communicate()[0]) for child in children}
        finally:
            server.shutdown()
            thread.join()
    assert sums == {int(local.train.tokens[:].astype("int64").sum())}
    cache = PieceCache(tmp_path / "cache", 9 * PIECE)
    assert sum(held(cache).values()) <= cache.limit
    assert not list(cache.folder.glob(".tmp-*"))


@pytest.mark.skipif(
    not (importlib.util.find_spec("moto") and importlib.util.find_spec("s3fs")),
    reason="needs s3fs and moto[server]; botocore wants python-dateutil 2, constraints.txt has 4",
)
def test_s3_is_read_and_written(local, tmp_path, monkeypatch):
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "testing"),
            ("AWS_SECRET_ACCESS_KEY", "testing"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        publish(local.folder, "s3://bucket/run", piece=1 << 16)
        cache = PieceCache(tmp_path / "cache", 1 << 17)
        corpus = open_corpus("s3://bucket/run/", cache=cache)
        same_blocks(corpus.train, local.train)
        assert sum(held(cache).values()) <= cache.limit
        with pytest.raises(UserError, match="no such file"):
            open_corpus("s3://bucket/other", cache=cache)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    shutil.rmtree(cache.folder)
    with pytest.raises(NetworkError, match="2 times"):
        open_corpus("s3://bucket/run", cache=PieceCache(tmp_path / "other", 1 << 17))
