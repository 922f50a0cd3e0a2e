"""The kernels on NumPy and device arrays, without TensorFlow (csrc/python_bindings.cc)."""

from collections.abc import Sequence
from typing import Any

def weight_norm(
    v: Any,
    g: Any,
    axis: int | Sequence[int] | None = -1,
    out_dtype: Any = None,
    *,
    out: tuple[Any, Any] | None = None,
    threads: int = 0,
    stream: int = 0,
    scratch: Any = None,
) -> tuple[Any, Any]: ...
def weight_norm_grad(
    grad_w: Any,
    v: Any,
    g: Any,
    norm: Any,
    axis: int | Sequence[int] | None = -1,
    *,
    out: tuple[Any, Any] | None = None,
    threads: int = 0,
    stream: int = 0,
    scratch: Any = None,
) -> tuple[Any, Any]: ...
def build_info() -> dict[str, Any]: ...
