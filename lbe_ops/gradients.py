# SPDX-License-Identifier: Apache-2.0
"""The gradients of the native ops, and the gradients of these.

A first gradient is one native op. TensorFlow differentiates that one by the gradient of
the reference (`lbe_ops.reference`), and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from lbe_ops import reference
from lbe_ops.native import load


def batch_entropy(
    x: tf.Tensor,
    statistics: Sequence[tf.Tensor],
    entropy_grad: tf.Tensor,
    statistics_grads: Sequence[tf.Tensor] = (),
    **attributes: Any,
) -> tf.Tensor:
    """The gradient with respect to x, by the native op.

    Args:
        x: the op's input.
        statistics: mean and variance. Where x is a shard of a batch, those of the
            batch, and how many samples that has.
        entropy_grad: of the entropy.
        statistics_grads: of mean and variance; empty where nobody sees these.
        **attributes: those of the op: ddof, scale, offset.
    """
    mean, variance, *count = statistics
    return load().ops.lbe_batch_entropy_grad(
        x, mean, variance, entropy_grad, list(statistics_grads), count, **attributes
    )


def epilogue(
    y: tf.Tensor,
    statistics: Sequence[tf.Tensor],
    dy: tf.Tensor,
    entropy_grad: tf.Tensor,
    **attributes: Any,
) -> list[tf.Tensor]:
    """The gradients with respect to z and, if there is one, the bias.

    Args:
        y: what the op returned.
        statistics: of y, as above.
        dy, entropy_grad: of y and of the entropy.
        **attributes: those of the op: activation, slope, ddof, scale, offset, and
            the number of biases.
    """
    mean, variance, *count = statistics
    entropy_grads, index = _vector_of(entropy_grad)
    dz, dbias = load().ops.lbe_epilogue_grad(
        dy, y, mean, variance, entropy_grads, count, index=index, **attributes
    )
    return [dz, *dbias]


def _vector_of(scalar: tf.Tensor) -> tuple[tf.Tensor, int]:
    """The vector of which tf.unstack took a scalar, and its index; or itself and -1.

    The gradient of tf.stack, of the entropies of all layers, is tf.unstack. XLA would
    compile a kernel for each element, and no two are the same: of 200 layers, that took
    40 % of the time and 190 MB of memory. So the op takes the element where it is.
    """
    op = getattr(scalar, "op", None)  # what runs eagerly has none
    if op is None or op.type != "Unpack" or op.inputs[0].shape.rank != 1:
        return scalar, -1
    return op.inputs[0], scalar.value_index


def _register(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the gradient of an op, once: a notebook may import this anew."""

    def decorate(gradient: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return tf.RegisterGradient(op)(gradient)
        except KeyError:  # the same function, of the import before
            return gradient

    return decorate


def _refuse_synchronized(op: tf.Operation) -> None:
    if op.get_attr("synchronized"):
        raise NotImplementedError(reference.NO_SECOND_GRADIENT)


@_register("LBE>EpilogueMoments")
@_register("LBE>MergeMoments")
def _no_gradient(op: tf.Operation, *_: tf.Tensor) -> None:
    raise NotImplementedError(
        f"{op.type} has no gradient of its own, which takes the statistics of all "
        "replicas. Call lbe_ops.ops.epilogue_moments."
    )


@_register("LBE>BatchEntropy")
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
    return batch_entropy(
        op.inputs[0],
        op.outputs[1:3],
        entropy_grad,
        [mean_grad, variance_grad] if flows else [],
        **{name: op.get_attr(name) for name in ("ddof", "scale", "offset")},
    )


@_register("LBE>BatchEntropyGrad")
def _batch_entropy_grad_grad(
    op: tf.Operation, dx_grad: tf.Tensor
) -> list[tf.Tensor | None]:
    """The gradient of the gradient: TensorFlow differentiates the reference's.

    dx depends on x alone: mean and variance are x's own, so that what flows back
    through them is part of the gradient with respect to x.
    """
    _refuse_synchronized(op)
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


_EPILOGUE_ATTRIBUTES = ("activation", "slope", "ddof", "scale", "offset", "biases")


@_register("LBE>Epilogue")
def _epilogue_grad(
    op: tf.Operation, dy: tf.Tensor, entropy_grad: tf.Tensor, *_: tf.Tensor
) -> list[tf.Tensor]:
    attributes = {name: op.get_attr(name) for name in _EPILOGUE_ATTRIBUTES}
    return epilogue(op.outputs[0], op.outputs[2:4], dy, entropy_grad, **attributes)


@_register("LBE>EpilogueGrad")
def _epilogue_grad_grad(op: tf.Operation, *grads: tf.Tensor) -> list[tf.Tensor | None]:
    """The gradient of the gradient: TensorFlow differentiates the formula.

    mean and variance are those of y, so that what flows back through them is part of
    the gradient with respect to y.
    """
    _refuse_synchronized(op)
    dy, y, _, _, entropy_grads = op.inputs
    index = op.get_attr("index")
    formula = {
        "ddof": op.get_attr("ddof"),
        "scale": float(op.get_attr("scale")),
        "offset": float(op.get_attr("offset")),
    }
    derivative = reference.DERIVATIVES[op.get_attr("activation").decode()]
    with tf.GradientTape() as outer:
        outer.watch([dy, y, entropy_grads])
        entropy_grad = entropy_grads if index < 0 else entropy_grads[index]
        with tf.GradientTape() as inner:
            inner.watch(y)
            entropy, _ = reference.batch_entropy_or_zero(y, **formula)
        share = inner.gradient(entropy, y, output_gradients=entropy_grad)
        dz = derivative(y, float(op.get_attr("slope"))) * (dy + share)
        outputs = [dz]
        if op.get_attr("biases"):
            channels = tf.reshape(dz, [-1, tf.shape(dz)[-1]])
            outputs.append(tf.reduce_sum(channels, axis=0))
    dy_grad, y_grad, g_grad = outer.gradient(
        outputs, [dy, y, entropy_grads], output_gradients=list(grads)
    )
    return [dy_grad, y_grad, None, None, g_grad]
