"""bench/: every script runs in its tiny shape and prints its table; what the harness refuses."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, run_of, write_llama, write_tokenizer
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import contrastive
import evaluate
import mine
import pretrain_ctkd as stage1
from data.tokenizer import Tokenizer
from model import load_llama
from runtime.errors import UserError

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import domain
import estimate
import harness
import plot
import smollm2
import validation

TRANSFORMERS = ("transformers",)
PEFT = ("transformers", "peft")
SENTENCES = ("sentence_transformers", "transformers")
SCRIPTS = {  # script and flags -> label of a row -> the packages that it needs
    "time_ctkd.py --shape tiny --dtype float32 --warm-up 0 --batch 2 --lengths 30 40": {
        "ours": (), "official": PEFT, "good": PEFT},
    "time_scl.py --shape tiny --warm-up 0 --rows 2 --queries 30 30 --documents 30 30 "
    "--mini-batch 2": {
        "ours": (), "one-micro-batch": (),
        "sentence-transformers, 2 texts": (*SENTENCES, "peft")},
    "time_encode.py --shape tiny --texts 4 --lengths 20 40": {
        "ours": (), "sentence-transformers": SENTENCES, "transformers": TRANSFORMERS},
    "time_scoring.py --dims 16 --documents 50 --queries 5": {
        "ours": (), "mteb": ("mteb", "pytrec_eval")},
    "scaling.py --shape tiny --dtype float32 --axes processes --values 1 2 --warm-up 0 "
    "--length 24 --batch 2 --neighbour": {"1": (), "2": ()},
    "scaling.py --shape tiny --dtype float32 --axes length --values 24 --tokens 48 --warm-up 0": {
        "training step": (), "encoding pass": ()},
}


@pytest.mark.parametrize("command, rows", list(SCRIPTS.items()), ids=lambda x: str(x).split()[0])
def test_every_script_runs_and_prints_its_table(command, rows, tmp_path):
    script, *flags = command.split()
    if script == "scaling.py" and find_spec("matplotlib"):
        flags += ["--figure", str(tmp_path / "scaling.svg")]
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, BENCH / script, *flags, "--turns", "1", "--threads", "1", "--out", out],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in done.stdout.splitlines() if line.startswith("|")]
    there = {label for label, packages in rows.items() if all(map(find_spec, packages))}
    assert there <= {cell for line in lines for cell in line[:2]}
    assert len({len(line) for line in lines}) == 1 and "s, median (min-max)" in lines[0]
    assert "--figure" not in flags or "<svg" in (tmp_path / "scaling.svg").read_text()
    content = json.loads(out.read_text())
    assert content["device"] and content["versions"]["torch"]
    assert content["freed_memory_kept_by"] == "all" and content["arguments"]["turns"] == 1


def test_mining_is_measured(tmp_path, capsys):
    """On a million fewer texts, and on data of which all that is relevant is known."""
    import mining

    assert mining.main(["search", "--documents", "50", "--queries", "3", "--dim", "4"]) == 0
    assert "| 50 | 4 | 0.00 | 3 | " in capsys.readouterr().out
    texts = [f"{word} card {n}" for word in ("a lost", "my new") for n in range(4)]
    files = {"banking77/train.jsonl": [{"text": t, "label": t[0]} for t in texts],
             "scifact/corpus.jsonl": [{"_id": t, "title": "", "text": t} for t in texts],
             "scifact/queries.jsonl": [{"_id": str(i), "text": f"card {i}"} for i in range(4)],
             "scifact/qrels/train.jsonl": [{"query-id": str(i), "corpus-id": t, "score": 1}
                                           for i in range(4) for t in texts[i : i + 3]]}
    for name, rows in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task, negatives, false, of in (("banking77", 6, 8 * 2, 8 * 6), ("scifact", 7, 8, 28)):
        assert mining.main(["judged", "--task", task, "--data-dir", str(tmp_path), "--margins",
                            "0", "--negatives", str(negatives)]) == 0
        said = capsys.readouterr().out  # all that is hidden is mined
        assert f" {false} hidden relevant ones" in said
        assert f"| {of} | {false} | {false / of:.2%} |" in said


def test_gguf_rows_of_neighbours_become_halves():
    """Row 2 i + j of a head in the file is row i + j * size / 2 in model.rotate's order."""
    rows = np.arange(2 * 6)[:, None] * np.ones((1, 3))  # two heads of six rows
    found = smollm2.halves(rows, 2)[:, 0].tolist()
    assert found == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_a_gguf_becomes_the_llama_that_it_was_made_from(tmp_path, monkeypatch):
    """Written here as llama.cpp names and orders it, but for the 4 bits."""
    base = write_llama(tmp_path / "base", tie_word_embeddings=True, dtype=torch.bfloat16)
    write_tokenizer(base)
    model = json.loads((base / "tokenizer.json").read_text())["model"]
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}
    names = {hub: gguf for gguf, hub in (smollm2.PLACES | smollm2.OUTSIDE).items()}
    tensors = []
    for name, tensor in load_file(base / "model.safetensors").items():
        x, block = tensor.float().numpy(), ""
        place = name.removeprefix("model.").removesuffix(".weight")
        if place.startswith("layers."):
            _, layer, place = place.split(".", 2)
            block = f"blk.{layer}."
        if place in heads:  # from half a head apart to neighbours
            x = x.reshape(heads[place], 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        name = f"{block}{names[place]}.weight"
        tensors.append(SimpleNamespace(name=name, data=x, tensor_type=0))
    contents = {
        "tokenizer.ggml.tokens": sorted(model["vocab"], key=model["vocab"].get),
        "tokenizer.ggml.token_type": [smollm2.CONTROL] * 3 + [1] * 317,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.embedding_length": 32, "llama.feed_forward_length": 48, "llama.block_count": 2,
        "llama.context_length": 256, "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5)}
    fields = {key: SimpleNamespace(contents=lambda value=value: value)
              for key, value in contents.items()}
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace(
        GGUFReader=lambda _: SimpleNamespace(tensors=tensors, fields=fields),
        dequantize=lambda data, _: data))
    monkeypatch.setattr(smollm2, "fetch", lambda folder: folder)
    assert smollm2.main([str(tmp_path / "out")]) == 0
    assert smollm2.main([str(tmp_path / "out")]) == 2  # never over a folder
    ours, theirs = load_llama(tmp_path / "out"), load_llama(base)
    expected = dict(theirs.named_parameters())
    assert all(torch.equal(p, expected.pop(name)) for name, p in ours.named_parameters())
    assert not expected and ours.config == replace(theirs.config, bos_token_id=0)
    a, b = (Tokenizer(folder, 320, 0).encode(["the quick </s> fox"])[0].tolist()
            for folder in (tmp_path / "out", base))
    assert (a[0], b[0]) == (0, 1) and a[1:] == b[1:]


def test_validation_tasks_have_no_text_of_a_test_set_and_none_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "QUERIES", 3)
    files = {
        "stsbenchmark-sts/validation.jsonl": [
            {"sentence1": f"a {i}", "sentence2": f"b {i}", "score": i % 6} for i in range(4)],
        "banking77/train.jsonl": [{"text": f"card {i}", "label": i % 3} for i in range(43)],
        "scifact/corpus.jsonl": [{"_id": str(i), "title": "", "text": f"paper {i}"}
                                 for i in range(60)],
        "scifact/queries.jsonl": [{"_id": f"q{i}", "text": f"claim {i}"} for i in range(5)],
        "scifact/qrels/train.jsonl": [{"query-id": f"q{i}", "corpus-id": str(10 * i), "score": 1}
                                      for i in (4, 0, 2, 1)]}
    for name, rows in files.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--out", str(tmp_path / "out"), "--data-dir", str(tmp_path / "data")]
    assert validation.main(command) == 0 and validation.main(command) == 2  # never over a folder

    def written(name):
        return [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]

    assert written("stsbenchmark-validation/test.jsonl") == files[
        "stsbenchmark-sts/validation.jsonl"]
    test, train = ([row["text"] for row in written(f"banking77-validation/{part}.jsonl")]
                   for part in ("test", "train"))
    assert test == [f"card {i}" for i in range(0, 43, 10)]
    assert len(train) == 10 and not set(test) & set(train)
    judged = written("scifact-validation/qrels/test.jsonl")
    assert [row["query-id"] for row in judged] == ["q4", "q0", "q2"]  # the first that are judged
    assert [row["_id"] for row in written("scifact-validation/queries.jsonl")] == ["q0", "q2", "q4"]
    ids = [row["_id"] for row in written("scifact-validation/corpus.jsonl")]
    assert ids[:3] == ["0", "20", "40"] and len(ids) == len(set(ids)) == 3 + 5
    kinds = [["--task-dir", str(tmp_path / "out" / name), "--kind", kind]
             for name, kind in validation.KINDS.items()]
    for kind in kinds:  # evaluate.py reads them
        assert evaluate.read_task(next(iter(evaluate.chosen_tasks(
            evaluate.parse_arguments(kind)).values())))


def step(loss, norm=1.0):
    return {"loss": loss, "norm": norm}


def test_a_domain_goes_from_rows_to_a_table_of_negatives(tmp_path, monkeypatch, capsys):
    """No topic of the test is trained on; every command is one that its script takes; each kind of
    negatives is mined by the kind before and trained from stage 2; nothing is made twice."""
    rows = [{"query": f"what {side} is topic {t} ?", "positive": f"topic {t} {side}",
             "negative": f"topic {t} {'a' if side == 'b' else 'b'}"}
            for t in range(12) for side in "ab"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--rows", str(tmp_path / "rows.jsonl"), "--base", "demo", "--queries", "5", "--pairs",
             "10", "--documents", "17", "--out", str(tmp_path / "out"), "--seeds", "3"]
    calls = []

    def call(script, *command):
        command = [str(part) for part in command]
        calls.append((script, command))
        given = dict(zip(command, command[1:]))
        {"pretrain_ctkd.py": stage1.parse_arguments, "contrastive.py": contrastive.parse_arguments,
         "mine.py": mine.parse_arguments, "evaluate.py": evaluate.parse_arguments}[script](command)
        if script == "evaluate.py":
            path = Path(given["--results"]) / domain.label_of(
                given["--model"], given.get("--method", "memory")) / "test.json"
            found = {"task_name": "test", "notes": [], "settings": {}, "evaluation_time": 1.0,
                     "scores": {"test": [{"main_score": len(calls) / 1000}]}}
        else:
            path, found = Path(given["--out"]), {}
            path = path if path.suffix else path / "encoder/encoder.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))

    monkeypatch.setattr(domain, "call", call)
    assert domain.main(flags) == 0
    data = tmp_path / "out/data"
    pairs, corpus, queries, judged, documents = (
        [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        for name in ("pairs", "test/corpus", "test/queries", "test/qrels/test", "documents"))
    assert len(pairs) == 10 and len(queries) == len(judged) == 5 and len(documents) == 17
    topics = [{row[key].split()[place] for row in some} for some, key, place in (
        (pairs, "positive", 1), (queries, "text", 4))]
    assert not topics[0] & topics[1]
    texts = {row["_id"]: row["text"] for row in corpus + queries}
    assert {(texts[row["query-id"]], texts[row["corpus-id"]]) for row in judged} < {
        (row["query"], row["positive"]) for row in rows}
    assert {row["text"] for row in corpus} <= {row["text"] for row in documents}
    made = [(script, dict(zip(command, command[1:]))) for script, command in calls]
    stage_3 = [given for _, given in made if given.get("--stage") == "scl"]
    mined = [given for script, given in made if script == "mine.py"]
    name = lambda given, key: Path(given[key]).name  # noqa: E731
    assert [name(given, "--model") for given in stage_3] == ["ucl"] * 3
    assert [name(given, "--triples") for given in stage_3] == [
        "pairs.jsonl", "mined-3.jsonl", "mined-twice-3.jsonl"]
    assert [(name(given, "--model"), name(given, "--out")) for given in mined] == [
        ("static-3", "mined-3.jsonl"), ("mined-3", "mined-twice-3.jsonl")]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + 2 + 2 + 3 and table[1].startswith("| untrained, weighted-mean | 0.1 |")
    before = len(calls)
    assert domain.main(flags) == 0 and len(calls) == before
    assert domain.main([*flags, "--steps", "7"]) == 2 and len(calls) == before
    assert "--steps 7: " in (line := capsys.readouterr().err) and "was begun with 50" in line
    again = [*flags, "--out", str(tmp_path / "more"), "--pairs", "90"]
    assert domain.main(again) == 2
    assert "of 12 topics are left for training; lower --queries or" in capsys.readouterr().err


def test_what_does_not_compute_the_same_is_not_timed(capsys):
    tolerances = {"loss": 1e-3, "norm": 1e-2}
    harness.check_losses({"ours": step(1.0), "other": step(1.0009, 0.991)}, tolerances)
    for other in (step(1.002), step(1.0, 1.02), step(float("nan")), step(1.0, float("inf"))):
        with pytest.raises(harness.UserError, match="other: .*do not compute the same"):
            harness.check_losses({"ours": step(1.0), "other": other}, tolerances)
    near_zero = {"ours": step(1e-4), "other": step(5e-3, 1.009)}
    harness.check_losses(near_zero, tolerances, absolute=1e-2)
    for first, absolute in ((near_zero, 1e-3), ({"ours": step(1.0), "other": step(1.0, 1.02)}, 1.0),
                            ({"ours": step(1.0), "other": step(float("nan"))}, 1.0)):
        with pytest.raises(harness.UserError, match="do not compute the same"):
            harness.check_losses(first, tolerances, absolute)


def test_warm_up_is_not_counted_and_the_fastest_threads_are():
    turns = {1: [9.0, 3.0, 5.0, 4.0], 2: [9.0, 1.0, 8.0, 2.0]}
    answers = {threads: [{"seconds": s, "peak_bytes": threads * harness.GIB} for s in seconds]
               for threads, seconds in turns.items()}
    found = harness.Timing({"imported_bytes": harness.GIB}, {}, answers, warm_up=1)
    assert (found.threads, found.median, found.seconds) == (2, 2.0, [1.0, 8.0, 2.0])
    assert found.cells(found) == ["2 (1-8)", "1.00", "2.00 (1.00)"]
    slower = harness.Timing({"imported_bytes": harness.GIB}, {}, {
        1: [{"seconds": 6.0, "peak_bytes": harness.GIB}] * 2}, warm_up=1)
    assert slower.cells(found)[1] == "3.00" and found.cells(slower)[1] == "0.33"


def test_what_is_not_installed_is_left_out(capsys):
    class Missing(harness.Implementation):
        imports = ("json", "no_such_package.part")

    kinds = {"ours": harness.Implementation, "theirs": Missing}
    assert list(harness.installed(kinds)) == ["ours"]
    assert capsys.readouterr().out == "left out: theirs, no_such_package is not installed\n"


def test_weights_depend_on_their_names_alone():
    llama = harness.random_llama(harness.SHAPES["tiny"], "float32", "cpu")
    again = dict(harness.random_llama(harness.SHAPES["tiny"], "float32", "cpu").named_parameters())
    drawn = [p for p in llama.parameters() if p.dim() > 1]
    assert all(p.equal(again[name]) for name, p in llama.named_parameters())
    assert all(not a.equal(b) for a, b in zip(drawn, drawn[1:]) if a.shape == b.shape)


def test_the_estimate_counts_the_products_and_weights_of_the_model(tmp_path):
    """Beside torch's own count, which has the adapters' small products, and lacks what the last
    layer leaves out."""
    config = stage1.parse_arguments(["--dtype", "float32", "--lora-dropout", "0"])
    encoder, shape = stage1.new_encoder(config, run_of(config)), estimate.BASES["7m"]
    adapters = sum(p.numel() for name, p in encoder.named_parameters() if "lora_" in name)
    assert estimate.adapters(shape) == adapters
    ids = [np.arange(1, 57, dtype=np.int32)] * 8
    batch = stage1.SplitBatch(ids, [28] * 8, [*range(8)], [*range(8)], 8, 8 * 56, 8 * 28)
    jobs = {"step": estimate.Job("", 1, 1, 8, 56), "pass": estimate.Job("", 0, 1, 8, 56)}
    for name, job in jobs.items():
        with FlopCounterMode(display=False) as counter:
            if name == "step":
                stage1.OBJECTIVES["ctkd"](encoder, batch, config).backward()
            else:
                encoder.embed(torch.arange(448) % 99, [56] * 8)
        products = sum(n for op, n in counter.get_flop_counts()["Global"].items()
                       if str(op).split(".")[1] in ("mm", "addmm"))
        assert 0.8 < products / estimate.flops(shape, job) < 1.2, name


def test_the_estimate_is_near_what_was_measured_and_stands_on_its_page(capsys):
    assert estimate.main([]) == 0
    printed = capsys.readouterr().out.splitlines()
    page, measured = ((ROOT / f"docs/{n}.md").read_text() for n in ("first-hour", "measured"))
    there = page.splitlines() + measured.splitlines()
    assert [line for line in printed if line not in there] == [] and len(printed) > 20
    cpu = estimate.MACHINES["two CPU cores"]
    for name, job, seconds, gib in estimate.MEASURED:
        assert f"| {seconds} (" in measured and f"| {gib:.2f} (" in measured
        if name != "7m":  # there the calls take most of the time
            shape = estimate.BASES[name]
            assert estimate.seconds(shape, job, cpu) == pytest.approx(seconds, rel=0.1)
            assert estimate.memory(shape, job, cpu) / 2**30 == pytest.approx(gib, rel=0.15)
    assert estimate.measure(estimate.SHAPES["tiny"])[0] > 0


def test_embed_is_measured(tmp_path):
    command = [sys.executable, BENCH / "embedding.py", "--texts", "30", "--kills", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(
        r"^\| 30 \| 0.000 \| \d+ \| .* \| 1, at \d+: same bytes \|$", done.stdout, re.M), done


# ---------------------------------------------------------------------------------------------
# plot.py
# ---------------------------------------------------------------------------------------------


def write_run(folder: Path, seed: int, lr: float, steps=80):
    """The logs of a run."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"seed": seed, "lr": lr, "out": str(folder)}))
    rows = [{"step": i, "loss": 3 - i / 100, "learning_rate": lr} for i in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scores.jsonl").write_text('{"step": 40, "sts17": 50.0, "mean": 55.0}\n')


def test_plot_draws_runs_of_the_same_settings_in_one_color(tmp_path, capsys):
    for i, (seed, lr) in enumerate([(0, 1e-3), (1, 1e-3), (2, 2e-3)]):
        write_run(tmp_path / f"run{i}", seed, lr)
    runs, out = [str(tmp_path / f"run{i}") for i in range(3)], tmp_path / "plot.svg"
    assert plot.main([*runs, "--show", "loss", "sts17", "scores", "--out", str(out)]) == 0
    drawn = out.read_text()
    for text in (*runs, "step", "loss", "mean score x 100"):
        assert text in drawn
    colors = [set(re.findall(r"stroke: (#\w+); stroke-width: 1.5", line))
              for line in drawn.split("<g id=\"axes_")[1:]]
    assert [len(found - {"#000000"}) for found in colors] == [2, 2, 2]  # C0 twice, C1
    points = np.arange(100.0).reshape(50, 2)
    assert np.allclose(plot.smooth(points), points.reshape(10, 5, 2).mean(axis=1))


def test_plot_tells_runs_apart_by_their_start_and_names_each(tmp_path):
    one, two = ({"model": f"runs/{name}", "seed": seed} for seed, name in enumerate(
        ["ctkd-0", "ctkd-1"]))
    assert plot.comparable(one) == plot.comparable(two)
    assert plot.comparable(one) != plot.comparable({"model": "runs/mntp-0", "seed": 0})
    paths = [str(ROOT / f"bench/records/{folder}/ctkd-0.json") for folder in (
        "smollm2", "smollm2-32000")]
    assert plot.main([*paths, "--out", str(tmp_path / "plot.svg")]) == 0
    assert {"ctkd-0", f"ctkd-0 ({paths[1]})"} <= set(labels(tmp_path / "plot.svg"))


def labels(path: Path) -> list[str]:
    """The words in a .svg, in order."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def test_plot_draws_what_collapse_has_found_and_what_a_record_keeps(tmp_path):
    models = [{"model": "runs/a$b", "spectrum": [4.0, 2.0, 1e-9], "cosines": [[1.0, 0.5]] * 2,
               "products": [[3.0, 1.0]] * 2}, {"model": "demo", "spectrum": [1.0, 0.5, 0.1]}]
    path, out = tmp_path / "collapse.json", tmp_path / "plot.svg"
    path.write_text(json.dumps(models))
    read = plot.read(str(path))
    assert read["runs/a$b"][1]["spectrum"] == [(1, 1.0), (2, 0.5)]  # the third is of rounding
    assert "cosines" not in read["demo"][1]
    assert plot.main([str(path), "--out", str(out)]) == 0
    assert {"singular value / first", "index", "mean cosine", "demo"} <= set(labels(out))
    assert labels(out).count("runs/a$b") == 2 and "mean product" not in labels(out)
    record = ROOT / "bench/records/demo/ctkd-0.json"
    settings, found = plot.read(str(record))["ctkd-0"]
    assert settings["objective"] == "ctkd" and "seed" not in settings
    every, mean = (json.loads(record.read_text())["loss"][key] for key in ("every", "mean"))
    steps, losses = zip(*found["loss"])
    assert losses == tuple(mean) and steps[:2] == ((every - 1) / 2, every + (every - 1) / 2)
    for content in ("no", "[1]", '{"collapse": {"spectrum": []}}'):
        path.write_text(content)
        with pytest.raises(UserError, match="neither JSON of collapse.py nor a record"):
            plot.read(str(path))


@pytest.mark.parametrize("flags, line", [
    (["--show", "lsos"], "there are learning_rate, loss, scores, sts17"),
    (["--out", "{folder}/no/plot.svg"], "cannot be written"),
    (["--out", "{folder}/plot.xyz"], "name a .svg, .png or .pdf"),
])
def test_what_plot_refuses(flags, line, tmp_path, capsys):
    write_run(tmp_path / "run", 0, 1e-3)
    flags = [flag.format(folder=tmp_path) for flag in flags]
    assert plot.main([str(tmp_path / "run"), "--out", str(tmp_path / "plot.svg"), *flags]) == 2
    assert line in capsys.readouterr().err
    assert plot.main([str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
    (tmp_path / "run" / "metrics.jsonl").write_text("no\n")
    assert plot.main([str(tmp_path / "run")]) == 2
    assert "metrics.jsonl, line 1" in capsys.readouterr().err
