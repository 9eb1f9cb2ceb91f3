"""The network in other engines: ONNX Runtime and OpenVINO (`pip install 'sdan-fast[peers]'`), and Inductor.

Each `prepare_*` returns a function from a NumPy picture to a NumPy picture, or raises `Absent` with one sentence.
"""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Engine = Callable[[Any], Any]  # (N, 3, H, W) float32 -> (N, 3, scale * H, scale * W) float32, NumPy arrays


class Absent(Exception):
    """An engine that is not installed, or cannot run this network; the message is one sentence that says why."""


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{name} is not installed: pip install 'sdan-fast[peers]'") from error


def to_onnx(network: nn.Module, x: Tensor) -> bytes:
    """The network as ONNX, as `torch.onnx.export` writes it, for exactly the shape of `x`.

    Raises:
        Absent: without the onnx package, or if this torch cannot export it.
    """
    _module("onnx")
    buffer = io.BytesIO()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The exporter that needs nothing beyond onnx. Its graph keeps LayerNorm, GELU and DepthToSpace whole.
            torch.onnx.export(network, (x,), buffer, dynamo=False, opset_version=20)  # type: ignore[arg-type]
    except Exception as error:
        raise Absent(f"torch.onnx.export failed: {(str(error).strip() or '-').splitlines()[0]}") from error
    return buffer.getvalue()


def prepare_onnx_runtime(model: bytes, dtype: str) -> Engine:
    """ONNX Runtime's CPU provider, all optimizations, as many threads as torch has.

    Raises:
        Absent: without onnxruntime, or in a dtype that it does not compute in.
    """
    if dtype != "float32":
        raise Absent(f"ONNX Runtime has no {dtype} convolutions on CPUs")
    ort = _module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def prepare_openvino(model: bytes, dtype: str) -> Engine:
    """OpenVINO's CPU plugin, for one request at a time, in the precision that `dtype` names.

    Raises:
        Absent: without openvino, or in a dtype that it does not compute in.
    """
    precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
    openvino = _module("openvino")
    core = openvino.Core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}[precision] not in capabilities:
        raise Absent(f"OpenVINO does not compute in {precision} on this processor")
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    return lambda x: request.infer(x, share_inputs=True, share_outputs=True)[0]
