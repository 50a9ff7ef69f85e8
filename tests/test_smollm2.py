"""data/smollm2, the trained encoder: that it fits its base, and that its card tells the truth."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, SMOLLM2, refused, write_smollm2
from safetensors import safe_open

from model import load_encoder

sys.path.insert(0, str(ROOT / "bench"))
import claims

RECORDS = ROOT / "bench" / "records"
TASKS = {  # the card's names -> the records'
    "STS17 (en-en)": "STS17", "STSBenchmark": "STSBenchmark",
    "Banking77": "Banking77Classification", "bundled retrieval": "demo-retrieval",
    "20 Newsgroups, subject lines (own draws)": "clustering-20newsgroups",
    "MedQuAD, reranking (no MTEB task)": "reranking-medquad",
}


def scores(folder: str, run: str) -> dict[str, float]:
    """The scores of a record."""
    return json.loads((RECORDS / folder / f"{run}.json").read_text())["scores"]


def cell(values: list[float]) -> str:
    """Mean, and deviation if there are several values, as the card has them."""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def test_the_card_has_the_scores_of_the_records():
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in (SMOLLM2 / "README.md").read_text().splitlines() if line.startswith("| ")]
    own = scores("smollm2-32000", "wide-ctkd-0")
    prompt = scores("smollm2", "prompteol-0")
    short = [scores("smollm2", f"ctkd-{seed}") for seed in range(4)]
    expected = [[title, cell([own[name]]), cell([prompt[name]]), cell([s[name] for s in short])]
                for title, name in TASKS.items()]
    expected.append(["mean of these six", *(
        cell([np.mean([found[name] for name in TASKS.values()]) for found in some])
        for some in ([own], [prompt], short))])
    assert rows[1:-1] == expected
    assert rows[-1][:2] == ["SciFact", cell([own["SciFact"]])]
    assert rows[-1][2] == cell([scores("smollm2-32000", "prompteol-0")["SciFact"]])


@pytest.mark.parametrize("title, folder, variant", [
    ("ctkd, 2,400 texts", "smollm2", "ctkd"), ("nll, 2,400 texts", "smollm2", "nll"),
    ("rc, 2,400 texts", "smollm2", "rc"), ("ctkd, 32,000 texts", "smollm2-32000", "ctkd"),
    ("ctkd-window (ours), 2,400 texts", "smollm2", "ctkd-window"),
    ("the same, gradients clipped at 0.5", "smollm2-clip", "ctkd-window"),
    ("ctkd, clipped at 0.5", "smollm2-clip", "ctkd"),
    ("mntp (LLM2Vec", "smollm2-32000", "mntp"), ("stage 2 without", "smollm2-32000", "ucl-none"),
    ("stage 2 after ctkd on 2,400 texts", "smollm2", "ucl-ctkd"),
    ("stage 2 after ctkd on 32,000 texts", "smollm2-32000", "ucl-ctkd"),
    ("stage 2 after mntp", "smollm2-32000", "ucl-mntp"),
])
def test_the_readme_has_the_scores_of_the_records(title, folder, variant):
    lines = (ROOT / "README.md").read_text().splitlines()
    [row] = [line for line in lines if line.startswith(f"| {title}")]
    *_, seeds, mean = [part.strip() for part in row.strip("|").split("|")]
    runs = sorted(path.stem for path in (RECORDS / folder).glob(f"{variant}-[0-9].json"))
    found = [np.mean([scores(folder, run)[name] for name in TASKS.values()]) for run in runs]
    assert seeds.replace(";", ",") == ", ".join(f"{x:.1f}" for x in found)
    assert mean.strip("*") == cell(found)


LONG = "smollm2-32000"


def means(folder: str, variant: str) -> dict[str, float]:
    """Seed -> mean of the six tasks, of the seeds that have a record."""
    runs = sorted(path.stem for path in (RECORDS / folder).glob(f"{variant}-[0-9].json"))
    return {run[-1]: np.mean([scores(folder, run)[name] for name in TASKS.values()])
            for run in runs}


@pytest.mark.parametrize("a, b, said", [
    (("smollm2", "ctkd"), ("smollm2", "prompteol"),
     "{:.1f} points above PromptEOL (95 % interval {:.1f} to {:.1f})"),
    (("smollm2", "ctkd"), ("smollm2", "nll"), "seed by seed +{:.1f} and"),
    (("smollm2", "ctkd"), ("smollm2", "rc"), "and +{:.1f}, neither significant"),
    (("smollm2", "ctkd"), (LONG, "ctkd"), "scores {:.0f} points less, each seed by 6 to 27 (95 % "
     "interval of the three {:.0f} to {:.0f}"),
    ((LONG, "ucl-ctkd"), (LONG, "ctkd"), "it adds {:.1f} points ({:.0f} to {:.0f})"),
    ((LONG, "ucl-ctkd"), (LONG, "ucl-none"), "alone** ({:.1f}, 95 % interval {:.1f} to {:.1f})"),
    ((LONG, "ucl-none"), (LONG, "ucl-mntp"), "{:.1f} points worse than alone ({:.1f} to {:.1f})"),
    (("smollm2", "ctkd-window"), ("smollm2", "ctkd"), "{3:+.1f}, {4:+.1f} and {5:+.1f} points from "
     "ctkd, {0:.1f} on average (95 % interval {1:.1f} to {2:.1f})"),
    (("smollm2-clip", "ctkd-window"), ("smollm2-clip", "ctkd"),
     "{:.1f} above ctkd clipped so ({:.1f} to {:.1f})"),
    (("smollm2-clip", "ctkd-window"), ("smollm2", "ctkd"),
     "{:.1f} above ctkd clipped at 2 ({:.1f} to {:.1f})"),
])
def test_the_readmes_differences_are_those_of_the_records(a, b, said):
    """Paired over the seeds that both have; against an untrained method, over all seeds."""
    x, y = means(*a), means(*b)
    if len(y) == 1:
        y = dict.fromkeys(x, y["0"])
    found = np.array([x[seed] - y[seed] for seed in x if seed in y])
    text = " ".join((ROOT / "README.md").read_text().split())
    assert said.format(*claims.student(found)[:3], *found) in text


def test_it_is_small_and_holds_no_name_of_a_machine():
    files = [path for path in SMOLLM2.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    with safe_open(SMOLLM2 / "ctkd/adapter_model.safetensors", "pt") as adapter:
        assert {adapter.get_slice(key).get_dtype() for key in adapter.keys()} == {"BF16"}
    for path in files:
        if path.suffix == ".json":
            assert not re.search(r'"/|\\\\|~', path.read_text()), path


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another base of the same shape."""
    return write_smollm2(tmp_path_factory.mktemp("smollm2"))


def test_another_copy_of_its_base_has_to_be_asked_for(other, capsys):
    """Token 0 comes first there, too."""
    refused(lambda: load_encoder(SMOLLM2, base=str(other), dtype=torch.bfloat16),
            "was trained on another base", "--other-base")
    encoder = load_encoder(SMOLLM2, base=str(other), dtype=torch.bfloat16, other_base=True)
    assert "another base than it was trained on" in capsys.readouterr().out
    assert [ids[0] for ids in encoder.tokenize(["A bird sings."]).ids] == [0]
    found = encoder.encode(["A bird sings.", ""])
    assert found.shape == (2, 576) and np.isfinite(found).all()
    assert encoder.config.num_memory_tokens == 1 and encoder.config.attention == "causal"
