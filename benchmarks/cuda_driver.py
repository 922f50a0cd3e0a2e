"""As much of a GPU as a benchmark needs, by way of the driver: memory, a stream, graphs, events."""

import ctypes
from collections.abc import Callable

import numpy as np

_MULTIPROCESSORS, _MAJOR, _MINOR, _L2_BYTES = 16, 75, 76, 38  # CUdevice_attribute, cuda.h
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class NoGpuError(RuntimeError):
    """There is no driver, or no device."""


class Gpu:
    """The first device, made current in its primary context: the one that PyTorch uses too."""

    def __init__(self) -> None:
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise NoGpuError("no NVIDIA driver (libcuda.so.1)") from None
        if self._driver.cuInit(0) != 0:
            raise NoGpuError("the NVIDIA driver finds no usable device")
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        if count.value == 0:
            raise NoGpuError("the NVIDIA driver finds no device")
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self.call("cuStreamCreate", ctypes.byref(stream), 1)  # does not wait for the default stream
        name = ctypes.create_string_buffer(100)
        self.call("cuDeviceGetName", name, len(name), device)
        self.name = name.value.decode()
        self.stream: int = stream.value or 0
        self.multiprocessors = self._attribute(device, _MULTIPROCESSORS)
        self.architecture = 10 * self._attribute(device, _MAJOR) + self._attribute(device, _MINOR)
        self.l2_bytes = self._attribute(device, _L2_BYTES)

    def _attribute(self, device: ctypes.c_int, attribute: int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        return value.value

    def call(self, name: str, *arguments: object) -> None:
        """Calls a function of the driver, and raises if it fails."""
        error = getattr(self._driver, name)(*arguments)
        if error != 0:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(error, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()}")

    def synchronize(self) -> None:
        """Waits for the stream."""
        self.call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def array(self, array: np.ndarray, margin: int = 0) -> "GpuArray":
        """Returns a copy of `array` on the device, `margin` bytes from the ends of its memory."""
        return GpuArray(self, array, margin)

    def copy(self, to: "GpuArray", source: "GpuArray", size: int) -> None:
        """Copies `size` bytes on the stream."""
        self.call(
            "cuMemcpyDtoDAsync_v2",
            ctypes.c_uint64(to.pointer),
            ctypes.c_uint64(source.pointer),
            ctypes.c_size_t(size),
            ctypes.c_void_p(self.stream),
        )

    def graph(self, launch: Callable[[], object]) -> Callable[[], None]:
        """Returns a function that replays what `launch` puts on the stream."""
        stream, graph, executable = (
            ctypes.c_void_p(self.stream),
            ctypes.c_void_p(),
            ctypes.c_void_p(),
        )
        self.call("cuStreamBeginCapture_v2", stream, _RELAXED)
        launch()
        self.call("cuStreamEndCapture", stream, ctypes.byref(graph))
        self.call(
            "cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0)
        )
        return lambda: self.call("cuGraphLaunch", executable, stream)

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        """Returns how long the device takes for what `run` puts on the stream, on average."""
        begin, end, elapsed = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_float()
        for event in (begin, end):
            self.call("cuEventCreate", ctypes.byref(event), 0)
        self.call("cuEventRecord", begin, ctypes.c_void_p(self.stream))
        for _ in range(repeats):
            run()
        self.call("cuEventRecord", end, ctypes.c_void_p(self.stream))
        self.call("cuEventSynchronize", end)
        self.call("cuEventElapsedTime", ctypes.byref(elapsed), begin, end)
        for event in (begin, end):
            self.call("cuEventDestroy_v2", event)
        return elapsed.value / 1e3 / repeats


class GpuArray:
    """An array on the device: for `native` by its pointer, for PyTorch by DLPack."""

    def __init__(self, gpu: Gpu, array: np.ndarray, margin: int):
        self._gpu, self._margin = gpu, margin
        self.dtype, self.shape, self.nbytes = array.dtype, array.shape, array.nbytes
        self._base = ctypes.c_uint64()
        gpu.call("cuMemAlloc_v2", ctypes.byref(self._base), ctypes.c_size_t(self._size))
        self.pointer: int = self._base.value + margin
        self._exports: list[DLManagedTensor] = []
        self._shape = (ctypes.c_int64 * len(self.shape))(*self.shape)
        self.fill(array)

    def __del__(self) -> None:
        self._gpu.call("cuMemFree_v2", self._base)

    @property
    def _size(self) -> int:
        return max(1, self.nbytes + 2 * self._margin)

    def fill(self, array: np.ndarray | None = None, byte: int = 0xA5) -> None:
        """Sets margins and contents to `byte`, or contents to `array`."""
        memory = np.full(self._size, byte, np.uint8)
        if array is not None:
            contents = np.frombuffer(array.tobytes(), np.uint8)
            memory[self._margin : self._margin + self.nbytes] = contents
        self._gpu.call(
            "cuMemcpyHtoD_v2", self._base, ctypes.c_void_p(memory.ctypes.data), memory.nbytes
        )

    def numpy(self) -> np.ndarray:
        """Returns a copy on the host. The margins must be as `fill` left them."""
        self._gpu.synchronize()
        memory = np.empty(self._size, np.uint8)
        self._gpu.call(
            "cuMemcpyDtoH_v2", ctypes.c_void_p(memory.ctypes.data), self._base, memory.nbytes
        )
        margins = memory[: self._margin], memory[self._margin + self.nbytes :]
        if self._margin and not all((margin == 0xA5).all() for margin in margins):
            raise AssertionError("a kernel wrote outside of its array")
        contents = memory[self._margin : self._margin + self.nbytes]
        return contents.view(self.dtype).reshape(self.shape)

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)  # kDLCUDA

    def __dlpack__(self, *, stream: int | None = None) -> object:
        code = 4 if self.dtype.name == "bfloat16" else 2
        bits = 8 * self.dtype.itemsize
        tensor = DLManagedTensor(
            data=self.pointer,
            device_type=2,
            ndim=len(self.shape),
            type_code=code,
            type_bits=bits,
            type_lanes=1,
            shape=self._shape,
        )
        self._exports.append(tensor)  # consumers may look at it until they are done
        return _new_capsule(ctypes.addressof(tensor), b"dltensor", None)


class DLManagedTensor(ctypes.Structure):
    """As in dlpack.h; no deleter, since the array owns what it points to."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("type_bits", ctypes.c_uint8),
        ("type_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager_context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
