// Checks the kernels against a long double reference, for random shapes, types, magnitudes and
// splits of the work among threads. Every buffer has exactly the size that the contract requires,
// so the address sanitizer detects any access out of bounds. Without it, guard bytes detect writes.
//
// The CPU kernels:
//
//   g++ -std=c++17 -O2 -pthread -Icsrc tests/csrc/kernels_test.cc csrc/weight_norm_cpu.cc -o
//   kernels_test
//   ./kernels_test [cases] [seed]
//
// Add -fsanitize=address,undefined or -fsanitize=thread. TFWN_SIMD=avx2 and TFWN_SIMD=baseline test
// the code that other machines run. The CUDA kernels, emulated on the CPU (see
// cuda_on_cpu/cuda_runtime.h):
//
//   cd tests/csrc && g++ -std=c++17 -O2 -DTFWN_TEST_CUDA -I../../csrc -Icuda_on_cpu -x c++
//     kernels_test.cc cuda_on_cpu/cuda_on_cpu.cc ../../csrc/weight_norm_cuda.cu -o kernels_test

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "tensor.h"
#include "weight_norm.h"

namespace {

using tfwn::Backward;
using tfwn::Buffer;
using tfwn::DeviceName;
using tfwn::Forward;
using tfwn::Inline;
using tfwn::Layout;
using tfwn::misalignment;
using tfwn::NormType;
using tfwn::Pick;
using tfwn::RandomThreads;
using tfwn::Type;

int failures = 0;

void Check(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

template <class Arguments>
void RunKernel(const Arguments& arguments, const tfwn::cpu::ParallelFor& parallel_for) {
  const size_t bytes = tfwn::ScratchBytes(arguments);
  // Exactly `bytes` bytes, aligned as the contract requires, with guard bytes after them.
  std::unique_ptr<unsigned char[]> memory(new unsigned char[bytes + 64]);
  const size_t shift = 64 - reinterpret_cast<uintptr_t>(memory.get()) % 64;
  unsigned char* scratch = memory.get() + shift % 64;
  std::memset(memory.get(), 0xff, bytes + 64);  // NaN exposes reads before writes
  const std::string error = tfwn::Run(arguments, scratch, parallel_for);
  Check(error.empty(), error);
  Check(std::all_of(scratch + bytes, memory.get() + bytes + 64, [](int x) { return x == 0xff; }),
        "scratch overrun");
}

struct Problem {
  Layout layout;
  Type v_type, g_type, w_type;
  Buffer v, g, grad_w;

  Problem(Layout layout, Type v_type, Type g_type, Type w_type)
      : layout(layout),
        v_type(v_type),
        g_type(g_type),
        w_type(w_type),
        v(v_type, layout.size()),
        g(g_type, layout.units),
        grad_w(w_type, layout.size()) {}

  int64_t Unit(int64_t i) const { return i / layout.inner % layout.units; }

  // Draws normal numbers with these standard deviations.
  void Fill(std::mt19937_64* random, double v_size = 1, double g_size = 1, double grad_size = 1) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < v.size(); ++i) v.Set(i, normal(*random) * v_size);
    for (int64_t n = 0; n < g.size(); ++n) g.Set(n, normal(*random) * g_size);
    for (int64_t i = 0; i < v.size(); ++i) grad_w.Set(i, normal(*random) * grad_size);
  }

  std::string Name() const {
    const char* names[] = {"half", "bfloat16", "float", "double"};
    return "[" + std::to_string(layout.outer) + ", " + std::to_string(layout.units) + ", " +
           std::to_string(layout.inner) + "] v " + names[int(v_type)] + " g " + names[int(g_type)] +
           " w " + names[int(w_type)] + ", " + DeviceName();
  }
};

struct Results {
  Buffer w, norm, grad_v, grad_g;

  explicit Results(const Problem& p)
      : w(p.w_type, p.layout.size()),
        norm(NormType(p.v_type), p.layout.units),
        grad_v(p.v_type, p.layout.size()),
        grad_g(p.g_type, p.layout.units) {}

  bool Intact() const { return w.Intact() && norm.Intact() && grad_v.Intact() && grad_g.Intact(); }
  bool operator==(const Results& other) const {
    return w == other.w && norm == other.norm && grad_v == other.grad_v && grad_g == other.grad_g;
  }
};

std::unique_ptr<Results> RunBoth(const Problem& p, const tfwn::cpu::ParallelFor& parallel_for) {
  auto results = std::make_unique<Results>(p);
  RunKernel(Forward{p.layout, p.v_type, p.g_type, p.w_type, p.v.data(), p.g.data(),
                    results->w.data(), results->norm.data()},
            parallel_for);
  RunKernel(
      Backward{p.layout, p.v_type, p.g_type, p.w_type, p.grad_w.data(), p.v.data(), p.g.data(),
               results->norm.data(), results->grad_v.data(), results->grad_g.data()},
      parallel_for);
  return results;
}

// grad_v may be written over grad_w if both have the same type.
void CheckInPlace(const Problem& p, const Results& expected,
                  const tfwn::cpu::ParallelFor& parallel_for) {
  if (p.v_type != p.w_type) return;
  Buffer grad(p.w_type, p.layout.size()), grad_g(p.g_type, p.layout.units);
  std::memcpy(grad.data(), p.grad_w.data(), grad.Bytes());
  RunKernel(Backward{p.layout, p.v_type, p.g_type, p.w_type, grad.data(), p.v.data(), p.g.data(),
                     expected.norm.data(), grad.data(), grad_g.data()},
            parallel_for);
  Check(grad.Intact() && grad_g.Intact(), p.Name() + ": wrote out of bounds in place");
  Check(grad == expected.grad_v, p.Name() + ": grad_v written over grad_w differs");
  Check(grad_g == expected.grad_g, p.Name() + ": grad_g differs with grad_v written over grad_w");
}

// Checks that ||out - reference|| <= bound * max(||reference||, sizes) in each unit, plus the
// spacing of the type's smallest numbers for each element.
void CheckClose(const Problem& p, const char* name, const Buffer& out, Type type,
                const std::vector<long double>& reference, bool per_unit, double bound,
                const std::vector<long double>& sizes) {
  const tfwn::Format format = tfwn::FormatOf(type);
  const double least = std::ldexp(1.0, format.least - (format.bits - 1));
  std::vector<long double> error(p.layout.units), size(p.layout.units), floor(p.layout.units);
  for (int64_t i = 0; i < out.size(); ++i) {
    const int64_t n = per_unit ? i : p.Unit(i);
    if (std::fabs(reference[i]) > 0.9 * format.most) continue;
    error[n] += (out[i] - reference[i]) * (out[i] - reference[i]);
    size[n] += reference[i] * reference[i];
    floor[n] += static_cast<long double>(least) * least;
  }
  for (int64_t n = 0; n < p.layout.units; ++n) {
    const long double scale = std::max(std::sqrt(size[n]), sizes.empty() ? 0.0L : sizes[n]);
    const bool close = std::sqrt(error[n]) <= bound * scale + std::sqrt(floor[n]);
    if (close) continue;
    Check(false, p.Name() + ": " + name + " of unit " + std::to_string(n) + ": error " +
                     std::to_string(double(std::sqrt(error[n]) / scale)));
    return;
  }
}

// A little more than half of the spacing of numbers, relative to them.
double BoundOf(Type type) {
  const double bounds[] = {std::ldexp(1.0, -11), std::ldexp(1.0, -8), 3e-7, 1e-14};
  return bounds[int(type)];
}

void CheckAgainstReference(const Problem& p, const Results& results) {
  const int64_t units = p.layout.units, size = p.layout.size();
  std::vector<long double> norm(units), dot(units), grad_g(units), w(size), grad_v(size);
  std::vector<long double> grad_w_norm(units), grad_v_scale(units);
  for (int64_t i = 0; i < size; ++i) {
    const long double v = p.v[i], grad_w = p.grad_w[i];
    norm[p.Unit(i)] += v * v;
    dot[p.Unit(i)] += v * grad_w;
    grad_w_norm[p.Unit(i)] += grad_w * grad_w;
  }
  for (int64_t n = 0; n < units; ++n) {
    norm[n] = std::sqrt(norm[n]);
    grad_w_norm[n] = std::sqrt(grad_w_norm[n]);
    grad_g[n] = norm[n] == 0 ? 0 : dot[n] / norm[n];
    grad_v_scale[n] = norm[n] == 0 ? 0 : std::fabs(p.g[n] / norm[n]) * grad_w_norm[n];
  }
  for (int64_t i = 0; i < size; ++i) {
    const int64_t n = p.Unit(i);
    if (norm[n] == 0) continue;
    w[i] = p.g[n] * p.v[i] / norm[n];
    grad_v[i] = p.g[n] / norm[n] * (p.grad_w[i] - grad_g[n] / norm[n] * p.v[i]);
  }
  const double compute = BoundOf(p.v_type == Type::kDouble ? Type::kDouble : Type::kFloat);
  auto bound = [&](Type type) { return BoundOf(type) + compute; };
  const double arithmetic =
      p.v_type == Type::kDouble || p.w_type == Type::kDouble ? 1e-14 : BoundOf(Type::kFloat);
  CheckClose(p, "norm", results.norm, NormType(p.v_type), norm, true, bound(NormType(p.v_type)),
             {});
#ifdef TFWN_TEST_CUDA
  // If w is double, it is computed in double whatever the type of v.
  const double w_bound = p.w_type == Type::kDouble ? 1e-14 : bound(p.w_type) + arithmetic;
#else
  const double w_bound = bound(p.w_type) + arithmetic;
#endif
  CheckClose(p, "w", results.w, p.w_type, w, false, w_bound, {});
  // Where grad_w is nearly parallel or orthogonal to v, the result is a small difference of large
  // numbers, so the error is relative to the size of those numbers.
  CheckClose(p, "grad_g", results.grad_g, p.g_type, grad_g, true, bound(p.g_type), grad_w_norm);
  CheckClose(p, "grad_v", results.grad_v, p.v_type, grad_v, false, bound(p.v_type) + arithmetic,
             grad_v_scale);
}

Layout RandomLayout(std::mt19937_64* random) {
  const std::vector<int64_t> sizes = {1,   1,   2,   3,   4,    5,    7,    8,    15,    16,    17,
                                      31,  32,  33,  63,  64,   65,   100,  127,  128,   129,   255,
                                      256, 257, 511, 513, 1000, 1025, 4096, 5000, 20000, 100000};
  for (;;) {
    Layout layout = {Pick(random, sizes), Pick(random, sizes),
                     Pick(random, {1, 1, 1, 2, 3, 9, 31, 32, 33, 100, 1000, 4097, 70000})};
    if ((*random)() % 40 == 0) layout.outer = 0;
    if ((*random)() % 40 == 0) layout.units = 0;
    if ((*random)() % 40 == 0) layout.inner = 0;
    if (layout.size() <= 300000) return layout;
  }
}

// The split of the work must not change a bit. Doubles show the last bit of a sum, which rounding
// to float mostly hides.
void TestManyCuts(uint64_t seed) {
  std::mt19937_64 random(seed);
  for (const Layout layout : {Layout{1025, 65, 1}, Layout{70, 300, 1}, Layout{3000, 1, 1},
                              Layout{500, 7, 3}, Layout{3, 600, 20}, Layout{2, 3, 40000}}) {
    Problem p(layout, Type::kDouble, Type::kDouble, Type::kDouble);
    p.Fill(&random);
    const auto results = RunBoth(p, Inline);
    for (int cut = 0; cut < 10; ++cut) {
      Check(*results == *RunBoth(p, RandomThreads(&random)),
            p.Name() + ": the split of the work changes the result");
      CheckInPlace(p, *results, RandomThreads(&random));
    }
  }
}

void TestRandomProblems(int cases, uint64_t seed) {
  for (int i = 0; i < cases; ++i) {
    std::mt19937_64 random(seed + i);
    tfwn::PickDevice(&random);
    misalignment = static_cast<int>(Pick(&random, {0, 0, 1}));
    const auto type = [&] { return static_cast<Type>(random() % 4); };
    const Type v_type = type();
    Problem p(RandomLayout(&random), v_type, type(), random() % 2 ? v_type : type());
    const bool narrow_v = p.v_type == Type::kHalf, narrow_w = p.w_type == Type::kHalf;
    // These keep all results in range. The magnitude of v varies between units.
    const double g_size =
        narrow_w || p.g_type == Type::kHalf ? 1 : std::pow(10.0, int(random() % 9) - 4);
    const double grad_size = narrow_v || narrow_w ? 0.1 : std::pow(10.0, int(random() % 7) - 3);
    p.Fill(&random, 1, g_size, grad_size);
    std::vector<double> magnitude(p.layout.units);
    for (double& m : magnitude) {
      m = std::pow(10.0, (int(random() % 59) - 29) * (narrow_v ? 0.05 : 1.0));
      if (random() % 16 == 0) m = 0;
    }
    for (int64_t k = 0; k < p.v.size(); ++k) p.v.Set(k, p.v[k] * magnitude[p.Unit(k)]);
    for (int64_t n = 0; n < p.g.size(); ++n) {
      if (random() % 16 == 0) p.g.Set(n, 0);
    }

    misalignment = static_cast<int>(Pick(&random, {0, 0, 1}));
    const auto results = RunBoth(p, Inline);
    Check(results->Intact(), p.Name() + ": wrote out of bounds");
    CheckAgainstReference(p, *results);
    const auto threaded = RunBoth(p, RandomThreads(&random));
    Check(threaded->Intact(), p.Name() + ": wrote out of bounds in threads");
    Check(*results == *threaded, p.Name() + ": threads change the result");
    CheckInPlace(p, *results, RandomThreads(&random));
    if (failures > 20) return;
  }
}

// The results of a unit with v = 0 must be zero, except where grad_w is infinite.
void TestZeroUnits() {
  const int64_t unit = 2;
  for (const Type type : {Type::kHalf, Type::kBfloat16, Type::kFloat, Type::kDouble}) {
    for (const Layout layout : {Layout{70, 5, 1}, Layout{1, 5, 70}, Layout{8, 5, 40}}) {
      Problem p(layout, type, Type::kFloat, type);
      for (int64_t i = 0; i < p.v.size(); ++i) {
        p.v.Set(i, p.Unit(i) == unit ? 0 : 1);
        p.grad_w.Set(i, i % 7 - 60000.0);
      }
      for (int64_t n = 0; n < p.g.size(); ++n) p.g.Set(n, 3);
      const auto check = [&](const Results& results) {
        bool zero = results.norm[unit] == 0 && results.grad_g[unit] == 0;
        for (int64_t i = 0; i < p.v.size(); ++i) {
          if (p.Unit(i) != unit) continue;
          zero &= results.w[i] == 0 && (std::isinf(p.grad_w[i]) || results.grad_v[i] == 0);
        }
        Check(zero, p.Name() + ": a zero unit has nonzero results");
      };
      const auto results = RunBoth(p, Inline);
      check(*results);
      CheckAgainstReference(p, *results);
      p.g.Set(unit, HUGE_VAL);
      p.grad_w.Set(unit * layout.inner, HUGE_VAL);  // the first element of that unit
      check(*RunBoth(p, Inline));
    }
  }
}

#ifdef TFWN_TEST_CUDA
// Weights for which one kernel needs about 60 and 130 KiB of shared memory. cuda_on_cpu.cc fails
// if a launch uses more than the kernel's limit, or if the limit is set twice.
void TestSharedMemory() {
  cuda_on_cpu::multiprocessors = 1;
  std::mt19937_64 random(0);
  for (const Layout layout : {Layout{864, 16, 1}, Layout{2048, 16, 1}}) {
    Problem p(layout, Type::kFloat, Type::kFloat, Type::kFloat);
    p.Fill(&random);
    CheckAgainstReference(p, *RunBoth(p, Inline));
  }
}

// Weights that need two launches, with and without clusters and overlap.
void TestTwoLaunches() {
  cuda_on_cpu::multiprocessors = 132;
  std::mt19937_64 random(0);
  for (const int architecture : {80, 90}) {
    cuda_on_cpu::architecture = architecture;
    for (const Layout layout : {Layout{60000, 2, 1}, Layout{20000, 7, 1}, Layout{9000, 16, 1},
                                Layout{8000, 3, 9}, Layout{1, 1, 150000}, Layout{3, 2, 60001}}) {
      for (const Type type : {Type::kBfloat16, Type::kFloat}) {
        Problem p(layout, type, Type::kFloat, type);
        p.Fill(&random);
        const int64_t before = cuda_on_cpu::launches;
        const auto results = RunBoth(p, Inline);
        Check(cuda_on_cpu::launches == before + 4, p.Name() + ": not two launches each");
        CheckAgainstReference(p, *results);
        CheckInPlace(p, *results, Inline);
      }
    }
  }
}
#endif

// g / norm leaves the range of float although w and grad_v stay within it.
void TestExtremes() {
  for (const Type type : {Type::kFloat, Type::kBfloat16}) {
    for (const double size : {1e-30, 1e-20, 1e20, 1e30}) {
      for (const Layout layout : {Layout{70, 5, 1}, Layout{1, 5, 70}, Layout{8, 3, 40}}) {
        Problem p(layout, type, Type::kFloat, Type::kFloat);
        std::mt19937_64 random(0);
        p.Fill(&random, size, 1 / std::sqrt(size), size < 1 ? 1e-25 : 1e20);
        CheckAgainstReference(p, *RunBoth(p, Inline));
      }
    }
  }
}

void CheckEqual(const Problem& p, const Buffer& out, const std::vector<double>& expected) {
  for (int64_t i = 0; i < out.size(); ++i) {
    if (out[i] == expected[i] || (std::isnan(out[i]) && std::isnan(expected[i]))) continue;
    Check(false,
          p.Name() + ": " + std::to_string(out[i]) + " instead of " + std::to_string(expected[i]));
    return;
  }
}

// Conversion to half and bfloat16: with one element per unit and v = 1, w is g rounded, where g is
// a number of the type or, for odd bits, the midpoint to the next one. Conversion from them: the
// norm of a single element is its absolute value.
void TestConversions() {
  const int64_t size = 1 << 16;
  for (const Type type : {Type::kHalf, Type::kBfloat16}) {
    Problem to({1, size, 1}, Type::kDouble, Type::kDouble, type);
    Problem from({1, size, 1}, type, Type::kFloat, Type::kFloat);
    for (int64_t i = 0; i < size; ++i) {
      const uint16_t bits = static_cast<uint16_t>(i);
      std::memcpy(static_cast<char*>(from.v.data()) + 2 * i, &bits, 2);
    }
    std::vector<double> rounded(size), lengths(size);
    for (int64_t i = 0; i < size; ++i) {
      const double value = from.v[i], next = from.v[std::min<int64_t>(i + 1, size - 1)];
      const bool midpoint = std::isfinite(value) && std::isfinite(next) && (i & 1);
      to.v.Set(i, 1);
      to.g.Set(i, midpoint ? (value + next) / 2 : value);
      to.grad_w.Set(i, 0);
      from.g.Set(i, 1);
      from.grad_w.Set(i, 0);
      rounded[i] = tfwn::Round(to.g[i], type);
      lengths[i] = std::fabs(value);
    }
    CheckEqual(to, RunBoth(to, Inline)->w, rounded);
    CheckEqual(from, RunBoth(from, Inline)->norm, lengths);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 300;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device()();
  std::printf("%s, %d cases, seed %llu\n", DeviceName().c_str(), cases,
              static_cast<unsigned long long>(seed));
  TestConversions();
  TestZeroUnits();
  TestExtremes();
#ifdef TFWN_TEST_CUDA
  TestSharedMemory();
  TestTwoLaunches();
#endif
  TestManyCuts(seed);
  TestRandomProblems(cases, seed);
#ifdef TFWN_TEST_CUDA
  std::printf("%lld launches: %lld with clusters, %lld overlapping the previous launch\n",
              static_cast<long long>(cuda_on_cpu::launches),
              static_cast<long long>(cuda_on_cpu::cluster_launches),
              static_cast<long long>(cuda_on_cpu::overlapping_launches));
  Check(cuda_on_cpu::cluster_launches > 0 && cuda_on_cpu::overlapping_launches > 0,
        "some kind of launch never took place");
#endif
  std::printf(failures == 0 ? "passed\n" : "%d failures\n", failures);
  return failures != 0;
}
