"""AdaIN: the norm whose scale and offset somebody else decides.

    y = γ (x - mean) / sqrt(variance + 1e-5) + β

Mean and variance are those of each image and channel, over its positions (variance: divided by h w,
not by h w - 1). In ROADS γ and β of each image come from the adapter, which has seen the whole image.
"""

import torch

import roads


def adain(x, gamma, beta):
    """x (B, C, h, w), gamma and beta (B, C) -> (B, C, h, w)."""
    ...


# ------------------------------------------------------------------------------------ the checker


def reference(x, gamma, beta):
    return roads.AdaIN(x.shape[1], learned=False)(x, torch.stack([gamma, beta], dim=1))


def cases():
    torch.manual_seed(0)
    x = 2 + 3 * torch.randn(3, 4, 2, 5)
    ones, zeros = torch.ones(3, 4), torch.zeros(3, 4)
    yield "γ = 1, β = 0: instance norm", (x, ones, zeros)
    x.requires_grad_()
    gamma, beta = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4).requires_grad_()
    yield "γ and β of each image", (x, gamma, beta)
