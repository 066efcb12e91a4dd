# SPDX-License-Identifier: Apache-2.0
"""`LBERegularizer`: layerwise batch entropy as the activity regularizer of a layer.

Keras calls it with the output of its layer. Under an `LBEModel` it reports the
entropy to the model's `Record`, and the model makes the loss; anywhere else it
returns its own loss. Its `lbe_alpha` is a weight like any other.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import weakref
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.backend.common.name_scope import name_scope
from keras.src.backend.common.symbolic_scope import in_symbolic_scope
from keras.src.saving import saving_lib
from tensorflow.python import pywrap_tfe

from lbe_ops import native as native_library
from lbe_ops import ops
from lbe_ops.alphas import Alpha

# From 3.14 on (and in Keras 2) a layer divides the value of its activity regularizer
# by the batch size. LBE is a mean over the batch already.
_KERAS_DIVIDES = tuple(int(n) for n in keras.__version__.split(".")[:2]) >= (3, 14)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One call of a regularizer: the scalars of `ops.batch_entropy_or_zero`.

    `valid` is None where the shape says already that it is 1.
    """

    regularizer: LBERegularizer
    entropy: tf.Tensor
    valid: tf.Tensor | None


class Record:
    """What the regularizers of one forward pass of an `LBEModel` have seen.

    Args:
        model: the model, which `made_by` recognizes.
        always: record whatever `training` is, and not in training only.
    """

    def __init__(self, model: keras.Model, always: bool) -> None:
        self.always = always
        self.reported: keras.layers.Layer | None = None  # the last, by its epilogue
        self._model = weakref.ref(model)
        self.entries: list[Entry] = []
        self._graph = _current_graph()
        self._zero: tf.Tensor | None = None
        self._zeros: list[tuple[keras.layers.Layer, int]] = []

    def add(self, entry: Entry, layer: str) -> None:
        """Raises where the entropy could not leave the function it was made in."""
        if _current_graph() is not self._graph:
            raise ValueError(
                f"The LBE layer {layer} is called inside a function of its own "
                "(tf.function, tf.cond, tf.while_loop, tf.map_fn) within the forward "
                "pass of its model, which cannot use its entropy. Call it outside, or "
                "put LBE on the layer around it: with_lbe(outer_layer)."
            )
        self.entries.append(entry)

    def made_by(self, model: keras.Model) -> bool:
        """Whether this is about a forward pass of that very model."""
        return self._model() is model

    def zero(self, layer: keras.layers.Layer) -> tf.Tensor:
        """A loss for Keras to add to those of `layer`, where there is none."""
        self._zeros.append((layer, len(layer._losses)))
        if _current_graph() is not self._graph:
            return tf.zeros(())
        if self._zero is None:
            self._zero = tf.zeros(())
        return self._zero

    def remove_zeros(self) -> None:
        """After the forward pass: hundreds of them cost more than the entropies."""
        for layer, index in reversed(self._zeros):
            # A slice: another thread in the same model may have cleared them.
            del layer._losses[index : index + 1]


_record: contextvars.ContextVar[Record | None] = contextvars.ContextVar(
    "lbe_ops_record", default=None
)


def current_record() -> Record | None:
    """That of the forward pass that this thread is in."""
    return _record.get()


@contextlib.contextmanager
def recording(record: Record) -> Iterator[Record]:
    """Sends what the regularizers see to `record`, in this thread."""
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)


def lbe_losses(
    entropy: tf.Tensor, alpha: tf.Tensor, alpha_min: Any, beta: Any
) -> tf.Tensor:
    """`LBE = beta * (H - max(|alpha|, alpha_min))^2`, element by element.

    `tf.maximum` gives the gradient of a tie to its first argument: alpha can leave
    alpha_min.
    """
    target = tf.maximum(tf.abs(alpha), tf.constant(alpha_min, alpha.dtype))
    return beta * tf.square(entropy - target)


@keras.saving.register_keras_serializable(package="lbe_ops")
class LBERegularizer(keras.layers.Layer):
    """Activity regularizer that pulls a layer's batch entropy towards alpha.

    For the batch entropy `H` of the layer's output (nats; see
    `lbe_ops.batch_entropy`),

        LBE = lbe_beta * (H - max(lbe_alpha_min, |lbe_alpha|))^2,

    where `lbe_alpha` is trained together with the weights of the layer. Under an
    `LBEModel` the model combines the LBE of all layers; in any other model LBE is
    added to the loss, whatever the batch size and the version of Keras.

    A batch of fewer than two samples adds neither loss nor gradient. The result is
    float32 (float64 for float64) under every dtype policy. In a plain Keras model
    whose graph is not made for training (neither `training=True` nor a gradient
    tape), only plain TensorFlow ops are used (unless `native=True`), so that an
    exported model does not need this package.

    Weight decay pulls alpha towards zero. `LBEModel` excludes it; in any other model
    call `optimizer.exclude_from_weight_decay(var_names=["lbe_alpha"])` yourself.

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
        name: name of the regularizer.
        trainable: False keeps alpha as it is.

    Attributes:
        lbe_alpha: the variable (`keras.Variable`, float32 scalar).

    Raises:
        ValueError: an argument is out of its range or not a number.
        TypeError: native is neither None nor a bool.

    Example:

    >>> layer = keras.layers.Dense(
    ...     32, activation="relu", activity_regularizer=LBERegularizer(lbe_alpha=1.0)
    ... )

    Source: Peer et al., TMLR 2022 (arXiv 2208.01134).
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
        name: str | None = None,
        trainable: bool = True,
    ) -> None:
        super().__init__(name=name, trainable=trainable, dtype="float32")
        check_finite("lbe_alpha", lbe_alpha)
        check_finite("lbe_alpha_min", lbe_alpha_min, at_least=0)
        check_finite("lbe_beta", lbe_beta, at_least=0)
        check_finite("scale", scale)
        check_finite("offset", offset)
        native_library.requested_mode(native)
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
        self.native = native
        # Made here and not in build(): a Functional model lists its variables before
        # its first call. In Keras' name scope alone: a variable whose name no other one
        # has takes TensorFlow five times as long.
        with name_scope(self.name, caller=self):
            self.lbe_alpha = Alpha(float(lbe_alpha))
        self.lbe_alpha.trainable = trainable
        self.built = True

    @property
    def supports_jit(self) -> bool:
        """Whether XLA can compile this layer; Keras asks before it turns XLA on.

        False where the native op is in use and its library was built without XLA:
        the whole model then trains outside of XLA, with the native op.
        """
        return self._supports_jit and native_library.compiles(self.native)

    @supports_jit.setter
    def supports_jit(self, value: bool) -> None:
        self._supports_jit = value

    @property
    def alpha(self) -> tf.Tensor:
        """The entropy to reach at present: `max(lbe_alpha_min, |lbe_alpha|)`."""
        return tf.maximum(tf.abs(self.lbe_alpha.value), self.lbe_alpha_min)

    def __call__(self, x: Any) -> Any:
        # Layer.__call__ would cost more than the entropy; only symbolic inputs of a
        # Functional model need it.
        if isinstance(x, keras.KerasTensor):
            return super().__call__(x)
        return self.call(x)

    def call(self, x: Any) -> tf.Tensor:
        """The loss to add for activations `[N, ...]`; zero where a model records."""
        if in_symbolic_scope():  # Keras infers shapes only
            return tf.zeros(())
        layer = self._calling_layer()
        record = _record.get()
        training = _training()
        if record is not None and not (record.always or training):
            return self._other(x, layer, record)
        if (record is not None or training) and pywrap_tfe.TFE_Py_TapeSetIsStopped():
            raise RuntimeError(
                f"The LBE layer {_name(layer)} is called where gradients are not "
                "recorded, as inside a rematerialised block (keras.RematScope, "
                "tf.recompute_grad): its LBE would be without a gradient. Take the "
                "layer out of the block, or put LBE on the output of the whole block: "
                "with_lbe(block)."
            )
        native = self.native
        recorded = training or not pywrap_tfe.TFE_Py_TapeSetIsEmpty()
        if record is None and not recorded and not tf.executing_eagerly():
            # This graph may be exported and served without the native library.
            native = native or False
        x = tf.convert_to_tensor(x)
        if x.dtype not in ops.DTYPES:
            raise TypeError(
                f"The LBE layer {_name(layer)} has an output that is not floating "
                "point, which has no batch entropy. Put LBE on a layer whose outputs "
                f"all are floating point. Received: dtype={x.dtype.name!r}"
            )
        maker, *made = getattr(x, "_lbe_entropy", (None,))
        if maker is self:  # by `epilogue`
            entropy, valid = made
        else:
            entropy, valid = ops.batch_entropy_or_zero(x, **self.formula, native=native)
        if record is not None:
            self._report(record, layer, x, entropy, valid)
            return self._other(x, layer, record)
        loss = valid * lbe_losses(
            entropy,
            tf.cast(self.lbe_alpha.value, entropy.dtype),
            self.lbe_alpha_min,
            self.lbe_beta,
        )
        if _KERAS_DIVIDES and layer is not None:
            loss *= tf.cast(tf.shape(x)[0], loss.dtype)
        if self.other_activity_regularizer is None:
            return loss
        return loss + tf.cast(self.other_activity_regularizer(x), loss.dtype)

    def in_epilogue_of(self, layer: keras.layers.Layer) -> bool:
        """Whether a layer is to end with `epilogue` now: in a step of an `LBEModel`.

        Not where a wrapper calls the layer's `call`: no regularizer follows there.
        """
        record = _record.get()
        return (
            record is not None
            and (record.always or _training())
            and self._calling_layer() is layer
            and not in_symbolic_scope()
            and not pywrap_tfe.TFE_Py_TapeSetIsStopped()
        )

    def epilogue(
        self, z: Any, bias: Any = None, activation: str = "linear", alpha: float = 1.0
    ) -> tf.Tensor:
        """`activation(z + bias)`, whose entropy is made in the same pass.

        It is kept with the tensor that is returned, for the call of this regularizer
        that follows.

        Args:
            z, bias, activation, alpha: as for `lbe_ops.ops.epilogue`.
        """
        y, *entropy = ops.epilogue(
            z,
            bias,
            activation=activation,
            alpha=alpha,
            **self.formula,
            native=self.native,
        )
        y._lbe_entropy = (self, *entropy)
        return y

    def report(self, y: tf.Tensor, layer: keras.layers.Layer) -> None:
        """Reports what `epilogue` has found, so that Keras need not call this."""
        if self.other_activity_regularizer is None:
            record = _record.get()
            self._report(record, layer, y, *y._lbe_entropy[1:])
            record.reported = layer

    def _report(
        self,
        record: Record,
        layer: keras.layers.Layer | None,
        x: tf.Tensor,
        entropy: tf.Tensor,
        valid: tf.Tensor | None,
    ) -> None:
        if (x.shape[0] or 0) >= 2 and x.shape[1:].num_elements():
            valid = None
        record.add(Entry(self, entropy, valid), _name(layer))

    def _other(
        self, x: Any, layer: keras.layers.Layer | None, record: Record
    ) -> tf.Tensor:
        if self.other_activity_regularizer is not None:
            return self.other_activity_regularizer(x)
        return tf.zeros(()) if layer is None else record.zero(layer)

    def _calling_layer(self) -> keras.layers.Layer | None:
        """The layer whose output is regularized, which has its name scope open.

        None where the regularizer is called by other code than that of `Layer`.
        """
        layer = calling_layer()
        of_layer = getattr(layer, "activity_regularizer", None) is self
        return layer if of_layer else None

    def compute_output_shape(self, input_shape: Any) -> tuple[int, ...]:
        """A scalar."""
        return ()

    def get_config(self) -> dict[str, Any]:
        """Plain values, with the present value of alpha."""
        return {
            "lbe_alpha": float(self.lbe_alpha.numpy()),
            "lbe_alpha_min": self.lbe_alpha_min,
            "lbe_beta": self.lbe_beta,
            "other_activity_regularizer": keras.regularizers.serialize(
                self.other_activity_regularizer
            ),
            **self.formula,
            "native": self.native,
            "name": self.name,
            "trainable": self.trainable,
        }

    def _trackable_children(
        self, save_type: str = "checkpoint", **kwargs: Any
    ) -> dict[str, Any]:
        children = super()._trackable_children(save_type, **kwargs)
        if save_type == "savedmodel" and self.lbe_alpha.vector is not None:
            children["lbe_alphas"] = self.lbe_alpha.vector  # functions may read it
        return children

    def load_own_variables(self, store: Any) -> None:
        """Restores alpha; a file that does not have it is an error."""
        if not store.keys():
            raise ValueError(
                "The file holds no lbe_alpha of its own for this LBERegularizer. Keras "
                "takes one regularizer shared by several layers apart when it loads a "
                "`.keras` file: give every layer its own, or build the model in code "
                f"and load the file with load_weights(). Received: name={self.name!r}"
            )
        super().load_own_variables(store)


def check_finite(name: str, value: Any, at_least: float = -math.inf) -> None:
    """Raises ValueError unless `value` is a finite number, `at_least` that large."""
    try:
        valid = math.isfinite(value) and value >= at_least
    except (TypeError, OverflowError):
        valid = False
    if not valid:
        bound = "" if at_least == -math.inf else f" >= {at_least:g}"
        raise ValueError(
            f"{name} must be a finite number{bound}. Received: {name}={value!r}"
        )


def _current_graph() -> tf.Graph | None:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _name(layer: keras.layers.Layer | None) -> str:
    return "(unknown)" if layer is None else f"'{layer.path or layer.name}'"


def calling_layer() -> Any:
    """Whose name scope is open: the layer or model in whose call this runs, or None."""
    scopes = global_state.get_global_attribute("name_scope_stack")
    return scopes[-1].caller if scopes else None


def in_layer_call() -> bool:
    """Whether this runs inside the call of a Keras layer or model."""
    return global_state.get_global_attribute("current_call_ctx") is not None


def _training() -> bool:
    context = global_state.get_global_attribute("current_call_ctx")
    return bool(getattr(context, "training", None))


def _save_activity_regularizers() -> None:
    """Makes Keras save the weights of activity regularizers.

    Its savers (`.keras`, `.weights.h5`) skip every attribute that a bare Layer has,
    and so lose alpha silently. Only regularizers with weights are concerned.
    """
    get_attr_skipset = saving_lib.get_attr_skipset

    @functools.wraps(get_attr_skipset)
    def without_activity_regularizer(obj_type: str) -> set[str]:
        return get_attr_skipset(obj_type) - {"activity_regularizer"}

    saving_lib.get_attr_skipset = without_activity_regularizer


_save_activity_regularizers()
