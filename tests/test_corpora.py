"""data/corpora.py: texts from files; WikiText-103 and Wiki1M from a server on the loopback."""

import hashlib
import json
import random
import re
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import pytest
from helpers import dead_url, gz, hub_environment, hub_file, loopback

from data import corpora
from data.corpora import digest_ids, every_text, read_texts
from runtime.errors import UserError

ROWS = b'{"text": "one"}\n{"text": "t\\u00f6w"}\n'

# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, content", [
    ("a.txt", "one\ntöw\n".encode()),
    ("a.txt.gz", gz("one\ntöw\n".encode())),
    ("a.jsonl", ROWS),
    ("byte-order-mark.jsonl", b"\xef\xbb\xbf" + ROWS),
    ("a.jsonl.gz", gz(ROWS)),
    ("zipped-without-the-suffix.txt", gz("one\ntöw".encode())),
    ("suffix-without-the-zip.jsonl.gz", ROWS),
    ("two-gzips-in-a-row.txt", gz(b"one\n") + gz("töw\n".encode())),
    ("with.dots.and spaces.txt", "one\r\ntöw\r\n".encode()),
    ("blank-lines.txt", "\n  one\t\n \n\ntöw  ".encode()),
    ("blank-lines.jsonl", b'\n{"id": 1, "text": " one\\n"}\n  \n{"text": " "}\n' + ROWS[16:]),
])
def test_texts_are_read_in_order_and_stripped(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    assert read_texts(str(path)) == ["one", "töw"]


@pytest.mark.parametrize("name, content, rows", [
    ("a.txt", b"\n one\n\n \ntwo", ["", "one", "", "", "two"]),
    ("a.txt.gz", gz(b"one\n\n"), ["one", ""]),
    ("a.jsonl", b'{"text": " "}\n{"text": "one"}\n', ["", "one"]),
])
def test_rows_are_all_texts_with_the_empty_ones(name, content, rows, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    assert every_text(str(path)) == rows
    assert read_texts(str(path)) == [row for row in rows if row]


def test_rows_are_those_of_the_library_datasets(tmp_path):
    """Which row has which number decides what a shuffle by seed takes."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    path = tmp_path / "a.txt"
    path.write_text("\n one\n\n  \ntwo\n\n\nthree \n\n")
    theirs = datasets.load_dataset("text", data_files=str(path), cache_dir=str(tmp_path / "cache"))
    found = every_text(str(path))
    assert found == [text.strip() for text in theirs["train"]["text"]]
    assert [i for i, text in enumerate(found) if text] == [1, 4, 7] and len(found) == 9


@pytest.mark.parametrize("name, content", [("a.txt", b" \n\n"), ("a.jsonl", b'{"text": " "}\n'),
                                           ("b.txt", b"")])
def test_rows_of_a_file_without_a_text_are_refused(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match="no text in it; give a file with at least one text"):
        every_text(str(path))


def test_only_newlines_separate_texts(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\u2028still one\x0bstill\x85one\ntwo\n", newline="")
    assert read_texts(str(path)) == ["one\u2028still one\x0bstill\x85one", "two"]


@pytest.mark.parametrize("name, content, fragments", [
    ("empty.txt", b"", ["no text", "at least one"]),
    ("empty.jsonl", b"", ["no text", "at least one"]),
    ("zipped-nothing.txt.gz", gz(b""), ["no text", "at least one"]),
    ("blank.txt", b" \n\n\t\n", ["no text", "at least one"]),
    ("blank.jsonl", b'{"text": " "}\n\n', ["no text", "at least one"]),
    ("latin.txt", b"good\n" * 5 + b"caf\xe9\n", ["line ", "not UTF-8", "iconv -f"]),
    ("json.txt", ROWS, ["lines are JSON objects", "rename it to .jsonl"]),
    ("twice.jsonl", b'{"text": "a", "text": "b"}\n', ["line 1:", "text twice"]),
    ("latin.txt.gz", gz(b"caf\xe9\n"), ["line ", "not UTF-8", "iconv -f"]),
    ("json.jsonl", ROWS + b"\n{'text': 'x'}\n", ["line 4:", "not JSON", "fix or remove"]),
    ("cut.jsonl", ROWS + b'{"text": "on', ["line 3:", "not JSON", "fix or remove"]),
    ("txt.jsonl.gz", gz(b"plain\n"), ["line 1:", "not JSON", "fix or remove"]),
    ("lacks.jsonl", ROWS + b'{"txt": "x"}\n', ["line 3:", "(it has txt)", "add it"]),
    ("number.jsonl", b'{"text": 5}\n' + ROWS, ["line 1:", '"text" that is a string', "add it"]),
    ("null.jsonl", ROWS + b'{"text": null}\n', ["line 3:", '"text" that is a string', "add it"]),
    ("list.jsonl", ROWS + b'["text"]\n', ["line 3:", 'no field "text"', "jq -c '.[]'"]),
    ("string.jsonl", b'"text"\n', ["line 1:", 'no field "text"', "one object per line"]),
    ("cut.txt.gz", gz(random.Random(0).randbytes(9999).hex().encode())[:-3000],
     ["line ", "cannot be read", "end-of-stream"]),
    ("table.csv", b"one\n", ["unknown kind", "rename it to .txt or .jsonl"]),
    ("archive.gz", gz(b"one\n"), ["unknown kind", "rename it to .txt or .jsonl"]),
])
def test_a_bad_file_is_reported_with_a_remedy_and_left_alone(name, content, fragments, tmp_path):
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
def test_a_missing_file_is_reported_with_what_text_accepts(name, tmp_path):
    (tmp_path / "folder.txt").mkdir()
    path = str(tmp_path / name)
    with pytest.raises(UserError, match=re.escape(path) + ": no such file.*--text.*wikitext103"):
        read_texts(path)


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("good", [0, 5, 3000])
def test_the_line_that_is_not_utf8_is_named(good, zipped, tmp_path):
    content = b"a good line\n" * good + b"caf\xe9\n" + b"a good line\n" * 3000
    path = tmp_path / "latin.txt"
    path.write_bytes(gz(content) if zipped else content)
    with pytest.raises(UserError, match=f"{path}, line {good + 1}: not UTF-8"):
        read_texts(str(path))


def test_fields_beside_the_text_are_named_and_counted_by_one_process(
    tmp_path, capsys, monkeypatch
):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "a", "title": "t", "url": None}, {"text": "b", "title": "", "n": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_texts(str(path)) == ["a", "b"]
    assert capsys.readouterr().out == (
        f"note: {path}: fields not read: title (2 rows), n (1 rows)\n")
    monkeypatch.setenv("RANK", "1")
    assert read_texts(str(path)) == ["a", "b"] and capsys.readouterr().out == ""
    assert read_texts("demo") and capsys.readouterr().out == ""


def test_a_damaged_byte_anywhere_in_a_gzip_is_a_user_error(tmp_path):
    texts = random.Random(0).choices(["red", "green", "blue", "a longer line of text"], k=2000)
    whole, path = gz("\n".join(texts).encode()), tmp_path / "a.txt.gz"
    refused = 0
    for place in range(10, len(whole), 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(UserError, match=re.escape(str(path))):
            read_texts(str(path))
        refused += 1
    assert refused > 50


def test_a_lone_surrogate_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROWS + b'{"text": "half an emoji \\ud83d"}\n')
    with pytest.raises(UserError, match=f"{path}, line 3:"):
        read_texts(str(path))


def test_the_digest_depends_on_the_ids_their_order_and_where_texts_end():
    def digest(*texts):
        return digest_ids([np.array(ids, np.int32) for ids in texts])

    first = digest([1, 2], [3])
    assert re.fullmatch("[0-9a-f]{64}", first) and digest([1, 2], [3]) == first
    others = {digest([1], [2, 3]), digest([3], [1, 2]), digest([1, 2, 3]), digest([1, 2], [4])}
    assert len(others) == 4 and first not in others


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
    assert every_text("wikitext103") == ["", TEXTS[0], "", TEXTS[1]]
    assert wikitext.requests == ["GET /w.zip"]
    assert cached_zips(tmp_path) == [NAME]


def test_a_server_that_refuses_pythons_own_user_agent_serves_wikitext(wikitext):
    status, content, _ = wikitext.answers["/w.zip"]
    wikitext.answers["/w.zip"] = status, content, {"wants-agent": "yes"}
    with pytest.raises(HTTPError, match="403"):
        urllib.request.urlopen(wikitext.url + "/w.zip")
    assert read_texts("wikitext103") == TEXTS


def download_fails(server, tmp_path, fragments) -> str:
    """Reading the corpus is one clear UserError and leaves no zip; a later try succeeds."""
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


def test_an_interrupted_download_is_not_kept(wikitext, tmp_path):
    good = wikitext.answers["/w.zip"]
    half = good[1][: len(good[1]) // 2]
    wikitext.answers |= {"good": good, "/w.zip": (200, half, {"Content-Length": str(len(good[1]))})}
    said = f"ended after {len(half)} of {len(good[1])} bytes"
    download_fails(wikitext, tmp_path, [*WHAT_TO_DO, said])


@pytest.mark.parametrize("chunk", [b"", b"5\r\nab"], ids=["between chunks", "within a chunk"])
def test_an_interrupted_chunked_download_is_not_kept(chunk, wikitext, tmp_path):
    headers = {"Transfer-Encoding": "chunked"}
    wikitext.answers |= {"good": wikitext.answers["/w.zip"], "/w.zip": (200, chunk, headers)}
    download_fails(wikitext, tmp_path, WHAT_TO_DO)


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_refused_download_is_reported_with_its_status(status, wikitext, tmp_path):
    wikitext.answers |= {"good": wikitext.answers["/w.zip"], "/w.zip": (status, b"no", {})}
    download_fails(wikitext, tmp_path, [*WHAT_TO_DO, f"HTTP Error {status}"])


def test_a_zip_with_a_wrong_sha256_is_removed(wikitext, tmp_path):
    good = wikitext.answers["/w.zip"]
    other = good[1][:-1] + b"x"
    wikitext.answers |= {"good": good, "/w.zip": (200, other, {})}
    digests = [hashlib.sha256(c).hexdigest()[:12] for c in (other, good[1])]
    said = ["sha256", *digests, f"{len(good[1])}", "removed, run again"]
    download_fails(wikitext, tmp_path, said)


def test_a_download_larger_than_published_is_not_read_to_its_end(wikitext, tmp_path, monkeypatch):
    good = wikitext.answers["/w.zip"]
    endless = good[1] + bytes(40_000_000)
    wikitext.answers |= {"good": good, "/w.zip": (200, endless, {})}
    message = download_fails(wikitext, tmp_path, ["sha256", "removed, run again"])
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
from data import corpora
from runtime.errors import UserError
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


# ---------------------------------------------------------------------------------------------
# Wiki1M
# ---------------------------------------------------------------------------------------------

WIKI1M, WIKI1M_NAME = corpora.WIKI1M
WIKI1M_PATH = f"/datasets/{WIKI1M}/resolve/{corpora.WIKI1M_REVISION}/{WIKI1M_NAME}"
READ_WIKI1M = """
import json, sys, time
time.sleep = lambda _: None  # the hub's client sleeps long before it gives up
from data import corpora
from runtime.errors import UserError
corpora.WIKI1M_SHA256 = sys.argv[1] or corpora.WIKI1M_SHA256
for _ in range(2):
    try:
        print(json.dumps(corpora.read_texts("wiki1m")))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def read_twice(home: Path, endpoint: str, sha256: str = "", **environment) -> list:
    """What two readings of wiki1m, of this sha256, give in a process whose hub is `endpoint`."""
    done = subprocess.run(
        [sys.executable, "-c", READ_WIKI1M, sha256], capture_output=True, text=True, timeout=100,
        env=hub_environment(home, endpoint) | environment,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_wiki1m_is_downloaded_once_from_the_hub(tmp_path):
    content = " YMCA in South Australia \n\nSenjō no Valkyria 3 .\r\n  last one".encode()
    texts = ["YMCA in South Australia", "Senjō no Valkyria 3 .", "last one"]
    sha256 = hashlib.sha256(content).hexdigest()
    with loopback({WIKI1M_PATH: hub_file(content, corpora.WIKI1M_REVISION)}) as server:
        assert read_twice(tmp_path, server.url, sha256) == [texts, texts]
        assert server.requests.count(f"GET {WIKI1M_PATH}") == 1
    cached = [p for p in (tmp_path / "hf").rglob("*") if p.name == WIKI1M_NAME]
    assert len(cached) == 1
    assert hashlib.sha256(cached[0].read_bytes()).digest() == hashlib.sha256(content).digest()
    assert read_twice(tmp_path, dead_url(), sha256, HF_HUB_OFFLINE="1") == [texts, texts]


def test_another_file_in_place_of_wiki1m_is_refused_and_fetched_again_once_removed(tmp_path):
    content, good = b"one\ntwo\n", b"three\nfour\n"
    sha256 = hashlib.sha256(good).hexdigest()
    with loopback({WIKI1M_PATH: hub_file(content, corpora.WIKI1M_REVISION)}) as server:
        said, again = read_twice(tmp_path, server.url, sha256)
        assert said == again and "wiki1m with sha256" in said and "remove it and run again" in said
        Path(said.partition(": ")[0]).unlink()
        server.answers[WIKI1M_PATH] = hub_file(good, corpora.WIKI1M_REVISION)
        assert read_twice(tmp_path, server.url, sha256) == [["three", "four"]] * 2


def offline_message(said: list) -> str:
    """The one clear line that both readings gave."""
    assert len(said) == 2 and said[0] == said[1]
    assert "\n" not in said[0]
    for fragment in ("wiki1m cannot be downloaded", WIKI1M, WIKI1M_NAME, f"--text {WIKI1M_NAME}"):
        assert fragment in said[0]
    return said[0]


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["no server", "offline"])
def test_without_the_hub_wiki1m_is_one_clear_line(environment, tmp_path):
    offline_message(read_twice(tmp_path, dead_url(), **environment))


def test_a_hub_that_lacks_wiki1m_is_one_clear_line(tmp_path):
    with loopback({}) as server:
        assert "EntryNotFound" in offline_message(read_twice(tmp_path, server.url))
        assert server.requests
