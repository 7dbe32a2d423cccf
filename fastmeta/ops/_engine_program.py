"""Programs of the adaptation engine: a network and its loss as a short canonical text.

A program travels through the schema of an op as a string, so that shape functions and
``torch.compile`` see it, and it is the key of every cache of plans. The text reads

    fm1;in=1x28x28;conv2d(0,w=f0,b=f1,out=64,k=3x3,...);relu(1);flatten(2);linear(3,...);loss=mse()

the version, the shape of a row, the nodes, the loss. Node i (from 1) defines value i, value 0 is
the input, the last node is the prediction. ``f2`` is the tensor 2 of the adapted parameters, ``s0``
the tensor 0 of what the tasks share. `Program.text` writes it and `parse` reads it: nothing else in
Python knows the format.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastmeta.errors import fail

__all__ = ["Loss", "Node", "Program", "Shape", "parse", "row_shape"]

VERSION = "fm1"

#: Shape of one row: (features,) or (channels, height, width).
Shape = tuple[int, ...]

#: Options of a node in the order of the text, each with its type: ``ref`` is a tensor (f0, s1),
#: ``pair`` two integers (3x3), ``flag`` 0 or 1.
NODES: dict[str, dict[str, str]] = {
    "linear": {"w": "ref", "b": "ref", "out": "int"},
    "conv2d": {
        "w": "ref",
        "b": "ref",
        "out": "int",
        "k": "pair",
        "s": "pair",
        "p": "pair",
        "d": "pair",
        "g": "int",
    },
    "batch_norm": {"w": "ref", "b": "ref", "mean": "ref", "var": "ref", "eps": "float"},
    "layer_norm": {"w": "ref", "b": "ref", "eps": "float"},
    "group_norm": {"w": "ref", "b": "ref", "groups": "int", "eps": "float"},
    "relu": {},
    "tanh": {},
    "sigmoid": {},
    "silu": {},
    "leaky_relu": {"slope": "float"},
    "elu": {"alpha": "float"},
    "gelu": {"approximate": "word"},
    "softplus": {"beta": "float", "threshold": "float"},
    "max_pool": {"k": "pair", "s": "pair", "p": "pair", "d": "pair", "ceil": "flag"},
    "avg_pool": {"k": "pair", "s": "pair", "p": "pair", "ceil": "flag", "include_pad": "flag"},
    "mean_pool": {},
    "flatten": {},
    "dropout": {"p": "float", "id": "int"},
    "add": {},
}

LOSSES: dict[str, dict[str, str]] = {
    "cross_entropy": {"smoothing": "float", "weight": "ref", "ignore": "int"},
    "mse": {},
    "huber": {"delta": "float"},
    "bce": {},
}


@dataclass(frozen=True)
class Node:
    """One operation: its kind, the values that it takes, its options by the names of `NODES`."""

    kind: str
    inputs: tuple[int, ...]
    options: Mapping[str, Any]

    def text(self) -> str:
        """The node as the program has it."""
        inputs = "+".join(map(str, self.inputs))
        return f"{self.kind}({','.join([inputs, *_options_text(NODES[self.kind], self.options)])})"


@dataclass(frozen=True)
class Loss:
    """The loss of a task, a mean over what counts."""

    kind: str
    options: Mapping[str, Any]

    def text(self) -> str:
        """The loss as the program has it."""
        return f"loss={self.kind}({','.join(_options_text(LOSSES[self.kind], self.options))})"


@dataclass(frozen=True)
class Program:
    """A network from rows of one shape to predictions, and the loss that its tasks adapt by.

    Attributes:
        input: Shape of one row.
        nodes: In an order in which every value is defined before it is used.
        loss: What adaptation descends.
        shapes: Of one row of each value, the input first.
    """

    input: Shape
    nodes: tuple[Node, ...]
    loss: Loss
    shapes: tuple[Shape, ...]

    @classmethod
    def build(cls, input: Shape, nodes: tuple[Node, ...], loss: Loss) -> Program:
        """The program of these nodes, with the shapes of its values.

        Raises:
            ValueError: A node does not fit the values that it takes.
        """
        shapes = [input]
        for node in nodes:
            if min(node.inputs) < 0:
                raise ValueError(f"{node.kind} takes values from 0 on, not {node.inputs}")
            shapes.append(row_shape(node, [shapes[i] for i in node.inputs]))
        return cls(input, nodes, loss, tuple(shapes))

    @property
    def output(self) -> Shape:
        """Shape of the prediction of one row."""
        return self.shapes[-1]

    @functools.cached_property
    def random(self) -> bool:
        """Whether it draws random numbers."""
        return any(node.kind == "dropout" for node in self.nodes)

    def text(self) -> str:
        """The canonical text."""
        row = "x".join(map(str, self.input))
        nodes = (node.text() for node in self.nodes)
        return ";".join([VERSION, f"in={row}", *nodes, self.loss.text()])


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Program:
    """The program that a text stands for.

    Raises:
        ValueError: It is not a program of this version, or its shapes do not fit.
    """
    try:
        version, row, *lines, loss = text.split(";")
        if version != VERSION or not row.startswith("in=") or not loss.startswith("loss="):
            raise ValueError(f"{VERSION};in=...;...;loss=...")
        nodes = tuple(_parse_node(line) for line in lines)
        kind, options = _parse_call(loss.removeprefix("loss="))
        found = Loss(kind, _parse_options(LOSSES[kind], options))
        shape = tuple(int(n) for n in row.removeprefix("in=").split("x"))
        return Program.build(shape, nodes, found)
    except (ValueError, KeyError, IndexError) as error:
        fail(ValueError, "adapt", "program", f"a program of version {VERSION} ({error})", text)


def row_shape(node: Node, inputs: list[Shape]) -> Shape:
    """Shape of one row of a node's value.

    Raises:
        ValueError: The node cannot take these inputs; the message says what it takes.
    """
    shape, options = inputs[0], node.options
    if (options.get("mean") is None) != (options.get("var") is None):
        raise ValueError(f"{node.kind} takes mean and var together")
    if node.kind == "add":
        if len(inputs) != 2 or inputs[0] != inputs[1]:
            raise ValueError(f"add takes two values of one shape, not {inputs}")
        return shape
    if node.kind == "linear":
        _require(node, len(shape) == 1, "flat rows", shape)
        return (options["out"],)
    if node.kind == "flatten":
        return (math.prod(shape),)
    if node.kind in ("conv2d", "max_pool", "avg_pool", "mean_pool"):
        _require(node, len(shape) == 3, "images of channels, height and width", shape)
    if node.kind == "mean_pool":
        return (shape[0], 1, 1)
    if node.kind == "conv2d":
        sides = _window(node, shape, options["d"], ceil=False)
        return (options["out"], *sides)
    if node.kind in ("max_pool", "avg_pool"):
        sides = _window(node, shape, options.get("d", (1, 1)), ceil=bool(options["ceil"]))
        return (shape[0], *sides)
    return shape


def _window(node: Node, shape: Shape, dilation: tuple[int, int], *, ceil: bool) -> list[int]:
    """Height and width of what a sliding window gives, by torch's rule for the last one."""
    sides = []
    for side, k, s, p, d in zip(
        shape[1:],
        node.options["k"],
        node.options["s"],
        node.options["p"],
        dilation,
        strict=True,
    ):
        _require(node, min(k, s, d) >= 1 and p >= 0, "windows of at least one pixel", shape)
        room = side + 2 * p - d * (k - 1) - 1
        count = (room + (s - 1 if ceil else 0)) // s + 1
        if ceil and (count - 1) * s >= side + p:
            count -= 1
        _require(node, room >= 0 and count > 0, f"images that a {k} wide window fits", shape)
        sides.append(count)
    return sides


def _require(node: Node, fits: bool, wanted: str, shape: Shape) -> None:
    if not fits:
        raise ValueError(f"{node.kind} takes {wanted}, not rows of shape {list(shape)}")


def _options_text(types: dict[str, str], options: Mapping[str, Any]) -> list[str]:
    parts = []
    for key, kind in types.items():
        value = options.get(key)
        if value is None:
            continue
        if kind == "pair":
            value = f"{value[0]}x{value[1]}"
        elif kind == "float":
            value = repr(float(value))
        elif kind in ("int", "flag"):
            value = int(value)
        parts.append(f"{key}={value}")
    return parts


def _parse_node(text: str) -> Node:
    kind, (inputs, *options) = _parse_call(text)
    values = tuple(int(i) for i in inputs.split("+"))
    return Node(kind, values, _parse_options(NODES[kind], options))


def _parse_call(text: str) -> tuple[str, list[str]]:
    kind, _, rest = text.partition("(")
    if not rest.endswith(")"):
        raise ValueError(f"no call: {text!r}")
    inside = rest[:-1]
    return kind, inside.split(",") if inside else []


def _parse_options(types: dict[str, str], parts: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in parts:
        key, _, value = part.partition("=")
        options[key] = _READ[types[key]](value)
    return options


def _read_pair(text: str) -> tuple[int, int]:
    first, second = text.split("x")
    return int(first), int(second)


def _read_ref(text: str) -> str:
    if text[:1] not in ("f", "s") or not text[1:].isdigit():
        raise ValueError(f"no tensor: {text!r}")
    return text


_READ: dict[str, Any] = {
    "ref": _read_ref,
    "int": int,
    "flag": lambda text: bool(int(text)),
    "pair": _read_pair,
    "float": float,
    "word": str,
}
