"""Before a long run: what would stop it later is found now, and its cost is estimated from a short measurement."""

import math
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from packaging.requirements import Requirement

from depthany.callbacks.checkpoint import AtomicCheckpointIO, newest_checkpoint
from depthany.callbacks.record import read_record
from depthany.config.build import build
from depthany.config.check import ConfigError
from depthany.data.labels import LabelPlan, encode_pseudo, half
from depthany.data.module import DepthData, Mix, Source, images_per_epoch
from depthany.data.order import global_batch, share_of
from depthany.data.sources.packed import ANY, Packed, Shards
from depthany.data.sources.scenes import Scenes
from depthany.data.storage import is_remote
from depthany.inference.memory import free_bytes
from depthany.inference.predictor import Predictor
from depthany.losses.total import WeightedSum
from depthany.models.depth_model import DepthModel
from depthany.models.weights import weights_hash
from depthany.runs.cost import (
    SAMPLES,
    Held,
    Probe,
    Row,
    Views,
    ask_teacher,
    cost,
    hold,
    label_bytes,
    shard_bytes,
    step_pace,
)
from depthany.runs.find import find_weights, open_weights
from depthany.tasks.base import DepthTask

PREFETCH = 2  # batches that a loader worker holds ready: torch's default
ROUND_TRIP = 512_000_000  # bytes of a checkpoint that are written, read and compared; the rest is of the same kind
SOCKET_PATH = 100  # characters that the path of a Unix socket may have, less its name


class Finding(NamedTuple):
    """One line of the report."""

    level: Literal["ok", "warn", "FAIL"]
    what: str
    text: str


# --- checks that need no measuring ------------------------------------------------------------------------------------


def check_versions(needed: Sequence[str], installed: Callable[[str], str]) -> Finding:
    """Installed packages against the requirements of this one."""
    wrong = []
    for requirement in map(Requirement, needed):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            there = installed(requirement.name)
        except PackageNotFoundError:
            there = "none"
        if there == "none" or not requirement.specifier.contains(there, prereleases=True):
            wrong.append(f"{requirement.name} {there} (needs {requirement.specifier})")
    if wrong:
        return Finding("FAIL", "versions", f"{', '.join(wrong)}: pip install -c constraints.txt -e .")
    python = ".".join(map(str, sys.version_info[:3]))
    return Finding("ok", "versions", f"Python {python}, torch {installed('torch')}, and all others as required")


def check_batch(*, size: int, mix: Mix, world: int, images: int) -> Finding:
    """How a batch is cut over the devices, and what of it is padding."""
    whole = global_batch(cursor=0, total=images, size=size, labelled=mix.labelled, unlabelled=mix.unlabelled)
    each = len(share_of(whole, rank=0, world=world))  # every rank has as many
    padding = each * world - len(whole)
    text = f"{len(whole)} images over {world} device(s): {each} each"
    if not padding:
        return Finding("ok", "world, batch", f"{text}, no padding")
    cuts = [(mix.labelled, world), (mix.unlabelled, 2 * world if world > 1 else 1)]  # CutMix partners stay together
    step = math.lcm(*(cut // math.gcd(share, cut) for share, cut in cuts if share)) * (mix.labelled + mix.unlabelled)
    return Finding(
        "warn",
        "world, batch",
        f"{text}, {padding} of {each * world} are padding: {padding / each / world:.0%} of the work for nothing, while "
        f"every image is used once; optim.batch_size={max(round(size / step), 1) * step} divides evenly",
    )


def check_temporary() -> Finding:
    """The folder for temporary files: torch, the loader's sockets and compilers use it."""
    asked, used = os.environ.get("TMPDIR"), tempfile.gettempdir()
    if asked and Path(asked).resolve() != Path(used).resolve():
        return Finding(
            "FAIL", "TMPDIR", f"TMPDIR={asked} cannot be written to: make it, or unset TMPDIR ({used} is there)"
        )
    free = shutil.disk_usage(used).free
    if free < 100e6:
        return Finding("FAIL", "TMPDIR", f"{used} has {_size(free)} free: set TMPDIR to a folder with room")
    if len(used) > SOCKET_PATH - 40:
        return Finding("FAIL", "TMPDIR", f"{used} is too long a path for sockets: set TMPDIR to a shorter one")
    return Finding("ok", "TMPDIR", f"{used}, {_size(free)} free")


def check_open_files(*, workers: int, window: int, soft: int, hard: int) -> Finding:
    """The limit on open files: shards that stay open, and a descriptor for each tensor that travels to this process."""
    need = 128 + 4 * window + 8 * PREFETCH * workers
    text = f"limit {soft}, about {need} needed"
    if soft >= need:
        return Finding("ok", "open files", text)
    way = f"ulimit -n {need}" if hard >= need else f"ask for a hard limit (now {hard}) of {need}"
    return Finding("FAIL", "open files", f"{text}: {way}")


def check_shared_memory(*, need: float, free: float | None) -> Finding:
    """Room for the batches that the workers hold ready."""
    if free is None or not need:
        why = "no workers: not used" if not need else "no /dev/shm on this system"
        return Finding("ok", "/dev/shm", why)
    text = f"{_size(free)} free, {_size(need)} needed for workers x {PREFETCH} batches"
    if free < need:
        return Finding(
            "FAIL", "/dev/shm", f"{text}: give more (docker --shm-size, mount -o remount,size=) or fewer workers"
        )
    return Finding("warn" if free < 2 * need else "ok", "/dev/shm", text)


def check_disks(needs: Sequence[tuple[Path, str, float]]) -> Iterator[Finding]:
    """Free space for what the run writes, added up for each file system.

    Args:
        needs: folder (it need not be there yet), what for, bytes.
    """
    by_disk: dict[int, list[tuple[Path, str, float]]] = {}
    for folder, what, size in needs:
        there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        by_disk.setdefault(there.stat().st_dev, []).append((there, what, size))
    for parts in by_disk.values():
        there, need = parts[0][0], sum(size for *_, size in parts)
        free = shutil.disk_usage(there).free
        listed = ", ".join(f"{what} {_size(size)}" for _, what, size in parts)
        text = f"{there}: {_size(free)} free, {_size(need)} needed ({listed})"
        way_out = "set paths.runs or paths.shards to another folder"
        if locked := [str(folder) for folder, *_ in parts if not os.access(folder, os.W_OK)]:
            yield Finding("FAIL", "disk", f"{', '.join(dict.fromkeys(locked))} cannot be written to: {way_out}")
        elif free < need:
            yield Finding("FAIL", "disk", f"{text}: make room, or {way_out}")
        else:
            yield Finding("warn" if free < 1.2 * need else "ok", "disk", text)


def check_sources(
    groups: Mapping[str, DictConfig | None], *, limit: int | None, labels_of: str | None
) -> tuple[dict[str, dict[str, Source]], dict[str, int], list[Finding]]:
    """Every source that a run reads, all at once: built, counted in images by `group.name`, and what is wrong with it.

    Args:
        groups: configs of the sources, as under `data`.
        limit: images in use of each; None: all.
        labels_of: whose stored labels are used of image shards; None: nobody's.
    """
    built: dict[str, dict[str, Source]] = {group: {} for group in groups}
    counts: dict[str, int] = {}
    findings = []
    for group, nodes in groups.items():
        for name in map(str, nodes or ()):
            node = nodes[name] if nodes else None
            if node is None:
                continue
            try:
                source = built[group][name] = build(node)
                if getattr(source, "weight", 1.0) == 0:
                    continue
                if isinstance(source, Shards):
                    source.teacher = labels_of if group == "unlabelled" else None
                if hasattr(source, "limit"):
                    source.limit = limit
                if isinstance(source, Packed) and not (source.teacher and source.folder.exists()):
                    source.source.prepare()  # what it packs has to be there; packing is the run's business
                    number = len(source.source) if limit is None else min(len(source.source), limit)
                    if source.teacher:
                        raise ValueError("not packed yet, so without stored labels: python -m depthany.pseudo_label")
                else:
                    if not isinstance(source, Packed):
                        source.prepare()
                    if hasattr(source, "open"):
                        source.open()
                    number = images_per_epoch(source, limit)
                if not number:
                    raise ValueError("no images")
                counts[f"{group}.{name}"] = number
            except (ValueError, OSError) as error:
                findings.append(Finding("FAIL", "sources", f"data.{group}.{name}: {_line(error)}"))
    there = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return built, counts, [*findings, *([Finding("ok", "sources", there)] if there else [])]


def check_checkpoint(
    task: DepthTask, optimizer: torch.optim.Optimizer, folder: Path, *, averaged: bool
) -> tuple[Finding, int]:
    """Writes a checkpoint as training does, reads it back and compares every bit; its whole size in bytes.

    Of a large one the first `ROUND_TRIP` bytes are tried.
    """
    weights = {f"model.{key}": value for key, value in task.model.state_dict().items()}
    moments = {f"{i}.{key}": v for i, s in enumerate(optimizer.state.values()) for key, v in s.items()}
    content = {"state_dict": weights, "optimizer_states": moments} | (
        {"current_model_state": weights} if averaged else {}
    )
    whole = sum(tensor.nbytes for part in content.values() for tensor in part.values())
    tried: dict[str, dict[str, torch.Tensor]] = {part: {} for part in content}
    left = ROUND_TRIP
    for part, tensors in content.items():
        for key, value in tensors.items():
            if value.nbytes <= left:
                left -= value.nbytes
                tried[part][key] = value.detach().cpu().clone()  # a copy of its own, as averaged weights are
    path, files = folder / f".preflight-{os.getpid()}.ckpt", AtomicCheckpointIO()
    fresh = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        begun = time.perf_counter()
        files.save_checkpoint(tried, path)
        size, took = path.stat().st_size, time.perf_counter() - begun
        back = files.load_checkpoint(path)
        same = all(torch.equal(back[part][key], value) for part in tried for key, value in tried[part].items())
    except (OSError, ValueError, RuntimeError) as error:
        return Finding("FAIL", "checkpoint", f"a dry run in {folder} failed: {error}"), whole
    finally:
        with suppress(OSError):
            path.unlink()
            for made in fresh:
                made.rmdir()
    sample = ROUND_TRIP - left
    whole += size - sample  # names, and what torch writes around the tensors
    text = f"{_size(size)} of {_size(whole)} written in {took:.2f} s, read back"
    return Finding(
        "ok" if same else "FAIL", "checkpoint", f"{text}, {'the same' if same else 'DIFFERENT'} to the bit"
    ), whole


# --- the whole --------------------------------------------------------------------------------------------------------


class Preflight:
    """The checks of a run and the estimate of its cost.

    Args:
        cfg: checked config of `depthany.preflight`: that of `depthany.train`, with images, world and probe_seconds.
        run_dir: the folder that the run would have.
        debug: its debug choice, by which a teacher is found.

    Attributes:
        findings: what was found so far.
        probe: what was measured so far.
        counts: images of each source that is there.

    Raises:
        ConfigError: images, world or probe_seconds is not positive.
    """

    def __init__(self, cfg: DictConfig, run_dir: Path, *, debug: str | None) -> None:
        self.cfg, self.run_dir, self.debug = cfg, run_dir, debug
        for name in ("images", "world", "probe_seconds"):
            if cfg[name] is not None and cfg[name] <= 0:
                raise ConfigError(f"{name}={cfg[name]}: give a positive number")
        self.findings: list[Finding] = []
        self.counts: dict[str, int] = {}
        self.is_student = cfg.task._target_.endswith("StudentTask")
        self.optim, self.mix = build(cfg.optim), build(cfg.mix)
        self.labels: LabelPlan | None = build(cfg.labels) if self.is_student and self.mix.unlabelled else None
        self.online = self.labels is not None and self.labels.mode == "online"
        gpu = torch.cuda.is_available() and cfg.trainer.accelerator != "cpu"
        self.device = torch.device("cuda" if gpu else "cpu")
        self.probe = Probe(device=torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads")
        devices = cfg.trainer.devices
        if str(devices) in ("auto", "-1"):
            devices = torch.cuda.device_count() if gpu else 1
        self.devices = int(devices) if isinstance(devices, int | str) else len(devices)
        self.world: int = cfg.world or self.devices * int(cfg.trainer.get("num_nodes", 1))
        self.each = max(self.optim.batch_size // self.world, 1)  # images of a batch on one device
        callbacks = cfg.callbacks or {}
        self.averaged = bool(callbacks.get("ema"))
        self.keep = max(int((callbacks.get("checkpoint") or {}).get("keep", 2)), 2)

    def say(self, *findings: Finding) -> None:
        """Prints and keeps."""
        for finding in findings:
            print(f"{finding.level:<5} {finding.what:<13} {finding.text}", flush=True)
        self.findings += findings

    def run(self) -> int:
        """Checks, measures, prints; 1 where something would stop the run, else 0."""
        self._check()
        with tempfile.TemporaryDirectory(prefix="preflight-") as folder:
            self._measure(Path(folder))
        failed, warned = (sum(finding.level == level for finding in self.findings) for level in ("FAIL", "warn"))
        print(f"{failed} would stop the run, {warned} to think about\n")
        images = self.cfg.images or self._images()
        if images:
            devices = f"{self.world} device(s) as this one: {self.probe.device}"
            print(f"{images:,} images, {self.mix.epochs} epoch(s), {devices}")
            print(
                "measured: here, in seconds. x: multiplied out. Waiting for data and for other devices is not counted."
            )
            print(table(self.cost(images)))
        else:
            print("no estimate: the images cannot be counted; give images=N")
        return 1 if failed else 0

    def cost(self, images: int) -> list[Row]:
        """The estimate for so many images, once measured."""
        return cost(self.probe, images=images, world=self.world, mix=self.mix, plan=self.labels, keep=self.keep)

    def _images(self) -> int:
        """Images of an epoch, of those that it counts."""
        group = "unlabelled." if self.mix.unlabelled else "sources."
        return sum(count for name, count in self.counts.items() if name.startswith(group))

    # Checks

    def _check(self) -> None:
        cfg = self.cfg
        try:
            needed = requires("depthany") or []
        except PackageNotFoundError:  # run from a folder
            needed = []
        self.say(check_versions(needed, version), self._check_device(), self._check_folder(), check_temporary())
        stored = self.labels is not None and self.labels.mode == "stored"
        whose = (self.labels.teacher or ANY) if stored and self.labels else None
        groups = {"sources": cfg.data.sources, "validation": cfg.data.validation}
        groups |= {"unlabelled": cfg.data.unlabelled} if self.mix.unlabelled else {}
        built, self.counts, findings = check_sources(groups, limit=cfg.data.limit, labels_of=whose)
        given = {"mix": self.mix, "augment": build(cfg.augment), "batch_size": self.optim.batch_size, "seed": cfg.seed}
        empty = OmegaConf.merge(cfg.data, dict.fromkeys(("sources", "unlabelled", "validation")))
        assert isinstance(empty, DictConfig)
        self.data: DepthData = build(empty, online=self.online, **{"unlabelled": {}, **built}, **given)
        soft, hard = (2**31 if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
        self.say(check_open_files(workers=self.data.num_workers, window=self.data.window, soft=soft, hard=hard))
        self.say(*findings)
        images = cfg.images or self._images() or self.optim.batch_size
        self.say(check_batch(size=self.optim.batch_size, mix=self.mix, world=self.world, images=images))

    def _check_device(self) -> Finding:
        asked, there = self.cfg.trainer.accelerator, torch.cuda.device_count()
        if asked in ("gpu", "cuda") and self.device.type != "cuda":
            return Finding("FAIL", "device", f"trainer.accelerator={asked}, and torch sees no GPU")
        if self.device.type == "cuda" and self.devices > there:
            return Finding("FAIL", "device", f"trainer.devices={self.devices}, and this machine has {there}")
        return Finding("ok", "device", f"{self.probe.device}, {self.cfg.trainer.precision}")

    def _check_folder(self) -> Finding:
        record, (newest, damaged) = read_record(self.run_dir), newest_checkpoint(self.run_dir / "checkpoints")
        if record.get("finished"):
            text = f"{self.run_dir} was finished on {record['finished']}: resume=never or another seed runs it again"
            return Finding("warn", "run folder", text)
        if damaged:
            start = newest.name if newest else "the beginning"
            text = f"{self.run_dir}: {', '.join(damaged)} damaged; it goes on from {start}"
            return Finding("warn", "run folder", text)
        return Finding("ok", "run folder", f"{self.run_dir}, {f'goes on from {newest.name}' if newest else 'new'}")

    def _check_memory(self, models: Sequence[DepthModel]) -> Finding:
        """Weights, gradients and moments of the first model, weights of the others; activations show in the steps."""
        sizes = [4 * sum(p.numel() for p in model.parameters()) for model in models]
        need = sizes[0] * (5 if self.averaged else 4) + sum(sizes[1:])
        free = free_bytes(self.device)
        text = f"{_size(need)} for weights, gradients and moments" + (f", {_size(free)} free" if free else "")
        if free and need > free:
            return Finding("FAIL", "memory", f"{text}: take a smaller model or a larger device")
        return Finding("ok", "memory", f"{text}; activations come on top")

    def _check_workers(self, views: Views) -> Finding:
        """Starts the loader's processes as the run would."""
        number, method = self.data.num_workers, self.data.start_method or multiprocessing.get_start_method()
        if not number:
            return Finding("ok", "start method", "data.num_workers=0: the loader runs in the training process")
        begun = time.perf_counter()
        try:
            views.data.batch_size = self.each
            iterator = iter(views.data.train_dataloader())
            next(iterator)
            del iterator  # ends them
        except Exception as error:  # a start method can fail in any way
            return Finding("FAIL", "start method", f"{number} workers by {method}: {_line(error)}")
        return Finding(
            "ok", "start method", f"{number} worker(s) by {method}, a batch in {time.perf_counter() - begun:.1f} s"
        )

    def _check_disks(self) -> Iterator[Finding]:
        assert self.probe.checkpoint_bytes is not None
        runs, shards = self.run_dir.parent, Path(self.cfg.paths.shards)
        needs: list[tuple[Path, str, float]] = [
            (runs, f"{self.keep} + 1 checkpoints", (self.keep + 1) * self.probe.checkpoint_bytes)
        ]
        chosen = (
            self.probe.label_bytes.get((str(self.labels.codec), str(self.labels.resolution))) if self.labels else None
        )
        for name, count in self.counts.items():
            group, _, key = name.partition(".")
            source = getattr(self.data, group)[key]
            if isinstance(source, Packed) and not Path(source.root).exists():
                needs.append((shards, f"packed {key}", count * (self.probe.image_bytes or 0)))
            if chosen and group == "unlabelled":
                root = source.labels_root if isinstance(source, Shards) else str(shards)
                needs += [] if is_remote(root) else [(Path(root), f"labels of {key}", count * chosen)]
        yield from check_disks(needs)

    # Measuring

    def _measure(self, folder: Path) -> None:
        """Fills the probe; what would stop the run becomes a finding."""
        seconds = float(self.cfg.probe_seconds)
        held = {part: self._hold(part, folder / part) for part in ("labelled", "unlabelled") if getattr(self.mix, part)}
        model, teacher = self._model(), self._teacher()
        asked = teacher or model
        memory = self._check_memory([model, *([asked] if self.labels else [])])
        self.say(memory)
        if memory.level == "FAIL":
            return
        if self.labels is not None:
            self._ask_teacher(asked, held["unlabelled"], folder, seconds=0.3 * seconds)
        if self.online and self.labels is not None:
            self.data.teacher_size = self.labels.input_size or asked.input_size
            self.data.teacher_multiple = asked.patch_size
        self.probe.read_bytes = self._read_bytes(held)
        views = Views(self.data, held)
        self.probe.loader, self.probe.batch_bytes = views.pace(most=self.each, seconds=0.2 * seconds)
        workers = self.data.num_workers * min(self.devices, self.world)
        need, shm = workers * PREFETCH * self.each * self.probe.batch_bytes, Path("/dev/shm")
        self.say(check_shared_memory(need=need, free=shutil.disk_usage(shm).free if shm.is_dir() else None))
        self.say(self._check_workers(views))
        task, precision = self._task(model, asked), str(self.cfg.trainer.precision)
        given: dict[str, Any] = {"precision": precision, "device": self.device, "most": self.each}
        try:
            self.probe.step, optimizer = step_pace(task, views, self.optim, seconds=0.4 * seconds, **given)
        except torch.OutOfMemoryError as error:
            self.say(Finding("FAIL", "memory", f"not even one image fits: {_line(error)}"))
            return
        except (ValueError, RuntimeError) as error:
            self.say(Finding("FAIL", "a step", _line(error)))
            return
        finding, self.probe.checkpoint_bytes = check_checkpoint(
            task, optimizer, self.run_dir.parent, averaged=self.averaged
        )
        self.say(finding, *self._check_disks())

    def _hold(self, part: str, folder: Path) -> Held:
        """A few samples of a part, of each source as many as its share; procedural scenes where nothing can be read."""
        group = _GROUPS[part]
        counts = {key.partition(".")[2]: n for key, n in self.counts.items() if n and key.startswith(f"{group}.")}
        members = []
        for name, count in counts.items():
            number = max(round(SAMPLES * count / sum(counts.values())), 1)
            try:
                members += hold(
                    getattr(self.data, group)[name], count=count, number=number, folder=folder / name
                ).members
            except (ValueError, OSError) as error:
                self.say(Finding("FAIL", "sources", f"data.{group}.{name}: {_line(error)}"))
        counted = part == ("unlabelled" if self.mix.unlabelled else "labelled")
        if members:
            if counted:
                self.probe.image_bytes, self.probe.images = shard_bytes(members, folder), len(members)
            return Held(part, members)
        size = self.cfg.model.input_size
        self.say(
            Finding("warn", "probe", f"{part}: procedural scenes of {size} pixels stand in, and no sizes are told")
        )
        scenes = Scenes(name="scenes", style="b", num_scenes=8, scene_seed=0, size=size, labelled=part == "labelled")
        return hold(scenes, count=8, number=8, folder=folder)

    def _model(self) -> DepthModel:
        """The model as the run would build it; with random weights where its own cannot be had."""
        try:
            return build(self.cfg.model)
        except ConfigError as error:
            self.say(Finding("FAIL", "model", _line(error)))
            return build(self.cfg.model, pretrained=False)

    def _teacher(self) -> DepthModel | None:
        """The run's teacher; None where it needs none, or where there is none: then the student's model stands in."""
        needed = self.is_student and (self.labels is None or self.labels.mode != "stored")
        if not needed:
            return None
        try:
            spec, runs = self.cfg.task.teacher_ckpt, Path(self.cfg.paths.runs)
            path = find_weights(spec, runs, stage="teacher", data=self.data.name, debug=self.debug)
            teacher, _ = open_weights(path, relative=True)
        except ConfigError as error:
            self.say(Finding("FAIL", "teacher", f"{error}. The student's own model with random weights stands in"))
            return None
        self.probe.teacher_name = f"{path}, {weights_hash(teacher)[:8]}"
        self.say(Finding("ok", "teacher", self.probe.teacher_name))
        return teacher

    def _ask_teacher(self, teacher: DepthModel, held: Held, folder: Path, *, seconds: float) -> None:
        """Times the teacher, stores its maps in every codec, and gives them to the held images as the run would."""
        assert self.labels is not None
        predictor = Predictor(model=teacher, device=self.device, precision=self.labels.precision or "fp32")
        pace, maps = ask_teacher(predictor, held, self.labels, seconds=seconds)
        if self.labels.mode == "offline":
            self.probe.teacher, self.probe.labels = pace, len(maps)
            self.probe.label_bytes = label_bytes(maps, folder)
        if not self.online:
            small = self.labels.resolution == "half"
            given = [encode_pseudo(half(m) if small else m, self.labels.codec or "png16") for m in maps]
            held.members = [
                members | label for members, label in zip(held.members, given, strict=False)
            ]  # those in time

    def _read_bytes(self, held: Mapping[str, Held]) -> float | None:
        """Bytes of the files of a view, the mean over the parts of a batch; None where a part is a stand-in."""
        if not self.probe.image_bytes:
            return None
        sizes = {part: fmean(sum(map(len, sample.values())) for sample in h.members) for part, h in held.items()}
        shares = {part: getattr(self.mix, part) for part in held}
        return sum(shares[part] * sizes[part] for part in held) / sum(shares.values())

    def _task(self, model: DepthModel, teacher: DepthModel) -> DepthTask:
        """The task as the run would build it."""
        cfg, loss, extra = self.cfg, WeightedSum(terms=build(self.cfg.loss)), {}
        if self.is_student:
            whose = cfg.task.feature_encoder
            if whose == "auto":
                whose = "initial" if cfg.model.pretrained else "teacher"
            kept = teacher if self.online or "feature" in loss.terms else None
            extra = {"teacher": kept, "precision": cfg.labels.precision or "fp32", "feature_encoder": whose}
        return build(cfg.task, model=model, loss=loss, plan=self.optim, **extra)


_GROUPS = {"labelled": "sources", "unlabelled": "unlabelled"}  # parts of a batch, and where their sources stand


def table(rows: Sequence[Row]) -> str:
    """The estimate as lines."""
    lines = []
    for what, value, unit, how in rows:
        number = "?" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        lines.append(f"  {what:<44} {number:>10} {unit:<8} {how}")
    return "\n".join(lines)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB" if number < 1000 else f"{number:,.0f} TB"
