# SPDX-License-Identifier: Apache-2.0
"""Batch entropy and unit statistics: the public ops.

One call is one native op where the compiled library can be used, and plain
TensorFlow (`lbe_ops.reference`) with the same results where it cannot.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from lbe_ops import gradients, reference
from lbe_ops.keras_internals import call_with_gradient
from lbe_ops.native import select

SCALE = math.pi * math.e
OFFSET = 1.0
# The range of scale and offset: float32 can hold their quotients.
SMALLEST, LARGEST = 1e-12, 1e12
# AutoGraph converts none of the functions below: there is no control flow of tensors.
DTYPES = (tf.float16, tf.bfloat16, tf.float32, tf.float64)


class UnitStatistics(NamedTuple):
    """Statistics over the batch, each of shape `x.shape[1:]`.

    float32, or float64 where x is float64.
    """

    mean: tf.Tensor
    variance: tf.Tensor
    entropy: tf.Tensor


@tf.autograph.experimental.do_not_convert
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

    finite everywhere for `offset > 0`. NaN and Inf in x come out as NaN; sums of
    squares that overflow the type of the result give infinity. With the native op the
    result has the same bits whatever the number of threads.

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
    ops = select(native)
    if ops is None:
        return reference.batch_entropy(x, **formula)
    return _entropy(ops, x, formula).entropy


@tf.autograph.experimental.do_not_convert
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
    ops = select(native)
    if ops is None:
        return reference.batch_entropy_or_zero(x, **formula)
    outputs = _entropy(ops, x, formula, small_batch="zero")
    return outputs.entropy, outputs.valid


@tf.autograph.experimental.do_not_convert
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
    ops = select(native)
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


@tf.autograph.experimental.do_not_convert
def epilogue(
    z: Any,
    bias: Any = None,
    *,
    activation: str = "linear",
    slope: float = 1.0,
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
        slope: of leaky_relu below 0; the factor of elu; at least 0.
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
    z, bias, slope, formula = _check_epilogue(
        z, bias, activation, slope, ddof, scale, offset
    )
    ops = select(native)
    if ops is None:
        y = reference.activate(z, bias, activation, slope)
        return EpilogueOutputs(y, *batch_entropy_or_zero(y, **formula, native=native))
    biases = [] if bias is None else [bias]
    attributes = {
        "activation": activation,
        "slope": repr(slope),
        **_attributes(formula),
    }

    def gradient(outputs: Any, *grads: tf.Tensor) -> list[tf.Tensor]:
        statistics = outputs.mean, outputs.variance
        return gradients.epilogue(
            outputs.y, statistics, *grads, biases=len(biases), **attributes
        )

    outputs = call_with_gradient(
        lambda: ops.lbe_epilogue(
            z, biases, result_type=reference.result_dtype(z.dtype), **attributes
        ),
        [z, *biases],
        ("y", "entropy"),
        gradient,
    )
    return EpilogueOutputs(outputs.y, outputs.entropy, outputs.valid)


class Moments:
    """Statistics of the samples of one replica, on their way to those of all.

    Attributes:
        count: the number of samples, a scalar. The gradient of the entropy of all
            replicas comes back through it.
        mean, m2: of every unit, the mean and the sum of squared deviations from it;
            of the shape of one sample.
    """

    def __init__(self, count: tf.Tensor, mean: tf.Tensor, m2: tf.Tensor) -> None:
        self.count, self.mean, self.m2 = count, mean, m2
        self._of_batch: tuple[tf.Tensor, ...] | None = None

    @property
    def of_batch(self) -> tuple[tf.Tensor, ...]:
        """Mean, variance and count of all replicas together, for the gradient.

        Who merges them sets it. Where nobody has, nobody takes an entropy: the count
        is 0, and so is the gradient.
        """
        if self._of_batch is None:
            return self.mean, self.m2, tf.zeros_like(self.count)
        return self._of_batch

    @of_batch.setter
    def of_batch(self, value: tuple[tf.Tensor, ...]) -> None:
        self._of_batch = value


@tf.autograph.experimental.do_not_convert
def epilogue_moments(
    z: Any,
    bias: Any = None,
    *,
    activation: str = "linear",
    slope: float = 1.0,
    ddof: int = 0,
    scale: float = SCALE,
    offset: float = OFFSET,
    native: bool | None = None,
) -> tuple[tf.Tensor, Moments]:
    """`epilogue` of the samples of one replica, whose entropy is that of all replicas.

    Args:
        z, bias, activation, slope, ddof, scale, offset, native: as for `epilogue`. Any
            number of samples, none included.

    Returns:
        `(y, moments)`. `lbe_ops.synchronized` makes the entropy of the moments.
    """
    z, bias, slope, formula = _check_epilogue(
        z, bias, activation, slope, ddof, scale, offset
    )
    ops = select(native, lowered=False)
    biases = [] if bias is None else [bias]
    epilogue: dict[str, Any] = {"activation": activation, "slope": slope}

    def gradient(outputs: Any, *grads: tf.Tensor) -> list[tf.Tensor]:
        of_batch, count = moments.of_batch, len(biases)
        if ops is None:
            dy, entropy_grad = grads
            return reference.epilogue_gradient(
                outputs.y,
                of_batch,
                dy,
                entropy_grad,
                biases=count,
                **epilogue,
                **formula,
            )
        attributes = {**epilogue, "slope": repr(slope), **_attributes(formula)}
        return gradients.epilogue(
            outputs.y, of_batch, *grads, biases=count, **attributes
        )

    outputs = call_with_gradient(
        lambda: _moments(ops, z, biases, **epilogue),
        [z, *biases],
        ("y", "count"),
        gradient,
        registered=False,
    )
    moments = Moments(outputs.count, outputs.mean, outputs.m2)
    return outputs.y, moments


@tf.autograph.experimental.do_not_convert
def batch_moments(
    x: Any,
    *,
    ddof: int = 0,
    scale: float = SCALE,
    offset: float = OFFSET,
    native: bool | None = None,
) -> Moments:
    """`batch_entropy_or_zero` of the samples of one replica, as `epilogue_moments`."""
    x, formula = _check(x, ddof, scale, offset)
    ops = select(native, lowered=False)

    def gradient(outputs: Any, entropy_grad: tf.Tensor) -> list[tf.Tensor]:
        if ops is None:
            return [
                reference.entropy_gradient(x, moments.of_batch, entropy_grad, **formula)
            ]
        return [
            gradients.batch_entropy(
                x, moments.of_batch, entropy_grad, **_attributes(formula)
            )
        ]

    outputs = call_with_gradient(
        lambda: _moments(ops, x, [], "linear", 0.0),
        [x],
        ("count",),
        gradient,
        registered=False,
    )
    moments = Moments(outputs.count, outputs.mean, outputs.m2)
    return moments


class MergedMoments(NamedTuple):
    """Statistics of all replicas: of every unit `[S]`, and of every layer `[L]`."""

    mean: tf.Tensor
    variance: tf.Tensor
    count: tf.Tensor
    entropy: tf.Tensor
    valid: tf.Tensor


def merge_moments(
    gathered: tf.Tensor,
    widths: Sequence[int],
    *,
    ddof: int = 0,
    scale: float = SCALE,
    offset: float = OFFSET,
    native: bool | None = None,
) -> MergedMoments:
    """Statistics and entropies of layers, out of the moments of all replicas.

    Moments merge by the tree of the kernels, over the replicas in order; one without a
    sample changes no bit. It is not differentiable.

    Args:
        gathered: `[R, L + 2 S]`, float32 or float64: for each of R replicas the number
            of samples of each of L layers, then the means of the S units of all layers,
            then their M2. Numbers of samples above 2^24 are rounded in float32.
        widths: how many units each layer has; their sum is S.
        ddof, scale, offset, native: as for `batch_entropy`.

    Returns:
        `MergedMoments`; `entropy` and `valid` are 0 where a layer has fewer than two
        samples in all.
    """
    formula = check_formula(ddof, scale, offset)
    ops = select(native, lowered=False)
    if ops is None:
        return MergedMoments(
            *reference.merge_moments(gathered, list(widths), **formula)
        )
    ends = tf.constant(np.cumsum(widths), tf.int64)
    return MergedMoments(*ops.lbe_merge_moments(gathered, ends, **_attributes(formula)))


def _check_epilogue(
    z: Any,
    bias: Any,
    activation: str,
    slope: float,
    ddof: int,
    scale: float,
    offset: float,
) -> tuple[tf.Tensor, tf.Tensor | None, float, dict[str, Any]]:
    """`(z, bias, slope, formula)`."""
    z, formula = _check(z, ddof, scale, offset)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(reference.ACTIVATIONS)}. "
            f"Received: {activation!r}"
        )
    if not (isinstance(slope, numbers.Real) and 0 <= slope < math.inf):
        raise ValueError(f"slope must be a number >= 0. Received: {slope!r}")
    if bias is not None:
        if z.shape.rank == 1:
            raise ValueError(
                "What has a bias must have shape [batch, ..., channels]. "
                f"Received: z of shape {z.shape}"
            )
        bias = tf.convert_to_tensor(bias, z.dtype)
        if not bias.shape.is_compatible_with(z.shape[-1:] if z.shape.rank else [None]):
            raise ValueError(
                "bias must have one entry for each channel, the last dimension of z. "
                f"Received: z of shape {z.shape}, bias of shape {bias.shape}"
            )
    return z, bias, float(slope), formula


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
    return check_activations(x), check_formula(ddof, scale, offset)


def check_activations(x: Any, function: str = "batch_entropy") -> tf.Tensor:
    """x as a tensor.

    Raises:
        TypeError, ValueError: its dtype is not served, or it is a scalar.
    """
    x = tf.convert_to_tensor(x)
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{function} takes float16, bfloat16, float32 or float64; cast first. "
            f"Received: x with dtype {x.dtype.name}"
        )
    if x.shape.rank == 0:
        raise ValueError(
            f"{function} takes activations of shape [batch, ...]. Received: a scalar"
        )
    return x


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
    """Calls the op; only `entropy` is differentiable."""

    def gradient(outputs: Any, entropy_grad: tf.Tensor) -> list[tf.Tensor]:
        statistics = outputs.mean, outputs.variance
        return [
            gradients.batch_entropy(x, statistics, entropy_grad, **_attributes(formula))
        ]

    return call_with_gradient(
        lambda: _call(ops, x, formula, **attributes), [x], ("entropy",), gradient
    )


class _ShardOutputs(NamedTuple):
    y: tf.Tensor
    count: tf.Tensor
    mean: tf.Tensor
    m2: tf.Tensor


def _moments(
    ops: Any, z: tf.Tensor, biases: list[tf.Tensor], activation: str, slope: float
) -> Any:
    if ops is None:
        y = reference.activate(z, biases[0] if biases else None, activation, slope)
        if y is z:
            y = tf.identity(z)  # a tape takes it for another tensor
        return _ShardOutputs(y, *reference.moments_of_shard(y))
    return ops.lbe_epilogue_moments(
        z,
        biases,
        result_type=reference.result_dtype(z.dtype),
        activation=activation,
        slope=repr(slope),
    )
