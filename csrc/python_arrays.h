// Converts Python arrays for the kernels: NumPy arrays, and CUDA device arrays with
// __cuda_array_interface__. Invalid arrays raise ValueError.

#ifndef TFWN_CSRC_PYTHON_ARRAYS_H_
#define TFWN_CSRC_PYTHON_ARRAYS_H_

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef TFWN_CUDA
#include <cuda_runtime_api.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "layout.h"
#include "weight_norm.h"

namespace tfwn {

namespace py = pybind11;

struct Array {
  std::string name;  // of the argument, for messages
  Type type;
  Sizes shape;
  bool contiguous;  // and aligned
  void* data;
  bool writable;
  bool on_device;
  py::object object;  // the caller's array or a copy of it; keeps data alive
};

template <class... Pieces>
[[noreturn]] void Fail(const Pieces&... pieces) {
  std::ostringstream message;
  (message << ... << pieces);
  throw py::value_error(message.str());
}

inline std::string Repr(const py::handle& object) { return py::repr(object).cast<std::string>(); }

inline std::string TypeName(const py::handle& object) {
  return py::type::of(object).attr("__name__").cast<std::string>();
}

inline int64_t BytesOf(const Array& array) {
  return Product(array.shape) * static_cast<int64_t>(SizeOf(array.type));
}

inline const char* NameOf(Type type) {
  switch (type) {
    case Type::kHalf:
      return "float16";
    case Type::kBfloat16:
      return "bfloat16";
    case Type::kFloat:
      return "float32";
    default:
      return "float64";
  }
}

inline py::dtype DTypeOf(Type type) {
  if (type != Type::kBfloat16) return py::dtype(NameOf(type));
  return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
}

inline Type ParseDType(const std::string& name, const py::dtype& dtype) {
  // NumPy's type numbers come first, because looking up names takes longer than a small kernel.
  if (dtype.byteorder() == '=') {
    if (dtype.num() == py::dtype::of<float>().num()) return Type::kFloat;
    if (dtype.num() == py::dtype::of<double>().num()) return Type::kDouble;
  }
  const std::string text = py::str(dtype.attr("name"));
  if (dtype.attr("isnative").cast<bool>()) {
    for (const Type type : {Type::kHalf, Type::kBfloat16, Type::kFloat, Type::kDouble}) {
      if (text == NameOf(type)) return type;
    }
  }
  Fail(name, " must be float16, bfloat16, float32 or float64 in native byte order, but is ",
       Repr(dtype), ". Convert it, for example with astype(np.float32)");
}

inline Type ParseType(const std::string& name, const py::object& dtype) {
  if (py::isinstance<py::str>(dtype) && dtype.cast<std::string>() == "bfloat16") {
    return Type::kBfloat16;
  }
  try {
    return ParseDType(name, py::dtype::from_args(dtype));
  } catch (const py::error_already_set&) {
    Fail(name, " must be a type, such as np.float32 or \"bfloat16\", but is ", Repr(dtype));
  }
}

inline Array ParseNumPy(const std::string& name, const py::array& array) {
  Array result = {
      name, ParseDType(name, array.dtype()), {}, false, nullptr, array.writeable(), false, array};
  result.shape.assign(array.shape(), array.shape() + array.ndim());
  constexpr int kContiguous =
      py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  result.contiguous = (array.flags() & kContiguous) == kContiguous;
  result.data = const_cast<void*>(array.data());
  return result;
}

#ifdef TFWN_CUDA

inline void CheckCuda(int error, const char* what) {
  if (error != 0) {
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cuda::ErrorString(error));
  }
}

// Returns the device that all arrays are on.
inline int DeviceOf(const std::vector<const Array*>& arrays) {
  int device = -1;
  for (const Array* array : arrays) {
    if (Product(array->shape) == 0) continue;
    cudaPointerAttributes attributes;
    CheckCuda(cudaPointerGetAttributes(&attributes, array->data), "look up a pointer");
    if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged) {
      Fail(array->name, " must be in a CUDA device's memory, but its pointer is not");
    }
    if (device >= 0 && attributes.device != device) {
      Fail(array->name, " must be on device ", device, " like the preceding arrays, but is on ",
           attributes.device);
    }
    device = attributes.device;
  }
  if (device < 0) CheckCuda(cudaGetDevice(&device), "find the device");
  return device;
}

// Makes a device current during the lifetime of the object.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    int current = 0;
    CheckCuda(cudaGetDevice(&current), "find the device");
    if (current == device) return;
    CheckCuda(cudaSetDevice(device), "choose the device");
    before_ = current;
  }
  ~OnDevice() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = -1;
};

inline Type ParseTypeString(const std::string& name, const std::string& text) {
  if (text == "<V2") return Type::kBfloat16;  // used by PyTorch and ml_dtypes
  return ParseDType(name, py::dtype(text));
}

inline Array ParseCudaArray(const std::string& name, const py::object& object, intptr_t stream) {
  const py::dict interface = object.attr("__cuda_array_interface__");
  const py::tuple data = interface["data"];
  Array result = {name,
                  ParseTypeString(name, interface["typestr"].cast<std::string>()),
                  interface["shape"].cast<Sizes>(),
                  true,
                  reinterpret_cast<void*>(data[0].cast<uintptr_t>()),
                  !data[1].cast<bool>(),
                  true,
                  object};
  if (interface.contains("strides") && !interface["strides"].is_none()) {
    const auto strides = interface["strides"].cast<std::vector<int64_t>>();
    int64_t expected = SizeOf(result.type);
    for (size_t a = strides.size(); a-- > 0;) {
      // Strides do not matter along axes of size 1 and in empty arrays.
      if (result.shape[a] > 1 && strides[a] != expected && Product(result.shape) > 0) {
        result.contiguous = false;
      }
      expected *= result.shape[a];
    }
  }
  if (interface.contains("stream") && !interface["stream"].is_none()) {
    // The array is ready once this stream has finished the work queued so far.
    const intptr_t producer = interface["stream"].cast<intptr_t>();
    if (producer != stream) {
      const OnDevice on_device(DeviceOf({&result}));  // which the default streams depend on
      cudaEvent_t ready;
      CheckCuda(cudaEventCreateWithFlags(&ready, cudaEventDisableTiming), "create an event");
      int error = cudaEventRecord(ready, reinterpret_cast<cudaStream_t>(producer));
      if (error == 0) error = cudaStreamWaitEvent(reinterpret_cast<cudaStream_t>(stream), ready, 0);
      cudaEventDestroy(ready);
      CheckCuda(error, "wait for the array's stream");
    }
  }
  return result;
}

// Uses `given` as scratch or, if it is null, memory from cudaMallocAsync.
template <class Arguments>
void RunOnDevice(const Arguments& arguments, int device, intptr_t stream_handle,
                 const Array* given) {
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  const OnDevice on_device(device);
  const int64_t bytes = static_cast<int64_t>(cuda::ScratchBytes(arguments.layout));
  if (given != nullptr) {
    if (BytesOf(*given) < bytes) {
      Fail("scratch must have at least ", bytes, " bytes, but has ", BytesOf(*given));
    }
    if (bytes > 0 && reinterpret_cast<uintptr_t>(given->data) % 256 != 0) {
      Fail("scratch must be aligned to 256 bytes, but is at ", given->data);
    }
    CheckCuda(cuda::Run(arguments, given->data, stream), "run weight_norm");
    return;
  }
  void* scratch = nullptr;
  if (bytes > 0) CheckCuda(cudaMallocAsync(&scratch, bytes, stream), "allocate scratch");
  const int error = cuda::Run(arguments, scratch, stream);
  if (scratch != nullptr) cudaFreeAsync(scratch, stream);
  CheckCuda(error, "run weight_norm");
}

#else

inline int DeviceOf(const std::vector<const Array*>&) { return 0; }

template <class Arguments>
void RunOnDevice(const Arguments&, int, intptr_t, const Array*) {}

#endif

// NumPy scalars count as arrays. The array will be used on `stream`.
inline Array ParseArray(const std::string& name, py::object object,
                        [[maybe_unused]] intptr_t stream) {
  if (!py::isinstance<py::array>(object)) {
    const py::module_ numpy = py::module_::import("numpy");
    if (py::isinstance(object, numpy.attr("generic"))) object = numpy.attr("asarray")(object);
  }
  if (py::isinstance<py::array>(object)) {
    return ParseNumPy(name, py::reinterpret_borrow<py::array>(object));
  }
  if (py::hasattr(object, "__cuda_array_interface__")) {
#ifdef TFWN_CUDA
    return ParseCudaArray(name, object, stream);
#else
    Fail(name, " is on a device, but this module was built without CUDA. Rebuild it with ",
         "nvcc installed, or copy ", name, " to a NumPy array");
#endif
  }
  Fail(name, " must be a NumPy array, or a CUDA device array with ",
       "__cuda_array_interface__, but is ", TypeName(object), ". Pass np.asarray(", name, ")");
}

inline Array NewArray(const std::string& name, const Sizes& shape, Type type) {
  return ParseNumPy(name, py::array(DTypeOf(type), shape));
}

// Returns a contiguous copy, transposed by `order` unless that is empty.
inline Array ContiguousCopy(const Array& array, const std::vector<int64_t>& order) {
  py::object view = array.object;
  if (!order.empty()) view = view.attr("transpose")(py::cast(order));
  const py::module_ numpy = py::module_::import("numpy");
  return ParseNumPy(array.name, numpy.attr("require")(view, py::none(), "CA").cast<py::array>());
}

// to.transpose(order)[...] = from, bit for bit.
inline void CopyTransposed(const Array& from, const std::vector<int64_t>& order, const Array& to) {
  const py::object shape = to.object.attr("transpose")(py::cast(order)).attr("shape");
  to.object.attr("transpose")(py::cast(order))
      .attr("__setitem__")(py::ellipsis(), from.object.attr("reshape")(shape));
}

inline void CheckOutput(const Array& array) {
  if (!array.writable) Fail(array.name, " in out must be writable, but is read-only");
  if (!array.contiguous) {
    Fail(array.name, " in out must be contiguous (C order) and aligned, but is not");
  }
}

inline bool Overlap(const Array& a, const Array& b) {
  const auto begin = [](const Array& x) { return reinterpret_cast<uintptr_t>(x.data); };
  return BytesOf(a) > 0 && BytesOf(b) > 0 && begin(a) < begin(b) + BytesOf(b) &&
         begin(b) < begin(a) + BytesOf(a);
}

class AlignedMemory {
 public:
  AlignedMemory(size_t bytes, size_t alignment)
      : memory_(bytes == 0 ? nullptr
                           : std::aligned_alloc(alignment,
                                                (bytes + alignment - 1) / alignment * alignment)) {
    if (bytes > 0 && memory_ == nullptr) throw std::bad_alloc();
  }
  ~AlignedMemory() { std::free(memory_); }
  AlignedMemory(const AlignedMemory&) = delete;
  AlignedMemory& operator=(const AlignedMemory&) = delete;
  void* data() const { return memory_; }

 private:
  void* memory_;
};

}  // namespace tfwn

#endif  // TFWN_CSRC_PYTHON_ARRAYS_H_
