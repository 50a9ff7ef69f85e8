"""The pages: commands parse, Python runs; names, files and links exist; no placeholder is left."""

import functools
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, SMOLLM2, mteb_demo_tasks, run_of, write_smollm2
from torch.distributed.run import get_args_parser

import collapse
import contrastive
import embed
import evaluate
import export
import mine
import paper
import pretrain_ctkd as stage1
from evaluate import evaluate_task
from model import load_encoder, save_encoder

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "data").glob("*/README.md"))]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
PROSE = {page: BLOCK.sub("", text) for page, text in TEXT.items()}
EXAMPLES = {re.match(r'"""(\w+\.py): ', code)[1]: code  # see test_extending.py
            for kind, code in BLOCK.findall(TEXT[ROOT / "docs/extending.md"]) if kind == "python"}


def spans(page: Path) -> list[str]:
    """What stands between backticks in the prose of a page."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", PROSE[page])]


def joined(text: str) -> list[str]:
    """The lines of a text; what a backslash goes on with is one line."""
    return text.replace("\\\n", " ").splitlines()


def paper_table() -> list[list[str]]:
    """The rows of README.md's table from the paper to the code, as cells."""
    table = TEXT[ROOT / "README.md"].split("\n## From the paper")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return rows[2:]


# ---------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------


def commands():
    """Every command line on the pages that starts Python: those in shell blocks and in prose."""
    for page in PAGES:
        shell = [line for kind, code in BLOCK.findall(TEXT[page]) if kind == "sh"
                 for line in joined(code)]
        for line in shell + spans(page):
            if command := re.match(r"(?:[A-Z_]+=\S+ )*((?:python|torchrun) .*)", line):
                words = shlex.split(command[1], comments=True)
                if "-c" not in words:
                    yield page, words


def flags_in(words: list[str]) -> set[str]:
    """The flags among the words of a command, those in a quoted word ("--lr 1e-4 ...") too."""
    single = [part for word in words for part in word.split()]
    return {word.partition("=")[0] for word in single if re.match(r"--?[a-z]", word)}


@functools.cache
def help_of(*command: str) -> str:
    """What a Python command prints under --help; the project's own are asked in this process."""
    if command[0] in map(str, ROOT.glob("*.py")):
        name = Path(command[0]).stem
        with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
            importlib.import_module({"model": "export"}.get(name, name)).main(["--help"])
        return printed.getvalue()
    return subprocess.run([sys.executable, *command, "--help"], check=True, capture_output=True,
                          text=True, cwd=ROOT / "docs",
                          env=os.environ | {"PYTHONPATH": str(ROOT)}).stdout


def flags_of(text: str) -> set[str]:
    """The flags that a --help lists, whole."""
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text))


def script_flags(script: Path) -> set[str]:
    """The flags that a script knows, the stages' included if it hands on what it does not know."""
    flags = flags_of(help_of(str(script)))
    if "parse_known_args" in script.read_text(encoding="utf-8"):
        for stage in ("pretrain_ctkd.py", "contrastive.py"):
            flags |= flags_of(help_of(str(ROOT / stage)))
    return flags


@functools.cache
def torchrun_flags() -> frozenset:
    """torchrun's own flags, with - and with _."""
    known = flags_of(get_args_parser().format_help())
    return frozenset(known | {flag[:2] + flag[2:].replace("_", "-") for flag in known})


def parse_evaluate(arguments: list[str]):
    """Parse a command line of evaluate.py, and look up what it names."""
    args = evaluate.parse_arguments(arguments)
    if args.task:
        assert evaluate.chosen_tasks(args)
    elif args.compare:
        assert set(args.compare[1:]) <= set(evaluate.PUBLISHED["rows"])
    else:
        assert args.list or args.task_dir and args.kind


def parse_export(arguments: list[str]):
    """Parse a command line of export.py, without the export."""
    assert export.parse_arguments(arguments).out


def parse_stage(name: str, arguments: list[str]):
    """Parse and check a command line of a stage."""
    stage = importlib.import_module(name)
    stage.check(stage.parse_arguments(arguments))


PARSERS = {
    "pretrain_ctkd.py": functools.partial(parse_stage, "pretrain_ctkd"),
    "contrastive.py": functools.partial(parse_stage, "contrastive"),
    "evaluate.py": parse_evaluate, "collapse.py": collapse.parse_arguments,
    "mine.py": lambda arguments: mine.check(mine.parse_arguments(arguments)),
    "export.py": parse_export, "model.py": parse_export, "embed.py": embed.parse_arguments,
}


def check_script(page: Path, script: str, arguments: list[str], folder: Path):
    """The script exists, and takes the arguments."""
    if page.name == "extending.md" and script in EXAMPLES:
        for name, code in EXAMPLES.items():
            (folder / name).write_text(code, encoding="utf-8")
        path = folder / script
    else:
        assert (path := ROOT / script).is_file(), script
        if script in PARSERS and "--help" not in arguments:
            PARSERS[script](arguments)
    if flags := flags_in(arguments):
        assert flags <= script_flags(path) | {"--help"}, flags - script_flags(path)


@pytest.mark.parametrize("page, words", [
    pytest.param(page, words, id=f"{page.relative_to(ROOT)}: {' '.join(words)}")
    for page, words in commands()
])
def test_a_command_parses(page, words, tmp_path):
    if words[0] == "torchrun":
        if any(word.endswith(".py") for word in words):
            parsed = get_args_parser().parse_args(words[1:])
            check_script(page, parsed.training_script, parsed.training_script_args, tmp_path)
            words = words[: words.index(parsed.training_script)]
        assert flags_in(words) <= torchrun_flags()
    elif words[1:2] == ["-m"]:
        assert words[2] == "pytest"
        assert flags_in(words[3:]) <= flags_of(help_of("-m", "pytest"))
        assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests/"))
    else:
        check_script(page, words[1], words[2:], tmp_path)


def test_the_commands_are_found():
    found = [(page.name, words) for page, words in commands()]
    assert ("README.md", ["torchrun", "contrastive.py", "--stage", "scl"]) in found
    assert {page for page, _ in found} >= {"README.md", "runs.md", "evaluation.md", "measured.md",
                                           "results.md", "extending.md", "first-hour.md"}
    assert len(found) > 40


@pytest.mark.parametrize("words", [
    "evaluate.py --tasks sts17", "evaluate.py --task stss17", "pretrain_ctkd.py --nun-texts 5",
    "pretrain_ctkd.py --num-text 5", "contrastive.py --stage sclx", "export.py only-one",
    "bench/report.py --run runs/ablations", "nowhere.py --help", "evaluate.py --compare a XX",
])
def test_a_wrong_command_does_not_parse(words, tmp_path, capsys):
    script, *arguments = words.split()
    with pytest.raises((AssertionError, SystemExit, evaluate.UserError)):
        check_script(ROOT / "README.md", script, arguments, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_flag_in_the_prose_is_a_flag_of_some_command(page):
    scripts = [path for folder in (".", "bench", "data/demo")
               for path in (ROOT / folder).glob("*.py")]
    named = {flag for span in spans(page) for flag in re.findall(r"^--[a-z][\w-]*", span)}
    known = torchrun_flags() | flags_of(help_of("-m", "pytest"))
    for script in scripts:
        if named <= known:
            break
        if "__main__" in (source := script.read_text(encoding="utf-8")) and "parse" in source:
            known |= flags_of(help_of(str(script)))
    assert named <= known, named - known


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_flags_after_the_name_of_a_script_are_its_flags(page):
    for span in spans(page):
        if (words := span.split())[0].endswith(".py") and (ROOT / words[0]).is_file():
            if flags := flags_in(words):
                assert flags <= script_flags(ROOT / words[0]), span


@pytest.mark.parametrize("mark, command", [("run", "torchrun pretrain_ctkd.py"),
                                           ("test", "python -m pytest")])
def test_the_first_commands_are_marked_for_the_check_of_a_fresh_clone(mark, command):
    (block,) = re.findall(rf"<!-- {mark} -->\n```sh\n(.*?)```", TEXT[ROOT / "README.md"], re.S)
    lines = block.splitlines()
    assert command in lines and lines[0].startswith("pip install -r requirements.txt")
    assert all((ROOT / name).is_file() for name in re.findall(r"-r (\S+)", lines[0]))


# ---------------------------------------------------------------------------------------------
# Python
# ---------------------------------------------------------------------------------------------


PYTHON = {page: [code for kind, code in BLOCK.findall(TEXT[page]) if kind == "python"]
          for page in PAGES if page.name != "extending.md"}


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Page -> the names that its Python defines, run from top to bottom without mteb's block, in
    a folder with an encoder where the demo's first stage puts it, its export, and a folder that
    plays the hub's base of data/smollm2."""
    folder, found = tmp_path_factory.mktemp("docs"), {}
    config = stage1.parse_arguments(["--dtype", "float32"])
    encoder = folder / "runs/ctkd-demo/encoder"
    save_encoder(stage1.new_encoder(config, run_of(config)), encoder)
    export.export_encoder(load_encoder(encoder), folder / "exported")
    (folder / "runs/scl-demo").symlink_to(folder / "runs/ctkd-demo")
    corpus = Path("data/demo/demo-retrieval/corpus.jsonl")
    (folder / corpus).parent.mkdir(parents=True)
    lines = (ROOT / corpus).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / corpus).write_text("".join(lines[:4]), encoding="utf-8")
    (folder / "data/smollm2").symlink_to(SMOLLM2)
    write_smollm2(folder / "HuggingFaceTB/SmolLM2-135M-Instruct")
    with chdir(folder):
        command = next(line for line in joined(TEXT[ROOT / "docs/runs.md"])
                       if line.startswith("python embed.py"))
        assert embed.main(shlex.split(command)[2:]) == 0
        for page, blocks in PYTHON.items():
            for code in blocks:
                if "import mteb" not in code:
                    exec(code, found.setdefault(page.name, {}))
    found["folder"] = folder
    return found


def test_the_python_on_the_pages_runs_and_agrees(names):
    assert sum(map(len, PYTHON.values())) >= 4
    embeddings = names["README.md"]["embeddings"]
    assert embeddings.shape == (2, 256)
    assert np.abs(embeddings - names["runs.md"]["embeddings"]).max() < 1e-5  # of the export
    ours = evaluate_task("demo-retrieval", names["evaluation.md"]["encoder"].encode)
    assert names["evaluation.md"]["scores"]["main_score"] == ours["main_score"]


def test_the_block_for_mteb_runs_and_agrees(names, monkeypatch, mteb):
    """On a bundled task in place of the one that it would download."""
    ((page, code),) = [(page, code) for page, blocks in PYTHON.items() for code in blocks
                       if "import mteb" in code]
    task = mteb_demo_tasks(mteb)["demo-sts"]
    monkeypatch.setattr(mteb, "get_task", lambda *_, **__: task)
    with chdir(names["folder"]):
        exec(code, names[page.name])
    (scores,) = names[page.name]["results"].task_results[0].scores["test"]
    ours = evaluate_task("demo-sts", names[page.name]["encoder"].encode)
    assert scores["main_score"] == pytest.approx(ours["main_score"], abs=1e-4)


# ---------------------------------------------------------------------------------------------
# Names, files, links
# ---------------------------------------------------------------------------------------------

FILE_ENDINGS = "py|md|json|jsonl|gz|txt|tsv|csv|svg|safetensors|yaml"


def resolve(name: str):
    """The object of a dotted name: a module of the project, then attributes."""
    parts = name.split(".")
    at = 2 if parts[0] in ("data", "runtime") else 1
    value = importlib.import_module(".".join(parts[:at]))
    for part in parts[at:]:
        fields = getattr(value, "__dataclass_fields__", {})
        value = fields[part] if part in fields else getattr(value, part)
    return value


def dotted_names(page: Path) -> list[str]:
    """The spans of a page that name something in a module of the project."""
    modules = "|".join([path.stem for path in ROOT.glob("*.py")] + ["data", "runtime"])
    name = re.compile(rf"(?:{modules})(?:\.\w+)+")
    return [span for span in spans(page)
            if name.fullmatch(span) and not re.search(rf"\.({FILE_ENDINGS})$", span)]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_the_names_on_a_page_exist(page):
    for name in dotted_names(page):
        resolve(name)


def test_the_table_from_the_paper_to_the_code_is_complete():
    rows = paper_table()
    oracles = {name for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    assert all(callable(getattr(paper, name)) for name in oracles)
    assert oracles >= {name for name in vars(paper) if re.match(r"eq\d", name)}
    fast = [name for row in rows for name in re.findall(r"`([\w.]+)`", row[2]) if "." in name]
    assert len([name for name in fast if not name.endswith(".py")]) >= 15
    assert {name.partition(".")[0] for name in fast} >= {
        "model", "pretrain_ctkd", "contrastive", "measures", "evaluate", "collapse"}


def preset_table() -> dict[str, list[str]]:
    """Setting -> its value in each stage, as docs/official.md prints `--preset paper`."""
    section = TEXT[ROOT / "docs/official.md"].split("\n## ")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in section.splitlines() if line.startswith("| `")]
    assert all(len(row) == 5 and row[4] for row in rows)  # each has its source
    return {name: row[1:4] for row in rows for name in re.findall(r"`(\w+)`", row[0])}


@pytest.mark.parametrize("stage, place", [("ctkd", 0), ("ucl", 1), ("scl", 2)])
def test_the_page_of_the_official_code_has_every_value_of_the_papers_preset(stage, place):
    module = stage1 if stage == "ctkd" else contrastive
    flags = ["--preset", "paper"] + ["--stage", stage] * (stage != "ctkd")
    config, table = module.parse_arguments(flags), preset_table()
    for name, cells in table.items():
        value = getattr(config, name, None)
        if cells[place] == "-":
            continue  # not of this stage
        if isinstance(value, bool):
            assert cells[place] == ("yes" if value else "no"), name
        elif isinstance(value, (int, float)):
            assert float(cells[place]) == value, name
        else:
            assert cells[place] == value, name
    names = re.findall(r"`(\w+)`", TEXT[ROOT / "docs/official.md"].split("Not of the method")[1]
                       .split("\n\n")[0])
    assert {f for f in module.Config.__annotations__} <= {*table, *names, "stage", "save_every"}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_the_files_named_on_a_page_exist(page):
    folders = "runtime|data|docs|bench|tests|\\.ci"
    inside = re.compile(rf"(?:{folders})/[\w./-]*")
    gone = re.findall(r"`(\S+)`,\s+is\s+no\s+longer\s+in\s+the\s+tree", PROSE[page])
    for span in spans(page):
        for word in span.split():
            if inside.fullmatch(word):
                assert (ROOT / word).exists() != (word in gone), word
            elif re.fullmatch(r"\w+\.py", word) and word not in EXAMPLES:
                places = [ROOT / word, page.parent / word, ROOT / "bench" / word]
                assert any(place.is_file() for place in places), word


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = [re.sub(r"[`*]", "", title) for title in re.findall(r"^#+ (.*)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PROSE[page]):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists() and there.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_no_placeholder_is_left(page):
    assert not re.search(r"@@|\b(TODO|FIXME|TBD|XXX)\b|lorem ipsum", TEXT[page])


def test_every_page_is_reached_from_the_readme():
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        reached.add(page := ahead.pop())
        links = re.findall(r"\]\(([^)#\s]+\.md)[^)]*\)", TEXT.get(page, ""))
        ahead += {(page.parent / link).resolve() for link in links if "://" not in link} - reached
    assert set(PAGES) <= reached
