"""LLM2Comp's equations as the paper writes them (arXiv 2511.17129), one text at a time, unbatched.
`python paper.py` prints each quantity for two passages next to the fast path's value.

n: token ids (T,) of a text, BOS first; context n[:a], continuation n[a:] of S = T - a tokens.
g_phi: the frozen causal Llama (.model, .head (V, D)). f_theta: the encoder; .llama is g_phi with
adapters, .table (V, D), .memory_tokens m_1..m_K (K, D) with states m~_1..m~_K. The tests' oracle.
"""

import torch


def linear(layer, x, adapters):
    """y = W x + (alpha / r) B A x for each row x; (T, in) -> (T, out)."""
    y = x @ layer.weight.T
    if adapters and layer.lora_A is not None:
        y = y + layer.scaling * (x @ layer.lora_A.to(x.dtype).T @ layer.lora_B.to(x.dtype).T)
    return y


def norm(layer, x):
    """x / rms(x) * weight."""
    wide = x.float() if x.dtype == torch.bfloat16 else x
    return layer.weight * (wide / (wide.square().mean(-1, keepdim=True) + layer.eps).sqrt()).to(x)


def rotary(x, theta):
    """Rotate row t's pair (i, i + size / 2) by t theta^(-2 i / size); x (T, heads, size)."""
    length, _, size = x.shape
    speeds = 1 / theta ** (torch.arange(0, size, 2).float() / size)  # fp32, as Llamas are trained
    angles = torch.arange(length).float()[:, None, None] * speeds
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    a, b = x[..., : size // 2], x[..., size // 2 :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def llama(model, x, causal, adapters=False):
    """Input embeddings of one sequence (T, D) -> hidden states after the final norm (T, D)."""
    allowed = torch.ones(len(x), len(x), dtype=torch.bool).tril(0 if causal else len(x))
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        h = norm(block.input_layernorm, x)
        q, k, v = (linear(p, h, adapters).view(len(x), -1, model.config.head_dim)
                   for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = (rotary(t, model.config.rope["rope_theta"]) for t in (q, k))
        group, heads = q.shape[1] // k.shape[1], []  # query heads per key head
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head // group].T / q.shape[-1] ** 0.5
            heads.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v[:, head // group])
        x = x + linear(attention.o_proj, torch.cat(heads, dim=-1), adapters)
        h = norm(block.post_attention_layernorm, x)
        gate, up = linear(mlp.gate_proj, h, adapters), linear(mlp.up_proj, h, adapters)
        x = x + linear(mlp.down_proj, gate * gate.sigmoid() * up, adapters)
    return norm(model.model.norm, x)


def log_g(g_phi, x):
    """log g_phi( . | x): input embeddings (T, D) -> log-probabilities of the next token (T, V)."""
    logits = llama(g_phi, x, causal=True) @ g_phi.head.T
    return (logits.float() if logits.dtype == torch.bfloat16 else logits).log_softmax(-1)


def eq1_memory(f_theta, context):
    """Eq. 1, 3: m~_i = f_theta(n_1..n_a, m_1..m_i)[-1] (K, D); the official code is not causal."""
    x = torch.cat((f_theta.table[context], f_theta.memory_tokens)).to(f_theta.dtype)
    causal = f_theta.config.attention == "causal"
    return llama(f_theta.llama, x, causal, adapters=True)[-len(f_theta.memory_tokens) :]


def log_g_after_memory(g_phi, bos, memory, text):
    """log g_phi( . | BOS m~_1..m~_K text): (S + 1, V) from m~_K on; BOS as in official code."""
    table = g_phi.model.embed_tokens.weight
    return log_g(g_phi, torch.cat((table[bos], memory, table[text])))[len(memory) :]


def eq2_rc(f_theta, g_phi, n):
    """Eq. 2: -log g_phi(n_l | m~_1..m~_K, n_1..n_{l-1}) of each token of the text (T - 1,)."""
    rows = log_g_after_memory(g_phi, n[:1], eq1_memory(f_theta, n), n[1:])
    return -rows[torch.arange(len(n) - 1), n[1:]]


def eq4_nll(f_theta, g_phi, n, a):
    """Eq. 4: -log g_phi(n_j | m~_1..m~_K, n_{a+1}..n_{j-1}) of each continuation token (S,)."""
    rows = log_g_after_memory(g_phi, n[:1], eq1_memory(f_theta, n[:a]), n[a:])
    return -rows[torch.arange(len(n) - a), n[a:]]


def eq5_ctkd(f_theta, g_phi, n, a):
    """Eq. 5: log( g_phi(n_j | n_1..n_{j-1}) / g_phi(n_j | m~_1..m~_K, n_{a+1}..n_{j-1}) ), summed
    over the vocabulary, weighted by the teacher: a KL (S + 1,); the last is past the text."""
    teacher = log_g(g_phi, g_phi.model.embed_tokens.weight[n])[a - 1 :].detach()
    student = log_g_after_memory(g_phi, n[:1], eq1_memory(f_theta, n[:a]), n[a:])
    return (teacher.exp() * (teacher - student)).sum(-1)


def batch_loss(f_theta, g_phi, texts, splits, objective):
    """ctkd: mean over a text's rows, then over texts; nll, rc: mean over all tokens."""
    rows_of = {"ctkd": eq5_ctkd, "ctkd-window": ours_ctkd_window, "nll": eq4_nll,
               "rc": lambda f_theta, g_phi, n, _: eq2_rc(f_theta, g_phi, n)}[objective]
    rows = [rows_of(f_theta, g_phi, n, a) for n, a in zip(texts, splits)]
    return torch.cat([r.mean()[None] if "ctkd" in objective else r for r in rows]).mean()


def eq6_embedding(memory):
    """Eq. 6: z = 1/K sum_i m~_i; memory (K, D) -> (D,)."""
    return memory.mean(0)


def eq7_correlation(memories):
    """Eq. 7: Cor = 1/N sum_i M~_i M~_i^T; N memories (K, D) -> (K, K)."""
    return sum(memory @ memory.T for memory in memories) / len(memories)


def eq8_info_nce(z, keys, tau):
    """Eq. 8: -log( exp(sim(z_i, z_j) / tau) / sum_k exp(sim(z_i, z_k) / tau) ), keys[i] being z_i's
    positive z_j; mean over the queries z (B, D). keys (M, D): M = B in UCL, 2 B in SCL."""
    cosine = torch.stack([torch.stack([q @ k / q.norm() / k.norm() for k in keys]) for q in z])
    return -(cosine / tau).log_softmax(-1).diagonal().mean()


# Ours, not the paper's


def ours_ctkd_window(f_theta, g_phi, n, a):
    """Eq. 5 for a continuation cut to 40 tokens, without its first 8 rows, or half of them if there
    are fewer than 16."""
    rows = eq5_ctkd(f_theta, g_phi, n[: a + 40], a)
    return rows[min(8, len(rows) // 2) :]


if __name__ == "__main__":  # in float64, so that nothing but the algebra can differ
    from collapse import correlation
    from contrastive import info_nce
    from data.batches import SplitTexts
    from lora import LoraConfig, add_lora, lora_layers
    from model import EncoderConfig, plain_encoder
    from pretrain_ctkd import OBJECTIVES, Config

    encoder, random = plain_encoder("demo", EncoderConfig(), dtype=torch.float64), torch.Generator()
    add_lora(encoder.llama, LoraConfig(), random)
    for layer in lora_layers(encoder.llama).values():  # zero at first, which would hide mistakes
        torch.nn.init.normal_(layer.lora_B, std=0.02, generator=random)
    encoder.add_memory("normal", train_table=True, generator=random)
    encoder.adapters, pair = True, SplitTexts.read("demo", encoder.tokenizer, 2).read_batch(0, 0, 2)
    texts = [torch.from_numpy(ids).long() for ids in pair.texts]
    with torch.no_grad():
        rows = [(name, batch_loss(encoder, encoder.llama, texts, pair.splits, name),
                 OBJECTIVES[name](encoder, pair, Config()))
                for name in ("ctkd", "nll", "rc", "ctkd-window")]
        memories = torch.stack([eq1_memory(encoder, n) for n in texts])
        memory = encoder.memory(torch.cat(texts), [len(n) for n in texts])
    z = torch.stack([eq6_embedding(memory) for memory in memories])
    keys, none_excluded = torch.cat((z.roll(1, 1), z.flip(0))), torch.zeros(2, 4, dtype=torch.bool)
    rows += [("memory", memories, memory), ("z", z, encoder.pool(memory)),
             ("Eq. 7", eq7_correlation(memories), torch.tensor(correlation(memory.numpy())[0] / 2)),
             ("InfoNCE", eq8_info_nce(z, keys, 0.05), info_nce(z, keys, 0.05, none_excluded))]
    print(f"{'first entry':<11}{'paper.py':>15}{'fast path':>16}")
    for name, by_paper, by_fast in rows:
        print(f"{name:<11}{by_paper.flatten()[0]:16.10f}{by_fast.flatten()[0]:16.10f}"
              f"   largest difference {(by_paper - by_fast).abs().max():.1e}")
