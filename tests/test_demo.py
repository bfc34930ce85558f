"""The page of the demo in a real browser."""

import io
import shutil
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from depthany.data.files import read_image
from depthany.inference.depth_map import load_map
from depthany.inference.predictor import Predictor
from depthany.models.weights import load_weights, save_weights
from depthany.runs.demo import sizes
from tests.processes import Group, Zygote
from tests.tiny import tiny_model

PATCH, OWN = 8, 56
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = tiny_model()
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    save_weights(model, path, metadata={})
    return path


def open_predictor(weights: Path, max_pixels: int) -> Predictor:
    return Predictor(model=load_weights(weights)[0], device="cpu", precision="fp32", max_pixels=max_pixels)


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A page of a headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    pytest.importorskip("gradio", reason="gradio is not installed")
    with playwright.sync_playwright() as started:
        program = next(filter(None, map(shutil.which, BROWSERS)), None)
        try:
            browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium starts here: {error.message.splitlines()[0]}")
        yield browser.new_page(viewport={"width": 1360, "height": 860})
        browser.close()


def serve(zygote: Zygote, folder: Path, *arguments: str) -> tuple[Group, str]:
    """The verb and the address of its page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"TMPDIR": str(folder)}
    group = zygote.start(["depthany.demo", "--port", str(port), *arguments], cwd=folder, env=env)
    for _ in range(600):
        assert group.poll() == [None], group.output()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=0.1).close()
            return group, f"http://127.0.0.1:{port}"
        except OSError:
            time.sleep(0.1)
    group.kill()
    raise AssertionError(group.output())


def test_the_sizes_are_multiples_of_the_patch_around_the_models_own(weights: Path) -> None:
    for max_pixels, largest in ((4_000_000, 4 * OWN), (100**2, 96), (30**2, OWN)):
        choice = sizes(open_predictor(weights, max_pixels))
        assert OWN in choice and choice[0] == PATCH and choice[-1] == largest
        assert all(size % PATCH == 0 for size in choice)


@pytest.mark.slow
def test_a_photo_is_uploaded_seen_at_two_sizes_and_its_map_downloaded(
    zygote: Zygote, weights: Path, page: Any, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    pixels = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((160, 120)))
    photo = tmp_path / "a photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(pixels).save(photo, exif=exif)
    (tmp_path / "torn.jpg").write_bytes(photo.read_bytes()[:900])
    Image.fromarray(np.tile(pixels, (1, 20, 1))).save(tmp_path / "wide.png")
    predictor = open_predictor(weights, 40_000)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))

    group, address = serve(zygote, tmp_path, "--checkpoint", str(weights), "--max-pixels", "40000")
    taken = zygote.start(
        ["depthany.demo", "--checkpoint", str(weights), "--port", address.rpartition(":")[2]], cwd=tmp_path
    )
    try:
        page.goto(address)
        pictures = {}
        for size, presses in ((OWN, 0), (OWN + 4 * PATCH, 4)):
            if presses:
                page.get_by_label("range slider for Input size").focus()
                for _ in range(presses):
                    page.keyboard.press("ArrowRight")
            else:
                page.set_input_files("input[type=file]", photo)
            page.get_by_text(f"120 × 160 photo, {size} × ").wait_for()
            expected = predictor.predict(read_image(photo.read_bytes()), input_size=size)
            saved = {}
            for button, suffix in (("16-bit PNG", ".png"), ("NPY", ".npy")):
                with page.expect_download() as download:
                    page.get_by_role("button", name=button).click()
                saved[suffix] = tmp_path / f"{size}{suffix}"
                download.value.save_as(saved[suffix])
            assert np.array_equal(np.load(saved[".npy"]), expected.values)
            low, high = expected.value_range()
            read = load_map(saved[".png"])
            assert read.valid.all() and high > low
            np.testing.assert_allclose(read.values, expected.values, rtol=1e-6, atol=0.51 * (high - low) / 65534)
            depth = page.locator("img[src$='image.jpeg']").nth(1)  # the first is the photo
            for seen in pictures:
                page.locator(f"img[src='{seen}']").wait_for(state="detached")
            url = depth.get_attribute("src")
            pictures[url] = np.asarray(Image.open(io.BytesIO(page.request.get(url).body()))).astype(int)
        first, second = pictures.values()
        assert first.shape == second.shape == (160, 120, 3)
        assert (abs(first - second).max(axis=2) > 20).mean() > 0.05

        for name, message in (("wide.png", "to stay within --max-pixels"), ("torn.jpg", "torn.jpg: damaged")):
            page.get_by_label("Clear").first.click()
            page.get_by_text("No photo yet.").wait_for()
            page.set_input_files("input[type=file]", tmp_path / name)
            page.get_by_text(message).wait_for()
        assert page.get_by_role("button", name="NPY").is_disabled()
        assert asked and not [url for url in asked if not url.startswith((address, "data:", "blob:"))]

        assert taken.wait(60) == [2], taken.output()
        assert "name another" in taken.output()
        group.kill(15, ranks=[0])
        assert group.wait(20) == [0], group.output()
        assert not list(tmp_path.glob("depthany-demo-*"))  # nobody's photos stay
    finally:
        group.kill()
