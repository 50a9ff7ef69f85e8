"""docs/extending.md: its files are extracted, run as the commands they are, and checked."""

import json
import os
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, embed_with_transformers, evaluate_main, files, losses, refused, run_of

import evaluate
import export
import model
import paper
import pretrain_ctkd as stage1
from model import load_encoder, load_llama

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
EXAMPLES = {re.match(r'"""(\w+\.py): ', block)[1]: block
            for block in re.findall(r"```python\n(.*?)```", PAGE, re.S)}
REGISTRIES = (stage1.OBJECTIVES, model.POOLINGS, evaluate.METHODS, model.BASES)


@pytest.fixture
def examples(tmp_path):
    """The page's files in a folder of their own; what they register is forgotten afterwards."""
    before = [dict(registry) for registry in REGISTRIES]
    for name, block in EXAMPLES.items():
        (tmp_path / name).write_text(block, encoding="utf-8")
    yield tmp_path
    for registry, entries in zip(REGISTRIES, before):
        registry.clear()
        registry.update(entries)


@pytest.fixture
def command(examples, monkeypatch):
    """command("file.py", flags...): run an example as `python file.py flags`, in this process."""

    def run(name: str, *flags) -> int:
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(examples / name), run_name="__main__")
        return end.value.code

    return run


def in_a_shell(folder, *arguments) -> subprocess.CompletedProcess:
    """`python FILE flags` in a process of its own, the project on its path."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, capture_output=True,
                          text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_page_has_four_short_files():
    assert set(EXAMPLES) == {"reverse_kl.py", "max_pooling.py", "train_max.py", "smollm3.py"}
    for block in EXAMPLES.values():
        code = [line for line in block.splitlines()[1:] if line.strip()]
        assert len(code) <= 25


# ---------------------------------------------------------------------------------------------
# An objective
# ---------------------------------------------------------------------------------------------


def reverse_kl_by_the_paper(config) -> float:
    """The loss of the first step by paper.py, text by text."""
    encoder = stage1.new_encoder(config, run_of(config))
    data = stage1.open_texts(config, encoder.tokenizer, config.num_texts)
    batch = data.read_batch(config.seed, 0, config.batch_size)
    g_phi, rows = encoder.llama, []
    with torch.no_grad():
        for ids, a in zip(batch.texts, batch.splits):
            n = torch.from_numpy(ids).long()
            teacher = paper.log_g(g_phi, g_phi.model.embed_tokens.weight[n])[a - 1 :]
            memory = paper.eq1_memory(encoder, n[:a])
            student = paper.log_g_after_memory(g_phi, n[:1], memory, n[a:])
            rows.append((student.exp() * (student - teacher)).sum(-1))
    return torch.cat(rows).mean().item()


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_an_objective_of_ones_own_trains_an_encoder(micro_batch, command, argv, tmp_path, capsys):
    flags = argv("ctkd", tmp_path / "out", "--steps", 2, "--batch-size", 4, "--objective",
                 "reverse-kl", "--micro-batch", micro_batch, "--chunk-rows", 7)
    assert command("reverse_kl.py", *flags) == 0
    first, second = losses(tmp_path / "out")
    expected = reverse_kl_by_the_paper(stage1.parse_arguments(flags))
    assert first == pytest.approx(expected, rel=1e-4) and second != first > 0
    assert "objective reverse-kl" in (printed := capsys.readouterr().out)
    assert re.search(r"reverse-kl, 2 memory tokens +-?\d", printed)  # the report ran, too


def test_its_encoder_needs_neither_the_file_nor_the_entry(command, argv, tmp_path):
    flags = argv("ctkd", tmp_path / "out", "--steps", 1, "--batch-size", 4, "--objective",
                 "reverse-kl")
    assert command("reverse_kl.py", *flags) == 0
    del stage1.OBJECTIVES["reverse-kl"]
    encoder = load_encoder(tmp_path / "out/encoder")
    assert encoder.history[0]["objective"] == "reverse-kl"
    assert np.isfinite(encoder.encode(["A model reads."])).all()
    assert evaluate.paper_row(encoder, "memory")[0] is None  # no row of the paper's table
    with pytest.raises(SystemExit):  # argparse: invalid choice
        stage1.parse_arguments(["--objective", "reverse-kl"])


# ---------------------------------------------------------------------------------------------
# A pooling
# ---------------------------------------------------------------------------------------------


def test_a_pooling_of_ones_own_is_a_method(command, tiny, here, reference):
    assert command("max_pooling.py", "--method", "max", "--model", tiny, "--task", "sts17",
                   "--data-dir", "../data", "--device", "cpu", "--threads", 1) == 0
    (path,) = here.glob("results/*@max/STS17.json")
    settings = json.loads(path.read_text())["settings"]
    assert (settings["method"], settings["pooling"], settings["paper"]) == ("max", "max", None)
    encoder, method = evaluate.open_model(str(tiny), "max")
    ids = torch.from_numpy(encoder.tokenizer.encode(["A model reads a text"])[0]).long()
    with torch.no_grad():
        states = reference(tiny).model(ids[None]).last_hidden_state[0].numpy()
    embedding = evaluate.encoding(encoder, method)(["A model reads a text"])[0]
    assert np.abs(embedding - states.max(axis=0)).max() <= 1e-5


def test_a_pooling_of_ones_own_is_stored_in_the_encoder(examples, home, tiny, here, capsys):
    flags = ["--model", tiny, "--text", home / "texts.txt", "--pooling", "max", "--attention",
             "causal", "--out", "run", "--steps", 1, "--batch-size", 4, "--max-tokens", 40,
             "--micro-tokens", 160, "--threads", 1, "--device", "cpu", "--dtype", "float32"]
    done = in_a_shell(here, examples / "train_max.py", *flags)
    assert done.returncode == 0, done.stderr
    about = json.loads((here / "run/encoder/encoder.json").read_text())
    assert about["pooling"] == "max" and about["num_memory_tokens"] == 0
    before = files(here)
    assert evaluate_main("--task", "sts17", "--model", "run") == 2  # not registered here
    assert re.search(r"encoder.json: pooling='max': unknown; one of memory, last, .*echo",
                     capsys.readouterr().err)
    assert files(here) == before
    runpy.run_path(str(examples / "max_pooling.py"))
    assert evaluate_main("--task", "sts17", "--model", "run") == 0
    assert load_encoder("run/encoder").config.pooling == "max"


# ---------------------------------------------------------------------------------------------
# A base
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {"num_hidden_layers": 5}, {"num_hidden_layers": 4, "tie_word_embeddings": False},
    {"num_hidden_layers": 8, "num_key_value_heads": 1, "rope_theta": 5e6},
], ids=str)
def test_a_base_of_ones_own_has_transformers_logits(settings, examples, checkpoint, reference):
    folder = checkpoint(kind="smollm3", pad_token_id=0, **settings)
    refused(lambda: load_llama(folder), "model_type='smollm3' is not supported, only 'llama', "
            "'mistral', 'qwen2', 'qwen3'")
    runpy.run_path(str(examples / "smollm3.py"))
    llama, smollm3, lengths = load_llama(folder), reference(folder), [1, 9, 40]
    ids = torch.randint(320, (sum(lengths),), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        ours = llama(llama.embed(ids), lengths, causal=True) @ llama.head.T
        theirs = torch.cat([smollm3(part[None]).logits[0] for part in ids.split(lengths)])
    assert (ours - theirs).abs().max() <= 1e-4 and theirs.abs().max() > 1


def test_a_base_of_ones_own_is_trained_stored_and_exported(command, argv, checkpoint, tmp_path):
    folder = checkpoint(kind="smollm3", pad_token_id=0, num_hidden_layers=4)
    flags = argv("ctkd", tmp_path / "out", "--model", folder, "--steps", 2, "--batch-size", 4)
    assert command("smollm3.py", *flags) == 0
    encoder, texts = load_encoder(tmp_path / "out/encoder"), ["A model reads a text", ""]
    z = encoder.encode(texts)
    assert np.isfinite(z).all() and encoder.llama.config.model_type == "smollm3"
    export.export_encoder(encoder, tmp_path / "plain")
    assert np.abs(embed_with_transformers(tmp_path / "plain", texts, k=2) - z).max() <= 1e-4
