"""Graphs for OpenVINO, which multiplies by 4-bit weights where it finds them widened to float32 before a product.

Activations stay float32, and so do sums.
"""

import numpy as np
from kimi_native import ops
from openvino import Core, Model, Shape, Tensor, Type, opset13

GROUP = 32
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


class Graph:
    """Nodes, and weights that stay in their arrays until the graph is compiled."""

    def __init__(self, T: int, width: int):
        self.x = opset13.parameter([T, width], Type.f32)

    def constant(self, array):
        return opset13.constant(array)

    def product(self, x, packed, scale):
        values = Tensor(packed.view(np.uint8).ravel(), Shape([*scale.shape, GROUP]), Type.u4)
        codes = opset13.convert(opset13.constant(values, shared_memory=True), Type.f32)
        scaled = opset13.multiply(opset13.subtract(codes, np.float32(8)), scale.astype(np.float32)[..., None])
        weight = opset13.reshape(scaled, np.array([len(scale), -1]), False)
        return opset13.matmul(x, weight, False, True)

    def rows(self, x, indices):
        return opset13.gather(x, indices, np.array(0))

    def mul(self, a, b):
        return opset13.multiply(a, b)

    def silu(self, x):
        return opset13.swish(x)

    def concat(self, parts):
        return opset13.concat(parts, 0)

    def sum(self, x):
        """Over the second axis."""
        return opset13.reduce_sum(x, np.array([1]))

    def call(self, x, result):
        """A function that computes `result` from x and returns it."""
        options = EXACT | {"INFERENCE_NUM_THREADS": ops.num_threads(), "NUM_STREAMS": 1}
        request = Core().compile_model(Model([result], [self.x]), "CPU", options).create_infer_request()
        return lambda keep=self: request.infer({0: x}, share_inputs=True, share_outputs=True)[0]
