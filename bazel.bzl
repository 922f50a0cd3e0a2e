"""The build's external repositories, all of which come from this machine.

@python: the headers and libraries of the installed TensorFlow, pybind11 and Python.
@rules_cc: Bazel's native C++ rules under the names that its own toolchain loads, so that nothing
is downloaded.
"""

_PROBE = """
import os, sysconfig
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import pybind11
import tensorflow as tf
flags = [f for f in tf.sysconfig.get_compile_flags() if f.startswith("-D")]
print("FOUND", tf.sysconfig.get_lib(), pybind11.get_include(), sysconfig.get_path("include"),
      tf.__version__, ",".join(flags), sep="\t")
"""

_BUILD = """
package(default_visibility = ["//visibility:public"])

cc_library(
    name = "tensorflow_headers",
    hdrs = glob(["tensorflow/include/**"]),
    defines = {defines},
    includes = [
        "tensorflow/include",
        "tensorflow/include/external/farmhash_archive/src",
        "tensorflow/include/external/highwayhash",
    ],
)

cc_library(
    name = "tensorflow_framework",
    srcs = ["tensorflow/libtensorflow_framework.so.2"],
    deps = [":tensorflow_headers"],
)

cc_library(
    name = "tensorflow_cc",
    srcs = ["tensorflow/libtensorflow_cc.so.2"],
    deps = [":tensorflow_framework"],
)

cc_library(
    name = "pybind11",
    hdrs = glob(["pybind11/**", "python/**"]),
    defines = ['TFWN_TENSORFLOW_VERSION=\\\\"{version}\\\\"'],
    includes = ["pybind11", "python"],
)
"""

def _installed_python_impl(context):
    python = context.os.environ.get("PYTHON", "python3")
    if "/" not in python:
        python = str(context.which(python) or fail("no %s on PATH; set PYTHON to a path" % python))
    result = context.execute([python, "-c", _PROBE])
    found = [line for line in result.stdout.splitlines() if line.startswith("FOUND\t")]
    if not found:
        fail("%s cannot import TensorFlow and pybind11: %s" % (python, result.stderr))
    _, tensorflow, pybind11, headers, version, flags = found[0].split("\t")
    context.symlink(tensorflow, "tensorflow")
    context.symlink(pybind11, "pybind11")
    context.symlink(headers, "python")
    defines = [flag[len("-D"):] for flag in flags.split(",")]
    context.file("BUILD", _BUILD.format(defines = defines, version = version))

installed_python = repository_rule(
    implementation = _installed_python_impl,
    environ = ["PYTHON"],
    local = True,
)

_RULES = ["cc_binary", "cc_library", "cc_toolchain", "cc_toolchain_suite"]

def _native_rules_cc_impl(context):
    context.file("BUILD")
    rule = "def {name}(**attributes):\n    native.{name}(**attributes)\n"
    context.file("cc/BUILD")
    context.file("cc/defs.bzl", "\n".join([rule.format(name = name) for name in _RULES]))

native_rules_cc = repository_rule(implementation = _native_rules_cc_impl)
