# SPDX-License-Identifier: Apache-2.0
"""`Strength`: the weight of LBE in the loss of an `LBEModel`, which may change."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from lbe_ops.regularizer import is_finite


def strength_of(value: Any) -> float | Schedule:
    """A number as a float, or a schedule, which may be given in its serialised form.

    Raises:
        ValueError: it is neither, or negative or not finite: a number, or the first
            value of the schedule.
    """
    if isinstance(value, dict):
        value = keras.optimizers.schedules.deserialize(dict(value))
    scheduled = isinstance(value, Schedule)
    with tf.init_scope():
        number = float(value(tf.constant(0, tf.int64))) if scheduled else value
        if not is_finite(number, at_least=0):
            raise ValueError(
                "LBE_strength must be a finite number >= 0, or a "
                "keras.optimizers.schedules.LearningRateSchedule whose values are. "
                f"Received: LBE_strength={value!r}"
                + (f", which begins with {number}" if scheduled else "")
            )
        return value if scheduled else float(value)


class Strength:
    """A number that graphs read in every step, or a schedule.

    The number is in a variable: functions that are traced already follow it. Keras
    tracks no attribute of this class, so that it is no weight and in no file of
    weights; the configuration of the model has it.

    Args:
        value: as for `strength_of`.

    Attributes:
        value: the float or the schedule.
    """

    def __init__(self, value: Any) -> None:
        self.value = strength_of(value)
        with tf.init_scope():
            # All bits of a Python float, which `at` rounds as it would a constant.
            self._variable = tf.Variable(
                0.0 if self.scheduled else self.value,
                trainable=False,
                dtype=tf.float64,
                # Who sets it, sets it on every replica.
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
                name="LBE_strength",
            )

    @property
    def scheduled(self) -> bool:
        """Whether it is a schedule."""
        return isinstance(self.value, Schedule)

    def change(self, value: Any) -> bool:
        """Sets it; returns whether that needs functions to be traced again."""
        value, before = strength_of(value), self.value
        scheduled = self.scheduled
        self.value = value
        if not self.scheduled:
            with tf.init_scope():
                self._variable.assign(value)
        return value is not before and (scheduled or self.scheduled)

    def at(self, optimizer: Any, dtype: tf.DType) -> tf.Tensor:
        """The present strength, a scalar of dtype.

        Args:
            optimizer: whose iterations a schedule is a function of.
            dtype: of the result.

        Raises:
            ValueError: there is a schedule and no optimizer.
        """
        if not self.scheduled:
            return tf.cast(self._variable, dtype)
        if optimizer is None:
            raise ValueError(
                "The LBE_strength is a schedule of the optimizer's iterations, and "
                "there is no optimizer. Compile the model with one, or set a number. "
                f"Received: LBE_strength={self.value!r}"
            )
        schedule: Any = self.value
        return tf.cast(schedule(optimizer.iterations), dtype)

    def get_config(self) -> float | dict[str, Any]:
        """The float, or the serialised schedule."""
        if not self.scheduled:
            return self.value
        return keras.optimizers.schedules.serialize(self.value)
