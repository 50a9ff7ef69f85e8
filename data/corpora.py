"""Plain texts for stages 1 and 2: .txt or .jsonl (gzipped or not), WikiText-103, or Wiki1M."""

import hashlib
import os
import sys
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import numpy as np
from huggingface_hub import hf_hub_download
from tqdm import tqdm

from data.lines import list_names, list_unread, parse_json, read_lines
from runtime.errors import UserError, note, shown

DEMO_PASSAGES = Path(__file__).parent / "demo" / "passages.jsonl.gz"
# WikiText-103 (Merity et al. 2016), the raw zip; this server requires a User-Agent.
WIKITEXT_URL = "https://wikitext.smerity.com/wikitext-103-raw-v1.zip"
WIKITEXT_MIRROR = ("mattdangerw/wikitext-103-raw", "wikitext-103-raw-v1.zip")  # a hub data set
WIKITEXT_BYTES = 191_984_949
WIKITEXT_SHA256 = "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794"
WIKITEXT_MEMBER = "wikitext-103-raw/wiki.train.raw"
WIKITEXT_MEMBER_CAP = 700_000_000  # bytes; the member has about 540 million
# A million sentences of Wikipedia (SimCSE, Gao et al. 2021, arXiv 2104.08821), one per line.
WIKI1M = ("princeton-nlp/datasets-for-simcse", "wiki1m_for_simcse.txt")  # a hub data set
WIKI1M_REVISION = "e145e8bb659b2aa2669f32ef79cb4cdef6c58fef"
WIKI1M_SHA256 = "7b1825863a99aa76479b0456f7c210539dfaeeb69598b41fb4de4f524dd5a706"


def read_texts(source: str) -> list[str]:
    """The texts of `source`, stripped, empty ones left out; see every_text."""
    return [text for text in every_text(source) if text]


def every_text(source: str) -> list[str]:
    """The texts of `source`, stripped, empty lines as empty texts.

    `source` is `demo`, `wikitext103`, `wiki1m`, a .txt(.gz) with one text per line, or a
    .jsonl(.gz) with a field `text`. Raises UserError with file and line number for whatever cannot
    be read, and if there is no text at all. Prints a note about fields other than `text`.
    """
    kind, unread = "", Counter()
    if source == "wikitext103":
        lines = wikitext_lines(wikitext_zip())
    elif source == "wiki1m":
        lines = read_lines(wiki1m_file())
    else:
        path = DEMO_PASSAGES if source == "demo" else Path(source)
        kind = path.name.removesuffix(".gz").rpartition(".")[2]
        if path.is_dir() or not path.exists():
            raise UserError(f"{source}: no such file; --text takes a .txt, a .jsonl (both may be "
                            f".gz), wikitext103, wiki1m or demo")
        if path.is_file() and kind not in ("txt", "jsonl"):  # read_lines refuses a pipe
            raise UserError(f"{source}: unknown kind of file; rename it to .txt or .jsonl")
        lines = read_lines(path)
        if kind == "jsonl":
            lines = (json_texts(path, i, line, unread)[0] if line.strip() else ""
                     for i, line in enumerate(lines, 1))
    texts = list(map(str.strip, lines))
    first = next(filter(None, texts), None)
    if first is None:
        raise UserError(f"{source}: no text in it; give a file with at least one text")
    if kind == "txt":
        require_no_json(path, first)
    for line in list_unread(unread):
        note(f"{source}: {line}")
    return texts


def json_texts(path: Path, number: int, line: str, unread: Counter, fields=("text",),
               fix="add it, or rename a field") -> list[str]:
    """The texts under `fields` in one line of a .jsonl file, None for one that is missing.

    The line's other fields are counted in `unread`. UserError, with the `fix`, if all are missing
    or one is not a text.
    """
    try:
        row = parse_json(line)
        texts = [row.get(name) if isinstance(row, dict) else None for name in fields]
        odd = [name for name, text in zip(fields, texts) if not isinstance(text, str | None)]
        if not odd and any(text is not None for text in texts):
            "".join(filter(None, texts)).encode()  # half a surrogate pair is JSON, but not text
            unread.update(key for key in row if key not in fields and row[key] is not None)
            return texts
    except UnicodeEncodeError as error:
        raise UserError(f"{path}, line {number}: not a text ({error}); fix or remove the line")
    except ValueError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error}); fix or remove the line")
    name = (odd or [name for name in fields if isinstance(row, dict) and name in row] or fields)[0]
    if isinstance(row, dict):
        what = f"it is {shown(row[name])}" if name in row else f"it has {list_names(row)}"
    elif isinstance(row, list):
        what, fix = "it is a list", "write one object per line: jq -c '.[]' FILE > NEW"
    else:
        what, fix = "it is no object", "write one object per line"
    raise UserError(f'{path}, line {number}: no field "{name}" that is a string ({what}); {fix}')


def require_no_json(path: Path, first: str):
    """UserError if a .txt begins with a JSON object: the JSON itself would be trained on."""
    with suppress(ValueError):
        if first.startswith("{") and isinstance(parse_json(first), dict):
            raise UserError(f"{path}: its lines are JSON objects; rename it to .jsonl")


def digest_ids(corpus: list[np.ndarray]) -> str:
    """sha256 of the texts' token ids, by which a resumed run recognises its data."""
    digest = hashlib.sha256()
    for ids in corpus:
        digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    return digest.hexdigest()


def wiki1m_file() -> Path:
    """The verified file of SimCSE's sentences in the hub's cache, downloaded on first use."""
    repo, name = WIKI1M
    try:
        path = Path(hf_hub_download(repo, name, repo_type="dataset", revision=WIKI1M_REVISION))
    except Exception as error:  # anything that the network, the hub or its client raises
        raise UserError(f"wiki1m cannot be downloaded: hub data set {repo}, file {name} "
                        f"({type(error).__name__}). Fetch it elsewhere and pass --text {name}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WIKI1M_SHA256:  # the cache has links: remove what they point to
        raise UserError(f"{path.resolve()}: wiki1m with sha256 {digest[:12]}..., expected "
                        f"{WIKI1M_SHA256[:12]}...; remove it and run again")
    return path


def wikitext_zip() -> Path:
    """The path of the verified zip of WikiText-103, downloaded on first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llm2comp"
    path = cache / WIKITEXT_MIRROR[1]
    if not path.is_file():
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{cache}: cannot be made ({error.strerror}); set XDG_CACHE_HOME")
        partial = cache / f".{path.name}.{os.getpid()}"
        try:
            download(WIKITEXT_URL, partial)
        except (OSError, HTTPException) as first:
            partial.unlink(missing_ok=True)
            print(f"{WIKITEXT_URL}: {first}; trying the mirror", file=sys.stderr)
            partial = download_mirror(cache / "mirror", first)
        check_wikitext(partial)
        os.replace(partial, path)
    return path


def download(url: str, target: Path):
    """Stream `url` to `target`, up to a block past WIKITEXT_BYTES; OSError if that fails."""
    request = urllib.request.Request(url, headers={"User-Agent": "llm2comp"})
    with urllib.request.urlopen(request, timeout=30) as answer, open(target, "wb") as file:
        with tqdm(total=WIKITEXT_BYTES, unit="B", unit_scale=True, desc="wikitext103") as bar:
            while (block := answer.read(1 << 20)) and bar.n <= WIKITEXT_BYTES:
                file.write(block)
                bar.update(len(block))
        if bar.n < WIKITEXT_BYTES:
            raise OSError(f"the connection ended after {bar.n:,} of {WIKITEXT_BYTES:,} bytes")


def download_mirror(folder: Path, first_error: Exception) -> Path:
    """The zip from the mirror on the hub, as a real file, not a link into the hub's cache."""
    repo, name = WIKITEXT_MIRROR
    try:
        return Path(hf_hub_download(repo, name, repo_type="dataset", local_dir=folder))
    except Exception as error:  # anything that the network, the hub or its client raises
        raise UserError(
            f"wikitext103 cannot be downloaded: {WIKITEXT_URL} ({first_error}); hub data set "
            f"{repo} ({type(error).__name__}). Fetch the zip elsewhere, unpack it, rename "
            f"wiki.train.raw and pass --text wiki.train.txt --min-characters 1000 "
            f"--max-text-tokens 512"
        )


def check_wikitext(path: Path):
    """Raise UserError, and remove the file, if it is not the published zip bit for bit."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WIKITEXT_SHA256:
        size = path.stat().st_size
        path.unlink()
        raise UserError(f"{path}: {size:,} bytes with sha256 {digest[:12]}..., expected "
                        f"{WIKITEXT_BYTES:,} and {WIKITEXT_SHA256[:12]}...; removed, run again")


def wikitext_lines(path: Path) -> Iterator[str]:
    """The lines of the training split, read from the zip without unpacking it."""
    with zipfile.ZipFile(path) as archive:
        if archive.getinfo(WIKITEXT_MEMBER).file_size > WIKITEXT_MEMBER_CAP:
            raise UserError(f"{path}: {WIKITEXT_MEMBER} unpacks to more than expected; remove it")
        with archive.open(WIKITEXT_MEMBER) as file:
            for line in file:
                yield line.decode("utf-8")
