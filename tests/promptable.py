"""One small promptable model three times: ours, segment-anything's and transformers', with the same random weights."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from sami_cache.models.segment_anything import SegmentAnything, SegmentAnythingConfig

SPARSENESS = 5.0
ENCODER = {"embed_dim": 64, "depth": 2, "num_heads": 4}


class Trio(NamedTuple):
    ours: SegmentAnything
    meta: Any
    """segment_anything's Sam."""
    hugging_face: Any
    """transformers' SamModel."""


def trio(size: int) -> Trio:
    """Windowed and global attention in the encoder; logits as far from 0 as a trained decoder's."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    torch.manual_seed(0)
    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    meta = Sam(
        ImageEncoderViT(
            size,
            16,
            **ENCODER,
            qkv_bias=True,
            norm_layer=norm,
            use_rel_pos=True,
            window_size=14,
            global_attn_indexes=(1,),
            out_chans=256,
        ),
        PromptEncoder(256, (size // 16, size // 16), (size, size), 16),
        MaskDecoder(transformer_dim=256, transformer=TwoWayTransformer(2, 256, 8, 2048)),
    ).eval()
    with torch.no_grad():
        for name, value in meta.named_parameters():
            if "pos" in name:  # zeros at the start, where a mistake would not show
                value.normal_(std=0.2)
        for name, value in meta.mask_decoder.transformer.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):  # sharper attention: masks that depend on the prompt
                value.mul_(3)
        # Channel 0 is the same everywhere, and taken off the masks: spots are left instead of half the picture.
        upscaling = meta.mask_decoder.output_upscaling[3]
        upscaling.weight[:, 0], upscaling.bias[0] = 0, 1
        for mlp in meta.mask_decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight.mul_(40)
            mlp.layers[-1].weight[0], mlp.layers[-1].bias[0] = 0, -SPARSENESS
        head = meta.mask_decoder.iou_prediction_head.layers[-1]
        head.weight.mul_(4)
        head.bias.fill_(0.6)
    ours = SegmentAnything(SegmentAnythingConfig(family="sam", encoder="vit_t", depth=1, image_size=size))
    # The smallest of SAM's own encoders would take ten seconds a picture.
    ours.config = replace(ours.config, encoder="sam_vit_b")
    ours.image_encoder = VisionTransformerSAM(
        img_size=size,
        patch_size=16,
        **ENCODER,
        num_classes=0,
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=(1,),
        use_abs_pos=True,
        neck_chans=256,
        norm_layer=norm,
    )
    state = {
        name.replace(".mlp.lin", ".mlp.fc") if name.startswith("image_encoder.") else name: value
        for name, value in meta.state_dict().items()
    }
    ours.load_state_dict(state)
    return Trio(ours.eval(), meta, _hugging_face(ours, size))


def _hugging_face(ours: SegmentAnything, size: int) -> Any:
    """By the table that reads transformers' files: theirs is taken for ours, and the tensors are put where they came from."""
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    from sami_cache.models.segment_anything_weights import segment_anything_state

    vision = SamVisionConfig(
        image_size=size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_dim=256,
        global_attn_indexes=[1],
        window_size=14,
    )
    prompts = SamPromptEncoderConfig(image_size=size, image_embedding_size=size // 16)
    decoder = SamMaskDecoderConfig(layer_norm_eps=1e-5)
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    theirs = SamModel(config).eval()
    mine = ours.state_dict()
    with torch.no_grad():
        state = theirs.state_dict()
        mapped = segment_anything_state(state)
        assert set(mapped) == set(mine)
        for name, value in mapped.items():
            value.copy_(mine[name])  # the state's tensors are the model's own
        theirs.prompt_encoder.shared_embedding.positional_embedding.copy_(theirs.shared_image_embedding.positional_embedding)
    return theirs
