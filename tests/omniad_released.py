"""Omni-AD with the global branch of the authors' released code, to measure what its two faults cost.

    python tests/omniad_released.py --data ...      every option of omniad.py

Four things differ from omniad.py, and nothing else:
  1. All tokens start at zero. So the key/value tokens get equal gradients, and stay equal to one another.
  2. A learned bias is added to the attention weights after the softmax. It decays, as there: only one-dimensional
     parameters do not.
  3. The attention's output passes through a random two-layer net instead of a learned matrix. The released code draws
     it anew in every call; here it is drawn once and kept in the checkpoint, so that results can be reproduced.
  4. The global branch adds its input x once more.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import omniad
from common import runtime


class RandomNet(nn.Module):
    """Linear, SiLU, Linear that nobody trains: (..., C) -> (..., C)."""

    def __init__(self, width):
        super().__init__()
        for i in (1, 2):
            linear = nn.Linear(width, width)
            self.register_buffer(f"weight{i}", linear.weight.detach())
            self.register_buffer(f"bias{i}", linear.bias.detach())

    def forward(self, x):
        return F.linear(F.silu(F.linear(x, self.weight1, self.bias1)), self.weight2, self.bias2)


class ReleasedAttention(omniad.TokenAttention):
    def __init__(self, kind, width, args):
        super().__init__(kind, width, args)
        self.to_out = RandomNet(width)
        if kind != "self":
            nn.init.zeros_(self.tokens)
            shape = (args.heads, args.tokens, 1) if kind == "q" else (args.heads, 1, args.tokens)
            self.bias = nn.Parameter(torch.zeros(shape))

    def attend(self, q, k, v):
        """(softmax(scale Q Kᵀ) + bias) V, with the bias' share worked out apart: it is the same for every query ("kv"),
        or for every key ("q")."""
        out = super().attend(q, k, v)
        if self.kind == "self":
            return out
        return out + (self.bias * v.sum(2, keepdim=True) if self.kind == "q" else self.bias @ v)


class ReleasedBlock(omniad.OmniBlock):
    def global_branch(self, x):
        return super().global_branch(x) + x


def main():
    """omniad.py's program, with its two classes exchanged while it runs."""
    own = omniad.TokenAttention, omniad.OmniBlock
    omniad.TokenAttention, omniad.OmniBlock = ReleasedAttention, ReleasedBlock
    try:
        omniad.main("omniad_released")
    finally:
        omniad.TokenAttention, omniad.OmniBlock = own


if __name__ == "__main__":
    runtime.launch(main)
