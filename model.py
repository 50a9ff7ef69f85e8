"""The Llama family by hand, and the text encoder made of it (LLM2Comp, arXiv 2511.17129).

Letters: N texts, T tokens of all of them in one row, K memory tokens, D hidden size, H query heads,
         G key-value heads, V vocabulary.

There is no padding and no mask: a batch is one row of T tokens plus the list of its N lengths.
Only `attend` looks at the lengths. The same frozen weights serve as language model g_phi
(`causal=True, adapters=False`) and, with adapters, as encoder f_theta (`causal=False,
adapters=True`): mask and adapters are arguments of the forward call.

    python model.py merge ENCODER OUT      write an encoder as a plain Hugging Face folder
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import lora
from data import UserError
from data.tokenizer import Tokenizer
from lora import LoraConfig, LoraLinear

DEMO_LLAMA = Path(__file__).parent / "data" / "demo" / "llama"  # what the name `demo` stands for

# ---------------------------------------------------------------------------------------------
# Configuration: Hugging Face's config.json, through a whitelist of keys
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture, under the names of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    rope: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})


def read_json(path: Path, whole: str = "a complete model folder") -> dict:
    """The JSON object in `path`; UserError if there is none. `whole`: what its folder should be."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; is {path.parent} {whole}?")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); fetch it again")
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected, this is a {type(value).__name__}")
    return value


def read_config(path: Path) -> LlamaConfig:
    """LlamaConfig from a config.json; UserError names what is missing or not supported."""
    raw = read_json(path)

    def refuse(key, known):
        raise UserError(f"{path}: {key}={raw.get(key)!r} is not supported, only {known}")

    if raw.get("model_type") != "llama":
        refuse("model_type", "'llama'")
    if raw.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "'silu'")
    for key in ("attention_bias", "mlp_bias", "quantization_config", "partial_rotary_factor"):
        if raw.get(key):
            refuse(key, "a model without it")

    def number(key, default=None, most=2**24):
        """The whole number above zero under `key`, or its default."""
        value = raw.get(key) if raw.get(key) is not None else default
        if value is None:
            raise UserError(f"{path}: the key {key} is missing; copy it from the model's page")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{path}: {key}={value!r} must be a whole number above zero")
        if value > most:  # it would only fail later, or take for ever
            raise UserError(f"{path}: {key}={value!r} must be at most {most}")
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    bos, eps = raw.get("bos_token_id"), raw.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, float | int) or not 0 <= eps < 1:
        raise UserError(f"{path}: rms_norm_eps={eps!r} must be a number, zero or above, below 1")
    config = LlamaConfig(
        vocab_size=number("vocab_size"),
        hidden_size=hidden,
        intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers", most=1000),
        num_attention_heads=heads,
        num_key_value_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden // heads),
        rms_norm_eps=float(eps),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        bos_token_id=bos if isinstance(bos, int) else None,
        rope=read_rope(raw, path),
    )
    if heads % config.num_key_value_heads or config.head_dim % 2:
        raise UserError(f"{path}: num_attention_heads={heads} must be a multiple of "
                        f"num_key_value_heads={config.num_key_value_heads}, and head_dim="
                        f"{config.head_dim} even")
    if heads * config.head_dim > 2**24:
        raise UserError(f"{path}: num_attention_heads={heads} times head_dim={config.head_dim} "
                        f"must be at most {2**24}")
    return config


ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


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
# The network. Parameter names are the upstream ones, so that loading needs no mapping.
# ---------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the root mean square in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(wide(x), x.shape[-1:], eps=self.eps).to(x.dtype)


def inverse_frequencies(rope: dict, head_dim: int) -> Tensor:
    """Radians per position of each of the head_dim / 2 pairs, fp32; `llama3` as in Llama 3.1.

    llama3 divides slow pairs (few turns within the original context) by `factor`, keeps fast ones,
    and blends in between.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / rope["rope_theta"] ** exponents
    if rope["rope_type"] == "linear":
        return inv_freq / rope["factor"]
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * inv_freq + (1 - keep) * inv_freq / rope["factor"]
    return inv_freq


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021): pair (i, i + head_dim / 2) of x (T, heads, head_dim)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool, dropout=0.0):
    """Softmax attention within each sequence of a packed row; causal or bidirectional by a boolean.

    q (T, H, head_dim), k and v (T, G, head_dim) -> (T, H, head_dim). On CUDA one call of the fused
    kernel takes all sequences; elsewhere neighbours of equal length share a call. On the CPU bf16
    has a way of its own up to 512 tokens; above, it is computed in fp32.
    """
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    if takes_any_lengths(q):
        return attend_jagged(q, k, v, lengths, causal, dropout)
    bf16 = q.device.type == "cpu" and q.dtype == torch.bfloat16
    groups = alike(lengths) if bf16 else [list(same) for _, same in groupby(lengths)]
    outputs, sizes = [], [sum(group) for group in groups]
    for group, *part in zip(groups, q.split(sizes), k.split(sizes), v.split(sizes)):
        if bf16 and group[0] <= 512:
            outputs.append(attend_bf16(*part, group, causal, dropout))
            continue
        batch = [t.unflatten(0, (len(group), -1)).transpose(1, 2) for t in part]
        if bf16:
            batch = [t.float() for t in batch]
        out = F.scaled_dot_product_attention(*batch, dropout_p=dropout, is_causal=causal)
        outputs.append(out.transpose(1, 2).flatten(0, 1).to(q.dtype))
    return torch.cat(outputs)


def alike(lengths: list[int]) -> list[list[int]]:
    """Groups of neighbours for bf16 on the CPU: 8 short ones that are padded to the same multiple
    of 32, where there are so many; else each alone, as the shapes of the products must be few."""
    groups = []
    for blocks, same in groupby(lengths, key=lambda length: -(-length // 32)):
        same = list(same)
        whole = len(same) - len(same) % 8 if blocks <= 2 else 0
        groups += [same[i : i + 8] for i in range(0, whole, 8)] + [[n] for n in same[whole:]]
    return groups


def attend_bf16(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool, dropout: float
) -> Tensor:
    """`attend` for a few sequences of similar length as two bf16 products, for CPUs.

    There the fused kernel gains nothing from bf16 (bench/NOTES.md). Products are compiled for each
    new shape, so lengths are padded to a multiple of 32; the first product also adds the mask that
    hides the padding, or the future. Its scores are rounded to bf16, as in transformers' eager
    attention. Keeps H L^2 weights a sequence for backward (with dropout three times that).
    """
    heads, size = q.shape[1], max(lengths) + -max(lengths) % 32

    def padded(t: Tensor) -> Tensor:
        """(T, H, head_dim) -> (n H, size, head_dim)."""
        rows = [F.pad(rows, (0, 0, 0, 0, 0, size - len(rows))) for rows in t.split(lengths)]
        return torch.stack(rows).transpose(1, 2).flatten(0, 1)

    if causal:
        mask = torch.full((size, size), -math.inf, dtype=q.dtype).triu(1)
    else:
        outside = torch.arange(size) >= torch.tensor(lengths)[:, None]
        mask = torch.zeros(outside.shape, dtype=q.dtype).masked_fill(outside, -math.inf)
        mask = mask.repeat_interleave(heads, dim=0)[:, None]
    scores = torch.baddbmm(mask, padded(q), padded(k).mT, alpha=q.shape[-1] ** -0.5)
    out = lora.dropout(scores.softmax(dim=-1), dropout) @ padded(v)
    sequences = out.unflatten(0, (-1, heads)).transpose(1, 2)  # (n, size, H, head_dim)
    return torch.cat([rows[:length] for rows, length in zip(sequences, lengths)])


def takes_any_lengths(q: Tensor) -> bool:
    """Whether a fused kernel takes q's heads (T, H, head_dim) for sequences of any lengths.

    Nested tensors, by which SDPA is told so, cannot be made in inference mode (but under no_grad).
    """
    if q.device.type != "cuda" or q.dtype == torch.float64 or torch.is_inference_mode_enabled():
        return False
    if q.dtype == torch.float32:
        return q.shape[-1] % 4 == 0
    ampere = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return ampere and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def attend_jagged(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool, dropout):
    """`attend` as one call of FlashAttention (in fp32 of its memory-efficient sister)."""
    about = {"offsets": offsets_of(tuple(lengths), q.device), "min_seqlen": min(lengths),
             "max_seqlen": max(lengths)}  # known here, so that nothing waits for the device
    nested = [torch.nested.nested_tensor_from_jagged(t, **about).transpose(1, 2) for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*nested, dropout_p=dropout, is_causal=causal)
    return out.transpose(1, 2).values()


@lru_cache(maxsize=4096)
def offsets_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the sequences begin and end (N + 1,).

    To torch each offsets tensor is another jagged size, and a recomputed forward pass must repeat
    its sizes: equal lengths have the same tensor.
    """
    return to_device(torch.tensor([0, *accumulate(lengths)]), device)


def last_of_each(x: Tensor, lengths: list[int], last: list[int] | None) -> Tensor:
    """The last[i] last rows of each sequence i of a packed row x (T, D); all if `last` is None."""
    if last is None:
        return x
    sizes = [size for length, n in zip(lengths, last) for size in (length - n, n)]
    return steady(torch.cat(x.split(sizes)[1::2]))


def steady(x: Tensor) -> Tensor:
    """x (T, D), in bf16 on the CPU with rows of zeros up to a multiple of 64.

    There products are compiled for each number of rows: this keeps those numbers few.
    """
    missing = -len(x) % 64 if x.device.type == "cpu" and x.dtype == torch.bfloat16 else 0
    return F.pad(x, (0, 0, 0, missing)) if missing else x


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = LoraLinear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = LoraLinear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = LoraLinear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = LoraLinear(c.num_attention_heads * c.head_dim, c.hidden_size)

    def forward(self, x, cos, sin, lengths, causal, adapters, dropout, last):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x, adapters).unflatten(-1, (-1, self.head_dim)) for p in projections)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = attend(q, k, v, lengths, causal, dropout).flatten(1)
        return self.o_proj(last_of_each(out, lengths, last), adapters)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = LoraLinear(c.hidden_size, c.intermediate_size)
        self.up_proj = LoraLinear(c.hidden_size, c.intermediate_size)
        self.down_proj = LoraLinear(c.intermediate_size, c.hidden_size)

    def forward(self, x, adapters):
        gate = F.silu(self.gate_proj(x, adapters))
        return self.down_proj(gate * self.up_proj(x, adapters), adapters)


class Block(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, lengths, causal, adapters, dropout, last=None):
        """x (T, D) -> (T, D), or the `last` rows of each sequence only."""
        attended = self.self_attn(
            self.input_layernorm(x), cos, sin, lengths, causal, adapters, dropout, last
        )
        x = last_of_each(x, lengths, last) + attended
        return x + self.mlp(self.post_attention_layernorm(x), adapters)


class Llama(nn.Module):
    """A Llama over packed rows: input embeddings in, hidden states out."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # activations again in the backward pass instead of keeping them
        blocks = (Block(config) for _ in range(config.num_hidden_layers))
        # nn.Embedding(V, D) would draw the table; on `meta` torch imports sympy for that, a second
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding.from_pretrained(table, freeze=False),
            "layers": nn.ModuleList(blocks),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The language-model head (V, D)."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def embed(self, ids: Tensor) -> Tensor:
        """ids (T,) -> rows of g_phi's own table (T, D)."""
        return self.model.embed_tokens(ids)

    def forward(
        self, x: Tensor, lengths: list[int], causal: bool, adapters=False, dropout=0.0,
        last: list[int] | None = None,
    ) -> Tensor:
        """x (T, D) input embeddings -> (T, D) hidden states after the final RMSNorm.

        `lengths` sum to T and positions count from 0 in each sequence; `dropout` is that of the
        attention weights and takes part in training mode only. With `last` only the last[i] states
        of each sequence i are returned, and only they are computed after the last attention.
        """
        rows, tokens, x = sum(last or lengths), len(x), steady(x)
        if len(x) > tokens:  # what was added is a sequence of its own
            lengths, last = [*lengths, len(x) - tokens], last and [*last, 0]
        if not self.training:
            dropout = 0.0
        cos, sin = self.rotary_table(lengths, x)
        inputs = cos, sin, lengths, causal, adapters, dropout
        for block in self.model.layers:
            of_each = last if block is self.model.layers[-1] else None
            if self.recompute:
                x = checkpoint(block, x, *inputs, of_each, use_reentrant=False)
            else:
                x = block(x, *inputs, of_each)
        return self.model.norm(x)[:rows]

    def rotary_table(self, lengths: list[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (T, 1, head_dim), computed in fp32 and cast to the activations' dtype."""
        positions = to_device(torch.cat([torch.arange(n) for n in lengths]), like.device)
        pairs = inverse_frequencies(self.config.rope, self.config.head_dim)
        angles = torch.outer(positions, to_device(pairs, like.device))
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


# ---------------------------------------------------------------------------------------------
# Loading: from a folder or the hub, strict, tensor by tensor
# ---------------------------------------------------------------------------------------------


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


def find_device(name: str) -> torch.device:
    """The device of a --device flag: `auto` is cuda where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: unknown; auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine or this torch has no CUDA; use cpu")
    return torch.device(name)


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


def load_llama(
    name: str | Path, revision: str | None = None, dtype=torch.float32, device="cpu"
) -> Llama:
    """A frozen Llama from a folder or the hub, each tensor cast and moved as it is read.

    Raises UserError for a file that is damaged and for a tensor that is missing, extra or of
    another shape than config.json says.
    """
    folder = find_model(name, revision)
    with torch.device("meta"):
        llama = Llama(read_config(folder / "config.json"))
    slots, seen = dict(llama.named_parameters()), {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    if key.endswith("rotary_emb.inv_freq"):  # stored by old Llama-2 shards
                        continue
                    if key == "lm_head.weight" and llama.config.tie_word_embeddings:
                        continue
                    shape = tuple(file.get_slice(key).get_shape())
                    if key not in slots or key in seen:
                        raise UserError(f"{path}: has the tensor {key}, which config.json has no "
                                        f"place for; is it the config of another model?")
                    if shape != tuple(slots[key].shape):
                        raise UserError(f"{path}: {key} has the shape {shape}, config.json says "
                                        f"{tuple(slots[key].shape)}")
                    tensor = file.get_tensor(key)
                    if not tensor.is_floating_point():
                        raise UserError(f"{path}: {key} is {tensor.dtype}; only floating-point "
                                        f"weights are read")
                    seen[key] = tensor.to(device=device, dtype=dtype)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or cut off ({error}); fetch it again")
    if missing := sorted(slots.keys() - seen.keys()):
        raise UserError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    llama.load_state_dict(seen, strict=True, assign=True)
    return llama.requires_grad_(False).eval()


def fingerprint(folder: Path) -> str:
    """sha256 over the weights, by which an adapter knows the base that it was trained on."""
    return digest(weight_files(folder))


def digest(paths: list[Path]) -> str:
    """sha256 over the sha256 of each file."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


# ---------------------------------------------------------------------------------------------
# The encoder f_theta
# ---------------------------------------------------------------------------------------------


POOLINGS = ("memory", "last", "mean", "weighted-mean", "echo")
INSTRUCTED = "{instruction}:{text}\n"  # the one template with instructions (paper, official code)


def check_text(text: str, name: str):
    """UserError for what no tokenizer takes: half a surrogate pair, or bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} {text!r}: not a text in UTF-8 ({error.reason}); write it anew")


@dataclass(frozen=True)
class EncoderConfig:
    """How texts become embeddings; stored with the encoder, so that no flag contradicts training.

    pooling: `memory` (mean of the K memory tokens), `last`, `mean` or `weighted-mean` (token i
    weighs i; SGPT, arXiv 2202.08904) over all tokens, BOS included; `echo` is the mean from the
    last {text} of the template on (arXiv 2402.15449). max_tokens counts BOS and K.
    template: what the tokenizer reads. With `{instruction}` in it the encoder was trained with
    instructions, and a text without one stands alone. document_template: the same for documents of
    retrieval and reranking; empty if they are read like texts without an instruction.
    kept_tokens: the memory tokens that make the embedding, empty for all (collapse.py chooses).
    """

    num_memory_tokens: int = 8
    pooling: str = "memory"
    attention: str = "bidirectional"
    max_tokens: int = 512
    template: str = "{text}"
    document_template: str = ""
    kept_tokens: tuple = ()

    def __post_init__(self):
        for one in fields(self):
            if type(value := getattr(self, one.name)) is not one.type:
                raise TypeError(f"{one.name}={value!r}: {one.type.__name__} expected")
        if self.pooling not in POOLINGS:
            raise UserError(f"pooling={self.pooling!r}: unknown; one of {', '.join(POOLINGS)}")
        if self.attention not in ("bidirectional", "causal"):
            raise UserError(f"attention={self.attention!r}: bidirectional or causal")
        k, least = self.num_memory_tokens, int(self.pooling == "memory")
        if k < least or (k and not least):
            raise UserError(f"num_memory_tokens={k} with pooling={self.pooling}: at least 1 for "
                            f"memory, 0 otherwise")
        for template in (self.template, self.document_template or "{text}"):
            if "{text}" not in template:
                raise UserError(f"template={template!r}: must contain {{text}}")
            check_text(template, "template")
        kept = self.kept_tokens
        if any(type(i) is not int or not 0 <= i < k for i in kept) or len(set(kept)) < len(kept):
            raise UserError(f"kept_tokens={kept}: must be different numbers from 0 to "
                            f"{k - 1}")
        if self.max_tokens < self.num_memory_tokens + 2:
            raise UserError(f"max_tokens={self.max_tokens} leaves no room for a text beside BOS "
                            f"and {self.num_memory_tokens} memory tokens")


PLAIN = EncoderConfig(num_memory_tokens=0, pooling="mean", attention="causal")


def wide(x: Tensor) -> Tensor:
    """x in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_device(tensor: Tensor, device) -> Tensor:
    """The tensor on the device; on CUDA copied from pinned memory, so that nothing waits."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def flat_ids(arrays: list[np.ndarray], device) -> Tensor:
    """Arrays of token ids -> one row (T,) int64 on the device."""
    return to_device(torch.from_numpy(np.concatenate(arrays)).long(), device)


def pack(*parts: tuple[Tensor, list[int]]) -> tuple[Tensor, list[int]]:
    """Lay N sequences in one row, each made of one segment of every part in turn.

    A part is (rows, lengths): all its N segments, one after another, and their N lengths.
    """
    segments = [rows.split(lengths) for rows, lengths in parts]
    row = torch.cat([segment for sequence in zip(*segments) for segment in sequence])
    return row, [sum(n) for n in zip(*(lengths for _, lengths in parts))]


class Encoder(nn.Module):
    """f_theta: a Llama with adapters, its own embedding table, K memory tokens, and a pooling.

    Without memory tokens and adapters it is the plain Llama under one of the classic poolings.
    """

    def __init__(self, llama: Llama, tokenizer: Tokenizer, config: EncoderConfig):
        super().__init__()
        self.llama, self.tokenizer, self.config = llama, tokenizer, config
        self.table = llama.model.embed_tokens.weight  # (V, D), g_phi's until it is trained
        self.memory_tokens = nn.Parameter(self.table.new_zeros(0, self.table.shape[1]))
        self.adapters = False  # whether the adapters on the Llama take part
        self.lora_config = LoraConfig()
        self.base: dict = {}  # where the Llama came from: name, revision, sha256
        self.sha256 = ""  # of what was trained: adapters, memory tokens, table
        self.history: list[dict] = []  # the stages that made the adapters, oldest first

    def add_memory(self, init: str, train_table: bool, generator: torch.Generator | None = None):
        """Make the K memory rows, and with `train_table` an own copy of the table, in fp32.

        init `normal`: mean and standard deviation of the table per dimension; `mean`: the mean
        plus 1e-3 of that deviation (nearly equal rows, as a mean-resize of the table gives).
        """
        table = wide(self.table.detach())
        mean, spread = table.mean(0), table.std(0) * (1e-3 if init == "mean" else 1.0)
        noise = torch.randn(self.config.num_memory_tokens, table.shape[1], generator=generator)
        self.memory_tokens = nn.Parameter(mean + spread * noise.to(table))
        if train_table:
            self.table = nn.Parameter(table.clone())

    def forward(
        self, ids: Tensor, lengths: list[int], dropout: float = 0.0, last: list[int] | None = None
    ) -> tuple[Tensor, list[int]]:
        """ids (T,) of N texts with BOS -> hidden states of texts and memory tokens, and lengths.

        Eq. 1 of the paper: f_theta reads n_1..n_a m_1..m_K. Returns (T + N K, D) and N lengths, or
        the `last` states of each text only.
        """
        dtype, n, k = self.llama.head.dtype, len(lengths), len(self.memory_tokens)
        tokens = F.embedding(ids, self.table).to(dtype)
        memory = self.memory_tokens.to(dtype).repeat(n, 1)
        x, lengths = pack((tokens, lengths), (memory, [k] * n))
        causal = self.config.attention == "causal"
        hidden = self.llama(x, lengths, causal, self.adapters, dropout, last)
        return hidden, last or lengths

    def memory(self, ids: Tensor, lengths: list[int], dropout: float = 0.0) -> Tensor:
        """ids (T,) of N texts -> memory (N, K, D): the last K hidden states of each (Eq. 3)."""
        n, k = len(lengths), self.config.num_memory_tokens
        return self(ids, lengths, dropout, last=[k] * n)[0].unflatten(0, (n, k))

    def pool(self, memory: Tensor) -> Tensor:
        """Memory (N, K, D) -> z (N, D) in at least fp32: the mean of all tokens, or of the kept."""
        kept = list(self.config.kept_tokens)
        return wide(memory[:, kept] if kept else memory).mean(dim=1)

    def embed(
        self, ids: Tensor, lengths: list[int], dropout: float = 0.0, tails: list[int] | None = None
    ) -> Tensor:
        """ids (T,) of N texts -> embeddings (N, D) in at least fp32; z = mean memory (Eq. 6).

        `tails` are the numbers of last tokens that `echo` averages.
        """
        if self.config.pooling == "memory":
            return self.pool(self.memory(ids, lengths, dropout))
        if self.config.pooling == "last":
            return wide(self(ids, lengths, dropout, last=[1] * len(lengths))[0])
        tails = [max(1, n) for n in tails] if self.config.pooling == "echo" else None
        hidden, lengths = self(ids, lengths, dropout, tails)
        sequences = wide(hidden).split(lengths)
        if self.config.pooling in ("mean", "echo"):
            return torch.stack([h.mean(dim=0) for h in sequences])
        weights = [torch.arange(1, len(h) + 1, device=h.device).to(h.dtype) for h in sequences]
        return torch.stack([w @ h / w.sum() for w, h in zip(weights, sequences)])

    def template(self, instruction: str = "", document: bool = False) -> str:
        """The template in which texts with (or without) an instruction, or documents, are read."""
        if document and self.config.document_template:
            return self.config.document_template
        template = self.config.template
        check_text(instruction, "instruction")
        if not instruction:
            return "{text}" if "{instruction}" in template else template
        if template == "{text}":
            template = INSTRUCTED
        if "{instruction}" not in template:
            raise UserError(f"instruction {instruction!r}: the template {template[:60]!r} has no "
                            f"place for one; leave the instruction out")
        return template.replace("{instruction}", instruction)

    def tokenize(
        self, texts: list[str], instruction="", document=False, max_tokens: int | None = None
    ) -> tuple[list[np.ndarray], list[int]]:
        """int32 ids with BOS of each text in its template, and its tail (see `embed`).

        At most `max_tokens` (default: the encoder's) with BOS and the K memory tokens to come.
        """
        template = self.template(instruction, document)
        limit = max_tokens or self.config.max_tokens
        room = limit - self.config.num_memory_tokens
        if room <= len(self.tokenizer.bos):
            raise UserError(f"{limit} tokens leave no room for a text beside BOS and "
                            f"{self.config.num_memory_tokens} memory tokens; raise the limit")
        if template == "{text}":
            ids = self.tokenizer.encode(texts, room)
            return ids, [len(i) for i in ids]
        return self.tokenizer.encode_prompted(texts, template, room)

    def batches(
        self, texts: list[str], instruction="", document=False, batch_tokens=4096,
        progress: bool | str = False,
    ):
        """Yield (places among the texts, ids (T,), lengths, tails) as `encode` reads them."""
        k, label = self.config.num_memory_tokens, progress if isinstance(progress, str) else None
        ids, tails = self.tokenize(texts, instruction, document)
        with tqdm(total=len(texts), unit="text", desc=label, disable=not progress,
                  leave=False) as bar:
            for batch in token_batches([len(i) + k for i in ids], batch_tokens):
                row = flat_ids([ids[i] for i in batch], self.llama.head.device)
                yield batch, row, [len(ids[i]) for i in batch], [tails[i] for i in batch]
                bar.update(len(batch))

    @torch.no_grad()
    def encode(
        self, texts: list[str], instruction="", document=False, batch_tokens=4096,
        progress: bool | str = False,
    ) -> np.ndarray:
        """Texts -> (n, D) float32, in their order; long texts are cut, memory tokens never.

        `instruction` goes before each text; `document` says that they are documents to be found.
        Batches hold texts of similar length, at most `batch_tokens` tokens each (at least a text).
        `progress` shows a bar, a string before it.
        """
        was_training = self.training
        out = np.empty((len(texts), self.table.shape[1]), dtype=np.float32)
        self.eval()
        batches = self.batches(texts, instruction, document, batch_tokens, progress)
        for batch, row, lengths, tails in batches:
            out[batch] = self.embed(row, lengths, tails=tails).float().cpu().numpy()
        self.train(was_training)
        return out


def token_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of texts, longest first, in batches whose lengths sum to at most `budget`."""
    batches, room = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > room:
            batches.append([])
            room = budget
        batches[-1].append(i)
        room -= lengths[i]
    return batches


# ---------------------------------------------------------------------------------------------
# Encoder folders: encoder.json, embeddings.safetensors, one PEFT adapter a stage
# ---------------------------------------------------------------------------------------------


def plain_encoder(
    name: str | Path, config=PLAIN, revision=None, dtype=torch.float32, device="cpu"
) -> Encoder:
    """A Llama as it is, with one of the classic poolings: the training-free methods."""
    folder = find_model(name, revision)
    llama = load_llama(folder, None, dtype, device)
    tokenizer = Tokenizer(folder, llama.config.vocab_size, llama.config.bos_token_id)
    encoder = Encoder(llama, tokenizer, config)
    local = str(name) != "demo" and Path(name).is_dir()
    hub = not local and str(name) != "demo"  # the cache's folder is named by the commit
    encoder.base = {"name": str(Path(name).resolve()) if local else str(name),
                    "revision": folder.name if hub else None, "sha256": fingerprint(folder)}
    return encoder


@contextmanager
def write_folder(target: Path):
    """Yield a folder beside `target` to fill; then sync it to disk and rename it into place.

    UserError if the disk is full or read-only; what was at `target` is then still there.
    """
    aside, old = (target.parent / f".{target.name}.{part}" for part in ("writing", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        finish_renaming(target)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        for path in [*aside.rglob("*"), aside]:
            sync(path)
        if target.exists():
            os.rename(target, old)
        os.rename(aside, target)
        sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: cannot be written ({error}); make room or name another place, "
                        f"what was saved before is intact")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):
            finish_renaming(target)


def finish_renaming(target: Path):
    """Put back what write_folder had set aside if nothing came in its place; else remove it."""
    old = target.parent / f".{target.name}.old"
    if old.exists() and not target.exists():
        os.rename(old, target)
    shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, text: str):
    """Write a file beside its place, sync it and rename it: at no moment is it half a file."""
    aside = path.parent / f".{path.name}.writing"
    try:
        aside.write_text(text)
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror})")


def sync(path: Path):
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_encoder(encoder: Encoder, folder: Path, earlier: Path | None = None):
    """Write an encoder folder; the adapter on the Llama belongs to the last stage of the history.

    `earlier` is the encoder folder that the stage started from; its adapters are copied.
    """
    with write_folder(Path(folder)) as aside:
        for stage in encoder.history[:-1]:
            shutil.copytree(Path(earlier) / stage["stage"], aside / stage["stage"])
        last = aside / encoder.history[-1]["stage"]
        lora.save_adapter(encoder.llama, encoder.lora_config, last, encoder.base["name"])
        tensors = {"memory_tokens": encoder.memory_tokens}
        if encoder.table is not encoder.llama.model.embed_tokens.weight:
            tensors["embed_tokens"] = encoder.table
        tensors = {name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}
        save_file(tensors, aside / "embeddings.safetensors", metadata={"format": "pt"})
        about = {"format": 1, "base": encoder.base, **asdict(encoder.config),
                 "history": encoder.history}
        (aside / "encoder.json").write_text(json.dumps(about, indent=2) + "\n")


def is_encoder(folder: str | Path) -> bool:
    """Whether `folder` is an encoder folder (rather than a Llama)."""
    return (Path(folder) / "encoder.json").is_file()


def encoder_of(name: str | Path) -> str:
    """The encoder in a run's folder; any other name as it is."""
    inner = Path(name) / "encoder"
    return str(inner if is_encoder(inner) else name)


def load_encoder(
    name: str | Path, base: str | None = None, dtype=torch.float32, device="cpu", revision=None
) -> Encoder:
    """An encoder from its folder (local or on the hub), all adapters but the last merged.

    `base` replaces the place recorded for the base model (it must be the same model: its sha256 is
    checked). Raises UserError for anything missing, damaged or not fitting.
    """
    folder = find_model(name, revision)
    about = read_json(folder / "encoder.json")
    about = {"document_template": "", "kept_tokens": [], **about}  # newer than the first folders
    try:
        about["kept_tokens"] = tuple(about["kept_tokens"])
        config = EncoderConfig(**{key: about[key] for key in EncoderConfig.__dataclass_fields__})
        recorded = {key: about["base"][key] for key in ("name", "revision", "sha256")}
        stages = [str(stage["stage"]) for stage in about["history"]]
        source = base or recorded["name"]
        if not stages or not all(isinstance(value, str) for key, value in recorded.items()
                                 if key != "revision" or value is not None):
            raise TypeError("base or history")
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'encoder.json'}: {error!r} is missing or odd; save it anew")
    except UserError as error:
        raise UserError(f"{folder / 'encoder.json'}: {error}")
    try:
        revision = None if base else recorded["revision"]
        encoder = plain_encoder(source, config, revision, dtype, device)
    except UserError as error:
        reason = str(error).replace("\n", " ")
        raise UserError(f"{folder}: its base model cannot be loaded; name its place with --base "
                        f"({reason})")
    if encoder.base["sha256"] != recorded["sha256"]:
        raise UserError(f"{folder}: was trained on another base than {source} (sha256 "
                        f"{recorded['sha256'][:12]}..., found {encoder.base['sha256'][:12]}...); "
                        f"name the right one with --base")
    encoder.history = about["history"]
    for stage in stages:
        lora.merge_lora(encoder.llama)
        if not re.fullmatch(r"[a-z]\w*", stage):
            raise UserError(f"{folder / 'encoder.json'}: {stage!r} is no name of a stage")
        encoder.lora_config = lora.load_adapter(encoder.llama, folder / stage)
        encoder.adapters = True
    load_embeddings(encoder, folder / "embeddings.safetensors")
    encoder.sha256 = digest(sorted(folder.rglob("*.safetensors")))
    return encoder.requires_grad_(False).eval()


def load_embeddings(encoder: Encoder, path: Path):
    """Put the memory tokens, and the trained table if there is one, from a file on the encoder."""
    k, (v, d) = encoder.config.num_memory_tokens, encoder.table.shape
    shapes = {"memory_tokens": (k, d), "embed_tokens": (v, d)}
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
    device = encoder.table.device
    encoder.memory_tokens = nn.Parameter(tensors["memory_tokens"].to(device))
    if "embed_tokens" in tensors:
        encoder.table = nn.Parameter(tensors["embed_tokens"].to(device))


@torch.no_grad()
def merge(encoder: Encoder, folder: str | Path):
    """Write the encoder as a plain Hugging Face LlamaModel: adapters merged, V + K rows, K tokens.

    One-way: the encoder's own Llama has its adapters merged afterwards.

    The K memory tokens become special tokens of the tokenizer with the ids V..V+K-1. A reader has
    to append them, attend bidirectionally and average their K last hidden states (see README).
    """
    if encoder.config.kept_tokens:
        raise UserError(f"kept_tokens={encoder.config.kept_tokens}: a reader of the merged folder "
                        f"would average all {encoder.config.num_memory_tokens} memory tokens; "
                        f"merge the encoder that they were chosen from")
    base = find_model(encoder.base["name"], encoder.base["revision"])
    v, k = encoder.llama.config.vocab_size, encoder.config.num_memory_tokens
    dtype = encoder.llama.head.dtype
    config = {**read_json(base / "config.json"), "architectures": ["LlamaModel"]}
    config.pop("dtype", None)  # the newer name of torch_dtype, which would win over it
    config |= {"vocab_size": v + k, "torch_dtype": str(dtype).removeprefix("torch.")}
    tokenizer = tokenizers.Tokenizer.from_str(encoder.tokenizer.backend.to_str())
    bos = encoder.tokenizer.bos
    # every id of the table gets a token, in order: those that the tokenizer lacks, then the memory
    new = [f"<unused_{i}>" for i in range(tokenizer.get_vocab_size(), v)]
    new += [f"<memory_{i}>" for i in range(1, k + 1)]
    taken = [token for token in new if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens(new)
    if taken or tokenizer.get_vocab_size() != v + k or tokenizer.id_to_token(v + k - 1) != new[-1]:
        raise UserError(f"{encoder.tokenizer.file}: its ids have gaps, or it has a token named "
                        f"{', '.join(taken) or new[-1]} already; rename that token")
    names = [tokenizer.id_to_token(i) for i in bos]
    tokenizer.post_processor = TemplateProcessing(
        single=[*names, "$A"], special_tokens=list(zip(names, bos))
    )
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names[0]}
    lora.merge_lora(encoder.llama)
    tensors = {name.removeprefix("model."): tensor for name, tensor in
               encoder.llama.state_dict().items() if name != "lm_head.weight"}
    tensors["embed_tokens.weight"] = torch.cat((encoder.table, encoder.memory_tokens)).to(dtype)
    with write_folder(Path(folder)) as aside:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (aside / "tokenizer_config.json").write_text(json.dumps(fast, indent=2) + "\n")
        tokenizer.save(str(aside / "tokenizer.json"))


def main(argv: list[str] | None = None) -> int:
    """The command line: `merge ENCODER OUT`; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=["merge"])
    parser.add_argument("encoder", help="an encoder folder")
    parser.add_argument("out", help="the folder to write; must not exist")
    parser.add_argument("--base", help="where the base model lies now")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args(argv)
    try:
        if Path(args.out).exists():
            raise UserError(f"{args.out}: exists already; name a new folder")
        merge(load_encoder(args.encoder, args.base, getattr(torch, args.dtype)), args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
