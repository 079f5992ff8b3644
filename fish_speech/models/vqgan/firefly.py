"""Firefly: a causal ConvNeXt encoder and a causal HiFi-GAN head.

Shapes: B batch, C channels, T frames, N samples. Parameter names are those of the published codec.
Whether a frame's channels or a channel's frames lie side by side in memory is up to the caller.
Both give the same numbers, and the order is kept throughout; a CPU is faster with the first.

A stream is decoded block by block with a `ConvState`; every block equals that stretch of the whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

# The last input columns of every convolution; empty at the beginning of a stream.
ConvState = dict[nn.Module, Tensor]


class CausalConv1d(nn.Module):
    """Padded on the left; on the right only as far as `stride` needs it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(
            in_channels, out_channels, kernel_size, stride, dilation=dilation, groups=groups
        )
        self.stride = stride
        self._left_context = (kernel_size - 1) * dilation + 1 - stride

    def forward(self, x: Tensor, state: ConvState | None = None) -> Tensor:
        """[B, C, T] -> [B, C', ceil(T / stride)]; with `state`, T is a multiple of it."""
        padded = _prepend_state(self, x, self._left_context, state)
        if right := -x.shape[-1] % self.stride:
            padded = F.pad(padded, (0, right))
        conv, weight = self.conv, self.conv.weight[:, :, None]
        return F.conv2d(
            padded, weight, conv.bias, (1, self.stride), 0, (1, *conv.dilation), conv.groups
        )[:, :, 0]


class CausalConvTranspose1d(nn.Module):
    """Upsampling by `stride`; the output of the left context, and what looks ahead, is trimmed."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(in_channels, out_channels, kernel_size, stride)
        self._left_context = math.ceil(kernel_size / stride) - 1

    def forward(self, x: Tensor, state: ConvState | None = None) -> Tensor:
        """[B, C, T] -> [B, C', T * stride]"""
        conv, weight, stride = self.conv, self.conv.weight[:, :, None], self.conv.stride[0]
        begin = 0 if state is None else self._left_context
        end = begin + x.shape[-1]
        x = _prepend_state(self, x, begin, state)
        x = F.conv_transpose2d(x, weight, conv.bias, (1, stride))[:, :, 0]
        return x[..., begin * stride : end * stride]


def _prepend_state(module: nn.Module, x: Tensor, size: int, state: ConvState | None) -> Tensor:
    """x [B, C, T] with `size` columns of left context: [B, C, 1, size + T].

    The context is the module's in `state`, which is updated, or zeros where there is none.
    Images of one row: padding, joining and convolving those keeps the order in memory.
    """
    x = x[:, :, None]
    if size == 0:
        return x
    # Not `torch.cat`: a single frame looks the same in either order, and it would take the wrong.
    order = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    joined = torch.empty(
        *x.shape[:-1], size + x.shape[-1], dtype=x.dtype, device=x.device, memory_format=order
    )
    joined[..., :size] = 0 if state is None else state.get(module, 0)
    joined[..., size:] = x
    if state is not None:
        state[module] = joined[..., -size:].clone()
    return joined


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, T]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, then a pointwise MLP, scaled and added to its input."""

    def __init__(self, channels: int, kernel_size: int = 7) -> None:
        super().__init__()
        self.dwconv = CausalConv1d(channels, channels, kernel_size, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor, state: ConvState | None = None) -> Tensor:  # [B, C, T]
        h = self.norm(self.dwconv(x, state).transpose(1, 2))
        h = self.gamma * self.pwconv2(F.gelu(self.pwconv1(h)))
        return x + h.transpose(1, 2)


class ConvNeXtEncoder(nn.Module):
    """log-mel [B, input_channels, T] -> features [B, dims[-1], T]."""

    def __init__(
        self, input_channels: int, depths: Sequence[int], dims: Sequence[int], kernel_size: int
    ) -> None:
        super().__init__()
        stem = nn.Sequential(
            CausalConv1d(input_channels, dims[0], kernel_size), ChannelsFirstLayerNorm(dims[0])
        )
        between = [
            nn.Sequential(ChannelsFirstLayerNorm(a), nn.Conv1d(a, b, 1))
            for a, b in itertools.pairwise(dims)
        ]
        self.downsample_layers = nn.ModuleList([stem, *between])
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(dim, kernel_size) for _ in range(depth)))
            for dim, depth in zip(dims, depths, strict=True)
        )
        self.norm = ChannelsFirstLayerNorm(dims[-1])

    def forward(self, x: Tensor) -> Tensor:
        for project, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(project(x))
        return self.norm(x)


class ResidualBlock(nn.Module):
    """Pairs of dilated convolutions, each pair added to its input."""

    def __init__(self, channels: int, kernel_size: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.convs1, self.convs2 = (
            nn.ModuleList(
                CausalConv1d(channels, channels, kernel_size, dilation=d) for d in dilations
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor, state: ConvState | None = None) -> Tensor:  # [B, C, N]
        for first, second in zip(self.convs1, self.convs2, strict=True):
            x = second(F.silu(first(F.silu(x), state)), state).add_(x)
        return x


class ParallelBlock(nn.Module):
    """The mean of residual blocks of several kernel sizes."""

    def __init__(
        self, channels: int, kernel_sizes: Sequence[int], dilations: Sequence[Sequence[int]]
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(channels, k, d) for k, d in zip(kernel_sizes, dilations, strict=True)
        )

    def forward(self, x: Tensor, state: ConvState | None = None) -> Tensor:  # [B, C, N]
        total = self.blocks[0](x, state)
        for block in self.blocks[1:]:
            total += block(x, state)
        return total.div_(len(self.blocks))


class HiFiGANHead(nn.Module):
    """features [B, num_mels, T] -> waveform [B, 1, T * hop_length]."""

    def __init__(
        self,
        num_mels: int,
        upsample_initial_channel: int,
        upsample_rates: Sequence[int],
        upsample_kernel_sizes: Sequence[int],
        resblock_kernel_sizes: Sequence[int],
        resblock_dilation_sizes: Sequence[Sequence[int]],
        pre_conv_kernel_size: int,
        post_conv_kernel_size: int,
    ) -> None:
        super().__init__()
        channels = [upsample_initial_channel // 2**i for i in range(len(upsample_rates) + 1)]
        self.conv_pre = CausalConv1d(num_mels, channels[0], pre_conv_kernel_size)
        self.ups = nn.ModuleList(
            CausalConvTranspose1d(channels[i], channels[i + 1], kernel, rate)
            for i, (rate, kernel) in enumerate(
                zip(upsample_rates, upsample_kernel_sizes, strict=True)
            )
        )
        self.resblocks = nn.ModuleList(
            ParallelBlock(c, resblock_kernel_sizes, resblock_dilation_sizes) for c in channels[1:]
        )
        self.conv_post = CausalConv1d(channels[-1], 1, post_conv_kernel_size)
        for module in self.modules():
            if isinstance(module, CausalConv1d | CausalConvTranspose1d):
                weight_norm(module.conv)

    def forward(self, x: Tensor, state: ConvState | None = None) -> Tensor:
        x = self.conv_pre(x.to(self.conv_pre.conv.weight.dtype), state)
        for up, resblock in zip(self.ups, self.resblocks, strict=True):
            x = resblock(up(F.silu(x), state), state)
        return torch.tanh(self.conv_post(F.silu(x).to(self.conv_post.conv.weight.dtype), state))
