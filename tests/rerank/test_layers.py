"""The parts of fusions, against sums written out and torch's own."""

import pytest
import torch

from mmsearch.rerank.layers import Logit, PatchAttention


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(left, right):
    return torch.allclose(left, right, rtol=0.0, atol=1e-5)


def test_a_logit_is_summed_in_single_precision():
    """Half precision in, no rounding on the way: near logits are not tied."""
    last, features = Logit(64), draw(5, 64).to(torch.bfloat16)
    assert close(last(features), (features.double() @ last.weight.double()).float())


@pytest.mark.parametrize("few", [False, True])
def test_patch_attention_is_ordinary_attention(few):
    """Against torch's own with keys and values made for each patch, in either order of the products."""
    own = PatchAttention(8, patch_width=10, heads=2, dropout=0.0)
    theirs = torch.nn.MultiheadAttention(8, 2, kdim=10, vdim=10, batch_first=True)
    with torch.no_grad():
        theirs.q_proj_weight.copy_(own.query.weight)
        theirs.k_proj_weight.copy_(own.key.weight)
        theirs.v_proj_weight.copy_(own.value.weight)
        theirs.in_proj_bias.copy_(torch.cat([own.query.bias, draw(8), own.value.bias]))  # any bias of keys
        theirs.out_proj.load_state_dict(own.out.state_dict())
    words, patches = draw(3, 4, 8), draw(3, 9, 10)
    read, weights = own(words, patches, few=few)
    wanted, shares = theirs(words, patches, patches, average_attn_weights=False)
    assert close(read, wanted) and close(weights, shares)
