"""Manifest -> shards -> decode -> augment -> mix -> batch."""
