"""The files of a model: config.json, *.safetensors, PEFT adapters, encoder folders.

Everything is checked here, by name, shape and type, and refused in one line. What comes out are
dictionaries and tensors, from which model.py and lora.py build the network.
"""

import json
import os
import re
import shutil
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime.errors import UserError, check_text, note
from runtime.files import MOST_JSON, open_regular, open_tensors, read_json, sha256_of_files
from runtime.hub import COMPLETE, describe_source, find_model, without_tensors
from runtime.identity import base_changes, base_record


class ModelFolder:
    """A Llama as files: `demo`, a folder in Hugging Face's layout, or a hub repository.

    config: LlamaConfig's fields from its config.json, checked. places: each tensor that is read,
    under the name that it has in a causal language model -> its file, its name there.
    """

    def __init__(self, name: str | Path, revision: str | None, model_types,
                 base_of: Path | None = None):
        self.folder = find_model(name, revision, base_of)
        if is_encoder(encoder_of(self.folder)):
            raise UserError(f"{name}: is an encoder, a plain Llama is needed here; name its base, "
                            f"which encoder.json names")
        run = (self.folder / "environment.json").is_file()
        if run and not any((self.folder / file).exists() for file in COMPLETE):
            raise UserError(f"{name}: is a run that has no encoder yet; end it with --resume")
        self.files = weight_files(self.folder)
        path = self.folder / "config.json"
        self.config = read_llama_config(path, model_types)
        self.source, self.revision = describe_source(name, self.folder)
        self.places = tensor_places(self.files, self.config["tie_word_embeddings"])
        # saved without a head (a LlamaModel) all names lack what they have in common otherwise
        bare = not any(key.startswith("model.") for _, key in self.places.values())
        self.config["has_head"] = not bare or "lm_head.weight" in self.places
        if (file := self.folder / "tokenizer.json").exists():
            open_regular(file, MOST_JSON).close()

    def weights(self, shapes: dict[str, tuple], dtype: torch.dtype, device) -> dict[str, Tensor]:
        """All tensors by name, each cast and moved as it is read; strict in names and shapes.

        Raises UserError for a file that is damaged and for a tensor that is missing, extra or of
        another shape than `shapes` has.
        """
        found: dict[str, Tensor] = {}
        for path in dict.fromkeys(path for path, _ in self.places.values()):
            here = [(name, key) for name, (file, key) in self.places.items() if file == path]
            with open_tensors(path) as file:
                for name, key in here:
                    tensor = checked_tensor(file, key, shapes.get(name), path)
                    found[name] = tensor.to(device=device, dtype=dtype)
        if missing := sorted(shapes.keys() - found.keys()):
            raise UserError(f"{self.folder}: {len(missing)} tensors are missing, the first is "
                            f"{missing[0]}")
        return found

    def record(self, bos: list[int]) -> dict:
        """What an encoder knows of the base that it was trained on: name, revision, identity.

        bos: the ids that are put before each text.
        """
        told = ("bos_token_id", "has_head")  # by `bos` and by the tensors' names
        config = {key: value for key, value in self.config.items() if key not in told}
        about = base_record(self.places, config, self.folder / "tokenizer.json", bos)
        return {"name": self.source, "revision": self.revision, **about}


# ---------------------------------------------------------------------------------------------
# config.json of a Llama, through a whitelist of keys
# ---------------------------------------------------------------------------------------------

ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_llama_config(path: Path, model_types) -> dict:
    """The keys of LlamaConfig from a config.json; UserError names what is missing or unsupported.

    model_types: the values of model_type for which there is a network.
    """
    raw = read_json(path)
    kind, number = raw.get("model_type"), partial(read_number, raw, path)

    def refuse(key, known):
        raise UserError(f"{path}: {key}={raw.get(key)!r} is not supported, only {known}")

    if kind not in list(model_types):
        refuse("model_type", ", ".join(map(repr, model_types)))
    if raw.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "'silu'")
    for key in ("attention_bias", "mlp_bias", "quantization_config", "partial_rotary_factor",
                "use_sliding_window"):
        if raw.get(key):
            refuse(key, "a model without it")
    layers = raw.get("layer_types") or []
    for layer in layers if isinstance(layers, list) else [layers]:
        if layer != "full_attention":
            raise UserError(f"{path}: layer_types has {layer!r}, only 'full_attention' is read")

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    bos, eps = raw.get("bos_token_id"), raw.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, float | int) or not 0 <= eps < 1:
        raise UserError(f"{path}: rms_norm_eps={eps!r} must be a number, zero or above, below 1")
    # null since Mistral's version 0.2; transformers gives a file without the key the first one's
    windowed = kind == "mistral" and raw.get("sliding_window", 4096) is not None
    config = {
        "model_type": kind,
        "vocab_size": number("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": number("intermediate_size"),
        "num_hidden_layers": number("num_hidden_layers", most=1000),
        "num_attention_heads": heads,
        "num_key_value_heads": number("num_key_value_heads", heads),
        "head_dim": number("head_dim", 128 if kind == "qwen3" else hidden // heads),
        "rms_norm_eps": float(eps),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "bos_token_id": bos if isinstance(bos, int) else None,
        "rope": read_rope(raw, path),
        "qkv_bias": kind == "qwen2",  # always, by no key
        "qk_norm": kind == "qwen3",
        "sliding_window": number("sliding_window", 4096) if windowed else None,
    }
    if heads % config["num_key_value_heads"] or config["head_dim"] % 2:
        raise UserError(f"{path}: num_attention_heads={heads} must be a multiple of "
                        f"num_key_value_heads={config['num_key_value_heads']}, and head_dim="
                        f"{config['head_dim']} even")
    if heads * config["head_dim"] > 2**24:
        raise UserError(f"{path}: num_attention_heads={heads} times head_dim={config['head_dim']} "
                        f"must be at most {2**24}")
    return config


def read_number(raw: dict, path: Path, key: str, default: int | None = None, most=2**24) -> int:
    """The whole number above zero under `key`, or its default; UserError if there is none."""
    value = raw.get(key) if raw.get(key) is not None else default
    if value is None:
        raise UserError(f"{path}: the key {key} is missing; copy it from the model's page")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {key}={value!r} must be a whole number above zero")
    if value > most:  # a damaged file: building such a network would never end
        raise UserError(f"{path}: {key}={value!r} must be at most {most}")
    return value


def check_window(folder: Path, window: int | None, max_tokens: int, memory: int):
    """UserError if a text of max_tokens and its memory tokens are more than a sliding window.

    Up to the window all tokens see what they see without one, causal or not; beyond it they would
    not, which is not computed here.
    """
    if window is not None and max_tokens + memory > window:
        raise UserError(f"{folder / 'config.json'}: sliding_window={window} is shorter than a text "
                        f"of up to {max_tokens} tokens and its {memory} memory tokens; cut texts "
                        f"to {window - memory} with --max-tokens")


def note_positions(encoder, *lengths: int):
    """Note that texts of up to such lengths, with the encoder's memory tokens, are longer than what
    its Llama was made for."""
    path = encoder.tokenizer.file.with_name("config.json")
    most = read_json(path).get("max_position_embeddings")
    tokens = max(lengths) + encoder.config.num_memory_tokens
    if isinstance(most, int) and tokens > most:
        note(f"{path}: max_position_embeddings={most}, and a text may have {tokens} tokens with "
             f"its memory tokens; one that is longer is read worse")


def read_rope(raw: dict, path: Path) -> dict:
    """The rotary settings, from the new spelling (rope_parameters) or the old (rope_scaling)."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise UserError(f"{path}: rope_parameters (or rope_scaling) is {given!r}, not an object")
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise UserError(f"{path}: rope_type={kind!r} is not supported, only {', '.join(ROPE_KEYS)}")
    theta = given.get("rope_theta", raw.get("rope_theta", 10000.0))
    rope = {"rope_type": kind, "rope_theta": theta}
    for key in ROPE_KEYS[kind]:
        rope[key] = given.get(key, raw.get("max_position_embeddings") if "max" in key else None)
    for key, value in rope.items():
        if key != "rope_type" and not (isinstance(value, int | float) and 0 < value < 1e30):
            raise UserError(f"{path}: rope setting {key}={value!r} must be a number above zero")
    return {key: value if key == "rope_type" else float(value) for key, value in rope.items()}


# ---------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those of its index, else model.safetensors."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        names = ["model.safetensors"]
        if not (folder / names[0]).exists():
            inside = islice((*folder.glob("*"), *folder.glob("*/*")), 10_000)
            raise without_tensors(folder, [str(path.relative_to(folder)) for path in inside])
    else:
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UserError(f"{index}: no weight_map in it; fetch it again")
        names = sorted(set(map(str, names.values())))
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise UserError(f"{index}: names the file {name!r}; only plain *.safetensors names "
                            f"beside it are read")
        if not (folder / name).exists():
            raise UserError(f"{folder / name}: missing; fetch the whole model again")
    return [folder / name for name in names]


def tensor_places(files: list[Path], tied: bool) -> dict[str, tuple[Path, str]]:
    """The tensors of a model, by their names in a causal language model -> file, name there.

    tied: a lm_head.weight is left out, it is the embedding table. Models saved without their head
    (a LlamaModel) lack the `model.` before each name. UserError for a file that is damaged, and for
    a name that occurs twice.
    """
    found: dict[str, tuple[Path, str]] = {}
    for path in files:
        with open_tensors(path) as file:
            for key in file.keys():
                if key.endswith("rotary_emb.inv_freq"):  # stored by old Llama-2 shards
                    continue
                if found.setdefault(key, (path, key))[0] != path:
                    raise UserError(f"{path}: has the tensor {key}, which {found[key][0].name} "
                                    f"has, too; fetch the whole model again")
    if tied:
        found.pop("lm_head.weight", None)
    bare = not any(key.startswith("model.") for key in found)
    return {f"model.{key}" if bare and key != "lm_head.weight" else key: place
            for key, place in found.items()}


def checked_tensor(file, key: str, shape: tuple | None, path: Path) -> Tensor:
    """The tensor `key` of an open file; UserError unless it has this shape and floats."""
    if shape is None:
        raise UserError(f"{path}: has the tensor {key}, which config.json has no place for; is it "
                        f"the config of another model?")
    if (found := tuple(file.get_slice(key).get_shape())) != shape:
        raise UserError(f"{path}: {key} has the shape {found}, config.json says {shape}")
    tensor = file.get_tensor(key)
    if not tensor.is_floating_point():
        raise UserError(f"{path}: {key} is {tensor.dtype}; only floating-point weights are read")
    return tensor


def require_head(name: str | Path, has_head: bool):
    """UserError if the model has no language-model head, without which nothing can be predicted."""
    if not has_head:
        raise UserError(f"{name}: has no language-model head (it was saved as a LlamaModel), which "
                        f"stage 1 predicts tokens with; name the causal language model that it was "
                        f"made of, or go on with contrastive.py")


def read_fitting(path: Path, shapes: dict[str, tuple], fix: str) -> dict[str, Tensor]:
    """The tensors of a file whose names are among `shapes`; nothing is read unless all fit."""
    with open_tensors(path, fix) as file:
        for key in sorted(file.keys()):
            shape = tuple(file.get_slice(key).get_shape())
            if shapes.get(key) != shape:
                raise UserError(f"{path}: {key} has the shape {shape}, expected {shapes.get(key)}; "
                                f"{fix}")
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {key} is {tensor.dtype}, no floating-point numbers; {fix}")
    return tensors


def write_tensors(path: Path, tensors: dict[str, Tensor], dtype=torch.float32):
    """A safetensors file of the tensors, cast to `dtype` (None: as they are)."""
    tensors = {name: (t if dtype is None else t.to(dtype)).detach().cpu().contiguous()
               for name, t in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


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

FORMAT = 2  # of encoder.json; in format 1 max_tokens counted the memory tokens, too
NEWER = {"document_template": "", "kept_tokens": [], "bos": -1,  # than the first folders, results
         "special_tokens": "parsed"}
IDENTITY = ("weights", "config", "tokenizer", "bos", "trained_on")  # newer parts of a base's record


def check_encoder_config(config, types: dict[str, type], poolings):
    """UserError for an EncoderConfig that no encoder can have; TypeError for a field's type."""
    for name, kind in types.items():
        if type(value := getattr(config, name)) is not kind:
            raise TypeError(f"{name}={value!r}: {kind.__name__} expected")
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


def is_encoder(folder: str | Path) -> bool:
    """Whether `folder` is an encoder folder (rather than a Llama)."""
    return (Path(folder) / "encoder.json").is_file()


def encoder_of(name: str | Path) -> str:
    """The encoder in a run's folder; any other name as it is."""
    inner = Path(name) / "encoder"
    return str(inner if is_encoder(inner) else name)


def own_file(folder: Path, name: str) -> Path:
    """folder / name; UserError if a link leads out of the encoder's folder.

    The links of the hub's cache lead to the blobs of the same repository. Any other file of this
    machine would go into what is saved, and published, next.
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

    `make_config` is EncoderConfig. Raises UserError for what is missing or cannot be.
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
    """UserError for flags about an encoder's base beside a model that has none."""
    if base or other_base:
        raise UserError(f"--base, --other-base: {name} is no encoder's folder, which has a base, "
                        f"but a Llama; leave them out")


def require_stage(folder: Path):
    """UserError for the place of a run that has no encoder (yet), given to start from."""
    missing = folder.parts[:1] == ("runs",)
    if folder.is_dir():
        missing = (folder / "environment.json").is_file() or not any(folder.iterdir())
    if missing:
        raise UserError(f"--model {folder}: no encoder there; run the stage before this one first "
                        f"(pretrain_ctkd.py, then contrastive.py; --resume continues an "
                        f"interrupted one), or name an encoder or a Llama")


def read_exported(folder: Path, make_config) -> tuple | None:
    """make_config(**its fields) and the history of the encoder that export.py made the folder of.

    None for other folders. `make_config` is EncoderConfig. UserError for what cannot be.
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
    """Make a UserError about the base of the encoder in `folder` say how to name its place."""
    try:
        yield
    except UserError as error:
        reason = str(error).replace("\n", " ")
        raise UserError(f"{folder}: its base model cannot be loaded; name its place with --base "
                        f"({reason})")


def check_base(encoder, folder: Path, recorded: dict, other: bool):
    """UserError unless the encoder's base is the one that its folder says it was trained on.

    With `other` it may be another one, which is noted, and told in the record of the base.
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
    """sha256 over all that was trained: adapters, memory tokens, table."""
    files = {folder / "embeddings.safetensors", *(folder / stage / ADAPTER[1] for stage in stages)}
    return sha256_of_files(sorted(files))
