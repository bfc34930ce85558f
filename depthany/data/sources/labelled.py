"""One labelled dataset of a mixture: in its authors' files or in the shards packed of it, and how often it is used."""

import hashlib
import json
from typing import Any, Literal

from depthany.data.shards import ShardError
from depthany.data.sources.packed import Packable, Shards
from depthany.data.sources.raw import Raw
from depthany.types import DepthSample, ImageSample, Skip

MOST = 1000  # times that one epoch may have an image


class Labelled:
    """A reader's samples, with the same keys and the same arrays whether they are read raw or from shards.

    The constructor touches no file, so that a mixture can name all that is missing at once.

    Args:
        source: the reader of the original files. Where shards are read, these need not be there; the shards must have
            been packed with the same options.
        read: raw: the original files; shards: what python -m depthany.prepare dataset=... has packed of them.
        shards: folder or URL of those shards.
        weight: how often an epoch has each image: 1 once, 2 twice, 0.5 every second image and in the next epoch the
            others; 0 leaves the set out, and then it need not be there.
        cache: folder on this machine for copies of remote shards; null: samples are read one by one where they lie.

    Raises:
        ValueError: the weight is no number from 0 to 1000.

    Attributes:
        limit: images in use; None: all.
        window: shards that the order shuffles into each other.
        reduce_to: short side in pixels that a JPEG in a shard may be decoded down to; None: at its own size.
        factor: numerator of the disparity.
        root_option: which of the options above says where the files lie.
    """

    def __init__(
        self, *, source: Packable, read: Literal["raw", "shards"], shards: str, weight: float, cache: str | None
    ) -> None:
        if not 0 <= weight <= MOST:
            raise ValueError(
                f"source {source.name}: weight={weight} must be a number from 0 to {MOST}: 2 has every image twice, "
                "0.5 every second one, 0 leaves the set out"
            )
        self.name, self.weight = source.name, weight
        self.factor: float = getattr(source, "factor", None) or 1.0
        self.reader = source if read == "raw" else Shards(name=source.name, root=shards, cache=cache)
        self._asked = {"split": source.split, "sky_masks": bool(source.sky_masks)} if isinstance(source, Raw) else {}
        self._asked |= getattr(source, "options", {})
        self.root_option = "source.root" if read == "raw" else "shards"
        self.limit: int | None = None
        self.window = 8
        self.reduce_to: int | None = None

    def check(self) -> None:
        """Looks whether the files or shards are there.

        Raises:
            ValueError: they are not.
        """
        if hasattr(self.reader, "check"):
            self.reader.check()

    def prepare(self) -> None:
        """Lists what there is, and says what of the original files is left out.

        Raises:
            ValueError: there is nothing, or it cannot be listed.
        """
        self.reader.prepare()
        left_out: list[Skip] = [] if isinstance(self.reader, Shards) else getattr(self.reader, "skipped", [])
        if left_out:
            first = f"{left_out[0].key}: {left_out[0].reason}"
            print(f"{self.name}: {len(self.reader):,} images; {len(left_out):,} files are left out, first {first}")

    def open(self) -> None:
        """Finds out which images are in use.

        Raises:
            ShardError: shards are missing, or were packed with other options than the reader has.
        """
        if not isinstance(self.reader, Shards):
            return
        self.reader.limit, self.reader.window, self.reader.reduce_to = self.limit, self.window, self.reduce_to
        self.reader.open()
        packed: dict[str, Any] = self.reader.shard(0).facts.get("source") or {}
        options = packed.get("options", {})
        made = packed | options | {"sky_masks": "sky_masks" in options}
        for option, value in self._asked.items() if packed else ():
            if made.get(option) != json.loads(json.dumps(value)):
                raise ShardError(
                    f"{self.name}: the shards in {self.reader.root} were packed with {option}={made.get(option)}, and "
                    f"the run asks for {value}: pack them again with dataset.{option}, or ask for what they hold"
                )

    @property
    def chunks(self) -> list[int]:
        """Images in use of each shard; none where the original files are read, in any order."""
        return self.reader.chunks if isinstance(self.reader, Shards) else []

    @property
    def fingerprint(self) -> str:
        """Which images are in use: what the cursor of a run counts. Another set has another one."""
        if isinstance(self.reader, Shards):
            return self.reader.fingerprint
        facts = json.dumps([self.reader.identity(), self.limit], sort_keys=True, default=str)
        return hashlib.sha256(facts.encode()).hexdigest()

    @property
    def skipped(self) -> list[Skip]:
        """Damaged samples that never got into the shards. What a scan leaves out by its rules is no damage."""
        return self.reader.skipped if isinstance(self.reader, Shards) else []

    def __len__(self) -> int:
        return len(self.reader)

    def key(self, index: int) -> str:
        """The sample's key."""
        return self.reader.key(index)

    def read(self, index: int) -> ImageSample | DepthSample:
        """The image with its label.

        Raises:
            DecodeError: it is damaged.
            OSError: a file cannot be read at all.
        """
        return self.reader.read(index)
