"""A model's identity: what it is, whatever its files are called and whoever wrote them.

A base is its tensors (names, dtypes, shapes, bytes), the architecture that config.json describes,
and how a text becomes token ids. The order of tensors in a file, the files they are spread over,
metadata, and what config.json and tokenizer.json say beyond that do not matter. The same numbers in
another dtype are another base: a rounded copy gives other embeddings.
"""

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import tokenizers
import torch

from runtime.files import open_tensors, sha256_of_json

READ = ("normalizer", "pre_tokenizer", "model", "added_tokens")  # what encoding depends on


def stamp(path: Path) -> tuple:
    """What identifies a file within a process, as hashing gigabytes again would take seconds."""
    about = path.stat()
    return str(path.resolve()), about.st_ino, about.st_size, about.st_mtime_ns


def sha256_of_tensors(places: dict[str, tuple[Path, str]]) -> str:
    """sha256 over names, dtypes, shapes and bytes; places: name -> its file, its name there."""
    files = {path: stamp(path) for path, _ in places.values()}
    return _hash_tensors(tuple((name, *place) for name, place in places.items()),
                         tuple(files.items()))


@lru_cache(maxsize=8)
def _hash_tensors(places: tuple, files: tuple) -> str:
    digests, names = {}, {(path, key): name for name, path, key in places}
    for path, _ in files:
        with open_tensors(path) as file:
            for key in file.offset_keys():  # in their order on disk, one at a time
                if name := names.get((path, key)):
                    tensor = file.get_tensor(key)
                    raw = tensor.reshape(-1).view(torch.uint8).numpy()
                    digests[name] = [str(tensor.dtype), list(tensor.shape),
                                     hashlib.sha256(raw).hexdigest()]
    return sha256_of_json(digests)


def sha256_of_tokenizer(path: Path) -> str:
    """sha256 of what a tokenizer.json says about encoding, as the library writes it: a file saved
    again by another version of the library or by transformers counts as the same."""
    return _hash_tokenizer(path, stamp(path))


@lru_cache(maxsize=8)
def _hash_tokenizer(path: Path, _) -> str:
    about = json.loads(tokenizers.Tokenizer.from_file(str(path)).to_str())
    return sha256_of_json([without_defaults(about[key]) for key in READ])


def without_defaults(value):
    """A JSON value without nulls and falses, the values of fields that newer versions add."""
    if isinstance(value, dict):
        return {key: without_defaults(v) for key, v in value.items()
                if v is not None and v is not False}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [without_defaults(v) for v in value]
    return value


def base_record(places: dict[str, tuple[Path, str]], config: dict, tokenizer: Path,
                bos: list[int]) -> dict:
    """The parts of a base's identity, by name, and the sha256 of them all.

    config: what was read from config.json; bos: the ids actually put before each text.
    """
    parts = {"weights": sha256_of_tensors(places), "config": config,
             "tokenizer": sha256_of_tokenizer(tokenizer), "bos": bos}
    return {"sha256": sha256_of_json(parts), **parts}


def base_changes(recorded: dict, found: dict, files: Callable[[], str]) -> list[str]:
    """How the base `found` differs from the one recorded, [] if it is the same.

    files: returns the sha256 of its files, which is all that an earlier version recorded.
    """
    if not isinstance(recorded.get("config"), dict):
        return [] if recorded.get("sha256") == files() else ["its weights"]
    before, now = recorded["config"], found["config"]
    changes = [f"{key} in config.json: {value!r} -> {now.get(key)!r}"
               for key, value in before.items() if now.get(key) != value]
    changes += [what for key, what in (("weights", "its weights"), ("tokenizer", "its tokenizer"))
                if recorded.get(key) != found[key]]
    if recorded.get("bos") != found["bos"]:
        changes.append(f"its BOS: {recorded.get('bos')} -> {found['bos']}")
    return changes


def identity(encoder) -> str:
    """sha256 of all that an encoder's embeddings depend on except its dtype: base, adapters with
    their scale, trained rows, and how texts are read."""
    return sha256_of_json([encoder.base["sha256"], encoder.sha256, encoder.stored_adapters,
                           vars(encoder.config)])
