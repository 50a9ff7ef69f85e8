"""Time and memory of embed.py for growing files, and whether a killed one ends in the same bytes.

    python bench/embedding.py --texts 10000 100000 1000000 --kills 3
    python bench/embedding.py --texts 100 --kills 1 --model runs/ctkd-demo     to try it out

For each size, one embed.py on a .jsonl of short made-up texts, with --threads: its seconds (about
four of them to start) and its peak resident memory (as Linux reports it), imports included. Then
the same command again, killed (SIGKILL) at --kills moments drawn by --seed and resumed each time:
how many texts were done at each, and whether the file ends with the same bytes.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime.errors import UserError, run_command

WORDS = "owl heron river night stone bread paper green quiet seven winter letter north salt".split()


def write_texts(path: Path, n: int):
    """n texts of three words."""
    with path.open("w") as file:
        for i in range(n):
            words = [WORDS[i // len(WORDS)**k % len(WORDS)] for k in range(3)]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")


def embed(command: list[str], kill_after: float | None = None) -> tuple[float, int, int]:
    """Run embed.py, killed after `kill_after` seconds: its seconds, peak in bytes, exit code."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if kill_after is not None and time.perf_counter() - start > kill_after:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(status)  # or it would be waited for again
    return time.perf_counter() - start, 1024 * usage.ru_maxrss, process.returncode


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measure(n: int, args: argparse.Namespace, folder: Path) -> list[str]:
    """The cells of a row: one size, embedded undisturbed, and then with kills."""
    write_texts(texts := folder / "texts.jsonl", n)
    command = [sys.executable, str(ROOT / "embed.py"), args.model, str(texts)]
    flags = ["--threads", str(args.threads), *(["--dtype", args.dtype] if args.dtype else [])]
    whole, killed = folder / "whole.npy", folder / "killed.npy"
    seconds, peak, code = embed([*command, str(whole), *flags])
    if code:
        raise UserError(f"--model {args.model}: embed.py ended with {code}; run it alone to see "
                        f"why")
    random, again = np.random.default_rng(args.seed), "-"
    done, note = [], killed.with_name(killed.name + ".json")
    for moment in random.uniform(0, seconds / max(1, args.kills), args.kills):
        if embed([*command, str(killed), *flags], moment)[2] == -signal.SIGKILL:
            done.append(f"{json.loads(note.read_text())['done'] if note.exists() else 0:,}")
    if args.kills:
        if note.exists() or not killed.exists():
            code = embed([*command, str(killed), *flags])[2]
            if code:
                raise UserError(f"after {len(done)} kills embed.py ended with {code}")
        again = f"{len(done)}, at {' '.join(done)}: " + (
            "same bytes" if digest(killed) == digest(whole) else "OTHER BYTES")
    row = [f"{n:,}", f"{whole.stat().st_size / 1e9:.3f}", f"{seconds:.0f}", f"{n / seconds:,.0f}",
           f"{peak / 1e9:.3f}", again]
    for path in (whole, killed):
        path.unlink(missing_ok=True)
    return row


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--texts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    add("--kills", type=int, default=0, help="of a second command with the same texts")
    add("--model", default="demo", help="as embed.py takes it")
    add("--dtype", help="as embed.py takes it")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0, help="of the moments")
    add("--scratch", help="folder for temporary files")
    args = parser.parse_args(argv)

    def run():
        print("| texts | file, GB | s | texts/s | peak, GB | kills |\n"
              "|---:|---:|---:|---:|---:|---|", flush=True)
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            for n in args.texts:
                print(f"| {' | '.join(measure(n, args, Path(folder)))} |", flush=True)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
