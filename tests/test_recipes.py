"""The presets beside the settings of other code, which settings_elsewhere.json has with sources."""

import json
from pathlib import Path

import pytest
import torch

import contrastive
import pretexts
import pretrain_ctkd
from lora import TARGETS, LoraConfig
from model import EncoderConfig
from runtime.devices import pick_dtype
from runtime.results import PUBLISHED
from runtime.schedule import learning_rate, warmup_steps

ELSEWHERE = json.loads((Path(__file__).parent / "settings_elsewhere.json").read_text())
SCHEDULES, SETTINGS = ELSEWHERE["deepspeed"]["schedules"], ELSEWHERE["settings"]
PRESETS = {"ctkd": pretrain_ctkd.PRESETS, **contrastive.PRESETS}


def ours(stage: str, preset: str) -> dict:
    """The settings of a preset, and what follows from them."""
    module = pretrain_ctkd if stage == "ctkd" else contrastive
    config = module.Config(**PRESETS[stage][preset])
    found = {**vars(config)}
    if found["model"].startswith("runs/"):  # the stage before: its model, its shape
        before = ours("ctkd", preset)
        found |= {key: before[key] for key in ("model", "memory_tokens", "attention")}
        found["pooling"] = before["pooling"]
    elif stage == "ctkd":
        own = pretexts.SHAPES.get(config.objective, {})
        found["pooling"] = own.get("pooling", EncoderConfig().pooling)
    steps = config.steps or config.num_texts // config.batch_size  # 0: known from the rows only
    schedule = found.get("schedule_steps") or steps
    warmup = warmup_steps(config.warmup, schedule or 10_000)
    half = learning_rate(1 + warmup // 2, max(schedule, 10 * warmup), warmup, 0.0, 1.0)
    return found | {
        "trained_steps": steps, "schedule": schedule, "warmup_steps": warmup,
        "rise": "linear" if abs(half - 0.5) < 0.01 else "logarithmic",
        "lora_targets": sorted(TARGETS if config.lora_k_proj else LoraConfig().targets),
        "rows_of_a_softmax": config.batch_size,
        "longest_text": config.max_tokens, "longest_document": found.get("document_tokens"),
        "cuda_dtype": str(pick_dtype(config.dtype, torch.device("cuda"))),
    }


def official(v: dict) -> dict:
    """Our settings as the official code's values say them, in all stages."""
    assert (v["optimizer.type"], v["scheduler.type"]) == ("AdamW", "WarmupDecayLR")
    assert v["optimizer.lr"] == v["scheduler.warmup_max_lr"]
    return {
        "model": v["model_name"], "memory_tokens": v["sequence_length"],
        "lr": v["optimizer.lr"], "min_lr": v["scheduler.warmup_min_lr"], "rise": "logarithmic",
        "warmup_steps": v["scheduler.warmup_num_steps"], "schedule": v["scheduler.total_num_steps"],
        "weight_decay": v["optimizer.weight_decay"], "clip": v["gradient_clipping"] or 0.0,
        "batch_size": v["train_batch_size"], "rows_of_a_softmax": v["train_batch_size"],
        "cuda_dtype": "torch.bfloat16" if v["bf16.enabled"] else "torch.float32",
        "max_tokens": v["max_length"] - v["sequence_length"],
        "lora_r": v["LoraConfig.r"], "lora_alpha": v["LoraConfig.lora_alpha"],
        "lora_dropout": v["LoraConfig.lora_dropout"],
        "lora_targets": sorted(v["LoraConfig.target_modules"]),
    }


def llm2vec(v: dict) -> dict:
    """The same of LLM2Vec's configurations."""
    return {
        "model": v["model_name_or_path"], "lr": v["learning_rate"], "lora_r": v["lora_r"],
        "attention": "bidirectional" if v.get("bidirectional", True) else "causal",
        "pooling": v.get("pooling_mode", "mean"), "max_tokens": v["max_seq_length"],
        "trained_steps": v["stop_after_n_steps"], "cuda_dtype": "torch." + v["torch_dtype"],
        "batch_size": (v.get("nproc_per_node", 1) * v["per_device_train_batch_size"]
                       * v["gradient_accumulation_steps"]),
    }


MAPPINGS = {
    "official code, stage 1": lambda v: {
        **official(v), "objective": {"KL": "ctkd"}[v["task_type"]], "text_seed": v["shuffle.seed"],
        "num_texts": v["select.range"],
        "trained_steps": v["select.range"] // v["train_batch_size"],
        "memory_init": {"resize_token_embeddings": "mean"}[v["new_rows"]],
    },
    "official code, stage 2": lambda v: {
        **official(v), "text_seed": v["set_seed"], "num_texts": v["data_pieces"],
        "trained_steps": v["data_pieces"] // v["train_batch_size"],
        "attention_dropout": v["dropout_rate"], "temperature": v["self.temperature"],
    },
    "official code, stage 3": lambda v: {
        **official(v), "trained_steps": v["samples"] // v["train_batch_size"],
        "document_tokens": {"2 * max_length": 2 * v["max_length"]}[v["max_length of documents"]]
        - v["sequence_length"],
        "attention_dropout": v["dropout_rate"], "temperature": v["temperature"],
        "negatives": v["negatives of a row"],
    },
    "RepLLaMA": lambda v: {
        "model": v["model_name_or_path"], "lr": v["learning_rate"],
        "min_lr": {"linear": 0.0}[v["lr_scheduler_type"]], "rise": v["lr_scheduler_type"],
        "warmup_steps": v["warmup_steps"], "weight_decay": v["weight_decay"],
        "clip": v["max_grad_norm"], "temperature": v["compute_similarity"],
        "batch_size": v["devices"] * v["per_device_train_batch_size"]
        * v["gradient_accumulation_steps"],
        "rows_of_a_softmax": v["per_device_train_batch_size"],
        "negatives": v["train_n_passages"] - 1,
        "steps": {1: 0}[v["num_train_epochs"]],  # 0 is once through the rows
        "num_texts": 0, "instruction": "none", "attention_dropout": 0.0,
        "template": v["query"] + "{text}" + v["eos_token"],
        "document_template": v["passage"] + "{text}" + v["eos_token"],
        "max_tokens": v["q_max_len"], "document_tokens": v["p_max_len"],
        "encoder_tokens": v["q_max_len, p_max_len on BEIR"],
        "longest_text": v["q_max_len"] - v["left free by a cut text"],
        "longest_document": v["p_max_len"] - v["left free by a cut text"],
        "pooling": v["pooling"], "attention": v["attention"],
        "cuda_dtype": "torch.bfloat16" if v["bf16"] else "torch.float32",
        "lora_r": v["peft_config.r"], "lora_alpha": v["peft_config.lora_alpha"],
        "lora_dropout": v["peft_config.lora_dropout"],
        "lora_targets": sorted(v["peft_config.target_modules"]),
    },
    "LLM2Vec, MNTP": lambda v: {
        **llm2vec(v), "objective": "mntp", "text": {"wikitext-103-raw-v1": "wikitext103"}[
            v["dataset_config_name"]], "mask_share": v["mlm_probability"],
        "mask_token": {("blank", "default"): "_"}[v["mask_token_type"], v["data_collator_type"]],
        "lora_alpha": {"2 * lora_r": 2 * v["lora_r"]}[v["lora_alpha"]],
        "lora_dropout": v["lora_dropout"], "lora_targets": sorted(v["target_modules"]),
    },
    "LLM2Vec, SimCSE": lambda v: {
        **llm2vec(v), "attention_dropout": v["simcse_dropout"], "temperature": 1 / v["loss_scale"],
        "text": v["dataset_name"].lower(), "encoder_tokens": v["LLM2Vec.max_length"],
    },
    "LLM2Vec, supervised": lambda v: {
        **llm2vec(v), "warmup_steps": v["warmup_steps"], "document_tokens": v["max_seq_length"],
    },
}


class Noting(dict):
    """A dictionary that notes which of its keys were asked for."""

    def __init__(self, values):
        super().__init__(values)
        self.asked = set()

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self[key] if key in self else default


# ---------------------------------------------------------------------------------------------
# Presets
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SETTINGS)
def test_a_preset_has_the_settings_of_its_source_but_for_the_differences_listed(source):
    """A change of a preset, of a value written down or of the list must be made in all places."""
    about = SETTINGS[source]
    theirs, own = MAPPINGS[source](about["values"]), ours(*about["preset"])
    differs = {key: [value, own[key]] for key, value in theirs.items() if own[key] != value}
    assert differs == {key: pair for key, (*pair, _) in about["differs"].items()}
    assert len(theirs) - len(differs) >= 4


@pytest.mark.parametrize("source", SETTINGS)
def test_every_value_written_down_is_compared_and_has_a_source(source):
    values = Noting(SETTINGS[source]["values"])
    MAPPINGS[source](values)
    assert values.asked == set(values)
    assert "/" in SETTINGS[source]["source"]
    assert all(why for *_, why in SETTINGS[source]["differs"].values())


def test_every_source_is_compared_and_every_paper_preset_has_one():
    assert MAPPINGS.keys() == SETTINGS.keys()
    compared = {tuple(about["preset"]) for about in SETTINGS.values()}
    assert compared == {(stage, name) for stage, own in PRESETS.items() for name in own
                        if name not in ("demo", "smollm2", "llama2vec")}  # ours


# ---------------------------------------------------------------------------------------------
# The learning rate
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rates_are_deepspeeds(name):
    about = SCHEDULES[name]
    shape = [about[key] for key in ("steps", "warmup", "low", "high")]
    found = {step: learning_rate(int(step), *shape) for step in about["rates"]}
    assert found == pytest.approx(about["rates"], rel=1e-12, abs=0)
    assert len(found) >= 8 and {"0", "1", "2"} <= set(found)


@pytest.mark.parametrize("stage, name", [
    ("ctkd", "stage 1, 32,000 texts"), ("ucl", "stage 2"), ("scl", "stage 3")])
def test_the_paper_presets_run_at_a_schedule_of_which_deepspeeds_rates_are_known(stage, name):
    own = ours(stage, "paper")
    assert SCHEDULES[name] == {"low": own["min_lr"], "high": own["lr"], "steps": own["schedule"],
                               "warmup": own["warmup_steps"], "rates": SCHEDULES[name]["rates"]}


def test_a_run_of_128000_texts_has_the_official_schedule():
    config = pretrain_ctkd.parse_arguments(["--preset", "paper", "--num-texts", "128000"])
    steps = config.num_texts // config.batch_size
    official_one = SCHEDULES["stage 1, official (128,000 texts)"]
    assert (steps, warmup_steps(config.warmup, steps)) == (
        official_one["steps"], official_one["warmup"])


# ---------------------------------------------------------------------------------------------
# What an encoder must have been trained with to stand beside the paper's row
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, steps", [("ctkd", 32000 // 4), ("ucl", 128000 // 128),
                                          ("scl", 200)])
def test_the_recipes_beside_the_papers_rows_are_those_of_the_paper_presets(stage, steps):
    recipe, own = PUBLISHED["recipes"][stage], ours(stage, "paper")
    assert recipe == {key: own[key] for key in recipe}
    assert recipe["trained_steps"] == steps and {"batch_size", "trained_steps"} <= set(recipe)


def test_each_of_the_papers_objectives_has_its_rows():
    own = pretrain_ctkd.OBJECTIVES.keys() - pretexts.OBJECTIVES.keys() - {"ctkd-window"}
    assert PUBLISHED["objectives"].keys() == own
    for name in PUBLISHED["objectives"].values():
        for ending in ("", " + UCL", " + SCL"):
            assert len(PUBLISHED["rows"][f"LLM2Comp {name}{ending}"]) == 14
