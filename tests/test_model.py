"""model.py against transformers: the network, its loading, and what bad files lead to."""

import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import edit_json, write_llama
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig as HFLlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import model
from data import UserError
from model import attend, attend_jagged, find_model, fingerprint, inverse_frequencies, load_llama
from model import read_config

LENGTHS = [7, 1, 40, 7, 7, 19]


def random_ids(lengths=LENGTHS, vocab=320, seed=1):
    return torch.randint(vocab, (sum(lengths),), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def our_logits(llama, ids, lengths):
    return llama(llama.embed(ids), lengths, causal=True) @ llama.head.T


@torch.no_grad()
def their_logits(reference, ids, lengths):
    """Each sequence alone."""
    return torch.cat([reference(part[None]).logits[0] for part in ids.split(lengths)])


def assert_equals_transformers(folder, reference, lengths=LENGTHS):
    ids = random_ids(lengths, read_config(folder / "config.json").vocab_size)
    ours = our_logits(load_llama(folder), ids, lengths)
    theirs = their_logits(reference(folder), ids, lengths)
    assert theirs.std() > 0.3
    assert (ours - theirs).abs().max() <= 1e-4


# ---------------------------------------------------------------------------------------------
# Logits
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    pytest.param({"num_key_value_heads": 4}, id="multi-head"),
    pytest.param({"num_key_value_heads": 2}, id="grouped-query"),
    pytest.param({"num_key_value_heads": 1}, id="multi-query"),
    pytest.param({"head_dim": 12}, id="explicit head_dim"),
    pytest.param({"tie_word_embeddings": True}, id="tied"),
    pytest.param({"tie_word_embeddings": True, "shard": "30KB"}, id="tied and sharded"),
    pytest.param({"shard": "30KB"}, id="sharded"),
    pytest.param({"rms_norm_eps": 0.5}, id="epsilon of config.json"),
    pytest.param({"num_hidden_layers": 5, "hidden_size": 24, "vocab_size": 77}, id="other sizes"),
])
def test_a_packed_batch_has_the_logits_of_transformers(settings, tmp_path, reference):
    folder = write_llama(tmp_path, **settings)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == ("shard" in settings)
    assert_equals_transformers(folder, reference)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
ROPES = {
    "default, no key at all": {},
    "default, old theta": {"rope_theta": 500.0},
    "default, rope_scaling null": {"rope_theta": 500.0, "rope_scaling": None},
    "default, new": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear, old type": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear, old": {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "linear, new": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 3.0}},
    "llama3, old": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "llama3, old, both keys": {
        "rope_theta": 5e3, "rope_scaling": {"rope_type": "llama3", "type": "llama3", **LLAMA3}
    },
    "llama3, old, whole factor": {
        "rope_theta": 500000, "rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": 32}
    },
    "llama3, new": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e3, **LLAMA3}},
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_every_spelling_of_the_rope_settings_is_read_as_by_transformers(rope, tiny_copy, reference):
    before = our_logits(load_llama(tiny_copy), random_ids([150]), [150])
    edit_json(tiny_copy / "config.json", drop=["rope_parameters"], **rope)
    assert_equals_transformers(tiny_copy, reference, [150, 3])
    after = our_logits(load_llama(tiny_copy), random_ids([150]), [150])
    assert ((before - after).abs().max() > 1e-2) == bool(rope)


def test_a_llama_2_checkpoint_with_inv_freq_tensors_and_a_short_config_loads(tmp_path, reference):
    folder = write_llama(tmp_path, num_key_value_heads=4)
    config = {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
        "intermediate_size": 48, "max_position_embeddings": 256, "model_type": "llama",
        "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 4,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": 320,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for i in range(2):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_equals_transformers(folder, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_loading_casts_every_tensor_and_freezes_it(dtype, tiny):
    llama, stored = load_llama(tiny, dtype=dtype), load_file(tiny / "model.safetensors")
    assert {name for name, _ in llama.named_parameters()} == set(stored)
    for name, weight in llama.named_parameters():
        assert weight.dtype == dtype and not weight.requires_grad
        assert torch.equal(weight, stored[name].to(dtype))
    assert not llama.training


def test_a_tied_head_is_the_embedding_table_and_a_stored_copy_of_it_is_left_out(tmp_path):
    folder = write_llama(tmp_path, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors")
    llama = load_llama(folder)
    assert llama.head is llama.model.embed_tokens.weight
    assert torch.equal(llama.head, tensors["model.embed_tokens.weight"])


def test_the_fingerprint_follows_the_weights_and_not_the_config(tiny, tiny_copy):
    weights = (tiny / "model.safetensors").read_bytes()
    expected = hashlib.sha256(hashlib.sha256(weights).digest()).hexdigest()
    edit_json(tiny_copy / "config.json", rms_norm_eps=0.1)
    assert fingerprint(tiny) == fingerprint(tiny_copy) == expected
    tensors = load_file(tiny_copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tiny_copy / "model.safetensors")
    assert fingerprint(tiny_copy) != expected


# ---------------------------------------------------------------------------------------------
# Rotary frequencies
# ---------------------------------------------------------------------------------------------

LLAMA31 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


# By the definition: the wavelength is 2 pi / f with f = 500000^(-pair / 64); shorter than 8192 / 4
# stays f, longer than 8192 / 1 becomes f / 8, between them a blend linear in 1 / wavelength.
GOLDEN = [
    (0, 1.0), (1, 8.14617234e-01), (16, 3.76060309e-02), (28, 3.21144599e-03),
    (29, 2.16657076e-03), (31, 8.56751413e-04), (34, 1.78507813e-04),
    (35, 9.55621235e-05), (48, 6.64786987e-06), (63, 3.06892599e-07),
]


@pytest.mark.parametrize("pair, expected", GOLDEN)
def test_llama_3_1_frequencies_are_the_ones_computed_by_hand(pair, expected):
    inv_freq = inverse_frequencies(LLAMA31, 128)
    assert inv_freq.shape == (64,) and inv_freq.dtype == torch.float32
    assert inv_freq[pair].item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rope", [
    LLAMA31,
    {**LLAMA31, "factor": 32.0},
    {**LLAMA31, "low_freq_factor": 2.0, "high_freq_factor": 3.0, "rope_theta": 1e4},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
])
def test_scaled_frequencies_equal_those_of_transformers(rope, head_dim):
    config = HFLlamaConfig(head_dim=head_dim, rope_parameters=dict(rope))
    theirs, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device=torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(rope, head_dim), theirs, rtol=1e-6, atol=0)


def test_positions_count_from_zero_in_each_sequence(tiny):
    table = load_llama(tiny).rotary_table([4, 2, 4], torch.empty(10, 32))
    for rows, trigonometric in zip(table, (math.cos, math.sin)):
        assert rows.shape == (10, 1, 8)
        assert torch.equal(rows[:4], rows[6:]) and torch.equal(rows[:2], rows[4:6])
        by_hand = [trigonometric(3 / 10000 ** (2 * i / 8)) for i in (0, 1, 2, 3, 0, 1, 2, 3)]
        assert rows[3, 0].tolist() == pytest.approx(by_hand, abs=1e-6)


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------


def slow_attention(q, k, v, lengths, causal):
    """One query of one head of one sequence at a time."""
    group, rows, start = q.shape[1] // k.shape[1], [], 0
    for length in lengths:
        for i in range(start, start + length):
            end = i + 1 if causal else start + length
            heads = []
            for h in range(q.shape[1]):
                scores = k[start:end, h // group] @ q[i, h] / math.sqrt(q.shape[2])
                weights = scores.exp() / scores.exp().sum()
                heads.append(weights @ v[start:end, h // group])
            rows.append(torch.stack(heads))
        start += length
    return torch.stack(rows)


def random_qkv(lengths, heads, groups, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(sum(lengths), n, 6, generator=generator, dtype=torch.float64).to(dtype)
            for n in (heads, groups, groups)]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("lengths", [[1], [6], [3, 3, 5, 1, 5, 5], [2, 9, 2], [4, 4, 4]], ids=str)
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (3, 1)])
def test_attention_and_its_gradients_equal_an_explicit_loop(lengths, heads, groups, causal):
    inputs = [t.requires_grad_() for t in random_qkv(lengths, heads, groups)]
    ours, slow = attend(*inputs, lengths, causal), slow_attention(*inputs, lengths, causal)
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)
    weights = torch.randn_like(slow)
    gradients = (torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, slow))
    for our_gradient, slow_gradient in zip(*gradients):
        torch.testing.assert_close(our_gradient, slow_gradient, rtol=0, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_float32_attention_equals_the_float64_loop(causal):
    lengths = [30, 2, 2, 17]
    ours = attend(*random_qkv(lengths, 4, 2, torch.float32), lengths, causal)
    slow = slow_attention(*random_qkv(lengths, 4, 2), lengths, causal)
    assert ours.dtype == torch.float32
    assert (ours - slow).abs().max() <= 1e-5


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("lengths", [[1], [32], [31, 33], [5, 5, 64, 2], [512], [513, 3],
                                     [3, 9, 1, 32, 5, 30, 7, 7, 2], [40] * 17], ids=str)
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2)])
def test_bf16_attention_and_its_gradients_are_float64s_to_rounding(lengths, heads, groups, causal):
    rounded = [t.bfloat16() for t in random_qkv(lengths, heads, groups)]
    ours, exact = ([t.to(dtype, copy=True).requires_grad_() for t in rounded]
                   for dtype in (torch.bfloat16, torch.float64))
    outputs = attend(*ours, lengths, causal), attend(*exact, lengths, causal)
    weights = torch.randn_like(outputs[1]).bfloat16()
    for out in outputs:
        (out * weights.to(out.dtype)).sum().backward()
    assert outputs[0].dtype == torch.bfloat16 and outputs[0].shape == outputs[1].shape
    pairs = [outputs, *zip((t.grad for t in ours), (t.grad for t in exact))]
    for found, expected in pairs:
        assert (found - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("lengths", [[20, 40], [20, *range(1, 8)]], ids=["apart", "in a group"])
def test_bf16_attention_ignores_the_next_sequence(lengths):
    q, k, v = (t.bfloat16() for t in random_qkv(lengths, 4, 4))
    before = attend(q, k, v, lengths, False)
    for t in (q, k, v):
        t[20:] = torch.nan
    after = attend(q, k, v, lengths, False)
    assert torch.equal(before[:20], after[:20]) and after[20:].isnan().all()


def test_bf16_attention_drops_weights_as_dropout_does():
    """With all weights 1 / L and v = 1, a row is the mean of L dropped ones."""
    lengths = [256] * 8
    q = torch.zeros(sum(lengths), 4, 8, dtype=torch.bfloat16)
    torch.manual_seed(0)
    rows = attend(q, q, torch.ones_like(q), lengths, False, dropout=0.25).double()[:, :, 0]
    assert rows.mean().item() == pytest.approx(1, abs=0.005)
    assert rows.var().item() == pytest.approx(0.25 / 0.75 / 256, rel=0.1)


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2)])
def test_the_jagged_form_of_attention_equals_the_loop(heads, groups):
    """On the CPU its kernel is torch's slow one, which knows no causal mask."""
    lengths = [2, 9, 1, 2]
    q, k, v = inputs = [t.requires_grad_() for t in random_qkv(lengths, heads, groups)]
    k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
    ours = attend_jagged(q, k, v, lengths, False, 0.0)
    slow = slow_attention(*inputs, lengths, False)
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)
    weights = torch.randn_like(slow)
    gradients = (torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, slow))
    for our_gradient, slow_gradient in zip(*gradients):
        torch.testing.assert_close(our_gradient, slow_gradient, rtol=0, atol=1e-11)


def test_the_jagged_form_can_be_recomputed(monkeypatch):
    """Its sizes are the same again. The kernel is a stand-in, as the CPU's cannot be recomputed."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: q * k + v.square())
    lengths, inputs = [2, 9, 1, 2], [t.requires_grad_() for t in random_qkv([2, 9, 1, 2], 4, 4)]
    with torch.no_grad():  # an evaluation before
        attend_jagged(*(t.detach() for t in inputs), lengths, False, 0.0)
    outputs = [attend_jagged(*inputs, lengths, False, 0.0),
               checkpoint(attend_jagged, *inputs, lengths, False, 0.0, use_reentrant=False)]
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in outputs]
    for kept, recomputed in zip(*gradients):
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("spread", [1, 4])
def test_bf16_attention_with_large_scores_is_not_far_from_the_fused_kernel(spread, causal):
    """Scores of deviation `spread`^2; theirs are kept in fp32, ours rounded to bf16."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(200, 4, 64, generator=random) for _ in range(3))
    q, k, v = (spread * q).bfloat16(), (spread * k).bfloat16(), v.bfloat16()
    batch = [t.transpose(0, 1)[None] for t in (q, k, v)]
    fused = F.scaled_dot_product_attention(*batch, is_causal=causal)[0].transpose(0, 1)
    exact = attend(q.double(), k.double(), v.double(), [200], causal)
    off = [(out - exact).norm() / exact.norm() for out in (attend(q, k, v, [200], causal), fused)]
    assert off[1] <= off[0] <= (0.01 if spread == 1 else 0.05)


def test_a_long_neighbour_changes_no_bf16_attention():
    q, k, v = (t.bfloat16() for t in random_qkv([40, 600], 4, 4))
    beside = attend(q, k, v, [40, 600], False)[:40]
    assert torch.equal(beside, attend(q[:40], k[:40], v[:40], [40], False))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("heads, groups", [(8, 8), (8, 2)])
def test_flash_attention_on_cuda_is_float64s_to_rounding(heads, groups, causal):
    lengths = [1, 300, 17, 128, 129, 5]
    random = torch.Generator().manual_seed(3)
    rounded = [torch.randn(sum(lengths), n, 64, generator=random).bfloat16()
               for n in (heads, groups, groups)]
    ours = [t.cuda().requires_grad_() for t in rounded]
    exact = [t.double().requires_grad_() for t in rounded]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        outputs = attend(*ours, lengths, causal), attend(*exact, lengths, causal)
    for out in outputs:
        out.square().sum().backward()
    pairs = [outputs, *zip((t.grad for t in ours), (t.grad for t in exact))]
    for found, expected in pairs:
        assert (found.cpu() - expected).norm() <= 0.01 * expected.norm()


@needs_cuda
@pytest.mark.parametrize("size", [6, 100])
def test_heads_that_flash_attention_does_not_take_are_attended_on_cuda(size):
    q = torch.randn(70, 2, size, device="cuda").bfloat16()
    ours = attend(q, q, q, [50, 20], True)
    exact = attend(*[q.cpu().double()] * 3, [50, 20], True)
    assert (ours.cpu() - exact).norm() <= 0.02 * exact.norm()


@needs_cuda
def test_flash_attention_on_cuda_drops_weights_and_repeats_itself():
    q = torch.zeros(2048, 4, 64, dtype=torch.bfloat16, device="cuda")
    rows = []
    for _ in range(2):
        torch.manual_seed(0)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            rows.append(attend(q, q, torch.ones_like(q), [256] * 8, False, dropout=0.25))
    assert torch.equal(*rows)
    values = rows[0].double()[:, :, 0]
    assert values.mean().item() == pytest.approx(1, abs=0.005)
    assert values.var().item() == pytest.approx(0.25 / 0.75 / 256, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_the_last_states_are_those_of_all(tiny, dtype, causal):
    llama, lengths, last = load_llama(tiny, dtype=dtype), [70, 5, 1, 33], [70, 2, 1, 0]
    x = llama.embed(random_ids(lengths)).requires_grad_()
    whole = torch.cat([h[len(h) - n :] for h, n in zip(llama(x, lengths, causal).split(lengths),
                                                       last)])
    part = llama(x, lengths, causal, last=last)
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 0.05}
    torch.testing.assert_close(part, whole, **tolerance)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0].double() for out in (part, whole)]
    assert (gradients[0] - gradients[1]).norm() <= tolerance["atol"] * gradients[1].norm()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_a_later_token_changes_earlier_outputs_only_without_the_causal_mask(causal, tiny):
    llama, lengths = load_llama(tiny), [70, 5]
    x = llama.embed(random_ids(lengths))
    changed = x.clone()
    changed[40] += 1
    with torch.no_grad():
        before, after = (llama(rows, lengths, causal) for rows in (x, changed))
    assert torch.equal(before[:40], after[:40]) == causal
    assert not torch.equal(before[40:70], after[40:70])
    assert torch.equal(before[70:], after[70:])


def test_attention_dropout_takes_part_in_training_mode_only(tiny):
    llama, lengths = load_llama(tiny), [20, 20, 9]
    x = llama.embed(random_ids(lengths))
    with torch.no_grad():
        plain = llama(x, lengths, False)
        assert torch.equal(llama(x, lengths, False, dropout=0.5), plain)
        llama.train()
        assert torch.equal(llama(x, lengths, False), plain)
        assert (llama(x, lengths, False, dropout=0.5) - plain).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------
# Files that are damaged, foreign or not supported
# ---------------------------------------------------------------------------------------------


def refused(load, *fragments):
    """`load` raises a UserError whose message has every fragment."""
    with pytest.raises(UserError) as info:
        load()
    for fragment in fragments:
        assert fragment in str(info.value)


def with_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def with_index(name):
    def damage(folder):
        shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
        index = {"weight_map": {"model.norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def cut(folder, size=-1000):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


NORM, HEAD = "model.norm.weight", "lm_head.weight"
BAD_WEIGHTS = {
    "no file": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors", "missing"]),
    "cut off": (cut, ["model.safetensors", "damaged"]),
    "empty": (lambda f: cut(f, 0), ["model.safetensors", "damaged"]),
    "header cut off": (lambda f: cut(f, 60), ["model.safetensors", "damaged"]),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs.github.com"),
        ["model.safetensors", "damaged"],
    ),
    "a tensor missing": (with_tensors(lambda t: t.pop(NORM)), ["missing", NORM]),
    "an untied head missing": (with_tensors(lambda t: t.pop(HEAD)), ["missing", HEAD]),
    "a tensor too many": (
        with_tensors(lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)})),
        ["model.safetensors", "model.layers.2.mlp.up_proj.weight"],
    ),
    "a bias": (
        with_tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})),
        ["model.safetensors", "model.layers.0.self_attn.q_proj.bias"],
    ),
    "another shape": (
        with_tensors(lambda t: t.update({NORM: torch.ones(31)})),
        ["model.safetensors", NORM, "(31,)", "(32,)"],
    ),
    "index is no JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        ["model.safetensors.index.json", "JSON"],
    ),
    "index without weight_map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        ["model.safetensors.index.json", "weight_map"],
    ),
    **{
        f"index names {name}": (with_index(name), ["model.safetensors.index.json", repr(name)])
        for name in ("../outside.safetensors", "/etc/hostname", "/tmp/x.safetensors", "",
                     "sub/x.safetensors", "pytorch_model.bin", "..safetensors", "x.safetensors\n",
                     "a\\..\\b.safetensors")
    },
    "index names a file that is not there": (
        with_index("model-00002.safetensors"), ["model-00002.safetensors", "missing"]
    ),
}


@pytest.mark.parametrize("damage, fragments", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_bad_weights_are_refused_by_name(damage, fragments, tiny_copy):
    damage(tiny_copy)
    refused(lambda: load_llama(tiny_copy), str(tiny_copy), *fragments)


def test_a_tensor_that_stands_in_two_shards_is_refused(tmp_path):
    folder = write_llama(tmp_path, shard="30KB")
    shards = sorted(folder.glob("*.safetensors"))
    tensors = load_file(shards[0])
    save_file({**tensors, **load_file(shards[1])}, shards[1])
    refused(lambda: load_llama(folder), shards[1].name, min(tensors))


BAD_CONFIGS = {
    "model_type": "mistral", "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True,
    "quantization_config": {"quant_method": "gptq"}, "vocab_size": "320", "hidden_size": None,
    "num_hidden_layers": 0, "num_attention_heads": -4, "intermediate_size": 48.5,
    "num_key_value_heads": 3, "head_dim": 7, "rms_norm_eps": "small",
    "rope_parameters": "linear",
}


@pytest.mark.parametrize("key, value", BAD_CONFIGS.items(), ids=BAD_CONFIGS)
def test_a_value_in_the_config_that_is_not_supported_is_refused_by_name(key, value, tiny_copy):
    edit_json(tiny_copy / "config.json", **{key: value})
    seen = [] if value is None else [str(value)]
    refused(lambda: load_llama(tiny_copy), str(tiny_copy / "config.json"), key, *seen)


@pytest.mark.parametrize("key", ["model_type", "vocab_size", "hidden_size", "intermediate_size",
                                 "num_hidden_layers", "num_attention_heads"])
def test_a_key_missing_from_the_config_is_named(key, tiny_copy):
    edit_json(tiny_copy / "config.json", drop=[key])
    refused(lambda: load_llama(tiny_copy), str(tiny_copy / "config.json"), key)


BAD_ROPES = [
    ({"rope_type": "yarn", "factor": 4.0}, ["rope_type", "yarn"]),
    ({"type": "dynamic", "factor": 2.0}, ["rope_type", "dynamic"]),
    ({"rope_type": ["linear"]}, ["rope_type", "linear"]),
    ({"rope_type": "linear"}, ["factor", "None"]),
    ({"rope_type": "linear", "factor": 0}, ["factor=0"]),
    ({"rope_type": "llama3", **LLAMA3, "low_freq_factor": "one"}, ["low_freq_factor='one'"]),
    ({"rope_type": "default", "rope_theta": -1.0}, ["rope_theta=-1.0"]),
]


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope, fragments", BAD_ROPES, ids=lambda v: str(v)[:40])
def test_rope_settings_that_are_not_supported_are_named(rope, fragments, key, tiny_copy):
    edit_json(tiny_copy / "config.json", drop=["rope_parameters"], **{key: rope})
    refused(lambda: load_llama(tiny_copy), str(tiny_copy / "config.json"), *fragments)


@pytest.mark.parametrize("content, fragment", [
    (b"{", "not readable as JSON"), (b"", "not readable as JSON"), (b"\xff\xfe\x00", "JSON"),
    (b"[]", "list"), (b"null", "NoneType"), (None, "missing"),
], ids=["cut off", "empty", "binary", "a list", "null", "no file"])
def test_a_config_that_is_no_json_object_is_refused(content, fragment, tiny_copy):
    path = tiny_copy / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    refused(lambda: load_llama(tiny_copy), str(path), fragment)


@pytest.mark.parametrize("name", ["no-such-folder", "a/b/c", "/no/such/folder", "o/n ame"])
def test_a_name_that_is_neither_folder_nor_repository_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: find_model(name), name, "no such folder")


def test_demo_is_the_name_of_the_embedded_model():
    assert find_model("demo") == Path(model.__file__).parent / "data" / "demo" / "llama"
    assert find_model("demo").is_dir()


# ---------------------------------------------------------------------------------------------
# The hub, played by a server on the loopback; huggingface_hub reads HF_ENDPOINT when imported,
# hence the subprocesses
# ---------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROBE = """
import json, sys
from data import UserError
from model import load_llama
from safetensors.torch import save_file
results = {}
for name, revision, out in json.loads(sys.argv[1]):
    try:
        save_file(load_llama(name, revision).state_dict(), out)
        results[f"{name}@{revision}"] = "loaded"
    except UserError as error:
        results[f"{name}@{revision}"] = f"UserError: {error}"
print(json.dumps(results))
"""


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that a download needs; `files` and `requests` are on the server."""

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path, files = self.path.partition("?")[0], self.server.files
        self.server.requests.append(f"{self.command} {path}")
        listed = path.startswith(("/api/models/o/tiny/", "/api/models/o/gated-files/"))
        if path.startswith(("/api/models/o/gated/", "/o/gated/", "/o/gated-files/")):
            self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        elif listed and path.endswith(("/revision/main", f"/revision/{COMMIT}")):
            siblings = [{"rfilename": name} for name in files]
            about = {"id": "o/tiny", "modelId": "o/tiny", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(about).encode())
        elif listed and path.endswith(f"/tree/{COMMIT}"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": hash_of(data)}
                    for name, data in files.items()]
            self.answer(200, json.dumps(tree).encode())
        elif listed:
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        elif path.startswith(f"/o/tiny/resolve/{COMMIT}/"):
            data = files[path.removeprefix(f"/o/tiny/resolve/{COMMIT}/")]
            self.answer(200, data, ETag=f'"{hash_of(data)}"', X_Repo_Commit=COMMIT)
        elif path.startswith("/api/models/o/down/"):
            self.answer(500, b"out of order")
        else:
            self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    do_HEAD = do_GET


def hash_of(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def probe(home: Path, endpoint: str, *cases, **environment) -> dict:
    """Load the cases (name, revision, file to write) in a fresh process."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(cases)], env=env, text=True, timeout=100,
        capture_output=True, cwd=Path(model.__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def hub(tiny, tmp_path_factory):
    """What happened to each case, the requests the server saw, and the loaded tensors."""
    home = tmp_path_factory.mktemp("hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests = []
    server.files = {path.name: path.read_bytes() for path in tiny.iterdir()} | {
        name: b"not for us"
        for name in ("pytorch_model.bin", "modeling_llama.py", "tokenizer.model", "README.md",
                     "consolidated.safetensors", "original/params.json", "notes.safetensors.bin")
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cases = [(f"o/{name}", revision, str(home / f"{name}.safetensors")) for name, revision in (
        ("tiny", None), ("tiny", "nowhere"), ("gated", None), ("gated-files", None),
        ("missing", None), ("down", None))]
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        results = probe(home / "home", endpoint, *cases)
    finally:
        server.shutdown()
        server.server_close()
    again = ("o/tiny", "main", str(home / "again.safetensors"))
    results |= probe(home / "home", endpoint, again, HF_HUB_OFFLINE="1")
    return results, server.requests, home


@pytest.mark.parametrize("case, fragments", [
    ("o/gated@None", ["o/gated ", "gated", "Ask for access", "hf auth login"]),
    ("o/gated-files@None", ["o/gated-files ", "is gated", "Ask for access", "hf auth login"]),
    ("o/missing@None", ["o/missing ", "nor on the hub", "Check the name"]),
    ("o/tiny@nowhere", ["o/tiny ", "no revision nowhere", "--revision"]),
    ("o/down@None", ["o/down ", "cannot be fetched", "HF_ENDPOINT"]),
])
def test_what_the_hub_refuses_is_told_with_what_to_do(case, fragments, hub):
    message = hub[0][case]
    assert message.startswith("UserError: The repository")
    for fragment in [*fragments, "Or pass a local folder"]:
        assert fragment in message


def test_a_repository_is_loaded_from_the_hub_tensor_by_tensor(hub, tiny):
    results, _, home = hub
    assert results["o/tiny@None"] == "loaded"
    stored, loaded = (load_file(path) for path in
                      (tiny / "model.safetensors", home / "tiny.safetensors"))
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)


def test_a_repository_that_was_fetched_once_is_loaded_offline(hub):
    results, _, home = hub
    assert results["o/tiny@main"] == "loaded"
    assert (home / "again.safetensors").read_bytes() == (home / "tiny.safetensors").read_bytes()


def test_only_safetensors_and_json_files_are_requested_from_the_hub(hub, tiny):
    prefix = f"GET /o/tiny/resolve/{COMMIT}/"
    got = {request.removeprefix(prefix) for request in hub[1] if request.startswith(prefix)}
    assert got == {path.name for path in tiny.iterdir()}
    asked = [request for request in hub[1] if "/resolve/" in request]
    assert all(request.endswith((".json", "/model.safetensors")) for request in asked)
    assert not any("original" in request for request in asked)


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["no server", "offline"])
def test_an_unreachable_hub_is_one_clear_error(environment, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        results = probe(tmp_path, endpoint, ("o/tiny", None, "unused"), **environment)
    for fragment in ["The repository o/tiny cannot be fetched", "network", "HF_HUB_OFFLINE",
                     "local folder"]:
        assert fragment in results["o/tiny@None"]
