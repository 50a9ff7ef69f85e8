"""Write a trained encoder as a folder from which other tools compute the same embeddings.

    python export.py runs/llama2-scl OUT             adapters merged, in float32
    python export.py runs/llama2-scl OUT --dtype bfloat16 --license llama2

    SentenceTransformer("OUT").encode(texts)         sentence-transformers 6 and newer
    AutoModel, AutoTokenizer.from_pretrained("OUT")  transformers 5.2 and newer: see OUT/README.md

The folder contains no custom code. The K memory tokens are special tokens with the ids V..V+K-1,
which the tokenizer itself appends, so that only the text is ever cut; `"is_causal": false` lets the
Llama attend in both directions; WordWeights with weight 1 for memory tokens and 0 for all others,
followed by the mean, is Eq. 6. Templates and instructions become a chat template, in which a prompt
is the instruction. OUT/README.md is the model card, OUT/probe.json has two texts and their vectors,
which show whether a tool reads the folder as it should: older ones ignore is_causal.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from shlex import quote

if __name__ == "__main__":  # handle Ctrl-C while torch is imported, which takes seconds
    from runtime.errors import await_command

    await_command()

import tokenizers
import torch
from tokenizers.processors import TemplateProcessing

import contrastive
import pretrain_ctkd
from data.tasks import TASKS
from data.tokenizer import choose_template
from evaluate import instruction_for
from lora import merge_lora
from model import Encoder, load_encoder
from runtime.errors import UserError, run_command
from runtime.files import read_json, write_folder
from runtime.formats import write_tensors
from runtime.results import label_of, read_result
from runtime.settings import command_line

SENTENCE_TRANSFORMERS = {  # the oldest versions that read the folder correctly
    "sentence_transformers": "6.0.0", "transformers": "5.2.0", "pytorch": "2.5.0"}
PROBES = ["A bird sings.", "Owls hunt at night:\n  they hear a mouse beneath the snow, and strike."]
POOLINGS = {"mean": "mean", "weighted-mean": "weightedmean", "last": "lasttoken"}


@torch.no_grad()
def export_encoder(encoder: Encoder, folder: str | Path, license: str = "", results=()):
    """Write an encoder for transformers and sentence-transformers: V + K rows, adapters merged.

    For the card: license, the base's, as its page names it; results, as evaluate.py wrote them.
    Modifies the encoder: its adapters are merged in place. UserError if it cannot be exported.
    """
    c = encoder.config
    for template in (c.template, c.document_template):
        if c.pooling == "echo" or template.count("{text}") > 1:
            raise UserError(f"pooling={c.pooling!r}, template={template[:60]!r}: reads each text "
                            f"twice, and no other tool cuts it so that the copies agree; use "
                            f"Encoder.encode")
    if c.pooling not in ("memory", *POOLINGS):
        raise UserError(f"pooling={c.pooling!r}: no other tool has it; use Encoder.encode")
    config = read_json(encoder.tokenizer.file.with_name("config.json"))
    names = config.get("architectures") or [f"{config['model_type'].capitalize()}ForCausalLM"]
    config["architectures"] = [name.replace("ForCausalLM", "Model") for name in names]  # no head
    config.pop("dtype", None)  # the newer name of torch_dtype, which would take precedence
    config |= {"vocab_size": encoder.llama.config.vocab_size + c.num_memory_tokens,
               "torch_dtype": str(encoder.dtype).removeprefix("torch."),
               "llm2comp": asdict(c) | {"history": encoder.history}}  # for evaluate.py
    if c.attention == "bidirectional":
        config["is_causal"] = False
    tokenizer = tokenizer_with_memory(encoder)
    check_ids(encoder, tokenizer)
    merge_lora(encoder.llama)
    tensors = {name.removeprefix("model."): tensor for name, tensor in
               encoder.llama.state_dict().items() if name != "lm_head.weight"}
    tensors["embed_tokens.weight"] = torch.cat((encoder.table, encoder.memory_tokens))
    vectors = encoder.encode(PROBES)
    probe = {"texts": PROBES, "embeddings": [[round(float(x), 6) for x in v] for v in vectors]}
    files = {"config.json": config, "probe.json": probe,
             "tokenizer_config.json": tokenizer_config(encoder), **module_files(encoder)}
    with write_folder(Path(folder)) as aside:
        write_tensors(aside / "model.safetensors", tensors, encoder.dtype)
        tokenizer.save(str(aside / "tokenizer.json"))
        about = card(encoder, Path(folder).name, license, list(results))
        (aside / "README.md").write_text(about, encoding="utf-8")
        for name, value in files.items():
            (aside / name).parent.mkdir(exist_ok=True)
            (aside / name).write_text(json.dumps(value, indent=None if "1_" in name else 2) + "\n")


# ---------------------------------------------------------------------------------------------
# The tokenizer
# ---------------------------------------------------------------------------------------------


def memory_names(encoder: Encoder) -> list[str]:
    """The names of the memory tokens in the exported tokenizer."""
    return [f"<memory_{i}>" for i in range(1, encoder.config.num_memory_tokens + 1)]


def tokenizer_with_memory(encoder: Encoder) -> tokenizers.Tokenizer:
    """The encoder's tokenizer with a token for each of V + K rows; memory tokens follow each text.

    UserError if the tokenizer's ids have gaps, or if it has such tokens already.
    """
    v, memory = encoder.llama.config.vocab_size, memory_names(encoder)
    about = json.loads(encoder.tokenizer.file.read_text(encoding="utf-8"))
    # drop a pad token beyond the table: the first memory token takes its id
    about["added_tokens"] = [t for t in about.get("added_tokens", []) if t["id"] < v]
    about |= {"truncation": None, "padding": None}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(about))
    # every id gets a token, in order: those of the table that the tokenizer lacks, then the memory
    new = [f"<unused_{i}>" for i in range(tokenizer.get_vocab_size(), v)] + memory
    taken = [token for token in new if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens(new)
    size = v + len(memory)
    last = [tokenizer.id_to_token(size - 1)] if new else []
    if taken or tokenizer.get_vocab_size() != size or last != new[-1:]:
        raise UserError(f"{encoder.tokenizer.file}: its ids have gaps, or it has a token named "
                        f"{', '.join(taken or new[-1:])} already; rename that token")
    bos = bos_names(encoder)
    ids = {name: tokenizer.token_to_id(name) for name in [*bos, *memory]}
    tokenizer.post_processor = TemplateProcessing(
        single=[*bos, "$A", *memory], special_tokens=list(ids.items()))
    return tokenizer


def bos_names(encoder: Encoder) -> list[str]:
    """The tokens that begin a text."""
    return [encoder.tokenizer.backend.id_to_token(i) for i in encoder.tokenizer.bos]


def is_prompted(encoder: Encoder) -> bool:
    """Whether the encoder reads any texts in a template, which makes a chat template necessary."""
    return (encoder.config.template, encoder.config.document_template) != ("{text}", "")


def chat_template(encoder: Encoder) -> str:
    """The encoder's templates in Jinja: the system message is the instruction.

    `task` is "document" in sentence-transformers' encode_document.
    """
    def fill(template: str) -> str:
        names = {"{instruction}": "system[0]", "{text}": "text"}
        parts = filter(None, re.split(r"(\{instruction\}|\{text\})", template))
        return "".join("{{ " + (names.get(part) or json.dumps(part)) + " }}" for part in parts)

    c = encoder.config
    plain = fill(choose_template(c.template, ""))
    read = f"{{% if system %}}{fill(c.template)}{{% else %}}{plain}{{% endif %}}" \
        if "{instruction}" in c.template else plain
    if c.document_template:
        read = f"{{% if task is defined and task == 'document' %}}{fill(c.document_template)}" \
               f"{{% else %}}{read}{{% endif %}}"
    of_role = ("{{% set {0} = messages | selectattr('role', 'equalto', '{1}') "
               "| map(attribute='content') | list %}}")
    return (of_role.format("system", "system") + of_role.format("user", "user")
            + "{% set text = user[0] %}" + fill("".join(bos_names(encoder))) + read
            + fill("".join(memory_names(encoder))))


def tokenizer_config(encoder: Encoder) -> dict:
    """tokenizer_config.json; memory tokens count in its length, since they are never cut."""
    c, first = encoder.config, bos_names(encoder)[0]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": first,
                "pad_token": first, "padding_side": "right",  # the mask tells them apart
                "model_max_length": c.max_tokens + c.num_memory_tokens}
    if is_prompted(encoder):  # its own control tokens must be read as such
        settings["chat_template"] = chat_template(encoder)
    elif c.special_tokens == "literal":
        settings["split_special_tokens"] = True
    return settings


def check_ids(encoder: Encoder, tokenizer: tokenizers.Tokenizer):
    """UserError if the exported tokenizer reads a text differently from the encoder.

    A chat template is tokenised as one string with its control tokens; a tokenizer that treats the
    beginning of a string specially reads the text after them differently.
    """
    c = encoder.config
    instruction = "Find it" if "{instruction}" in c.template else ""
    for text in [*PROBES, "", " 1,024 Häuser\n\tif x:  # 東京 🦉"]:
        for told, document in (("", False), (instruction, False), ("", True)):
            read = encoder.tokenize([text], told, document)
            ours = read.ids[0].tolist()
            ours += [tokenizer.token_to_id(name) for name in memory_names(encoder)]
            if is_prompted(encoder):
                filled = choose_template(c.template, c.document_template, told, document)
                filled = filled.replace("{instruction}", told).replace("{text}", text)
                string = "".join([*bos_names(encoder), filled, *memory_names(encoder)])
                theirs = tokenizer.encode(string, add_special_tokens=False).ids
            else:
                theirs = tokenizer.encode(text).ids
            if ours != theirs and not read.cut[0]:
                raise UserError(f"{encoder.tokenizer.file}: reads {text[:30]!r} differently behind "
                                f"its control tokens, as a chat template would have it; an "
                                f"encoder with a template cannot be exported with this tokenizer")


# ---------------------------------------------------------------------------------------------
# sentence-transformers' modules
# ---------------------------------------------------------------------------------------------


def module_files(encoder: Encoder) -> dict[str, object]:
    """The files that make sentence-transformers read, weigh and pool as the encoder does."""
    c, (v, d) = encoder.config, encoder.table.shape
    k, memory = c.num_memory_tokens, memory_names(encoder)
    kept = [memory[i] for i in c.kept_tokens] or memory
    pooling = {"embedding_dimension": d, "pooling_mode": "mean", "include_prompt": True}
    modules, files = ["Transformer", "WordWeights", "Pooling"], {}
    if k > 1:  # all names but the memory tokens' are placeholders
        files["1_WordWeights/config.json"] = {
            "vocab": [""] * v + memory, "word_weights": dict.fromkeys(kept, 1.0),
            "unknown_word_weight": 0.0}
    else:  # a single memory token is the last token: more tools support that
        modules.remove("WordWeights")
        pooling["pooling_mode"] = POOLINGS[c.pooling] if k == 0 else "lasttoken"
    paths = [f"{i}_{name}" if i else "" for i, name in enumerate(modules)]
    files[paths[-1] + "/config.json"] = pooling
    files["modules.json"] = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(zip(modules, paths))]
    read = {"max_seq_length": c.max_tokens + k, "do_lower_case": False,
            "unpad_inputs": False}  # the path without padding loses the weights
    if is_prompted(encoder):
        way = {"method": "forward", "method_output_name": "last_hidden_state"}
        read |= {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings",
                 "modality_config": {"text": way, "message": {**way, "format": "flat"}}}
    files["sentence_bert_config.json"] = read
    reason = "older versions attend causally, and know no such chat template"
    files["config_sentence_transformers.json"] = {
        "model_type": "SentenceTransformer", "__version__": SENTENCE_TRANSFORMERS,
        "requirements": {"transformers": {
            "specifier": f">={SENTENCE_TRANSFORMERS['transformers']}", "reason": reason}},
        "prompts": task_prompts(encoder), "default_prompt_name": None,
        "similarity_fn_name": "cosine"}
    return files


def task_prompts(encoder: Encoder) -> dict[str, str]:
    """Names under which mteb looks up prompts -> tasks' instructions, if the encoder takes any."""
    if "{instruction}" not in encoder.config.template:
        return {}
    only_queries = ("retrieval", "reranking")
    of_paper = {key: task for key, task in TASKS.items() if "group" in task}
    return {task["name"] + "-query" * (task["kind"] in only_queries):
            instruction_for(key, "auto", encoder) for key, task in of_paper.items()}


# ---------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------

CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, sentence-similarity, mteb, llm2comp]{about}
---

# {title}

A text encoder made from `{base}` as LLM2Comp ([arXiv 2511.17129](https://arxiv.org/abs/2511.17129))
makes them: {how}
{D} dimensions, compared by their cosine. A text may have {max_tokens} tokens; a longer one is cut.

```python
from sentence_transformers import SentenceTransformer  # 6.0 or newer, transformers 5.2 or newer

model = SentenceTransformer("{title}")
embeddings = model.encode(["A bird sings.", "An owl hunts at night."]{prompt})
```

Older versions, and servers that read only a part of the folder, take it without a word and give
other vectors. What they should be is in probe.json:

```python
import json
probe = json.load(open("{title}/probe.json"))
print(model.similarity(model.encode(probe["texts"]), probe["embeddings"]).diagonal())  # all 1.00
```

In transformers{fits}:

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("{title}"), AutoModel.from_pretrained("{title}")
texts = ["A bird sings.", "An owl hunts at night."]
{read}
with torch.no_grad():
    states, mask = model(**batch).last_hidden_state, batch["attention_mask"]
embeddings = {pooled}
```

## Training

```sh
{commands}
```
{table}"""

STATES = {  # right-padded states (N, L, D) and their mask (N, L) -> embeddings (N, D)
    "last": "states[range(len(mask)), mask.sum(1) - 1]",
    "mean": "(states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)",
    "weighted-mean": "(states * (w := mask * mask.cumsum(1))[..., None]).sum(1) / w.sum(1, True)",
}
BATCH = """batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")"""
CHAT = """messages = [[{"role": "user", "content": text}] for text in texts]
batch = tokenizer.apply_chat_template(
    messages, padding=True, return_dict=True, return_tensors="pt")"""
SYSTEM = """# instructed: [{"role": "system", "content": "Find it"}, ...]
"""


def card(encoder: Encoder, title: str, license: str, results: list[dict]) -> str:
    """README.md of the folder: what the hub reads, how to use the model, how it was made.

    results: what evaluate.py has written about this encoder.
    """
    c, k, prompted = encoder.config, encoder.config.num_memory_tokens, is_prompted(encoder)
    how, pooled = f"its last layer's states under the pooling `{c.pooling}`.", STATES.get(c.pooling)
    if k:
        kept = f"{len(c.kept_tokens)} of " if c.kept_tokens else ""
        how = f"it reads a text and {k} memory tokens, and the mean of {kept}their last " \
              f"states is the embedding." if k > 1 else \
              "it reads a text and one memory token, whose last state is the embedding."
        places = [i - k for i in c.kept_tokens] or list(range(-k, 0))
        pooled = STATES["last"] if k == 1 else \
            f"torch.stack([h[[n + i for i in {places}]].mean(0)\n" \
            f"                          for h, n in zip(states, mask.sum(1).tolist())])"
    scores = [(r["task_name"], 100 * r["scores"]["test"][0]["main_score"]) for r in results]
    rows = "".join(f"| {name} | {score:.2f} |\n" for name, score in scores)
    base = encoder.base["name"]
    local = Path(base).is_absolute()  # nobody else has that folder
    return CARD.format(
        base=Path(base).name if local else base, title=title, how=how, D=encoder.table.shape[1],
        about=f"\nbase_model: {base}" * (not local) + f"\nlicense: {license}" * bool(license)
              + metadata(title, results), max_tokens=c.max_tokens,
        prompt=', prompt="Retrieve semantically similar text"' * bool(task_prompts(encoder)),
        fits=", for texts that need not be cut" * prompted,
        read=SYSTEM * bool(task_prompts(encoder)) + CHAT if prompted else BATCH,
        pooled=pooled, commands="\n".join(map(command_of, encoder.history)),
        table=f"\n## Scores\n\n| task | main score x 100 |\n|---|---|\n{rows}" * bool(rows))


def metadata(title: str, results: list[dict]) -> str:
    """The scores as the hub and mteb read them from a card (`model-index`)."""
    if not results:
        return ""
    known = {task["name"]: task for task in TASKS.values()}
    lines = ["", "model-index:", f"- name: {title}", "  results:"]
    for r in results:
        name, [score] = r["task_name"], r["scores"]["test"]
        task = known.get(name, {"kind": "text", "repository": name})
        lines += [f"  - task: {{type: {task['kind']}}}",
                  f"    dataset: {{type: {task['repository']}, name: {name}, config: "
                  f"{score['hf_subset']}, split: test, revision: {r['dataset_revision']}}}",
                  f"    metrics: [{{type: main_score, value: {score['main_score']:.6f}}}]"]
    return "\n".join(lines)


def command_of(stage: dict) -> str:
    """The commands that made a stage, from the settings in the encoder's history."""
    kind = stage["stage"].partition("_")[0]  # ucl_2 is a second ucl
    module = contrastive if kind in contrastive.PRESETS else pretrain_ctkd
    presets = module.PRESETS.get(kind, module.PRESETS)
    given = command_line(module.Config, presets["paper"], {**stage, "stage": kind})
    first = f"--stage {kind} " if module is contrastive else ""
    command = f"torchrun {module.__name__}.py {first}--preset paper {given}"
    if kept := stage.get("collapse"):
        given = {key: value for key, value in kept.items() if key != "kept_tokens"}
        flags = [f"--{key} {quote(str(value))}" for key, value in given.items()
                 if value is not None]
        command += (f"\npython collapse.py --model RUN {' '.join(flags)} --save FOLDER"
                    f"  # keeps {', '.join(map(str, kept['kept_tokens']))}")
    return command


def results_of(name: str, encoder: Encoder, folder: Path) -> list[dict]:
    """The results of evaluate.py under this name that have the encoder's weights and base."""
    found = map(read_result, sorted((folder / label_of(name, "memory")).glob("*.json")))
    ours = encoder.sha256, encoder.base["sha256"]
    return [r for r in found if ours == (
        r["settings"].get("sha256"), (r["settings"].get("base") or {}).get("sha256"))]


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("encoder", help="an encoder folder, or a run's")
    parser.add_argument("out", help="the folder to write; must not exist")
    parser.add_argument("--base", help="path of the base model, if it has moved")
    parser.add_argument("--other-base", action="store_true", help="take that base even if it is "
                        "another one than the encoder was trained on")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--license", default="", help="the base's, for the card: apache-2.0, ...")
    parser.add_argument("--results", default="results", help="evaluate.py's, for the card")
    return parser.parse_args(argv)


def run(args: argparse.Namespace):
    """Export, and say what a user of the folder has to watch out for."""
    if Path(args.out).exists():
        raise UserError(f"{args.out}: exists already; name a new folder")
    dtype = getattr(torch, args.dtype)
    encoder = load_encoder(args.encoder, args.base, dtype, other_base=args.other_base)
    results = results_of(args.encoder, encoder, Path(args.results))
    export_encoder(encoder, args.out, args.license, results)
    said = f", {len(results)} score{'s'[: len(results) != 1]} in its card" * bool(results)
    print(f"wrote {args.out}{said}")
    if encoder.tokenizer.special and is_prompted(encoder):
        some = ", ".join(list(encoder.tokenizer.special)[:3])
        print(f"note: in a text, {some} are letters to this encoder, and tokens to readers of the "
              f"folder's chat template (docs/runs.md)")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(lambda: run(parse_arguments(argv)), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
