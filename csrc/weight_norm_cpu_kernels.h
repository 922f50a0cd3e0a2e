// The loops over elements, for one instruction set. weight_norm_cpu_levels.h includes this file
// once per set, after weight_norm_cpu_simd.h and like it.
//
// A Block is read in one of two ways. As columns: each column has a sum and factors. As segments:
// each row has.
//
// Terms are added in float, kGroup of them, and these small sums in double: the error does not grow
// with the size of a unit. A small sum that leaves float's range is added again in double.

// For an element that may lie past the end of the tensor. Into the second-level cache: rows that
// are a power of two apart would push each other out of the first.
template <class T>
TFWN_INLINE void Fetch(const T* base, int64_t i) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(base) + i * sizeof(T)), 0, 2);
}

// The same for each cache line of kPair elements.
template <class C, class T>
TFWN_INLINE void FetchPair(const T* base, int64_t i) {
  constexpr int kLine = 64 / sizeof(T);
  for (int k = 0; k < kPair<C>; k += kLine) Fetch(base, i + k);
}

// The elements that are summed: v^2 in eq. 2, grad_w * v in eq. 3.
template <class V, class W, bool backward>
struct Terms {
  using C = ComputeType<V, W>;
  static constexpr bool kEvenOdd = std::is_same_v<V, Bfloat16> && std::is_same_v<W, Bfloat16>;

  const V* v;
  const W* grad_w;
  const Block block;

  explicit Terms(const Block& from)
      : v(static_cast<const V*>(from.v)), grad_w(static_cast<const W*>(from.grad_w)), block(from) {}

  // Adds the terms of kPair elements to sum, and their absolute values to size.
  template <class Lanes>
  TFWN_INLINE void Add(int64_t i, Lanes lanes, Pair<C>* sum, Pair<C>* size) const {
    constexpr int n = kLanes<C>;
    const Pair<C> x = LoadPair<C, kEvenOdd>(v + i, lanes);
    if constexpr (backward) {
      const Pair<C> y = LoadPair<C, kEvenOdd>(grad_w + i, lanes);
      sum->left += x.left * y.left;
      sum->right += x.right * y.right;
      if constexpr (std::is_same_v<C, float>) {
        size->left += Absolute<C, n>(x.left) * Absolute<C, n>(y.left);
        size->right += Absolute<C, n>(x.right) * Absolute<C, n>(y.right);
      }
    } else {
      sum->left += x.left * x.left;
      sum->right += x.right * x.right;
    }
  }

  TFWN_INLINE void FetchNext(int64_t i) const {
    FetchPair<C>(v, i + block.fetch);
    if constexpr (backward) FetchPair<C>(grad_w, i + block.fetch);
  }
};

constexpr int kDoubles = kVectorBytes / sizeof(double);

// The terms of kPair columns, `rows` of them, in double from the start, for those columns of
// `lost`.
template <class V, class W, bool backward>
__attribute__((noinline)) void SumInDouble(Block block, int64_t i, int rows, int64_t stride,
                                           int64_t count, uint32_t lost, double* sums) {
  constexpr int n = kDoubles;
  const Terms<V, W, backward> terms(block);
  for (int64_t j = 0; j < kPair<float>; j += n, count -= n) {
    Vector<double, n> sum = {};
    for (int row = 0; row < rows; ++row) {
      const int64_t at = i + row * stride + j;
      const auto x = Load<double, n>(terms.v + at, First{count});
      if constexpr (backward) {
        sum += x * Load<double, n>(terms.grad_w + at, First{count});
      } else {
        sum += x * x;
      }
    }
    for (int k = 0; k < n; ++k) {
      if (lost >> (j + k) & 1) sums[j + k] = sum[k];
    }
  }
}

// The lanes before `count`, as bits, of small sums that may have lost something on the way: below
// 2^-100, terms may have underflowed that matter to the others.
TFWN_INLINE uint32_t OutOfRange(const Pair<float>& size, int64_t count) {
  constexpr int n = kLanes<float>;
  constexpr float kLeast = 0x1p-100f, kMost = std::numeric_limits<float>::max();
  const uint32_t out_of_range =
      Outside(size.left, kLeast, kMost) | Outside(size.right, kLeast, kMost) << n;
  return out_of_range & MaskOf<2 * n>(First{count});
}

// The terms of kPair columns, `rows` of them, as doubles in the order of the columns.
template <class V, class W, bool backward, class Lanes>
TFWN_INLINE void Finish(const Terms<V, W, backward>& terms, int64_t i, int rows, int64_t stride,
                        Lanes lanes, Pair<ComputeType<V, W>> sum,
                        const Pair<ComputeType<V, W>>& size, double* sums) {
  using C = ComputeType<V, W>;
  constexpr int n = kLanes<C>;
  if constexpr (std::is_same_v<C, float>) {
    constexpr bool even_odd = Terms<V, W, backward>::kEvenOdd;
    if constexpr (even_odd) sum = Halves<float>(sum);
    StoreAsDoubles(sum.left, sums);
    StoreAsDoubles(sum.right, sums + n);
    int64_t count = 2 * n;
    if constexpr (std::is_same_v<Lanes, First>) count = lanes.count;
    uint32_t lost;
    if constexpr (!backward) {
      lost = OutOfRange(sum, count);
    } else if constexpr (even_odd) {
      lost = OutOfRange(Halves<float>(size), count);
    } else {
      lost = OutOfRange(size, count);
    }
    if (__builtin_expect(lost != 0, 0)) {
      SumInDouble<V, W, backward>(terms.block, i, rows, stride, count, lost, sums);
    }
  } else {
    Store<double, n>(sum.left, sums);
    Store<double, n>(sum.right, sums + n);
  }
}

template <class V, class W, bool backward>
struct Sums {
  using C = ComputeType<V, W>;
  static constexpr int n = kLanes<C>;

  // sums[j] += the terms of `rows` rows from `row` on
  template <int rows, class Lanes>
  TFWN_INLINE static void AddColumns(const Terms<V, W, backward>& terms, int64_t row, int64_t j,
                                     Lanes lanes, double* sums) {
    const int64_t i = row * terms.block.stride + j;
    Pair<C> sum = {}, size = {};
    int64_t at = i;
#pragma GCC unroll 1
    for (int k = 0; k < rows; ++k) {  // Unrolled, it would run out of registers for addresses.
      terms.FetchNext(at);
      terms.Add(at, lanes, &sum, &size);
      at += terms.block.stride;
    }
    alignas(64) double group[2 * n];
    Finish(terms, i, rows, terms.block.stride, lanes, sum, size, group);
    for (int k = 0; k < 2 * n; k += kDoubles) {
      const auto total = LoadBytes<Vector<double, kDoubles>>(sums + j + k) +
                         LoadBytes<Vector<double, kDoubles>>(group + k);
      Store<double, kDoubles>(total, sums + j + k);
    }
  }

  template <int rows>
  TFWN_INLINE static void AddRows(const Terms<V, W, backward>& terms, int64_t row, double* sums) {
    const int64_t width = terms.block.width;
    int64_t j = 0;
    for (; j + kPair<C> <= width; j += kPair<C>) {
      AddColumns<rows>(terms, row, j, All(), sums);
    }
    if (j < width) AddColumns<rows>(terms, row, j, First{width - j}, sums);
  }

  // sums[j] += the terms of column j. The sums are padded to a multiple of kPair.
  static void Columns(const Block& block, double* sums) {
    const Terms<V, W, backward> terms(block);
    int64_t row = 0;
    for (; row + kGroup <= block.rows; row += kGroup) AddRows<kGroup>(terms, row, sums);
    for (; row < block.rows; ++row) AddRows<1>(terms, row, sums);
  }

  // sums[i] = the terms of row i
  static void Segments(const Block& block, double* sums) {
    const Terms<V, W, backward> terms(block);
    for (int64_t row = 0; row < block.rows; ++row) {
      Vector<double, kDoubles> total = {};
      int64_t j = 0;
      for (; j + kGroup * kPair<C> <= block.width; j += kGroup * kPair<C>) {
        Pair<C> sum = {}, size = {};
#pragma GCC unroll 8
        for (int k = 0; k < kGroup; ++k) {
          const int64_t at = row * block.stride + j + k * kPair<C>;
          terms.Add(at, All(), &sum, &size);
        }
        AddGroup(terms, row * block.stride + j, kGroup, All(), sum, size, &total);
      }
      if (j + kPair<C> <= block.width) {
        Pair<C> sum = {}, size = {};
        const int64_t first = row * block.stride + j;
        int pairs = 0;
        for (; j + kPair<C> <= block.width; j += kPair<C>, ++pairs) {
          terms.Add(row * block.stride + j, All(), &sum, &size);
        }
        AddGroup(terms, first, pairs, All(), sum, size, &total);
      }
      if (j < block.width) {
        Pair<C> sum = {}, size = {};
        const First lanes{block.width - j};
        terms.Add(row * block.stride + j, lanes, &sum, &size);
        AddGroup(terms, row * block.stride + j, 1, lanes, sum, size, &total);
      }
      sums[row] = SumLanes<kDoubles>(total);
    }
  }

  template <class Lanes>
  TFWN_INLINE static void AddGroup(const Terms<V, W, backward>& terms, int64_t i, int rows,
                                   Lanes lanes, const Pair<C>& sum, const Pair<C>& size,
                                   Vector<double, kDoubles>* total) {
    alignas(64) double group[2 * n];
    Finish(terms, i, rows, int64_t{kPair<C>}, lanes, sum, size, group);
    for (int k = 0; k < 2 * n; k += kDoubles) {
      *total += LoadBytes<Vector<double, kDoubles>>(group + k);
    }
  }
};

// A factor of kPair elements: fraction * power, where power is 1 but for blocks that need it.
template <class C, bool powers>
struct Factor {
  Pair<C> fraction, power;

  // One for each column.
  TFWN_INLINE void LoadColumns(const Factors& from, int64_t j) {
    fraction = LoadPair<C, false>(static_cast<const C*>(from.fraction) + j);
    if constexpr (powers) power = LoadPair<C, false>(static_cast<const C*>(from.power) + j);
  }

  // One for all.
  TFWN_INLINE void LoadSegment(const Factors& from, int64_t row) {
    const Vector<C, kLanes<C>> zero = {};
    fraction.left = fraction.right = zero + static_cast<const C*>(from.fraction)[row];
    if constexpr (powers) power.left = power.right = zero + static_cast<const C*>(from.power)[row];
  }

  TFWN_INLINE Pair<C> Times(Pair<C> x) const {
    if constexpr (powers) x = {x.left * power.left, x.right * power.right};
    return {x.left * fraction.left, x.right * fraction.right};
  }
};

// The factors of a block's columns, in the order in which their elements are loaded.
template <class C, bool powers>
struct EvenOddFactors {
  alignas(64) C parts[powers ? 2 : 1][kMostColumns];

  Factors Order(const Factors& from, int64_t width) {
    for (int64_t j = 0; j < width; j += kPair<C>) {
      OrderPair(from.fraction, j, parts[0]);
      if constexpr (powers) OrderPair(from.power, j, parts[1]);
    }
    return {parts[0], powers ? parts[1] : nullptr};
  }

  TFWN_INLINE static void OrderPair(const void* from, int64_t j, C* to) {
    const auto pair = EvenOdd<C>(LoadPair<C, false>(static_cast<const C*>(from) + j));
    StorePair<C, false, false>(pair, to + j);
  }
};

// w = scale * v, grad_v = scale * (grad_w - projection * v)
template <class V, class W, bool backward, bool powers, bool own_rounding>
struct Scaling {
  using C = ComputeType<V, W>;
  using Result = std::conditional_t<backward, V, W>;
  static constexpr int n = kLanes<C>;
  static constexpr bool kEvenOdd = Terms<V, W, backward>::kEvenOdd;

  const Terms<V, W, backward> terms;
  Result* const result;
  Factor<C, powers> scale, projection;

  explicit Scaling(const Block& block) : terms(block), result(static_cast<Result*>(block.result)) {}

  TFWN_INLINE static Vector<C, n> Across(const Vector<C, n>& x, const Vector<C, n>& along_v) {
    const Vector<C, n> across = x - along_v;
    return Absolute<C, n>(across) < Absolute<C, n>(x) * kRounding<C> ? Vector<C, n>{} : across;
  }

  template <class Lanes>
  TFWN_INLINE void Apply(int64_t i, Lanes lanes) const {
    constexpr bool kMayStream = std::is_same_v<Lanes, All> && kStreams<C, Result>;
    const bool stream = kMayStream && terms.block.stream;
    if (!stream) FetchPair<C>(static_cast<const Result*>(result), i + terms.block.fetch_result);
    Pair<C> x = LoadPair<C, kEvenOdd>(terms.v + i, lanes);
    if constexpr (backward) {
      const Pair<C> along_v = projection.Times(x);
      const Pair<C> grad_w = LoadPair<C, kEvenOdd>(terms.grad_w + i, lanes);
      x = {Across(grad_w.left, along_v.left), Across(grad_w.right, along_v.right)};
    }
    x = scale.Times(x);
    if constexpr (kMayStream) {
      if (stream) return StreamPair<C, kEvenOdd, own_rounding>(x, result + i);
    }
    StorePair<C, kEvenOdd, own_rounding>(x, result + i, lanes);
  }

  template <int rows, class Lanes>
  TFWN_INLINE void Column(int64_t row, int64_t j, Lanes lanes, const Factors& scales,
                          const Factors& projections) {
    scale.LoadColumns(scales, j);
    if constexpr (backward) projection.LoadColumns(projections, j);
    int64_t i = row * terms.block.stride + j;
#pragma GCC unroll 1
    for (int k = 0; k < rows; ++k, i += terms.block.stride) Apply(i, lanes);
  }

  template <int rows>
  TFWN_INLINE void Rows(int64_t row, const Factors& scales, const Factors& projections) {
    const int64_t width = terms.block.width;
    int64_t j = 0;
    for (; j + kPair<C> <= width; j += kPair<C>) {
      Column<rows>(row, j, All(), scales, projections);
    }
    if (j < width) Column<rows>(row, j, First{width - j}, scales, projections);
  }

  // Factors are padded to a multiple of kPair. Row after row is how memory is fastest; but where
  // the factors of a row fill much of the first-level cache, several rows share a load of them.
  TFWN_INLINE void Columns(const Factors& scales, const Factors& projections) {
    constexpr int kRows = 4;
    constexpr int64_t kNarrow = 8192 / sizeof(C);
    int64_t row = 0;
    if (terms.block.width > kNarrow) {
      for (; row + kRows <= terms.block.rows; row += kRows) Rows<kRows>(row, scales, projections);
    }
    for (; row < terms.block.rows; ++row) Rows<1>(row, scales, projections);
  }

  TFWN_INLINE void Segments(const Factors& scales, const Factors& projections) {
    const Block& block = terms.block;
    for (int64_t row = 0; row < block.rows; ++row) {
      scale.LoadSegment(scales, row);
      if constexpr (backward) projection.LoadSegment(projections, row);
      const int64_t i = row * block.stride;
      int64_t j = 0;
      for (; j + kPair<C> <= block.width; j += kPair<C>) {
        terms.FetchNext(i + j);
        Apply(i + j, All());
      }
      if (j < block.width) Apply(i + j, First{block.width - j});
    }
  }
};

template <class V, class W, bool backward, bool columns, bool powers, bool own_rounding>
void ScaleBlock(const Block& block, const Factors& scales, const Factors& projections) {
  using Loops = Scaling<V, W, backward, powers, own_rounding>;
  using C = typename Loops::C;
  Loops loops(block);
  if constexpr (!columns) {
    loops.Segments(scales, projections);
  } else if constexpr (Loops::kEvenOdd) {
    EvenOddFactors<C, powers> ordered_scales, ordered_projections;
    const Factors s = ordered_scales.Order(scales, block.width);
    const Factors p = backward ? ordered_projections.Order(projections, block.width) : Factors{};
    loops.Columns(s, p);
  } else {
    loops.Columns(scales, projections);
  }
}

template <class V, class W, bool backward, bool columns, bool own_rounding>
void Scale(const Block& block, const Factors& scales, const Factors& projections, bool powers) {
  if (powers) {
    ScaleBlock<V, W, backward, columns, true, own_rounding>(block, scales, projections);
  } else {
    ScaleBlock<V, W, backward, columns, false, own_rounding>(block, scales, projections);
  }
}

template <class V, class W, bool backward, bool columns>
auto* ScaleFor() {
#if TFWN_VECTOR_BYTES == 64
  using Result = std::conditional_t<backward, V, W>;
  if constexpr (kOwnRounding<ComputeType<V, W>, Result>) {
    if (RoundsToBfloat16()) return Scale<V, W, backward, columns, true>;
  }
#endif
  return Scale<V, W, backward, columns, false>;
}

template <class V, class W, bool backward>
Kernels KernelsForVW(bool columns) {
  if (columns) return {Sums<V, W, backward>::Columns, ScaleFor<V, W, backward, true>()};
  return {Sums<V, W, backward>::Segments, ScaleFor<V, W, backward, false>()};
}

template <class V>
Kernels KernelsForV(Type w, bool backward, bool columns) {
  const auto of = [&](auto w_element) {
    using W = decltype(w_element);
    return backward ? KernelsForVW<V, W, true>(columns) : KernelsForVW<V, W, false>(columns);
  };
  switch (w) {
    case Type::kHalf:
      return of(Half());
    case Type::kBfloat16:
      return of(Bfloat16());
    case Type::kFloat:
      return of(float());
    default:
      return of(double());
  }
}

Kernels KernelsFor(Type v, Type w, bool backward, bool columns) {
  switch (v) {
    case Type::kHalf:
      return KernelsForV<Half>(w, backward, columns);
    case Type::kBfloat16:
      return KernelsForV<Bfloat16>(w, backward, columns);
    case Type::kFloat:
      return KernelsForV<float>(w, backward, columns);
    default:
      return KernelsForV<double>(w, backward, columns);
  }
}
