// Vectors and conversions for one instruction set. weight_norm_cpu_levels.h includes this file once
// per set, inside that set's namespace and with TFWN_VECTOR_BYTES defined, so it has no include
// guard and no #include.

constexpr int kVectorBytes = TFWN_VECTOR_BYTES;

template <class T, int n>
struct VectorOf {
  typedef T type __attribute__((vector_size(n * sizeof(T))));
};
template <class T>
struct VectorOf<T, 1> {  // A scalar, because GCC 12 miscompiles one-lane vectors.
  using type = T;
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

// In the four functions below, Bits is uint32_t or a vector of it, and F is float or a vector of
// it.

// Subnormal halves are converted by a subtraction of normal floats, so that the result does not
// depend on whether the processor flushes subnormals.
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
  // Rounds to nearest even by carrying into the bits that are kept.
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

// The upper half of each result is the bfloat16.
template <class Bits, class F>
TFWN_INLINE Bits RoundToBfloat16(F value) {
  const Bits bits = BitCast<Bits>(value);
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bits quiet_nan = bits | 0x400000u;  // Rounding could turn a NaN into infinity.
  return (bits & 0x7fffffffu) > (255u << 23) ? quiet_nan : rounded;
}

template <class C, int n>
TFWN_INLINE Vector<C, n> Absolute(const Vector<C, n>& x) {
  using Bits = Vector<std::conditional_t<sizeof(C) == 4, uint32_t, uint64_t>, n>;
  return BitCast<Vector<C, n>>(Bits(BitCast<Bits>(x) & (~Bits{} >> 1)));
}

template <class To>
TFWN_INLINE To LoadBytes(const void* from) {
  To to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

// The lanes of a vector that are in memory: all, or the first `count`. The others read as 0.
struct All {
  All From(int64_t) const { return {}; }
};
struct First {
  int64_t count;
  First From(int64_t lane) const { return {count - lane}; }
};

template <int n>
TFWN_INLINE uint32_t MaskOf(First lanes) {
  const uint32_t all = static_cast<uint32_t>((uint64_t{1} << n) - 1);
  if (lanes.count >= n) return all;
  return lanes.count <= 0 ? 0 : (1u << lanes.count) - 1;
}

template <class T, int n>
TFWN_INLINE Vector<T, n> LoadLanes(const void* from, All) {
  return LoadBytes<Vector<T, n>>(from);
}

template <class T, int n>
TFWN_INLINE Vector<T, n> LoadLanes(const void* from, First lanes) {
#if TFWN_VECTOR_BYTES == 64
  const uint32_t mask = MaskOf<n>(lanes);
  if constexpr (sizeof(T) == 2 && n == 32) {
    return BitCast<Vector<T, n>>(_mm512_maskz_loadu_epi16(mask, from));
  } else if constexpr (sizeof(T) == 2 && n == 16) {
    return BitCast<Vector<T, n>>(_mm256_maskz_loadu_epi16(mask, from));
  } else if constexpr (sizeof(T) == 2 && n == 8) {
    return BitCast<Vector<T, n>>(_mm_maskz_loadu_epi16(mask, from));
  } else if constexpr (sizeof(T) == 4 && n == 16) {
    return BitCast<Vector<T, n>>(_mm512_maskz_loadu_epi32(mask, from));
  } else if constexpr (sizeof(T) == 4 && n == 8) {
    return BitCast<Vector<T, n>>(_mm256_maskz_loadu_epi32(mask, from));
  } else {
    static_assert(sizeof(T) == 8 && n == 8);
    return BitCast<Vector<T, n>>(_mm512_maskz_loadu_epi64(mask, from));
  }
#else
  Vector<T, n> to = {};
  const int64_t count = std::min<int64_t>(lanes.count, n);
  if (count > 0) std::memcpy(&to, from, count * sizeof(T));
  return to;
#endif
}

template <class T, int n>
TFWN_INLINE void StoreLanes(const Vector<T, n>& from, void* to, All) {
  std::memcpy(to, &from, sizeof(from));
}

template <class T, int n>
TFWN_INLINE void StoreLanes(const Vector<T, n>& from, void* to, First lanes) {
#if TFWN_VECTOR_BYTES == 64
  const uint32_t mask = MaskOf<n>(lanes);
  if constexpr (sizeof(T) == 2 && n == 32) {
    _mm512_mask_storeu_epi16(to, mask, BitCast<__m512i>(from));
  } else if constexpr (sizeof(T) == 2 && n == 16) {
    _mm256_mask_storeu_epi16(to, mask, BitCast<__m256i>(from));
  } else if constexpr (sizeof(T) == 2 && n == 8) {
    _mm_mask_storeu_epi16(to, mask, BitCast<__m128i>(from));
  } else if constexpr (sizeof(T) == 4 && n == 16) {
    _mm512_mask_storeu_epi32(to, mask, BitCast<__m512i>(from));
  } else if constexpr (sizeof(T) == 4 && n == 8) {
    _mm256_mask_storeu_epi32(to, mask, BitCast<__m256i>(from));
  } else {
    static_assert(sizeof(T) == 8 && n == 8);
    _mm512_mask_storeu_epi64(to, mask, BitCast<__m512i>(from));
  }
#else
  const int64_t count = std::min<int64_t>(lanes.count, n);
  if (count > 0) std::memcpy(to, &from, count * sizeof(T));
#endif
}

// Widens or narrows each lane. Without the intrinsics, compilers go through halves of the vector.
// The masks are all ones, and used only because GCC warns of an undefined value in the unmasked
// ones.
template <class To, class From, int n>
TFWN_INLINE Vector<To, n> Convert(const Vector<From, n>& from) {
#if TFWN_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<To, double> && std::is_same_v<From, float> && n == 8) {
    return BitCast<Vector<To, n>>(_mm512_maskz_cvtps_pd(0xff, BitCast<__m256>(from)));
  } else if constexpr (std::is_same_v<To, float> && std::is_same_v<From, double> && n == 8) {
    return BitCast<Vector<To, n>>(_mm512_maskz_cvtpd_ps(0xff, BitCast<__m512d>(from)));
  } else if constexpr (std::is_same_v<To, uint32_t> && n == 16) {
    return BitCast<Vector<To, n>>(_mm512_maskz_cvtepu16_epi32(0xffff, BitCast<__m256i>(from)));
  } else if constexpr (std::is_same_v<To, uint16_t> && n == 16) {
    return BitCast<Vector<To, n>>(_mm512_maskz_cvtepi32_epi16(0xffff, BitCast<__m512i>(from)));
  } else if constexpr (std::is_same_v<To, uint16_t> && n == 8) {
    return BitCast<Vector<To, n>>(_mm256_maskz_cvtepi32_epi16(0xff, BitCast<__m256i>(from)));
  } else
#endif
#if TFWN_VECTOR_BYTES >= 32
      if constexpr (std::is_same_v<To, uint32_t> && n == 8) {
    return BitCast<Vector<To, n>>(_mm256_cvtepu16_epi32(BitCast<__m128i>(from)));
  } else
#endif
      if constexpr (n == 1) {
    return static_cast<To>(from);
  } else {
    return __builtin_convertvector(from, Vector<To, n>);
  }
}

// Loads n numbers of type T and converts them to C, float or double.
template <class C, int n, class T, class Lanes = All>
TFWN_INLINE Vector<C, n> Load(const T* from, Lanes lanes = {}) {
  if constexpr (std::is_same_v<C, T>) {
    return LoadLanes<C, n>(from, lanes);
  } else if constexpr (std::is_same_v<C, double>) {
    return Convert<double, float, n>(Load<float, n>(from, lanes));
  } else if constexpr (std::is_same_v<T, double>) {
    return Convert<float, double, n>(LoadLanes<double, n>(from, lanes));
  } else {
    const auto bits = LoadLanes<uint16_t, n>(from, lanes);
#if TFWN_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, Half> && n == 16) {
      return BitCast<Vector<C, n>>(_mm512_maskz_cvtph_ps(0xffff, BitCast<__m256i>(bits)));
    }
#endif
#if TFWN_VECTOR_BYTES >= 32
    if constexpr (std::is_same_v<T, Half> && n == 8) {
      return BitCast<Vector<C, n>>(_mm256_cvtph_ps(BitCast<__m128i>(bits)));
    }
    if constexpr (std::is_same_v<T, Half> && n == 4) {
      return BitCast<Vector<C, n>>(_mm_cvtph_ps(_mm_set1_epi64x(BitCast<int64_t>(bits))));
    }
#endif
    const auto wide = Convert<uint32_t, uint16_t, n>(bits);
    if constexpr (std::is_same_v<T, Half>) {
      return FloatFromHalfBits<Vector<C, n>>(wide);
    } else {
      return FloatFromBfloat16Bits<Vector<C, n>>(wide);
    }
  }
}

// Converts n numbers of type C to type T and stores them. A double becomes a 16-bit type by way of
// float.
template <class C, int n, class T, class Lanes = All>
TFWN_INLINE void Store(const Vector<C, n>& from, T* to, Lanes lanes = {}) {
  if constexpr (std::is_same_v<C, T>) {
    StoreLanes<T, n>(from, to, lanes);
  } else if constexpr (std::is_same_v<T, double>) {
    StoreLanes<T, n>(Convert<double, float, n>(from), to, lanes);
  } else if constexpr (std::is_same_v<C, double>) {
    Store<float, n>(Convert<float, double, n>(from), to, lanes);
  } else {
#if TFWN_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, Half> && n == 16) {
      const __m256i halves =
          _mm512_maskz_cvtps_ph(0xffff, BitCast<__m512>(from), _MM_FROUND_TO_NEAREST_INT);
      return StoreLanes<uint16_t, n>(BitCast<Vector<uint16_t, n>>(halves), to, lanes);
    }
#endif
#if TFWN_VECTOR_BYTES >= 32
    if constexpr (std::is_same_v<T, Half> && n == 8) {
      const __m128i halves = _mm256_cvtps_ph(BitCast<__m256>(from), _MM_FROUND_TO_NEAREST_INT);
      return StoreLanes<uint16_t, n>(BitCast<Vector<uint16_t, n>>(halves), to, lanes);
    }
#endif
    Vector<uint32_t, n> bits;
    if constexpr (std::is_same_v<T, Half>) {
      bits = HalfBitsFromFloat<Vector<uint32_t, n>>(from);
    } else {
      bits = RoundToBfloat16<Vector<uint32_t, n>>(from) >> 16;
    }
    StoreLanes<uint16_t, n>(Convert<uint16_t, uint32_t, n>(bits), to, lanes);
  }
}

template <int n>
TFWN_INLINE double SumLanes(const Vector<double, n>& x) {
  if constexpr (n == 1) {
    return x;
  } else {
    Vector<double, n / 2> halves[2];
    std::memcpy(halves, &x, sizeof(halves));
    return SumLanes<n / 2>(halves[0] + halves[1]);
  }
}

TFWN_INLINE void StoreAsDoubles(const Vector<float, kLanes<float>>& from, double* to) {
  constexpr int n = kLanes<double>;
#if TFWN_VECTOR_BYTES == 64
  const __m512 x = BitCast<__m512>(from);
  const auto low = BitCast<Vector<float, n>>(_mm512_maskz_extractf32x8_ps(0xff, x, 0));
  const auto high = BitCast<Vector<float, n>>(_mm512_maskz_extractf32x8_ps(0xff, x, 1));
#elif TFWN_VECTOR_BYTES == 32
  const __m256 x = BitCast<__m256>(from);
  const auto low = BitCast<Vector<float, n>>(_mm256_extractf128_ps(x, 0));
  const auto high = BitCast<Vector<float, n>>(_mm256_extractf128_ps(x, 1));
#else
  const Vector<float, n> low = {from[0], from[1]}, high = {from[2], from[3]};
#endif
  Store<double, n>(Convert<double, float, n>(low), to);
  Store<double, n>(Convert<double, float, n>(high), to + n);
}

TFWN_INLINE void StoreAsDoubles(const Vector<double, kLanes<double>>& from, double* to) {
  Store<double, kLanes<double>>(from, to);
}

// A bit mask of the lanes that are not in [least, most].
TFWN_INLINE uint32_t Outside(const Vector<float, kLanes<float>>& x, float least, float most) {
#if TFWN_VECTOR_BYTES == 64
  const __m512 y = BitCast<__m512>(x);
  return _mm512_cmp_ps_mask(y, _mm512_set1_ps(least), _CMP_NGE_UQ) |
         _mm512_cmp_ps_mask(y, _mm512_set1_ps(most), _CMP_NLE_UQ);
#elif TFWN_VECTOR_BYTES == 32
  const __m256 y = BitCast<__m256>(x);
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(y, _mm256_set1_ps(least), _CMP_NGE_UQ),
                                         _mm256_cmp_ps(y, _mm256_set1_ps(most), _CMP_NLE_UQ)));
#else
  uint32_t lanes = 0;
  for (int k = 0; k < kLanes<float>; ++k) lanes |= uint32_t{!(x[k] >= least && x[k] <= most)} << k;
  return lanes;
#endif
}

// Two vectors that hold kPair consecutive elements: the first and the second half, or the even and
// the odd elements, each of which takes one instruction to convert from bfloat16.
template <class C>
constexpr int kPair = 2 * kLanes<C>;

template <class C>
struct Pair {
  Vector<C, kLanes<C>> left, right;
};

template <class C, bool even_odd, class T, class Lanes = All>
TFWN_INLINE Pair<C> LoadPair(const T* from, Lanes lanes = {}) {
  constexpr int n = kLanes<C>;
  if constexpr (even_odd) {
    static_assert(std::is_same_v<T, Bfloat16> && std::is_same_v<C, float>);
    using Bits = Vector<uint32_t, n>;
    const Bits bits = BitCast<Bits>(LoadLanes<uint16_t, 2 * n>(from, lanes));
    return {BitCast<Vector<C, n>>(Bits(bits << 16)),
            BitCast<Vector<C, n>>(Bits(bits & 0xffff0000u))};
  } else {
    return {Load<C, n>(from, lanes), Load<C, n>(from + n, lanes.From(n))};
  }
}

// Whether the processor's own rounding to bfloat16 applies: one instruction instead of ten.
template <class C, class T>
constexpr bool kOwnRounding =
    kVectorBytes == 64 && std::is_same_v<C, float> && std::is_same_v<T, Bfloat16>;

#if TFWN_VECTOR_BYTES == 64
// Returns false if a number is subnormal, because the instruction would round it to 0.
template <bool even_odd>
TFWN_INLINE bool RoundPair(const Pair<float>& from, Vector<uint16_t, 32>* to) {
  constexpr int kSubnormal = 0x20;
  const __m512 left = BitCast<__m512>(from.left), right = BitCast<__m512>(from.right);
  const uint32_t subnormal =
      _mm512_fpclass_ps_mask(left, kSubnormal) | _mm512_fpclass_ps_mask(right, kSubnormal);
  if (__builtin_expect(subnormal != 0, 0)) return false;
  *to = BitCast<Vector<uint16_t, 32>>(_mm512_cvtne2ps_pbh(right, left));
  if constexpr (even_odd) {
    constexpr Vector<uint16_t, 32> kInterleave = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                  21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                  11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    *to = BitCast<Vector<uint16_t, 32>>(_mm512_maskz_permutexvar_epi16(
        ~__mmask32{}, BitCast<__m512i>(kInterleave), BitCast<__m512i>(*to)));
  }
  return true;
}
#endif

template <class C, bool even_odd, bool own_rounding, class T, class Lanes = All>
TFWN_INLINE void StorePair(const Pair<C>& from, T* to, Lanes lanes = {}) {
  constexpr int n = kLanes<C>;
#if TFWN_VECTOR_BYTES == 64
  if constexpr (own_rounding) {
    Vector<uint16_t, 2 * n> rounded;
    if (RoundPair<even_odd>(from, &rounded)) return StoreLanes<uint16_t, 2 * n>(rounded, to, lanes);
  }
#endif
  if constexpr (even_odd) {
    using Bits = Vector<uint32_t, n>;
    const Bits bits =
        RoundToBfloat16<Bits>(from.left) >> 16 | (RoundToBfloat16<Bits>(from.right) & 0xffff0000u);
    StoreLanes<uint16_t, 2 * n>(BitCast<Vector<uint16_t, 2 * n>>(bits), to, lanes);
  } else {
    Store<C, n>(from.left, to, lanes);
    Store<C, n>(from.right, to + n, lanes.From(n));
  }
}

// Whether a pair fills whole vectors when stored. Doubles stored as a 16-bit type do not.
template <class C, class T>
constexpr bool kStreams = kPair<C> * sizeof(T) % kVectorBytes == 0;

// StorePair that bypasses the caches. The address must be a multiple of a vector's size.
template <class C, bool even_odd, bool own_rounding, class T>
TFWN_INLINE void StreamPair(const Pair<C>& from, T* to) {
#if defined(__x86_64__)
  alignas(64) T elements[kPair<C>];
  StorePair<C, even_odd, own_rounding>(from, elements);
  for (size_t k = 0; k < sizeof(elements); k += kVectorBytes) {
    const char* part = reinterpret_cast<const char*>(elements) + k;
    char* out = reinterpret_cast<char*>(to) + k;
#if TFWN_VECTOR_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), LoadBytes<__m512i>(part));
#elif TFWN_VECTOR_BYTES == 32
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), LoadBytes<__m256i>(part));
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(out), LoadBytes<__m128i>(part));
#endif
  }
#else
  StorePair<C, even_odd, own_rounding>(from, to);
#endif
}

#if defined(__clang__)
template <class T, int n, int... k>
TFWN_INLINE Vector<T, n> Shuffle(const Vector<T, n>& a, const Vector<T, n>& b,
                                 std::integer_sequence<int, k...>) {
  return __builtin_shufflevector(a, b, k...);
}
#else
template <class T, int n, int... k>
TFWN_INLINE Vector<T, n> Shuffle(const Vector<T, n>& a, const Vector<T, n>& b,
                                 std::integer_sequence<int, k...>) {
  return __builtin_shuffle(a, b,
                           Vector<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>, n>{k...});
}
#endif

template <class C, int... k>
TFWN_INLINE Pair<C> Split(const Pair<C>& x, std::integer_sequence<int, k...>) {
  return {Shuffle<C, kLanes<C>>(x.left, x.right, std::integer_sequence<int, 2 * k...>()),
          Shuffle<C, kLanes<C>>(x.left, x.right, std::integer_sequence<int, 2 * k + 1 ...>())};
}

template <class C, int... k>
TFWN_INLINE Pair<C> Merge(const Pair<C>& x, std::integer_sequence<int, k...>) {
  constexpr int n = kLanes<C>;
  return {
      Shuffle<C, n>(x.left, x.right, std::integer_sequence<int, k % 2 * n + k / 2 ...>()),
      Shuffle<C, n>(x.left, x.right, std::integer_sequence<int, k % 2 * n + (n + k) / 2 ...>())};
}

// Converts halves to even and odd elements, and back.
template <class C>
TFWN_INLINE Pair<C> EvenOdd(const Pair<C>& halves) {
  return Split(halves, std::make_integer_sequence<int, kLanes<C>>());
}
template <class C>
TFWN_INLINE Pair<C> Halves(const Pair<C>& even_odd) {
  return Merge(even_odd, std::make_integer_sequence<int, kLanes<C>>());
}
