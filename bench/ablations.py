"""The paper's ablations: variants x seeds of stage 1 and later stages, scored and analysed.

    python bench/ablations.py                              the objectives, bundled demo, 3 seeds
    python bench/ablations.py --study rate tokens --seeds 0 --preset smollm2 --threads 1 --jobs 2 \\
        --task sts17 scifact --data-dir FOLDER --out runs/mine --records bench/records/mine
    python bench/report.py                                 docs/results.md from bench/records/

Flags that this command does not know go to `pretrain_ctkd.py --preset demo --memory-init mean` in
every run, or to another --preset alone if one is given: the common setting, `ctkd`. A variant is
made and scored along with the one that it changes; what the common setting is already is left out:

    untrained    no training: methods of evaluate.py                               Table 1
    objective    ctkd, nll, rc                                                     Figures 2, 4 to 6
    pretexts     nll, mntp, ebae-ebar, reading as many tokens as ctkd              Table 1
    rate         learning rates of each objective                                  (ours)
    pretext-rate those of mntp and ebae-ebar                                       (ours)
    window       ctkd-window, reading as many tokens as ctkd, and as ctkd-4x       (ours)
    start        ctkd, nll, rc from the other initial rows: --memory-init          (ours)
    tokens       K = 1, 2, 4, 8, 16; nll with K = 1                                Figure 3, 4.2
    attention    causal, or bidirectional, each at three rates                     (a summary)
    texts        ctkd with 1/4, 1/2, 2, 4 times as many texts and steps; nll: 4    Figures 5, 6
    embeddings   the whole table trained, or the memory rows                       (ours)
    bos          token 1 before each text (SmolLM2-Instruct's)                     (ours)
    merging      the mean of the effective tokens of stage 1's encoders            Figure 7, 4.2
    wide         the mean of their wide tokens                                     (ours)
    stages       stages 2 and 3 after ctkd, nll, rc, and without stage 1           Table 1, Fig 8, 9
    mntp-stages  the same after mntp                                               Table 1
    wide-stages  the same after ctkd, read by its wide tokens                      (ours)
    window-stages  the same after those of window, and after ctkd-4x               (ours)
    curve        the one run of stages that Figure 10 needs, scl-ctkd              Figure 10

The pretexts and ctkd-window repeat the same texts until the networks have read as many tokens as
in ctkd's steps (`reads`). Without stage 1, stage 2 starts with the memory rows and attention that
stage 1 has at its start.

Stage 3 is scored on --curve-tasks every --curve-every steps as it trains (scores.jsonl). Stages 2
and 3 have the same flags whatever they start from. Causal attention is in a summary of the paper,
not in its text. The paper's spectra are of SciDocsRR's texts: --analyse scidocs, or scifact where
those are missing.

A run is OUT/VARIANT-SEED: training, then evaluate.py (into OUT/results), then collapse.py (into
OUT/VARIANT-SEED/collapse). What is kept of it is RECORDS/VARIANT-SEED.json, a few kilobytes:
settings, command, machine, hours, losses, scores, analysis. A run with a record is not repeated,
here or on another machine; an interrupted training resumes. --jobs N works on N runs at a time,
seed after seed, and logs to OUT/logs.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project root

import collapse
import contrastive
import evaluate
import pretrain_ctkd
from data.batches import MIN_SIDE
from data.tasks import TASKS
from harness import device_name
from model import MEMORY_INITS, plain_encoder
from runtime.devices import find_device
from runtime.errors import UserError, run_command
from runtime.files import write_file
from runtime.results import label_of, read_result
from runtime.settings import adopt_older, changed_settings, flag

SEEDS = [0, 1, 2]  # a verdict of bench/report.py needs three
OBJECTIVES = ("ctkd", "nll", "rc")
PRETEXTS = {  # other papers' tasks: the flags that pretexts.py requires
    "mntp": "--objective mntp --attention bidirectional --memory-tokens 0 "
            "--train-embeddings memory",
    "ebae-ebar": "--objective ebae-ebar --attention causal"}
RATES = ("1e-4", "3e-4", "1e-3", "2e-3")  # for all but ctkd the last three
LATER = ("ucl", "scl", "merged", "wide")  # kinds of variants that start from another: KIND-START
KEPT = {"merged": ["--texts", "256"], "wide": ["--texts", "1024", "--keep", "wide"]}
NAMED = ("study", "seeds", "variant", "jobs", "base", "out", "records")  # not part of the setting
MAY_CHANGE = ("task", "task_dir", "data_dir", "about")  # parts of it
LATELY = {"mntp_flags": "", "ebae_ebar_flags": ""}  # keys that older setting.json files lack

# ---------------------------------------------------------------------------------------------
# Variants
# ---------------------------------------------------------------------------------------------


def reads(objective: str, config: pretrain_ctkd.Config) -> float:
    """The tokens that all networks read for one text of T = max_tokens, a of them its context.

    ctkd: T (teacher), a + K (encoder), 1 + K + S (student); nll without the teacher; rc: a = S = T;
    mntp: T; ebae-ebar: the context in two prompts of about 12 tokens; ctkd-window: as ctkd, S cut,
    on average over the splits.
    """
    t, k = config.max_tokens, config.memory_tokens
    end = pretrain_ctkd.WINDOW[1]
    window = np.mean([a + min(t - a, end) for a in range(MIN_SIDE, t - MIN_SIDE + 1)])
    return {"ctkd": 2 * t + 2 * k + 1, "nll": t + 2 * k + 1, "rc": 2 * t + 2 * k + 1, "mntp": t,
            "ebae-ebar": t + 2 * (12 + k), "ctkd-window": 2 * window + 2 * k + 1}[objective]


def others(now: object, **options: str) -> dict[str, str]:
    """Variant -> flags, without the variant that is the common setting."""
    return {name.replace("_", "-"): flags for name, flags in options.items()
            if flags.split()[-1] != now}


def studies(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Study -> variant -> the flags that it adds to those of the common setting."""
    base, texts, steps = args.base, args.base.num_texts, args.base.steps
    own = {"ctkd": "", "nll": f"--objective nll {args.nll_flags}".strip(),
           "rc": f"--objective rc {args.rc_flags}".strip()}
    count = {name: round(steps * reads("ctkd", base) / reads(name, base))
             for name in ("nll", "ctkd-window", *PRETEXTS)}
    equal = {name: f"--steps {n}" * bool(n) for name, n in count.items()}
    pretexts = {name: f"{PRETEXTS[name]} {equal[name]} {given}".strip() for name, given in
                (("mntp", args.mntp_flags), ("ebae-ebar", args.ebae_ebar_flags))}

    inits = [init for init in MEMORY_INITS if init != base.memory_init]
    start = {f"{name}-{init}": f"{own[name]} --memory-init {init}".strip()
             for name in OBJECTIVES for init in inits}

    def rates_of(name: str, flags: str) -> dict[str, str]:
        """An objective at the learning rates other than its own."""
        now = pretrain_ctkd.parse_arguments([*args.common, *flags.split()]).lr
        return {f"{'' if name == 'ctkd' else f'{name}-'}lr={lr}": f"{flags} --lr {lr}".strip()
                for lr in RATES[name != "ctkd" :] if float(lr) != now}

    more = {f"{name}-{times:g}x": f"{own[name]} --num-texts {texts * times:.0f} "
                                  f"--steps {steps * times:.0f}".strip()
            for name, times in (("ctkd", 1 / 4), ("ctkd", 1 / 2), ("ctkd", 2), ("ctkd", 4),
                                ("nll", 4)) if texts}  # of all texts there is no multiple
    window = {"ctkd-window": f"--objective ctkd-window {equal['ctkd-window']}".strip()}
    if texts:
        window["ctkd-window-4x"] = (f"--objective ctkd-window --num-texts {4 * texts} "
                                    f"--steps {4 * count['ctkd-window']}")
    attention = others(base.attention, bidirectional="--attention bidirectional",
                       causal="--attention causal")
    attention |= {f"{name}-lr={lr}": f"{flags} --lr {lr}" for name, flags in attention.items()
                  for lr in RATES[1:] if float(lr) != base.lr}
    return {
        "untrained": dict.fromkeys(("last", "mean", "weighted-mean", "echo", "prompteol"), ""),
        "objective": own,
        "pretexts": {"nll-equal": f"{own['nll']} {equal['nll']}".strip(), **pretexts},
        "rate": {k: v for name in own for k, v in rates_of(name, own[name]).items()},
        "pretext-rate": {k: v for name in pretexts
                         for k, v in rates_of(name, pretexts[name]).items()},
        "window": window,
        "start": start,
        "tokens": {f"K={k}": f"--memory-tokens {k}" for k in (1, 2, 4, 8, 16)
                   if k != base.memory_tokens} | {"nll-K=1": f"{own['nll']} --memory-tokens 1"},
        "attention": attention,
        "texts": more,
        "embeddings": others(base.train_embeddings, whole_table="--train-embeddings all",
                             memory_rows="--train-embeddings memory"),
        "bos": {"bos=1": "--bos 1"},
        "merging": {f"merged-{name}": "" for name in [
            *OBJECTIVES, *start, *(name for name in more if name.endswith("-4x"))]},
        "wide": {f"wide-{name}": "" for name in (*OBJECTIVES, "ctkd-window")},
        "stages": {f"{kind}-{name}": "" for name in ("none", *OBJECTIVES)
                   for kind in ("ucl", "scl")},
        "mntp-stages": {"ucl-mntp": "", "scl-mntp": ""},
        "wide-stages": {"ucl-wide-ctkd": "", "scl-wide-ctkd": ""},
        "window-stages": {f"{kind}-{name}": "" for name in [*window, *["ctkd-4x"] * bool(texts)]
                          for kind in ("ucl", "scl")},
        "curve": {"scl-ctkd": ""},
    }


def beside(variant: str) -> str:
    """The variant of stage 1 that a variant changes: ctkd, unless its name says otherwise."""
    kind, _, start = variant.partition("-")
    if kind in LATER:
        return start
    starts = [name for name in (*OBJECTIVES, *PRETEXTS) if f"{variant}-".startswith(f"{name}-")]
    return starts[0] if starts else "ctkd"


def recipe(variant: str, seed: object, args: argparse.Namespace):
    """The module and the flags that make OUT/VARIANT-SEED, and the variant that it starts from."""
    def folder(name: str) -> str:
        return str(Path(args.out) / f"{name}-{seed}")

    kind, _, start = variant.partition("-")
    if kind in KEPT:
        flags = ["--model", folder(start), "--text", args.base.text, *KEPT[kind], "--threads",
                 str(args.base.threads), "--seed", str(seed), "--save", folder(variant)]
        return collapse, [*flags, "--out", folder(variant) + "/merging"], start
    if kind in ("ucl", "scl"):
        before = start if kind == "ucl" else f"ucl-{start}"
        model = args.base.model if before == "none" else folder(before)
        curve = " ".join(args.curve_tasks) if kind == "scl" else ""
        scored = ["--eval-tasks", curve, *["--eval-every", str(args.curve_every)] * bool(curve)]
        scored += ["--data-dir", args.data_dir] if args.data_dir and curve else []
        more = shlex.split(args.ucl_flags if kind == "ucl" else args.scl_flags)
        shape = ["--attention", args.base.attention, "--memory-init", args.base.memory_init,
                 "--memory-tokens", str(args.base.memory_tokens)] * (model == args.base.model)
        flags = ["--stage", kind, "--preset", "demo", "--threads", str(args.base.threads),
                 "--model", model, *shape, *scored, *more]
        module, start = contrastive, "" if before == "none" else before
    else:
        own = next(v[variant] for v in studies(args).values() if variant in v)
        module, flags, start = pretrain_ctkd, [*args.common, *shlex.split(own)], ""
    return module, [*flags, "--seed", str(seed), "--out", folder(variant)], start


# ---------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------


def same_run(module, flags: list[str], before: dict, place: Path):
    """UserError if a run or a record was made with settings other than `flags`."""
    if module is collapse:  # keeps no settings
        return
    own = {name: before[name] for name in ("threads", "out") if name in before}
    config = replace(module.parse_arguments(flags), **own)
    adopt_older(config, before)
    if changed := changed_settings(config, before):
        raise UserError(f"{place}: was run with other settings ({'; '.join(changed)}); name "
                        f"another --out and --records")


def make(variant: str, seed: int, args: argparse.Namespace) -> Path:
    """Train the run of a variant and a seed, and those that it starts from; returns its folder."""
    module, flags, start = recipe(variant, seed, args)
    out = Path(args.out) / f"{variant}-{seed}"
    if start:
        make(start, seed, args)
    saved = out / "config.json"
    if not (out / "encoder" / "encoder.json").is_file():
        call(module, [*flags, *["--resume"] * saved.is_file()])
    elif saved.is_file():
        same_run(module, flags, json.loads(saved.read_text()), out)
    return out


def call(module, flags: list[str]):
    """Run a command of the project; ends with its exit code if it fails."""
    own = vars(module).get("report")
    if own:  # a stage's: not wanted, as runs are scored here
        module.report = lambda *_: None
    try:
        code = module.main(flags)
    finally:
        if own:
            module.report = own
    if code:
        sys.exit(code)


def task_names(args: argparse.Namespace) -> dict[str, str]:
    """The tasks by which runs are compared: name in the results -> kind."""
    return {TASKS[task]["name"]: TASKS[task]["kind"] for task in args.task} | {
        Path(folder).name: kind for folder, kind in args.task_dir}


def tokens_with(method: str, model: str, max_tokens: int) -> int:
    """A --max-tokens under which an untrained method reads as much of a text as an encoder of
    `max_tokens`: its prompt's own tokens come on top, a text that it reads twice counts twice."""
    prompt = evaluate.METHODS[method]["prompts"][0]
    copies, tokenizer = prompt.count("{text}"), plain_encoder(model).tokenizer
    frame = len(tokenizer.encode([prompt.replace("{text}", "a")])[0]) - copies  # BOS is in it
    return frame + copies * (max_tokens - len(tokenizer.bos))


def score(model: str, method: list[str], out: Path, args: argparse.Namespace):
    """Evaluate a model on all tasks and analyse how far it collapses, unless that is done."""
    flags = ["--model", model, *method, "--dtype", args.eval_dtype, "--threads",
             str(args.base.threads)]
    if method:  # an encoder knows its own length
        limit = tokens_with(method[1], args.base.model, args.base.max_tokens)
        flags += ["--max-tokens", str(limit)]
    data = ["--data-dir", args.data_dir] if args.data_dir else []
    jobs = [["--task", *args.task, *data]] if args.task else []
    jobs += [["--task-dir", folder, "--kind", kind] for folder, kind in args.task_dir]
    for job in jobs:
        call(evaluate, [*flags, *job, "--results", str(Path(args.out) / "results")])
    path = out / "collapse" / "collapse.json"
    if not path.is_file():  # keep_setting refuses other texts and dtypes
        call(collapse, [*flags, "--task", args.analyse, *data, "--out", str(path.parent)])


def read_log(path: Path) -> list[dict]:
    """The rows of a log; [] if there is no log."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def thin(losses: list[float], points: int = 60) -> dict:
    """The losses of all steps as means of the first and last 50 and of equal stretches."""
    every = max(1, len(losses) // points)
    means = [np.mean(losses[i : i + every]) for i in range(0, len(losses), every)]
    return {"first": np.mean(losses[:50]), "last": np.mean(losses[-50:]), "every": every,
            "mean": [round(float(x), 4) for x in means]}


def shorter(value, digits: int = 4):
    """Floats, also in nested lists, rounded to `digits` significant digits."""
    if isinstance(value, list):
        return [shorter(v, digits) for v in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def machine(args: argparse.Namespace) -> str:
    """The machine that the runs are made on."""
    name = device_name(args.base.device)
    if find_device(args.base.device).type == "cuda":
        return name
    return f"{name}, {os.cpu_count()} cores, {args.base.threads or 'all'} threads"


def record(variant: str, seed: int, out: Path, results: Path, args: argparse.Namespace) -> dict:
    """What is kept of a run: RECORDS/VARIANT-SEED.json. results: the folder of its scores.

    UserError if it was evaluated and analysed with different weights.
    """
    found, [analysis] = {}, json.loads((out / "collapse" / "collapse.json").read_text())
    for name in task_names(args):
        found[name] = read_result(results / f"{name}.json")
    if any(r["settings"]["sha256"] != analysis["sha256"] for r in found.values()):
        raise UserError(f"{out}: was evaluated and analysed with different weights; remove "
                        f"{out / 'collapse'} to analyse it again")
    about = {"variant": variant, "seed": seed, "command": f"evaluate.py --method {variant}"}
    hours = {"scoring": sum(r["evaluation_time"] for r in found.values()) / 3600}
    if (out / "encoder").is_dir():
        module, flags, _ = recipe(variant, seed, args)
        about["command"] = f"{module.__name__}.py {shlex.join(flags)}"
    if (out / "config.json").is_file():  # not of a merged encoder
        about["settings"] = json.loads((out / "config.json").read_text())
        about["environment"] = json.loads((out / "environment.json").read_text())
        steps = read_log(out / "metrics.jsonl")
        hours["training"] = sum(s["real_tokens"] / s["tokens_per_second"] for s in steps) / 3600
        about["loss"] = thin([s["loss"] for s in steps])
        about["curve"] = read_log(out / "scores.jsonl")
    for key in ("products", "drawn", "wide", "base"):
        analysis.pop(key, None)
    return about | {
        "machine": machine(args),
        "hours": {k: round(v, 4) for k, v in hours.items()},
        "scores": {name: 100 * r["scores"]["test"][0]["main_score"] for name, r in found.items()},
        "collapse": {key: shorter(value) for key, value in analysis.items()},
    }


def finish(variant: str, seed: int, args: argparse.Namespace):
    """Make, score, analyse and record a run, unless its record has all tasks."""
    path, untrained = Path(args.records) / f"{variant}-{seed}.json", is_untrained(variant, args)
    if path.is_file():
        before = json.loads(path.read_text())
        if not untrained and "settings" in before:
            same_run(*recipe(variant, seed, args)[:2], before["settings"], path)
        if not task_names(args).keys() - before["scores"].keys():
            return
    print(f"\n== {variant}, seed {seed}", flush=True)
    model, method, out = args.base.model, variant, Path(args.out) / variant
    if not untrained:
        out = make(variant, seed, args)
        model, method = str(out), "memory"
    score(model, ["--method", method] if untrained else [], out, args)
    found = record(variant, seed, out, Path(args.out) / "results" / label_of(model, method), args)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(found) + "\n")


def is_untrained(variant: str, args: argparse.Namespace) -> bool:
    """Whether a variant is a method of evaluate.py."""
    return variant in studies(args)["untrained"]


# ---------------------------------------------------------------------------------------------
# All runs
# ---------------------------------------------------------------------------------------------


def queue(args: argparse.Namespace) -> list[tuple[int, list[str]]]:
    """(seed, variants to make one after another, as they share a start) of each job, by seed."""
    found: dict[tuple[int, str], list[str]] = {}
    for seed in args.seeds:
        for study in args.study:
            own, untrained = studies(args)[study], study == "untrained"
            if untrained and seed != args.seeds[0]:
                continue
            compared = [] if untrained else [name for name in map(beside, own) if name != "none"]
            for variant in dict.fromkeys([*compared, *own]):
                if not args.variant or variant in args.variant:
                    root = variant
                    while root.partition("-")[0] in LATER:
                        root = root.partition("-")[2]
                    group = found.setdefault((0 if untrained else seed, root), [])
                    group.extend([variant] * (variant not in group))
    return [(seed, variants) for (seed, _), variants in found.items()]


def run(args: argparse.Namespace, argv: list[str]):
    """Make, score and analyse what is missing, --jobs runs at a time."""
    keep_setting(args)
    if args.jobs == 1:
        for seed, variants in queue(args):
            for variant in variants:
                finish(variant, seed, args)
        return
    (logs := Path(args.out) / "logs").mkdir(parents=True, exist_ok=True)

    def work(job: tuple[int, list[str]]) -> bool:
        """A process of its own for a group of runs; whether it failed."""
        seed, variants = job
        command = [sys.executable, __file__, *argv, "--jobs", "1", "--seeds", str(seed),
                   "--variant", *variants]
        log = logs / f"{variants[0]}-{seed}.log"
        with open(log, "a") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        print(f"{', '.join(variants)}, seed {seed}: " + (f"exit code {code}, see {log}" if code
                                                         else "done"), flush=True)
        return bool(code)

    with ThreadPoolExecutor(args.jobs) as pool:
        if failed := sum(pool.map(work, queue(args))):
            raise UserError(f"{failed} of the jobs failed; fix what {logs} says and give the same "
                            f"command again")


def read_setting(path: Path) -> dict:
    """A setting.json, with defaults for what it may lack."""
    return LATELY | json.loads(path.read_text())


def keep_setting(args: argparse.Namespace):
    """Write RECORDS/setting.json for the report; UserError if its runs had another setting."""
    path = Path(args.records) / "setting.json"
    now = {key: value for key, value in vars(args).items() if key not in NAMED}
    before = read_setting(path) if path.is_file() else now
    for key in sorted(now.keys() - set(MAY_CHANGE)):
        if before.get(key) != now[key]:
            raise UserError(f"{path}: its runs have {key}={before.get(key)!r}, now {now[key]!r}; "
                            f"name another --out and --records")
    if not path.is_file() or before != now:  # or the jobs of one queue would all write it
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(now, indent=2) + "\n")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; `common`: the common setting's flags, `base`: what they parse to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False
    )
    add = parser.add_argument
    add("--study", nargs="+", default=["untrained", "objective"], metavar="STUDY")
    add("--seeds", nargs="+", type=int, default=SEEDS, help="default: 0 1 2")
    add("--variant", nargs="+", help="of those of the study; default: all")
    add("--jobs", type=int, default=1, help="runs at a time; give each its --threads")
    add("--task", nargs="*", default=["demo-sts", "demo-retrieval"])
    add("--task-dir", nargs=2, action="append", default=[], metavar=("FOLDER", "KIND"))
    add("--analyse", default="demo-sts", help="the task whose texts collapse.py reads")
    add("--data-dir", help="the tasks' repositories, hub layout")
    add("--eval-dtype", default="float32", choices=["float32", "bfloat16"])
    for name, what in (("nll", "pretrain_ctkd.py for nll, its own rate for example"),
                       ("rc", "pretrain_ctkd.py for rc"), ("mntp", "pretrain_ctkd.py for mntp"),
                       ("ebae-ebar", "pretrain_ctkd.py for ebae-ebar"),
                       ("ucl", "contrastive.py for stage 2"),
                       ("scl", "contrastive.py for stage 3")):
        add(f"--{name}-flags", default="", help=f"flags of {what}, in quotes")
    add("--curve-tasks", nargs="*", default=["demo-sts", "demo-retrieval"],
        help="tasks on which stage 3 is scored as it trains; none after the flag: it is not")
    add("--curve-every", type=int, default=10, help="steps between these scores")
    add("--about", default="", help="a sentence on the data, for the report")
    add("--out", default="runs/ablations", help="folder of the runs: gigabytes")
    add("--records", help="folder of what is kept of them (default OUT/records)")
    args, rest = parser.parse_known_args(argv)
    args.records = args.records or f"{args.out}/records"
    own = any(f.split("=")[0] == "--preset" for f in rest)
    args.common = rest if own else ["--preset", "demo", "--memory-init", "mean", *rest]
    args.base = pretrain_ctkd.parse_arguments(args.common)
    for name in ("seed", "out", "resume", "objective"):
        if any(f.split("=")[0] == flag(name) for f in rest):
            parser.error(f"{flag(name)} is set by the variants; see --seeds, --study")
    try:
        pretrain_ctkd.check(args.base)
        for task in [*args.task, args.analyse, *args.curve_tasks]:
            evaluate.find_task(task)
    except UserError as error:
        parser.error(str(error))
    if unknown := [study for study in args.study if study not in studies(args)]:
        parser.error(f"--study {' '.join(unknown)}: choose from {', '.join(studies(args))}")
    there = {name for study in args.study for name in studies(args)[study]}
    there |= set(map(beside, there))
    if unknown := set(args.variant or ()) - there:
        parser.error(f"--variant {' '.join(unknown)}: not in {', '.join(args.study)}")
    if "texts" in args.study and not (args.base.num_texts and args.base.steps):
        parser.error("--study texts needs --num-texts and --steps, of which it takes a multiple")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    return run_command(lambda: run(args, argv), "the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
