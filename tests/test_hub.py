"""runtime/hub.py: names of models, and downloads from a hub played by a server on the loopback.

huggingface_hub reads HF_ENDPOINT when it is imported, hence the subprocesses.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, Site, dead_url, hub_environment, hub_file, loopback, refused
from safetensors.torch import load_file

from runtime.hub import describe_source, find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# ---------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no-such-folder", "a/b/c", "/no/such/folder", "o/n ame"])
def test_a_name_that_is_neither_a_folder_nor_a_repository_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: find_model(name), name, "no such folder")


def test_demo_is_the_embedded_model():
    assert find_model("demo") == ROOT / "data" / "demo" / "llama"
    assert find_model("demo").is_dir()


def test_a_model_is_recorded_by_full_path_or_by_repository_and_commit(tiny, monkeypatch):
    assert describe_source("demo", find_model("demo")) == ("demo", None)
    monkeypatch.chdir(tiny.parent)
    assert describe_source(tiny.name, Path(tiny.name)) == (str(tiny.resolve()), None)
    assert describe_source("o/tiny", Path("hub/snapshots") / COMMIT) == ("o/tiny", COMMIT)


# ---------------------------------------------------------------------------------------------
# Downloads
# ---------------------------------------------------------------------------------------------

PROBE = """
import json, sys
from model import load_llama
from runtime.errors import UserError
from runtime.hub import describe_source, find_model
from safetensors.torch import save_file
results = {}
for name, revision, out in json.loads(sys.argv[1]):
    try:
        save_file(load_llama(name, revision).state_dict(), out)
        commit = describe_source(name, find_model(name, revision))[1]
        results[f"{name}@{revision}"] = f"loaded {commit}"
    except UserError as error:
        results[f"{name}@{revision}"] = f"UserError: {error}"
print(json.dumps(results))
"""


class Hub(Site):
    """The part of the hub's API that a download needs; `answers` are the repository's files."""

    def find_answer(self, path):
        files = self.server.answers
        listed = path.startswith(("/api/models/o/tiny/", "/api/models/o/gated-files/"))
        if path.startswith(("/api/models/o/gated/", "/o/gated/", "/o/gated-files/")):
            return refusal(401, "GatedRepo", "Access is restricted")
        if listed and path.endswith(("/revision/main", f"/revision/{COMMIT}")):
            siblings = [{"rfilename": name} for name in files]
            about = {"id": "o/tiny", "modelId": "o/tiny", "sha": COMMIT, "siblings": siblings}
            return 200, json.dumps(about).encode(), {}
        if listed and path.endswith(f"/tree/{COMMIT}"):
            tree = [{"type": "file", "path": name, "size": len(data),
                     "oid": hashlib.sha1(data).hexdigest()} for name, data in files.items()]
            return 200, json.dumps(tree).encode(), {}
        if listed:
            return refusal(404, "RevisionNotFound", "Invalid rev id")
        if path.startswith(f"/o/tiny/resolve/{COMMIT}/"):
            return hub_file(files[path.removeprefix(f"/o/tiny/resolve/{COMMIT}/")], COMMIT)
        if path.startswith("/api/models/o/down/"):
            return 500, b"out of order", {}
        return refusal(404, "RepoNotFound", "Repository not found")


def refusal(status: int, code: str, message: str):
    """An answer with the headers by which the hub's client knows what is wrong."""
    return status, b"", {"X-Error-Code": code, "X-Error-Message": message}


def probe(home: Path, endpoint: str, *cases, **environment) -> dict:
    """Load the cases (name, revision, file to write) in a fresh process."""
    env = hub_environment(home, endpoint) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(cases)], env=env, text=True, timeout=100,
        capture_output=True, cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def hub(tiny, tmp_path_factory):
    """What happened to each case, the requests the server saw, and the loaded tensors."""
    home = tmp_path_factory.mktemp("hub")
    files = {path.name: path.read_bytes() for path in tiny.iterdir()} | {
        name: b"not for us"
        for name in ("pytorch_model.bin", "modeling_llama.py", "tokenizer.model", "README.md",
                     "consolidated.safetensors", "original/params.json", "notes.safetensors.bin")
    }
    cases = [(f"o/{name}", revision, str(home / f"{name}.safetensors")) for name, revision in (
        ("tiny", None), ("tiny", "nowhere"), ("gated", None), ("gated-files", None),
        ("missing", None), ("down", None))]
    with loopback(files, Hub) as server:
        results = probe(home, server.url, *cases)
    again = ("o/tiny", "main", str(home / "again.safetensors"))
    results |= probe(home, server.url, again, HF_HUB_OFFLINE="1")
    return results, server.requests, home


@pytest.mark.parametrize("case, fragments", [
    ("o/gated@None", ["o/gated ", "gated", "Ask for access", "hf auth login"]),
    ("o/gated-files@None", ["o/gated-files ", "is gated", "Ask for access", "hf auth login"]),
    ("o/missing@None", ["o/missing ", "nor on the hub", "Check the name"]),
    ("o/tiny@nowhere", ["o/tiny ", "no revision nowhere", "--revision"]),
    ("o/down@None", ["o/down ", "cannot be fetched", "HF_ENDPOINT"]),
])
def test_a_refusal_of_the_hub_is_reported_with_a_remedy(case, fragments, hub):
    message = hub[0][case]
    assert message.startswith("UserError: The repository")
    for fragment in [*fragments, "Or pass a local folder"]:
        assert fragment in message


def test_a_repository_loads_from_the_hub_bit_for_bit(hub, tiny):
    results, _, home = hub
    assert results["o/tiny@None"] == f"loaded {COMMIT}"
    stored, loaded = (load_file(path) for path in
                      (tiny / "model.safetensors", home / "tiny.safetensors"))
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)


def test_a_repository_that_was_fetched_once_loads_offline(hub):
    results, _, home = hub
    assert results["o/tiny@main"] == f"loaded {COMMIT}"
    assert (home / "again.safetensors").read_bytes() == (home / "tiny.safetensors").read_bytes()


def test_only_safetensors_and_json_files_are_requested(hub, tiny):
    prefix = f"GET /o/tiny/resolve/{COMMIT}/"
    got = {request.removeprefix(prefix) for request in hub[1] if request.startswith(prefix)}
    assert got == {path.name for path in tiny.iterdir()}
    asked = [request for request in hub[1] if "/resolve/" in request]
    assert all(request.endswith((".json", "/model.safetensors")) for request in asked)
    assert not any("original" in request for request in asked)


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["no server", "offline"])
def test_an_unreachable_hub_is_one_clear_error(environment, tmp_path):
    results = probe(tmp_path, dead_url(), ("o/tiny", None, "unused"), **environment)
    for fragment in ["The repository o/tiny cannot be fetched", "network", "HF_HUB_OFFLINE",
                     "local folder"]:
        assert fragment in results["o/tiny@None"]
