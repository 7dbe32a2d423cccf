"""What a module consisted of when it was looked at, and whether that still holds."""

from __future__ import annotations

import collections
import copy
import functools
import operator
import types
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta._lent_model import Slots, find_slots

__all__ = ["Structure"]

COPIED = (dict, list, set)
CONTAINERS = (dict, list, set, tuple, collections.deque)
#: Whose truth value says whether they are empty.
SIZED = (*COPIED, collections.OrderedDict, collections.deque)
IMMUTABLE = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)

#: What is looked at elsewhere, or holds no options.
OPAQUE = (Tensor, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)

#: What may change of a tensor that stays the same object.
LEARNS = operator.attrgetter("requires_grad")
FORM = operator.attrgetter("dtype", "device", "shape")

#: Containers of more items are data.
MOST_ITEMS = 1000

#: Objects within objects further away than this are no options of the module's.
DEEPEST = 8


class Structure:
    """Where a module holds its tensors, looked up once and valid as long as `same` says so.

    A walk over the modules costs as much as a whole meta-step of a small network. Comparing their
    attributes to what they were, tensors by identity, costs a tenth of it and notices whatever may
    matter: modules, parameters and buffers that come, go or are tied, training flags, options of
    layers and of objects that the modules hold (a config, modules in a list), hooks,
    ``requires_grad``, dtypes, shapes. It does not see globals, closures, slots and numbers in
    arrays.

    Args:
        model: The module.
        others: Objects whose options matter as well.

    Attributes:
        slots: Where each parameter is held.
        buffers: Where each buffer is held.
    """

    def __init__(self, model: nn.Module, *others: Any) -> None:
        self.slots: Slots = find_slots(model)
        self.buffers: dict[str, tuple[dict[str, Any], str]] = {}
        self._watched: list[tuple[Any, Any]] = []
        self._seen: dict[int, Any] = {id(module): module for module in model.modules()}
        self._hooks: list[Any] = []
        for prefix, module in model.named_modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    name = f"{prefix}.{key}" if prefix else key
                    self.buffers[name] = (module._buffers, key)
            self._watch(module.__dict__)
            self._hooks += [
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            ]
        for other in others:
            self._meet(other, 0)
        # Of most of what a module holds nothing is in use; to ask takes less than to compare.
        self._empty = [now for now, was in self._watched if type(now) in SIZED and not was]
        watched = [w for w in self._watched if type(w[0]) not in SIZED or w[1]]
        self._now, self._before = [w[0] for w in watched], [w[1] for w in watched]
        self._hooked = [len(h) for h in self._hooks] if any(self._hooks) else None
        self._tensors = [slot for places in self.slots.values() for slot in places]
        self._tensors += self.buffers.values()
        self._state = self._look(True)
        self._seen.clear()
        self._watched.clear()

    def _watch(self, attributes: dict[str, Any], depth: int = 0) -> None:
        self._watched.append((attributes, _copied(attributes)))
        for value in attributes.values():
            if type(value) in COPIED:
                self._enter(value, depth)
            else:
                self._meet(value, depth)

    def _meet(self, value: Any, depth: int) -> None:
        """Watch what a container or a plain object has in it, once."""
        if isinstance(value, (IMMUTABLE, OPAQUE)) or id(value) in self._seen or depth > DEEPEST:
            return
        self._seen[id(value)] = value
        if isinstance(value, CONTAINERS):
            if not isinstance(value, tuple):
                self._watched.append((value, copy.copy(value)))
            self._enter(value, depth)
        elif isinstance(value, functools.partial):
            self._enter((value.func, value.args, value.keywords), depth)
        elif isinstance(value, types.MethodType):
            self._meet(value.__self__, depth + 1)
        elif hasattr(value, "__dict__"):
            self._watch(vars(value), depth + 1)

    def _enter(self, container: Any, depth: int) -> None:
        """Meet the items of a container, but for a large one's: no options but data."""
        if len(container) <= MOST_ITEMS:
            for item in container.values() if isinstance(container, dict) else container:
                self._meet(item, depth + 1)

    def same(self, forms: bool = True) -> bool:
        """Whether nothing has changed but the numbers.

        Args:
            forms: Look at dtypes, devices and shapes, which takes as long as all else. Without:
                for who hands the tensors to an op that holds them against what it expects.
        """
        try:
            if any(self._empty) or self._now != self._before:
                return False
            if self._hooked is not None and [len(h) for h in self._hooks] != self._hooked:
                return False
            return (self._hooked is not None or not any(self._hooks)) and (
                self._look(forms) == (self._state if forms else self._state[:2])
            )
        except (RuntimeError, KeyError, AttributeError, TypeError, ValueError):
            # Another tensor in a place compares number by number, and has no truth value.
            return False

    def _look(self, forms: bool) -> tuple[list[Any], ...]:
        tensors = [held[key] for held, key in self._tensors]
        found = list(map(id, tensors)), list(map(LEARNS, tensors))
        return (*found, list(map(FORM, tensors))) if forms else found

    def slot(self, name: str) -> tuple[dict[str, Any], str]:
        """Where the parameter or buffer of this name is."""
        return self.slots[name][0] if name in self.slots else self.buffers[name]

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of this name, as it is now."""
        held, key = self.slot(name)
        value: Tensor = held[key]
        return value


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes with containers copied, so that a change within them shows."""
    return {k: v.copy() if type(v) in COPIED else v for k, v in attributes.items()}
