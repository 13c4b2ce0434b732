"""The loss of reverse distillation: one cosine of each map, or one of each place.

The papers print a cosine at every place, averaged over places and images (flat=False). The released
code flattens an image's whole map into one vector of C h w numbers first (flat=True). That is another
loss: a place with long vectors then weighs more. Both are summed over the scales:

    location   sum over scales of mean over images and places of 1 - cos(f_i, f̂_i) along the channels
    flat       sum over scales of mean over images of 1 - cos(the whole f_i, the whole f̂_i)

The gradients are compared, too. The teacher is a constant: it must get none.
"""

import torch

import kernels


def cosine_loss(teachers, students, flat):
    """Lists of maps (B, C, h, w); flat: True or False -> a scalar tensor."""
    ...


# ------------------------------------------------------------------------------------ the checker


def reference(teachers, students, flat):
    return kernels.cosine_loss(teachers, students, flat=flat, backend="torch")


def cases():
    torch.manual_seed(0)
    shapes = (3, 8, 4, 4), (3, 16, 2, 2)
    teachers = [torch.randn(shape) for shape in shapes]
    for teacher in teachers:
        teacher[:, :, 0] *= 5  # the first row is longer than the others
    students = [(teacher + torch.randn_like(teacher)).requires_grad_() for teacher in teachers]
    yield "one scale, location by location", (teachers[:1], students[:1], False)
    yield "two scales, location by location", (teachers, students, False)
    yield "two scales, flat", (teachers, students, True)
