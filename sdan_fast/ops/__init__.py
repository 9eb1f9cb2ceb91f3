"""The ops as torch knows them; one module per op, and one mechanism (`_op.Op`) for all of them.

This list is the one table that a new op has to be added to.
"""

from ._op import OPS, Op, attach_kernels
from .depthwise_conv2d import depthwise_conv2d
from .gated_strip_conv_chain import gated_strip_conv_chain
from .layer_norm2d import layer_norm2d
from .mm_lka import mm_lka
from .pointwise_conv2d import pointwise_conv2d
from .pointwise_gate import pointwise_gate
from .rsdam import rsdam
from .sdan import sdan
from .sdm import sdm
from .star import star
from .star_conv import star_conv
from .strip_conv_chain import strip_conv_chain

attach_kernels()

__all__ = [
    "OPS",
    "Op",
    "depthwise_conv2d",
    "gated_strip_conv_chain",
    "layer_norm2d",
    "mm_lka",
    "pointwise_conv2d",
    "pointwise_gate",
    "rsdam",
    "sdan",
    "sdm",
    "star",
    "star_conv",
    "strip_conv_chain",
]
