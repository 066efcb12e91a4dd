# SPDX-License-Identifier: Apache-2.0
"""Private names of Keras and TensorFlow stand in one file, which can do without."""

import ast
import pathlib
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import run_script, samples

import lbe_ops
from lbe_ops import (
    LBE,
    Conv2D_LBE,
    Dense_LBE,
    LBEModel,
    LBERegularizer,
    keras_internals,
)
from lbe_ops.loss import LBELoss

# Keras reads a variable into NumPy 2 in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")

PACKAGE = pathlib.Path(lbe_ops.__file__).parent
SOURCES = {
    path: ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "keras_internals.py"
}


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def own_names():
    """Every private name that this package gives to something itself."""
    names = set()
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute | ast.Name) and isinstance(
                node.ctx, ast.Store
            ):
                names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return names


def private_uses(tree, own):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in own:
                yield node.lineno, node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [getattr(node, "module", None) or ""]
            modules += [alias.name for alias in node.names]
            for name in modules:
                if name.startswith(
                    ("keras.src", "tensorflow.python", "tensorflow.core")
                ):
                    yield node.lineno, name
        elif isinstance(node, ast.Constant) and str(node.value).startswith(
            ("keras.src.", "tensorflow.python.")
        ):
            yield node.lineno, node.value


def test_no_other_file_uses_a_private_name():
    own = own_names()
    found = {
        f"{path.name}:{line}": name
        for path, tree in SOURCES.items()
        for line, name in private_uses(tree, own)
    }
    assert not found


def test_such_a_use_would_be_found():
    text = "import keras.src.ops\nx = layer._losses\nfrom tensorflow.python import a"
    assert [name for _, name in private_uses(ast.parse(text), set())] == [
        "keras.src.ops",
        "tensorflow.python",
        "_losses",
    ]


@pytest.mark.parametrize(
    "make, base",
    [
        (lambda: LBERegularizer(), keras.layers.Layer),
        (lambda: LBE(), keras.layers.Layer),
        (lambda: LBELoss(dict, "loss"), keras.layers.Layer),
        (lambda: Dense_LBE(3), lambda: keras.layers.Dense(3)),
        (lambda: Conv2D_LBE(3, 3), lambda: keras.layers.Conv2D(3, 3)),
        (lambda: LBEModel(), keras.Model),
    ],
    ids=["LBERegularizer", "LBE", "LBELoss", "Dense_LBE", "Conv2D_LBE", "LBEModel"],
)
def test_no_private_name_of_ours_is_one_of_keras(make, base):
    """A method of ours in place of one of Keras' would be called by Keras."""
    ours, theirs = make(), base()
    defined = set()
    meant = keras_internals.MultiWorkerTraining  # which Keras is to call
    for cls in type(ours).__mro__:
        if cls.__module__.startswith("lbe_ops") and cls is not meant:
            defined |= set(vars(cls))
    defined |= set(vars(ours)) - set(vars(theirs))
    shared = {name for name in defined & set(dir(theirs)) if is_private(name)}
    assert not shared


IMPORT = """
import json, sys, types
import keras, tensorflow as tf
from tensorflow.python.eager import record, forwardprop_util  # as lbe_ops does
from tensorflow.python.ops import control_flow_util

def state():
    found = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith(("keras", "tensorflow")) or module is None:
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, types.ModuleType):
                continue
            found[name, key] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                for attribute, inner in list(vars(value).items()):
                    found[name, key, attribute] = id(inner)
    return found

before = state()
import lbe_ops
after = state()
changed = [key for key, value in before.items() if after.get(key) != value]
new = [k for k in after if k not in before and k[0] in {b[0] for b in before}]
print(json.dumps([changed, new]))
"""


def test_importing_this_package_changes_nothing_of_keras_and_tensorflow():
    changed, new = run_script(IMPORT)
    # TensorFlow's own caches, counters and lazy loaders.
    allowed = ("abc", "_cache", "__warningregistry__", "_abc_impl")
    assert [c for c in changed if not any(a in c[-1] for a in allowed)] == []
    assert [c for c in new if not any(a in c[-1] for a in allowed)] == []


# What each function says of a Keras or TensorFlow that lacks the name. --------------


X, Y = samples(12, 5), samples(12, 2, seed=1)


def losses(**compiled):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    x = Dense_LBE(4, activation="relu")(inputs)
    x = keras.layers.Dense(4, activity_regularizer=LBERegularizer())(x)
    model = LBEModel(inputs, keras.layers.Dense(2)(x))
    model.compile(**{"optimizer": "sgd", "loss": "mse", **compiled})
    return model.fit(X, Y, epochs=2, verbose=0).history["loss"]


def without_modules(monkeypatch):
    monkeypatch.setattr(keras_internals, "_module", lambda name: None)


def test_training_without_the_eager_modules_of_tensorflow(monkeypatch):
    expected = losses()
    without_modules(monkeypatch)
    assert keras_internals.gradients_are_recorded()
    assert not keras_internals.compiled_by_xla()
    np.testing.assert_allclose(losses(), expected, rtol=1e-5)


def test_a_module_that_is_missing_is_none():
    assert keras_internals._module("tensorflow.python.there_is_none") is None


def test_layers_without_flatten_layers():
    class Model:
        def __init__(self, *layers):
            self.layers = list(layers)

    leaves = [types.SimpleNamespace() for _ in range(3)]
    inner = Model(leaves[1], leaves[2])
    found = keras_internals.flatten_layers(Model(leaves[0], inner, leaves[1]))
    assert found == [leaves[0], inner, leaves[1], leaves[2]]


def test_exclusions_without_the_names_of_optimizers():
    class Optimizer:
        built = False
        excluded = None

        def exclude_from_weight_decay(self, var_list=None, var_names=None):
            self.excluded = var_names

    optimizer = Optimizer()
    keras_internals.exclude_from_weight_decay(optimizer, "lbe_alpha")
    assert optimizer.excluded == ["lbe_alpha"]


def test_layers_are_in_the_order_of_the_model():
    inputs = keras.Input((5,))
    block = keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(4)])
    model = keras.Model(inputs, keras.layers.Dense(2)(block(inputs)))
    dense = [
        layer.units
        for layer in keras_internals.flatten_layers(model)
        if isinstance(layer, keras.layers.Dense)
    ]
    assert dense == [3, 4, 2]


def test_the_graph_of_xla_is_known_while_it_is_traced():
    seen = []

    def function(x):
        seen.append(keras_internals.compiled_by_xla())
        return x

    for jit_compile in (False, True):
        tf.function(function, jit_compile=jit_compile).get_concrete_function(
            tf.TensorSpec(())
        )
    assert seen == [False, True]
    assert "tensorflow.python.ops.control_flow_util" in sys.modules
