"""The two-layer MLP that turns patch features into image tokens of the decoder's width (Liu et al. 2023, LLaVA-1.5)."""

from torch import Tensor, nn

from minivlm.ops.activations import ACTIVATIONS


class MLPProjector(nn.Module):
    """linear_2(act(linear_1(x))). in_width is the encoder's width times the number of tapped layers."""

    def __init__(self, in_width: int, out_width: int, activation: str, bias: bool):
        super().__init__()
        self.linear_1 = nn.Linear(in_width, out_width, bias=bias)
        self.activation = ACTIVATIONS[activation]
        self.linear_2 = nn.Linear(out_width, out_width, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """features [N, P, in_width] -> image tokens before packing [N, P, D]."""
        return self.linear_2(self.activation(self.linear_1(features)))
