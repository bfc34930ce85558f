"""The cards of the labelled sets, for training and evaluation, say what the code does."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from depthany.data.sources.da2k import Da2k
from depthany.types import DepthKind, Quantity

FOLDER = Path(__file__).parents[3] / "data_manifests"
KEYS = [
    "name",
    "title",
    "origin",
    "citation",
    "licence",
    "commercial",
    "kind",
    "quantity",
    "unit",
    "factor",
    "invalid",
    "sky",
    "image_format",
    "label_format",
    "expected",
    "count",
    "splits",
    "range_m",
    "defects",
    "confidence",
    "reader",
    "used_in",
]
NAMES = [
    "blendedmvs",
    "hypersim",
    "irs",
    "tartanair",
    "tartanair_v2",
    "vkitti2",
    "diml_indoor",
    "diml_outdoor",
    "hrwsi",
    "megadepth",
    "kitti",
    "kitti_raw",
    "nyuv2",
    "nyuv2_labelled",
    "sintel",
    "eth3d",
    "diode",
    "ddad",
    "scannet",
    "ibims",
]


def read_card(name: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"))  # type: ignore[return-value]


@pytest.mark.parametrize("name", NAMES)
def test_a_card_agrees_with_its_reader(name: str) -> None:
    card = read_card(name)
    assert list(card) == KEYS
    module, _, attribute = card["reader"].rpartition(".")
    reader = getattr(import_module(module), attribute)
    assert card["name"] == reader.dataset == name
    assert DepthKind(card["kind"]) is reader.kind
    assert card["factor"] == reader.factor
    assert tuple(card["splits"]) == reader.splits and card["expected"].keys() == set(reader.splits)
    assert Quantity(card["quantity"]) in list(Quantity)
    assert bool(card["count"]) == (not any(card["expected"].values()))  # one of them says how many there are
    assert card["commercial"] in ("yes", "no", "unclear") and card["confidence"] in ("A", "B", "C")
    assert set(card["used_in"]) <= {"v1", "v2", "metric", "evaluation"}
    assert card["range_m"] is None or card["range_m"][0] < card["range_m"][1]
    assert (card["range_m"] is None) == (card["kind"] != "metric")
    assert all(isinstance(card[key], str) for key in ("title", "origin", "citation", "licence", "unit", "invalid"))
    assert card["defects"] and all(isinstance(defect, str) for defect in card["defects"])


def test_the_card_of_point_pairs_has_no_unit_and_no_factor() -> None:
    card = read_card("da2k")
    assert list(card) == KEYS
    assert card["reader"] == f"{Da2k.__module__}.{Da2k.__name__}" and card["name"] == Da2k.dataset
    assert card["kind"] == "ordinal" and card["quantity"] is card["factor"] is card["range_m"] is None
    assert card["used_in"] == ["evaluation"] and card["expected"].keys() == set(card["splits"])
    assert card["defects"] and card["commercial"] == "yes"


def test_no_labelled_card_is_left_out() -> None:
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert {name for name in names if "quantity" in read_card(name)} == {*NAMES, "da2k", "embedded"}
