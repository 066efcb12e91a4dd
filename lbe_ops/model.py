# SPDX-License-Identifier: Apache-2.0
"""`LBEModel`: a Keras model whose loss is `CE + strength * mean_l(LBE_l) * CE + ...`.

The regularizers of a forward pass report their entropies to a `Record`, which
travels with the outputs; `compute_loss` makes the loss of all layers out of it at
once. `fit`, `evaluate` and everything else are those of Keras.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.models.functional import Functional, functional_from_config
from keras.src.utils import python_utils, tracking

from lbe_ops import epilogue
from lbe_ops.alphas import ALPHA_NAME, AlphaVector
from lbe_ops.regularizer import (
    Entry,
    LBERegularizer,
    Record,
    check_finite,
    in_layer_call,
    lbe_losses,
    recording,
)

# Whether `trainable_variables` lists every `lbe_alpha`, and not their vector.
_one_by_one: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "lbe_ops_one_by_one", default=False
)
_in_step: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "lbe_ops_in_step", default=False
)


class LBEModel(keras.Model):
    """Trains with layerwise batch entropy (LBE), multiplied by the compiled loss.

    With `CE` the loss given to `compile` (any loss, with its weights and sample
    weights) and `LBE_l` the LBE of layer l (see `LBERegularizer`), the loss is

        CE + LBE_strength * mean_l(LBE_l) * CE + the other losses of the model.

    LBE layers are found wherever they are, in nested models too; a layer that is
    called twice counts twice. Everything else is `keras.Model`: Functional
    (`LBEModel(inputs, outputs)`) or subclassed with a `call` of its own.

    An LBEModel inside another one leaves its layers to the outer one; inside a model
    that is not an LBEModel its strength has no effect, and the LBE of its layers is
    added to that model's loss. Copy one with `type(model).from_config(
    model.get_config())`: `keras.models.clone_model` makes a plain Functional model.

    LBE is part of the loss in `fit` and `evaluate`, and in loops of your own for
    outputs of `model(x, training=True)`, passed to `model.compute_loss` as they are.
    It is absent from `predict`, from plain calls and from exported models.

    Every `lbe_alpha` stays a weight of its regularizer, to read, to assign and in
    files. They are kept in one vector, the last of `trainable_variables`, and that is
    what the optimizer sees: differentiate these in loops of your own. What an
    optimizer takes from a variable as a whole, it takes from the vector: the norm of
    `clipnorm` (`global_clipnorm` and `clipvalue` make no difference), of `Lamb` and of
    `Adafactor`. A step without an alpha's layer gives it a gradient of zero, and
    momentum still moves it. What else a loss of your own makes of an `lbe_alpha` has
    no gradient there.

    Logs beside `loss` and the compiled metrics: `ce` (the compiled loss alone), `lbe`
    (`mean_l(LBE_l) * CE`, without the strength) and `max_lbe` (`max_l(LBE_l) * CE`).

    Args:
        inputs: as for `keras.Model`; not for a subclass with its own `call`.
        outputs: likewise.
        LBE_strength: weight of LBE, >= 0, independent of the batch size. It is fixed
            when the training function is built; call `compile` after changing it.
        name: name of the model.
        **kwargs: as for `keras.Model`.

    Raises:
        ValueError: LBE_strength is negative, not finite or not a number.

    Example:

    >>> inputs = keras.Input((20,))
    >>> x = Dense_LBE(32, activation="relu")(inputs)
    >>> model = LBEModel(inputs, keras.layers.Dense(10)(x), LBE_strength=0.5)
    >>> model.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))

    Source: Peer et al., TMLR 2022 (arXiv 2208.01134).
    """

    _alpha_vector: AlphaVector | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> LBEModel:
        if cls is LBEModel and (args or "inputs" in kwargs):
            cls = LBEFunctional
        return super().__new__(cls)

    def __init__(
        self,
        inputs: Any = None,
        outputs: Any = None,
        LBE_strength: float = 1.5,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_finite("LBE_strength", LBE_strength, at_least=0)
        if inputs is None:
            super().__init__(name=name, **kwargs)
        else:
            cls = type(self)
            if not issubclass(cls, Functional):
                # Keras would make LBEModel itself Functional, and with it every
                # subclass that has a call of its own.
                cls.__bases__ = (*cls.__bases__, Functional)
            super().__init__(inputs, outputs, name=name, **kwargs)
        self.LBE_strength = float(LBE_strength)
        # Not tracked: nested in another model, they must not appear in its logs.
        with tracking.DotNotTrackScope():
            self._lbe_metrics = [
                keras.metrics.Mean(name=name) for name in ("ce", "lbe", "max_lbe")
            ]

    @property
    def lbe_regularizers(self) -> list[LBERegularizer]:
        """Every LBE regularizer in the model, once, nested models included."""
        return [
            layer
            for layer in self._flatten_layers(include_self=False)
            if isinstance(layer, LBERegularizer)
        ]

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        """Those of Keras, with one vector at the end in place of every `lbe_alpha`.

        See `lbe_ops.alphas`. The scalars are in `weights`.
        """
        return self._with_alpha_vector(super().trainable_variables)

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        """The same, but for metrics and random seeds."""
        return self._with_alpha_vector(super().trainable_weights)

    def _with_alpha_vector(self, variables: list[Any]) -> list[Any]:
        if not variables or _one_by_one.get():
            return variables
        vector = self._alphas()
        return variables if vector is None else vector.in_place_of_scalars(variables)

    def _alphas(self) -> AlphaVector | None:
        """The vector; a new one where a layer was added since it was made."""
        regularizers = self.lbe_regularizers
        vector = self._alpha_vector
        if vector is None or not vector.stands_for(regularizers):
            if not regularizers:
                return None
            vector = AlphaVector.make(regularizers, self.distribute_strategy)
            # Not tracked: it must not appear among the weights or in files.
            with tracking.DotNotTrackScope():
                self._alpha_vector = vector
        return vector

    @python_utils.default  # Keras describes constructors where nothing overrides it
    def get_config(self) -> dict[str, Any]:
        """What makes the model anew, with the present strength.

        Of a Functional model, the layers and how they are connected; of a subclass
        with its own constructor what Keras says, and the strength if the constructor
        takes it.
        """
        parameters = inspect.signature(type(self).__init__).parameters
        if type(self).__init__ is LBEModel.__init__ and hasattr(self, "_inputs_struct"):
            # A Functional model of any other signature than Keras' refuses to say.
            config = Functional(self.input, self.output, name=self.name).get_config()
            config["trainable"] = self.trainable
        else:
            config = super().get_config()
        if "LBE_strength" in parameters or any(
            p.kind is p.VAR_KEYWORD for p in parameters.values()
        ):
            config["LBE_strength"] = self.LBE_strength
        return config

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> LBEModel:
        """The model that `get_config` described."""
        config = dict(config)
        if cls.__init__ is LBEModel.__init__ and "input_layers" in config:
            return functional_from_config(cls, config, custom_objects)
        strength = None
        if "LBE_strength" not in inspect.signature(cls.__init__).parameters:
            # Its **kwargs may go to a constructor that is given the strength already.
            strength = config.pop("LBE_strength", None)
        model = super().from_config(config, custom_objects)
        if strength is not None:
            model.LBE_strength = strength
        return model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if in_layer_call():  # the outermost model makes the loss
            return super().__call__(*args, **kwargs)
        epilogue.install(self)
        with recording(Record(self, always=_in_step.get())) as record:
            outputs = super().__call__(*args, **kwargs)
        record.remove_zeros()
        inputs = {id(tensor) for tensor in tf.nest.flatten((args, kwargs))}
        for output in tf.nest.flatten(outputs):
            if tf.is_tensor(output) and id(output) not in inputs:
                # The record lives as long as the outputs that it belongs to, so it
                # can be neither stale nor another thread's.
                output._lbe_record = record
        return outputs

    @functools.wraps(keras.Model.fit)  # and its documentation
    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        history = super().fit(*args, **kwargs)
        if self._alpha_vector is not None and _averages(self.optimizer):
            # Keras has just overwritten the vector with its moving average.
            vector = self._alpha_vector
            vector.assign(vector.constraint(vector.value))
        return history

    @functools.wraps(keras.Model.get_state_tree)
    def get_state_tree(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # Scalars, as files have them.
        with _set(_one_by_one):
            return super().get_state_tree(*args, **kwargs)

    @functools.wraps(keras.Model.set_state_tree)
    def set_state_tree(self, *args: Any, **kwargs: Any) -> None:
        with _set(_one_by_one):
            super().set_state_tree(*args, **kwargs)

    def train_step(self, data: Any) -> dict[str, Any]:
        """One step of `fit`: that of Keras, with LBE whatever `call` takes."""
        with _set(_in_step):
            return super().train_step(data)

    def test_step(self, data: Any) -> dict[str, Any]:
        """One step of `evaluate`: that of Keras, with LBE in the loss."""
        with _set(_in_step):
            return super().test_step(data)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The metrics of Keras, with `ce`, `lbe` and `max_lbe` after the loss."""
        metrics = super().metrics
        if self.compiled:
            metrics[1:1] = self._lbe_metrics
        return metrics

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> tf.Tensor:
        """The total loss of one batch.

        Args:
            x: inputs of the batch; their number of samples weighs the logged means.
            y: targets.
            y_pred: what `model(x, training=True)` returned, unchanged.
            sample_weight: as for the compiled loss.
            training: whether missing entropies are an error.

        Returns:
            A scalar.

        Raises:
            ValueError: y_pred is not the output of this model, carries no entropy
                although the model has LBE and `training` is True, or no loss was
                compiled.
        """
        _exclude_alpha_from_weight_decay(self.optimizer)
        record = _record_of(y_pred)
        if record is not None and not record.made_by(self):
            record = None
        entries = record.entries if record else []
        missing = training and not entries and self.lbe_regularizers
        if missing and record is None:
            raise ValueError(
                "compute_loss needs y_pred as the model returned it, in the same "
                "function: it carries the batch entropies of that forward pass. "
                "Received a y_pred that does not come from calling this model (or was "
                "changed since)."
            )
        if missing:
            raise ValueError(
                "No LBE layer reported its batch entropy in this forward pass, and the "
                "loss would be without LBE. Either the model was called without "
                "training=True: call model(x, training=True). Or its LBE layers are "
                "not called as layers (TimeDistributed takes their `call` only) or in "
                "a function that was traced before: put LBE on the wrapper, "
                "with_lbe(wrapper). Received: no entropy of "
                f"{len(self.lbe_regularizers)} LBE regularizers"
            )
        if self._compile_loss is None:
            if entries:
                raise ValueError(
                    "LBE is multiplied by the compiled loss, and there is none. "
                    "Provide a `loss` argument in `compile()`."
                )
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        ce = self._compile_loss(y, y_pred, sample_weight)
        if ce.dtype != tf.float64:
            ce = tf.cast(ce, tf.float32)
        mean, maximum = self._mean_and_max(entries, ce.dtype, training)
        batch = next(t for t in tf.nest.flatten((x, y_pred)) if t is not None)
        samples = tf.shape(batch)[0]
        # Keras has divided the loss by the number of replicas, which then add up.
        full = ce * tf.distribute.get_strategy().num_replicas_in_sync
        for metric, value in zip(
            self._lbe_metrics, (full, mean * full, maximum * full), strict=True
        ):
            metric.update_state(value, sample_weight=samples)
        others = [
            tf.cast(self._aggregate_additional_loss(loss), ce.dtype)
            for loss in self.losses
        ]
        return tf.add_n([ce, self.LBE_strength * mean * ce, *others])

    def _mean_and_max(
        self, entries: list[Entry], dtype: Any, training: bool
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Mean and maximum of LBE over layers, in a few vector ops for all of them."""
        if not entries:
            return tf.zeros((), dtype), tf.zeros((), dtype)
        regularizers = [entry.regularizer for entry in entries]
        if training:
            self._warn_of_layers_not_called(regularizers)
        vector = self._alphas()
        if vector is None:  # layers that the model does not track
            alphas = tf.stack([each.lbe_alpha.value for each in regularizers])
        elif training:
            alphas = vector.for_training(regularizers)
        else:
            alphas = vector.for_evaluation(regularizers)
        losses = lbe_losses(
            tf.stack([tf.cast(entry.entropy, dtype) for entry in entries]),
            tf.cast(alphas, dtype),
            [each.lbe_alpha_min for each in regularizers],
            [each.lbe_beta for each in regularizers],
        )
        if any(entry.valid is not None for entry in entries):
            losses *= tf.stack(
                [
                    tf.ones((), dtype) if e.valid is None else tf.cast(e.valid, dtype)
                    for e in entries
                ]
            )
        return tf.reduce_mean(losses), tf.reduce_max(losses)

    def _warn_of_layers_not_called(self, called: list[LBERegularizer]) -> None:
        """As Keras warns of variables without a gradient."""
        called_ids = {id(regularizer) for regularizer in called}
        absent = [
            regularizer.lbe_alpha.path
            for regularizer in self.lbe_regularizers
            if regularizer.lbe_alpha.trainable and id(regularizer) not in called_ids
        ]
        if absent:
            warnings.warn(
                f"Gradients do not exist for {absent}: their layers reported no batch "
                "entropy in this forward pass.",
                stacklevel=2,
            )


@keras.saving.register_keras_serializable(package="lbe_ops")
class LBEFunctional(LBEModel, Functional):
    """What `LBEModel(inputs, outputs)` makes, as Keras makes `Functional`."""


LBE_Model = LBEModel


@contextlib.contextmanager
def _set(flag: contextvars.ContextVar[bool]) -> Iterator[None]:
    token = flag.set(True)
    try:
        yield
    finally:
        flag.reset(token)


def _record_of(y_pred: Any) -> Record | None:
    for output in tf.nest.flatten(y_pred):
        record = getattr(output, "_lbe_record", None)
        if record is not None:
            return record
    return None


def _averages(optimizer: Any) -> bool:
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # loss scaling
    return bool(getattr(optimizer, "use_ema", False))


def _exclude_alpha_from_weight_decay(optimizer: Any) -> None:
    """Adds alpha to what the optimizer's weight decay leaves alone already."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # loss scaling
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    if optimizer is None or (pattern and pattern.search(ALPHA_NAME)):
        return
    variables = getattr(optimizer, "_exclude_from_weight_decay", set())
    names = [pattern.pattern] if pattern else []
    optimizer.exclude_from_weight_decay(var_names=[ALPHA_NAME, *names])
    optimizer._exclude_from_weight_decay = variables
