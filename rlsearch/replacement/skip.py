"""The block `skip`: the control that leaves a unit out."""

from __future__ import annotations

from torch import Tensor, nn


class Skip(nn.Module):
    """Stands for a unit that was replaced by nothing: its input is its output.

    Args:
        returns_pair: whether the unit gives a tuple of the output and None, as ``nn.MultiheadAttention`` does.
    """

    def __init__(self, returns_pair: bool = False) -> None:
        super().__init__()
        self.returns_pair = returns_pair

    def forward(self, x: Tensor, *_args: object, **_kwargs: object) -> Tensor | tuple[Tensor, None]:
        """(N, …) to the same; further arguments, of an attention, play no part."""
        return (x, None) if self.returns_pair else x
