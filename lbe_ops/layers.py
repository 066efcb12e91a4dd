# SPDX-License-Identifier: Apache-2.0
"""LBE on layers: `Dense_LBE`, `Conv2D_LBE`, `LBE` behind any other, and whole models.

`with_lbe` puts an `LBERegularizer` on one layer, `add_lbe` on chosen layers of an
existing model.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from lbe_ops import ops, recorder, targets
from lbe_ops.fuse import reporting_call, tapped
from lbe_ops.keras_internals import flatten_layers
from lbe_ops.loss import LBELoss
from lbe_ops.model import LBEModel
from lbe_ops.regularizer import LBERegularizer
from lbe_ops.strength import strength_of

AnyLayer = TypeVar("AnyLayer", bound=keras.layers.Layer)
Selection = (
    type[keras.layers.Layer]
    | tuple[type[keras.layers.Layer], ...]
    | Callable[[keras.layers.Layer], bool]
    | Iterable[str]
)

# The layer that Keras is calling, and whether that leaves anything to regularize.
_call: contextvars.ContextVar[tuple[Any, list[bool]]] = contextvars.ContextVar(
    "lbe_ops_call", default=(None, [])
)


def _regularizer(other: Any, **arguments: Any) -> LBERegularizer:
    """LBE beside the activity regularizer that a layer has, unless that is LBE."""
    other = keras.regularizers.get(other)
    if isinstance(other, LBERegularizer):
        LBERegularizer(**arguments)  # a misspelt argument is an error all the same
        return other
    return LBERegularizer(other_activity_regularizer=other, **arguments)


class _ReportingLayer:
    """Before a layer class: in a step of an `LBEModel` it reports its entropy itself.

    Anywhere else the layer is one with an `LBERegularizer`, which Keras calls.
    """

    lbe_regularizer: Any = None

    @property
    def activity_regularizer(self) -> Any:
        """The layer's `LBERegularizer`.

        None while Keras ends a call in a forward pass of an `LBEModel`: it would divide
        a loss that is always zero by the batch size, in four operations a layer.
        """
        layer, reported = _call.get()
        return None if layer is self and reported else self.lbe_regularizer

    @activity_regularizer.setter
    def activity_regularizer(self, value: Any) -> None:
        # Keras leaves what is called `activity_regularizer` out of weights files.
        self.lbe_regularizer = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with recorder.set_to(_call, (self, [])):
            return super().__call__(*args, **kwargs)

    def _reporting_to(self, training: Any) -> recorder.Recording | None:
        """Where the call that has begun is to report to, or None."""
        regularizer = self.lbe_regularizer
        if not isinstance(regularizer, LBERegularizer):
            return None
        layer, reported = _call.get()
        if recorder.current() is None:
            if training and layer is not self:
                raise ValueError(
                    f"The `call` of the LBE layer '{self.path or self.name}' is used, "
                    "and the layer itself is not called (as in TimeDistributed): Keras "
                    "would leave its LBE out. Put LBE behind the wrapper: "
                    "lbe_ops.LBE()(wrapper(x))."
                )
            return None
        if layer is self and regularizer.other_activity_regularizer is None:
            reported.append(True)
        return recorder.active(training)


class _EndsWithEpilogue(_ReportingLayer):
    """What `Dense_LBE` and `Conv2D_LBE` add to the layer class behind them."""

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
        regularizer.reach = targets.reach_of(self, **regularizer.formula)

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """The layer's output; in a step of an `LBEModel` its entropy is reported."""
        recording = self._reporting_to(training)
        if recording is None:
            return super().call(inputs)
        regularizer = self.lbe_regularizer
        return reporting_call(self, super().call, regularizer, recording, inputs)

    def quantize(self, *args: Any, type_check: bool = True, **kwargs: Any) -> None:
        """Quantizes the layer as the one of Keras, whose class it does not change."""
        super().quantize(*args, type_check=False, **kwargs)


@keras.saving.register_keras_serializable(package="lbe_ops")
class Dense_LBE(_EndsWithEpilogue, keras.layers.Dense):
    """`keras.layers.Dense` with LBE on its output.

    Args:
        *args: as for `keras.layers.Dense`.
        LBE_alpha: initial entropy to reach, in nats; trained (see `LBERegularizer`).
            The default, of the TensorFlow port, is above what a bounded activation can
            have (`lbe_ops.max_entropy`): give such a layer one that is not.
        LBE_alpha_min: what it cannot fall below.
        LBE_beta: weight of this layer's LBE.
        activity_regularizer: one more activity regularizer, beside LBE; or an
            `LBERegularizer`, which is then used as it is in place of `LBE_...`.
        **kwargs: as for `keras.layers.Dense`.

    Attributes:
        activity_regularizer: the layer's `LBERegularizer`; `lbe_regularizer` is
            another name.

    Example:

    >>> layer = Dense_LBE(32, activation="relu", LBE_alpha=3.0, LBE_alpha_min=0.3)
    """


@keras.saving.register_keras_serializable(package="lbe_ops")
class Conv2D_LBE(_EndsWithEpilogue, keras.layers.Conv2D):
    """`keras.layers.Conv2D` with LBE on its output; see `Dense_LBE`.

    Every position of every channel is a unit of its own.

    Args:
        *args: as for `keras.layers.Conv2D`.
        LBE_alpha, LBE_alpha_min, LBE_beta, activity_regularizer: as for `Dense_LBE`.
        **kwargs: as for `keras.layers.Conv2D`.

    Example:

    >>> layer = Conv2D_LBE(16, 3, activation="relu", LBE_beta=0.5)
    """


@keras.saving.register_keras_serializable(package="lbe_ops")
class LBE(_ReportingLayer, keras.layers.Layer):
    """Passes its input on, and puts LBE on it: behind any layer, block or model.

    Outputs have the dtype, the values and the mask of the inputs, in every mode. Every
    tensor of a structure counts as a layer of its own; all must be floating point.
    Behind an activation that a loss of Keras looks for (softmax, sigmoid), use a loss
    with `from_logits=True`: the loss does not look through this layer.

    Args:
        lbe_alpha, lbe_alpha_min, lbe_beta, ddof, scale, offset, native, variant: as for
            `LBERegularizer`.
        activity_regularizer: one more activity regularizer, beside LBE; or an
            `LBERegularizer`, which is then used as it is.
        **kwargs: as for `keras.layers.Layer`: `name`, `trainable`.

    Example:

    >>> x = keras.layers.LSTM(32)(keras.Input((16, 8)))
    >>> x = LBE(lbe_alpha=1.0)(x)
    """

    def __init__(
        self,
        lbe_alpha: float = 0.5,
        lbe_alpha_min: float = 0.3,
        lbe_beta: float = 0.2,
        *,
        ddof: int = 0,
        scale: float = ops.SCALE,
        offset: float = ops.OFFSET,
        native: bool | None = None,
        variant: str = "entropy",
        activity_regularizer: Any = None,
        **kwargs: Any,
    ) -> None:
        regularizer = _regularizer(
            activity_regularizer,
            lbe_alpha=lbe_alpha,
            lbe_alpha_min=lbe_alpha_min,
            lbe_beta=lbe_beta,
            ddof=ddof,
            scale=scale,
            offset=offset,
            native=native,
            variant=variant,
        )
        kwargs.setdefault("autocast", False)  # the dtype is that of the inputs
        super().__init__(activity_regularizer=regularizer, **kwargs)
        self.supports_masking = True
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The inputs; in a step of an `LBEModel` their entropies are reported."""
        recording = self._reporting_to(training)
        if recording is None:
            return inputs
        name = self.path or self.name
        return keras.tree.map_structure(
            lambda x: tapped(self.lbe_regularizer, recording, name, x), inputs
        )

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> Any:
        """Shapes and dtypes of the inputs."""
        return keras.tree.map_structure(
            lambda x: keras.KerasTensor(x.shape, x.dtype), inputs
        )


def with_lbe(layer: AnyLayer, **arguments: Any) -> AnyLayer:
    """Puts LBE on the output of a layer, built or not.

    An activity regularizer that the layer has stays, beside LBE. A layer that has
    LBE already is left as it is. Every output of a layer counts as a layer of its
    own, and must be floating point. A model in the model is no layer.

    Some layer classes of Keras do not keep an activity regularizer (as of Keras 3.15
    `MultiHeadAttention`, `SimpleRNN`, `SpatialDropout1D`, `EinsumDense` and others):
    they are refused, since LBE would be lost in a file. Put `LBE()` behind them.

    Args:
        layer: the layer; changed in place. The alpha of one that is built already is
            trained by an `LBEModel` only.
        **arguments: those of `LBERegularizer`. Without `lbe_alpha` the target suits the
            layer's activation: 1 nat where it is unbounded, 0.5 for tanh, 0.2 for
            sigmoid, and 0.4 of `lbe_ops.max_entropy` for other bounded ones;
            `lbe_alpha_min` is 0.05, or less for a small target; `lbe_beta` is 1. So
            ran the map of trainability (docs/map.md).

    Returns:
        The same layer.

    Raises:
        ValueError: an argument is out of its range or not a number, or the layer is a
            Functional or Sequential model, or would lose LBE in a file.

    Example:

    >>> x = with_lbe(keras.layers.Conv1D(8, 3), lbe_alpha=1.0)(keras.Input((32, 4)))
    """
    _attach(layer, _regularizer_for(layer, **arguments))
    return layer


def _regularizer_for(layer: keras.layers.Layer, **arguments: Any) -> LBERegularizer:
    if isinstance(layer, keras.Model):
        raise ValueError(
            "LBE is for a layer, and Keras would lose its alpha in a model. Put it on "
            "the last layer of the model, or behind it: lbe_ops.LBE()(model(x)). "
            f"Received: {layer.name!r}"
        )
    arguments.setdefault("name", f"{layer.name}_lbe")
    defaults = targets.default_arguments(layer, **arguments)
    regularizer = _regularizer(layer.activity_regularizer, **{**defaults, **arguments})
    regularizer.reach = targets.reach_of(layer, **regularizer.formula)
    if not _keeps(layer, regularizer):
        raise ValueError(
            f"A layer of the class {type(layer).__name__} does not keep an activity "
            "regularizer in its configuration, and LBE would be lost when the model is "
            "saved. Put LBE behind it: lbe_ops.LBE()(layer(x)). "
            f"Received: {layer.name!r}"
        )
    return regularizer


def _keeps(layer: keras.layers.Layer, regularizer: LBERegularizer) -> bool:
    """Whether a copy of the layer, made as from a file, has the regularizer."""
    try:
        copy = type(layer).from_config(layer.get_config())
        vars(copy)["activity_regularizer"] = regularizer
        again = type(layer).from_config(copy.get_config())
    except (NotImplementedError, TypeError):
        return True  # Keras cannot make such a layer from a file, with or without LBE
    return isinstance(again.activity_regularizer, LBERegularizer)


def _attach(layer: keras.layers.Layer, regularizer: LBERegularizer) -> None:
    try:
        layer.activity_regularizer = regularizer
    except ValueError:  # Keras takes no new sublayer into a layer that is built
        vars(layer)["activity_regularizer"] = regularizer
        layer.lbe_checkpointed = regularizer.checkpointed  # of TensorFlow's, tracked
        regularizer.on_built_layer = True


def add_lbe(
    model: keras.Model,
    layers: Selection | None = None,
    *,
    LBE_strength: float | Schedule = 0.1,
    **arguments: Any,
) -> LBEModel:
    """An `LBEModel` out of a Functional or Sequential model, with LBE on some layers.

    Without further arguments it has the setting of the map of trainability
    (docs/map.md), on every hidden layer.

    The layers are those of `model`, changed in place: both models share them. The
    alphas are trained by the `LBEModel`; `model` itself would now train with LBE added
    to its loss, and leave them as they are. A layer that has LBE already keeps it as
    it is, whatever the arguments. After an error no layer has changed.

    Args:
        model: a built Functional or Sequential model. For a subclassed model, derive
            it from `LBEModel` and use `with_lbe`.
        layers: which layers get LBE, nested ones included: a layer class (or several
            in a tuple), a function of the layer that says so, or names. None takes
            each `Dense` and `Conv2D` whose output is not one of the model's.
        LBE_strength: as for `LBEModel`: a number or a schedule.
        **arguments: those of `LBERegularizer`; every layer gets one of its own.
            Defaults are those of `with_lbe`, where they suit each layer's activation.

    Returns:
        The model, to be compiled.

    Raises:
        ValueError: the selection matches no layer, or names one that is not there, or
            one that would lose LBE in a file (see `with_lbe`), or an argument is out of
            its range.
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
    LBE_strength = strength_of(LBE_strength)
    selected = hidden_layers(model) if layers is None else select_layers(model, layers)
    regularizers = [_regularizer_for(layer, **arguments) for layer in selected]
    for layer, regularizer in zip(selected, regularizers, strict=True):
        if layer.activity_regularizer is not regularizer:
            _attach(layer, regularizer)
    if isinstance(model, keras.Sequential):  # has lists only
        (inputs,), (outputs,) = model.inputs, model.outputs
    else:
        inputs, outputs = model.input, model.output
    return LBEModel(inputs, outputs, LBE_strength=LBE_strength, name=model.name)


def hidden_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Each `Dense` and `Conv2D` that gives none of the model's outputs.

    What a model returns is for the compiled loss alone to say.
    """
    outputs = {id(each) for each in keras.tree.flatten(model.outputs)}

    def gives_outputs(layer: keras.layers.Layer) -> bool:
        try:
            own = keras.tree.flatten(layer.output)
        except (AttributeError, ValueError):  # called several times, or by a layer
            return False
        return any(id(each) in outputs for each in own)

    layers = select_layers(model, (keras.layers.Dense, keras.layers.Conv2D))
    hidden = [layer for layer in layers if not gives_outputs(layer)]
    if not hidden:
        raise ValueError(
            "The model has no hidden layer: each Dense and Conv2D gives one of its "
            "outputs. Name those that are to get LBE. "
            f"Received: layers=None for {[layer.name for layer in layers]}"
        )
    return hidden


@contextlib.contextmanager
def with_attributes(
    layer: keras.layers.Layer, attributes: dict[str, Any]
) -> Iterator[None]:
    """Gives a layer other attributes for a while, past Keras, which tracks such."""
    missing = object()
    before = {name: vars(layer).get(name, missing) for name in attributes}
    vars(layer).update(attributes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is missing:
                del vars(layer)[name]
            else:
                vars(layer)[name] = value


def select_layers(model: keras.Model, layers: Selection) -> list[keras.layers.Layer]:
    """The layers of a model that match, nested ones included; see `add_lbe`."""
    own = (keras.layers.InputLayer, LBERegularizer, LBELoss)
    model = getattr(model, "lbe_net", None) or model
    candidates = [
        layer for layer in flatten_layers(model) if not isinstance(layer, own)
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
        names: set[Any] = set(layers)
        missing = names - {layer.name for layer in candidates}
        if missing:
            raise ValueError(f"There is no such layer. Received: {sorted(missing)}")
        selected = [layer for layer in candidates if layer.name in names]
    if not selected:
        raise ValueError(f"No layer matches. Received: layers={layers!r}")
    return selected
