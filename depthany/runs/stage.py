"""One training run: go on or start, fit, keep the weights, evaluate, write the page."""

import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from depthany.callbacks.checkpoint import AtomicCheckpointIO, StepCheckpoint, newest_checkpoint
from depthany.callbacks.record import RECORD, WEIGHTS, MetricsCsv, SkipLog, facts, read_record, write_json, write_text
from depthany.callbacks.throughput import progress_bar
from depthany.config.build import build, choice, is_sweep
from depthany.config.check import ConfigError, plain
from depthany.data.module import collate, normalise_image
from depthany.geometry.resize import resize_image
from depthany.inference.predictor import Predictor
from depthany.inference.rendering import colorize
from depthany.losses.affine_invariant import kept_mask
from depthany.losses.total import WeightedSum
from depthany.models.weights import save_weights, weights_hash
from depthany.report.run_page import Panel, write_run_page
from depthany.runs.find import find_weights, open_weights
from depthany.runs.label_job import label_shards
from depthany.runs.scoring import baselines, print_table, score_all

# What may differ between a run and its continuation: it does not change what is learnt.
FREE = ("paths", "resume", "callbacks", "logger")  # averaged weights are what is kept: callbacks.ema may not
QUIET = ".*LeafSpec.*|.*does not have many workers.*|.*litlogger.*|.*exists and is not empty.*"
QUIET += "|.*sync_dist=True.*"  # torchmetrics has summed the scores over the ranks
FREE_IN_TRAINER = ("devices", "accelerator", "strategy", "max_time", "log_every_n_steps")


class Stage:
    """A teacher or student run in its folder.

    Args:
        cfg: checked config of `depthany.train`.
        run_dir: the run folder.
    """

    def __init__(self, cfg: DictConfig, run_dir: Path) -> None:
        self.cfg, self.run_dir = cfg, run_dir
        self.name = "student" if cfg.task._target_.endswith("StudentTask") else "teacher"
        self.main = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0
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
        if self.main and record.get("table"):
            print_table(record["table"])
        return True

    def _place(self) -> Path | None:
        """The checkpoint to go on from; refuses a folder that belongs to another config."""
        cfg, run_dir = self.cfg, self.run_dir
        if is_sweep() and cfg.trainer.devices not in (1, "1", "auto"):
            raise ConfigError("-m runs its jobs in one process: use trainer.devices=1, or a loop of single runs")
        if cfg.resume == "never":
            if self.main and (run_dir / "config.yaml").exists():
                aside = next(
                    p for n in range(1, 10_000) if not (p := run_dir.with_name(f"{run_dir.name}~{n}")).exists()
                )
                run_dir.rename(aside)
                run_dir.mkdir()
                self.say(f"the run that was here is kept as {aside}")
            return None
        begun = read_record(run_dir).get("finished") or any((run_dir / "checkpoints").glob("*.ckpt"))
        if not begun or not (run_dir / "config.yaml").exists():
            return None
        old = plain(OmegaConf.load(run_dir / "config.yaml"))  # type: ignore[arg-type]  # it holds a mapping
        if differences := _differences(_learnt(old), _learnt(plain(cfg))):
            raise ConfigError(
                f"{run_dir} holds a run of another config: {'; '.join(differences[:5])}. "
                f"Use resume=never to start again (the old folder is kept beside), or another seed"
            )
        newest, damaged = newest_checkpoint(run_dir / "checkpoints")
        if damaged:
            self.say(f"damaged checkpoints are passed over: {', '.join(damaged)}")
        if newest and not read_record(run_dir).get("finished"):
            self.say(f"going on from {newest}")
        return newest

    def prepare(self) -> None:
        """Data, pseudo-labels, task and trainer."""
        cfg = self.cfg
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message=QUIET)
        pl.seed_everything(cfg.seed, workers=False, verbose=False)
        torch.set_float32_matmul_precision("high")
        if self.main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_text(self.run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
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
        self.say(f"run folder: {self.run_dir}")
        with main_first(main=self.main):
            if self.main:
                self.data.prepare_data()
            self.facts: dict[str, Any] = facts() if self.main else {}
            self.teacher = self._teacher() if self.name == "student" else None
        model = build(cfg.model)
        loss = WeightedSum(terms=build(cfg.loss))
        extra: dict[str, Any] = {}
        if self.name == "student":
            kept = self.teacher if self.labels.mode == "online" or "feature" in loss.terms else None
            whose = cfg.task.feature_encoder
            if whose == "auto":
                whose = "initial" if cfg.model.pretrained else "teacher"
            extra = {"teacher": kept, "precision": self.labels.precision, "feature_encoder": whose}
            if "feature" in loss.terms and whose == "initial" and not cfg.model.pretrained:
                raise ConfigError(
                    "feature alignment to the student's own encoder teaches nothing while that is random "
                    "(model.pretrained=false): use task.feature_encoder=teacher or loss.feature.weight=0"
                )
        self.task = build(cfg.task, model=model, loss=loss, plan=self.plan, **extra)
        self.data.eval_size, self.data.eval_multiple = model.input_size, model.patch_size
        self.data.cursor = lambda: self.task.samples_seen
        self.data.setup()
        self.task.num_samples = self.data.num_samples
        self.task.validation_sources = [s.name for s in self.data.validation.values()]
        self.task.max_depth = self.data.max_depth

    def _teacher(self) -> Any:
        """Finds the teacher and says which; labels the shards where labels are offline.

        A run that goes on keeps the teacher that it began with, whatever was finished since.
        """
        cfg = self.cfg
        runs = Path(cfg.paths.runs)
        began = read_record(self.run_dir) if self.checkpoint or not self.main else {}
        known = began.get("teacher file", "")
        spec = known if Path(known).is_file() else cfg.task.teacher_ckpt
        path = find_weights(spec, runs, stage="teacher", data=self.data.name, debug=choice("debug"))
        teacher, _ = open_weights(path)
        name = f"teacher-{weights_hash(teacher)[:8]}"
        if name != began.get("teacher", name):
            raise ConfigError(
                f"{self.run_dir} began with {began['teacher']} of {known}, and {path} is {name}: name the first one's "
                f"weights as task.teacher_ckpt, or start again with resume=never"
            )
        if self.main:
            write_json(self.run_dir / RECORD, {"teacher": name, "teacher file": str(path.resolve())})
        self.say(f"teacher: {path} ({name})")
        self.facts |= {"teacher": name, "teacher file": str(path)}
        if self.labels.mode == "offline" and self.mix.unlabelled:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            predictor = Predictor(model=teacher, device=device, precision=self.labels.precision)
            for source in self.data.unlabelled.values():
                if self.main:
                    damaged = label_shards(predictor, source.tars, teacher=name, plan=self.labels)
                    for line in damaged:
                        self.say(f"  no label for {line}")
                source.teacher = name
        return teacher

    def fit(self) -> None:
        """Trains from the cursor to the end."""
        cfg = self.cfg
        self.log = MetricsCsv(run_dir=self.run_dir)
        self.skips = SkipLog(run_dir=self.run_dir, limit=self.data.skip_limit, packed=self.data.skips())
        callbacks = [c for c in (build(cfg.callbacks) or {}).values() if c is not None]
        for callback in callbacks:
            if isinstance(callback, StepCheckpoint):
                callback.dirpath = str(self.run_dir / "checkpoints")
        services = {name: node for name, node in (cfg.logger or {}).items() if node is not None}
        loggers = [self.log, *(build(n, save_dir=n.save_dir or str(self.run_dir)) for n in services.values())]
        trainer_cfg = dict(plain(cfg.trainer))
        trainer_cfg.pop("_target_")
        self.trainer = pl.Trainer(
            **trainer_cfg,
            max_epochs=1,  # one Lightning epoch is the whole run: mix.epochs lie inside the order
            check_val_every_n_epoch=None,
            callbacks=[*callbacks, self.skips, progress_bar(terminal=sys.stdout.isatty())],
            logger=loggers,
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
            enable_model_summary=False,
            default_root_dir=str(self.run_dir),
        )
        if self.checkpoint is not None:
            step = int(self.checkpoint.stem.removeprefix("step-"))
            self.log.resume(step)
        self.began = time.monotonic()
        batch = self.plan.batch_size
        self.say(
            f"{self.name}: {sum(p.numel() for p in self.task.model.parameters()) / 1e6:.2f} M parameters, "
            f"{self.data.num_samples} images in batches of {batch}, {self.trainer.world_size} process(es)"
        )
        try:
            self.trainer.fit(self.task, self.data, ckpt_path=self.checkpoint, weights_only=True)
        except SIGTERMException as error:  # Lightning would exit with 0, as if the run were complete
            self.say("stopped by SIGTERM; the same command goes on from the last checkpoint")
            raise SystemExit(128 + signal.SIGTERM) from error
        if torch.distributed.is_initialized():  # the rest is rank 0's: its scores must not wait for the others
            torch.distributed.destroy_process_group()

    def keep_weights(self) -> None:
        """The final weights with what they are, as model.safetensors."""
        if not self.trainer.is_global_zero:
            return
        trained = self.task.samples_seen >= self.data.num_samples or self.cfg.trainer.max_steps >= 0
        if not trained:
            raise SystemExit(
                f"stopped at {self.task.samples_seen} of {self.data.num_samples} images; the same command goes on"
            )
        self.seconds = time.monotonic() - self.began
        self.facts |= {
            "stage": self.name,
            "seed": str(self.cfg.seed),
            "images seen": str(self.task.samples_seen),
            "optimizer steps": str(self.trainer.global_step),
            "training time": f"{self.seconds:.0f} s",
        }
        metadata = {"stage": self.name, "data": self.data.name, "facts": json.dumps(self.facts)}
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
        rows = score_all(baselines(self.data) | predictors, self.data, size=size, multiple=multiple)
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
        from depthany.data.module import EvalDataset
        from depthany.tasks.base import fitted

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
            batch = collate([dataset[spot]])
            if batch["skipped"]:
                continue
            with torch.inference_mode():
                pred = model(normalise_image(batch["image"]))
            kept = kept_mask(pred, batch["disparity"], batch["valid"], self.cfg.loss.ssi.alignment, drop)[0].numpy()
            label = batch["disparity"][0].numpy()
            images = [
                ("clean", batch["clean"][0].numpy()),
                ("student's view", batch["image"][0].numpy()),
                ("pseudo-label", colorize(label)),
                (f"pseudo-label, {drop:.0%} dropped", colorize(label, valid=kept)),
                ("student", colorize(pred[0].numpy())),
            ]
            panels.append(Panel(title=batch["key"][0], images=images))
        return panels


@contextmanager
def main_first(*, main: bool) -> Iterator[None]:
    """Under torchrun every rank starts at once: the others wait until rank 0 has packed and labelled, however long.

    Lightning's own launcher starts the other ranks only when rank 0 begins to fit.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if cuda else "gloo")  # Lightning takes it over
    store = torch.distributed.distributed_c10d._get_default_store()
    if not main:
        store.wait(["depthany prepared"], timedelta(days=7))
    yield
    if main:
        store.set("depthany prepared", "yes")


def _learnt(cfg: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in cfg.items() if k not in FREE}
    kept["trainer"] = {k: v for k, v in cfg["trainer"].items() if k not in FREE_IN_TRAINER}
    kept["callbacks"] = {"ema": (cfg["callbacks"] or {}).get("ema")}
    return kept


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in dict.fromkeys([*old, *new]):
            if key in ("root", "num_workers"):
                continue
            found += _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if old == new else [f"{path} is {new!r} now, was {old!r}"]
