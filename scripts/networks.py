#!/usr/bin/env python3
"""Write docs/networks.md: the layers that match_layers finds in networks of common libraries.

pip install -e ".[stacks]"
python scripts/networks.py    # all networks, with random weights, in a minute
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import transformers
import vit_pytorch
from torch import Tensor, nn
from torchvision import models
from vit_pytorch.simple_vit_with_register_tokens import SimpleViT as ViTWithRegisters

from at_fused import match_layers
from at_fused._models import arguments_of, tensors_in
from at_fused._observe import LayoutOverrides, format_size, observe
from at_fused.layers import NetworkStages, split_single_block

PAGE = Path(__file__).parents[1] / "docs" / "networks.md"
Network = tuple[Callable[[], nn.Module], Any]


def image(size: int) -> Tensor:
    """Return two images."""
    return torch.randn(2, 3, size, size)


TIMM = {
    224: """beit_base_patch16_224 cait_xxs24_224 convit_tiny davit_tiny deit_tiny_patch16_224
        efficientformer_l1 focalnet_tiny_srf gcvit_xxtiny gmlp_ti16_224 hiera_tiny_224 levit_128
        mixer_s32_224 maxvit_rmlp_pico_rw_256 mvitv2_tiny nest_tiny pit_ti_224 resmlp_12_224
        sequencer2d_s
        swin_tiny_patch4_window7_224 tiny_vit_5m_224 twins_svt_small vit_tiny_patch16_224
        vit_tiny_r_s16_p8_224 visformer_tiny volo_d1_224 xcit_nano_12_p8_224 crossvit_tiny_240
        coat_lite_tiny vit_small_patch14_reg4_dinov2 swinv2_cr_tiny_224""",
    96: """convnext_atto cs3darknet_focus_s dla60x_c edgenext_xx_small efficientvit_b0
        fasternet_t0 fastvit_t8 ghostnet_050 hgnetv2_b0 hrnet_w18_small mobilenetv3_small_050
        mobileone_s0 nf_resnet26 poolformerv2_s12 pvt_v2_b0 regnetx_002 repghostnet_050 repvgg_a0
        res2net50_14w_8s resnet18d resnetv2_50 rexnet_100 selecsls42 skresnet18 starnet_s050
        tf_efficientnetv2_b0 tresnet_m vovnet39a xception41p mambaout_femto""",
}  # fmt: skip
FIXED_SIZES = {
    "maxvit_rmlp_pico_rw_256": 256,
    "crossvit_tiny_240": 240,
    "vit_small_patch14_reg4_dinov2": 518,
}
TORCHVISION = {
    224: "alexnet maxvit_t vit_b_32",
    96: """convnext_tiny densenet121 efficientnet_b0 googlenet mnasnet0_5 mobilenet_v2
        mobilenet_v3_small regnet_y_400mf resnet50 shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t
        vgg11_bn""",
}
SEGMENTATION = (
    "fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large"
)
VIDEO = "r3d_18 mc3_18 r2plus1d_18 swin3d_t"
_VIT = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
_PATCHES = {**_VIT, "image_size": 64, "patch_size": 8}
_STAGES = {"depths": [2, 2, 2, 2], "hidden_sizes": [24, 32, 40, 48]}
_SWIN = {"image_size": 64, "patch_size": 2, "embed_dim": 24, "depths": [2, 2, 2]}
_WINDOWS = {**_SWIN, "num_heads": [2, 2, 2], "window_size": 4}
_FOCI = {"hidden_sizes": [24, 48, 96], "focal_levels": [2] * 3, "focal_windows": [3] * 3}
_HIERA = {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 2, 2, 1]}
_WAVES = {**_VIT, "num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 15}
IMAGE = image(64)
# Configuration options and an example.
TRANSFORMERS: dict[str, tuple[dict[str, Any], Any]] = {
    "ViTForImageClassification": (_PATCHES, IMAGE),
    "DeiTForImageClassification": (_PATCHES, IMAGE),
    "BeitForImageClassification": (_PATCHES, IMAGE),
    "Dinov2ForImageClassification": (_PATCHES, IMAGE),
    "Dinov2WithRegistersModel": (_PATCHES, IMAGE),
    "CLIPVisionModel": (_PATCHES, IMAGE),
    "SiglipVisionModel": (_PATCHES, IMAGE),
    "ViTMAEModel": ({**_PATCHES, "mask_ratio": 0.0}, IMAGE),
    "YolosModel": ({**_PATCHES, "image_size": [64, 64]}, IMAGE),
    "SwinForImageClassification": (_WINDOWS, IMAGE),
    "Swinv2ForImageClassification": (_WINDOWS, IMAGE),
    "FocalNetForImageClassification": ({**_SWIN, **_FOCI}, IMAGE),
    "ConvNextForImageClassification": (_STAGES, IMAGE),
    "ResNetForImageClassification": ({**_STAGES, "embedding_size": 16}, IMAGE),
    "RegNetForImageClassification": ({**_STAGES, "embedding_size": 16, "groups_width": 8}, IMAGE),
    "MobileNetV2ForImageClassification": ({"depth_multiplier": 0.35}, IMAGE),
    "MobileViTForImageClassification": ({"image_size": 64}, IMAGE),
    "PvtV2ForImageClassification": ({"image_size": 64}, IMAGE),
    "PoolFormerForImageClassification": ({}, IMAGE),
    "SegformerForSemanticSegmentation": ({}, IMAGE),
    "HieraForImageClassification": (_HIERA, IMAGE),
    "VideoMAEModel": ({**_PATCHES, "num_frames": 4}, torch.randn(2, 4, 3, 64, 64)),
    "TimesformerModel": ({**_PATCHES, "num_frames": 4}, torch.randn(2, 4, 3, 64, 64)),
    "ASTModel": ({**_VIT, "max_length": 64, "num_mel_bins": 32}, torch.randn(2, 64, 32)),
    "Wav2Vec2Model": (_WAVES, torch.randn(2, 4000)),
    "BertModel": ({**_VIT, "vocab_size": 50}, torch.randint(50, (2, 12))),
    "LlamaModel": ({**_VIT, "vocab_size": 50}, {"input_ids": torch.randint(50, (2, 12))}),
}
SMP = {
    "Unet": "resnet18", "UnetPlusPlus": "resnet18", "FPN": "efficientnet-b0",
    "DeepLabV3Plus": "resnet18", "Segformer": "mit_b0",
}  # fmt: skip
_OWN = {
    "image_size": 64, "patch_size": 8, "num_classes": 10, "dim": 32, "depth": 4, "heads": 2,
    "mlp_dim": 64,
}  # fmt: skip


def one_dimensional(width: int) -> nn.Module:
    """Return a network for signals (B, C, L)."""

    def block(c: int, c_out: int) -> nn.Module:
        conv = nn.Conv1d(c, c_out, 3, 2, 1), nn.BatchNorm1d(c_out), nn.ReLU()
        return nn.Sequential(nn.Sequential(*conv), nn.Conv1d(c_out, c_out, 3, 1, 1))

    return nn.Sequential(nn.Conv1d(2, width, 7, 2, 3), block(width, width), block(width, 2 * width))


def networks() -> dict[str, dict[str, Network]]:
    """Return the networks by library and name, each with an example of its input."""

    def torchvision_network(name: str, example: Any) -> Network:
        backbone = {"weights_backbone": None} if name in SEGMENTATION.split() else {}
        return partial(models.get_model, name, weights=None, **backbone), example

    def transformers_network(name: str) -> Network:
        options, example = TRANSFORMERS[name]
        network = getattr(transformers, name)
        return (lambda: network(network.config_class(**options))), example

    torchvision = {n: image(size) for size, names in TORCHVISION.items() for n in names.split()}
    torchvision |= {name: image(96) for name in SEGMENTATION.split()}
    torchvision |= dict.fromkeys(VIDEO.split(), torch.randn(2, 3, 8, 64, 64))
    no_weights: dict[str, Any] = {"weights": None, "weights_backbone": None}
    detector = partial(
        models.detection.fasterrcnn_resnet50_fpn, **no_weights, min_size=96, max_size=96
    )
    return {
        "timm": {
            name: (partial(timm.create_model, name), image(FIXED_SIZES.get(name, size)))
            for size, names in TIMM.items()
            for name in names.split()
        },
        "torchvision": {n: torchvision_network(n, x) for n, x in torchvision.items()}
        | {"fasterrcnn_resnet50_fpn": (detector, [torch.randn(3, 96, 96) for _ in range(2)])},
        "transformers": {name: transformers_network(name) for name in TRANSFORMERS},
        "segmentation_models_pytorch": {
            f"{name}, {encoder}": (
                partial(getattr(smp, name), encoder, encoder_weights=None),
                image(96),
            )
            for name, encoder in SMP.items()
        },
        "vit-pytorch": {
            "ViT": (lambda: vit_pytorch.ViT(**_OWN), IMAGE),
            "SimpleViT": (lambda: vit_pytorch.SimpleViT(**_OWN), IMAGE),
            "SimpleViT with registers": (lambda: ViTWithRegisters(**_OWN), IMAGE),
        },
        "torch": {"1-D convolutions": (lambda: one_dimensional(8), torch.randn(2, 2, 256))},
    }


# Students and teachers of different families: library and name of each.
ACROSS_FAMILIES = [
    ("timm", "resnet18d", "torchvision", "resnet50"),
    ("torchvision", "mobilenet_v2", "torchvision", "convnext_tiny"),
    ("torchvision", "resnet50", "torchvision", "swin_t"),
    ("torchvision", "mobilenet_v3_small", "timm", "efficientvit_b0"),
    ("timm", "pvt_v2_b0", "torchvision", "densenet121"),
    ("timm", "vit_tiny_patch16_224", "timm", "beit_base_patch16_224"),
    ("timm", "vit_tiny_patch16_224", "torchvision", "maxvit_t"),
    ("timm", "deit_tiny_patch16_224", "timm", "cait_xxs24_224"),
    ("timm", "pit_ti_224", "timm", "twins_svt_small"),
    ("transformers", "DeiTForImageClassification", "transformers", "Dinov2WithRegistersModel"),
    ("transformers", "ResNetForImageClassification", "transformers", "BeitForImageClassification"),
    ("torchvision", "lraspp_mobilenet_v3_large", "torchvision", "deeplabv3_resnet50"),
    ("segmentation_models_pytorch", "Unet, resnet18", "torchvision", "resnet50"),
]


def row(name: str, network: Network) -> str:
    """Return the row of the table for a network."""
    make, example = network
    torch.manual_seed(0)
    shapes = ", ".join("x".join(map(str, x.shape[1:])) for x in tensors_in(example))
    try:
        stages = NetworkStages(observe(make(), arguments_of(example), LayoutOverrides()))
    except ValueError as error:
        return f"| {name} | {shapes} | refused: {error} | |"
    if not stages.blocks:
        return f"| {name} | {shapes} | refused: {stages.describe()} | |"
    chosen = [blocks[-1] for blocks in stages.blocks.values()]
    layers = ", ".join(f"`{call.name}` {format_size(call.size or ())}" for call in chosen)
    forms = ", ".join(sorted({call.format_shape("C") for call in chosen}))
    if len(chosen) == 1:
        layers += f", the last of {len(split_single_block(*stages.blocks.values()))}"
    return f"| {name} | {shapes} | {layers} | {forms} |"


def pairs_of(student: Network, teacher: Network) -> str:
    """Return the pairs of two networks, as match_layers prints them."""
    output = io.StringIO()
    torch.manual_seed(0)
    try:
        with contextlib.redirect_stdout(output):
            match_layers(student[0](), teacher[0](), teacher[1], resize="maps")
    except ValueError as error:
        return f"refused: {error}"
    return f"```\n{output.getvalue()}```"


def page() -> str:
    """Return the text of the page."""
    libraries = networks()
    lines = [INTRODUCTION]
    for library, by_name in libraries.items():
        lines += [f"\n## {library}\n", "| network | input | layers and their maps | features |"]
        lines += ["|---|---|---|---|", *(row(name, each) for name, each in by_name.items())]
    lines.append("\n## Across families\n")
    for student_library, student, teacher_library, teacher in ACROSS_FAMILIES:
        pair = libraries[student_library][student], libraries[teacher_library][teacher]
        lines.append(f"{student} <- {teacher}\n\n{pairs_of(*pair)}\n")
    return "\n".join(lines).rstrip() + "\n"


INTRODUCTION = """# Layers found in networks

This page lists the layers that `match_layers` finds in networks with random weights, and that
`AttentionTransfer(student, teacher, example=x)` taps: the last block of each stage, with the size
of its map. Layers of student and teacher are paired if their maps have the same size. Networks with
a single size, such as ViTs, get up to four pairs of blocks at proportional depth. `1+196` means one
class token, which is left out, and 196 patches. If a network is refused, name its layers with
`layers=[...]`, or pass the option that the message asks for. `scripts/networks.py` writes this
page, and a test compares it with the script's output."""


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page())
