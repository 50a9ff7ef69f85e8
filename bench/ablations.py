"""The paper's ablations: variants x seeds of stage 1 and of the stages after it, scored, analysed.

    python bench/ablations.py                                the objectives, embedded demo, 3 seeds
    python bench/ablations.py --study tokens attention --seeds 0 1 2 --text FILE --steps 1000 \\
        --task sts17 scifact --data-dir FOLDER --out runs/ablations
    python bench/report.py --runs runs/ablations             tables, figures, the paper's claims

Flags that are not of this command go to `pretrain_ctkd.py --preset demo --memory-init mean` in
every run: the common setting, `ctkd`. Variants are made and scored beside what they change:

    untrained    no training: methods of evaluate.py                               Table 1
    objective    ctkd, nll, rc                                                     Figures 2, 4, 5
    start        the same from rows drawn anew: --memory-init normal               (ours)
    tokens       K = 1, 2, 4, 16; nll with K = 1                                   Figure 3, 4.2
    attention    causal in place of bidirectional                                  (a summary)
    texts        ctkd, nll with 4 times as many texts and steps                    Figures 5, 6
    embeddings   the memory rows trained in place of the whole table               (ours)
    merging      the mean of the effective tokens of stage 1's encoders            Figure 7, 4.2
    stages       stages 2 and 3 after ctkd, nll, rc, and without stage 1           Table 1, Fig 8, 9
    curve        the one run of stages that Figure 10 needs, scl-ctkd              Figure 10

Stage 3 is scored on --curve-tasks every --curve-every steps as it trains (scores.jsonl). Stages 2
and 3 have the same flags after every start. Causal attention is in a summary of the paper, not in
its text. The paper's spectra are of SciDocsRR's texts: --analyse scidocs, or scifact where those
are missing.

A run is OUT/VARIANT-SEED: training, then evaluate.py (into OUT/results), then collapse.py (into
OUT/VARIANT-SEED/collapse). What is finished is not repeated, an interrupted training resumes. Seeds
can run side by side; studies, too, once the variants beside them are there.
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
from runtime.settings import changed_settings, flag

SEEDS = [0, 1, 2]  # a verdict of bench/report.py needs three
OBJECTIVES = {"ctkd": "", "nll": "--objective nll", "rc": "--objective rc"}
LATER = ("ucl", "scl", "merged")  # kinds of variants that start from another: KIND-START


def studies(base: pretrain_ctkd.Config) -> dict[str, dict[str, str]]:
    """Study -> variant -> the flags that it adds to those of the common setting."""
    nll, texts, longer = OBJECTIVES["nll"], base.num_texts, f"--steps {4 * base.steps}"
    normal = {f"{name}-normal": f"{own} --memory-init normal" for name, own in OBJECTIVES.items()}
    more = {f"{name}-4x": f"{OBJECTIVES[name]} --num-texts {4 * texts} {longer}"
            for name in ("ctkd", "nll") if texts}  # of all texts there is no multiple
    return {
        "untrained": dict.fromkeys(("last", "mean", "weighted-mean", "echo", "prompteol"), ""),
        "objective": OBJECTIVES,
        "start": normal,
        "tokens": {f"K={k}": f"--memory-tokens {k}" for k in (1, 2, 4, 16)}
        | {"nll-K=1": f"{nll} --memory-tokens 1"},
        "attention": {"causal": "--attention causal"},
        "texts": more,
        "embeddings": {"memory-rows": "--train-embeddings memory"},
        "merging": {f"merged-{start}": "" for start in [*OBJECTIVES, *normal, *more]},
        "stages": {f"{kind}-{start}": "" for start in ("none", *OBJECTIVES)
                   for kind in ("ucl", "scl")},
        "curve": {"scl-ctkd": ""},
    }


def beside(variant: str) -> str:
    """The variant of stage 1 that a variant changes: ctkd, if its name does not say another."""
    kind, _, start = variant.partition("-")
    return start if kind in LATER else kind if kind in OBJECTIVES else "ctkd"


def finished(module, flags: list[str], out: Path) -> bool:
    """Whether the run is done; UserError if it was made with other settings than `flags`."""
    if not (out / "encoder" / "encoder.json").is_file():
        return False
    if module is collapse:  # keeps no settings
        return True
    before = json.loads((out / "config.json").read_text())
    config = replace(module.parse_arguments(flags), threads=before["threads"])
    if changed := changed_settings(config, before):
        raise UserError(f"{out}: was run with other settings ({'; '.join(changed)}); name another "
                        f"--out")
    return True


def recipe(variant: str, seed: object, args: argparse.Namespace):
    """The module and the flags that make OUT/VARIANT-SEED, and the variant that it starts from."""
    def folder(name: str) -> str:
        return str(Path(args.out) / f"{name}-{seed}")

    kind, _, start = variant.partition("-")
    if kind == "merged":
        flags = ["--model", folder(start), "--text", args.base.text, "--texts", "256", "--threads",
                 str(args.base.threads), "--seed", str(seed), "--save", folder(variant)]
        return collapse, [*flags, "--out", folder(variant) + "/merging"], start
    if kind in ("ucl", "scl"):
        before = start if kind == "ucl" else f"ucl-{start}"
        model = args.base.model if before == "none" else folder(before)
        curve = " ".join(args.curve_tasks) if kind == "scl" else ""
        scored = ["--eval-tasks", curve, *["--eval-every", str(args.curve_every)] * bool(curve)]
        scored += ["--data-dir", args.data_dir] if args.data_dir and curve else []
        more = shlex.split(args.ucl_flags if kind == "ucl" else args.scl_flags)
        flags = ["--stage", kind, "--preset", "demo", "--model", model, *scored, *more]
        module, start = contrastive, "" if before == "none" else before
    else:
        own = next(v[variant] for v in studies(args.base).values() if variant in v)
        module, flags, start = pretrain_ctkd, [*args.common, *shlex.split(own)], ""
    return module, [*flags, "--seed", str(seed), "--out", folder(variant)], start


def make(variant: str, seed: int, args: argparse.Namespace) -> Path:
    """The run of a variant and a seed, and those that it starts from, trained."""
    module, flags, start = recipe(variant, seed, args)
    out = Path(args.out) / f"{variant}-{seed}"
    if start:
        make(start, seed, args)
    if not finished(module, flags, out):
        call(module, [*flags, *["--resume"] * (out / "config.json").is_file()])
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
    add("--seeds", nargs="+", type=int, default=SEEDS, help="default: 0 1 2")
    add("--variant", nargs="+", help="of those of the study; default: all")
    add("--task", nargs="+", default=["demo-sts", "demo-retrieval"])
    add("--task-dir", nargs=2, action="append", default=[], metavar=("FOLDER", "KIND"))
    add("--analyse", default="demo-sts", help="the task whose texts collapse.py reads")
    add("--data-dir", help="the tasks' repositories, hub layout")
    add("--eval-dtype", default="float32", choices=["float32", "bfloat16"])
    add("--ucl-flags", default="", help="flags of contrastive.py for stage 2, in quotes")
    add("--scl-flags", default="", help="flags of contrastive.py for stage 3, in quotes")
    add("--curve-tasks", nargs="*", default=["demo-sts", "demo-retrieval"],
        help="tasks on which stage 3 is scored as it trains; none after the flag: it is not")
    add("--curve-every", type=int, default=10, help="steps between these scores")
    add("--about", default="", help="a sentence on the data, for the report")
    add("--out", default="runs/ablations")
    args, rest = parser.parse_known_args(argv)
    start = ["--preset", "demo", "--memory-init", "mean"]  # the official code's, as --preset paper
    args.common = [*start, *rest]
    args.base, expected = map(pretrain_ctkd.parse_arguments, (args.common, start))
    for name in ("seed", "out", "resume", "objective", "attention", "memory_init"):
        if getattr(args.base, name) != getattr(expected, name):
            parser.error(f"{flag(name)} is set by the variants; see --seeds, --study")
    there = {name for study in args.study for name in studies(args.base)[study]}
    there |= set(map(beside, there))
    if unknown := set(args.variant or ()) - there:
        parser.error(f"--variant {' '.join(unknown)}: not in {', '.join(args.study)}")
    if "texts" in args.study and not args.base.num_texts:
        parser.error("--study texts needs --num-texts, of which it takes a multiple")
    try:
        pretrain_ctkd.check(args.base)
        for task in [*args.task, args.analyse, *args.curve_tasks]:
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
    for key in sorted(now.keys() - {"task", "task_dir", "data_dir", "out", "about"}):
        if before.get(key) != now[key]:
            raise UserError(f"{path}: its runs have {key}={before.get(key)!r}, now {now[key]!r}; "
                            f"name another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(now, indent=2) + "\n")


def run(args: argparse.Namespace):
    """Make, score and analyse what is missing."""
    keep_setting(args)
    for study in args.study:
        own, untrained = studies(args.base)[study], study == "untrained"
        compared = [] if untrained else [name for name in map(beside, own) if name != "none"]
        for seed in [0] if untrained else args.seeds:
            for variant in dict.fromkeys([*compared, *own]):
                if args.variant and variant not in args.variant:
                    continue
                print(f"\n== {study}: {variant}, seed {seed}", flush=True)
                if untrained:
                    score(args.base.model, ["--method", variant], Path(args.out) / variant, args)
                else:
                    score(str(out := make(variant, seed, args)), [], out, args)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
