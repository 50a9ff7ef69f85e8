"""runtime/results.py: the JSON files of evaluate.py, averages, comparisons."""

import importlib.metadata
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import edit_json, error_line, evaluate_main, files, sts17, write_encoder
from helpers import write_task
from safetensors.torch import load_file, save_file

from data.tasks import TASKS
from data.tokenizer import INSTRUCTED
from evaluate import evaluate_task, open_model
from runtime.results import GROUPS, PAPER, PUBLISHED, label_of, mean_of, summary

# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, method, label", [
    ("runs/a/encoder", "memory", "runs__a"), ("runs/a", "memory", "runs__a"),
    ("runs/a/", "memory", "runs__a"), ("./runs/a", "memory", "runs__a"),
    ("demo", "echo", "demo@echo"), ("owner/name", "last", "owner__name@last"),
    ("/tmp/x", "mean", "tmp__x@mean"),
])
def test_the_folder_of_results_is_named_after_model_and_method(model, method, label):
    assert label_of(model, method) == label
    assert label_of(model, method, "none") == f"{label}+none"
    assert label_of(model, method, "Find it") == f"{label}+instruction"


@pytest.mark.parametrize("name", [".", "./", ".."])
def test_a_model_given_as_a_bare_dot_still_gets_a_folder_of_results(name):
    assert label_of(name, "memory") not in ("", ".", "..")


def test_the_json_file_says_what_the_score_depends_on(tiny, here, capsys):
    where = write_encoder(tiny, here / "mine", attention="causal")
    assert sts17("--model", "mine", "--dtype", "bfloat16", "--results", "out") == 0
    printed = capsys.readouterr().out
    result = json.loads((here / "out/mine/STS17.json").read_text())
    settings, (scores,) = result["settings"], result["scores"]["test"]
    encoder, _ = open_model(str(where), dtype=torch.bfloat16)
    expected = evaluate_task("sts17", encoder.encode, here.parent / "data")["main_score"]
    assert scores["main_score"] == scores["cosine_spearman"] == expected
    assert scores["hf_subset"] == "en-en" and result["task_name"] == "STS17"
    about = {"model": "mine", "method": "memory", "pooling": "memory", "num_memory_tokens": 2,
             "attention": "causal", "max_tokens": 64, "template": "{text}", "instruction": "",
             "dtype": "torch.bfloat16", "device": "cpu", "threads": 1, "ranks": 1,
             "history": [{"stage": "ctkd", "seed": 0}],
             "format": 2, "paper": None,
             "paper_differs": "ctkd had memory_tokens=None, the row's is 8",
             "data": str(here.parent / "data/sts17-crosslingual-sts")}
    assert {key: settings[key] for key in about} == about
    assert settings["base"]["name"] == str(tiny) and len(settings["base"]["sha256"]) == 64
    assert len(settings["sha256"]) == 64 and settings["versions"]["torch"] == torch.__version__
    assert settings["versions"]["numpy"] == importlib.metadata.version("numpy")
    assert re.search(rf"sts17 +cosine_spearman +{100 * expected:.2f} ", printed)
    assert "written to out/mine/" in printed


@pytest.mark.parametrize("task, subset, revision", [
    ("sts17", "en-en", TASKS["sts17"]["revision"]),
    ("scifact", "default", TASKS["scifact"]["revision"]),
    ("scidocs", "default", TASKS["scidocs"]["revision"]),
    ("demo-sts", "default", "embedded"),
])
def test_mteb_reads_a_result_file(task, subset, revision, mteb, tiny, here):
    assert evaluate_main("--task", task, "--model", tiny) == 0
    (path,) = here.glob("results/*/*.json")
    ours = json.loads(path.read_text())["scores"]["test"][0]["main_score"]
    result = mteb.results.TaskResult.from_disk(path)
    assert result.get_score() == pytest.approx(ours, abs=1e-9)
    assert result.task_name == path.stem == TASKS[task]["name"]
    assert result.dataset_revision == revision and list(result.scores) == ["test"]
    (scores,) = result.scores["test"]
    assert scores["hf_subset"] == subset and scores["languages"] == ["eng-Latn"]
    assert result.get_score(splits=["test"], languages=["eng"]) == pytest.approx(ours, abs=1e-9)
    assert (subset, result.evaluation_time >= 0) == (result.hf_subsets[0], True)


def test_finished_tasks_are_encoded_again_only_with_force(tiny, here, encoded, capsys):
    assert sts17("--model", tiny) == 0
    first, before = capsys.readouterr().out, files(here)
    assert len(encoded) == 1
    assert evaluate_main("--task", "sts17", "sickr", "--model", tiny) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines() if "cosine_spearman" in line}
    assert "finished before" in lines["sts17"] and "finished before" not in lines["sickr"]
    assert lines["sts17"].split()[:3] == re.search("sts17.*", first)[0].split()[:3]
    assert len(encoded) == 2 and {**files(here), **before} == files(here)
    assert sts17("--model", tiny, "--force") == 0
    assert len(encoded) == 3 and "finished before" not in capsys.readouterr().out


def other_method(here, tiny):
    (first,) = here.glob("results/*")
    shutil.copytree(first, first.with_name(label_of(str(tiny), "last")))
    return ["--model", tiny, "--method", "last"]


def other_weights(here, tiny):
    shutil.rmtree(here / "mine")
    write_encoder(tiny, here / "mine", seed=1)
    return ["--model", "mine"]


def other_base(here, tiny):
    path = here / "llama/model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] += 1
    save_file(weights, path)
    return ["--model", "llama"]


def other_data(here, tiny):
    shutil.copytree(here.parent / "data", here / "data")
    (path,) = (here / "data/sts17-crosslingual-sts").glob("test*")
    path.write_bytes(path.read_bytes().replace(b"A dog runs.", b"A cat runs."))
    return ["--model", tiny, "--data-dir", "data"]


@pytest.mark.parametrize("model, change, said", [
    ("TINY", lambda *_: ["--model", "TINY", "--dtype", "bfloat16"],
     "dtype: 'torch.float32' -> 'torch.bfloat16'"),
    ("TINY", other_method, "method: 'weighted-mean' -> 'last'"),
    ("mine", other_weights, "sha256: "), ("llama", other_base, "the base model"),
    ("TINY", other_data, "the task's files: test"),
])
def test_a_result_made_with_other_settings_is_neither_reused_nor_overwritten(
    model, change, said, tiny, here, encoded, capsys
):
    write_encoder(tiny, here / "mine")
    shutil.copytree(tiny, here / "llama")
    place = {"TINY": str(tiny)}
    assert sts17("--model", place.get(model, model)) == 0
    arguments = [place.get(str(a), str(a)) for a in change(here, tiny)]
    before, calls = files(here), len(encoded)
    capsys.readouterr()
    error_line(sts17(*arguments), capsys, "STS17.json: was made with other settings (", said,
               "--force")
    assert files(here) == before and len(encoded) == calls
    assert sts17(*arguments, "--force") == 0 and len(encoded) == calls + 1


def test_a_result_with_another_instruction_is_not_reused(tiny, here, capsys):
    write_encoder(tiny, here / "mine", template=INSTRUCTED)
    for wanted in ("auto", "none", "Find it"):
        assert sts17("--model", "mine", "--instruction", wanted) == 0
    capsys.readouterr()
    code = sts17("--model", "mine", "--instruction", "Find that")
    error_line(code, capsys, "instruction: 'Find it' -> 'Find that'")
    assert sorted(p.name for p in here.glob("results/*")) == ["mine", "mine+instruction",
                                                             "mine+none"]


def test_a_result_from_before_a_setting_existed_has_its_default(tiny, here, encoded, capsys):
    assert sts17("--model", tiny) == 0
    (path,) = here.glob("results/*/*.json")
    result = json.loads(path.read_text())
    for key in ("document_template", "kept_tokens", "bos"):
        del result["settings"][key]
    path.write_text(json.dumps(result))
    assert sts17("--model", tiny) == 0
    assert len(encoded) == 1 and "finished before" in capsys.readouterr().out


def test_how_special_tokens_are_read_is_part_of_a_score(tiny, here, encoded, capsys):
    """A result from before there was a choice is of an encoder that parsed them."""
    assert sts17("--model", tiny) == 0
    (path,) = here.glob("results/*/*.json")
    assert json.loads(path.read_text())["settings"]["special_tokens"] == "literal"
    capsys.readouterr()
    error_line(sts17("--model", tiny, "--special-tokens", "parsed"), capsys,
               "special_tokens: 'literal' -> 'parsed'", "--force")
    edit_settings(path, drop=["special_tokens"])
    error_line(sts17("--model", tiny), capsys, "special_tokens: 'parsed' -> 'literal'", "--force")
    assert len(encoded) == 1
    assert sts17("--model", tiny, "--special-tokens", "parsed") == 0
    assert len(encoded) == 1 and "finished before" in capsys.readouterr().out


@pytest.fixture
def result_file(tiny, here):
    """The result of an encoder of two memory tokens that reads 64 tokens of a text."""
    write_encoder(tiny, here / "mine")
    assert sts17("--model", "mine") == 0
    return here / "results/mine/STS17.json"


def edit_settings(path: Path, drop=(), **new):
    """Change keys of the settings in a result."""
    result = json.loads(path.read_text())
    settings = {k: v for k, v in result["settings"].items() if k not in drop}
    path.write_text(json.dumps({**result, "settings": {**settings, **new}}))


@pytest.mark.parametrize("max_tokens, same", [(66, True), (64, False), (67, False)])
def test_a_result_of_format_1_counted_the_memory_tokens_in_its_limit(
    max_tokens, same, result_file, encoded, capsys
):
    edit_settings(result_file, drop=["format", "paper_differs"], max_tokens=max_tokens)
    before = result_file.read_text()
    capsys.readouterr()
    code = sts17("--model", "mine")
    if same:
        assert code == 0 and "finished before" in capsys.readouterr().out
    else:
        error_line(code, capsys, f"STS17.json: was made with other settings (max_tokens: "
                                 f"{max_tokens - 2} -> 64)", "--force")
    assert result_file.read_text() == before and encoded == []


def test_a_result_of_an_encoder_from_before_special_tokens_were_letters_stays(
    result_file, encoded, capsys
):
    """It and its result have no such setting; both mean that they are parsed."""
    edit_json(result_file.parents[2] / "mine/encoder.json", drop=["special_tokens"])
    edit_settings(result_file, drop=["special_tokens"])
    assert sts17("--model", "mine") == 0
    assert encoded == [] and "finished before" in capsys.readouterr().out


@pytest.mark.parametrize("k", ["2", None, []])
def test_a_result_of_format_1_with_an_odd_number_of_memory_tokens_is_refused(
    k, result_file, capsys
):
    edit_settings(result_file, drop=["format"], max_tokens=66, num_memory_tokens=k)
    capsys.readouterr()
    error_line(sts17("--model", "mine"), capsys, "STS17.json", "--force")


def test_the_limit_in_a_result_of_format_2_is_taken_as_it_is(result_file, capsys):
    assert json.loads(result_file.read_text())["settings"]["format"] == 2
    edit_settings(result_file, max_tokens=66)
    capsys.readouterr()
    error_line(sts17("--model", "mine"), capsys, "(max_tokens: 66 -> 64)")


@pytest.mark.parametrize("left_out", [["format"], ["format", "num_memory_tokens"]], ids=" ".join)
def test_a_result_of_format_1_of_a_plain_llama_has_the_same_limit(
    left_out, tiny, here, encoded, capsys
):
    assert sts17("--model", tiny) == 0
    (path,) = here.glob("results/*/*.json")
    edit_settings(path, drop=left_out)
    assert sts17("--model", tiny) == 0
    assert len(encoded) == 1 and "finished before" in capsys.readouterr().out


def drop(*keys):
    return lambda result: json.dumps({k: v for k, v in result.items() if k not in keys})


def change(**new):
    return lambda result: json.dumps({**result, **new})


def change_settings(**new):
    return lambda result: json.dumps({**result, "settings": {**result["settings"], **new}})


DAMAGES = {
    "empty": lambda _: "", "not JSON": lambda _: "{", "null": lambda _: "null",
    "a list": lambda _: "[]", "a number": lambda _: "3", "binary": lambda _: "\0",
    "cut off": lambda result: json.dumps(result)[:-40], "no settings": drop("settings"),
    "no scores": drop("scores"), "no notes": drop("notes"), "no time": drop("evaluation_time"),
    "settings a number": change(settings=3), "settings a list": change(settings=[]),
    "settings a text": change(settings="x"), "no split": change(scores={}),
    "an empty split": change(scores={"test": []}), "no main score": change(scores={"test": [{}]}),
    "null for a score": change(scores={"test": [{"main_score": None}]}),
    "a word for a score": change(scores={"test": [{"main_score": "high"}]}),
    "notes a number": change(notes=3), "the task a number": change(task_name=3),
    "a text for a time": change(evaluation_time="1.0"),
    "nan for a time": change(evaluation_time=float("nan")),
    "the base a text": change_settings(base="demo"),
    "the paper's row a list": change_settings(paper=["LT"]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_result_is_reported_and_replaced_with_force(damage, tiny, here, capsys):
    assert sts17("--model", tiny) == 0
    (path,) = here.glob("results/*/*.json")
    whole = path.read_text()
    path.write_text(damage(json.loads(whole)))
    before = files(here)
    capsys.readouterr()
    error_line(sts17("--model", tiny), capsys, f"{path.relative_to(here)}: damaged", "--force")
    assert files(here) == before
    assert sts17("--model", tiny, "--force") == 0
    assert json.loads(path.read_text())["scores"] == json.loads(whole)["scores"]


# ---------------------------------------------------------------------------------------------
# Averages
# ---------------------------------------------------------------------------------------------


def test_a_mean_needs_all_its_tasks():
    assert mean_of({"a": 1.0, "b": 4.0, "c": 9.0}, ["a", "b"]) == 2.5
    assert mean_of({"a": 1.0}, ["a", "b"]) is None


def test_the_summary_averages_each_group_and_the_14():
    scores = {task: float(i) for i, task in enumerate(PAPER)}
    rows = dict(summary(scores))
    assert rows.pop("average (14 tasks)") == pytest.approx(6.5)
    assert rows == {f"{group} ({len(tasks)} tasks)": np.mean([scores[t] for t in tasks])
                    for group, tasks in GROUPS.items()}


def test_the_summary_says_how_many_tasks_are_missing_and_averages_no_incomplete_group():
    some = {"sts17": 80.0, "sickr": 70.0, "stsbenchmark": 60.0, "biorxiv": 20.0, "demo-sts": 5.0}
    assert summary(some) == [("clustering (1 of 3 tasks)", None), ("sts (3 tasks)", 70.0),
                             ("average (4 of 14 tasks)", None)]
    assert summary({"demo-sts": 5.0}) == [] == summary({})
    assert summary({task: 1.0 for task in PAPER[1:]})[-1] == ("average (13 of 14 tasks)", None)


def test_the_average_of_a_published_row_is_the_published_one():
    row = dict(zip(PAPER, PUBLISHED["rows"]["LLM2Comp KL + SCL"]))
    assert dict(summary(row))["average (14 tasks)"] == pytest.approx(66.78, abs=0.02)


def test_the_table_ends_with_group_averages(tiny, here, capsys):
    write_task(here.parent / "data/stsbenchmark-sts", "sts")
    assert evaluate_main("--task", "sts", "--model", tiny) == 0
    printed = capsys.readouterr().out
    scores = [float(re.search(rf"^{name} .*?([\d.-]+) +[\d.]+$", printed, re.M)[1])
              for name in GROUPS["sts"]]
    mean = float(re.search(r"^sts \(3 tasks\) +([\d.-]+)$", printed, re.M)[1])
    assert mean == pytest.approx(np.mean(scores), abs=0.01)
    assert re.search(r"^average \(3 of 14 tasks\) +-$", printed, re.M)


# ---------------------------------------------------------------------------------------------
# Comparisons
# ---------------------------------------------------------------------------------------------


def write_results(where: Path, paper=None, notes=(), **scores):
    """Result files of a run with these main scores x 100."""
    where.mkdir(parents=True)
    for key, score in scores.items():
        name = TASKS[key]["name"] if key in TASKS else key
        result = {"task_name": name, "scores": {"test": [{"main_score": score / 100}]},
                  "evaluation_time": 1.0, "notes": list(notes), "settings": {"paper": paper}}
        (where / f"{name}.json").write_text(json.dumps(result))


def compared(capsys, *names) -> tuple[list[str], dict[str, list[str]]]:
    """The titles of --compare's columns, and the cells of each line of scores."""
    assert evaluate_main("--compare", *names) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    table = lines[: [line.startswith("published rows:") for line in lines].index(True)]
    cells = {line[:26].strip(): line[26:].split() for line in table}
    return re.split(r"\s{2,}", head[26:].strip()), cells


def test_two_runs_are_compared_side_by_side_with_their_difference(here, capsys):
    write_results(here / "results/runs__a", sts17=80, sickr=70.5)
    write_results(here / "results/b@last", sts17=75.25, scifact=30, own=1)
    titles, cells = compared(capsys, "runs/a", "b@last")
    assert titles == ["runs__a", "b@last", "against runs__a"]
    assert cells == {"sts17": ["80.00", "75.25", "-4.75"], "sickr": ["70.50", "-", "-"],
                     "scifact": ["-", "30.00", "-"], "own": ["-", "1.00", "-"],
                     "tasks of the 14": ["2", "2", "1"]}


def test_a_run_is_compared_with_the_papers_row_for_it_and_with_a_named_row(here, capsys):
    row = dict(zip(PAPER, PUBLISHED["rows"]["WMP"]))
    write_results(here / "results/a", "WMP", **{task: row[task] + 1 for task in PAPER})
    titles, cells = compared(capsys, "a", "LLM2Comp KL + SCL")
    assert titles == ["a", "paper: WMP", "difference", "LLM2Comp KL + SCL", "against a"]
    best = dict(zip(PAPER, PUBLISHED["rows"]["LLM2Comp KL + SCL"]))
    for task in PAPER:
        ours, theirs = row[task] + 1, best[task]
        assert cells[task] == [f"{ours:.2f}", f"{row[task]:.2f}", "+1.00", f"{theirs:.2f}",
                               f"{theirs - ours:+.2f}"]
    average = [float(cell) for cell in cells["average (14 tasks)"]]
    assert average[:2] == pytest.approx([41.46, 40.46], abs=0.02) and average[2] == 1
    assert average[3:] == pytest.approx([66.78, 66.78 - 41.46], abs=0.03)
    assert cells["sts (3 tasks)"][2] == "+1.00" and cells["tasks of the 14"] == ["14"] * 5


@pytest.mark.parametrize("history, named", [([], True), ([{"stage": "ctkd"}], False)])
def test_a_trained_encoders_row_in_a_result_of_format_1_is_not_believed(
    history, named, here, capsys
):
    """That format named the row whatever K, attention, start and steps were."""
    write_results(here / "results/a", "LLM2Comp KL", sts17=80)
    edit_settings(here / "results/a/STS17.json", history=history)
    assert ("paper: LLM2Comp KL" in compared(capsys, "a")[0]) is named
    edit_settings(here / "results/a/STS17.json", format=2)
    assert "paper: LLM2Comp KL" in compared(capsys, "a")[0]


def test_a_gap_in_a_published_row_is_a_dash_and_leaves_no_average(here, capsys):
    titles, cells = compared(capsys, "RepLLaMA", "LT")
    assert titles == ["RepLLaMA", "LT", "against RepLLaMA"]
    assert cells["sts17"] == ["-", "57.80", "-"]
    assert cells["scifact"] == ["75.60", "2.17", "-73.43"]
    assert cells["retrieval (3 tasks)"] == ["53.00", "5.91", "-47.09"]
    assert cells["average (14 tasks)"][::2] == ["-", "-"]
    assert float(cells["average (14 tasks)"][1]) == pytest.approx(33.05, abs=0.02)
    assert cells["tasks of the 14"] == ["3", "14", "3"]


def test_a_comparison_ends_with_the_notes_of_the_results(here, capsys):
    write_results(here / "results/a", notes=["4 pairs, the published task has 250"], sts17=80)
    assert evaluate_main("--compare", "a") == 0
    assert capsys.readouterr().out.endswith(
        "note: a, sts17: 4 pairs, the published task has 250\n")


def test_results_can_be_named_by_their_folders_path(here, capsys):
    write_results(here / "elsewhere/a", sts17=80)
    assert compared(capsys, "elsewhere/a") == (["a"], {"sts17": ["80.00"],
                                                       "tasks of the 14": ["1"]})


def test_a_comparison_reads_what_an_evaluation_has_written(tiny, here, capsys):
    assert evaluate_main("--task", "sts17", "sickr", "--model", tiny, "--method", "last") == 0
    capsys.readouterr()
    (where,) = here.glob("results/*")
    titles, cells = compared(capsys, where.name)
    assert titles == [where.name, "paper: LT", "difference"]
    for key, published in (("sts17", 57.8), ("sickr", 55.63)):
        path = where / f"{TASKS[key]['name']}.json"
        score = 100 * json.loads(path.read_text())["scores"]["test"][0]["main_score"]
        assert cells[key] == [f"{score:.2f}", f"{published:.2f}", f"{score - published:+.2f}"]


def test_a_run_is_compared_under_the_name_given_to_model(tiny, here, capsys):
    """The run's own folder has JSON files too."""
    write_encoder(tiny, here / "runs/a/encoder")
    (here / "runs/a/config.json").write_text('{"model": "demo"}')
    assert sts17("--model", "runs/a") == 0
    capsys.readouterr()
    for name in ("runs/a", "runs/a/encoder", "runs__a"):
        assert compared(capsys, name)[0] == ["runs__a"]


@pytest.mark.parametrize("name, near", [
    ("LLM2Comp KL+SCL", "LLM2Comp KL + SCL"), ("runs/a", "runs__a"), ("metaeol", "MetaEOL"),
    ("zzzz", "runs__a"),
])
def test_an_unknown_run_is_refused_with_the_nearest_names(name, near, here, capsys):
    write_results(here / "results/runs__ab", sts17=80)
    code = evaluate_main("--compare", name)
    line = error_line(code, capsys, f"--compare {name}: no results of that name")
    assert near in line.partition("there are ")[2]


def test_json_files_in_a_runs_own_folder_are_not_results(here, capsys):
    (here / "runs/a").mkdir(parents=True)
    (here / "runs/a/config.json").write_text('{"model": "demo"}')
    code = evaluate_main("--compare", "runs/a")
    error_line(code, capsys, "--compare runs/a: no results of that name")


def test_a_damaged_file_is_named_in_a_comparison(here, capsys):
    write_results(here / "results/a", sts17=80)
    for content in ("{", "[]", '{"task_name": "STS17"}', "null"):
        (here / "results/a/STS17.json").write_text(content)
        code = evaluate_main("--compare", "a")
        error_line(code, capsys, "STS17.json: damaged, or not a result of evaluate.py")
