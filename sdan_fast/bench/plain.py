"""SDAN in plain PyTorch, with the parameters of a model: what eager PyTorch, Inductor and ONNX exporters are given.

`use_backend("reference")` computes the same, but through this package's ops; a peer has to see none of them.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdan_fast import reference
from sdan_fast.models import SDAN
from sdan_fast.models.sdan import BSConv
from sdan_fast.modules import RSDAM


class PlainSDAN(nn.Module):
    """The network of `models.SDAN`, written out; shares the parameters of the model that it is made from."""

    def __init__(self, model: SDAN) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        repeated = x.repeat(1, model.head.pw.weight.shape[1] // x.shape[1], 1, 1)
        shallow = _bsconv(model.head, repeated)
        deep = [shallow]
        for block in model.blocks:
            deep.append(reference.rsdam(deep[-1], *cast("RSDAM", block).parameters_in_order()))
        f = F.gelu(F.conv2d(torch.cat(deep[1:], dim=1), model.fuse.weight, model.fuse.bias))
        f = _bsconv(model.tail, f) + shallow
        return F.pixel_shuffle(F.conv2d(f, model.up.weight, model.up.bias, padding=1), model.scale)


def _bsconv(conv: BSConv, x: Tensor) -> Tensor:
    return reference.depthwise_conv2d(F.conv2d(x, conv.pw.weight), conv.dw.weight, conv.dw.bias)
