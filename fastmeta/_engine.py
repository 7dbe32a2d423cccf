"""The strategy ``"engine"``: whole inner loops in one call of an op, where a module allows it.

`Engine.prepare` says of a call whether the engine takes it, and if so holds what the op needs. It
asks the module for its program once for each number of rows, and notices when the module changes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fastmeta._descent import Rates
from fastmeta._engine_loss import Work, hand_out
from fastmeta._engine_refusals import NoProgram
from fastmeta._engine_trace import Trace, trace
from fastmeta._inner_losses import Loss, NamedLoss, Supports, check_prediction
from fastmeta._structure import Structure
from fastmeta.errors import IGNORE_INDEX
from fastmeta.ops._engine_program import Loss as ProgramLoss
from fastmeta.ops._engine_program import Program, Shape
from fastmeta.ops.engine import adapt

__all__ = ["Engine", "NoProgram", "Prepared", "has_kernel", "unusual_call"]

DTYPES = (torch.float32, torch.float64)

#: Programs of a module that are kept, one for each number of supports and queries.
KEPT = 256

_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


@functools.cache
def has_kernel(device_type: str) -> bool:
    """Whether the engine is compiled for this kind of device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(
        "fastmeta::meta_step", key
    )


@dataclass
class Prepared:
    """A program with the tensors that it runs on, by name.

    Attributes:
        program: The network and the loss.
        text: Its text.
        fast: Names of the parameters that adapt and that it uses.
        shared: Names of the other tensors that it uses.
        places: Where those of ``fast`` stand among the parameters that adapt.
        weighted: Whether the loss's class weights come after those.
        normalises: Whether rows of a task influence each other.
        summary: What it is made of, in a few words.
    """

    program: Program
    text: str
    fast: list[str]
    shared: list[str]
    places: list[int]
    weighted: bool
    normalises: bool = field(init=False)
    summary: str = field(init=False)

    def __post_init__(self) -> None:
        kinds: dict[str, int] = {}
        for node in self.program.nodes:
            kinds[node.kind] = kinds.get(node.kind, 0) + 1
        parts = ", ".join(f"{n} {kind}" if n > 1 else kind for kind, n in kinds.items())
        self.summary = f"{parts}; {self.program.loss.kind}"
        self.normalises = any(
            n.kind == "batch_norm" and n.options.get("mean") is None for n in self.program.nodes
        )

    def rows(self, x: Tensor) -> Tensor:
        """Rows Tensor[T, N, ...] as the program takes them: flat where it begins by flattening."""
        row = self.program.input
        return x if x.dim() == len(row) + 2 else x.reshape(*x.shape[:2], *row)


class Engine:
    """Programs of one module, made when they are first needed."""

    def __init__(
        self, loss: Loss, batch_norm: str, randomness: str, task_chunk: int | None
    ) -> None:
        self._loss = loss
        self._batch_norm = batch_norm
        self._randomness = randomness
        self._task_chunk = task_chunk
        self._model: nn.Module | None = None
        self._structure: Structure | None = None
        self._traces: dict[Any, Trace | str] = {}
        self._programs: dict[Any, Prepared | str] = {}
        self._recalled: dict[Any, Any] = {}
        self._constants: dict[Any, Tensor] = {}

    def __deepcopy__(self, memo: Any) -> Engine:
        loss = copy.deepcopy(self._loss, memo)
        return Engine(loss, self._batch_norm, self._randomness, self._task_chunk)

    def __reduce__(self) -> Any:
        return Engine, (self._loss, self._batch_norm, self._randomness, self._task_chunk)

    def structure(self, model: nn.Module) -> Structure:
        """Where ``model`` holds its tensors. Looked up again when it has changed."""
        known = self._structure
        if known is None or model is not self._model or not known.same():
            self._model, self._structure = model, Structure(model)
            self._traces.clear()
            self._programs.clear()
            self._recalled.clear()
        assert self._structure is not None
        return self._structure

    def prepare(
        self,
        model: nn.Module,
        names: Sequence[str],
        supports: Supports,
        query_x: Tensor | None,
        masked: Callable[[], bool],
        query_y: Tensor | None = None,
    ) -> Prepared:
        """What runs these tasks, in which the parameters ``names`` of ``model`` adapt.

        Raises:
            NoProgram: The engine does not take them; the message says why.
        """
        x = supports.x
        self._check_call(x, supports.y, query_x, query_y)
        rows = 0 if query_x is None else query_x.shape[1]
        row, query_row = x.shape[2:], () if query_x is None else query_x.shape[2:]
        signature = (x.dtype, x.device, supports.y.shape[2:], tuple(names))
        key = (x.shape[1], rows, row, query_row, *signature)
        known = self._programs.get(key)
        if known is None:
            if len(self._programs) >= KEPT:
                self._programs.clear()
            try:
                known = self._make(model, names, supports, query_x)
            except NoProgram as reason:
                known = str(reason)
            self._programs[key] = known
        if isinstance(known, str):
            raise NoProgram(known)
        assert isinstance(self._loss, NamedLoss)
        shape = torch.Size((x.shape[1], *known.program.output))
        if supports.top is not None and supports.top >= shape[1]:
            check_prediction(self._loss, shape, supports.y.shape[1:], supports)
        if known.normalises and (masked() or (self._loss.labelled and supports.padded())):
            raise NoProgram("tasks are padded and batch norm takes its statistics over all rows")
        return known

    def _check_call(
        self, x: Tensor, y: Tensor, query_x: Tensor | None, query_y: Tensor | None
    ) -> None:
        if not isinstance(self._loss, NamedLoss):
            raise NoProgram("the loss is a function of your own")
        unusual = unusual_call() or _autocast(x.device.type)
        if unusual is not None:
            raise NoProgram(unusual)
        if x.dtype not in DTYPES:
            raise NoProgram(f"inputs are {str(x.dtype).removeprefix('torch.')}")
        if query_x is not None and query_x.dtype != x.dtype:
            raise NoProgram("supports and queries differ in dtype")
        for target in (y, query_y):
            if target is None:
                continue
            if target.requires_grad and torch.is_grad_enabled():
                raise NoProgram("targets require a gradient")
            if not self._loss.labelled and target.dtype != x.dtype:
                raise NoProgram("targets differ from inputs in dtype")
        for t in (x, y, query_x, query_y):
            if t is not None and (
                type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided
            ):
                raise NoProgram(f"an input is no plain tensor but a {type(t).__name__}")

    def _make(
        self, model: nn.Module, names: Sequence[str], supports: Supports, query_x: Tensor | None
    ) -> Prepared:
        x = supports.x
        found = self._trace(model, x.shape[2:], x.shape[1], x.dtype)
        if query_x is not None and query_x.shape[1]:
            again = self._trace(model, query_x.shape[2:], query_x.shape[1], x.dtype)
            if again != found:
                raise NoProgram("the forward pass differs between supports and queries")
        used = found.tensors
        fast = [name for name in names if name in used]
        if not fast:
            raise NoProgram("no parameter that adapts is used")
        shared = sorted(used - set(fast))
        refs = {n: f"f{i}" for i, n in enumerate(fast)} | {n: f"s{i}" for i, n in enumerate(shared)}
        structure = self.structure(model)
        for name in used:
            tensor = structure.tensor(name)
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
                raise NoProgram(f"{name!r} is no plain tensor but a {type(tensor).__name__}")
            if tensor.dtype != x.dtype or tensor.device != x.device:
                kind = str(tensor.dtype).removeprefix("torch.")
                raise NoProgram(f"{name!r} is {kind} on {tensor.device}, unlike the inputs")
        loss = self._loss
        assert isinstance(loss, NamedLoss)
        weight = loss.weight
        program = found.program(_program_loss(loss, f"s{len(shared)}", x), refs)
        targets = (1, *supports.y.shape[2:])
        if loss.labelled:
            if len(program.output) != 1 or len(targets) != 1:
                raise NoProgram("labels are not one for each row")
            if weight is not None and weight.shape != program.output:
                raise NoProgram("class weights do not fit the outputs")
        elif (1, *program.output) != targets:
            raise NoProgram("targets are not of the shape of the outputs")
        if program.random and self._randomness == "same":
            raise NoProgram("dropout is to be the same for all tasks")
        places = [i for i, name in enumerate(names) if name in used]
        tensors = [structure.tensor(name) for name in fast], [structure.tensor(n) for n in shared]
        if weight is not None:
            tensors[1].append(weight)
        _try_kernel(program, *tensors, supports.x, supports.y)
        return Prepared(program, program.text(), fast, shared, places, weight is not None)

    def _trace(self, model: nn.Module, row: Shape, rows: int, dtype: torch.dtype) -> Trace:
        key = (tuple(row), rows, dtype)
        if key not in self._traces:
            if len(self._traces) >= KEPT:
                self._traces.clear()
            structure = self.structure(model)
            found: Trace | str
            try:
                found = trace(model, structure.slots, tuple(row), rows, self._batch_norm, dtype)
            except NoProgram as reason:
                found = str(reason)
            if not structure.same():
                raise NoProgram("the forward pass changes the module")
            self._traces[key] = found
        known = self._traces[key]
        if isinstance(known, str):
            raise NoProgram(known)
        return known

    def _operands(
        self, ready: Prepared, model: nn.Module, values: dict[str, Tensor], rates: Rates, steps: int
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The tensors of the op: what adapts, what is shared, and the rates."""
        structure = self._structure
        assert structure is not None
        fast = [values[name] for name in ready.fast]
        shared = [
            values[name] if name in values else structure.tensor(name) for name in ready.shared
        ]
        if ready.weighted:
            assert isinstance(self._loss, NamedLoss)
            shared.append(self._loss.weight)  # type: ignore[arg-type]
        return fast, shared, self._rates(rates, steps, ready.places, fast[0])

    def _rates(self, rates: Rates, steps: int, places: list[int], like: Tensor) -> Tensor:
        """The rates as Tensor[R, E]."""
        if not rates.tensors:
            key = (rates.value, like.dtype, like.device)
            if key not in self._constants:
                if len(self._constants) >= KEPT:  # a rate that is annealed
                    self._constants.clear()
                self._constants[key] = torch.full(
                    (1, 1), rates.value, dtype=like.dtype, device=like.device
                )
            return self._constants[key]
        tensors = rates.tensors
        if not rates.shared and len(places) != len(tensors):
            tensors = [tensors[i] for i in places]
        lead = 1 if rates.per_step else 0
        if rates.per_step and tensors[0].shape[0] != steps:
            last = tensors[0].shape[0] - 1
            index = [min(step, last) for step in range(max(steps, 1))]
            tensors = [t[index] for t in tensors]
        count = tensors[0].shape[0] if lead else 1
        if len(tensors) == 1:
            table = tensors[0].reshape(count, -1)
        elif all(t.dim() == lead for t in tensors):
            table = torch.stack(tensors, lead).reshape(count, -1)
        else:
            table = torch.cat([t.reshape(count, -1) for t in tensors], 1)
        return table.to(like.dtype)

    def run(
        self,
        ready: Prepared,
        model: nn.Module,
        values: dict[str, Tensor],
        rates: Rates,
        supports: Supports,
        query_x: Tensor | None,
        steps: int,
        first_order: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Prediction for the queries, and without them the adapted parameters ``ready.fast``."""
        fast, shared, table = self._operands(ready, model, values, rates, steps)
        support_x = ready.rows(supports.x)
        whole = query_x is None
        query = support_x[:, :0].detach() if query_x is None else ready.rows(query_x)
        learning = torch.is_grad_enabled() and any(
            t.requires_grad for t in (*fast, *shared, table, support_x, query)
        )
        prediction, adapted, _ = adapt(
            ready.text,
            fast,
            shared,
            table,
            support_x,
            supports.y,
            query,
            steps,
            self._seed(ready),
            first_order,
            whole,
            learning,
        )
        return prediction, adapted

    def loss(
        self,
        ready: Prepared,
        model: nn.Module,
        values: dict[str, Tensor],
        rates: Rates,
        supports: Supports,
        queries: Supports,
        steps: int,
        first_order: bool,
        backward: bool,
    ) -> Tensor:
        """Mean over the tasks of their query losses, with its gradients computed in one go.

        ``backward``: these are handed out at once, and the loss has no graph.
        """
        operands = self._operands(ready, model, values, rates, steps)
        work, tensors = self._work(ready, operands, supports, queries, steps, first_order)
        return hand_out(*work.gradients(tensors)) if backward else work.loss(tensors)

    def _work(
        self,
        ready: Prepared,
        operands: tuple[list[Tensor], list[Tensor], Tensor],
        supports: Supports,
        queries: Supports,
        steps: int,
        first_order: bool,
    ) -> tuple[Work, tuple[Tensor, ...]]:
        """A meta-step, and the tensors that it may have gradients for."""
        fast, shared, table = operands
        work = Work(
            ready.text,
            (len(fast), len(shared)),
            (supports.y, queries.y),
            (steps, self._seed(ready), first_order),
            self._task_chunk,
        )
        return work, (*fast, *shared, table, ready.rows(supports.x), ready.rows(queries.x))

    def remember(self, ready: Prepared, given: Sequence[Tensor]) -> None:
        """Let `recall` take such a call from now on, as long as the module is what it is."""
        structure = self._structure
        assert structure is not None
        assert isinstance(self._loss, NamedLoss)
        labelled = self._loss.labelled
        if labelled and (self._loss.ignore != IGNORE_INDEX or given[1].dtype != torch.int64):
            return
        if given[1].requires_grad or given[3].requires_grad:
            return
        if len(self._recalled) >= KEPT:
            self._recalled.clear()
        slots = [structure.slot(n) for n in ready.fast], [structure.slot(n) for n in ready.shared]
        padding_matters = labelled and ready.normalises
        self._recalled[_signature(*given)] = ready, slots, padding_matters

    def recall(
        self,
        model: nn.Module,
        rates: Rates,
        given: Sequence[Any],
        steps: int,
        first_order: bool,
        backward: bool,
    ) -> Tensor | None:
        """What `loss` returns, by the shortest way, if such a call was taken before; else None.

        For small networks, whose tasks take less time than all the checks of a call. What they
        would find is either in the signature, or the kernel finds it: then None as well.
        """
        structure = self._structure
        if not self._recalled or model is not self._model or structure is None:
            return None
        for t in given:
            if type(t) is not Tensor or not t.is_cpu:
                return None
        found = self._recalled.get(_signature(*given))
        if found is None or not structure.same(False) or unusual_call() or _autocast("cpu"):
            return None
        ready, (fast, shared), padding_matters = found
        support_x, support_y, query_x, query_y = given
        if padding_matters and min(int(support_y.min()), int(query_y.min())) < 0:
            return None
        tensors = [held[key] for held, key in fast]
        others = [held[key] for held, key in shared]
        if ready.weighted:
            assert isinstance(self._loss, NamedLoss)
            others.append(self._loss.weight)
        operands = tensors, others, self._rates(rates, steps, ready.places, tensors[0])
        supports, queries = Supports(support_x, support_y), Supports(query_x, query_y)
        work, inputs = self._work(ready, operands, supports, queries, steps, first_order)
        try:
            if not backward:
                return work.loss(inputs)
            found = work.gradients(inputs)
        except (RuntimeError, IndexError):
            return None
        return hand_out(*found)

    def _seed(self, ready: Prepared) -> int:
        return int(torch.randint(2**62, ())) if ready.program.random else 0


def _try_kernel(
    program: Program, fast: list[Tensor], shared: list[Tensor], x: Tensor, y: Tensor
) -> None:
    """Run no tasks at all, for what only the kernel knows that it does not take."""
    with torch.no_grad():
        rates = x.new_zeros(1, 1)
        none = x[:0].detach().reshape(0, x.shape[1], *program.input)
        try:
            adapt(program.text(), fast, shared, rates, none, y[:0], none, 1, 0, True, False, False)
        except (RuntimeError, ValueError) as error:
            reason = str(error).split("\n", 1)[0].removeprefix("fastmeta: ")
            raise NoProgram(reason) from error


def _program_loss(loss: NamedLoss, weight: str, like: Tensor) -> ProgramLoss:
    if loss.kind == "huber":
        return ProgramLoss("huber", {"delta": loss.delta})
    if loss.kind != "cross_entropy":
        return ProgramLoss(loss.kind, {})
    options: dict[str, Any] = {"smoothing": loss.smoothing, "ignore": -100}
    if loss.weight is not None:
        if loss.weight.dtype != like.dtype or loss.weight.device != like.device:
            raise NoProgram("class weights differ from the inputs in dtype or device")
        if loss.weight.requires_grad:
            raise NoProgram("class weights require a gradient")
        options["weight"] = weight
    return ProgramLoss("cross_entropy", options)


def _signature(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Any:
    learn = sy.requires_grad, qy.requires_grad
    return (sx.shape, sy.shape, qx.shape, qy.shape, sx.dtype, sy.dtype, qx.dtype, qy.dtype, learn)


def _autocast(device_type: str) -> str | None:
    return "autocast is enabled" if torch.is_autocast_enabled(device_type) else None


def unusual_call() -> str | None:
    """What is going on around the call, so that it has to run as it is written."""
    if _transforms_active() or forward_ad._current_level >= 0:
        return "torch.func transforms are active"
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if torch._C._len_torch_function_stack() and not all(
        isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()
    ):
        return "a TorchFunctionMode is active"
    return None
