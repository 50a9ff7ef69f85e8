"""model.py against transformers: the network, its attention, the encoder and its poolings."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ECHO, EOL, MEMORY, OTHERS, TEXT, TEXTS, K
from helpers import edit_json, random_qkv, refused, slow_attention, trained_encoder, write_llama
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig as HFLlamaConfig
from transformers import PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import lora
from data.tokenizer import INSTRUCTED
from model import EncoderConfig, attend, inverse_frequencies, load_encoder, load_llama
from model import plain_encoder, save_encoder
from runtime.devices import pack
from runtime.errors import UserError
from runtime.files import sha256_of_json
from runtime.hub import find_model

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
    llama = load_llama(folder)
    ids = random_ids(lengths, llama.config.vocab_size)
    ours = our_logits(llama, ids, lengths)
    theirs = their_logits(reference(folder), ids, lengths)
    assert theirs.std() > 0.3
    assert (ours - theirs).abs().max() <= 1e-4


# ---------------------------------------------------------------------------------------------
# Logits
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", *OTHERS])
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
def test_packed_logits_equal_those_of_transformers(settings, kind, tmp_path, reference):
    folder = write_llama(tmp_path, kind=kind, **settings)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == ("shard" in settings)
    assert_equals_transformers(folder, reference)


@pytest.mark.parametrize("kind", ["llama", *OTHERS])
def test_bidirectional_states_and_gradients_equal_those_of_transformers(kind, tmp_path, reference):
    folder, n = write_llama(tmp_path, kind=kind), 40
    edit_json(folder / "config.json", is_causal=False)
    llama, theirs, results = load_llama(folder), reference(folder), []
    rows = llama.embed(random_ids([n]))
    for forward in (lambda x: llama(x, [n], causal=False), lambda x: llama(x, [n], causal=True),
                    lambda x: theirs.model(inputs_embeds=x[None]).last_hidden_state[0]):
        x = rows.clone().requires_grad_()
        states = forward(x)
        states.square().sum().backward()
        results.append((states.detach(), x.grad / x.grad.abs().max()))
    for ours, causal, expected in zip(*results):
        assert (ours - expected).abs().max() <= 1e-4
        assert (ours - causal).abs().max() > 0.01


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
def test_rope_settings_are_read_as_transformers_reads_them(rope, tiny_copy, reference):
    before = our_logits(load_llama(tiny_copy), random_ids([150]), [150])
    edit_json(tiny_copy / "config.json", drop=["rope_parameters"], **rope)
    assert_equals_transformers(tiny_copy, reference, [150, 3])
    after = our_logits(load_llama(tiny_copy), random_ids([150]), [150])
    assert ((before - after).abs().max() > 1e-2) == bool(rope)


def test_a_llama_2_checkpoint_loads_despite_inv_freq_and_a_short_config(tmp_path, reference):
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
def test_loading_casts_and_freezes_every_tensor(dtype, tiny):
    llama, stored = load_llama(tiny, dtype=dtype), load_file(tiny / "model.safetensors")
    assert {name for name, _ in llama.named_parameters()} == set(stored)
    for name, weight in llama.named_parameters():
        assert weight.dtype == dtype and not weight.requires_grad
        assert torch.equal(weight, stored[name].to(dtype))
    assert not llama.training


def test_a_tied_head_is_the_embedding_table_and_a_stored_copy_is_ignored(tmp_path):
    folder = write_llama(tmp_path, tie_word_embeddings=True)
    # copies: under safetensors before 0.8 they are the file that is written over below
    tensors = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}
    tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors")
    llama = load_llama(folder)
    assert llama.head is llama.model.embed_tokens.weight
    assert torch.equal(llama.head, tensors["model.embed_tokens.weight"])


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
def test_llama_3_1_frequencies_match_values_computed_by_hand(pair, expected):
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


def test_positions_restart_at_zero_in_each_sequence(tiny):
    table = load_llama(tiny).rotary_table([4, 2, 4], torch.empty(10, 32))
    for rows, trigonometric in zip(table, (math.cos, math.sin)):
        assert rows.shape == (10, 1, 8)
        assert torch.equal(rows[:4], rows[6:]) and torch.equal(rows[:2], rows[4:6])
        by_hand = [trigonometric(3 / 10000 ** (2 * i / 8)) for i in (0, 1, 2, 3, 0, 1, 2, 3)]
        if trigonometric is math.sin:  # of the first half, negative
            by_hand[:4] = [-sine for sine in by_hand[:4]]
        assert rows[3, 0].tolist() == pytest.approx(by_hand, abs=1e-6)


# ---------------------------------------------------------------------------------------------
# Attention; bf16 on the CPU is in test_cpu.py, FlashAttention in test_cuda.py
# ---------------------------------------------------------------------------------------------


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
def test_fp32_attention_equals_the_fp64_loop(causal):
    lengths = [30, 2, 2, 17]
    ours = attend(*random_qkv(lengths, 4, 2, torch.float32), lengths, causal)
    slow = slow_attention(*random_qkv(lengths, 4, 2), lengths, causal)
    assert ours.dtype == torch.float32
    assert (ours - slow).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_last_returns_the_same_states_as_a_full_pass(tiny, dtype, causal):
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
def test_a_token_affects_earlier_states_only_without_the_causal_mask(causal, tiny):
    llama, lengths = load_llama(tiny), [70, 5]
    x = llama.embed(random_ids(lengths))
    changed = x.clone()
    changed[40] += 1
    with torch.no_grad():
        before, after = (llama(rows, lengths, causal) for rows in (x, changed))
    assert torch.equal(before[:40], after[:40]) == causal
    assert not torch.equal(before[40:70], after[40:70])
    assert torch.equal(before[70:], after[70:])


def test_attention_dropout_acts_only_in_training_mode(tiny):
    llama, lengths = load_llama(tiny), [20, 20, 9]
    x = llama.embed(random_ids(lengths))
    with torch.no_grad():
        plain = llama(x, lengths, False)
        assert torch.equal(llama(x, lengths, False, dropout=0.5), plain)
        llama.train()
        assert torch.equal(llama(x, lengths, False), plain)
        assert (llama(x, lengths, False, dropout=0.5) - plain).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------
# The encoder: memory tokens, table, pooling
# ---------------------------------------------------------------------------------------------


def packed(encoder, texts):
    arrays = encoder.tokenize(texts).ids
    return torch.from_numpy(np.concatenate(arrays)), [len(a) for a in arrays]


@torch.no_grad()
def their_hidden(reference, rows, causal):
    """Last hidden states of transformers for one sequence of input embeddings, under a 4-D mask."""
    n = len(rows)
    mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1) * causal
    return reference(inputs_embeds=rows[None], attention_mask=mask[None, None]).last_hidden_state[0]


@pytest.mark.parametrize("batch_tokens", [1, 30, 100, 4096])
@pytest.mark.parametrize("config", [
    MEMORY,
    EncoderConfig(K, attention="causal", max_tokens=64),
    EncoderConfig(0, "mean", max_tokens=64),
    EncoderConfig(0, "last", "causal", max_tokens=64),
    EncoderConfig(0, "weighted-mean", "causal", max_tokens=64),
    EncoderConfig(0, "echo", "causal", 512, ECHO),
    EncoderConfig(0, "last", "causal", 512, EOL),
    EncoderConfig(K, template=INSTRUCTED, max_tokens=64),
], ids=lambda c: f"{c.pooling} {c.attention} {c.template[:9]}")
def test_an_embedding_does_not_depend_on_batch_or_order(config, batch_tokens, tiny):
    encoder = trained_encoder(tiny, config)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    order = random.Random(batch_tokens).sample(range(len(TEXTS)), len(TEXTS))
    together = encoder.encode([TEXTS[i] for i in order], batch_tokens=batch_tokens)
    assert np.abs(together - alone[order]).max() <= 1e-5
    distances = np.abs(alone[:, None] - alone[None]).max(-1)
    np.fill_diagonal(distances, 1.0)
    assert distances[6, 7] == 0 and (distances > 1e-3).sum() == len(TEXTS) ** 2 - 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_encode_returns_one_float32_row_per_text_and_none_for_no_texts(dtype, tiny):
    encoder = trained_encoder(tiny, dtype=dtype)
    for texts in ([], [""], TEXTS):
        rows = encoder.encode(texts)
        assert rows.shape == (len(texts), 32) and rows.dtype == np.float32
        assert np.isfinite(rows).all()


@pytest.mark.parametrize("kind", ["llama", *OTHERS])
def test_a_bf16_encoder_is_close_to_the_fp32_one(kind, tiny_of):
    wide, narrow = (trained_encoder(tiny_of(kind), dtype=dtype).encode(TEXTS)
                    for dtype in (torch.float32, torch.bfloat16))
    cosines = (wide * narrow).sum(1) / np.linalg.norm(wide, axis=1) / np.linalg.norm(narrow, axis=1)
    assert cosines.min() > 0.999


@pytest.mark.parametrize("max_tokens", [2, 5, 20])
def test_a_long_text_is_cut_to_max_tokens_and_the_memory_tokens_follow(max_tokens, tiny):
    config = EncoderConfig(K, max_tokens=max_tokens)
    encoder = trained_encoder(tiny, config)
    whole = trained_encoder(tiny, EncoderConfig(K, max_tokens=512))
    ids = encoder.tokenizer.encode([TEXT])[0]
    assert len(ids) > 50 and ids[0] == 1
    kept = torch.from_numpy(ids[:max_tokens])
    with torch.no_grad():
        hidden, lengths = encoder(kept, [len(kept)])
        expected = whole.embed(kept, [len(kept)]).numpy()
    assert lengths == [max_tokens + K] and len(hidden) == max_tokens + K
    assert np.abs(encoder.encode([TEXT]) - expected).max() <= 1e-6
    assert np.abs(whole.encode([TEXT]) - expected).max() > 1e-3


@pytest.mark.parametrize("k", [1, 2, 16])
def test_an_encoder_counts_the_texts_that_it_has_cut(k, tiny):
    """As many tokens of each text whatever K; no text counts while it is only tokenized."""
    encoder = trained_encoder(tiny, EncoderConfig(k, max_tokens=20))
    sizes = [len(ids) for ids in encoder.tokenizer.encode(TEXTS)]
    long = sum(size > 20 for size in sizes)
    assert 20 in [min(size, 20) for size in sizes] and 2 <= long < len(TEXTS)
    encoder.tokenize(TEXTS)
    assert encoder.cut == 0
    encoder.encode(TEXTS)
    assert encoder.cut == long
    lengths = {place: n for places, _, ns, _ in encoder.batches(TEXTS, batch_tokens=50)
               for place, n in zip(places, ns)}
    assert [lengths[i] for i in range(len(TEXTS))] == [min(size, 20) for size in sizes]
    assert encoder.cut == 2 * long
    encoder.encode(["x" * 15])
    assert encoder.cut == 2 * long
    encoder.encode(["x" * 15], "Find it")
    assert encoder.cut == 2 * long + 1


def test_encode_uses_no_dropout_and_restores_training_mode(tiny):
    encoder = trained_encoder(tiny)
    expected = encoder.encode(TEXTS)
    encoder.train()
    assert np.array_equal(encoder.encode(TEXTS), expected)
    assert encoder.training and encoder.llama.training
    encoder.config = replace(encoder.config, document_template="passage: {text}")
    refused(lambda: encoder.encode(TEXTS, "Find it", document=True), "instruction")
    assert encoder.training and encoder.llama.training
    plain = plain_encoder(tiny)
    plain.encode(TEXTS)
    assert not any(module.training for module in plain.modules())


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_every_state_sees_the_whole_sequence_only_under_bidirectional_attention(attention, tiny):
    """No library default swaps one mask for the other at batch size one."""
    encoder = trained_encoder(tiny, EncoderConfig(K, attention=attention), dtype=torch.float64)
    ids = torch.arange(1, 31)  # distinct, so that a row of the table is one place of the context
    encoder.table.requires_grad_()
    hidden, lengths = encoder(ids, [30])
    assert lengths == [30 + K]
    weights = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for place in range(30 + K):
        (gradient,) = torch.autograd.grad(hidden[place] @ weights, encoder.table, retain_graph=True)
        reached = gradient[ids].abs().amax(1) > 1e-9
        visible = 30 if attention == "bidirectional" else min(place + 1, 30)
        assert reached[:visible].all() and not reached[visible:].any()


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_the_last_token_affects_the_first_state_only_bidirectionally(attention, tiny):
    encoder = trained_encoder(tiny, EncoderConfig(K, attention=attention))
    ids = torch.arange(1, 31)
    with torch.no_grad():
        before, after = (encoder(torch.cat((ids, torch.tensor([t]))), [31])[0] for t in (40, 41))
    assert ((before[0] - after[0]).abs().max() > 1e-5) == (attention == "bidirectional")
    assert torch.equal(before[:30], after[:30]) == (attention == "causal")
    assert (before[-K:] - after[-K:]).abs().max() > 1e-4


POOLINGS = {
    "memory": lambda h: sum(h[-K:]) / K,
    "last": lambda h: h[-1],
    "mean": lambda h: sum(h) / len(h),
    "weighted-mean": lambda h: sum((i + 1) * h[i] for i in range(len(h)))
    / sum(range(1, len(h) + 1)),
}


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_each_pooling_equals_its_formula_on_the_states_of_transformers(
    pooling, attention, tiny, reference
):
    k = K if pooling == "memory" else 0
    encoder = plain_encoder(tiny, EncoderConfig(k, pooling, attention, max_tokens=128))
    encoder.add_memory("normal", False, torch.Generator().manual_seed(0))
    theirs, result = reference(tiny).model, encoder.encode(TEXTS)
    for text, embedding in zip(TEXTS, result):
        ids = torch.from_numpy(encoder.tokenizer.encode([text])[0]).long()[:128]
        rows = torch.cat((theirs.embed_tokens(ids), encoder.memory_tokens.data))
        hidden = their_hidden(theirs, rows.detach(), attention == "causal")
        assert np.abs(embedding - POOLINGS[pooling](list(hidden)).numpy()).max() <= 1e-5


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_echo_averages_the_tokens_of_the_second_occurrence(attention, tiny, reference):
    encoder = plain_encoder(tiny, EncoderConfig(0, "echo", attention, 512, ECHO))
    theirs, result = reference(tiny).model, encoder.encode(TEXTS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tiny / "tokenizer.json"))
    for text, embedding in zip(TEXTS, result):
        string = ECHO.replace("{text}", text)
        found = tokenizer(string, return_offsets_mapping=True)
        second = [end > len(string) - len(text) for _, end in found.offset_mapping]
        rows = theirs.embed_tokens(torch.tensor(found.input_ids)).detach()
        hidden = their_hidden(theirs, rows, attention == "causal")
        tail = hidden[torch.tensor(second)] if text else hidden[-1:]
        assert np.abs(embedding - tail.mean(0).numpy()).max() <= 1e-5
        assert 0 < len(tail) < len(hidden) / 2 + 1


def test_the_memory_is_the_last_k_states_of_each_text(tiny):
    encoder = trained_encoder(tiny)
    ids, lengths = packed(encoder, TEXTS)
    with torch.no_grad():
        memory, (hidden, longer) = encoder.memory(ids, lengths), encoder(ids, lengths)
    assert longer == [n + K for n in lengths]
    assert memory.shape == (len(TEXTS), K, 32)
    for ours, rows in zip(memory, hidden.split(longer)):
        assert torch.equal(ours, rows[-K:])


@pytest.mark.parametrize("train_table", [True, False], ids=["table", "memory tokens only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_tokens_and_own_table_are_fp32_and_the_llama_keeps_its_own(dtype, train_table, tiny):
    encoder = plain_encoder(tiny, EncoderConfig(2000, max_tokens=4000), dtype=dtype)
    stored = load_file(tiny / "model.safetensors")["model.embed_tokens.weight"].to(dtype)
    encoder.add_memory("normal", train_table, torch.Generator().manual_seed(0))
    assert encoder.memory_tokens.dtype == torch.float32
    assert (encoder.memory_tokens.mean(0) - stored.float().mean(0)).abs().max() < 0.02
    ratio = encoder.memory_tokens.std(0) / stored.float().std(0)
    assert 0.9 < ratio.min() and ratio.max() < 1.1
    if train_table:
        assert encoder.table.dtype == torch.float32 and encoder.table.requires_grad
        assert torch.equal(encoder.table, stored.float())
        encoder.table.data.zero_()
    else:
        assert encoder.table is encoder.llama.model.embed_tokens.weight
    assert torch.equal(encoder.llama.model.embed_tokens.weight, stored)


def test_without_adapters_an_encoder_is_the_plain_llama_with_its_pooling(tiny):
    config = EncoderConfig(0, "mean", max_tokens=64)
    plain = plain_encoder(tiny, config)
    adapted = trained_encoder(tiny, config, train_table=False)
    expected = plain.encode(TEXTS)
    assert np.abs(adapted.encode(TEXTS) - expected).max() > 1e-2
    adapted.adapters = False
    assert np.array_equal(adapted.encode(TEXTS), expected)


def draw_memory(folder, init, k, table=None, seed=0, dtype=torch.float32) -> torch.Tensor:
    """The initial memory rows (k, D) of a plain Llama, its table replaced if one is given."""
    encoder = plain_encoder(folder, EncoderConfig(k), dtype=dtype)
    if table is not None:
        encoder.table.data.copy_(table)
    encoder.add_memory(init, False, torch.Generator().manual_seed(seed))
    return encoder.memory_tokens.detach()


@pytest.fixture(scope="module")
def centred_table():
    """A table (320, 32) of zero mean, so that the rows' rounding to bf16 is small beside their
    spread; its dimensions are correlated and of unequal deviation."""
    random = torch.Generator().manual_seed(5)
    mix = torch.randn(32, 32, generator=random, dtype=torch.float64)
    table = torch.randn(320, 32, generator=random, dtype=torch.float64) @ mix
    table *= torch.logspace(-1, 1, 32, dtype=torch.float64)
    return table - table.mean(0)


def standard_errors(rows: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How far the rows' covariance is from the expected one (D, D), in standard errors of a normal
    sample."""
    variance = expected.diagonal()
    error = (expected**2 + variance[:, None] * variance) / len(rows)
    return (rows.double().T.cov() - expected).abs() / error.sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mean_rows_have_a_billionth_of_the_tables_covariance(dtype, centred_table, tiny):
    rows = draw_memory(tiny, "mean", 20_000, centred_table, dtype=dtype)
    expected = 1e-9 * centred_table.T @ centred_table / 320
    assert standard_errors(rows, expected).max() < 5  # of 528 numbers
    assert standard_errors(rows, 1.2 * expected).max() > 10
    assert standard_errors(rows, expected.diagonal().diag()).max() > 10
    assert (rows.double().mean(0).abs() / (expected.diagonal() / 20_000).sqrt()).max() < 5


def test_mean_rows_are_drawn_as_transformers_resizes_a_table(centred_table, tiny, reference):
    """The official code's start: resize_token_embeddings."""
    model = reference(tiny)
    model.get_input_embeddings().weight.data.copy_(centred_table)
    torch.manual_seed(0)
    theirs = model.resize_token_embeddings(320 + 20_000, mean_resizing=True).weight[320:].detach()
    ours = draw_memory(tiny, "mean", 20_000, centred_table)
    assert theirs.shape == ours.shape and theirs.abs().max() > 0
    covariance = theirs.double().T.cov()
    assert standard_errors(ours, covariance).max() < 5 * 2**0.5  # theirs is a sample, too
    assert (ours.std(0) / theirs.std(0) - 1).abs().max() < 0.03
    assert (ours.norm(dim=1).mean() / theirs.norm(dim=1).mean() - 1).abs() < 0.02


def test_mean_rows_lie_at_the_tables_mean_and_are_nearly_equal(tiny):
    rows, table = draw_memory(tiny, "mean", 8), load_llama(tiny).model.embed_tokens.weight
    mean, spread = table.mean(0), table.std(0)
    distance = (rows - mean).abs()
    assert (distance <= 2**-8 * mean.abs() + 6 * 1e-9**0.5 * spread).all()
    assert (distance.max(dim=0).values > 0).any() and not torch.equal(rows[0], rows[1])
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    assert (unit @ unit.T).min() > 0.99999
    unit = torch.nn.functional.normalize(draw_memory(tiny, "normal", 8).double(), dim=1)
    assert (unit @ unit.T).min() < 0.5


def test_mean_rows_have_no_spread_where_the_table_has_none(centred_table, tiny):
    """The covariance is about the mean. The value lies halfway between two of bf16, so that the
    least noise would move some rows to the other one."""
    table = centred_table.clone()
    table[:, 3] = 1 + 2**-8
    rows = draw_memory(tiny, "mean", 64, table)
    assert (rows[:, 3] == 1).all() and len(rows[:, 4].unique()) > 32


def test_normal_rows_have_the_tables_deviation_in_each_dimension_and_no_correlation(
    centred_table, tiny
):
    rows = draw_memory(tiny, "normal", 20_000, centred_table)
    expected = centred_table.var(0).diag()
    assert standard_errors(rows, expected).max() < 5
    assert standard_errors(rows, centred_table.T.cov()).max() > 10


@pytest.mark.parametrize("init", ["mean", "normal"])
def test_initial_memory_rows_depend_on_the_generator_alone_and_are_rounded_to_bf16(init, tiny):
    drawn = [draw_memory(tiny, init, 8, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    for rows in drawn:
        assert rows.dtype == torch.float32 and torch.equal(rows, rows.bfloat16().float())
        assert len(torch.unique(rows, dim=0)) > 1
    wide = draw_memory(tiny, init, 8, seed=3, dtype=torch.float64)
    assert wide.dtype == torch.float64 and torch.equal(wide, wide.bfloat16().double())


def test_the_table_of_an_encoder_is_not_rounded_and_is_no_copy_of_the_llamas(tiny):
    encoder = plain_encoder(tiny, MEMORY)
    encoder.add_memory("mean", True, torch.Generator().manual_seed(0))
    own, theirs = encoder.table.detach(), encoder.llama.model.embed_tokens.weight
    assert torch.equal(own, theirs) and not torch.equal(own, own.bfloat16().float())
    encoder.table.data.add_(1)
    assert not torch.equal(own, theirs)


def test_gradients_reach_only_memory_tokens_table_and_adapters(tiny):
    encoder = trained_encoder(tiny).train()
    encoder.embed(*packed(encoder, TEXTS)).square().sum().backward()
    reached = {name for name, p in encoder.named_parameters() if p.grad is not None}
    adapters = {n for n, _ in encoder.named_parameters() if "lora_" in n}
    assert len(adapters) == 24 and reached == adapters | {"table", "memory_tokens"}


def test_pack_puts_the_parts_of_each_sequence_side_by_side():
    a, b = torch.arange(5.0)[:, None], torch.arange(10.0, 14.0)[:, None]
    row, lengths = pack((a, [2, 0, 3]), (b, [1, 2, 1]))
    assert row[:, 0].tolist() == [0, 1, 10, 11, 12, 2, 3, 4, 13]
    assert lengths == [3, 2, 4]


def test_the_demo_model_embeds_similar_sentences_close_together():
    if not (find_model("demo") / "model.safetensors").is_file():
        pytest.skip("the demo model is not built")
    encoder = plain_encoder("demo")
    rows = encoder.encode(["A cat sits on the mat.", "A cat is on the mat.", "Shares fell today."])
    assert rows.shape == (3, 256) and encoder.base["name"] == "demo"
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > unit[0] @ unit[2]


# ---------------------------------------------------------------------------------------------
# Saving and loading encoders; bad folders are in test_formats.py
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [
    MEMORY, EncoderConfig(2, attention="causal", template="q: {text}", max_tokens=40)
], ids=["paper", "other settings"])
@pytest.mark.parametrize("train_table", [True, False], ids=["table", "memory tokens only"])
def test_a_saved_encoder_loads_bit_for_bit(train_table, config, tiny, tmp_path):
    encoder = trained_encoder(tiny, config, train_table)
    save_encoder(encoder, tmp_path / "encoder")
    files = {path.name for path in (tmp_path / "encoder").iterdir()}
    assert files == {"encoder.json", "embeddings.safetensors", "ctkd"}
    loaded = load_encoder(tmp_path / "encoder")
    assert np.array_equal(loaded.encode(TEXTS), encoder.encode(TEXTS))
    assert (loaded.config, loaded.base) == (config, encoder.base)
    assert loaded.history == [{"stage": "ctkd"}] and loaded.lora_config.r == 16
    ours, theirs = encoder.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert (loaded.table is loaded.llama.model.embed_tokens.weight) != train_table
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_moved_base_is_found_with_base_and_a_different_one_is_refused(checkpoint, tmp_path):
    encoder = trained_encoder(checkpoint())
    save_encoder(encoder, tmp_path / "encoder")
    (tmp_path / "llama").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="--base") as info:
        load_encoder(tmp_path / "encoder")
    assert str(tmp_path / "llama") in str(info.value)
    loaded = load_encoder(tmp_path / "encoder", base=str(tmp_path / "moved"))
    assert np.array_equal(loaded.encode(TEXTS), encoder.encode(TEXTS))
    other = checkpoint("other", seed=1)
    with pytest.raises(UserError, match="another base") as info:
        load_encoder(tmp_path / "encoder", base=str(other))
    assert str(other) in str(info.value) and encoder.base["sha256"][:12] in str(info.value)


def test_the_base_is_recorded_by_path_and_hash(tiny, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    base = plain_encoder(tiny.name).base
    parts = {key: base.pop(key) for key in ("weights", "config", "tokenizer", "bos")}
    assert base == {"name": str(tiny.resolve()), "revision": None, "sha256": sha256_of_json(parts)}
    assert parts["bos"] == [1] and parts["config"]["rope"] == {
        "rope_type": "default", "rope_theta": 10000.0}


def test_after_two_stages_the_first_adapter_is_merged_and_the_second_live(two_stages, tiny):
    first, second, trained = two_stages
    loaded, base = load_encoder(second), load_file(tiny / "model.safetensors")
    assert loaded.history == [{"stage": "ctkd"}, {"stage": "ucl", "steps": 3}]
    a1, a2 = (load_file(folder / stage / "adapter_model.safetensors")
              for folder, stage in ((first, "ctkd"), (second, "ucl")))
    by_hand = load_llama(tiny)
    for name, weight in by_hand.named_parameters():
        module = "base_model.model." + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in a1:
            weight += 32 / 16 * a1[f"{module}.lora_B.weight"] @ a1[f"{module}.lora_A.weight"]
        merged = loaded.llama.get_parameter(name)
        assert (merged - weight).abs().max() <= 1e-6
        if f"{module}.lora_A.weight" in a2:
            weight += 20 / 4 * a2[f"{module}.lora_B.weight"] @ a2[f"{module}.lora_A.weight"]
    assert set(lora.lora_state(loaded.llama)) == set(a2) and len(a2) == 2 * 2 * 3
    assert not torch.equal(by_hand.model.layers[0].self_attn.k_proj.weight,
                           base["model.layers.0.self_attn.k_proj.weight"])
    texts = loaded.encode(TEXTS)
    loaded.llama = by_hand
    assert np.abs(loaded.encode(TEXTS) - texts).max() <= 1e-5
    assert np.array_equal(trained.encode(TEXTS), texts)
    assert np.abs(load_encoder(first).encode(TEXTS) - texts).max() > 1e-2


def test_the_first_stage_is_copied_unchanged_into_the_second_folder(two_stages):
    first, second, _ = two_stages
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / "ctkd" / name).read_bytes() == (second / "ctkd" / name).read_bytes()
