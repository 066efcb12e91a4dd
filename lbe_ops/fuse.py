# SPDX-License-Identifier: Apache-2.0
"""Dense layers and convolutions end with the epilogue: LBE rides along with the bias.

A layer's entropy costs a pass over its output. In a training step the epilogue
(`lbe_ops.ops.epilogue`) makes it in the pass that adds the bias and applies the
activation, and its gradient in the one that goes through them.

`Dense_LBE` and `Conv2D_LBE` do so by themselves. A plain `keras.layers.Dense` or
`Conv2D` with an `LBERegularizer` is made to by `fuse_layers`, which an `LBEModel` calls
once, when it takes the layers in: it sets the attribute `call` of the layer to a
function that ends with the epilogue in a step of an `LBEModel`, and anywhere else calls
what was there before. Weights, configuration, files, exported graphs and results stay
what they are. `LBEModel(..., fuse=False)` leaves the layers alone; LBE then costs them
a pass of its own. Layers of other classes, subclasses of the two, and layers whose
`call` was replaced before are never touched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import keras
import tensorflow as tf

from lbe_ops import ops, recorder
from lbe_ops.regularizer import LBERegularizer

# Activations that the op serves: its name for them, and their slope. Not sigmoid: Keras
# finds the logits of its output again in a loss, which a fused one would lose.
ACTIVATIONS = {
    keras.activations.linear: ("linear", 1.0),
    keras.activations.relu: ("relu", 1.0),
    keras.activations.leaky_relu: ("leaky_relu", 0.2),
    keras.activations.elu: ("elu", 1.0),
    keras.activations.selu: ("selu", 1.0),
    keras.activations.tanh: ("tanh", 1.0),
    keras.activations.softplus: ("softplus", 1.0),
}
_WITH_LOGITS = (keras.activations.sigmoid, keras.activations.softmax)


def reporting_call(
    layer: keras.layers.Dense | keras.layers.Conv2D,
    call: Callable[..., tf.Tensor],
    regularizer: LBERegularizer,
    recording: recorder.Recording,
    inputs: tf.Tensor,
) -> tf.Tensor:
    """What `call(inputs)` returns, with its entropy reported.

    Args:
        layer: the layer.
        call: its own `call`, for what the epilogue does not serve.
        regularizer: the layer's.
        recording: where to report to.
        inputs: of the layer.
    """
    name = layer.path or layer.name
    if layer.activation in _WITH_LOGITS or regularizer.on_units:
        y = call(inputs)
        regularizer.report(recording, y, name)
        return y
    served: tuple[str, float] | None = None
    products: Any = None
    for function, names in ACTIVATIONS.items():
        if layer.activation is function:
            served = names
    if served and isinstance(layer, keras.layers.Dense):
        products = keras.ops.matmul(inputs, layer.kernel)
    elif served and layer.data_format == "channels_last":
        products = layer.convolution_op(inputs, layer.kernel)
    if served is None or products is None:
        return tapped(regularizer, recording, name, call(inputs))
    activation, slope = served
    epilogue = {"bias": layer.bias, "activation": activation, "slope": slope}
    return tapped(regularizer, recording, name, products, **epilogue)


def tapped(
    regularizer: LBERegularizer,
    recording: recorder.Recording,
    layer: str,
    z: tf.Tensor,
    **epilogue: Any,
) -> tf.Tensor:
    """The epilogue of z (z itself without more arguments), its entropy reported."""
    if regularizer.on_units:  # reporting_call has left nothing but z to do
        regularizer.report(recording, z, layer)
        return z
    arguments = {**epilogue, **regularizer.formula, "native": regularizer.native}
    if recording.synchronized:
        y, moments = ops.epilogue_moments(z, **arguments)
        recording.report(regularizer, y, layer, moments=moments)
    else:
        y, entropy, valid = ops.epilogue(z, **arguments)
        recording.report(regularizer, y, layer, entropy=entropy, valid=valid)
    return y


def fuse_layers(layers: Iterable[keras.layers.Layer]) -> None:
    """Lets plain Dense layers and convolutions with LBE end with the epilogue.

    Args:
        layers: layers of a model; only those of exactly the two classes, with an
            `LBERegularizer`, change.
    """
    for layer in layers:
        if (
            type(layer) in (keras.layers.Dense, keras.layers.Conv2D)
            and isinstance(layer.activity_regularizer, LBERegularizer)
            and "call" not in vars(layer)
        ):
            layer.call = functools.partial(_fused_call, layer, layer.call)


def _fused_call(
    layer: Any,
    call: Callable[..., tf.Tensor],
    inputs: tf.Tensor,
    training: bool | None = None,
) -> tf.Tensor:
    recording = recorder.active(training)
    regularizer = layer.activity_regularizer
    if recording is None or not isinstance(regularizer, LBERegularizer):
        return call(inputs)
    return reporting_call(layer, call, regularizer, recording, inputs)
