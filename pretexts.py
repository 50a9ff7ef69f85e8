"""The pretext tasks that the paper compares with in Table 1, as objectives of pretrain_ctkd.py.

    torchrun pretrain_ctkd.py --preset llm2vec        mntp: LLM2Vec (arXiv 2404.05961)
    torchrun pretrain_ctkd.py --preset llama2vec      ebae-ebar: Llama2Vec (ACL 2024; LLaRA's code)

    mntp       a bidirectional Llama predicts masked tokens, each from the state before it; the
               embedding is the mean of all states
    ebae-ebar  a causal Llama reads a text and, after a prompt, K memory tokens. From their states
               alone the head must predict the words of the text (auto-encoding) or, after a second
               prompt, of what follows it (auto-regression); the mean of the K is the embedding

They see the same texts as ctkd. The head is frozen (LLM2Vec's code trains it but drops it, LLaRA's
keeps it); docs/official.md lists what else differs. Notation as in model.py; a text has T tokens.
"""

import numpy as np
import torch
from torch import Tensor

from data.batches import SplitBatch
from data.tokenizer import Tokenizer
from head import ThroughHead, log_probabilities, nll_loss
from model import Encoder
from runtime.devices import flat_ids, to_device
from runtime.errors import UserError
from runtime.schedule import MASKS, generator
from runtime.settings import flag, require_unset

# ---------------------------------------------------------------------------------------------
# MNTP: masked next-token prediction
# ---------------------------------------------------------------------------------------------


def mask_tokens(
    ids: np.ndarray, first: int, mask: int, vocabulary: int, share: float,
    random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Choose tokens from `first` on, each with probability `share`: masked ids (T,), chosen (T,).

    80 % of the chosen become `mask`, 10 % a random token, 10 % stay as they are (as in BERT).
    """
    chosen, kind = random.random(len(ids)) < share, random.random(len(ids))
    chosen[:first] = False  # BOS has no state before it that could predict it
    read = np.where(chosen & (kind < 0.8), mask, ids)
    other = random.integers(vocabulary, size=len(ids))
    return np.where(chosen & (kind >= 0.9), other, read).astype(ids.dtype), chosen


def mntp(encoder: Encoder, batch: SplitBatch, config) -> Tensor:
    """-log p(token) of the chosen tokens given the masked text; mean over those of all texts."""
    tokenizer, head = encoder.tokenizer, encoder.llama.head
    first, mask = len(tokenizer.bos), mask_id(tokenizer, config.mask_token)

    masked = {  # of the global batch, to count its chosen tokens: place in the run -> ids, chosen
        place: mask_tokens(ids, first, mask, len(head), config.mask_share,
                           generator(config.seed, MASKS, place))
        for place, ids in zip(batch.whole.positions, batch.whole.texts)}
    total = sum(chosen.sum() for _, chosen in masked.values())
    read, chosen = zip(*(masked[place] for place in batch.positions))
    hidden, _ = encoder(flat_ids(read, encoder.device), [len(ids) for ids in read])
    places = to_device(torch.from_numpy(np.flatnonzero(np.concatenate(chosen))), encoder.device)
    targets = flat_ids(batch.texts, encoder.device)[places]
    # the state before a token predicts it, as in the Llama's own training
    return nll_loss(hidden[places - 1], targets, head, config.chunk_rows) / max(1, total)


def mask_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of the token that replaces masked ones; UserError if there is no such token."""
    found = tokenizer.backend.token_to_id(token)
    if found is None or found >= tokenizer.vocab_size:  # a pad token may lie beyond the table
        raise UserError(f"--mask-token {token!r}: no token of {tokenizer.file}; name one that is "
                        f"rare in texts and has an id of its own there")
    return found


# ---------------------------------------------------------------------------------------------
# EBAE and EBAR: embedding-based auto-encoding and auto-regression
# ---------------------------------------------------------------------------------------------

# The prompts of LLaRA's code (FlagEmbedding, research/LLARA).
SUMMARIZE = '"{text}", summarize the above passage within eight words: '
PREDICT = '"{text}", predict the following passage within eight words: '


def bag_of_words(
    states: Tensor, targets: list[np.ndarray], head: Tensor, chunk_rows: int
) -> Tensor:
    """Sum over texts of the mean of -log p(token) over a target's distinct tokens.

    states (N K, D), K per text; p is the softmax over V of each token's largest logit among the K
    states, so that only one of the K states need predict a token.
    """
    k = len(states) // len(targets)
    words = [flat_ids([np.unique(ids)], states.device) for ids in targets]

    def loss(logits: Tensor, rows: slice) -> Tensor:
        log_p = log_probabilities(logits.unflatten(0, (-1, k)).amax(dim=1))
        own = words[rows.start // k :][: len(log_p)]
        return -torch.stack([row[ids].mean() for row, ids in zip(log_p, own)]).sum()

    return ThroughHead.apply(states, head, loss, k * max(1, chunk_rows // k))


def ebae_ebar(encoder: Encoder, batch: SplitBatch, config) -> Tensor:
    """-log p(token) of the text, mean over tokens, plus 1/10 of the mean of the two bags of words.

    Each prompt is read as a sequence of its own: LLaRA's code puts both into one, where neither
    sees the other and both have the same positions, which is equivalent.
    """
    tokenizer, k = encoder.tokenizer, encoder.config.num_memory_tokens
    bos, n = np.array(tokenizer.bos, dtype=np.int32), len(batch.texts)
    texts = [ids[len(bos) :] for ids in batch.contexts]
    frames = [prompt_ids(tokenizer, prompt) for prompt in (SUMMARIZE, PREDICT)]
    read = [np.concatenate((bos, before, ids, after)) for before, after in frames for ids in texts]
    hidden, lengths = encoder(flat_ids(read, encoder.device), [len(ids) for ids in read])
    states, first = hidden.split(lengths), len(bos) + len(frames[0][0])
    memory = torch.cat([h[-k:] for h in states])  # of all texts after SUMMARIZE, then PREDICT
    bags = bag_of_words(memory, texts + batch.continuations, encoder.llama.head, config.chunk_rows)
    predicting = torch.cat([h[first - 1 : first - 1 + len(ids)]  # states before each text token
                            for h, ids in zip(states[:n], texts)])
    nll = nll_loss(predicting, flat_ids(texts, encoder.device), encoder.llama.head,
                   config.chunk_rows)
    tokens = batch.total_tokens - batch.total_targets - len(bos) * batch.total_texts
    return nll / tokens + bags / 10 / (2 * batch.total_texts)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[np.ndarray]:
    """The token ids of a prompt before and after its {text}."""
    return [ids[len(tokenizer.bos) :] for ids in tokenizer.encode(tokenizer.frame(prompt))]


# ---------------------------------------------------------------------------------------------
# What the stage has to know about them
# ---------------------------------------------------------------------------------------------

OBJECTIVES = {"mntp": mntp, "ebae-ebar": ebae_ebar}

SHAPES = {  # how their encoders read texts: fields of EncoderConfig
    "mntp": {"pooling": "mean"},
    # a query predicts what could follow it, a document summarises itself
    "ebae-ebar": {"template": PREDICT, "document_template": SUMMARIZE},
}

PRESETS = {
    # train_configs/mntp/MetaLlama*.json of LLM2Vec's code; its linear decay spans three epochs, but
    # training stops after 1,000 steps, before the rate has fallen far
    "llm2vec": {
        "objective": "mntp", "out": "runs/llm2vec", "memory_tokens": 0,
        "train_embeddings": "memory", "lora_k_proj": True, "batch_size": 32, "steps": 1000,
        "lr": 5e-5, "min_lr": 5e-5, "warmup": 0.0, "weight_decay": 0.0, "clip": 1.0,
    },
    # the paper says only that the texts are the same; rate, batch and rank are those of stage 1
    "llama2vec": {
        "objective": "ebae-ebar", "out": "runs/llama2vec", "attention": "causal",
        "memory_init": "normal", "train_embeddings": "memory", "lora_k_proj": True,
    },
}


def check(config):
    """UserError for settings that an objective of this file does not support."""
    preset, needed = {
        "mntp": ("llm2vec", {"attention": "bidirectional", "memory_tokens": 0,
                             "train_embeddings": "memory"}),
        "ebae-ebar": ("llama2vec", {"attention": "causal"}),
    }.get(config.objective, ("", {}))
    for name, value in needed.items():
        if (found := getattr(config, name)) != value:
            raise UserError(f"{flag(name)} {found}: --objective {config.objective} needs "
                            f"{flag(name)} {value}; --preset {preset} has all that belongs to it")
    if config.objective == "mntp" and not config.mask_share:
        raise UserError("--mask-share 0: no token would be predicted; raise it")
    if config.objective != "mntp" and not config.resume:
        require_unset("--objective mntp", config, "mask_token", "mask_share")
    if not config.memory_tokens and config.objective != "mntp":
        raise UserError(f"--memory-tokens 0: must be at least 1 for --objective "
                        f"{config.objective}")
