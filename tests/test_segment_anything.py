"""The promptable models against what others published: segment-anything, transformers, and EfficientSAM's released code."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor

from sami_cache.errors import SamiCacheError
from sami_cache.models.segment_anything import SegmentAnything, SegmentAnythingConfig
from sami_cache.models.segment_anything_weights import (
    load_decoder,
    load_segment_anything,
    load_student,
    save_segment_anything,
    segment_anything_state,
)
from sami_cache.models.students import create_encoder, export_encoder

SIZE, GRID = 256, 16


def tiny(family: str, seed: int = 0, **changes) -> SegmentAnything:
    torch.manual_seed(seed)
    config = {"family": family, "encoder": "vit_t", "depth": 1, "image_size": SIZE} | changes
    model = SegmentAnything(SegmentAnythingConfig(**config)).eval()
    with torch.no_grad():  # biases and norms start where they change nothing
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def some_prompts(batch: int, queries: int, points: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return SIZE * torch.rand(batch, queries, points, 2, generator=generator), torch.randint(
        0, 2, (batch, queries, points), generator=generator
    )


def embeddings(batch: int, seed: int = 2) -> Tensor:
    return torch.randn(batch, 256, GRID, GRID, generator=torch.Generator().manual_seed(seed))


# --- family sam ---


@pytest.fixture(scope="module")
def meta() -> tuple[PromptEncoder, MaskDecoder]:
    torch.manual_seed(5)
    prompts = PromptEncoder(256, (GRID, GRID), (SIZE, SIZE), 16).eval()
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    return prompts, MaskDecoder(transformer_dim=256, transformer=transformer).eval()


@pytest.fixture(scope="module")
def sam(meta) -> SegmentAnything:
    model = tiny("sam")
    model.prompt_encoder.load_state_dict(meta[0].state_dict())
    model.mask_decoder.load_state_dict(meta[1].state_dict())
    return model


def metas_answer(meta, embedding, points, labels, boxes=None, masks=None, multimask=True):
    """segment-anything's, which takes one image."""
    sparse, dense = meta[0]((points, labels), boxes, masks)
    return meta[1](embedding[None], meta[0].get_dense_pe(), sparse, dense, multimask)


@pytest.mark.parametrize("multimask", [True, False])
@torch.no_grad()
def test_points_on_many_images_are_answered_as_by_segment_anything(sam, meta, multimask) -> None:
    images, (points, labels) = embeddings(3), some_prompts(3, 4, 2)
    answer = sam.decode(images, *sam.complete_prompts(points, labels))
    answer = answer.three if multimask else answer.single
    for image in range(3):
        logits, iou = metas_answer(meta, images[image], points[image], labels[image], multimask=multimask)
        torch.testing.assert_close(answer.logits[image], logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(answer.iou[image], iou, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_boxes_with_points_and_earlier_masks_are_answered_as_by_segment_anything(sam, meta) -> None:
    images, (points, labels) = embeddings(2), some_prompts(2, 3, 2)
    corners = torch.tensor([[20.0, 30.0], [200.0, 180.0]]).expand(2, 3, 2, 2)
    earlier = torch.randn(2, 3, 1, 4 * GRID, 4 * GRID)
    kinds = torch.tensor([2, 3]).expand(2, 3, 2)
    with_box = torch.cat([points, corners], 2), torch.cat([labels, kinds], 2)
    completed = sam.complete_prompts(*with_box)
    assert torch.equal(completed[0], with_box[0]), "SAM adds no point beside a box"
    answer = sam.decode(images, *completed, masks=earlier)
    for image in range(2):
        boxes = corners[image].flatten(1)
        logits, iou = metas_answer(meta, images[image], points[image], labels[image], boxes, earlier[image])
        torch.testing.assert_close(answer.three.logits[image], logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(answer.three.iou[image], iou, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_hugging_faces_decoder_is_read_and_answers_the_same(tmp_path) -> None:
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    torch.manual_seed(3)
    # A vision encoder of SAM's base width, so that the file is known for a whole model, and of one block.
    vision = SamVisionConfig(num_hidden_layers=1, image_size=SIZE, global_attn_indexes=[0])
    prompts = SamPromptEncoderConfig(image_size=SIZE, image_embedding_size=GRID)
    config = SamConfig(
        vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=SamMaskDecoderConfig(layer_norm_eps=1e-5)
    )
    theirs = SamModel(config).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    theirs.prompt_encoder.shared_embedding.positional_embedding.copy_(theirs.shared_image_embedding.positional_embedding)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny("sam")
    load_decoder(ours, tmp_path / "theirs")
    images, (points, labels) = embeddings(2), some_prompts(2, 3, 2)
    answer = ours.decode(images, *ours.complete_prompts(points, labels)).three
    out = theirs(image_embeddings=images, input_points=points, input_labels=labels, multimask_output=True)
    torch.testing.assert_close(answer.logits, out.pred_masks, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(answer.iou, out.iou_scores, atol=1e-4, rtol=1e-3)


# --- family efficientsam, written down anew over the names of its file ---


def linear(state, name, values):
    return F.linear(values, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state, name, values):
    return F.layer_norm(values, values.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def attention(state, name, queries, keys, values):
    """Eight heads by einsum."""
    parts = [linear(state, f"{name}.{part}_proj", value) for part, value in zip("qkv", (queries, keys, values), strict=True)]
    q, k, v = (part.unflatten(-1, (8, -1)) for part in parts)
    weights = (torch.einsum("nqhc,nkhc->nhqk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    return linear(state, f"{name}.out_proj", torch.einsum("nhqk,nkhc->nqhc", weights, v).flatten(2))


def mlp(state, name, values, layers):
    for layer in range(layers):
        values = F.gelu(linear(state, f"{name}.layers.{layer}.0", values))
    return linear(state, f"{name}.fc", values)


def sines(state, places):
    angles = 2 * math.pi * ((2 * places - 1) @ state["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"])
    return torch.cat([angles.sin(), angles.cos()], -1)


def efficientsams_answer(state, image, points, labels):
    """One image [1, 256, g, g], queries [Q, 6, 2] and [Q, 6]: logits [Q, 4, 4 g, 4 g] and IoU [Q, 4]."""
    tokens = sines(state, (points + 0.5) / SIZE)
    names = {-1: "invalid_points", 1: "point_embeddings", 2: "bbox_top_left_embeddings", 3: "bbox_bottom_right_embeddings"}
    for query, point in np.ndindex(*labels.shape):
        if (label := int(labels[query, point])) in names:
            tokens[query, point] += state[f"prompt_encoder.{names[label]}.weight"][0]
    decoder = {name.removeprefix("mask_decoder."): value for name, value in state.items()}
    own = torch.cat([decoder["iou_token.weight"], decoder["mask_tokens.weight"]])
    tokens = torch.cat([own.expand(len(tokens), -1, -1), tokens], 1)
    centres = (torch.arange(GRID) + 0.5) / GRID
    places = sines(state, torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1)).reshape(1, GRID * GRID, 256)
    keys, queries = image.flatten(2).transpose(1, 2).expand(len(tokens), -1, -1), tokens
    for layer in range(2):
        at = f"transformer.layers.{layer}"
        if layer:
            queries = queries + tokens
        queries = norm(decoder, f"{at}.norm1", queries + attention(decoder, f"{at}.self_attn", queries, queries, queries))
        seen = attention(decoder, f"{at}.cross_attn_token_to_image", queries + tokens, keys + places, keys)
        queries = norm(decoder, f"{at}.norm2", queries + seen)
        queries = norm(decoder, f"{at}.norm3", queries + mlp(decoder, f"{at}.mlp", queries, 1))
        seen = attention(decoder, f"{at}.cross_attn_image_to_token", keys + places, queries + tokens, queries)
        keys = norm(decoder, f"{at}.norm4", keys + seen)
    seen = attention(decoder, "transformer.final_attn_token_to_image", queries + tokens, keys + places, keys)
    queries = norm(decoder, "transformer.norm_final_attn", queries + seen)
    image = keys.transpose(1, 2).unflatten(2, (GRID, GRID))
    up = "final_output_upscaling_layers"
    image = F.conv_transpose2d(image, decoder[f"{up}.0.0.weight"], decoder[f"{up}.0.0.bias"], stride=2)
    image = F.gelu(F.group_norm(image, 1, decoder[f"{up}.0.1.weight"], decoder[f"{up}.0.1.bias"]))
    image = F.gelu(F.conv_transpose2d(image, decoder[f"{up}.1.0.weight"], decoder[f"{up}.1.0.bias"], stride=2))
    weights = [mlp(decoder, f"output_hypernetworks_mlps.{token}", queries[:, 1 + token], 2) for token in range(4)]
    return torch.einsum("ntc,nchw->nthw", torch.stack(weights, 1), image), mlp(decoder, "iou_prediction_head", queries[:, 0], 2)


@torch.no_grad()
def test_efficientsams_decoder_is_the_released_one() -> None:
    model = tiny("efficientsam")
    images, (points, labels) = embeddings(2), some_prompts(2, 3, 4)
    labels[0, 0] = torch.tensor([2, 3, 1, 0])
    points, labels = model.complete_prompts(points, labels)
    assert labels.shape == (2, 3, 6)
    assert (points[..., 4:, :] == -1).all()
    answer = model.decode(images, points, labels)
    for image in range(2):
        logits, iou = efficientsams_answer(model.state_dict(), images[image : image + 1], points[image], labels[image])
        torch.testing.assert_close(answer.logits[image], logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(answer.iou[image], iou, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("encoder", "whole", "alone"), [("vit_t", 10.22, 6.16), ("vit_s", 26.41, 22.35)])
def test_efficientsam_has_the_released_tensors_and_sizes(encoder, whole, alone) -> None:
    model = SegmentAnything(SegmentAnythingConfig(family="efficientsam", encoder=encoder))
    assert len(model.state_dict()) == 278
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == whole
    assert round(sum(p.numel() for p in model.image_encoder.parameters()) / 1e6, 2) == alone


# --- the student as image encoder ---


@torch.no_grad()
def test_the_image_encoder_is_timms_vit_with_positions_resized_as_published() -> None:
    """At 224 pixels, with SAM's neck taken off: timm's blocks on the cells alone. Larger: bicubic, without antialiasing."""
    model = tiny("efficientsam", depth=12, image_size=224)
    student = create_encoder("vit_t")
    load_student(model, export_encoder(student, head=False), "the student")
    pixels, encoder = torch.randn(2, 3, 224, 224), model.image_encoder
    tokens = student.patch_embed(pixels) + student.pos_embed[:, 1:]
    for block in student.blocks:
        tokens = block(tokens)
    expected = encoder.neck(tokens.transpose(1, 2).unflatten(2, (14, 14)))
    torch.testing.assert_close(model.encode(pixels), expected, atol=1e-5, rtol=1e-4)
    square = student.pos_embed[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(encoder.positions(64), F.interpolate(square, (64, 64), mode="bicubic"))


def test_a_student_of_another_size_is_refused() -> None:
    with pytest.raises(SamiCacheError, match=r"the student does not fit: .* of another shape"):
        load_student(tiny("sam", depth=12), export_encoder(create_encoder("vit_s"), head=False), "the student")
    with pytest.raises(SamiCacheError, match="a heap is no vit_t: it has no pos_embed"):
        load_student(tiny("sam"), {}, "a heap")


# --- files ---


@pytest.mark.parametrize("family", ["sam", "efficientsam"])
def test_a_saved_model_comes_back_bit_by_bit(tmp_path, family) -> None:
    model = tiny(family)
    save_segment_anything(model, tmp_path / "model.pt")
    assert torch.load(tmp_path / "model.pt").keys() == {"model", "image_size"}
    again = load_segment_anything(tmp_path / "model.pt")
    assert again.config == model.config
    assert load_segment_anything(tmp_path / "model.pt", image_size=2 * SIZE).config.image_size == 2 * SIZE
    assert not again.training
    for (name, before), (_, after) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(before, after), name


def test_metas_file_is_read_and_written_under_metas_names(tmp_path) -> None:
    from segment_anything import sam_model_registry

    torch.manual_seed(1)
    theirs = sam_model_registry["vit_b"]()
    torch.save(theirs.state_dict(), tmp_path / "sam_vit_b.pth")
    ours = load_segment_anything(tmp_path / "sam_vit_b.pth")
    assert ours.config == SegmentAnythingConfig(family="sam", encoder="sam_vit_b")
    save_segment_anything(ours, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth")["model"]
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in theirs.state_dict().items())


def test_hugging_faces_names_of_the_whole_model_become_ours() -> None:
    from transformers import SamConfig, SamModel

    with torch.device("meta"):
        theirs = SamModel(SamConfig())
        ours = SegmentAnything(SegmentAnythingConfig(family="sam", encoder="sam_vit_b"))
    renamed = segment_anything_state(dict(theirs.state_dict()))
    expected = {name: value.shape for name, value in ours.state_dict().items()}
    assert {name: value.shape for name, value in renamed.items()} == expected


def test_what_is_no_promptable_model_is_refused(tmp_path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(SamiCacheError, match=r"other\.pt holds no whole promptable model: expected .*, found weight"):
        load_segment_anything(tmp_path / "other.pt")
    save_segment_anything(tiny("sam"), tmp_path / "sam.pt")
    with pytest.raises(SamiCacheError, match="is not of family efficientsam"):
        load_decoder(tiny("efficientsam"), tmp_path / "sam.pt")


# --- pictures and prompts ---


@pytest.mark.parametrize(("height", "width"), [(300, 400), (517, 200), (3, 900)])
def test_sams_preprocessing_and_way_back_are_segment_anythings(height, width) -> None:
    from segment_anything import SamPredictor, sam_model_registry
    from segment_anything.modeling import Sam

    class Nothing(torch.nn.Module):
        img_size = SIZE

        def forward(self, pixels):
            return pixels

    assert sam_model_registry
    reference = SamPredictor(Sam(Nothing(), None, None))  # type: ignore[arg-type]
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    reference.set_image(picture)
    model = tiny("sam")
    torch.testing.assert_close(model.preprocess(picture)[None], reference.features)
    points = np.array([[10.5, 3.0], [width - 1, height - 1]])
    moved = model.to_input(torch.from_numpy(points), height, width).numpy()
    np.testing.assert_allclose(moved, reference.transform.apply_coords(points, (height, width)))
    logits = torch.randn(2, 3, 64, 64)
    expected = reference.model.postprocess_masks(logits, reference.input_size, reference.original_size)
    torch.testing.assert_close(model.to_picture(logits, height, width), expected)


def test_efficientsam_squashes_without_antialiasing() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    model = tiny("efficientsam")
    unit = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    expected = F.interpolate(unit, (SIZE, SIZE), mode="bilinear")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (expected - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(model.preprocess(picture)[None], expected)
    logits = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.to_picture(logits, 300, 500), F.interpolate(logits, (300, 500), mode="bicubic"))


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        tiny("sam").preprocess(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match=r"expected \[B, 3, 256, 256\]"):
        tiny("sam").encode(torch.zeros(1, 3, 224, 224))
    with pytest.raises(SamiCacheError, match="7 points in a query"):
        tiny("efficientsam").complete_prompts(*some_prompts(1, 1, 7))
    model = tiny("efficientsam")
    with pytest.raises(SamiCacheError, match="takes no mask as a prompt"):
        model.decode(embeddings(1), *model.complete_prompts(*some_prompts(1, 1, 1)), masks=torch.zeros(1, 1, 1, 64, 64))
    assert tiny("sam").covered(1, 900) == (1, 256), "a picture one row high is one row high"
    for change, text in (
        ({"family": "mobile"}, "family"),
        ({"encoder": "vit_x"}, "encoder"),
        ({"image_size": 100}, "image_size"),
    ):
        with pytest.raises(SamiCacheError, match=f"{text} is"):
            SegmentAnythingConfig(**change)
