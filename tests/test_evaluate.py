"""Measures against SciPy, tasks from folders and from a hub on the loopback, the command line."""

import gzip
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from test_data import dead_url, hub_environment, hub_file, loopback

import evaluate
from data import UserError
from evaluate import average_ranks, evaluate_task, paired_cosine, spearman
from lora import add_lora
from model import EncoderConfig, plain_encoder, save_encoder

FIELDS = ("sentence1", "sentence2", "score")
ROWS = [
    ("A dog runs.", "A dog is running.", 4.8),
    ("A dog runs.", "The moon is bright.", 0.2),
    ("A dog runs.", "A dog runs.", 5.0),
    ("Two men talk.", "Two women talk.", 2.6),
    ("", "ümläut 漢字", 1),
]

# ---------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------


def cases(count):
    """Pairs of vectors of 2 to 60 values, most with ties, of very unlike sizes."""
    random = np.random.default_rng(0)
    for _ in range(count):
        n, levels = random.integers(2, 60), random.integers(1, 40)
        x, y = random.integers(0, levels, (2, n)) * 10.0 ** random.integers(-9, 9, (2, 1))
        y = y + x * random.integers(-1, 2)
        yield (x, random.standard_normal(n)) if random.random() < 0.2 else (x, y)


def test_spearman_is_scipys_also_with_ties_and_nan_for_a_constant():
    constant = 0
    for x, y in cases(3000):
        ours = spearman(x, y)
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            constant += 1
            assert np.isnan(ours)
        else:
            assert abs(ours - scipy.stats.spearmanr(x, y).statistic) <= 1e-12
    assert 50 < constant < 500


def test_average_ranks_are_scipys():
    for x, _ in cases(1000):
        assert np.array_equal(average_ranks(x), scipy.stats.rankdata(x))


def test_equal_rows_have_the_cosine_one_exactly_and_so_stay_tied():
    random = np.random.default_rng(0)
    rows = random.standard_normal((5000, 33)) * 10.0 ** random.integers(-6, 6, (5000, 1))
    for dtype in (np.float32, np.float64):
        assert (paired_cosine(rows.astype(dtype), rows.astype(dtype)) == 1).all()


def test_paired_cosine_is_the_cosine():
    a, b = np.random.default_rng(0).standard_normal((2, 1000, 33))
    plain = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert np.abs(paired_cosine(a, 7 * b) - plain).max() < 1e-14
    narrow = paired_cosine(a.astype(np.float32), b.astype(np.float32))
    assert np.abs(narrow - plain).max() < 1e-6
    assert paired_cosine(a, -a) == pytest.approx(-1.0)


# ---------------------------------------------------------------------------------------------
# Tasks from a folder
# ---------------------------------------------------------------------------------------------


def jsonl(rows) -> bytes:
    return "".join(json.dumps(dict(zip(FIELDS, row))) + "\n" for row in rows).encode()


def write_task(data_dir: Path, content: bytes, name="test/en-en.jsonl.gz") -> Path:
    path = data_dir / "sts17-crosslingual-sts" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def bag_of_letters(texts: list[str]) -> np.ndarray:
    return np.array([[1 + text.count(chr(c)) for c in range(32, 123)] for text in texts])


@pytest.mark.parametrize("as_list", [False, True], ids=["array", "list"])
@pytest.mark.parametrize("name", ["test/en-en.jsonl.gz", "test/en-en.jsonl"])
def test_a_task_gives_scipys_correlation_of_the_cosines(name, as_list, tmp_path):
    write_task(tmp_path, jsonl(ROWS), name)
    asked = []

    def encode(texts):
        asked.append(texts)
        return bag_of_letters(texts).tolist() if as_list else bag_of_letters(texts)

    scores = evaluate_task("sts17", encode, tmp_path)
    left, right, gold = zip(*ROWS)
    assert asked == [list(left), list(right)]
    a, b = bag_of_letters(left), bag_of_letters(right)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    expected = scipy.stats.spearmanr(cosines, gold).statistic
    assert 0.1 < expected < 1 and scores["main_score"] == pytest.approx(expected, abs=1e-12)
    assert scores["cosine_spearman"] == scores["main_score"]
    assert np.abs(scores["cosines"] - cosines).max() < 1e-6 and scores["gold"].tolist() == [*gold]
    assert (scores["samples"], scores["revision"], scores["task"]) == (5, "local", "sts17")


def test_only_another_number_of_samples_than_published_is_noted(tmp_path, capsys):
    path = write_task(tmp_path, jsonl(ROWS))
    evaluate_task("sts17", bag_of_letters, tmp_path)
    note = f"note: {path} has 5 samples, the published task 250\n"
    assert capsys.readouterr().out == note
    write_task(tmp_path, b"\n" + jsonl(ROWS * 50))
    assert evaluate_task("sts17", bag_of_letters, tmp_path)["samples"] == 250
    assert capsys.readouterr().out == ""


def test_the_embedded_task_needs_no_folder_and_has_its_325_samples(capsys):
    scores = evaluate_task("demo-sts", bag_of_letters)
    assert (scores["samples"], scores["revision"]) == (325, "embedded")
    assert 0.2 < scores["main_score"] < 1 and capsys.readouterr().out == ""


def row(**change):
    """A line of a task's file with fields changed; None leaves a field out."""
    values = {**dict(zip(FIELDS, ROWS[0])), **change}
    return json.dumps({k: v for k, v in values.items() if v is not None}).encode() + b"\n"


@pytest.mark.parametrize("line", [
    row(sentence1=None), row(sentence2=None), row(score=None), row(score="high"), row(score=[1]),
    b'{"sentence1": "a", "sentence2": "b", "score": null}\n', b"{'sentence1': 1}\n",
    b'{"sentence1": "a", "sen\n', b'["a", "b", 3]\n', b"null\n",
])
def test_a_wrong_row_is_named_with_its_line_and_the_fields(line, tmp_path):
    content = jsonl(ROWS[:2]) + line + jsonl(ROWS[2:])
    path = write_task(tmp_path, content, "test/en-en.jsonl")
    with pytest.raises(UserError) as caught:
        evaluate_task("sts17", bag_of_letters, tmp_path)
    assert str(caught.value).startswith(f"{path}, line 3: needs sentence1, sentence2, score")
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", [
    b'{"sentence1": null, "sentence2": "b", "score": 1}\n',
    b'{"sentence1": ["a"], "sentence2": "b", "score": 1}\n',
    row(sentence2=5), row(score=float("nan")), row(score=float("inf")), row(score="nan"),
])
def test_a_value_of_another_kind_is_not_taken_for_text_or_a_score(line, tmp_path):
    path = write_task(tmp_path, jsonl(ROWS[:2]) + line, "test/en-en.jsonl")
    with pytest.raises(UserError, match=f"{path}, line 3: "):
        evaluate_task("sts17", bag_of_letters, tmp_path)


@pytest.mark.parametrize("content, fragment", [
    (b"", "no rows"), (b"\n\n", "no rows"), (b"\xff\xfe\n", "not UTF-8"),
])
def test_a_file_without_rows_is_refused(content, fragment, tmp_path):
    path = write_task(tmp_path, content, "test/en-en.jsonl")
    with pytest.raises(UserError, match=f"{path}.*{fragment}"):
        evaluate_task("sts17", bag_of_letters, tmp_path)


@pytest.mark.parametrize("encode, fragment", [
    (lambda texts: bag_of_letters(texts)[:-1], r"shape \(4, 91\) for 5 texts"),
    (lambda texts: bag_of_letters(texts)[0], r"shape \(91,\) for 5 texts"),
    (lambda texts: bag_of_letters(texts)[None], r"shape \(1, 5, 91\) for 5 texts"),
    (lambda texts: [], r"shape \(0,\) for 5 texts"),
    (lambda texts: np.where(np.arange(5)[:, None] == 2, np.nan, bag_of_letters(texts)),
     "embedding of sentence1 is not finite"),
    (lambda texts: np.full((5, 3), 1e39), "embedding of sentence1 is not finite"),
])
@pytest.mark.filterwarnings("ignore:overflow")
def test_what_an_encode_function_returns_is_checked(encode, fragment, tmp_path):
    write_task(tmp_path, jsonl(ROWS))
    with pytest.raises(UserError, match=fragment):
        evaluate_task("sts17", encode, tmp_path)


def test_a_folder_without_the_task_is_told_with_what_it_must_hold(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError) as caught:
            evaluate_task("sickr", bag_of_letters, folder)
        for fragment in [f"{folder}/sickr-sts", "test.jsonl.gz, test.jsonl", "--data-dir"]:
            assert fragment in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_task_is_told_with_the_known_ones(capsys):
    with pytest.raises(UserError, match="STS17: unknown; one of sts17, .*demo-sts"):
        evaluate_task("STS17", bag_of_letters)
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["--task", "STS17"])
    assert caught.value.code == 2 and "sts17" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Tasks from the hub
# ---------------------------------------------------------------------------------------------


def hub_answers(*missing_names):
    """The hub with sts17 whole, sickr under its second name only, stsbenchmark without revision."""
    answers = {}
    for task in ("sts17", "sickr"):
        about = evaluate.TASKS[task]
        path = f"/datasets/{about['repository']}/resolve/{about['revision']}/"
        answers[path + about["files"][0]] = hub_file(gzip.compress(jsonl(ROWS)), about["revision"])
        answers[path + about["files"][1]] = hub_file(jsonl(ROWS[:4]), about["revision"])
        if task == "sickr":
            del answers[path + about["files"][0]]
    about = evaluate.TASKS["stsbenchmark"]
    for name in about["files"]:
        path = f"/datasets/{about['repository']}/resolve/{about['revision']}/{name}"
        answers[path] = 404, b"", {"X-Error-Code": "RevisionNotFound"}
    return answers


# The hub's client sleeps for 23 seconds in all before it gives up: not here.
COMMANDS = """
import json, sys, time
time.sleep = lambda _: None
import evaluate
for arguments in json.loads(sys.argv[1]):
    print(json.dumps(evaluate.main(arguments)), file=sys.stderr)
"""


def commands(folder: Path, endpoint: str, tiny: Path, *tasks: str) -> list[list[str]]:
    """What evaluate.py writes to stderr for each task, its exit code last, with this hub."""
    arguments = [["--model", str(tiny), "--task", *names.split()] for names in tasks]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(arguments)], capture_output=True, text=True,
        env=hub_environment(folder, endpoint), cwd=folder, timeout=100,
    )
    assert done.returncode == 0, done.stderr
    lines, said = [], []
    for line in re.split("[\r\n]+", done.stderr):
        lines.append(line)
        if line.isdigit():
            said.append(lines)
            lines = []
    assert len(said) == len(tasks)
    return said


def test_a_hub_serves_tasks_at_pinned_revisions_and_what_it_lacks_is_told(tiny, tmp_path):
    with loopback(hub_answers()) as server:
        whole, no_revision = commands(tmp_path, server.url, tiny, "sts17 sickr", "stsbenchmark")
        fetched = [r.rpartition("/")[2] for r in server.requests if r.startswith("GET")]
    no_hub, cached = commands(tmp_path, dead_url(), tiny, "stsbenchmark", "sts17")

    assert whole[-1] == cached[-1] == "0" and fetched == ["en-en.jsonl.gz", "test.jsonl"]
    for task, samples in (("sts17", 5), ("sickr", 4)):
        (path,) = tmp_path.glob(f"results/*/*/{task}.json")
        result = json.loads(path.read_text())
        assert result["revision"] == evaluate.TASKS[task]["revision"]
        assert result["samples"] == samples

    for *_, message, code in (no_revision, no_hub):
        assert code == "2"
        for fragment in ["error: task stsbenchmark", "mteb/stsbenchmark-sts at b0fddb56",
                         "cannot be fetched", "--data-dir FOLDER"]:
            assert fragment in message
    assert "RevisionNotFoundError" in no_revision[-2] and "RevisionNotFound" not in no_hub[-2]
    assert not list(tmp_path.glob("results/*/*/stsbenchmark.json"))


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


def write_encoder(tiny: Path, folder: Path, seed=0, **settings) -> Path:
    """An encoder folder as stage 1 leaves it, its adapters random."""
    encoder = plain_encoder(tiny, EncoderConfig(num_memory_tokens=2, max_tokens=64, **settings))
    random = torch.Generator().manual_seed(seed)
    encoder.add_memory("normal", True, random)
    add_lora(encoder.llama, encoder.lora_config, random)
    encoder.history = [{"stage": "ctkd", "seed": seed}]
    save_encoder(encoder, folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with the task sts17 in data/."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write_task(tmp_path / "data", jsonl(ROWS))
    return tmp_path / "work"


def main(*arguments) -> int:
    flags = ["--task", "sts17", "--data-dir", "../data", "--device", "cpu"]
    return evaluate.main([*flags, *map(str, arguments)])


def test_the_default_model_is_the_encoder_written_last(tiny, here, capsys):
    for i, name in enumerate("cba"):
        folder = write_encoder(tiny, here / "runs" / name / "encoder", seed=i)
        when = 2_000_000_000 - 1000 * abs(i - 1)
        os.utime(folder / "encoder.json", (when, when))
    assert main() == 0
    assert "model   runs/b/encoder  (the newest encoder under runs/)" in capsys.readouterr().out
    (path,) = here.glob("results/**/*.json")
    result = json.loads(path.read_text())
    assert result["model"] == "runs/b/encoder" and result["history"][0]["seed"] == 1


def test_without_a_run_the_default_model_is_the_embedded_llama(here, capsys):
    (here / "runs" / "unfinished").mkdir(parents=True)
    assert main() == 0
    assert "model   demo  (the embedded tiny Llama)" in capsys.readouterr().out
    assert (here / "results/demo/weighted-mean/sts17.json").is_file()


def test_a_runs_folder_stands_for_its_encoder(tiny, here, capsys):
    write_encoder(tiny, here / "mine" / "encoder")
    assert main("--model", "mine") == 0
    (path,) = here.glob("results/**/*.json")
    first = path.read_text()
    path.unlink()
    assert main("--model", "mine/encoder") == 0
    assert json.loads(path.read_text())["main_score"] == json.loads(first)["main_score"]


def test_the_json_file_says_what_the_score_depends_on(tiny, here, capsys):
    folder = write_encoder(tiny, here / "mine", attention="causal")
    assert main("--model", "mine", "--dtype", "bfloat16", "--results", "out") == 0
    printed = capsys.readouterr().out
    result = json.loads((here / "out/mine/memory/sts17.json").read_text())
    encoder = evaluate.open_model(str(folder), dtype=torch.bfloat16)
    expected = evaluate_task("sts17", encoder.encode, here.parent / "data")["main_score"]
    assert result["main_score"] == result["cosine_spearman"] == expected
    about = {"task": "sts17", "samples": 5, "revision": "local", "model": "mine",
             "method": "memory", "num_memory_tokens": 2, "attention": "causal", "max_tokens": 64,
             "template": "{text}", "dtype": "torch.bfloat16", "device": "cpu", "threads": 1,
             "history": [{"stage": "ctkd", "seed": 0}]}
    assert {key: result[key] for key in about} == about
    assert result["base"]["name"] == str(tiny) and len(result["base"]["sha256"]) == 64
    assert result["versions"]["torch"] == torch.__version__
    assert result["versions"]["numpy"] == importlib.metadata.version("numpy")
    assert re.search(rf"sts17 +5 +{100 * expected:.2f} ", printed)
    assert "written to out/mine/memory/" in printed


def test_every_untrained_method_has_its_own_score_and_file(tiny, here):
    for method in evaluate.UNTRAINED:
        assert main("--model", tiny, "--method", method) == 0
    results = [json.loads(p.read_text()) for p in here.glob("results/*/*/sts17.json")]
    assert sorted(r["method"] for r in results) == sorted(evaluate.UNTRAINED)
    assert all(-1 <= r["main_score"] <= 1 and r["history"] == [] for r in results)


@pytest.mark.parametrize("arguments, fragments", [
    (["--model", "mine", "--method", "mean"], ["--method mean", "trained with memory"]),
    (["--model", "TINY", "--method", "memory"], ["--method memory", "plain Llama"]),
    (["--model", "nowhere"], ["nowhere: no such folder"]),
    (["--model", "mine", "--base", "nowhere"], ["base model cannot be loaded", "--base"]),
    (["--model", "mine", "--data-dir", "nowhere"], ["nowhere/sts17", "--data-dir"]),
    (["--model", "mine", "--results", "mine/encoder.json"], ["cannot be written", "--results"]),
])
def test_a_wrong_argument_is_exit_code_2_and_leaves_no_file(
    arguments, fragments, tiny, here, capsys
):
    write_encoder(tiny, here / "mine")
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert main(*[str(tiny) if a == "TINY" else a for a in arguments]) == 2
    message = capsys.readouterr().err.rpartition("\r")[2]  # what follows the progress bar
    assert message.startswith("error: ")
    for fragment in fragments:
        assert fragment in message
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_exit_code_2(tiny, here, capsys):
    assert main("--model", tiny, "--device", "cuda") == 2
    assert "--device cuda" in capsys.readouterr().err


def test_a_score_that_is_not_a_number_is_refused(tiny, here, capsys):
    write_task(here.parent / "data", jsonl([(a, b, 3) for a, b, _ in ROWS]))
    assert main("--model", tiny) == 2
    assert "no rank correlation" in capsys.readouterr().err
    assert not list(here.glob("results/**/*.json"))


def test_a_moved_base_is_found_with_the_flag(tiny, here):
    elsewhere = shutil.copytree(tiny, here / "elsewhere")
    write_encoder(elsewhere, here / "mine")
    elsewhere.rename(here / "moved")
    assert main("--model", "mine") == 2
    assert main("--model", "mine", "--base", "moved") == 0
