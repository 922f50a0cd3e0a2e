"""What a benchmark needs from the CUDA driver: memory, a stream, graphs, events."""

import ctypes
import math
from collections.abc import Callable

import numpy as np

_MULTIPROCESSORS, _MAJOR, _MINOR, _L2_BYTES = 16, 75, 76, 38  # CUdevice_attribute, cuda.h
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

# to[i] = a[i] + b[i], one vector of 16 bytes per thread: the least traffic of any backward pass. It
# is written in PTX, which every driver compiles, so it needs no nvcc.
_ADD_THREADS = 256
_ADD = b"""
.version 6.4
.target sm_75
.address_size 64
.visible .entry add(.param .u64 to, .param .u64 a, .param .u64 b, .param .u64 count)
{
  .reg .pred %p<2>;
  .reg .b32 %x<9>;
  .reg .b64 %n<9>;
  ld.param.u64 %n1, [to];
  ld.param.u64 %n2, [a];
  ld.param.u64 %n3, [b];
  ld.param.u64 %n4, [count];
  mov.u32 %x1, %ctaid.x;
  mul.wide.u32 %n5, %x1, 256;
  mov.u32 %x2, %tid.x;
  cvt.u64.u32 %n6, %x2;
  add.u64 %n5, %n5, %n6;
  setp.ge.u64 %p1, %n5, %n4;
  @%p1 bra done;
  shl.b64 %n5, %n5, 4;
  add.u64 %n1, %n1, %n5;
  add.u64 %n2, %n2, %n5;
  add.u64 %n3, %n3, %n5;
  ld.global.v4.u32 {%x1, %x2, %x3, %x4}, [%n2];
  ld.global.v4.u32 {%x5, %x6, %x7, %x8}, [%n3];
  add.u32 %x1, %x1, %x5;
  add.u32 %x2, %x2, %x6;
  add.u32 %x3, %x3, %x7;
  add.u32 %x4, %x4, %x8;
  st.global.v4.u32 [%n1], {%x1, %x2, %x3, %x4};
done:
  ret;
}
"""


class NoGpuError(RuntimeError):
    """There is no driver, or no device."""


class Gpu:
    """The first device, with its primary context made current, which PyTorch also uses."""

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
        module, self._add = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(_ADD))
        self.call("cuModuleGetFunction", ctypes.byref(self._add), module, ctypes.c_char_p(b"add"))

    def _attribute(self, device: ctypes.c_int, attribute: int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        return value.value

    def call(self, name: str, *arguments: object) -> None:
        """Calls a function of the driver, and raises RuntimeError if it fails."""
        error = getattr(self._driver, name)(*arguments)
        if error != 0:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(error, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()}")

    def synchronize(self) -> None:
        """Waits for the stream."""
        self.call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def array(self, array: np.ndarray, margin: int = 0) -> "GpuArray":
        """Returns a copy of `array` on the device, with `margin` bytes before and after it."""
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

    def add(self, to: "GpuArray", a: "GpuArray", b: "GpuArray", size: int) -> None:
        """Adds the whole 16-byte vectors in the first `size` bytes, on the stream."""
        count = size // 16
        if count == 0:
            return
        values = [ctypes.c_uint64(x) for x in (to.pointer, a.pointer, b.pointer, count)]
        pointers = (ctypes.c_void_p * 4)(*map(ctypes.addressof, values))
        self.call(
            "cuLaunchKernel",
            self._add,
            *map(ctypes.c_uint, (-(-count // _ADD_THREADS), 1, 1, _ADD_THREADS, 1, 1, 0)),
            ctypes.c_void_p(self.stream),
            pointers,
            None,
        )

    def free_bytes(self) -> int:
        """Returns the free memory of the device, in bytes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

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
        """Returns the device's average time for what `run` puts on the stream."""
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
    """An array on the device, passed to `native` by its pointer and to PyTorch by DLPack.

    All accesses use the one stream. The driver's plain copies from ordinary memory use a stream of
    their own, and may return before the device has the bytes.
    """

    def __init__(self, gpu: Gpu, array: np.ndarray, margin: int):
        self._allocate(gpu, array.dtype, array.shape, margin)
        self.fill(array)

    @classmethod
    def empty(cls, gpu: Gpu, dtype, shape: tuple[int, ...]) -> "GpuArray":
        """Returns an uninitialized array."""
        array = cls.__new__(cls)
        array._allocate(gpu, np.dtype(dtype), shape, 0)
        return array

    def _allocate(self, gpu: Gpu, dtype: np.dtype, shape: tuple[int, ...], margin: int) -> None:
        self._gpu, self._margin = gpu, margin
        self.dtype, self.shape = dtype, shape
        self.nbytes = math.prod(shape) * dtype.itemsize
        self._base = ctypes.c_uint64()
        gpu.call("cuMemAlloc_v2", ctypes.byref(self._base), ctypes.c_size_t(self._size))
        self.pointer: int = self._base.value + margin
        self._exports: list[DLManagedTensor] = []
        self._shape = (ctypes.c_int64 * len(shape))(*shape)

    def __del__(self) -> None:
        if self._base.value:
            self._gpu.call("cuMemFree_v2", self._base)

    @property
    def _size(self) -> int:
        return max(1, self.nbytes + 2 * self._margin)

    def fill(self, array: np.ndarray | None = None, byte: int = 0xA5) -> None:
        """Sets the margins to `byte`, and the contents to `array` or, without one, to `byte`."""
        memory = np.full(self._size, byte, np.uint8)
        if array is not None:
            contents = np.frombuffer(array.tobytes(), np.uint8)
            memory[self._margin : self._margin + self.nbytes] = contents
        self.write(memory, -self._margin)

    def write(self, memory: np.ndarray, offset: int = 0) -> None:
        """Copies host memory to `offset` bytes after the start, and waits for the copy."""
        self._gpu.call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(self.pointer + offset),
            ctypes.c_void_p(memory.ctypes.data),
            ctypes.c_size_t(memory.nbytes),
            ctypes.c_void_p(self._gpu.stream),
        )
        self._gpu.synchronize()

    def read(self, offset: int, size: int) -> np.ndarray:
        """Returns `size` bytes from `offset` bytes after the start."""
        memory = np.empty(size, np.uint8)
        self._gpu.call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(memory.ctypes.data),
            ctypes.c_uint64(self.pointer + offset),
            ctypes.c_size_t(size),
            ctypes.c_void_p(self._gpu.stream),
        )
        self._gpu.synchronize()
        return memory

    def repeat(self, block: np.ndarray) -> None:
        """Fills the array with copies of a block, whose size must divide the array's."""
        assert self.nbytes % block.nbytes == 0
        self.write(np.ascontiguousarray(block))
        done = block.nbytes
        while done < self.nbytes:
            size = min(done, self.nbytes - done)
            self._gpu.call(
                "cuMemcpyDtoDAsync_v2",
                ctypes.c_uint64(self.pointer + done),
                ctypes.c_uint64(self.pointer),
                ctypes.c_size_t(size),
                ctypes.c_void_p(self._gpu.stream),
            )
            done += size
        self._gpu.synchronize()

    def numpy(self) -> np.ndarray:
        """Returns a copy on the host, after checking that the margins are as `fill` left them."""
        memory = self.read(-self._margin, self._size)
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
        self._exports.append(tensor)  # must outlive its consumers
        return _new_capsule(ctypes.addressof(tensor), b"dltensor", None)


class DLManagedTensor(ctypes.Structure):
    """As in dlpack.h, without a deleter, because the array owns the memory."""

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
