"""Graphs with the same weights and none of the rounding of what comes into matrices, to compare the weights themselves."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import GraphProto, NodeProto, helper


def quantizes_activations(path: Path) -> bool:
    """Return whether a graph rounds, or lets its runtime round, what comes into any of its matrices to 8 bits."""
    graph = onnx.load(path, load_external_data=False).graph
    return bool(_levels(graph)) or any(node.op_type == "QuantizeLinear" for node in graph.node)


def strip_activation_quantization(path: Path) -> bytes:
    """Return a graph, its data left where it is, whose matrices take their inputs as they are.

    Matrices in blocks get the accuracy level at which nothing is rounded. A product of integers becomes one of the numbers that
    would have been rounded and the same codes; what would be rounded and turned back at once is passed on.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for level in _levels(graph):
        level.i = 0
    rounded = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    if rounded:
        nodes = [new for node in graph.node if node.op_type != "QuantizeLinear" for new in _exact(node, rounded, graph)]
        del graph.node[:]
        graph.node.extend(nodes)
        del graph.value_info[:]  # what is integers there is none any more
    return model.SerializeToString()


def _levels(graph: GraphProto) -> list[onnx.AttributeProto]:
    """Return the accuracy levels of matrices in blocks that are not 0."""
    nodes = (node for node in graph.node if node.op_type == "MatMulNBits")
    return [attribute for node in nodes for attribute in node.attribute if attribute.name == "accuracy_level" and attribute.i]


def _exact(node: NodeProto, rounded: dict[str, str], graph: GraphProto) -> list[NodeProto]:
    """Return what computes the same as a node does, on the numbers before they were rounded."""
    if not node.input or node.input[0] not in rounded:
        return [node]
    value = rounded[node.input[0]]
    if node.op_type == "DequantizeLinear":
        return [helper.make_node("Identity", [value], list(node.output), name=node.name)]
    if node.op_type != "MatMulInteger":
        raise ValueError(f"{node.name}: {node.op_type} of rounded inputs is not known here")
    kind = next(_cast_to(other) for other in graph.node if other.op_type == "Cast" and other.input[0] == node.output[0])
    codes, zero, centred = (f"{node.name}:{part}" for part in ("codes", "zero", "centred"))
    return [
        helper.make_node("Cast", [node.input[1]], [codes], name=codes, to=kind),
        helper.make_node("Cast", [node.input[3]], [zero], name=zero, to=kind),
        helper.make_node("Sub", [codes, zero], [centred], name=centred),
        helper.make_node("MatMul", [value, centred], list(node.output), name=node.name),
    ]


def _cast_to(node: NodeProto) -> int:
    return next(attribute.i for attribute in node.attribute if attribute.name == "to")
