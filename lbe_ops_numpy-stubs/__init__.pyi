# SPDX-License-Identifier: Apache-2.0
"""The types of `lbe_ops_numpy`, which is compiled; `help()` of it says what they mean.

NumPy arrays give NumPy arrays, and arrays on a GPU `CudaArray`s. That class and the
functions whose names begin with `cuda_`, but for `cuda_system`, are in builds with CUDA
alone.
"""

from typing import Any, Literal, Protocol, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

class _OnGpu(Protocol):
    """An array of CuPy, PyTorch, JAX, or a `CudaArray`."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...

_Array: TypeAlias = NDArray[Any]
_Entropy: TypeAlias = np.floating[Any]
_Activation: TypeAlias = Literal[
    "linear", "relu", "leaky_relu", "elu", "selu", "tanh", "sigmoid", "softplus"
]
_Bits: TypeAlias = Literal["float16", "bfloat16"]

@overload
def batch_entropy(
    x: _Array,
    *,
    out: tuple[_Array, _Array, _Array] | None = None,
    workspace: None = None,
    scale: float = 8.539734222673566,
    offset: float = 1.0,
    ddof: int = 0,
    threads: int = 1,
    dtype: None = None,
    stream: None = None,
    blocks: int = 0,
) -> tuple[_Entropy, _Array, _Array]: ...
@overload
def batch_entropy(
    x: _OnGpu,
    *,
    out: tuple[_OnGpu, _OnGpu, _OnGpu] | None = None,
    workspace: _OnGpu | None = None,
    scale: float = 8.539734222673566,
    offset: float = 1.0,
    ddof: int = 0,
    threads: int = 1,
    dtype: _Bits | None = None,
    stream: int | None = None,
    blocks: int = 0,
) -> tuple[CudaArray, CudaArray, CudaArray]: ...
@overload
def batch_entropy_grad(
    x: _Array,
    mean: _Array,
    variance: _Array,
    entropy_grad: float | _Array = 1.0,
    *,
    mean_grad: _Array | None = None,
    variance_grad: _Array | None = None,
    dx: _Array | None = None,
    scale: float = 8.539734222673566,
    offset: float = 1.0,
    ddof: int = 0,
    threads: int = 1,
    dtype: None = None,
    stream: None = None,
    blocks: int = 0,
) -> _Array: ...
@overload
def batch_entropy_grad(
    x: _OnGpu,
    mean: _OnGpu,
    variance: _OnGpu,
    entropy_grad: float | _OnGpu = 1.0,
    *,
    mean_grad: _OnGpu | None = None,
    variance_grad: _OnGpu | None = None,
    dx: _OnGpu | None = None,
    scale: float = 8.539734222673566,
    offset: float = 1.0,
    ddof: int = 0,
    threads: int = 1,
    dtype: _Bits | None = None,
    stream: int | None = None,
    blocks: int = 0,
) -> CudaArray: ...
@overload
def epilogue(
    z: _Array,
    bias: _Array | None = None,
    *,
    activation: _Activation = "linear",
    slope: float = 0.0,
    y: _Array | None = None,
    out: tuple[_Array, _Array, _Array] | None = None,
    workspace: None = None,
    scale: float = 8.539734222673566,
    offset: float = 1.0,
    ddof: int = 0,
    threads: int = 1,
    dtype: None = None,
    stream: None = None,
    blocks: int = 0,
) -> tuple[_Array, _Entropy, _Array, _Array]: ...
@overload
def epilogue(
    z: _OnGpu,
    bias: _OnGpu | None = None,
    *,
    activation: _Activation = "linear",
    slope: float = 0.0,
    y: _OnGpu | None = None,
    out: tuple[_OnGpu, _OnGpu, _OnGpu] | None = None,
    workspace: _OnGpu | None = None,
    scale: float = 8.539734222673566,
    offset: float = 1.0,
    ddof: int = 0,
    threads: int = 1,
    dtype: _Bits | None = None,
    stream: int | None = None,
    blocks: int = 0,
) -> tuple[CudaArray, CudaArray, CudaArray, CudaArray]: ...
@overload
def epilogue_grad(
    dy: _Array,
    y: _Array,
    mean: _Array,
    variance: _Array,
    entropy_grad: float | _Array = 1.0,
    *,
    activation: _Activation = "linear",
    slope: float = 0.0,
    bias_grad: bool = False,
    dz: _Array | None = None,
    dbias: _Array | None = None,
    workspace: None = None,
    scale: float = 8.539734222673566,
    offset: float = 1.0,
    ddof: int = 0,
    threads: int = 1,
    dtype: None = None,
    stream: None = None,
    blocks: int = 0,
) -> tuple[_Array, _Array | None]: ...
@overload
def epilogue_grad(
    dy: _OnGpu,
    y: _OnGpu,
    mean: _OnGpu,
    variance: _OnGpu,
    entropy_grad: float | _OnGpu = 1.0,
    *,
    activation: _Activation = "linear",
    slope: float = 0.0,
    bias_grad: bool = False,
    dz: _OnGpu | None = None,
    dbias: _OnGpu | None = None,
    workspace: _OnGpu | None = None,
    scale: float = 8.539734222673566,
    offset: float = 1.0,
    ddof: int = 0,
    threads: int = 1,
    dtype: _Bits | None = None,
    stream: int | None = None,
    blocks: int = 0,
) -> tuple[CudaArray, CudaArray | None]: ...
def build_info() -> dict[str, str]: ...
def cuda_system(device: int = 0) -> dict[str, str]: ...
def simd_level() -> str: ...

class CudaArray:
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    def numpy(self) -> _Array: ...

def cuda_array(array: _Array, *, stream: int | None = None) -> CudaArray: ...
def cuda_workspace_bytes(
    x: _OnGpu, *, epilogue: bool = False, dtype: _Bits | None = None, blocks: int = 0
) -> int: ...
def cuda_grad_workspace_bytes(y: _OnGpu, *, dtype: _Bits | None = None) -> int: ...
