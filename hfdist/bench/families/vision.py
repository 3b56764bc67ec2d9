"""torchvision's and timm's models, as narrow and shallow as their classes allow."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfdist.bench.families.family import Family, normal


def _pictures(size: int, number: int = 3) -> tuple[Tensor, Tensor]:
    return normal(number, 3, size, size), torch.randint(3, (number,))


def _resnet(block: str) -> nn.Module:
    """A stem, three of torchvision's residual blocks, a head."""
    from torchvision.models import resnet

    kind = getattr(resnet, block)
    wide = 4 * kind.expansion
    shortcut = nn.Sequential(nn.Conv2d(4, wide, 1, stride=2, bias=False), nn.BatchNorm2d(wide))
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
        kind(4, 4, stride=2, downsample=shortcut, **({"base_width": 32} if block == "Bottleneck" else {})),
        *([kind(wide, 4)] if block == "BasicBlock" else []),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 3),
    )  # fmt: skip


def _mobilenet() -> nn.Module:
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    setting = [
        InvertedResidualConfig(8, 3, 8, 8, True, "RE", 1, 1, 0.25),
        InvertedResidualConfig(8, 5, 16, 8, True, "HS", 2, 1, 0.25),
    ]
    return MobileNetV3(setting, last_channel=8, num_classes=3)


def _efficientnet() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

    setting = [FusedMBConvConfig(2, 3, 2, 8, 8, 1), MBConvConfig(2, 3, 2, 8, 8, 2)]
    return EfficientNet(setting, dropout=0.2, num_classes=3, last_channel=16)


def _convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(4, 8, 1), CNBlockConfig(8, None, 1)], 0.1, num_classes=3)


def _swin(version: str) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    more: dict[str, Any] = {}
    if version == "2":
        more = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return swin.SwinTransformer(
        [2, 2], 4, [2, 1], [1, 2], [2, 2], mlp_ratio=2.0, num_classes=3, **more
    )


def _vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(8, 4, 1, 2, 8, 12, num_classes=3)


def _densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(
        growth_rate=2, block_config=(2, 2), num_init_features=4, bn_size=2, num_classes=3
    )


def _shufflenet() -> nn.Module:
    from torchvision.models import ShuffleNetV2

    return ShuffleNetV2([2, 1, 1], [4, 8, 8, 8, 8], num_classes=3)


def _regnet() -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    shape = BlockParams([1, 1], [4, 8], [2, 4], [1.0, 1.0], [2, 2], 0.25)
    return RegNet(shape, num_classes=3, stem_width=4)


def _timm(module: str, kind: str, **settings: Any) -> nn.Module:
    import importlib

    return getattr(importlib.import_module(f"timm.models.{module}"), kind)(
        num_classes=3, **settings
    )


def families() -> list[Family]:
    """In the order of the table."""

    def of(name: str, model: Any, size: int, source: str = "torchvision", **more: Any) -> Family:
        return Family(name=name, source=source, model=model, batch=partial(_pictures, size), **more)

    patches = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    return [
        of("ResNet, basic blocks", partial(_resnet, "BasicBlock"), 8),
        of("ResNet, basic blocks, training", partial(_resnet, "BasicBlock"), 8, training=True),
        of("ResNet, bottlenecks", partial(_resnet, "Bottleneck"), 8),
        of("MobileNet v3", _mobilenet, 16),
        of("MobileNet v3, training", _mobilenet, 16, training=True),
        of("EfficientNet v2", _efficientnet, 16),
        of("EfficientNet v2, training", _efficientnet, 16, training=True),
        of("ConvNeXt", _convnext, 16),
        of("Swin", partial(_swin, "1"), 8),
        of("Swin v2, training", partial(_swin, "2"), 8, training=True),
        of("ViT", _vit, 8),
        of("DenseNet", _densenet, 32),
        of("ShuffleNet v2", _shufflenet, 32),
        of("RegNet", _regnet, 16),
        of("ViT", partial(_timm, "vision_transformer", "VisionTransformer", **patches), 8, "timm"),
        of("MLP-Mixer", partial(_timm, "mlp_mixer", "MlpMixer", img_size=8, patch_size=4,
                                embed_dim=8, num_blocks=1), 8, "timm"),
        of("BEiT", partial(_timm, "beit", "Beit", **patches, use_rel_pos_bias=True), 8, "timm"),
        of("EVA", partial(_timm, "eva", "Eva", **patches, use_rot_pos_emb=True), 8, "timm"),
        of("CaiT", partial(_timm, "cait", "Cait", **patches), 8, "timm"),
        of("XCiT", partial(_timm, "xcit", "Xcit", **patches | {"img_size": 16, "patch_size": 8}), 16, "timm"),
        of("MetaFormer", partial(_timm, "metaformer", "MetaFormer", depths=(1, 1), dims=(4, 8)), 16,
           "timm"),
        of("ConvNeXt v2", partial(_timm, "convnext", "ConvNeXt", depths=(1,) * 4, dims=(4,) * 4,
                                  kernel_sizes=3, use_grn=True, ls_init_value=None), 32, "timm"),
        of("ResNet v2, standardized weights", _timm_resnet, 16, "timm"),
    ]  # fmt: skip


def _timm_resnet() -> nn.Module:
    from timm.layers import GroupNormAct

    norm = partial(GroupNormAct, num_groups=2)
    return _timm(
        "resnetv2", "ResNetV2", layers=(1, 1), channels=(8, 8), stem_chs=4, norm_layer=norm
    )
