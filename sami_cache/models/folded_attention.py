"""The mask decoder's attention between a few tokens and a whole image, with the image's projections folded into the tokens.

In a two-way block (arXiv 2304.02643, appendix A) a dozen tokens look at 4096 places of the image, and these at them. The plain
way projects all places to queries, keys or values: 256 x 128 multiplications each. But (W x) . q = x . (W^T q), so the
projection can be done to the tokens instead, once a head, and the places are only multiplied with what comes out:

- tokens to image: score = x . (Wk^T q) + bk . q. Then sum the places, and project the sum to the values: Wv (sum of a x) + bv,
  as the a of a token sum to 1.
- image to tokens: score = x . (Wq^T k) + bq . k, and out = sum of a (Wo v) + bo, with Wo v made once a token and head.

For a place that is 8 x tokens x 256 instead of 256 x 128 + 128 x tokens multiplications, half of them for the seven tokens of a
click, and nothing as long as the image is written to memory on the way but the result. The answer is the same but for the
rounding of float32.
"""

import torch
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn


class FoldedAttention(Attention):
    """`Attention` of segment-anything, with its parameters and its answers, made for few tokens against many places."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries [N, Q, C], keys and values [N, K, C] -> [N, Q, C]."""
        tokens, places = sorted((q.shape[1], k.shape[1]))
        if self.num_heads * tokens > self.internal_dim or places < 2 * tokens:
            return super().forward(q, k, v)  # so many prompts, or so small an image, that folding is no less work
        return self._to_image(q, k, v) if q.shape[1] == tokens else self._to_tokens(q, k, v)

    def _to_image(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        folded, bias = self._fold(self.q_proj(tokens), self.k_proj)
        weights = torch.baddbmm(bias, folded, keys.transpose(1, 2)).softmax(dim=-1)
        seen = (weights @ values).unflatten(1, (self.num_heads, -1))
        out = torch.einsum("nhtc,hdc->nthd", seen, self._of_heads(self.v_proj.weight)).flatten(2)
        return self.out_proj(out + self.v_proj.bias)

    def _to_tokens(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        folded, bias = self._fold(self.k_proj(keys), self.q_proj)
        scores = torch.baddbmm(bias, folded, queries.transpose(1, 2)).unflatten(1, (self.num_heads, -1))
        # Places last: a softmax along a dimension of seven is many times slower.
        weights = scores.softmax(dim=2).flatten(1, 2)
        heads = self.v_proj(values).unflatten(-1, (self.num_heads, -1))
        summands = torch.einsum("nthd,chd->nhtc", heads, self.out_proj.weight.unflatten(1, (self.num_heads, -1))).flatten(1, 2)
        return torch.baddbmm(self.out_proj.bias, weights.transpose(1, 2), summands)

    def _fold(self, tokens: Tensor, projection: nn.Linear) -> tuple[Tensor, Tensor]:
        """What projected places score with tokens [N, T, internal], as a function of the places themselves.

        Returns [N, heads x T, C], to be multiplied with a place, and [N, heads x T, 1], to be added. The latter is the same for
        all places; where the softmax is over these, it stays so that the bias has a gradient, 0, as plain attention gives it.
        """
        heads = tokens.unflatten(-1, (self.num_heads, -1)) * (self.internal_dim // self.num_heads) ** -0.5
        factor = torch.einsum("nthd,hdc->nhtc", heads, self._of_heads(projection.weight))
        summand = torch.einsum("nthd,hd->nht", heads, self._of_heads(projection.bias))
        return factor.flatten(1, 2), summand.flatten(1, 2)[..., None]

    def _of_heads(self, parameter: Tensor) -> Tensor:
        """[internal, ...] -> [heads, internal / heads, ...]."""
        return parameter.unflatten(0, (self.num_heads, -1))


def fold_attention(transformer: nn.Module) -> None:
    """Make the attention between tokens and image in a two-way transformer, segment-anything's or ours, a `FoldedAttention`.

    Its parameters stay the same objects under the same names.
    """
    for name, module in list(transformer.named_modules()):
        if isinstance(module, Attention) and name.endswith(("token_to_image", "image_to_token")):
            with torch.device("meta"):  # draws no random numbers
                folded = FoldedAttention(module.embedding_dim, module.num_heads, module.embedding_dim // module.internal_dim)
            folded.load_state_dict(module.state_dict(keep_vars=True), assign=True)
            parent, _, child = name.rpartition(".")
            setattr(transformer.get_submodule(parent), child, folded)
