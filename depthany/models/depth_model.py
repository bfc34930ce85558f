"""The depth network: a ViT encoder and a DPT head, in the official Depth Anything key layout.

Legend: B batch, H W pixels, h w patches, C channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from depthany.models.dpt import DPTHead
from depthany.models.encoder import Encoder
from depthany.models.zoedepth import INPUT_SHAPE, MetricBins
from depthany.types import DepthOutput


class DepthModel(nn.Module):
    """Affine-invariant disparity of an image, or metric depth with the metric weights of V1 and V2.

    The state dict is the official one (github.com/DepthAnything/Depth-Anything-V2) without its
    never used `pretrained.mask_token` and `depth_head.scratch.refinenet4.resConfUnit1.*`, and with
    timm's names in the giant's MLP. V1's metric head lies beside it, under `metric_head.`.

    Args:
        encoder: a timm ViT.
        taps: four 0-based blocks, increasing, the last one the encoder's last.
        pretrained: the encoder's weights, see `Encoder`.
        pos_embed: the rule for grids other than the stored one, see `Encoder`.
        encoder_arguments: numbers for timm's constructor, see `Encoder`.
        features: channels of the fused maps.
        out_channels: channels of the four reassembled maps.
        hidden: channels before the last convolution.
        activation: the last one; sigmoid belongs to metric weights, which are read and never trained here.
        input_size: short side in pixels for which the model is meant; a multiple of the patch size.
        max_depth: metres at which the sigmoid of a metric model ends; null for disparity.
        metric_head: `zoedepth`: metres come from V1's bins, see `MetricBins`; null for no such head.

    Raises:
        ValueError: arguments that do not fit together.
    """

    def __init__(
        self,
        *,
        encoder: str,
        taps: Sequence[int],
        pretrained: bool | str,
        pos_embed: Literal["auto", "official", "timm"],
        encoder_arguments: Mapping[str, Any],
        features: int,
        out_channels: Sequence[int],
        hidden: int,
        activation: Literal["relu", "softplus", "sigmoid"],
        input_size: int,
        max_depth: float | None = None,
        metric_head: Literal["zoedepth"] | None = None,
    ):
        super().__init__()
        if len(taps) != 4:
            raise ValueError(f"taps={list(taps)}: the DPT head takes four")
        if (activation == "sigmoid") != (max_depth is not None) or (max_depth is not None and not max_depth > 0):
            raise ValueError(
                f"activation={activation!r}, max_depth={max_depth}: a metric model has sigmoid and a positive "
                "max_depth in metres, every other has neither"
            )
        if metric_head not in (None, "zoedepth") or (metric_head and activation != "relu"):
            raise ValueError(
                f"metric_head={metric_head!r}, activation={activation!r}: it is null, or zoedepth on a model with relu"
            )
        self._config: dict[str, Any] = {
            "encoder": encoder,
            "taps": list(taps),
            "pretrained": False,
            "pos_embed": pos_embed,
            "encoder_arguments": dict(encoder_arguments),
            "features": features,
            "out_channels": list(out_channels),
            "hidden": hidden,
            "activation": activation,
            "input_size": input_size,
        }
        if max_depth is not None:
            self._config["max_depth"] = float(max_depth)
        if metric_head is not None:
            self._config["metric_head"] = metric_head
        self.input_size = input_size
        self.max_depth = max_depth
        self.pretrained = Encoder(
            name=encoder,
            taps=taps,
            pretrained=pretrained,
            pos_embed=pos_embed,
            arguments=encoder_arguments,
        )
        self.depth_head = DPTHead(
            in_channels=self.pretrained.channels,
            features=features,
            out_channels=out_channels,
            hidden=hidden,
            activation=activation,
        )
        self.metric_head = None if metric_head is None else MetricBins(features=features, hidden=hidden)
        if input_size <= 0 or input_size % self.patch_size:
            near = max(round(input_size / self.patch_size), 1) * self.patch_size
            raise ValueError(f"input_size={input_size} is no multiple of the patch size {self.patch_size}: take {near}")

    @property
    def patch_size(self) -> int:
        """Both image sides must be multiples of this many pixels."""
        return self.pretrained.patch_size

    @property
    def space(self) -> Literal["disparity", "metric"]:
        """What the output is: disparity up to scale and shift, larger is nearer, or depth in metres."""
        return "disparity" if self.max_depth is None and self.metric_head is None else "metric"

    @property
    def input_shape(self) -> tuple[int, int] | None:
        """(h, w) to which the official code stretches every image; None where it keeps the aspect ratio."""
        return None if self.metric_head is None else INPUT_SHAPE

    def config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this model, as JSON values, pretrained=False."""
        resolved = {"pos_embed": self.pretrained.pos_embed_rule}
        return {**self._config, **resolved, "encoder_arguments": dict(self._config["encoder_arguments"])}

    def outputs(self, image: Tensor) -> DepthOutput:
        """Disparity (B, H, W), of a metric model depth in metres, and the encoder's final features (B, C, h, w).

        Args:
            image: (B, 3, H, W) ImageNet-normalised RGB.

        Raises:
            ValueError: a side that is no multiple of the patch size.
        """
        taps, size = self.pretrained(image), (image.shape[-2], image.shape[-1])
        if self.metric_head is not None:
            maps = list(self.depth_head.fuse(taps))
            values = self.metric_head(*self.depth_head.last(maps[-1], size), maps)
        else:
            values = self.depth_head(taps, size)
        return DepthOutput(disparity=values if self.max_depth is None else self.max_depth * values, features=taps[-1])

    def forward(self, image: Tensor) -> Tensor:
        """Disparity (B, H, W), affine-invariant, >= 0, or metres (`space`), of a normalised image (B, 3, H, W)."""
        return self.outputs(image).disparity

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that may start from public weights: the small learning rate."""
        return self.pretrained.parameters()

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that start from scratch: the large learning rate."""
        return (weight for name, weight in self.named_parameters() if not name.startswith("pretrained."))
