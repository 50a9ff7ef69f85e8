"""The files of a Llama: config.json and *.safetensors; runtime/encoders.py reads an encoder's.

Everything is checked here, by name, shape and type, and refused in one line. The results are
dictionaries and tensors, from which model.py builds the network.
"""

import re
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime.errors import UserError, note
from runtime.files import MOST_JSON, open_regular, open_tensors, read_json
from runtime.hub import COMPLETE, describe_source, find_model, without_tensors
from runtime.identity import base_record


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
        # if saved as a LlamaModel, names lack the prefix "model.", and there is no head
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
        """What an encoder records of the base that it was trained on: name, revision, identity.

        bos: the ids that are put before each text.
        """
        told = ("bos_token_id", "has_head")  # recorded as `bos` and the tensors' names
        config = {key: value for key, value in self.config.items() if key not in told}
        about = base_record(self.places, config, self.folder / "tokenizer.json", bos)
        return {"name": self.source, "revision": self.revision, **about}


def is_encoder(folder: str | Path) -> bool:
    """Whether `folder` is an encoder folder (rather than a Llama)."""
    return (Path(folder) / "encoder.json").is_file()


def encoder_of(name: str | Path) -> str:
    """The encoder in a run's folder; any other name unchanged."""
    inner = Path(name) / "encoder"
    return str(inner if is_encoder(inner) else name)


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
    # null since Mistral 0.2; for a file without the key, transformers assumes the window of 0.1
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
        "qkv_bias": kind == "qwen2",  # always, without a key for it
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
    """UserError if a text of max_tokens and its memory tokens exceed the sliding window.

    Up to the window's length all tokens see what they would see without one, causal or not; longer
    sequences need windowed attention, which is not implemented.
    """
    if window is not None and max_tokens + memory > window:
        raise UserError(f"{folder / 'config.json'}: sliding_window={window} is shorter than a text "
                        f"of up to {max_tokens} tokens and its {memory} memory tokens; cut texts "
                        f"to {window - memory} with --max-tokens")


def note_positions(encoder, *lengths: int):
    """Print a note if texts of up to these lengths, with the encoder's memory tokens, are longer
    than what its Llama was made for."""
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

    tied: lm_head.weight is left out, as it is the embedding table. Models saved without their head
    (a LlamaModel) lack the prefix `model.`. UserError for a file that is damaged, and for a name
    that occurs twice.
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
    """The tensor `key` of an open file; UserError unless it is floating-point and of this shape."""
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
    """The tensors of a file, all of which must be in `shapes`; none is read unless all fit."""
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
    """Write a safetensors file of the tensors, cast to `dtype` (None: unchanged)."""
    tensors = {name: (t if dtype is None else t.to(dtype)).detach().cpu().contiguous()
               for name, t in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
