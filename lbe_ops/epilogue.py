# SPDX-License-Identifier: Apache-2.0
"""LBE at the end of a layer's call: its statistics ride along with bias + activation.

In a step of an `LBEModel` every layer with an `LBERegularizer` ends with
`lbe_ops.ops.epilogue`, which costs less than statistics of their own. Layers are not
changed but for their instance's `call`, which calls that of their class anywhere else;
weights, configuration and files stay what they are.
"""

from __future__ import annotations

import types
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend import get_keras_mask, set_keras_mask

from lbe_ops import ops
from lbe_ops.regularizer import LBERegularizer, calling_layer, current_record

# Activations that the op serves: its name for them, and their parameter.
ACTIVATIONS = {
    keras.activations.linear: ("linear", 1.0),
    keras.activations.relu: ("relu", 1.0),
    keras.activations.leaky_relu: ("leaky_relu", 0.2),
    keras.activations.elu: ("elu", 1.0),
    keras.activations.selu: ("selu", 1.0),
    keras.activations.tanh: ("tanh", 1.0),
    keras.activations.sigmoid: ("sigmoid", 1.0),
    keras.activations.softplus: ("softplus", 1.0),
}


class EndsWithEpilogue:
    """Before a layer class: what the epilogue reports, Keras does not ask for again.

    It would divide a loss that is always zero by the batch size: four operations for
    every layer, where LBE itself takes none.
    """

    @property
    def activity_regularizer(self) -> Any:
        """That of the layer; None while Keras ends a call that has reported."""
        record = current_record()
        if record is not None and record.reported is self is calling_layer():
            return None
        return vars(self).get("activity_regularizer")

    @activity_regularizer.setter
    def activity_regularizer(self, value: Any) -> None:
        vars(self)["activity_regularizer"] = value

    @activity_regularizer.deleter
    def activity_regularizer(self) -> None:
        del vars(self)["activity_regularizer"]


def install(model: keras.Model) -> None:
    """Lets every layer of a model that has LBE end with an epilogue, in its steps.

    Layers whose `call` was replaced by somebody else are left alone.
    """
    for layer in model._flatten_layers(include_self=False):
        regularizer = getattr(layer, "activity_regularizer", None)
        if isinstance(regularizer, LBERegularizer) and "call" not in vars(layer):
            layer.call = types.MethodType(_call, layer)


def _call(layer: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:
    """In place of the layer's own `call`."""
    call = types.MethodType(type(layer).call, layer)
    record = current_record()
    if record is not None:
        record.reported = None
    regularizer = layer.activity_regularizer
    if not (
        isinstance(regularizer, LBERegularizer) and regularizer.in_epilogue_of(layer)
    ):
        return call(*args, **kwargs)
    served = products = None
    if type(layer).call in (keras.layers.Dense.call, keras.layers.Conv2D.call):
        served = next(
            (s for f, s in ACTIVATIONS.items() if f is layer.activation), None
        )
    if served:
        products = _products(layer, args[0] if args else kwargs["inputs"])
    if products is None:  # another layer, activation or layout
        return keras.tree.map_structure(
            lambda output: _tap(regularizer, output), call(*args, **kwargs)
        )
    y = regularizer.epilogue(products, layer.bias, *served)
    if layer.activation is keras.activations.sigmoid:
        # Losses take these for more precision; pruned where none does.
        y._keras_logits = products if layer.bias is None else products + layer.bias
    if isinstance(layer, EndsWithEpilogue):
        regularizer.report(y, layer)
    return y


def _products(layer: Any, inputs: Any) -> Any:
    """What a layer adds its bias to; None for channels that do not come last."""
    if type(layer).call is keras.layers.Dense.call:
        return keras.ops.matmul(inputs, layer.kernel)
    if layer.data_format != "channels_last":
        return None
    return layer.convolution_op(inputs, layer.kernel)


def _tap(regularizer: LBERegularizer, output: Any) -> Any:
    """The same output, with its entropy, and what Keras has attached to it."""
    if not isinstance(output, tf.Tensor) or output.dtype not in ops.DTYPES:
        return output
    y = regularizer.epilogue(output)
    if hasattr(output, "_keras_logits"):
        y._keras_logits = output._keras_logits
    mask = get_keras_mask(output)
    if mask is not None:
        set_keras_mask(y, mask)
    return y
