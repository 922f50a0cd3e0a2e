"""reparameterize and fold for Keras layers and models."""

import keras
from keras.src.models import Functional

from tfwn.keras.wrapper import WeightNormalization, is_weight
from tfwn.modules import attributes


def reparameterize(model: keras.layers.Layer) -> keras.layers.Layer:
    """`tfwn.reparameterize` for Keras: its layers in wrappers."""
    if isinstance(model, keras.Model) and not model.built:
        raise ValueError(f"the model {model.name!r} is not built: call it once, or build it")
    return _replaced(model, _wrapped)


def fold(model: keras.layers.Layer) -> keras.layers.Layer:
    """`tfwn.fold` for Keras: its layers out of their wrappers."""
    if not any(isinstance(layer, WeightNormalization) for layer in model._flatten_layers()):
        raise ValueError(f"fold found nothing weight-normalized in {model.name!r}")
    return _replaced(model, _unwrapped)


def _wrapped(layer):
    """The layer in a wrapper, where it has something to normalize and is in none."""
    layers = layer._flatten_layers()
    if any(isinstance(one, WeightNormalization) for one in layers):
        return layer
    variables = [v for one in layers for v in vars(one).values() if isinstance(v, keras.Variable)]
    if layer.built and not any(is_weight(v) for v in variables):
        return layer
    wrapper = WeightNormalization(layer)
    if layer.built:
        wrapper.build()
    return wrapper


def _unwrapped(layer):
    return layer.fold() if isinstance(layer, WeightNormalization) else layer


def _replaced(model, replace, replaced=None):
    """The model with `replace` done to each layer in it; in place, where it is no graph."""
    if not isinstance(model, keras.layers.Layer):
        return model  # An operation of a functional model's graph, as of x + y.
    replaced = {} if replaced is None else replaced
    if id(model) not in replaced:
        if isinstance(model, keras.Sequential | Functional):
            new = keras.models.clone_model(
                model, clone_function=lambda layer: _replaced(layer, replace, replaced)
            )
        elif isinstance(model, keras.Model) or _holds_wrappers(model):
            new = model
            _replace_attributes(model, lambda layer: _replaced(layer, replace, replaced))
        else:
            new = replace(model)
        replaced[id(model)] = model, new  # The model too: its id must not be given to another.
    return replaced[id(model)][1]


def _holds_wrappers(layer) -> bool:
    """As TimeDistributed or Bidirectional around wrappers."""
    inner = layer._flatten_layers(include_self=False)
    return not isinstance(layer, WeightNormalization) and any(
        isinstance(one, WeightNormalization) for one in inner
    )


def _replace_attributes(model, replace):
    tracker = model._tracker
    stores = [store for _, store in tracker.config.values()]

    def replaced(value):
        if isinstance(value, keras.layers.Layer):
            new = replace(value)
            if new is not value and tracker.is_in_store("layers", value):
                tracker.replace_tracked_value("layers", value, new)
            return new
        if isinstance(value, list | tuple):
            items = [replaced(item) for item in value]
            same = all(a is b for a, b in zip(items, value, strict=True))
            return value if same else type(value)(items) if type(value) is tuple else items
        if isinstance(value, dict):
            table = {key: replaced(item) for key, item in value.items()}
            return value if all(table[key] is value[key] for key in table) else table
        return value

    for name, value in attributes(model):
        if not any(value is store for store in stores):
            new = replaced(value)
            if new is not value:
                setattr(model, name, new)
    # Traced with the layers before.
    for name in ("train_function", "test_function", "predict_function"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
