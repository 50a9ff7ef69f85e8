"""Stage 1 in its readable form: one text at a time, whole masks, whole logits, nothing fused.

The oracle of the fast path, for test_ctkd.py and bench/overlay.py. It reads the weights of an
Encoder and shares no code with model.py or pretrain_ctkd.py. No dropout.
"""

import math

import torch


def linear(layer, x, adapters):
    """y = W x + (alpha / r) B A x."""
    y = x @ layer.weight.T
    if adapters and layer.lora_A is not None:
        a, b = layer.lora_A.to(x.dtype), layer.lora_B.to(x.dtype)
        y = y + layer.scaling * (x @ a.T @ b.T)
    return y


def norm(layer, x):
    """x / rms(x) * weight."""
    wide = x.float() if x.dtype == torch.bfloat16 else x
    return layer.weight * (wide / (wide.square().mean(-1, keepdim=True) + layer.eps).sqrt()).to(x)


def rotary(x, theta):
    """Turn pair (i, i + size / 2) of row t by t theta^(-2 i / size), an fp32 angle, as Llamas are
    trained; x (T, heads, size)."""
    length, _, size = x.shape
    speeds = 1 / theta ** (torch.arange(0, size, 2).float() / size)
    angles = torch.arange(length).float()[:, None, None] * speeds
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    a, b = x[..., : size // 2], x[..., size // 2 :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def llama(model, x, causal, adapters=False):
    """Input embeddings of one sequence (T, D) -> hidden states (T, D)."""
    config, length = model.config, len(x)
    assert config.rope["rope_type"] == "default"
    allowed = torch.ones(length, length, dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        h = norm(block.input_layernorm, x)
        q, k, v = (linear(p, h, adapters).view(length, -1, config.head_dim)
                   for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = (rotary(t, config.rope["rope_theta"]) for t in (q, k))
        groups = q.shape[1] // k.shape[1]
        heads = []
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head // groups].T / math.sqrt(config.head_dim)
            scores = scores.masked_fill(~allowed, -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, head // groups])
        x = x + linear(attention.o_proj, torch.cat(heads, dim=-1), adapters)
        h = norm(block.post_attention_layernorm, x)
        gate, up = linear(mlp.gate_proj, h, adapters), linear(mlp.up_proj, h, adapters)
        x = x + linear(mlp.down_proj, gate * gate.sigmoid() * up, adapters)
    return norm(model.model.norm, x)


def log_probabilities(model, hidden):
    """(rows, D) -> (rows, V)."""
    logits = hidden @ model.head.T
    return (logits.float() if logits.dtype == torch.bfloat16 else logits).log_softmax(-1)


def stage1_loss(encoder, texts, splits, objective):
    """ctkd: mean over a text's S + 1 rows, then over texts; nll, rc: mean over target tokens."""
    model, k, dtype = encoder.llama, encoder.config.num_memory_tokens, encoder.llama.head.dtype
    bidirectional = encoder.config.attention == "bidirectional"
    table, sums, counts = model.model.embed_tokens.weight, 0.0, 0
    for ids, a in zip(texts, splits):
        ids = torch.from_numpy(ids).long()
        context = ids if objective == "rc" else ids[:a]
        target = ids[1:] if objective == "rc" else ids[a:]
        read = torch.cat((encoder.table[context], encoder.memory_tokens)).to(dtype)
        memory = llama(model, read, causal=not bidirectional, adapters=True)[-k:]
        student = llama(model, torch.cat((table[ids[:1]], memory, table[target])), causal=True)
        student = log_probabilities(model, student)[k:]  # row k is the last memory token's
        if objective == "ctkd":
            teacher = log_probabilities(model, llama(model, table[ids], causal=True))[a - 1 :]
            teacher = teacher.detach()
            kl = (teacher.exp() * (teacher - student)).sum(-1)
            assert len(kl) == len(target) + 1
            sums, counts = sums + kl.mean(), counts + 1
        else:
            sums = sums - student[torch.arange(len(target)), target].sum()
            counts += len(target)
    return sums / counts
