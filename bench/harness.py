"""What the scripts of bench/ share: worker processes, turns, tables, and random models to time.

Each implementation runs in a process of its own, so that its peak memory is its own, and waits on
its stdin while another one is timed. Each first answers `check`: unless all compute the same, the
script ends with an error before anything is timed. Then they take turns (turn, thread count,
implementation); the first --warm-up turns are not counted.

seconds   median over the --turns counted turns, at the thread count at which it is lowest
peak      CPU: highest resident memory of the process (VmHWM, on Linux only), in brackets how far it
          is above that after the imports; CUDA: max_memory_allocated. There each timed step comes
          after an untimed one, and cached memory is released, as all share the device

On the CPU our commands let glibc keep the memory that tensors free. That is an allocator setting
which anybody can use, so the others get it, too, to be fair. --no-keep-memory-for-all leaves them
at their defaults.
"""

import argparse
import importlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lora  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402
from runtime.cpu import keep_freed_memory  # noqa: E402
from runtime.devices import find_device  # noqa: E402
from runtime.errors import UserError, run_command  # noqa: E402
from runtime.formats import read_llama_config, write_tensors  # noqa: E402
from runtime.hub import find_model  # noqa: E402

SHAPES = {  # V, D, intermediate, layers, heads, key-value heads, head_dim
    "tiny": LlamaConfig(512, 64, 128, 2, 4, 4, 16),
    "7m": LlamaConfig(8192, 256, 704, 6, 4, 4, 64, 1e-5, True),  # the bundled Llama's
    "134m": LlamaConfig(32000, 768, 2048, 12, 12, 12, 64),
    "smollm2": LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 1e-5, True),  # SmolLM2-135M's
    "1b": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 1e-5, True),  # Llama-3.2-1B's
    "7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128),
}
BOS = 1
GIB = 2**30
TIMES = ("s, median (min-max)", "time / ours", "peak GiB (above imports)")  # of Timing.cells
QUIET = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
         "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
         "TQDM_DISABLE": "1"}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


@torch.no_grad()
def draw(name: str, tensor: Tensor, std: float):
    """Fill a tensor from a generator that depends on its name alone."""
    random = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
    tensor.normal_(0.0, std, generator=random)


def draw_base(model: nn.Module, layers: int):
    """The frozen weights: norms 1, all else normal with deviation columns^-1/2.

    As in GPT-2, what adds to the residual stream is smaller by (2 layers)^-1/2; it also keeps the
    rounding of bf16 from growing with depth.
    """
    for name, p in model.requires_grad_(False).named_parameters():
        if p.dim() == 1:
            nn.init.ones_(p)
        else:
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            draw(name, p, p.shape[-1] ** -0.5 * ((2 * layers) ** -0.5 if adds else 1.0))


def draw_adapters(model: nn.Module):
    """A with the deviation of LoRA's usual initialisation, B small but not zero."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            name = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            draw(name, p, 0.02 if name.endswith("lora_B") else (3 * p.shape[-1]) ** -0.5)


def random_llama(shape: LlamaConfig, dtype: str, device: str) -> Llama:
    """A frozen Llama of random weights."""
    with torch.device("meta"):
        llama = Llama(shape).to(getattr(torch, dtype))
    draw_base(llama.to_empty(device=device), shape.num_hidden_layers)
    return llama


def random_texts(random, lengths, vocabulary: int) -> list[np.ndarray]:
    """Texts of random token ids after BOS, which is counted in the lengths."""
    return [np.concatenate(([BOS], random.integers(3, vocabulary, n - 1))).astype(np.int32)
            for n in lengths]


def write_folder(args) -> str:
    """Write a Llama's folder that all libraries can read, and return its path: 7m is the bundled
    Llama itself, other shapes are random, with the bundled tokenizer."""
    folder, demo = Path(args.scratch) / "llama", find_model("demo")
    folder.mkdir()
    rows = read_llama_config(demo / "config.json", ["llama"])["vocab_size"]
    files = ["tokenizer.json"]
    if args.shape == "7m":
        files += ["config.json", *(path.name for path in demo.glob("*.safetensors*"))]
    else:
        shape = SHAPES[args.shape]
        shape = replace(shape, vocab_size=max(rows, shape.vocab_size), bos_token_id=BOS)
        llama, about = random_llama(shape, args.dtype, "cpu"), asdict(shape)
        write_tensors(folder / "model.safetensors", llama.state_dict(), dtype=None)
        about |= {"rope_theta": about.pop("rope")["rope_theta"], "max_position_embeddings": 2048,
                  "architectures": ["LlamaForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(about))
    for name in files:
        (folder / name).symlink_to(demo / name)
    fast = {"tokenizer_class": "PreTrainedTokenizerFast",  # pad_token: any, padding is masked
            "pad_token": Tokenizer(demo, rows).backend.id_to_token(0)}
    (folder / "tokenizer_config.json").write_text(json.dumps(fast))
    return str(folder)


class Implementation:
    """Something to time: subclasses have `measure(turn, **settings)`, which returns `seconds`."""

    ours = False  # whether it lets glibc keep freed memory whatever the others do
    imports: tuple = ()  # modules whose memory is not the implementation's

    def __init__(self, args):
        self.args = args
        self.build()

    def check(self, **settings) -> dict:
        """What must be equal for all implementations; by default, a turn's answer."""
        return self.measure(0, **settings)

    def close(self):
        """Called after the last turn."""


class TrainingStep(Implementation):
    """Forward, backward, clip and AdamW.

    Subclasses set `config` (with lr, weight_decay, clip) and `modules` in `build`; `prepare(turn)`
    is not timed, `gradient(prepared)` returns the loss.
    """

    def __init__(self, args):
        super().__init__(args)
        self.parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.clip = self.config.clip or float("inf")
        self.optimizer = torch.optim.AdamW(
            self.parameters, self.config.lr, weight_decay=self.config.weight_decay, fused=True)

    def check(self, **settings) -> dict:
        """Loss and norm of the gradient of turn 0 without dropout; nothing is updated."""
        dropouts = [(layer, "p" if isinstance(layer, nn.Dropout) else "dropout")
                    for layer in self.modules.modules()
                    if isinstance(layer, nn.Dropout | lora.LoraLinear)]
        before = [getattr(layer, key) for layer, key in dropouts]
        for layer, key in dropouts:
            setattr(layer, key, 0.0)
        loss = self.gradient(self.prepare(0, **settings)).item()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        self.optimizer.zero_grad(set_to_none=True)
        for (layer, key), p in zip(dropouts, before):
            setattr(layer, key, p)
        trained = sum(p.numel() for p in self.parameters)
        return {"loss": loss, "norm": norm, "trained": trained}

    def step(self, prepared) -> tuple[float, float]:
        """One whole step: loss and norm."""
        loss = self.gradient(prepared)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        loss, norm = loss.item(), norm.item()  # as in the loop, which checks them before it updates
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def measure(self, turn: int, **settings) -> dict:
        prepared = self.prepare(turn, **settings)
        shared = self.args.device == "cuda"
        if shared:
            self.step(prepared)  # untimed: fills the allocator's cache again
        clock = now(self.args.device)
        loss, norm = self.step(prepared)
        seconds = now(self.args.device) - clock
        if shared:
            torch.cuda.empty_cache()
        return {"seconds": seconds, "loss": loss, "norm": norm}


def serve(args):
    """Build an implementation, then answer each call, a line of stdin, with a line; all JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not an answer

    def answer(found: dict):
        print(json.dumps(found), file=answers, flush=True)

    torch.set_num_threads(args.threads[0])
    kind = getattr(sys.modules["__main__"], args.kind)
    for module in kind.imports:
        importlib.import_module(module)
    imported = memory_bytes(args.device, "VmRSS")
    if args.device == "cpu" and (kind.ours or args.keep_memory_for_all):
        keep_freed_memory()
    implementation = kind(args)
    answer({"imported_bytes": imported, "built_bytes": memory_bytes(args.device, "VmRSS")})
    for line in sys.stdin:
        call = json.loads(line)
        torch.set_num_threads(call.pop("threads"))
        found = getattr(implementation, call.pop("call"))(**call)
        answer(found | {"peak_bytes": memory_bytes(args.device, "VmHWM")})
    implementation.close()


def now(device: str) -> float:
    """The clock in seconds, read once the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_bytes(device: str, key: str) -> float:
    """The bytes that this process holds (CPU: resident): now (VmRSS), or at its peak (VmHWM)."""
    if device == "cuda":
        return (torch.cuda.memory_allocated() if key == "VmRSS" else
                torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if not status.is_file():  # not Linux
        return float("nan")
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


class Worker:
    """The parent's end of an implementation's process, or of one process for each rank."""

    def __init__(self, kind: type[Implementation], args, processes: int = 1):
        self.name = kind.__name__
        given = json.dumps({**vars(args), "kind": self.name})
        env = {**os.environ, **QUIET, **dict.fromkeys(THREADS, str(max(args.threads)))}
        if processes > 1:  # as torchrun would
            with socket.create_server(("127.0.0.1", 0)) as free:
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            env |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
        self.processes = []
        for rank in range(processes):
            if processes > 1:
                env |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            self.processes.append(subprocess.Popen(
                [sys.executable, args.script, "--worker", given], env=env, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE))

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error):
        for process in self.processes:
            if error[0]:
                process.kill()
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()

    def answer(self) -> dict:
        """The next answer: rank 0's, once all ranks have given theirs."""
        lines = [process.stdout.readline() for process in self.processes]
        if not all(lines):
            code = self.processes[lines.index("")].wait()
            raise UserError(f"the worker {self.name} ended with code {code}, see above; -9 means "
                            f"too little memory: name fewer implementations")
        return json.loads(lines[0])

    def ask(self, call: str, threads: int, **settings) -> dict:
        """Call a method of the implementation; returns its answer."""
        line = json.dumps({"call": call, "threads": threads, **settings})
        for process in self.processes:
            with suppress(BrokenPipeError):  # `answer` reports it
                print(line, file=process.stdin, flush=True)
        return self.answer()


class Timing:
    """An implementation's answers: when built (`ready`), to `check` (`first`), in the turns."""

    def __init__(self, ready: dict, first: dict, answers: dict[int, list[dict]], warm_up: int):
        self.ready, self.first, self.answers = ready, first, answers
        self.agreement = ""  # with ours, in words
        counted = {threads: turns[warm_up:] for threads, turns in answers.items()}
        medians = {t: median(a["seconds"] for a in turns) for t, turns in counted.items()}
        self.threads = min(medians, key=medians.get)
        self.turns, self.median = counted[self.threads], medians[self.threads]
        self.seconds = [answer["seconds"] for answer in self.turns]
        self.peak = max(turns[-1]["peak_bytes"] for turns in answers.values())

    def cells(self, reference: "Timing", since: str = "imported_bytes") -> list[str]:
        """The cells of TIMES."""
        return [f"{self.median:.4g} ({min(self.seconds):.4g}-{max(self.seconds):.4g})",
                f"{self.median / reference.median:.2f}", memory(self.peak, self.ready[since])]


def memory(peak: int, before: int) -> str:
    """A peak in GiB, and how far it is above what was there before."""
    return f"{peak / GIB:.2f} ({(peak - before) / GIB:.2f})"


def installed(kinds: dict[str, type]) -> dict[str, type]:
    """The implementations whose packages are installed; prints which are left out."""
    missing = {label: package for label, kind in kinds.items() for package in
               {module.partition(".")[0] for module in kind.imports} if not find_spec(package)}
    for label, package in missing.items():
        print(f"left out: {label}, {package} is not installed")
    return {label: kind for label, kind in kinds.items() if label not in missing}


def race(kinds: dict[str, type], args, check: Callable, settings: dict[str, dict] | None = None,
         processes: int = 1) -> dict[str, Timing]:
    """Let implementations take turns, after check(label -> first answer, args); label -> Timing.

    settings: further arguments of a label's calls. check may return label -> words.
    """
    with ExitStack() as stack:
        workers = {label: stack.enter_context(Worker(kind, args, processes))
                   for label, kind in installed(kinds).items()}
        ready = {label: worker.answer() for label, worker in workers.items()}

        def ask(label: str, call: str, threads: int, **more) -> dict:
            return workers[label].ask(call, threads, **(settings or {}).get(label, {}), **more)

        first = {label: ask(label, "check", args.threads[0]) for label in workers}
        words = check(first, args) or {}
        answers = {label: {threads: [] for threads in args.threads} for label in workers}
        for turn in range(args.warm_up + args.turns):
            for threads in args.threads:
                for label in workers:
                    answers[label][threads].append(ask(label, "measure", threads, turn=turn))
            print(f"turn {turn + 1} of {args.warm_up + args.turns} done", file=sys.stderr)
    found = {label: Timing(ready[label], first[label], answers[label], args.warm_up)
             for label in workers}
    for label, said in words.items():
        found[label].agreement = said
    return found


def check_losses(first: dict[str, dict], tolerances: dict[str, float], absolute: float = 0.0):
    """UserError unless loss and norm of the first step equal those of the first one named.

    tolerances are relative; a loss, which may be near zero, may also be off by `absolute`.
    """
    (reference, expected), *others = first.items()
    print(f"first step, {reference}: loss {expected['loss']:.7g}, norm {expected['norm']:.7g}")
    for label, found in others:
        for key, tolerance in tolerances.items():
            off = abs(found[key] - expected[key])
            allowed = max(tolerance * abs(expected[key]), absolute if key == "loss" else 0.0)
            print(f"first step, {label}: {key} {found[key]:.7g}, off by {off:.1e} (allowed "
                  f"{allowed:.1e})", flush=True)
            if not off <= allowed:  # also true for nan
                raise UserError(f"{label}: {key} {found[key]} is not that of {reference}, "
                                f"{expected[key]}: they do not compute the same")


def whole(least: int = 1) -> Callable[[str], int]:
    """An argparse type: whole numbers from `least` on."""
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value
    return number


FLAGS = {
    "shape": {"choices": list(SHAPES), "help": "of the Llama; 7m: that of the bundled one"},
    "dtype": {"choices": ["bfloat16", "float32"], "help": "of the weights"},
    "device": {"choices": ["cpu", "cuda"], "help": "where all of it runs"},
    "threads": {"type": whole(), "nargs": "+", "help": "CPU thread counts"},
    "turns": {"type": whole(), "help": "counted turns of each"},
    "warm_up": {"type": whole(0), "help": "turns of each that are not counted"},
}


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it is; defaults are shown."""


def new_parser(doc: str, **defaults) -> argparse.ArgumentParser:
    """A parser with the common flags named in `defaults`, and those that every script has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=Help)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **FLAGS[name])
    parser.set_defaults(device=defaults.get("device", "cpu"))
    parser.add_argument("--seed", type=whole(0), default=0, help="of texts and embeddings")
    parser.add_argument("--keep-memory-for-all", action=argparse.BooleanOptionalAction,
                        default=True, help="let glibc keep freed memory in all processes, not in "
                        "ours alone")
    parser.add_argument("--neighbour", action="store_true", help="a busy machine: beside each turn "
                        "a process of its own multiplies matrices of 512 x 512 on one thread")
    parser.add_argument("--out", default=f"bench/results/{Path(sys.argv[0]).stem}.json",
                        help="JSON with all answers")
    return parser


def main(script: str, parse: Callable, bench: Callable, *packages: str) -> int:
    """A script's command line, or that of one of its workers; returns the exit code.

    bench(args) measures, and yields what goes into the JSON so far and what to print. The versions
    of the packages named are printed and written, too.
    """
    if sys.argv[1:2] == ["--worker"]:
        return run_command(lambda: serve(SimpleNamespace(**json.loads(sys.argv[2]))))
    args = parse()
    args.script, given, out = script, dict(vars(args)), Path(args.out)

    def run():
        about = environment(args, packages)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as args.scratch, neighbour(args.neighbour):
            for results, text in bench(args):
                print(f"\n{text}", flush=True)
                content = {"arguments": given, **about, "load_after": os.getloadavg(), **results}
                out.write_text(json.dumps(content, indent=1, default=vars) + "\n")
        print(f"\nwritten to {out}")

    return run_command(run)


@contextmanager
def neighbour(wanted: bool):
    """A process that multiplies matrices for as long as the block lasts."""
    code = "import torch; x = torch.randn(512, 512)\nwhile True: x @ x"
    one = {**os.environ, **dict.fromkeys(THREADS, "1")}
    process = subprocess.Popen([sys.executable, "-c", code], env=one) if wanted else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def environment(args, packages) -> dict:
    """Processor, versions, load, whose freed memory is kept; printed in a line, and returned."""
    versions = {"python": platform.python_version()}
    for package in ("torch", *packages):
        with suppress(PackageNotFoundError):  # see `installed`
            versions[package] = version(package)
    kept = "all" if args.keep_memory_for_all else "ours"
    if args.device == "cuda":
        kept = "nobody"
    elif "MALLOC_MMAP_THRESHOLD_" in os.environ:  # it takes precedence
        kept = "as MALLOC_MMAP_THRESHOLD_ says"
    about = {"device": device_name(args.device), "versions": versions,
             "load_before": os.getloadavg(), "freed_memory_kept_by": kept}
    beside = ", beside a busy process" * args.neighbour
    print(f"{about['device']}, {' '.join(map(str, args.threads))} thread(s), load "
          f"{about['load_before'][0]:.1f}{beside}, freed memory kept by {kept}; {versions}",
          flush=True)
    return about


def device_name(device: str) -> str:
    """The GPU, or the processor as Linux names it."""
    if find_device(device).type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(titles, rows: list, words: int = 1) -> str:
    """A Markdown table whose first `words` columns are text, the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(titles) - words)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (titles, rule, *rows))
