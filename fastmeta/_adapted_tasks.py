"""Tasks after adaptation: a model with one set of weights for each task."""

from __future__ import annotations

import contextlib
import copy
import operator
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fastmeta._inner_loop import TaskRunner, Weights
from fastmeta._inner_losses import named_loss
from fastmeta._lent_model import BATCH_NORM, find_slots
from fastmeta._padding import Look, Queries
from fastmeta.errors import check_choice, describe, fail

__all__ = ["AdaptedTask", "AdaptedTasks", "check_queries"]

_FORMAT = "fastmeta.AdaptedTasks/1"


def check_queries(
    function: str, query_x: Any, query_mask: Any, tasks: int, device: torch.device | None = None
) -> Queries:
    """Check the queries of ``tasks`` tasks."""
    if not isinstance(query_x, Tensor):
        fail(TypeError, function, "query_x", "a tensor", describe(query_x))
    if query_x.dim() < 2 or query_x.shape[0] != tasks:
        wanted = f"of shape [T={tasks}, Q, ...]"
        fail(ValueError, function, "query_x", wanted, f"shape {list(query_x.shape)}")
    if device is not None and query_x.device != device:
        fail(ValueError, function, "query_x", f"on {device}, like support_x", query_x.device)
    if query_mask is None:
        return Queries(query_x)
    if not isinstance(query_mask, Tensor) or query_mask.dtype != torch.bool:
        fail(TypeError, function, "query_mask", "a bool tensor", describe(query_mask))
    if query_mask.shape != query_x.shape[:2]:
        wanted = f"of shape {list(query_x.shape[:2])}, as query_x has [T, Q]"
        fail(ValueError, function, "query_mask", wanted, f"shape {list(query_mask.shape)}")
    if query_mask.device != query_x.device:
        fail(ValueError, function, "query_mask", f"on {query_x.device}", query_mask.device)
    return Queries(query_x, query_mask)


class AdaptedTask:
    """One adapted task: ``task(x)`` is the model's output with this task's weights.

    Attributes:
        parameters: The adapted parameters by name, Tensor[*shape] each.
    """

    def __init__(self, model: nn.Module, runner: TaskRunner, parameters: dict[str, Tensor]) -> None:
        self._model = model
        self._runner = runner
        self.parameters = parameters

    def __call__(self, query_x: Tensor) -> Tensor:
        """Output of the model.

        Args:
            query_x: Tensor[Q, ...].

        Returns:
            Tensor[Q, ...].
        """
        return AdaptedTasks(
            self._model, self._runner, {n: p.unsqueeze(0) for n, p in self.parameters.items()}
        )(query_x.unsqueeze(0))[0]

    def to_module(self) -> nn.Module:
        """A copy of the model that has this task's weights and no tie to anything else.

        A model that adapted under ``batch_norm="batch"`` never had running statistics for its
        weights, so in the copy its batch-norm layers keep none: they normalise by the batch, in
        both modes.
        """
        module = copy.deepcopy(self._model)
        values = dict(module.named_parameters())
        with torch.no_grad():
            for name, value in self.parameters.items():
                values[name].copy_(value)
        if self._runner.batch_norm == "batch":
            for layer in module.modules():
                if isinstance(layer, _NormBase):
                    layer.track_running_stats = False
                    layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        return module

    def __repr__(self) -> str:
        return f"AdaptedTask({len(self.parameters)} adapted parameters)"


class AdaptedTasks:
    """T adapted tasks, as ``MAML.adapt`` returns them.

    Call them on queries Tensor[T, Q, ...], index them (an `AdaptedTask`, or of a slice, a list or a
    tensor of numbers or of bools the tasks that it names), iterate over them, save them. What did
    not adapt (with ANIL the body) and the buffers are not copied: they are those of the model, so
    further training of it shows here. ``save`` keeps all.

    Attributes:
        parameters: The adapted parameters by name, Tensor[T, *shape] each; with their graph, unless
            they were adapted under ``torch.no_grad()`` or come from ``detach``.
    """

    def __init__(self, model: nn.Module, runner: TaskRunner, parameters: dict[str, Tensor]) -> None:
        self._model = model
        self._runner = runner
        self.parameters = parameters

    def __call__(self, query_x: Tensor, *, query_mask: Tensor | None = None) -> Tensor:
        """Predictions of each task for its queries.

        Args:
            query_x: Tensor[T, Q, ...], what the model takes.
            query_mask: bool Tensor[T, Q], False for padding, which then gives zeros and does not
                enter batch statistics; None if there is none.

        Returns:
            Tensor[T, Q, ...]: what the model returns.

        Raises:
            ValueError: The shapes do not fit.
            TypeError: An argument is of the wrong type.
        """
        queries = check_queries("AdaptedTasks", query_x, query_mask, len(self))
        Look().share(queries)
        weights = Weights.of(self._model, list(self.parameters), list(self.parameters.values()))
        return self._runner.predict(weights, queries)

    def __len__(self) -> int:
        return next(iter(self.parameters.values())).shape[0]

    @overload
    def __getitem__(self, index: int) -> AdaptedTask: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> AdaptedTasks: ...

    def __getitem__(
        self, index: int | slice | Sequence[int] | Tensor
    ) -> AdaptedTask | AdaptedTasks:
        several: slice | Tensor
        if isinstance(index, slice) or (isinstance(index, Tensor) and index.dim()):
            several = index
        elif isinstance(index, Sequence):
            several = torch.tensor(index, dtype=None if len(index) else torch.int64)
        else:
            task = operator.index(index)
            if not -len(self) <= task < len(self):
                wanted = f"out of range for {len(self)} tasks"
                raise IndexError(f"AdaptedTasks: index {task} is {wanted}")
            parts = {name: p[task] for name, p in self.parameters.items()}
            return AdaptedTask(self._model, self._runner, parts)
        parts = {name: p[several] for name, p in self.parameters.items()}
        return AdaptedTasks(self._model, self._runner, parts)

    def __iter__(self) -> Iterator[AdaptedTask]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"AdaptedTasks({len(self)} tasks, {len(self.parameters)} adapted parameters)"

    def detach(self) -> AdaptedTasks:
        """The same tasks without the graph of their adaptation, sharing its memory."""
        parts = {name: p.detach() for name, p in self.parameters.items()}
        return AdaptedTasks(self._model, self._runner, parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tasks to ``path``, atomically: it holds all of them or what it held before.

        The file has the adapted parameters, what the tasks share (the other parameters, the
        buffers) and the options; ``torch.load(path, weights_only=True)`` reads it.

        Args:
            path: File to write or replace; its folder must exist.
        """
        slots = find_slots(self._model)
        own = {id(held[key]) for name in self.parameters for held, key in slots[name]}
        state = self._model.state_dict(keep_vars=True).items()
        shared = {n: v.detach() for n, v in state if isinstance(v, Tensor) and id(v) not in own}
        runner = self._runner
        content = {
            "format": _FORMAT,
            "parameters": {n: p.detach().clone() for n, p in self.parameters.items()},
            "shared": shared,
            "batch_norm": runner.batch_norm,
            "strategy": runner.strategy,
            "task_chunk": runner.task_chunk,
            "randomness": runner.randomness,
        }
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "xb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> AdaptedTasks:
        """Read tasks that ``save`` wrote.

        Args:
            path: The file.
            model: A module of the same architecture. It is copied, and the copy gets the saved
                weights; its device is where the tasks come to.

        Returns:
            The tasks, detached.

        Raises:
            ValueError: The file holds something else, or does not fit ``model``.
        """
        first = next(model.parameters(), None)
        device = torch.device("cpu") if first is None else first.device
        content = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(content, Mapping) or content.get("format") != _FORMAT:
            fail(ValueError, "AdaptedTasks.load", "path", f"a file of format {_FORMAT}", repr(path))
        check_choice("AdaptedTasks.load", "batch_norm", content["batch_norm"], BATCH_NORM)
        model = copy.deepcopy(model)
        parameters: dict[str, Tensor] = content["parameters"]
        _fit(model, parameters, content["shared"])
        options = ("batch_norm", "strategy", "task_chunk", "randomness")
        # The loss is the business of adaptation, which is over.
        runner = TaskRunner(named_loss("mse"), **{key: content[key] for key in options})
        return cls(model, runner, parameters)


def _fit(model: nn.Module, parameters: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
    """Give ``model`` the shared weights, once all is known to fit."""
    wanted = {name: list(p.shape) for name, p in model.named_parameters()}
    saved = {name: list(p.shape[1:]) for name, p in parameters.items()}
    slots = find_slots(model)
    own = {id(held[key]) for name in saved if name in slots for held, key in slots[name]}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in own:
            wanted[name] = list(value.shape)
    saved |= {name: list(value.shape) for name, value in shared.items()}
    if wanted != saved:
        names = sorted(n for n in wanted.keys() | saved.keys() if wanted.get(n) != saved.get(n))
        model_has = {name: wanted.get(name) for name in names}
        file_has = {name: saved.get(name) for name in names}
        fail(ValueError, "AdaptedTasks.load", "model", f"with the tensors {file_has}", model_has)
    model.load_state_dict(shared, strict=False)
