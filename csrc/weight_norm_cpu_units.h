// The arithmetic on one number per unit, for one instruction set. weight_norm_cpu_levels.h includes
// this file once per set, as it does weight_norm_cpu_kernels.h, on which this file depends.
//
// All computations are in double, on vectors of units first and then on the remaining single units.

// total[j] += the sum of column j
void AddRows(const double* sums, int64_t rows, int64_t width, int64_t stride, double* total) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t j = 0; j < width; ++j) total[j] += sums[row * stride + j];
  }
}

template <int n>
TFWN_INLINE Vector<double, n> LoadNumbers(Type type, const void* from, int64_t i) {
  switch (type) {
    case Type::kHalf:
      return Load<double, n>(static_cast<const Half*>(from) + i);
    case Type::kBfloat16:
      return Load<double, n>(static_cast<const Bfloat16*>(from) + i);
    case Type::kFloat:
      return Load<double, n>(static_cast<const float*>(from) + i);
    default:
      return Load<double, n>(static_cast<const double*>(from) + i);
  }
}

template <int n>
TFWN_INLINE void StoreNumbers(const Vector<double, n>& from, Type type, void* to, int64_t i) {
  switch (type) {
    case Type::kHalf:
      return Store<double, n>(from, static_cast<Half*>(to) + i);
    case Type::kBfloat16:
      return Store<double, n>(from, static_cast<Bfloat16*>(to) + i);
    case Type::kFloat:
      return Store<double, n>(from, static_cast<float*>(to) + i);
    default:
      return Store<double, n>(from, static_cast<double*>(to) + i);
  }
}

template <int n>
TFWN_INLINE Vector<double, n> SquareRoot(Vector<double, n> x) {
  if constexpr (n == 1) {
    return std::sqrt(x);
  } else {
#if TFWN_VECTOR_BYTES == 64
    return BitCast<Vector<double, n>>(_mm512_maskz_sqrt_pd(0xff, BitCast<__m512d>(x)));
#elif TFWN_VECTOR_BYTES == 32
    return BitCast<Vector<double, n>>(_mm256_sqrt_pd(BitCast<__m256d>(x)));
#else
    for (int k = 0; k < n; ++k) x[k] = std::sqrt(x[k]);
    return x;
#endif
  }
}

// x / norm, given 1 / norm, or 0 for norm = 0, so that a unit with v = 0 gets zero weights and
// gradients even if x is not finite.
template <int n>
TFWN_INLINE Vector<double, n> Over(const Vector<double, n>& x, const Vector<double, n>& norm,
                                   const Vector<double, n>& reciprocal) {
  return norm == 0.0 ? norm : x * reciprocal;
}

// Splits factors into fraction * power (see Factors). Returns whether any power is not 1.
template <class C, int n>
TFWN_INLINE bool StoreFactors(const Vector<double, n>& factor, const Factors& to, int64_t i) {
  using Doubles = Vector<double, n>;
  using Bits = Vector<int64_t, n>;
  constexpr int64_t kMost = std::is_same_v<C, double> ? 1022 : 126;
  Bits exponent = ((BitCast<Bits>(factor) >> 52) & 0x7ff) - 1023;
  // Normal numbers need no power. Zero, infinity and NaN must not have one, because 0 * infinity is
  // NaN.
  const auto alone =
      ((exponent >= -kMost) & (exponent <= kMost)) | (exponent == 1024) | (factor == 0.0);
  exponent = exponent < -kMost ? Bits{} - kMost : exponent;
  exponent = exponent > kMost ? Bits{} + kMost : exponent;
  exponent = alone ? Bits{} : exponent;
  Store<double, n>(Doubles(factor * BitCast<Doubles>(Bits((1023 - exponent) << 52))),
                   static_cast<C*>(to.fraction) + i);
  Store<double, n>(BitCast<Doubles>(Bits((exponent + 1023) << 52)), static_cast<C*>(to.power) + i);
  if constexpr (n == 1) {
    return !alone;
  } else {
    int64_t all = -1;
    for (int k = 0; k < n; ++k) all &= alone[k];
    return all == 0;
  }
}

// Combines units [i, i + n) of a block. Returns whether any power is not 1.
template <class C, bool backward, int n>
TFWN_INLINE bool CombineVector(const UnitBlock& units, int64_t i) {
  const auto sum = Load<double, n>(units.sums + i);
  const auto g = LoadNumbers<n>(units.g_type, units.g, i);
  if constexpr (backward) {
    const auto norm = LoadNumbers<n>(units.norm_type, units.norm, i);
    const Vector<double, n> reciprocal = 1.0 / norm;
    const auto grad_g = Over<n>(sum, norm, reciprocal);
    StoreNumbers<n>(grad_g, units.g_type, units.grad_g, i);
    const bool powers = StoreFactors<C, n>(Over<n>(grad_g, norm, reciprocal), units.projections, i);
    return StoreFactors<C, n>(Over<n>(g, norm, reciprocal), units.scales, i) || powers;
  } else {
    const auto norm = SquareRoot<n>(sum);
    StoreNumbers<n>(norm, units.norm_type, units.norm, i);
    return StoreFactors<C, n>(Over<n>(g, norm, 1.0 / norm), units.scales, i);
  }
}

template <class C, bool backward>
bool CombineUnits(const UnitBlock& units) {
  bool powers = false;
  int64_t i = 0;
  for (; i + kDoubles <= units.count; i += kDoubles) {
    powers |= CombineVector<C, backward, kDoubles>(units, i);
  }
  for (; i < units.count; ++i) powers |= CombineVector<C, backward, 1>(units, i);
  return powers;
}

constexpr UnitKernels kUnitKernels = {
    AddRows,
    {CombineUnits<float, false>, CombineUnits<double, false>},
    {CombineUnits<float, true>, CombineUnits<double, true>},
};
