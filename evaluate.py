"""Score a text encoder on the paper's 14 MTEB tasks (Muennighoff et al. 2022, arXiv 2210.07316).

    python evaluate.py --task demo-sts                   the newest encoder under runs/
    python evaluate.py --task all --model runs/llama2    the paper's row; resumes if interrupted
    python evaluate.py --task sts retrieval --model demo --method echo       no training at all
    python evaluate.py --task-dir FOLDER --kind clustering                   your own data
    python evaluate.py --compare runs/llama2 "LLM2Comp KL + SCL"
    torchrun --nproc-per-node 4 evaluate.py --task all --model runs/llama2   texts split over ranks

Pooling, attention, length and instructions come from the encoder's folder; a plain Llama is read
by one of the training-free methods of data/prompts.json. Data are read from --data-dir in the hub's
layout (one folder per repository), or are downloaded once at the revision that MTEB pins.
Protocol: MTEB 1.12 (the paper names none). The scores themselves are in measures.py.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from difflib import get_close_matches
from functools import partial
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":  # handle Ctrl-C while torch is imported, which takes seconds
    from runtime.errors import await_command

    await_command()

import numpy as np
import torch

from data.tasks import LAYOUT, TASKS, find_file, folder_task, read_task, task_place
from data.tokenizer import bare_instruction
from measures import KINDS
from model import PLAIN, Encoder, EncoderConfig, load_encoder, plain_encoder
from runtime.devices import scoring_dtype
from runtime.encoders import read_exported, require_no_base
from runtime.errors import UserError, note, print_error, printable, run_command
from runtime.files import sha256_of_files
from runtime.formats import encoder_of, is_encoder, note_positions, weight_files
from runtime.hub import find_model
from runtime.ranks import Ranks, join_ranks
from runtime.results import (
    FORMAT, GROUPS, PAPER, PUBLISHED, compare, finished, label_of, result_of, summary, write_result,
)

DATA = Path(__file__).parent / "data"
METHODS = json.loads((DATA / "prompts.json").read_text())  # training-free: prompts and pooling
INSTRUCTIONS = json.loads((DATA / "instructions.json").read_text())["instructions"]
ROLES = {"retrieval": ("corpus", "queries", "qrels"), "classification": ("train", "test")}
UNTRAINED = ("last", "mean", "weighted-mean")  # what stage 1 reports next to its encoder

Encode = Callable[[list[str]], np.ndarray]

# ---------------------------------------------------------------------------------------------
# Tasks: texts become embeddings, which are scored with the labels
# ---------------------------------------------------------------------------------------------


def encode_roles(
    encode: Encode, texts: dict[str, list[str]], notes: list[str]
) -> dict[str, np.ndarray]:
    """Encode the texts of all roles, each distinct text once; role -> (n, D) float32.

    Raises UserError for a wrong shape and for nan or inf; zero vectors are counted in the notes.
    """
    row = {text: i for i, text in enumerate(dict.fromkeys(t for ts in texts.values() for t in ts))}
    distinct = list(row)
    with np.errstate(over="ignore"):
        x = np.asarray(encode(distinct), dtype=np.float32)
    if x.ndim != 2 or len(x) != len(distinct):
        raise UserError(f"encode returned the shape {x.shape} for {len(distinct)} texts; it must "
                        f"return one row for each")
    if len(wrong := np.flatnonzero(~np.isfinite(x).all(axis=1))):
        raise UserError(f"the embedding of {distinct[wrong[0]][:60]!r} and of {len(wrong) - 1} "
                        f"other texts has nan or inf; the model is damaged, or its dtype too "
                        f"narrow")
    if zeros := int((~x.any(axis=1)).sum()):
        notes.append(f"{zeros} of {len(x)} texts have the zero vector (cosine 0)")
    return {role: x[[row[text] for text in ts]] for role, ts in texts.items()}


def score_task(task: dict, read: tuple, encode: Encode, encode_documents: Encode) -> dict:
    """Encode and score a task that was read by read_task (see `evaluate_task`)."""
    (texts, labels, notes), (kind, main) = read, KINDS[task["kind"]]
    x = encode_roles(encode, {r: t for r, t in texts.items() if r != "documents"}, notes)
    if "documents" in texts:
        x |= encode_roles(encode_documents, {"documents": texts["documents"]}, notes)
    scores = kind(**x, **labels)
    if np.isnan(scores[main]):
        raise UserError(f"{task['name']}: no rank correlation, all cosines or all scores are "
                        f"equal; is the model collapsed?")
    return {"main_score": scores[main], **scores, "notes": notes}


def evaluate_task(task: str | dict, encode: Encode, data_dir: str | Path | None = None,
                  encode_documents: Encode | None = None) -> dict:
    """Score any `encode(list[str]) -> (n, D) array` on a task of data/tasks.json or a folder's.

    `encode_documents` is for the documents of retrieval and reranking, if they are encoded
    differently from queries (without an instruction). Returns main_score (a fraction), MTEB's
    other scores, per-sample arrays, and notes. Raises UserError for data that are missing or
    damaged, and for embeddings that are not finite (n, D) arrays.
    """
    task = find_task(task) if isinstance(task, str) else task
    return score_task(task, read_task(task, data_dir), encode, encode_documents or encode)


def demo_sts(encoder: Encoder) -> float:
    """Spearman x 100 on the bundled STS set, with its instruction if the encoder takes one."""
    instruction = instruction_for("demo-sts", "auto", encoder)
    encode = partial(encoder.encode, instruction=instruction)
    return 100 * evaluate_task("demo-sts", encode)["main_score"]


def find_task(name: str, flag: str = "--task") -> dict:
    """The entry of data/tasks.json; UserError with the nearest names if there is none."""
    if name not in TASKS:
        groups = [*GROUPS, "all"] if flag == "--task" else []
        near = get_close_matches(name.lower(), [*TASKS, *groups], n=3, cutoff=0.4)
        guess = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"{flag} {name}: unknown; {guess}evaluate.py --list shows all tasks")
    return TASKS[name]


# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------


def newest_encoder() -> str:
    """The encoder folder under runs/ that was written last, else the bundled Llama."""
    found = sorted(Path("runs").rglob("encoder/encoder.json"), key=lambda p: p.stat().st_mtime)
    return str(found[-1].parent) if found else "demo"


def open_model(
    name: str, method: str | None = None, max_tokens: int | None = None,
    special_tokens: str | None = None, **options
) -> tuple[Encoder, str]:
    """An encoder, and how it is read: by its own pooling, or untrained by one of METHODS.

    `name` is the folder of an encoder, a run, an export or a Llama, or a hub repository; `options`
    go to model.load_encoder or plain_encoder. UserError if `method`, `max_tokens` (a plain Llama's
    default: 512) or `special_tokens` (its default: literal) contradicts the training.
    """
    if max_tokens is not None and max_tokens < 2:
        raise UserError(f"--max-tokens {max_tokens}: must be at least 2, for BOS and a text")
    name = encoder_of(name)
    folder = find_model(name, options.get("revision"))
    if is_encoder(folder):
        encoder = load_encoder(name, **options)
        for flag, given, trained in (("--method", method, encoder.config.pooling),
                                     ("--max-tokens", max_tokens, encoder.config.max_tokens),
                                     ("--special-tokens", special_tokens,
                                      encoder.config.special_tokens)):
            if given not in (None, trained):
                raise UserError(f"{flag} {given}: {name} was trained with {trained}; leave {flag} "
                                f"out, or name its base with --model")
        return encoder, encoder.config.pooling
    require_no_base(name, *(options.pop(key, None) for key in ("base", "other_base")))
    about = read_exported(folder, EncoderConfig)
    if about and method in (None, about[0].pooling):
        if max_tokens or special_tokens:
            raise UserError(f"--max-tokens, --special-tokens: {name} was exported from an encoder, "
                            f"which knows its own; leave them out")
        encoder, k = plain_encoder(name, about[0], **options), about[0].num_memory_tokens
        encoder.memory_tokens = torch.nn.Parameter(encoder.table[len(encoder.table) - k :].detach())
        encoder.history = about[1]
        return encoder, about[0].pooling
    if method == "memory":
        raise UserError(f"--method memory: {name} is a plain Llama without memory tokens; train an "
                        f"encoder with pretrain_ctkd.py, or take {', '.join(METHODS)}")
    method = method or "weighted-mean"
    config = replace(PLAIN, pooling=METHODS[method]["pooling"], max_tokens=max_tokens or 512,
                     template=METHODS[method]["prompts"][0],
                     special_tokens=special_tokens or PLAIN.special_tokens)
    if about:
        note(f"{name} was exported from an encoder; under --method {method} it is read as a plain "
             f"Llama (without: as that encoder)")
    encoder = plain_encoder(name, config, **options)
    note_positions(encoder, max_tokens or 0)
    return encoder, method


def as_sentence(text: str) -> str:
    """A text as the one-word prompts expect it (code of PromptEOL and MetaEOL): with a final full
    stop, also in place of a question mark, but not after a quote; double quotes become single."""
    if text and text[-1] not in ".?\"'":
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text


def encoding(encoder: Encoder, method: str) -> Callable:
    """`encode(texts, instruction="", **options)` by the method; MetaEOL averages its prompts."""
    if encoder.history:  # trained: its folder says how
        return encoder.encode
    about = METHODS[method]

    def encode(texts: list[str], instruction="", progress="", **options) -> np.ndarray:
        """The mean over the method's prompts (n, D)."""
        if about.get("sentences"):
            texts = [as_sentence(text) for text in texts]
        total, n, before, most = 0.0, len(about["prompts"]), encoder.cut, 0
        for i, prompt in enumerate(about["prompts"], 1):
            encoder.config = replace(encoder.config, template=prompt)
            bar = f"{progress} {i}/{n}" if progress and n > 1 else progress
            encoder.cut = 0
            total = total + encoder.encode(texts, instruction, progress=bar, **options)
            most = max(most, encoder.cut)
        encoder.cut = before + most  # a text that is cut in several prompts counts once
        return total / np.float32(n)

    return encode


def instruction_for(task: str, wanted: str, encoder: Encoder) -> str:
    """What --instruction stands for; `auto`: the task's, for encoders trained with instructions."""
    if wanted == "none" or wanted == "auto" and "{instruction}" not in encoder.config.template:
        return ""
    return bare_instruction(INSTRUCTIONS.get(task, "") if wanted == "auto" else wanted)


def over_ranks(encode: Encode, ranks: Ranks) -> Encode:
    """`encode` shared by the ranks: each encodes its part of the texts, and all get every row."""
    if ranks.size == 1:
        return encode

    def shared(texts: list[str]) -> np.ndarray:
        """This rank takes every `size`-th text by length; the sum over ranks fills all rows."""
        by_length = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        mine = by_length[ranks.rank :: ranks.size]
        with ranks.fail_together():  # a text that is refused is refused on all ranks
            part = torch.from_numpy(encode([texts[i] for i in mine])).to(ranks.device)
        everything = part.new_zeros(len(texts), part.shape[1])
        everything[mine] = part
        return ranks.sum(everything).cpu().numpy()

    return shared


def evaluate_on_ranks(task: dict, encoder: Encoder, encode: Callable, instruction: str,
                      data_dir: str | None, ranks: Ranks, **options) -> dict:
    """evaluate_task on all ranks, each encoding its share of the texts; cut texts are noted.

    `encode` is the encoder's own or encoding()'s; `options` go to `encode(texts, instruction=,
    document=, **options)`, see Encoder.encode.
    """
    with ranks.fail_together():
        read = read_task(task, data_dir)
    query = partial(encode, instruction=instruction, **options)
    document = partial(encode, document=True, **options)
    before = encoder.cut
    found = score_task(task, read, over_ranks(query, ranks), over_ranks(document, ranks))
    cut = int(ranks.sum(torch.tensor([encoder.cut - before], device=ranks.device)))
    if cut:
        found["notes"].append(f"texts cut to {encoder.config.max_tokens} tokens: {cut:,}")
    return found


def score_on_ranks(name: str, encoder: Encoder, data_dir: str, ranks: Ranks, wanted: str) -> float:
    """The main score x 100 of an encoder in training; all ranks share the encoding.

    wanted: as --instruction.
    """
    found = evaluate_on_ranks(TASKS[name], encoder, encoder.encode,
                              instruction_for(name, wanted, encoder), data_dir or None, ranks)
    return 100 * found["main_score"]


def paper_row(encoder: Encoder, method: str) -> tuple[str | None, str]:
    """The row of data/published.json to compare an encoder or a method with, or None.

    The second value says why there is none: the first setting that differs (`recipes` there).
    """
    if not encoder.history:
        return METHODS[method]["paper"], "the paper has none for this method"
    stages = [entry["stage"] for entry in encoder.history]
    if stages != ["ctkd", "ucl", "scl"][: len(stages)]:
        return None, f"stages {', '.join(stages)}"
    if kept := encoder.config.kept_tokens:
        return None, f"kept_tokens={kept}"
    for entry, stage in zip(encoder.history, stages):
        for key, value in PUBLISHED["recipes"][stage].items():
            if entry.get(key) != value:
                return None, f"{stage} had {key}={entry.get(key)!r}, the row's is {value!r}"
    objective = encoder.history[0].get("objective")
    row = f"LLM2Comp {PUBLISHED['objectives'].get(str(objective))}"
    row += ["", " + UCL", " + SCL"][len(stages) - 1]
    return (row if row in PUBLISHED["rows"] else None), f"objective {objective!r}"


def score_settings(encoder: Encoder, name: str, method: str, ranks: Ranks) -> dict:
    """What a score depends on besides the data, as stored with each score."""
    config = encoder.config
    row, why_none = paper_row(encoder, method)
    return {
        "format": FORMAT, "model": name, "method": method, "base": encoder.base,
        "sha256": encoder.sha256, "adapters": encoder.stored_adapters,
        **asdict(config), "kept_tokens": list(config.kept_tokens),
        "dtype": str(encoder.dtype), "device": str(encoder.device),
        "threads": torch.get_num_threads(), "ranks": ranks.size, "history": encoder.history,
        "paper": row, "paper_differs": "" if row else why_none,
        "versions": {p: version(p) for p in ("torch", "tokenizers", "numpy", "safetensors")},
    }


def task_files(task: dict, data_dir: str | None) -> dict[str, str]:
    """Role -> sha256 of its file, for all files that the task's score depends on."""
    return {role: sha256_of_files([find_file(task, role, data_dir)])
            for role in ROLES.get(task["kind"], ("test",))}


def look_up(path: Path, task: dict, settings: dict, encoder: Encoder,
            data_dir: str | None) -> dict | None:
    """The result in `path`, if there is one; UserError if it does not fit the current settings."""
    pinned, files = task_place(task, data_dir)[0] is None, {}
    if path.exists() and not pinned:
        with suppress(UserError):  # a finished result is shown even if its files are gone
            files = task_files(task, data_dir)
    folder = encoder.tokenizer.file.parent
    return finished(path, {**settings, "files": files},
                    lambda: sha256_of_files(weight_files(folder)), pinned)


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


def list_tasks():
    """Print the tasks: kind, size, main score, group."""
    print(f"{'task':<18}{'kind':<21}{'main score':<17}{'group':<16}size")
    for name, task in TASKS.items():
        size = ", ".join(f"{n:,} {what}" for what, n in task["expected"].items()
                         if what != "characters")
        print(f"{name:<18}{task['kind']:<21}{KINDS[task['kind']][1]:<17}"
              f"{task.get('group', '-'):<16}{size}")
    print("\nall: the 14 with a group; a group's name: its tasks. Sprint is pair classification, "
          "but the\npaper averages it with classification.")


def chosen_tasks(args: argparse.Namespace) -> dict[str, dict]:
    """Name -> entry of the tasks that the command line names, each once."""
    if args.task_dir and (args.task or args.data_dir) or args.kind and not args.task_dir:
        raise UserError("--task-dir goes with --kind, and without --task and --data-dir")
    if args.task_dir:
        if not args.kind:
            raise UserError(f"--task-dir {args.task_dir}: needs --kind, one of {', '.join(KINDS)}")
        task = folder_task(args.task_dir, args.kind)
        return {task["name"]: task}
    if not args.task:
        raise UserError("nothing to do: give --task, --task-dir, --compare or --list")
    names = [name for given in args.task
             for name in (PAPER if given == "all" else GROUPS.get(given, [given]))]
    return {name: find_task(name) for name in names}


def add_reading_flags(add: Callable):
    """Add the flags on how a model reads texts (evaluate.py, collapse.py, embed.py, mine.py)."""
    add("--base", help="path of an encoder's base model, if it has moved")
    add("--other-base", action="store_true", help="take that base even if it is another one than "
        "the encoder was trained on; recorded with what is made")
    add("--special-tokens", choices=["literal", "parsed"], help="for a plain Llama: </s> and the "
        "like in a text as literal letters (default), or parsed as transformers does; an encoder "
        "knows its own")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--dtype", choices=["float32", "bfloat16"],
        help="default: bfloat16 on cuda, float32 elsewhere")
    add("--batch-tokens", type=int, default=4096, help="tokens per forward pass")
    add("--threads", type=int, default=0, help="CPU threads per process; 0 = the cores, shared")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", nargs="+", metavar="TASK", help="tasks (see --list), groups of tasks, or all")
    add("--task-dir", metavar="FOLDER", help="a task of your own: a folder in a kind's layout")
    add("--kind", choices=list(KINDS), help="of --task-dir. " + ". ".join(
        f"{kind}: {layout}" for kind, layout in LAYOUT.items()))
    add("--list", action="store_true", help="show the tasks and stop")
    add("--compare", nargs="+", metavar="RUN", help="print runs (as given to --model, or folders "
        "of results) and published rows side by side and stop; rows: "
        + ", ".join(PUBLISHED["rows"]))
    add("--model", help="an encoder, a run, a Llama's folder or hub repository, or demo; default: "
        "the newest encoder under runs/, else demo")
    add("--method", choices=["memory", *METHODS], help="how a plain Llama is read (default "
        "weighted-mean); an encoder knows its own")
    add("--max-tokens", type=int, help="of a text and its prompt, BOS counted, for a plain Llama "
        "(default 512); an encoder knows its own")
    add("--instruction", default="auto", help="auto (the task's, for encoders trained with "
        "instructions), none, or a text for all tasks")
    add("--data-dir", help="folder with the tasks' repositories, hub layout")
    add("--revision", help="branch, tag or commit of a hub model")
    add_reading_flags(add)
    add("--timeout", type=float, default=60, help="minutes that a rank waits for the others")
    add("--results", default="results", help="folder for the JSON files")
    add("--force", action="store_true", help="evaluate finished tasks again")
    args = parser.parse_args(argv)
    if args.batch_tokens < 1 or args.threads < 0 or not args.timeout > 0:
        parser.error("--batch-tokens and --timeout must be above 0, --threads not below")
    if args.list or args.compare:
        for name in ("model", "method", "max_tokens", "instruction", "force"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')}: is for --task; leave it out")
    return args


def run(args: argparse.Namespace, tasks: dict[str, dict], ranks: Ranks) -> int:
    """Evaluate the tasks, print the table, write the JSON files."""
    say = partial(print, flush=True) if ranks.rank == 0 else lambda *_: None
    name = args.model or newest_encoder()
    dtype = scoring_dtype(args.dtype, ranks.device)
    encoder, method = open_model(name, args.method, args.max_tokens, args.special_tokens,
                                 base=args.base, other_base=args.other_base,
                                 revision=args.revision, dtype=dtype, device=ranks.device)
    label = label_of(name, "memory" if encoder.history else method, args.instruction)
    folder = Path(args.results) / label
    common = score_settings(encoder, name, method, ranks)
    jobs = {}  # task -> file, settings, the result if there is one
    for key, task in tasks.items():
        instruction = instruction_for(key, args.instruction, encoder)
        encoder.tokenize([], instruction)  # raises if the template has no place for one
        settings = common | {"instruction": instruction, "kind": task["kind"],
                             "data": task_place(task, args.data_dir)[1]}
        path = folder / f"{task['name']}.json"
        result = None if args.force else look_up(path, task, settings, encoder, args.data_dir)
        jobs[key] = path, settings, result

    chosen = "  (the newest encoder under runs/)" if not args.model and name != "demo" else ""
    say(f"model   {printable(name)}{'  (the bundled tiny Llama)' if name == 'demo' else chosen}\n"
        f"method  {method}, {encoder.config.attention}, {str(dtype).removeprefix('torch.')}\n\n"
        f"{'task':<26}{'main score':<17}{'x 100':>7}{'seconds':>9}")
    encode, scores, failed = encoding(encoder, method), {}, False
    for key, (path, settings, result) in jobs.items():
        start, mark = time.perf_counter(), "  finished before"
        if not ranks.from_first(int(result is not None)):  # other ranks may not see its files
            try:
                with ranks.fail_together():  # before they are read, so that a later edit shows
                    settings["files"] = task_files(tasks[key], args.data_dir)
                found = evaluate_on_ranks(
                    tasks[key], encoder, encode, settings["instruction"], args.data_dir, ranks,
                    batch_tokens=args.batch_tokens, progress=key if ranks.rank == 0 else "")
            except UserError as error:  # continue with the other tasks
                failed = True
                print_error(error)
                continue
            mark, seconds = "", time.perf_counter() - start
            result = result_of(tasks[key], found, settings, seconds)
            if ranks.rank == 0:
                write_result(path, result)
        if ranks.rank == 0:
            scores[key] = 100 * result["scores"]["test"][0]["main_score"]
            say(f"{printable(key):<26}{KINDS[tasks[key]['kind']][1]:<17}{scores[key]:>7.2f}"
                f"{result['evaluation_time']:>9.1f}{mark}")
            if settings["instruction"] or "{instruction}" in encoder.config.template:
                say(f"  instruction: {printable(settings['instruction']) or 'none'}")
            for note in result["notes"]:
                say(f"  note: {printable(note)}")
    for title, mean in summary(scores):
        say(f"{title:<43}{'-' if mean is None else f'{mean:.2f}':>7}")
    if common["paper_differs"] and encoder.history:
        say(f"not compared with a row of the paper: {common['paper_differs']}")
    if scores:
        say(f"\nwritten to {printable(folder)}/")
    return 2 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (see run_command)."""

    def command() -> int | None:
        """Do what the arguments ask for."""
        args = parse_arguments(argv)
        if sum(map(bool, (args.list, args.compare, args.task or args.task_dir))) > 1:
            raise UserError("--list, --compare, and --task or --task-dir: one at a time")
        if args.list:
            return list_tasks()
        if args.compare:
            return compare(args.compare, Path(args.results))
        tasks = chosen_tasks(args)
        with join_ranks(args.device, args.threads, args.timeout) as ranks:
            return run(args, tasks, ranks)

    return run_command(command, "finished tasks are kept, the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
