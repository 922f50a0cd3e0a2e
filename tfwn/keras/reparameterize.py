"""reparameterize and fold for Keras: swap a model's layers and their wrappers."""

from collections import OrderedDict
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from tfwn.keras import internals
from tfwn.keras.normalized import find, is_weight, own_variables
from tfwn.keras.recipe import remember
from tfwn.keras.scope import exact
from tfwn.keras.wrapper import WeightNormalization
from tfwn.modules import attributes


def reparameterize(
    model: keras.layers.Layer, kernel_mask: Callable | None = None, required: bool = True
) -> keras.layers.Layer:
    """`tfwn.reparameterize` for Keras: wraps the layers of a model, or a single layer.

    If there is nothing to normalize, raises ValueError if `required`, otherwise returns the model.
    """
    internals.check_layer_traces(model)
    before: list[tuple[keras.Variable, tf.Tensor]] = []
    masks: list = []

    def mask_of(v):
        before.append((v, exact(v)))
        masks.append(kernel_mask(v) if kernel_mask else None)
        return masks[-1]

    change = _Change(lambda layer: _wrapped(layer, mask_of), separate=True)
    try:
        change.find(model)
        if required and kernel_mask and all(mask is None for mask in masks):
            raise ValueError(
                f"kernel_mask returned no mask for any of {[v.path for v, _ in before]}"
            )
    except BaseException:
        for _, wrapper in change.replaced.values():
            wrapper.fold()
        for v, value in before:
            v.assign(value)
        raise
    if required and not change.replaced and not _wrappers_in(model):
        names = [variable.path for variable in model.variables]
        raise ValueError(
            f"reparameterize found no weight in {model.name!r}, whose variables are {names}: wrap "
            "the layers with tfwn.keras.WeightNormalization(layer, weight_names=...)"
        )
    return change.make(model, "reparameterize")


def fold(model: keras.layers.Layer, required: bool = True) -> keras.layers.Layer:
    """`tfwn.fold` for Keras: unwraps the layers; `required` is as in `reparameterize`."""
    wrappers = _wrappers_in(model)
    if required and not wrappers:
        raise ValueError(f"fold found nothing weight-normalized in {model.name!r}")
    for wrapper in wrappers:
        for normalized in wrapper.normalized:
            normalized.check_owner()
    internals.check_layer_traces(model)
    change = _Change(_unwrapped)
    change.find(model)
    return change.make(model, "fold")


def _wrappers_in(layer) -> list[WeightNormalization]:
    return [one for one in internals.layers_in(layer) if isinstance(one, WeightNormalization)]


def _wrapped(layer, mask_of):
    """Returns the layer in a wrapper, or itself if it is one or has nothing to normalize."""
    if isinstance(layer, WeightNormalization):
        return layer
    weights = [v for _, v in find(layer, is_weight)]
    if layer.built and not weights:
        return layer
    wrapper = WeightNormalization(layer, kernel_mask=_masks(layer, weights, mask_of))
    if layer.built:
        internals.take_path(wrapper, layer)
        wrapper.build()
    return wrapper


def _masks(layer, weights, mask_of) -> dict | None:
    """Returns the masks of a layer's weights by name, as its wrapper takes them."""
    found = [(v.name, mask_of(v)) for v in weights]
    masks = {name: mask for name, mask in found if mask is not None}
    for name, mask in found:
        if name in masks and (mask is None or not np.array_equal(mask, masks[name])):
            raise ValueError(
                f"kernel_mask returned several masks for the variables {name!r} in {layer.name!r}: "
                "a wrapped layer has one mask per name"
            )
    return masks or None


def _has_kernels_itself(layer) -> bool:
    return isinstance(layer, WeightNormalization) or any(map(is_weight, own_variables(layer)))


def _unwrapped(layer):
    return layer.fold() if isinstance(layer, WeightNormalization) else layer


class _Change:
    """Replaces layers of a model in place.

    With `separate`, layers that share a kernel (tied weights) are not replaced themselves. The
    inner layer that they have in common is replaced instead.
    """

    def __init__(
        self,
        replace: Callable[[keras.layers.Layer], keras.layers.Layer],
        separate: bool = False,
    ):
        self._replace = replace
        self._separate = separate
        self._separated: set[int] = set()
        self._holders: list[keras.layers.Layer] = []
        self.replaced: dict[int, tuple[keras.layers.Layer, keras.layers.Layer]] = {}

    def find(self, model) -> None:
        """Creates the replacement of each layer without changing the model."""
        while True:
            self._holders = []
            units = list(self._units(model, set()))
            if not (self._separate and self._separate_some(units)):
                break
        for layer in units:
            new = self._replace(layer)
            if new is not layer:
                self.replaced[id(layer)] = layer, new

    def _separate_some(self, units) -> bool:
        """Treats layers that share a kernel as holders; returns whether there are new ones."""
        users: dict[int, tuple] = {}
        for layer in units:
            for _, v in find(layer, is_weight):
                users.setdefault(id(v), (v, []))[1].append(layer)
        for v, sharing in users.values():
            if len(sharing) == 1:
                continue
            apart = [layer for layer in sharing if not _has_kernels_itself(layer)]
            if len(apart) < len(sharing) - 1:
                raise ValueError(
                    f"{v.path} is a kernel of {', '.join(layer.name for layer in sharing)}, which "
                    "would each normalize it: let one layer have the kernel, and let the others "
                    "have that layer as an attribute"
                )
            self._separated.update(id(layer) for layer in apart)
            return True
        return False

    def _units(self, layer, seen):
        """Yields the layers to replace and collects the holders that contain them."""
        if id(layer) in seen:
            return
        seen.add(id(layer))
        if not (id(layer) in self._separated or self._holds_layers(layer)):
            yield layer
            return
        if isinstance(layer, keras.Model):
            _check_built(layer)
        if internals.is_functional(layer):
            internals.refresh_graph(layer, {})  # Another model may have changed the same graph.
        self._holders.append(layer)
        for inner in internals.layers_in(layer, include_self=False, recursive=False):
            yield from self._units(inner, seen)

    @staticmethod
    def _holds_layers(layer) -> bool:
        """Returns whether to replace its inner layers instead: it is a model or has wrappers."""
        if isinstance(layer, WeightNormalization):
            return False
        return isinstance(layer, keras.Model) or bool(_wrappers_in(layer))

    def make(self, model, name):
        """Makes the change called `name`, and returns the model or its replacement."""
        internals.forget_layer_traces(model)
        for old, new in self.replaced.values():
            internals.replace_layer(old, new)
        layers = {key: new for key, (_, new) in self.replaced.items()}
        for holder in self._holders:
            if self._change(holder, layers):
                remember(holder, name)
        return layers.get(id(model), model)

    def _change(self, holder, layers) -> bool:
        """Puts the new layers into one holder; returns whether there were any."""
        changed = any(
            id(one) in layers for one in internals.layers_in(holder, False, recursive=False)
        )
        if internals.is_functional(holder):
            internals.refresh_graph(holder, layers)
        _replace_attributes(holder, layers)
        for name in internals.TRACED_BY_KERAS:
            if getattr(holder, name, None) is not None:
                setattr(holder, name, None)
        for optimizer in internals.optimizers_in([value for _, value in attributes(holder)]):
            if optimizer.built:
                internals.restart_optimizer(optimizer)
            for wrapper in _wrappers_in(holder):
                for one in wrapper.normalized:
                    internals.exclude_from_weight_decay(optimizer, one.v, one.g)
        return changed


def _check_built(model):
    """Raises ValueError if layers of the model lack variables."""
    inner = internals.layers_in(model, include_self=False, recursive=False)
    missing = [layer.name for layer in inner if not internals.has_variables(layer)]
    if missing or not (inner or model.built):
        raise ValueError(
            f"the model {model.name!r} is not built{': ' if missing else ''}{', '.join(missing)}: "
            "call it once, or build it"
        )


def _replace_attributes(holder, layers):
    lists = internals.tracked_lists(holder)

    def replaced(value):
        if isinstance(value, keras.layers.Layer):
            return layers.get(id(value), value)
        if isinstance(value, list | tuple):
            items = [replaced(item) for item in value]
            if all(a is b for a, b in zip(items, value, strict=True)):
                return value
            if hasattr(value, "_make"):
                return value._make(items)  # Not type(value), which may be TensorFlow's wrapper.
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, dict):
            kind = OrderedDict if isinstance(value, OrderedDict) else dict  # Keras has only these.
            table = kind((key, replaced(item)) for key, item in value.items())
            return value if all(table[key] is value[key] for key in table) else table
        return value

    for layer in internals.layers_in(holder, include_self=False, recursive=False):
        if id(layer) in layers:
            internals.replace_tracked(holder, layer, layers[id(layer)])
    for name, value in attributes(holder):
        if not any(value is one for one in lists):
            new = replaced(value)
            if new is not value:
                setattr(holder, name, new)
