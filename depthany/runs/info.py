"""What a checkpoint is: stage, model, order, progress, teacher, data and their licences, software."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from depthany.callbacks.record import read_record
from depthany.models.depth_model import DepthModel
from depthany.models.layouts import OFFICIAL
from depthany.models.weights import read_metadata, weights_hash
from depthany.runs.cards import find_card, read_cards
from depthany.runs.find import find_weights, open_weights, run_config

Info = dict[str, Any]  # section -> name -> value; "data" is a list of such mappings
# What the authors say of their own files (V2c README.md); a file in their layout may be anybody's.
OFFICIAL_LICENCES = {  # of V2
    "vits": "Apache-2.0",
    "vitb": "CC-BY-NC-4.0",
    "vitl": "CC-BY-NC-4.0",
    "vitg": "CC-BY-NC-4.0",
}
CARD_OF = {"scenes": "embedded"}  # modules of depthany.data.sources whose card has another name


def checkpoint_info(spec: str, runs: Path) -> Info:
    """Everything that a checkpoint, its metadata and its run folder say; what they do not say is left out.

    Args:
        spec: what `find_weights` takes.
        runs: where run folders are.

    Raises:
        ConfigError: no such checkpoint, or none that is known.
    """
    path = find_weights(spec, runs, stage=None)
    model, said = open_weights(path)
    facts = _mapping(said.get("facts"))
    config = facts.get("config") or _mapping(said.get("config")) or run_config(path)
    folder = path.parent.parent if path.suffix == ".ckpt" else path.parent
    record = read_record(folder) if config and (folder / "config.yaml").is_file() else {}
    facts = record.get("facts", {}) | {key: value for key, value in facts.items() if value is not None}
    for key in ("images seen", "optimizer steps"):
        facts[key] = said.get(key, facts.get(key))
    info: Info = {
        "checkpoint": {
            "file": str(path),
            "size": f"{path.stat().st_size / 1e6:.1f} MB",
            "layout": said.get("layout", "depthany"),
            "taken from": said.get("copy"),
            "precision": said["precision"],
            "weights": weights_hash(model),
            "left out, never run": said.get("unused"),
        },
        "model": _model(model),
        "run": {
            "stage": said.get("stage"),
            "folder": str(folder) if record else None,
            "finished": record.get("finished"),
            "command": facts.get("command"),
            **_choices(config),
        },
        "order": _order(config, facts),
        "progress": _progress(facts),
        "teacher": _teacher(config, facts, record),
        "data": [*_data(config, "")],
        "software": {name: facts.get(name) for name in ("revision", "changed files", "versions", "device", "started")},
    }
    if teacher := info["teacher"].get("file"):
        beside = folder.parent.joinpath(*Path(teacher).parts[-2:])  # the path may be one of where the run was started
        for file in (Path(teacher), beside):
            if file.is_file():
                info["data"] += _data(_teacher_config(file), "of the teacher: ")
                break
    name = next((n for n, official in OFFICIAL.items() if official["encoder"] == model.config()["encoder"]), None)
    if name and str(said.get("layout")).startswith(("official", "Hugging")):
        first = str(said["layout"]).endswith("V1")
        told = {"set": f"official {name} weights of {'V1' if first else 'V2'}, if these are they"}
        told["licence"] = "Apache-2.0 (of the repository)" if first else OFFICIAL_LICENCES[name]
        info["data"] = [{"part": "weights", **told}]
    return {section: _told(values) for section, values in info.items() if _told(values)}


def _mapping(text: str | None) -> dict[str, Any]:
    """A JSON mapping of a file's metadata; empty for what is none, which anybody may have written there."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _told(values: Any) -> Any:
    """Without what is not known."""
    if isinstance(values, list):
        return [_told(value) for value in values]
    return {name: value for name, value in values.items() if value not in (None, "", [])}


def _model(model: DepthModel) -> dict[str, Any]:
    config = model.config()
    encoder, head = (sum(p.numel() for p in part) for part in (model.encoder_parameters(), model.head_parameters()))
    limit = "" if model.max_depth is None else f", up to {model.max_depth:g}"
    name = next((name for name, official in OFFICIAL.items() if official["encoder"] == config["encoder"]), None)
    return {
        "encoder": config["encoder"] + (f" ({name})" if name else ""),
        "parameters": encoder + head,
        "of the encoder": encoder,
        "of the head": head,
        "taps": config["taps"],
        "head widths": [config["features"], *config["out_channels"]],
        "input size": config["input_size"],
        "patch size": model.patch_size,
        "position rule": config["pos_embed"],
        "activation": config["activation"],
        "output": "disparity" if model.space == "disparity" else f"depth in metres{limit}",
    }


def _choices(config: Mapping[str, Any]) -> dict[str, Any]:
    optim, loss = config.get("optim") or {}, config.get("loss") or {}
    terms = {name: term.get("weight") for name, term in loss.items() if isinstance(term, Mapping)}
    return {
        "recipe": (config.get("recipe") or {}).get("name"),
        "data": (config.get("data") or {}).get("name"),
        "batch size": optim.get("batch_size"),
        "learning rates": [optim[key] for key in ("encoder_lr", "head_lr") if key in optim],
        "loss weights": ", ".join(f"{name} {weight}" for name, weight in terms.items()),
        "averaged weights": (((config.get("callbacks") or {}).get("ema")) or {}).get("decay"),
    }


def _order(config: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    mix = config.get("mix") or {}
    images, epochs = facts.get("images"), mix.get("epochs")
    return {
        "seed": config.get("seed", facts.get("seed")),
        "window": (config.get("data") or {}).get("window"),
        "epoch length": int(images) // epochs if images and epochs else None,
        "epochs": epochs,
        "labelled : unlabelled": f"{mix.get('labelled')} : {mix.get('unlabelled')}" if mix else None,
    }


def _progress(facts: Mapping[str, Any]) -> dict[str, Any]:
    seen, images = facts.get("images seen"), facts.get("images")
    share = f" of {int(images)} ({int(seen) / int(images):.1%})" if seen and images else ""
    return {
        "images seen": f"{seen}{share}" if seen is not None else None,
        "optimizer steps": facts.get("optimizer steps"),
        "training time": facts.get("training time"),
    }


def _teacher(config: Mapping[str, Any], facts: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    name = facts.get("teacher") or record.get("teacher")
    if not name:
        return {}
    labels = config.get("labels") or {}
    return {
        "name": name,
        "hash": name.rpartition("-")[2],
        "file": record.get("teacher file") or facts.get("teacher file"),
        "labels": labels.get("mode"),
        "codec": labels.get("codec"),
        "input size": labels.get("input_size"),
        "precision": labels.get("precision"),
    }


def _teacher_config(path: Path) -> dict[str, Any]:
    """The config of the run that made a teacher, as far as its file or folder tells it."""
    config = run_config(path)
    if not config and path.suffix == ".safetensors":
        config = _mapping(read_metadata(path).get("config"))
    return config


def _data(config: Mapping[str, Any], whose: str) -> Iterator[dict[str, Any]]:
    """The sets that a run trains on, with title and licence from their cards."""
    mix, data = config.get("mix") or {}, config.get("data") or {}
    cards = read_cards()
    parts = {"labelled": (mix.get("labelled"), "sources"), "unlabelled": (mix.get("unlabelled"), "unlabelled")}
    for part, (share, group) in parts.items():
        for key, node in (data.get(group) or {}).items() if share else ():
            if node is None:
                continue
            inner = node.get("source") or node
            name, module = str(inner.get("name", key)), str(inner.get("_target_", "")).split(".")[-2:-1]
            card = find_card(cards, [name, str(key), *(CARD_OF.get(m, m) for m in module)])
            told = {k: card.get(k) for k in ("title", "licence", "commercial")} if card else {"licence": "no card"}
            yield {"part": whose + part, "set": name, **told}


def table(info: Info) -> str:
    """The facts as lines, section by section."""
    lines = []
    for section, values in info.items():
        lines.append(section)
        if isinstance(values, list):
            for row in values:
                commercial = {"True": "yes", "False": "no"}.get(str(row.get("commercial")), row.get("commercial"))
                words = [row.get("title"), row.get("licence"), commercial and f"commercial use: {commercial}"]
                lines.append(f"  {row['part'] + ' ':<24}{row['set']}: {', '.join(str(word) for word in words if word)}")
            continue
        for name, value in values.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"  {name:<24}{f'{shown:,}' if isinstance(shown, int) and name != 'seed' else shown}")
    return "\n".join(lines)
