"""The anomaly map of reverse distillation.

Of each scale, how far teacher and student point in different directions, at each place; resized to
the image, and summed over the scales:

    M = sum over scales of resize(1 - cos(teacher, student) along the channels)

Resize the distance, not the features: bilinear, `align_corners=True`.
"""

import torch

import kernels


def cosine_map(teachers, students, size):
    """Lists of maps (B, C, h, w), each scale with its own C, h, w -> (B, size, size)."""
    ...


# ------------------------------------------------------------------------------------ the checker


def reference(teachers, students, size):
    return kernels.cosine_map(teachers, students, size, backend="torch")


def cases():
    torch.manual_seed(0)
    shapes = (2, 8, 8, 8), (2, 16, 4, 4), (2, 32, 2, 2)
    teachers = [torch.randn(shape) for shape in shapes]
    students = [0.5 * teacher + torch.randn_like(teacher) for teacher in teachers]
    yield "one scale, already of the map's size", (teachers[:1], students[:1], 8)
    yield "one scale, enlarged", (teachers[1:2], students[1:2], 16)
    yield "three scales", (teachers, students, 16)
    longer = [10 * student for student in students]
    yield "a longer vector in the same direction is no anomaly", (teachers, longer, 16)
