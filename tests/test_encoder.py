"""The encoder f_theta, its tokenizer, its poolings and its folders."""

import hashlib
import json
import random
import shutil

import numpy as np
import pytest
import tokenizers
import torch
from conftest import TEXT, edit_json, write_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

import lora
from data import UserError
from data.tokenizer import Tokenizer
from lora import LoraConfig
from model import (
    INSTRUCTED,
    EncoderConfig,
    find_model,
    load_encoder,
    load_llama,
    main,
    merge,
    pack,
    plain_encoder,
    save_encoder,
    token_batches,
    write_folder,
)

K = 4
MEMORY = EncoderConfig(num_memory_tokens=K, max_tokens=64)
TEXTS = [
    "A model reads a text.", "", "The quick brown fox jumps over the lazy dog", "x", " ",
    "ümläut 漢字", "the embedding of the text", "the embedding of the text",
    "A model reads a text.\n", TEXT,
]


ECHO = "Rewrite the sentence: {text}, rewritten sentence: {text}"
EOL = 'This sentence : "{text}" means in one word:"'


def randomize(llama, seed):
    """Trained-looking adapters: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora.lora_layers(llama).values():
        noise = 0.1 * torch.randn(layer.lora_B.shape, generator=generator)
        layer.lora_B.data = noise.to(layer.lora_B)


def build(folder, config=MEMORY, train_table=True, dtype=torch.float32):
    """An encoder as it is after a first stage: random adapters, memory rows and table."""
    encoder = plain_encoder(folder, config, dtype=dtype)
    generator = torch.Generator().manual_seed(11)
    encoder.add_memory("normal", train_table, generator)
    if train_table:
        encoder.table.data += 0.1 * torch.randn(encoder.table.shape, generator=generator)
    lora.add_lora(encoder.llama, encoder.lora_config, generator)
    randomize(encoder.llama, 12)
    encoder.adapters, encoder.history = True, [{"stage": "ctkd"}]
    return encoder.eval()


@pytest.fixture(scope="module")
def encoder(tiny):
    return build(tiny)


def packed(encoder, texts):
    arrays = encoder.tokenizer.encode(texts, encoder.config.max_tokens - len(encoder.memory_tokens))
    return torch.from_numpy(np.concatenate(arrays)), [len(a) for a in arrays]


@torch.no_grad()
def their_hidden(reference, rows, causal):
    """Last hidden states of transformers for one sequence of input embeddings, under a 4-D mask."""
    n = len(rows)
    mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1) * causal
    return reference(inputs_embeds=rows[None], attention_mask=mask[None, None]).last_hidden_state[0]


# ---------------------------------------------------------------------------------------------
# Embeddings
# ---------------------------------------------------------------------------------------------


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
def test_an_embedding_does_not_depend_on_its_batch_or_place(config, batch_tokens, tiny):
    encoder = build(tiny, config)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    order = random.Random(batch_tokens).sample(range(len(TEXTS)), len(TEXTS))
    together = encoder.encode([TEXTS[i] for i in order], batch_tokens=batch_tokens)
    assert np.abs(together - alone[order]).max() <= 1e-5
    distances = np.abs(alone[:, None] - alone[None]).max(-1)
    np.fill_diagonal(distances, 1.0)
    assert distances[6, 7] == 0 and (distances > 1e-3).sum() == len(TEXTS) ** 2 - 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_encode_returns_one_float32_row_a_text_and_an_empty_table_for_none(dtype, tiny):
    encoder = build(tiny, dtype=dtype)
    for texts in ([], [""], TEXTS):
        rows = encoder.encode(texts)
        assert rows.shape == (len(texts), 32) and rows.dtype == np.float32
        assert np.isfinite(rows).all()


def test_a_bf16_encoder_is_near_the_fp32_one(tiny):
    wide, narrow = (build(tiny, dtype=t).encode(TEXTS) for t in (torch.float32, torch.bfloat16))
    cosines = (wide * narrow).sum(1) / np.linalg.norm(wide, axis=1) / np.linalg.norm(narrow, axis=1)
    assert cosines.min() > 0.999


@pytest.mark.parametrize("max_tokens", [K + 2, K + 5, 20])
def test_a_long_text_is_cut_to_max_tokens_with_bos_and_every_memory_token(max_tokens, tiny):
    config = EncoderConfig(K, max_tokens=max_tokens)
    encoder, whole = build(tiny, config), build(tiny, EncoderConfig(K, max_tokens=512))
    ids = encoder.tokenizer.encode([TEXT])[0]
    assert len(ids) > 50 and ids[0] == 1
    kept = torch.from_numpy(ids[: max_tokens - K])
    with torch.no_grad():
        hidden, lengths = encoder(kept, [len(kept)])
        expected = whole.embed(kept, [len(kept)]).numpy()
    assert lengths == [max_tokens] and len(hidden) == max_tokens
    assert np.abs(encoder.encode([TEXT]) - expected).max() <= 1e-6
    assert np.abs(whole.encode([TEXT]) - expected).max() > 1e-3


def test_the_template_is_filled_with_the_text_and_nothing_else(tiny):
    texts = ["a {text} b", "{0} {x}", "%s"]
    templated = build(tiny, EncoderConfig(K, template="query: {text}\n", max_tokens=64))
    plain = build(tiny).encode([f"query: {text}\n" for text in texts])
    assert np.abs(templated.encode(texts) - plain).max() <= 1e-6


@pytest.mark.parametrize("template", ["{text}", INSTRUCTED])
def test_an_instruction_stands_before_its_text_and_a_text_without_one_stands_alone(template, tiny):
    texts = ["A text.", "", "{instruction}", "two\nlines"]
    encoder, plain = build(tiny, EncoderConfig(K, template=template, max_tokens=64)), build(tiny)
    told = plain.encode([f"Find it:{text}\n" for text in texts])
    assert np.abs(encoder.encode(texts, "Find it") - told).max() <= 1e-6
    assert np.abs(encoder.encode(texts, instruction="Find it") - told).max() <= 1e-6
    assert np.abs(encoder.encode(texts) - plain.encode(texts)).max() <= 1e-6
    assert np.abs(told - plain.encode(texts)).max() > 1e-2


@pytest.mark.parametrize("template", ["query: {text}", ECHO, EOL])
def test_a_template_without_a_place_for_an_instruction_refuses_one(template, tiny):
    encoder = plain_encoder(tiny, EncoderConfig(0, "last", "causal", template=template))
    assert encoder.encode(["x"]).shape == (1, 32)
    with pytest.raises(UserError, match="instruction 'Find it'.*no place for one"):
        encoder.encode(["x"], "Find it")


def test_a_long_text_leaves_instruction_and_newline_whole(tiny):
    config = EncoderConfig(K, template=INSTRUCTED, max_tokens=40)
    encoder = build(tiny, config)
    ids, _ = encoder.tokenize([TEXT, "short"], "Find it")
    assert len(ids[0]) == 40 - K and encoder.tokenizer.decode(ids[1]) == "Find it:short\n"
    said = encoder.tokenizer.decode(ids[0])
    assert said.startswith("Find it:The quick") and said.endswith("\n")
    kept = said.removeprefix("Find it:").removesuffix("\n")
    assert TEXT.startswith(kept) and len(kept) > 10
    assert np.abs(encoder.encode([TEXT], "Find it") - encoder.encode([kept], "Find it")).max() == 0


def test_encode_restores_the_mode_and_uses_no_dropout(tiny):
    encoder = build(tiny)
    expected = encoder.encode(TEXTS)
    encoder.train()
    assert np.array_equal(encoder.encode(TEXTS), expected)
    assert encoder.training and encoder.llama.training


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_at_batch_size_one_each_memory_row_sees_each_context_row_and_back(attention, tiny):
    """`mask swap` is real: no library default turns the one into the other at batch size one."""
    encoder = build(tiny, EncoderConfig(K, attention=attention), dtype=torch.float64)
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
def test_a_changed_last_token_reaches_the_first_row_only_bidirectionally(attention, tiny):
    encoder = build(tiny, EncoderConfig(K, attention=attention))
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
def test_each_pooling_equals_its_formula_on_the_hidden_states_of_transformers(
    pooling, attention, tiny, reference
):
    k = K if pooling == "memory" else 0
    encoder = plain_encoder(tiny, EncoderConfig(k, pooling, attention, max_tokens=128))
    encoder.add_memory("normal", False, torch.Generator().manual_seed(0))
    theirs, result = reference(tiny).model, encoder.encode(TEXTS)
    for text, embedding in zip(TEXTS, result):
        ids = torch.from_numpy(encoder.tokenizer.encode([text], 128 - k)[0]).long()
        rows = torch.cat((theirs.embed_tokens(ids), encoder.memory_tokens.data))
        hidden = their_hidden(theirs, rows.detach(), attention == "causal")
        assert np.abs(embedding - POOLINGS[pooling](list(hidden)).numpy()).max() <= 1e-5


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_echo_is_the_mean_over_the_tokens_of_the_second_occurrence(attention, tiny, reference):
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


def test_the_memory_is_the_last_k_hidden_rows_of_each_text(encoder):
    ids, lengths = packed(encoder, TEXTS)
    with torch.no_grad():
        memory, (hidden, longer) = encoder.memory(ids, lengths), encoder(ids, lengths)
    assert longer == [n + K for n in lengths]
    assert memory.shape == (len(TEXTS), K, 32)
    for ours, rows in zip(memory, hidden.split(longer)):
        assert torch.equal(ours, rows[-K:])


@pytest.mark.parametrize("train_table", [True, False], ids=["table", "memory rows only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_rows_and_own_table_are_fp32_and_the_model_keeps_its_own(dtype, train_table, tiny):
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


def test_without_adapters_an_encoder_is_the_plain_llama_under_its_pooling(tiny):
    config = EncoderConfig(0, "mean", max_tokens=64)
    plain, adapted = plain_encoder(tiny, config), build(tiny, config, train_table=False)
    expected = plain.encode(TEXTS)
    assert np.abs(adapted.encode(TEXTS) - expected).max() > 1e-2
    adapted.adapters = False
    assert np.array_equal(adapted.encode(TEXTS), expected)


def test_the_mean_init_makes_nearly_equal_rows(tiny):
    encoder = plain_encoder(tiny, MEMORY)
    encoder.add_memory("mean", False, torch.Generator().manual_seed(0))
    rows, table = encoder.memory_tokens.data, encoder.table
    distance = (rows - table.mean(0)).abs() / table.std(0)
    assert distance.max() < 5e-3 and not torch.equal(rows[0], rows[1])


def test_gradients_reach_memory_rows_table_and_adapters_and_nothing_else(tiny):
    encoder = build(tiny).train()
    encoder.embed(*packed(encoder, TEXTS)).square().sum().backward()
    reached = {name for name, p in encoder.named_parameters() if p.grad is not None}
    adapters = {n for n, _ in encoder.named_parameters() if "lora_" in n}
    assert len(adapters) == 24 and reached == adapters | {"table", "memory_tokens"}


@pytest.mark.parametrize("settings, fragment", [
    ({"pooling": "max"}, "'max'"), ({"attention": "both"}, "'both'"),
    ({"num_memory_tokens": 0}, "num_memory_tokens=0"),
    ({"num_memory_tokens": 8, "pooling": "mean"}, "num_memory_tokens=8"),
    ({"num_memory_tokens": -1, "pooling": "mean"}, "num_memory_tokens=-1"),
    ({"max_tokens": 9}, "max_tokens=9"), ({"template": "query: "}, "must contain {text}"),
    ({"template": "{instruction}:"}, "must contain {text}"),
    ({"num_memory_tokens": 8, "pooling": "echo"}, "num_memory_tokens=8"),
])
def test_a_contradictory_encoder_config_is_refused(settings, fragment):
    with pytest.raises(UserError) as info:
        EncoderConfig(**settings)
    assert fragment in str(info.value)


@pytest.mark.parametrize("budget", [1, 7, 10, 10**6])
@pytest.mark.parametrize("lengths", [[], [5], [3, 9, 3, 1, 9, 2, 2], [12, 1, 1, 1]], ids=str)
def test_token_batches_hold_each_text_once_within_the_budget_or_alone(lengths, budget):
    batches = token_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or sum(lengths[i] for i in b) <= budget for b in batches)
    order = [lengths[i] for batch in batches for i in batch]
    assert order == sorted(lengths, reverse=True)
    assert budget < 10**6 or len(batches) <= 1


def test_pack_lays_the_parts_of_each_sequence_side_by_side():
    a, b = torch.arange(5.0)[:, None], torch.arange(10.0, 14.0)[:, None]
    row, lengths = pack((a, [2, 0, 3]), (b, [1, 2, 1]))
    assert row[:, 0].tolist() == [0, 1, 10, 11, 12, 2, 3, 4, 13]
    assert lengths == [3, 2, 4]


# ---------------------------------------------------------------------------------------------
# The tokenizer
# ---------------------------------------------------------------------------------------------


def save(tokenizer, folder):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def like_llama_2(folder, template="<s> $A"):
    """SentencePiece in spirit: a metaspace before the text, byte fallback, `<s>` first."""
    special, fallback = ["<unk>", "<s>", "</s>"], [f"<0x{i:02X}>" for i in range(256)]
    vocab = [*special, *fallback, "▁", "a", "b", "▁a", "ab"]
    tokenizer = tokenizers.Tokenizer(models.BPE(
        {token: i for i, token in enumerate(vocab)}, [("▁", "a"), ("a", "b")],
        unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    save(tokenizer, folder)
    return len(vocab)


def like_llama_3(folder):
    """Byte level, `<|begin_of_text|>` at the end of the vocabulary, two post-processors."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "ab"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b")], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    bos = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 257)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    save(tokenizer, folder)
    return 259, vocab


def test_ids_of_a_llama_2_tokenizer_are_the_golden_ones(tmp_path):
    size = like_llama_2(tmp_path)
    tokenizer = Tokenizer(tmp_path, size)
    assert tokenizer.bos == [1]
    texts = ["a", "ab", "b", " a", "a!", ""]
    golden = [[1, 262], [1, 262, 261], [1, 259, 261], [1, 259, 262], [1, 262, 3 + 0x21], [1]]
    arrays = tokenizer.encode(texts)
    assert [array.tolist() for array in arrays] == golden
    assert all(array.dtype == np.int32 for array in arrays)
    assert tokenizer.decode(golden[1]) == "ab"


def test_ids_of_a_llama_3_tokenizer_are_the_golden_ones(tmp_path):
    size, vocab = like_llama_3(tmp_path)
    tokenizer = Tokenizer(tmp_path, size)
    assert tokenizer.bos == [257]
    golden = [[257, 256], [257, vocab["b"], vocab["a"]], [257, vocab["Ġ"], 256], [257]]
    assert [a.tolist() for a in tokenizer.encode(["ab", "ba", " ab", ""])] == golden


def test_an_end_token_of_the_post_processor_is_left_out(tmp_path):
    tokenizer = Tokenizer(tmp_path, like_llama_2(tmp_path, "<s> $A </s>"))
    assert tokenizer.bos == [1]
    assert tokenizer.encode(["ab"])[0].tolist() == [1, 262, 261]


@pytest.mark.parametrize("template", [None, "$A </s>"], ids=["none", "end token only"])
def test_without_a_bos_in_the_post_processor_the_config_names_it(template, tmp_path):
    write_tokenizer(tmp_path, template=template)
    tokenizer = Tokenizer(tmp_path, 320, bos_token_id=2)
    assert tokenizer.bos == [2] and tokenizer.encode([""])[0].tolist() == [2]
    with pytest.raises(UserError, match="bos_token_id") as info:
        Tokenizer(tmp_path, 320)
    assert str(tmp_path / "tokenizer.json") in str(info.value)


def test_the_post_processor_goes_before_the_config(tmp_path):
    write_tokenizer(tmp_path)
    assert Tokenizer(tmp_path, 320, bos_token_id=2).bos == [1]


def test_ids_equal_those_of_transformers_and_a_cut_keeps_bos(tiny):
    ours = Tokenizer(tiny, 320)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tiny / "tokenizer.json"))
    assert [a.tolist() for a in ours.encode(TEXTS)] == theirs(TEXTS).input_ids
    assert [a.tolist() for a in ours.encode(TEXTS, 5)] == [i[:5] for i in theirs(TEXTS).input_ids]
    assert [ours.decode(a) for a in ours.encode(TEXTS)] == TEXTS


def test_more_texts_than_a_chunk_keep_their_order(tiny):
    ours = Tokenizer(tiny, 320)
    texts = [str(i) for i in range(4096 + 5)]
    assert [ours.decode(a) for a in ours.encode(texts)] == texts


def test_truncation_and_padding_stored_in_the_file_have_no_effect(tiny, tmp_path):
    stored = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    stored.enable_truncation(4)
    stored.enable_padding(length=16)
    save(stored, tmp_path)
    assert len(stored.encode(TEXT).ids) == 16 and stored.encode(TEXT).attention_mask.count(1) == 4
    plain, ours = Tokenizer(tiny, 320), Tokenizer(tmp_path, 320)
    assert ours.bos == plain.bos
    for a, b in zip(ours.encode(TEXTS), plain.encode(TEXTS)):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("prompt, after", [
    (ECHO, ""), (EOL, '" means in one word:"'), (INSTRUCTED, "\n"), ("{text} and {text}!", "!"),
])
def test_a_filled_prompt_is_tokenized_as_one_text_and_its_tail_is_the_last_occurrence(
    prompt, after, tiny
):
    tokenizer = Tokenizer(tiny, 320)
    arrays, tails = tokenizer.encode_prompted(TEXTS, prompt, 4096)
    whole = tokenizer.encode([prompt.replace("{text}", text) for text in TEXTS])
    for text, ids, expected, tail in zip(TEXTS, arrays, whole, tails):
        assert np.array_equal(ids, expected) and ids.dtype == np.int32
        last = tokenizer.decode(ids[len(ids) - tail :])
        assert last in (text + after, f" {text}{after}") and tail < len(ids)


def test_the_tail_in_a_llama_2_tokenizer_is_the_golden_one(tmp_path):
    tokenizer = Tokenizer(tmp_path, like_llama_2(tmp_path))
    arrays, tails = tokenizer.encode_prompted(["a", "ab", "b", "é", ""], "b {text}b {text}", 99)
    space, b = [259], [261]
    first = [1, 259, 261]
    golden = [[*first, 262, *b, 262], [*first, 262, *b, *b, 262, *b],
              [*first, *space, *b, *b, *space, *b],
              [*first, *space, 3 + 0xC3, 3 + 0xA9, *b, *space, 3 + 0xC3, 3 + 0xA9],
              [*first, *space, *b, *space]]
    assert [array.tolist() for array in arrays] == golden
    assert tails == [1, 2, 1, 2, 0]


def longest_fit(tokenizer, text, prompt, room):
    """The ids with the longest beginning of the text, in its own tokens, that fit; None if none."""
    ends = [end for _, end in tokenizer.backend.encode(text, add_special_tokens=False).offsets]
    for string in [text, *(text[:end] for end in reversed(ends))]:
        (ids,) = tokenizer.encode([prompt.replace("{text}", string)])
        if len(ids) <= room:
            return ids.tolist()
    return None


@pytest.mark.parametrize("prompt", [ECHO, EOL, INSTRUCTED.replace("{instruction}", "Find it")])
@pytest.mark.parametrize("like", ["gpt-2", "llama-2"])
def test_a_long_text_is_cut_as_little_as_fits_and_the_prompt_never(prompt, like, tiny, tmp_path):
    if like == "gpt-2":
        tokenizer = Tokenizer(tiny, 320)
    else:
        tokenizer = Tokenizer(tmp_path, like_llama_2(tmp_path))
    draw = random.Random(0)
    texts = [TEXT, "ümläut 漢字 " * 9, "ab" * 50, " a" * 50] + [
        "".join(draw.choices("ab  \n漢é.", k=60)) for _ in range(12)]
    frame = len(tokenizer.encode([prompt.replace("{text}", "")])[0])
    before, after = prompt.partition("{text}")[0], prompt.rpartition("{text}")[2]
    for room in range(frame, frame + 60, 7):
        for text in texts:
            expected = longest_fit(tokenizer, text, prompt, room)
            try:
                (ids,), (tail,) = tokenizer.encode_prompted([text], prompt, room)
            except UserError as error:
                assert expected is None and f"max_tokens={room}" in str(error)
                continue
            assert ids.tolist() == expected and len(ids) <= room and 0 < tail < len(ids)
            said = tokenizer.decode(ids)
            assert said.startswith(before.strip()) and said.endswith(after)


def test_only_the_text_that_is_too_long_is_cut(tiny):
    tokenizer = Tokenizer(tiny, 320)
    texts = ["short", TEXT, "", "a model"]
    arrays, tails = tokenizer.encode_prompted(texts, EOL, 80)
    for i in (0, 2, 3):
        (alone,), (tail,) = tokenizer.encode_prompted([texts[i]], EOL, 4096)
        assert np.array_equal(arrays[i], alone) and tails[i] == tail
    assert 75 <= len(arrays[1]) <= 80


@pytest.mark.parametrize("text", [TEXT, "x", ""])
def test_a_prompt_that_leaves_no_room_is_a_user_error(text, tiny):
    encoder = plain_encoder(tiny, EncoderConfig(0, "last", "causal", 20, EOL))
    with pytest.raises(UserError, match="max_tokens=20 leaves no room for a text in the prompt"):
        encoder.encode([text])


def test_more_prompted_texts_than_a_chunk_keep_their_order(tiny):
    tokenizer = Tokenizer(tiny, 320)
    texts = [str(i) for i in range(512 + 5)]
    arrays, tails = tokenizer.encode_prompted(texts, "a {text} b {text}", 99)
    assert [tokenizer.decode(a) for a in arrays] == [f"a {t} b {t}" for t in texts]
    assert len(tails) == len(texts)


@pytest.mark.parametrize("content, fragment", [
    (None, "missing"), (b"", "not a tokenizer.json"), (b"{", "not a tokenizer.json"),
    (b"[]", "not a tokenizer.json"), (b'{"model": {"type": "X"}}', "not a tokenizer.json"),
    (b"\xff\xfe", "not a tokenizer.json"),
], ids=["no file", "empty", "cut off", "a list", "unknown model", "binary"])
def test_a_bad_tokenizer_file_is_refused_by_name(content, fragment, tiny_copy):
    path = tiny_copy / "tokenizer.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError) as info:
        plain_encoder(tiny_copy)
    assert str(path) in str(info.value) and fragment in str(info.value)


def test_ids_beyond_the_vocabulary_of_the_model_are_refused(checkpoint):
    folder = checkpoint(tokens=330)
    with pytest.raises(UserError) as info:
        plain_encoder(folder)
    for fragment in (str(folder / "tokenizer.json"), "329", "320"):
        assert fragment in str(info.value)


# ---------------------------------------------------------------------------------------------
# Encoder folders
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [
    MEMORY, EncoderConfig(2, attention="causal", template="q: {text}", max_tokens=40)
], ids=["paper", "other settings"])
@pytest.mark.parametrize("train_table", [True, False], ids=["table", "memory rows only"])
def test_a_saved_encoder_is_loaded_exactly(train_table, config, tiny, tmp_path):
    encoder = build(tiny, config, train_table)
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


def test_a_base_that_has_moved_is_named_with_base_and_another_one_is_refused(checkpoint, tmp_path):
    encoder = build(checkpoint())
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


def test_the_base_is_recorded_by_place_and_hash(tiny, monkeypatch):
    digest = hashlib.sha256((tiny / "model.safetensors").read_bytes()).digest()
    expected = hashlib.sha256(digest).hexdigest()
    monkeypatch.chdir(tiny.parent)
    base = plain_encoder(tiny.name).base
    assert base == {"name": str(tiny.resolve()), "revision": None, "sha256": expected}


@pytest.fixture(scope="module")
def two_stages(tiny, tmp_path_factory):
    """Folders of a first and a second stage, and the second-stage encoder as it was trained."""
    root = tmp_path_factory.mktemp("stages")
    save_encoder(build(tiny), root / "first")
    encoder = load_encoder(root / "first")
    lora.merge_lora(encoder.llama)
    encoder.lora_config = LoraConfig(r=4, alpha=20, targets=("q_proj", "k_proj", "up_proj"))
    lora.add_lora(encoder.llama, encoder.lora_config)
    randomize(encoder.llama, 99)
    encoder.history = [{"stage": "ctkd"}, {"stage": "ucl", "steps": 3}]
    save_encoder(encoder, root / "second", earlier=root / "first")
    return root / "first", root / "second", encoder


def test_two_stages_are_the_first_merged_and_the_second_live(two_stages, tiny):
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


def test_a_first_stage_stands_unchanged_in_the_folder_of_the_second(two_stages):
    first, second, _ = two_stages
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / "ctkd" / name).read_bytes() == (second / "ctkd" / name).read_bytes()


def test_an_interrupted_write_leaves_the_old_folder_and_no_remains(tmp_path):
    target = tmp_path / "out"
    for text in ("old", "new"):
        with write_folder(target) as aside:
            (aside / "file").write_text(text)
        assert (target / "file").read_text() == text
    with pytest.raises(KeyboardInterrupt), write_folder(target) as aside:
        (aside / "file").write_text("half")
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def spoil(name, **new):
    return lambda folder: edit_json(folder / name, **new)


def spoil_rows(edit):
    def damage(folder):
        tensors = load_file(folder / "embeddings.safetensors")
        edit(tensors)
        save_file(tensors, folder / "embeddings.safetensors")

    return damage


ABOUT, ROWS = "encoder.json", "embeddings.safetensors"
BAD_ENCODERS = {
    "no encoder.json": (lambda f: (f / ABOUT).unlink(), ABOUT, "missing"),
    "encoder.json cut off": (lambda f: (f / ABOUT).write_text("{"), ABOUT, "JSON"),
    "no pooling": (lambda f: edit_json(f / ABOUT, drop=["pooling"]), ABOUT, "pooling"),
    "no base": (lambda f: edit_json(f / ABOUT, drop=["base"]), ABOUT, "base"),
    "base without revision": (
        spoil(ABOUT, base={"name": "demo", "sha256": ""}), ABOUT, "revision"
    ),
    "base without hash": (
        spoil(ABOUT, base={"name": "demo", "revision": None}), ABOUT, "sha256"
    ),
    "K a word": (spoil(ABOUT, num_memory_tokens="8"), ABOUT, ""),
    "unknown pooling": (spoil(ABOUT, pooling="max"), "", "'max'"),
    "history a word": (spoil(ABOUT, history=["ctkd"]), ABOUT, ""),
    "a stage outside": (spoil(ABOUT, history=[{"stage": "../first"}]), ABOUT, "../first"),
    "a stage that is a number": (spoil(ABOUT, history=[{"stage": 1}]), ABOUT, "1"),
    "a stage that is not there": (spoil(ABOUT, history=[{"stage": "scl"}]), "scl", "adapter"),
    "another K": (spoil(ABOUT, num_memory_tokens=5), ROWS, "(4, 32)"),
    "no rows": (lambda f: (f / ROWS).unlink(), ROWS, "missing"),
    "rows cut off": (lambda f: (f / ROWS).write_bytes(b"1234567890"), ROWS, "damaged"),
    "no memory rows": (spoil_rows(lambda t: t.pop("memory_tokens")), ROWS, "memory_tokens"),
    "a table of another size": (
        spoil_rows(lambda t: t.update(embed_tokens=torch.ones(7, 32))), ROWS, "(7, 32)"
    ),
    "an unknown tensor": (spoil_rows(lambda t: t.update(x=torch.ones(1))), ROWS, "x"),
    "a damaged adapter": (spoil("ctkd/adapter_config.json", r="many"), "ctkd", "many"),
}


@pytest.mark.parametrize("damage, file, fragment", BAD_ENCODERS.values(), ids=BAD_ENCODERS)
def test_a_bad_encoder_folder_is_refused_by_name(damage, file, fragment, two_stages, tmp_path):
    folder = shutil.copytree(two_stages[0], tmp_path / "encoder")
    damage(folder)
    with pytest.raises(UserError) as info:
        load_encoder(folder)
    assert file in str(info.value) and fragment in str(info.value)


# ---------------------------------------------------------------------------------------------
# A merged folder
# ---------------------------------------------------------------------------------------------


def embed_with_transformers(folder, texts, k=K):
    """What a reader of a merged folder has to do."""
    reference = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    memory = "".join(f"<memory_{i}>" for i in range(1, k + 1))
    rows = []
    for text in texts:
        ids = tokenizer(text + memory, return_tensors="pt").input_ids
        size, n = reference.config.vocab_size, ids.shape[1]
        assert ids[0, -k:].tolist() == list(range(size - k, size)) and ids[0, 0] == 1
        mask = torch.zeros(1, 1, n, n)
        with torch.no_grad():
            hidden = reference(ids, attention_mask=mask).last_hidden_state[0]
        rows.append(hidden[-k:].mean(0).numpy())
    return np.stack(rows)


SHORT = TEXTS[:-1]


@pytest.mark.parametrize("tokens", [300, 320], ids=["fewer ids than rows", "equal ids"])
@pytest.mark.parametrize("settings", [
    {}, {"tie_word_embeddings": True}, {"head_dim": 12, "shard": "30KB"},
], ids=["untied", "tied", "sharded, head_dim"])
def test_a_merged_folder_gives_the_same_embeddings_in_transformers(
    tokens, settings, checkpoint, tmp_path
):
    encoder = build(checkpoint(tokens=tokens, **settings))
    expected = encoder.encode(SHORT)
    merge(encoder, tmp_path / "merged")
    theirs = embed_with_transformers(tmp_path / "merged", SHORT)
    assert np.abs(theirs - expected).max() <= 1e-4
    assert np.abs(encoder.encode(SHORT) - expected).max() <= 1e-5
    assert json.loads((tmp_path / "merged/config.json").read_text())["vocab_size"] == 320 + K


def test_two_stages_are_merged_as_one(two_stages, tmp_path):
    encoder = load_encoder(two_stages[1])
    expected = encoder.encode(SHORT)
    merge(encoder, tmp_path / "merged")
    assert np.abs(embed_with_transformers(tmp_path / "merged", SHORT) - expected).max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=lambda t: f"base {t}")
def test_transformers_reads_a_merged_folder_in_the_dtype_it_was_written_in(
    stored, dtype, checkpoint, tmp_path
):
    merge(build(checkpoint(dtype=stored), dtype=dtype), tmp_path / "merged")
    assert AutoModel.from_pretrained(tmp_path / "merged", dtype="auto").dtype == dtype


@pytest.mark.parametrize("template", [None, "<s> $A </s>", "$A </s>"])
def test_a_merged_tokenizer_puts_bos_first_and_nothing_behind_the_memory_tokens(
    template, checkpoint, tmp_path
):
    encoder = build(checkpoint(template=template))
    expected = encoder.encode(SHORT)
    merge(encoder, tmp_path / "merged")
    assert np.abs(embed_with_transformers(tmp_path / "merged", SHORT) - expected).max() <= 1e-4


@pytest.mark.parametrize("taken", ["<memory_2>", "<unused_310>"])
def test_merging_gives_the_memory_tokens_the_last_ids_even_if_a_name_is_taken(
    taken, checkpoint, tmp_path
):
    folder = checkpoint(tokens=300)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([taken])
    save(tokenizer, folder)
    encoder = build(folder)
    try:
        merge(encoder, tmp_path / "merged")
    except UserError as error:  # to refuse is as good as to rename
        assert taken in str(error)
    else:
        vocab = Tokenizer(tmp_path / "merged", 320 + K).backend.get_vocab()
        ids = [vocab[f"<memory_{i}>"] for i in range(1, K + 1)]
        assert ids == list(range(320, 320 + K))


def test_the_command_line_merges_once_and_then_refuses(two_stages, tmp_path, capsys):
    out = tmp_path / "deep" / "merged"
    arguments = ["merge", str(two_stages[1]), str(out)]
    assert main(arguments) == 0
    assert str(out) in capsys.readouterr().out
    expected = load_encoder(two_stages[1]).encode(SHORT)
    assert np.abs(embed_with_transformers(out, SHORT) - expected).max() <= 1e-4
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(out) in error and "exists" in error
    assert len(error.splitlines()) == 1


def test_the_command_line_tells_what_is_wrong_with_an_encoder(tiny, tmp_path, capsys):
    assert main(["merge", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert main(["merge", str(tiny), str(tmp_path / "out")]) == 2
    assert "encoder.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_demo_model_is_an_encoder_in_any_pooling():
    if not (find_model("demo") / "model.safetensors").is_file():
        pytest.skip("the demo model is not built")
    encoder = plain_encoder("demo")
    rows = encoder.encode(["A cat sits on the mat.", "A cat is on the mat.", "Shares fell today."])
    assert rows.shape == (3, 256) and encoder.base["name"] == "demo"
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > unit[0] @ unit[2]
