# SPDX-License-Identifier: Apache-2.0
"""`LBERegularizer`: layerwise batch entropy as the activity regularizer of a layer.

Keras calls it with the output of its layer. In a step of an `LBEModel` it reports the
entropy (see `lbe_ops.recorder`), and the model makes the loss; anywhere else it returns
its own loss.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lbe_ops import keras_internals, ops, recorder, reference, targets
from lbe_ops.native import compiles, requested_mode

ALPHA_NAME = "lbe_alpha"

# From 3.14 on (and in Keras 2) a layer divides the value of its activity regularizer
# by the batch size. LBE is a mean over the batch already.
_KERAS_DIVIDES = tuple(int(n) for n in keras.__version__.split(".")[:2]) >= (3, 14)


# Variants of LBE that are made of the variance of every unit, and not of H.
ON_UNITS = {"units": reference.units_to_target, "std_hinge": reference.std_hinge}
VARIANTS = ("entropy", "one_sided", *ON_UNITS)


def entropy_to_reach(alpha: tf.Tensor, alpha_min: Any) -> tf.Tensor:
    """`max(|alpha|, alpha_min)`.

    `tf.maximum` gives the gradient of a tie to its first argument: alpha can leave
    alpha_min.
    """
    return tf.maximum(tf.abs(alpha), tf.constant(alpha_min, alpha.dtype))


def lbe_losses(
    entropy: tf.Tensor, alpha: tf.Tensor, alpha_min: Any, beta: Any, one_sided: Any
) -> tf.Tensor:
    """`LBE = beta * (H - max(|alpha|, alpha_min))^2`, element by element.

    Where it is one-sided, 0 for an H above that.
    """
    difference = entropy - entropy_to_reach(alpha, alpha_min)
    if np.any(one_sided):
        below = tf.minimum(difference, 0)
        difference = (
            below if np.all(one_sided) else tf.where(one_sided, below, difference)
        )
    return beta * tf.square(difference)


class Alpha:
    """The `lbe_alpha` of one regularizer: reads and writes it wherever it is kept.

    That is a scalar weight of the regularizer, or an element of the weight of an
    `LBEModel`. Nothing is copied, so that what it shows is never stale.

    Args:
        variable: the weight.
        initial: what the weight is initialized with.
    """

    def __init__(self, variable: keras.Variable, initial: float) -> None:
        self.variable = variable
        self.index: int | None = None  # None for a scalar
        self.in_a_graph = False  # which would not learn of a move
        self.initial = initial

    def move(self, vector: keras.Variable, index: int) -> None:
        """Lets an element of a vector, which has its value, take the scalar's place."""
        self.variable, self.index = vector, index

    def value_of_scalar(self) -> Callable[[], tf.Tensor]:
        """Reads the scalar, even after the move; for the initializer of the vector.

        A variable that a step has made in its graph has no value before its end.
        """
        scalar = self.variable

        def read() -> tf.Tensor:
            if not scalar.value.is_initialized():
                return tf.constant(self.initial, self.dtype)
            return tf.convert_to_tensor(scalar.value)

        return read

    @property
    def value(self) -> tf.Tensor | tf.Variable:
        """The scalar as TensorFlow's variable, or an element as a tensor."""
        value = self.variable.value
        if not (tf.executing_eagerly() or keras_internals.in_scratch_graph()):
            self.in_a_graph = True
        return value if self.index is None else value[self.index]

    @property
    def shape(self) -> tuple[int, ...]:
        """Always `()`."""
        return ()

    @property
    def dtype(self) -> str:
        """That of the weight: `"float32"`, or `"float64"` in a model of float64."""
        return self.variable.dtype

    def assign(self, value: Any) -> None:
        """Sets it, in a `tf.function` too. Only this element changes."""
        if self.index is None:
            self.variable.assign(value)
            return
        value = tf.reshape(tf.cast(value, self.dtype), [1])
        vector = tf.convert_to_tensor(self.variable.value)
        self.variable.assign(tf.tensor_scatter_nd_update(vector, [[self.index]], value))

    def numpy(self) -> np.ndarray:
        """The present value, a float32 scalar."""
        return tf.convert_to_tensor(self.value).numpy()

    def __float__(self) -> float:
        return float(self.numpy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.numpy(), dtype)

    def __tf_tensor__(
        self, dtype: tf.DType | None = None, name: str | None = None
    ) -> tf.Tensor:
        return tf.convert_to_tensor(self.value, dtype, name)

    def __repr__(self) -> str:
        place = "" if self.index is None else f"[{self.index}]"
        with tf.init_scope():  # a function that is traced may print it
            return f"<Alpha {self.variable.path}{place}={float(self)}>"


@keras.saving.register_keras_serializable(package="lbe_ops")
class LBERegularizer(keras.layers.Layer):
    """Activity regularizer that pulls a layer's batch entropy towards alpha.

    For the batch entropy `H` of the layer's output (nats; see
    `lbe_ops.batch_entropy`),

        LBE = lbe_beta * (H - max(lbe_alpha_min, |lbe_alpha|))^2,

    where `lbe_alpha` is trained. Under an `LBEModel` the model combines the LBE of all
    layers, and owns their alphas; in any other model LBE is added to the loss, whatever
    the batch size and the version of Keras, and alpha is a weight of the layer. A plain
    model that shares layers with an `LBEModel` takes their alphas as they are: it is
    the `LBEModel` that trains them.

    Under a `tf.distribute` strategy a plain model has the entropies of each replica's
    own samples; an `LBEModel` has those of the whole batch.

    A batch of fewer than two samples adds neither loss nor gradient. The result is
    float32 (float64 for float64) under every dtype policy. In a plain Keras model
    whose graph is not made for training (`training=True`), only plain TensorFlow ops
    are used (unless `native=True`), so that an exported model does not need this
    package.

    Weight decay pulls alpha towards zero. `LBEModel` excludes it; in any other model
    call `optimizer.exclude_from_weight_decay(var_names=["lbe_alpha"])` yourself.

    Keras leaves activity regularizers out of `.weights.h5` files. In a plain Keras
    model, the alpha of `keras.layers.Dense(activity_regularizer=LBERegularizer())` is
    in `.keras` files of Functional and Sequential models and in checkpoints of
    TensorFlow only; that of `Dense_LBE`,
    `Conv2D_LBE` and `LBE`, and of every `LBEModel`, is in all of them.

    Args:
        lbe_alpha: initial value of the entropy to reach, in nats; trainable.
        lbe_alpha_min: what that entropy cannot fall below, >= 0.
        lbe_beta: weight of the layer's LBE, >= 0.
        other_activity_regularizer: one more activity regularizer of the same layer
            (anything that Keras takes for one). Its value is added unscaled by LBE.
        ddof: 0 divides the sum of squares by N, 1 by N - 1.
        scale: positive factor of the variance.
        offset: what is added to it, >= 0.
        native: None uses the native op where possible, True requires it, False
            forbids it.
        variant: what LBE is. With t for `max(lbe_alpha_min, |lbe_alpha|)`,

            - "entropy": `lbe_beta * (H - t)^2`, that of the paper;
            - "one_sided": the same while H < t, else 0;
            - "units": `lbe_beta * mean_u (H_u - t)^2`, with the entropy of each unit;
            - "std_hinge": `lbe_beta * mean_u max(0, s - std_u)`, with s the standard
              deviation of a unit whose entropy is t. Its gradient does not vanish with
              the variance, as that of the others does.

            The last three are what was tried beside the paper's; none of them was
            reliably better in the trainability map (docs/map.md). Alpha can only fall
            with "one_sided" and "std_hinge", down to `lbe_alpha_min`:
            `trainable=False` keeps it. "units" and "std_hinge" are plain TensorFlow
            operations on the layer's output, without the fused epilogue, and an
            `LBEModel` on replicas needs `synchronized=False`.
        name: name of the regularizer.
        trainable: False keeps alpha as it is.

    Attributes:
        lbe_alpha: an `Alpha`: `.numpy()`, `.assign(value)`, `.value`, `float()`.

    Raises:
        ValueError: an argument is out of its range or not a number, or there is no such
            variant, or none for `native=True`.
        TypeError: native is neither None nor a bool.

    Example:

    >>> layer = keras.layers.Dense(
    ...     32, activation="relu", activity_regularizer=LBERegularizer(lbe_alpha=1.0)
    ... )

    Source: Peer et al., TMLR 2022 (arXiv 2208.01134); "std_hinge" is the variance term
    of VICReg (arXiv 2105.04906) and VCReg (arXiv 2306.13292).
    """

    def __init__(
        self,
        lbe_alpha: float = 0.5,
        lbe_alpha_min: float = 0.3,
        lbe_beta: float = 0.2,
        other_activity_regularizer: Any = None,
        *,
        ddof: int = 0,
        scale: float = ops.SCALE,
        offset: float = ops.OFFSET,
        native: bool | None = None,
        variant: str = "entropy",
        name: str | None = None,
        trainable: bool = True,
    ) -> None:
        # Without autocast, Keras would not see float16 and float64 outputs as they are.
        super().__init__(
            name=name, trainable=trainable, dtype="float32", autocast=False
        )
        check_finite("lbe_alpha", lbe_alpha)
        check_finite("lbe_alpha_min", lbe_alpha_min, at_least=0)
        check_finite("lbe_beta", lbe_beta, at_least=0)
        check_finite("scale", scale)
        check_finite("offset", offset)
        requested_mode(native)
        if variant not in VARIANTS:
            raise ValueError(
                f"variant must be one of {', '.join(VARIANTS)}. Received: {variant!r}"
            )
        if variant in ON_UNITS and native:
            raise ValueError(
                f"There is no native op for the variant {variant!r}, which is plain "
                "TensorFlow: leave native out. Received: native=True"
            )
        other = keras.regularizers.get(other_activity_regularizer)
        if isinstance(other, LBERegularizer):
            raise ValueError(
                "other_activity_regularizer must not be an LBERegularizer itself. "
                f"Received: other_activity_regularizer={other}"
            )
        self.lbe_alpha_min = float(lbe_alpha_min)
        self.lbe_beta = float(lbe_beta)
        self.other_activity_regularizer = other
        self.formula = ops.check_formula(ddof, scale, offset)
        self.variant = variant
        self.native = False if variant in ON_UNITS else native
        self.supports_masking = True
        # Whether the layer was built before, so that Keras does not track its alpha.
        self.on_built_layer = False
        # What the activation of its layer can reach, where that is known.
        self.reach: targets.Reach | None = None
        # Made here and not in build(): a Functional model lists its variables before
        # its first call. Keras tracks what is in the list, and no longer what was taken
        # out; checkpoints of TensorFlow have what is in the module.
        with keras.name_scope(self.name):
            variable = keras.Variable(
                lambda shape, dtype: tf.constant(float(lbe_alpha), dtype, shape),
                shape=(),
                dtype="float32",
                autocast=False,
                name=ALPHA_NAME,
            )
        variable.trainable = trainable
        self.scalars = [variable]
        self.checkpointed = tf.Module()
        self.checkpointed.lbe_alpha = variable
        self._alpha = Alpha(variable, float(lbe_alpha))
        self.built = True

    @property
    def lbe_alpha(self) -> Alpha:
        """The present entropy to reach; set it with `lbe_alpha.assign(value)`."""
        return self._alpha

    @property
    def target(self) -> tf.Tensor:
        """The entropy to reach at present: `max(lbe_alpha_min, |lbe_alpha|)`."""
        value = tf.convert_to_tensor(self.lbe_alpha.value)
        return entropy_to_reach(value, self.lbe_alpha_min)

    @property
    def on_units(self) -> bool:
        """Whether the variant is made of the variance of every unit."""
        return self.variant in ON_UNITS

    @property
    def initial_target(self) -> float:
        """The entropy to reach at first."""
        return max(self.lbe_alpha_min, abs(self.lbe_alpha.initial))

    @property
    def supports_jit(self) -> bool:
        """Whether XLA can compile this layer; Keras asks before it turns XLA on.

        False where the native op is in use and its library was built without XLA:
        the whole model then trains outside of XLA, with the native op.
        """
        return self._jit_allowed and compiles(self.native)

    @supports_jit.setter
    def supports_jit(self, value: bool) -> None:
        self._jit_allowed = value

    def move_alpha(self, vector: keras.Variable, index: int) -> None:
        """Lets an element of a model's weight, which has its value, take alpha's place.

        The scalar is a weight of nobody then.
        """
        self._alpha.move(vector, index)
        self.scalars.clear()
        del self.checkpointed.lbe_alpha
        self.checkpointed.lbe_alphas = vector  # exported graphs of other models read it

    def __call__(self, x: Any) -> Any:
        recording = recorder.current()
        if recording is not None and recording.always and tf.is_tensor(x):
            return self.call(x, training=True)
        return super().__call__(x)  # Keras says whether this is training

    def call(self, x: Any, training: bool | None = None) -> tf.Tensor:
        """What Keras is to add to the losses of the layer with activations `[N, ...]`.

        Keras divides it by the number of samples from 3.14 on, and what is returned
        makes up for that. In a layer of your own, add `regularizer.loss(x)`.
        """
        loss, other = self.loss(x, training), self.other_activity_regularizer
        if recorder.current() is not None:
            return loss if other is None else other(x)
        if _KERAS_DIVIDES and x.shape.rank:
            loss *= tf.cast(tf.shape(x)[0], loss.dtype)
        return loss if other is None else loss + tf.cast(other(x), loss.dtype)

    def loss(self, x: Any, training: bool | None = None) -> tf.Tensor:
        """LBE of activations `[N, ...]`, without the other regularizer: a scalar.

        In a forward pass of an `LBEModel` it is 0, and the model makes the loss of what
        is reported here.

        Args:
            x: the activations.
            training: False or None uses plain TensorFlow ops in a graph, which may be
                exported, unless `native=True`.
        """
        x = tf.convert_to_tensor(x)
        if x.dtype not in ops.DTYPES:
            raise TypeError(
                f"The layer of '{self.name}' has an output that is not floating point, "
                "which has no batch entropy. Put LBE on a layer whose outputs all are "
                f"floating point. Received: dtype={x.dtype.name!r}"
            )
        recording = recorder.current()
        if recording is not None:
            if recording is recorder.active(training):
                self.report(recording, x)
            return recording.zero()
        native = self.native
        if native is None and not training and not tf.executing_eagerly():
            native = False
        if training:
            self._check_training()
        entropy, valid, variance = self._measure(x, native)
        alpha = tf.cast(self.lbe_alpha.value, entropy.dtype)
        return valid * self.lbe(entropy, variance, alpha)

    def _measure(
        self, x: tf.Tensor, native: bool | None
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]:
        """`(entropy, valid, variance)` of an output, as in a `recorder.Entry`."""
        if not self.on_units:
            found = ops.batch_entropy_or_zero(x, **self.formula, native=native)
            return *found, None
        variance, _ = reference.variance_or_one(x, self.formula["ddof"])
        return *reference.batch_entropy_or_zero(x, **self.formula), variance

    def lbe(
        self, entropy: tf.Tensor, variance: tf.Tensor | None, alpha: tf.Tensor
    ) -> tf.Tensor:
        """LBE of one output, a scalar of the dtype of alpha."""
        if not self.on_units:
            entropy = tf.cast(entropy, alpha.dtype)
            one_sided = self.variant == "one_sided"
            return lbe_losses(
                entropy, alpha, self.lbe_alpha_min, self.lbe_beta, one_sided
            )
        return self.lbe_beta * ON_UNITS[self.variant](
            tf.cast(variance, alpha.dtype),
            entropy_to_reach(alpha, self.lbe_alpha_min),
            self.formula["scale"],
            self.formula["offset"],
        )

    def report(
        self, recording: recorder.Recording, x: tf.Tensor, layer: str | None = None
    ) -> None:
        """Reports the entropy of an output, unless its layer has done so."""
        if recording.has_reported(self, x):
            return
        layer = layer or self.name
        if recording.synchronized:
            if self.on_units:
                raise ValueError(
                    f"The variant {self.variant!r} of LBE is not made of the moments "
                    "that replicas share. Make the LBEModel with synchronized=False: "
                    "every replica then has the LBE of its own samples. "
                    f"Received: the layer {layer!r}"
                )
            moments = ops.batch_moments(x, **self.formula, native=self.native)
            recording.report(self, x, layer, moments=moments)
        else:
            entropy, valid, variance = self._measure(x, self.native)
            recording.report(
                self, x, layer, entropy=entropy, valid=valid, variance=variance
            )

    def _check_training(self) -> None:
        """Raises where training would leave alpha or the layer without a gradient.

        Warns, once, where the layer cannot get to the entropy that it is to reach.
        """
        text = targets.unreachable([("", self.reach, self.initial_target)])
        if text:
            targets.warn_once(text)
        if self.on_built_layer and self.lbe_alpha.index is None:
            raise ValueError(
                "LBE was put on a layer that was built before, whose alpha a plain "
                "Keras model cannot train. Put LBE on the layer before it is built, or "
                f"train an LBEModel (add_lbe makes one). Received: {self.name!r}"
            )
        if not keras_internals.gradients_are_recorded() and _tapes_are_stopped():
            raise RuntimeError(recorder.rematerialised(self.name))

    def compute_output_shape(self, input_shape: Any) -> tuple[int, ...]:
        """A scalar."""
        return ()

    def get_config(self) -> dict[str, Any]:
        """Plain values, with the present value of alpha.

        An alpha that is not finite any more is a string, as JSON has no such number.
        """
        alpha = float(self.lbe_alpha)
        return {
            "lbe_alpha": alpha if math.isfinite(alpha) else str(alpha),
            "lbe_alpha_min": self.lbe_alpha_min,
            "lbe_beta": self.lbe_beta,
            "other_activity_regularizer": keras.regularizers.serialize(
                self.other_activity_regularizer
            ),
            **self.formula,
            "native": self.native,
            "variant": self.variant,
            "name": self.name,
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LBERegularizer:
        """The regularizer that `get_config` described, with a warning about NaN."""
        alpha = config["lbe_alpha"]
        if not isinstance(alpha, str):
            return cls(**config)
        regularizer = cls(**{**config, "lbe_alpha": 0.0})
        regularizer.lbe_alpha.assign(float(alpha))
        warnings.warn(
            f"The lbe_alpha of '{regularizer.name}' is {alpha}: training had diverged "
            "before the model was saved.",
            stacklevel=2,
        )
        return regularizer

    def save_own_variables(self, store: Any) -> None:
        """Writes the present alpha, wherever it is kept."""
        store["0"] = self.lbe_alpha.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Restores alpha; a file that does not have it is an error."""
        if "0" not in list(store.keys()):
            raise ValueError(
                "No lbe_alpha for this LBERegularizer is in the file. It may be of a "
                "model without LBE here, or of a plain Keras model, which leaves that "
                "of a plain layer out; or two layers shared a regularizer, which Keras "
                "takes apart when it loads a `.keras` file: give every layer its own, "
                "or build the model in code and load the file with load_weights(). "
                f"Received: name={self.name!r}"
            )
        self.lbe_alpha.assign(store["0"][()])


def is_finite(value: Any, at_least: float = -math.inf) -> bool:
    """Whether `value` is a finite number, `at_least` that large."""
    try:
        return math.isfinite(value) and value >= at_least
    except (TypeError, OverflowError):
        return False


def check_finite(name: str, value: Any, at_least: float = -math.inf) -> None:
    """Raises ValueError unless `value` is a finite number, `at_least` that large."""
    if not is_finite(value, at_least):
        bound = "" if at_least == -math.inf else f" >= {at_least:g}"
        raise ValueError(
            f"{name} must be a finite number{bound}. Received: {name}={value!r}"
        )


def _tapes_are_stopped() -> bool:
    """Whether not even a new gradient tape records anything here."""
    with tf.Graph().as_default(), tf.GradientTape() as tape:
        x = tf.constant(0.0)
        tape.watch(x)
        return tape.gradient(tf.identity(x), x) is None
