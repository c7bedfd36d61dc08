"""Routed experts as a graph in bench.onnx_graph or bench.openvino_graph, for the routing of one case, so that no row is
computed in vain.
"""

import numpy as np


def experts(graph, x, topk_weights, topk_ids, arrays):
    """A function that returns the layer's output. arrays: of each expert gate, up and down, each (packed, scale)."""
    T, K = topk_ids.shape
    order = topk_ids.ravel().argsort(kind="stable")
    parts = []
    for e in np.unique(topk_ids):
        gate, up, down = arrays[e]
        rows = graph.rows(graph.x, order[topk_ids.ravel()[order] == e] // K)
        hidden = graph.mul(graph.silu(graph.product(rows, *gate)), graph.product(rows, *up))
        parts.append(graph.product(hidden, *down))
    slots = graph.rows(graph.concat(parts), order.argsort().reshape(T, K))  # [T, K, H]
    return graph.call(x, graph.sum(graph.mul(slots, graph.constant(topk_weights[:, :, None]))))
