"""The files of a model: config.json, *.safetensors, PEFT adapters, encoder folders.

Everything is checked here, by name, shape and type, and refused in one line. What comes out are
dictionaries and tensors, from which model.py and lora.py build the network.
"""

import json
import re
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.errors import UserError, check_text
from runtime.files import read_json, sha256_of_files
from runtime.hub import describe_source, find_model


class ModelFolder:
    """A Llama as files: `demo`, a folder in Hugging Face's layout, or a hub repository.

    config: LlamaConfig's fields from its config.json, checked.
    """

    def __init__(self, name: str | Path, revision: str | None, model_types):
        self.folder = find_model(name, revision)
        if is_encoder(self.folder):
            raise UserError(f"{name}: is an encoder, a plain Llama is needed here; name its base, "
                            f"which encoder.json names")
        self.config = read_llama_config(self.folder / "config.json", model_types)
        self.source, self.revision = describe_source(name, self.folder)

    def weights(self, shapes: dict[str, tuple], dtype: torch.dtype, device) -> dict[str, Tensor]:
        """All tensors by name; strict in names and shapes."""
        tied = self.config["tie_word_embeddings"]
        return read_weights(self.folder, shapes, tied, dtype, device)

    def record(self) -> dict:
        """Name, revision and sha256, by which an encoder knows the base that it was trained on."""
        return {"name": self.source, "revision": self.revision,
                "sha256": sha256_of_files(weight_files(self.folder))}


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
    return rope


# ---------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those of its index, else model.safetensors."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        names = ["model.safetensors"]
    else:
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UserError(f"{index}: no weight_map in it; fetch it again")
        names = sorted(set(map(str, names.values())))
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise UserError(f"{index}: names the file {name!r}; only plain *.safetensors names "
                            f"beside it are read")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing; fetch the whole model again")
    return [folder / name for name in names]


def read_weights(
    folder: Path, shapes: dict[str, tuple], tied: bool, dtype: torch.dtype, device
) -> dict[str, Tensor]:
    """The tensors of a model folder, each cast and moved as it is read; strict in name and shape.

    tied: a lm_head.weight is not read, it is the embedding table. Raises UserError for a file that
    is damaged and for a tensor that is missing, extra or of another shape than `shapes` has.
    """
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    if key.endswith("rotary_emb.inv_freq"):  # stored by old Llama-2 shards
                        continue
                    if key == "lm_head.weight" and tied:
                        continue
                    shape = tuple(file.get_slice(key).get_shape())
                    if key not in shapes or key in found:
                        raise UserError(f"{path}: has the tensor {key}, which config.json has no "
                                        f"place for; is it the config of another model?")
                    if shape != shapes[key]:
                        raise UserError(f"{path}: {key} has the shape {shape}, config.json says "
                                        f"{shapes[key]}")
                    tensor = file.get_tensor(key)
                    if not tensor.is_floating_point():
                        raise UserError(f"{path}: {key} is {tensor.dtype}; only floating-point "
                                        f"weights are read")
                    found[key] = tensor.to(device=device, dtype=dtype)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or cut off ({error}); fetch it again")
    if missing := sorted(shapes.keys() - found.keys()):
        raise UserError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return found


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


def read_adapter(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """LoraConfig's fields and the tensors of a stored adapter.

    Raises UserError for damaged files and for kinds of adapters other than plain LoRA.
    """
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    try:
        peft = json.loads(config_file.read_text())
        targets = peft["target_modules"]
        targets = (targets,) if isinstance(targets, str) else tuple(sorted(targets))
        settings = {"r": int(peft["r"]), "alpha": float(peft["lora_alpha"]),
                    "dropout": float(peft.get("lora_dropout", 0.0)), "targets": targets}
        if settings["r"] < 1:
            raise ValueError(f"r is {settings['r']}")
        if not 0 <= settings["dropout"] < 1 or not abs(settings["alpha"]) < 1e38:
            raise ValueError(f"lora_dropout is {settings['dropout']}, lora_alpha "
                             f"{settings['alpha']}")
        tensors = load_file(weights_file)
        for name, tensor in tensors.items():
            if settings["r"] not in tensor.shape or not tensor.is_floating_point():
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, r "
                                 f"{settings['r']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError,
            RecursionError, SafetensorError) as error:
        raise UserError(f"{folder}: no readable LoRA adapter in adapter_config.json and "
                        f"adapter_model.safetensors ({error!r}); write it anew")
    unsupported = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
    for key in unsupported:
        if peft.get(key):
            raise UserError(f"{config_file}: {key}={peft[key]!r} is not supported; plain LoRA only")
    return settings, tensors


def check_adapter_fits(folder: Path, tensors: dict[str, Tensor], slots: dict[str, Tensor]):
    """UserError unless an adapter's tensors have exactly the names and shapes of the slots."""
    odd = sorted(slots.keys() ^ tensors.keys()) or sorted(
        name for name in slots if slots[name].shape != tensors[name].shape
    )
    if odd:
        raise UserError(f"{folder / 'adapter_model.safetensors'}: {odd[0]} is missing, extra or of "
                        f"another shape; is the adapter of another base model?")


# ---------------------------------------------------------------------------------------------
# Encoder folders: encoder.json, embeddings.safetensors, one adapter per stage
# ---------------------------------------------------------------------------------------------

FORMAT = 2  # of encoder.json; in format 1 max_tokens counted the memory tokens, too


def check_encoder_config(config, types: dict[str, type], poolings):
    """UserError for an EncoderConfig that no encoder can have; TypeError for a field's type."""
    for name, kind in types.items():
        if type(value := getattr(config, name)) is not kind:
            raise TypeError(f"{name}={value!r}: {kind.__name__} expected")
    if config.pooling not in poolings:
        raise UserError(f"pooling={config.pooling!r}: unknown; one of {', '.join(poolings)}")
    if config.attention not in ("bidirectional", "causal"):
        raise UserError(f"attention={config.attention!r}: bidirectional or causal")
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


def write_encoder_json(folder: Path, about: dict):
    """Write encoder.json: EncoderConfig's fields, the base, the history."""
    (folder / "encoder.json").write_text(json.dumps({"format": FORMAT, **about}, indent=2) + "\n")


def copy_adapters(earlier: Path | None, stages: list[str], folder: Path):
    """Copy the adapters of earlier stages from the encoder folder that this one started from."""
    for stage in stages:
        shutil.copytree(Path(earlier) / stage, folder / stage)


def read_encoder(folder: Path, make_config) -> tuple:
    """What encoder.json says: make_config(**its fields), the base as recorded, the history.

    `make_config` is EncoderConfig. Raises UserError for what is missing or cannot be.
    """
    file = folder / "encoder.json"
    about = read_json(file)
    if type(about.get("format")) is not int or about["format"] not in (1, FORMAT):
        raise UserError(f"{file}: format={about.get('format')!r}, this version reads 1 and "
                        f"{FORMAT}; update the code, or save the encoder anew")
    newer = {"document_template": "", "kept_tokens": [], "bos": -1}  # than the first folders
    about = {**newer, **about}
    try:
        about["kept_tokens"] = tuple(about["kept_tokens"])
        if about["format"] == 1:
            about["max_tokens"] -= about["num_memory_tokens"]
        config = make_config(**{key: about[key] for key in make_config.__dataclass_fields__})
        base = {key: about["base"][key] for key in ("name", "revision", "sha256")}
        stages = [str(stage["stage"]) for stage in about["history"]]
        if not stages or not all(isinstance(value, str) for key, value in base.items()
                                 if key != "revision" or value is not None):
            raise TypeError("base or history")
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: {error!r} is missing or odd; save it anew")
    except UserError as error:
        raise UserError(f"{file}: {error}")
    for stage in stages:
        if not re.fullmatch(r"[a-z]\w*", stage):
            raise UserError(f"{file}: {stage!r} is no name of a stage")
    return config, base, about["history"]


@contextmanager
def loading_base(folder: Path):
    """Make a UserError about the base of the encoder in `folder` say how to name its place."""
    try:
        yield
    except UserError as error:
        reason = str(error).replace("\n", " ")
        raise UserError(f"{folder}: its base model cannot be loaded; name its place with --base "
                        f"({reason})")


def check_base(folder: Path, source: str, recorded: dict, found: dict):
    """UserError unless the base found is the one that the encoder in `folder` was trained on."""
    if found["sha256"] != recorded["sha256"]:
        raise UserError(f"{folder}: was trained on another base than {source} (sha256 "
                        f"{recorded['sha256'][:12]}..., found {found['sha256'][:12]}...); "
                        f"name the right one with --base")


def read_embeddings(folder: Path, shapes: dict[str, tuple]) -> dict[str, Tensor]:
    """The memory tokens, and the trained table if there is one, of an encoder folder."""
    path = folder / "embeddings.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); save the encoder anew")
    for key, tensor in tensors.items():
        if shapes.get(key) != tuple(tensor.shape) or not tensor.is_floating_point():
            raise UserError(f"{path}: {key} {tuple(tensor.shape)} of {tensor.dtype}, expected "
                            f"{shapes.get(key)}, floating point; save the encoder anew")
    if "memory_tokens" not in tensors:
        raise UserError(f"{path}: memory_tokens is missing; save the encoder anew")
    return tensors


def encoder_hash(folder: Path) -> str:
    """sha256 over all that was trained: adapters, memory tokens, table."""
    return sha256_of_files(sorted(folder.rglob("*.safetensors")))
