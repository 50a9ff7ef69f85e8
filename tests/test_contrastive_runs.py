"""Stages 2 and 3 from their command line: runs one after another, resumes, ranks, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edit_json, write_llama
from safetensors.torch import load_file, save_file
from test_contrastive import ALONE, words
from test_pretrain import files, losses, metrics, same_tensors, signal_after

import contrastive
import evaluate
import pretrain_ctkd
from contrastive import Config, one_source_batch
from data.triples import INSTRUCTIONS, Triples
from model import INSTRUCTED, load_encoder
from training import global_batch, learning_rate

ROOT = Path(__file__).parent.parent
FAST = ["--max-tokens", 40, "--batch-size", 8, "--steps", 3, "--lr", 0.003, "--threads", 1,
        "--dtype", "float32", "--device", "cpu", "--micro-tokens", 160, "--lora-r", 4]
LONG = ["--max-tokens", 120, "--micro-tokens", 360]  # room for an instruction
FIELDS = {"step", "loss", "accuracy", "alignment", "uniformity", "effective_dimension", "masked",
          "learning_rate", "grad_norm", "real_tokens", "tokens_per_second"}
WEIGHTS = "adapter_model.safetensors"


def write_triples(path: Path, count: int, seed: int) -> Path:
    """A file of `count` rows of short texts, each with two negatives."""
    texts = iter(words(4 * count, seed, 2, 8))
    rows = [{"query": q, "positive": p, "negative": n} for q, p, *n in zip(*[texts] * 4)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The folder of what all tests read: texts, triples, and the runs ctkd, ucl, scl."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "texts.txt").write_text("\n".join(words(40, 0, 2, 12)))
    write_triples(folder / "triples.jsonl", 24, 1)
    write_triples(folder / "folder/allnli.jsonl", 20, 2)
    write_triples(folder / "folder/mine.jsonl", 10, 3)
    write_triples(folder / "folder/squad.jsonl", 9, 4)
    return folder


def run_stage(home: Path, out: Path, stage: str, model: Path, *flags) -> int:
    """A contrastive stage in this process; returns the exit code."""
    data = ["--text", home / "texts.txt"] if stage == "ucl" else [
        "--triples", home / "triples.jsonl", "--document-tokens", 40]
    arguments = ["--stage", stage, "--model", model, "--out", out, *data, *FAST, *flags]
    return contrastive.main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def ctkd(home, tiny) -> Path:
    """A run of stage 1 on the tiny Llama."""
    arguments = ["--model", tiny, "--text", home / "texts.txt", "--out", home / "ctkd", "--steps",
                 2, "--memory-tokens", 2, "--max-tokens", 40, "--threads", 1, "--dtype", "float32",
                 "--lr", 0.01, "--device", "cpu", "--lora-r", 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_ctkd, "report", lambda *_: None)
        assert pretrain_ctkd.main(list(map(str, arguments))) == 0
    return home / "ctkd"


@pytest.fixture(scope="module")
def ucl(home, ctkd) -> Path:
    """A run of stage 2 after stage 1, with evaluations."""
    flags = ["--eval-tasks", "demo-sts", "--eval-every", 2]
    assert run_stage(home, home / "ucl", "ucl", ctkd, *flags) == 0
    return home / "ucl"


@pytest.fixture(scope="module")
def scl(home, ucl) -> Path:
    """A run of stage 3 after stage 2."""
    assert run_stage(home, home / "scl", "scl", ucl, "--save-every", 2) == 0
    return home / "scl"


@pytest.fixture
def quiet(monkeypatch):
    """No report after a run: it takes longer than the run."""
    monkeypatch.setattr(contrastive, "report", lambda *_: None)


@pytest.fixture
def run(home, ctkd, tmp_path, quiet):
    """run(name, flags...): ucl, or what --stage says, after stage 1 into tmp_path / name."""

    def main(name: str, *flags, stage="ucl", model=ctkd) -> int:
        return run_stage(home, tmp_path / name, stage, model, *flags)

    return main


def history(folder: Path) -> list[str]:
    about = json.loads((folder / "encoder/encoder.json").read_text())
    return [entry["stage"] for entry in about["history"]]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def scores(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------
# A run after another
# ---------------------------------------------------------------------------------------------

RUN = ["checkpoints", "config.json", "encoder", "environment.json", "metrics.jsonl"]


def test_ucl_after_ctkd_leaves_everything_in_its_folder(ucl):
    assert names(ucl) == sorted([*RUN, "best", "scores.jsonl"])
    assert names(ucl / "checkpoints") == ["step-0000003"]
    assert names(ucl / "encoder") == names(ucl / "best") == [
        "ctkd", "embeddings.safetensors", "encoder.json", "ucl"]
    config = json.loads((ucl / "config.json").read_text())
    assert (config["stage"], config["lr"], config["temperature"]) == ("ucl", 0.003, 0.05)
    assert json.loads((ucl / "environment.json").read_text())["processes"] == 1
    assert [row["step"] for row in scores(ucl)] == [0, 2, 3]
    for row in scores(ucl):
        assert row.keys() == {"step", "demo-sts", "mean"} and row["mean"] == row["demo-sts"]
        assert -100 < row["mean"] < 100


def test_scl_after_ucl_leaves_everything_in_its_folder(scl):
    assert names(scl) == RUN  # no scores.jsonl, no best: --eval-tasks was not given
    assert names(scl / "checkpoints") == ["step-0000002", "step-0000003"]
    assert names(scl / "encoder") == [
        "ctkd", "embeddings.safetensors", "encoder.json", "scl", "ucl"]


def test_metrics_have_every_step_once_and_are_finite(ucl, scl):
    for out, keys, schedule in ((ucl, 8, 3), (scl, 16, 2000)):
        rows = metrics(out)
        assert [row["step"] for row in rows] == [0, 1, 2]
        for row in rows:
            assert row.keys() == FIELDS and np.isfinite(list(row.values())).all()
            assert row["loss"] > 0 and row["grad_norm"] > 0 and row["masked"] == 0
            assert 0 <= row["accuracy"] <= 1 and 0 <= row["alignment"] <= 4
            assert -8 <= row["uniformity"] <= 0 and 1 <= row["effective_dimension"] <= 7
            assert row["real_tokens"] > 3 * (8 + keys)
        assert [row["learning_rate"] for row in rows] == [
            learning_rate(step, schedule, schedule // 10, 1e-5, 0.003) for step in range(3)]


def test_the_history_names_all_stages_and_their_adapters_are_copied(ctkd, ucl, scl):
    assert history(ctkd) == ["ctkd"] and history(ucl) == ["ctkd", "ucl"]
    assert history(scl) == ["ctkd", "ucl", "scl"]
    first = json.loads((ctkd / "encoder/encoder.json").read_text())
    for out in (ucl, scl):
        about = json.loads((out / "encoder/encoder.json").read_text())
        assert about["base"] == first["base"] and about["history"][0] == first["history"][0]
        assert about["history"][-1] == json.loads((out / "config.json").read_text())
        assert contents(out / "encoder/ctkd") == contents(ctkd / "encoder/ctkd")
    assert contents(scl / "encoder/ucl") == contents(ucl / "encoder/ucl")
    assert contents(scl / "encoder/ucl").keys() == {"adapter_config.json", WEIGHTS}
    assert not same_tensors(scl / "encoder/scl" / WEIGHTS, scl / "encoder/ucl" / WEIGHTS)


def test_memory_tokens_and_table_of_the_earlier_stage_are_frozen(ctkd, ucl, scl):
    name = "encoder/embeddings.safetensors"
    assert load_file(ctkd / name).keys() == {"memory_tokens", "embed_tokens"}
    assert same_tensors(ctkd / name, ucl / name) and same_tensors(ctkd / name, scl / name)
    trained = load_file(scl / "checkpoints/step-0000003/weights.safetensors")
    assert len(trained) == 24 and all("lora_" in key for key in trained)


def test_the_encoder_of_a_run_loads_and_differs_from_the_one_before(ctkd, ucl, scl):
    texts = words(6, 9)
    before, *after = (load_encoder(out / "encoder").encode(texts) for out in (ctkd, ucl, scl))
    for rows in after:
        assert rows.shape == (6, 32) and np.isfinite(rows).all()
        assert np.abs(rows - before).max() > 1e-3
        before = rows
    encoder = load_encoder(scl / "encoder")
    assert encoder.config.template == "{text}" and encoder.config.num_memory_tokens == 2
    assert encoder.encode(texts, document=True) == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize("stage", ["ucl", "scl"])
def test_before_its_first_step_a_stage_has_the_earlier_encoder(stage, ctkd, ucl):
    texts = [*words(6, 9), ""]
    for folder in (ctkd, ucl, ucl / "encoder"):
        config = Config(stage=stage, model=str(folder), max_tokens=40, dtype="float32")
        encoder, earlier = contrastive.new_encoder(config, ALONE)
        expected = load_encoder(folder if folder.name == "encoder" else folder / "encoder")
        assert encoder.training and earlier.name == "encoder"
        assert np.abs(encoder.encode(texts) - expected.encode(texts)).max() <= 1e-5
        assert all("lora_" in name for name, p in encoder.named_parameters() if p.requires_grad)


def test_the_scores_before_the_first_step_are_those_of_the_earlier_encoder(ctkd, ucl):
    expected = evaluate.demo_sts(load_encoder(ctkd / "encoder"))
    assert scores(ucl)[0]["demo-sts"] == pytest.approx(expected, abs=0.01)
    last = evaluate.demo_sts(load_encoder(ucl / "encoder"))
    assert scores(ucl)[-1]["demo-sts"] == pytest.approx(last, abs=0.01)


def test_the_adapter_of_each_stage_starts_from_its_own_draw(ctkd, ucl, tiny):
    """An adapter that began like the merged one of the same seed would repeat its directions."""
    draws = []
    for folder in (tiny, ctkd, ucl):
        encoder, _ = contrastive.new_encoder(
            Config(model=str(folder), max_tokens=40, dtype="float32"), ALONE)
        draws.append(encoder.llama.model["layers"][0].self_attn.q_proj.lora_A.detach().flatten())
    first = pretrain_ctkd.new_encoder(pretrain_ctkd.Config(model=str(tiny), lora_r=16), ALONE)
    draws.append(first.llama.model["layers"][0].self_attn.q_proj.lora_A.detach().flatten())
    cosines = np.corrcoef(torch.stack(draws))
    assert np.abs(cosines - np.eye(4)).max() < 0.2


@pytest.mark.parametrize("stage", ["ucl", "scl"])
def test_the_loss_falls(stage, run, tmp_path):
    flags = ["--steps", 20, "--lr", 0.02, "--micro-tokens", 2000]
    flags += ["--num-texts", 8] if stage == "ucl" else []
    assert run("run", *flags, stage=stage) == 0
    values = losses(tmp_path / "run")
    assert np.mean(values[-4:]) < 0.7 * np.mean(values[:2])


def test_what_a_run_prints(home, ctkd, tmp_path, capsys):
    out, flags = tmp_path / "run", ["--eval-tasks", "demo-sts", "--steps", 2]
    assert run_stage(home, out, "ucl", ctkd, *flags) == 0
    printed = capsys.readouterr().out
    for fragment in [
        f"torch {torch.__version__}, 1 process(es) on cpu, 1 thread(s) each, float32",
        f"model  {ctkd}: ", "; ucl, memory pooling, bidirectional",
        f"data   {home}/texts.txt: 40 texts, ", f"steps  2 of 8 rows -> {out}",
        "embedded STS set (325 pairs)", "before      ctkd ", "ucl         ctkd + ucl ",
        "ucl, best   ctkd + ucl ", f"torchrun contrastive.py --stage scl --model {out} "
        "--triples FOLDER --out FOLDER\n",
    ]:
        assert fragment in printed
    assert "note:" not in printed
    name, *flags = printed.splitlines()[-1].split()[1:]
    assert name == "evaluate.py"
    flags = [flag.replace("sts17", "demo-sts") for flag in flags]
    assert evaluate.main([*flags, "--threads", "1", "--results", str(tmp_path / "results")]) == 0


def test_without_steps_a_run_goes_once_through_the_data(run, tmp_path):
    assert run("run", "--batch-size", 12, "--steps", 0) == 0
    assert len(losses(tmp_path / "run")) == 3  # 40 // 12
    assert run("scl", "--batch-size", 12, "--steps", 0, stage="scl") == 0
    assert len(losses(tmp_path / "scl")) == 2  # 24 // 12


def test_without_steps_single_dataset_goes_once_through_the_full_batches(run, home, tmp_path):
    flags = ["--triples", home / "folder", "--batches", "single-dataset", "--batch-size", 7,
             *LONG]
    assert run("run", *flags, "--steps", 0, stage="scl") == 0
    assert len(losses(tmp_path / "run")) == 20 // 7 + 10 // 7 + 9 // 7


def test_the_best_encoder_is_kept_and_not_the_last(run, tmp_path, monkeypatch):
    values, seen = iter([90.0, 40.0, 70.0, 50.0, 70.0]), []

    def score(encoder, *_):
        tensors = contrastive.trained_of(encoder)
        seen.append({name: p.detach().clone() for name, p in tensors.items()})
        return {"demo-sts": (value := next(values)), "mean": value}

    monkeypatch.setattr(contrastive, "score", score)
    flags = ["--steps", 4, "--eval-tasks", "demo-sts", "--eval-every", 1]
    assert run("run", *flags) == 0
    out = tmp_path / "run"
    assert [row["mean"] for row in scores(out)] == [90.0, 40.0, 70.0, 50.0, 70.0]
    best = load_file(out / "best/ucl" / WEIGHTS)
    assert len(best) == len(seen[0]) == 24
    steps = [step for step, tensors in enumerate(seen) if all(
        torch.equal(tensor, best[f"base_model.model.{name.removeprefix('llama.')}.weight"])
        for name, tensor in tensors.items())]
    assert steps == [2]


# ---------------------------------------------------------------------------------------------
# A stage for the second time
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, folder", [("scl", "scl_2"), ("ucl", "ucl_2")])
def test_a_stage_may_come_again_after_scl(stage, folder, scl, run, tmp_path, capsys):
    assert run("again", stage=stage, model=scl) == 0
    out = tmp_path / "again"
    (note,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("note: ")]
    assert "ctkd, ucl, scl" in note and "merged" in note and f"{stage} trains a new one" in note
    assert history(out) == ["ctkd", "ucl", "scl", folder]
    assert names(out / "encoder") == sorted(
        ["ctkd", "ucl", "scl", folder, "embeddings.safetensors", "encoder.json"])
    for earlier in ("ctkd", "ucl", "scl"):
        assert contents(out / "encoder" / earlier) == contents(scl / "encoder" / earlier)
    moved = load_encoder(out / "encoder").encode(words(4, 9))
    moved -= load_encoder(scl / "encoder").encode(words(4, 9))
    assert np.isfinite(moved).all() and np.abs(moved).max() > 1e-4


def test_a_stage_may_come_a_third_time_and_needs_no_earlier_folder(run, scl, tmp_path, capsys):
    assert run("b", "--steps", 1, stage="scl", model=scl) == 0
    assert run("c", "--steps", 1, stage="scl", model=tmp_path / "b") == 0
    assert history(tmp_path / "c") == ["ctkd", "ucl", "scl", "scl_2", "scl_3"]
    assert "ctkd, ucl, scl, scl_2;" in capsys.readouterr().out
    before = load_encoder(tmp_path / "c/encoder").encode(words(4, 9))
    shutil.rmtree(tmp_path / "b")
    moved = shutil.move(tmp_path / "c/encoder", tmp_path / "elsewhere")
    assert (load_encoder(moved).encode(words(4, 9)) == before).all()


def test_ucl_after_ctkd_and_scl_after_ucl_need_no_note(run, ucl, capsys):
    assert run("a", "--steps", 1) == 0
    assert run("b", "--steps", 1, stage="scl", model=ucl) == 0
    assert "note:" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# From a plain Llama
# ---------------------------------------------------------------------------------------------


def test_fresh_memory_tokens_of_a_plain_llama_are_trained(run, tiny, tmp_path):
    flags = ["--memory-tokens", 3, "--min-lr", 0.003, "--lr", 0.003]
    config = Config(model=str(tiny), memory_tokens=3, dtype="float32", lora_r=4, max_tokens=40)
    encoder, earlier = contrastive.new_encoder(config, ALONE)
    assert earlier is None and encoder.memory_tokens.requires_grad
    before = encoder.memory_tokens.detach()
    base = files(tiny)
    assert run("run", *flags, model=tiny) == 0
    assert history(tmp_path / "run") == ["ucl"] and files(tiny) == base
    stored = load_file(tmp_path / "run/encoder/embeddings.safetensors")
    assert stored.keys() == {"memory_tokens"} and before.shape == (3, 32)
    moved = (stored["memory_tokens"] - before).abs()
    assert (moved.max(dim=1).values > 1e-4).all() and moved.max() < 0.02
    encoder = load_encoder(tmp_path / "run/encoder")
    assert encoder.config.pooling == "memory" and encoder.config.attention == "bidirectional"
    assert np.isfinite(encoder.encode(["A text."])).all()


@pytest.fixture
def repllama(run, tiny, tmp_path):
    """A run of the preset repllama on the tiny Llama."""
    assert run("repllama", "--preset", "repllama", stage="scl", model=tiny) == 0
    return tmp_path / "repllama"


def test_a_preset_with_templates_stores_them_and_reads_texts_in_them(repllama):
    encoder = load_encoder(repllama / "encoder")
    config = encoder.config
    assert (config.pooling, config.attention, config.num_memory_tokens) == ("last", "causal", 0)
    assert config.template == "query: {text}</s>"
    assert config.document_template == "passage: {text}</s>"
    assert history(repllama) == ["scl"]
    texts = ["A model", "", "the embedding of the text " * 30]
    for document, start in ((False, "query: "), (True, "passage: ")):
        prefix = encoder.tokenizer.encode([start])[0].tolist()
        ids, _ = encoder.tokenize(texts, document=document)
        assert [len(i) for i in ids][2] == 40 and len(ids[0]) < 40
        for one in ids:
            assert one[-1] == 2 and list(one).count(2) == 1 and one[0] == 1
            assert one[:4].tolist() == prefix[:4]
        plain = [encoder.tokenizer.encode([f"{start}{text}</s>"])[0] for text in texts[:2]]
        assert [i.tolist() for i in ids[:2]] == [i.tolist() for i in plain]
        rows = encoder.encode(texts, document=document)
        for one, row in zip(ids, rows):
            alone = encoder.embed(torch.tensor(one, dtype=torch.int64), [len(one)])
            assert row == pytest.approx(alone[0].numpy(), abs=1e-5)
    assert np.abs(encoder.encode(texts[:1]) - encoder.encode(texts[:1], document=True)).max() > 0.01


def test_a_batch_is_read_in_the_templates_too(repllama):
    config = Config(**json.loads((repllama / "config.json").read_text()))
    encoder, earlier = contrastive.new_encoder(config, ALONE)
    assert earlier is None
    data = contrastive.open_data(config, encoder, False)
    batch = contrastive.read_batch(encoder, data, config, 0)
    texts = [data[i] for i in batch.rows]
    assert [i.tolist() for i in batch.queries] == [
        i.tolist() for i in encoder.tokenizer.encode([f"query: {t.query}</s>" for t in texts])]
    assert [i.tolist() for i in batch.keys[:8]] == [
        i.tolist() for i in encoder.tokenizer.encode([f"passage: {t.positive}</s>" for t in texts])]
    for row, key in zip(texts, batch.keys[8:], strict=True):
        found = encoder.tokenizer.decode(key)
        assert found in [f"passage: {text}" for text in row.negatives]


def test_documents_are_scored_in_their_template(repllama):
    encoder, method = evaluate.open_model(str(repllama))
    assert method == "last"
    asked = []

    def encode(texts, instruction="", document=False):
        asked.append((instruction, document, len(texts)))
        return encoder.encode(texts, instruction, document)

    task = evaluate.find_task("demo-retrieval")
    evaluate.evaluate_together(task, encode, "", None, ALONE)
    assert asked == [("", False, 76), ("", True, 98)]


# ---------------------------------------------------------------------------------------------
# Files of triples: instructions, negatives, batches
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, template, wanted", [
    ([], INSTRUCTED, [*INSTRUCTIONS["allnli"], "", *INSTRUCTIONS["squad"]]),
    (["--instruction", "Find it"], INSTRUCTED,
     [*INSTRUCTIONS["allnli"], "Find it", *INSTRUCTIONS["squad"]]),
    (["--instruction", "none"], "{text}", [""]),
], ids=["E5", "E5 and another", "none"])
def test_instructions_stand_before_queries_and_in_the_encoders_folder(
    flags, template, wanted, run, home, tmp_path, monkeypatch, capsys
):
    batches, read_batch = [], contrastive.read_batch

    def note(encoder, data, *arguments):
        batches.append((encoder, data, read_batch(encoder, data, *arguments)))
        return batches[-1][-1]

    monkeypatch.setattr(contrastive, "read_batch", note)
    flags = ["--triples", home / "folder", "--batch-size", 18, *LONG, *flags]
    assert run("run", *flags, "--steps", 2, stage="scl") == 0
    encoder = load_encoder(tmp_path / "run/encoder")
    assert encoder.config.template == template and encoder.config.document_template == ""
    instruction = evaluate.instruction_for("scifact", "auto", encoder)
    assert instruction == ("" if template == "{text}" else
                           "Given a scientific claim, retrieve documents that support or refute "
                           "the claim")
    assert np.isfinite(encoder.encode(["A text."], instruction)).all()
    printed, seen = capsys.readouterr().out, set()
    assert all(f"{text}\n" in printed for text in wanted[2:] if len(wanted) > 1)
    for encoder, data, batch in batches:
        for row, query, key in zip(batch.rows, batch.queries, batch.keys):
            triple = data[row]
            text = f"{triple.instruction}:{triple.query}\n" if triple.instruction else triple.query
            seen.add(triple.instruction)
            expected = encoder.tokenizer.encode([text])[0]
            assert query.tolist() == expected.tolist()
            assert encoder.tokenizer.decode(key) == triple.positive
    assert seen == set(wanted)


def test_a_template_without_a_place_for_an_instruction_is_not_replaced(
    run, home, tiny, tmp_path, capsys
):
    flags = ["--triples", home / "folder/squad.jsonl", "--pooling", "last", *LONG,
             "--template", "query: {text}</s>"]
    code = run("run", *flags, stage="scl", model=tiny)
    assert not (tmp_path / "run/encoder").exists()
    error(code, capsys, "query: {text}</s>", "instruction")
    assert run("run", *flags, "--instruction", "none", stage="scl", model=tiny) == 0
    assert load_encoder(tmp_path / "run/encoder").config.template == "query: {text}</s>"


def test_a_template_with_its_own_place_for_an_instruction_is_kept(run, home, tiny, tmp_path):
    template = "Do: {instruction}. Text: {text}"
    flags = ["--triples", home / "folder/squad.jsonl", "--pooling", "last", *LONG]
    assert run("run", *flags, "--template", template, stage="scl", model=tiny) == 0
    assert load_encoder(tmp_path / "run/encoder").config.template == template


@pytest.mark.parametrize("negatives, keys", [(0, 8), (1, 16), (2, 24), (5, 24)])
def test_negatives_of_a_row_are_drawn_from_its_list(negatives, keys, ctkd, home):
    config = Config(stage="scl", model=str(ctkd), triples=str(home / "triples.jsonl"),
                    negatives=negatives, batch_size=8, dtype="float32")
    encoder, _ = contrastive.new_encoder(config, ALONE)
    data, chosen = contrastive.open_data(config, encoder, False), set()
    for step in range(6):
        batch = contrastive.read_batch(encoder, data, config, step)
        again = contrastive.read_batch(encoder, data, config, step)
        assert len(batch.queries) == 8 and len(batch.keys) == keys
        assert batch.excluded.shape == (8, keys) and again.rows == batch.rows
        assert all((a == b).all() for a, b in zip(batch.keys, again.keys, strict=True))
        per_row = min(negatives, 2)
        for j, row in enumerate(batch.rows):
            mine = batch.keys[8 + per_row * j : 8 + per_row * (j + 1)]
            places = [data[row].negatives.index(encoder.tokenizer.decode(ids)) for ids in mine]
            assert len(set(places)) == len(places) == per_row
            chosen.update(places[:1])
    assert chosen == ({0, 1} if negatives else set())


@pytest.mark.parametrize("sizes, batch", [([20, 10, 9], 4), ([7], 2), ([3, 3], 3), ([5, 100], 5),
                                          ([2, 0, 9], 2)])
def test_a_batch_of_one_source_has_rows_of_it_alone(sizes, batch):
    per_epoch, ends = sum(size // batch for size in sizes), np.cumsum(sizes)
    epochs = []
    for epoch in range(3):
        rows, counts = [], [0] * len(sizes)
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            found = one_source_batch(5, step, batch, sizes)
            assert found == one_source_batch(5, step, batch, list(sizes))
            assert len(found) == batch and all(isinstance(row, int) for row in found)
            (source,) = set(np.searchsorted(ends, found, side="right").tolist())
            counts[source] += 1
            rows += found
        assert len(set(rows)) == len(rows) and 0 <= min(rows) and max(rows) < sum(sizes)
        assert counts == [size // batch for size in sizes]
        epochs.append(rows)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [one_source_batch(6, step, batch, sizes) for step in range(per_epoch)] != [
        one_source_batch(5, step, batch, sizes) for step in range(per_epoch)]


def test_a_batch_of_the_one_source_is_the_global_batch():
    for seed, n in ((0, 17), (3, 8)):
        for step in range(9):
            assert one_source_batch(seed, step, 4, [n]) == global_batch(seed, step, 4, n)


@pytest.mark.parametrize("kind", ["mixed", "single-dataset"])
def test_single_dataset_makes_batches_of_one_file_only(kind, run, home, monkeypatch):
    seen, read_batch = [], contrastive.read_batch

    def note(*arguments):
        batch = read_batch(*arguments)
        seen.append(set(np.searchsorted([20, 30, 39], batch.rows, side="right").tolist()))
        return batch

    monkeypatch.setattr(contrastive, "read_batch", note)
    flags = ["--triples", home / "folder", "--batches", kind, "--steps", 4, *LONG]
    assert run("run", *flags, stage="scl") == 0
    if kind == "single-dataset":
        assert all(len(files) == 1 for files in seen)
        assert sorted(source for sources in seen for source in sources) == [0, 0, 1, 2]
    else:
        assert all(len(files) > 1 for files in seen)


def test_the_embedded_data_are_read_by_name(ctkd):
    config = Config(model=str(ctkd), text="demo", num_texts=300, max_tokens=40, dtype="float32")
    encoder, _ = contrastive.new_encoder(config, ALONE)
    ids = contrastive.open_data(config, encoder, False)
    assert len(ids) == 300 and all(1 < len(i) <= 38 and i[0] == 1 for i in ids)
    data = contrastive.open_data(Config(stage="scl", triples="demo"), encoder, False)
    assert data.sha256 == Triples("demo").sha256


# ---------------------------------------------------------------------------------------------
# Interruptions
# ---------------------------------------------------------------------------------------------


def without_speed(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics(out)]


@pytest.mark.parametrize("stage, dtype", [("ucl", "float32"), ("scl", "bfloat16")])
def test_a_stopped_run_goes_on_bit_for_bit(stage, dtype, run, tmp_path, capsys):
    flags = ["--steps", 5, "--dtype", dtype, "--lora-dropout", 0.3, "--attention-dropout", 0.2,
             "--eval-tasks", "demo-sts", "--eval-every", 2]
    assert run("whole", *flags, stage=stage) == 0
    capsys.readouterr()
    with signal_after(2, signal.SIGTERM):
        assert run("parts", *flags, stage=stage) == 143
    assert capsys.readouterr().out.splitlines()[-1] == (
        "stopped by signal 15, saved; go on with the same command and --resume")
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    assert names(parts / "checkpoints") == ["step-0000003"] and not (parts / "encoder").exists()
    assert [row["step"] for row in scores(parts)] == [0, 2]
    assert run("parts", *flags, "--resume", stage=stage) == 0
    assert without_speed(parts) == without_speed(whole) and len(losses(parts)) == 5
    assert scores(parts) == scores(whole)
    assert [row["step"] for row in scores(parts)] == [0, 2, 4, 5]
    last = "checkpoints/step-0000005"
    for name in (f"{last}/weights", f"{last}/optimizer", f"encoder/{stage}/adapter_model",
                 "encoder/embeddings", f"best/{stage}/adapter_model", "best/embeddings",
                 "best/ctkd/adapter_model"):
        assert same_tensors(parts / f"{name}.safetensors", whole / f"{name}.safetensors")
    assert history(parts) == ["ctkd", stage]


def test_best_stays_the_same_over_an_interruption(run, tmp_path, monkeypatch):
    def score(encoder, *_):  # 3, 5, 4, 2, 1: the best encoder is that of step 1
        return {"demo-sts": (value := [3.0, 5.0, 4.0, 2.0, 1.0][len(calls)]), "mean": value}

    flags = ["--steps", 4, "--eval-tasks", "demo-sts", "--eval-every", 1]
    for name in ("whole", "parts"):
        calls = []
        monkeypatch.setattr(contrastive, "score", lambda *a: (score(*a), calls.append(1))[0])
        if name == "whole":
            assert run(name, *flags) == 0
        else:
            with signal_after(1, signal.SIGTERM):
                assert run(name, *flags) == 143
            assert run(name, *flags, "--resume") == 0
        assert [row["mean"] for row in scores(tmp_path / name)] == [3.0, 5.0, 4.0, 2.0, 1.0]
    assert (tmp_path / "parts/scores.jsonl").read_bytes() == (
        tmp_path / "whole/scores.jsonl").read_bytes()
    assert same_tensors(*(tmp_path / name / "best/ucl" / WEIGHTS for name in ("parts", "whole")))
    assert not same_tensors(*(tmp_path / "whole" / name / "ucl" / WEIGHTS
                              for name in ("best", "encoder")))


def test_a_crashed_run_goes_on_from_its_last_checkpoint(run, tmp_path):
    flags = ["--steps", 5, "--save-every", 2, "--eval-tasks", "demo-sts", "--eval-every", 1]
    assert run("run", *flags, stage="scl") == 0
    out = tmp_path / "run"
    wanted, scored = without_speed(out), scores(out)
    kept = shutil.copytree(out / "encoder", tmp_path / "kept")
    best = shutil.copytree(out / "best", tmp_path / "kept-best")
    shutil.rmtree(out / "encoder")  # as if the power had failed in step 4, while saving
    shutil.rmtree(out / "checkpoints/step-0000005")
    for name in ("metrics", "scores"):
        content = (out / f"{name}.jsonl").read_text()
        (out / f"{name}.jsonl").write_text(content[:-20])
    assert run("run", *flags, "--resume", stage="scl") == 0
    assert without_speed(out) == wanted and scores(out) == scored
    for name in ("scl", "ctkd"):
        assert same_tensors(kept / name / WEIGHTS, out / "encoder" / name / WEIGHTS)
        assert same_tensors(best / name / WEIGHTS, out / "best" / name / WEIGHTS)


def test_a_finished_run_that_is_resumed_changes_nothing(run, tmp_path):
    assert run("run") == 0
    before = files(tmp_path)
    assert run("run", "--resume", "--save-every", 7, "--timeout", 9) == 0
    changed = {path.name for path, content in files(tmp_path).items() if before[path] != content}
    assert changed <= {"config.json"}


# ---------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------


def test_two_processes_have_the_losses_of_one_with_dropout(run, home, ctkd, tmp_path):
    flags = ["--steps", 4, "--batch-size", 7, "--micro-tokens", 64, "--lora-dropout", 0.2,
             "--attention-dropout", 0.2, "--eval-tasks", "demo-sts", "--eval-every", 2]
    out = tmp_path / "two"
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2, "contrastive.py",
               "--stage", "scl", "--model", ctkd, "--triples", home / "triples.jsonl",
               "--document-tokens", 40, "--out", out, *FAST, *flags]
    with open(f"{out}.stdout", "w") as stdout, open(f"{out}.stderr", "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)], cwd=ROOT, stdout=stdout, stderr=stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert run("one", *flags, stage="scl") == 0
    assert process.wait(timeout=300) == 0, Path(f"{out}.stderr").read_text()
    one = tmp_path / "one"
    assert losses(out) == pytest.approx(losses(one), rel=1e-5)
    for key in ("step", "learning_rate", "real_tokens", "masked"):
        assert [row[key] for row in metrics(out)] == [row[key] for row in metrics(one)]
    for key in ("accuracy", "alignment", "uniformity", "effective_dimension", "grad_norm"):
        assert [row[key] for row in metrics(out)] == pytest.approx(
            [row[key] for row in metrics(one)], rel=1e-3)
    assert [row["step"] for row in scores(out)] == [0, 2, 4]
    assert [row["mean"] for row in scores(out)] == pytest.approx(
        [row["mean"] for row in scores(one)], abs=0.05)
    printed = Path(f"{out}.stdout").read_text()
    assert "2 process(es) on cpu" in printed and printed.count("; next (") == 1
    assert history(out) == ["ctkd", "scl"]
    difference = load_encoder(out / "encoder").encode(words(5, 9))
    difference -= load_encoder(one / "encoder").encode(words(5, 9))
    assert np.abs(difference).max() < 1e-3


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


def error(code: int, capsys, *fragments) -> str:
    """The one line on stderr of a run that ended with exit code 2; it holds the fragments."""
    printed = capsys.readouterr().err
    assert code == 2 and printed.startswith("error: ") and printed.endswith("\n")
    for fragment in fragments:
        assert str(fragment) in printed
    assert len(printed.splitlines()) == 1
    return printed


@pytest.mark.parametrize("stage, flags, fragments", [
    ("ucl", ["--temperature", 0], ["--temperature 0.0", "above 0"]),
    ("scl", ["--temperature=-0.1"], ["--temperature -0.1", "above 0"]),
    ("ucl", ["--temperature", "nan"], ["--temperature nan", "finite"]),
    ("ucl", ["--micro-tokens", 39], ["--micro-tokens 39", "40 tokens", "raise it", "--max-tokens"]),
    ("scl", ["--document-tokens", 161], ["--micro-tokens 160", "161 tokens", "--document-tokens"]),
    ("ucl", ["--batch-size", 1], ["--batch-size 1", "at least 2"]),
    ("scl", ["--batch-size", 0], ["--batch-size 0", "at least 2"]),
    ("ucl", ["--max-tokens", 9], ["--max-tokens 9", "at least 10"]),
    ("scl", ["--negatives=-1"], ["--negatives -1", "at least 0"]),
    ("ucl", ["--eval-every", 0], ["--eval-every 0", "at least 1"]),
    ("ucl", ["--attention-dropout", 1.0], ["--attention-dropout 1.0", "below 1"]),
    ("ucl", ["--attention-dropout=-0.1"], ["--attention-dropout -0.1", "at least 0"]),
    ("ucl", ["--lr", 1e-9], ["--lr 1e-09", "--min-lr"]),
    ("ucl", ["--triples", "demo"], ["--triples demo", "--stage scl", "--text"]),
    ("ucl", ["--eval-tasks", "demo-sts demo-stss"], ["--eval-tasks", "demo-stss", "demo-sts"]),
    ("scl", ["--eval-tasks", "sts"], ["--eval-tasks", "sts: unknown"]),
])
def test_a_setting_that_no_run_can_have_is_refused(stage, flags, fragments, run, tmp_path, capsys):
    error(run("run", *flags, stage=stage), capsys, *fragments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage, flags, fragments", [
    ("ucl", ["--batch-size", 41], ["texts.txt: 40 rows", "--batch-size 41", "lower it"]),
    ("ucl", ["--num-texts", 7], ["texts.txt: 7 rows", "--batch-size 8", "lower it"]),
    ("scl", ["--batch-size", 25], ["triples.jsonl: 24 rows", "--batch-size 25", "lower it"]),
    ("scl", ["--triples", "HOME/folder", "--batch-size", 10, "--batches", "single-dataset",
             "--instruction", "none"],
     ["squad.jsonl: 9 rows", "--batch-size 10", "lower it"]),
    ("scl", ["--triples", ""], ["needs --triples", ".jsonl", "demo"]),
    ("ucl", ["--text", "nowhere.txt"], ["nowhere.txt: no such file", "--text"]),
    ("ucl", ["--text", "HOME/same.txt"], ["same.txt: all 30 texts are the same", "different"]),
    ("scl", ["--triples", "HOME/none"], ["none: no .jsonl", "put the triples there"]),
    ("scl", ["--triples", "HOME/missing"], ["missing: no such file or folder", "--triples"]),
    ("scl", ["--triples", "HOME/keys.jsonl"], ["keys.jsonl, line 3: has no positive", "a row"]),
    ("scl", ["--triples", "HOME/same.jsonl"], ["same.jsonl: all 9 rows have the same positive"]),
    ("ucl", ["--pooling", "mean"], ["--pooling mean", "ctkd/encoder", "'memory'", "leave it out"]),
    ("ucl", ["--attention", "causal"], ["--attention causal", "'bidirectional'", "leave it out"]),
    ("scl", ["--template", "q: {text}"], ["--template q: {text}", "'{text}'", "leave it out"]),
    ("scl", ["--document-template", "d: {text}"], ["--document-template d:", "leave it out"]),
    ("ucl", ["--memory-tokens", 8], ["--memory-tokens 8", "trained with 2", "leave it out"]),
    ("ucl", ["--model", "HOME/nowhere"], ["HOME/nowhere", "no such folder"]),
    ("ucl", ["--model", "runs/nowhere"], ["--model runs/nowhere", "no encoder there", "the stage "
                                          "before"]),
    ("scl", ["--model", "HOME/folder"], ["folder/config.json: missing"]),
    ("ucl", ["--device", "banana"], ["--device banana", "cpu"]),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else value)
def test_bad_data_or_a_bad_model_is_a_clear_line(
    stage, flags, fragments, run, home, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (home / "same.txt").write_text("one text\n" * 30)
    (home / "none").mkdir(exist_ok=True)
    lines = (home / "triples.jsonl").read_text().splitlines()
    (home / "keys.jsonl").write_text("\n".join([*lines[:2], '{"query": "a"}', *lines[2:]]))
    (home / "same.jsonl").write_text('{"query": "a", "positive": "b"}\n' * 9)
    before = files(home)
    there = [str(value).replace("HOME", str(home)) for value in flags]
    fragments = [fragment.replace("HOME", str(home)) for fragment in fragments]
    error(run("run", *there, stage=stage), capsys, *fragments)
    assert files(home) == before and files(tmp_path) == {}
    assert run("run", "--steps", 1, stage=stage) == 0  # the mended command


@pytest.mark.parametrize("flags, fragments", [
    (["--template", "{text}<eos>"], ["<eos> is no token", "tokenizer.json", "end-of-text"]),
    (["--document-template", "{text}<|end|>"], ["<|end|> is no token", "tokenizer.json"]),
    (["--template", "a text</s>"], ["must contain {text}"]),
    (["--document-template", "</s>"], ["must contain {text}"]),
])
def test_a_template_that_the_tokenizer_cannot_read_is_refused(
    flags, fragments, run, tiny, tmp_path, capsys
):
    error(run("run", "--pooling", "last", *flags, model=tiny), capsys, flags[1], *fragments)
    assert files(tmp_path) == {}


def test_a_limit_without_room_beside_the_memory_tokens_is_refused(run, tiny, tmp_path, capsys):
    flags = ["--memory-tokens", 12, "--document-tokens", 12]
    error(run("run", *flags, stage="scl", model=tiny), capsys, "12 tokens", "12 memory", "raise")


def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(run, tmp_path, capsys):
    assert run("run", "--lr", 1e30, "--steps", 6, "--save-every", 1) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: step 2: the loss (") and "nothing was updated" in message
    assert "Lower --lr" in message and str(tmp_path / "run/checkpoints") in message
    assert len(losses(tmp_path / "run")) == 2 and np.isfinite(losses(tmp_path / "run")).all()
    assert names(tmp_path / "run/checkpoints") == ["step-0000001", "step-0000002"]
    assert not (tmp_path / "run/encoder").exists()


def test_an_encoder_without_its_base_is_one_line_that_names_base(
    run, ctkd, tiny_copy, tmp_path, capsys
):
    copy, lost = shutil.copytree(ctkd, tmp_path / "earlier"), tmp_path / "lost"
    base = json.loads((copy / "encoder/encoder.json").read_text())["base"]
    edit_json(copy / "encoder/encoder.json", base={**base, "name": str(lost)})
    before = files(tmp_path)
    code = run("run", model=copy)
    assert files(tmp_path) == before
    error(code, capsys, copy / "encoder", lost, "--base")
    assert run("run", "--steps", 1, "--base", tiny_copy, model=copy) == 0


def test_an_encoder_of_another_base_is_refused(run, ctkd, tiny_copy, tmp_path, capsys):
    write_llama(tiny_copy, seed=7)
    before = files(tmp_path)
    error(run("run", "--base", tiny_copy), capsys, ctkd / "encoder", "another base", tiny_copy,
          "sha256", "--base")
    assert files(tmp_path) == before


@pytest.mark.parametrize("name, fragments", [
    ("full", ["full: exists and is not an empty folder", "--resume", "--out"]),
    ("file", ["file: exists and is not an empty folder", "--out"]),
    ("file/below", ["below: cannot be written", "--out"]),
])
def test_an_output_folder_that_is_taken_is_refused(name, fragments, run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    for mine in ("full/notes.txt", "file"):
        (tmp_path / mine).write_text("mine")
    error(run(name), capsys, tmp_path / name, *fragments)
    assert files(tmp_path) == {tmp_path / "full/notes.txt": b"mine", tmp_path / "file": b"mine"}


@pytest.fixture
def stopped(run, home, ctkd, tmp_path, capsys):
    """stopped(stage): copies of data and earlier run, and a run on them that ended at step 2."""
    copy = shutil.copytree(ctkd, tmp_path / "earlier")
    shutil.copytree(home / "folder", tmp_path / "folder")
    shutil.copy(home / "texts.txt", tmp_path / "texts.txt")

    def resume(stage: str, *flags, out="run") -> int:
        data = ["--text", tmp_path / "texts.txt"] if stage == "ucl" else [
            "--triples", tmp_path / "folder", *LONG]
        return run(out, *data, *flags, stage=stage, model=copy)

    def make(stage: str):
        with signal_after(1, signal.SIGTERM):
            assert resume(stage) == 143
        capsys.readouterr()
        return resume

    return make


def test_a_resume_with_a_changed_setting_names_it(stopped, tmp_path, capsys):
    resume = stopped("ucl")
    before = files(tmp_path)
    code = resume("ucl", "--temperature", 0.1, "--steps", 4, "--resume")
    error(code, capsys, tmp_path / "run/config.json", "temperature: 0.05 -> 0.1", "steps: 3 -> 4",
          "another --out")
    assert files(tmp_path) == before
    error(resume("ucl", "--resume", out="new"), capsys, "nothing to resume", "leave --resume out")
    assert resume("ucl", "--resume", "--save-every", 1) == 0


@pytest.mark.parametrize("stage, change", [
    ("ucl", "text"), ("scl", "row"), ("scl", "name"), ("ucl", "encoder"), ("scl", "encoder"),
])
def test_a_resume_over_other_data_or_another_encoder_is_refused(
    stage, change, stopped, tmp_path, capsys
):
    resume, folder = stopped(stage), tmp_path / "folder"
    if change == "text":
        with open(tmp_path / "texts.txt", "a") as file:
            file.write("\none more text")
    elif change == "row":
        path = folder / "mine.jsonl"
        path.write_text(path.read_text().replace('"query": "', '"query": "so ', 1))
    elif change == "name":  # its rows get an instruction
        (folder / "mine.jsonl").rename(folder / "nq.jsonl")
    else:
        path = tmp_path / "earlier/encoder/embeddings.safetensors"
        tensors = load_file(path)
        tensors["memory_tokens"][0, 0] += 0.5
        save_file(tensors, path)
    before = files(tmp_path)
    said = "the base of this run changed" if change == "encoder" else "the texts of this run"
    error(resume(stage, "--resume"), capsys, tmp_path / "run/checkpoints", said, "another --out")
    assert files(tmp_path) == before


@pytest.mark.parametrize("stage, folder", [("ucl", "ctkd-demo"), ("scl", "ucl-demo")])
def test_a_run_needs_the_stage_before_it(stage, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = contrastive.main(["--stage", stage, "--device", "cpu", "--threads", "1"])
    error(code, capsys, f"--model runs/{folder}: no encoder there", "pretrain_ctkd.py")
    assert files(tmp_path) == {}


def test_the_run_before_must_have_ended(run, tmp_path, capsys):
    with signal_after(1, signal.SIGTERM):
        assert run("stopped") == 143
    capsys.readouterr()
    error(run("run", stage="scl", model=tmp_path / "stopped"), capsys, tmp_path / "stopped",
          "encoder", "--resume")


def test_the_preset_is_the_stages_demo_unless_a_model_or_a_preset_is_named():
    for flags, preset in (([], "ucl-demo"), (["--stage", "scl"], "scl-demo"),
                          (["--model", "x"], "ucl"), (["--stage", "scl", "--model", "x"], "scl"),
                          (["--preset", "repllama"], "repllama"), (["--preset", "ucl"], "ucl")):
        config = contrastive.parse_arguments(flags)
        expected = Config(**contrastive.PRESETS[preset])
        if "--model" in flags:
            expected.model = "x"
        assert config == expected


def test_as_a_command_bad_input_is_one_line_on_stderr(ctkd, tmp_path):
    command = [sys.executable, ROOT / "contrastive.py", "--stage", "scl", "--model", ctkd,
               "--out", "run", *FAST, "--document-tokens", 40]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True,
                          timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "--triples" in done.stderr
    assert len(done.stderr.splitlines()) == 1
