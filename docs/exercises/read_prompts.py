"""ROADS's Eq. 1: the prompts read the map.

    ẑ = FFN(LN(MCA(LN(z), LN(F)) + z)) + z

z (B, l, C) the prompts of the image's class, F (B, n, C) the map's positions. Look where the last z
stands: the outer skip starts from z, not from the attention's sum. Eq. 3 is the same formula with
the roles exchanged, so the project has one class for both.
"""

import torch
from torch import nn

import roads


def read_prompts(block, z, positions):
    """block: has attend(z, positions), which is MCA(LN(z), LN(F)), norm (the outer LN) and ffn;
    z (B, l, C), positions (B, n, C) -> ẑ (B, l, C)."""
    ...


# ------------------------------------------------------------------------------------ the checker


def reference(block, z, positions):
    return block(z, positions)


def cases():
    torch.manual_seed(0)
    block = roads.CrossAttentionBlock(16, roads.Args(head_width=8, ffn=2))
    z = torch.randn(2, 3, 16).requires_grad_()
    positions = torch.randn(2, 12, 16).requires_grad_()
    yield "at the start, when the FFN gives zeros", (block, z, positions)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    yield "trained", (block, z, positions)
