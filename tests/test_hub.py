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
from helpers import trained_encoder
from safetensors.torch import load_file

from model import load_llama, save_encoder
from runtime.hub import describe_source, find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# ---------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no-such-folder", "a/b/c", "/no/such/folder", "o/n ame"])
def test_a_name_that_is_neither_a_folder_nor_a_repository_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: find_model(name), name, "no such folder")


def test_demo_is_the_bundled_model():
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


# ---------------------------------------------------------------------------------------------
# Models without safetensors
# ---------------------------------------------------------------------------------------------

WITHOUT = {  # repository or folder -> its files beside config.json and tokenizer.json, what is said
    "pickled": (["pytorch_model.bin"], [
        "pytorch_model.bin is pickled", "AutoModelForCausalLM.from_pretrained(NAME)"
        ".save_pretrained('NEW')", "AutoTokenizer"]),
    "shards": (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin",
                "pytorch_model.bin.index.json"], ["-00001-of-00002.bin is pickled", "from_pretr"]),
    "gguf": (["m.Q4_K_M.gguf"], ["m.Q4_K_M.gguf is llama.cpp's",
                                 "from_pretrained(NAME, gguf_file='m.Q4_K_M.gguf')"]),
    "meta": (["consolidated.00.pth", "params.json"], ["consolidated.00.pth is in its publisher's"]),
    "mistral": (["consolidated.safetensors"], ["consolidated.safetensors is in its publisher's"]),
    "original": (["original/consolidated.00.pth"], ["original/consolidated.00.pth is in its"]),
    "adapter": (["adapter_config.json", "adapter_model.safetensors"],
                ["an adapter's", "AutoPeftModelForCausalLM.from_pretrained(NAME)"]),
    "sentences": (["modules.json", "0_Transformer/model.safetensors", "1_Pooling/config.json"],
                  ["0_Transformer", "sentence-transformers' layout"]),
    "sentences-pickled": (["modules.json", "pytorch_model.bin", "1_Pooling/config.json"],
                          ["pytorch_model.bin is pickled"]),
    "variant": (["model.fp16.safetensors"], ["model.fp16.safetensors is a variant",
                                             "from_pretrained(NAME, variant='fp16')"]),
    "variant-shards": (["model.safetensors.index.fp16.json",
                        "model.fp16-00001-of-00001.safetensors"],
                       ["is a variant", "variant='fp16'"]),
    "part": (["model-00001-of-00002.safetensors"], ["is a part", "model.safetensors.index.json"]),
    "tf": (["tf_model.h5"], ["tf_model.h5 is another framework's"]),
    "name": (["weights.safetensors"], ["weights.safetensors", "rename it to model.safetensors"]),
    "nothing": ([], ["model.safetensors is missing; fetch the whole model again"]),
}


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_folder_without_safetensors_is_told_how_to_go_on(kind, tiny_copy):
    names, said = WITHOUT[kind]
    (tiny_copy / "model.safetensors").unlink()
    for name in names:
        (tiny_copy / name).parent.mkdir(exist_ok=True)
        (tiny_copy / name).write_bytes(b"weights")
    refused(lambda: load_llama(tiny_copy), str(tiny_copy),
            *(text.replace("NAME", repr(str(tiny_copy))) for text in said))


class Shelf(Site):
    """A hub with several repositories of the owner o; `answers`: name -> its files."""

    def find_answer(self, path):
        api, _, rest = path.removeprefix("/api/models").removeprefix("/o/").partition("/")
        files = self.server.answers.get(api)
        if files is None:
            return refusal(404, "RepoNotFound", "Repository not found")
        if "/resolve/" in path:
            name = rest.removeprefix(f"resolve/{COMMIT}/")
            return hub_file(files[name], COMMIT)
        if rest.startswith("revision/"):
            siblings = [{"rfilename": name} for name in files]
            about = {"id": f"o/{api}", "modelId": f"o/{api}", "sha": COMMIT, "siblings": siblings}
            return 200, json.dumps(about).encode(), {}
        tree = [{"type": "file", "path": name, "size": len(data),
                 "oid": hashlib.sha1(data).hexdigest()} for name, data in files.items()]
        return 200, json.dumps(tree).encode(), {}


SHELF_PROBE = """
import json, sys
from model import load_encoder, load_llama
from runtime.errors import UserError
results = {}
for name in json.loads(sys.argv[1]):
    try:
        print(f"-- {name}")
        (load_encoder if "encoder" in name else load_llama)(name)
        results[name] = "loaded"
    except UserError as error:
        results[name] = str(error)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def shelf(tiny, tmp_path_factory):
    """What happened to each repository of WITHOUT and to encoders of foreign bases; what was
    printed; the requests; where it happened, a folder that has one called `local`."""
    home = tmp_path_factory.mktemp("shelf")
    whole = {path.name: path.read_bytes() for path in tiny.iterdir()}
    small = {name: data for name, data in whole.items() if name != "model.safetensors"}
    answers = {kind: {**small, **{name: b"weights" for name in names}}
               for kind, (names, _) in WITHOUT.items()}
    answers |= {"tiny": whole}
    save_encoder(trained_encoder(tiny), home / "encoder")
    files = {str(path.relative_to(home / "encoder")): path.read_bytes()
             for path in (home / "encoder").rglob("*") if path.is_file()}
    about = json.loads(files["encoder.json"])
    for name, base, revision in (("encoder", "o/tiny", COMMIT), ("encoder-path", "runs/x", None),
                                 ("encoder-path2", "local/x", None),
                                 ("encoder-up", "o/tiny", "../../main")):
        about["base"] |= {"name": base, "revision": revision}
        answers[name] = {**files, "encoder.json": json.dumps(about).encode()}
    (home / "local").mkdir()
    names = [f"o/{name}" for name in answers if name != "tiny"]
    with loopback(answers, Shelf) as server:
        env = hub_environment(home, server.url) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", SHELF_PROBE, json.dumps([*names, "o/encoder", "local/y",
                                                            "runs/y"])],
            env=env, text=True, timeout=200, capture_output=True, cwd=home)
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    return json.loads(last), "\n".join(printed), server.requests, home


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_repository_without_safetensors_is_told_how_to_go_on(kind, shelf):
    for text in WITHOUT[kind][1]:
        assert text.replace("NAME", f"'o/{kind}'") in shelf[0][f"o/{kind}"]
    names = [name for name in WITHOUT[kind][0] if not name.endswith((".safetensors", ".json"))]
    assert not any(request.endswith(f"/{name}") for request in shelf[2] for name in names)


def test_what_an_encoder_names_as_its_base_is_fetched_with_a_note_and_only_once(shelf):
    results, printed, _, _ = shelf
    assert results["o/encoder"] == "loaded" and printed.count("note: ") == 1
    assert f"note: fetching o/tiny at {COMMIT}, which " in printed
    assert "names as its base" in printed


@pytest.mark.parametrize("name, said", [
    ("o/encoder-path", "runs/x: no such folder"), ("o/encoder-path2", "local/x: no such folder"),
    ("o/encoder-up", "revision"), ("local/y", "local/y: no such folder"),
    ("runs/y", "runs/y: no such folder"),
])
def test_the_hub_is_not_asked_for_what_looks_like_a_path(name, said, shelf):
    results, _, requests, _ = shelf
    assert said in results[name]
    assert not any("/runs/" in request or "/local/" in request for request in requests)
