# SPDX-License-Identifier: Apache-2.0
"""Batch entropy and unit statistics: the public ops and their gradients.

One call is one native op where the compiled library can be used, and plain
TensorFlow (`lbe_ops.reference`) with the same results where it cannot.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.python.eager import forwardprop_util, record

from lbe_ops import native as native_library
from lbe_ops import reference

SCALE = math.pi * math.e
OFFSET = 1.0
# The range of scale and offset: float32 can hold their quotients.
SMALLEST, LARGEST = 1e-12, 1e12
DTYPES = (tf.float16, tf.bfloat16, tf.float32, tf.float64)


class UnitStatistics(NamedTuple):
    """Statistics over the batch, each of shape `x.shape[1:]`.

    float32, or float64 where x is float64.
    """

    mean: tf.Tensor
    variance: tf.Tensor
    entropy: tf.Tensor


@tf.autograph.experimental.do_not_convert  # there is nothing to convert
def batch_entropy(
    x: Any,
    *,
    ddof: int = 0,
    scale: float = SCALE,
    offset: float = OFFSET,
    native: bool | None = None,
) -> tf.Tensor:
    """Batch entropy of a layer's activations: how much they differ over a batch.

    With `v_u` the variance of unit `u` over the batch, in nats,

        H = mean_u 1/2 ln(scale * v_u + offset).

    The default `scale = pi * e`, `offset = 1` is always >= 0 and finite for a dead
    unit; `scale = 2 * pi * e`, `offset = 0` is the differential entropy of a Gaussian
    (minus infinity, with an undefined gradient, for a unit that does not vary).

    Differentiable twice and more. The first gradient is one native pass,

        dH/dx_nu = scale * (x_nu - mean_u) / (U (N - ddof) (scale * v_u + offset)),

    finite everywhere for `offset > 0`. NaN and Inf in x come out as NaN, as do sums of
    squares that overflow the type of the result. With the native op the result has
    the same bits whatever the number of threads.

    Args:
        x: activations `[N, ...]`, N >= 2 samples first; every later position is a
            unit. float16, bfloat16, float32 or float64, known or unknown shape.
        ddof: 0 divides the sum of squares by N, 1 by N - 1.
        scale: factor of the variance, from 1e-12 to 1e12.
        offset: what is added to it, 0 or in the same range.
        native: None uses the native op where possible, True requires it, False
            forbids it.

    Returns:
        A scalar, float32 (float64 for float64).

    Raises:
        tf.errors.InvalidArgumentError: fewer than two samples, or no unit.
        TypeError, ValueError: a dtype, rank or argument that is not served.
        lbe_ops.NativeUnavailableError: `native=True` and it cannot be used.

    Example:

    >>> x = tf.constant([[0.0, 1.0], [2.0, 1.0]])  # variances 1 and 0
    >>> float(lbe_ops.batch_entropy(x))            # (ln(pi e + 1) / 2 + 0) / 2
    0.563866...

    Source: Peer et al., TMLR 2022 (arXiv 2208.01134), with the offset of its code.
    """
    x, formula = _check(x, ddof, scale, offset)
    ops = native_library.select(native)
    if ops is None:
        return reference.batch_entropy(x, **formula)
    return _entropy(ops, x, formula).entropy


@tf.autograph.experimental.do_not_convert  # there is nothing to convert
def batch_entropy_or_zero(
    x: Any,
    *,
    ddof: int = 0,
    scale: float = SCALE,
    offset: float = OFFSET,
    native: bool | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """`batch_entropy` for a batch that may turn out too small to have one.

    Args:
        x, ddof, scale, offset, native: as for `batch_entropy`.

    Returns:
        `(entropy, valid)`, two scalars: `(H, 1)`, or `(0, 0)` with a gradient of zero
        where x has fewer than two samples or no unit. Multiply a loss by `valid`.
    """
    x, formula = _check(x, ddof, scale, offset)
    ops = native_library.select(native)
    if ops is None:
        return reference.batch_entropy_or_zero(x, **formula)
    outputs = _entropy(ops, x, formula, small_batch="zero")
    return outputs.entropy, outputs.valid


@tf.autograph.experimental.do_not_convert  # there is nothing to convert
def unit_statistics(
    x: Any,
    *,
    ddof: int = 0,
    scale: float = SCALE,
    offset: float = OFFSET,
    native: bool | None = None,
) -> UnitStatistics:
    """Mean, variance and entropy of every unit over the batch, in one pass over x.

    Errors and determinism are those of `batch_entropy`, whose value is the mean of
    the entropies. Differentiable in all three.

    Args:
        x, ddof, scale, offset, native: as for `batch_entropy`.

    Returns:
        `UnitStatistics(mean, variance, entropy)`, each of shape `x.shape[1:]`.

    Example:

    >>> x = tf.constant([[0.0, 1.0], [2.0, 1.0]])
    >>> lbe_ops.unit_statistics(x).variance.numpy()
    array([1., 0.], dtype=float32)
    """
    x, formula = _check(x, ddof, scale, offset)
    ops = native_library.select(native)
    if ops is None:
        return UnitStatistics(*reference.unit_statistics(x, **formula))
    outputs = _call(ops, x, formula, statistics_grad=True)
    return UnitStatistics(
        outputs.mean,
        outputs.variance,
        reference.unit_entropy(outputs.variance, scale, offset),
    )


class EpilogueOutputs(NamedTuple):
    """What `epilogue` returns.

    `y` has shape and dtype of z; `entropy` and `valid` are scalars as those of
    `batch_entropy_or_zero`.
    """

    y: tf.Tensor
    entropy: tf.Tensor
    valid: tf.Tensor


@tf.autograph.experimental.do_not_convert  # there is nothing to convert
def epilogue(
    z: Any,
    bias: Any = None,
    *,
    activation: str = "linear",
    alpha: float = 1.0,
    ddof: int = 0,
    scale: float = SCALE,
    offset: float = OFFSET,
    native: bool | None = None,
) -> EpilogueOutputs:
    """`y = activation(z + bias)` and the batch entropy of y, in one pass.

    The end of a dense layer or a convolution, with its LBE: the pass that adds the
    bias also makes the statistics, in the memory of z where TensorFlow allows it. The
    gradient is one pass, too, and adds LBE's share to what flows back through y. With
    neither activation nor bias y is z itself, without a copy.

    Determinism is that of `batch_entropy`, for the gradient of the bias as well.

    Args:
        z: products `[N, ..., C]`; float16, bfloat16, float32 or float64.
        bias: `[C]`, of the dtype of z, or None.
        activation: linear, relu, leaky_relu, elu, selu, tanh, sigmoid or softplus.
        alpha: slope of leaky_relu below 0, factor of elu, at least 0.
        ddof, scale, offset, native: as for `batch_entropy`.

    Returns:
        `EpilogueOutputs(y, entropy, valid)`; the entropy is 0, and `valid` too, where
        N < 2.

    Raises:
        TypeError, ValueError: an argument that is not served.
        lbe_ops.NativeUnavailableError: `native=True` and it cannot be used.

    Example:

    >>> z = tf.constant([[-1.0], [2.0]])
    >>> epilogue(z, tf.constant([0.5]), activation="relu").y.numpy().ravel()
    array([0. , 2.5], dtype=float32)
    """
    z, formula = _check(z, ddof, scale, offset)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(reference.ACTIVATIONS)}. "
            f"Received: {activation!r}"
        )
    if not (isinstance(alpha, numbers.Real) and 0 <= alpha < math.inf):
        raise ValueError(f"alpha must be a number >= 0. Received: {alpha!r}")
    if bias is not None:
        bias = tf.convert_to_tensor(bias, z.dtype)
        if not bias.shape.is_compatible_with(z.shape[-1:] if z.shape.rank else [None]):
            raise ValueError(
                "bias must have one entry for each channel, the last dimension of z. "
                f"Received: z of shape {z.shape}, bias of shape {bias.shape}"
            )
    ops = native_library.select(native)
    if ops is None:
        y = reference.activate(z, bias, activation, float(alpha))
        return EpilogueOutputs(y, *batch_entropy_or_zero(y, **formula, native=native))
    biases = [] if bias is None else [bias]
    attributes = {
        "activation": activation,
        "alpha": repr(float(alpha)),
        **_attributes(formula),
    }
    outputs = _recorded(
        lambda: ops.lbe_epilogue(
            z, biases, result_type=reference.result_dtype(z.dtype), **attributes
        ),
        [z, *biases],
        ("y", "entropy"),
        functools.partial(_epilogue_gradient, biases=len(biases), **attributes),
    )
    return EpilogueOutputs(outputs.y, outputs.entropy, outputs.valid)


def check_formula(ddof: int, scale: float, offset: float) -> dict[str, Any]:
    """The parameters of the entropy as plain numbers.

    Raises:
        ValueError: one of them is out of its range.
    """
    if ddof not in (0, 1):
        raise ValueError(
            f"ddof must be 0 (divide by N) or 1 (divide by N - 1). Received: {ddof!r}"
        )
    for name, value in (("scale", scale), ("offset", offset)):
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number. Received: {value!r}")
        if not (SMALLEST <= value <= LARGEST or (name == "offset" and value == 0)):
            zero = "0 or " if name == "offset" else ""
            raise ValueError(
                f"{name} must be {zero}from {SMALLEST:g} to {LARGEST:g}. "
                f"Received: {value!r}"
            )
    return {"ddof": int(ddof), "scale": float(scale), "offset": float(offset)}


def _check(
    x: Any, ddof: int, scale: float, offset: float
) -> tuple[tf.Tensor, dict[str, Any]]:
    x = tf.convert_to_tensor(x)
    if x.dtype not in DTYPES:
        raise TypeError(
            "batch_entropy takes float16, bfloat16, float32 or float64; cast first. "
            f"Received: x with dtype {x.dtype.name}"
        )
    if x.shape.rank == 0:
        raise ValueError(
            "batch_entropy takes activations of shape [batch, ...]. Received: a scalar"
        )
    return x, check_formula(ddof, scale, offset)


def _attributes(formula: dict[str, Any]) -> dict[str, Any]:
    # Float attributes of an op have 32 bits; their text carries all 64.
    return {
        "ddof": formula["ddof"],
        "scale": repr(formula["scale"]),
        "offset": repr(formula["offset"]),
    }


def _call(ops: Any, x: tf.Tensor, formula: dict[str, Any], **attributes: Any) -> Any:
    return ops.lbe_batch_entropy(
        x,
        result_type=reference.result_dtype(x.dtype),
        **_attributes(formula),
        **attributes,
    )


def _entropy(ops: Any, x: tf.Tensor, formula: dict[str, Any], **attributes: Any) -> Any:
    """The op, where nobody sees mean and variance."""

    def gradient(outputs: Any, entropy_grad: tf.Tensor) -> list[tf.Tensor]:
        return [
            _batch_entropy_gradient(
                x, outputs, entropy_grad, [], **_attributes(formula)
            )
        ]

    return _recorded(
        lambda: _call(ops, x, formula, **attributes), [x], ("entropy",), gradient
    )


def _recorded(
    call: Callable[[], Any],
    inputs: list[tf.Tensor],
    differentiable: tuple[str, ...],
    gradient: Callable[..., list[tf.Tensor]],
) -> Any:
    """The outputs of an op; gradient tapes know those that have a gradient only.

    For every other output of an op that they see themselves, TensorFlow makes a
    gradient of zeros in every step: for hundreds of layers, more operations than the
    rest of LBE. In functions that are differentiated as a whole, and in forward mode,
    TensorFlow takes the op and the registered gradients below.
    """
    if forwardprop_util.pack_tangents(inputs).tangents:
        return call()
    with record.stop_recording():
        outputs = call()
    record.record_operation(
        "LBE",
        [getattr(outputs, name) for name in differentiable],
        inputs,
        functools.partial(gradient, outputs),
    )
    return outputs


def _batch_entropy_gradient(
    x: tf.Tensor,
    outputs: Any,
    entropy_grad: tf.Tensor,
    statistics_grads: Sequence[tf.Tensor],
    **attributes: Any,
) -> tf.Tensor:
    _, mean, variance, _ = outputs
    return native_library.load().ops.lbe_batch_entropy_grad(
        x, mean, variance, entropy_grad, statistics_grads, **attributes
    )


def _epilogue_gradient(
    outputs: Any, dy: tf.Tensor, entropy_grad: tf.Tensor, **attributes: Any
) -> list[tf.Tensor]:
    y, _, mean, variance, _ = outputs
    dz, dbias = native_library.load().ops.lbe_epilogue_grad(
        dy, y, mean, variance, entropy_grad, **attributes
    )
    return [dz, *dbias]


@tf.RegisterGradient("LBE>BatchEntropy")
def _batch_entropy_grad(
    op: tf.Operation,
    entropy_grad: tf.Tensor,
    mean_grad: tf.Tensor,
    variance_grad: tf.Tensor,
    _: tf.Tensor,
) -> tf.Tensor:
    # Without statistics_grad mean and variance serve this gradient alone; nobody
    # else sees them.
    flows = op.get_attr("statistics_grad")
    return _batch_entropy_gradient(
        op.inputs[0],
        op.outputs,
        entropy_grad,
        [mean_grad, variance_grad] if flows else [],
        **{name: op.get_attr(name) for name in ("ddof", "scale", "offset")},
    )


@tf.RegisterGradient("LBE>BatchEntropyGrad")
def _batch_entropy_grad_grad(
    op: tf.Operation, dx_grad: tf.Tensor
) -> list[tf.Tensor | None]:
    """The gradient of the gradient: TensorFlow differentiates the reference's.

    dx depends on x alone: mean and variance are x's own, so that what flows back
    through them is part of the gradient with respect to x.
    """
    x, _, _, *grads = op.inputs
    formula = {
        "ddof": op.get_attr("ddof"),
        "scale": float(op.get_attr("scale")),
        "offset": float(op.get_attr("offset")),
    }
    with tf.GradientTape() as outer:
        outer.watch([x, *grads])
        with tf.GradientTape() as inner:
            inner.watch(x)
            entropy, _ = reference.batch_entropy_or_zero(x, **formula)
            targets = [entropy, *reference.moments(x, formula["ddof"])]
        dx = inner.gradient(targets[: len(grads)], x, output_gradients=grads)
    x_grad, *grads_grads = outer.gradient(dx, [x, *grads], output_gradients=dx_grad)
    return [x_grad, None, None, *grads_grads]


_EPILOGUE_ATTRIBUTES = ("activation", "alpha", "ddof", "scale", "offset", "biases")


@tf.RegisterGradient("LBE>Epilogue")
def _epilogue_grad(
    op: tf.Operation, dy: tf.Tensor, entropy_grad: tf.Tensor, *_: tf.Tensor
) -> list[tf.Tensor]:
    attributes = {name: op.get_attr(name) for name in _EPILOGUE_ATTRIBUTES}
    return _epilogue_gradient(op.outputs, dy, entropy_grad, **attributes)


@tf.RegisterGradient("LBE>EpilogueGrad")
def _epilogue_grad_grad(op: tf.Operation, *grads: tf.Tensor) -> list[tf.Tensor | None]:
    """The gradient of the gradient: TensorFlow differentiates the formula.

    mean and variance are those of y, so that what flows back through them is part of
    the gradient with respect to y.
    """
    dy, y, _, _, entropy_grad = op.inputs
    formula = {
        "ddof": op.get_attr("ddof"),
        "scale": float(op.get_attr("scale")),
        "offset": float(op.get_attr("offset")),
    }
    derivative = reference.DERIVATIVES[op.get_attr("activation").decode()]
    with tf.GradientTape() as outer:
        outer.watch([dy, y, entropy_grad])
        with tf.GradientTape() as inner:
            inner.watch(y)
            entropy, _ = reference.batch_entropy_or_zero(y, **formula)
        share = inner.gradient(entropy, y, output_gradients=entropy_grad)
        dz = derivative(y, float(op.get_attr("alpha"))) * (dy + share)
        outputs = [dz]
        if op.get_attr("biases"):
            channels = tf.reshape(dz, [-1, tf.shape(dz)[-1]])
            outputs.append(tf.reduce_sum(channels, axis=0))
    dy_grad, y_grad, g_grad = outer.gradient(
        outputs, [dy, y, entropy_grad], output_gradients=list(grads)
    )
    return [dy_grad, y_grad, None, None, g_grad]
