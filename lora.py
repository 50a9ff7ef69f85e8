"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), as PEFT initialises and stores them.

    y = W x + (alpha / r) B A dropout(x)        W (out, in) frozen, A (r, in), B (out, r) trained

Every projection of the Llama in model.py is a `LoraLinear`. Whether its adapter takes part is an
argument of the forward call, never a switch on the layer: one copy of W serves the frozen language
model (`adapters=False`, bit-identical to a plain linear layer) and the encoder (`adapters=True`),
and a checkpointed forward that is recomputed during backward repeats the same computation.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from runtime import cpu
from runtime.devices import at_least_fp32
from runtime.encoders import read_adapter, read_adapter_tensors, write_adapter

PEFT_PREFIX = "base_model.model."  # what PEFT puts before a module's name


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """Rank, alpha, dropout and the projections adapted (the official code leaves out k_proj)."""

    r: int = 16
    alpha: float = 32
    dropout: float = 0.05
    targets: tuple = tuple(name for name in TARGETS if name != "k_proj")


class AdaptedLinear(Function):
    """The formula above with a hand-written gradient: the adapter's part is added in place, forward
    and backward, and dropout keeps only the masked x and which elements it dropped."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
                scaling: float, p: float) -> Tensor:
        """x (T, in), weight (out, in), frozen like bias (out,); a (r, in), b (out, r)."""
        # the fp32 matrices are small: cast them to x's dtype, never x to theirs
        y, a, b, where = F.linear(x, weight, bias), a.to(x.dtype), b.to(x.dtype), None
        if p:
            where, scaling = cpu.dropped(x, p), scaling / (1 - p)
            x = cpu.zero(x.clone(memory_format=torch.contiguous_format), where)
        low = F.linear(x, a)
        ctx.save_for_backward(x, weight, a, b, low, where)
        ctx.scaling = scaling
        return y.addmm_(low, b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        """gradient (T, out) -> the gradients of x, a and b."""
        x, weight, a, b, low, where = ctx.saved_tensors
        grad_low = (gradient @ b).mul_(ctx.scaling)
        grad_a, grad_b, grad_x = grad_low.t() @ x, (low.t() @ gradient).t() * ctx.scaling, None
        if ctx.needs_input_grad[0]:
            grad_x = gradient @ weight
            if where is None:
                grad_x.addmm_(grad_low, a)
            else:
                grad_x.add_(cpu.zero(grad_low @ a, where))
        return grad_x, None, None, grad_a, grad_b, None, None


class LoraLinear(nn.Linear):
    """A linear layer with room for one low-rank adapter."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.scaling, self.dropout = 0.0, 0.0

    def forward(self, x: Tensor, adapters: bool = False) -> Tensor:
        """x (T, in) -> (T, out)."""
        if not adapters or self.lora_A is None:
            return F.linear(x, self.weight, self.bias)
        p = self.dropout if self.training else 0.0
        return AdaptedLinear.apply(x, self.weight, self.bias, self.lora_A, self.lora_B,
                                   self.scaling, p)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Name -> layer, for all layers that hold an adapter."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLinear) and layer.lora_A is not None
    }


def add_lora(model: nn.Module, config: LoraConfig, generator: torch.Generator | None = None):
    """Put a fresh fp32 adapter (fp64 in an fp64 model) on every target layer.

    A is Kaiming-uniform with a = sqrt(5), as in nn.Linear; B is zero, so the model is unchanged.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLinear) or name.rpartition(".")[2] not in config.targets:
            continue
        device = layer.weight.device
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        a = torch.empty(config.r, layer.in_features, dtype=dtype)
        # drawn on the CPU, so that all devices get the same numbers
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        layer.lora_A = nn.Parameter(a.to(device))
        b = torch.zeros(layer.out_features, config.r, dtype=dtype, device=device)
        layer.lora_B = nn.Parameter(b)
        layer.scaling, layer.dropout = config.alpha / config.r, config.dropout


@torch.no_grad()
def merge_lora(model: nn.Module):
    """W <- W + (alpha / r) B A, summed in at least fp32 and rounded once; removes the adapter."""
    for layer in lora_layers(model).values():
        a, b = at_least_fp32(layer.lora_A), at_least_fp32(layer.lora_B)
        layer.weight.copy_(at_least_fp32(layer.weight) + layer.scaling * (b @ a))
        layer.lora_A = layer.lora_B = None


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    return {
        f"{PEFT_PREFIX}{name}.lora_{which}.weight": getattr(layer, f"lora_{which}").detach()
        for name, layer in lora_layers(model).items()
        for which in "AB"
    }


def save_adapter(model: nn.Module, config: LoraConfig, folder: Path, base: str):
    """Store the adapter on the model in PEFT's layout; `base` is the base model's name."""
    write_adapter(folder, asdict(config), lora_state(model), base)


def load_adapter(model: nn.Module, folder: Path) -> LoraConfig:
    """Put the adapter stored in `folder` on the model; strict in names and shapes."""
    config = LoraConfig(**read_adapter(folder))
    shapes = {  # of all tensors, checked before any adapter is allocated
        f"{PEFT_PREFIX}{name}.lora_{which}.weight": shape
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLinear) and name.rpartition(".")[2] in config.targets
        for which, shape in (("A", (config.r, layer.in_features)),
                             ("B", (layer.out_features, config.r)))
    }
    tensors = read_adapter_tensors(folder, shapes)
    add_lora(model, config)
    with torch.no_grad():
        for name, slot in lora_state(model).items():  # they share the parameters' memory
            slot.copy_(tensors[name])
    return config
