"""Prove that the tests bite: plant the defects of tests/defects.toml, one at a time.

    python tests/plant.py               all defects
    python tests/plant.py NAME ...      some of them
    python tests/plant.py --jobs 2      two side by side, for machines with cores to spare

Each defect is a small mistake in the product code and names the tests that must fail with it. The
work is done in copies of the checkout. First all named tests must pass without any defect; then
each defect has a line: its name, what became of it, and the seconds that its tests took. Only
pytest's exit code 1, a test that failed, is a catch; that a defect uses a name which the code no
longer has is none, as code that cannot run proves nothing. The exit code is 1 if a defect survived,
was not judged, or could not be planted.

An entry of defects.toml has `name`, `file`, `find` (it occurs once in the file), `replace`, `test`
(a node id, or a list of them) and `why`. `survives_before` records that the tests of the time at
which the entry was written let the defect through, so that a test was added for it.
"""

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds for the tests of one defect: some mistakes never come to an end
VERDICTS = {0: "SURVIVED", 1: "caught", 2: "NOT JUDGED: the tests cannot be collected",
            4: "NOT JUDGED: the test does not exist", 5: "NOT JUDGED: the test does not exist"}


def read_defects(names: list[str]) -> list[dict]:
    """The entries of defects.toml, or those that are named; SystemExit for an unknown name."""
    defects = tomllib.loads((ROOT / "tests/defects.toml").read_text(encoding="utf-8"))["defect"]
    known = [defect["name"] for defect in defects]
    if twice := {name for name in known if known.count(name) > 1}:
        sys.exit(f"defects.toml: more than one entry is named {', '.join(sorted(twice))}")
    if unknown := set(names) - set(known):
        sys.exit(f"defects.toml: no entry is named {', '.join(sorted(unknown))}")
    return [defect for defect in defects if not names or defect["name"] in names]


def tests_of(defect: dict) -> list[str]:
    """The node ids of the tests that must fail."""
    return [defect["test"]] if isinstance(defect["test"], str) else defect["test"]


def copy_checkout(target: Path):
    """Copy what git tracks, and what it neither tracks nor ignores, as it stands in the folder."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, done.stdout.decode().split("\0")):
        if (ROOT / name).is_file():  # a tracked file may have been removed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def run_pytest(folder: Path, tests: list[str]) -> tuple[int | None, str]:
    """pytest's exit code (None after TIMEOUT) and output, for these tests in the copy."""
    # no .pyc files: one could outlive its source, whose size and time a defect need not change
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--basetemp",
               str(folder.parent / "pytest"), *tests]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, timeout=TIMEOUT, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout


def plant(defect: dict, folder: Path) -> str:
    """What becomes of the defect in the copy, which is afterwards as it was before."""
    path = folder / defect["file"]
    original = path.read_text(encoding="utf-8")
    if (count := original.count(defect["find"])) != 1:
        return f"NOT PLANTED: `find` occurs {count} times in {defect['file']}"
    path.write_text(original.replace(defect["find"], defect["replace"]), encoding="utf-8")
    try:
        code, output = run_pytest(folder, tests_of(defect))
    finally:
        path.write_text(original, encoding="utf-8")
    if code == 1 and re.search(r"^E +(NameError|UnboundLocalError):", output, re.MULTILINE):
        return "NOT JUDGED: `replace` uses a name that is not there"
    return VERDICTS.get(code, f"NOT JUDGED: pytest ended with {code}")


def plant_all(defects: list[dict], folders: list[Path]) -> int:
    """Plant each defect in whichever copy is free, with a line for each; returns how many were
    caught."""
    free: queue.Queue[Path] = queue.Queue()
    for folder in folders:
        free.put(folder)

    def judge(defect: dict) -> tuple[str, float]:
        folder, start = free.get(), time.perf_counter()
        try:
            return plant(defect, folder), time.perf_counter() - start
        finally:
            free.put(folder)

    caught, width = 0, max(len(defect["name"]) for defect in defects)
    with ThreadPoolExecutor(len(folders)) as pool:
        for defect, (verdict, seconds) in zip(defects, pool.map(judge, defects)):
            caught += verdict == VERDICTS[1]
            print(f"{defect['name']:<{width}}  {verdict}  {seconds:.1f} s", flush=True)
    return caught


def main(argv: list[str] | None = None) -> int:
    """Plant the named defects, or all; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="the defects to plant")
    parser.add_argument("--jobs", type=int, default=1, help="defects at a time (default 1)")
    args = parser.parse_args(argv)
    defects = read_defects(args.names)
    with tempfile.TemporaryDirectory(prefix="plant-") as place:
        folders = [Path(place) / str(job) / "checkout" for job in range(max(1, args.jobs))]
        for folder in folders:
            copy_checkout(folder)
        tests = list(dict.fromkeys(test for defect in defects for test in tests_of(defect)))
        start = time.perf_counter()
        code, output = run_pytest(folders[0], tests)
        if code != 0:
            print(f"{output}\nwithout any defect the tests must pass; pytest ended with {code}")
            return 1
        print(f"{len(tests)} tests pass without a defect ({time.perf_counter() - start:.0f} s)",
              flush=True)
        caught = plant_all(defects, folders)
    print(f"{caught} of {len(defects)} defects were caught")
    return int(caught < len(defects))


if __name__ == "__main__":
    sys.exit(main())
