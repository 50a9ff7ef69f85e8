"""The Llama family from scratch, and the text encoder built on it (LLM2Comp, arXiv 2511.17129).

Notation: N texts, T tokens of all texts packed in one row, K memory tokens, D hidden size, H query
          heads, G key-value heads, V vocabulary size.

A batch is one packed row of T tokens and the list of its N lengths, with no padding and no mask
tensor (but see runtime/cpu.py): attention and positions use the lengths, all else works token by
token. The same frozen weights serve as language model g_phi (`causal=True, adapters=False`) and as
encoder f_theta (`causal=False, adapters=True`), by arguments of the forward call.
"""

from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data.batches import token_batches
from data.tokenizer import Tokenizer, Tokens, check_texts, choose_template
from lora import LoraConfig, LoraLinear, load_adapter, merge_lora, save_adapter
from runtime import cpu, cuda, encoders, formats
from runtime.devices import at_least_fp32, flat_ids, pack, to_device
from runtime.files import write_folder


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
    model_type: str = "llama"  # one of BASES
    qkv_bias: bool = False  # of q_proj, k_proj and v_proj, as in Qwen2
    qk_norm: bool = False  # an RMSNorm for the queries and one for the keys, as in Qwen3
    sliding_window: int | None = None  # longest sequence supported, as in Mistral 0.1
    has_head: bool = True  # False if saved as a LlamaModel


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
        return self.weight * cpu.normalise(x, self.eps)


def inverse_frequencies(rope: dict, head_dim: int) -> Tensor:
    """Radians per position of each of the head_dim / 2 pairs, fp32 (Su et al. 2021).

    `llama3`, as in Llama 3.1, divides slow pairs (few turns within the original context) by
    `factor`, keeps fast ones, and blends in between.
    """
    inv_freq = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if rope["rope_type"] == "linear":
        return inv_freq / rope["factor"]
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * inv_freq / (2 * torch.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * inv_freq + (1 - keep) * inv_freq / rope["factor"]
    return inv_freq


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of pairs (i, i + head_dim / 2); x (T, heads, head_dim)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Pass(NamedTuple):
    """What the blocks share in one forward pass."""

    lengths: list[int]  # of the sequences in the packed row
    causal: bool  # the mask: causal (g_phi) or bidirectional (f_theta, by default)
    adapters: bool  # whether the LoRA adapters take part
    dropout: float  # of the attention weights
    cos: Tensor  # (T, 1, head_dim), for `rotate`
    sin: Tensor  # negative in the first half


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool, dropout=0.0):
    """Softmax attention within each sequence of a packed row, `causal` or bidirectional.

    q (T, H, head_dim), k and v (T, G, head_dim) -> (T, H, head_dim). Adjacent sequences of equal
    length share a call; bf16 on the CPU, and 16 bits on CUDA, have faster equivalents.
    """
    if cpu.is_cpu_bf16(q):
        return cpu.attend(q, k, v, lengths, causal, dropout)
    if cuda.takes_any_lengths(q):  # one call of FlashAttention for all of them
        return cuda.attend(q, k, v, lengths, causal, dropout)
    if k.shape[1] != q.shape[1]:  # grouped queries: not every kernel repeats the heads itself
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    outputs, groups = [], [list(same) for _, same in groupby(lengths)]
    sizes = [sum(group) for group in groups]  # tokens in each run of equal lengths
    for group, *part in zip(groups, q.split(sizes), k.split(sizes), v.split(sizes)):
        batch = [t.unflatten(0, (len(group), -1)).transpose(1, 2) for t in part]
        out = F.scaled_dot_product_attention(*batch, dropout_p=dropout, is_causal=causal)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def last_of_each(x: Tensor, lengths: list[int], last: list[int] | None) -> Tensor:
    """The final last[i] rows of each sequence i of a packed row x (T, D), zero-padded by
    cpu.pad_rows; all rows if `last` is None."""
    if last is None:
        return x
    sizes = [size for length, n in zip(lengths, last) for size in (length - n, n)]
    return cpu.pad_rows(torch.cat(x.split(sizes)[1::2]))


class Attention(nn.Module):
    """Self-attention with rotary positions and grouped queries."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = LoraLinear(c.hidden_size, c.num_attention_heads * c.head_dim, c.qkv_bias)
        self.k_proj = LoraLinear(c.hidden_size, c.num_key_value_heads * c.head_dim, c.qkv_bias)
        self.v_proj = LoraLinear(c.hidden_size, c.num_key_value_heads * c.head_dim, c.qkv_bias)
        self.o_proj = LoraLinear(c.num_attention_heads * c.head_dim, c.hidden_size)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, p: Pass, last: list[int] | None) -> Tensor:
        """x (T, D) -> (T, D), or only the `last` rows of each sequence."""
        projections = (self.q_proj, self.k_proj, self.v_proj)  # -> (T, H or G, head_dim)
        q, k, v = (proj(x, p.adapters).unflatten(-1, (-1, self.head_dim)) for proj in projections)
        q, k = rotate(self.q_norm(q), p.cos, p.sin), rotate(self.k_norm(k), p.cos, p.sin)
        out = attend(q, k, v, p.lengths, p.causal, p.dropout).flatten(1)
        return self.o_proj(last_of_each(out, p.lengths, last), p.adapters)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = LoraLinear(c.hidden_size, c.intermediate_size)
        self.up_proj = LoraLinear(c.hidden_size, c.intermediate_size)
        self.down_proj = LoraLinear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor, adapters: bool) -> Tensor:
        gate, up = self.gate_proj(x, adapters), self.up_proj(x, adapters)
        return self.down_proj(cpu.swiglu(gate, up), adapters)


class Block(nn.Module):
    """One layer: attention, then MLP, each after a norm and added to the residual stream."""

    attention = Attention  # another base may replace this, see docs/extending.md

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = self.attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, p: Pass, last: list[int] | None = None) -> Tensor:
        """x (T, D) -> (T, D), or only the `last` rows of each sequence."""
        attended = self.self_attn(self.input_layernorm(x), p, last)
        x = last_of_each(x, p.lengths, last) + attended
        return x + self.mlp(self.post_attention_layernorm(x), p.adapters)


class Llama(nn.Module):
    """A Llama over packed rows: input embeddings in, hidden states out."""

    block = Block

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # recompute activations in backward instead of keeping them
        blocks = (self.block(config) for _ in range(config.num_hidden_layers))
        # nn.Embedding(V, D) would initialise the table; on `meta` that imports sympy: a second
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding.from_pretrained(table, freeze=False),
            "layers": nn.ModuleList(blocks),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if config.has_head and not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The language-model head (V, D); the table if the two are tied or there is no head."""
        return getattr(self, "lm_head", self.model.embed_tokens).weight

    def embed(self, ids: Tensor) -> Tensor:
        """ids (T,) -> rows of g_phi's own table (T, D)."""
        return self.model.embed_tokens(ids)

    def forward(
        self, x: Tensor, lengths: list[int], causal: bool, adapters=False, dropout=0.0,
        last: list[int] | None = None,
    ) -> Tensor:
        """x (T, D) input embeddings -> (T, D) hidden states after the final RMSNorm.

        `lengths` sum to T, and positions restart at 0 in each sequence; `dropout` applies to the
        attention weights, in training mode only. With `last`, only the final last[i] states of each
        sequence i are returned, and only they are computed after the last attention.
        """
        rows = sum(last or lengths)
        x, lengths, last = cpu.pad_pass(x, lengths, last)  # bf16 on the CPU is slow on new shapes
        cos, sin = self.rotary_table(lengths, x)
        p = Pass(lengths, causal, adapters, dropout if self.training else 0.0, cos, sin)
        for block in self.model.layers:
            # up to the last attention, the other tokens are needed as keys and values
            of_each = last if block is self.model.layers[-1] else None
            if self.recompute:
                x = checkpoint(block, x, p, of_each, use_reentrant=False)
            else:
                x = block(x, p, of_each)
        return self.model.norm(x)[:rows]  # without what cpu.pad_pass added

    def rotary_table(self, lengths: list[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (T, 1, head_dim), computed in fp32 and cast to the activations' dtype."""
        positions = to_device(torch.cat([torch.arange(n) for n in lengths]), like.device)
        speeds = inverse_frequencies(self.config.rope, self.config.head_dim)
        angles = torch.outer(positions, to_device(speeds, like.device))
        cos, sin = angles.cos(), angles.sin()
        tables = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return tuple(t.unsqueeze(1).to(like.dtype) for t in tables)  # the same for all heads


# model_type in config.json -> network; these differ only in optional parts, see LlamaConfig
BASES: dict[str, type[Llama]] = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), Llama)


# ---------------------------------------------------------------------------------------------
# The encoder f_theta
# ---------------------------------------------------------------------------------------------


def weighted_mean(h: Tensor) -> Tensor:
    """The mean of h (n, D) with weight i for token i (SGPT, arXiv 2202.08904)."""
    w = torch.arange(1, len(h) + 1, device=h.device).to(h.dtype)
    return w @ h / w.sum()


# Poolings other than `memory`: states (n, D) of a text's tokens, BOS included -> its embedding.
POOLINGS = {
    "last": lambda h: h[-1],
    "mean": lambda h: h.mean(dim=0),
    "weighted-mean": weighted_mean,
    "echo": lambda h: h.mean(dim=0),  # h begins at the last {text} of the template (2402.15449)
}


@dataclass(frozen=True)
class EncoderConfig:
    """How texts become embeddings; stored with the encoder, so that no flag contradicts training.

    template: what the tokenizer reads. If it has `{instruction}`, the encoder was trained with
    instructions, and a text without one is read bare. document_template: the same for documents in
    retrieval and reranking; if empty, they are read like texts without an instruction.
    """

    num_memory_tokens: int = 8
    pooling: str = "memory"  # Eq. 6, or one of POOLINGS
    attention: str = "bidirectional"  # or causal
    max_tokens: int = 512  # of a text in its template, BOS included; memory tokens are extra
    template: str = "{text}"
    document_template: str = ""
    kept_tokens: tuple = ()  # memory tokens averaged into the embedding; empty: all (collapse.py)
    bos: int = -1  # id of the token before each text; -1: the base's own
    special_tokens: str = "literal"  # </s> in a text is plain text; or parsed, as in transformers

    def __post_init__(self):
        encoders.check_encoder_config(self, ("memory", *POOLINGS))


PLAIN = EncoderConfig(num_memory_tokens=0, pooling="mean", attention="causal")
MEMORY_INITS = ("mean", "normal", "rows")  # see Encoder.add_memory


class Encoder(nn.Module):
    """f_theta: a Llama with adapters, its own embedding table, K memory tokens, and a pooling.

    Without adapters and memory tokens: the plain Llama under one of the classic poolings.
    """

    def __init__(self, llama: Llama, tokenizer: Tokenizer, config: EncoderConfig):
        super().__init__()
        self.llama, self.tokenizer, self.config = llama, tokenizer, config
        self.table = llama.model.embed_tokens.weight  # (V, D), g_phi's own until trained
        self.memory_tokens = nn.Parameter(self.table.new_zeros(0, self.table.shape[1]))
        self.adapters, self.lora_config = False, LoraConfig()  # whether the adapters take part
        self.base: dict = {}  # the Llama's identity: name, revision, sha256 and its parts
        self.sha256 = ""  # of what was trained: adapters, memory tokens, table
        self.stored_adapters: list[list] = []  # stage, r, alpha, targets of each
        self.history: list[dict] = []  # the stages that made the adapters, oldest first
        self.cut = 0  # texts that `batches` and `encode` have cut so far

    dtype = property(lambda self: self.llama.head.dtype)  # of activations; trained weights are fp32
    device = property(lambda self: self.llama.head.device)

    def forward(self, ids: Tensor, lengths: list[int], dropout=0.0,
                last: list[int] | None = None) -> tuple[Tensor, list[int]]:
        """Eq. 1 and 3: f_theta reads n_1..n_a m_1..m_K.

        ids (T,) of N texts with BOS -> hidden states of texts and memory tokens (T + N K, D) and
        their N lengths, or only the `last` states of each text.
        """
        n, k = len(lengths), len(self.memory_tokens)
        tokens = F.embedding(ids, self.table).to(self.dtype)  # trained in fp32, read in bf16
        memory = self.memory_tokens.to(self.dtype).repeat(n, 1)
        x, lengths = pack((tokens, lengths), (memory, [k] * n))
        causal = self.config.attention == "causal"
        hidden = self.llama(x, lengths, causal, self.adapters, dropout, last)
        return hidden, last or lengths

    def memory(self, ids: Tensor, lengths: list[int], dropout: float = 0.0) -> Tensor:
        """ids (T,) of N texts -> memory (N, K, D): the last K hidden states of each (Eq. 1, 3)."""
        n, k = len(lengths), self.config.num_memory_tokens
        return self(ids, lengths, dropout, last=[k] * n)[0].unflatten(0, (n, k))

    def pool(self, memory: Tensor) -> Tensor:
        """Eq. 6: memory (N, K, D) -> z (N, D) in at least fp32, the mean over all or kept K."""
        kept = list(self.config.kept_tokens)
        return at_least_fp32(memory[:, kept] if kept else memory).mean(dim=1)

    def embed(self, ids: Tensor, lengths: list[int], dropout=0.0,
              tails: list[int] | None = None) -> Tensor:
        """ids (T,) of N texts -> embeddings z (N, D) in at least fp32.

        `tails`: how many final tokens of each text `echo` averages.
        """
        pooling, last = self.config.pooling, None
        if pooling == "memory":
            return self.pool(self.memory(ids, lengths, dropout))
        if pooling in ("last", "echo"):
            last = [1] * len(lengths) if pooling == "last" else [max(1, n) for n in tails]
        hidden, sizes = self(ids, lengths, dropout, last)
        return torch.stack([POOLINGS[pooling](h) for h in at_least_fp32(hidden).split(sizes)])

    def add_memory(self, init: str, train_table: bool, generator: torch.Generator | None = None):
        """Draw the K memory rows; with `train_table`, also copy the table to train it in fp32.

        init `mean`: from N(mean, 1e-9 covariance) of the table's rows, so nearly equal, like
        transformers' resize in the official code (docs/official.md); `normal`: with the rows' mean
        and deviation per dimension; `rows`: K rows of the table, drawn at random (one of the
        initialisations of a soft prompt in arXiv 2104.08691).
        """
        table = at_least_fp32(self.table.detach()).cpu()  # drawn on the CPU: equal on all devices
        (v, d), k, mean = table.shape, self.config.num_memory_tokens, table.mean(dim=0)
        noise = torch.randn(k, v if init == "mean" else d, generator=generator).to(table)
        if init == "mean":  # noise times the centred table has V times its covariance
            rows = mean + (1e-9 / v) ** 0.5 * noise @ (table - mean)
        elif init == "normal":
            rows = mean + table.std(dim=0) * noise
        else:
            rows = table[torch.randperm(v, generator=generator)[:k]]
        rows = rows.bfloat16()  # as in the official code: drawn in bf16, trained in fp32
        self.memory_tokens = nn.Parameter(rows.to(self.device, table.dtype))
        if train_table:
            self.table = nn.Parameter(table.to(self.device, copy=True))

    def tokenize(
        self, texts: list[str], instruction="", document=False, max_tokens: int | None = None
    ) -> Tokens:
        """Each text in its template, cut to max_tokens (default: the encoder's)."""
        c, limit = self.config, max_tokens or self.config.max_tokens
        window = self.tokenizer.file.parent, self.llama.config.sliding_window
        formats.check_window(*window, limit, c.num_memory_tokens)
        template = choose_template(c.template, c.document_template, instruction, document)
        return self.tokenizer.read(texts, template, limit, instruction)

    def batches(self, texts: list[str], instruction="", document=False, batch_tokens=4096,
                progress: bool | str = False):
        """Yield (indices into the texts, ids (T,), lengths, tails) of `encode`'s batches."""
        ids, tails, cut = self.tokenize(texts, instruction, document)
        self.cut += sum(cut)
        sizes = [len(i) + self.config.num_memory_tokens for i in ids]
        label = progress if isinstance(progress, str) else None
        with tqdm(total=len(texts), desc=label, leave=False, disable=not progress) as bar:
            for batch in token_batches(sizes, batch_tokens):
                row = flat_ids([ids[i] for i in batch], self.device)
                yield batch, row, [len(ids[i]) for i in batch], [tails[i] for i in batch]
                bar.update(len(batch))

    @torch.no_grad()
    def encode(self, texts: list[str], instruction="", document=False, batch_tokens=4096,
               progress: bool | str = False) -> np.ndarray:
        """Texts -> (n, D) float32, in the same order; long texts are cut, memory tokens never.

        `encode(["what is an owl"], instruction="Find it")`: one instruction, put before each text;
        `document`: the texts are documents to be found. Texts of similar length share a pass of up
        to `batch_tokens` tokens. `progress`: show a bar. TextError unless given a list of texts.
        """
        texts, was_training = check_texts(texts), self.training
        out = np.empty((len(texts), self.table.shape[1]), np.float32)
        self.eval()
        try:
            for batch, row, lengths, tails in self.batches(texts, instruction, document,
                                                           batch_tokens, progress):
                out[batch] = self.embed(row, lengths, tails=tails).float().cpu().numpy()
        finally:
            self.train(was_training)
        return out


# ---------------------------------------------------------------------------------------------
# Loading and saving: runtime/formats.py and encoders.py read and check, this builds the modules
# ---------------------------------------------------------------------------------------------


def load_llama(name: str | Path, revision=None, dtype=torch.float32, device="cpu") -> Llama:
    """A frozen Llama from `demo`, a folder in Hugging Face's layout, or a hub repository."""
    return build_llama(formats.ModelFolder(name, revision, BASES), dtype, device)


def build_llama(files: formats.ModelFolder, dtype: torch.dtype, device) -> Llama:
    """The frozen network that a model's files describe."""
    config = LlamaConfig(**files.config)
    with torch.device("meta"):  # shapes only: the tensors come from the files
        llama = BASES[config.model_type](config)
    shapes = {key: tuple(p.shape) for key, p in llama.named_parameters()}
    llama.load_state_dict(files.weights(shapes, dtype, device), strict=True, assign=True)
    return llama.requires_grad_(False).eval()


def plain_encoder(name: str | Path, config=PLAIN, revision=None, dtype=torch.float32, device="cpu",
                  base_of=None) -> Encoder:
    """A frozen Llama without adapters or memory rows, as in training-free methods (PLAIN: mean)."""
    files = formats.ModelFolder(name, revision, BASES, base_of)
    llama = build_llama(files, dtype, device)
    sizes, reading = (llama.config.vocab_size, llama.config.bos_token_id), config.special_tokens
    encoder = Encoder(llama, Tokenizer(files.folder, *sizes, config.bos, reading), config)
    encoder.base = files.record(encoder.tokenizer.bos)
    return encoder.eval()


def load_encoder(name: str | Path, base: str | None = None, dtype=torch.float32, device="cpu",
                 revision=None, other_base=False) -> Encoder:
    """An encoder from its folder (local or on the hub), with all adapters but the last merged.

    `base` overrides the recorded location of the base model, which must be the same model unless
    `other_base`. Raises UserError for anything missing, damaged or mismatched.
    """
    folder, config, recorded, history = encoders.read_encoder(name, revision, EncoderConfig)
    place = (base, None, None) if base else (recorded["name"], recorded["revision"], folder)
    with encoders.loading_base(folder):
        encoder = plain_encoder(place[0], config, place[1], dtype, device, base_of=place[2])
    encoders.check_base(encoder, folder, recorded, other_base)
    for entry in history:
        merge_lora(encoder.llama)  # the adapter before: only the last one stays separate
        encoder.lora_config = c = load_adapter(encoder.llama, folder / entry["stage"])
        encoder.stored_adapters.append([entry["stage"], c.r, c.alpha, *c.targets])
    (v, d), k = encoder.table.shape, config.num_memory_tokens
    rows = encoders.read_embeddings(folder, {"memory_tokens": (k, d), "embed_tokens": (v, d)})
    for key, tensor in rows.items():
        setattr(encoder, "table" if key == "embed_tokens" else key, nn.Parameter(tensor.to(device)))
    encoder.adapters, encoder.history = True, history
    encoder.sha256 = encoders.encoder_hash(folder, [entry["stage"] for entry in history])
    return encoder.requires_grad_(False).eval()


def save_encoder(encoder: Encoder, folder: str | Path, earlier: Path | None = None):
    """Write an encoder folder; the adapter on the Llama belongs to the last stage of the history.

    `earlier` is the encoder folder that the stage started from; its adapters are copied.
    """
    stages = [entry["stage"] for entry in encoder.history]
    tensors = {"memory_tokens": encoder.memory_tokens}
    if encoder.table is not encoder.llama.model.embed_tokens.weight:
        tensors["embed_tokens"] = encoder.table
    with write_folder(Path(folder)) as aside:
        encoders.copy_adapters(earlier, stages[:-1], aside)
        save_adapter(encoder.llama, encoder.lora_config, aside / stages[-1],
                     encoder.base["name"])
        formats.write_tensors(aside / "embeddings.safetensors", tensors)
        encoders.write_encoder_json(aside, {"base": encoder.base, **asdict(encoder.config),
                                           "history": encoder.history})

