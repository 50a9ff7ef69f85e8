"""The house: who may import whom, what a module may not do, how long things may get."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from packaging.requirements import Requirement

TOP = sorted(ROOT.glob("*.py"))
PACKAGES = [*sorted((ROOT / "runtime").glob("*.py")), *sorted((ROOT / "data").glob("*.py"))]
STAGES = ("pretrain_ctkd", "contrastive")
STAGE_PATH = ("model", "lora", "head", "pretexts", *STAGES)  # what a reader of a stage has to read
EVERYTHING = [*TOP, *(path for folder in ("runtime", "data", "bench", "tests")
                      for path in sorted((ROOT / folder).rglob("*.py")))]


def module(path: Path) -> str:
    """The name under which a file of the project is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in [*TOP, *PACKAGES]}


def tree(path: Path) -> ast.Module:
    """The syntax tree of a file, without what runs only if the file is a command."""
    parsed = ast.parse(path.read_text(encoding="utf-8"))
    parsed.body = [node for node in parsed.body if not is_main_block(node)]
    return parsed


def is_main_block(node: ast.stmt) -> bool:
    """Whether this is `if __name__ == "__main__":`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imported(nodes) -> set[str]:
    """The project's modules that the import statements among `nodes` name."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"a relative import: {ast.unparse(node)}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in names if name in MODULES and MODULES[name].name != "__init__.py"}


def imports(name: str) -> set[str]:
    """The project's modules that a module imports, also inside functions."""
    return imported(ast.walk(tree(MODULES[name])))


def top_level_imports(name: str) -> set[str]:
    """The project's modules that are imported when the module is."""
    def outside_functions(node):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield child
                yield from outside_functions(child)

    return imported(outside_functions(tree(MODULES[name])))


def calls(path: Path) -> set[str]:
    """What is called in a file, as it is written: print, torch.load, ..."""
    return {ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}


def functions(path: Path):
    """(name, number of lines) of every function and method of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def length(path: Path) -> int:
    """The number of lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


# ---------------------------------------------------------------------------------------------
# Imports
# ---------------------------------------------------------------------------------------------

MAY_IMPORT = {  # module or package -> the modules and packages of the project that it may import
    "runtime": {"runtime"},
    "data": {"data", "runtime"},
    "lora": {"runtime"},
    "model": {"lora", "data", "runtime"},
    "measures": set(),
    "paper": set(),
    "head": {"runtime"},
    "pretexts": {"head", "model", "data", "runtime"},
    "pretrain_ctkd": {"pretexts", "head", "model", "lora", "data", "runtime", "evaluate"},
    "contrastive": {"measures", "model", "lora", "data", "runtime", "evaluate"},
    "evaluate": {"measures", "model", "data", "runtime"},
    "export": {"contrastive", "pretrain_ctkd", "evaluate", "model", "lora", "data", "runtime"},
    "collapse": {"evaluate", "measures", "model", "data", "runtime"},
    "embed": {"evaluate", "measures", "data", "runtime"},
    "mine": {"embed", "evaluate", "measures", "model", "data", "runtime"},
}


def test_a_module_imports_only_what_its_place_allows():
    wrong = [f"{name} imports {other}" for name in MODULES for other in imports(name)
             if other.partition(".")[0] not in MAY_IMPORT[name.partition(".")[0]]]
    assert wrong == []


def test_the_rules_see_the_imports():
    """The tests above and below would pass if no import were found."""
    assert {"lora", "data.tokenizer", "runtime.cpu", "runtime.encoders"} <= imports("model")
    assert {"evaluate", "model", "runtime.run"} <= imports("contrastive")
    assert {"runtime.errors", "runtime.files"} <= imports("runtime.checkpoints")
    assert "print" in calls(MODULES["collapse"])
    assert set(MAY_IMPORT) == {name.partition(".")[0] for name in MODULES}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_the_evaluation_only_inside_functions(stage):
    assert "evaluate" in imports(stage) and "evaluate" not in top_level_imports(stage)


def test_nothing_imports_in_a_circle():
    try:
        TopologicalSorter({name: imports(name) for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_paper_imports_the_project_only_as_a_command():
    path = MODULES["paper"]
    (block,) = [n for n in ast.parse(path.read_text()).body if is_main_block(n)]
    assert {"model", "pretrain_ctkd"} <= imported(ast.walk(block))
    assert imports("paper") == set()


# ---------------------------------------------------------------------------------------------
# What a module may not do
# ---------------------------------------------------------------------------------------------


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PRINTING = {  # modules that talk to the user; all others compute
    "pretrain_ctkd", "contrastive", "evaluate", "export", "collapse", "embed", "mine",
    "data.corpora",
    "runtime.checkpoints", "runtime.errors", "runtime.hub", "runtime.results", "runtime.run",
}


def unpickles(node: ast.AST) -> bool:
    """Whether this imports a pickling module, or names torch.load or torch.save."""
    if isinstance(node, ast.Import):
        return bool(PICKLES & {alias.name.partition(".")[0] for alias in node.names})
    if isinstance(node, ast.ImportFrom):
        names = {alias.name for alias in node.names} if node.module == "torch" else set()
        return (node.module or "").partition(".")[0] in PICKLES or bool({"load", "save"} & names)
    if isinstance(node, ast.keyword):
        return node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
    return isinstance(node, ast.Attribute) and ast.unparse(node) in (
        "torch.load", "torch.save", "torch.jit.load")


@pytest.mark.parametrize("line", [
    "import pickle", "import os, pickle as p", "from pickle import loads", "from torch import load",
    "torch.load(path)", "load = torch.load", "numpy.load(path, allow_pickle=True)",
])
def test_the_rule_against_pickles_sees(line):
    assert any(map(unpickles, ast.walk(ast.parse(line))))


def test_nothing_is_unpickled_anywhere():
    wrong = [f"{path.relative_to(ROOT)}:{node.lineno}" for path in EVERYTHING
             for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if unpickles(node)]
    assert wrong == [] and len(EVERYTHING) > 50


def test_nothing_evaluates_strings():
    forbidden = {"eval", "exec", "compile", "os.system"}
    assert [name for name, path in MODULES.items() if forbidden & calls(path)] == []


def test_what_computes_does_not_print():
    printing = {"print", "sys.stdout.write", "sys.stderr.write"}
    assert {name for name, path in MODULES.items() if printing & calls(path)} <= PRINTING


def test_the_network_leaves_checks_to_the_runtime():
    raised = [node.lineno for node in ast.walk(ast.parse(MODULES["model"].read_text()))
              if isinstance(node, ast.Raise)]
    assert raised == []


def test_the_files_that_the_code_names_exist():
    """In comments, docstrings and messages: docs/..., bench/..., runtime/..., tests/..."""
    named = re.compile(r"\b(?:docs|bench|runtime|tests|data)/[\w/-]+\.(?:py|md|json)\b")
    wrong = [f"{path.relative_to(ROOT)}: {name}" for path in [*TOP, *PACKAGES]
             for name in named.findall(path.read_text(encoding="utf-8"))
             if not (ROOT / name).is_file()]
    assert wrong == []


# ---------------------------------------------------------------------------------------------
# Lengths
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_the_training_loop_is_short_and_in_the_open(stage):
    source = MODULES[stage].read_text()
    (loop,) = [node for node in ast.walk(ast.parse(source))
               if isinstance(node, ast.For) and ast.unparse(node.iter) == "run.steps()"]
    assert ast.unparse(loop.target) == "step" and loop.end_lineno - loop.lineno + 1 <= 25
    called = sorted((node.lineno, node.col_offset, ast.unparse(node.func))
                    for node in ast.walk(loop) if isinstance(node, ast.Call))
    parts = (".backward", ".sum_gradients", ".clip_grad_norm_", ".require_finite",
             "optimizer.step", ".end_step")
    assert [part for *_, name in called for part in parts if name.endswith(part)] == list(parts)


def test_no_function_is_above_60_lines():
    assert [(path.name, name, lines) for path in [*TOP, *PACKAGES]
            for name, lines in functions(path) if lines > 60] == []


@pytest.mark.parametrize("name", STAGE_PATH)
def test_a_file_on_the_path_of_a_stage_has_at_most_500_lines(name):
    assert length(MODULES[name]) <= 500


def test_the_paper_has_under_160_lines():
    assert length(MODULES["paper"]) < 160


def test_the_network_begins_early_in_its_file():
    lines = MODULES["model"].read_text().splitlines()
    (norm,) = [i for i, line in enumerate(lines, 1) if line.startswith("class RMSNorm")]
    assert norm <= 60
    assert any("Eq. 1" in line for line in lines[:330])


# ---------------------------------------------------------------------------------------------
# What stands beside the code
# ---------------------------------------------------------------------------------------------


def requirements(name: str) -> dict[str, Requirement]:
    """Package -> what a file of requirements says of it."""
    lines = (ROOT / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    return {requirement.name: requirement for requirement in found}


def test_the_pins_of_ci_lie_in_the_ranges_that_are_allowed():
    ranges, pins = requirements("requirements.txt"), requirements("constraints.txt")
    assert ranges.keys() == pins.keys()
    for name, pin in pins.items():
        [only] = pin.specifier
        assert only.operator == "==" and only.version in ranges[name].specifier
        assert {spec.operator for spec in ranges[name].specifier} == {">=", "<"}
    assert "constraints.txt" in (ROOT / ".ci/run").read_text()


def test_the_citation_names_the_paper_and_the_licence():
    about = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert about["cff-version"] == "1.2.0" and about["title"] and about["message"]
    assert (ROOT / "LICENSE").read_text().startswith(f"{about['license']} License")
    [paper] = about["references"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert paper["title"] in readme and paper["url"] in readme
    assert all(author["family-names"] for author in paper["authors"])
