// The loops over elements, for one instruction set. weight_norm_cpu.cc includes this file once per
// set, inside a namespace of its own, with TFWN_VECTOR_BYTES (and TFWN_F16C) defined; hence no
// include guard and no #include.
//
// Every loop runs along a contiguous piece of the tensor, in memory order, and looks its unit up by
// a position that advances with the element and wraps at the period: sums and factors are arrays of
// period + kPadding entries, where a vector that starts just before the period runs on into the
// padding. sums[period + i] counts for sums[i]; factors[period + i] repeats factors[i].

constexpr int kVectorBytes = TFWN_VECTOR_BYTES;
static_assert(kVectorBytes / sizeof(float) <= kPadding);

template <class T, int n>
struct VectorOf {
  typedef T type __attribute__((vector_size(n * sizeof(T))));
};
template <class T, int n>
using Vector = typename VectorOf<T, n>::type;

template <class C>
constexpr int kLanes = kVectorBytes / sizeof(C);

template <class To, class From>
TFWN_INLINE To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// In the four functions below Bits is uint32_t or a vector of them, and F is float or a vector.

// Subnormal halves get their exponent from a subtraction of normal floats, so that it does not
// matter whether the processor flushes subnormals.
template <class F, class Bits>
TFWN_INLINE F FloatFromHalfBits(Bits half) {
  const Bits shifted = (half & 0x7fffu) << 13;
  const Bits exponent = shifted & (0x7c00u << 13);
  const Bits normal = shifted + (112u << 23);
  const Bits special = shifted + (224u << 23);
  const F subnormal =
      BitCast<F>(Bits(shifted + (113u << 23))) - BitCast<F>(Bits((half & 0u) + (113u << 23)));
  Bits bits = exponent == 0u ? BitCast<Bits>(subnormal) : normal;
  bits = exponent == (0x7c00u << 13) ? special : bits;
  return BitCast<F>(Bits(bits | (half & 0x8000u) << 16));
}

template <class Bits, class F>
TFWN_INLINE Bits HalfBitsFromFloat(F value) {
  Bits bits = BitCast<Bits>(value);
  const Bits sign = bits & 0x80000000u;
  bits ^= sign;
  const Bits zero = bits & 0u;
  // Rounds to nearest even by carrying into the bits that stay.
  const Bits normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  // Adding 0.5 lets the adder round to the spacing of subnormal halves, 2^-24.
  const Bits half_ulp = zero + (126u << 23);
  const Bits subnormal = BitCast<Bits>(F(BitCast<F>(bits) + BitCast<F>(half_ulp))) - half_ulp;
  const Bits special = bits > (255u << 23) ? zero + 0x7e00u : zero + 0x7c00u;
  Bits half = bits < (113u << 23) ? subnormal : normal;
  half = bits >= (143u << 23) ? special : half;
  return half | sign >> 16;
}

template <class F, class Bits>
TFWN_INLINE F FloatFromBfloat16Bits(Bits bfloat16) {
  return BitCast<F>(Bits(bfloat16 << 16));
}

template <class Bits, class F>
TFWN_INLINE Bits Bfloat16BitsFromFloat(F value) {
  const Bits bits = BitCast<Bits>(value);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits quiet_nan = bits >> 16 | 0x40u;  // Rounding could carry a NaN into infinity.
  return (bits & 0x7fffffffu) > (255u << 23) ? quiet_nan : rounded;
}

template <class To, class From>
TFWN_INLINE To LoadBytes(const From* from) {
  To to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

// Loads n numbers of type T and converts them to C, float or double.
template <class C, int n, class T>
TFWN_INLINE Vector<C, n> Load(const T* from) {
  if constexpr (std::is_same_v<C, T>) {
    return LoadBytes<Vector<C, n>>(from);
  } else if constexpr (std::is_same_v<C, double> && !std::is_same_v<T, float>) {
    return __builtin_convertvector((Load<float, n>(from)), Vector<C, n>);
  } else if constexpr (std::is_same_v<T, float>) {
    return __builtin_convertvector((LoadBytes<Vector<float, n>>(from)), Vector<C, n>);
  } else {
#ifdef TFWN_F16C
    if constexpr (std::is_same_v<T, Half> && n == 8) {
      return BitCast<Vector<C, n>>(_mm256_cvtph_ps(LoadBytes<__m128i>(from)));
    }
    if constexpr (std::is_same_v<T, Half> && n == 4) {
      return BitCast<Vector<C, n>>(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)from)));
    }
#endif
    const auto bits = __builtin_convertvector((LoadBytes<Vector<uint16_t, n>>(from)),
                                              Vector<uint32_t, n>);
    if constexpr (std::is_same_v<T, Half>) {
      return FloatFromHalfBits<Vector<C, n>>(bits);
    } else {
      return FloatFromBfloat16Bits<Vector<C, n>>(bits);
    }
  }
}

// Converts n numbers of type C to type T and stores them. A double becomes a half by way of float.
template <class C, int n, class T>
TFWN_INLINE void Store(const Vector<C, n>& from, T* to) {
  if constexpr (std::is_same_v<C, T>) {
    std::memcpy(to, &from, sizeof(from));
  } else if constexpr (sizeof(T) >= sizeof(float)) {
    const auto converted = __builtin_convertvector(from, Vector<T, n>);
    std::memcpy(to, &converted, sizeof(converted));
  } else if constexpr (std::is_same_v<C, double>) {
    const Vector<float, n> single = __builtin_convertvector(from, Vector<float, n>);
    Store<float, n>(single, to);
  } else {
#ifdef TFWN_F16C
    if constexpr (std::is_same_v<T, Half> && n == 8) {
      const __m128i halves = _mm256_cvtps_ph(BitCast<__m256>(from), _MM_FROUND_TO_NEAREST_INT);
      std::memcpy(to, &halves, sizeof(halves));
      return;
    }
#endif
    Vector<uint32_t, n> bits;
    if constexpr (std::is_same_v<T, Half>) {
      bits = HalfBitsFromFloat<Vector<uint32_t, n>>(from);
    } else {
      bits = Bfloat16BitsFromFloat<Vector<uint32_t, n>>(from);
    }
    const auto shorter = __builtin_convertvector(bits, Vector<uint16_t, n>);
    std::memcpy(to, &shorter, sizeof(shorter));
  }
}

// A vector's worth of elements of which only the first `size` are in the tensor.
template <class T>
struct Tail {
  T values[kPadding] = {};
  Tail(const T* from, int64_t size) { std::memcpy(values, from, size * sizeof(T)); }
};

// sums[position] += v^2
template <class V>
void SquareSums(const void* v_bytes, int64_t size, int64_t position, int64_t period, double* sums) {
  constexpr int n = kLanes<double>;
  const V* v = static_cast<const V*>(v_bytes);
  auto add = [&](const V* at) __attribute__((always_inline)) {
    const Vector<double, n> x = Load<double, n>(at);
    Store<double, n>(Load<double, n>(sums + position) + x * x, sums + position);
    position += n;
    if (position >= period) position -= period;
  };
  int64_t i = 0;
  for (; i + n <= size; i += n) add(v + i);
  if (i < size) add(Tail<V>(v + i, size - i).values);
}

// sums[position] += grad_w * v
template <class V, class W>
void ProductSums(const void* grad_w_bytes, const void* v_bytes, int64_t size, int64_t position,
                 int64_t period, double* sums) {
  constexpr int n = kLanes<double>;
  const V* v = static_cast<const V*>(v_bytes);
  const W* grad_w = static_cast<const W*>(grad_w_bytes);
  auto add = [&](const W* grad_w_at, const V* v_at) __attribute__((always_inline)) {
    Store<double, n>(Load<double, n>(sums + position) +
                         Load<double, n>(grad_w_at) * Load<double, n>(v_at),
                     sums + position);
    position += n;
    if (position >= period) position -= period;
  };
  int64_t i = 0;
  for (; i + n <= size; i += n) add(grad_w + i, v + i);
  if (i < size) add(Tail<W>(grad_w + i, size - i).values, Tail<V>(v + i, size - i).values);
}

// w = scale * v
template <class V, class W>
void ScaleForward(const void* v_bytes, int64_t size, int64_t position, int64_t period,
                  const Factors& scale, void* w_bytes) {
  using C = ComputeType<V, W>;
  constexpr int n = kLanes<C>;
  const V* v = static_cast<const V*>(v_bytes);
  W* w = static_cast<W*>(w_bytes);
  const C* power = static_cast<const C*>(scale.power);
  const C* rest = static_cast<const C*>(scale.rest);
  auto apply = [&](const V* v_at, W* w_at) __attribute__((always_inline)) {
    Store<C, n>(Load<C, n>(v_at) * Load<C, n>(power + position) * Load<C, n>(rest + position),
                w_at);
    position += n;
    if (position >= period) position -= period;
  };
  int64_t i = 0;
  for (; i + n <= size; i += n) apply(v + i, w + i);
  if (i < size) {
    W last[kPadding];
    apply(Tail<V>(v + i, size - i).values, last);
    std::memcpy(w + i, last, (size - i) * sizeof(W));
  }
}

// grad_v = scale * (grad_w - projection * v)
template <class V, class W>
void ScaleBackward(const void* grad_w_bytes, const void* v_bytes, int64_t size, int64_t position,
                   int64_t period, const Factors& scale, const Factors& projection,
                   void* grad_v_bytes) {
  using C = ComputeType<V, W>;
  constexpr int n = kLanes<C>;
  const V* v = static_cast<const V*>(v_bytes);
  const W* grad_w = static_cast<const W*>(grad_w_bytes);
  V* grad_v = static_cast<V*>(grad_v_bytes);
  const C* scale_power = static_cast<const C*>(scale.power);
  const C* scale_rest = static_cast<const C*>(scale.rest);
  const C* projection_power = static_cast<const C*>(projection.power);
  const C* projection_rest = static_cast<const C*>(projection.rest);
  auto apply = [&](const W* grad_w_at, const V* v_at, V* grad_v_at) __attribute__((always_inline)) {
    const Vector<C, n> along_v = Load<C, n>(v_at) * Load<C, n>(projection_power + position) *
                                 Load<C, n>(projection_rest + position);
    Store<C, n>((Load<C, n>(grad_w_at) - along_v) * Load<C, n>(scale_power + position) *
                    Load<C, n>(scale_rest + position),
                grad_v_at);
    position += n;
    if (position >= period) position -= period;
  };
  int64_t i = 0;
  for (; i + n <= size; i += n) apply(grad_w + i, v + i, grad_v + i);
  if (i < size) {
    V last[kPadding];
    apply(Tail<W>(grad_w + i, size - i).values, Tail<V>(v + i, size - i).values, last);
    std::memcpy(grad_v + i, last, (size - i) * sizeof(V));
  }
}

template <class V, class W>
Kernels KernelsOf() {
  return {SquareSums<V>, ProductSums<V, W>, ScaleForward<V, W>, ScaleBackward<V, W>};
}

template <class V>
Kernels KernelsOf(Type w) {
  switch (w) {
    case Type::kHalf: return KernelsOf<V, Half>();
    case Type::kBfloat16: return KernelsOf<V, Bfloat16>();
    case Type::kFloat: return KernelsOf<V, float>();
    default: return KernelsOf<V, double>();
  }
}

Kernels KernelsFor(Type v, Type w) {
  switch (v) {
    case Type::kHalf: return KernelsOf<Half>(w);
    case Type::kBfloat16: return KernelsOf<Bfloat16>(w);
    case Type::kFloat: return KernelsOf<float>(w);
    default: return KernelsOf<double>(w);
  }
}
