"""Graphs for onnxruntime, whose MatMulNBits takes 4-bit weights in the published layout.

accuracy 4 rounds activations to int8 per 32 inputs, accuracy 1 leaves them float32.
"""

import numpy as np
from kimi_native import ops
from onnx import TensorProto, helper
from onnxruntime import InferenceSession, OrtValue, SessionOptions

GROUP = 32


class Graph:
    """Nodes, and weights that stay in their arrays but for scales, which become float32."""

    x = "x"

    def __init__(self, accuracy: int):
        self.accuracy, self._nodes, self._initializers, self._values = accuracy, [], [], {}

    def constant(self, array) -> str:
        name = f"constant {len(self._values)}"
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="in memory")
        self._initializers.append(tensor)
        self._values[name] = array
        return name

    def _op(self, kind: str, *inputs: str, **attributes) -> str:
        output = f"{kind} {len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def product(self, x: str, packed, scale) -> str:
        (n_out, groups), blocks = scale.shape, self.constant(packed.view(np.uint8).reshape(*scale.shape, GROUP // 2))
        shape = {"K": groups * GROUP, "N": n_out, "bits": 4, "block_size": GROUP, "accuracy_level": self.accuracy}
        scales = self.constant(scale.astype(np.float32))
        return self._op("MatMulNBits", x, blocks, scales, domain="com.microsoft", **shape)

    def rows(self, x: str, indices) -> str:
        return self._op("Gather", x, self.constant(indices), axis=0)

    def mul(self, a: str, b: str) -> str:
        return self._op("Mul", a, b)

    def silu(self, x: str) -> str:
        return self._op("Mul", x, self._op("Sigmoid", x))

    def concat(self, parts) -> str:
        return self._op("Concat", *parts, axis=0)

    def sum(self, x: str) -> str:
        """Over the second axis."""
        return self._op("ReduceSum", x, self.constant(np.array([1])), keepdims=0)

    def call(self, x, result: str):
        """A function that computes `result` from x and returns it."""
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (self.x, result)]
        graph = helper.make_graph(self._nodes, "case", ends[:1], ends[1:], self._initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        options = SessionOptions()
        options.intra_op_num_threads = ops.num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads take others' cores
        values = [OrtValue.ortvalue_from_numpy(array) for array in self._values.values()]
        options.add_external_initializers(list(self._values), values)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        session = InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return lambda keep=self: session.run([result], {self.x: x})[0]
