"""The redirector (HGR) of SafeCFG: a small transformer from prompt embeddings to the negative branch of
guidance.

Inspired by SafeCFG (arXiv 2412.16039): that a transformer between text encoder and denoiser replaces the null
text is the paper's [summary]; layers, width and the zero-initialised last layer are a reconstruction (methods
6.4). Knows no denoiser; how it is trained is `safelight.defenses.safe_cfg`.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class Redirector(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Prompt embeddings (N, L, D) -> embeddings of the negative branch (N, L, D).

    null + gate (hidden - null) + moved: a learnt null embedding, a step from it towards or beyond the prompt
    itself, and a free part. Gate (one number a feature and token) and moved are the transformer's answers
    through last layers that start at zero: an untrained redirector, whose null is the empty prompt's
    embedding, is plain classifier-free guidance.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, width: int = 768, window: int = 77, layers: int = 2, heads: int = 4) -> None:
        """`width` D and `window` L are the text encoder's. Raises ValueError where heads do not divide the
        width.
        """
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide the width {width}; got {heads}")
        self.null = nn.Parameter(torch.zeros(window, width))
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(width, heads, width // heads, activation_fn="gelu") for _ in range(layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)
        for last in (self.out, self.gate):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden (N, L, D) -> (N, L, D)."""
        x = self.norm_in(hidden)
        for block in self.blocks:
            x = block(x)
        x = self.norm_out(x)
        redirected: Tensor = self.null + self.gate(x) * (hidden - self.null) + self.out(x)
        return redirected
