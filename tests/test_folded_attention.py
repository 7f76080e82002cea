"""The mask decoder's folded attention against segment-anything's plain one."""

import pytest
import torch
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.transformer import Attention

from sami_cache.models.folded_attention import FoldedAttention, fold_attention

PLACES = 144


def plain_and_folded() -> tuple[TwoWayTransformer, TwoWayTransformer]:
    torch.manual_seed(0)
    plain = TwoWayTransformer(depth=2, embedding_dim=64, num_heads=4, mlp_dim=128)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folded = TwoWayTransformer(depth=2, embedding_dim=64, num_heads=4, mlp_dim=128)
    fold_attention(folded)
    folded.load_state_dict(plain.state_dict())
    return plain, folded


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 100])  # 4 heads of 8: folded up to 8 tokens
def test_answers_and_gradients_are_those_of_segment_anything(tokens, monkeypatch) -> None:
    plain, folded = plain_and_folded()
    unfolded = []
    monkeypatch.setattr(Attention, "forward", counted(Attention.forward, unfolded))
    image, places, prompts = torch.randn(2, 64, 12, 12), torch.randn(2, 64, 12, 12), torch.randn(2, tokens, 64)
    found = []
    for model in (plain, folded):
        unfolded.clear()
        inputs = image.clone().requires_grad_(), places, prompts.clone().requires_grad_()
        queries, keys = model(*inputs)
        (queries.square().mean() + keys.square().mean()).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append((queries, keys, inputs[0].grad, inputs[2].grad, gradients))
    # The two layers' attention among tokens is never folded, the five to and from the image are.
    assert len(unfolded) == (2 if tokens <= 8 else 7)
    for theirs, ours in zip(found[0][:4], found[1][:4], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    for name, gradient in found[0][4].items():
        torch.testing.assert_close(found[1][4][name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def counted(forward, calls):
    def call(self, q, k, v):
        calls.append(self)
        return forward(self, q, k, v)

    return call


def test_parameters_and_random_numbers_stay_what_they_were() -> None:
    torch.manual_seed(0)
    plain = TwoWayTransformer(depth=2, embedding_dim=64, num_heads=4, mlp_dim=128)
    before, state = dict(plain.named_parameters()), torch.get_rng_state()
    fold_attention(plain)
    assert torch.equal(torch.get_rng_state(), state)
    after = dict(plain.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert sum(isinstance(module, FoldedAttention) for module in plain.modules()) == 5
