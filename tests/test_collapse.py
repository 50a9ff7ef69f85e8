"""The analysis of collapse against NumPy's direct computation, and its command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage

import collapse
import evaluate
import model
from model import load_encoder, plain_encoder, save_encoder


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


def test_a_mean_far_from_zero_costs_no_digits():
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


def test_copies_merge_and_orthogonal_tokens_do_not():
    assert collapse.complete_linkage(cosines_of(0, 90, 0), 0.9) == [[0, 2], [1]]
    assert collapse.complete_linkage(np.eye(4), 0.9) == [[0], [1], [2], [3]]
    assert collapse.complete_linkage(np.ones((3, 3)), 1.0) == [[0, 1, 2]]
    assert collapse.complete_linkage(np.ones((1, 1)), 0.9) == [[0]]


def test_a_chain_is_not_one_cluster():
    """Neighbours are 20 degrees apart (0.94), the ends 60 (0.5): single linkage would join all."""
    clusters = collapse.complete_linkage(cosines_of(0, 20, 40, 60), 0.9)
    assert sorted(clusters) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("seed", range(20))
def test_clusters_are_scipys(seed):
    x = np.random.default_rng(seed).normal(size=(9, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    distance = 1 - (x @ x.T)[np.triu_indices(9, 1)]
    expected = fcluster(linkage(distance, "complete"), 1 - 0.6, criterion="distance")
    found = np.empty(9, dtype=int)
    for label, cluster in enumerate(collapse.complete_linkage(x @ x.T, 0.6)):
        found[cluster] = label
    assert ((found[:, None] == found) == (expected[:, None] == expected)).all()


def test_alignment_and_uniformity_equal_plain_loops():
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
    """An encoder folder of the embedded Llama with four memory tokens, two of them equal."""
    import pretrain_ctkd as stage1
    from training import Ranks

    config = stage1.Config(**stage1.PRESETS["demo"] | {"memory_tokens": 4, "dtype": "float32"})
    encoder = stage1.new_encoder(config, Ranks(0, 1, torch.device("cpu")))
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
    ids, _ = encoder.tokenize(texts[:3])
    memory = [encoder.memory(torch.from_numpy(i).long(), [len(i)])[0] for i in ids]
    kept = torch.stack([m[found["drawn"][0]] for m in memory]).detach().numpy()
    np.testing.assert_allclose(merged.encode(texts[:3]), kept, rtol=0, atol=1e-5)
    assert 0 < evaluate.demo_sts(merged) < 100
    assert "| " in capsys.readouterr().out
    for name in ("spectra.svg", "correlation.svg"):
        assert (out / name).read_text().startswith("<?xml")
    assert run("--model", "demo", "--text", "demo", "--texts", 20, "--out", out) == 0
    assert not (out / "correlation.svg").exists()  # that of the first call would mislead


def test_the_kept_token_is_drawn_by_the_seed(trained, tmp_path):
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


def test_a_plain_llama_has_a_spectrum_and_no_tokens(tmp_path, capsys):
    assert run("--model", "demo", "--text", "demo", "--texts", 30, "--out", tmp_path) == 0
    [found] = json.loads((tmp_path / "collapse.json").read_text())
    assert "cosines" not in found and found["alignment"] is None and found["texts"] == 30
    x = plain_encoder("demo").table
    assert len(found["spectrum"]) == x.shape[1]


def test_without_matplotlib_the_numbers_are_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert run("--model", "demo", "--text", "demo", "--texts", 20, "--out", tmp_path) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert (tmp_path / "collapse.json").is_file()


@pytest.mark.parametrize("arguments, fragment", [
    (["--text", "nowhere.txt"], "nowhere.txt"), (["--task", "st17"], "did you mean sts17"),
    (["--task", "sts"], "a group of tasks; name one"),
    (["--text", "demo", "--model", "demo", "dmeo"], "dmeo: no such folder"),
    (["--task", "sts"], "a group of tasks; name one"),
    (["--model", "demo", "dmeo", "--text", "demo"], "dmeo: no such folder"),
    (["--task", "demo-sts", "--save", "x"], "no memory tokens"),
])
def test_what_cannot_be_done_ends_in_a_line(arguments, fragment, tmp_path, capsys):
    assert run("--model", "demo", *arguments, "--out", tmp_path) == 2
    assert fragment in capsys.readouterr().err
    assert not (tmp_path / "collapse.json").exists()


@pytest.mark.parametrize("arguments", [
    ["--texts", "1"], ["--seed", "-1"], ["--merge", "1.5"], ["--merge", "nan"],
    ["--method", "mode"], ["--text", "x"], ["--save", "x", "--model", "demo", "demo"],
])
def test_settings_that_make_no_sense_are_refused(arguments):
    with pytest.raises(SystemExit) as stop:
        collapse.main(["--model", "demo", "--task", "demo-sts", *arguments])
    assert stop.value.code == 2


def test_a_file_in_the_place_of_out_is_said_before_anything_is_read(tmp_path, capsys, monkeypatch):
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
        return np.ones((len(texts), 256)), 0.0

    monkeypatch.setattr(collapse, "read_states", states)
    assert run("--model", "demo", "--task", "demo-retrieval", "--out", tmp_path) == 0
    assert [document for _, document in calls] == [False, True] and calls[1][0] > calls[0][0]


def test_the_uniformity_of_zero_rows_is_a_number():
    x = np.array([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
    assert collapse.uniformity(x) == pytest.approx(-4)  # all squared distances count as 2


def test_save_never_replaces_an_encoder(trained, tmp_path, capsys):
    before = sorted((p, p.stat().st_mtime_ns) for p in trained.rglob("*"))
    assert run("--model", trained, "--task", "demo-sts", "--texts", 20, "--out", tmp_path / "out",
               "--save", trained.parent) == 2
    assert "exists already; name a new folder" in capsys.readouterr().err
    assert sorted((p, p.stat().st_mtime_ns) for p in trained.rglob("*")) == before


def test_an_encoder_of_kept_tokens_is_another_one(trained, tmp_path, capsys):
    """Its results are not taken for those of the whole, and it is not merged into a plain Llama."""
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
    assert model.main(["merge", str(trained), str(tmp_path / "plain")]) == 2
    assert "would average all 4 memory tokens" in capsys.readouterr().err
    (trained / "encoder.json").write_text(json.dumps(about))


def test_embeddings_that_are_no_numbers_end_in_a_line(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model.Encoder, "pool", lambda self, memory: memory[:, 0] * torch.nan)
    assert run("--model", trained, "--task", "demo-sts", "--texts", 9, "--out", tmp_path) == 2
    assert "no finite numbers" in capsys.readouterr().err
