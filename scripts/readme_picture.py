"""The picture of the README: unseen scenes of style b beside the truth, a teacher's and its student's answer.

python scripts/readme_picture.py runs/teacher-seed0 runs/student-seed0 docs/example.png
"""

import sys
from pathlib import Path

import cv2
import numpy as np
import torch

from depthany.data.scenes import render
from depthany.geometry.alignment import scale_and_shift
from depthany.inference.rendering import colorize, side_by_side
from depthany.runs.find import open_model

SCENES = (7, 30, 41, 65)
SIZE = 160


def main(teacher: str, student: str, out: str) -> None:
    """Writes one row per scene: image, truth, teacher, student, each fitted to the truth."""
    models = [open_model(path, Path(), device="cpu", stage=None)[0] for path in (teacher, student)]
    rows = []
    for index in SCENES:
        scene = render(style="b", seed=4, index=index, size=SIZE)
        sky = np.isinf(scene.depth)
        truth = np.where(sky, 0, 1 / scene.depth).astype(np.float32)
        low, high = np.percentile(truth[~sky], [1, 99])
        row = [scene.image, colorize(truth, valid=~sky, low=low, high=high)]
        for predictor in models:
            pred = torch.from_numpy(predictor.predict(scene.image, input_size=None).disparity)[None]
            scale, shift = scale_and_shift(pred, torch.from_numpy(truth)[None], torch.from_numpy(~sky)[None])
            row.append(colorize((scale * pred + shift)[0].numpy(), low=low, high=high))
        rows.append(side_by_side(row, 6))
    picture = np.concatenate([np.pad(row, ((0, 6), (0, 0), (0, 0)), constant_values=255) for row in rows])
    cv2.imwrite(out, picture[:-6, :, ::-1])


if __name__ == "__main__":
    main(*sys.argv[1:])
