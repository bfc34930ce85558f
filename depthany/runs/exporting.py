"""Exports: a model written in a format of others, read back, and compared with what it was on a photo."""

import copy
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from depthany.config.check import ConfigError
from depthany.data.files import DecodeError, read_image
from depthany.data.scenes import render
from depthany.geometry.resize import network_input, resize_image
from depthany.inference.graph import write_onnx, write_torchscript
from depthany.inference.predictor import Predictor
from depthany.models.depth_model import DepthModel
from depthany.models.layouts import UNUSED, find_copy, from_hugging_face, is_hugging_face, read_plain, version_in_name
from depthany.models.weights import CONFIG_KEY, load_weights, save_weights, weights_hash, write_safetensors
from depthany.models.writers import heads, official_name, preprocessor_config, to_hugging_face, to_official
from depthany.runs.find import find_weights, open_weights

Format = Literal["official", "hf", "safetensors", "onnx", "torchscript"]
SUFFIXES = {"official": (".pth", ".pt"), "safetensors": (".safetensors",), "onnx": (".onnx",), "torchscript": (".pt",)}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime")}  # format: packages of the extra `export`
BOUND = 1e-4  # of the standard deviation of the output, where arithmetic is another's; the same weights give 0
BINS_ROUNDING = 10  # times what float32 itself loses: V1's bins divide what is rounded by temperatures down to 0.02
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
READING = (
    "layout",
    "copy",
    "unused",
    "precision",
    CONFIG_KEY,
)  # of metadata: how a file was read, not what it is


class Different(Exception):
    """A written file does not give what the model gave."""


class Check(NamedTuple):
    """The output of a written file against that of the model before, on one photo."""

    reader: str  # who read the file, and the network input
    largest: float  # difference, in the output's unit
    spread: float  # standard deviation of the output before
    bound: float  # of largest / spread
    rounding: float  # what float32 may lose, of an output that hardly varies or of V1's bins, in its unit

    @property
    def holds(self) -> bool:
        """Whether the file gives what the model gave; not where the output is constant and shows nothing."""
        return self.spread > 0 and self.largest <= max(self.bound * self.spread, self.rounding)

    def __str__(self) -> str:
        if not self.spread > 0:
            return f"{self.reader}: the output is constant or not finite, so that nothing can be compared"
        share = self.largest / self.spread
        return (
            f"{self.reader}: largest difference {self.largest:.3g}, {share:.2g} of the output's standard deviation "
            f"{self.spread:.4g}{'' if self.holds else f', ABOVE {self.bound:g}'}"
        )


def export(
    spec: str,
    *,
    runs: Path,
    form: Format,
    out: Path,
    photo: Path | None,
    size: int | None,
    processing: Literal["none", "inside"],
) -> Iterator[str]:
    """Writes a model, reads it back, compares, and puts it in place only if the comparison holds.

    Args:
        spec: what `find_weights` takes.
        runs: where run folders are.
        form: what is written.
        out: the file, or for hf the folder; it does not exist yet.
        photo: on which before and after are compared; None: a scene of the embedded data.
        size: short side in pixels of the network input for that, and of the pictures of `processing`; None: the size
            the model was trained at.
        processing: inside: the ONNX graph takes pictures and gives maps of their size.

    Yields:
        Lines that say what was done.

    Raises:
        ConfigError: options that do not fit, or a model that the format cannot hold.
        Different: the file does not give what the model gave.
    """
    _check(form, out, size, processing)
    source = find_weights(spec, runs, stage=None)
    picture, picture_name = _photo(photo)
    model, said = open_weights(source)
    model.eval()
    stored = DTYPES.get(said["precision"], torch.float32)
    if processing == "inside" and size is None and model.input_shape:
        raise ConfigError(
            "processing=inside keeps the shape of a picture, and these weights want every picture as "
            f"{model.input_shape[1]} x {model.input_shape[0]}: take processing=none, or say size={model.input_size}"
        )
    size = size or model.input_size
    try:
        with _beside(out) as draft:
            if form == "onnx":
                write_onnx(model, draft, pictures=size if processing == "inside" else None)
            elif form == "torchscript":
                write_torchscript(model, draft)
            else:
                _write_weights(model.to(stored), source, said, form=form, out=draft)
            what = f"{said.get('layout', 'depthany')} weights {weights_hash(model)[:8]} in {said['precision']}"
            yield f"{source}: {what}; compared on {picture_name}"
            holds = True
            for check in _compare(model.float(), draft, picture, form=form, size=size, processing=processing):
                yield str(check)
                holds &= check.holds
            if not holds:
                raise Different(f"{out} is not written: it does not give what the model gave")
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
    files = [out] if out.is_file() else sorted(out.iterdir())
    more = [path for path in [out.with_name(f"{out.name}.data")] if path.is_file() and form == "onnx"]
    beside = "".join(f" with {path.name}, which it needs beside it" for path in more)
    yield f"{out}{beside}: {form}, {sum(path.stat().st_size for path in files + more) / 1e6:.1f} MB"


def _check(form: Format, out: Path, size: int | None, processing: str) -> None:
    suffixes = SUFFIXES.get(form, ("",))
    if out.suffix not in suffixes and form != "hf":
        raise ConfigError(f"out={out}: a file of format={form} ends in {' or '.join(suffixes)}")
    if out.exists():
        raise ConfigError(f"out={out} exists: name another, or remove it first")
    if processing == "inside" and form != "onnx":
        raise ConfigError("processing=inside is for format=onnx alone")
    if size is not None and size < 1:
        raise ConfigError(f"size={size}: the network input's short side in pixels")
    if lacking := [name for name in NEEDS.get(form, ()) if find_spec(name) is None]:
        raise ConfigError(f"format={form} needs {', '.join(lacking)}: pip install 'depthany[export]'")


def _photo(photo: Path | None) -> tuple[np.ndarray, str]:
    if photo is None:  # 4 : 3, as most photos, and not the square of the stored position grid
        return render(style="b", seed=0, index=0, size=640).image[80:560], "a scene of the embedded data (photo=FILE)"
    try:
        return read_image(photo.read_bytes()), str(photo)
    except (OSError, DecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"photo={photo} cannot be read: {reason}") from error


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A place for a draft under the final name, and under its folder's name, which says V1 or V2, too.

    What is there in the end is moved to `out`; after an error nothing is left.
    """
    folder = out.absolute().parent
    hidden = folder / f".export-{os.getpid()}"
    draft = hidden / (folder.name or "export") / out.name
    try:
        draft.parent.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"out={out}: {error.strerror}: {error.filename}") from error
    try:
        yield draft
        for made in sorted(draft.parent.iterdir(), reverse=True):  # what belongs to a file before the file
            os.replace(made, folder / made.name)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


_BY_NAME = "an official file says its tap layers and range by its name alone"


def _write_weights(model: DepthModel, source: Path, said: Mapping[str, str], *, form: Format, out: Path) -> None:
    if form == "safetensors":
        kept = {key: value for key, value in said.items() if key not in READING}
        return save_weights(
            model, out, metadata=kept | {"exported from": f"{source} ({said.get('layout', 'depthany')})"}
        )
    unused = _never_run(source) if said.get("unused") else {}
    if form == "official":
        if version_in_name(out) is None and model.metric_head is None:
            raise ConfigError(
                f"out={out.name}: {_BY_NAME}, which names neither v1 nor v2: {official_name(model)} would do"
            )
        return torch.save(to_official(model, unused=unused), out)
    state, config = to_hugging_face(model, unused=unused)
    out.mkdir()
    write_safetensors(state, out / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config", config), ("preprocessor_config", preprocessor_config(model))):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return None


def _never_run(source: Path) -> dict[str, Tensor]:
    """The tensors that a file of others stores and nobody runs, under official names: a round trip gives them back."""
    state: Mapping[str, Tensor] = find_copy(read_plain(source), source=str(source)).state
    state = from_hugging_face(state) if is_hugging_face(state) else state
    return {key: value.clone() for key, value in state.items() if key.startswith(UNUSED)}


def _compare(
    model: DepthModel, path: Path, picture: np.ndarray, *, form: Format, size: int, processing: str
) -> Iterator[Check]:
    patch = model.patch_size
    if form == "onnx" and processing == "inside":
        yield from _compare_pictures(model, path, picture, size=size)
        return
    if form in ("onnx", "torchscript"):
        run = _onnx(path) if form == "onnx" else _torchscript(path)
        reader = "ONNX Runtime" if form == "onnx" else "TorchScript"
        for side, count in ((size, 1), (max(size // 2 // patch, 1) * patch, 2)):  # neither is the size of the example
            image = _image(picture, side, patch)
            images = torch.cat([image, image.flip(-1)])[:count]
            output, lost = _output(model, images), 0.0
            if model.metric_head is not None:
                exact = _output(copy.deepcopy(model).double(), images.double())
                lost = BINS_ROUNDING * (output - exact).abs().max().item()
            yield _check_output(f"{reader} {_sides(images)}", run(images), output, bound=BOUND, lost=lost)
        return
    back, _ = load_weights(path)
    before, after = (_unweighted(each) for each in (model, back))
    if changed := [f"{key}={after[key]} instead of {before[key]}" for key in before if before[key] != after[key]]:
        way_out = f": {_BY_NAME}, take {official_name(model)}" if form == "official" else ""
        raise ConfigError(f"out={path.name} would be read with {', '.join(changed)}{way_out}")
    image = _image(picture, size, patch)
    yield _check_output(
        f"depthany {_sides(image)}", _output(back.float().eval(), image), _output(model, image), bound=0
    )
    if weights_hash(back) != weights_hash(model):
        raise Different(f"{path.name}: weights read back are not those that were written")
    if form == "hf":
        if find_spec("transformers") is None:
            return
        side = back.pretrained.patch_embed.grid_size[0] * patch
        image = _image(resize_image(picture, (side, side), antialias=True), side, patch)
        yield _check_output(
            f"transformers {_sides(image)}", _transformers(path, image), _output(model, image), bound=BOUND
        )


def _unweighted(model: DepthModel) -> dict[str, Any]:
    """What stands in no weight and changes the output."""
    told = {key: model.config().get(key) for key in ("taps", "activation", "max_depth", "metric_head", "input_size")}
    return told | {"pos_embed": model.pretrained.pos_embed_rule, "heads": heads(model)}


def _compare_pictures(model: DepthModel, path: Path, picture: np.ndarray, *, size: int) -> Iterator[Check]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    predictor = Predictor(model=model, device="cpu", precision="fp32")
    half = resize_image(picture, (picture.shape[0] // 2 + 1, picture.shape[1] // 3 + 1), antialias=True)
    for photo in (picture, half):
        (after,) = session.run(None, {"picture": photo[None]})
        before = torch.from_numpy(predictor.predict(photo, input_size=size).values)[None]
        name = f"ONNX Runtime, picture of {photo.shape[1]} x {photo.shape[0]}"
        yield _check_output(name, torch.from_numpy(after), before, bound=10 * BOUND)  # cubic resizing rounds, too


def _image(picture: np.ndarray, size: int, patch: int) -> Tensor:
    """(1, 3, H, W), by the official rule; a side of it has no bound, as the picture is the user's choice."""
    values = network_input(picture, size=size, multiple=patch, max_pixels=10**9)
    return torch.from_numpy(values).permute(2, 0, 1)[None].contiguous()


def _sides(image: Tensor) -> str:
    count, _, height, width = image.shape
    return f"{count} x {height} x {width}"


def _check_output(reader: str, after: Tensor, before: Tensor, *, bound: float, lost: float = 0.0) -> Check:
    if after.shape != before.shape:
        raise Different(f"{reader}: gives {tuple(after.shape)} instead of {tuple(before.shape)}")
    spread = before.std().item()
    rounding = max(lost, 1e-6 * before.abs().max().item()) if bound else 0.0
    return Check(reader, (after - before).abs().max().item(), spread if np.isfinite(spread) else 0.0, bound, rounding)


@torch.inference_mode()
def _output(model: DepthModel, images: Tensor) -> Tensor:
    return model(images)


def _onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


def _torchscript(path: Path) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, which the user was told
        return torch.inference_mode()(torch.jit.load(path))


def _transformers(folder: Path, image: Tensor) -> Tensor:
    """What transformers gives, after it has found every key and no other."""
    from transformers import AutoModelForDepthEstimation
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, report = AutoModelForDepthEstimation.from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32, local_files_only=True
        )
    except Exception as error:  # its checks of config.json raise anything
        raise Different(f"transformers does not open {folder.name}: {error}") from error
    if wrong := {name: keys for name, keys in report.items() if keys}:
        raise Different(f"transformers opens {folder.name} with {wrong}")
    with torch.inference_mode():
        return model.eval()(image).predicted_depth
