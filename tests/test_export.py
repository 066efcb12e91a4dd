# SPDX-License-Identifier: Apache-2.0
"""What was exported is served: by each consumer, without this package, as `predict`."""

import inspect
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import require_native, run_script, samples

import lbe_ops
from lbe_ops import LBE, Conv2D_LBE, Dense_LBE, LBEModel, LBERegularizer, add_lbe

# Keras reads a variable into NumPy 2 in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")

X = samples(12, 6, 6, 1)


def outputs_of(inputs):
    """Every kind of layer that has LBE."""
    x = Conv2D_LBE(3, 3, activation="relu")(inputs)
    x = keras.layers.Flatten()(x)
    x = Dense_LBE(4, activation="tanh")(x)
    regularizer = LBERegularizer(other_activity_regularizer="l2")
    x = keras.layers.Dense(4, "elu", activity_regularizer=regularizer)(x)
    return keras.layers.Dense(2)(LBE()(x))


class Subclassed(LBEModel):
    def __init__(self):
        super().__init__()
        self.flatten = keras.layers.Flatten()
        self.first = Dense_LBE(4, activation="relu")
        self.second = keras.layers.Dense(2, activity_regularizer=LBERegularizer())

    def call(self, x):
        return self.second(self.first(self.flatten(x)))


def functional(model=LBEModel):
    inputs = keras.Input(X.shape[1:])
    return model(inputs, outputs_of(inputs))


def subclassed():
    model = Subclassed()
    model(X)
    return model


def original():
    """A plain model of layers whose alphas an LBEModel keeps."""
    lbe = functional()
    model = keras.Model(lbe.input, lbe.output)
    model.lbe = [lbe]  # or its alphas would be gone
    return model


def added():
    plain = keras.Sequential([keras.Input(X.shape[1:]), keras.layers.Flatten()])
    plain.add(keras.layers.Dense(2))
    return add_lbe(plain, keras.layers.Dense)


MODELS = {
    "functional": functional,
    "subclassed": subclassed,
    "plain": lambda: functional(keras.Model),
    "original": original,
    "added": added,
}


def made(kind, trained):
    model = MODELS[kind]()
    model.compile("adam", "mse")
    if trained:
        y = (
            samples(12, *model.output_shape[1:])
            if kind != "subclassed"
            else X[:, 0, :2, 0]
        )
        model.fit(X, y, validation_data=(X, y), verbose=0)
    return model


SERVE = """
import sys
sys.modules["lbe_ops"] = None  # an import of it fails
import numpy as np, tensorflow as tf
x = np.load("x.npy")
for folder in sys.argv[1:]:
    served = tf.saved_model.load(folder)
    (y,) = served.signatures["serving_default"](tf.constant(x)).values()
    np.save(folder + ".npy", y)
    if folder.endswith("_saved"):
        continue  # the other two take no such model of Keras, whatever its layers
    # As TensorFlow Serving restores it: by names, in a session.
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        loaded = tf.compat.v1.saved_model.loader.load(session, ["serve"], folder)
        signature = loaded.signature_def["serving_default"]
        (given,), (wanted,) = signature.inputs.values(), signature.outputs.values()
        np.save(folder + ".classic.npy", session.run(wanted.name, {given.name: x}))
    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    content = converter.convert()
    interpreter = tf.lite.Interpreter(model_content=content)
    (given,) = interpreter.get_input_details()
    interpreter.resize_tensor_input(given["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], x)
    interpreter.invoke()
    (wanted,) = interpreter.get_output_details()
    np.save(folder + ".lite.npy", interpreter.get_tensor(wanted["index"]))
"""


@pytest.mark.long
def test_exported_models_are_served_without_this_package(tmp_path):
    expected = {}
    for kind in MODELS:
        for trained in (False, True):
            model = made(kind, trained)
            for how in ("exported", "saved"):
                folder = f"{kind}_{trained}_{how}"
                if how == "exported":
                    model.export(tmp_path / folder, verbose=False)
                elif trained:  # Keras' own models have no signature before
                    tf.saved_model.save(model, str(tmp_path / folder))
                else:
                    continue
                expected[folder] = model.predict(X, verbose=0)
                content = (tmp_path / folder / "saved_model.pb").read_bytes()
                assert b"LBE>" not in content, folder
    np.save(tmp_path / "x.npy", X)
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SERVE, *expected],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        check=True,
    )
    for folder, outputs in expected.items():
        others = [] if folder.endswith("_saved") else [".classic.npy", ".lite.npy"]
        for suffix in (".npy", *others):
            served = np.load(tmp_path / f"{folder}{suffix}")
            np.testing.assert_allclose(
                served, outputs, rtol=1e-5, atol=1e-6, err_msg=folder + suffix
            )


@pytest.mark.filterwarnings("ignore:In the future `np.object`:FutureWarning")
@pytest.mark.parametrize("kind", MODELS)
def test_onnx(kind, tmp_path):
    import onnxruntime

    model = made(kind, trained=True)
    path = str(tmp_path / "model.onnx")
    model.export(path, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(path)
    (given,) = session.get_inputs()
    (served,) = session.run(None, {given.name: X})
    expected = model.predict(X, verbose=0)
    np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-6)


LOAD = """
import json, sys
import tensorflow as tf
import lbe_ops
module = tf.saved_model.load(sys.argv[1])
entropy, gradient = module.entropy(tf.constant([[0.0, 1.0], [2.0, 1.0]]))
print(json.dumps([float(entropy), gradient.numpy().tolist()]))
"""


def test_importing_is_enough_for_a_saved_model_that_holds_the_op(tmp_path):
    require_native()

    @tf.function(input_signature=[tf.TensorSpec((None, 2))])
    def entropy_and_gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            entropy = lbe_ops.batch_entropy(x, native=True)
        return entropy, tape.gradient(entropy, x)

    module = tf.Module()
    module.entropy = entropy_and_gradient
    tf.saved_model.save(module, str(tmp_path))
    entropy, gradient = run_script(LOAD, tmp_path)
    assert entropy == pytest.approx(0.5638664, rel=1e-6)
    x = tf.constant([[0.0, 1.0], [2.0, 1.0]])
    np.testing.assert_allclose(gradient, entropy_and_gradient(x)[1], rtol=1e-6)


ELSEWHERE = """
import json, sys
import keras
keras.config.backend = keras.backend.backend = lambda: "jax"
try:
    import lbe_ops
except ImportError as error:
    print(json.dumps(str(error)))
"""


def test_another_backend_of_keras_is_an_error_at_import():
    message = run_script(ELSEWHERE)
    assert "TensorFlow backend" in message and "Received: backend='jax'" in message


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
@pytest.mark.parametrize("filters", [None, "first", ["first"], lambda x: True])
def test_quantization_is_that_of_the_net_without_lbe(filters, tmp_path):
    if filters and "filters" not in inspect.signature(keras.Model.quantize).parameters:
        pytest.skip("this Keras has no filters")

    def net(lbe):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((5,))
        arguments = {"activity_regularizer": LBERegularizer()} if lbe else {}
        layer_class = Dense_LBE if lbe else keras.layers.Dense
        x = layer_class(8, activation="relu", name="first")(inputs)
        x = keras.layers.Dense(8, activation="tanh", name="second", **arguments)(x)
        model = LBEModel if lbe else keras.Model
        return model(inputs, keras.layers.Dense(2, name="third")(x))

    x = samples(12, 5)
    results = []
    for lbe in (False, True):
        model = net(lbe)
        model.predict(x, verbose=0)  # with a graph of the layers as they are
        arguments = {} if filters is None else {"filters": filters}
        model.quantize("int8", **arguments)
        modes = [
            model.get_layer(n).quantization_mode for n in ("first", "second", "third")
        ]
        results.append((modes, model.predict(x, verbose=0)))
    assert results[0][0] == results[1][0]
    assert results[1][0][0] == "int8"
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)
    model.compile("sgd", "mse")  # LBE stays part of the loss
    logs = model.evaluate(x, results[0][1] + 1, return_dict=True, verbose=0)
    assert logs["max_lbe"] > 0
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        loaded.predict(x, verbose=0), results[1][1], rtol=1e-5, atol=1e-6
    )


def test_a_configuration_is_json():
    config = json.loads(functional().to_json())
    assert config["registered_name"] == "lbe_ops>LBEModel"
