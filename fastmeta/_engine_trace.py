"""From a module to a program of the engine: its forward pass, listened to.

The module's own ``forward`` runs once on a tensor that has a shape and no data, under a mode that
sees every call of torch. Calls with an engine form become nodes; any other stops the tracing, and
the message names the layer that made it. Since the code itself runs, a network needs no particular
form: containers, residual blocks, functional calls and reshapes all read the same way.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from fastmeta._engine_refusals import NoProgram, is_torchs, label, no_randomness, refuse_hooks
from fastmeta._lent_model import LentModel, Slots
from fastmeta.ops._engine_program import Loss, Node, Program, Shape, row_shape

__all__ = ["Trace", "trace"]

#: Options of nodes that name tensors.
_REFS = ("w", "b", "mean", "var")


@dataclass(frozen=True)
class Trace:
    """The nodes of a module; their options name tensors by the names that the module gives them."""

    input: Shape
    nodes: tuple[Node, ...]

    @property
    def tensors(self) -> set[str]:
        """Names of the parameters and buffers that it uses."""
        return {n.options[k] for n in self.nodes for k in _REFS if n.options.get(k) is not None}

    def program(self, loss: Loss, refs: dict[str, str]) -> Program:
        """The program in which the tensor ``name`` is ``refs[name]``."""
        nodes = []
        for node in self.nodes:
            options = {k: refs[v] if k in _REFS else v for k, v in node.options.items()}
            nodes.append(replace(node, options=options))
        return Program.build(self.input, tuple(nodes), loss)


def trace(
    model: nn.Module, slots: Slots, row: Shape, rows: int, batch_norm: str, dtype: torch.dtype
) -> Trace:
    """The forward pass of ``model`` for ``rows`` rows of shape ``row``.

    Raises:
        NoProgram: It has no engine form; the message names the layer and the reason.
    """
    refuse_hooks(model)
    with LentModel(model, slots, [], batch_norm=batch_norm, second_order=False) as lent:
        # In place of the parameters others, so that one which the model holds elsewhere, too, and
        # which would not adapt there, is found out.
        held = {name: places[0][0][places[0][1]] for name, places in slots.items()}
        lent.place({n: nn.Parameter(p.detach(), p.requires_grad) for n, p in held.items()})
        recorder = _Recorder(model, batch_norm)
        x = recorder.begin((rows, *row), dtype)
        with no_randomness(), torch.enable_grad():
            try:
                with recorder:
                    output = model(x)
                return recorder.finish(output)
            except NoProgram:
                raise
            except Exception as error:
                first = str(error).strip().split("\n", 1)[0]
                raise NoProgram(
                    f"the forward pass raised {type(error).__name__}: {first}"
                ) from None


class _Recorder(TorchFunctionMode):
    """Turns the calls of one forward pass into nodes."""

    def __init__(self, model: nn.Module, batch_norm: str) -> None:
        super().__init__()
        self._policy = batch_norm
        self._modules = {id(m): (name, m) for name, m in model.named_modules()}
        self._names: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._names.setdefault(id(tensor), name)
        self._nodes: list[Node] = []
        # The tensors are held, so that no id is given twice.
        self._values: dict[int, tuple[Tensor, int]] = {}
        self._viewed: set[int] = set()
        self._dropouts = 0

    def begin(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        """The input."""
        self._row = shape[1:]
        self._dtype = dtype
        return self._value(shape, 0)

    def finish(self, output: Any) -> Trace:
        """The trace that ends in ``output``, without nodes that do not lead there."""
        if not isinstance(output, Tensor):
            raise NoProgram(f"the model returns {type(output).__name__}, no tensor")
        last = self._number(output)
        live = {last}
        for number in range(last, 0, -1):
            if number in live:
                live |= set(self._nodes[number - 1].inputs)
        row = self._row
        skipped: set[int] = set()
        readers = [n for i, n in enumerate(self._nodes, 1) if i in live and 0 in n.inputs]
        if readers and all(node.kind == "flatten" for node in readers):
            # Rows come flat: it is a matter of how they are handed over.
            row = (math.prod(row),)
            skipped = {
                i for i, n in enumerate(self._nodes, 1) if n.kind == "flatten" and n in readers
            }
        if len(row) not in (1, 3):
            raise NoProgram(f"rows of shape {list(self._row)} are neither flat nor images")
        renumbered = dict.fromkeys(skipped | {0}, 0)
        nodes: list[Node] = []
        for index, node in enumerate(self._nodes, 1):
            if index in live and index not in skipped:
                nodes.append(replace(node, inputs=tuple(renumbered[i] for i in node.inputs)))
                renumbered[index] = len(nodes)
        if not nodes:
            raise NoProgram("the model has no layer with an engine form")
        return Trace(row, tuple(nodes))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        if rule is None:
            if func in _PASSIVE or (func in _PASSIVE_BUT_OF_VALUES and not self._is_value(args)):
                return func(*args, **(kwargs or {}))
            title: Any = resolve_name(func)  # type: ignore[no-untyped-call]
            self._stop(f"it calls {title or getattr(func, '__name__', func)}", True)
        if not torch.is_grad_enabled():
            self._stop("it runs under torch.no_grad(), or in an autograd.Function")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            self._stop("it runs under autocast")
        try:
            return rule(self, *args, **(kwargs or {}))
        except (TypeError, ValueError) as error:
            self._stop(str(error))

    def _is_value(self, args: Any) -> bool:
        return bool(args) and id(args[0]) in self._values

    def _stop(self, detail: str, unknown: bool = False) -> NoReturn:
        """Raise `NoProgram` in the name of the innermost layer that is at work."""
        frame: Any = sys._getframe(1)
        name, module = "", None
        while frame is not None:
            held = frame.f_locals.get("self")
            if id(held) in self._modules:
                name, module = self._modules[id(held)]
                break
            frame = frame.f_back
        who = "the model" if module is None else label(name, module)
        if unknown and module is not None and is_torchs(module):
            raise NoProgram(f"{who} has no engine form")
        raise NoProgram(f"{who} has no engine form: {detail}")

    def _value(self, shape: Sequence[int], number: int) -> Tensor:
        # A leaf that requires a gradient: whatever goes through a Function of the user's own, with
        # a derivative of its own, comes out with a grad_fn.
        tensor = torch.empty(tuple(shape), device="meta", dtype=self._dtype, requires_grad=True)
        self._values[id(tensor)] = (tensor, number)
        return tensor

    def _number(self, tensor: Any) -> int:
        if not isinstance(tensor, Tensor) or id(tensor) not in self._values:
            self._stop("a tensor that is not computed from the input by layers with an engine form")
        if tensor.grad_fn is not None:
            self._stop("it calls an autograd.Function")
        return self._values[id(tensor)][1]

    def _name(self, tensor: Tensor | None) -> str | None:
        if tensor is None:
            return None
        if id(tensor) not in self._names:
            self._stop("its weight is computed, or belongs to no module")
        return self._names[id(tensor)]

    def _add(self, kind: str, *values: Tensor, inplace: Any = False, **options: Any) -> Tensor:
        """A new node, and its value."""
        options = {key: value for key, value in options.items() if value is not None}
        if any(isinstance(value, Tensor) for value in options.values()):
            self._stop("a tensor is one of its options")
        node = Node(kind, tuple(self._number(v) for v in values), options)
        if inplace and id(values[0]) in self._viewed:
            self._stop("it writes in place what has another view")
        rows = [tuple(v.shape[1:]) for v in values]
        shape = row_shape(node, rows)
        self._nodes.append(node)
        if inplace:
            self._values[id(values[0])] = (values[0], len(self._nodes))
            return values[0]
        return self._value((values[0].shape[0], *shape), len(self._nodes))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out, features = weight.shape
        _want(tuple(input.shape[1:]) == (features,), f"rows of shape {list(input.shape[1:])}")
        _want(bias is None or tuple(bias.shape) in ((out,), (1, out)), "its bias's shape")
        return self._add("linear", input, w=self._name(weight), b=self._name(bias), out=out)

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        _want(input.dim() == 4 and input.shape[1] == weight.shape[1] * groups, "its input's shape")
        kernel, stride, dilation = tuple(weight.shape[2:]), _pair(stride), _pair(dilation)
        if padding == "same":
            reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            _want(all(r % 2 == 0 for r in reach), "padding='same' is not symmetric")
            padding = tuple(r // 2 for r in reach)
        return self._add(
            "conv2d",
            input,
            w=self._name(weight),
            b=self._name(bias),
            out=weight.shape[0],
            k=kernel,
            s=stride,
            p=(0, 0) if padding == "valid" else _pair(padding),
            d=dilation,
            g=groups,
        )

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        affine = {"w": self._name(weight), "b": self._name(bias), "eps": eps}
        if self._policy == "batch":
            many = input.numel() > input.shape[1]
            _want(many, "batch statistics of a single value a channel")
            return self._add("batch_norm", input, **affine)
        _want(running_mean is not None, "it keeps no running statistics")
        mean, var = self._name(running_mean), self._name(running_var)
        return self._add("batch_norm", input, **affine, mean=mean, var=var)

    def _instance_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        _want(input.dim() == 4, "its input's shape")
        if self._policy == "running" and running_mean is not None:
            return self._batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
        _want(input.shape[2:].numel() > 1, "statistics of a single pixel")
        return self._group_norm(input, input.shape[1], weight, bias, eps)

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        whole = tuple(normalized_shape) == tuple(input.shape[1:])
        _want(whole, "it normalises over less than a row")
        w, b = self._name(weight), self._name(bias)
        return self._add("layer_norm", input, w=w, b=b, eps=eps)

    def _group_norm(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        _want(input.shape[1] % num_groups == 0, "its input's shape")
        w, b = self._name(weight), self._name(bias)
        return self._add("group_norm", input, w=w, b=b, groups=num_groups, eps=eps)

    def _max_pool(
        self,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor:
        window = self._window(kernel_size, stride, padding)
        return self._add("max_pool", input, **window, d=_pair(dilation), ceil=bool(ceil_mode))

    def _avg_pool(
        self,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        _want(divisor_override is None, "divisor_override")
        window = self._window(kernel_size, stride, padding)
        include = bool(count_include_pad)
        return self._add("avg_pool", input, **window, ceil=bool(ceil_mode), include_pad=include)

    def _window(self, kernel: Any, stride: Any, padding: Any) -> dict[str, tuple[int, int]]:
        k, p = _pair(kernel), _pair(padding)
        _want(all(2 * b <= a for a, b in zip(k, p, strict=True)), "padding of over half the window")
        return {"k": k, "s": k if stride is None or stride == [] else _pair(stride), "p": p}

    def _adaptive(self, input: Tensor, output_size: Any) -> Tensor:
        _want(_pair(output_size) == (1, 1), f"pooling to {output_size}")
        return self._add("mean_pool", input)

    def _mean(self, input: Tensor, dim: Any = None, keepdim: bool = False, **extra: Any) -> Tensor:
        dims = [dim] if isinstance(dim, int) else list(dim or ())
        pixels = input.dim() == 4 and sorted(d % 4 for d in dims) == [2, 3]
        _want(pixels and not any(v is not None for v in extra.values()), "a mean not over pixels")
        pooled = self._add("mean_pool", input)
        return pooled if keepdim else self._add("flatten", pooled)

    def _flatten(self, input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
        last = input.dim() - 1
        _want(start_dim == 1 and end_dim in (-1, last), "it flattens less, or more, than a row")
        return self._flat(input)

    def _flat(self, input: Tensor) -> Tensor:
        if input.dim() == 2:
            return input
        output = self._add("flatten", input)
        self._viewed |= {id(input), id(output)}
        return output

    def _reshape(self, input: Tensor, *shape: Any) -> Tensor:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        known = math.prod(s for s in sizes if s != -1)
        sizes = tuple(input.numel() // max(known, 1) if s == -1 else s for s in sizes)
        if sizes == tuple(input.shape):
            return input
        _want(sizes == (input.shape[0], input[0].numel()), f"a reshape to {list(sizes)}")
        return self._flat(input)

    def _sum(self, input: Any, other: Any, *, alpha: Any = 1, inplace: bool = False) -> Tensor:
        both = isinstance(input, Tensor) and isinstance(other, Tensor)
        _want(both and alpha == 1 and input.shape == other.shape, "a sum of unlike values")
        return self._add("add", input, other, inplace=inplace)

    def _sum_(self, input: Any, other: Any, *, alpha: Any = 1) -> Tensor:
        return self._sum(input, other, alpha=alpha, inplace=True)

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        self._number(input)
        _want(not isinstance(p, Tensor), "a tensor is one of its options")
        if not training or p == 0:
            return input
        self._dropouts += 1
        return self._add("dropout", input, inplace=inplace, p=p, id=self._dropouts - 1)

    def _same(self, input: Tensor) -> Tensor:
        self._number(input)
        return input

    def _leaky(self, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
        return self._add("leaky_relu", input, inplace=inplace, slope=negative_slope)

    def _elu(self, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
        return self._add("elu", input, inplace=inplace, alpha=alpha)

    def _gelu(self, input: Tensor, approximate: str = "none") -> Tensor:
        return self._add("gelu", input, approximate=approximate)

    def _softplus(self, input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
        return self._add("softplus", input, beta=beta, threshold=threshold)


def _want(condition: bool, detail: str) -> None:
    if not condition:
        raise ValueError(detail)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    values = tuple(value)
    first, second = values * 2 if len(values) == 1 else values
    return first, second


def _plain(kind: str, *, inplace: bool = False) -> Callable[..., Tensor]:
    """Rule of a function of one value without options."""

    def rule(recorder: _Recorder, input: Tensor, inplace: bool = inplace) -> Tensor:
        return recorder._add(kind, input, inplace=inplace)

    return rule


_T = torch.Tensor
_RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _Recorder._linear,
    F.conv2d: _Recorder._conv2d,
    F.batch_norm: _Recorder._batch_norm,
    F.instance_norm: _Recorder._instance_norm,
    F.layer_norm: _Recorder._layer_norm,
    F.group_norm: _Recorder._group_norm,
    F.max_pool2d: _Recorder._max_pool,
    torch.max_pool2d: _Recorder._max_pool,
    F.avg_pool2d: _Recorder._avg_pool,
    F.adaptive_avg_pool2d: _Recorder._adaptive,
    F.leaky_relu: _Recorder._leaky,
    F.elu: _Recorder._elu,
    F.gelu: _Recorder._gelu,
    F.softplus: _Recorder._softplus,
    F.dropout: _Recorder._dropout,
    F.silu: _plain("silu"),
    **dict.fromkeys((F.relu, torch.relu, _T.relu), _plain("relu")),
    **dict.fromkeys((torch.relu_, F.relu_, _T.relu_), _plain("relu", inplace=True)),
    **dict.fromkeys((torch.tanh, _T.tanh), _plain("tanh")),
    **dict.fromkeys((torch.sigmoid, _T.sigmoid), _plain("sigmoid")),
    **dict.fromkeys((torch.mean, _T.mean), _Recorder._mean),
    **dict.fromkeys((torch.flatten, _T.flatten), _Recorder._flatten),
    **dict.fromkeys((torch.reshape, _T.reshape, _T.view), _Recorder._reshape),
    **dict.fromkeys((torch.add, _T.add, _T.__radd__), _Recorder._sum),
    _T.add_: _Recorder._sum_,
    _T.contiguous: _Recorder._same,
}

#: Questions that change nothing: asked of the tensors as they are.
_PASSIVE = {
    _T.dim,
    _T.size,
    _T.numel,
    _T.is_floating_point,
    _T.is_complex,
    _T.__len__,
    torch._C._set_grad_enabled,
    *(getattr(_T, name).__get__ for name in ("shape", "ndim", "dtype")),
}

#: Those which a value, having no data, would answer in its own way.
_PASSIVE_BUT_OF_VALUES = {
    _T.stride,
    _T.is_contiguous,
    *(getattr(_T, name).__get__ for name in ("device", "layout", "is_cuda", "requires_grad")),
}
