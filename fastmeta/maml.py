"""Model-agnostic meta-learning: `MAML` and the `AdaptedTasks` that it makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta._adapted_tasks import AdaptedTask, AdaptedTasks, check_queries
from fastmeta._graph_capture import Request
from fastmeta._graphed_step import GraphedSteps
from fastmeta._inference import outside_inference, usable
from fastmeta._inner_loop import STRATEGIES, Rates, TaskRunner, Weights
from fastmeta._inner_losses import LOSSES, NamedLoss, check_supports, named_loss
from fastmeta._learned_rates import LEARN_LR, make_rates, rates_of
from fastmeta._lent_model import BATCH_NORM, Slots
from fastmeta._padding import Look
from fastmeta._selection import Adapt, check_model, selected
from fastmeta.errors import check_choice, check_integer, describe, fail, is_number

__all__ = ["MAML", "AdaptedTask", "AdaptedTasks", "Plan"]


@dataclass(frozen=True)
class Plan:
    """How `MAML` runs its tasks.

    Attributes:
        strategy: ``"engine"``, ``"vmap"`` or ``"loop"``.
        reason: Why; of the engine, what the program is made of, or which layer stopped it.
        adapted: Names of the parameters that adapt.
        second_order: Whether the meta-gradient is of second order.
    """

    strategy: str
    reason: str
    adapted: tuple[str, ...]
    second_order: bool

    def __str__(self) -> str:
        order = "second" if self.second_order else "first"
        return (
            f"{self.strategy}: {self.reason}; {len(self.adapted)} parameters adapt, "
            f"meta-gradient of {order} order"
        )


class MAML(nn.Module):
    r"""Model-agnostic meta-learning of any module: T tasks adapt at once, gradients are exact.

    For each task :math:`t`, starting from the model's parameters :math:`\theta_0`,

    .. math:: \theta_{k+1} = \theta_k - \alpha \nabla_\theta L(f_{\theta_k}(x_S), y_S),
       \qquad k = 0, \dots, K - 1

    on its supports, with :math:`L` the mean over them, and then :math:`f_{\theta_K}(x_Q)` for its
    queries (Finn et al. 2017, arXiv:1703.03400). A loss of yours on that output, and
    ``loss.backward()``, give ``model.parameters()`` the meta-gradient through all K steps.

    Options, in any combination:

    * ``first_order`` drops the second derivatives (FOMAML, same paper, section 5.2).
    * ``learn_lr`` learns the rates with the model: one, one for each parameter tensor
      (with ``lr_per_step``, for each step too: Antoniou et al. 2019, MAML++, arXiv:1810.09502), or
      one for each number (Li et al. 2017, Meta-SGD, arXiv:1707.09835). They are parameters of this
      module, free in sign: give ``maml.parameters()`` to your optimizer.
    * ``adapt`` names the parameters that adapt; the others are shared by the tasks and learn in the
      outer loop alone (with the head alone: Raghu et al. 2020, ANIL, arXiv:1909.09157).

    Batch norm: under ``batch_norm="batch"`` every pass, in training and evaluation mode, normalises
    by the batch it sees: adaptation by the task's supports, prediction by the task's queries. So
    predictions are *transductive*: a query's depends on the other queries of its task, as in the
    original code and its successors. Under ``"running"`` it uses the running statistics as they
    are. Neither writes to the model's buffers, ever.

    Strategies: ``"engine"`` runs all steps of all tasks in one call, a task in a thread's cache,
    for modules made of the layers it knows and losses known by name, in float32 and float64; its
    gradient cannot be differentiated again. ``"vmap"`` maps the forward pass over the tasks
    (``torch.func.vmap``) and takes gradients outside of it, so that second derivatives through
    batch norm and layer norm are exact, which ``torch.func.grad`` around ``vmap`` does not give.
    Convolutions (on CUDA those that may not round to TF32) and batch norm with weights of each task
    then run as `task_conv2d` and `task_batch_norm`, whose second derivatives stay batched.
    ``"loop"`` runs task after task and takes every module (recurrent layers, forward passes that
    branch on data). ``"auto"`` uses the first of them that can; of the last it warns and says why.
    `plan` says which it was, and what stopped the others. All give the same numbers.

    Padding: with integer labels, supports labelled -100 are padding and count for nothing. Where
    rows of a task influence each other through batch norm, or the loss is your own, such tasks are
    run one by one without their padding. A module that mixes rows in other ways needs
    ``strategy="loop"`` for that. A task of nothing but padding does not adapt. On CUDA the host
    waits for labels, once a call, only for these three; elsewhere no call waits for the device.

    Memory: the engine keeps the parameters of each step, and for `loss` nothing but the gradients
    and up to 32 sums of them (``task_chunk=n``: n at most).
    Otherwise, of each step only the ``T * parameters`` numbers that it starts from are kept, and of
    the last one its graph, ``2 * T * (parameters + outputs of all layers for the supports)``
    numbers; the prediction keeps the outputs of all layers for the queries. The backward pass runs
    each earlier step again and takes one Hessian-vector product, so that no two steps' graphs are
    there at a time. Without gradients (``torch.no_grad()``) nothing is kept. ``task_chunk=n`` keeps
    this for n tasks at a time: the backward pass runs each chunk again, at the cost of one more
    adaptation. Where a step cannot be run again, all graphs are kept: when the model writes
    buffers, when it or the loss reads tensors with ``requires_grad=True`` that are no parameters of
    the model, and under ``torch.func.grad``. A model that hides its state (a counter in Python)
    is found out in the backward pass, on the CPU.

    CUDA graphs: with ``cuda_graph=True`` the first `backward` or `loss` of a signature (shapes,
    strides, dtypes and ``requires_grad`` of the inputs, this module as it is but for the numbers in
    it, torch's settings) runs a few times and is captured, without a trace in gradients, buffers
    and random numbers; later ones copy their inputs, replay the graph and hand out copies of its
    gradients. The numbers are the same, dropout is drawn anew, optimizers need nothing new; what
    changes the module is captured again. Up to 8 graphs are kept, each with its memory, and copies
    or pickles have none. What the model and the loss do in Python happens at the capture alone, and
    the gradient of `loss` cannot be differentiated again. Batch norm by batch statistics with
    labels (and a loss of your own) looks at them before each replay, which waits for the device:
    padded tasks run without the graph. Where random numbers are drawn, all graphs of steps and
    chunks are kept. What cannot be captured (it waits for the device, or runs by ``"loop"`` because
    ``"vmap"`` failed) runs without a graph, after one warning that says why; so do, without one,
    calls under torch.func, torch.compile or modes of torch. On the CPU nothing changes.

    Under autocast ``"vmap"`` may return float32 where ``"loop"`` returns the lower dtype: it adds
    biases apart from the products.

    Args:
        model: Any ``nn.Module`` from one tensor to one tensor. It is a submodule here:
            ``state_dict``, ``to``, ``train`` and ``eval`` (dropout is the model's own business)
            reach it.
        lr: Step size of the inner loop, at least 0; the initial one if it is learned.
        steps: Number K of steps, at least 0.
        first_order: Whether to treat inner gradients as constants.
        loss: ``"cross_entropy"`` (integer labels), ``"mse"``, ``"huber"`` or ``"bce"`` with logits
            (targets of the prediction's shape), torch's functions and modules for these, or a
            function ``(prediction, target) -> scalar`` of one task's Tensor[S, ...] each. What
            ``ignore_index`` of ``nn.CrossEntropyLoss`` names is padding. A module becomes a
            submodule, ``criterion``: what it has of parameters learns in the outer loop.
        adapt: Which parameters adapt: names, names of submodules or glob patterns; or a predicate
            ``(name, parameter) -> bool``; or a submodule of ``model``; None: all. Parameters with
            ``requires_grad=False`` never do.
        learn_lr: False, ``"scalar"``, ``"parameter"`` or ``"element"``.
        lr_per_step: Whether learned rates differ between steps. Steps past ``steps`` use the last.
        batch_norm: ``"batch"`` or ``"running"``.
        strategy: ``"auto"``, ``"engine"``, ``"vmap"`` or ``"loop"``.
        task_chunk: Tasks to hold in memory at a time; None: all. The numbers are the same.
        randomness: ``"different"`` or ``"same"`` random numbers (dropout) for each task.
        cuda_graph: Whether `backward` and `loss` on CUDA are captured in a CUDA graph the first
            time and replayed after.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument has a value that it cannot have; ``adapt`` matches nothing.

    Example:
        >>> import torch, fastmeta as fm
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> maml = fm.MAML(model, lr=0.1, steps=5)
        >>> support_x, support_y = torch.randn(16, 6, 4), torch.randint(3, (16, 6))
        >>> query_x, query_y = torch.randn(16, 9, 4), torch.randint(3, (16, 9))
        >>> logits = maml(support_x, support_y, query_x)
        >>> logits.shape
        torch.Size([16, 9, 3])
        >>> loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), query_y.flatten())
        >>> loss.backward()
        >>> model[0].weight.grad.shape
        torch.Size([8, 4])
    """

    _graphs: GraphedSteps | None = None

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        steps: int,
        *,
        first_order: bool = False,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        adapt: Adapt = None,
        learn_lr: bool | str = False,
        lr_per_step: bool = False,
        batch_norm: str = "batch",
        strategy: str = "auto",
        task_chunk: int | None = None,
        randomness: str = "different",
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        check_model(model)
        if not is_number(lr):
            fail(TypeError, "MAML", "lr", "a number", describe(lr))
        if not (math.isfinite(lr) and lr >= 0):
            fail(ValueError, "MAML", "lr", "finite and at least 0", lr)
        steps = check_integer("MAML", "steps", steps, 0)
        if task_chunk is not None:
            task_chunk = check_integer("MAML", "task_chunk", task_chunk, 1)
        if not callable(loss):
            check_choice("MAML", "loss", loss, (*LOSSES, "a function"))
        flags = {"first_order": first_order, "lr_per_step": lr_per_step, "cuda_graph": cuda_graph}
        for argument, value in flags.items():
            if not isinstance(value, bool):
                fail(TypeError, "MAML", argument, "True or False", describe(value))
        if learn_lr is not False and learn_lr not in LEARN_LR:
            wanted = "False, 'scalar', 'parameter' or 'element'"
            fail(ValueError, "MAML", "learn_lr", wanted, repr(learn_lr))
        if lr_per_step and not (learn_lr and steps):
            wanted = "False unless rates are learned (learn_lr) and steps is at least 1"
            fail(ValueError, "MAML", "lr_per_step", wanted, True)
        check_choice("MAML", "batch_norm", batch_norm, BATCH_NORM)
        check_choice("MAML", "strategy", strategy, STRATEGIES)
        check_choice("MAML", "randomness", randomness, ("different", "same"))
        self.model = model
        self.lr = float(lr)
        self.steps = steps
        self.first_order = first_order
        self.learn_lr = learn_lr
        self.lr_per_step = lr_per_step
        if isinstance(loss, nn.Module):
            self.criterion = loss
        # For when the model has other parameters; in a tuple, where a module is no submodule. A
        # predicate is asked once: it need not be one that can be pickled.
        predicate = callable(adapt) and not isinstance(adapt, nn.Module)
        self._adapt_as = () if predicate else (adapt,)
        self._adapt = selected(model, adapt)
        self._adapt_of = [name for name, _ in model.named_parameters()]
        self._loss_state: Any = None
        self._runner = TaskRunner(
            named_loss(loss),
            batch_norm=batch_norm,
            strategy=strategy,
            task_chunk=task_chunk,
            randomness=randomness,
        )
        self._look_at_criterion()
        lead = (self.steps,) if lr_per_step else ()
        self.rates = make_rates(model, self._adapt, self.lr, learn_lr, lead)
        self._names: list[str] = []
        if cuda_graph:
            self._graphs = GraphedSteps()

    def forward(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor | None = None,
        *,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """Adapt to each task's supports and predict for its queries.

        With ``query_y`` it is `loss`, for ``DistributedDataParallel``, which averages the gradients
        of its own call alone: ``ddp(support_x, support_y, query_x, query_y).backward()``.

        Args:
            support_x: Tensor[T, S, ...], what the model takes, S of them for each of T tasks.
            support_y: Tensor[T, S, ...], labels (int64 or another integer type, -100 is padding) or
                targets.
            query_x: Tensor[T, Q, ...].
            query_y: Tensor[T, Q, ...], to get the loss of the queries instead of predictions.
            query_mask: bool Tensor[T, Q], False for padding, which then gives zeros and does not
                enter batch statistics; None if there is none, or if the model treats each row by
                itself.

        Returns:
            Tensor[T, Q, ...]: what the model returns, differentiable in the model's parameters, the
            learned rates and all floating inputs. With ``query_y`` a scalar, as `loss`.

        Raises:
            ValueError: The inputs do not fit each other or the model; CPU labels out of range
                (CUDA labels are not looked at: that would stall the stream).
            TypeError: An input is of the wrong type or dtype.
            RuntimeError: No adapted parameter influences the loss, or this is called within
                ``torch.func.vmap``. Errors of the model surface as they are.
        """
        if query_y is not None:
            if query_mask is not None:
                wanted = "None with query_y, whose label -100 says the same"
                fail(ValueError, "MAML", "query_mask", wanted, describe(query_mask))
            return self.loss(support_x, support_y, query_x, query_y)
        self._look_at_criterion()
        with outside_inference():
            support_x, support_y, query_x = usable(support_x, support_y, query_x)
            supports = check_supports("MAML", support_x, support_y, self._runner.loss)
            tasks, device = support_x.shape[0], support_x.device
            queries = check_queries("MAML", query_x, query_mask, tasks, device)
            Look().share(supports, queries)
            weights = self._weights()
            return self._runner.forward(
                weights, self._rates(weights.names), supports, queries, self.steps, self.first_order
            )

    def loss(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> Tensor:
        """Adapt to each task's supports, and return the mean loss of their queries.

        The same number as the constructor's ``loss`` of each task's predictions, averaged over the
        tasks. With the engine it is faster and needs less memory than the call: prediction, loss
        and all gradients come in one pass over the tasks, of which each is forgotten before the
        next one; ``backward()`` has only to hand them out.

        Args:
            support_x: Tensor[T, S, ...], as for the call.
            support_y: Tensor[T, S, ...], as for the call.
            query_x: Tensor[T, Q, ...], at least one query a task.
            query_y: Tensor[T, Q, ...], labels or targets as ``support_y``; rows labelled -100 are
                padding, which counts for nothing.

        Returns:
            A scalar, differentiable (with the engine or a CUDA graph once) in the model's
            parameters, the learned rates and the floating inputs.

        Raises:
            ValueError: As for the call; the queries' labels do not fit.
            TypeError: As for the call.
            RuntimeError: As for the call; someone differentiates such a gradient again.

        Example:
            >>> import torch, fastmeta as fm
            >>> maml = fm.MAML(torch.nn.Linear(2, 1), lr=0.1, steps=3, loss="mse")
            >>> x, y = torch.randn(4, 5, 2), torch.randn(4, 5, 1)
            >>> maml.loss(x[:, :3], y[:, :3], x[:, 3:], y[:, 3:]).backward()
            >>> maml.model.weight.grad.shape
            torch.Size([1, 2])
        """
        if torch.is_inference_mode_enabled():
            with outside_inference():
                return self.loss(support_x, support_y, query_x, query_y)
        return self._meta_loss((support_x, support_y, query_x, query_y), backward=False)

    def backward(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> Tensor:
        """``loss(...).backward()`` in one call: the meta-gradient is added to ``.grad``.

        With the engine this leaves out autograd, which for small networks takes as long as the
        tasks. Tensor hooks run; hooks of autograd's nodes do not where autograd is left out, and
        with them those of DistributedDataParallel: under it, see the call.

        Returns:
            The loss, without a graph.

        Raises:
            RuntimeError: As for `loss`; inference mode is on; nothing requires a gradient.

        Example:
            >>> import torch, fastmeta as fm
            >>> maml = fm.MAML(torch.nn.Linear(2, 1), lr=0.1, steps=3, loss="mse")
            >>> x, y = torch.randn(4, 5, 2), torch.randn(4, 5, 1)
            >>> loss = maml.backward(x[:, :3], y[:, :3], x[:, 3:], y[:, 3:])
            >>> maml.model.weight.grad.shape
            torch.Size([1, 2])
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("MAML.backward: there are no gradients in inference mode")
        given = support_x, support_y, query_x, query_y
        if torch.is_grad_enabled():
            return self._meta_loss(given, backward=True)
        with torch.enable_grad():
            return self._meta_loss(given, backward=True)

    def _meta_loss(self, given: tuple[Tensor, ...], backward: bool) -> Tensor:
        self._look_at_criterion()
        runner, rates, options = self._runner, self._rates(), (self.steps, self.first_order)
        recalled = runner.recall(self.model, rates, given, *options, backward)
        if recalled is not None:
            return recalled
        call = "MAML.backward" if backward else "MAML.loss"
        if self._graphs is not None:
            modules = list(self.children())

            def step(given: Sequence[Tensor], look: Look) -> Tensor:
                return self._step(call, given, look, backward=False)

            fixed = (self.lr, self.learn_lr, self.lr_per_step, self._adapt, *options)
            request = Request(given, modules, fixed, runner, step)
            replayed = self._graphs(request, backward)
            if replayed is not None:
                return replayed
        return self._step(call, given, Look(), backward)

    def _step(self, call: str, given: Sequence[Tensor], look: Look, backward: bool) -> Tensor:
        runner = self._runner
        support_x, support_y, query_x, query_y = usable(*given)
        supports = check_supports(call, support_x, support_y, runner.loss)
        queries = check_supports(call, query_x, query_y, runner.loss, "query")
        check_queries(call, query_x, None, support_x.shape[0], support_x.device)
        look.share(supports, queries)
        weights = self._weights()
        self._names = weights.names
        rates = self._rates(weights.names)
        return runner.meta_loss(
            weights, rates, supports, queries, given, self.steps, self.first_order, backward
        )

    def adapt(self, support_x: Tensor, support_y: Tensor, steps: int | None = None) -> AdaptedTasks:
        """Adapt to each task's supports.

        Args:
            support_x: Tensor[T, S, ...].
            support_y: Tensor[T, S, ...], as for the call.
            steps: Number of steps, in place of that of the constructor.

        Returns:
            The adapted tasks, differentiable as the call is; under ``torch.no_grad()`` without a
            graph. ``task_chunk`` then bounds the memory; with a graph it does not, for the graph is
            kept.

        Raises:
            ValueError: As for the call.
            TypeError: As for the call.

        Example:
            >>> import torch, fastmeta as fm
            >>> maml = fm.MAML(torch.nn.Linear(2, 1), lr=0.1, steps=1, loss="mse")
            >>> with torch.no_grad():
            ...     tasks = maml.adapt(torch.randn(4, 5, 2), torch.randn(4, 5, 1), steps=10)
            >>> tasks(torch.randn(4, 3, 2)).shape, tasks[0](torch.randn(3, 2)).shape
            (torch.Size([4, 3, 1]), torch.Size([3, 1]))
        """
        steps = self.steps if steps is None else check_integer("MAML.adapt", "steps", steps, 0)
        self._look_at_criterion()
        with outside_inference():
            support_x, support_y = usable(support_x, support_y)
            supports = check_supports("MAML.adapt", support_x, support_y, self._runner.loss)
            Look().share(supports)
            weights = self._weights()
            theta = self._runner.adapt(
                weights, self._rates(weights.names), supports, steps, self.first_order
            )
        return AdaptedTasks(self.model, self._runner, dict(zip(weights.names, theta, strict=True)))

    def plan(self) -> Plan:
        """The strategy of the last call and why; before the first, the one that it will try.

        Example:
            >>> import torch, fastmeta as fm
            >>> print(fm.MAML(torch.nn.Linear(2, 1), lr=0.1, steps=1, strategy="loop").plan())
            loop: strategy='loop' was asked for; 2 parameters adapt, meta-gradient of second order
        """
        names = tuple(self._weights().names)
        strategy, reason = self._runner.outlook(next(self.model.parameters()).device)
        return Plan(strategy, reason, names, not self.first_order)

    def extra_repr(self) -> str:
        """The options, in the module's printed form."""
        return f"lr={self.lr}, steps={self.steps}, first_order={self.first_order}"

    def _look_at_criterion(self) -> None:
        """Start anew if the loss module is no longer what it was."""
        criterion = self._modules.get("criterion")
        if criterion is None:
            return
        loss = named_loss(criterion)
        weight = loss.weight if isinstance(loss, NamedLoss) else None
        state = loss, None if weight is None else (weight.shape, weight.dtype, weight.requires_grad)
        if state != self._loss_state:
            if self._loss_state is not None:
                self._runner = self._runner.with_loss(loss)
            self._loss_state = state

    def _weights(self) -> Weights:
        slots = self._runner.engine.structure(self.model).slots
        if self._adapt_as and list(slots) != self._adapt_of:
            self._adapt = selected(self.model, *self._adapt_as)
            self._adapt_of = list(slots)
        names = [n for n in slots if n in self._adapt and _trainable(slots, n)]
        if not names:
            wanted = "with a parameter that adapts and has requires_grad=True"
            fail(ValueError, "MAML", "model", wanted, "none")
        return Weights(self.model, slots, names, [_value(slots, n) for n in names])

    def _rates(self, names: list[str] | None = None) -> Rates:
        if not self.learn_lr:
            return Rates(self.lr)
        names = self._names if names is None else names
        return rates_of(self.rates, names, self.lr, self.learn_lr, self.lr_per_step)


def _value(slots: Slots, name: str) -> Tensor:
    held, key = slots[name][0]
    value: Tensor = held[key]
    return value


def _trainable(slots: Slots, name: str) -> bool:
    value = _value(slots, name)
    # Tensors that functional_call puts in place of parameters need not require grad.
    return value.requires_grad or not isinstance(value, nn.Parameter)
