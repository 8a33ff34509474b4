"""Strip the activation quantization from ONNX graphs and keep the quantized weights, to compare the weights alone."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import GraphProto, NodeProto, helper


def quantizes_activations(path: Path) -> bool:
    """Return whether a graph quantizes the input of any matrix product to 8 bits, itself or by an `accuracy_level`."""
    graph = onnx.load(path, load_external_data=False).graph
    return bool(_accuracy_levels(graph)) or any(node.op_type == "QuantizeLinear" for node in graph.node)


def strip_activation_quantization(path: Path) -> bytes:
    """Return a graph, serialized, without activation quantization; its external data stay where they are.

    `MatMulNBits` gets accuracy level 0. `MatMulInteger` becomes a `MatMul` of the unquantized input and the same weight codes; a
    `QuantizeLinear` followed by `DequantizeLinear` becomes an `Identity`.
    """
    # The graph alone is changed in memory; its weights stay in their files, to which ONNX Runtime is pointed.
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for level in _accuracy_levels(graph):
        # Level 4 lets MatMulNBits round its input to 8 bits on CPUs.
        level.i = 0
    quantized = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    if quantized:
        nodes = [
            new for node in graph.node if node.op_type != "QuantizeLinear" for new in _without_quantization(node, quantized, graph)
        ]
        del graph.node[:]
        graph.node.extend(nodes)
        del graph.value_info[:]  # it declares integer types that are gone
    return model.SerializeToString()


def _accuracy_levels(graph: GraphProto) -> list[onnx.AttributeProto]:
    """Return the nonzero accuracy levels of `MatMulNBits` nodes."""
    nodes = (node for node in graph.node if node.op_type == "MatMulNBits")
    return [attribute for node in nodes for attribute in node.attribute if attribute.name == "accuracy_level" and attribute.i]


def _without_quantization(node: NodeProto, quantized: dict[str, str], graph: GraphProto) -> list[NodeProto]:
    """Return the nodes that replace a node, with the input before its quantization."""
    if not node.input or node.input[0] not in quantized:
        return [node]
    value = quantized[node.input[0]]
    if node.op_type == "DequantizeLinear":
        return [helper.make_node("Identity", [value], list(node.output), name=node.name)]
    if node.op_type != "MatMulInteger":
        raise ValueError(f"{node.name}: {node.op_type} of rounded inputs is not known here")
    # The type that the integer product is cast to next is the one in which the dense product must be computed.
    kind = next(_cast_to(other) for other in graph.node if other.op_type == "Cast" and other.input[0] == node.output[0])
    codes, zero, centred = (f"{node.name}:{suffix}" for suffix in ("codes", "zero", "centred"))
    return [
        helper.make_node("Cast", [node.input[1]], [codes], name=codes, to=kind),
        helper.make_node("Cast", [node.input[3]], [zero], name=zero, to=kind),
        helper.make_node("Sub", [codes, zero], [centred], name=centred),
        helper.make_node("MatMul", [value, centred], list(node.output), name=node.name),
    ]


def _cast_to(node: NodeProto) -> int:
    return next(attribute.i for attribute in node.attribute if attribute.name == "to")
