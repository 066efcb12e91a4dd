# SPDX-License-Identifier: Apache-2.0
"""LBE on layers: `Dense_LBE`, `Conv2D_LBE`, any other layer, and whole models.

`with_lbe` puts an `LBERegularizer` on one layer of any class, `add_lbe` on chosen
layers of an existing model. No layer class is copied for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import keras
from keras.src.models.functional import Functional

from lbe_ops.epilogue import EndsWithEpilogue
from lbe_ops.model import LBEModel
from lbe_ops.regularizer import LBERegularizer, check_finite

AnyLayer = TypeVar("AnyLayer", bound=keras.layers.Layer)
Selection = (
    type[keras.layers.Layer]
    | tuple[type[keras.layers.Layer], ...]
    | Callable[[keras.layers.Layer], bool]
    | Iterable[str]
)


def _regularizer_for(layer: keras.layers.Layer, **arguments: Any) -> LBERegularizer:
    if isinstance(layer, (Functional, keras.Sequential)):
        raise ValueError(
            "LBE is for a layer, and Keras would lose its alpha in a Functional or "
            "Sequential model. Put it on the last layer of the model, or behind it: "
            "with_lbe(keras.layers.Activation('linear'))(model(x)). "
            f"Received: {layer.name!r}"
        )
    return _regularizer(layer.activity_regularizer, **arguments)


def _regularizer(other: Any, **arguments: Any) -> LBERegularizer:
    """LBE beside the activity regularizer that a layer has, unless that is LBE."""
    other = keras.regularizers.get(other)
    if isinstance(other, LBERegularizer):
        return other
    return LBERegularizer(other_activity_regularizer=other, **arguments)


class _LBE(EndsWithEpilogue):
    """Before a layer class: the arguments that `Dense_LBE` and `Conv2D_LBE` add."""

    def __init__(
        self,
        *args: Any,
        LBE_alpha: float = 6.0,
        LBE_alpha_min: float = 0.5,
        LBE_beta: float = 1.0,
        activity_regularizer: Any = None,
        **kwargs: Any,
    ) -> None:
        regularizer = _regularizer(
            activity_regularizer,
            lbe_alpha=LBE_alpha,
            lbe_alpha_min=LBE_alpha_min,
            lbe_beta=LBE_beta,
        )
        super().__init__(*args, activity_regularizer=regularizer, **kwargs)


@keras.saving.register_keras_serializable(package="lbe_ops")
class Dense_LBE(_LBE, keras.layers.Dense):
    """`keras.layers.Dense` with LBE on its output.

    Args:
        *args: as for `keras.layers.Dense`.
        LBE_alpha: initial entropy to reach, in nats; trained (see `LBERegularizer`).
        LBE_alpha_min: what it cannot fall below.
        LBE_beta: weight of this layer's LBE.
        activity_regularizer: one more activity regularizer, beside LBE; or an
            `LBERegularizer`, which is then used as it is in place of `LBE_...`.
        **kwargs: as for `keras.layers.Dense`.

    Example:

    >>> layer = Dense_LBE(32, activation="relu", LBE_alpha=3.0, LBE_alpha_min=0.3)
    """


@keras.saving.register_keras_serializable(package="lbe_ops")
class Conv2D_LBE(_LBE, keras.layers.Conv2D):
    """`keras.layers.Conv2D` with LBE on its output; see `Dense_LBE`.

    Every position of every channel is a unit of its own.

    Args:
        *args: as for `keras.layers.Conv2D`.
        LBE_alpha, LBE_alpha_min, LBE_beta, activity_regularizer: as for `Dense_LBE`.
        **kwargs: as for `keras.layers.Conv2D`.

    Example:

    >>> layer = Conv2D_LBE(16, 3, activation="relu", LBE_beta=0.5)
    """


def with_lbe(layer: AnyLayer, **arguments: Any) -> AnyLayer:
    """Puts LBE on the output of a layer of any class, built or not.

    An activity regularizer that the layer has stays, beside LBE. A layer that has
    LBE already is left as it is. Every output of a layer counts as a layer of its
    own, and must be floating point. A model in the model is no layer.

    Args:
        layer: the layer; changed in place.
        **arguments: those of `LBERegularizer`.

    Returns:
        The same layer.

    Raises:
        ValueError: an argument is out of its range or not a number, or the layer is a
            Functional or Sequential model.

    Example:

    >>> x = with_lbe(keras.layers.Conv1D(8, 3), lbe_alpha=1.0)(keras.Input((32, 4)))
    """
    _attach(layer, _regularizer_for(layer, **arguments))
    return layer


def _attach(layer: keras.layers.Layer, regularizer: LBERegularizer) -> None:
    tracker = layer._tracker
    locked = tracker.locked  # a built layer refuses new weights
    tracker.unlock()
    layer.activity_regularizer = regularizer
    tracker.locked = locked


def add_lbe(
    model: keras.Model,
    layers: Selection = (keras.layers.Dense, keras.layers.Conv2D),
    *,
    LBE_strength: float = 1.5,
    **arguments: Any,
) -> LBEModel:
    """An `LBEModel` out of a Functional or Sequential model, with LBE on some layers.

    The layers are those of `model`, changed in place: both models share them, and
    `model` itself would now train with LBE added to its loss. A layer that has LBE
    already keeps it as it is, whatever the arguments. After an error no layer has
    changed.

    Args:
        model: a built Functional or Sequential model. For a subclassed model, derive
            it from `LBEModel` and use `with_lbe`.
        layers: which layers get LBE, nested ones included: a layer class (or several
            in a tuple), a function of the layer that says so, or names.
        LBE_strength: as for `LBEModel`.
        **arguments: those of `LBERegularizer`; every layer gets one of its own.

    Returns:
        The model, to be compiled.

    Raises:
        ValueError: the selection matches no layer, or names one that is not there,
            or an argument is out of its range.
        TypeError: the model is neither Functional nor Sequential (or not built).

    Example:

    >>> resnet = keras.applications.ResNet50(weights=None)
    >>> model = add_lbe(resnet, keras.layers.Conv2D, LBE_strength=0.1, lbe_alpha=1.0)
    """
    if not getattr(model, "inputs", None):
        raise TypeError(
            "add_lbe takes a Functional model, or a Sequential one with an Input. "
            f"Received: model={model}"
        )
    check_finite("LBE_strength", LBE_strength, at_least=0)
    selected = select_layers(model, layers)
    regularizers = [_regularizer_for(layer, **arguments) for layer in selected]
    for layer, regularizer in zip(selected, regularizers, strict=True):
        _attach(layer, regularizer)
    if isinstance(model, keras.Sequential):  # has lists only
        (inputs,), (outputs,) = model.inputs, model.outputs
    else:
        inputs, outputs = model.input, model.output
    return LBEModel(inputs, outputs, LBE_strength=LBE_strength, name=model.name)


def select_layers(model: keras.Model, layers: Selection) -> list[keras.layers.Layer]:
    """The layers of a model that match, nested ones included; see `add_lbe`."""
    candidates = [
        layer
        for layer in model._flatten_layers(include_self=False)
        if not isinstance(layer, (keras.layers.InputLayer, LBERegularizer))
    ]
    if isinstance(layers, str):
        layers = [layers]
    if isinstance(layers, type) or (
        isinstance(layers, tuple) and all(isinstance(c, type) for c in layers)
    ):
        selected = [layer for layer in candidates if isinstance(layer, layers)]
    elif callable(layers):
        selected = [layer for layer in candidates if layers(layer)]
    else:
        names = set(layers)
        missing = names - {layer.name for layer in candidates}
        if missing:
            raise ValueError(f"There is no such layer. Received: {sorted(missing)}")
        selected = [layer for layer in candidates if layer.name in names]
    if not selected:
        raise ValueError(f"No layer matches. Received: layers={layers!r}")
    return selected
