# SPDX-License-Identifier: Apache-2.0
"""Initializations of deep plain nets: what LBE is to be compared with.

`LooksLinear` and `DeltaOrthogonal` are initializers for a layer's kernel,
`critical_gain` is the scale that an activation needs, and `lsuv` finds the scale of
every layer of a model by a forward pass.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from lbe_ops.layers import Selection, select_layers, with_attributes
from lbe_ops.regularizer import check_finite


def _generator(seed: int | None) -> np.random.Generator:
    """Without a seed, one that follows `keras.utils.set_random_seed`."""
    return np.random.default_rng(random.getrandbits(64) if seed is None else seed)


def _orthogonal(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """A matrix whose rows (or columns, if these are fewer) are orthonormal."""
    normal = rng.normal(size=(max(rows, columns), min(rows, columns)))
    orthogonal, triangular = np.linalg.qr(normal)
    orthogonal *= np.sign(np.diag(triangular))  # any of them is equally likely
    return orthogonal if rows >= columns else orthogonal.T


def _at_the_centre(
    matrix: np.ndarray, shape: tuple[int, ...], dtype: str | None
) -> object:
    """A kernel that has the matrix at the centre of its window, and zeros around."""
    kernel = np.zeros(shape)
    kernel[tuple((length - 1) // 2 for length in shape[:-2])] = matrix
    return keras.ops.convert_to_tensor(kernel, dtype or keras.config.floatx())


@keras.saving.register_keras_serializable(package="lbe_ops")
class LooksLinear(keras.initializers.Initializer):
    """Mirrored orthogonal kernels, with which a ReLU or GELU net starts linear.

    The units of a layer are pairs that see `z` and `-z`, and the next layer takes
    `f(z) - f(-z)` from them, of the activation f: with a semi-orthogonal matrix A, the
    first kernel is `gain * [A, -A]` and every later one `gain * [[A, -A], [-A, A]]`.
    The pairs part as soon as the net trains. Convolutions have A at the centre of their
    kernel and zeros around that.

    Of relu, gelu, silu and softplus that difference is z itself: however deep, the net
    starts as a linear map, in which neither signals nor gradients vanish, explode or
    become alike; an isometry where no layer has fewer pairs than it has inputs (the
    first) or than the layer before. Biases must be zero. The same is so for leaky_relu
    with `gain=1 / (1 + slope)`. Of sigmoid it is `tanh(z / 2)`: with a gain of 2, the
    edge below which signals die out, or rather 2.2, the net starts as an orthogonal
    tanh net. `critical_gain(activation, pairs=True)` is the gain of any activation;
    tanh itself needs no pairs. How deep such nets were trained: docs/map.md.

    Args:
        first: whether the layer's input is not made of such pairs.
        seed: of the orthogonal matrix; equal seeds give equal kernels. None draws
            another one each time, from what `keras.utils.set_random_seed` has set.
        gain: what the kernel is multiplied by, a finite number.

    Raises:
        ValueError: units (or, but for the first layer, inputs) are odd in number; the
            gain is not finite.

    Example:

    >>> kernel = LooksLinear(first=True, seed=1)((3, 4))
    >>> bool(np.allclose(kernel[:, :2], -kernel[:, 2:]))
    True

    Source: Balduzzi et al., "The Shattered Gradients Problem", ICML 2017
    (arXiv 1702.08591), section 4, for relu. Of gelu and silu `f(z) - f(-z) = z` (as
    noted by J. Su, kexue.fm, 16 August 2025), since they are `z * s(z)` with
    `s(z) + s(-z) = 1`.
    """

    def __init__(
        self, first: bool = False, seed: int | None = None, gain: float = 1.0
    ) -> None:
        check_finite("gain", gain)
        self.first = first
        self.seed = seed
        self.gain = float(gain)

    def __call__(self, shape: tuple[int, ...], dtype: str | None = None) -> object:
        inputs, units = shape[-2:]
        if units % 2 or (inputs % 2 and not self.first):
            raise ValueError(
                "looks_linear makes pairs of units: their number must be even. "
                f"Received: a kernel of shape {tuple(shape)}"
            )
        rows = inputs if self.first else inputs // 2
        matrix = self.gain * _orthogonal(rows, units // 2, _generator(self.seed))
        matrix = np.concatenate([matrix, -matrix], axis=1)
        if not self.first:
            matrix = np.concatenate([matrix, -matrix])
        return _at_the_centre(matrix, shape, dtype)

    def get_config(self) -> dict[str, object]:
        """Whether it is for a first layer, the seed, and the gain."""
        return {"first": self.first, "seed": self.seed, "gain": self.gain}


@keras.saving.register_keras_serializable(package="lbe_ops")
class DeltaOrthogonal(keras.initializers.Initializer):
    """Orthogonal kernels of convolutions: a matrix at the centre, zeros around that.

    For kernels `[*window, inputs, units]` of `Conv1D`, `Conv2D` and `Conv3D`; the
    kernel of a `Dense` layer, which has no window, is the matrix itself. With stride 1
    and padding "same" the convolution turns the channels of every position, and mixes
    no positions. With inputs <= units the rows of the matrix are orthonormal, and the
    layer is `gain` times an isometry, as the paper needs it. With inputs > units there
    is none: here the columns are orthonormal then, and the isometry is that of the
    gradients. A deep net needs `gain=critical_gain(activation)` and zero biases.

    The matrix of a grouped convolution, `[inputs / groups, units]`, is one for all of
    its groups, and no isometry. Depthwise kernels are not made of such matrices.

    Args:
        gain: what the matrix is multiplied by, a finite number.
        seed: as for `LooksLinear`.

    Raises:
        ValueError: the gain is not finite, or the kernel has fewer than two axes.

    Example:

    >>> matrix = np.array(DeltaOrthogonal(seed=1)((3, 3, 4, 8))[1, 1])
    >>> bool(np.allclose(matrix @ matrix.T, np.eye(4), atol=1e-6))
    True

    Source: Xiao et al., "Dynamical Isometry and a Mean Field Theory of CNNs", ICML 2018
    (arXiv 1806.05393), algorithm 1.
    """

    def __init__(self, gain: float = 1.0, seed: int | None = None) -> None:
        check_finite("gain", gain)
        self.gain = float(gain)
        self.seed = seed

    def __call__(self, shape: tuple[int, ...], dtype: str | None = None) -> object:
        if len(shape) < 2:
            raise ValueError(
                "DeltaOrthogonal is for kernels [*window, inputs, units]. "
                f"Received: shape={tuple(shape)}"
            )
        inputs, units = shape[-2:]
        matrix = self.gain * _orthogonal(inputs, units, _generator(self.seed))
        return _at_the_centre(matrix, shape, dtype)

    def get_config(self) -> dict[str, object]:
        """The gain and the seed."""
        return {"gain": self.gain, "seed": self.seed}


def critical_gain(
    activation: str | Callable[[Any], Any] | None, pairs: bool = False
) -> float:
    """The gain of orthogonal kernels with which a deep plain net keeps its signal.

    It is meant for nets with zero biases whose input has a second moment of about 1,
    and for the `gain` of `DeltaOrthogonal` and `keras.initializers.Orthogonal`. For
    normal kernels of N inputs it is their standard deviation times sqrt(N).

    Of an odd activation that damps large signals (tanh, softsign) it is
    `1 / activation'(0)`: the edge of chaos, at which signals neither die out at an
    exponential rate nor become chaotic. Of any other one it is
    `1 / sqrt(E[activation(z)**2])`, z normal with variance 1: that of
    pre-activations stays 1. For what is linear on both sides of zero that is critical
    as well, at any variance: linear 1, relu sqrt(2), leaky_relu
    sqrt(2 / (1 + slope**2)). For the remaining ones the gain keeps the scale, and is
    not the edge of chaos: nets of selu (1, by its design) and elu return to that scale;
    those of gelu and silu leave it, since an error in the second moment grows by 14 and
    17 % a layer: with gelu all of eight nets of 50 layers trained, of 100 layers none
    (docs/map.md); with sigmoid it is kept while all samples soon look alike. For these
    three `LooksLinear` does better.

    Args:
        activation: as for a layer of Keras: a name, a function or None (linear). A
            function of your own takes a float64 tensor, and works element by element.
        pairs: whether to return the gain of `LooksLinear`: that of the difference
            `activation(z) - activation(-z)`. It is 1 for relu, gelu, silu and
            softplus, 2 for sigmoid.

    Returns:
        The gain, > 0. A numerical integral: relative error 1e-8 where the activation
        computes in float64, and has kinks at multiples of 1/2 only.

    Raises:
        ValueError: there is no such activation, or it does not work element by
            element, or the gain is not finite.

    Example:

    >>> round(critical_gain("relu"), 6)
    1.414214

    Source: Schoenholz et al., "Deep Information Propagation", ICLR 2017
    (arXiv 1611.01232); He et al., 2015 (arXiv 1502.01852), section 2.2.
    """
    function = keras.activations.get(activation)

    def values(z: np.ndarray) -> np.ndarray:
        x = keras.ops.convert_to_tensor(z, "float64")
        y = function(x) - function(-x) if pairs else function(x)
        return np.asarray(keras.ops.convert_to_numpy(y), np.float64)

    # Not Gauss-Hermite, which is slow to converge for functions with kinks.
    nodes, weights = np.polynomial.legendre.leggauss(20)
    middles = np.arange(-12, 12, 0.5)[:, np.newaxis] + 0.25
    z = (middles + 0.25 * nodes).ravel()
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    y = values(z)
    if y.shape != z.shape or not np.allclose(values(z[::2]), y[::2], equal_nan=True):
        raise ValueError(
            "critical_gain takes activations that work element by element. "
            f"Received: activation={activation!r}"
        )
    moment = float(np.sum(np.tile(0.25 * weights, len(middles)) * density * y**2))
    if not 0 < moment < math.inf:
        what = "(activation(z) - activation(-z))" if pairs else "activation(z)"
        raise ValueError(
            f"The gain is the inverse of the root of E[{what}**2], which must be "
            f"finite and > 0. Received: {moment} for activation={activation!r}"
        )
    if np.max(np.abs(y + y[::-1])) < 1e-6 * np.max(np.abs(y)):
        # Twice the one minus the other is free of an error that is linear in the step.
        steps = np.array([1e-5, 2e-5])
        once, twice = values(steps) / steps
        slope = round(float(abs(2 * once - twice)), 9)
        # Of a linear function both say the same, and the slope says it exactly.
        if slope**2 > (1 - 1e-9) * moment:
            return 1 / slope
    return 1 / math.sqrt(moment)


class ScaledLayer(NamedTuple):
    """What `lsuv` did to a layer.

    Attributes:
        layer: its path.
        factor: what the kernel was multiplied by, in all.
        variance: of its pre-activations on the batch, after that.
    """

    layer: str
    factor: float
    variance: float


def lsuv(
    model: keras.Model,
    x: Any,
    *,
    target: float = 1.0,
    tolerance: float = 0.05,
    max_iterations: int = 10,
    layers: Selection | None = None,
    orthogonal: bool = False,
    seed: int | None = None,
    verbose: bool = False,
) -> list[ScaledLayer]:
    """Layer-sequential unit-variance initialization: scales the kernels of a model.

    In one eager forward pass for inference (`training=False`) every layer's kernel is
    multiplied, as the pass reaches the layer, until the variance of its pre-activations
    on the batch `x` is `target`: the variance over all entries of what the layer
    returns with a linear `activation`, bias included, over samples, positions and
    units alike. It is computed in float64 from outputs of the layer's own dtype. A
    layer that is called more than once is scaled at its first call (in TimeDistributed,
    at the first step). Biases and all other weights stay as they are.

    That cures a wrong scale, and no more: the samples may still become alike with
    depth, since the variance over units counts as well.

    Args:
        model: a built Keras model, Functional, Sequential, `LBEModel` or subclassed;
            changed in place. Models that share its layers share the change.
        x: the batch: inputs of the model as an array, or the structure of arrays that
            the model takes.
        target: the variance to reach, > 0.
        tolerance: how far from it, relative to it, the variance may stay, > 0. A
            layer that is within already is left alone.
        max_iterations: how often a kernel may be scaled. Without a bias once does.
        layers: which layers, as for `add_lbe`. None takes every layer with a
            `kernel` that is neither frozen nor recurrent, nested ones included:
            `Dense`, `EinsumDense`, all convolutions.
        orthogonal: whether kernels are drawn anew before they are scaled, as in the
            paper: `[everything but units, units]` with orthonormal rows or columns.
        seed: of these kernels; as for `LooksLinear`.
        verbose: whether to print a line for each layer.

    Returns:
        For each layer, in the order of the forward pass, what was done. The same
        weights, batch and seed give the same results, as far as TensorFlow does.

    Raises:
        ValueError: an argument is out of its range; the model is not built; no layer
            matches; one that does has no kernel of floating point, or is not called;
            or its variance is zero or not finite, or does not come to the target. The
            weights are then what they were.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, "gelu")])
    >>> x = np.random.default_rng(0).normal(size=(64, 8))
    >>> done = lsuv(model, x, tolerance=1e-4)
    >>> round(done[0].variance, 3)
    1.0

    Source: Mishkin & Matas, "All you need is a good init", ICLR 2016
    (arXiv 1511.06422), algorithm 1.
    """
    for name, value in (("target", target), ("tolerance", tolerance)):
        check_finite(name, value, at_least=0)
        if value == 0:
            raise ValueError(f"{name} must be > 0. Received: {name}={value!r}")
    if not isinstance(max_iterations, int) or max_iterations < 1:
        raise ValueError(
            "max_iterations must be an integer >= 1. "
            f"Received: max_iterations={max_iterations!r}"
        )
    if not tf.executing_eagerly():
        raise ValueError("lsuv changes weights, and is not for use in a tf.function.")
    if not model.built:
        raise ValueError(
            "lsuv needs a model with weights: call it on a batch before. "
            f"Received: {model.name!r}, which is not built"
        )
    try:
        selected = select_layers(model, _has_kernel if layers is None else layers)
    except ValueError:
        if layers is not None:
            raise
        raise ValueError(
            "lsuv finds no layer with a kernel that is neither frozen nor recurrent. "
            f"Name layers in `layers`. Received: {model.name!r}"
        ) from None
    kernels = {layer: _kernel(layer) for layer in selected}
    before = {layer: _numpy(kernel) for layer, kernel in kernels.items()}
    rng = _generator(seed) if orthogonal else None
    done: dict[keras.layers.Layer, ScaledLayer | None] = {}
    failure: ValueError | None = None

    def scale(layer: keras.layers.Layer, measure: Callable[[], float]) -> ScaledLayer:
        path = layer.path or layer.name
        kernel, start, factor = kernels[layer], before[layer].astype(np.float64), 1.0
        if rng is not None:
            start = _orthogonal(start.size // start.shape[-1], start.shape[-1], rng)
            start = start.reshape(kernel.shape)
            kernel.assign(tf.cast(start, kernel.dtype))
        for _ in range(max_iterations + 1):
            variance = measure()
            if not 0 < variance < math.inf:
                raise ValueError(
                    f"Layer '{path}' cannot be scaled: the variance of its "
                    f"pre-activations must be finite and > 0. Received: {variance}"
                )
            if abs(variance / target - 1) <= tolerance:
                return ScaledLayer(path, factor, variance)
            factor *= math.sqrt(target / variance)
            kernel.assign(tf.cast(factor * start, kernel.dtype))
        raise ValueError(
            f"The variance of the pre-activations of layer '{path}' does not come to "
            f"{target} +- {tolerance:.3%}: it is {variance:g} after {max_iterations} "
            "scalings of its kernel. If its biases alone vary that much, make them "
            "smaller; or give more iterations or tolerance."
        )

    def reached(
        layer: keras.layers.Layer, call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        nonlocal failure
        if layer not in done:
            done[layer] = None  # for calls from inside of the measurement
            try:
                scaled = scale(layer, lambda: _variance(layer, call, args, kwargs))
            except ValueError as error:
                failure = error
                raise
            done[layer] = scaled
            if verbose:
                print("{}: kernel times {:.4g}, variance {:.4g}".format(*scaled))
        return call(*args, **kwargs)

    try:
        with _calling(selected, reached):
            model(keras.tree.map_structure(tf.convert_to_tensor, x), training=False)
        missing = [layer.path or layer.name for layer in selected if layer not in done]
        if missing:
            raise ValueError(
                "The model does not call these layers for inference, or only in a "
                f"tf.function: leave them out of `layers`. Received: {missing}"
            )
    except BaseException:
        for layer, kernel in kernels.items():
            kernel.assign(before[layer])
        if failure is not None:  # and not what Keras made of it
            raise failure from None
        raise
    return [scaled for scaled in done.values() if scaled is not None]


def _has_kernel(layer: keras.layers.Layer) -> bool:
    """Whether `lsuv` takes a layer by itself; wrappers show the kernel of another."""
    return (
        getattr(layer, "kernel", None) is not None
        and not hasattr(layer, "recurrent_kernel")
        and not isinstance(layer, keras.layers.Wrapper)
        and layer.trainable
    )


def _kernel(layer: keras.layers.Layer) -> keras.Variable:
    kernel = getattr(layer, "kernel", None)
    if isinstance(kernel, keras.Variable) and "float" in kernel.dtype:
        return kernel
    raise ValueError(
        f"Layer '{layer.path or layer.name}' has no variable `kernel` of floating "
        "point that lsuv could scale (one with LoRA or quantized is none). Leave it "
        f"out of `layers`. Received: {type(kernel).__name__} of the dtype "
        f"{getattr(kernel, 'dtype', None)}"
    )


def _numpy(kernel: keras.Variable) -> np.ndarray:
    return kernel.numpy().copy()


def _variance(
    layer: keras.layers.Layer,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> float:
    """The variance of all that a layer's `call` returns with a linear activation."""
    if not tf.executing_eagerly():
        raise ValueError(
            f"Layer '{layer.path or layer.name}' is called in a graph (of a "
            "tf.function in the model?), where its output has no values. Leave it out "
            "of `layers`, or call it eagerly."
        )
    has_one = "activation" in vars(layer)
    linear = {"activation": keras.activations.linear} if has_one else {}
    with with_attributes(layer, linear):
        outputs = keras.tree.flatten(call(*args, **kwargs))
    entries = [np.ravel(tf.cast(output, tf.float64)) for output in outputs]
    return float(np.var(np.concatenate(entries)))


@contextlib.contextmanager
def _calling(
    layers: Iterable[keras.layers.Layer], function: Callable[..., Any]
) -> Iterator[None]:
    """Lets Keras call `function(layer, call, ...)` in place of the `call` of layers."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            call = functools.partial(function, layer, layer.call)
            stack.enter_context(with_attributes(layer, {"call": call}))
        yield
