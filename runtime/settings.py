"""Settings: one dataclass per stage, one field per line, for command line, bounds and JSON."""

import argparse
import shlex
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from runtime.errors import UserError, terminal


def setting(default, help: str, choices=None, *, least=None, below=None, resumable=False,
            older=None, only=""):
    """A field of a stage's Config, with its sentence of help and its bounds.

    choices: the values allowed (a tuple, a mapping with these keys, or a function that returns them
    when the command line is read). least <= value < below. resumable: whether it may change when a
    run is resumed: no; True (nothing depends on it); "place" (it locates something whose content
    the checkpoint knows by its sha256); "bits" (it is how the same step is computed). older: what
    runs from before this setting did, if not the default. only: the stage that it is for, if not
    for all.
    """
    return field(default=default, metadata={
        "help": help, "choices": choices, "least": least, "below": below, "resumable": resumable,
        "older": default if older is None else older, "only": only})


@dataclass
class RunConfig:
    """The settings that all stages share: machine, seed, checkpoints."""

    dtype: str = setting("auto", "dtype of frozen weights and activations",
                         ("auto", "bfloat16", "float32", "float64"))
    device: str = setting("auto", "auto, cpu, cuda", resumable="bits")
    threads: int = setting(0, "CPU threads per process; 0 = the cores shared among processes",
                           least=0, resumable="bits")
    seed: int = setting(0, "seed of order, draws, initialisation and dropout", least=0)
    deterministic: bool = setting(False, "on CUDA: the same bits from the same input, slower")
    save_every: int = setting(500, "steps between checkpoints", least=1, resumable=True)
    save_minutes: float = setting(0.0, "also save when the last checkpoint is this old; 0 = off",
                                  least=0, resumable=True)
    timeout: float = setting(30.0, "minutes that a rank waits for the others in a step",
                             least=0.01, resumable=True)
    resume: bool = setting(False, "resume from the newest checkpoint in --out", resumable=True)


def parse_config(
    config_class, presets: dict[str, dict[str, dict]], argv: list[str] | None, doc: str
):
    """A configuration from its defaults, a preset, and the flags given (the stronger last).

    presets: stage -> name -> settings. The stage is that of --stage, or else the first one that has
    the preset; the preset is `paper` if a --model other than the demo's is named, or else `demo`.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = dict.fromkeys(name for own in presets.values() for name in own)
    parser.add_argument("--preset", choices=list(names), help="a set of defaults, see below "
                        "(default demo; paper if --model names anything but demo)")
    parser.epilog = "\n".join(
        f"preset {name} of {stage}: "
        + (", ".join(f"{k} {v}" for k, v in changes.items()) or "the defaults")
        for stage, own in presets.items() for name, changes in own.items()
    )
    own = list(config_class.__annotations__)  # the stage's settings first, then those of every run
    for f in sorted(fields(config_class),
                    key=lambda f: own.index(f.name) if f.name in own else len(own)):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        if choices := f.metadata["choices"]:
            kind["choices"] = list(choices() if callable(choices) else choices)
        only = f.metadata["only"]
        text = (f"{only}: " if only else "") + f.metadata["help"].replace("%", "%%")
        text += "" if f.type is bool else f" (default {f.default!r})"
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **kind)
    with terminal():
        given = vars(parser.parse_args(argv))
    name = given.pop("preset") or ("demo" if given.get("model", "demo") == "demo" else "paper")
    stage = given.get("stage") or next(stage for stage, own in presets.items() if name in own)
    if name not in presets[stage]:
        parser.error(f"--preset {name}: is not for {stage}, which has {', '.join(presets[stage])}")
    for f in fields(config_class):
        only = f.metadata["only"]
        if f.name in given and only not in ("", stage) and not given.get("resume"):
            parser.error(f"{flag(f.name)}: is for --stage {only}, not for {stage}; leave it out, "
                         f"or give --stage {only}")
    return config_class(**{**presets[stage][name], **given})


def require_unset(what: str, config, *names: str):
    """UserError if one of these settings, which are for `what` alone, is not its default."""
    for name in names:
        if (value := getattr(config, name)) != getattr(type(config), name):
            raise UserError(f"{flag(name)} {value}: is for {what}; leave it out")


def check_bounds(config):
    """UserError for a number that is outside its field's bounds, or not finite."""
    for f in fields(config):
        value, least, below = (getattr(config, f.name), *map(f.metadata.get, ("least", "below")))
        if isinstance(value, float) and not abs(value) < 1e38:  # also true for nan
            raise UserError(f"{flag(f.name)} {value}: must be finite, and below 1e38")
        if least is not None and value < least:
            raise UserError(f"{flag(f.name)} {value}: must be at least {least}")
        if isinstance(value, int) and value >= 2**63:
            raise UserError(f"{flag(f.name)} {value}: must be below 2^63")
        if below is not None and value >= below:
            raise UserError(f"{flag(f.name)} {value}: must be below {below}")
    if config.lr < config.min_lr:
        raise UserError(f"--lr {config.lr}: must be at least --min-lr {config.min_lr}; lower both")


def flag(name: str) -> str:
    """The command line's flag of a setting."""
    return "--" + name.replace("_", "-")


def stored_settings(config) -> dict:
    """The configuration as it is stored with the run and the encoder."""
    return {name: value for name, value in asdict(config).items()
            if name not in ("resume", "dry_run")}


def adopt_older(config, before: dict) -> list[str]:
    """Set the settings that a stored run is too old to have to what it did without them, so that it
    continues unchanged; returns 'name value' for each."""
    newer = [f for f in fields(config) if f.name not in before and f.metadata["older"] != f.default]
    for f in newer:
        setattr(config, f.name, f.metadata["older"])
    return [f"{f.name} {f.metadata['older']}" for f in newer]


def changed_settings(config, before: dict, resuming: bool = False) -> list[str]:
    """What differs between a configuration and a run's: 'name: old -> new' for each such setting.

    Left out are settings on which nothing depends and, if `resuming`, what a resumed run may
    change. A setting that is newer than the run counts as its default, or as what `older` says.
    """
    allowed = (True, "place", "bits") if resuming else (True,)
    return [f"{name}: {old!r} -> {new!r}" for name, (old, new, kind) in
            differences(config, before).items() if kind not in allowed]


def differences(config, before: dict) -> dict[str, tuple]:
    """The settings that are not as before: name -> old value, new value, `resumable`."""
    found = {}
    for f in fields(config):
        old, new = before.get(f.name, f.metadata["older"]), getattr(config, f.name)
        kind = f.metadata["resumable"]
        same = kind == "place" and old and new and Path(str(old)) == Path(new)  # runs/a/ is runs/a
        if old != new and not same:
            found[f.name] = old, new, kind
    return found


# settings that say where and how a run was made, not what it is
OWN_PLACE = ("out", "device", "threads", "save_every", "save_minutes", "timeout", "resume")


def command_line(config_class, preset: dict, stored: dict) -> str:
    """The flags by which the stored settings differ from a preset, for a shell."""
    given = []
    for f in fields(config_class):
        value = stored.get(f.name, f.metadata["older"])
        if f.name in OWN_PLACE or value == preset.get(f.name, f.default):
            continue
        if f.type is bool:
            given.append(flag(f.name if value else f"no_{f.name}"))
        else:
            given += [flag(f.name), str(value)]
    return shlex.join(given)
