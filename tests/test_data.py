"""Texts from files, and WikiText-103 from a server on the loopback; nothing here has a network."""

import gzip
import hashlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import urllib.request
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError

import pytest

from data import UserError, corpora
from data.corpora import read_texts

ROOT = Path(__file__).parent.parent
ROWS = b'{"text": "one"}\n{"text": "t\\u00f6w"}\n'

# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, content", [
    ("a.txt", "one\ntöw\n".encode()),
    ("a.txt.gz", gzip.compress("one\ntöw\n".encode())),
    ("a.jsonl", ROWS),
    ("byte-order-mark.jsonl", b"\xef\xbb\xbf" + ROWS),
    ("a.jsonl.gz", gzip.compress(ROWS)),
    ("zipped-without-the-suffix.txt", gzip.compress("one\ntöw".encode())),
    ("suffix-without-the-zip.jsonl.gz", ROWS),
    ("two-gzips-in-a-row.txt", gzip.compress(b"one\n") + gzip.compress("töw\n".encode())),
    ("with.dots.and spaces.txt", "one\r\ntöw\r\n".encode()),
    ("blank-lines.txt", "\n  one\t\n \n\ntöw  ".encode()),
    ("blank-lines.jsonl", b'\n{"id": 1, "text": " one\\n"}\n  \n{"text": " "}\n' + ROWS[16:]),
])
def test_texts_are_read_stripped_and_in_order(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    assert read_texts(str(path)) == ["one", "töw"]


def test_a_text_may_hold_line_separators_other_than_the_newline(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\u2028still one\x0bstill\x85one\ntwo\n", newline="")
    assert read_texts(str(path)) == ["one\u2028still one\x0bstill\x85one", "two"]


@pytest.mark.parametrize("name, content, fragments", [
    ("empty.txt", b"", ["no text", "at least one"]),
    ("empty.jsonl", b"", ["no text", "at least one"]),
    ("zipped-nothing.txt.gz", gzip.compress(b""), ["no text", "at least one"]),
    ("blank.txt", b" \n\n\t\n", ["no text", "at least one"]),
    ("blank.jsonl", b'{"text": " "}\n\n', ["no text", "at least one"]),
    ("latin.txt", b"good\n" * 5 + b"caf\xe9\n", ["line ", "not UTF-8", "iconv -f"]),
    ("utf16.jsonl", '{"text": "a"}\n'.encode("utf-16"), ["line ", "not UTF-8", "iconv -f"]),
    ("latin.txt.gz", gzip.compress(b"caf\xe9\n"), ["line ", "not UTF-8", "iconv -f"]),
    ("json.jsonl", ROWS + b"\n{'text': 'x'}\n", ["line 4:", "not JSON", "mend or remove"]),
    ("cut.jsonl", ROWS + b'{"text": "on', ["line 3:", "not JSON", "mend or remove"]),
    ("txt.jsonl.gz", gzip.compress(b"plain\n"), ["line 1:", "not JSON", "mend or remove"]),
    ("lacks.jsonl", ROWS + b'{"txt": "x"}\n', ["line 3:", 'no field "text"', "add it"]),
    ("number.jsonl", b'{"text": 5}\n' + ROWS, ["line 1:", '"text" that is a string', "add it"]),
    ("null.jsonl", ROWS + b'{"text": null}\n', ["line 3:", '"text" that is a string', "add it"]),
    ("list.jsonl", ROWS + b'["text"]\n', ["line 3:", 'no field "text"', "add it"]),
    ("string.jsonl", b'"text"\n', ["line 1:", 'no field "text"', "add it"]),
    ("cut.txt.gz", gzip.compress(random.Random(0).randbytes(9999).hex().encode())[:-3000],
     ["line ", "cannot be read", "end-of-stream"]),
    ("table.csv", b"one\n", ["unknown kind", "rename it to .txt or .jsonl"]),
    ("archive.gz", gzip.compress(b"one\n"), ["unknown kind", "rename it to .txt or .jsonl"]),
])
def test_a_bad_file_is_named_with_line_and_fix_and_left_alone(name, content, fragments, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_texts(str(path))
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    for fragment in fragments:
        assert fragment in message
    assert [p.name for p in tmp_path.iterdir()] == [name] and path.read_bytes() == content


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl.gz", "folder.txt", ""])
def test_a_missing_file_is_told_with_what_text_takes(name, tmp_path):
    (tmp_path / "folder.txt").mkdir()
    path = str(tmp_path / name)
    with pytest.raises(UserError, match=re.escape(path) + ": no such file.*--text.*wikitext103"):
        read_texts(path)


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("good", [0, 5, 3000])
def test_the_line_that_is_not_utf8_is_named(good, zipped, tmp_path):
    content = b"a good line\n" * good + b"caf\xe9\n" + b"a good line\n" * 3000
    path = tmp_path / "latin.txt"
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(UserError, match=f"{path}, line {good + 1}: not UTF-8"):
        read_texts(str(path))


def test_a_gzip_with_a_damaged_byte_anywhere_is_a_user_error(tmp_path):
    texts = random.Random(0).choices(["red", "green", "blue", "a longer line of text"], k=2000)
    whole, path = gzip.compress("\n".join(texts).encode()), tmp_path / "a.txt.gz"
    refused = 0
    for place in range(10, len(whole), 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(UserError, match=re.escape(str(path))):
            read_texts(str(path))
        refused += 1
    assert refused > 50


def test_a_lone_surrogate_is_refused_before_a_tokenizer_sees_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROWS + b'{"text": "half an emoji \\ud83d"}\n')
    with pytest.raises(UserError, match=f"{path}, line 3:"):
        read_texts(str(path))


# ---------------------------------------------------------------------------------------------
# A server on the loopback
# ---------------------------------------------------------------------------------------------


class Site(BaseHTTPRequestHandler):
    """Answers from `server.answers`: path -> (status, body, headers); notes every request."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        not_found = 404, b"", {"X-Error-Code": "EntryNotFound"}
        status, body, headers = self.server.answers.get(path, not_found)
        if "wants-agent" in headers and self.headers["User-Agent"].startswith("Python-urllib"):
            status, body, headers = 403, b"", {}
        self.send_response(status)
        length = {} if "Transfer-Encoding" in headers else {"Content-Length": str(len(body))}
        for key, value in {**length, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


@contextmanager
def loopback(answers):
    """A server of these answers, with its `url` and the `requests` that it has seen."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.answers, server.requests = answers, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def hub_file(content: bytes, commit: str):
    """What the hub answers for a file of a repository."""
    tag = hashlib.sha1(content).hexdigest()
    return 200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": commit}


def dead_url() -> str:
    """An address on the loopback where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def hub_environment(home: Path, endpoint: str) -> dict[str, str]:
    """The environment of a process whose hub is `endpoint` and whose caches are below `home`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return kept | {
        "HF_HOME": str(home / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "XDG_CACHE_HOME": str(home / "cache"),
        "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


# ---------------------------------------------------------------------------------------------
# WikiText-103
# ---------------------------------------------------------------------------------------------

TRAIN = " \n = Valkyria = \n \n Senjō no Valkyria 3 : <unk> Chronicles \n"
TEXTS = ["= Valkyria =", "Senjō no Valkyria 3 : <unk> Chronicles"]
REPOSITORY, NAME = corpora.WIKITEXT_MIRROR
MIRROR_PATH = f"/datasets/{REPOSITORY}/resolve/main/{NAME}"


def make_zip(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("wikitext-103-raw/wiki.test.raw", "of the test part\n")
        archive.writestr("wikitext-103-raw/wiki.train.raw", TRAIN)
        archive.writestr("wikitext-103-raw/wiki.valid.raw", "of the validation part\n")
    return path.read_bytes()


@pytest.fixture
def wikitext(tmp_path, monkeypatch):
    """A site whose /w.zip is the corpus as data.corpora now expects it; the mirror is offline."""
    content = make_zip(tmp_path / "made.zip")
    monkeypatch.setattr(corpora, "WIKITEXT_BYTES", len(content))
    monkeypatch.setattr(corpora, "WIKITEXT_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with loopback({"/w.zip": (200, content, {})}) as server:
        monkeypatch.setattr(corpora, "WIKITEXT_URL", server.url + "/w.zip")
        yield server


def cached_zips(tmp_path) -> list[str]:
    """The files in the cache that are, or were to become, the corpus."""
    return [p.name for p in (tmp_path / "cache").rglob("*") if ".zip" in p.name
            and p.suffix not in (".lock", ".metadata")]


def test_wikitext_is_downloaded_once_and_only_its_training_part_is_read(wikitext, tmp_path):
    assert read_texts("wikitext103") == TEXTS
    assert read_texts("wikitext103") == TEXTS
    assert wikitext.requests == ["GET /w.zip"]
    assert cached_zips(tmp_path) == [NAME]


def test_wikitext_comes_also_from_a_server_that_refuses_pythons_own_user_agent(wikitext):
    status, content, _ = wikitext.answers["/w.zip"]
    wikitext.answers["/w.zip"] = status, content, {"wants-agent": "yes"}
    with pytest.raises(HTTPError, match="403"):
        urllib.request.urlopen(wikitext.url + "/w.zip")
    assert read_texts("wikitext103") == TEXTS


def refused(server, tmp_path, fragments) -> str:
    """Reading the corpus raises one clear line, leaves no zip behind, and a later try succeeds."""
    good = server.answers.pop("good")
    with pytest.raises(UserError) as caught:
        read_texts("wikitext103")
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    assert "\n" not in message and cached_zips(tmp_path) == []
    server.answers["/w.zip"] = good
    assert read_texts("wikitext103") == TEXTS
    return message


WHAT_TO_DO = ["/w.zip (", REPOSITORY, "Fetch the zip elsewhere", "--text", "--min-characters 1000",
              "--max-text-tokens 512"]


def test_a_broken_off_download_is_not_kept(wikitext, tmp_path):
    good = wikitext.answers["/w.zip"]
    half = good[1][: len(good[1]) // 2]
    wikitext.answers |= {"good": good, "/w.zip": (200, half, {"Content-Length": str(len(good[1]))})}
    said = f"ended after {len(half)} of {len(good[1])} bytes"
    refused(wikitext, tmp_path, [*WHAT_TO_DO, said])


@pytest.mark.parametrize("chunk", [b"", b"5\r\nab"], ids=["between chunks", "within a chunk"])
def test_a_broken_off_chunked_download_is_not_kept(chunk, wikitext, tmp_path):
    headers = {"Transfer-Encoding": "chunked"}
    wikitext.answers |= {"good": wikitext.answers["/w.zip"], "/w.zip": (200, chunk, headers)}
    refused(wikitext, tmp_path, WHAT_TO_DO)


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_refused_download_is_told_with_its_status(status, wikitext, tmp_path):
    wikitext.answers |= {"good": wikitext.answers["/w.zip"], "/w.zip": (status, b"no", {})}
    refused(wikitext, tmp_path, [*WHAT_TO_DO, f"HTTP Error {status}"])


def test_a_zip_with_a_wrong_sha256_is_removed(wikitext, tmp_path):
    good = wikitext.answers["/w.zip"]
    other = good[1][:-1] + b"x"
    wikitext.answers |= {"good": good, "/w.zip": (200, other, {})}
    digests = [hashlib.sha256(c).hexdigest()[:12] for c in (other, good[1])]
    refused(wikitext, tmp_path, ["sha256", *digests, f"{len(good[1])}", "removed, run again"])


def test_more_bytes_than_published_are_not_all_read(wikitext, tmp_path, monkeypatch):
    good = wikitext.answers["/w.zip"]
    endless = good[1] + bytes(40_000_000)
    wikitext.answers |= {"good": good, "/w.zip": (200, endless, {})}
    message = refused(wikitext, tmp_path, ["sha256", "removed, run again"])
    assert int(re.search(r"([\d,]+) bytes", message)[1].replace(",", "")) < 3_000_000


def test_without_server_and_mirror_the_message_says_what_to_do(wikitext, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "WIKITEXT_URL", dead_url() + "/w.zip")
    with pytest.raises(UserError) as caught:
        read_texts("wikitext103")
    for fragment in [*WHAT_TO_DO, "refused"]:
        assert fragment in str(caught.value)
    assert cached_zips(tmp_path) == [] and wikitext.requests == []


def test_a_member_that_unpacks_to_too_much_is_refused(wikitext, monkeypatch):
    monkeypatch.setattr(corpora, "WIKITEXT_MEMBER_CAP", len(TRAIN.encode()) - 1)
    with pytest.raises(UserError, match="wiki.train.raw unpacks to more than expected"):
        read_texts("wikitext103")


def test_a_cache_that_cannot_be_written_is_a_user_error(wikitext, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "file"))):
        read_texts("wikitext103")


FROM_MIRROR = """
import json, sys
from data import UserError, corpora
corpora.WIKITEXT_URL, corpora.WIKITEXT_BYTES, corpora.WIKITEXT_SHA256 = json.loads(sys.argv[1])
for _ in range(2):
    try:
        print(json.dumps(corpora.read_texts("wikitext103")))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def from_mirror(answers, digest, size, tmp_path):
    """What two readings give when only the mirror is there, and the files that it was asked for."""
    with loopback(answers) as server:
        done = subprocess.run(
            [sys.executable, "-c", FROM_MIRROR, json.dumps([dead_url() + "/w.zip", size, digest])],
            env=hub_environment(tmp_path, server.url), capture_output=True, text=True, timeout=100,
        )
    assert done.returncode == 0, done.stderr
    assert "trying the mirror" in done.stderr
    files = [request for request in server.requests if request == f"GET {MIRROR_PATH}"]
    return *map(json.loads, done.stdout.splitlines()), len(files)


def test_the_mirror_serves_when_the_first_address_is_dead(tmp_path):
    content = make_zip(tmp_path / "made.zip")
    answers = {MIRROR_PATH: hub_file(content, "c" * 40)}
    digest = hashlib.sha256(content).hexdigest()
    first, second, fetched = from_mirror(answers, digest, len(content), tmp_path)
    assert first == second == TEXTS and fetched == 1
    assert cached_zips(tmp_path) == [NAME]


def test_a_wrong_zip_from_the_mirror_is_removed_and_fetched_again(tmp_path):
    content = make_zip(tmp_path / "made.zip")
    answers = {MIRROR_PATH: hub_file(content, "c" * 40)}
    first, second, fetched = from_mirror(answers, "0" * 64, len(content), tmp_path)
    for message in (first, second):
        assert "sha256" in message and "removed, run again" in message
    assert fetched == 2 and cached_zips(tmp_path) == []
