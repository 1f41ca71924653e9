"""Write a graph as an ONNX model, with its large tensors in files beside it."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxllm import __version__
from jaxllm.export.onnx_graph import MICROSOFT, TYPES, Graph, Node, Tensor, Value, numbers
from jaxllm.progress import progress

OPSET = 21
IR_VERSION = 10
INSIDE = 1024  # bytes of a tensor that the program itself holds
ALIGNED = 4096  # so that a file can be mapped into memory
SHARD = 2**30  # bytes of a file of tensors


def write(folder: pathlib.Path, g: Graph, name: str, stem: str = "weights") -> list[str]:
    """Write the model as folder/name and its tensors as one or more files -> their names."""
    import onnx

    nodes, used = g.needed()
    tensors = [t for t in g.tensors.values() if t.name in used]
    protos, files = [], _Files(folder, stem)
    with progress("writing parameters", len(tensors)) as advance:
        for tensor in tensors:
            protos.append(_tensor(tensor, files))
            advance()
    files.close()
    graph = _graph(g, nodes, "jaxllm")
    graph.initializer.extend(protos)
    model = onnx.helper.make_model(
        graph,
        producer_name="jaxllm",
        producer_version=__version__,
        ir_version=IR_VERSION,
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(MICROSOFT, 1)],
    )
    (folder / name).write_bytes(model.SerializeToString(deterministic=True))
    return files.names


class _Files:
    """Files of tensors, one after the other."""

    def __init__(self, folder: pathlib.Path, stem: str):
        self.folder, self.stem, self.names, self.file = folder, stem, [], None

    def put(self, data: bytes) -> tuple[str, int]:
        """(file, offset) of what was appended."""
        if self.file is None or self.file.tell() + len(data) > SHARD:
            self.close()
            self.names.append(f"{self.stem}.{len(self.names)}.bin")
            self.file = (self.folder / self.names[-1]).open("wb")
        self.file.write(bytes(-self.file.tell() % ALIGNED))
        offset = self.file.tell()
        self.file.write(data)
        return self.names[-1], offset

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _tensor(tensor: Tensor, files: _Files) -> Any:
    import onnx

    x = tensor.fetch()
    assert x.shape == tensor.shape, f"{tensor.name} is {x.shape} instead of {tensor.shape}"
    data = numbers(x.astype(tensor.dtype, copy=False))
    proto = onnx.TensorProto(name=tensor.name, data_type=TYPES[tensor.dtype.name], dims=tensor.shape)
    if len(data) <= INSIDE:
        proto.raw_data = data
        return proto
    location, offset = files.put(data)
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", len(data))):
        proto.external_data.add(key=key, value=str(value))
    return proto


def _graph(g: Graph, nodes: list[Node], name: str) -> Any:
    import onnx

    renamed = list(_named_outputs(g))
    return onnx.helper.make_graph(
        [*(_node(node) for node in nodes), *(_node(node) for node, _ in renamed)],
        name,
        [_port(x.name, x) for x in g.inputs],
        [_port(name, x) for (_, x), (name, _) in zip(renamed, g.outputs, strict=True)],
    )


def _named_outputs(g: Graph) -> Iterator[tuple[Node, Value]]:
    """Values under the names that they have outside."""
    for name, x in g.outputs:
        yield Node("Identity", "", (x.name,), (name,), ()), x


def _port(name: str, x: Value) -> Any:
    import onnx

    shape = [int(axis) if isinstance(axis, int | np.integer) else str(axis) for axis in x.shape]
    return onnx.helper.make_tensor_value_info(name, TYPES[x.dtype.name], shape)


def _node(node: Node) -> Any:
    import onnx

    attributes = {
        key: _graph(value, value.needed()[0], node.outputs[0]) if isinstance(value, Graph) else value
        for key, value in node.attributes
    }
    return onnx.helper.make_node(
        node.op, list(node.inputs), list(node.outputs), name=node.outputs[0], domain=node.domain, **attributes
    )
