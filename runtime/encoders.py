"""The files of an encoder: encoder.json, embeddings.safetensors, one PEFT adapter per stage.

Everything is checked here, as in runtime/formats.py, which reads the files of its base. The results
are dictionaries and tensors, from which model.py and lora.py build the encoder.
"""

import json
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from runtime.errors import UserError, check_text, note
from runtime.files import MOST_JSON, open_regular, open_tensors, read_json, sha256_of_files
from runtime.formats import encoder_of, read_fitting, weight_files, write_tensors
from runtime.hub import find_model
from runtime.identity import base_changes

# ---------------------------------------------------------------------------------------------
# Adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors
# ---------------------------------------------------------------------------------------------


def write_adapter(folder: Path, settings: dict, tensors: dict[str, Tensor], base: str):
    """Write an adapter; `settings` are LoraConfig's fields, `base` the base model's name."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    peft = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": settings["r"], "lora_alpha": settings["alpha"], "lora_dropout": settings["dropout"],
        "target_modules": list(settings["targets"]), "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(peft, indent=2) + "\n")


ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def read_adapter(folder: Path) -> dict:
    """LoraConfig's fields of a stored adapter; UserError for kinds of adapters other than LoRA."""
    config_file = own_file(folder.parent, f"{folder.name}/{ADAPTER[0]}")
    try:
        with open_regular(config_file, MOST_JSON) as file:
            peft = json.loads(file.read().decode())
        targets = peft["target_modules"]
        targets = (targets,) if isinstance(targets, str) else tuple(sorted(targets))
        settings = {"r": int(peft["r"]), "alpha": float(peft["lora_alpha"]),
                    "dropout": float(peft.get("lora_dropout", 0.0)), "targets": targets}
        if settings["r"] < 1:
            raise ValueError(f"r is {settings['r']}")
        if not 0 <= settings["dropout"] < 1 or not abs(settings["alpha"]) < 1e38:
            raise ValueError(f"lora_dropout is {settings['dropout']}, lora_alpha "
                             f"{settings['alpha']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError,
            RecursionError) as error:
        raise UserError(f"{folder}: no readable LoRA adapter in adapter_config.json and "
                        f"adapter_model.safetensors ({error!r}); write it anew")
    unsupported = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
    for key in unsupported:
        if peft.get(key):
            raise UserError(f"{config_file}: {key}={peft[key]!r} is not supported; plain LoRA only")
    return settings


def read_adapter_tensors(folder: Path, shapes: dict[str, tuple]) -> dict[str, Tensor]:
    """An adapter's tensors; UserError unless they have exactly these names and shapes."""
    path, fix = own_file(folder.parent, f"{folder.name}/{ADAPTER[1]}"), "write it anew"
    with open_tensors(path, fix) as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    if odd := sorted(name for name in shapes.keys() | found.keys()
                     if shapes.get(name) != found.get(name)):
        raise UserError(f"{path}: {odd[0]} is missing, extra or of another shape; is the adapter "
                        f"of another base model?")
    return read_fitting(path, shapes, fix)


# ---------------------------------------------------------------------------------------------
# Encoder folders: encoder.json, embeddings.safetensors, one adapter per stage
# ---------------------------------------------------------------------------------------------

FORMAT = 2  # of encoder.json; in format 1 max_tokens included the memory tokens
NEWER = {"document_template": "", "kept_tokens": [], "bos": -1,  # missing in older folders, results
         "special_tokens": "parsed"}
IDENTITY = ("weights", "config", "tokenizer", "bos", "trained_on")  # newer parts of a base's record


def check_encoder_config(config, poolings):
    """UserError for an invalid EncoderConfig; TypeError for a field of the wrong type."""
    for f in fields(config):
        if type(value := getattr(config, f.name)) is not f.type:
            raise TypeError(f"{f.name}={value!r}: {f.type.__name__} expected")
    if config.pooling not in poolings:
        raise UserError(f"pooling={config.pooling!r}: unknown; one of {', '.join(poolings)}")
    if config.attention not in ("bidirectional", "causal"):
        raise UserError(f"attention={config.attention!r}: bidirectional or causal")
    if config.special_tokens not in ("literal", "parsed"):
        raise UserError(f"special_tokens={config.special_tokens!r}: literal or parsed")
    k, least = config.num_memory_tokens, int(config.pooling == "memory")
    if k < least or (k and not least):
        raise UserError(f"num_memory_tokens={k} with pooling={config.pooling}: at least 1 for "
                        f"memory, 0 otherwise")
    for template in (config.template, config.document_template or "{text}"):
        if "{text}" not in template:
            raise UserError(f"template={template!r}: must contain {{text}}")
        check_text(template, "template")
    kept = config.kept_tokens
    if any(type(i) is not int or not 0 <= i < k for i in kept) or len(set(kept)) < len(kept):
        raise UserError(f"kept_tokens={kept}: must be different numbers from 0 to {k - 1}")
    if config.max_tokens < 2:
        raise UserError(f"max_tokens={config.max_tokens} leaves no room for a text beside BOS")


def own_file(folder: Path, name: str) -> Path:
    """folder / name; UserError if a link leads out of the encoder's folder.

    Links in the hub's cache lead to the blobs of the same repository, which is allowed. Any other
    file of this machine could end up in what is saved, and published, next.
    """
    path, home = folder / name, folder.resolve()
    places = [home, *(snapshots.parent / "blobs" for snapshots in home.parents
                      if snapshots.name == "snapshots"
                      and snapshots.parent.name.startswith("models--"))]
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(place) for place in places):
        raise UserError(f"{path}: is a link out of the encoder's folder, to {real}; put the file "
                        f"itself there")
    return path


def write_encoder_json(folder: Path, about: dict):
    """Write encoder.json: EncoderConfig's fields, the base, the history."""
    (folder / "encoder.json").write_text(json.dumps({"format": FORMAT, **about}, indent=2) + "\n")


def copy_adapters(earlier: Path | None, stages: list[str], folder: Path):
    """Copy the adapters of earlier stages from the encoder folder that this one started from."""
    for stage in stages:
        (folder / stage).mkdir()
        for name in ADAPTER:  # and nothing else that a stranger may have put there
            source = own_file(Path(earlier), f"{stage}/{name}")
            with open_regular(source) as old, open(folder / stage / name, "wb") as new:
                shutil.copyfileobj(old, new)


def read_encoder(name: str | Path, revision: str | None, make_config) -> tuple:
    """An encoder's folder; make_config(**its fields), its base as recorded, its history.

    `make_config` is EncoderConfig. Raises UserError for anything missing or invalid.
    """
    folder = find_model(encoder_of(name), revision)
    file = own_file(folder, "encoder.json")
    if not file.exists():
        raise UserError(f"{file}: missing; {folder} is no encoder's folder, nor that of a run with "
                        f"an encoder in it")
    about = read_json(file)
    if type(about.get("format")) is not int or about["format"] not in (1, FORMAT):
        raise UserError(f"{file}: format={about.get('format')!r}, this version reads 1 and "
                        f"{FORMAT}; update the code, or save the encoder anew")
    about = {**NEWER, **about}
    try:
        about["kept_tokens"] = tuple(about["kept_tokens"])
        if about["format"] == 1:
            about["max_tokens"] -= about["num_memory_tokens"]
        config = make_config(**{key: about[key] for key in make_config.__dataclass_fields__})
        base = {key: about["base"][key] for key in ("name", "revision", "sha256")}
        base |= {key: value for key, value in about["base"].items() if key in IDENTITY}
        stages = [str(stage["stage"]) for stage in about["history"]]
        if not stages or not all(isinstance(base[key], str) for key in ("name", "sha256")):
            raise TypeError("base or history")
        if base["revision"] is not None and not re.fullmatch(r"\w[\w.-]*", base["revision"]):
            raise TypeError("the base's revision")
    except UserError as error:
        raise UserError(f"{file}: {error}")
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: {error!r} is missing or odd; save it anew")
    for stage in stages:
        if not re.fullmatch(r"[a-z]\w*", stage):
            raise UserError(f"{file}: {stage!r} is no name of a stage")
    return folder, config, base, about["history"]


def require_no_base(name: str, base: str | None, other_base: bool):
    """UserError for flags about an encoder's base if the model is a Llama, which has none."""
    if base or other_base:
        raise UserError(f"--base, --other-base: {name} is no encoder's folder, which has a base, "
                        f"but a Llama; leave them out")


def require_stage(folder: Path):
    """UserError if the folder to start from is that of a run without an encoder (yet)."""
    missing = folder.parts[:1] == ("runs",)
    if folder.is_dir():
        missing = (folder / "environment.json").is_file() or not any(folder.iterdir())
    if missing:
        raise UserError(f"--model {folder}: no encoder there; run the stage before this one first "
                        f"(pretrain_ctkd.py, then contrastive.py; --resume continues an "
                        f"interrupted one), or name an encoder or a Llama")


def read_exported(folder: Path, make_config) -> tuple | None:
    """make_config(**its fields) and the history of the encoder that export.py exported here.

    None for other folders. `make_config` is EncoderConfig. UserError for invalid contents.
    """
    path = folder / "config.json"
    about = read_json(path).get("llm2comp") if path.is_file() else None
    if about is None:
        return None
    try:
        fields = {key: about[key] for key in make_config.__dataclass_fields__}
        config = make_config(**fields | {"kept_tokens": tuple(fields["kept_tokens"])})
        history = [{**stage, "stage": str(stage["stage"])} for stage in about["history"]]
        if not history:
            raise TypeError("no history")
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{path}: llm2comp, which export.py wrote, is damaged ({error}); export "
                        f"the encoder again")
    return config, history


@contextmanager
def loading_base(folder: Path):
    """Add to a UserError about the base of the encoder in `folder` how to name the base's place."""
    try:
        yield
    except UserError as error:
        reason = str(error).replace("\n", " ")
        raise UserError(f"{folder}: its base model cannot be loaded; name its place with --base "
                        f"({reason})")


def check_base(encoder, folder: Path, recorded: dict, other: bool):
    """UserError unless the encoder's base is the one that its folder says it was trained on.

    With `other` it may be another one, which is noted, and kept in the record of the base.
    """
    found = encoder.base
    place = encoder.tokenizer.file.parent
    changes = base_changes(recorded, found, lambda: sha256_of_files(weight_files(place)))
    first = {key: recorded[key] for key in ("name", "revision", "sha256")}
    if changes and not other:
        raise UserError(f"{folder}: was trained on another base than {found['name']} "
                        f"({'; '.join(changes)}; sha256 {recorded['sha256'][:12]}... recorded); "
                        f"name the right one with --base, or take this one on purpose with "
                        f"--other-base")
    if changes:
        note(f"{folder} is read on another base than it was trained on: {'; '.join(changes)}")
        encoder.base = {**found, "trained_on": first}
    elif "trained_on" in recorded:
        encoder.base = {**found, "trained_on": recorded["trained_on"]}


def read_embeddings(folder: Path, shapes: dict[str, tuple]) -> dict[str, Tensor]:
    """The memory tokens, and the trained table if there is one, of an encoder folder."""
    path = own_file(folder, "embeddings.safetensors")
    tensors = read_fitting(path, shapes, "save the encoder anew")
    if "memory_tokens" not in tensors:
        raise UserError(f"{path}: memory_tokens is missing; save the encoder anew")
    return tensors


def encoder_hash(folder: Path, stages: list[str]) -> str:
    """sha256 of everything that was trained: adapters, memory tokens, table."""
    files = {folder / "embeddings.safetensors", *(folder / stage / ADAPTER[1] for stage in stages)}
    return sha256_of_files(sorted(files))
