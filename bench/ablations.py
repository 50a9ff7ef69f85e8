"""The paper's ablations: variants x seeds of stage 1 and of the stages after it, scored, analysed.

    python bench/ablations.py                                the objectives, embedded demo, 3 seeds
    python bench/ablations.py --study tokens attention --seeds 0 1 --text FILE --steps 1000 \\
        --task sts17 scifact --data-dir FOLDER --out runs/ablations
    python bench/report.py --runs runs/ablations             tables, figures, the paper's claims

Flags that are not of this command go to `pretrain_ctkd.py --preset demo` in every run: they are the
common setting, `ctkd`. A study is a list of variants beside it, each with flags of its own:

    untrained    no training: methods of evaluate.py                               Table 1
    objective    ctkd, nll, rc                                                     Figure 2
    tokens       K = 1, 2, 4, 16                                                   Figure 3
    attention    causal in place of bidirectional
    texts        0.3 and 3 times as many texts and steps; the same steps over an eighth of the texts
    embeddings   the memory rows trained in place of the whole table
    memory       memory rows that are nearly equal at the start, and their effective tokens
    merging      the mean of the effective tokens of ctkd and nll                  section 4.2
    stages       stages 2 and 3 after ctkd, and without stage 1                    Figures 8 and 10

A run is OUT/VARIANT-SEED: training, then evaluate.py (into OUT/results), then collapse.py (into
OUT/VARIANT-SEED/collapse). What is finished is not repeated and an interrupted training resumes, so
that the command may be stopped at any time. Seeds can run side by side; studies, too, once the
`ctkd` of their seeds is there.
"""

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project root

import collapse
import contrastive
import evaluate
import pretrain_ctkd
from runtime.errors import UserError, run_command
from runtime.files import write_file
from runtime.settings import changed_settings

SEEDS = {"untrained": [0], "objective": [0, 1, 2], "merging": [0, 1, 2]}  # of the others: 0, 1
BESIDE = {"untrained": {}, "merging": {"ctkd": "", "nll": "--objective nll"}}  # of the others: ctkd


def studies(base: pretrain_ctkd.Config) -> dict[str, dict[str, str]]:
    """Study -> variant -> the flags that it adds to those of the common setting."""
    texts, steps = base.num_texts, base.steps
    return {
        "untrained": {method: "" for method in ("last", "mean", "weighted-mean", "echo")},
        "objective": {"ctkd": "", "nll": "--objective nll", "rc": "--objective rc"},
        "tokens": {f"K={k}": f"--memory-tokens {k}" for k in (1, 2, 4, 16)},
        "attention": {"causal": "--attention causal"},
        "texts": {"texts-fewer": f"--num-texts {texts * 3 // 10} --steps {steps * 3 // 10}",
                  "texts-again": f"--num-texts {texts // 8}",
                  "texts-more": f"--num-texts {texts * 3} --steps {steps * 3}"},
        "embeddings": {"memory-rows": "--train-embeddings memory"},
        "memory": {"equal-rows": "--memory-init mean", "merged-equal-rows": ""},
        "merging": {"merged-ctkd": "", "merged-nll": ""},
        "stages": {"ucl-none": "", "scl-none": "", "ucl-ctkd": "", "scl-ctkd": ""},
    }


def finished(module, flags: list[str], out: Path) -> bool:
    """Whether the run is done; UserError if it was made with other settings than `flags`."""
    if not (out / "encoder" / "encoder.json").is_file():
        return False
    before = json.loads((out / "config.json").read_text())
    config = replace(module.parse_arguments(flags), threads=before["threads"])
    if changed := changed_settings(config, before):
        raise UserError(f"{out}: was run with other settings ({'; '.join(changed)}); name another "
                        f"--out")
    return True


def train(module, flags: list[str], out: Path):
    """Train by a stage file, from where an interrupted run stopped, unless it is done."""
    if not finished(module, flags, out):
        call(module, [*flags, *["--resume"] * (out / "config.json").is_file()])


def recipe(variant: str, own: str, seed: object, args: argparse.Namespace):
    """The module and the flags that make OUT/VARIANT-SEED, and the variant that it starts from."""
    def folder(name: str) -> str:
        return str(Path(args.out) / f"{name}-{seed}")

    kind, _, start = variant.partition("-")
    if kind == "merged":
        flags = ["--model", folder(start), "--text", args.base.text, "--texts", "256", "--threads",
                 str(args.base.threads), "--seed", str(seed), "--save", folder(variant)]
        return collapse, [*flags, "--out", folder(variant) + "/merging"], start
    if kind in ("ucl", "scl"):
        before = {"ucl": start, "scl": f"ucl-{start}"}[kind]
        model = args.base.model if before == "none" else folder(before)
        more = shlex.split(args.ucl_flags if kind == "ucl" else args.scl_flags)
        more += shlex.split(args.ucl_flags_none) if variant == "ucl-none" else []
        flags = ["--preset", f"{kind}-demo", "--model", model, *more]
        module, start = contrastive, "" if before == "none" else before
    else:
        module, flags, start = pretrain_ctkd, [*args.common, *shlex.split(own)], ""
    return module, [*flags, "--seed", str(seed), "--out", folder(variant)], start


def make(variant: str, own: str, seed: int, args: argparse.Namespace) -> Path:
    """The run of a variant and a seed, and those that it starts from, trained."""
    module, flags, start = recipe(variant, own, seed, args)
    out = Path(args.out) / f"{variant}-{seed}"
    if start:
        flags_of = {v: own for study in studies(args.base).values() for v, own in study.items()}
        make(start, flags_of[start], seed, args)
    if module is not collapse:
        train(module, flags, out)
    elif not (out / "encoder" / "encoder.json").is_file():
        call(collapse, flags)
    return out


def call(module, flags: list[str]):
    """Run a command of the project; ends with its exit code if it fails."""
    if code := module.main(flags):
        sys.exit(code)


def score(model: str, method: list[str], out: Path, args: argparse.Namespace):
    """Evaluate a model on all tasks and analyse how far it collapses, where that is not done."""
    flags = ["--model", model, *method, "--dtype", args.eval_dtype, "--threads",
             str(args.base.threads)]
    if method:  # an encoder knows its own length
        flags += ["--max-tokens", str(args.base.max_tokens)]
    data = ["--data-dir", args.data_dir] if args.data_dir else []
    jobs = [["--task", *args.task, *data]]
    jobs += [["--task-dir", folder, "--kind", kind] for folder, kind in args.task_dir]
    for job in jobs:
        call(evaluate, [*flags, *job, "--results", str(Path(args.out) / "results")])
    path = out / "collapse" / "collapse.json"
    if not path.is_file():  # keep_setting lets no other text or dtype in
        call(collapse, [*flags, "--task", args.analyse, *data, "--out", str(path.parent)])


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `common` are the flags of the common setting, `base` is what they say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False
    )
    add = parser.add_argument
    add("--study", nargs="+", default=["untrained", "objective"],
        choices=list(studies(pretrain_ctkd.Config())))
    add("--seeds", nargs="+", type=int, help="default: 0 1 2 of objective and merging, else 0 1")
    add("--variant", nargs="+", help="of those of the study; default: all")
    add("--task", nargs="+", default=["demo-sts", "demo-retrieval"])
    add("--task-dir", nargs=2, action="append", default=[], metavar=("FOLDER", "KIND"))
    add("--analyse", default="demo-sts", help="the task whose texts collapse.py reads")
    add("--data-dir", help="the tasks' repositories, hub layout")
    add("--eval-dtype", default="float32", choices=["float32", "bfloat16"])
    add("--ucl-flags", default="", help="flags of contrastive.py for stage 2, in quotes")
    add("--ucl-flags-none", default="", help="more of them without stage 1")
    add("--scl-flags", default="", help="flags of contrastive.py for stage 3, in quotes")
    add("--out", default="runs/ablations")
    args, rest = parser.parse_known_args(argv)
    args.common = ["--preset", "demo", *rest]
    for flag in ("--seed", "--out", "--resume", "--objective", "--attention"):
        if flag in rest:
            parser.error(f"{flag} is set by the variants; see --seeds, --study")
    args.base = pretrain_ctkd.parse_arguments(args.common)
    if "texts" in args.study and not args.base.num_texts:
        parser.error("--study texts needs --num-texts, of which it takes a part and a multiple")
    try:
        for task in [*args.task, args.analyse]:
            evaluate.find_task(task)
    except UserError as error:
        parser.error(str(error))
    return args


def keep_setting(args: argparse.Namespace):
    """Write OUT/common.json for the report; UserError if its runs had another setting."""
    path = Path(args.out) / "common.json"
    now = {key: value for key, value in vars(args).items()
           if key not in ("base", "study", "seeds", "variant")}
    before = json.loads(path.read_text()) if path.is_file() else now
    for key in ("common", "analyse", "eval_dtype", "ucl_flags", "ucl_flags_none", "scl_flags"):
        if before[key] != now[key]:
            raise UserError(f"{path}: its runs have {key}={before[key]!r}, now {now[key]!r}; name "
                            f"another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(now, indent=2) + "\n")


def run(args: argparse.Namespace):
    """Make, score and analyse what is missing."""
    keep_setting(args)
    for study in args.study:
        variants = BESIDE.get(study, {"ctkd": ""}) | studies(args.base)[study]
        for seed in [0] if study == "untrained" else args.seeds or SEEDS.get(study, [0, 1]):
            for variant, own in variants.items():
                if variant not in (args.variant or variants):
                    continue
                print(f"\n== {study}: {variant}, seed {seed}", flush=True)
                if study == "untrained":
                    score(args.base.model, ["--method", variant], Path(args.out) / variant, args)
                else:
                    out = make(variant, own, seed, args)
                    score(str(out), [], out, args)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
