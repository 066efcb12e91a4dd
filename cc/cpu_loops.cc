// SPDX-License-Identifier: Apache-2.0
//
// The CPU loops over rows and columns, for one instruction set.
//
// CMake compiles this file once for each instruction set, with LBE_CPU_LOOPS
// naming the table that it defines; cpu_launch.cc picks one at run time. All
// functions are local or always inlined, so that the linker never merges code
// of different instruction sets.

#include "cpu_loops.h"

#include <algorithm>
#include <type_traits>

#include "cpu_vectors.h"

#ifndef LBE_CPU_LOOPS
#error "LBE_CPU_LOOPS must name the table to define"
#endif

namespace lbe {
namespace {

constexpr int LogOfTwo(int64_t power) {
  return power == 1 ? 0 : 1 + LogOfTwo(power / 2);
}

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename Element, typename Scalar>
struct Loops {
  using V = typename Convert<Element>::Vector;
  static constexpr int64_t kLanes = kVectorBytes / sizeof(Scalar);
  static constexpr int64_t kLine = kLineBytes / sizeof(Element);
  // Columns of a leaf that are worked on at once: what is made of them stays in
  // the first cache.
  static constexpr int64_t kSegment = 1024 / sizeof(Scalar);
  // How far in front of the reading of contiguous rows the fetching begins, at
  // least: nearer, and memory does not answer in time.
  static constexpr int64_t kAheadBytes = 64 << 10;
  // Activations of so many bytes lie in the second cache, as a rule: something
  // has just made them.
  static constexpr int64_t kCachedBytes = 1 << 20;
  // Columns of which a gradient's constants stay in the first cache; see
  // IsRowByRow.
  static constexpr int64_t kRowByRow = 8192 / sizeof(Scalar);
  // Rows are short if kShortRowLeaves leaves of them fit into the first cache.
  // These are then worked on at a time, which saves most of the calls.
  static constexpr int64_t kShortRowBytes = 512;
  static constexpr int kShortRowLevel = 3;
  static constexpr int64_t kShortRowLeaves = 1 << kShortRowLevel;

  // `width` < kLanes elements; the other lanes are 0.
  static V LoadPart(const Element* x, int64_t width) {
    Element padded[kLanes] = {};
    __builtin_memcpy(padded, x, width * sizeof(Element));
    return Convert<Element>::Load(padded);
  }
  static void StorePart(const V& vector, int64_t width, Element* x) {
    Element padded[kLanes];
    Convert<Element>::Store(vector, padded);
    __builtin_memcpy(x, padded, width * sizeof(Element));
  }

  // Reads and writes vectors of a result, of which the last may be short.
  LBE_MATH V LoadResult(const void* from, int64_t column, int64_t columns) {
    const Scalar* p = static_cast<const Scalar*>(from) + column;
    if (column + kLanes <= columns) return LoadVector<V>(p);
    V vector = {};
    __builtin_memcpy(&vector, p, (columns - column) * sizeof(Scalar));
    return vector;
  }
  LBE_MATH void StoreResult(const V& vector, int64_t column, int64_t columns,
                            void* to) {
    Scalar* p = static_cast<Scalar*>(to) + column;
    if (column + kLanes <= columns) return StoreVector(vector, p);
    __builtin_memcpy(p, &vector, (columns - column) * sizeof(Scalar));
  }

  // Moments of columns; what has no name of its own has room for this many.
  template <int64_t kColumns>
  struct Node {
    alignas(kLineBytes) Scalar mean[kColumns];
    alignas(kLineBytes) Scalar m2[kColumns];
  };

  // The node over 2^kLevel leaves of a vector of columns at x; calls before()
  // before each of them.
  template <int kLevel, typename Before>
  LBE_MATH Moments<V> NodeAt(const Element* x, int64_t stride,
                             const Before& before) {
    if constexpr (kLevel == 0) {
      using From = Convert<Element>;
      before();
      V values[kLeafRows] = {From::Load(x),
                             From::Load(x + stride),
                             From::Load(x + 2 * stride),
                             From::Load(x + 3 * stride),
                             From::Load(x + 4 * stride),
                             From::Load(x + 5 * stride),
                             From::Load(x + 6 * stride),
                             From::Load(x + 7 * stride)};
      KeepInRegisters(values[0], values[1], values[2], values[3], values[4],
                      values[5], values[6], values[7]);
      return LeafMoments<Scalar>(values, kLeafRows);
    } else {
      constexpr int64_t kHalf = int64_t{kLeafRows} << (kLevel - 1);
      Moments<V> upper = NodeAt<kLevel - 1>(x, stride, before);
      KeepInRegisters(upper.mean, upper.m2);
      return Merge(upper,
                   NodeAt<kLevel - 1>(x + kHalf * stride, stride, before),
                   WeightsOf<Scalar>(kHalf, kHalf));
    }
  }

  // The nodes over 2^kLevel full leaves at x of `columns` >= kLanes columns.
  // Not inlined: in a function of its own the loop keeps its registers.
  //
  // Unless `next` is null, fetches as many bytes into the second cache, from
  // `next` on in rows of which the first ends at `row_end`, `gap` bytes before
  // the next one starts. Eight rows in turn are more than the processor's own
  // prefetcher follows, and memory is read fastest in its own order. Not into
  // the first cache, where rows that are a multiple of 4 KB apart share a set;
  // and a few lines at a time, since a processor drops what it cannot begin.
  template <int kLevel>
  __attribute__((noinline)) static void FullLeaves(
      const Element* x, int64_t stride, int64_t columns, Scalar* mean,
      Scalar* m2, const char* next, const char* row_end, int64_t gap) {
    const int64_t row_bytes = stride * sizeof(Element) - gap;
    const auto fetch = [&]() __attribute__((always_inline)) {
      if (next == nullptr) return;
      constexpr int64_t kFetched = kLeafRows * kLanes * sizeof(Element);
      for (int64_t at = 0; at < kFetched; at += kLineBytes) {
        __builtin_prefetch(next + at, 0, 2);
      }
      next += kFetched;
      if (next >= row_end) {
        next = row_end + gap;
        row_end = next + row_bytes;
      }
    };
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      const Moments<V> node = NodeAt<kLevel>(x + c, stride, fetch);
      StoreVector(node.mean, mean + c);
      StoreVector(node.m2, m2 + c);
    }
    if (c < columns) {
      // The last vector has columns of the one before: the same values again.
      c = columns - kLanes;
      const Moments<V> node = NodeAt<kLevel>(x + c, stride, [] {});
      StoreVector(node.mean, mean + c);
      StoreVector(node.m2, m2 + c);
    }
  }

  // The same for fewer rows.
  static void ShortLeaf(const Element* x, int64_t stride, int rows,
                        int64_t columns, Scalar* mean, Scalar* m2) {
    for (int64_t begin = 0; begin < columns; begin += kLanes) {
      const int64_t c = std::min(begin, columns - kLanes);
      V values[kLeafRows] = {};
      for (int r = 0; r < rows; ++r) {
        values[r] = Convert<Element>::Load(x + r * stride + c);
      }
      const auto moments = LeafMoments<Scalar>(values, rows);
      StoreVector(moments.mean, mean + c);
      StoreVector(moments.m2, m2 + c);
    }
  }

  // The same for all of `columns` < kLanes columns, where rows are contiguous:
  // a vector goes on into the rows that follow, of which `whole` are there for
  // that. Writes kLanes columns.
  static void NarrowLeaf(const Element* x, int rows, int64_t columns,
                         int64_t whole, Scalar* mean, Scalar* m2) {
    V values[kLeafRows] = {};
    for (int r = 0; r < rows; ++r) {
      values[r] = r < whole ? Convert<Element>::Load(x + r * columns)
                            : LoadPart(x + r * columns, columns);
    }
    const Moments<V> moments = LeafMoments<Scalar>(values, rows);
    StoreVector(moments.mean, mean);
    StoreVector(moments.m2, m2);
  }

  // The merge of the moments of columns, to where those of b may be, too.
  __attribute__((noinline)) static void MergeColumns(
      const Scalar* a_mean, const Scalar* a_m2, const Scalar* b_mean,
      const Scalar* b_m2, const MergeWeights<Scalar>& weights, int64_t columns,
      Scalar* mean, Scalar* m2) {
    const auto one = [&](int64_t c, auto load,
                         auto store) __attribute__((always_inline)) {
      const auto merged =
          Merge<Scalar, V>({load(a_mean, c), load(a_m2, c)},
                           {load(b_mean, c), load(b_m2, c)}, weights);
      store(merged.mean, c, mean);
      store(merged.m2, c, m2);
    };
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      one(
          c, [](const Scalar* p, int64_t at) { return LoadVector<V>(p + at); },
          [](const V& v, int64_t at, Scalar* p) { StoreVector(v, p + at); });
    }
    if (c < columns) {
      one(
          c,
          [&](const Scalar* p, int64_t at) {
            return LoadResult(p, at, columns);
          },
          [&](const V& v, int64_t at, Scalar* p) {
            StoreResult(v, at, columns, p);
          });
    }
  }

  using Stack = Node<kTile + kGroupUnits>;
  static constexpr int kLevels = LogOfTwo(kPartRows / kLeafRows);

  // Rows of y = activation(z + bias), with the bias in the type of the results.
  using ActivateRows = void (*)(const Element* z, Element* y, int64_t stride,
                                int64_t rows, int64_t columns,
                                const Scalar* bias, Scalar slope);

  template <Activation kActivation>
  static void Activated(const Element* z, Element* y, int64_t stride,
                        int64_t rows, int64_t columns, const Scalar* bias,
                        Scalar slope) {
    for (int64_t row = 0; row < rows; ++row, z += stride, y += stride) {
      int64_t c = 0;
      for (; c + kLanes <= columns; c += kLanes) {
        const V sum = Convert<Element>::Load(z + c) + LoadVector<V>(bias + c);
        Convert<Element>::Store(Activate<kActivation>(sum, slope), y + c);
      }
      if (c < columns) {
        const V sum = LoadPart(z + c, columns - c) + LoadVector<V>(bias + c);
        StorePart(Activate<kActivation>(sum, slope), columns - c, y + c);
      }
    }
  }

  static ActivateRows ActivatedBy(Activation activation) {
    switch (activation) {
#define LBE_ACTIVATION(name, keras_name) \
  case Activation::name:                 \
    return Activated<Activation::name>;
      LBE_FOR_EACH_ACTIVATION(LBE_ACTIVATION)
#undef LBE_ACTIVATION
    }
    __builtin_unreachable();
  }

  // The bias of columns [column, column + columns): the channels of a position
  // are side by side, those of the next one follow. Zeros where there is none.
  static void BiasOf(const Epilogue& epilogue, int64_t column, int64_t columns,
                     Scalar* bias) {
    const Element* from = static_cast<const Element*>(epilogue.bias);
    const int64_t channels = from == nullptr ? 1 : epilogue.channels;
    const Element zero = {};
    if (from == nullptr) from = &zero;
    int64_t channel = column % channels;
    for (int64_t c = 0; c < columns;) {
      const int64_t width = std::min({kLanes, columns - c, channels - channel});
      StoreVector(LoadPart(from + channel, width), bias + c);
      c += width;
      channel = (channel + width) % channels;
    }
  }

  // A block is read leaf by leaf, and a leaf segment by segment.
  static void MomentsOf(const Problem& problem,
                        const ForwardArguments& arguments, const Block& block,
                        void* mean, void* m2) {
    const int64_t units = problem.units;
    const int64_t rows = block.rows;
    const int64_t columns = block.columns;
    const int64_t first = block.row * units + block.column;
    const Epilogue* const epilogue = arguments.epilogue;
    const Element* const z = static_cast<const Element*>(arguments.x) + first;
    Element* const made = static_cast<Element*>(arguments.y) + first;
    const Element* const y = epilogue == nullptr ? z : made;
    ActivateRows activate = nullptr;
    alignas(kLineBytes) Scalar bias[kTile + 2 * kGroupUnits];
    if (epilogue != nullptr) {
      activate = ActivatedBy(epilogue->activation);
      BiasOf(*epilogue, block.column, columns, bias);
    }
    const auto bytes = [](int64_t elements) {
      return elements * static_cast<int64_t>(sizeof(Element));
    };
    const bool contiguous = columns == units;
    const bool fetches = bytes(problem.rows * units) > kCachedBytes;
    const int64_t ahead =
        std::max<int64_t>(kAheadBytes - bytes(kLeafRows * units), 0);
    // The tree, leaf by leaf, as a binary counter: level l of the stack holds
    // the node over the latest 2^l full leaves, where bit l of the count of
    // leaves is set. A leaf merges with the nodes that it completes, and the
    // last one with all that are left:
    //
    //   leaf  0     1       2     3           4     (last)
    //   bits  000   001     010   011         100
    //   node  0     01      2     23, 0123    4, 01234
    Stack stack[kLevels];
    Node<2 * kSegment> node;
    // The last segment has what is left of fewer than kSegment columns besides.
    const int64_t segments = std::max<int64_t>(1, columns / kSegment);
    const bool short_rows =
        contiguous && columns >= kLanes && bytes(columns) <= kShortRowBytes;
    int64_t leaves = 1;
    for (int64_t leaf = 0; leaf * kLeafRows < rows; leaf += leaves) {
      const int64_t rest = rows - leaf * kLeafRows;
      const int level = short_rows && leaf % kShortRowLeaves == 0 &&
                                rest >= kShortRowLeaves * kLeafRows
                            ? kShortRowLevel
                            : 0;
      leaves = 1 << level;
      const bool last = rest <= leaves * kLeafRows;
      const int64_t node_rows = std::min(rest, leaves * kLeafRows);
      const int merges =
          last ? __builtin_popcountll(leaf)
               : __builtin_ctzll(~static_cast<uint64_t>(leaf >> level));
      Scalar* const to_mean =
          last ? static_cast<Scalar*>(mean) : stack[level + merges].mean;
      Scalar* const to_m2 =
          last ? static_cast<Scalar*>(m2) : stack[level + merges].m2;
      const int64_t at = leaf * kLeafRows * units;
      for (int64_t segment = 0; segment < segments; ++segment) {
        const int64_t begin = segment * kSegment;
        const int64_t width =
            segment + 1 == segments ? columns - begin : kSegment;
        if (activate != nullptr) {
          activate(z + at + begin, made + at + begin, units, node_rows, width,
                   bias + begin, static_cast<Scalar>(epilogue->slope));
        }
        const bool narrow = columns < kLanes;
        const bool to_node = merges > 0 || narrow;
        Scalar* const node_mean = to_node ? node.mean : to_mean + begin;
        Scalar* const node_m2 = to_node ? node.m2 : to_m2 + begin;
        if (narrow) {
          // Vectors may not go beyond the last row of this block.
          NarrowLeaf(y + at, static_cast<int>(node_rows), columns,
                     rest + 1 - CeilDiv(kLanes, columns), node_mean, node_m2);
        } else if (node_rows >= kLeafRows) {
          // Of the rows to come as many bytes as this segment has.
          const int64_t offset = bytes(kLeafRows * begin);
          const int64_t row = contiguous ? 0 : offset / bytes(columns);
          const char* const row_start =
              reinterpret_cast<const char*>(z + at + (kLeafRows + row) * units);
          const auto run =
              level == 0 ? FullLeaves<0> : FullLeaves<kShortRowLevel>;
          run(y + at + begin, units, width, node_mean, node_m2,
              !fetches     ? nullptr
              : contiguous ? row_start + ahead + offset
                           : row_start + offset % bytes(columns),
              contiguous ? row_start + bytes(rows * units)
                         : row_start + bytes(columns),
              bytes(units - columns));
        } else {
          ShortLeaf(y + at + begin, units, static_cast<int>(node_rows), width,
                    node_mean, node_m2);
        }
        // The stack has room for whole vectors, the results have not.
        const int64_t whole = CeilDiv(width, kLanes) * kLanes;
        int64_t merged = node_rows;
        for (int l = level, left = merges; left > 0; ++l) {
          if ((leaf >> l & 1) == 0) continue;
          const bool is_last_merge = --left == 0;
          const int64_t left_rows = int64_t{kLeafRows} << l;
          MergeColumns(stack[l].mean + begin, stack[l].m2 + begin, node.mean,
                       node.m2, WeightsOf<Scalar>(left_rows, merged),
                       is_last_merge && last ? width : whole,
                       is_last_merge ? to_mean + begin : node.mean,
                       is_last_merge ? to_m2 + begin : node.m2);
          merged += left_rows;
        }
        if (narrow && merges == 0) {
          const int64_t count = last ? columns : kLanes;
          std::copy_n(node.mean, count, to_mean);
          std::copy_n(node.m2, count, to_m2);
        }
      }
    }
  }

  static void MergeInto(int64_t a_rows, int64_t b_rows, int64_t columns,
                        const void* b_mean, const void* b_m2, void* mean,
                        void* m2) {
    Scalar* const to_mean = static_cast<Scalar*>(mean);
    Scalar* const to_m2 = static_cast<Scalar*>(m2);
    MergeColumns(to_mean, to_m2, static_cast<const Scalar*>(b_mean),
                 static_cast<const Scalar*>(b_m2),
                 WeightsOf<Scalar>(a_rows, b_rows), columns, to_mean, to_m2);
  }

  static void Finish(const Problem& problem, int64_t columns, void* m2,
                     double* group_sums) {
    const auto factors = EntropyFactorsOf<Scalar>(problem.formula);
    for (int64_t group = 0; group < columns; group += kGroupUnits) {
      alignas(kLineBytes) Scalar entropies[kGroupUnits] = {};
      for (int64_t i = 0; i < kGroupUnits && group + i < columns; i += kLanes) {
        const int64_t c = group + i;
        const V variance = Variance<Scalar>(LoadResult(m2, c, columns),
                                            problem.rows, problem.formula);
        StoreResult(variance, c, columns, m2);
        StoreVector(UnitEntropy<Scalar>(variance, factors), entropies + i);
      }
      double values[kGroupUnits];
      for (int64_t i = 0; i < kGroupUnits; ++i) {
        values[i] = group + i < columns ? entropies[i] : 0;
      }
      group_sums[group / kGroupUnits] = SumHalves<kGroupUnits>(values);
    }
  }

  // What a gradient needs of each column.
  struct Columns {
    alignas(kLineBytes) Scalar mean[kTile + kGroupUnits];
    alignas(kLineBytes) Scalar reciprocal[kTile + kGroupUnits];
    alignas(kLineBytes)
        Scalar slope[kTile + kGroupUnits];  // with gradients of statistics
    alignas(kLineBytes)
        Scalar offset[kTile + kGroupUnits];  // with gradients of statistics
    Scalar share;

    Columns(const Problem& problem, const GradientArguments& arguments,
            const Block& block) {
      const auto factors =
          arguments.count == nullptr
              ? GradientFactorsOf<Scalar>(problem.rows, problem.units,
                                          problem.formula)
              : GradientFactorsOfCount(
                    *static_cast<const Scalar*>(arguments.count), problem.units,
                    problem.formula);
      share = EntropyShare(*static_cast<const Scalar*>(arguments.entropy_grad),
                           factors);
      const int64_t end = block.column + block.columns;
      for (int64_t c = 0; c < block.columns; c += kLanes) {
        const int64_t column = block.column + c;
        StoreVector(LoadResult(arguments.mean, column, end), mean + c);
        StoreVector(
            Reciprocal(LoadResult(arguments.variance, column, end), factors),
            reciprocal + c);
        if (arguments.mean_grad == nullptr) continue;
        StoreVector(
            VarianceSlope(LoadResult(arguments.variance_grad, column, end),
                          factors),
            slope + c);
        StoreVector(
            MeanOffset(LoadResult(arguments.mean_grad, column, end), factors),
            offset + c);
      }
    }

    // The gradient with respect to values of columns [c, c + kLanes).
    template <bool kStatistics>
    __attribute__((always_inline)) auto At(int64_t c) const {
      return [share = share, mean = LoadVector<V>(mean + c),
              reciprocal = LoadVector<V>(reciprocal + c),
              slope = kStatistics ? LoadVector<V>(slope + c) : V{},
              offset = kStatistics ? LoadVector<V>(offset + c) : V{}](
                 const V& x) __attribute__((always_inline)) {
        if constexpr (kStatistics) {
          return UnitGradient(x, mean, reciprocal, share, slope, offset);
        } else {
          return UnitGradient(x, mean, reciprocal, share);
        }
      };
    }
  };

  // Whether rows are read and written one after the other. What is needed of
  // their columns must then stay in the first cache; else it is read once for
  // several rows in turn, which is faster where all of them lie in a cache, and
  // slower where short ones come from memory.
  static bool IsRowByRow(const Problem& problem, const Block& block) {
    return block.columns <= kRowByRow &&
           problem.rows * problem.units * sizeof(Element) > kCachedBytes;
  }

  // kRows rows of dx, column by column.
  template <int kRows, bool kStream, bool kStatistics>
  static void GradientRows(const Element* x, int64_t stride, int64_t columns,
                           const Columns& of, Element* dx) {
    const auto part = [&](int64_t c, int64_t width) {
      const auto gradient = of.template At<kStatistics>(c);
      for (int r = 0; r < kRows; ++r) {
        StorePart(gradient(LoadPart(x + r * stride + c, width)), width,
                  dx + r * stride + c);
      }
    };
    // Lines that are written around the caches must be written whole. They
    // begin in the same column of every row.
    constexpr int64_t kStep = kStream ? kLine : kLanes;
    int64_t c = 0;
    if constexpr (kStream) {
      const auto place = reinterpret_cast<uintptr_t>(dx) / sizeof(Element);
      const int64_t first = std::min<int64_t>(-place % kLine, columns);
      for (; c < first; c += kLanes) part(c, std::min(kLanes, first - c));
      c = first;
    }
    for (; c + kStep <= columns; c += kStep) {
      alignas(kLineBytes) Element out[kRows][kStep];
      for (int64_t at = 0; at < kStep; at += kLanes) {
        const auto gradient = of.template At<kStatistics>(c + at);
        for (int r = 0; r < kRows; ++r) {
          Convert<Element>::Store(
              gradient(Convert<Element>::Load(x + r * stride + c + at)),
              kStream ? out[r] + at : dx + r * stride + c);
        }
      }
      if constexpr (kStream) {
        for (int r = 0; r < kRows; ++r) {
          StreamLine(out[r], dx + r * stride + c);
        }
      }
    }
    for (; c < columns; c += kLanes) part(c, std::min(kLanes, columns - c));
  }

  template <bool kStream, bool kStatistics>
  static void GradientBlock(const Element* x, int64_t stride, int64_t rows,
                            int64_t columns, bool row_by_row, const Columns& of,
                            Element* dx) {
    int64_t row = 0;
    if (!row_by_row) {
      for (; row + kLeafRows <= rows; row += kLeafRows) {
        GradientRows<kLeafRows, kStream, kStatistics>(
            x + row * stride, stride, columns, of, dx + row * stride);
      }
    }
    for (; row < rows; ++row) {
      GradientRows<1, kStream, kStatistics>(x + row * stride, stride, columns,
                                            of, dx + row * stride);
    }
    if constexpr (kStream) EndStream();
  }

  static void Gradient(const Problem& problem,
                       const GradientArguments& arguments, const Block& block,
                       bool stream) {
    const Columns of(problem, arguments, block);
    const bool statistics = arguments.mean_grad != nullptr;
    const int64_t first = block.row * problem.units + block.column;
    const auto run =
        statistics
            ? (stream ? GradientBlock<true, true> : GradientBlock<false, true>)
            : (stream ? GradientBlock<true, false>
                      : GradientBlock<false, false>);
    run(static_cast<const Element*>(arguments.x) + first, problem.units,
        block.rows, block.columns, IsRowByRow(problem, block), of,
        static_cast<Element*>(arguments.dx) + first);
  }

  // kRows rows of dx = activation'(y) * (dy + the entropy's gradient), each of
  // which is added to `sums`, one after the other.
  template <Activation kActivation, bool kSums, int kRows>
  static void EpilogueGradientRows(const Element* dy, const Element* y,
                                   Element* dx, int64_t stride, int64_t columns,
                                   Scalar slope, const Columns& of,
                                   Scalar* sums) {
    const auto one = [&](int64_t c, auto load,
                         auto store) __attribute__((always_inline)) {
      const auto entropy_gradient = of.template At<false>(c);
      V sum = kSums ? LoadVector<V>(sums + c) : V{};
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = r * stride + c;
        const V y_part = load(y + at);
        const V result = Derivative<kActivation>(y_part, slope) *
                         (load(dy + at) + entropy_gradient(y_part));
        if constexpr (kSums) sum += result;
        store(result, dx + at);
      }
      if constexpr (kSums) StoreVector(sum, sums + c);
    };
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      one(c, Convert<Element>::Load, Convert<Element>::Store);
    }
    if (c == columns) return;
    const int64_t width = columns - c;
    one(
        c, [&](const Element* from) { return LoadPart(from, width); },
        [&](const V& v, Element* to) { StorePart(v, width, to); });
  }

  // At most kLeafRows rows of dx, and their sum.
  using EpilogueRows = void (*)(const Element* dy, const Element* y,
                                Element* dx, int64_t stride, int64_t rows,
                                int64_t columns, bool row_by_row, Scalar slope,
                                const Columns& of, Scalar* sums);

  template <Activation kActivation, bool kSums>
  static void EpilogueLeaf(const Element* dy, const Element* y, Element* dx,
                           int64_t stride, int64_t rows, int64_t columns,
                           bool row_by_row, Scalar slope, const Columns& of,
                           Scalar* sums) {
    // Four rows in turn, since two arrays are read.
    constexpr int64_t kRows = kLeafRows / 2;
    int64_t row = 0;
    if (!row_by_row) {
      for (; row + kRows <= rows; row += kRows) {
        const int64_t at = row * stride;
        EpilogueGradientRows<kActivation, kSums, kRows>(
            dy + at, y + at, dx + at, stride, columns, slope, of, sums);
      }
    }
    for (; row < rows; ++row) {
      const int64_t at = row * stride;
      EpilogueGradientRows<kActivation, kSums, 1>(
          dy + at, y + at, dx + at, stride, columns, slope, of, sums);
    }
  }

  template <bool kSums>
  static EpilogueRows EpilogueLeafOf(Activation activation) {
    switch (activation) {
#define LBE_ACTIVATION(name, keras_name) \
  case Activation::name:                 \
    return EpilogueLeaf<Activation::name, kSums>;
      LBE_FOR_EACH_ACTIVATION(LBE_ACTIVATION)
#undef LBE_ACTIVATION
    }
    __builtin_unreachable();
  }

  static void EpilogueGradient(const Problem& problem,
                               const GradientArguments& arguments,
                               const Block& block) {
    const Columns of(problem, arguments, block);
    const int64_t columns = block.columns;
    const bool row_by_row = IsRowByRow(problem, block);
    const bool wants_sums = arguments.dbias != nullptr;
    const EpilogueRows leaf_rows =
        wants_sums ? EpilogueLeafOf<true>(arguments.epilogue->activation)
                   : EpilogueLeafOf<false>(arguments.epilogue->activation);
    const Scalar slope = static_cast<Scalar>(arguments.epilogue->slope);
    // The order of the sums is that of activations.h; leaves without a row are
    // 0.
    alignas(kLineBytes) Scalar leaves[kLeafRows][kTile + kGroupUnits];
    const int64_t end = block.row + block.rows;
    for (int64_t begin = block.row; begin < end; begin += kSumRows) {
      for (int64_t leaf = 0; leaf < kLeafRows; ++leaf) {
        const int64_t row = begin + leaf * kLeafRows;
        Scalar* const sums = wants_sums ? leaves[leaf] : nullptr;
        if (wants_sums) std::fill_n(sums, columns + kLanes - 1, Scalar(0));
        if (row >= end) continue;
        const int64_t first = row * problem.units + block.column;
        leaf_rows(static_cast<const Element*>(arguments.dy) + first,
                  static_cast<const Element*>(arguments.x) + first,
                  static_cast<Element*>(arguments.dx) + first, problem.units,
                  std::min<int64_t>(end - row, kLeafRows), columns, row_by_row,
                  slope, of, sums);
      }
      if (!wants_sums) continue;
      Scalar* const sums = static_cast<Scalar*>(arguments.workspace) +
                           begin / kSumRows * problem.units + block.column;
      for (int64_t c = 0; c < columns; c += kLanes) {
        V of_leaves[kLeafRows];
        for (int64_t leaf = 0; leaf < kLeafRows; ++leaf) {
          of_leaves[leaf] = LoadVector<V>(leaves[leaf] + c);
        }
        StoreResult(PairwiseSum(of_leaves), c, columns, sums);
      }
    }
  }

  static void RoundAll(const void* from, int64_t count, void* to) {
    Element* elements = static_cast<Element*>(to);
    for (int64_t c = 0; c < count; c += kLanes) {
      StorePart(LoadResult(from, c, count), std::min(kLanes, count - c),
                elements + c);
    }
  }
};

}  // namespace

const CpuLoops* LBE_CPU_LOOPS() {
  static constexpr CpuLoops kLoops[] = {
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) \
  {                                                                   \
      sizeof(element),                                                \
      Loops<element, result>::MomentsOf,                              \
      Loops<element, result>::MergeInto,                              \
      Loops<element, result>::Finish,                                 \
      Loops<element, result>::Gradient,                               \
      Loops<element, result>::EpilogueGradient,                       \
      Loops<element, result>::RoundAll,                               \
  },
      LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
  };
  return kLoops;
}

}  // namespace lbe
