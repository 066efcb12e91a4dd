# SPDX-License-Identifier: Apache-2.0
"""What a batch looks like in a layer: its rank, its cosine; and `Probe`, which looks.

A batch can lose its scale on its way through a deep net (all samples become the same),
or its rank (they become multiples of one direction), or its gradient can explode. Batch
entropy sees the first only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lbe_ops import ops, reference
from lbe_ops.keras_internals import flatten_layers
from lbe_ops.layers import Selection, select_layers, with_attributes
from lbe_ops.loss import find_regularizers


@tf.autograph.experimental.do_not_convert
def effective_rank(x: Any) -> tf.Tensor:
    """In how many directions a batch of activations varies: the participation ratio.

    With C the covariance of the units over the batch and l its eigenvalues,

        rank = (tr C)^2 / tr(C^2) = (sum_i l_i)^2 / sum_i l_i^2,

    from 1 (all samples on a line) to min(N - 1, U) (no direction is preferred). It does
    not depend on the scale of x, from 1e-36 to 3e38 in float32. 0 where nothing varies;
    NaN where x is not finite. No eigenvalues are computed: `C^2` has the trace of the
    squared Gram matrix, of which the smaller is taken, N x N or U x U. Differentiable,
    with a gradient of 0 where nothing varies.

    Args:
        x: activations `[N, ...]`, N >= 2 samples first; every later position is a
            unit. float16, bfloat16, float32 or float64, known or unknown shape.

    Returns:
        A scalar, float32 (float64 for float64). On a GPU with TensorFloat-32 the
        products have 10 bits.

    Raises:
        tf.errors.InvalidArgumentError: fewer than two samples, or no unit.
        TypeError, ValueError: a dtype or rank that is not served.

    Example:

    >>> x = tf.constant([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    >>> float(lbe_ops.effective_rank(x))
    2.0

    Source: Gao et al. 2017 (bioRxiv 214262), the participation ratio; its logarithm is
    the Renyi-2 entropy of the spectrum. The name is that of Roy & Vetterli (EUSIPCO
    2007), who take the Shannon entropy, which is never smaller.
    """
    centred, _ = _centred(_samples(x, "effective_rank"))
    n, units = centred.shape
    if n is None or units is None:
        size = tf.shape(centred)
        smaller_first = tf.cond(
            size[0] <= size[1], lambda: centred, lambda: tf.transpose(centred)
        )
    else:
        smaller_first = centred if n <= units else tf.transpose(centred)
    gram = tf.matmul(smaller_first, smaller_first, transpose_b=True)
    return tf.math.divide_no_nan(
        tf.square(tf.linalg.trace(gram)), tf.reduce_sum(tf.square(gram))
    )


@tf.autograph.experimental.do_not_convert
def mean_cosine(x: Any) -> tf.Tensor:
    """How much the samples of a batch point the same way: their mean cosine.

        cosine = mean over pairs i != j of <x_i, x_j> / (|x_i| |x_j|),

    from -1 / (N - 1) to 1 (all samples are positive multiples of one vector). A sample
    that is zero has a cosine of 0 with every other. It does not depend on the scale of
    any sample. The pairs are not formed: with `r_i = x_i / |x_i|` their sum is
    `|sum_i r_i|^2 - sum_i |r_i|^2`. NaN where x is not finite. Differentiable, with a
    gradient of 0 for samples that are zero.

    Args:
        x: activations `[N, ...]`, as for `effective_rank`.

    Returns:
        A scalar, float32 (float64 for float64).

    Raises:
        tf.errors.InvalidArgumentError: fewer than two samples, or no unit.
        TypeError, ValueError: a dtype or rank that is not served.

    Example:

    >>> x = tf.constant([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])  # cosines 1, 0 and 0
    >>> float(lbe_ops.mean_cosine(x))
    0.333333...
    """
    x = _samples(x, "mean_cosine")
    x, _ = _scaled(x, axis=1)
    squares = tf.reduce_sum(tf.square(x), axis=1, keepdims=True)
    nonzero = tf.cast(squares != 0, x.dtype)
    x /= tf.sqrt(squares + (1 - nonzero))  # a square root has no gradient at 0
    n = tf.cast(tf.shape(x)[0], x.dtype)
    total = tf.reduce_sum(tf.square(tf.reduce_sum(x, axis=0)))
    return (total - tf.reduce_sum(nonzero)) / (n * (n - 1))


def rms(x: Any) -> tf.Tensor:
    """Root mean square of all activations `[N, ...]`, a scalar."""
    return _rms(*_scaled(_samples(x, "rms")))


def deviation(x: Any) -> tf.Tensor:
    """Root mean square of the differences from the mean over the batch, a scalar.

    That is the square root of the mean over units of their variance.
    """
    return _rms(*_centred(_samples(x, "deviation")))


def dead_share(x: Any) -> tf.Tensor:
    """Share of the units that have one and the same value for all samples, a scalar."""
    x = _samples(x, "dead_share")
    return tf.reduce_mean(tf.cast(tf.reduce_all(x == x[:1], axis=0), x.dtype))


# What a `Probe` measures, each of the output of a layer; float64 comes out as float64.
MEASURES: dict[str, Callable[..., tf.Tensor]] = {
    "batch_entropy": ops.batch_entropy,
    "effective_rank": effective_rank,
    "mean_cosine": mean_cosine,
    "rms": rms,
    "deviation": deviation,
    "dead_share": dead_share,
}
GRADIENT = "gradient_norm"


class Probe:
    """Measures layers of a Keras model on one batch; compiled once.

    It changes neither weights nor statistics nor random state, as far as these are
    variables of Keras (and no `tf.Variable` that a layer assigns by itself).

    Args:
        model: any Keras model. One that is not built is built by a call.
        data: the batch: inputs of the model for at least two samples, as an array (or
            the structure of arrays that the model takes).
        layers: which layers, as for `add_lbe`, or a list of them. None takes
            `default_layers(model)`.
        measures: which of `MEASURES`: batch_entropy (nats), effective_rank,
            mean_cosine, rms, deviation (root mean square of the difference from the
            mean over the batch), dead_share (of the units, those that have the same
            value for all samples).
        targets: of the batch; adds gradient_norm, which needs a compiled model: the
            global norm of the gradient of the compiled loss (without LBE, and without
            other losses that layers add) with respect to the trainable weights of the
            layer. NaN for a layer without weights that the loss depends on.
        training: the mode of the forward pass. In training BatchNormalization takes the
            statistics of this batch, and Dropout drops.
        compiled: False runs eagerly, which is faster for a single time. So does a model
            with `run_eagerly`.
        ddof, scale, offset: as for `lbe_ops.batch_entropy`.

    Attributes:
        names: path of each layer measured, in the order of the forward pass. A layer
            with several outputs or calls appears once for each: "dense", "dense (2)".
        has_gradient: of each, whether it has weights that the loss depends on.

    Raises:
        ValueError: no layer matches, or none is called by the model, or one is called
            where it cannot be measured; targets without a compiled loss or of another
            number of samples; an unknown measure.

    Example:

    >>> probe = Probe(model, x[:512], targets=y[:512])
    >>> probe()["gradient_norm"]  # [layers], in the order of probe.names
    """

    def __init__(
        self,
        model: keras.Model,
        data: Any,
        layers: Selection | list[keras.layers.Layer] | None = None,
        *,
        measures: Iterable[str] = tuple(MEASURES),
        targets: Any = None,
        training: bool = False,
        compiled: bool = True,
        ddof: int = 0,
        scale: float = ops.SCALE,
        offset: float = ops.OFFSET,
    ) -> None:
        self.model = model
        self.names: list[str] = []
        self.measures = check_measures(measures)
        self._data = as_tensors(data)
        self._targets = None if targets is None else as_tensors(targets)
        self._layers = layers
        self._training = training
        self._compiled = compiled
        self._formula = ops.check_formula(ddof, scale, offset)
        self._key: tuple[Any, ...] | None = None
        self._run: Callable[..., Any] | None = None
        self._functions: dict[Any, Callable[[tf.Tensor], tf.Tensor]] = {}
        self.has_gradient: list[bool] = []
        if self._targets is not None:
            _check_samples(self._data, self._targets)

    def __call__(self) -> dict[str, np.ndarray]:
        """The measures now: of each name an array `[layers]`, float32 or float64."""
        model = self.model
        if not model.built:
            model(self._data)
        eagerly = model.run_eagerly or not self._compiled
        key: tuple[Any, ...] = (eagerly,)
        scale = 1.0
        if self._targets is not None:
            if getattr(model, "loss", None) is None:
                raise ValueError(
                    "Gradients are those of the compiled loss, and there is none. "
                    "Provide a `loss` argument in `compile()`. "
                    f"Received: model={model.name!r}"
                )
            key += (model.loss, model.optimizer)  # another `compile`, another graph
            if model.optimizer is not None:
                # Gradients in float16 are zero without the scale of the optimizer.
                scale = float(model.optimizer.scale_loss(tf.ones(())))
        if self._run is None or key != self._key:
            function = self._measure
            self._run = function if eagerly else tf.function(function, autograph=False)
            self._key = key
        while True:
            values = self._run(self._data, self._targets, tf.constant(scale))
            result = {name: value.numpy() for name, value in values.items()}
            if scale <= 1 or np.isfinite(result[GRADIENT][self.has_gradient]).all():
                return result
            scale = max(scale / 32, 1.0)  # too large, as the optimizer would find out

    def _measure(
        self, data: Any, targets: Any, loss_scale: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        model = self.model
        rows: list[tuple[keras.layers.Layer, tf.Tensor]] = []
        tape = None if targets is None else tf.GradientTape()
        with _unchanged(model), tape or contextlib.nullcontext():
            with _observed(self._selected(), self._observer(rows, tape)):
                outputs = model(data, training=self._training)
            if tape is not None:
                # Losses of Keras have states of their own, for the logs of `fit`.
                with keras.StatelessScope():
                    loss = keras.Model.compute_loss(
                        _WithoutLosses(model), data, targets, outputs
                    )
                loss *= tf.cast(loss_scale, loss.dtype)
        if not rows:
            raise ValueError(
                "The model calls none of the layers to observe. Received: layers="
                f"{[layer.name for layer in self._selected()]}"
            )
        layers = [layer for layer, _ in rows]
        self.names = _numbered([layer.path or layer.name for layer in layers])
        columns = tf.unstack(_stack(values for _, values in rows), axis=1)
        result = dict(zip(self.measures, columns, strict=True))
        if tape is not None:
            norms = _gradient_norms(tape, loss, layers)
            self.has_gradient = [norm is not None for norm in norms]
            norms = _stack(tf.constant(np.nan) if x is None else x for x in norms)
            result[GRADIENT] = norms / tf.cast(loss_scale, norms.dtype)
        return result

    def _of_output(self, x: tf.Tensor) -> tf.Tensor:
        """All measures of the output of a layer, a vector."""

        def values(x: tf.Tensor) -> tf.Tensor:
            return _stack(
                MEASURES[name](x, **(self._formula if name == "batch_entropy" else {}))
                for name in self.measures
            )

        if not self.measures:
            return tf.zeros(0)
        # Traced once for all outputs of one shape, and a function in the graph too: a
        # graph with all of these operations for every layer takes minutes to optimize.
        key = str(x.shape), x.dtype
        if key not in self._functions:
            function = tf.function(
                values, autograph=False, experimental_attributes={"_noinline": True}
            )
            self._functions[key] = function.get_concrete_function(
                tf.TensorSpec(x.shape, x.dtype)
            )
        return self._functions[key](x)

    def _selected(self) -> list[keras.layers.Layer]:
        if self._layers is None:
            return default_layers(self.model)
        if isinstance(self._layers, list) and all(
            isinstance(layer, keras.layers.Layer) for layer in self._layers
        ):
            return self._layers
        return select_layers(self.model, self._layers)

    def _observer(
        self, rows: list[Any], tape: tf.GradientTape | None
    ) -> Callable[[keras.layers.Layer], Callable[[tf.Tensor], tf.Tensor]]:
        """Makes for a layer the function that measures its output into `rows`."""

        def graph() -> tuple[bool, tf.Graph]:
            return tf.executing_eagerly(), tf.compat.v1.get_default_graph()

        outside = graph()

        def observer(layer: keras.layers.Layer) -> Callable[[tf.Tensor], tf.Tensor]:
            def observe(x: tf.Tensor) -> tf.Tensor:
                if graph() != outside:
                    raise ValueError(
                        f"The layer '{layer.path or layer.name}' is called inside a "
                        "function of its own (tf.function, tf.while_loop, tf.map_fn), "
                        "where it cannot be measured. Take the layer around it: "
                        f"layers=[...]. Received: layers={self._layers}"
                    )
                with tape.stop_recording() if tape else contextlib.nullcontext():
                    rows.append((layer, self._of_output(x)))
                return tf.zeros(())

            return observe

        return observer


def default_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers with LBE; in a model that has none, `weighted_layers(model)`."""
    lbe = find_regularizers(model)
    with_lbe = [layer for layers in lbe.values() for layer in layers]
    return with_lbe or weighted_layers(model)


def weighted_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Every layer with a kernel, nested ones included, in the order of the model.

    Recurrent layers take the place of the cells in them, which run in a loop.

    Raises:
        ValueError: there is none.
    """
    recurrent = [
        each for each in flatten_layers(model) if isinstance(each, keras.layers.RNN)
    ]
    inside = {id(each) for layer in recurrent for each in flatten_layers(layer)}

    def has_kernel(layer: keras.layers.Layer) -> bool:
        kernel = getattr(layer, "kernel", None) is not None
        return id(layer) not in inside and (
            kernel or isinstance(layer, keras.layers.RNN)
        )

    return select_layers(model, has_kernel)


def as_tensors(data: Any) -> Any:
    """A structure of arrays as one of tensors."""
    return keras.tree.map_structure(tf.convert_to_tensor, data)


def check_measures(measures: Iterable[str]) -> tuple[str, ...]:
    """The names, each once, in the order of `MEASURES`.

    Raises:
        ValueError: one of them is not known.
    """
    given = {measures} if isinstance(measures, str) else set(measures)
    unknown = given - set(MEASURES)
    if unknown:
        raise ValueError(
            f"Unknown measures. Choose of {', '.join(MEASURES)}. (For {GRADIENT}, give "
            f"targets.) Received: {sorted(unknown)}"
        )
    return tuple(name for name in MEASURES if name in given)


class _WithoutLosses:
    """A model for `keras.Model.compute_loss`, which is to leave out added losses.

    These are LBE, weight decay by regularizers, and what `add_loss` has added.
    """

    losses = ()

    def __init__(self, model: keras.Model) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@contextlib.contextmanager
def _observed(
    layers: list[keras.layers.Layer],
    observer: Callable[[keras.layers.Layer], Callable[[tf.Tensor], tf.Tensor]],
) -> Iterator[None]:
    """Lets Keras call an observer with every output of these layers.

    It takes the place of the activity regularizer; the layers' own stay tracked.
    """
    with contextlib.ExitStack() as stack:
        for layer in layers:
            plain = "activity_regularizer" in vars(layer)
            place = "activity_regularizer" if plain else "lbe_regularizer"  # layers.py
            stack.enter_context(with_attributes(layer, {place: observer(layer)}))
        yield


@contextlib.contextmanager
def _unchanged(model: keras.Model) -> Iterator[None]:
    """Gives states (of normalization, recurrent layers, seeds) back their values."""
    # Reading a variable and assigning what was read copies nothing.
    states = [
        (variable, tf.convert_to_tensor(variable.value))
        for variable in model.non_trainable_variables
    ]
    try:
        yield
    finally:
        for variable, value in states:
            variable.assign(value)


def _gradient_norms(
    tape: tf.GradientTape, loss: tf.Tensor, layers: list[keras.layers.Layer]
) -> list[tf.Tensor | None]:
    """The global norm of the gradient of each layer's weights; None without one."""
    weights = {id(v): v.value for layer in layers for v in layer.trainable_variables}
    gradients = dict(
        zip(weights, tape.gradient(loss, list(weights.values())), strict=True)
    )
    norms = []
    for layer in layers:
        found = [gradients[id(v)] for v in layer.trainable_variables]
        found = [_norm(tf.convert_to_tensor(g)) for g in found if g is not None]
        norms.append(_norm(_stack(found)) if found else None)
    return norms


def _norm(x: tf.Tensor) -> tf.Tensor:
    """Euclidean norm, with neither overflow nor underflow of its squares."""
    x, scale = _scaled(tf.cast(x, reference.result_dtype(x.dtype)))
    return scale * tf.sqrt(tf.reduce_sum(tf.square(x)))


def _stack(tensors: Iterable[tf.Tensor]) -> tf.Tensor:
    """The tensors as one, float64 if one of them is, else float32."""
    tensors = list(tensors)
    wide = any(each.dtype == tf.float64 for each in tensors)
    return tf.stack([tf.cast(x, tf.float64 if wide else tf.float32) for x in tensors])


def _numbered(names: list[str]) -> list[str]:
    """The names, each with its number from the second time on."""
    return [
        name if (number := names[: i + 1].count(name)) == 1 else f"{name} ({number})"
        for i, name in enumerate(names)
    ]


def _check_samples(data: Any, targets: Any) -> None:
    counts = [x.shape[0] for x in keras.tree.flatten((data, targets)) if x.shape.rank]
    if len(set(counts)) > 1:
        raise ValueError(
            "The inputs and the targets of the probe must be of the same samples. "
            f"Received: {counts} samples"
        )


def _samples(x: Any, function: str) -> tf.Tensor:
    """x as `[N, U]`, float32 or float64."""
    x = ops.check_activations(x, function)
    x = reference.check_sizes(x, function)
    x = tf.cast(x, reference.result_dtype(x.dtype))
    if x.shape.rank == 2:
        return x
    units = None if x.shape.rank is None else x.shape[1:].num_elements()
    flat = tf.reshape(x, [tf.shape(x)[0], -1])
    return tf.ensure_shape(flat, [None if units is None else x.shape[0], units])


def _scaled(x: tf.Tensor, axis: int | None = None) -> tuple[tf.Tensor, tf.Tensor]:
    """`(x / s, s)` with s the largest absolute value, or 1 where that is 0."""
    # It makes no difference to what is computed of x / s, and has no gradient. XLA
    # divides by multiplying, and the reciprocal of the largest numbers would be 0.
    x = x / 16
    largest = tf.stop_gradient(
        tf.reduce_max(tf.abs(x), axis=axis, keepdims=axis is not None)
    )
    scale = tf.where(largest > 0, largest, tf.ones_like(largest) / 16)
    return x / scale, 16 * scale


def _centred(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """`(d, s)`: the deviations from the mean over the batch are `s * d`, |d| <= 2.

    First relative to the first sample, so that a unit that does not vary has none; and
    halved, so that the difference of two large numbers is one.
    """
    x, scale = _scaled(x / 2 - tf.stop_gradient(x[:1]) / 2)
    return 2 * (x - tf.reduce_mean(x, axis=0)), scale


def _rms(x: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """Root mean square of `scale * x`."""
    return scale * tf.sqrt(tf.reduce_mean(tf.square(x)))
