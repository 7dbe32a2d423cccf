"""Ops ``matching_attention`` and ``matching_nll``: softmax attention over a labelled support set.

Sections: public functions, then schema and derivative rules of each op. Arguments are checked in
``_matching_inputs.py``; the reference is in ``_matching_reference.py``, the kernels in
``csrc/matching/``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmeta.errors import IGNORE_INDEX, check_choice
from fastmeta.ops import _matching_reference as reference
from fastmeta.ops._define import LIBRARY, Op, acc_dtype, define_op, fold_tasks
from fastmeta.ops._matching_inputs import MatchingInputs
from fastmeta.ops._matching_reference import SIMILARITIES

__all__ = ["SIMILARITIES", "matching_attention", "matching_nll"]


def matching_attention(
    query: Tensor,
    support: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    similarity: str = "cosine",
    scale: float | Tensor = 1.0,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    output: str = "log_probs",
) -> Tensor:
    r"""Classify queries by softmax attention over a labelled support set.

    .. math:: \log p(c \mid q) = \operatorname{logsumexp}_{i: y_i = c} z_i
              - \operatorname{logsumexp}_i z_i, \qquad
              z_i = \mathrm{scale} \cdot \mathrm{similarity}(q, s_i)

    Vinyals et al. 2016, "Matching Networks for One Shot Learning", arXiv:1606.04080, eq. 1. Neither
    the attention weights [Q, S] nor one-hot labels exist in memory in the compiled path, forward,
    backward or double backward (a third order runs in plain PyTorch and holds them), but for small
    tasks: the similarities [Q, S] from the forward to the backward where they take at most half of
    the memory of ``query`` and ``support``, and on the CPU up to 256 KB a task while the backward
    runs.

    Args:
        query: Tensor[..., Q, D], float32, float64, bfloat16 or float16.
        support: Tensor[..., S, D], dtype and device of ``query``; leading (task) dimensions
            broadcast.
        labels: Tensor[..., S] of integers in [0, ``num_classes``); -100 marks padding.
        num_classes: C, at least 1.
        similarity: ``"dot"``, ``"cosine"`` (0 with zero gradient for a zero vector),
            ``"sqeuclidean"`` (negative squared distance), ``"euclidean"`` (negative distance, zero
            gradient at coincident points), or ``"additive"``: ``weight . tanh(q + s)`` of Bahdanau
            et al. 2015 with ``query`` and ``support`` already projected (``W_q q``, ``W_s s``).
        scale: Inverse temperature, dimensionless: a number, or a tensor of one element or of the
            leading shape (one per task), differentiable.
        lengths: Tensor[...] of integers: only the first ``lengths`` supports of a task count.
        mask: Tensor[..., S] of bool, True where a support counts. Not together with ``lengths``.
        weight: Tensor[D] or Tensor[..., D], for ``"additive"`` only.
        output: ``"log_probs"`` or ``"probs"``.

    Returns:
        Tensor[..., Q, C] in the dtype of ``query``; under autocast in float32, as torch's own
        ``log_softmax``. A class without support gets exactly -inf (probability 0) and sends no
        gradient; so do all classes of a task without any support.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape, device, label or option does not fit; the message names the argument.

    Note:
        Accumulates in float32 (float64 for float64). ``"sqeuclidean"`` uses norms and inner
        products: its error is relative to the squared norms. A NaN or infinity in a query spoils
        that query's row, one in a valid support all rows of its task; nothing else. Labels are
        checked on the CPU; on CUDA, where looking would stall the stream, and under tracing, a
        label outside the range counts as padding. Deterministic, independent of the number of
        threads. Differentiable to any order in query, support, scale and weight; works under
        ``torch.func`` transforms and ``torch.compile``; forward-mode AD raises.

    Example:
        >>> import torch, fastmeta as fm
        >>> support, labels = torch.eye(3), torch.tensor([0, 1, 1])
        >>> fm.matching_attention(torch.eye(3)[:1], support, labels, 2, scale=2.0, output="probs")
        tensor([[0.7870, 0.2130]])
    """
    name = "matching_attention"
    check_choice(name, "output", output, ("log_probs", "probs"))
    inputs = MatchingInputs(
        name, query, support, labels, num_classes, similarity, scale, lengths, mask, weight
    )
    logp = _attention(*inputs.args, num_classes, similarity)[0]
    if output == "probs":
        logp = logp.exp()
    return inputs.restore(logp)


def matching_nll(
    query: Tensor,
    support: Tensor,
    labels: Tensor,
    targets: Tensor,
    num_classes: int,
    *,
    similarity: str = "cosine",
    scale: float | Tensor = 1.0,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood of the query labels under `matching_attention`, in one op.

    The loss of Vinyals et al. 2016 (arXiv:1606.04080, eq. 2): ``-log p(target_q | q)``; no [Q, C]
    array exists either. Options shared with :func:`matching_attention` mean the same here.

    Args:
        query: Tensor[..., Q, D].
        support: Tensor[..., S, D].
        labels: Tensor[..., S] of integers in [0, ``num_classes``); -100 marks padding.
        targets: Tensor[..., Q] of integers in [0, ``num_classes``), or ``ignore_index``.
        num_classes: C, at least 1.
        similarity: See :func:`matching_attention`.
        scale: See :func:`matching_attention`.
        lengths: See :func:`matching_attention`.
        mask: See :func:`matching_attention`.
        weight: See :func:`matching_attention`.
        ignore_index: Target of queries that do not count: loss 0, no gradient.
        reduction: ``"mean"`` over the queries that count (NaN when none does, as torch's
            ``nll_loss``), ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or with ``"none"`` Tensor[..., Q]. A query whose target class has no support has
        loss +inf and sends no gradient.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape, device, label or option does not fit; the message names the argument.

    Note:
        See :func:`matching_attention` for accuracy, determinism and transforms.

    Example:
        >>> import torch, fastmeta as fm
        >>> support, labels = torch.eye(3), torch.tensor([0, 1, 1])
        >>> fm.matching_nll(torch.eye(3), support, labels, labels, 2, scale=2.0)
        tensor(0.1549)
    """
    name = "matching_nll"
    check_choice(name, "reduction", reduction, ("mean", "sum", "none"))
    inputs = MatchingInputs(
        name, query, support, labels, num_classes, similarity, scale, lengths, mask, weight
    )
    targets = inputs.targets(targets, ignore_index)
    q, s, y, *rest = inputs.args
    losses = _nll(q, s, y, targets, *rest, num_classes, similarity)[0]
    if reduction == "none":
        return inputs.restore(losses)
    total = losses.sum()
    if reduction == "mean":
        total = total / ((targets >= 0) & (targets < num_classes)).sum()
    return total.to(inputs.out_dtype)


# --- class_order ----------------------------------------------------------------------------------
# Not differentiable and not public: what the CUDA bridge sorts a task's supports with.

LIBRARY.define("class_order(Tensor labels, SymInt num_classes) -> (Tensor, Tensor)")


def _class_order(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Supports in class order [T, S], padding last, and each class's start in it [T, C + 1]."""
    key = torch.where((labels >= 0) & (labels < num_classes), labels, num_classes)
    ordered, order = torch.sort(key, dim=1, stable=True)
    classes = torch.arange(num_classes + 1, device=labels.device).expand(labels.shape[0], -1)
    return order, torch.searchsorted(ordered, classes.contiguous())


LIBRARY.impl("class_order", _class_order, "CompositeExplicitAutograd")

# What the CUDA bridge asks before it rounds float32 to TF32: torch's stable ABI has no answer.
LIBRARY.define("allow_tf32() -> bool")
LIBRARY.impl(
    "allow_tf32",
    lambda: torch.backends.cuda.matmul.fp32_precision == "tf32",
    "CompositeExplicitAutograd",
)


# --- matching_attention ---------------------------------------------------------------------------


# ``keep_scores`` asks the forward for what spares the backward its first product: the similarities
# of few-shot tasks. They are the kernel's own business: empty where it keeps none (larger tasks,
# the reference, traced programs), and read by no one but the backward.


def _fake(
    query: Tensor, _support: Tensor, _labels: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    acc, (tasks, queries, _) = acc_dtype(query.dtype), query.shape
    num_classes = args[2]
    return (
        query.new_empty((tasks, queries, num_classes), dtype=acc),
        query.new_empty((tasks, queries), dtype=acc),
        query.new_empty((tasks, 0), dtype=acc),
    )


def _fake_backward(_grad: Tensor, query: Tensor, support: Tensor, *args: Any) -> tuple[Tensor, ...]:
    acc, tasks = acc_dtype(query.dtype), query.shape[0]
    width = 0 if args[-6] is None else query.shape[2]  # of weight, out, lse, scores, C, similarity
    return (
        query.new_empty(query.shape),
        support.new_empty(support.shape),
        query.new_empty((tasks,), dtype=acc),
        query.new_empty((tasks, width), dtype=acc),
    )


def _no_scores(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return out, lse, lse.new_empty((lse.shape[0], 0))


def _sum_shared(grad: Tensor, shared: Tensor) -> Tensor:
    """Gradient per task to that of a tensor that may serve all tasks."""
    return grad if shared.shape[0] == grad.shape[0] else grad.sum(0, keepdim=True)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, num_classes, similarity = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    ctx.options = (num_classes, similarity)


def _backward_grads(double_backward: Callable[..., Any]) -> Callable[..., Any]:
    """Autograd formula of a backward op: the double backward op, over all that it saved.

    The dependence of ``out`` and ``lse`` on query and support counts there, so their own gradients
    are None.
    """

    def backward(ctx: Any, *given: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        _grad, _query, _support, *ints, scale, weight, _out, _lse, _scores = saved
        if all(g is None for g in given):
            return (None,) * (len(saved) + 2)
        dweight: Tensor | None
        dgrad, dquery, dsupport, dscale, dweight = double_backward(
            *given, *saved[:-1], *ctx.options
        )
        dweight = None if weight is None else _sum_shared(dweight, weight)
        dscale = _sum_shared(dscale, scale)
        return dgrad, dquery, dsupport, *(None for _ in ints), dscale, dweight, *(None,) * 5

    return backward


def _setup_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, _out, _lse, num_classes, similarity = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    ctx.options = (num_classes, similarity)


def _differentiate(double_backward: Callable[..., Any]) -> Callable[..., Any]:
    """Autograd formula of a double backward op: torch differentiates the reference's formula.

    That recomputes ``out`` and ``lse`` from query and support, so every further order is right.
    """

    def backward(ctx: Any, *given: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        floating = [i for i, t in enumerate(saved) if t is not None and t.is_floating_point()]

        def formula(*values: Tensor) -> tuple[Tensor, ...]:
            tensors = list(saved)
            for i, value in zip(floating, values, strict=True):
                tensors[i] = value
            outputs: tuple[Tensor, ...] = double_backward(*tensors, *ctx.options)
            return outputs

        outputs, vjp, *_ = torch.func.vjp(formula, *(saved[i] for i in floating))
        cotangents = tuple(
            torch.zeros_like(value) if g is None else g
            for g, value in zip(given, outputs, strict=True)
        )
        grads = dict(zip(floating, vjp(cotangents), strict=True))
        return (*(grads.get(i) for i in range(len(saved))), *(None,) * 4)

    return backward


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, support, labels, scale, weight, num_classes, similarity, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, support, labels, scale, weight, *output)
    ctx.options = (num_classes, similarity)


def _attention_grads(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    query, support, labels, scale, weight, *results = ctx.saved_tensors
    dq, ds, dscale, dweight = _attention_backward(
        grad, query, support, labels, scale, weight, *results, *ctx.options
    )
    dweight = None if weight is None else _sum_shared(dweight, weight)
    return dq, ds, None, _sum_shared(dscale, scale), dweight, None, None, None


def _fake_double_backward(*args: Any) -> tuple[Tensor, ...]:
    grad, query, support = args[4:7]
    acc, tasks = acc_dtype(query.dtype), query.shape[0]
    width = 0 if args[-5] is None else query.shape[2]  # of weight, out, lse, C, similarity
    return (
        grad.new_empty(grad.shape),
        query.new_empty(query.shape),
        support.new_empty(support.shape),
        query.new_empty((tasks,), dtype=acc),
        query.new_empty((tasks, width), dtype=acc),
    )


_attention_double_backward: Op = define_op(
    "matching_attention_double_backward(Tensor? grad_query, Tensor? grad_support, "
    "Tensor? grad_scale, Tensor? grad_weight, Tensor grad, Tensor query, Tensor support, "
    "Tensor labels, Tensor scale, Tensor? weight, Tensor logp, Tensor lse, SymInt num_classes, "
    "str similarity) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=lambda *a: reference.attention_double_backward(*a[:10], *a[12:]),
    fake=_fake_double_backward,
    setup_context=_setup_double_backward,
    backward=_differentiate(reference.attention_double_backward),
    vmap=fold_tasks(lambda *a: _attention_double_backward(*a)),
)

_attention_backward: Op = define_op(
    "matching_attention_backward(Tensor grad, Tensor query, Tensor support, Tensor labels, "
    "Tensor scale, Tensor? weight, Tensor logp, Tensor lse, Tensor scores, SymInt num_classes, "
    "str similarity) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=lambda *a: reference.attention_backward(*a[:6], *a[9:]),
    fake=_fake_backward,
    setup_context=_setup_backward,
    backward=_backward_grads(_attention_double_backward),
    vmap=fold_tasks(lambda *a: _attention_backward(*a)),
)

_attention: Op = define_op(
    "matching_attention(Tensor query, Tensor support, Tensor labels, Tensor scale, Tensor? weight, "
    "SymInt num_classes, str similarity, bool keep_scores=False) -> (Tensor, Tensor, Tensor)",
    reference=lambda *a: _no_scores(*reference.attention(*a[:7])),
    fake=_fake,
    setup_context=_attention_setup,
    backward=_attention_grads,
    vmap=fold_tasks(lambda *a: _attention(*a)),
    eager_options=(True,),
)


# --- matching_nll ---------------------------------------------------------------------------------


def _fake_nll(query: Tensor, *_args: Any) -> tuple[Tensor, Tensor, Tensor]:
    acc, (tasks, queries, _) = acc_dtype(query.dtype), query.shape
    return (
        query.new_empty((tasks, queries), dtype=acc),
        query.new_empty((tasks, queries), dtype=acc),
        query.new_empty((tasks, 0), dtype=acc),
    )


def _nll_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, support, labels, targets, scale, weight, num_classes, similarity, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, support, labels, targets, scale, weight, *output)
    ctx.options = (num_classes, similarity)


def _nll_grads(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 9
    query, support, labels, targets, scale, weight, *results = ctx.saved_tensors
    dq, ds, dscale, dweight = _nll_backward(
        grad, query, support, labels, targets, scale, weight, *results, *ctx.options
    )
    dweight = None if weight is None else _sum_shared(dweight, weight)
    return dq, ds, None, None, _sum_shared(dscale, scale), dweight, None, None, None


_nll_double_backward: Op = define_op(
    "matching_nll_double_backward(Tensor? grad_query, Tensor? grad_support, Tensor? grad_scale, "
    "Tensor? grad_weight, Tensor grad, Tensor query, Tensor support, Tensor labels, "
    "Tensor targets, Tensor scale, Tensor? weight, Tensor nll, Tensor lse, SymInt num_classes, "
    "str similarity) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=lambda *a: reference.nll_double_backward(*a[:11], *a[13:]),
    fake=_fake_double_backward,
    setup_context=_setup_double_backward,
    backward=_differentiate(reference.nll_double_backward),
    vmap=fold_tasks(lambda *a: _nll_double_backward(*a)),
)

_nll_backward: Op = define_op(
    "matching_nll_backward(Tensor grad, Tensor query, Tensor support, Tensor labels, "
    "Tensor targets, Tensor scale, Tensor? weight, Tensor nll, Tensor lse, Tensor scores, "
    "SymInt num_classes, str similarity) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=lambda *a: reference.nll_backward(*a[:7], *a[10:]),
    fake=_fake_backward,
    setup_context=_setup_backward,
    backward=_backward_grads(_nll_double_backward),
    vmap=fold_tasks(lambda *a: _nll_backward(*a)),
)

_nll: Op = define_op(
    "matching_nll(Tensor query, Tensor support, Tensor labels, Tensor targets, Tensor scale, "
    "Tensor? weight, SymInt num_classes, str similarity, bool keep_scores=False) "
    "-> (Tensor, Tensor, Tensor)",
    reference=lambda *a: _no_scores(*reference.nll(*a[:8])),
    fake=_fake_nll,
    setup_context=_nll_setup,
    backward=_nll_grads,
    vmap=fold_tasks(lambda *a: _nll(*a)),
    eager_options=(True,),
)
