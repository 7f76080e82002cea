import numpy as np
import pytest
import timm
import torch
from torch import nn

from sami_cache.errors import SamiCacheError
from sami_cache.losses import feature_loss
from sami_cache.models.students import (
    SAMI,
    STUDENTS,
    count_kept,
    count_reconstructed,
    create_encoder,
    export_encoder,
    patch_targets,
    sincos_positions,
)

TOKENS, KEPT, CHANNELS = 196, 49, 12


def tiny(keys_values="visible+mask", *, depth=2, seed=0) -> SAMI:
    torch.manual_seed(seed)
    encoder = create_encoder("vit_t", depth=depth, embed_dim=48, num_heads=3)
    return SAMI(
        encoder, target_channels=CHANNELS, decoder_width=32, decoder_depth=2, decoder_heads=4, keys_values=keys_values
    ).eval()


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ids_shuffle():
    generator = torch.Generator().manual_seed(2)
    return torch.stack([torch.randperm(TOKENS, generator=generator) for _ in range(2)])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def one_thread():
    """Models this small are many times faster on one, most of all where other work shares the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def change_patch(pixels, image, token):
    changed = pixels.clone()
    row, column = divmod(int(token), 14)
    changed[image, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 3
    return changed


def test_mask_is_true_where_removed(pixels, ids_shuffle):
    output = tiny()(pixels, ids_shuffle, 0.75)
    assert output.prediction.shape == (2, TOKENS, CHANNELS)
    for image in range(2):
        assert set(output.mask[image].nonzero().flatten().tolist()) == set(ids_shuffle[image, KEPT:].tolist())


def test_masked_pixel_changes_nothing_visible_pixel_does(pixels, ids_shuffle):
    model = tiny()
    before = model.encode(pixels, ids_shuffle[:, :KEPT])
    reference = model(pixels, ids_shuffle, 0.75).prediction
    mask = model(pixels, ids_shuffle, 0.75).mask
    masked, visible = mask[0].nonzero()[0], (~mask[0]).nonzero()[0]
    changed = change_patch(pixels, 0, masked)
    assert torch.equal(model.encode(changed, ids_shuffle[:, :KEPT]), before)
    assert torch.equal(model(changed, ids_shuffle, 0.75).prediction, reference)
    changed = change_patch(pixels, 0, visible)
    assert not torch.equal(model.encode(changed, ids_shuffle[:, :KEPT])[0], before[0])
    assert torch.equal(model(changed, ids_shuffle, 0.75).prediction[1], reference[1])


@pytest.mark.parametrize("keys_values", ["visible+mask", "visible"])
def test_visible_tokens_bypass_the_decoder(pixels, ids_shuffle, keys_values):
    model = tiny(keys_values)
    before = model(pixels, ids_shuffle, 0.75)
    with torch.enable_grad():
        output = model(pixels, ids_shuffle, 0.75)
        output.prediction[~output.mask].square().sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.decoder_blocks.parameters())
    assert model.mask_token.grad is None or not model.mask_token.grad.any()
    assert all(parameter.grad.any() for name, parameter in model.encoder.named_parameters() if not name.endswith("qkv.bias"))
    for parameter in (*model.decoder_blocks.parameters(), model.mask_token):
        parameter.add_(torch.randn_like(parameter))
    after = model(pixels, ids_shuffle, 0.75)
    assert torch.equal(after.prediction[~after.mask], before.prediction[~before.mask])
    assert (after.prediction[after.mask] != before.prediction[before.mask]).any(dim=-1).all()


def test_ids_restore_puts_every_token_in_its_place(pixels, ids_shuffle):
    """Every part between the position embeddings and the prediction made the identity: a token must predict its own number."""
    model = tiny()
    number = torch.arange(TOKENS, dtype=torch.float32)[None, :, None] + 1
    model.encoder.patch_embed.proj.weight.zero_()
    model.encoder.patch_embed.proj.bias.zero_()
    model.encoder.pos_embed[:, 1:] = number
    model.encoder.blocks, model.encoder.norm, model.decoder_norm = nn.Identity(), nn.Identity(), nn.Identity()
    nn.init.constant_(model.decoder_embed.weight, 1 / 48)
    nn.init.zeros_(model.decoder_embed.bias)
    model.decoder_positions.copy_(number.expand(-1, -1, 32))
    model.mask_token.zero_()
    for block in model.decoder_blocks:
        for layer in (block.out, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    nn.init.constant_(model.head.weight, 1 / 32)
    nn.init.zeros_(model.head.bias)
    prediction = model(pixels, ids_shuffle, 0.75).prediction
    torch.testing.assert_close(prediction, number.expand(2, -1, CHANNELS))


def test_partial_reconstruction_decodes_the_first_masked_tokens_alone(pixels, ids_shuffle):
    decoded = KEPT + 36  # a quarter of the 147
    for keys_values in ("visible", "visible+mask"):
        model = tiny(keys_values)
        everything, part = model(pixels, ids_shuffle, 0.75), model(pixels, ids_shuffle, 0.75, 0.25)
        assert torch.equal(part.ids, ids_shuffle[:, :decoded].sort(dim=1)[0])
        assert torch.equal(part.mask, everything.mask.gather(1, part.ids))
        assert part.mask.sum(1).tolist() == [36, 36]
        same = everything.prediction.gather(1, part.ids[..., None].expand(-1, -1, CHANNELS))
        torch.testing.assert_close(part.prediction[~part.mask], same[~part.mask])
        # Masked tokens that do not see each other cannot tell how many they are.
        alike = torch.allclose(part.prediction[part.mask], same[part.mask], atol=1e-5)
        assert alike is (keys_values == "visible")
        other = ids_shuffle.clone()
        other[:, decoded:] = other[:, decoded:].flip(1)
        assert torch.equal(model(pixels, other, 0.75, 0.25).prediction, part.prediction)


@pytest.mark.parametrize("reconstruct", [1.0, 0.25])
def test_loss_equals_a_decoder_written_token_by_token(pixels, ids_shuffle, reconstruct):
    """Every image on its own, tokens put into their places one at a time, the loss summed in a loop."""
    model, target = tiny(), torch.randn(2, TOKENS, CHANNELS)
    prediction, mask, ids = model(pixels, ids_shuffle, 0.75, reconstruct)
    assert reconstruct < 1 or torch.equal(ids, torch.arange(TOKENS).expand(2, -1))
    got = feature_loss(prediction, target.gather(1, ids[..., None].expand(-1, -1, CHANNELS)), mask)
    errors = []
    for image in range(2):
        order = ids_shuffle[image].tolist()
        kept, hidden = order[:KEPT], order[KEPT : KEPT + (147 if reconstruct == 1 else 36)]
        encoded = model.encode(pixels[image : image + 1], torch.tensor([kept]))
        projected = model.decoder_embed(encoded)
        places = model.decoder_positions[0]
        visible = torch.cat([projected[0, :1], projected[0, 1:] + places[kept]])[None]
        queries = model.mask_token + places[hidden]
        for block in model.decoder_blocks:
            queries = block(queries, visible)
        for token, value in [*zip(kept, projected[0, 1:], strict=True), *zip(hidden, queries[0], strict=True)]:
            errors.append((model.head(model.decoder_norm(value)) - target[image, token]).square().mean())
    torch.testing.assert_close(got["loss"], torch.stack(errors).mean(), rtol=1e-5, atol=1e-6)


def test_count_reconstructed():
    assert [count_reconstructed(147, share) for share in (1.0, 0.5, 0.25, 1 / 147)] == [147, 73, 36, 1]
    for share in (-0.1, 0, 0.006, 1.01):
        with pytest.raises(SamiCacheError, match=r"of 147 masked tokens: take a share between 0\.0068 and 1"):
            count_reconstructed(147, share)


@pytest.mark.parametrize(("keys_values", "attends"), [("visible", False), ("visible+mask", True)])
def test_who_attends_to_the_mask_tokens(keys_values, attends):
    block = tiny(keys_values).decoder_blocks[0]
    masked, visible = torch.randn(1, 6, 32), torch.randn(1, 4, 32)
    before = block(masked, visible)
    masked[:, 1:] += torch.randn(5, 32)
    assert torch.allclose(block(masked, visible)[:, 0], before[:, 0], atol=1e-6) is not attends
    visible[:, 0] += torch.randn(32)  # the class token is a key in both
    assert not torch.allclose(block(masked, visible)[:, 0], before[:, 0], atol=1e-4)


def test_cross_attention_equals_torch_multi_head_attention():
    block = tiny().decoder_blocks[0]
    reference = nn.MultiheadAttention(32, 4, batch_first=True)
    reference.in_proj_weight.copy_(torch.cat([block.query.weight, block.key_value.weight]))
    reference.in_proj_bias.copy_(torch.cat([block.query.bias, block.key_value.bias]))
    reference.out_proj.load_state_dict(block.out.state_dict())
    masked, visible = torch.randn(2, 6, 32), torch.randn(2, 4, 32)
    queries = block.norm_masked(masked)
    context = torch.cat([block.norm_visible(visible), queries], dim=1)
    attended = masked + reference(queries, context, context)[0]
    torch.testing.assert_close(block(masked, visible), attended + block.mlp(block.norm_mlp(attended)), atol=1e-5, rtol=1e-5)


def test_random_weights_come_from_the_callers_seed():
    first, same, other = (tiny(seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert "decoder_positions" not in first


def test_compiles_into_one_graph(pixels, ids_shuffle):
    model = tiny()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixels, ids_shuffle, 0.75).prediction, model(pixels, ids_shuffle, 0.75).prediction)


def test_trains_under_bfloat16(pixels, ids_shuffle):
    with torch.autocast("cpu", torch.bfloat16):
        output = tiny()(pixels, ids_shuffle, 0.75)
        loss = feature_loss(output.prediction, torch.randn(2, TOKENS, CHANNELS), output.mask)["loss"]
    assert loss.dtype == torch.float32
    exact = tiny()(pixels, ids_shuffle, 0.75).prediction
    assert (output.prediction.float() - exact).square().mean() < 1e-3 * exact.square().mean()


@pytest.mark.parametrize("keys_values", ["visible+mask", "visible"])
@pytest.mark.usefixtures("one_thread")
def test_overfits_eight_images(keys_values):
    """Below 5 % of where it started, and of what predicting zero would leave."""
    torch.manual_seed(0)
    model = SAMI(
        create_encoder("vit_t", depth=2, embed_dim=64, num_heads=2, img_size=96),
        target_channels=CHANNELS,
        decoder_width=64,
        decoder_depth=2,
        decoder_heads=4,
        keys_values=keys_values,
    )
    images = torch.randn(8, 3, 96, 96)
    # Each image's own mixture of six maps over the grid, in six directions of feature space.
    target = torch.einsum("bk,nk,kc->bnc", torch.randn(8, 6), torch.randn(36, 6), torch.randn(6, CHANNELS)) / 6**0.5
    ids = torch.stack([torch.randperm(36) for _ in range(8)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, goal = [], 0.0
    with torch.enable_grad():
        for _ in range(800):
            output = model(images, ids, 0.75)
            loss = feature_loss(output.prediction, target, output.mask)["loss"]
            losses.append(loss.item())
            goal = 0.05 * min(losses[0], target.square().mean().item())
            if losses[-1] < goal:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[-1] < goal, losses[::40]


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("tokens", ["all", "masked"])
def test_loss_equals_a_plain_loop(kind, tokens):
    generator = np.random.default_rng(0)
    prediction, target = generator.normal(size=(2, 3, 5, 4)).astype(np.float32)
    mask = generator.random((3, 5)) < 0.6
    every = {"all": [], "visible": [], "masked": []}
    for image in range(3):
        for token in range(5):
            p, t = prediction[image, token].astype(np.float64), target[image, token].astype(np.float64)
            value = ((p - t) ** 2).mean() if kind == "mse" else 1 - p @ t / np.sqrt((p @ p) * (t @ t))
            every["all"].append(value)
            every["masked" if mask[image, token] else "visible"].append(value)
    got = feature_loss(*map(torch.from_numpy, (prediction, target, mask)), kind=kind, tokens=tokens)
    assert got["loss"].item() == pytest.approx(np.mean(every[tokens]), rel=1e-5)
    assert got["loss_visible"].item() == pytest.approx(np.mean(every["visible"]), rel=1e-5)
    assert got["loss_masked"].item() == pytest.approx(np.mean(every["masked"]), rel=1e-5)


def test_loss_names_shapes_and_options():
    target, mask = torch.zeros(1, 4, 2), torch.zeros(1, 4, dtype=torch.bool)
    with pytest.raises(SamiCacheError, match=r"prediction \(1, 4, 3\), target \(1, 4, 2\)"):
        feature_loss(torch.zeros(1, 4, 3), target, mask)
    with pytest.raises(SamiCacheError, match="expected 'mse' or 'cosine'"):
        feature_loss(target, target, mask, kind="l1")  # type: ignore[arg-type]


@pytest.mark.parametrize("student", ["vit_t", "vit_s"])
def test_export_loads_strictly_into_stock_timm(student):
    encoder = create_encoder(student)
    if student != "vit_t":  # running the smallest is enough
        timm.create_model(STUDENTS[student]).load_state_dict(export_encoder(encoder), strict=True)
        return
    stock = timm.create_model(STUDENTS[student]).eval()
    stock.load_state_dict(export_encoder(encoder), strict=True)
    bare = timm.create_model(STUDENTS[student], num_classes=0).eval()
    bare.load_state_dict(export_encoder(encoder, head=False), strict=True)
    image = torch.randn(1, 3, 224, 224)
    features = encoder.eval().forward_features(image)
    assert torch.equal(stock.forward_features(image), features)
    assert torch.equal(bare(image), features[:, 0])
    assert torch.equal(stock.head.weight, export_encoder(encoder)["head.weight"])
    assert 0.019 < stock.head.weight.std() < 0.021
    assert not stock.head.bias.any()


def test_encoder_equals_stock_timm_on_all_tokens(pixels):
    model = tiny()
    everything = torch.arange(TOKENS).expand(2, -1)
    torch.testing.assert_close(model.encode(pixels, everything), model.encoder.forward_features(pixels))


def test_count_kept():
    assert [count_kept(196, ratio) for ratio in (0.5, 0.75, 0.85, 0.9)] == [98, 49, 29, 19]
    assert count_kept(10, 0.9) == 1
    for ratio in (-0.1, 0, 1, 0.999):
        with pytest.raises(SamiCacheError, match="tokens visible: take one between"):
            count_kept(196, ratio)


def test_patch_targets_equal_mae():
    pixels = torch.rand(2, 3, 32, 48)
    got = patch_targets(pixels)
    assert got.shape == (2, 6, 768)
    patch = pixels[1, :, 16:32, 16:32].permute(1, 2, 0).reshape(-1)  # row 1, column 1: token 4
    torch.testing.assert_close(got[1, 4], (patch - patch.mean()) / (patch.var() + 1e-6).sqrt())
    # As MAE says: brightness and contrast do not matter.
    torch.testing.assert_close(patch_targets(pixels * 4 - 1), got, atol=1e-4, rtol=1e-4)
    with pytest.raises(SamiCacheError, match="33 x 48 pixels cannot be cut into patches of 16"):
        patch_targets(torch.rand(1, 3, 33, 48))


def test_sincos_positions_equal_mae():
    """The formula as facebookresearch/mae, util/pos_embed.py, has it."""
    width, rows, columns = 16, 3, 5

    def one_dimension(places):
        omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
        out = np.einsum("m,d->md", places.reshape(-1), omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    grid = np.stack(np.meshgrid(np.arange(columns, dtype=np.float32), np.arange(rows, dtype=np.float32)), axis=0)
    expected = np.concatenate([one_dimension(grid[0]), one_dimension(grid[1])], axis=1)
    np.testing.assert_allclose(sincos_positions(width, (rows, columns)).numpy(), expected, atol=1e-6)


def test_errors_name_the_fix():
    with pytest.raises(SamiCacheError, match="expected one of vit_t, vit_s, vit_b"):
        create_encoder("vit_x")
    encoder = create_encoder("vit_t", depth=1, embed_dim=48, num_heads=3)
    with pytest.raises(SamiCacheError, match="multiple of 4 and of decoder_heads"):
        SAMI(encoder, target_channels=4, decoder_width=30)
    with pytest.raises(SamiCacheError, match="expected 'visible\\+mask'"):
        SAMI(encoder, target_channels=4, keys_values="all")  # type: ignore[arg-type]
