"""The README's commands parse, name files that exist, and its table names functions that exist."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_evaluate import demo_tasks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in
         ("README.md", "RESULTS.md", "bench/MEASURED.md", "data/demo/README.md")]


def commands():
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                scripts = [i for i, w in enumerate(words) if w.endswith(".py")]
                if words and words[0] in ("python", "torchrun") and scripts:
                    yield pytest.param(words[scripts[0]], words[scripts[0] + 1 :], id=line)


@pytest.mark.parametrize("script, arguments", list(commands()))
def test_commands_parse(script, arguments, capsys):
    assert (ROOT / script).is_file()
    module = script.removesuffix(".py")
    if module in ("pretrain_ctkd", "contrastive") and "--help" not in arguments:
        stage = importlib.import_module(module)
        stage.check(stage.parse_arguments(arguments))
    elif module == "evaluate":
        evaluate = importlib.import_module(module)
        args = evaluate.parse_arguments(arguments)
        if args.task:
            assert evaluate.chosen_tasks(args)
        elif args.compare:
            assert set(args.compare[1:]) <= set(evaluate.PUBLISHED["rows"])
        else:
            assert args.list or args.task_dir and args.kind
    else:  # the other scripts say in --help which flags they know
        text = subprocess.run([sys.executable, str(ROOT / script), "--help"], check=True,
                              capture_output=True, text=True).stdout
        stage1_help = "--num-texts --steps --text --lr --max-tokens --seed --threads"
        flags = [a for a in arguments if a.startswith("--") and " " not in a]  # no quoted ones
        assert all(flag in text or script.startswith("bench/") and flag in stage1_help
                   for flag in flags)


def test_paper_table_names_things_that_exist():
    table = ROOT.joinpath("README.md").read_text().split("## From the paper")[1].split("\n## ")[0]
    modules = "model|pretrain_ctkd|contrastive|evaluate|collapse"
    names = re.findall(rf"`((?:{modules})\.(?!py)[A-Z_a-z.]+)`", table)
    assert len(names) >= 5
    for name in names:
        value = importlib.import_module(name.partition(".")[0])
        for part in name.split(".")[1:]:
            value = getattr(value, part)


def test_no_placeholder_is_left():
    assert not [page for page in PAGES if "@@" in page.read_text()]


def test_the_python_blocks_run_and_agree(tmp_path, monkeypatch):
    """An untrained encoder, its merged folder read by the README's transformers block, its score by
    the README's mteb block (on an embedded task in place of the one to download)."""
    import torch

    import pretrain_ctkd as stage1
    from evaluate import evaluate_task
    from model import load_encoder, merge, save_encoder
    from training import Ranks

    monkeypatch.chdir(tmp_path)
    config = stage1.parse_arguments(["--dtype", "float32"])
    encoder = stage1.new_encoder(config, Ranks(0, 1, torch.device("cpu")))
    save_encoder(encoder, Path("runs/ctkd-demo/encoder"))
    merge(load_encoder("runs/ctkd-demo/encoder"), "merged")
    blocks = re.findall(r"```python\n(.*?)```", ROOT.joinpath("README.md").read_text(), re.S)
    with_mteb = [block for block in blocks if "import mteb" in block]
    names = {}
    for block in blocks:
        if block not in with_mteb:
            exec(block, names)
    assert (len(blocks), len(with_mteb)) == (4, 1) and names["embeddings"].shape == (2, 256)
    difference = torch.from_numpy(names["embeddings"][0]) - names["embedding"].detach()
    assert difference.abs().max() < 1e-4
    ours = evaluate_task("demo-retrieval", names["encoder"].encode)
    assert names["scores"]["main_score"] == ours["main_score"]

    mteb = pytest.importorskip("mteb")
    task = demo_tasks(mteb)["demo-sts"]
    monkeypatch.setattr(mteb, "get_task", lambda *_, **__: task)
    exec(with_mteb[0], names)
    (scores,) = names["results"].task_results[0].scores["test"]
    ours = evaluate_task("demo-sts", names["encoder"].encode)
    assert scores["main_score"] == pytest.approx(ours["main_score"], abs=1e-6)
