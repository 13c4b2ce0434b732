"""CADA's Eq. 5: a map in units of what a normal map of its kind looks like.

    calibrated map = (M - û) / (γ̂ - û)

û and γ̂ are the mean and the maximum that the map of a *normal* image of this kind is expected to have:
0 then is an ordinary place, 1 the worst place of a normal image, in every class. The width γ̂ - û is
predicted, and may come out as nothing, or below: it is at least `floor`.
"""

import torch

import cada


def calibrate(maps, u_hat, gamma_hat, floor):
    """maps (B, S, S), u_hat and gamma_hat (B,), floor: a float above 0 -> (B, S, S)."""
    ...


# ------------------------------------------------------------------------------------ the checker


def reference(maps, u_hat, gamma_hat, floor):
    return cada.calibrate(maps, u_hat, gamma_hat, floor)


def cases():
    torch.manual_seed(0)
    maps = torch.rand(4, 4, 4)
    u_hat, gamma_hat = torch.tensor([0.1, 0.3, 0.2, 0.4]), torch.tensor([0.9, 0.8, 0.6, 0.7])
    yield "four images, each with its own statistics", (maps, u_hat, gamma_hat, 0.05)
    gamma_hat = torch.tensor([0.9, 0.31, 0.1, 0.7])
    yield "a width below the floor, and one below zero", (maps, u_hat, gamma_hat, 0.05)
