"""Fixtures: tiny random checkpoints, written by transformers, for all tests."""

import os
import random
import shutil
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network; see test_hub.py for the hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored

import numpy as np
import pytest
import torch
import transformers
from helpers import CTKD, FAST, FAST2, STAGES, TEXT, stage1_encoder
from helpers import split_texts, words, write_llama, write_task, write_tokenizer
from helpers import write_triples
from helpers import randomize_adapters, trained_encoder

from data.batches import SplitTexts
from lora import LoraConfig, add_lora, merge_lora
from model import Encoder, load_encoder, save_encoder

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def checkpoint(tmp_path):
    """Make a checkpoint folder: checkpoint(name, tokens=..., template=..., **config settings)."""

    def make(name="llama", tokens=320, template="<s> $A", **settings) -> Path:
        folder = write_llama(tmp_path / name, **settings)
        write_tokenizer(folder, tokens, template)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The checkpoint of TINY with its tokenizer; read only."""
    folder = write_llama(tmp_path_factory.mktemp("session") / "tiny")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_of(tiny, tmp_path_factory):
    """tiny_of(kind): a checkpoint like `tiny` of that model_type; read only. The tokenizers of
    the Qwens have fewer ids than the table has rows, and add no BOS."""
    found = {"llama": tiny}

    def write(kind: str) -> Path:
        if kind not in found:
            found[kind] = write_llama(tmp_path_factory.mktemp("bases") / kind, kind=kind)
            write_tokenizer(found[kind], *((300, None) if "qwen" in kind else ()))
        return found[kind]

    return write


@pytest.fixture
def tiny_copy(tiny, tmp_path) -> Path:
    """A copy of `tiny` that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture(scope="session")
def reference():
    """reference(folder): the same checkpoint in transformers, float32."""

    def load(folder: Path):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.eval()

    return load


@pytest.fixture(scope="module")
def ctkd_encoder() -> Encoder:
    """Stage 1's encoder of the bundled Llama in float64, with adapters whose B is not zero."""
    return stage1_encoder(CTKD)


@pytest.fixture(scope="module")
def id_texts() -> SplitTexts:
    """32 texts of random token ids of the bundled Llama, of unequal lengths."""
    draw = np.random.default_rng(0)
    return split_texts([np.concatenate(([1], draw.integers(3, 8192, n))).astype(np.int32)
                        for n in draw.integers(20, 70, 32)])


# ---------------------------------------------------------------------------------------------
# Runs of the stages
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """The folder of texts and triples for runs, and of the runs ctkd, ucl, scl; read only."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "texts.txt").write_text("\n".join(words(40, 0, 2, 12)))
    write_triples(folder / "triples.jsonl", 24, 1)
    write_triples(folder / "folder/allnli.jsonl", 20, 2)
    write_triples(folder / "folder/mine.jsonl", 10, 3)
    write_triples(folder / "folder/squad.jsonl", 9, 4)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """40 texts of about 75 tokens."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(" ".join(draw.choices(TEXT.split(), k=30)) for _ in range(40)))
    return path


@pytest.fixture(scope="session")
def ctkd(home, tiny) -> Path:
    """A run of stage 1 on the tiny Llama."""
    flags = ["--text", home / "texts.txt", "--steps", 2, "--max-tokens", 40, "--lora-r", 4]
    return quiet_run("ctkd", "--model", tiny, "--out", home / "ctkd", *FAST, *flags)


@pytest.fixture(scope="session")
def ucl(home, ctkd, argv) -> Path:
    """A run of stage 2 after stage 1, with evaluations."""
    flags = ["--eval-tasks", "demo-sts", "--eval-every", 2]
    return quiet_run("ucl", *argv("ucl", home / "ucl", *flags))


@pytest.fixture(scope="session")
def scl(home, ucl, argv) -> Path:
    """A run of stage 3 after stage 2."""
    return quiet_run("scl", *argv("scl", home / "scl", "--model", ucl, "--save-every", 2))


def quiet_run(stage: str, *flags) -> Path:
    """The folder of a complete run without its report, which takes longer than the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(STAGES[stage], "report", lambda *_: None)
        assert STAGES[stage].main(list(map(str, flags))) == 0
    return Path(flags[flags.index("--out") + 1])


@pytest.fixture(scope="session")
def argv(home, ctkd, tiny):
    """argv(stage, out, flags...): a stage's command line on tiny data."""

    def arguments(stage: str, out: Path, *flags) -> list[str]:
        if stage == "ctkd":
            own = ["--model", tiny, "--text", home / "texts.txt", *FAST]
        else:
            data = ["--text", home / "texts.txt"] if stage == "ucl" else [
                "--triples", home / "triples.jsonl", "--document-tokens", 40]
            own = ["--stage", stage, "--model", ctkd, *data, *FAST2]
        return [str(word) for word in (*own, "--out", out, *flags)]

    return arguments


@pytest.fixture
def run(argv, tmp_path, monkeypatch):
    """run(name, flags..., stage=): a stage in this process into tmp_path / name, without its
    report, which takes longer than the run; returns the exit code."""
    for stage in STAGES.values():
        monkeypatch.setattr(stage, "report", lambda *_: None)

    def main(name: str, *flags, stage="ctkd") -> int:
        return STAGES[stage].main(argv(stage, tmp_path / name, *flags))

    return main


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------

TASK_PLACES = {  # folder under --data-dir -> kind
    "sts17-crosslingual-sts": "sts", "sickr-sts": "sts", "scifact": "retrieval",
    "scidocs-reranking": "reranking",
    "sprintduplicatequestions-pairclassification": "pair-classification",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder beside data/ with the tasks of TASK_PLACES."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for place, kind in TASK_PLACES.items():
        write_task(tmp_path / "data" / place, kind)
    return tmp_path / "work"


@pytest.fixture
def encoded(monkeypatch):
    """The (texts, instruction) of every call of Encoder.encode from now on."""
    calls, whole = [], Encoder.encode

    def encode(self, texts, instruction="", **options):
        calls.append((texts, instruction))
        return whole(self, texts, instruction, **options)

    monkeypatch.setattr(Encoder, "encode", encode)
    return calls


@pytest.fixture(scope="session")
def two_stages(tiny, tmp_path_factory) -> tuple[Path, Path, Encoder]:
    """Folders of a first and a second stage (read only), and the second's encoder as trained."""
    root = tmp_path_factory.mktemp("stages")
    save_encoder(trained_encoder(tiny), root / "first")
    encoder = load_encoder(root / "first")
    merge_lora(encoder.llama)
    encoder.lora_config = LoraConfig(r=4, alpha=20, targets=("q_proj", "k_proj", "up_proj"))
    add_lora(encoder.llama, encoder.lora_config)
    randomize_adapters(encoder.llama, 99)
    encoder.history = [{"stage": "ctkd"}, {"stage": "ucl", "steps": 3}]
    save_encoder(encoder, root / "second", earlier=root / "first")
    return root / "first", root / "second", encoder


@pytest.fixture(scope="session")
def mteb():
    """The library mteb; tests that compare with it are skipped without it."""
    return pytest.importorskip("mteb")
