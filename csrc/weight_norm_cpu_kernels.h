// The loops over elements, for one instruction set. weight_norm_cpu.cc includes this file once per
// set, inside a namespace of its own, with TFWN_VECTOR_BYTES defined; hence no
// include guard and no #include.
//
// A Block is read in one of two ways. As columns: each column has a sum and factors. As segments:
// each row has.

constexpr int kVectorBytes = TFWN_VECTOR_BYTES;

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

template <class C, int n>
TFWN_INLINE Vector<C, n> Absolute(const Vector<C, n>& x) {
  using Bits = Vector<std::conditional_t<sizeof(C) == 4, uint32_t, uint64_t>, n>;
  return BitCast<Vector<C, n>>(Bits(BitCast<Bits>(x) & (~Bits{} >> 1)));
}

template <class To, class From>
TFWN_INLINE To LoadBytes(const From* from) {
  To to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

// Widens or narrows each lane. The compiler can do it alone, but takes detours through halves of
// the vector. (The masks are all ones: GCC warns of an undefined value in the unmasked functions.)
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
  {
    return __builtin_convertvector(from, Vector<To, n>);
  }
}

// Loads n numbers of type T and converts them to C, float or double.
template <class C, int n, class T>
TFWN_INLINE Vector<C, n> Load(const T* from) {
  if constexpr (std::is_same_v<C, T>) {
    return LoadBytes<Vector<C, n>>(from);
  } else if constexpr (std::is_same_v<C, double>) {
    return Convert<double, float, n>(Load<float, n>(from));
  } else if constexpr (std::is_same_v<T, double>) {
    return Convert<float, double, n>(LoadBytes<Vector<double, n>>(from));
  } else {
#if TFWN_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, Half> && n == 16) {
      return BitCast<Vector<C, n>>(_mm512_maskz_cvtph_ps(0xffff, LoadBytes<__m256i>(from)));
    }
#endif
#if TFWN_VECTOR_BYTES >= 32
    if constexpr (std::is_same_v<T, Half> && n == 8) {
      return BitCast<Vector<C, n>>(_mm256_cvtph_ps(LoadBytes<__m128i>(from)));
    }
    if constexpr (std::is_same_v<T, Half> && n == 4) {
      return BitCast<Vector<C, n>>(_mm_cvtph_ps(_mm_set1_epi64x(LoadBytes<int64_t>(from))));
    }
#endif
    const auto bits = Convert<uint32_t, uint16_t, n>(LoadBytes<Vector<uint16_t, n>>(from));
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
  } else if constexpr (std::is_same_v<T, double>) {
    Store<double, n>(Convert<double, float, n>(from), to);
  } else if constexpr (std::is_same_v<C, double>) {
    Store<float, n>(Convert<float, double, n>(from), to);
  } else {
#if TFWN_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, Half> && n == 16) {
      const __m256i halves =
          _mm512_maskz_cvtps_ph(0xffff, BitCast<__m512>(from), _MM_FROUND_TO_NEAREST_INT);
      std::memcpy(to, &halves, sizeof(halves));
      return;
    }
#endif
#if TFWN_VECTOR_BYTES >= 32
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
    const auto narrow = Convert<uint16_t, uint32_t, n>(bits);
    std::memcpy(to, &narrow, sizeof(narrow));
  }
}

// Asks for an element that may lie past the end of the tensor.
template <class T>
TFWN_INLINE void Prefetch(const T* base, int64_t i) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(base) + i * sizeof(T)));
}

// The same for an element that will be written.
template <class T>
TFWN_INLINE void PrefetchToWrite(T* base, int64_t i) {
  __builtin_prefetch(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(base) + i * sizeof(T)), 1);
}

// A term of a sum over elements: v^2 in eq. 2, grad_w * v in eq. 3.
template <class V>
struct Square {
  const V* v;
  template <int n>
  TFWN_INLINE Vector<double, n> At(int64_t i) const {
    const Vector<double, n> x = Load<double, n>(v + i);
    return x * x;
  }
  TFWN_INLINE void Fetch(int64_t i) const { Prefetch(v, i); }
};

template <class V, class W>
struct Product {
  const W* grad_w;
  const V* v;
  template <int n>
  TFWN_INLINE Vector<double, n> At(int64_t i) const {
    return Load<double, n>(grad_w + i) * Load<double, n>(v + i);
  }
  TFWN_INLINE void Fetch(int64_t i) const {
    Prefetch(grad_w, i);
    Prefetch(v, i);
  }
};

// A partial sum.
struct Plain {
  const double* sums;
  template <int n>
  TFWN_INLINE Vector<double, n> At(int64_t i) const {
    return LoadBytes<Vector<double, n>>(sums + i);
  }
  TFWN_INLINE void Fetch(int64_t) const {}
};

// The last vector of a row overlaps the one before: only its last `fresh` numbers are new.
template <int n>
TFWN_INLINE Vector<double, n> OnlyFresh(const Vector<double, n>& x, int64_t fresh) {
  Vector<int64_t, n> lane;
  for (int k = 0; k < n; ++k) lane[k] = k;
  return BitCast<Vector<double, n>>(
      Vector<int64_t, n>(BitCast<Vector<int64_t, n>>(x) & (lane >= n - fresh)));
}

template <int n>
TFWN_INLINE double SumLanes(const Vector<double, n>& x) {
  if constexpr (n == 1) {
    return x[0];
  } else {
    Vector<double, n / 2> halves[2];
    std::memcpy(halves, &x, sizeof(halves));
    return SumLanes<n / 2>(halves[0] + halves[1]);
  }
}

// The terms of `group` rows, added to sum.
template <int n, int group, class Term>
TFWN_INLINE Vector<double, n> AddTerms(Term term, int64_t i, int64_t stride,
                                       Vector<double, n> sum) {
  static_assert(group == 1 || group == 4);
  sum += term.template At<n>(i);
  if constexpr (group == 4) {
    sum += term.template At<n>(i + stride);
    sum += term.template At<n>(i + 2 * stride);
    sum += term.template At<n>(i + 3 * stride);
  }
  return sum;
}

// sums[j] += the terms of column j, `group` rows of them; fetches the group below.
template <int n, int group, class Term>
TFWN_INLINE void SumGroup(Term term, int64_t i, int64_t width, int64_t stride, double* sums) {
  int64_t j = 0;
  for (; j + 2 * n <= width; j += 2 * n) {  // A whole cache line of floats, with 64-byte vectors.
    for (int row = group; row < 2 * group; ++row) term.Fetch(i + j + row * stride);
    const auto left = LoadBytes<Vector<double, n>>(sums + j);
    const auto right = LoadBytes<Vector<double, n>>(sums + j + n);
    Store<double, n>(AddTerms<n, group>(term, i + j, stride, left), sums + j);
    Store<double, n>(AddTerms<n, group>(term, i + j + n, stride, right), sums + j + n);
  }
  if (j + n <= width) {
    const auto sum = LoadBytes<Vector<double, n>>(sums + j);
    Store<double, n>(AddTerms<n, group>(term, i + j, stride, sum), sums + j);
    j += n;
  }
  if (j == width) return;
  const auto last = AddTerms<n, group>(term, i + width - n, stride, Vector<double, n>{});
  const auto sum = LoadBytes<Vector<double, n>>(sums + width - n);
  Store<double, n>(sum + OnlyFresh<n>(last, width - j), sums + width - n);
}

template <int n, class Term>
TFWN_INLINE void SumColumns(Term term, const Block& block, double* sums) {
  int64_t row = 0;
  for (; row + 4 <= block.rows; row += 4) {
    SumGroup<n, 4>(term, row * block.stride, block.width, block.stride, sums);
  }
  for (; row < block.rows; ++row) {
    SumGroup<n, 1>(term, row * block.stride, block.width, block.stride, sums);
  }
}

// sums[i] = the terms of row i
template <int n, class Term>
TFWN_INLINE void SumSegments(Term term, const Block& block, double* sums) {
  const int64_t width = block.width;
  for (int64_t row = 0; row < block.rows; ++row) {
    const int64_t i = row * block.stride;
    Vector<double, n> sum = {};
    int64_t j = 0;
    if (4 * n <= width) {
      Vector<double, n> a = {}, b = {}, c = {};
      for (; j + 4 * n <= width; j += 4 * n) {
        sum += term.template At<n>(i + j);
        a += term.template At<n>(i + j + n);
        b += term.template At<n>(i + j + 2 * n);
        c += term.template At<n>(i + j + 3 * n);
      }
      sum = (sum + a) + (b + c);
    }
    for (; j + n <= width; j += n) sum += term.template At<n>(i + j);
    if (j < width) sum += OnlyFresh<n>(term.template At<n>(i + width - n), width - j);
    sums[row] = SumLanes<n>(sum);
  }
}

// The factors of a row of a block: one per column, or one for the segment.
template <class C>
struct ColumnFactors {
  const C* power;
  const C* rest;
  ColumnFactors(const Factors& from, int64_t /*row*/)
      : power(static_cast<const C*>(from.power)), rest(static_cast<const C*>(from.rest)) {}
  template <int n>
  TFWN_INLINE Vector<C, n> Times(const Vector<C, n>& x, int64_t j) const {
    return x * LoadBytes<Vector<C, n>>(power + j) * LoadBytes<Vector<C, n>>(rest + j);
  }
};

template <class C>
struct SegmentFactor {
  C power;
  C rest;
  SegmentFactor(const Factors& from, int64_t row)
      : power(static_cast<const C*>(from.power)[row]),
        rest(static_cast<const C*>(from.rest)[row]) {}
  template <int n>
  TFWN_INLINE Vector<C, n> Times(const Vector<C, n>& x, int64_t) const {
    return x * power * rest;
  }
};

// w = scale * v
template <class V, class W, class Factor>
struct ForwardScale {
  using C = ComputeType<V, W>;
  const V* v;
  W* w;
  Factor scale;
  int64_t ahead;
  template <int n>
  TFWN_INLINE void At(int64_t i, int64_t j) const {
    Prefetch(v, i + ahead);
    PrefetchToWrite(w, i + kAhead);
    Store<C, n>(scale.template Times<n>(Load<C, n>(v + i), j), w + i);
  }
};

// grad_v = scale * (grad_w - projection * v)
template <class V, class W, class Factor>
struct BackwardScale {
  using C = ComputeType<V, W>;
  const W* grad_w;
  const V* v;
  V* grad_v;
  Factor scale, projection;
  int64_t ahead;
  template <int n>
  TFWN_INLINE void At(int64_t i, int64_t j) const {
    Prefetch(v, i + ahead);
    Prefetch(grad_w, i + ahead);
    PrefetchToWrite(grad_v, i + kAhead);
    const Vector<C, n> x = Load<C, n>(grad_w + i);
    const Vector<C, n> along_v = projection.template Times<n>(Load<C, n>(v + i), j);
    Vector<C, n> across = x - along_v;
    across = Absolute<C, n>(across) < Absolute<C, n>(x) * kRounding<C> ? Vector<C, n>{} : across;
    Store<C, n>(scale.template Times<n>(across, j), grad_v + i);
  }
};

// Applies scale to the elements from begin on. The last vector may overlap the one before: writing
// the same numbers twice is cheaper than a loop for the rest.
template <int n, class Scale>
TFWN_INLINE void ScaleRow(const Scale& scale, int64_t begin, int64_t width) {
  int64_t j = 0;
  for (; j + n <= width; j += n) scale.template At<n>(begin + j, j);
  if (j < width) scale.template At<n>(begin + width - n, width - n);
}

// Calls body with the number of lanes for rows of this width: as many as a vector has if they fill
// it.
template <int n, class Body>
TFWN_INLINE void ByWidth(int64_t width, const Body& body) {
  if (width >= n) return body(std::integral_constant<int, n>());
  if constexpr (n > 4) {
    if (width >= 4) return body(std::integral_constant<int, 4>());
  }
  body(std::integral_constant<int, 1>());
}

template <class V, class W, bool columns>
struct KernelsOf {
  using C = ComputeType<V, W>;
  using Factor = std::conditional_t<columns, ColumnFactors<C>, SegmentFactor<C>>;

  template <class Term>
  TFWN_INLINE static void Sum(const Term& term, const Block& block, double* sums) {
    ByWidth<kVectorBytes / sizeof(double)>(block.width, [&](auto n) __attribute__((always_inline)) {
      if constexpr (columns) {
        SumColumns<n()>(term, block, sums);
      } else {
        SumSegments<n()>(term, block, sums);
      }
    });
  }

  static void SumForward(const void* v, const Block& block, double* sums) {
    Sum(Square<V>{static_cast<const V*>(v)}, block, sums);
  }

  static void SumBackward(const void* grad_w, const void* v, const Block& block, double* sums) {
    Sum(Product<V, W>{static_cast<const W*>(grad_w), static_cast<const V*>(v)}, block, sums);
  }

  static void ScaleForward(const void* v, const Block& block, const Factors& scale, void* w) {
    ByWidth<kVectorBytes / sizeof(C)>(block.width, [&](auto n) __attribute__((always_inline)) {
      for (int64_t row = 0; row < block.rows; ++row) {
        const ForwardScale<V, W, Factor> of_row = {static_cast<const V*>(v), static_cast<W*>(w),
                                                   Factor(scale, row), block.ahead};
        ScaleRow<n()>(of_row, row * block.stride, block.width);
      }
    });
  }

  static void ScaleBackward(const void* grad_w, const void* v, const Block& block,
                            const Factors& scale, const Factors& projection, void* grad_v) {
    ByWidth<kVectorBytes / sizeof(C)>(block.width, [&](auto n) __attribute__((always_inline)) {
      for (int64_t row = 0; row < block.rows; ++row) {
        const BackwardScale<V, W, Factor> of_row = {
            static_cast<const W*>(grad_w), static_cast<const V*>(v),
            static_cast<V*>(grad_v),       Factor(scale, row),
            Factor(projection, row),       block.ahead};
        ScaleRow<n()>(of_row, row * block.stride, block.width);
      }
    });
  }
};

template <class V, class W>
Kernels KernelsForVW(bool columns) {
  using Columns = KernelsOf<V, W, true>;
  using Segments = KernelsOf<V, W, false>;
  if (columns) {
    return {Columns::SumForward, Columns::SumBackward, Columns::ScaleForward,
            Columns::ScaleBackward};
  }
  return {Segments::SumForward, Segments::SumBackward, Segments::ScaleForward,
          Segments::ScaleBackward};
}

template <class V>
Kernels KernelsForV(Type w, bool columns) {
  switch (w) {
    case Type::kHalf:
      return KernelsForVW<V, Half>(columns);
    case Type::kBfloat16:
      return KernelsForVW<V, Bfloat16>(columns);
    case Type::kFloat:
      return KernelsForVW<V, float>(columns);
    default:
      return KernelsForVW<V, double>(columns);
  }
}

Kernels KernelsFor(Type v, Type w, bool columns) {
  switch (v) {
    case Type::kHalf:
      return KernelsForV<Half>(w, columns);
    case Type::kBfloat16:
      return KernelsForV<Bfloat16>(w, columns);
    case Type::kFloat:
      return KernelsForV<float>(w, columns);
    default:
      return KernelsForV<double>(w, columns);
  }
}

// total[j] += the sums of column j
void AddRows(const double* sums, const Block& block, double* total) {
  ByWidth<kVectorBytes / sizeof(double)>(block.width, [&](auto n) __attribute__((always_inline)) {
    SumColumns<n()>(Plain{sums}, block, total);
  });
}

// The functions of one number per unit take arrays of a multiple of kUnitLanes.

constexpr int kDoubles = kVectorBytes / sizeof(double);
static_assert(kUnitLanes % kDoubles == 0);

TFWN_INLINE Vector<double, kDoubles> SquareRoot(Vector<double, kDoubles> x) {
#if TFWN_VECTOR_BYTES == 64
  return BitCast<Vector<double, 8>>(_mm512_maskz_sqrt_pd(0xff, BitCast<__m512d>(x)));
#elif TFWN_VECTOR_BYTES == 32
  return BitCast<Vector<double, 4>>(_mm256_sqrt_pd(BitCast<__m256d>(x)));
#else
  for (int k = 0; k < kDoubles; ++k) x[k] = std::sqrt(x[k]);
  return x;
#endif
}

// 1 / norm, with the one exception that makes a unit with v = 0 come out as zero.
TFWN_INLINE Vector<double, kDoubles> Reciprocal(const Vector<double, kDoubles>& norm) {
  return norm == 0.0 ? norm : 1.0 / norm;
}

void UnitsForward(int64_t count, const double* squares, const double* g, double* norms,
                  double* scales) {
  for (int64_t i = 0; i < count; i += kDoubles) {
    const auto norm = SquareRoot(Load<double, kDoubles>(squares + i));
    Store<double, kDoubles>(norm, norms + i);
    Store<double, kDoubles>(Load<double, kDoubles>(g + i) * Reciprocal(norm), scales + i);
  }
}

void UnitsBackward(int64_t count, const double* dots, const double* norms, const double* g,
                   double* grad_g, double* scales, double* projections) {
  for (int64_t i = 0; i < count; i += kDoubles) {
    const auto reciprocal = Reciprocal(Load<double, kDoubles>(norms + i));
    const auto along_v = Load<double, kDoubles>(dots + i) * reciprocal;
    Store<double, kDoubles>(along_v, grad_g + i);
    Store<double, kDoubles>(Load<double, kDoubles>(g + i) * reciprocal, scales + i);
    Store<double, kDoubles>(along_v * reciprocal, projections + i);
  }
}

// Splits factors into power * rest, see Factors.
template <class C>
void SplitFactors(int64_t count, const double* factors, C* power, C* rest) {
  using Doubles = Vector<double, kDoubles>;
  using Bits = Vector<int64_t, kDoubles>;
  constexpr int64_t kMost = std::is_same_v<C, double> ? 1022 : 126;
  for (int64_t i = 0; i < count; i += kDoubles) {
    const Doubles factor = Load<double, kDoubles>(factors + i);
    Bits exponent = ((BitCast<Bits>(factor) >> 52) & 0x7ff) - 1023;
    exponent = exponent < -kMost ? Bits{} - kMost : exponent;
    // Zero, infinity and NaN need no power, and must not make 0 * infinity of it.
    exponent = ((exponent == 1024) | (factor == 0.0)) ? Bits{} : exponent;
    exponent = exponent > kMost ? Bits{} + kMost : exponent;
    Store<double, kDoubles>(BitCast<Doubles>(Bits((exponent + 1023) << 52)), power + i);
    Store<double, kDoubles>(factor * BitCast<Doubles>(Bits((1023 - exponent) << 52)), rest + i);
  }
}

template <class T>
void ToDouble(const void* from, int64_t count, double* to) {
  ByWidth<kDoubles>(count, [&](auto n) __attribute__((always_inline)) {
    const T* x = static_cast<const T*>(from);
    int64_t i = 0;
    for (; i + n() <= count; i += n()) Store<double, n()>(Load<double, n()>(x + i), to + i);
    if (i < count) Store<double, n()>(Load<double, n()>(x + count - n()), to + count - n());
  });
}

template <class T>
void FromDouble(const double* from, int64_t count, void* to) {
  ByWidth<kDoubles>(count, [&](auto n) __attribute__((always_inline)) {
    T* x = static_cast<T*>(to);
    int64_t i = 0;
    for (; i + n() <= count; i += n()) Store<double, n()>(Load<double, n()>(from + i), x + i);
    if (i < count) Store<double, n()>(Load<double, n()>(from + count - n()), x + count - n());
  });
}

constexpr UnitKernels kUnitKernels = {
    AddRows,
    UnitsForward,
    UnitsBackward,
    SplitFactors<float>,
    SplitFactors<double>,
    {ToDouble<Half>, ToDouble<Bfloat16>, ToDouble<float>, ToDouble<double>},
    {FromDouble<Half>, FromDouble<Bfloat16>, FromDouble<float>, FromDouble<double>},
};
