"""Checks that every public object has a docstring with an example, and that examples run."""

import doctest
import inspect
import types

import numpy as np
import pytest
import tensorflow as tf

import tfwn.keras


def public_objects():
    """Returns every object that `tfwn` and its public modules export, by qualified name."""
    found = {}
    modules = [tfwn, tfwn.keras]
    while modules:
        module = modules.pop()
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, types.ModuleType):
                modules.append(value)
            else:
                found[f"{module.__name__}.{name}"] = value
    return found


PUBLIC = public_objects()
every_object = pytest.mark.parametrize("name", PUBLIC)


@every_object
def test_docstring(name):
    value = PUBLIC[name]
    doc = inspect.getdoc(value)
    assert doc, "no docstring"
    first = doc.splitlines()[0]
    assert first.endswith((".", ":")), f"the first line is not a sentence: {first}"
    assert ">>>" in doc, "no example"


@every_object
def test_examples(name):
    value = PUBLIC[name]
    variables = {"tf": tf, "np": np, "tfwn": tfwn}
    tests = doctest.DocTestFinder().find(value, name, globs=variables)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report = []
    for test in tests:
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)
    assert runner.tries > 0


@every_object
def test_public_methods_have_docstrings(name):
    value = PUBLIC[name]
    if not inspect.isclass(value):
        return
    for method_name, method in inspect.getmembers(value, inspect.isroutine):
        ours = (getattr(method, "__module__", None) or "").split(".")[0] == "tfwn"
        if ours and (method_name == "__call__" or not method_name.startswith("_")):
            assert inspect.getdoc(method), f"{method_name} has no docstring"
            assert method.__name__ == method_name  # Otherwise help() shows two names.
