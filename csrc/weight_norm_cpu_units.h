// The arithmetic on one number per unit, for one instruction set. weight_norm_cpu_levels.h includes
// this file once per set, after weight_norm_cpu_kernels.h and like it.
//
// All of it is in double, on arrays of a multiple of kUnitLanes.

static_assert(kUnitLanes % kDoubles == 0);

// total[j] += the sums of column j
void AddRows(const double* sums, int64_t rows, int64_t width, int64_t stride, double* total) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t j = 0; j < width; ++j) total[j] += sums[row * stride + j];
  }
}

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

// Splits factors into fraction * power, see Factors. Returns whether one of them needs its power.
template <class C>
bool SplitFactors(int64_t count, const double* factors, void* fractions, void* powers) {
  using Doubles = Vector<double, kDoubles>;
  using Bits = Vector<int64_t, kDoubles>;
  constexpr int64_t kMost = std::is_same_v<C, double> ? 1022 : 126;
  Bits needed = {};
  for (int64_t i = 0; i < count; i += kDoubles) {
    const Doubles factor = Load<double, kDoubles>(factors + i);
    Bits exponent = ((BitCast<Bits>(factor) >> 52) & 0x7ff) - 1023;
    // Normal numbers stand alone, and so do zero, infinity and NaN: no 0 * infinity of them.
    const Bits alone =
        ((exponent >= -kMost) & (exponent <= kMost)) | (exponent == 1024) | Bits(factor == 0.0);
    exponent = exponent < -kMost ? Bits{} - kMost : exponent;
    exponent = exponent > kMost ? Bits{} + kMost : exponent;
    exponent = alone ? Bits{} : exponent;
    needed |= ~alone;
    Store<double, kDoubles>(factor * BitCast<Doubles>(Bits((1023 - exponent) << 52)),
                            static_cast<C*>(fractions) + i);
    Store<double, kDoubles>(BitCast<Doubles>(Bits((exponent + 1023) << 52)),
                            static_cast<C*>(powers) + i);
  }
  int64_t any = 0;
  for (int k = 0; k < kDoubles; ++k) any |= needed[k];
  return any != 0;
}

template <class T>
void ToDouble(const void* from, int64_t count, double* to) {
  const T* x = static_cast<const T*>(from);
  int64_t i = 0;
  for (; i + kDoubles <= count; i += kDoubles) {
    Store<double, kDoubles>(Load<double, kDoubles>(x + i), to + i);
  }
  if (i < count) Store<double, kDoubles>(Load<double, kDoubles>(x + i, First{count - i}), to + i);
}

template <class T>
void FromDouble(const double* from, int64_t count, void* to) {
  T* x = static_cast<T*>(to);
  int64_t i = 0;
  for (; i + kDoubles <= count; i += kDoubles) {
    Store<double, kDoubles>(Load<double, kDoubles>(from + i), x + i);
  }
  if (i < count) Store<double, kDoubles>(Load<double, kDoubles>(from + i), x + i, First{count - i});
}

constexpr UnitKernels kUnitKernels = {
    AddRows,
    UnitsForward,
    UnitsBackward,
    {SplitFactors<float>, SplitFactors<double>},
    {ToDouble<Half>, ToDouble<Bfloat16>, ToDouble<float>, ToDouble<double>},
    {FromDouble<Half>, FromDouble<Bfloat16>, FromDouble<float>, FromDouble<double>},
};
