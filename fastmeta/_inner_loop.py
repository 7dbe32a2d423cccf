"""The inner loop of MAML over T tasks: three strategies, and the choice between them.

Under ``"engine"`` all of it is one call of an op, for modules that have a program (`_engine`).

Under ``"vmap"`` only the forward pass is vectorised: ``torch.func.vmap`` maps the loss over the
tasks, each with its own weights, and the gradient of the sum of their losses, taken outside of it,
is each task's own. Derivatives of any order are then those of the batched operations themselves;
the batching rules of *backward* passes, silently wrong for batch norm and layer norm, are never
used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta._checkpointed_steps import Adaptation
from fastmeta._descent import Rates
from fastmeta._engine import Engine, NoProgram, Prepared, has_kernel
from fastmeta._inner_losses import (
    Loss,
    NamedLoss,
    check_prediction,
    query_losses,
    task_loss,
)
from fastmeta._lent_model import LentModel, PaddingMixes, Slots, find_slots
from fastmeta._padding import Queries, Supports, valid_rows
from fastmeta._recompute import RngState, rng_restore, rng_state
from fastmeta._recomputed_chunk import recomputed_chunk
from fastmeta.errors import fail

__all__ = ["STRATEGIES", "Rates", "TaskRunner", "Weights"]

#: The choices of ``strategy``.
STRATEGIES = ("auto", "engine", "vmap", "loop")

_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


@dataclass
class Weights:
    """A model with the parameters to adapt: ``theta``, shared by the tasks or with one for each.

    ``others`` are to stand for parameters that are not adapted; those left out are as they are.
    """

    model: nn.Module
    slots: Slots
    names: list[str]
    theta: list[Tensor]
    others: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, names: Sequence[str], theta: Sequence[Tensor]) -> Weights:
        """``theta`` for the parameters ``names`` of ``model``."""
        return cls(model, find_slots(model), list(names), list(theta))

    def values(self) -> dict[str, Tensor]:
        """The tensors that stand for parameters of the model."""
        return self.others | dict(zip(self.names, self.theta, strict=True))


class TaskRunner:
    """Adapts and evaluates tasks by one strategy, and remembers which it took and why."""

    def __init__(
        self,
        loss: Loss,
        *,
        batch_norm: str,
        strategy: str,
        task_chunk: int | None,
        randomness: str,
    ) -> None:
        self.loss = loss
        self.batch_norm = batch_norm
        self.strategy = strategy
        self.task_chunk = task_chunk
        self.randomness = randomness
        self.engine = Engine(loss, batch_norm, randomness, task_chunk)
        self.passed: str | None = None
        self._recallable: tuple[str, str] | None = None
        self.proven = False
        self.refused: str | None = None
        self.last: tuple[str, str] | None = None
        # Of a CUDA graph that is being captured: whether, and whether the run draws random numbers.
        self.recording = False
        self.draws = True

    def with_loss(self, loss: Loss) -> TaskRunner:
        """One like this, of another loss."""
        return TaskRunner(
            loss,
            batch_norm=self.batch_norm,
            strategy=self.strategy,
            task_chunk=self.task_chunk,
            randomness=self.randomness,
        )

    def adapt(
        self, weights: Weights, rates: Rates, supports: Supports, steps: int, first_order: bool
    ) -> list[Tensor]:
        """Adapted parameters of all tasks, Tensor[T, ...] each."""
        second = torch.is_grad_enabled() and not first_order
        parts = [
            self._run(_Job(self, weights, rates, supports.part(*chunk), None, steps, second))
            for chunk in self._chunks(supports.x)
        ]
        if len(parts) == 1:
            return parts[0]  # type: ignore[no-any-return]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def forward(
        self,
        weights: Weights,
        rates: Rates,
        supports: Supports,
        queries: Queries,
        steps: int,
        first_order: bool,
    ) -> Tensor:
        """Predictions for the queries of all tasks after adaptation."""

        def run(weights: Weights, rates: Rates, part: Supports, query: Queries) -> Tensor:
            second = torch.is_grad_enabled() and not first_order
            out: Tensor = self._run(_Job(self, weights, rates, part, query, steps, second))
            return out

        whole = self.task_chunk is None or self.task_chunk >= supports.x.shape[0]
        if not (whole or self.taped or not torch.is_grad_enabled() or _transforms_active()):
            run = recomputed_chunk(run, self.loss, self.draws)
        parts = [
            run(weights, rates, supports.part(*chunk), queries.part(*chunk))
            for chunk in self._chunks(supports.x)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def predict(self, weights: Weights, queries: Queries) -> Tensor:
        """Predictions of tasks with the weights ``weights.theta``, Tensor[T, ...] each."""
        if not queries.x.shape[0]:  # of any one task they have the shape
            theta = [t.new_zeros(1, *t.shape[1:]) for t in weights.theta]
            one = Queries(queries.x.new_zeros(1, *queries.x.shape[1:]))
            return self.predict(replace(weights, theta=theta), one)[:0]
        parts = []
        for start, stop in self._chunks(queries.x):
            part = replace(weights, theta=[t[start:stop] for t in weights.theta])
            query = queries.part(start, stop)
            parts.append(self._run(_Job(self, part, None, None, query, 0, False)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def taped(self) -> bool:
        """Whether nothing can be run again, for its random numbers would be others."""
        return self.recording and self.draws

    def start(self, device: torch.device) -> RngState | None:
        """Where the random numbers start that are the same for all tasks, if they are."""
        if self.randomness != "same" or not self.draws:
            return None
        if self.recording:
            raise RuntimeError("random numbers start over for each task or chunk of tasks")
        return rng_state(device)

    def _chunks(self, like: Tensor) -> Iterator[tuple[int, int]]:
        tasks = like.shape[0]
        size = self.task_chunk or tasks
        state = self.start(like.device) if size < tasks else None
        for start in range(0, tasks, size):
            if state is not None:
                rng_restore(state, like.device)
            yield start, min(start + size, tasks)

    def outlook(self, device: torch.device) -> tuple[str, str]:
        """The strategy of the last run, or the one that the first will try, and why."""
        if self.last is not None:
            return self.last
        if self.strategy == "auto":
            first = isinstance(self.loss, NamedLoss) and has_kernel(device.type)
            return "engine" if first else "vmap", "it will be tried first"
        return self.strategy, f"strategy={self.strategy!r} was asked for"

    def meta_loss(
        self,
        weights: Weights,
        rates: Rates,
        supports: Supports,
        queries: Supports,
        given: Sequence[Tensor],
        steps: int,
        first_order: bool,
        backward: bool,
    ) -> Tensor:
        """Mean over the tasks of the loss for their queries, after adaptation.

        ``given`` are the user's inputs. ``backward`` hands the gradients out: no graph is left.
        """
        ready = self._ready(weights, supports, queries.x, queries.y, queries.padded)
        if ready is not None:
            assert isinstance(self.loss, NamedLoss)
            shape = torch.Size((queries.x.shape[1], *ready.program.output))
            check_prediction(self.loss, shape, queries.y.shape[1:], queries)
            values = weights.values()
            self.engine.remember(ready, given)
            self._recallable = self.last
            return self.engine.loss(
                ready, weights.model, values, rates, supports, queries, steps, first_order, backward
            )
        if not isinstance(self.loss, NamedLoss):
            queries.padded()  # it has to know anyway; else the mask may be seen by the device alone
        mask = None if queries.known is False else valid_rows(queries.y)
        rows = Queries(queries.x, mask, queries.known, queries.look)
        out = self.forward(weights, rates, supports, rows, steps, first_order)
        loss = query_losses(self.loss, out, queries).mean()
        if not backward:
            return loss
        loss.backward()
        return loss.detach()

    def recall(
        self,
        model: nn.Module,
        rates: Rates,
        given: Sequence[Any],
        steps: int,
        first_order: bool,
        backward: bool,
    ) -> Tensor | None:
        """What `meta_loss` does, by the shortest way, for a call like one before; or None."""
        loss = self.engine.recall(model, rates, given, steps, first_order, backward)
        if loss is not None:
            self.last = self._recallable
        return loss

    def _ready(
        self,
        weights: Weights,
        supports: Supports,
        query_x: Tensor | None,
        query_y: Tensor | None,
        masked: Callable[[], bool],
    ) -> Prepared | None:
        """What the engine runs, or None where another strategy is to; then `passed` says why."""
        if self.strategy not in ("auto", "engine"):
            return None
        device = supports.x.device.type
        compiled = has_kernel(device)
        try:
            if self.strategy == "auto" and not compiled:
                raise NoProgram(f"it is not compiled for {device}")
            ready = self.engine.prepare(
                weights.model, weights.names, supports, query_x, masked, query_y
            )
        except NoProgram as reason:
            if self.strategy == "engine":
                fail(ValueError, "MAML", "strategy", f"another here, because {reason}", "'engine'")
            self.passed = str(reason)
            return None
        on = "" if compiled else f", on the reference, for it is not compiled for {device}"
        self.last = ("engine", f"the model is a program ({ready.summary}){on}")
        return ready

    def _engine(self, job: _Job, ready: Prepared) -> Any:
        """The job by the engine."""
        weights, supports, queries = job.weights, job.supports, job.queries
        assert supports is not None
        assert job.rates is not None
        prediction, adapted = self.engine.run(
            ready,
            weights.model,
            weights.values(),
            job.rates,
            supports,
            None if queries is None else queries.x,
            job.steps,
            not job.second_order,
        )
        if queries is not None:
            return prediction if queries.mask is None else _hide(prediction, queries.mask)
        found, tasks = dict(zip(ready.fast, adapted, strict=True)), supports.x.shape[0]
        # What the program does not use stays as it is.
        return [
            found[name] if name in found else theta.expand(tasks, *theta.shape)
            for name, theta in zip(weights.names, weights.theta, strict=True)
        ]

    def _run(self, job: _Job) -> Any:
        if job.supports is not None:
            query_x, masked = None, _nothing_is_masked
            if job.queries is not None:
                query_x, masked = job.queries.x, job.queries.padded
            ready = self._ready(job.weights, job.supports, query_x, None, masked)
            if ready is not None:
                return self._engine(job, ready)
        if self.strategy == "loop":
            return self._loop(job, "strategy='loop' was asked for")
        if self.refused is not None:
            return self._loop(job, self.refused)
        if _inside_vmap():
            wanted = "outside of torch.func.vmap, with the tasks in dimension 0"
            fail(RuntimeError, "MAML", "the call", wanted, "a call inside it")
        if self.strategy == "vmap":
            try:
                return self._vmap(job, "strategy='vmap' was asked for")
            except PaddingMixes as mixes:
                wanted = f"'loop' or 'auto' for padded tasks, because {mixes}"
                reason: str | None = wanted
            fail(ValueError, "MAML", "strategy", str(reason), "'vmap'")
        return self._vmap_or_loop(job)

    def _vmap_or_loop(self, job: _Job) -> Any:
        like = job.like
        state = None if self.proven else rng_state(like.device)
        passed = f"; not the engine: {self.passed}" if self.passed else ""
        try:
            reason = f"torch.func.vmap can map the model over the tasks{passed}"
            result = self._vmap(job, reason)
            self.proven = True
            return result
        except torch.OutOfMemoryError:
            raise
        except PaddingMixes as mixes:
            because, refuse = (
                f"tasks are padded and {mixes}: each is run without its padding",
                False,
            )
        except Exception as error:
            if self.recording:
                raise
            first = str(error).strip().split("\n", 1)[0]
            because, refuse = f"vmap failed with {type(error).__name__}: {first}{passed}", True
        if state is not None:
            rng_restore(state, like.device)
        # An error of the user's shows here again, now in torch's own words for one task.
        result = self._loop(job, because)
        if refuse:
            if not self.proven:
                self.refused = because
            warnings.warn(
                f"MAML: tasks run one after another (strategy 'loop'), because {because}. "
                "The numbers are the same; strategy='loop' says that this is meant.",
                stacklevel=2,
            )
        return result

    def _vmap(self, job: _Job, reason: str) -> Any:
        for name, places in job.weights.slots.items():
            kind = type(places[0][0][places[0][1]])
            if kind not in (Tensor, nn.Parameter):
                raise RuntimeError(f"the parameter {name!r} is a {kind.__name__}")
        with job.lend() as lent:
            lent.place(job.weights.others)
            result = job.batched(lent)
            replaced = next(lent.replaced_buffers(), None)
            if replaced is not None:
                raise RuntimeError(f"the forward pass replaces the buffer {replaced!r}")
        if job.supports is not None:
            self.last = ("vmap", reason)
        return result

    def _loop(self, job: _Job, reason: str) -> Any:
        with job.lend() as lent:
            lent.place(job.weights.others)
            result = job.one_by_one(lent)
        if job.supports is not None:
            self.last = ("loop", reason)
        return result


@dataclass
class _Job:
    """What a chunk of tasks is to do: adapt (to supports), predict (for queries), or both."""

    runner: TaskRunner
    weights: Weights
    rates: Rates | None
    supports: Supports | None
    queries: Queries | None
    steps: int
    second_order: bool

    @property
    def like(self) -> Tensor:
        """Any of the inputs."""
        part = self.supports or self.queries
        assert part is not None
        return part.x

    def lend(self) -> LentModel:
        """The model, for the time of the run."""
        w = self.weights
        batch_norm = self.runner.batch_norm
        return LentModel(
            w.model, w.slots, w.names, batch_norm=batch_norm, second_order=self.second_order
        )

    def batched(self, lent: LentModel) -> Any:
        """All tasks at once."""
        theta, mode = self.weights.theta, self.runner.randomness
        if self.supports is not None and self.rates is not None:
            supports, tasks = self.supports, self.supports.x.shape[0]
            theta = [p.expand(tasks, *p.shape) for p in theta]
            loss = task_loss(self.runner.loss, supports, trimmed=False)

            def losses(lent: LentModel, theta: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
                def task(theta: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
                    return loss(lent(theta, x), y)

                return torch.func.vmap(task, randomness=mode)(theta, x, y).sum()

            lent.pad(supports.padded)
            theta = self._descend(
                lent,
                Adaptation(self.lend, losses, supports.x, supports.y, self.runner.draws),
                theta,
            )
        if self.queries is None:
            return theta
        queries = self.queries
        lent.pad(queries.padded)
        out = torch.func.vmap(lent, randomness=mode)(theta, queries.x)
        if queries.mask is not None:
            out = _hide(out, queries.mask)
        return out

    def one_by_one(self, lent: LentModel) -> Any:
        """Task after task, rows of padding taken out."""
        tasks, results = self.like.shape[0], []
        state = self.runner.start(self.like.device)
        for task in range(tasks):
            if state is not None and task:
                rng_restore(state, self.like.device)
            lent.fresh_buffers()
            results.append(self._one(lent, task))
        if self.queries is None:
            return [torch.stack(column) for column in zip(*results, strict=True)]
        return torch.stack(results)

    def _one(self, lent: LentModel, task: int) -> Any:
        # Aliases: hooks of the parameters are for the gradients of the outer loop.
        theta = [t.view_as(t) for t in self.weights.theta]
        if self.supports is not None and self.rates is not None:
            x, y = self.supports.rows(task)
            loss = task_loss(self.runner.loss, self.supports, trimmed=True)
            if x.shape[0]:  # a task of nothing but padding stays as it is
                adaptation = Adaptation(
                    self.lend,
                    lambda lent, theta, x, y: loss(lent(theta, x), y),
                    x,
                    y,
                    self.runner.draws,
                )
                theta = self._descend(lent, adaptation, theta)
        else:
            theta = [t[task] for t in theta]
        if self.queries is None:
            return theta
        return self._query(lent, theta, self.queries, task)

    def _descend(self, lent: LentModel, what: Adaptation, theta: list[Tensor]) -> list[Tensor]:
        assert self.rates is not None
        # Under torch.func a step is its own graph; of one step there is nothing to save.
        many = self.second_order and self.steps > 1
        if many and not (self.runner.taped or _transforms_active()):
            return what.checkpointed(lent, theta, self.rates, self.steps)
        return what.taped(lent, theta, self.rates, self.steps, self.second_order)

    @staticmethod
    def _query(lent: LentModel, theta: list[Tensor], queries: Queries, task: int) -> Tensor:
        x = queries.x[task]
        if not queries.padded():
            return lent(theta, x)
        assert queries.mask is not None
        mask = queries.mask[task]
        valid = mask.nonzero().squeeze(1)
        if not valid.numel():
            return _hide(lent(theta, x), mask)
        out = lent(theta, x[valid])
        return out.new_zeros(x.shape[0], *out.shape[1:]).index_copy(0, valid, out)


def _nothing_is_masked() -> bool:
    return False


def _hide(out: Tensor, mask: Tensor) -> Tensor:
    """``out`` with zeros in the rows that are no queries."""
    return torch.where(mask.reshape(*mask.shape, *(1,) * (out.dim() - mask.dim())), out, 0)


def _inside_vmap() -> bool:
    if not _transforms_active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)
