// The loops over elements, for one instruction set. weight_norm_cpu_levels.h includes this file
// once per set, as it does weight_norm_cpu_simd.h, on which this file depends.
//
// A Block is read either as columns, each with its own sum and factors, or as segments, where each
// row has its own sum and factors.
//
// Groups of terms are added in float, and the group sums in double, so that the error does not grow
// with the size of a unit. A group is kGroup rows of a column, or kGroup pairs of vectors of a
// segment. A group whose sum leaves float's range is added again in double.

// Prefetches an element, which may be past the end of the tensor, into the L2 cache. In the L1
// cache, rows that are a power of two apart would evict each other.
template <class T>
TFWN_INLINE void Fetch(const T* base, int64_t i) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(base) + i * sizeof(T)), 0, 2);
}

// Prefetches each cache line of kPair elements.
template <class C, class T>
TFWN_INLINE void FetchPair(const T* base, int64_t i) {
  constexpr int kLine = 64 / sizeof(T);
  for (int k = 0; k < kPair<C>; k += kLine) Fetch(base, i + k);
}

// The terms of the sums: v^2 in eq. 2, grad_w * v in eq. 3.
template <class V, class W, bool backward>
struct Terms {
  using C = ComputeType<V, W>;
  static constexpr bool kEvenOdd = std::is_same_v<V, Bfloat16> && std::is_same_v<W, Bfloat16>;

  const V* const v;
  const W* const grad_w;
  const int64_t stride, fetch;

  explicit Terms(const Block& block)
      : v(static_cast<const V*>(block.v)),
        grad_w(static_cast<const W*>(block.grad_w)),
        stride(block.stride),
        fetch(block.fetch) {}

  // Adds the terms of kPair elements.
  template <class Lanes>
  TFWN_INLINE void Add(int64_t i, Lanes lanes, Pair<C>* sum) const {
    const Pair<C> x = LoadPair<C, kEvenOdd>(v + i, lanes);
    if constexpr (backward) {
      const Pair<C> y = LoadPair<C, kEvenOdd>(grad_w + i, lanes);
      sum->left += x.left * y.left;
      sum->right += x.right * y.right;
    } else {
      sum->left += x.left * x.left;
      sum->right += x.right * x.right;
    }
  }

  TFWN_INLINE void FetchNext(int64_t i) const {
    FetchPair<C>(v, i + fetch);
    if constexpr (backward) FetchPair<C>(grad_w, i + fetch);
  }
};

constexpr int kDoubles = kVectorBytes / sizeof(double);

// Sums `rows` terms of each of kDoubles columns, starting at element i, entirely in double.
template <bool backward, class V, class W, class Lanes>
__attribute__((noinline)) Vector<double, kDoubles> SumInDouble(const V* v, const W* grad_w,
                                                               int64_t i, int64_t rows,
                                                               int64_t stride, Lanes lanes) {
  Vector<double, kDoubles> sum = {};
  for (const int64_t end = i + rows * stride; i < end; i += stride) {
    const auto x = Load<double, kDoubles>(v + i, lanes);
    if constexpr (backward) {
      sum += x * Load<double, kDoubles>(grad_w + i, lanes);
    } else {
      sum += x * x;
    }
  }
  return sum;
}

// A bit mask of the lanes whose group sums may be inaccurate. From 2^-100 up, what underflow takes
// from a term, less than 2^-149, does not matter. Overflow leaves an infinity or a NaN. Terms that
// cancel to 0 are added again needlessly, which only costs time.
TFWN_INLINE uint32_t OutOfRange(const Vector<float, kLanes<float>>& sum) {
  return Outside(Absolute<float, kLanes<float>>(sum), 0x1p-100f, std::numeric_limits<float>::max());
}

template <class V, class W, bool backward>
struct Sums {
  using C = ComputeType<V, W>;
  using Doubles = Vector<double, kDoubles>;
  static constexpr int n = kLanes<C>;
  static constexpr bool kEvenOdd = Terms<V, W, backward>::kEvenOdd;

  const Terms<V, W, backward> terms;
  const int64_t rows, width;

  explicit Sums(const Block& block) : terms(block), rows(block.rows), width(block.width) {}

  // sums[j] += the terms of column j. The sums are padded to a multiple of kPair.
  TFWN_INLINE void Columns(double* sums) const {
    int64_t row = 0;
    for (; row + kGroup <= rows; row += kGroup) AddRows<kGroup>(row, sums);
    for (; row < rows; ++row) AddRows<1>(row, sums);
  }

  template <int count>
  TFWN_INLINE void AddRows(int64_t row, double* sums) const {
    int64_t j = 0;
    for (; j + kPair<C> <= width; j += kPair<C>) AddColumns<count>(row, j, All(), sums);
    if (j < width) AddColumns<count>(row, j, First{width - j}, sums);
  }

  // sums[j] += the terms of `count` rows, starting at `row`
  template <int count, class Lanes>
  TFWN_INLINE void AddColumns(int64_t row, int64_t j, Lanes lanes, double* sums) const {
    const int64_t i = row * terms.stride + j;
    Pair<C> sum = {};
    int64_t at = i;
#pragma GCC unroll 1
    for (int k = 0; k < count; ++k) {  // Unrolling would need too many registers for addresses.
      terms.FetchNext(at);
      terms.Add(at, lanes, &sum);
      at += terms.stride;
    }
    if constexpr (kEvenOdd) sum = Halves<C>(sum);
    alignas(64) double group[2 * n];
    StoreAsDoubles(sum.left, group);
    StoreAsDoubles(sum.right, group + n);
    if constexpr (std::is_same_v<C, float>) {
      int64_t columns = 2 * n;
      if constexpr (std::is_same_v<Lanes, First>) columns = lanes.count;
      const uint32_t lost =
          (OutOfRange(sum.left) | OutOfRange(sum.right) << n) & MaskOf<2 * n>(First{columns});
      if (__builtin_expect(lost != 0, 0)) ReplaceInDouble(i, count, columns, lost, group);
    }
    for (int k = 0; k < 2 * n; k += kDoubles) {
      const auto total = LoadBytes<Doubles>(sums + j + k) + LoadBytes<Doubles>(group + k);
      Store<double, kDoubles>(total, sums + j + k);
    }
  }

  // Replaces the group sums of the columns in `lost` by sums in double.
  TFWN_INLINE void ReplaceInDouble(int64_t i, int count, int64_t columns, uint32_t lost,
                                   double* group) const {
    for (int64_t j = 0; j < columns; j += kDoubles) {
      const Doubles sum = columns - j < kDoubles
                              ? InDouble(i + j, count, terms.stride, First{columns - j})
                              : InDouble(i + j, count, terms.stride, All());
      for (int k = 0; k < kDoubles; ++k) {
        if (lost >> (j + k) & 1) group[j + k] = sum[k];
      }
    }
  }

  template <class Lanes>
  TFWN_INLINE Doubles InDouble(int64_t i, int64_t count, int64_t stride, Lanes lanes) const {
    return SumInDouble<backward>(terms.v, terms.grad_w, i, count, stride, lanes);
  }

  // sums[i] = the sum of the terms of row i
  TFWN_INLINE void Segments(double* sums) const {
    constexpr int64_t kElements = kGroup * kPair<C>;
    for (int64_t row = 0; row < rows; ++row) {
      Doubles total = {};
      int64_t i = row * terms.stride;
      const int64_t end = i + width;
      for (; i + kElements <= end; i += kElements) {
        Pair<C> sum = {};
#pragma GCC unroll 8
        for (int k = 0; k < kGroup; ++k) terms.Add(i + k * kPair<C>, All(), &sum);
        total += GroupInDouble(i, kElements, sum);
      }
      if (i < end) {
        Pair<C> sum = {};
        int64_t at = i;
        for (; at + kPair<C> <= end; at += kPair<C>) terms.Add(at, All(), &sum);
        if (at < end) terms.Add(at, First{end - at}, &sum);
        total += GroupInDouble(i, end - i, sum);
      }
      sums[row] = SumLanes<kDoubles>(total);
    }
  }

  // The sum of the terms of `count` elements, starting at i. `sum` holds the sum of each lane.
  TFWN_INLINE Doubles GroupInDouble(int64_t i, int64_t count, const Pair<C>& sum) const {
    const Vector<C, n> both = sum.left + sum.right;
    if constexpr (std::is_same_v<C, float>) {
      const int64_t lanes = kEvenOdd ? CeilDiv(count, 2) : count;  // The other lanes have no terms.
      const uint32_t lost = OutOfRange(both) & MaskOf<n>(First{lanes});
      if (__builtin_expect(lost != 0, 0)) {
        const int64_t rest = count % kDoubles;
        return InDouble(i, count / kDoubles, kDoubles, All()) +
               InDouble(i + count - rest, 1, kDoubles, First{rest});
      }
      alignas(64) double halves[n];
      StoreAsDoubles(both, halves);
      return LoadBytes<Doubles>(halves) + LoadBytes<Doubles>(halves + kDoubles);
    } else {
      return both;
    }
  }
};

template <class V, class W, bool backward, bool columns>
void Sum(const Block& block, double* sums) {
  const Sums<V, W, backward> loops(block);
  if constexpr (columns) {
    loops.Columns(sums);
  } else {
    loops.Segments(sums);
  }
}

// The factors of kPair elements: fraction * power, or fraction alone if the block needs no powers.
template <class C, bool powers>
struct Factor {
  Pair<C> fraction, power;

  // One per column.
  TFWN_INLINE void LoadColumns(const Factors& from, int64_t j) {
    fraction = LoadPair<C, false>(static_cast<const C*>(from.fraction) + j);
    if constexpr (powers) power = LoadPair<C, false>(static_cast<const C*>(from.power) + j);
  }

  // The same for all elements.
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

// The factors of a block's columns in the even-odd order in which elements are loaded.
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
  const int64_t rows, width;
  Result* const result;
  const int64_t fetch_result;
  const bool may_stream;
  Factor<C, powers> scale, projection;

  explicit Scaling(const Block& block)
      : terms(block),
        rows(block.rows),
        width(block.width),
        result(static_cast<Result*>(block.result)),
        fetch_result(block.fetch_result),
        may_stream(block.stream) {}

  TFWN_INLINE static Vector<C, n> Across(const Vector<C, n>& x, const Vector<C, n>& along_v) {
    const Vector<C, n> across = x - along_v;
    return Absolute<C, n>(across) < Absolute<C, n>(x) * kRounding<C> ? Vector<C, n>{} : across;
  }

  template <class Lanes>
  TFWN_INLINE void Apply(int64_t i, Lanes lanes) const {
    constexpr bool kMayStream = std::is_same_v<Lanes, All> && kStreams<C, Result>;
    const bool stream = kMayStream && may_stream;
    if (!stream) FetchPair<C>(static_cast<const Result*>(result), i + fetch_result);
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

  template <int count, class Lanes>
  TFWN_INLINE void Column(int64_t row, int64_t j, Lanes lanes, const Factors& scales,
                          const Factors& projections) {
    scale.LoadColumns(scales, j);
    if constexpr (backward) projection.LoadColumns(projections, j);
    int64_t i = row * terms.stride + j;
#pragma GCC unroll 1
    for (int k = 0; k < count; ++k, i += terms.stride) Apply(i, lanes);
  }

  template <int count>
  TFWN_INLINE void Rows(int64_t row, const Factors& scales, const Factors& projections) {
    int64_t j = 0;
    for (; j + kPair<C> <= width; j += kPair<C>) {
      Column<count>(row, j, All(), scales, projections);
    }
    if (j < width) Column<count>(row, j, First{width - j}, scales, projections);
  }

  // Factors are padded to a multiple of kPair. Memory access is fastest row by row, but if the
  // factors of a row fill much of the L1 cache, several rows share each load of them.
  TFWN_INLINE void Columns(const Factors& scales, const Factors& projections) {
    constexpr int kRows = 4;
    constexpr int64_t kNarrow = 8192 / sizeof(C);
    int64_t row = 0;
    if (width > kNarrow) {
      for (; row + kRows <= rows; row += kRows) Rows<kRows>(row, scales, projections);
    }
    for (; row < rows; ++row) Rows<1>(row, scales, projections);
  }

  TFWN_INLINE void Segments(const Factors& scales, const Factors& projections) {
    for (int64_t row = 0; row < rows; ++row) {
      scale.LoadSegment(scales, row);
      if constexpr (backward) projection.LoadSegment(projections, row);
      const int64_t i = row * terms.stride;
      int64_t j = 0;
      for (; j + kPair<C> <= width; j += kPair<C>) {
        terms.FetchNext(i + j);
        Apply(i + j, All());
      }
      if (j < width) Apply(i + j, First{width - j});
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
  if (columns) return {Sum<V, W, backward, true>, ScaleFor<V, W, backward, true>()};
  return {Sum<V, W, backward, false>, ScaleFor<V, W, backward, false>()};
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
