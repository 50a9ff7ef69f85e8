"""export.py: a folder that transformers and sentence-transformers read, with the embeddings."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import yaml
from helpers import ROOT, TEXTS, K, edit_json, embed_with_transformers, error_line, refused
from helpers import trained_encoder
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

import collapse
import contrastive
import export
import pretrain_ctkd
from evaluate import open_model
from export import export_encoder
from model import POOLINGS, EncoderConfig, load_encoder, plain_encoder, save_encoder
from runtime.results import result_of, write_result

sys.path.insert(0, str(ROOT / "bench"))
import mteb_parity

SHORT = TEXTS[:-1]


@pytest.mark.parametrize("kind, tokens", [  # with 300 the tokenizer has fewer ids than the table
    ("llama", 300), ("llama", 320), ("mistral", 320), ("qwen2", 300), ("qwen3", 300),
])
@pytest.mark.parametrize("settings", [
    {}, {"tie_word_embeddings": True}, {"head_dim": 12, "shard": "30KB"},
], ids=["untied", "tied", "sharded, head_dim"])
def test_an_exported_folder_gives_the_same_embeddings_in_transformers(
    tokens, settings, kind, checkpoint, tmp_path
):
    encoder = trained_encoder(checkpoint(tokens=tokens, kind=kind, **settings))
    expected = encoder.encode(SHORT)
    export_encoder(encoder, tmp_path / "exported")
    theirs = embed_with_transformers(tmp_path / "exported", SHORT)
    assert np.abs(theirs - expected).max() <= 1e-4
    assert np.abs(encoder.encode(SHORT) - expected).max() <= 1e-5
    about = json.loads((tmp_path / "exported/config.json").read_text())
    assert (about["model_type"], about["vocab_size"]) == (kind, 320 + K)
    reader = AutoModel.from_pretrained(tmp_path / "exported")
    assert about["architectures"] == [type(reader).__name__] == [f"{kind.capitalize()}Model"]
    names = load_file(tmp_path / "exported/model.safetensors").keys()
    assert len([name for name in names if name.endswith("bias")]) == 6 * (kind == "qwen2")
    assert len([name for name in names if re.search("[qk]_norm", name)]) == 4 * (kind == "qwen3")


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_base_without_the_name_of_its_class_is_exported_under_it(kind, checkpoint, tmp_path):
    folder = checkpoint(kind=kind)
    edit_json(folder / "config.json", drop=["architectures"])
    export_encoder(trained_encoder(folder), tmp_path / "exported")
    about = json.loads((tmp_path / "exported/config.json").read_text())
    assert about["architectures"] == [type(AutoModel.from_pretrained(folder)).__name__]


def test_the_adapters_of_two_stages_are_both_merged(two_stages, tmp_path):
    encoder = load_encoder(two_stages[1])
    expected = encoder.encode(SHORT)
    export_encoder(encoder, tmp_path / "exported")
    assert np.abs(embed_with_transformers(tmp_path / "exported", SHORT) - expected).max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=lambda t: f"base {t}")
def test_transformers_loads_an_exported_folder_in_the_dtype_it_was_written_in(
    stored, dtype, checkpoint, tmp_path
):
    export_encoder(trained_encoder(checkpoint(dtype=stored), dtype=dtype), tmp_path / "exported")
    assert AutoModel.from_pretrained(tmp_path / "exported", dtype="auto").dtype == dtype


@pytest.mark.parametrize("template", [None, "<s> $A </s>", "$A </s>"])
def test_the_exported_tokenizer_puts_bos_first_and_nothing_after_the_memory_tokens(
    template, checkpoint, tmp_path
):
    encoder = trained_encoder(checkpoint(template=template))
    expected = encoder.encode(SHORT)
    export_encoder(encoder, tmp_path / "exported")
    assert np.abs(embed_with_transformers(tmp_path / "exported", SHORT) - expected).max() <= 1e-4


@pytest.mark.parametrize("way", ["literal", "parsed"])
def test_a_reader_reads_special_tokens_as_the_encoder_does(way, tiny, tmp_path):
    texts = ["It writes </s> after each.", "</s>", "<s><unk>", "a text"]
    encoder = trained_encoder(tiny, EncoderConfig(K, max_tokens=64, special_tokens=way))
    encoder.encode(texts[:1])
    expected = encoder.encode(texts)
    export_encoder(encoder, tmp_path / "exported")
    found = [embed_with_transformers(tmp_path / "exported", texts, literal=literal)
             for literal in (None, way != "literal")]
    assert np.abs(found[0] - expected).max() <= 1e-4
    apart = np.abs(found[1] - expected).max(axis=1)
    assert apart[:3].min() > 1e-3 and apart[3] <= 1e-4


@pytest.mark.parametrize("way", ["literal", "parsed"])
def test_a_pad_token_beyond_the_table_is_not_exported(way, checkpoint, tmp_path):
    """The first memory token has its id."""
    folder = checkpoint()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = EncoderConfig(K, max_tokens=64, template="{text}</s>", special_tokens=way)
    encoder = trained_encoder(folder, config)
    encoder.encode(SHORT)  # in a template with a special token, whose stand-in is not exported
    encoder.config = replace(config, template="{text}")
    expected = encoder.encode(SHORT)
    export_encoder(encoder, tmp_path / "exported")
    assert np.abs(embed_with_transformers(tmp_path / "exported", SHORT) - expected).max() <= 1e-4
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "exported/tokenizer.json"))
    assert exported.get_vocab_size() == 320 + K and exported.token_to_id("[PAD]") is None


@pytest.mark.parametrize("taken", ["<memory_2>", "<unused_310>"])
def test_a_tokenizer_that_has_such_a_token_already_is_refused(taken, checkpoint, tmp_path):
    folder = checkpoint(tokens=300)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([taken])
    tokenizer.save(str(folder / "tokenizer.json"))
    encoder = trained_encoder(folder)
    refused(lambda: export_encoder(encoder, tmp_path / "exported"), str(folder), taken, "rename")
    assert not (tmp_path / "exported").exists()


# ---------------------------------------------------------------------------------------------
# sentence-transformers
# ---------------------------------------------------------------------------------------------

INSTRUCTED = "{instruction}:{text}\n"
REPLLAMA = {"template": "query: {text}</s>", "document_template": "passage: {text}</s>"}
NO_MEMORY = {"num_memory_tokens": 0, "attention": "causal"}
ENCODERS = {
    "memory": {}, "causal": {"attention": "causal"}, "kept": {"kept_tokens": (1, 5)},
    "one": {"num_memory_tokens": 1}, "instructed": {"template": INSTRUCTED},
    "instructed, documents": {"template": INSTRUCTED, "document_template": "passage: {text}"},
    "mean": {**NO_MEMORY, "attention": "bidirectional", "pooling": "mean"},
    "weighted mean": {**NO_MEMORY, "pooling": "weighted-mean"},
    "last": {**NO_MEMORY, "pooling": "last"},
    "repllama": {**NO_MEMORY, **REPLLAMA, "pooling": "last"},
}
TOLD = "Find it"


def an_encoder(folder: Path, case: str):
    """An encoder of random adapters of that case; texts longer than 36 tokens are cut."""
    config = EncoderConfig(**{"num_memory_tokens": 8, "max_tokens": 36} | ENCODERS[case])
    return trained_encoder(folder, config, train_table=case != "one")


def embed_with_the_card(folder: Path, texts=None, told="", read=None) -> np.ndarray:
    """The embeddings of the card's snippet for transformers, of its texts or others.

    told: an instruction, as the card says. read: the folder to be read, if it is not the card's.
    """
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[-1]
    [listed] = re.findall(r"^texts = (.*)", code, re.M)
    code = code.replace(f'"{folder.name}"', repr(str(read or folder)))
    code = code.replace(listed, repr(texts) if texts else listed)
    if told:
        [system] = re.findall(r"# instructed: \[(.*?), \.\.\.\]", code)
        code = code.replace('[{"role": "user"', f'[{system}, {{"role": "user"')
        code = code.replace('"Find it"', repr(told))
    found: dict = {}
    exec(code, found)
    return found["embeddings"].numpy()


@pytest.mark.parametrize("case, kind", [
    *((case, "llama") for case in ENCODERS), ("memory", "mistral"), ("instructed", "qwen2"),
    ("instructed", "qwen3"), ("kept", "qwen3"),
])
def test_sentence_transformers_gives_the_same_embeddings(case, kind, tiny_of, tmp_path):
    encoder = an_encoder(tiny_of(kind), case)
    texts = [*TEXTS, "", "a b", "  two\n\nlines ", "<memory_0> is no token"]
    assert any(encoder.tokenize(texts).cut) and not all(encoder.tokenize(texts).cut)
    expected, documents = encoder.encode(texts), encoder.encode(texts, document=True)
    takes = "{instruction}" in encoder.config.template
    told = encoder.encode(texts, TOLD) if takes else None
    snippet = encoder.encode(["A bird sings.", "An owl hunts at night."])
    export_encoder(encoder, tmp_path / "exported")
    reader = SentenceTransformer(str(tmp_path / "exported"), device="cpu")

    def same(theirs, ours):
        return np.abs(theirs - ours).max() <= 1e-5

    assert same(reader.encode(texts), expected)  # one padded batch
    assert same(np.stack([reader.encode([text])[0] for text in texts]), expected)
    assert same(reader.encode_query(texts), expected)
    assert same(reader.encode_document(texts), documents)
    assert not takes or same(reader.encode(texts, prompt=TOLD), told)
    prompts = reader.prompts
    assert takes == ("SciFact-query" in prompts) == ("STS17" in prompts)
    assert "SciFact" not in prompts and not any("STS17-" in name for name in prompts)
    reader.save(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert same(again.encode(texts), expected)
    card = partial(embed_with_the_card, tmp_path / "exported")
    templates = export.is_prompted(encoder)  # transformers cuts what they make at the wrong end
    cut = encoder.tokenize(texts, TOLD * takes).cut
    fit = [i for i in range(len(texts)) if not (templates and cut[i])]
    fitting = [texts[i] for i in fit]
    for folder in (tmp_path / "exported", tmp_path / "again"):
        assert same(card(fitting, read=folder), expected[fit])  # one padded batch
        assert same(np.stack([card([text], read=folder)[0] for text in fitting]), expected[fit])
    assert not takes or same(card(fitting, TOLD), told[fit])
    probe = json.loads((tmp_path / "exported" / "probe.json").read_text())
    assert same(reader.encode(probe["texts"]), np.array(probe["embeddings"]))
    assert same(card(), snippet)


@pytest.mark.parametrize("template", ["{text}", INSTRUCTED])
def test_mteb_scores_the_folder_as_evaluate_scores_the_encoder(template, mteb, tmp_path, capsys):
    """On the bundled tasks, under the names of two of the 14, by which mteb finds the prompts."""
    encoder = plain_encoder("demo", EncoderConfig(template=template))
    encoder.add_memory("normal", False, torch.Generator().manual_seed(5))
    encoder.history = [{"stage": "ctkd"}]
    folder, printed = tmp_path / "exported", []
    (tmp_path / "data").mkdir()
    export_encoder(encoder, folder)
    for name, task in (("sts17-crosslingual-sts", "demo-sts"), ("scifact", "demo-retrieval")):
        (tmp_path / "data" / name).symlink_to(ROOT / "data/demo" / task)

    def rows(*flags, code=0) -> dict[str, list[float]]:
        arguments = [str(folder), "--data-dir", str(tmp_path / "data"), *flags]
        assert mteb_parity.main(arguments) == code
        printed.append(capsys.readouterr())
        found = re.findall(r"^(STS17|SciFact) +([\d. e+-]+)$", printed[-1].out, re.M)
        return {name: list(map(float, cells.split())) for name, cells in found}

    found = rows()
    assert found.keys() == {"STS17", "SciFact"}
    for theirs, ours, apart, embedding in found.values():
        assert apart == pytest.approx(abs(theirs - ours), abs=1e-6) and apart <= 1e-4
        assert 0.05 < ours < 0.95 and embedding <= 2e-6
    assert ("instruction: Retrieve" in printed[0].out) == (template == INSTRUCTED)
    if template == INSTRUCTED:
        assert abs(rows("--task", "sts17", "--instruction", "none")["STS17"][0]
                   - found["STS17"][0]) > 1e-4
    else:
        edit_json(folder / "config.json", is_causal=True)
        rows("--task", "sts17", code=2)
        assert "STS17: mteb and evaluate.py differ" in printed[-1].err
    rows("--task", "banking77", code=2)
    assert "--task banking77" in printed[-1].err


def test_the_memory_tokens_see_what_the_encoder_lets_them(tiny, tmp_path):
    """Without the flag the reader would attend causally: the test above would then fail."""
    encoder = an_encoder(tiny, "memory")
    expected = encoder.encode(SHORT)
    export_encoder(encoder, tmp_path / "exported")
    edit_json(tmp_path / "exported" / "config.json", is_causal=True)
    reader = SentenceTransformer(str(tmp_path / "exported"), device="cpu")
    assert np.abs(reader.encode(SHORT) - expected).max() > 0.01


def test_what_other_tools_cannot_read_is_refused(tiny, checkpoint, tmp_path):
    echo = EncoderConfig(num_memory_tokens=0, pooling="echo", template="{text}\n{text}",
                         attention="causal")
    refused(lambda: export_encoder(plain_encoder(tiny, echo), tmp_path / "out"), "echo", "twice")
    folder = checkpoint()  # one that begins a string, and only that, in a way of its own
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
        vocab_size=100, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    tokenizer.save(str(folder / "tokenizer.json"))
    export_encoder(an_encoder(folder, "memory"), tmp_path / "plain")
    refused(lambda: export_encoder(an_encoder(folder, "instructed"), tmp_path / "out"),
            "tokenizer.json", "behind its control tokens")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module, argv", [
    (pretrain_ctkd, ["--preset", "smollm2", "--text", "my texts.txt", "--bos", "1"]),
    (pretrain_ctkd, ["--objective", "nll", "--recompute", "--text-seed", "-1"]),
    (contrastive, ["--stage", "ucl", "--lr", "3e-5", "--model", "runs/x"]),
    (contrastive, ["--preset", "demo", "--stage", "scl"]),
])
def test_the_card_has_the_commands_that_made_the_encoder(module, argv):
    config = module.parse_arguments(argv)
    stage = argv[argv.index("--stage") + 1] if "--stage" in argv else config.objective
    command = shlex.split(export.command_of({"stage": stage, **asdict(config)}))
    assert command[:2] == ["torchrun", f"{module.__name__}.py"]
    again = module.parse_arguments(command[2:])
    elsewhere = dict.fromkeys(("out", "save_every"), None)
    assert asdict(again) | elsewhere == asdict(config) | elsewhere
    if module is contrastive:  # a second time the same
        stored = {**asdict(config), "stage": f"{stage}_2"}
        assert shlex.split(export.command_of(stored)) == command


def test_the_card_has_the_scores_of_these_weights(two_stages, tmp_path, capsys, monkeypatch):
    encoder = load_encoder(two_stages[1])
    task = {"name": "STS17", "revision": "abc", "subset": "en-en"}
    run = tmp_path / "runs" / "mine"
    shutil.copytree(two_stages[1], run / "encoder")
    adapters, base = encoder.sha256, encoder.base["sha256"]
    for name, weights, llama, score in (
            ("STS17", adapters, base, 0.71), ("SICK-R", "another", base, 0.9),
            ("STSBenchmark", adapters, "another", 0.8)):
        result = result_of({**task, "name": name}, {"main_score": score, "notes": []},
                           {"sha256": weights, "base": {"sha256": llama}}, 1.0)
        write_result(tmp_path / "results" / "runs__mine" / f"{name}.json", result)
    monkeypatch.chdir(tmp_path)
    assert export.main(["runs/mine", "out", "--license", "apache-2.0"]) == 0
    assert "1 score in its card" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| STS17 | 71.00 |" in card and "SICK-R" not in card and "STSB" not in card
    about = yaml.safe_load(card.split("---")[1])
    assert about["license"] == "apache-2.0" and "base_model" not in about  # a folder of ours
    assert Path(encoder.base["name"]).name in card and encoder.base["name"] not in card
    encoder.base["name"] = "owner/name"
    assert "\nbase_model: owner/name\n" in export.card(encoder, "title", "", [])
    [result] = about["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "main_score", "value": 0.71}]
    assert result["dataset"]["config"] == "en-en" and result["dataset"]["name"] == "STS17"


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


def test_ctrl_c_is_a_line_and_leaves_nothing(two_stages, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_tensors", stop)
    assert export.main([str(two_stages[1]), str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "\ninterrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_exports_once_and_then_refuses(two_stages, tmp_path, capsys):
    out = tmp_path / "deep" / "exported"
    arguments = [str(two_stages[1]), str(out)]
    assert export.main(arguments) == 0
    assert str(out) in capsys.readouterr().out
    expected = load_encoder(two_stages[1]).encode(SHORT)
    assert np.abs(embed_with_transformers(out, SHORT) - expected).max() <= 1e-4
    assert export.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(out) in error and "exists" in error
    assert len(error.splitlines()) == 1


def test_the_command_line_reports_what_is_wrong_with_an_encoder(tiny, tmp_path, capsys):
    assert export.main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert export.main([str(tiny), str(tmp_path / "out")]) == 2
    assert "encoder.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_exports_the_files_of_the_function(two_stages, tmp_path):
    expected, found = tmp_path / "expected", tmp_path / "found"
    export_encoder(load_encoder(two_stages[1]), expected)
    arguments = ["export.py", str(two_stages[1].resolve()), str(found)]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=100)
    assert (done.returncode, done.stdout) == (0, f"wrote {found}\n"), done.stderr
    files = {path.relative_to(expected) for path in expected.rglob("*") if path.is_file()}
    assert len(files) == 11 and files == {
        path.relative_to(found) for path in found.rglob("*") if path.is_file()}
    for path in files - {Path("README.md")}:  # which has the folder's name
        assert (expected / path).read_bytes() == (found / path).read_bytes()


# ---------------------------------------------------------------------------------------------
# A folder without a head as a model
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["last", "mean", "weighted-mean"])
@pytest.mark.parametrize("tokens", [300, 320])
def test_an_encoder_without_memory_tokens_is_exported_and_read_again(
    pooling, tokens, checkpoint, tmp_path, capsys
):
    config = EncoderConfig(0, pooling, "causal", max_tokens=64)
    encoder = trained_encoder(checkpoint(tokens=tokens), config, train_table=False)
    expected = encoder.encode(SHORT)
    save_encoder(encoder, tmp_path / "run/encoder")
    assert export.main([str(tmp_path / "run"), str(tmp_path / "plain")]) == 0
    again, method = open_model(str(tmp_path / "plain"), pooling)
    assert method == pooling and np.abs(again.encode(SHORT) - expected).max() <= 1e-5
    assert "wrote" in capsys.readouterr().out


def test_a_pooling_of_ones_own_is_not_exported(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(POOLINGS, "max", lambda h: h.amax(0))
    encoder = trained_encoder(tiny, EncoderConfig(0, "max", "causal"), train_table=False)
    refused(lambda: export_encoder(encoder, tmp_path / "out"), "pooling='max'", "no other tool")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ENCODERS)
def test_the_folder_is_read_here_as_the_encoder_was(case, tiny, tmp_path, capsys):
    encoder = an_encoder(tiny, case)
    takes = "{instruction}" in encoder.config.template
    expected = [encoder.encode(TEXTS), encoder.encode(TEXTS, document=True),
                encoder.encode(TEXTS, TOLD) if takes else None]
    export_encoder(encoder, tmp_path / "out")
    again, method = open_model(str(tmp_path / "out"))
    assert (method, again.history) == (encoder.config.pooling, encoder.history)
    assert again.config == encoder.config and capsys.readouterr().out == ""
    assert open_model(str(tmp_path / "out"), encoder.config.pooling)[0].history == encoder.history
    error_line(collapse.main(["--model", str(tmp_path / "out"), "--text", "demo", "--save",
                              str(tmp_path / "kept")]), capsys, "--save", "an exported one")
    found = [again.encode(TEXTS), again.encode(TEXTS, document=True),
             again.encode(TEXTS, TOLD) if takes else None]
    for ours, theirs in zip(found, expected):
        assert ours is theirs is None or np.abs(ours - theirs).max() <= 1e-5
    other = "mean" if encoder.config.pooling == "last" else "last"
    open_model(str(tmp_path / "out"), other)
    assert f"under --method {other} it is read as a plain Llama" in capsys.readouterr().out
    refused(lambda: open_model(str(tmp_path / "out"), None, 30), "--max-tokens", "leave them out")
    for damage in ({"history": None}, {"pooling": "best"}, {"kept_tokens": 5}, {"max_tokens": "9"}):
        about = json.loads((tmp_path / "out/config.json").read_text())["llm2comp"]
        shutil.copytree(tmp_path / "out", tmp_path / "damaged", dirs_exist_ok=True)
        edit_json(tmp_path / "damaged/config.json", llm2comp={**about, **damage})
        refused(lambda: open_model(str(tmp_path / "damaged")), "config.json", "llm2comp")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_that_transformers_saved_without_its_head_gives_its_states(
    tied, kind, checkpoint, tmp_path
):
    folder = checkpoint(kind=kind, tie_word_embeddings=tied)
    expected = plain_encoder(folder).encode(SHORT)
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "bare")
    shutil.copy(folder / "tokenizer.json", tmp_path / "bare")
    assert not any(name.startswith("model.") for name in
                   load_file(tmp_path / "bare/model.safetensors"))
    bare = plain_encoder(tmp_path / "bare")
    assert np.array_equal(bare.encode(SHORT), expected)
    assert bare.base["weights"] != plain_encoder(folder).base["weights"] or tied


def test_stage_1_needs_a_head_and_stage_2_does_not(tiny, two_stages, run, tmp_path, capsys):
    AutoModel.from_pretrained(tiny).save_pretrained(tmp_path / "plain")
    shutil.copy(tiny / "tokenizer.json", tmp_path / "plain")
    error_line(run("one", "--model", tmp_path / "plain", "--steps", 1), capsys,
               f"{tmp_path / 'plain'}: has no language-model head", "LlamaModel", "contrastive.py")
    assert run("two", "--model", tmp_path / "plain", "--steps", 1, "--pooling", "mean",
               stage="ucl") == 0
    expected = load_encoder(tmp_path / "two/encoder").encode(["a text"])
    assert export.main([str(tmp_path / "two"), str(tmp_path / "out")]) == 0
    assert np.abs(open_model(str(tmp_path / "out"))[0].encode(["a text"]) - expected).max() < 1e-5
    capsys.readouterr()
    error_line(run("three", "--model", tmp_path / "out", "--steps", 1, stage="ucl"), capsys,
               str(tmp_path / "out"), "was written by export.py", "the run that it was made from")


@pytest.mark.parametrize("what, said", [
    ("base", "encoder.json: missing"), ("exported", "encoder.json: missing"),
    ("unfinished", "encoder.json: missing"), ("none", "no such folder"),
])
def test_what_is_no_encoder_is_not_exported(what, said, two_stages, tiny, tmp_path, capsys):
    export_encoder(load_encoder(two_stages[1]), tmp_path / "exported")
    (tmp_path / "unfinished").mkdir()
    folder = tiny if what == "base" else tmp_path / what
    error_line(export.main([str(folder), str(tmp_path / "out")]), capsys, folder, said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["run", "run/encoder", "run/"])
def test_a_runs_folder_stands_for_its_encoder(folder, two_stages, tmp_path, monkeypatch):
    shutil.copytree(two_stages[1], tmp_path / "run/encoder")
    monkeypatch.chdir(tmp_path)
    assert export.main([folder, "out"]) == 0
    expected = load_encoder(two_stages[1]).encode(SHORT)
    assert np.array_equal(load_encoder(folder).encode(SHORT), expected)
