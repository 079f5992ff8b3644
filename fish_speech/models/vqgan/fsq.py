"""Grouped finite scalar quantization (Mentzer et al., 2023), with downsampling around it.

Shapes: B batch, D features, T frames before and T' after downsampling, G groups (codebooks),
L levels per group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fish_speech.models.vqgan.firefly import (
    CausalConv1d,
    CausalConvTranspose1d,
    ConvNeXtBlock,
    ConvState,
)


class FiniteScalarQuantizer(nn.Module):
    """One group: a few dimensions, each rounded to one of its levels; codes in mixed radix."""

    def __init__(self, dim: int, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.codebook_size = math.prod(levels)
        self.project_in = nn.Linear(dim, len(levels))
        self.project_out = nn.Linear(len(levels), dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T', dim] -> the quantized x, with straight-through gradients, and codes [B, T']."""
        bounded = self._bound(self._bound(self.project_in(x)))
        rounded = bounded + (bounded.round() - bounded).detach()
        return self._output(rounded), self._codes(rounded.detach())

    def encode(self, x: Tensor) -> Tensor:
        """x [B, T', dim] -> codes [B, T'] (int64); -1 where x is NaN."""
        # Bounded twice: an accident upstream that the published weights were trained with.
        bounded = self._bound(self._bound(self.project_in(x)))
        return self._codes(bounded.round()).where(bounded.isfinite().all(-1), -1)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [B, T'] -> x [B, T', dim]."""
        basis, halves = self._constants(codes.device)
        sizes = codes.new_tensor(self.levels)
        digits = codes[..., None] // basis % sizes
        return self._output((digits - halves).to(self.project_out.weight.dtype))

    def _output(self, rounded: Tensor) -> Tensor:
        return self.project_out(rounded / self._constants(rounded.device)[1])

    def _codes(self, rounded: Tensor) -> Tensor:
        basis, halves = self._constants(rounded.device)
        return ((rounded.round().long() + halves) * basis).sum(-1)

    def _bound(self, z: Tensor) -> Tensor:
        levels = z.new_tensor(self.levels)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        shift = (offset / half).atanh()
        return (z + shift).tanh() * half - offset

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Weights of the digits, the first level fastest, and half of the levels."""
        basis = [math.prod(self.levels[:i]) for i in range(len(self.levels))]
        halves = [level // 2 for level in self.levels]
        return torch.tensor(basis, device=device), torch.tensor(halves, device=device)


class ResidualGroups(nn.Module):
    """Holds the groups under the published name; there is one quantizer (no residue) a group."""

    def __init__(self, dim: int, n_groups: int, levels: Sequence[int]) -> None:
        super().__init__()
        self.rvqs = nn.ModuleList(
            FiniteScalarQuantizer(dim // n_groups, levels) for _ in range(n_groups)
        )


class DownsampleFiniteScalarQuantizer(nn.Module):
    """Features at the mel rate to codes at the frame rate, and back."""

    def __init__(
        self, input_dim: int, n_groups: int, levels: Sequence[int], downsample_factor: Sequence[int]
    ) -> None:
        super().__init__()
        self.residual_fsq = ResidualGroups(input_dim, n_groups, levels)
        self.downsample = nn.Sequential(
            *(
                nn.Sequential(
                    CausalConv1d(input_dim, input_dim, factor, stride=factor),
                    ConvNeXtBlock(input_dim),
                )
                for factor in downsample_factor
            )
        )
        self.upsample = nn.Sequential(
            *(
                nn.Sequential(
                    CausalConvTranspose1d(input_dim, input_dim, factor, factor),
                    ConvNeXtBlock(input_dim),
                )
                for factor in reversed(downsample_factor)
            )
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Training: x [B, D, T] -> quantized [B, D, T'·factor] and codes [B, G, T']."""
        parts = [
            rvq(part) for rvq, part in zip(self.residual_fsq.rvqs, self._groups(x), strict=True)
        ]
        quantized = torch.cat([part for part, _ in parts], dim=-1).transpose(1, 2)
        return self._upsampled(quantized), torch.stack([codes for _, codes in parts], dim=1)

    def encode(self, x: Tensor) -> Tensor:
        """x [B, D, T] -> codes [B, G, T'] (int64)."""
        groups = zip(self.residual_fsq.rvqs, self._groups(x), strict=True)
        return torch.stack([rvq.encode(part) for rvq, part in groups], dim=1)

    def decode(self, codes: Tensor, state: ConvState | None = None) -> Tensor:
        """codes [B, G, T'] -> features [B, D, T'·factor]."""
        groups = zip(self.residual_fsq.rvqs, codes.unbind(1), strict=True)
        quantized = torch.cat([rvq.decode(part) for rvq, part in groups], dim=-1)
        return self._upsampled(quantized.transpose(1, 2), state)

    def _upsampled(self, x: Tensor, state: ConvState | None = None) -> Tensor:
        for up, block in self.upsample:
            x = block(up(x, state), state)
        return x

    def _groups(self, x: Tensor) -> Sequence[Tensor]:
        return self.downsample(x).transpose(1, 2).chunk(len(self.residual_fsq.rvqs), dim=-1)
