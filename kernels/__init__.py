"""The operations that carry all four methods, each in plain PyTorch and as Triton GPU kernels.

`cross_attention`: attention between few learned tokens and many feature tokens.
`few_token_attention`: the same with its LayerNorms and projections, which never projects the long
side. `cosine_map` and `cosine_loss`: the cosine distance between teacher and student features, as
an anomaly map and as a training loss. On CUDA tensors the kernels run, elsewhere plain PyTorch;
`set_backend` changes that for the whole process. Start with kernels/README.md.
"""

from .backend import set_backend
from .cosine_map import cosine_loss, cosine_map
from .cross_attention import cross_attention
from .few_tokens import few_token_attention

__all__ = ["cosine_loss", "cosine_map", "cross_attention", "few_token_attention", "set_backend"]
