"""The cards of data_manifests: what every set is, where it comes from, and whether it may be used."""

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from depthany.config.launch import config_dir


def read_cards() -> dict[str, dict[str, Any]]:
    """The cards of data_manifests by their names."""
    cards: dict[str, dict[str, Any]] = {}
    for file in sorted((config_dir().parent / "data_manifests").glob("*.yaml")):
        card: Any = OmegaConf.to_container(OmegaConf.load(file))
        cards[str(card["name"])] = card
    return cards


def find_card(cards: Mapping[str, dict[str, Any]], names: list[str]) -> dict[str, Any] | None:
    """The card of the first name that has one: its own, or that of its beginning (bdd100k_frames: bdd100k)."""
    by_letters = {re.sub(r"[^a-z0-9]", "", name.lower()): card for name, card in cards.items()}
    for name in names:
        parts = re.findall(r"[a-z0-9]+", name.lower())
        for length in range(len(parts), 0, -1):
            if card := by_letters.get("".join(parts[:length])):
                return card
    return None
