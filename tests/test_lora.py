"""lora.py against PEFT, by hand, and in what it must never change: the base model."""

import peft
import pytest
import torch
import torch.nn.functional as F
from helpers import OTHERS, randomize_adapters
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint as recompute

import lora
from lora import LoraConfig, LoraLinear
from model import load_llama
from runtime import cpu

LENGTHS = [6, 13, 13, 2]
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIGS = {
    "paper": LoraConfig(),
    "no dropout, odd rank": LoraConfig(r=3, alpha=7, dropout=0.0),
    "alpha below rank": LoraConfig(r=8, alpha=1.5),
    "all seven": LoraConfig(r=4, alpha=8, targets=SEVEN),
    "one": LoraConfig(r=1, alpha=1, targets=("k_proj",)),
}
# every kind of adapter on a Llama, and one of all projections on the other bases
PAIRS = {**{name: (config, "llama") for name, config in CONFIGS.items()},
         **{kind: (CONFIGS["all seven"], kind) for kind in OTHERS}}


@pytest.fixture
def ids():
    return torch.randint(320, (sum(LENGTHS),), generator=torch.Generator().manual_seed(5))


def logits(llama, ids, adapters=True):
    hidden = llama(llama.embed(ids), LENGTHS, causal=True, adapters=adapters)
    return hidden @ llama.head.T


def their_logits(model, ids):
    with torch.no_grad():
        return torch.cat([model(part[None]).logits[0] for part in ids.split(LENGTHS)])


def adapted(folder, config=LoraConfig(), seed=0, **kinds):
    """A Llama with adapters whose B is random, as if they were trained."""
    llama = load_llama(folder, **kinds)
    generator = torch.Generator().manual_seed(seed)
    lora.add_lora(llama, config, generator)
    randomize_adapters(llama, seed + 1)
    return llama


def with_peft(reference, folder, config):
    """The same base in transformers with a PEFT adapter whose B is random."""
    settings = peft.LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout,
        target_modules=list(config.targets), task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(reference(folder), settings).eval()
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    return model


# ---------------------------------------------------------------------------------------------
# Against PEFT
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config, kind", PAIRS.values(), ids=PAIRS)
def test_peft_reads_our_adapter_and_gives_our_logits_applied_and_merged(
    config, kind, tiny_of, reference, ids, tmp_path, monkeypatch
):
    llama = adapted(tiny_of(kind), config)
    lora.save_adapter(llama, config, tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(reference(tiny_of(kind)), tmp_path).eval()
    with torch.no_grad():
        ours, base = logits(llama, ids), logits(llama, ids, adapters=False)
        assert (ours - base).abs().max() > 0.01
        assert (ours - their_logits(theirs, ids)).abs().max() <= 1e-5
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "is_cpu", lambda x: False)  # the lines for other devices
            assert (logits(llama, ids) - ours).abs().max() <= 1e-5
        lora.merge_lora(llama)
        merged = theirs.merge_and_unload()
        assert (logits(llama, ids) - their_logits(merged, ids)).abs().max() <= 1e-5


@pytest.mark.parametrize("config, kind", PAIRS.values(), ids=PAIRS)
def test_an_adapter_saved_by_peft_gives_the_same_logits_here(
    config, kind, tiny_of, reference, ids, tmp_path
):
    theirs = with_peft(reference, tiny_of(kind), config)
    theirs.save_pretrained(tmp_path)
    llama = load_llama(tiny_of(kind))
    loaded = lora.load_adapter(llama, tmp_path)
    assert (loaded.r, loaded.alpha, loaded.dropout) == (config.r, config.alpha, config.dropout)
    assert set(loaded.targets) == set(config.targets)
    with torch.no_grad():
        assert (logits(llama, ids) - their_logits(theirs, ids)).abs().max() <= 1e-5
        lora.merge_lora(llama)
        merged = theirs.merge_and_unload()
        assert (logits(llama, ids) - their_logits(merged, ids)).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_adapter_loads_bit_for_bit(dtype, tiny, tmp_path):
    llama, again = adapted(tiny, dtype=dtype), load_llama(tiny, dtype=dtype)
    lora.save_adapter(llama, LoraConfig(), tmp_path, "base")
    lora.load_adapter(again, tmp_path)
    saved, loaded = lora.lora_state(llama), lora.lora_state(again)
    assert saved.keys() == loaded.keys() and len(saved) == 2 * 2 * 6
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert all(t.dtype == torch.float32 for t in loaded.values())
    for ours, theirs in zip(*(lora.lora_layers(m).values() for m in (llama, again))):
        assert (ours.scaling, ours.dropout) == (theirs.scaling, theirs.dropout) == (2.0, 0.05)


def test_the_initial_a_has_the_spread_of_pefts(tiny, reference):
    llama = load_llama(tiny)
    lora.add_lora(llama, LoraConfig(r=64), torch.Generator().manual_seed(0))
    settings = peft.LoraConfig(r=64, target_modules=["q_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(reference(tiny), settings).state_dict()
    name = "model.layers.0.self_attn.q_proj.lora_A"
    ours = llama.get_parameter(name)
    peer = theirs[f"base_model.model.{name}.default.weight"]
    assert ours.shape == peer.shape == (64, 32)
    assert ours.std().item() == pytest.approx(peer.std().item(), rel=0.05)
    assert ours.abs().max() <= 32**-0.5 and ours.abs().max() > 0.95 * 32**-0.5


# ---------------------------------------------------------------------------------------------
# By hand
# ---------------------------------------------------------------------------------------------


def one_layer(dropout=0.0):
    torch.manual_seed(0)
    host = torch.nn.ModuleDict({"q_proj": LoraLinear(5, 4)})
    lora.add_lora(host, LoraConfig(r=2, alpha=3, dropout=dropout))
    layer = host["q_proj"]
    layer.lora_B.data.normal_()
    return host, layer, torch.randn(7, 5)


def test_a_layer_computes_w_plus_alpha_over_r_times_b_a():
    host, layer, x = one_layer()
    w = layer.weight + 3 / 2 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x, adapters=True), x @ w.T, rtol=0, atol=1e-6)
    lora.merge_lora(host)
    torch.testing.assert_close(layer.weight.data, w.data, rtol=0, atol=1e-6)


def test_dropout_acts_on_the_adapters_input_only_in_training_mode():
    _, layer, x = one_layer(dropout=0.5)
    assert layer.training
    torch.manual_seed(1)
    ours = layer(x, adapters=True)
    torch.manual_seed(1)
    dropped = cpu.dropout(x, 0.5)
    by_hand = x @ layer.weight.T + 1.5 * dropped @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-6)
    assert not torch.equal(ours, layer(x, adapters=True))
    assert torch.equal(layer(x, adapters=False), F.linear(x, layer.weight))
    layer.eval()
    w = layer.weight + 1.5 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x, adapters=True), x @ w.T, rtol=0, atol=1e-6)


def test_a_bf16_merge_is_summed_in_fp32_and_rounded_once(tiny):
    llama = adapted(tiny, dtype=torch.bfloat16)
    name, layer = next(iter(lora.lora_layers(llama).items()))
    exact = layer.weight.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    lora.merge_lora(llama)
    merged = llama.get_submodule(name).weight
    assert merged.dtype == torch.bfloat16
    assert (merged != exact.to(torch.bfloat16)).sum() <= 2  # ties of the fp32 sum


def test_a_second_adapter_is_added_to_the_merged_first(tiny):
    llama, base = adapted(tiny), load_file(tiny / "model.safetensors")
    name, layer = next(iter(lora.lora_layers(llama).items()))
    first = 2.0 * layer.lora_B.data @ layer.lora_A.data
    lora.merge_lora(llama)
    lora.add_lora(llama, LoraConfig(r=4, alpha=2))
    torch.testing.assert_close(layer.weight.data, base[f"{name}.weight"] + first)
    assert layer.scaling == 0.5 and layer.lora_A.shape == (4, 32)
    assert layer.lora_B.count_nonzero() == 0


def test_the_generator_determines_the_initial_adapter(tiny):
    def drawn(seed):
        llama = load_llama(tiny)
        lora.add_lora(llama, LoraConfig(), torch.Generator().manual_seed(seed))
        return torch.cat([layer.lora_A.flatten() for layer in lora.lora_layers(llama).values()])

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_a_recomputed_pass_repeats_the_adapters_and_their_dropout(tiny, ids):
    llama = adapted(tiny).train()
    x, gradients = llama.embed(ids), []
    for forward in (llama, lambda *args: recompute(llama, *args, use_reentrant=False)):
        torch.manual_seed(7)
        llama.zero_grad()
        forward(x, LENGTHS, False, True, 0.1).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in llama.named_parameters() if "lora" in n})
    assert all(gradients[0][name].abs().max() > 0 for name in gradients[0])
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


# ---------------------------------------------------------------------------------------------
# What never changes: the base model
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing(dtype, tiny, ids):
    llama = load_llama(tiny, dtype=dtype)
    plain = logits(llama, ids, adapters=False)
    lora.add_lora(llama, LoraConfig())
    assert len(lora.lora_layers(llama)) == 2 * 6
    assert torch.equal(logits(llama, ids, adapters=True), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_with_adapters_off_a_trained_model_is_bit_identical_to_its_base(
    training, dtype, tiny, ids
):
    plain = logits(load_llama(tiny, dtype=dtype), ids, adapters=False)
    llama = adapted(tiny, dtype=dtype).train(training)
    assert torch.equal(logits(llama, ids, adapters=False), plain)
    assert not torch.equal(logits(llama, ids, adapters=True), plain)


def test_a_step_on_the_adapters_leaves_every_base_weight_untouched(tiny, ids):
    llama = adapted(tiny).train()
    base = load_file(tiny / "model.safetensors")
    before = {name: t.clone() for name, t in lora.lora_state(llama).items()}
    optimizer = torch.optim.AdamW([p for p in llama.parameters() if p.requires_grad], lr=0.01)
    F.cross_entropy(logits(llama, ids), ids).backward()
    optimizer.step()
    weights = {n: p for n, p in llama.named_parameters() if "lora_" not in n}
    assert weights.keys() == base.keys()
    assert all(torch.equal(weights[name], base[name]) for name in base)
    assert all(weight.grad is None for weight in weights.values())
    after = lora.lora_state(llama)
    assert len(after) == 24 and not any(torch.equal(before[name], after[name]) for name in after)


def test_merging_twice_equals_merging_once(tiny, ids):
    llama = adapted(tiny)
    lora.merge_lora(llama)
    once = {name: t.clone() for name, t in llama.state_dict().items()}
    lora.merge_lora(llama)
    twice = llama.state_dict()
    assert once.keys() == twice.keys() == load_file(tiny / "model.safetensors").keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert torch.equal(logits(llama, ids, adapters=True), logits(llama, ids, adapters=False))
