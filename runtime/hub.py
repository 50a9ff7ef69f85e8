"""A model's name -> the local folder that holds it."""

import re
from pathlib import Path

from huggingface_hub import list_repo_files, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from runtime.errors import UserError, note

# what the name `demo` stands for
DEMO_LLAMA = Path(__file__).resolve().parents[1] / "data" / "demo" / "llama"

COMPLETE = ("model.safetensors", "model.safetensors.index.json", "encoder.json")  # at least one
SAVE = "AutoModelForCausalLM.from_pretrained({name!r}{how}).save_pretrained('NEW')"
OTHERS = {  # files of a model without model.safetensors -> what they are, and what to do
    r"adapter_config\.json": "an adapter's, without its base; merge it once with peft: "
    "AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained('NEW'), "
    "and save the base's tokenizer there",
    r"(?:pytorch_)?model[\w.-]*\.bin|[\w.-]+\.pt": "pickled, which can run code; convert it once "
    f"with transformers: {SAVE}, and the same with AutoTokenizer",
    r"(?P<gguf_file>[^/]+\.gguf)": "llama.cpp's; convert it once with transformers: "
    f"{SAVE}, and the same with AutoTokenizer",
    r"(?:original/)?consolidated.*|(?:original/)?params\.json": "in its publisher's own format; "
    "take the repository in Hugging Face's layout (as a rule its name ends in -hf)",
    r"model\.(?:safetensors\.index\.)?(?P<variant>\w+)(?:-\d+-of-\d+)?\.(?:safetensors|json)":
    f"a variant; save it once under the usual name with transformers: {SAVE}",
    r"model-\d+-of-\d+\.safetensors": "a part; fetch model.safetensors.index.json, too",
    r"0_\w+/.*|modules\.json": "of sentence-transformers' layout, where the model has a folder of "
    "its own, as a rule 0_Transformer; name that (of a repository, after hf download)",
    r"[^/]+\.(?:h5|msgpack|onnx|ot|npz)": "another framework's; take a model with *.safetensors",
    r"[^/]+\.safetensors": "no model's file by its name; rename it to model.safetensors if it is",
}


def without_tensors(name: str | Path, files: list[str]) -> UserError:
    """What to say about a model without model.safetensors: `name` as given, and its files."""
    inside = Path(name).absolute().parents[:2] if Path(name).is_dir() else []
    for place in inside:  # it is a checkpoint or an adapter of a run
        if (place / "encoder.json").is_file() or (place / "environment.json").is_file():
            return UserError(f"{name}: is a part of the encoder or run in {place}; name that")
    for pattern, about in OTHERS.items():
        for match in filter(None, (re.fullmatch(pattern, file) for file in sorted(files))):
            how = "".join(f", {key}={value!r}" for key, value in match.groupdict().items())
            return UserError(f"{name}: has no model.safetensors, and nothing else is read; "
                             f"{match[0]} is {about.format(name=str(name), how=how)}")
    if "config.json" not in files:
        return UserError(f"{name}/config.json: missing; is {name} a complete model folder?")
    return UserError(f"{name}: model.safetensors is missing; fetch the whole model again")


def find_model(name: str | Path, revision: str | None = None, base_of: Path | None = None) -> Path:
    """The local folder of a model: `demo`, a folder, or a hub repository (downloaded once).

    Only *.safetensors and *.json are fetched. base_of: the encoder whose encoder.json names this
    model; as a stranger may have written it, it is fetched only with a revision, never silently.
    UserError says what to do if the repository is gated, missing, unreachable or without weights.
    """
    if str(name) == "demo" or str(name) and Path(name).is_dir():
        if revision and not base_of:
            raise UserError(f"--revision {revision}: {name} is a folder here, and has none; leave "
                            f"it out, or run this where no folder has the repository's name")
        return DEMO_LLAMA if str(name) == "demo" else Path(name)
    if Path(name).is_file():
        raise UserError(f"{name}: is a file; name the folder that it is in")
    owner, repository = str(name).partition("/")[0], r"\w[\w.-]*/\w[\w.-]*"
    if not re.fullmatch(repository, str(name)) or base_of and not revision:
        raise UserError(f"{name}: no such folder, nor a repository's owner/name")
    if not revision and (owner == "runs" or Path(owner).is_dir()):  # the hub is not asked for paths
        raise UserError(f"{name}: no such folder; if the hub's repository of that name is meant, "
                        f"add --revision main where the command has it, or name it from elsewhere")
    if base_of and not isinstance(
            try_to_load_from_cache(str(name), "config.json", revision=revision), str):
        note(f"fetching {name} at {revision}, which {base_of} names as its base")
    folder = fetch(str(name), revision)
    if not any((folder / file).is_file() for file in COMPLETE):
        try:
            files = list_repo_files(str(name), revision=folder.name)
        except Exception:  # offline: the files that were fetched say less
            files = [str(path.relative_to(folder)) for path in folder.rglob("*")]
        raise without_tensors(name, files)
    return folder


def fetch(name: str, revision: str | None) -> Path:
    """The snapshot of a hub repository, downloaded if need be; UserError says why it is not."""
    wanted = {"allow_patterns": ["*.safetensors", "*.json"]}
    skipped = {"ignore_patterns": ["consolidated*", "original/*"]}  # second copies of the weights
    try:
        return Path(snapshot_download(name, revision=revision, **wanted, **skipped))
    except GatedRepoError:
        problem = "is gated", "Ask for access on its page, create a token, run `hf auth login`."
    except RepositoryNotFoundError:
        problem = ("is neither a folder here nor on the hub",
                   "Check the name; for a private one run `hf auth login`.")
    except RevisionNotFoundError:
        problem = f"has no revision {revision}", "Give a branch, tag or commit with --revision."
    except Exception as error:  # anything that the network, the disk or the client raises
        line = str(error).partition("\n")[0][:120]
        reason = f"cannot be fetched ({type(error).__name__}: {line})"
        problem = reason, "Check the network and HF_ENDPOINT, or whether HF_HUB_OFFLINE is set."
    raise UserError(f"The repository {name} {problem[0]}.\n{problem[1]}\n"
                    f"Or pass a local folder with config.json, *.safetensors, tokenizer.json.")


def describe_source(name: str | Path, folder: Path) -> tuple[str, str | None]:
    """The name and revision under which a result or an encoder records a model found in `folder`.

    A local folder is recorded by its full path; a hub's snapshot is named by its commit.
    """
    if str(name) == "demo":
        return "demo", None
    if Path(name).is_dir():
        return str(Path(name).resolve()), None
    return str(name), folder.name
