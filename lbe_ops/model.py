# SPDX-License-Identifier: Apache-2.0
"""`LBEModel`: a Keras model whose loss is `CE + strength * mean_l(LBE_l) * CE + ...`.

Its steps record what its LBE layers report (`lbe_ops.recorder`), and `compute_loss`
makes the loss out of that (`lbe_ops.loss`). `fit`, `evaluate` and everything else are
those of Keras.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from lbe_ops import recorder, targets
from lbe_ops.fuse import fuse_layers
from lbe_ops.keras_internals import (
    MultiWorkerTraining,
    described_by_constructor,
    exclude_from_weight_decay,
    flatten_layers,
)
from lbe_ops.loss import LBELoss, find_regularizers
from lbe_ops.recorder import Recording
from lbe_ops.regularizer import ALPHA_NAME, LBERegularizer
from lbe_ops.strength import Strength, strength_of
from lbe_ops.synchronized import replicas, synchronize, warn_of

# Whether `losses` is empty for now, so that Keras computes the compiled loss alone.
_compiled_loss_alone: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "lbe_ops_compiled_loss_alone", default=False
)


_OWN_NAMES = {
    "lbe_by_samples",
    "lbe_factor",
    "lbe_fuse",
    "lbe_kept",
    "lbe_logs",
    "lbe_loss",
    "lbe_net",
    "lbe_synchronized",
}


class LossLogs:
    """The means that an `LBEModel` logs beside the loss: `ce`, `lbe` and `max_lbe`.

    Keras tracks no attribute of this class: nested in another model, they must not
    appear in its logs, nor in files.
    """

    NAMES = ("ce", "lbe", "max_lbe")

    def __init__(self) -> None:
        self.metrics = [_LossLog(name=name) for name in self.NAMES]


class _LossLog(keras.metrics.Mean):
    """A mean that `compute_loss` updates, and nothing else.

    A training step as in Keras' guide updates every metric of the model with targets
    and predictions, of which this one is no function.
    """

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""

    def add(self, value: tf.Tensor, samples: tf.Tensor) -> None:
        """Adds the value of a batch to the mean."""
        super().update_state(value, sample_weight=samples)


class _OfNet:
    """An attribute of the Functional model inside; a model without one lacks it.

    A subclass with its own `call` may have one of its own.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, model: LBEModel | None, owner: type) -> Any:
        if model is None:
            return self
        if model.lbe_net is None:
            raise AttributeError(
                f"This {owner.__name__} has no {self._name!r}: it was not made of "
                "inputs and outputs."
            )
        return getattr(model.lbe_net, self._name)


@keras.saving.register_keras_serializable(package="lbe_ops")
class LBEModel(MultiWorkerTraining, keras.Model):
    """Trains with layerwise batch entropy (LBE), multiplied by the compiled loss.

    With `CE` the loss given to `compile` (any loss, with its weights and sample
    weights) and `LBE_l` the LBE of layer l (see `LBERegularizer`), the loss is

        CE + LBE_strength * mean_l(LBE_l) * CE + the other losses of the model.

    LBE layers are found wherever they are, in nested models too; a layer that is
    called twice counts twice. Everything else is `keras.Model`: Functional
    (`LBEModel(inputs, outputs)`) or subclassed with a `call` of its own.

    An LBEModel inside another one leaves its layers to the outer one; inside a model
    that is not an LBEModel its strength has no effect, and the LBE of its layers is
    added to that model's loss in training. Build a subclassed model by calling it, or
    in `fit`, before you list its variables: it takes the alphas in then.

    LBE is part of the loss in `fit` and `evaluate`, and in loops of your own for
    outputs of `model(x, training=True)`, passed to `model.compute_loss` as they are,
    or in `with lbe_ops.recording():`. It is absent from `predict`, from plain calls
    and from exported models.

    The alphas of all layers are one trainable weight of the model, `lbe_loss.alphas`:
    to the optimizer, to files and to callbacks a weight like any other. What an
    optimizer takes from a variable as a whole, it takes from that vector: the norm of
    `clipnorm` (`global_clipnorm` and `clipvalue` make no difference), of `Lamb` and of
    `Adafactor`. Weight decay of `model.optimizer` leaves it alone.
    `regularizer.lbe_alpha` shows and sets one element. Models that share layers share
    their alphas, which belong to the first `LBEModel` made of them; a plain Keras model
    takes them as they are. Freeze a layer (or its regularizer) and compile, and `fit`
    leaves its alpha alone, even if the optimizer has momentum (but not with a
    `train_step` of your own that does not call this class's).

    Logs beside `loss` and the compiled metrics: `ce` (the compiled loss alone), `lbe`
    (`mean_l(LBE_l) * CE`, without the strength) and `max_lbe` (`max_l(LBE_l) * CE`).

    Args:
        inputs: as for `keras.Model`; not for a subclass with its own `call`.
        outputs: likewise.
        LBE_strength: weight of LBE, >= 0, independent of the batch size: a number, or
            a `keras.optimizers.schedules.LearningRateSchedule` of the optimizer's
            iterations. See the attribute.
        name: name of the model.
        fuse: whether plain `keras.layers.Dense` and `Conv2D` with an `LBERegularizer`
            end with the fused epilogue in training (see `lbe_ops.fuse`).
        synchronized: whether entropies are those of the whole batch where a
            `tf.distribute` strategy spreads it over replicas, and not those of each
            replica's share (see `lbe_ops.synchronized`). The layers' outputs need a
            known shape then, but for the batch. Without replicas it has no effect.
        weigh_by_samples: whether the compiled loss of a replica then counts by its
            samples. Keras takes the mean of the replicas' losses, whatever their
            shares, as this model does by default. True makes a last batch that is not
            shared evenly count as on one device; for a loss that is a mean over
            samples, without `sample_weight` and masks. It holds for a model without
            LBE as well.
        **kwargs: as for `keras.Model`.

    Attributes:
        LBE_strength: the float or the schedule. Set it at any time, as in a callback:
            the next step has the new one. No function is traced again for one number
            after another; `fit` and `evaluate` are for a schedule, and a `tf.function`
            of your own keeps the schedule that it was traced with. It is part of the
            configuration and no weight: `.weights.h5` files and checkpoints do not
            have it.
        lbe_loss: the layer that owns the alphas (`LBELoss`).
        lbe_net: the Functional model of the inputs and outputs, without LBE's loss;
            None for a subclass with its own `call`.

    Raises:
        ValueError: LBE_strength is negative, not finite, or neither a number nor a
            schedule. Of a schedule the first value is looked at only.

    Example:

    >>> inputs = keras.Input((20,))
    >>> x = Dense_LBE(32, activation="relu")(inputs)
    >>> model = LBEModel(inputs, keras.layers.Dense(10)(x), LBE_strength=0.5)
    >>> model.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    >>> schedules = keras.optimizers.schedules  # 0.5, and from step 200 on no LBE
    >>> model.LBE_strength = schedules.PiecewiseConstantDecay([199], [0.5, 0.0])

    Source: Peer et al., TMLR 2022 (arXiv 2208.01134).
    """

    def __init__(
        self,
        inputs: Any = None,
        outputs: Any = None,
        LBE_strength: float | Schedule = 1.5,
        name: str | None = None,
        *,
        fuse: bool = True,
        synchronized: bool = True,
        weigh_by_samples: bool = False,
        **kwargs: Any,
    ) -> None:
        LBE_strength = strength_of(LBE_strength)
        if inputs is not None:
            kwargs.setdefault("autocast", False)  # the net casts its inputs itself
        super().__init__(name=name, **kwargs)
        self.lbe_factor = Strength(LBE_strength)
        self.lbe_fuse = bool(fuse)
        self.lbe_synchronized = bool(synchronized)
        self.lbe_by_samples = bool(weigh_by_samples)
        self.lbe_logs = LossLogs()
        self.lbe_kept = recorder.KeptRecordings()
        net = None if inputs is None else keras.Model(inputs, outputs, name=self.name)
        self.lbe_net: keras.Model | None = net
        self.lbe_loss = LBELoss(self._find_regularizers, f"{self.name}_lbe_loss")
        if inputs is not None:
            self._adopt()
            self.built = True

    input, output = _OfNet(), _OfNet()
    inputs, outputs = _OfNet(), _OfNet()
    input_shape, output_shape = _OfNet(), _OfNet()
    output_names = _OfNet()

    @property
    def layers(self) -> list[keras.layers.Layer]:
        """The layers that the model was made of."""
        if self.lbe_net is not None:
            return self.lbe_net.layers
        return [layer for layer in super().layers if layer is not self.lbe_loss]

    @layers.setter
    def layers(self, value: Any) -> None:
        keras.Model.layers.fset(self, value)  # says that the name is taken

    @property
    def LBE_strength(self) -> float | Schedule:
        """The weight of LBE in the loss; set it at any time."""
        return self.lbe_factor.value

    @LBE_strength.setter
    def LBE_strength(self, value: Any) -> None:
        if self.lbe_factor.change(value):
            # In the middle of `fit` as well, which keeps no function of its own.
            if self.train_function is not None:
                self.make_train_function(force=True)
            if self.test_function is not None:
                self.make_test_function(force=True)

    @property
    def lbe_regularizers(self) -> list[LBERegularizer]:
        """Every LBE regularizer in the model, once, nested models included."""
        return list(self._find_regularizers())

    def _find_regularizers(self) -> dict[LBERegularizer, list[keras.layers.Layer]]:
        return find_regularizers(self)

    @property
    def losses(self) -> list[tf.Tensor]:
        """As for any Keras model."""
        return [] if _compiled_loss_alone.get() else super().losses

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN_NAMES and (name in vars(self) or hasattr(type(self), name)):
            raise AttributeError(
                f"LBEModel needs its attribute {name!r} itself: give yours another "
                f"name. Received: {name}={value!r}"
            )
        super().__setattr__(name, value)

    def _adopt(self) -> None:
        """Takes the alphas and the layers in, once they are there."""
        if not self.lbe_loss.adopted:
            self._warn_of_targets()
            self.lbe_loss.adopt()
            if self.lbe_fuse:
                fuse_layers(flatten_layers(self))

    def _warn_of_targets(self) -> None:
        """Warns, once for all layers, where LBE cannot reach what it is to reach."""
        text = targets.unreachable(
            (
                layer.path or layer.name,
                targets.reach_of(layer, **regularizer.formula),
                regularizer.initial_target,
            )
            for regularizer, layers in self._find_regularizers().items()
            if regularizer.lbe_alpha.index is None  # or another LBEModel has said so
            for layer in layers
        )
        if text:
            warnings.warn(text, stacklevel=4)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """The outputs of the Functional model; subclasses may have their own."""
        if self.lbe_net is None:
            return super().call(inputs)  # says that there is none
        return self.lbe_net(inputs, training=training, mask=mask)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.lbe_net is not None and self.get_build_config() is None:
            # Keras asks for the shapes when TensorFlow saves the model. Not earlier: a
            # built model takes no new metrics or layers from a subclass's constructor.
            self.build(keras.tree.map_structure(lambda x: x.shape, self.input))
        outer = recorder.current()
        if outer is not None and outer.is_forward_pass:
            return super().__call__(*args, **kwargs)  # the outermost makes the loss
        training = bool(kwargs.get("training"))
        spread = self.lbe_synchronized and replicas() > 1
        with recorder.forward_pass(self, training, spread) as recording:
            outputs = super().__call__(*args, **kwargs)
        self._adopt()
        if outer is None and spread and recording.entries:
            zero = tf.zeros(())
            recording.entries, _ = synchronize(recording.entries, zero, zero)
        recording.close((args, kwargs), outputs, self.lbe_kept)
        if outer is None and recording.entries:
            # For the loss of a plain model around this one, or of a loop without
            # `compute_loss`.
            total = self.lbe_loss.total(recording.entries)
            total._lbe_total = True
            self.add_loss(total)
        return outputs

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `keras.Model.compile`; weight decay is told to leave alphas alone.

        Raises:
            ValueError: a metric has the name of a log of this model.
        """
        arguments = inspect.signature(keras.Model.compile).bind(self, *args, **kwargs)
        _check_names(arguments.arguments)
        super().compile(*args, **kwargs)
        warn_of(self.distribute_strategy)
        if self.built:
            self._adopt()
            if not self._find_regularizers():
                warnings.warn(
                    f"No layer of {self.name!r} has LBE: it trains as a plain model. "
                    "Take Dense_LBE or Conv2D_LBE, give layers an LBERegularizer, or "
                    "put LBE on those of a plain model with lbe_ops.add_lbe.",
                    stacklevel=2,
                )
        self.lbe_loss.freeze()
        self._exclude_alphas_from_weight_decay()

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """As `keras.Model.compile_from_config`, for the `compile` of this class."""
        if type(self).compile is not LBEModel.compile:
            super().compile_from_config(config)  # says what the subclass has to do
            return
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def _exclude_alphas_from_weight_decay(self) -> None:
        for optimizer in _optimizers(getattr(self, "optimizer", None)):
            exclude_from_weight_decay(optimizer, ALPHA_NAME)

    @functools.wraps(keras.Model.fit)  # and its documentation
    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        # In the end Keras may overwrite the alphas with their moving average.
        with self.lbe_loss.frozen_alphas_kept():
            return super().fit(*args, **kwargs)

    def train_step(self, data: Any) -> dict[str, Any]:
        """One step of `fit`: that of Keras, with LBE whatever `call` takes."""
        with recorder.recording(), self.lbe_loss.frozen_alphas_kept():
            return super().train_step(data)

    def test_step(self, data: Any) -> dict[str, Any]:
        """One step of `evaluate`: that of Keras, with LBE in the loss."""
        with recorder.recording():
            return super().test_step(data)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The metrics of Keras, with `ce`, `lbe` and `max_lbe` after the loss."""
        metrics = super().metrics
        if self.compiled:
            metrics[1:1] = self.lbe_logs.metrics
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
            y_pred: what `model(x, training=True)` returned, unchanged; or, in
                `with lbe_ops.recording():`, anything made of it.
            sample_weight: as for the compiled loss.
            training: whether missing entropies are an error.

        Returns:
            A scalar.

        Raises:
            ValueError: there is no entropy although the model has LBE and `training`
                is True, or no loss was compiled.
        """
        optimizer = getattr(self, "optimizer", None)
        if getattr(optimizer, "optimizers", None) == []:
            # A MultiOptimizer asks a function for its optimizers when it is built.
            with tf.init_scope():
                optimizer.build(self.trainable_variables)
        self._exclude_alphas_from_weight_decay()
        recording = recorder.of_outputs(y_pred)
        if recording is None or not recording.made_by(self):
            recording = recorder.current()
        entries = recording.entries if recording is not None else []
        regularizers = self.lbe_regularizers
        if recording is not None and not recording.is_forward_pass:
            own = set(regularizers)
            entries = [each for each in entries if each.regularizer in own]
        if training and regularizers:
            _check_entries(recording, entries, regularizers)
        if getattr(self, "loss", None) is None:
            if entries:
                raise ValueError(
                    "LBE is multiplied by the compiled loss, and there is none. "
                    "Provide a `loss` argument in `compile()`."
                )
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        with recorder.set_to(_compiled_loss_alone, True):
            ce = super().compute_loss(x, y, y_pred, sample_weight, training)
        if ce.dtype != tf.float64:
            ce = tf.cast(ce, tf.float32)
        batch = next(t for t in tf.nest.flatten((x, y_pred)) if t is not None)
        samples = tf.shape(batch)[0]
        by_samples = self.lbe_by_samples and replicas() > 1
        if by_samples or any(entry.moments is not None for entry in entries):
            entries, total = synchronize(entries, ce, samples, by_samples=by_samples)
            ce = tf.cast(total, ce.dtype)
        mean, maximum = self.lbe_loss.mean_and_max(entries, ce.dtype)
        # Keras has divided the loss by the number of replicas, which then add up.
        count = tf.distribute.get_strategy().num_replicas_in_sync
        full = ce * count
        for metric, value in zip(
            self.lbe_logs.metrics, (full, mean * full, maximum * full), strict=True
        ):
            metric.add(value, samples)
        others = [
            _scalar(loss, ce.dtype)
            for loss in self.losses
            if not hasattr(loss, "_lbe_total")
        ]
        if others and count > 1:
            others = [tf.add_n(others) / count]
        strength = self.lbe_factor.at(optimizer, ce.dtype)
        return tf.add_n([ce, strength * mean * ce, *others])

    @described_by_constructor
    def get_config(self) -> dict[str, Any]:
        """What makes the model anew, with the present strength.

        Of a Functional model, the layers and how they are connected; of a subclass
        with its own constructor what Keras says, and the strength if the constructor
        takes it.
        """
        parameters = inspect.signature(type(self).__init__).parameters
        passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        own = {"LBE_strength": self.lbe_factor.get_config()}
        if self.lbe_net is not None and _takes_inputs(parameters):
            config = {"net": keras.saving.serialize_keras_object(self.lbe_net)}
            own |= self._own_config()
        elif type(self).__init__ is LBEModel.__init__:
            config = {}
            own |= self._own_config()
        else:
            config = super().get_config()
        return {
            **config,
            **{n: value for n, value in own.items() if passes_on or n in parameters},
        }

    def _own_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "fuse": self.lbe_fuse,
            "synchronized": self.lbe_synchronized,
            "weigh_by_samples": self.lbe_by_samples,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> LBEModel:
        """The model that `get_config` described."""
        config = dict(config)
        if "net" in config:
            net = keras.saving.deserialize_keras_object(
                config.pop("net"), custom_objects=custom_objects
            )
            return cls(net.input, net.output, **config)
        strength = None
        if "LBE_strength" not in inspect.signature(cls.__init__).parameters:
            # Its **kwargs may go to a constructor that is given the strength already.
            strength = config.pop("LBE_strength", None)
        model = super().from_config(config, custom_objects)
        if strength is not None:
            model.LBE_strength = strength_of(strength)
        return model

    def export(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.export`; what is exported has no LBE.

        Of a Functional model that is `lbe_net`: a plain Keras model.
        """
        if self.lbe_net is not None:
            return self.lbe_net.export(filepath, *args, **kwargs)
        return super().export(filepath, *args, **kwargs)

    def quantize(
        self, mode: Any = None, config: Any = None, filters: Any = None, **kwargs: Any
    ) -> None:
        """As `keras.Model.quantize`, for layers with LBE as well.

        Keras quantizes layers that have no layer in them, and takes a regularizer with
        weights for one.
        """
        given = {"mode": mode, "config": config, "filters": filters, **kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        super().quantize(**given)
        given.pop("filters", None)
        for layer in flatten_layers(self):
            inside = flatten_layers(layer)
            only_lbe = inside and all(isinstance(x, LBERegularizer) for x in inside)
            if not only_lbe or not _passes(layer, filters):
                continue
            try:
                layer.quantize(**given)
            except NotImplementedError as error:
                warnings.warn(str(error), stacklevel=2)
        # Their graphs are of the layers before.
        self.train_function = self.test_function = self.predict_function = None

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """As `keras.Model.summary`, and one line about the alphas, which are counted.

        Of a Functional model the table is that of its layers.
        """
        super().summary(*args, **kwargs)
        if self.lbe_loss.alphas is not None:
            print_line = kwargs.get("print_fn") or print
            print_line(
                f" LBE alphas: {self.lbe_loss.alphas.shape[0]:,} (one weight of the "
                "model, counted above)"
            )


LBE_Model = LBEModel


def _takes_inputs(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a constructor takes the inputs and outputs of a Functional model."""
    positional = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    return positional or {"inputs", "outputs"} <= set(parameters)


def _scalar(loss: tf.Tensor, dtype: Any) -> tf.Tensor:
    """A loss that a layer has added, as Keras sums it up."""
    loss = tf.cast(loss, dtype)
    return loss if loss.shape.rank == 0 else tf.reduce_sum(loss)


def _check_entries(
    recording: Recording | None,
    entries: list[recorder.Entry],
    regularizers: list[LBERegularizer],
) -> None:
    """Raises where LBE would be missing in the loss; warns where it is in part."""
    called = {id(entry.regularizer) for entry in entries}
    absent = [each for each in regularizers if id(each) not in called]
    elsewhere = recording.elsewhere if recording is not None else {}
    for each in absent:
        if id(each) in elsewhere:
            raise ValueError(
                f"The LBE layer '{elsewhere[id(each)]}' is called inside a function of "
                "its own (tf.function, tf.cond, tf.while_loop, tf.map_fn) within the "
                "forward pass of its model, which cannot use its entropy. Call it "
                "outside, or put LBE behind the layer around it: "
                "lbe_ops.LBE()(outer_layer(x))."
            )
    if not entries and recording is None:
        raise ValueError(
            "compute_loss needs y_pred as the model returned it, in the same function: "
            "it carries the batch entropies of that forward pass. For anything else "
            "write\n\n    with lbe_ops.recording():\n        loss = "
            "model.compute_loss(x, y, change(model(x, training=True)))\n\n"
            "Received a y_pred that does not come from calling this model (or was "
            "changed since)."
        )
    if not entries:
        raise ValueError(
            "No LBE layer reported its batch entropy in this forward pass, and the "
            "loss would be without LBE. Either the model was called without "
            "training=True: call model(x, training=True). Or its LBE layers are not "
            "called as layers (TimeDistributed takes their `call` only) or in a "
            "function that was traced before: put LBE behind the wrapper, "
            "lbe_ops.LBE()(wrapper(x)). "
            f"Received: no entropy of {len(regularizers)} LBE regularizers"
        )
    if absent:
        # As Keras warns of variables without a gradient.
        warnings.warn(
            f"Gradients do not exist for the lbe_alpha of {[r.name for r in absent]}: "
            "their layers reported no batch entropy in this forward pass.",
            stacklevel=3,
        )


def _check_names(arguments: dict[str, Any]) -> None:
    """Raises ValueError where a metric of the user's has the name of one of ours."""
    given = [arguments.get("metrics"), arguments.get("weighted_metrics")]
    for metric in keras.tree.flatten(given):
        name = metric if isinstance(metric, str) else getattr(metric, "name", None)
        name = name or getattr(metric, "__name__", None)
        if name in LossLogs.NAMES:
            raise ValueError(
                f"An LBEModel logs {', '.join(LossLogs.NAMES)} itself (`ce` is the "
                "compiled loss): give the metric another name. For Keras' crossentropy "
                f'write "crossentropy". Received: a metric named {name!r}'
            )


def _optimizers(optimizer: Any) -> list[Any]:
    """The optimizers that update variables: those inside of Keras' wrappers."""
    if optimizer is None:
        return []
    inner = getattr(optimizer, "inner_optimizer", None)  # LossScaleOptimizer
    if inner is not None:
        return _optimizers(inner)
    several = getattr(optimizer, "optimizers", None)  # MultiOptimizer
    return [optimizer] if several is None else list(several)


def _passes(layer: keras.layers.Layer, filters: Any) -> bool:
    """Whether `filters` of `quantize` lets a layer through, as Keras documents it."""
    if filters is None:
        return True
    if callable(filters):
        return bool(filters(layer))
    patterns = [filters] if isinstance(filters, str) else filters
    return any(re.search(pattern, layer.name) for pattern in patterns)
