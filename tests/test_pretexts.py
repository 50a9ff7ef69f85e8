"""pretexts.py: the objectives of LLM2Vec and Llama2Vec, against transformers and plain loops."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from helpers import (
    CONFIGS, error_line, gradients, losses, refused, settings_of, stage1_encoder, without_speed,
    worst,
)

import contrastive
import evaluate
import pretexts
import pretrain_ctkd
from export import export_encoder
from lora import TARGETS, lora_layers
from model import load_encoder
from pretexts import PREDICT, SUMMARIZE, mask_tokens
from runtime.schedule import generator


def in_transformers(encoder, folder, causal=True):
    """The encoder's Llama, adapters merged, as transformers reads it: fp64, with the head."""
    base, export = evaluate.find_model("demo"), folder / "exported"
    export_encoder(encoder, export)
    llama = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float64)
    weights = transformers.LlamaModel.from_pretrained(export, dtype=torch.float64)
    table = llama.get_input_embeddings().weight.detach().clone()
    llama.model.layers, llama.model.norm = weights.layers, weights.norm
    llama.config.is_causal = llama.model.config.is_causal = causal
    return llama.eval(), table


# ---------------------------------------------------------------------------------------------
# MNTP
# ---------------------------------------------------------------------------------------------


def test_a_fifth_of_the_tokens_is_chosen_and_read_80_10_10():
    """Each count within four standard deviations of a binomial's mean; BOS is never chosen."""
    ids, mask, n, v = np.full(200_100, 7, dtype=np.int32), 3, 200_000, 50_000
    read, chosen = mask_tokens(ids, 100, mask, v, 0.2, generator(0, 1))
    assert not chosen[:100].any() and read.dtype == ids.dtype and (read[~chosen] == 7).all()

    def near(count, trials, p):
        return abs(count - trials * p) < 4 * (trials * p * (1 - p)) ** 0.5

    m = int(chosen.sum())
    masked, kept = (read[chosen] == mask).sum(), (read[chosen] == 7).sum()
    assert near(m, n, 0.2) and near(masked, m, 0.8) and near(kept, m, 0.1)
    other = read[chosen & (read != mask) & (read != 7)]
    assert near(len(other), m, 0.1) and len(set(other.tolist())) > 0.95 * len(other) * (
        1 - len(other) / v / 2)
    assert abs(other.mean() / v - 0.5) < 0.02 and other.max() < v and other.min() >= 0


def test_masks_depend_on_seed_and_place_in_the_run_alone(id_texts):
    config = CONFIGS["mntp"]
    draws = [mask_tokens(id_texts.texts[0], 1, 5, 300, 0.2, generator(seed, 6, place))[1]
             for seed, place in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any() and (draws[0] != draws[3]).any()
    batches = [id_texts.read_batch(0, step, config.batch_size) for step in (0, 1)]
    assert [b.positions for b in batches] == [list(range(8)), list(range(8, 16))]


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_mntp_is_the_loss_of_transformers_without_a_causal_mask(share, id_texts, tmp_path):
    """Labels at the chosen tokens, which transformers shifts; also with all of them chosen."""
    config = replace(CONFIGS["mntp"], mask_share=share)
    encoder = stage1_encoder(config)
    batch = id_texts.read_batch(0, 1, config.batch_size)
    ours = pretexts.mntp(encoder, batch, config).item()
    llama, _ = in_transformers(encoder, tmp_path, causal=False)
    mask, total, count = encoder.tokenizer.backend.token_to_id("_"), 0.0, 0
    for ids, place in zip(batch.texts, batch.positions):
        read, chosen = mask_tokens(ids, 1, mask, 8192, share, generator(config.seed, 6, place))
        assert chosen.any() and (share < 1 or chosen[1:].all())
        labels = torch.from_numpy(np.where(chosen, ids, -100)).long()[None]
        inputs = torch.from_numpy(read).long()[None]
        with torch.no_grad():
            mean = llama(input_ids=inputs, labels=labels).loss.item()
        total, count = total + mean * chosen.sum(), count + chosen.sum()
    assert ours == pytest.approx(total / count, rel=1e-5)


def test_a_micro_batch_in_which_no_token_is_chosen_adds_nothing(id_texts, monkeypatch):
    """A short text may have none; on the only rank that has no other, too."""
    config = CONFIGS["mntp"]
    encoder, batch = stage1_encoder(config), id_texts.read_batch(0, 0, 2)
    real = pretexts.mask_tokens

    def none_in_the_first(ids, *rest):
        read, chosen = real(ids, *rest)
        return (ids, np.zeros_like(chosen)) if ids is batch.texts[0] else (read, chosen)

    monkeypatch.setattr(pretexts, "mask_tokens", none_in_the_first)
    whole, parts = [pretexts.mntp(encoder, batch, config)], []
    whole[0].backward()
    expected = gradients(encoder)
    for place in (0, 1):
        parts.append(pretexts.mntp(encoder, batch.part(range(place, place + 1)), config))
        parts[-1].backward()
    assert parts[0] == 0 and parts[1].item() == pytest.approx(whole[0].item(), rel=1e-12)
    assert worst(gradients(encoder), expected) < 1e-10


# ---------------------------------------------------------------------------------------------
# EBAE and EBAR
# ---------------------------------------------------------------------------------------------


def llara_by_hand(llama, table, encoder, batch) -> float:
    """The loss as LLaRA's code computes it: both prompts in one sequence and a 4-D mask, float64.

    The second prompt has the positions of the first and does not see it.
    """
    k, tokenizer = encoder.config.num_memory_tokens, encoder.tokenizer
    (open_ids, first), (_, second) = (pretexts.prompt_ids(tokenizer, p)
                                      for p in (SUMMARIZE, PREDICT))
    memory, total, bags = encoder.memory_tokens.detach().double(), [], []
    for context, continuation in zip(batch.contexts, batch.continuations):
        text = context[1:]
        start = np.concatenate((context[:1], open_ids, text)).astype(int)
        parts = [table[start], table[first.astype(int)], memory, table[second.astype(int)], memory]
        x = torch.cat(parts)
        n, a, b = len(start), len(first) + k, len(second) + k
        allowed = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        allowed[n + a :, n : n + a] = False
        mask = torch.where(allowed, 0.0, -torch.inf).double()[None, None]
        positions = torch.cat((torch.arange(n + a), n + torch.arange(b)))[None]
        with torch.no_grad():
            logits = llama(inputs_embeds=x[None], attention_mask=mask, position_ids=positions)
        logits = logits.logits[0]
        for rows, target in ((logits[n + a - k : n + a], text), (logits[-k:], continuation)):
            log_p = rows.max(dim=0).values.log_softmax(-1)
            words = sorted(set(target.tolist()))
            bags.append(-sum(log_p[i].item() for i in words) / len(words) / 10)
        log_p = logits.log_softmax(-1)
        total += [-log_p[n - len(text) + i - 1, token].item() for i, token in enumerate(text)]
    return np.mean(total) + np.mean(bags)


@pytest.mark.parametrize("chunk_rows", [256, 5])
def test_ebae_ebar_is_llaras_loss_over_one_sequence_with_a_4d_mask(chunk_rows, id_texts, tmp_path):
    config = replace(CONFIGS["ebae-ebar"], chunk_rows=chunk_rows)
    encoder = stage1_encoder(config)
    batch = id_texts.read_batch(0, 1, config.batch_size)
    ours = pretexts.ebae_ebar(encoder, batch, config).item()
    llama, table = in_transformers(encoder, tmp_path)
    assert ours == pytest.approx(llara_by_hand(llama, table, encoder, batch), rel=1e-5)


# ---------------------------------------------------------------------------------------------
# Runs: their encoders, the stages after them, resume, refusals
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny, texts, tmp_path):
    """run("out", preset, flags...): stage 1 on the tiny Llama, 3 steps of 4 texts."""

    def run(name, preset, *flags):
        return pretrain_ctkd.main([
            "--preset", preset, "--model", str(tiny), "--text", str(texts), "--out",
            str(tmp_path / name), "--steps", "3", "--batch-size", "4", "--num-texts", "0",
            "--min-characters", "0", "--max-text-tokens", "0", "--max-tokens", "64",
            *["--mask-token", "e"] * (preset == "llm2vec"), *map(str, flags)])

    return run


@pytest.mark.parametrize("preset, pooling, k, stage", [
    ("llm2vec", "mean", 0, "mntp"), ("llama2vec", "memory", 8, "ebae_ebar")])
def test_their_encoders_are_read_as_they_were_trained_and_trained_on(
        preset, pooling, k, stage, run, tiny, texts, tmp_path, capsys):
    assert run("out", preset) == 0
    assert np.isfinite(losses(tmp_path / "out")).all()
    printed = capsys.readouterr().out
    assert f"{stage.replace('_', '-')}, {'8 memory tokens' if k else 'mean'}" in printed
    assert "context (" not in printed  # g_phi never reads their memory
    encoder = load_encoder(tmp_path / "out/encoder")
    assert (encoder.config.pooling, len(encoder.memory_tokens)) == (pooling, k)
    assert encoder.table is encoder.llama.model.embed_tokens.weight
    kinds = {name.rpartition(".")[2] for name in lora_layers(encoder.llama)}
    assert kinds == set(TARGETS) and encoder.history[0]["stage"] == stage
    query, document = encoder.encode(["A model reads."]), encoder.encode(["A model reads."],
                                                                         document=True)
    assert np.isfinite(query).all() and (query != document).any() == (k > 0)
    assert evaluate.paper_row(encoder, "memory") == (None, f"stages {stage}")
    assert contrastive.main([
        "--preset", "paper", "--model", str(tmp_path / "out"), "--text", str(texts), "--out",
        str(tmp_path / "ucl"), "--steps", "2", "--batch-size", "4", "--num-texts", "0",
        "--max-tokens", "64"]) == 0
    after = load_encoder(tmp_path / "ucl/encoder")
    assert [entry["stage"] for entry in after.history] == [stage, "ucl"]
    assert after.config == encoder.config


@pytest.mark.parametrize("preset", ["llm2vec", "llama2vec"])
def test_an_interruption_changes_no_bit(preset, run, tmp_path, capsys, monkeypatch):
    assert run("whole", preset) == 0
    update, calls = torch.optim.AdamW.step, []

    def dies(optimizer):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return update(optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            run("cut", preset, "--save-every", 1)
    assert run("cut", preset, "--save-every", 1, "--resume") == 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert without_speed(whole) == without_speed(cut) and len(losses(cut)) == 3
    weights = [sorted(folder.rglob("encoder/**/*.safetensors")) for folder in (whole, cut)]
    assert len(weights[0]) == 2 and all(
        a.read_bytes() == b.read_bytes() for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("preset, flags, fragments", [
    ("llm2vec", ["--mask-token", "<mask>"], ["--mask-token '<mask>'", "tokenizer.json", "name"]),
    ("llm2vec", ["--memory-tokens", "8"], ["--memory-tokens 8", "needs --memory-tokens 0"]),
    ("llm2vec", ["--attention", "causal"], ["--attention causal", "bidirectional", "llm2vec"]),
    ("llm2vec", ["--train-embeddings", "all"], ["--train-embeddings all", "memory"]),
    ("llm2vec", ["--mask-share", "1.5"], ["--mask-share 1.5", "below 1"]),
    ("llm2vec", ["--mask-share", "0"], ["--mask-share 0", "raise it"]),
    ("llama2vec", ["--attention", "bidirectional"], ["--attention bidirectional", "causal"]),
    ("llama2vec", ["--max-tokens", "20"], ["max_tokens=20", "no room", "prompt"]),
    ("paper", ["--memory-tokens", "0"], ["--memory-tokens 0", "ctkd", "at least 1"]),
    ("paper", ["--objective", "mntp"], ["--attention", "--preset llm2vec"][1:]),
])
def test_what_they_cannot_do_is_refused(preset, flags, fragments, run, tmp_path, capsys):
    error_line(run("out", preset, *flags), capsys, *fragments)
    assert not (tmp_path / "out" / "encoder").exists()


def test_a_mask_token_beyond_the_table_is_refused():
    """A pad token may have such an id: 32000 of 32,000."""
    tokenizer = SimpleNamespace(backend=SimpleNamespace(token_to_id=lambda token: 320),
                                vocab_size=321, file="tokenizer.json")
    assert pretexts.mask_id(tokenizer, "<pad>") == 320
    tokenizer.vocab_size = 320
    refused(lambda: pretexts.mask_id(tokenizer, "<pad>"), "--mask-token '<pad>'", "tokenizer.json")


def test_llama2vecs_preset_is_beside_the_papers_rows():
    other = pretrain_ctkd.parse_arguments(["--preset", "llama2vec"])
    assert other.num_texts == 32000 and other.memory_tokens == 8 and other.lora_k_proj


def test_k_proj_is_adapted_where_it_is_asked_for(run, tmp_path, capsys):
    for flag, there in ((), False), (("--lora-k-proj",), True):
        name = f"k{there}"
        assert run(name, "paper", "--objective", "nll", *flag) == 0
        encoder = load_encoder(tmp_path / name / "encoder")
        assert any("k_proj" in layer for layer in lora_layers(encoder.llama)) == there
        assert settings_of(tmp_path / name)["lora_k_proj"] == there
