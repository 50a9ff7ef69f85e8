"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), as PEFT initialises and stores them.

    y = W x + (alpha / r) B A dropout(x)        W (out, in) frozen, A (r, in), B (out, r) trained

Every projection of the Llama in model.py is a `LoraLinear`. Whether its adapter takes part is an
argument of the forward call, never a hidden switch: one copy of W serves the frozen language
model (`adapters=False`, bit-identical to a plain linear layer) and the encoder (`adapters=True`),
and a checkpointed forward that is recomputed during backward repeats the same computation.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data import UserError

PEFT_PREFIX = "base_model.model."  # what PEFT puts before a module's name


@dataclass(frozen=True)
class LoraConfig:
    """Rank, alpha, dropout and the projections adapted (the official code leaves out k_proj)."""

    r: int = 16
    alpha: float = 32
    dropout: float = 0.05
    targets: tuple = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraLinear(nn.Linear):
    """A linear layer without bias that has room for one low-rank adapter."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.scaling, self.dropout = 0.0, 0.0

    def forward(self, x: Tensor, adapters: bool = False) -> Tensor:
        """x (T, in) -> (T, out). The small matrices are cast to x's dtype, never x to theirs."""
        y = F.linear(x, self.weight)
        if not adapters or self.lora_A is None:
            return y
        x = dropout(x, self.dropout if self.training else 0.0)
        low = F.linear(x, self.lora_A.to(x.dtype))
        return torch.addmm(y, low, self.lora_B.to(x.dtype).t(), alpha=self.scaling)


def dropout(x: Tensor, p: float) -> Tensor:
    """x with each element zero with probability p, or else divided by 1 - p.

    On the CPU torch draws a number per element, one after another, which takes longer than the
    matrix product beside it. Here four elements share the 64 bits of one number: p is rounded to a
    multiple of 2^-16.
    """
    dropped = min(round(p * 2**16), 2**16 - 1)
    if x.device.type != "cpu" or not dropped:
        return F.dropout(x, p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return x * ((bits >= dropped - 2**15).to(x.dtype) / (1 - dropped / 2**16))


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Name -> layer, of the layers that hold an adapter."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLinear) and layer.lora_A is not None
    }


def add_lora(model: nn.Module, config: LoraConfig, generator: torch.Generator | None = None):
    """Put a fresh fp32 adapter (fp64 in an fp64 model) on every target layer.

    A is Kaiming-uniform with a = sqrt(5), as in nn.Linear; B is zero, so the model is unchanged.
    A is drawn on the CPU, hence equal on all devices.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLinear) or name.rpartition(".")[2] not in config.targets:
            continue
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        a = torch.empty(config.r, layer.in_features, dtype=dtype)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        layer.lora_A = nn.Parameter(a.to(layer.weight.device))
        layer.lora_B = nn.Parameter(layer.weight.new_zeros(layer.out_features, config.r).to(dtype))
        layer.scaling, layer.dropout = config.alpha / config.r, config.dropout


@torch.no_grad()
def merge_lora(model: nn.Module):
    """W <- W + (alpha / r) B A, summed in at least fp32 and rounded once; the adapter is gone."""
    for layer in lora_layers(model).values():
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        delta = layer.scaling * (layer.lora_B.to(wide) @ layer.lora_A.to(wide))
        layer.weight.copy_(layer.weight.to(wide) + delta)
        layer.lora_A = layer.lora_B = None


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    return {
        f"{PEFT_PREFIX}{name}.lora_{which}.weight": getattr(layer, f"lora_{which}").detach()
        for name, layer in lora_layers(model).items()
        for which in "AB"
    }


def save_adapter(model: nn.Module, config: LoraConfig, folder: Path, base: str):
    """Write adapter_config.json and adapter_model.safetensors; `base` is the base model's name."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.float().cpu().contiguous() for name, t in lora_state(model).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    peft = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": config.r, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
        "target_modules": list(config.targets), "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(peft, indent=2) + "\n")


def load_adapter(model: nn.Module, folder: Path) -> LoraConfig:
    """Put the adapter stored in `folder` on the model; strict in names and shapes.

    Raises UserError for damaged files and for kinds of adapters other than plain LoRA.
    """
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    try:
        peft = json.loads(config_file.read_text())
        targets = peft["target_modules"]
        config = LoraConfig(
            int(peft["r"]), float(peft["lora_alpha"]), float(peft.get("lora_dropout", 0.0)),
            (targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        )
        if config.r < 1:
            raise ValueError(f"r is {config.r}")
        if not 0 <= config.dropout < 1 or not abs(config.alpha) < 1e38:
            raise ValueError(f"lora_dropout is {config.dropout}, lora_alpha {config.alpha}")
        tensors = load_file(weights_file)
        for name, tensor in tensors.items():
            if config.r not in tensor.shape or not tensor.is_floating_point():
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, r {config.r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError,
            RecursionError, SafetensorError) as error:
        raise UserError(f"{folder}: no readable LoRA adapter in adapter_config.json and "
                        f"adapter_model.safetensors ({error!r}); write it anew")
    unsupported = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
    for key in unsupported:
        if peft.get(key):
            raise UserError(f"{config_file}: {key}={peft[key]!r} is not supported; plain LoRA only")
    add_lora(model, config)
    slots = lora_state(model)  # they share the parameters' memory
    odd = sorted(slots.keys() ^ tensors.keys()) or sorted(
        name for name in slots if slots[name].shape != tensors[name].shape
    )
    if odd:
        raise UserError(f"{weights_file}: {odd[0]} is missing, extra or of another shape; is the "
                        f"adapter of another base model?")
    with torch.no_grad():
        for name, slot in slots.items():
            slot.copy_(tensors[name])
    return config
