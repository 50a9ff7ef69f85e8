"""Results of evaluate.py: one JSON file per task in MTEB's format, averages, published rows.

A run's folder is results/<model>[@method][+instruction]/ with one <Task>.json per task, which mteb
can read too.
"""

import json
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from runtime.encoders import NEWER
from runtime.errors import UserError, printable
from runtime.files import MOST_JSON, open_regular, write_file
from runtime.identity import base_changes

TABLES = Path(__file__).resolve().parents[1] / "data"
TASKS = json.loads((TABLES / "tasks.json").read_text(encoding="utf-8"))
PUBLISHED = json.loads((TABLES / "published.json").read_text(encoding="utf-8"))
PAPER = PUBLISHED["tasks"]  # the 14
GROUPS = {group: [task for task in PAPER if TASKS[task]["group"] == group]
          for group in ("clustering", "retrieval", "sts", "classification", "reranking")}

FORMAT = 2  # of the settings in a result; in format 1 max_tokens included the memory tokens

# what a finished result must share with the one asked for, besides base, task and adapters
SAME = ("method", "sha256", "attention", "max_tokens", "template", "dtype", "instruction", *NEWER)


def label_of(model: str, method: str, instruction: str = "auto") -> str:
    """The name of the folder with a model's results: model, method, instruction if not auto."""
    name = model.rstrip("/").removesuffix("/encoder").strip("/.").replace("/", "__")
    name = name or Path(model).resolve().name
    name += "" if method == "memory" else f"@{method}"
    return name + {"auto": "", "none": "+none"}.get(instruction, "+instruction")


def read_result(path: Path) -> dict:
    """A file that `write_result` has written; UserError if it is something else, or damaged."""
    try:
        with open_regular(path, MOST_JSON) as file:
            result = json.loads(file.read().decode())
        for value in (result["scores"]["test"][0]["main_score"], result["evaluation_time"]):
            if not isinstance(value, int | float) or not abs(value) < 1e38:
                raise ValueError(f"{str(value)[:50]!r} in place of a number")
        settings = result["settings"]
        for name, value, kind in (
            ("task_name", result["task_name"], str), ("notes", result["notes"], list),
            ("settings", settings, dict), ("base", settings.get("base") or {}, dict),
            ("paper", settings.get("paper") or "", str),
        ):
            if not isinstance(value, kind):
                raise ValueError(f"{name} is of another type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError,
            RecursionError) as error:
        raise UserError(f"{path}: damaged, or not a result of evaluate.py ({error!r}); remove it, "
                        f"or evaluate again with --force")
    return result


def finished(
    path: Path, settings: dict, base_files: Callable[[], str], pinned: bool
) -> dict | None:
    """The result in `path`, if there is one; UserError if it was made with other settings.

    settings["files"]: sha256 of the task's files, {} if they are not here. base_files: see
    identity.base_changes. pinned: the task is a fixed revision of a hub repository. A note is added
    if it is not known whether the task's files or the model are still the same.
    """
    if not path.exists():
        return None
    result = read_result(path)
    before = {**NEWER, **result["settings"]}
    lengths = [before.get(key) for key in ("max_tokens", "num_memory_tokens")]
    if "format" not in before and all(isinstance(length, int) for length in lengths):
        before["max_tokens"] -= before["num_memory_tokens"]
    changed = [f"{key}: {before.get(key)!r} -> {settings[key]!r}" for key in SAME
               if before.get(key) != settings[key]]
    if parts := base_changes(before.get("base") or {}, settings["base"], base_files):
        changed.append(f"the base model: {', '.join(parts)}")
    if before.get("adapters", settings["adapters"]) != settings["adapters"]:
        changed.append("the adapters' settings")
    changed += changed_files(before, settings)
    if changed:
        raise UserError(f"{path}: was made with other settings ({'; '.join(changed)}); evaluate "
                        f"again with --force, or name another --results folder")
    unknown = ["config.json, tokenizer and adapters"] * ("adapters" not in before)
    unknown += ["the task's files"] * (not pinned and not before.get("files"))
    if unknown:
        result["notes"] = [*result["notes"], f"an earlier version made it, without a hash of "
                           f"{' and of '.join(unknown)}: whether these are still the same is not "
                           f"known, --force evaluates again"]
    elif not pinned and not settings["files"]:
        result["notes"] = [*result["notes"], "the task's files are not all here now: whether they "
                           "are still the same is not known"]
    return result


def changed_files(before: dict, now: dict) -> list[str]:
    """How the task of a result differs from the one asked for: by the hashes of its files, or by
    its place if there are no hashes."""
    old, new = before.get("files"), now["files"]
    if not (isinstance(old, dict) and old and new):
        return [f"data: {before.get('data')!r} -> {now['data']!r}"
                ] * (before.get("data") != now["data"])
    changed = [f"kind: {before.get('kind')!r} -> {now['kind']!r}"
               ] * (before.get("kind") != now["kind"])
    roles = sorted(role for role in old.keys() | new.keys() if old.get(role) != new.get(role))
    return changed + [f"the task's files: {', '.join(roles)}"] * bool(roles)


def result_of(task: dict, scores: dict, settings: dict, seconds: float) -> dict:
    """One task's scores in the format of MTEB's result files, with our settings added."""
    subset = {"hf_subset": task.get("subset", "default"), "languages": ["eng-Latn"]}
    plain = {k: v for k, v in scores.items() if not isinstance(v, np.ndarray) and k != "notes"}
    return {"dataset_revision": task.get("revision", "local"), "task_name": task["name"],
            "mteb_version": None, "evaluation_time": round(seconds, 2), "kg_co2_emissions": None,
            "scores": {"test": [{**subset, **plain}]},
            "notes": scores["notes"], "settings": settings}


def write_result(path: Path, result: dict):
    """Write a result; the file is never half written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); name another --results")
    write_file(path, json.dumps(result, indent=2) + "\n")


def mean_of(scores: dict[str, float], tasks: list[str]) -> float | None:
    """The mean score of the tasks, None unless all are there."""
    return float(np.mean([scores[t] for t in tasks])) if set(tasks) <= set(scores) else None


def summary(scores: dict[str, float]) -> list[tuple[str, float | None]]:
    """Group averages and the average of the 14, each None unless all its tasks are there."""
    rows = []
    for group, tasks in [*GROUPS.items(), ("average", PAPER)]:
        if there := sum(task in scores for task in tasks):
            part = "" if there == len(tasks) else f"{there} of "
            rows.append((f"{group} ({part}{len(tasks)} tasks)", mean_of(scores, tasks)))
    return rows


def read_results(
    name: str, results: Path
) -> tuple[str, dict[str, float], str | None, list[str], dict[str, dict]]:
    """A column of --compare: its title, scores x 100 by task, the paper's row for it, its notes,
    the hashes of the tasks' files.

    `name` is a published row, or a run as a folder of results or as it was given to --model.
    """
    if name in PUBLISHED["rows"]:
        row = zip(PAPER, PUBLISHED["rows"][name])
        return name, {task: score for task, score in row if score is not None}, None, [], {}
    folders = [results / name, results / label_of(name, "memory"), Path(name)]
    files = next((f for folder in folders if (f := sorted(folder.glob("*.json")))), [])
    if files and files[0].parent == Path(name):  # it may be a run's folder, with other files
        files = [path for path in files if path.is_file() and path.stat().st_size <= MOST_JSON
                 and b'"task_name"' in path.read_bytes()]
    scores, notes, paper, hashes, makers = {}, [], None, {}, set()
    keys = {task["name"]: key for key, task in TASKS.items()}
    for result in map(read_result, files):
        task = keys.get(result["task_name"], result["task_name"])
        scores[task] = 100 * result["scores"]["test"][0]["main_score"]
        settings = result["settings"]
        known = "format" in settings or not settings.get("history")
        paper = settings.get("paper") if known else None  # format 1 named one for any training
        notes += [f"{task}: {note}" for note in result["notes"]]
        hashes[task], base = settings.get("files"), settings.get("base") or {}
        if "weights" in base:  # earlier results record less of the model
            makers.add(str([base.get("sha256"), *map(settings.get, ("adapters", "sha256"))]))
    if len(makers) > 1:
        notes.append(f"{len(makers)} different models have made these scores; evaluate again with "
                     f"--force")
    if not scores:
        known = [p.name for p in sorted(results.glob("*")) if p.is_dir()] + [*PUBLISHED["rows"]]
        near = get_close_matches(name, known, n=3, cutoff=0.4) or known[:8] + ["..."]
        raise UserError(f"--compare {name}: no results of that name under {results}/, nor a "
                        f"published row; there are {', '.join(near)}")
    return files[0].parent.name, scores, paper, notes, hashes


def compare(names: list[str], results: Path):
    """Print runs side by side, each next to the paper's row for it, with differences."""
    columns, notes, named, known = [], [], [], {}
    for name in names:
        title, scores, paper, said, hashes = read_results(name, results)
        title = printable(title)
        notes += [f"{title}, {note}" for note in said]
        for task, own in hashes.items():
            first, before = known.setdefault(task, (title, own))
            if before and own and before != own:
                notes.append(f"{task}: {first} and {title} were scored on different files")
        columns.append((title, scores, ".2f"))
        if paper:
            published = read_results(paper, results)[1]
            columns.append((f"paper: {printable(paper)}", published, ".2f"))
            columns.append(("difference", subtract(scores, published), "+.2f"))
        if named:
            columns.append((f"against {named[0][0]}", subtract(scores, named[0][1]), "+.2f"))
        named.append((title, scores))
    there = {task for _, scores in named for task in scores}
    widths = [max(8, len(title)) + 2 for title, *_ in columns]

    def line(head: str, cells: list[str]):
        print(f"{printable(head):<26}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths)))

    line("main score x 100", [title for title, *_ in columns])
    for task in [t for t in TASKS if t in there] + sorted(there - set(TASKS)):
        line(task, [f"{s[task]:{form}}" if task in s else "-" for _, s, form in columns])
    for head, group in [*GROUPS.items(), ("average", PAPER)]:
        if any(mean_of(scores, group) is not None for _, scores in named):
            means = [(mean_of(s, group), form) for _, s, form in columns]
            line(f"{head} ({len(group)} tasks)",
                 ["-" if mean is None else f"{mean:{form}}" for mean, form in means])
    line("tasks of the 14", [str(len(set(s) & set(PAPER))) for _, s, _ in columns])
    print(f"published rows: {PUBLISHED['paper']}")
    for note in notes:
        print(f"note: {printable(note)}")


def subtract(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """a - b on the tasks that both have."""
    return {task: a[task] - b[task] for task in a if task in b}
