"""What counts as the same base: tensors, architecture and tokenizer, not the bytes of files; and
what then depends on it: encoders, scores, runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import TEXTS, edit_json, error_line, evaluate_main, files, refused, sts17
from helpers import trained_encoder, write_encoder
from safetensors.torch import load_file, save_file

import collapse
import export
import mine
from model import EncoderConfig, load_encoder, plain_encoder, save_encoder
from runtime.files import sha256_of_files
from runtime.formats import ModelFolder, weight_files
from runtime.identity import identity

# ---------------------------------------------------------------------------------------------
# Copies of a base
# ---------------------------------------------------------------------------------------------


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def other_metadata(folder):
    save_file(tensors_of(folder), folder / "model.safetensors", metadata={"by": "another"})


def other_order(folder):
    """The library sorts the tensors by name: the last one first, by hand."""
    header, data = {}, b""
    for name, tensor in sorted(tensors_of(folder).items(), reverse=True):
        raw = tensor.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)


def two_shards(folder):
    tensors = tensors_of(folder)
    names = sorted(tensors)
    parts = {"a.safetensors": names[1::2], "b.safetensors": names[::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def by_transformers(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for path in folder.iterdir():
        path.unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    tokenizer.save_pretrained(folder)


def old_buffers(folder):
    tensors = tensors_of(folder)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")


def edit_tokenizer(edit):
    """change(folder): edit tokenizer.json as an object."""
    def change(folder):
        path = folder / "tokenizer.json"
        about = json.loads(path.read_text())
        edit(about)
        path.write_text(json.dumps(about, indent=1))

    return change


def eos_after(about):
    about["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    about["post_processor"]["special_tokens"]["</s>"] = {
        "id": "</s>", "ids": [2], "tokens": ["</s>"]}


def bos_0(about):
    about["post_processor"]["special_tokens"]["<s>"]["ids"] = [0]


def config(drop=(), **new):
    return lambda folder: edit_json(folder / "config.json", drop, **new)


SAME = {
    "other metadata": other_metadata, "other order": other_order, "two shards": two_shards,
    "transformers": by_transformers, "old buffers": old_buffers,
    "keys that are not read": config(use_cache=False, note="edited", eos_token_id=7),
    "rope_theta in the old place": config(["rope_parameters"], rope_theta=10000),
    "a default left out": config(["rope_parameters", "rope_scaling", "rope_theta"]),
    "a bos_token_id that the tokenizer overrules": config(bos_token_id=5),
    "a BOS that config.json names, too": edit_tokenizer(
        lambda about: about.update(post_processor=None)),
    "EOS after a text": edit_tokenizer(eos_after),
    "truncation": edit_tokenizer(lambda about: about.update(truncation={
        "direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0})),
    "the decoder": edit_tokenizer(lambda about: about.update(decoder=None)),
}


def cast(folder):
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(folder).items()}
    save_file(tensors, folder / "model.safetensors")


def one_number(folder):
    tensors = tensors_of(folder)
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, folder / "model.safetensors")


def swap(folder):
    tensors = tensors_of(folder)
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, folder / "model.safetensors")


def fewer_merges(about):
    about["model"]["merges"].pop()


OTHER = {
    "rope_theta": (config(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
                   ["rope in config.json", "10000.0", "500000.0"]),
    "rope_theta in the old place": (config(["rope_parameters"], rope_theta=500000),
                                    ["rope in config.json", "500000.0"]),
    "rope scaling": (config(["rope_parameters"], rope_scaling={"type": "linear", "factor": 2}),
                     ["rope in config.json", "linear"]),
    "eps": (config(rms_norm_eps=1e-3), ["rms_norm_eps in config.json: 1e-05 -> 0.001"]),
    "one number": (one_number, ["its weights"]), "swapped tensors": (swap, ["its weights"]),
    "another dtype": (cast, ["its weights"]),
    "BOS": (edit_tokenizer(bos_0), ["its BOS: [1] -> [0]"]),
    "a merge": (edit_tokenizer(fewer_merges), ["its tokenizer"]),
    "a normalizer": (edit_tokenizer(lambda about: about.update(normalizer={"type": "Lowercase"})),
                     ["its tokenizer"]),
    "an added token": (edit_tokenizer(lambda about: about["added_tokens"].append(
        {"id": 300, "content": about_token(about, 300), "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": False})), ["its tokenizer"]),
}


def about_token(about, number: int) -> str:
    """The token of that id."""
    return next(token for token, i in about["model"]["vocab"].items() if i == number)


@pytest.fixture
def encoder_of_tiny(tiny, tmp_path) -> Path:
    """An encoder on the tiny Llama."""
    save_encoder(trained_encoder(tiny), tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_a_copy_that_computes_the_same_is_the_same_base(
    change, encoder_of_tiny, tiny_copy, tiny
):
    change(tiny_copy)
    assert sha256_of_files(sorted(tiny.iterdir())) != sha256_of_files(sorted(tiny_copy.iterdir()))
    first, copy = load_encoder(encoder_of_tiny), load_encoder(encoder_of_tiny, str(tiny_copy))
    assert copy.base == {**first.base, "name": str(tiny_copy)}
    assert np.array_equal(first.encode(TEXTS), copy.encode(TEXTS))
    assert identity(copy) == identity(first)


@pytest.mark.parametrize("change, said", OTHER.values(), ids=OTHER)
def test_a_copy_that_computes_something_else_is_refused_by_the_name_of_what_differs(
    change, said, encoder_of_tiny, tiny_copy, capsys
):
    change(tiny_copy)
    refused(lambda: load_encoder(encoder_of_tiny, str(tiny_copy)), str(encoder_of_tiny),
            "another base", str(tiny_copy), "--base", "--other-base", *said)
    before = load_encoder(encoder_of_tiny)
    other = load_encoder(encoder_of_tiny, str(tiny_copy), other_base=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"note: {encoder_of_tiny} is read on another base") and said[0] in line
    assert other.base["trained_on"] == {key: before.base[key]
                                        for key in ("name", "revision", "sha256")}
    assert identity(other) != identity(before)


def test_a_tied_head_that_is_stored_twice_is_the_table(checkpoint, tmp_path):
    base = checkpoint(tie_word_embeddings=True)
    save_encoder(trained_encoder(base), tmp_path / "encoder")
    tensors = tensors_of(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors")
    load_encoder(tmp_path / "encoder")


def test_another_bos_of_the_encoder_overrules_that_of_its_base(tiny_copy, tmp_path):
    save_encoder(trained_encoder(tiny_copy, EncoderConfig(4, bos=2)), tmp_path / "encoder")
    edit_tokenizer(bos_0)(tiny_copy)
    assert load_encoder(tmp_path / "encoder").tokenizer.bos == [2]


def as_before(folder: Path, base: Path, **other):
    """Make an encoder folder say of its base what earlier versions said: the hash of its files."""
    about = json.loads((folder / "encoder.json").read_text())["base"]
    edit_json(folder / "encoder.json", base={
        "name": about["name"], "revision": None, "sha256": sha256_of_files(weight_files(base)),
        **other})


def test_a_folder_from_before_knows_its_base_by_the_files(encoder_of_tiny, tiny, tiny_copy):
    as_before(encoder_of_tiny, tiny)
    old = load_encoder(encoder_of_tiny)
    assert {"weights", "config", "tokenizer"} < old.base.keys()  # the next folder knows more
    other_order(tiny_copy)
    refused(lambda: load_encoder(encoder_of_tiny, str(tiny_copy)), "another base", "its weights")
    assert "trained_on" in load_encoder(encoder_of_tiny, str(tiny_copy), other_base=True).base


def test_what_other_base_took_is_still_known_two_stages_later(
    encoder_of_tiny, tiny_copy, tmp_path
):
    one_number(tiny_copy)
    other = load_encoder(encoder_of_tiny, str(tiny_copy), other_base=True)
    save_encoder(other, tmp_path / "next")
    again = load_encoder(tmp_path / "next")
    assert again.base == other.base and again.base["trained_on"]["sha256"]


def test_the_hash_of_tensors_is_taken_once(tiny_copy, monkeypatch):
    from runtime import identity as module

    opened = []
    plain = module.open_tensors
    monkeypatch.setattr(module, "open_tensors", lambda path: opened.append(path) or plain(path))
    first = ModelFolder(tiny_copy, None, ["llama"]).record([1])
    assert ModelFolder(tiny_copy, None, ["llama"]).record([1]) == first and len(opened) == 1
    one_number(tiny_copy)
    assert ModelFolder(tiny_copy, None, ["llama"]).record([1])["weights"] != first["weights"]


@pytest.mark.parametrize("command", ["evaluate", "collapse", "mine", "export"])
def test_every_command_that_has_base_has_other_base(
    command, encoder_of_tiny, tiny_copy, here, capsys
):
    one_number(tiny_copy)
    base, device = ["--base", tiny_copy], ["--device", "cpu", "--threads", "1"]
    rows = [{"query": f"query {i}", "positive": f"a text of number {i}"} for i in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call = {
        "evaluate": lambda *more: sts17("--model", encoder_of_tiny, *base, *more),
        "collapse": lambda *more: collapse.main([*map(str, (
            "--model", encoder_of_tiny, "--task", "demo-sts", *base, *device, "--out", "c",
            *more))]),
        "mine": lambda *more: mine.main([*map(str, (
            "--model", encoder_of_tiny, "--triples", "rows.jsonl", "--margin", "0", "--out",
            "m.jsonl", *base, *device, *more))]),
        "export": lambda *more: export.main([*map(str, (encoder_of_tiny, "x", *base, *more))]),
    }[command]
    error_line(call(), capsys, "another base", "its weights", "--other-base")
    assert call("--other-base") == 0
    assert "is read on another base" in capsys.readouterr().out
    if command in ("evaluate", "collapse"):
        path = next(Path("results").rglob("*.json") if command == "evaluate" else
                    iter([Path("c/collapse.json")]))
        about = json.loads(path.read_text())
        about = about["settings"] if command == "evaluate" else about[0]
        assert about["base"]["name"] == str(tiny_copy) and about["base"]["trained_on"]["sha256"]


# ---------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------


def edit_task(here, *_):
    (path,) = (here.parent / "data/sts17-crosslingual-sts").glob("test*")
    path.write_bytes(path.read_bytes().replace(b"A dog runs.", b"A cat runs."))


def of_model(change):
    return lambda here, name: change(here / "llama")


def of_adapter(**new):
    return lambda here, name: edit_json(here / "mine/ctkd/adapter_config.json", **new)


STALE = {
    "the task": ("llama", edit_task, "the task's files: test"),
    "the task of an encoder": ("mine", edit_task, "the task's files: test"),
    "rope_theta": ("llama", of_model(OTHER["rope_theta"][0]), "rope in config.json"),
    "eps": ("llama", of_model(config(rms_norm_eps=1e-3)), "rms_norm_eps"),
    "BOS": ("llama", of_model(edit_tokenizer(bos_0)), "its BOS: [1] -> [0]"),
    "a merge": ("llama", of_model(edit_tokenizer(fewer_merges)), "its tokenizer"),
    "alpha": ("mine", of_adapter(lora_alpha=64), "the adapters' settings"),
    "pooling of some": ("mine", lambda here, _: edit_json(here / "mine/encoder.json",
                                                          kept_tokens=[1]), "kept_tokens"),
    "the template": ("mine", lambda here, _: edit_json(here / "mine/encoder.json",
                                                       template="q: {text}"), "template"),
}


@pytest.fixture
def models(tiny, here) -> Path:
    """A working folder with a Llama and an encoder on another copy of it."""
    shutil.copytree(tiny, here / "llama")
    write_encoder(tiny, here / "mine")
    return here


@pytest.mark.parametrize("model, edit, said", STALE.values(), ids=STALE)
def test_a_score_of_what_was_edited_since_is_not_shown(model, edit, said, models, encoded, capsys):
    assert sts17("--model", model) == 0
    edit(models, model)
    before, calls = files(models), len(encoded)
    capsys.readouterr()
    error_line(sts17("--model", model), capsys, "STS17.json: was made with other settings (", said,
               "evaluate again with --force")
    assert files(models) == before and len(encoded) == calls
    assert sts17("--model", model, "--force") == 0 and len(encoded) == calls + 1
    capsys.readouterr()
    assert sts17("--model", model) == 0 and "finished before" in capsys.readouterr().out


@pytest.mark.parametrize("change", [*SAME.values(), None], ids=[*SAME, "moved data"])
def test_a_score_is_shown_again_if_the_same_was_only_written_anew(change, models, encoded, capsys):
    assert sts17("--model", "llama") == 0
    more = []
    if change:
        change(models / "llama")
    else:
        shutil.copytree(models.parent / "data", models / "moved")
        more = ["--data-dir", "moved"]
    capsys.readouterr()
    assert sts17("--model", "llama", *more) == 0 and len(encoded) == 1
    printed = capsys.readouterr().out
    assert "finished before" in printed and "not known" not in printed


@pytest.mark.parametrize("kind", ["sts", "retrieval", "classification", "clustering",
                                  "pair-classification", "reranking"])
def test_all_files_that_a_task_reads_are_known_by_their_hash(kind, tmp_path, monkeypatch):
    import evaluate
    from data.tasks import folder_task, read_task
    from helpers import write_task

    task, asked = folder_task(write_task(tmp_path / kind, kind), kind), []
    found = evaluate.find_file
    monkeypatch.setattr("data.tasks.find_file", lambda task, role, data_dir: (
        asked.append(role), found(task, role, data_dir))[1])
    read_task(task)
    assert evaluate.task_files(task, None).keys() == set(asked)


def edit_result(path: Path, drop, **base):
    """Make a result say what earlier versions said."""
    result = json.loads(path.read_text())
    settings = {key: value for key, value in result["settings"].items() if key not in drop}
    settings["base"] = {**{key: settings["base"][key] for key in ("name", "revision")}, **base}
    path.write_text(json.dumps({**result, "settings": settings}))


def test_of_a_result_from_before_it_is_said_what_is_not_known(models, encoded, capsys):
    assert sts17("--model", "mine") == 0
    path, base = models / "results/mine/STS17.json", Path(load_encoder("mine").base["name"])
    edit_result(path, ["files", "kind", "adapters"], sha256=sha256_of_files(weight_files(base)))
    before = path.read_bytes()
    capsys.readouterr()
    assert sts17("--model", "mine") == 0 and len(encoded) == 1 and path.read_bytes() == before
    printed = capsys.readouterr().out
    assert "finished before" in printed and "note: an earlier version made it" in printed
    assert "the task's files" in printed and "config.json, tokenizer and adapters" in printed
    assert evaluate_main("--compare", "mine") == 0
    edit_result(path, [], sha256="0" * 64)
    capsys.readouterr()
    error_line(sts17("--model", "mine"), capsys, "the base model: its weights")


def test_what_makes_two_scores_incomparable_is_said_in_a_comparison(models, capsys):
    assert sts17("--model", "mine") == 0 and sts17("--model", "llama") == 0
    capsys.readouterr()
    assert evaluate_main("--compare", "mine", "llama@weighted-mean") == 0
    printed = capsys.readouterr().out
    assert "different files" not in printed and "different models" not in printed
    edit_task(models)
    config(rms_norm_eps=1e-3)(models / "llama")
    assert sts17("--model", "llama", "--force") == 0
    assert evaluate_main("--task", "sickr", "--model", "mine") == 0
    edit_json(models / "mine/ctkd/adapter_config.json", lora_alpha=64)
    assert evaluate_main("--task", "sickr", "--model", "mine", "--force") == 0
    capsys.readouterr()
    assert evaluate_main("--compare", "mine", "llama@weighted-mean") == 0
    printed = capsys.readouterr().out
    assert "note: sts17: mine and llama@weighted-mean were scored on different files" in printed
    assert "note: mine, 2 different models have made these scores" in printed


def test_a_result_without_its_task_is_shown_and_said_to_be_unchecked(models, capsys):
    assert sts17("--model", "mine") == 0
    shutil.rmtree(models.parent / "data/sts17-crosslingual-sts")
    capsys.readouterr()
    assert sts17("--model", "mine") == 0
    printed = capsys.readouterr().out
    assert "finished before" in printed and "not all here now" in printed


def test_embeddings_for_mining_are_not_continued_with_another_scale(models, capsys):
    rows = [{"query": f"query {i}", "positive": f"a text of number {i}"} for i in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", "mine", "--triples", "rows.jsonl", "--margin", "0", "--device", "cpu",
             "--embeddings", "e.npy", "--threads", "1", "--out"]
    assert mine.main([*flags, "a.jsonl"]) == 0
    edit_json(models / "mine/ctkd/adapter_config.json", lora_alpha=64)
    capsys.readouterr()
    error_line(mine.main([*flags, "b.jsonl"]), capsys, "e.npy: was begun with another encoder")


def test_a_plain_llama_knows_its_parts(tiny):
    base = plain_encoder(tiny).base
    assert base["config"]["rms_norm_eps"] == 1e-5 and "bos_token_id" not in base["config"]
    assert base["bos"] == [1] and len({base[k] for k in ("sha256", "weights", "tokenizer")}) == 3
