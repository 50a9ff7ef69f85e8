"""Stage 1: what its objectives do at the edges, gradients over any split of a batch, its runs."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CONFIGS, CTKD, FAST, ROOT, ctkd_step, dead_url, error_line, files, gradients
from helpers import hub_environment, losses, metrics, names, run_of, settings_of, signal_after
from helpers import stage1_encoder, words, worst
from safetensors.torch import load_file, save_file

import evaluate
import pretrain_ctkd
from lora import lora_layers
from model import load_encoder
from pretrain_ctkd import ctkd_loss
from runtime.checkpoints import seal, unseal
from runtime.ranks import Ranks
from runtime.schedule import global_batch

OBJECTIVES = list(pretrain_ctkd.OBJECTIVES)


def step_gradient(encoder, data, config, step=1):
    """The loss of a step and the gradient of every tensor that has one."""
    losses, _ = ctkd_step(encoder, data, config, step)
    return losses.sum().item(), gradients(encoder)


def random_rows(rows=9, size=16, vocabulary=40, scale=1.0):
    """Student's and teacher's hidden states, and a head."""
    random = torch.Generator().manual_seed(0)
    shapes = (rows, size), (rows, size), (vocabulary, size)
    return [scale * torch.randn(s, generator=random, dtype=torch.float64) for s in shapes]


# ---------------------------------------------------------------------------------------------
# Objectives; that they are the paper's is checked in test_paper.py
# ---------------------------------------------------------------------------------------------


def test_ctkd_is_zero_when_the_student_is_the_teacher():
    student, _, head = random_rows()
    student.requires_grad_()
    loss = ctkd_loss(student, student.detach(), torch.ones(9), head)
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ctkd_is_finite_where_probabilities_underflow(dtype):
    student, teacher, head = (t.to(dtype) for t in random_rows(scale=20.0))
    student.requires_grad_()
    probabilities = (student @ head.T).float().softmax(-1)
    assert probabilities.min() == 0 and probabilities.max() == 1
    loss = ctkd_loss(student, teacher, torch.ones(9), head)
    loss.backward()
    assert loss.isfinite() and loss > 0 and student.grad.isfinite().all()


def test_the_teacher_gets_no_gradient():
    student, teacher, head = (t.requires_grad_() for t in random_rows())
    ctkd_loss(student, teacher, torch.ones(9), head).backward()
    assert teacher.grad is None and head.grad is None and student.grad.abs().max() > 0


def test_nll_weight_adds_the_token_mean_of_the_cross_entropy(ctkd_encoder, id_texts):
    kl, nll, both = (step_gradient(ctkd_encoder, id_texts, replace(CTKD, **change))[0]
                     for change in ({}, {"objective": "nll"}, {"nll_weight": 0.25}))
    assert both == pytest.approx(kl + 0.25 * nll, rel=1e-12)


def test_only_adapters_table_and_memory_tokens_get_gradients(ctkd_encoder, id_texts):
    _, found = step_gradient(ctkd_encoder, id_texts, CTKD)
    kinds = {n.rpartition(".")[2] for n in found}
    assert kinds == {"lora_A", "lora_B", "table", "memory_tokens"}
    assert not any("k_proj" in n for n in found)
    assert all(g.abs().max() > 0 for g in found.values())


# ---------------------------------------------------------------------------------------------
# The gradient, however the batch is split
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_do_not_change_the_gradient(id_texts, objective, micro_batch):
    config = CONFIGS[objective]
    encoder = stage1_encoder(config)
    value, whole = step_gradient(encoder, id_texts, config)
    sum_of_parts, parts = step_gradient(encoder, id_texts, replace(config, micro_batch=micro_batch))
    assert sum_of_parts == pytest.approx(value, rel=1e-12)
    assert worst(parts, whole) < 1e-10


RANK_PROGRAM = """
import sys
from dataclasses import replace
sys.path.insert(0, sys.argv[1])
from helpers import CONFIGS, ctkd_step, run_of, split_texts
from pretrain_ctkd import new_encoder
from safetensors.torch import load_file, save_file
from runtime.ranks import join_ranks
folder, micro_batch = sys.argv[2], int(sys.argv[3])
with join_ranks("cpu", 1, 2.0) as ranks:
    for objective, config in CONFIGS.items():
        config = replace(config, micro_batch=micro_batch)
        encoder = new_encoder(config, run_of(config, ranks))
        start = load_file(f"{folder}/{objective}.safetensors")
        parameters = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
        for name, p in parameters.items():
            p.data.copy_(start[name])
        flat, lengths = (t.numpy() for t in map(load_file(folder + "/texts.safetensors").get,
                                                ("ids", "lengths")))
        texts = [flat[e - n : e] for e, n in zip(lengths.cumsum(), lengths)]
        ctkd_step(encoder, split_texts(texts), config, 1, ranks)
        ranks.sum_gradients(list(parameters.values()))
        if ranks.rank == 0:
            save_file({n: p.grad for n, p in parameters.items()},
                      f"{folder}/{objective}-{ranks.size}-{micro_batch}.safetensors")
"""


@pytest.mark.parametrize("processes, micro_batch", [(2, 0), (3, 2)])
def test_ranks_do_not_change_the_gradient(id_texts, tmp_path, processes, micro_batch):
    """One rank x 8 = two ranks x 4 = three ranks with uneven shares, in micro-batches of 2."""
    encoders = {name: stage1_encoder(config) for name, config in CONFIGS.items()}
    for name, encoder in encoders.items():
        save_file({n: p.data for n, p in encoder.named_parameters() if p.requires_grad},
                  tmp_path / f"{name}.safetensors")
    save_file({"ids": torch.from_numpy(np.concatenate(id_texts.texts)),
               "lengths": torch.tensor([len(ids) for ids in id_texts.texts])},
              tmp_path / "texts.safetensors")
    (tmp_path / "program.py").write_text(RANK_PROGRAM)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(processes), str(tmp_path / "program.py"), str(ROOT / "tests"), str(tmp_path),
         str(micro_batch)],
        check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for objective, config in CONFIGS.items():
        _, whole = step_gradient(encoders[objective], id_texts, config)
        ranks = load_file(tmp_path / f"{objective}-{processes}-{micro_batch}.safetensors")
        assert worst(ranks, whole) < 1e-10


def test_recomputed_activations_give_the_same_gradient_dropout_included(ctkd_encoder, id_texts):
    encoder = ctkd_encoder
    for layer in lora_layers(encoder.llama).values():
        layer.dropout = 0.5
    calls, block = [], encoder.llama.model.layers[0]
    handle = block.register_forward_pre_hook(lambda *_: calls.append(1))
    value, kept = step_gradient(encoder, id_texts, CTKD)
    assert len(calls) == 3  # encoder, student, teacher
    encoder.llama.recompute = True
    again, recomputed = step_gradient(encoder, id_texts, CTKD)
    assert len(calls) == 3 + 5  # all but the teacher twice
    encoder.llama.recompute = False
    handle.remove()
    for layer in lora_layers(encoder.llama).values():
        layer.dropout = 0.0
    assert again == value and all(torch.equal(kept[n], recomputed[n]) for n in kept)
    assert value != step_gradient(encoder, id_texts, CTKD)[0]


@pytest.mark.parametrize("recompute, forwards", [(False, 1), (True, 2)])
def test_recompute_runs_the_blocks_again_in_the_backward_pass(recompute, forwards):
    config, calls = replace(CTKD, recompute=recompute), []
    encoder = pretrain_ctkd.new_encoder(config, run_of(config))
    for block in encoder.llama.model.layers:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    encoder.memory(torch.arange(1, 20), [19]).square().sum().backward()
    assert len(calls) == forwards * len(encoder.llama.model.layers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_gradient_on_cuda_never_waits_for_the_device(id_texts, objective):
    ranks = Ranks(0, 1, torch.device("cuda"))
    config = replace(CONFIGS[objective], dtype="bfloat16", lora_dropout=0.05)
    encoder = pretrain_ctkd.new_encoder(config, run_of(config, ranks))
    ctkd_step(encoder, id_texts, config, 0, ranks)  # compiles, allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        values, _ = ctkd_step(encoder, id_texts, config, 1, ranks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert values.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recomputation_and_encoding_on_cuda(id_texts):
    config = replace(CTKD, dtype="bfloat16", lora_dropout=0.05)
    ranks, found = Ranks(0, 1, torch.device("cuda")), []
    for recompute in (False, True):
        changed = replace(config, recompute=recompute)
        encoder = pretrain_ctkd.new_encoder(changed, run_of(changed, ranks))
        ctkd_step(encoder, id_texts, config, 1, ranks)
        found.append(gradients(encoder))
    assert worst(*found) < 1e-2
    on_cpu = pretrain_ctkd.new_encoder(config, run_of(config))
    texts = ["A bird sings.", "", "Rain falls on the hills all night. " * 20]
    there, here = encoder.encode(texts), on_cpu.encode(texts)
    cosines = (there * here).sum(1) / np.linalg.norm(there, axis=1) / np.linalg.norm(here, axis=1)
    assert cosines.min() > 0.999


# ---------------------------------------------------------------------------------------------
# Runs, on texts long enough to learn from, with their report
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny, texts, tmp_path):
    """run(name, flags...): stage 1 in this process into tmp_path / name; returns the exit code."""

    def main(name: str, *flags) -> int:
        arguments = ["--model", tiny, "--text", texts, "--out", tmp_path / name, *FAST, *flags]
        return pretrain_ctkd.main(list(map(str, arguments)))

    return main


def test_a_run_learns_and_leaves_everything_in_its_folder(run, tiny, texts, tmp_path, capsys):
    flags = ["--steps", 30, "--num-texts", 16, "--batch-size", 8, "--save-every", 20]
    assert run("run", *flags) == 0
    out = tmp_path / "run"
    values = losses(out)
    assert np.mean(values[-6:]) < 0.7 * np.mean(values[:2])
    assert [row["step"] for row in metrics(out)] == list(range(30))
    assert all(row["grad_norm"] > 0 and row["real_tokens"] > 300 for row in metrics(out))
    assert names(out) == [
        "checkpoints", "config.json", "encoder", "environment.json", "metrics.jsonl"]
    assert names(out / "checkpoints") == ["step-0000020", "step-0000030"]
    config = settings_of(out)
    assert (config["lr"], config["steps"], config["memory_tokens"]) == (0.01, 30, 2)

    encoder = load_encoder(out / "encoder")
    rows = encoder.encode(["A model reads a text.", "", "Memory tokens stand at the end."])
    assert rows.shape == (3, 32) and np.isfinite(rows).all() and np.ptp(rows, axis=0).max() > 0.1
    assert (encoder.config.num_memory_tokens, encoder.config.attention) == (2, "bidirectional")
    assert encoder.history[0] == {"stage": "ctkd", **config, "trained_steps": 30}

    printed = capsys.readouterr().out
    for fragment in [
        f"torch {torch.__version__}, 1 process(es) on cpu, 1 thread(s) each, float32",
        f"model  {tiny}: ", "K = 2, bidirectional, objective ctkd",
        f"data   {texts}: 16 texts, ", f"steps  30 of 8 -> {out}",
        "untrained, weighted-mean", "ctkd, 2 memory tokens", "from 2 memories",
        f"torchrun contrastive.py --model {out} --out FOLDER",
        f"python evaluate.py --task sts17 --model {out}/encoder",
    ]:
        assert fragment in printed


def test_the_untrained_rows_are_read_as_the_encoder_is(run, monkeypatch):
    asked = []

    def demo_sts(encoder) -> float:
        asked.append((encoder.config.pooling, encoder.tokenizer.bos, encoder.config.special_tokens,
                      encoder.config.max_tokens))
        return 50.0

    monkeypatch.setattr(evaluate, "demo_sts", demo_sts)
    flags = ["--bos", 5, "--special-tokens", "parsed", "--max-tokens", 40]
    assert run("run", "--steps", 1, *flags) == 0
    assert asked == [(pooling, [5], "parsed", 40) for pooling in (*evaluate.UNTRAINED, "memory")]


def test_the_command_named_at_the_end_works(run, tmp_path, capsys):
    assert run("run", "--steps", 1) == 0
    name, *flags = capsys.readouterr().out.splitlines()[-1].split()[1:]
    assert name == "evaluate.py"
    flags = [flag.replace("sts17", "demo-sts") for flag in flags]
    assert evaluate.main([*flags, "--results", str(tmp_path / "results")]) == 0


@pytest.mark.parametrize("flags", [
    {"objective": "nll"}, {"objective": "rc", "dtype": "bfloat16"},
    {"attention": "causal", "clip": 0.0, "warmup": 0.0},
    {"train_embeddings": "memory", "bos": 5}, {"special_tokens": "parsed"},
    {"memory_init": "normal", "dtype": "float64"}, {"memory_init": "rows"},
    {"nll_weight": 0.5, "micro_batch": 3},
    {"batch_size": 1, "memory_tokens": 1, "lora_r": 1, "lora_dropout": 0.0, "chunk_rows": 5},
], ids=lambda flags: ", ".join(map(str, flags.items())))
def test_every_setting_runs_and_is_in_the_encoders_history(flags, run, tmp_path):
    words = [w for key, value in flags.items() for w in (f"--{key.replace('_', '-')}", value)]
    assert run("run", "--steps", 3, *words) == 0
    assert len(losses(tmp_path / "run")) == 3 and np.isfinite(losses(tmp_path / "run")).all()
    encoder = load_encoder(tmp_path / "run" / "encoder")
    assert flags.items() <= encoder.history[0].items()
    assert np.isfinite(encoder.encode(["A model reads."])).all()
    assert encoder.config.attention == flags.get("attention", "bidirectional")
    assert encoder.tokenizer.bos == [flags.get("bos", 1)]
    assert encoder.config.special_tokens == flags.get("special_tokens", "literal")
    stored = load_file(tmp_path / "run/encoder/embeddings.safetensors")
    assert ("embed_tokens" in stored) == ("train_embeddings" not in flags)
    distance = (stored["memory_tokens"][0] - stored["memory_tokens"][-1]).abs().max()
    assert (distance > 0.1) == ("memory_init" in flags)


def test_micro_batches_do_not_change_the_losses_but_dropout_does(run, tmp_path):
    values = []
    for name, size, dropout in (("whole", 0, 0), ("micro", 1, 0), ("dropout", 0, 0.5)):
        flags = ["--micro-batch", size, "--lora-dropout", dropout, "--min-lr", 0.01]
        assert run(name, "--steps", 3, "--dtype", "float64", *flags) == 0
        values.append(losses(tmp_path / name))
    whole, micro, dropout = values
    assert micro == pytest.approx(whole, rel=1e-9)
    assert dropout[1:] != pytest.approx(whole[1:], rel=1e-4)  # at first B is zero


def test_dropout_is_drawn_anew_for_every_micro_batch_and_step(run, tmp_path, monkeypatch):
    """An objective that draws as dropout does: in three steps of four micro-batches, and in the
    same steps with an interruption after the first."""
    draws = []

    def objective(encoder, *_):
        draws.append(tuple(torch.rand(4).tolist()))
        return 0 * encoder.memory_tokens.sum()

    monkeypatch.setattr(pretrain_ctkd, "report", lambda *_: None)
    monkeypatch.setitem(pretrain_ctkd.OBJECTIVES, "ctkd", objective)
    flags = ["--steps", 3, "--micro-batch", 1]
    assert run("whole", *flags) == 0
    with signal_after(1, signal.SIGTERM):
        assert run("parts", *flags) == 143
    assert run("parts", *flags, "--resume") == 0
    assert len(draws) == 24 and draws[12:] == draws[:12] and len(set(draws)) == 12


@pytest.mark.parametrize("way", ["literal", "parsed"])
def test_a_corpus_is_read_as_the_encoder_reads_texts(way, tiny, tmp_path):
    """A text about </s> has its letters, unless --special-tokens says parsed."""
    path = tmp_path / "texts.txt"
    path.write_text("The tokenizer writes </s> after each document of the text.\n" * 3)
    config = pretrain_ctkd.Config(model=str(tiny), text=str(path), special_tokens=way)
    encoder = pretrain_ctkd.new_encoder(config, run_of(config))
    data = pretrain_ctkd.open_texts(config, encoder.tokenizer, 0)
    read, found = encoder.tokenize([path.read_text().splitlines()[0]]).ids[0], data.texts[0]
    assert found.tolist() == read.tolist() and (2 in found) == (way == "parsed")


def test_a_run_leaves_the_models_folder_as_it_was(run, tiny):
    before = files(tiny)
    assert run("run", "--steps", 3, "--lr", 1.0) == 0
    assert files(tiny) == before


def test_the_first_two_steps_have_the_lowest_rate_and_the_schedule_is_applied(run, tmp_path):
    assert run("run", "--steps", 3, "--min-lr", 0, "--save-every", 1) == 0
    rates = [row["learning_rate"] for row in metrics(tmp_path / "run")]
    assert rates == [0, 0, 0.01]
    for step, moved in ((2, False), (3, True)):
        weights = load_file(tmp_path / f"run/checkpoints/step-000000{step}/weights.safetensors")
        up = [tensor for name, tensor in weights.items() if name.endswith("lora_B")]
        assert len(up) == 12 and all(bool(tensor.any()) == moved for tensor in up)


def test_a_finished_run_that_is_resumed_only_reports(run, tmp_path, capsys):
    assert run("run", "--steps", 4) == 0
    before, first = files(tmp_path), capsys.readouterr().out
    assert run("run", "--steps", 4, "--resume") == 0
    assert files(tmp_path) == before
    reports = [text.partition("bundled STS")[2] for text in (first, capsys.readouterr().out)]
    assert reports[0] == reports[1] and "; next" in reports[0]


def test_the_continuation_shown_is_that_from_the_memory(tiny, capsys):
    config = pretrain_ctkd.Config(model=str(tiny), memory_tokens=2, dtype="float32")
    encoder = pretrain_ctkd.new_encoder(config, run_of(config)).eval()
    tokenizer, llama = encoder.tokenizer, encoder.llama
    texts = tokenizer.encode(words(2, 0, 24, 30))
    pretrain_ctkd.show_continuations(encoder, texts, tokens=8)
    shown = capsys.readouterr().out
    bos = llama.embed(torch.tensor(tokenizer.bos))
    for ids in texts:
        half = torch.from_numpy(ids[: len(ids) // 2])
        with torch.no_grad():
            read = torch.cat((bos, encoder.memory(half, [len(half)])[0]))
        expected, blind = (tokenizer.decode(pretrain_ctkd.generate(llama, x, 8))
                           for x in (read, bos))
        assert f"from 2 memories   {expected!r}\n" in shown and expected != blind


# ---------------------------------------------------------------------------------------------
# Errors of stage 1; those of all stages are in test_stages.py
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, fragments", [
    (["--min-characters", 10_000], ["no text left of 43", "43 under 10000 characters"]),
    (["--max-text-tokens", 20], ["no text left of 43", "3 under 20 tokens", "40 20 tokens or more",
                                 "--max-text-tokens"]),
    (["--min-characters", 30, "--max-text-tokens", 30],
     ["no text left of 43", "2 under 30 characters", "1 under 20 tokens", "40 30 tokens or more"]),
    (["--batch-size", 41], ["--batch-size 41", "the 40 rows", "3 under 20 tokens", "lower it"]),
    (["--batch-size", 4, "--num-texts", 3], ["--batch-size 4", "the 3 rows", "lower it"]),
])
def test_too_few_texts_are_reported_with_the_count_of_each_filter(
    flags, fragments, run, texts, tmp_path, capsys
):
    path = tmp_path / "more.txt"
    path.write_text("short\nsmall\nthe embedding of the text is here\n" + texts.read_text())
    content = path.read_bytes()
    error_line(run("run", "--text", path, *flags), capsys, path, *fragments)
    assert path.read_bytes() == content


@pytest.mark.parametrize("micro_batch", [
    pytest.param(1, id="texts one by one"),
    pytest.param(0, id="whole batch"),
])
def test_a_loss_that_is_not_finite_names_its_texts_and_stops_before_the_update(
    micro_batch, run, tiny, texts, tmp_path, capsys
):
    """A checkpoint whose row for `~` is infinite, and one text with a `~`, the third of step 5."""
    bad = np.random.default_rng(42).permutation(40)[global_batch(0, 5, 4, 40)[2]]  # its line
    lines, path, out = texts.read_text().splitlines(), tmp_path / "texts.txt", tmp_path / "run"
    lines[bad] = "~" * 60  # wherever this is split, the context has one
    path.write_text("\n".join(lines))
    flags = ["--text", path, "--steps", 10, "--save-every", 2, "--micro-batch", micro_batch]
    with signal_after(2, signal.SIGTERM):
        assert run("run", *flags) == 143
    last = out / "checkpoints/step-0000002"
    weights, about = last / "weights.safetensors", unseal(last)
    tensors = load_file(weights)
    vocabulary = json.loads((tiny / "tokenizer.json").read_text())["model"]["vocab"]
    tensors["table"][vocabulary["~"]] = float("inf")
    save_file(tensors, weights)
    seal(last, about)

    capsys.readouterr()
    code = run("run", *flags, "--resume")
    message = error_line(code, capsys, "step 5: the loss (nan)", "nothing was updated",
                         "Rows", "Lower --lr", out / "checkpoints", bar=True)
    named = re.findall(re.escape(f"{path}, text ") + r"(\d+)\b", message)
    assert str(bad + 1) in named and "from 0" not in message  # lines count from 1
    assert named == [str(bad + 1)] or micro_batch == 0
    assert len(losses(out)) == 5 and np.isfinite(losses(out)).all()
    assert names(out / "checkpoints") == ["step-0000002", "step-0000004"]
    assert not (out / "encoder").exists()
    before = files(out)
    assert run("run", *flags, "--resume") == 2
    unlike = {path.name for path, content in files(out).items() if before.get(path) != content}
    assert unlike <= {"metrics.jsonl"}  # its speeds


def test_a_gradient_that_is_not_finite_stops_the_run_too(run, tmp_path, capsys):
    code = run("run", "--steps", 2, "--nll-weight", 1e30)
    message = error_line(code, capsys, "step 0: the loss (", "gradient's norm (inf)",
                         "nothing was", bar=True)
    assert float(re.search(r"the loss \((.*?)\)", message)[1]) < 1e32
    assert not (tmp_path / "run/checkpoints").exists() and metrics(tmp_path / "run") == []


# the hub's client sleeps for 23 seconds in all before it gives up
IMPATIENT = """
import sys, time
time.sleep = lambda _: None
import pretrain_ctkd
sys.exit(pretrain_ctkd.main())
"""


@pytest.mark.parametrize("name, arguments", [
    ("resume", ["--resume"]), ("text", ["--text", "nowhere.txt"]),
    ("hub", ["--model", "owner/name"]),
])
def test_as_a_command_bad_input_is_a_clear_line_on_stderr(name, arguments, tiny, texts, tmp_path):
    program = ["-c", IMPATIENT] if name == "hub" else [str(ROOT / "pretrain_ctkd.py")]
    done = subprocess.run(
        [sys.executable, *program, "--model", str(tiny), "--text", str(texts), "--out", "run",
         *FAST, *arguments],
        cwd=tmp_path, env=hub_environment(tmp_path, dead_url()), capture_output=True, text=True,
        timeout=100,
    )
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    lines = [x for x in done.stderr.splitlines() if "thrown while" not in x and "Retrying" not in x]
    assert lines[0].startswith("error: ") and len(lines) == 1
