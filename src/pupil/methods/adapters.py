"""Trained modules that join tensors of different shapes."""

from collections.abc import Sequence

from torch import nn


def regressor(
    src: Sequence[int], dst: Sequence[int], relu: bool = True, grow: bool = False, deep: bool = False
) -> nn.Sequential:
    """FitNet's: one convolution with bias, batch norm, ReLU (AB: none); from a (B, C, H, W) shape towards another.

    Twice as large: 3x3 with stride 2.  Half as large: 4x4 transposed with stride 2.  Larger or equal: an un-padded
    kernel of the difference plus one.  Otherwise smaller: 3x3, and the size stays (SimKD's rule, which pools the
    teacher's map; RepDistiller crashes here) or, with `grow`, spot-adaptive KD's: transposed, from the one size to the
    other, with a stride of their whole ratio.  `deep` (its too) adds a 1x1 convolution, batch norm and ReLU.
    """
    (_, c_in, h_in, w_in), (_, c_out, h_out, w_out) = src, dst
    if h_in == 2 * h_out:
        conv: nn.Module = nn.Conv2d(c_in, c_out, 3, 2, 1)
    elif 2 * h_in == h_out:
        conv = nn.ConvTranspose2d(c_in, c_out, 4, 2, 1)
    elif h_in >= h_out:
        conv = nn.Conv2d(c_in, c_out, (1 + h_in - h_out, 1 + w_in - w_out))
    elif grow:
        stride = h_out // h_in
        conv = nn.ConvTranspose2d(c_in, c_out, (h_out - stride * (h_in - 1), w_out - stride * (w_in - 1)), stride)
    else:
        conv = nn.Conv2d(c_in, c_out, 3, 1, 1)
    more = [nn.Conv2d(c_out, c_out, 1), nn.BatchNorm2d(c_out), nn.ReLU()] if deep else []
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), *([nn.ReLU()] if relu else []), *more)
