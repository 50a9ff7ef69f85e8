"""A model's name -> the local folder that holds it."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from runtime.errors import UserError

# what the name `demo` stands for
DEMO_LLAMA = Path(__file__).resolve().parents[1] / "data" / "demo" / "llama"


def find_model(name: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: `demo`, a folder, or a hub repository (downloaded once).

    Only *.safetensors and *.json are fetched. UserError says what to do if the repository is
    gated, missing or out of reach.
    """
    if str(name) == "demo":
        return DEMO_LLAMA
    if str(name) and Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise UserError(f"{name}: no such folder, nor a repository's owner/name")
    wanted = {"allow_patterns": ["*.safetensors", "*.json"]}
    skipped = {"ignore_patterns": ["consolidated*", "original/*"]}  # second copies of the weights
    try:
        return Path(snapshot_download(str(name), revision=revision, **wanted, **skipped))
    except GatedRepoError:
        problem = "is gated", "Ask for access on its page, create a token, run `hf auth login`."
    except RepositoryNotFoundError:
        problem = ("is neither a folder here nor on the hub",
                   "Check the name; for a private one run `hf auth login`.")
    except RevisionNotFoundError:
        problem = f"has no revision {revision}", "Give a branch, tag or commit with --revision."
    except Exception as error:  # whatever the network, the disk or the client has to say
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
