// tfwn.native: the kernels on NumPy arrays and on device arrays, without TensorFlow.
//
// To use it without TensorFlow, build it alone and load the file directly, bypassing
// tfwn/__init__.py:
//
//   TFWN_TENSORFLOW=0 python setup.py build_ext --inplace
//
//   from importlib.util import module_from_spec, spec_from_file_location
//   spec = spec_from_file_location("native", glob.glob("tfwn/native.*.so")[0])
//   native = module_from_spec(spec)
//   spec.loader.exec_module(native)

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "layout.h"
#include "python_arrays.h"
#include "thread_pool.h"
#include "weight_norm.h"

namespace tfwn {
namespace {

// The axes of v that index the units, and the resulting layout.
struct Axes {
  Axis given;
  Sizes units;  // their sizes
  Layout layout;
  Axis order;  // the transpose of v for the kernels; empty if axis is consecutive
};

void Require(const std::string& error) {
  if (!error.empty()) Fail(error);
}

Axis AxisList(const py::object& axis) {
  try {
    if (axis.is_none()) return {};
    if (py::hasattr(axis, "__index__")) return {py::int_(axis).cast<int64_t>()};
    Axis list;
    for (const py::handle a : axis) {
      if (!py::hasattr(a, "__index__")) throw py::cast_error();
      list.push_back(py::int_(py::reinterpret_borrow<py::object>(a)).cast<int64_t>());
    }
    return list;
  } catch (const std::exception&) {
    PyErr_Clear();
    Fail("axis must be an int, a sequence of ints or None, but is ", Repr(axis));
  }
}

Axes AxesOf(const Array& v, const py::object& axis) {
  const int64_t rank = static_cast<int64_t>(v.shape.size());
  Axes axes;
  axes.given = AxisList(axis);
  Axis kept = axes.given;
  Require(CheckAxis(rank, &kept));
  for (const int64_t a : kept) axes.units.push_back(v.shape[a]);
  const std::string error = CheckConsecutive(rank, kept);
  if (error.empty()) {
    axes.layout = Collapse(v.shape, kept);
    return axes;
  }
  if (v.on_device) Fail(error);
  axes.layout = {1, Product(axes.units), 1};
  axes.order = kept;
  for (int64_t a = 0; a < rank; ++a) {
    if (std::find(kept.begin(), kept.end(), a) != kept.end()) continue;
    axes.order.push_back(a);
    axes.layout.inner *= v.shape[a];
  }
  return axes;
}

void CheckResultShape(const Array& array, const Sizes& shape) {
  if (array.shape == shape) return;
  Fail(array.name, " in out must have shape ", ShapeText(shape), ", but has shape ",
       ShapeText(array.shape));
}

void CheckType(const Array& array, Type type, const std::string& why) {
  if (array.type == type) return;
  Fail(array.name, " must be ", NameOf(type), ", ", why, ", but is ", NameOf(array.type));
}

int ThreadsOf(int threads) {
  if (threads < 0) Fail("threads must be positive, or 0 for all cores, but is ", threads);
  return threads > 0 ? threads : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Where a call runs, and with which threads, stream and scratch.
struct Place {
  bool on_device;
  int threads;
  intptr_t stream;
  std::optional<Array> scratch;

  Place(const std::vector<const Array*>& arrays, int threads, intptr_t stream,
        const py::object& scratch_in)
      : on_device(arrays[0]->on_device), threads(ThreadsOf(threads)), stream(stream) {
    for (const Array* array : arrays) {
      if (array->on_device != on_device) {
        Fail(arrays[0]->name, " and ", array->name, " must both be NumPy arrays or both be on a ",
             "CUDA device, but ", (on_device ? array : arrays[0])->name, " is a NumPy array");
      }
    }
    if (scratch_in.is_none()) return;
    scratch = ParseArray("scratch", scratch_in, stream);
    if (!on_device || !scratch->on_device || !scratch->contiguous || !scratch->writable) {
      Fail("scratch must be a contiguous, writable array on the same device as the inputs, ",
           "but is ", TypeName(scratch_in));
    }
  }
};

// The results of a call: the caller's arrays, or new ones.
class Results {
 public:
  Results(const Place& place, const py::object& out, const char* first, const char* second) {
    if (out.is_none()) {
      if (place.on_device) {
        Fail("out must be given for arrays on a device, where this module does not allocate. ",
             "Pass out=(", first, ", ", second, ")");
      }
      return;
    }
    if (!py::isinstance<py::tuple>(out) || py::len(out) != 2) {
      Fail("out must be a tuple of two arrays, (", first, ", ", second, "), but is ", Repr(out));
    }
    for (int i = 0; i < 2; ++i) {
      given_[i] = ParseArray(i == 0 ? first : second, out.cast<py::tuple>()[i], place.stream);
      CheckOutput(*given_[i]);
      if (given_[i]->on_device != place.on_device) {
        Fail(given_[i]->name, " in out must be where the inputs are, on ",
             place.on_device ? "the device" : "the host");
      }
    }
  }

  const std::optional<Array>& given(int i) const { return given_[i]; }

  Array Get(int i, const char* name, const Sizes& shape, Type type, const char* type_why) const {
    if (!given_[i]) return NewArray(name, shape, type);
    CheckResultShape(*given_[i], shape);
    CheckType(*given_[i], type, type_why);
    return *given_[i];
  }

 private:
  std::optional<Array> given_[2];
};

void CheckApart(const Array& a, const Array& b) {
  if (Overlap(a, b)) Fail(a.name, " must not overlap ", b.name);
}

void CheckOverlap(const std::vector<const Array*>& inputs, const Array& first,
                  const Array& second) {
  for (const Array* input : inputs) {
    CheckApart(first, *input);
    CheckApart(second, *input);
  }
  CheckApart(first, second);
}

template <class Arguments>
void Execute(const Arguments& arguments, const Place& place, std::vector<const Array*> arrays) {
  const Array* given = place.scratch ? &*place.scratch : nullptr;
  if (given != nullptr) {
    for (const Array* array : arrays) CheckApart(*given, *array);
    arrays.push_back(given);
  }
  const py::gil_scoped_release release;
  if (place.on_device) return RunOnDevice(arguments, DeviceOf(arrays), place.stream, given);
  const size_t bytes = cpu::ScratchBytes(arguments);
  const AlignedMemory scratch(bytes, 64);
  cpu::Run(arguments, scratch.data(), ParallelForOn(place.threads));
}

// Returns the array as the kernels need it: contiguous, and transposed by `order` unless that is
// empty.
Array Prepare(const Array& array, const Axis& order) {
  if (order.empty() && array.contiguous) return array;
  if (array.on_device) {
    Fail(array.name, " must be contiguous on a device. Make a contiguous copy");
  }
  return ContiguousCopy(array, order);
}

py::tuple WeightNorm(const py::object& v_in, const py::object& g_in, const py::object& axis,
                     const py::object& out_dtype, const py::object& out, int threads,
                     intptr_t stream, const py::object& scratch) {
  const Array v_given = ParseArray("v", v_in, stream);
  const Array g_given = ParseArray("g", g_in, stream);
  const Axes axes = AxesOf(v_given, axis);
  Require(CheckG(axes.given, axes.units, &v_given.shape, g_given.shape));
  const Place place({&v_given, &g_given}, threads, stream, scratch);
  const Results results(place, out, "w", "norm");
  Type w_type = v_given.type;
  if (!out_dtype.is_none()) {
    w_type = ParseType("out_dtype", out_dtype);
  } else if (results.given(0)) {
    w_type = results.given(0)->type;
  }
  const Array w = results.Get(0, "w", v_given.shape, w_type, "as out_dtype says");
  const Array norm = results.Get(1, "norm", axes.units, NormType(v_given.type),
                                 "float64 if v is and float32 otherwise");
  const Array v = Prepare(v_given, axes.order);
  const Array g = Prepare(g_given, {});
  CheckOverlap({&v, &g}, w, norm);
  const Array w_kernel = axes.order.empty() ? w : NewArray("w", v.shape, w_type);
  Execute(Forward{axes.layout, v.type, g.type, w_type, v.data, g.data, w_kernel.data, norm.data},
          place, {&v, &g, &w, &norm});
  if (!axes.order.empty()) CopyTransposed(w_kernel, axes.order, w);
  return py::make_tuple(w.object, norm.object);
}

py::tuple WeightNormGrad(const py::object& grad_w_in, const py::object& v_in,
                         const py::object& g_in, const py::object& norm_in, const py::object& axis,
                         const py::object& out, int threads, intptr_t stream,
                         const py::object& scratch) {
  const Array grad_w_given = ParseArray("grad_w", grad_w_in, stream);
  const Array v_given = ParseArray("v", v_in, stream);
  const Array g_given = ParseArray("g", g_in, stream);
  const Array norm_given = ParseArray("norm", norm_in, stream);
  const Axes axes = AxesOf(v_given, axis);
  Require(CheckSameShape("grad_w", grad_w_given.shape, "v", v_given.shape));
  Require(CheckG(axes.given, axes.units, &v_given.shape, g_given.shape));
  Require(CheckSameShape("norm", norm_given.shape, "g", g_given.shape));
  CheckType(norm_given, NormType(v_given.type), "float64 if v is and float32 otherwise");
  const Place place({&grad_w_given, &v_given, &g_given, &norm_given}, threads, stream, scratch);
  const Results results(place, out, "grad_v", "grad_g");
  const Array grad_v = results.Get(0, "grad_v", v_given.shape, v_given.type, "like v");
  const Array grad_g = results.Get(1, "grad_g", axes.units, g_given.type, "like g");
  const Array grad_w = Prepare(grad_w_given, axes.order), v = Prepare(v_given, axes.order);
  const Array g = Prepare(g_given, {}), norm = Prepare(norm_given, {});
  CheckOverlap({&v, &g, &norm}, grad_v, grad_g);
  CheckApart(grad_g, grad_w);
  const bool in_place = grad_v.data == grad_w.data && grad_v.type == grad_w.type;
  if (!in_place && Overlap(grad_v, grad_w)) {
    Fail("grad_v must be grad_w itself, with one type for both, or not overlap it");
  }
  const Array grad_v_kernel = axes.order.empty() ? grad_v : NewArray("grad_v", v.shape, v.type);
  Execute(Backward{axes.layout, v.type, g.type, grad_w.type, grad_w.data, v.data, g.data, norm.data,
                   grad_v_kernel.data, grad_g.data},
          place, {&grad_w, &v, &g, &norm, &grad_v, &grad_g});
  if (!axes.order.empty()) CopyTransposed(grad_v_kernel, axes.order, grad_v);
  return py::make_tuple(grad_v.object, grad_g.object);
}

py::dict BuildInfo() {
  const auto text_or_none = [](const char* text) -> py::object {
    return *text == '\0' ? py::object(py::none()) : py::object(py::str(text));
  };
  py::list architectures;
  std::istringstream list(TFWN_CUDA_ARCHITECTURES);
  for (std::string a; std::getline(list, a, ',');) architectures.append(std::stoi(a));
  py::dict info;
  info["tensorflow"] = text_or_none(TFWN_TENSORFLOW_VERSION);
  info["cuda"] = text_or_none(TFWN_CUDA_VERSION);
  info["cuda_architectures"] = architectures;
  info["simd"] = cpu::SimdLevel();
  return info;
}

constexpr char kModuleDoc[] = R"(The weight normalization kernels on arrays, without TensorFlow.

NumPy arrays (float16, float32, float64, and ml_dtypes' bfloat16) use the CPU kernels. CUDA device
arrays with __cuda_array_interface__ use the CUDA kernels, which are launched on the given stream.
The call does not wait for them to finish.
)";

constexpr char kWeightNormDoc[] = R"(Returns (w, norm).

    norm = ||v||,  w = g * v / norm                  (Salimans & Kingma 2016, eq. 2)

>>> v = np.array([[3, 0], [4, 2]], np.float32)
>>> w, norm = native.weight_norm(v, np.array([1, 10], np.float32))
>>> w, norm
(array([[ 0.6,  0. ],
       [ 0.8, 10. ]], dtype=float32), array([5., 2.], dtype=float32))

Args:
  v: an array of any shape. A NumPy array that is not contiguous is copied.
  g: an array of shape [v.shape[a] for a in axis].
  axis: the axes of v that index the units: an int, a sequence of ints, or None for one norm over
    the whole of v. On a device, they must be consecutive and ascending. On the CPU, v is copied if
    they are not.
  out_dtype: the type of w. The default is the type of out[0] if given, else of v.
  out: (w, norm), contiguous arrays to write into that do not overlap the inputs. Required on a
    device.
  threads: the maximum number of threads on the CPU; 0 for all cores. Results do not depend on it.
  stream: the CUDA stream's handle, as an int; 0 is the default stream.
  scratch: a contiguous device array for intermediate results, aligned to 256 bytes, that does not
    overlap the others. 512 KiB and 8 bytes per unit are always enough; if it is too small, the error
    reports the required size. By default, cudaMallocAsync allocates it.

Returns:
  w, with v's shape, and norm, with g's shape. norm is float64 if v is, float32 otherwise.

Raises:
  ValueError: an argument has an invalid shape, type, device or value.
  RuntimeError: a CUDA call failed.
)";

constexpr char kWeightNormGradDoc[] = R"(Returns (grad_v, grad_g), shaped and typed like v and g.

    grad_g = sum(grad_w * v) / norm                  (Salimans & Kingma 2016, eq. 3)
    grad_v = (g / norm) * (grad_w - (grad_g / norm) * v)

>>> v = np.array([[3, 0], [4, 2]], np.float32)
>>> g = np.array([1, 10], np.float32)
>>> w, norm = native.weight_norm(v, g)
>>> grad_w = np.array([[10, 1], [5, 1]], np.float32)
>>> native.weight_norm_grad(grad_w, v, g, norm)
(array([[ 0.8,  5. ],
       [-0.6,  0. ]], dtype=float32), array([10.,  1.], dtype=float32))

Args:
  grad_w: the gradient with respect to w, with v's shape and any of the supported types.
  v, g, axis: as for weight_norm.
  norm: the norm that weight_norm returned.
  out: (grad_v, grad_g) to write into, as for weight_norm. grad_v may be grad_w itself if both have
    the same type.
  threads, stream, scratch: as for weight_norm.

Raises:
  ValueError: an argument has an invalid shape, type, device or value.
  RuntimeError: a CUDA call failed.
)";

constexpr char kBuildInfoDoc[] = R"(Returns how this module was built and what it runs on.

The keys of the dict are: tensorflow, the TensorFlow version that the op was built against, or None;
cuda, the version of nvcc, or None without CUDA kernels; cuda_architectures, a list of ints;
simd, the instruction set that the CPU kernels use on this machine.

>>> native.build_info()["simd"] in ("avx512", "avx2", "baseline")
True
)";

PYBIND11_MODULE(native, m) {
  using py::arg;
  m.doc() = kModuleDoc;
  m.def("weight_norm", &WeightNorm, kWeightNormDoc, arg("v"), arg("g"), arg("axis") = -1,
        arg("out_dtype") = py::none(), py::kw_only(), arg("out") = py::none(), arg("threads") = 0,
        arg("stream") = 0, arg("scratch") = py::none());
  m.def("weight_norm_grad", &WeightNormGrad, kWeightNormGradDoc, arg("grad_w"), arg("v"), arg("g"),
        arg("norm"), arg("axis") = -1, py::kw_only(), arg("out") = py::none(), arg("threads") = 0,
        arg("stream") = 0, arg("scratch") = py::none());
  m.def("build_info", &BuildInfo, kBuildInfoDoc);
}

}  // namespace
}  // namespace tfwn
