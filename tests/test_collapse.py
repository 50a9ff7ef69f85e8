"""collapse.py: the measures against NumPy and SciPy computed directly, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import error_line, run_of, trained_encoder, words
from scipy.cluster.hierarchy import fcluster, linkage

import collapse
import evaluate
import export
import model
import pretrain_ctkd as stage1
from data.tasks import TASKS, read_task
from model import EncoderConfig, load_encoder, plain_encoder, save_encoder
from runtime.devices import flat_ids


def random_rows(n, d, rank=None, seed=0):
    random = np.random.default_rng(seed)
    if rank is None:
        return random.normal(size=(n, d)) + random.normal(size=d)
    return random.normal(size=(n, rank)) @ random.normal(size=(rank, d)) + 3.0


@pytest.mark.parametrize("n, d, block", [(50, 7, 4096), (5, 9, 2), (1000, 20, 333)])
def test_the_spectrum_is_that_of_numpys_covariance(n, d, block):
    x = random_rows(n, d)
    expected = np.cov(x.T, bias=True)
    np.testing.assert_allclose(collapse.covariance(x, block), expected, rtol=0, atol=1e-12)
    values = np.linalg.svd(expected, compute_uv=False)
    np.testing.assert_allclose(collapse.spectrum(x), values, rtol=0, atol=1e-8)


def test_a_mean_far_from_zero_costs_no_precision():
    x = random_rows(300, 6).astype(np.float32)
    moved = (x + np.float32(1024)).astype(np.float32)
    exact = np.cov(moved.astype(np.float64).T, bias=True)
    np.testing.assert_allclose(collapse.covariance(moved), exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_matrix_of_rank_r_has_effective_dimension_r(rank):
    random = np.random.default_rng(1)
    basis = np.linalg.qr(random.normal(size=(12, rank)))[0]
    x = np.concatenate((np.eye(rank), -np.eye(rank))) @ basis.T * 2.5  # equal in r directions
    found = collapse.dimensions(collapse.spectrum(x))
    assert found["above_1_percent"] == found["rank"] == rank
    assert found["entropy"] == pytest.approx(rank) and found["participation"] == pytest.approx(rank)
    x = random_rows(400, 12, rank)
    for rows in (x, x.astype(np.float32)):
        general = collapse.dimensions(collapse.spectrum(rows))
        assert general["participation"] <= general["entropy"] + 1e-9 <= rank + 1e-6
        assert general["rank"] == rank
    assert collapse.dimensions(collapse.spectrum(np.ones((5, 3)))) == {
        "entropy": 0.0, "participation": 0.0, "above_1_percent": 0, "rank": 0}


def test_correlation_is_the_mean_over_texts_of_products_and_cosines():
    memory = random_rows(6 * 3, 5).reshape(6, 3, 5)
    memory[2, 1] = 0
    products, cosines = collapse.correlation(memory)
    for i in range(3):
        for j in range(3):
            pairs = [(text[i], text[j]) for text in memory]
            assert products[i, j] == pytest.approx(sum(a @ b for a, b in pairs))
            norms = [np.linalg.norm(a) * np.linalg.norm(b) for a, b in pairs]
            assert cosines[i, j] == pytest.approx(
                sum(a @ b / n if n else 0 for (a, b), n in zip(pairs, norms)))


def cosines_of(*angles):
    """Cosines of directions in a plane, in degrees."""
    radians = np.radians(angles)
    return np.cos(radians[:, None] - radians)


def test_equal_tokens_are_joined_and_orthogonal_ones_are_not():
    assert collapse.complete_linkage(cosines_of(0, 90, 0), 0.9) == [[0, 2], [1]]
    assert collapse.complete_linkage(np.eye(4), 0.9) == [[0], [1], [2], [3]]
    assert collapse.complete_linkage(np.ones((3, 3)), 1.0) == [[0, 1, 2]]
    assert collapse.complete_linkage(np.ones((1, 1)), 0.9) == [[0]]


def test_a_chain_of_neighbours_is_not_one_cluster():
    """Neighbours are 20 degrees apart (0.94), the ends 60 (0.5): single linkage would join all."""
    clusters = collapse.complete_linkage(cosines_of(0, 20, 40, 60), 0.9)
    assert sorted(clusters) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("seed", range(20))
def test_clusters_match_scipys_complete_linkage(seed):
    x = np.random.default_rng(seed).normal(size=(9, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    distance = 1 - (x @ x.T)[np.triu_indices(9, 1)]
    expected = fcluster(linkage(distance, "complete"), 1 - 0.6, criterion="distance")
    found = np.empty(9, dtype=int)
    for label, cluster in enumerate(collapse.complete_linkage(x @ x.T, 0.6)):
        found[cluster] = label
    assert ((found[:, None] == found) == (expected[:, None] == expected)).all()


def test_alignment_and_uniformity_match_plain_loops():
    x, y = random_rows(30, 4), random_rows(30, 4, seed=1)
    u, v = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
    assert collapse.alignment(x, y) == pytest.approx(np.mean([np.sum((a - b) ** 2)
                                                              for a, b in zip(u, v)]))
    kernel = [np.exp(-2 * np.sum((u[i] - u[j]) ** 2)) for i in range(30) for j in range(i)]
    assert collapse.uniformity(x, block=7) == pytest.approx(np.log(np.mean(kernel)))


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An encoder folder of the bundled Llama with four memory tokens."""
    config = stage1.Config(**stage1.PRESETS["demo"] | {"memory_tokens": 4, "dtype": "float32"})
    encoder = stage1.new_encoder(config, run_of(config))
    encoder.history[0]["stage"] = "ctkd"
    folder = tmp_path_factory.mktemp("run") / "encoder"
    save_encoder(encoder, folder)
    return folder


def run(*arguments):
    return collapse.main([*map(str, arguments), "--threads", "1", "--device", "cpu"])


def test_the_command_measures_writes_and_saves_a_merged_encoder(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--model", trained, "--task", "demo-sts", "--texts", 1000, "--out", out, "--merge",
               -1, "--save", tmp_path / "merged") == 0
    [found] = json.loads((out / "collapse.json").read_text())
    assert found["texts"] == 503 and len(found["drawn"]) == 1  # at cosine -1 all are one
    encoder = load_encoder(trained)
    texts, _, pairs = collapse.read_source(collapse.parse_arguments(
        ["--model", "demo", "--task", "demo-sts"]))
    x = encoder.encode(texts).astype(np.float64)
    np.testing.assert_allclose(found["spectrum"], np.linalg.svd(np.cov(x.T, bias=True))[1],
                               rtol=0, atol=1e-5)
    assert found["alignment"] == pytest.approx(collapse.alignment(*x[pairs.T]), rel=1e-4)
    merged = load_encoder(tmp_path / "merged" / "encoder")
    assert merged.config == replace(encoder.config, kept_tokens=tuple(found["drawn"]))
    ids = encoder.tokenize(texts[:3]).ids
    memory = [encoder.memory(torch.from_numpy(i).long(), [len(i)])[0] for i in ids]
    kept = torch.stack([m[found["drawn"][0]] for m in memory]).detach().numpy()
    np.testing.assert_allclose(merged.encode(texts[:3]), kept, rtol=0, atol=1e-5)
    assert 0 < evaluate.demo_sts(merged) < 100
    assert "| " in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["collapse.json"]


def test_the_seed_draws_the_kept_token(trained, tmp_path):
    kept = set()
    for seed in range(6):
        for turn in range(2):
            run("--model", trained, "--task", "demo-sts", "--texts", 20, "--merge", -1, "--seed",
                seed, "--out", tmp_path / f"{turn}")
        found = [json.loads((tmp_path / f"{turn}/collapse.json").read_text())[0]["drawn"]
                 for turn in range(2)]
        assert found[0] == found[1]
        kept.add(found[0][0])
    assert len(kept) > 1


def test_mean_products_and_cosines_are_reported(tiny, tmp_path):
    config = EncoderConfig(num_memory_tokens=3, max_tokens=64)
    save_encoder(trained_encoder(tiny, config), tmp_path / "encoder")
    texts = words(7, 0)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    assert run("--model", tmp_path / "encoder", "--text", tmp_path / "texts.txt", "--out",
               tmp_path / "out") == 0
    [found] = json.loads((tmp_path / "out/collapse.json").read_text())
    encoder = load_encoder(tmp_path / "encoder")
    ids = encoder.tokenize(texts).ids
    memory = [encoder.memory(flat_ids([one], "cpu"), [len(one)])[0].double() for one in ids]
    products = sum(m @ m.T for m in memory) / 7
    cosines = sum(m @ m.T / (m.norm(dim=1)[:, None] * m.norm(dim=1)) for m in memory) / 7
    assert np.array(found["products"]) == pytest.approx(products.numpy(), rel=1e-4)
    assert np.array(found["cosines"]) == pytest.approx(cosines.numpy(), abs=1e-5)
    others = [cosines[i, j].item() for i in range(3) for j in range(3) if i != j]
    assert found["mean_cosine"] == pytest.approx(np.mean(others), abs=1e-5)


def directions(n: int, of: int) -> np.ndarray:
    """2 n points (2 n, of) whose covariance has n equal singular values: participation ratio n."""
    axes = np.eye(of, dtype=np.float32)[:n]
    return np.concatenate((axes, -axes))


def test_wide_tokens_have_three_quarters_of_the_largest_dimension():
    """8, 6 and 5 directions, and a token that is the same for all texts."""
    tokens = [np.resize(directions(n, 16), (480, 16)) for n in (6, 8, 5)]
    ratios, wide = collapse.wide_tokens(np.stack((*tokens, np.ones_like(tokens[0])), axis=1))
    assert ratios == pytest.approx([6, 8, 5, 0], abs=1e-5) and wide == [0, 1]
    assert collapse.wide_tokens(np.ones((9, 3, 4)))[1] == [0, 1, 2]


def test_an_encoder_of_the_wide_tokens_can_be_written(tiny, tmp_path, monkeypatch, capsys):
    """Their dimensions are those of every n-th text's states."""
    save_encoder(trained_encoder(tiny, EncoderConfig(3, max_tokens=64)), tmp_path / "encoder")
    texts = words(7, 0)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    monkeypatch.setattr(collapse, "STATES_OF", 3)
    real = collapse.wide_tokens
    monkeypatch.setattr(collapse, "wide_tokens", lambda states: (real(states)[0], [1]))
    source = ["--model", tmp_path / "encoder", "--text", tmp_path / "texts.txt", "--out",
              tmp_path / "out"]
    assert run(*source, "--save", tmp_path / "wide", "--keep", "wide") == 0
    [found] = json.loads((tmp_path / "out/collapse.json").read_text())
    encoder = load_encoder(tmp_path / "encoder")
    ids = encoder.tokenize(texts[::3]).ids
    states = torch.cat([encoder.memory(flat_ids([one], "cpu"), [len(one)]) for one in ids])
    assert found["token_participation"] == pytest.approx(real(states.detach().numpy())[0], rel=1e-4)
    wide = load_encoder(tmp_path / "wide")
    assert found["wide"] == [1] and wide.config.kept_tokens == (1,)
    command = export.command_of(wide.history[-1]).splitlines()[1]
    assert command == (f"python collapse.py --model RUN --text {tmp_path}/texts.txt --texts 60000 "
                       f"--seed 0 --keep wide --merge 0.9 --save FOLDER  # keeps 1")
    assert "memory tokens 1 make the embedding" in capsys.readouterr().out
    error_line(run("--model", tmp_path / "wide", *source[2:], "--save", tmp_path / "again"),
               capsys, "is read by some of its memory tokens already")
    with pytest.raises(SystemExit):
        run(*source, "--keep", "wide")
    assert "--keep wide: is for --save; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("attention, kept, k, stored", [
    ("causal", [0], 1, ()), ("causal", [0, 2], 3, (0, 2)), ("causal", [0, 1], 2, ()),
    ("bidirectional", [0], 4, (0,)), ("bidirectional", [0, 1, 2, 3], 4, ())])
def test_memory_tokens_that_nothing_reads_are_left_out(tiny, tmp_path, attention, kept, k, stored):
    """The embedding stays what it was: the mean of the kept states."""
    encoder = trained_encoder(tiny, EncoderConfig(4, attention=attention, max_tokens=64)).eval()
    ids = encoder.tokenize(words(1, 3)).ids[0]
    with torch.no_grad():
        expected = encoder.memory(flat_ids([ids], "cpu"), [len(ids)])[0, kept].mean(dim=0)
    collapse.keep_tokens(encoder, kept)
    save_encoder(encoder, tmp_path / "encoder")
    encoder = load_encoder(tmp_path / "encoder")
    assert (encoder.config.num_memory_tokens, encoder.config.kept_tokens) == (k, stored)
    np.testing.assert_allclose(encoder.encode(words(1, 3))[0], expected, rtol=0, atol=1e-5)


def test_texts_that_were_cut_are_noted(tiny, tmp_path, capsys):
    """The note counts texts, each once, and names the encoder's limit."""
    save_encoder(trained_encoder(tiny, EncoderConfig(3, max_tokens=21)), tmp_path / "encoder")
    (tmp_path / "texts.txt").write_text("\n".join("x" * n for n in (20, 21, 22, 5, 60)))
    source = ["--text", tmp_path / "texts.txt", "--out", tmp_path / "out"]
    assert run("--model", tmp_path / "encoder", *source) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert notes == [f"note: {tmp_path}/encoder: texts cut to 21 tokens: 3"]
    (tmp_path / "texts.txt").write_text("\n".join("x" * n for n in (20, 19, 5)))
    assert run("--model", tmp_path / "encoder", *source) == 0
    assert "texts cut" not in capsys.readouterr().out


def test_positive_pairs_have_four_fifths_of_the_highest_score():
    roles, labels, _ = read_task(TASKS["demo-sts"])
    pairs = list(zip(roles["left"], roles["right"], labels["gold"]))
    highest = max(score for *_, score in pairs)
    expected = [(left, right) for left, right, score in pairs if score / highest >= 0.8 - 1e-12]
    assert any(0.5 < score / highest < 0.8 for *_, score in pairs)
    arguments = collapse.parse_arguments(["--model", "demo", "--task", "demo-sts"])
    texts, _, found = collapse.read_source(arguments)
    assert [(texts[i], texts[j]) for i, j in found] == expected


def test_a_plain_llama_has_a_spectrum_but_no_memory_tokens(tmp_path, capsys):
    assert run("--model", "demo", "--text", "demo", "--texts", 30, "--out", tmp_path) == 0
    [found] = json.loads((tmp_path / "collapse.json").read_text())
    assert "cosines" not in found and found["alignment"] is None and found["texts"] == 30
    x = plain_encoder("demo").table
    assert len(found["spectrum"]) == x.shape[1]


@pytest.mark.parametrize("arguments, fragment", [
    (["--text", "nowhere.txt"], "nowhere.txt"), (["--task", "st17"], "did you mean sts17"),
    (["--task", "sts"], "a group of tasks; name one"),
    (["--text", "demo", "--model", "demo", "dmeo"], "dmeo: no such folder"),
    (["--model", "demo", "dmeo", "--text", "demo"], "dmeo: no such folder"),
    (["--task", "demo-sts", "--save", "x"], "--save: demo is no encoder"),
    (["--task", "demo-sts", "--max-tokens", "0"], "--max-tokens 0: must be at least 2"),
])
def test_a_mistake_ends_in_one_line_and_writes_nothing(arguments, fragment, tmp_path, capsys):
    error_line(run("--model", "demo", *arguments, "--out", tmp_path), capsys, fragment)
    assert not (tmp_path / "collapse.json").exists()


@pytest.mark.parametrize("arguments", [
    ["--texts", "1"], ["--seed", "-1"], ["--merge", "1.5"], ["--merge", "nan"],
    ["--method", "mode"], ["--text", "x"], ["--save", "x", "--model", "demo", "demo"],
])
def test_impossible_settings_are_refused(arguments):
    with pytest.raises(SystemExit) as stop:
        collapse.main(["--model", "demo", "--task", "demo-sts", *arguments])
    assert stop.value.code == 2


def test_a_file_in_place_of_out_is_reported_before_anything_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(collapse, "read_source", lambda args: pytest.fail("reads"))
    (out := tmp_path / "file").write_text("")
    assert collapse.main(["--model", "demo", "--text", "demo", "--out", str(out)]) == 2
    assert "file" in capsys.readouterr().err


def test_the_embeddings_are_those_that_evaluate_scores(tmp_path, monkeypatch):
    """MetaEOL is the mean over its prompts; documents are read as documents."""
    seen = []
    monkeypatch.setattr(collapse, "spectrum", lambda x: seen.append(x) or np.zeros(x.shape[1]))
    assert run("--model", "demo", "--method", "metaeol", "--text", "demo", "--texts", 5, "--out",
               tmp_path, "--max-tokens", 200) == 0
    texts = collapse.read_source(collapse.parse_arguments(
        ["--model", "demo", "--text", "demo", "--texts", "5"]))[0]
    expected = evaluate.encoding(*evaluate.open_model("demo", "metaeol", 200))(texts)
    np.testing.assert_allclose(seen[0], expected, rtol=0, atol=1e-4)
    calls = []

    def states(encoder, method, texts, document=False, **options):
        calls.append((len(texts), document))
        return np.ones((len(texts), 256)), 0.0, None

    monkeypatch.setattr(collapse, "read_states", states)
    assert run("--model", "demo", "--task", "demo-retrieval", "--out", tmp_path) == 0
    assert [document for _, document in calls] == [False, True] and calls[1][0] > calls[0][0]


def test_the_uniformity_of_zero_rows_is_a_number():
    x = np.array([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
    assert collapse.uniformity(x) == pytest.approx(-4)  # all squared distances count as 2


def test_ctrl_c_is_a_line(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(collapse, "read_states", interrupted)
    assert run("--model", "demo", "--text", "demo", "--texts", 9, "--out", tmp_path) == 130
    assert capsys.readouterr().err == "\ninterrupted; the same command begins anew\n"
    assert list(tmp_path.iterdir()) == []


def test_how_a_plain_llama_reads_special_tokens_can_be_said(trained, tmp_path):
    """An encoder in the same call knows its own."""
    for way in ("literal", "parsed"):
        assert run("--model", "demo", trained, "--text", "demo", "--texts", 9, "--out", tmp_path,
                   "--special-tokens", way) == 0
        found = json.loads((tmp_path / "collapse.json").read_text())
        assert [one["special_tokens"] for one in found] == [way, "literal"]


def test_save_never_overwrites_an_encoder(trained, tmp_path, capsys):
    before = sorted((p, p.stat().st_mtime_ns) for p in trained.rglob("*"))
    assert run("--model", trained, "--task", "demo-sts", "--texts", 20, "--out", tmp_path / "out",
               "--save", trained.parent) == 2
    assert "exists already; name a new folder" in capsys.readouterr().err
    assert sorted((p, p.stat().st_mtime_ns) for p in trained.rglob("*")) == before


def test_an_encoder_with_kept_tokens_is_another_encoder(trained, tmp_path, capsys):
    """The whole encoder's results are not reused for it, and its export weighs its own tokens."""
    whole = ["--model", str(trained), "--task", "demo-sts", "--results", str(tmp_path / "results")]
    assert evaluate.main(whole) == 0
    about = json.loads((trained / "encoder.json").read_text())
    for kept, fragment in (([0, 2], "kept_tokens: [] -> [0, 2]"), ([0, 0], "different numbers"),
                           ([4], "from 0 to 3"), ([True], "different numbers"),
                           ("ab", "different numbers"), (3, "missing or odd")):
        (trained / "encoder.json").write_text(json.dumps(about | {"kept_tokens": kept}))
        capsys.readouterr()
        assert evaluate.main(whole) == 2
        assert fragment in capsys.readouterr().err
    (trained / "encoder.json").write_text(json.dumps(about | {"kept_tokens": [0, 2]}))
    assert export.main([str(trained), str(tmp_path / "plain")]) == 0
    weights = json.loads((tmp_path / "plain/1_WordWeights/config.json").read_text())
    assert weights["word_weights"] == {"<memory_1>": 1.0, "<memory_3>": 1.0}
    (trained / "encoder.json").write_text(json.dumps(about))


def test_non_finite_embeddings_end_in_one_line(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model.Encoder, "pool", lambda self, memory: memory[:, 0] * torch.nan)
    assert run("--model", trained, "--task", "demo-sts", "--texts", 9, "--out", tmp_path) == 2
    assert "embeddings with nan or inf" in capsys.readouterr().err
