# SPDX-License-Identifier: Apache-2.0
"""Trainings on replicas beside the same on one device; run by test_synchronized.py.

`python replica_cases.py COUNT` runs the cases for so many replicas, on logical devices
that have to be made before TensorFlow starts, and prints what they return as JSON.
"""

import collections
import contextlib
import json
import sys
import tempfile
import traceback

import keras
import numpy as np
import tensorflow as tf

from lbe_ops import (
    LBE,
    Conv2D_LBE,
    Dense_LBE,
    LBEModel,
    LBERegularizer,
    ops,
    recording,
    with_lbe,
)
from lbe_ops import synchronized as module
from lbe_ops.callbacks import BatchEntropyLogger
from lbe_ops.recorder import Entry

COUNT = int(sys.argv[1])
CASES = {}
SHAPE = (8,)
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * COUNT,
)
DEVICES = [f"CPU:{i}" for i in range(COUNT)]
# One for all cases: TensorFlow mixes up the collectives of two of the same devices.
STRATEGY = tf.distribute.MirroredStrategy(DEVICES)


def case(*counts):
    def decorate(function):
        if COUNT in counts:
            CASES[function.__name__] = function
        return function

    return decorate


def samples(number, shape=SHAPE):
    x = np.random.default_rng(0).normal(size=(number, *shape))
    return x.astype(keras.config.floatx()), (x.reshape(number, -1)[:, 0] > 0) * 1


def net(alpha=1.0):
    """Layers of every kind: fused, with two formulas, and tapped."""
    inputs = keras.Input(SHAPE)
    x = inputs
    for _ in range(3):
        x = Dense_LBE(16, activation="relu", LBE_alpha=alpha)(x)
    x = with_lbe(keras.layers.Dense(12, "tanh"), ddof=1)(x)
    x = with_lbe(keras.layers.LayerNormalization())(x)  # LBE without an epilogue
    return inputs, keras.layers.Dense(2, dtype=keras.config.floatx())(LBE()(x))


def model_of(make=net, optimizer=None, compiled=None, **options):
    keras.utils.set_random_seed(1)
    model = LBEModel(*make(), LBE_strength=0.5, **options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.SGD(0.05), loss, **compiled or {})
    return model


def largest(one, other):
    return max(
        float(np.abs(np.asarray(a, np.float64) - b).max(initial=0))
        for a, b in zip(one, other, strict=True)
    )


def compare(
    number,
    batch_size,
    make=net,
    on=None,
    compiled=None,
    data=None,
    outputs=5,
    **options,
):
    """Largest differences between training on one device and on replicas."""
    x, y = data or samples(number)
    one = model_of(make, compiled=compiled)
    with (on or STRATEGY).scope():
        many = model_of(make, compiled=compiled, **options)
    fit = {"batch_size": batch_size, "shuffle": False, "verbose": 0}
    histories = [m.fit(x, y, epochs=3, **fit).history for m in (one, many)]
    results = [m.evaluate(x, y, batch_size=batch_size, verbose=0) for m in (one, many)]
    predictions = [m.predict(x[:outputs], batch_size=4, verbose=0) for m in (one, many)]
    return {
        "weights": largest(one.get_weights(), many.get_weights()),
        "history": largest(*(list(h.values()) for h in histories)),
        "evaluate": largest(*([result] for result in results)),
        "predict": largest(*([prediction] for prediction in predictions)),
        "finite": bool(np.isfinite(list(histories[1].values())).all()),
    }


@case(2, 3, 4)
def equal_shards():
    return compare(24 * COUNT, 8 * COUNT)


@case(2, 4)  # Keras divides by 3 in float32
def equal_shards_in_float64():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        return compare(24 * COUNT, 8 * COUNT)
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")


@case(2)
def without_synchronization():
    return compare(48, 16, synchronized=False)


@case(4)
def partial_batches():  # the last one has 5 samples: 2, 2, 1 and none
    return compare(53, 16, weigh_by_samples=True)


@case(4)
def partial_batches_as_keras():
    return compare(53, 16)


@case(4)
def partial_batches_in_float16():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        # A scaled loss overflows on one device and not, divided by R, on R of them.
        compiled = {"auto_scale_loss": False}
        return compare(53, 16, compiled=compiled, weigh_by_samples=True)
    finally:
        keras.config.set_dtype_policy("float32")


@case(2)
def shards_of_one():
    return compare(6, 2)


@case(4)
def two_sums():
    module.SLOT_BYTES, before = 0, module.SLOT_BYTES
    try:
        return compare(53, 16, weigh_by_samples=True)
    finally:
        module.SLOT_BYTES = before


@case(2)
def eager():
    return compare(16, 16, compiled={"run_eagerly": True})


@case(2)
def several_steps_per_execution():
    on = tf.distribute.MirroredStrategy(
        DEVICES, cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    return compare(64, 16, on=on, compiled={"steps_per_execution": 2})


@case(2)
def convolution():
    def make():
        inputs = keras.Input((6, 6, 2))
        x = Conv2D_LBE(4, 3, activation="elu", padding="same", LBE_alpha=1.0)(inputs)
        x = Conv2D_LBE(3, 3, activation="softplus", LBE_alpha=1.0)(x)
        return inputs, keras.layers.Dense(2)(keras.layers.Flatten()(x))

    # TensorFlow's convolutions cannot predict for a replica without a sample.
    return compare(48, 16, make, data=samples(48, (6, 6, 2)), outputs=8)


@case(2)
def shared_layer():
    def make():
        inputs = keras.Input(SHAPE)
        layer = Dense_LBE(8, activation="relu", LBE_alpha=1.0)
        return inputs, keras.layers.Dense(2)(layer(layer(inputs)))

    return compare(48, 16, make)


def own_loop(forward, wrap=tf.function):
    """Weights after some steps of `forward(model, x, y)`, which returns the loss."""
    x, y = samples(16)
    models = [model_of()]
    on = STRATEGY
    with on.scope():
        models.append(model_of())

    def gradients(model, x, y):
        with tf.GradientTape() as tape:
            loss = forward(model, x, y)
        return tape.gradient(loss, model.trainable_variables)

    shards = on.experimental_distribute_dataset(
        tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    )
    one = gradients(models[0], x, y)

    def step(data):
        return on.run(lambda data: gradients(models[1], *data), args=(data,))

    many = wrap(step)(next(iter(shards)))
    many = [sum(on.experimental_local_results(gradient)) for gradient in many]
    return {"weights": largest(one, many)}


@case(2)
def loop_of_outputs():
    return own_loop(lambda m, x, y: m.compute_loss(x, y, m(x, training=True)))


@case(2)
def loop_that_records():
    def forward(model, x, y):
        with recording():
            return model.compute_loss(x, y, 2 * model(x))

    return own_loop(forward)


@case(2)
def loop_that_is_eager():
    return own_loop(
        lambda m, x, y: m.compute_loss(x, y, m(x, training=True)), lambda step: step
    )


@case(2)
def function_differentiated_from_outside():
    x, y = samples(16)
    one = model_of()
    on = STRATEGY
    with on.scope():
        many = model_of()
    shards = on.experimental_distribute_dataset(
        tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    )
    variables = [on.experimental_local_results(v.value) for v in many.weights]

    @tf.function
    def loss(data):
        return on.run(
            lambda x, y: many.compute_loss(x, y, many(x, training=True)), args=data
        )

    with tf.GradientTape() as tape:
        losses = on.experimental_local_results(loss(next(iter(shards))))
        total = tf.add_n([tf.identity(each) for each in losses])
    gradients = [sum(each) for each in tape.gradient(total, variables)]
    with tf.GradientTape() as tape:
        total = one.compute_loss(x, y, one(x, training=True))
    return {"weights": largest(tape.gradient(total, one.weights), gradients)}


@case(2)
def second_derivative():
    with STRATEGY.scope():
        model = model_of()
    x, y = samples(16)
    on = model.distribute_strategy

    def step(x, y):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                loss = model.compute_loss(x, y, model(x, training=True))
            first = inner.gradient(loss, model.trainable_variables[0])
        return outer.gradient(first, model.trainable_variables[0])

    try:
        tf.function(lambda: on.run(step, args=(tf.constant(x), tf.constant(y))))()
    except Exception as error:
        return str(error)


@case(2)
def collectives():
    """How many operations of each kind a step of one replica has."""
    counts = {}
    x, y = samples(16)
    for name, options in {
        "synchronized": {},
        "per replica": {"synchronized": False},
    }.items():
        with STRATEGY.scope():
            model = model_of(**options)
        shards = STRATEGY.experimental_distribute_dataset(
            tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
        )
        for kind, function in {
            "train": model.train_step,
            "evaluate": model.test_step,
            "predict": model.predict_step,
        }.items():
            step = tf.function(lambda data, f=function: STRATEGY.run(f, args=(data,)))
            graph = step.get_concrete_function(next(iter(shards))).graph
            found = collections.Counter(op.type for op in graph.get_operations())
            counts[f"{name} {kind}"] = {
                op: number / COUNT for op, number in found.items() if "Collect" in op
            }
    return counts


@case(2)
def nan_in_one_sample():
    """Entropies on each replica, where one sample of the first one has a NaN."""
    x, _ = samples(16)
    x[3, 5] = np.nan

    regularizers = {native: LBERegularizer(native=native) for native in (None, False)}

    def entropies(x):
        entries = [
            Entry(regularizer, "", moments=ops.batch_moments(units, native=native))
            for units in (x, x[:, :4])
            for native, regularizer in regularizers.items()
        ]
        zero = tf.zeros(())
        merged, _ = module.synchronize(entries, zero, zero)
        return [entry.entropy for entry in merged] + [
            tf.reduce_sum(tf.cast(tf.math.is_nan(each.moments.of_batch[1]), tf.int32))
            for each in merged
        ]

    shards = STRATEGY.experimental_distribute_dataset(
        tf.data.Dataset.from_tensor_slices(x).batch(16)
    )
    run = tf.function(lambda x: STRATEGY.run(entropies, args=(x,)))
    values = [STRATEGY.experimental_local_results(v) for v in run(next(iter(shards)))]
    return np.asarray(values, np.float64).tolist()


@case(2)
def unknown_shapes():
    with STRATEGY.scope():
        inputs = keras.Input((None, 4))
        x = Dense_LBE(4, name="wide")(inputs)
        model = LBEModel(inputs, keras.layers.Dense(1)(x))
        model.compile("sgd", "mse")
    inputs, targets = tf.TensorSpec((2, None, 4)), tf.TensorSpec((2, None, 1))
    data = tf.data.Dataset.from_generator(
        lambda: iter([(tf.ones((2, 3, 4)), tf.ones((2, 3, 1)))]),
        output_signature=(inputs, targets),
    )
    try:
        model.fit(data, verbose=0)
    except ValueError as error:
        return str(error)


@case(2)
def callbacks():
    """Training that is interrupted and goes on, with Keras' callbacks and ours."""
    x, y = samples(64)
    fit = {"batch_size": 16, "shuffle": False, "verbose": 0, "epochs": 4}

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def trained(*more):
        with STRATEGY.scope():
            model = model_of(optimizer=keras.optimizers.Adam(0.01))
        logger = BatchEntropyLogger(x)
        model.fit(x, y, callbacks=[logger, *more], **fit)
        return model, logger

    whole, logger = trained()
    with tempfile.TemporaryDirectory() as folder:
        backup = f"{folder}/backup"
        with contextlib.suppress(KeyboardInterrupt):
            trained(keras.callbacks.BackupAndRestore(backup), Stop())
        checkpoint = keras.callbacks.ModelCheckpoint(f"{folder}/model.keras")
        resumed, _ = trained(keras.callbacks.BackupAndRestore(backup), checkpoint)
        loaded = keras.saving.load_model(f"{folder}/model.keras")  # on one device
    alone = BatchEntropyLogger(x)
    alone.set_model(loaded)
    return {
        "resumed": largest(whole.get_weights(), resumed.get_weights()),
        "loaded": largest(whole.get_weights(), loaded.get_weights()),
        "logged": largest([logger.values[-1]], [alone.measure()]),
    }


def net_of(variant):
    def make():
        inputs = keras.Input(SHAPE)
        regularizer = LBERegularizer(1.0, variant=variant)
        x = Dense_LBE(16, "relu", activity_regularizer=regularizer)(inputs)
        return inputs, keras.layers.Dense(2)(x)

    return make


@case(2)
def one_sided():
    return compare(48, 16, net_of("one_sided"))


@case(2)
def variants_on_units():
    """What is said with synchronization, and whether it trains without."""
    results = {}
    x, y = samples(48)
    for variant in ("units", "std_hinge"):
        for synchronized in (True, False):
            with STRATEGY.scope():
                model = model_of(net_of(variant), synchronized=synchronized)
            try:
                history = model.fit(x, y, batch_size=16, epochs=3, verbose=0).history
                result = history["loss"][-1] < history["loss"][0]
            except ValueError as error:
                result = str(error)
            results[f"{variant} {synchronized}"] = result
    return results


@case(2)
def changing_strength():
    """Weights after a number of each epoch, and a schedule, on one device and two."""
    x, y = samples(48)
    decay = keras.optimizers.schedules.CosineDecay(1.0, 8)
    results = {}
    for name, strengths in {
        "numbers": [0.5, 0.0, 2.0, 0.1],
        "schedule": [decay] * 4,
        "both": [0.5, decay, 0.25, 2.0],
    }.items():

        class Set(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None, strengths=strengths):
                self.model.LBE_strength = strengths[epoch]

        one = model_of()
        with STRATEGY.scope():
            many = model_of()
        histories = [
            model.fit(
                *(x, y),
                batch_size=16,
                epochs=4,
                shuffle=False,
                callbacks=[Set()],
                validation_data=(x, y),
                verbose=0,
            ).history
            for model in (one, many)
        ]
        results[name] = largest(one.get_weights(), many.get_weights())
        results[f"{name} history"] = largest(*(list(h.values()) for h in histories))
    return results


def main():
    results = {}
    chosen = sys.argv[2:] or CASES
    for name in chosen:
        print(name, file=sys.stderr, flush=True)
        function = CASES[name]
        keras.backend.clear_session()
        try:
            results[name] = function()
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
