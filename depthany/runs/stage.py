"""One training run: go on or start, fit, keep the weights, evaluate, write the page."""

import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig, OmegaConf

from depthany.callbacks.checkpoint import AtomicCheckpointIO, StepCheckpoint, Stopped, newest_checkpoint
from depthany.callbacks.preemption import Preemption
from depthany.callbacks.record import (
    RECORD,
    WEIGHTS,
    MetricsCsv,
    SkipLog,
    TooManySkips,
    facts,
    read_record,
    write_json,
    write_text,
)
from depthany.callbacks.throughput import progress_bar
from depthany.config.build import build, choice, is_sweep
from depthany.config.check import ConfigError, plain
from depthany.data.claims import Claim
from depthany.data.module import EvalDataset, collate
from depthany.data.shards import ShardError
from depthany.data.storage import Unreachable
from depthany.geometry.resize import resize_image
from depthany.inference.predictor import Predictor
from depthany.inference.rendering import colorize
from depthany.losses.affine_invariant import kept_mask
from depthany.losses.total import WeightedSum
from depthany.models.weights import save_weights, weights_hash
from depthany.report.run_page import Panel, write_run_page
from depthany.runs.find import find_weights, open_weights
from depthany.runs.label_job import label_shards, teacher_name
from depthany.runs.ranks import main_first
from depthany.runs.scoring import baselines, print_table, score_all
from depthany.runs.stored_labels import check_stored
from depthany.tasks.base import fitted
from depthany.types import STOPPED

# What may differ between a run and its continuation: it does not change what is learnt.
FREE = ("paths", "resume", "callbacks", "logger")  # averaged weights are what is kept: callbacks.ema may not
QUIET = ".*LeafSpec.*|.*does not have many workers.*|.*litlogger.*|.*exists and is not empty.*"
QUIET += "|.*sync_dist=True.*"  # torchmetrics has summed the scores over the ranks
QUIET += "|.*your dataloader is not resumable.*"  # it starts at the cursor
QUIET += "|.*DataLoader will create .* worker processes.*|.*smaller than the logging interval.*"
QUIET += "|Total length of .* is zero.*"  # a run may have no validation
FREE_IN_TRAINER = ("devices", "num_nodes", "accelerator", "strategy", "max_time", "log_every_n_steps")
# What may differ too, with a word: every image is still used once, by other steps.
MAY_CHANGE = ("optim.batch_size", "trainer.accumulate_grad_batches")


class Stage:
    """A teacher or student run in its folder.

    Args:
        cfg: checked config of `depthany.train`.
        run_dir: the run folder.
        claim: of the folder, on the main process; None on the others.
    """

    def __init__(self, cfg: DictConfig, run_dir: Path, claim: Claim | None) -> None:
        self.cfg, self.run_dir, self.claim = cfg, run_dir, claim
        self.name = "student" if cfg.task._target_.endswith("StudentTask") else "teacher"
        self.main = claim is not None
        self.checkpoint = self._place()

    def say(self, text: str) -> None:
        """Prints on the main process only."""
        if self.main:
            print(text, flush=True)

    def is_finished(self) -> bool:
        """Whether this very run was finished before; says so and shows its table."""
        record = read_record(self.run_dir)
        if not record.get("finished") or self.cfg.resume == "never":  # then only rank 0 has moved the old one away
            return False
        self.say(f"{self.run_dir} was finished on {record['finished']}; to run it again: resume=never, or another seed")
        file = self.run_dir / "config.yaml"
        was = _roots(plain(OmegaConf.load(file))) if file.is_file() else {}  # type: ignore[arg-type]  # it holds a mapping
        now = _roots(plain(self.cfg))
        for path in [path for path in now if path in was and was[path] != now[path]]:
            more = "hydra.run.dir=runs/NAME gives other data a run of their own"
            self.say(f"that run had {path}={was[path]}, not {now[path]}: {more}")
        if self.main and record.get("table"):
            print_table(record["table"])
        return True

    def _place(self) -> Path | None:
        """The checkpoint to go on from; refuses a folder that belongs to another config."""
        cfg, run_dir = self.cfg, self.run_dir
        if is_sweep() and cfg.trainer.devices not in (1, "1", "auto"):
            raise ConfigError("-m runs its jobs in one process: use trainer.devices=1, or a loop of single runs")
        if cfg.resume == "never":
            if self.main and any((run_dir / name).exists() for name in ("config.yaml", "checkpoints")):
                aside = next(
                    p for n in range(1, 10_000) if not (p := run_dir.with_name(f"{run_dir.name}~{n}")).exists()
                )
                run_dir.rename(aside)
                run_dir.mkdir()
                self.say(f"the run that was here is kept as {aside}")
            return None
        begun = read_record(run_dir).get("finished") or any((run_dir / "checkpoints").glob("*.ckpt"))
        if not begun:
            return None
        again = "resume=never starts again and keeps the folder beside"
        if not (run_dir / "config.yaml").exists():
            raise ConfigError(f"{run_dir} holds checkpoints, but no config.yaml that says of what: {again}")
        old = plain(OmegaConf.load(run_dir / "config.yaml"))  # type: ignore[arg-type]  # it holds a mapping
        differences = _differences(_learnt(old), _learnt(plain(cfg)))
        if refused := [text for text in differences if not text.startswith(MAY_CHANGE)]:
            raise ConfigError(
                f"{run_dir} holds a run of another config: {'; '.join(refused[:5])}. "
                f"Use resume=never to start again (the old folder is kept beside), or another seed"
            )
        newest, damaged = newest_checkpoint(run_dir / "checkpoints")
        if damaged:
            self.say(f"damaged checkpoints are passed over: {', '.join(damaged)}")
        if not read_record(run_dir).get("finished"):
            if newest is None:
                raise ConfigError(
                    f"{run_dir / 'checkpoints'}: none of the checkpoints is whole; bring one back, or {again}"
                )
            self.say(f"going on from {newest}")
            for text in differences:
                self.say(f"{text}: every image is still used once")
        return newest

    def prepare(self) -> None:
        """Data, pseudo-labels, task and trainer."""
        cfg = self.cfg
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message=QUIET)
        pl.seed_everything(cfg.seed, workers=False, verbose=False)
        torch.set_float32_matmul_precision("high")
        self.plan = build(cfg.optim)
        self.mix = build(cfg.mix)
        self.labels = build(cfg.labels)
        self.augment = build(cfg.augment)
        self.data = build(
            cfg.data,
            mix=self.mix,
            augment=self.augment,
            batch_size=self.plan.batch_size,
            seed=cfg.seed,
            online=self.labels.mode == "online",
        )
        with in_words():
            self.data.check()  # before weights are fetched
        model = build(cfg.model)  # before data are packed: what it or the loss refuses is told at once
        if model.space == "metric":
            raise ConfigError(
                "model.activation=sigmoid or model.metric_head: metric models are used, not trained; take relu or "
                "softplus, and no metric_head"
            )
        loss = WeightedSum(terms=build(cfg.loss))
        whose = "teacher"
        if self.name == "student":
            whose = cfg.task.feature_encoder
            if whose == "auto":
                whose = "initial" if cfg.model.pretrained else "teacher"
            if "feature" in loss.terms and whose == "initial" and not cfg.model.pretrained:
                raise ConfigError(
                    "feature alignment to the student's own encoder teaches nothing while that is random "
                    "(model.pretrained=false): use task.feature_encoder=teacher or loss.feature.weight=0"
                )
        if self.main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_text(self.run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        self.say(f"run folder: {self.run_dir}")
        with in_words(), main_first(main=self.main, checkpoint=self.checkpoint) as self.checkpoint:
            if self.main:
                self.data.prepare_data()
            self.facts: dict[str, Any] = facts() if self.main else {}
            self.teacher = self._teacher() if self.name == "student" else None
        if self.teacher is not None:
            self.data.teacher_size = self.labels.input_size or self.teacher.input_size
            self.data.teacher_multiple = self.teacher.patch_size
        extra: dict[str, Any] = {}
        if self.name == "student":
            kept = self.teacher if self.labels.mode == "online" or "feature" in loss.terms else None
            extra = {"teacher": kept, "precision": self.labels.precision, "feature_encoder": whose}
            if kept is not None and "feature" in loss.terms and whose == "teacher":
                sizes = [(m.pretrained.channels, m.patch_size) for m in (model, kept)]
                if sizes[0] != sizes[1]:
                    raise ConfigError(
                        f"feature alignment compares equal encoders: the student has (channels, patch) {sizes[0]}, the "
                        f"teacher {sizes[1]}: set loss.feature.weight=0, or model.pretrained with "
                        f"task.feature_encoder=initial"
                    )
        self.task = build(cfg.task, model=model, loss=loss, plan=self.plan, **extra)
        self.data.eval_size, self.data.eval_multiple = model.input_size, model.patch_size
        self.data.cursor = lambda: self.task.samples_seen
        with in_words():
            self.data.setup()
        if self.main:
            self._check_sets()
        self._list_skips()
        if not self.data.num_samples:
            part = "unlabelled" if self.mix.unlabelled else "sources"
            filtered = f", and labels.min_quality={q} keeps none" if (q := self.labels.min_quality) is not None else ""
            raise ConfigError(f"there is no image to train on: data.{part} names no set that has any{filtered}")
        self.task.num_samples = self.data.num_samples
        self.task.validation_sources = [s.name for s in self.data.validation.values()]
        self.task.max_depth = self.data.max_depth
        self.task.facts = {"stage": self.name, "seed": str(cfg.seed), "config": plain(cfg), **self.facts}

    def _teacher(self) -> Any:
        """Finds the teacher and says which; labels the shards where labels are offline.

        A run that goes on keeps the teacher that it began with, whatever was finished since.
        """
        cfg = self.cfg
        began = read_record(self.run_dir) if self.checkpoint or not self.main else {}
        known = began.get("teacher file", "")
        sources = list(self.data.unlabelled.values()) if self.mix.unlabelled and self.labels.mode != "online" else []
        stored = check_stored(sources, self.labels) if sources and self.labels.mode == "stored" else None
        teacher: Any = None
        file = ""
        if not stored or cfg.task.teacher_ckpt != "last":  # labels that are there do not need their teacher
            spec = known if Path(known).is_file() else cfg.task.teacher_ckpt
            path = find_weights(spec, Path(cfg.paths.runs), stage="teacher", data=self.data.name, debug=choice("debug"))
            teacher, file = open_weights(path, relative=True)[0], str(path.resolve())
        elif (cfg.loss.get("feature") or {}).get("weight") and not cfg.model.pretrained:
            raise ConfigError("feature alignment needs the teacher itself: name its weights as task.teacher_ckpt")
        name = stored or teacher_name(teacher)
        if name != began.get("teacher", name):
            raise ConfigError(
                f"{self.run_dir} began with {began['teacher']} of {known}, and {file} is {name}: name the first one's "
                f"weights as task.teacher_ckpt, or start again with resume=never"
            )
        if self.main:
            write_json(self.run_dir / RECORD, began | {"teacher": name, "teacher file": file})
        self.say(f"teacher: {file or 'of the stored labels'} ({name})")
        self.facts |= {"teacher": name, "teacher file": file}
        for source in sources:
            if self.main and self.labels.mode == "offline":
                device = "cuda" if torch.cuda.is_available() else "cpu"
                predictor = Predictor(model=teacher, device=device, precision=self.labels.precision)
                for line in label_shards(predictor, source, teacher=name, plan=self.labels):
                    self.say(f"  no label for {line}")
            source.teacher, source.quality = name, self.labels.min_quality
        return teacher

    def _check_sets(self) -> None:
        """What the cursor counts has to stay what it was: in another set every position would mean another image.

        Raises:
            ConfigError: a set of shards is not the one that the run began with.
        """
        sources = [*self.data.sources.values(), *(self.data.unlabelled.values() if self.mix.unlabelled else ())]
        sets = {source.name: source.fingerprint for source in sources if hasattr(source, "fingerprint")}
        record = read_record(self.run_dir)
        began = record.get("sets", sets) if self.checkpoint else sets
        if changed := [name for name in sets if began.get(name) != sets[name]]:
            raise ConfigError(
                f"{self.run_dir}: {', '.join(changed)} changed since the run began (images were added, dropped or "
                f"scored anew), and an epoch cannot go on in another set: bring it back, or use resume=never"
            )
        write_json(self.run_dir / RECORD, record | {"sets": sets})

    def _list_skips(self) -> None:
        """Starts the list of samples that cannot be used with those that never got into a shard.

        Raises:
            ConfigError: of a source, they are more than data.skip_limit.
        """
        limit = self.data.skip_limit
        self.skips = SkipLog(run_dir=self.run_dir, limit=limit, packed=self.data.skips())
        for source in self.data.used:
            lost = getattr(source, "skipped", [])
            whole = len(source) + len(lost)
            if len(lost) > max(10, limit * whole):
                if self.main:
                    self.skips.save()
                raise ConfigError(
                    f"{source.name}: {len(lost)} of {whole} images could not be packed, more than data.skip_limit="
                    f"{limit}: mend them or raise it. {self.skips.path} lists them; the last: {lost[-1].key}: "
                    f"{lost[-1].reason}"
                )

    def fit(self) -> None:
        """Trains from the cursor to the end."""
        cfg = self.cfg
        self.log = MetricsCsv(run_dir=self.run_dir)
        callbacks = [c for c in (build(cfg.callbacks) or {}).values() if c is not None]
        for callback in callbacks:
            if isinstance(callback, StepCheckpoint):
                callback.dirpath = str(self.run_dir / "checkpoints")
        services = {name: node for name, node in (cfg.logger or {}).items() if node is not None}
        loggers = [self.log, *(build(n, save_dir=n.save_dir or str(self.run_dir)) for n in services.values())]
        trainer_cfg = dict(plain(cfg.trainer))
        trainer_cfg.pop("_target_")
        try:
            self.stop = Preemption(max_time=trainer_cfg.pop("max_time"))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if not any(isinstance(callback, StepCheckpoint) for callback in callbacks):
            raise ConfigError("a run without callbacks.checkpoint could not go on: set its every_steps high instead")
        trainer_cfg["val_check_interval"] *= trainer_cfg["accumulate_grad_batches"]  # Lightning counts batches
        ours = LambdaCallback(on_save_checkpoint=lambda *_: self._check_claim())
        self.trainer = pl.Trainer(
            **trainer_cfg,
            max_epochs=1,  # one Lightning epoch is the whole run: mix.epochs lie inside the order
            check_val_every_n_epoch=None,
            callbacks=[*callbacks, self.skips, progress_bar(terminal=sys.stdout.isatty()), self.stop, ours],
            logger=loggers,
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
            enable_model_summary=False,
            default_root_dir=str(self.run_dir),
        )
        if self.checkpoint is not None:
            step = int(self.checkpoint.stem.removeprefix("step-"))
            self.log.resume(step)
        self.stop.listen()
        self.began = time.monotonic()
        batch = self.plan.batch_size
        again = f" ({self.mix.epochs} epochs)" if self.mix.epochs > 1 else ""
        self.say(
            f"{self.name}: {sum(p.numel() for p in self.task.model.parameters()) / 1e6:.2f} M parameters, "
            f"{self.data.num_samples} images{again} in batches of {batch}, {self.trainer.world_size} process(es)"
        )
        try:
            self.trainer.fit(self.task, self.data, ckpt_path=self.checkpoint, weights_only=True)
        except Stopped as stopped:
            self.say(stopped.text)
            raise
        except TooManySkips as error:
            raise ConfigError(str(error)) from error
        except Unreachable as error:  # from a loader worker it comes with the worker's stack in front
            reason = str(error).strip().splitlines()[-1].rpartition("Unreachable: ")[2]
            print(f"stopped: {reason}; the same command goes on from the last checkpoint", flush=True)
            raise SystemExit(STOPPED) from error
        if torch.distributed.is_initialized():  # the rest is rank 0's: its scores must not wait for the others
            torch.distributed.destroy_process_group()
        self.stop.finish(main=self.trainer.is_global_zero)

    def _check_claim(self) -> None:
        """Before anything is written under its last name: a process that was asleep may have been given up.

        Raises:
            RuntimeError: another run has taken the folder over.
        """
        if self.claim is not None and not self.claim.still_mine():
            raise RuntimeError(f"{self.run_dir} was taken over by another run while this one was stopped: it ends here")

    def keep_weights(self) -> None:
        """The final weights with what they are, as model.safetensors."""
        if not self.trainer.is_global_zero:
            return
        self._check_claim()
        seconds = time.monotonic() - self.began
        self.facts |= {
            "stage": self.name,
            "seed": str(self.cfg.seed),
            "images": str(self.data.num_samples),
            "images seen": str(self.task.samples_seen),
            "optimizer steps": str(self.trainer.global_step),
            "training time": f"{seconds:.0f} s",
        }
        metadata = {"stage": self.name, "data": self.data.name, "facts": json.dumps(self.facts)}
        metadata["config"] = json.dumps(plain(self.cfg))
        save_weights(self.task.model, self.run_dir / WEIGHTS, metadata=metadata)
        self.facts["weights"] = weights_hash(self.task.model)

    def report(self) -> None:
        """Scores against the trivial predictors and the teacher, the page, and the record that says finished."""
        if not self.trainer.is_global_zero:
            return
        model = self.task.model.eval().cpu()
        models = {self.name: model}
        if self.teacher is not None:
            models = {"teacher": self.teacher.eval().cpu(), **models}
        predictors = {name: (lambda batch, m=m: m(batch["image"])) for name, m in models.items()}
        size, multiple = model.input_size, model.patch_size
        trivial = baselines(self.data) if self.data.validation else {}  # the mean map reads every labelled image
        rows = score_all(trivial | predictors, self.data, size=size, multiple=multiple)
        page = write_run_page(
            self.run_dir,
            models=list(models),
            rows=rows,
            validation=self._validation_panels(models),
            pseudo_labels=self._label_panels(model),
            facts=self.facts,
            skipped=list(self.skips.seen.values()),
        )
        finished = time.strftime("%Y-%m-%d %H:%M:%S")
        record = {"stage": self.name, "data": self.data.name, "debug": choice("debug"), "finished": finished}
        write_json(self.run_dir / RECORD, record | {"facts": self.facts, "table": rows})
        print_table(rows)
        if self.skips.seen:
            print(f"{len(self.skips.seen)} samples could not be used: {self.run_dir / 'skipped.csv'}")
        print(f"weights: {self.run_dir / WEIGHTS}")
        print(f"report:  {page}")

    def _validation_panels(self, models: dict[str, Any]) -> list[Panel]:
        """A few images of each validation source: image, truth, teacher, student, at the label's size."""
        panels = []
        for source in self.data.validation.values():
            dataset = EvalDataset([source], size=self.data.eval_size, multiple=self.data.eval_multiple, limit=None)
            for i in np.linspace(0, len(dataset) - 1, min(4, len(dataset))).astype(int):
                item = dataset[int(i)]
                if "image" not in item:
                    continue
                truth, valid = item["disparity"][0].numpy(), item["valid"][0].numpy()
                seen = truth[valid] if valid.any() else np.zeros(1)
                low, high = (float(v) for v in np.percentile(seen, [1, 99]))
                shown = resize_image(item["original"], truth.shape, antialias=True)
                images = [("image", shown), ("truth", colorize(truth, valid=valid, low=low, high=high))]
                for name, model in models.items():
                    with torch.inference_mode():
                        pred = fitted(model(item["image"]), item)[0].numpy()
                    images.append((name, colorize(pred, low=low, high=high)))
                panels.append(Panel(title=item["key"][0], images=images))
        return panels

    def _label_panels(self, model: Any) -> list[Panel]:
        """A few unlabelled images: what the student sees, its teacher's label, its own answer, the dropped pixels."""
        if not self.mix.unlabelled or self.labels.mode == "online":
            return []
        dataset = self.data.train_dataset()
        drop = float(self.cfg.loss.ssi.drop)
        panels = []
        for spot in self.data.first_spots("unlabelled", 4):
            item = dataset[spot]
            batch = self.data.on_after_batch_transfer(collate([item]), 0)
            if batch["skipped"]:
                continue
            with torch.inference_mode():
                pred = model(batch["image"])
            kept = kept_mask(pred, batch["disparity"], batch["valid"], self.cfg.loss.ssi.alignment, drop)[0].numpy()
            label = batch["disparity"][0].numpy()
            images = [
                ("clean", item["clean"]),
                ("student's view", item["image"]),
                ("pseudo-label", colorize(label)),
                (f"pseudo-label, {drop:.0%} dropped", colorize(label, valid=kept)),
                ("student", colorize(pred[0].numpy())),
            ]
            panels.append(Panel(title=batch["key"][0], images=images))
        return panels


@contextmanager
def in_words() -> Iterator[None]:
    """What is wrong with shards is for the user to mend: told in lines, like a wrong option."""
    try:
        yield
    except ShardError as error:
        raise ConfigError(str(error)) from error


def _learnt(cfg: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in cfg.items() if k not in FREE}
    kept["trainer"] = {k: v for k, v in cfg["trainer"].items() if k not in FREE_IN_TRAINER}
    kept["callbacks"] = {"ema": (cfg["callbacks"] or {}).get("ema")}
    return kept


def _roots(node: Any, path: str = "") -> dict[str, Any]:
    """Every folder of data that a config names, by its option."""
    if not isinstance(node, dict):
        return {path: node} if path.endswith(".root") else {}
    return {k: v for key in node for k, v in _roots(node[key], f"{path}.{key}" if path else str(key)).items()}


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in dict.fromkeys([*old, *new]):
            if key in ("root", "labels_root", "shards", "index_root", "cache", "num_workers", "start_method"):
                continue
            found += _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if old == new else [f"{path} is {new!r} now, was {old!r}"]
