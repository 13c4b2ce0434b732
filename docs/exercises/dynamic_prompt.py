"""OneNIP's Eq. 3: features and prompt attend to each other.

Both are (B, N, D). The prompt reads the features first, and the features then read the prompt as it
is *now*; after each attention the residual and a norm, and on the prompt's side an MLP with its own:

    p <- norm1(p + prompt_attention(query p + pos, key x + pos, value x))
    p <- norm2(p + mlp(p))
    x <- norm3(x + feature_attention(query x + pos, key p + pos, value p))

Both attentions respect the neighbour mask, `window`. The first public version of the authors' code
took the second line's output of the MLP in the third line, too, in the place of the attention:
m = mlp(p), p <- norm2(p + m), x <- norm3(x + m). The published numbers are of that version.
"""

import torch

import onenip

RETURNS = "p", "x"


def dynamic_prompt(block, p, x, pos, window):
    """block: has norm1, norm2, norm3, mlp, and prompt_attention and feature_attention, each called
    with (query, key, value, window). p, x (B, N, D), pos (N, D) -> the new p and x."""
    ...


# ------------------------------------------------------------------------------------ the checker


def reference(block, p, x, pos, window):
    return block(p, x, pos, window)


def cases():
    torch.manual_seed(0)
    args = onenip.Args(hidden=16, heads=2, mlp=32, dropout=0.0)
    block = onenip.DynamicBlock(args).eval()
    p, x = torch.randn(2, 2, 9, 16)
    pos = torch.rand(9, 16)
    for tensor in (p, x, pos):
        tensor.requires_grad_()
    p, x = p.detach().requires_grad_(), x.detach().requires_grad_()
    yield "nothing is forbidden but oneself", (block, p, x, pos, (3, 3, 0))
    yield "the neighbour mask", (block, p, x, pos, (3, 3, 1))
