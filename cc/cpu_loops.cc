// SPDX-License-Identifier: Apache-2.0
//
// The CPU loops over rows and columns, for one instruction set.
//
// CMake compiles this file once for each instruction set, with LBE_CPU_LOOPS
// naming the table that it defines; cpu_dispatch.cc picks one at run time. All
// functions are local or always inlined, so that the linker never merges code
// of different instruction sets.

#include <immintrin.h>

#include <algorithm>

#include "cpu_kernels.h"

#ifndef LBE_CPU_LOOPS
#error "LBE_CPU_LOOPS must name the table to define"
#endif

namespace lbe {
namespace {

// A line of accumulators, which the compiler splits into what the instruction
// set has. 64 bytes, so that 8 rows in the same cache set are each read once.
constexpr int kLineBytes = 64;
typedef float FloatLine __attribute__((vector_size(kLineBytes)));
typedef double DoubleLine __attribute__((vector_size(kLineBytes)));
typedef int32_t Int32Line __attribute__((vector_size(kLineBytes)));
typedef int64_t Int64Line __attribute__((vector_size(kLineBytes)));
typedef uint32_t Uint32Line __attribute__((vector_size(kLineBytes)));
typedef uint64_t Uint64Line __attribute__((vector_size(kLineBytes)));
typedef uint16_t Uint16Line __attribute__((vector_size(kLineBytes / 2)));

}  // namespace

template <>
struct Integers<FloatLine> {
  using type = Uint32Line;
  LBE_MATH FloatLine Convert(const type& k) {
    return __builtin_convertvector(BitCast<Int32Line>(k), FloatLine);
  }
};
template <>
struct Integers<DoubleLine> {
  using type = Uint64Line;
  LBE_MATH DoubleLine Convert(const type& k) {
    return __builtin_convertvector(BitCast<Int64Line>(k), DoubleLine);
  }
};

namespace {

template <typename V>
LBE_MATH V LoadLine(const void* from) {
  V line;
  __builtin_memcpy(&line, from, sizeof(line));
  return line;
}

template <typename V>
LBE_MATH void StoreLine(const V& line, void* to) {
  __builtin_memcpy(to, &line, sizeof(line));
}

// Elements widened to a line of accumulators, and a line rounded to elements.
template <typename Element>
struct Convert;

template <>
struct Convert<float> {
  using Scalar = float;
  using Line = FloatLine;
  LBE_MATH FloatLine Load(const float* x) { return LoadLine<FloatLine>(x); }
  LBE_MATH float LoadOne(const float* x) { return *x; }
  LBE_MATH void Store(const FloatLine& line, float* x) { StoreLine(line, x); }
};

template <>
struct Convert<double> {
  using Scalar = double;
  using Line = DoubleLine;
  LBE_MATH DoubleLine Load(const double* x) { return LoadLine<DoubleLine>(x); }
  LBE_MATH double LoadOne(const double* x) { return *x; }
  LBE_MATH void Store(const DoubleLine& line, double* x) { StoreLine(line, x); }
};

template <>
struct Convert<BFloat16> {
  using Scalar = float;
  using Line = FloatLine;
  LBE_MATH FloatLine Load(const BFloat16* x) {
    const auto bits = LoadLine<Uint16Line>(x);
    return BitCast<FloatLine>(__builtin_convertvector(bits, Uint32Line) << 16);
  }
  LBE_MATH float LoadOne(const BFloat16* x) {
    return BitCast<float>(static_cast<uint32_t>(x->bits) << 16);
  }
  LBE_MATH void Store(const FloatLine& line, BFloat16* x) {
    const auto bits = BitCast<Uint32Line>(line);
    // To nearest, ties to even; a NaN keeps its sign and stays a NaN.
    const Uint32Line rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Uint32Line nan = (bits >> 16) | 0x40;
    const Uint32Line result = line == line ? rounded : nan;
    StoreLine(__builtin_convertvector(result, Uint16Line), x);
  }
};

template <>
struct Convert<Half> {
  using Scalar = float;
  using Line = FloatLine;
  LBE_MATH float LoadOne(const Half* x) {
#if defined(__F16C__)
    return _cvtsh_ss(x->bits);
#else
    Half padded[kLineBytes / sizeof(float)] = {*x};
    return Load(padded)[0];
#endif
  }
#if defined(__AVX512F__)
  LBE_MATH FloatLine Load(const Half* x) {
    return _mm512_cvtph_ps(LoadLine<__m256i>(x));
  }
  LBE_MATH void Store(const FloatLine& line, Half* x) {
    StoreLine(_mm512_cvtps_ph(line, _MM_FROUND_TO_NEAREST_INT), x);
  }
#elif defined(__F16C__)
  LBE_MATH FloatLine Load(const Half* x) {
    const __m256 halves[2] = {_mm256_cvtph_ps(LoadLine<__m128i>(x)),
                              _mm256_cvtph_ps(LoadLine<__m128i>(x + 8))};
    return LoadLine<FloatLine>(halves);
  }
  LBE_MATH void Store(const FloatLine& line, Half* x) {
    __m256 halves[2];
    StoreLine(line, halves);
    StoreLine(_mm256_cvtps_ph(halves[0], _MM_FROUND_TO_NEAREST_INT), x);
    StoreLine(_mm256_cvtps_ph(halves[1], _MM_FROUND_TO_NEAREST_INT), x + 8);
  }
#else
  LBE_MATH FloatLine Load(const Half* x) {
    const auto bits =
        __builtin_convertvector(LoadLine<Uint16Line>(x), Uint32Line);
    const Uint32Line magnitude = bits & 0x7fff;
    // Rebias the exponent from 15 to 127; Inf and NaN get the largest one.
    const Uint32Line normal = (magnitude << 13) + (112u << 23);
    const Uint32Line special = (magnitude << 13) | 0x7f800000;
    // A subnormal is its mantissa times 2^-24: by arithmetic, since the
    // processor may be flushing subnormal floats.
    const FloatLine small =
        __builtin_convertvector(BitCast<Int32Line>(magnitude), FloatLine) *
        5.9604644775390625e-8f;
    Uint32Line result = magnitude >= 0x7c00 ? special : normal;
    result = magnitude < 0x400 ? BitCast<Uint32Line>(small) : result;
    return BitCast<FloatLine>(result | ((bits & 0x8000) << 16));
  }
  LBE_MATH void Store(const FloatLine& line, Half* x) {
    const auto bits = BitCast<Uint32Line>(line);
    const Uint32Line magnitude = bits & 0x7fffffff;
    // To nearest, ties to even. Normal: drop 13 bits of the mantissa. Below
    // 2^-14: adding 1/2 leaves the subnormal's mantissa, rounded, in the lowest
    // bits.
    const Uint32Line normal =
        (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    const Uint32Line small =
        BitCast<Uint32Line>(BitCast<FloatLine>(magnitude) + 0.5f) - 0x3f000000;
    const Uint32Line nan = (magnitude >> 13 & 0x3ff) | 0x7e00;
    const Uint32Line infinity = Uint32Line{} + 0x7c00;
    Uint32Line result = magnitude < 0x38800000 ? small : normal;
    result = magnitude >= 0x477ff000 ? infinity : result;
    result = magnitude > 0x7f800000 ? nan : result;
    result |= (bits >> 16) & 0x8000;
    StoreLine(__builtin_convertvector(result, Uint16Line), x);
  }
#endif
};

// 64 aligned bytes written around the caches.
LBE_MATH void StreamLine(const void* line, void* to) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), LoadLine<__m512i>(line));
#else
  for (int i = 0; i < 4; ++i) {
    _mm_stream_si128(static_cast<__m128i*>(to) + i,
                     LoadLine<__m128i>(static_cast<const __m128i*>(line) + i));
  }
#endif
}

template <typename Element>
struct Loops {
  using Scalar = typename Convert<Element>::Scalar;
  using Line = typename Convert<Element>::Line;
  static constexpr int64_t kLanes = kLineBytes / sizeof(Scalar);
  // Rows of the tree's lowest node that is made in registers: two leaves, or
  // one where y is written besides and rows are a multiple of this many bytes
  // apart. A set of the first cache then holds no more lines than that.
  static constexpr int kChunkRows = 2 * kLeafRows;
  static constexpr int64_t kSetBytes = 4096;
  // While one segment of a chunk's rows is worked on, the next one is fetched,
  // row by row: memory is read in longer runs than by 16 rows in turn, of which
  // the processor's own prefetcher loses track at every page.
  static constexpr int64_t kSegmentBytes = 1024;
  static constexpr int64_t kSegment = kSegmentBytes / sizeof(Element);

  // `columns` < kLanes elements; the other lanes are 0.
  static Line LoadPart(const Element* x, int64_t columns) {
    Element padded[kLanes] = {};
    __builtin_memcpy(padded, x, columns * sizeof(Element));
    return Convert<Element>::Load(padded);
  }

  static void StorePart(const Line& line, int64_t columns, Element* x) {
    Element padded[kLanes];
    Convert<Element>::Store(line, padded);
    __builtin_memcpy(x, padded, columns * sizeof(Element));
  }

  // Reads and writes lines of a result, of which the last may be short.
  LBE_MATH Line LoadResult(const void* from, int64_t column, int64_t columns) {
    const Scalar* p = static_cast<const Scalar*>(from) + column;
    if (column + kLanes <= columns) return LoadLine<Line>(p);
    Line line = {};
    __builtin_memcpy(&line, p, (columns - column) * sizeof(Scalar));
    return line;
  }
  LBE_MATH void StoreResult(const Line& line, int64_t column, int64_t columns,
                            void* to) {
    Scalar* p = static_cast<Scalar*>(to) + column;
    if (column + kLanes <= columns) return StoreLine(line, p);
    __builtin_memcpy(p, &line, (columns - column) * sizeof(Scalar));
  }

  // Columns of x as they stand in memory: a line of them, a short one, or one.
  struct FullColumns {
    const Element* x;
    Line Load(int64_t at) const { return Convert<Element>::Load(x + at); }
    static Line Keep(const Line& line, int64_t) { return line; }
  };
  struct FewColumns {
    const Element* x;
    int64_t width;
    Line Load(int64_t at) const { return LoadPart(x + at, width); }
    static Line Keep(const Line& line, int64_t) { return line; }
  };
  struct OneColumn {
    const Element* x;
    Scalar Load(int64_t at) const { return Convert<Element>::LoadOne(x + at); }
    static Scalar Keep(Scalar value, int64_t) { return value; }
  };
  // Columns of y, made of those of z.
  template <Activation kActivation>
  struct MadeColumns {
    const Element* z;
    Element* y;
    Line bias;
    Scalar alpha;
    __attribute__((always_inline)) Line Load(int64_t at) const {
      return Activate<kActivation>(Convert<Element>::Load(z + at) + bias,
                                   alpha);
    }
    __attribute__((always_inline)) Line Keep(const Line& line,
                                             int64_t at) const {
      Convert<Element>::Store(line, y + at);
      if constexpr (sizeof(Element) == sizeof(Scalar)) return line;
      return Convert<Element>::Load(y + at);  // rounded
    }
  };

  // Moments of `rows` <= kLeafRows rows of columns at an offset.
  template <typename Columns>
  LBE_MATH auto Leaf(const Columns& columns, int64_t at, int64_t stride,
                     int rows) {
    decltype(columns.Load(at)) values[kLeafRows] = {};
    // All are read before one is written: a processor waits where a row is read
    // that is a multiple of 4 KB behind one being written.
    for (int r = 0; r < kLeafRows; ++r) {
      if (r < rows) values[r] = columns.Load(at + r * stride);
    }
    for (int r = 0; r < kLeafRows; ++r) {
      if (r < rows) values[r] = columns.Keep(values[r], at + r * stride);
    }
    return LeafMoments<Scalar>(values, rows);
  }

  // The same over `rows` <= kChunkRows rows.
  template <typename Columns>
  LBE_MATH auto Chunk(const Columns& columns, int64_t at, int64_t stride,
                      int rows) {
    if (rows <= kLeafRows) return Leaf(columns, at, stride, rows);
    return Merge(
        Leaf(columns, at, stride, kLeafRows),
        Leaf(columns, at + kLeafRows * stride, stride, rows - kLeafRows),
        WeightsOf<Scalar>(kLeafRows, rows - kLeafRows));
  }

  // The same for `width` < kLanes columns of x: few of them one by one, since a
  // line would be filled piece by piece.
  static Moments<Line> NarrowChunk(const Element* x, int64_t stride, int rows,
                                   int64_t width) {
    constexpr int64_t kFew = 4;
    if (width > kFew) return Chunk(FewColumns{x, width}, 0, stride, rows);
    Moments<Line> line = {};
    for (int64_t c = 0; c < width; ++c) {
      const auto moments = Chunk(OneColumn{x}, c, stride, rows);
      line.mean[c] = moments.mean;
      line.m2[c] = moments.m2;
    }
    return line;
  }

  // The share of column c in fetching the segment after that of c.
  template <int kRows>
  LBE_MATH void Prefetch(const Element* x, int64_t units, int64_t c,
                         int64_t columns) {
    constexpr int64_t kSteps = kSegment / kLanes;
    constexpr int64_t kLines = kSegmentBytes / kLineBytes;
    constexpr int64_t kShare = kRows * kLines / kSteps;
    const int64_t next = (c / kSegment + 1) * kSegment;
    const Element* from = next < columns ? x + next : x + kRows * units;
    const int64_t first = c / kLanes % kSteps * kShare;
    const auto* row =
        reinterpret_cast<const char*>(from + first / kLines * units);
    for (int64_t line = 0; line < kShare; ++line) {
      _mm_prefetch(row + (first % kLines + line) * kLineBytes, _MM_HINT_T0);
    }
  }

  // A line of the bias for columns [column, column + kLanes): the channels of a
  // position are side by side, those of the next one follow.
  LBE_MATH Line BiasLine(const Element* bias, int64_t channels, int64_t column,
                         int64_t columns) {
    const int64_t channel = column % channels;
    if (channel + columns <= channels) {
      return columns == kLanes ? Convert<Element>::Load(bias + channel)
                               : LoadPart(bias + channel, columns);
    }
    Element line[kLanes] = {};
    for (int64_t i = 0; i < columns; ++i) {
      line[i] = bias[(channel + i) % channels];
    }
    return Convert<Element>::Load(line);
  }

  // Rows and columns of y = activation(z + bias).
  template <Activation kActivation>
  static void MakeYWith(const EpilogueOperands& o, int64_t row, int64_t rows,
                        int64_t column, int64_t columns) {
    const Element* bias = static_cast<const Element*>(o.epilogue->bias);
    const Scalar alpha = static_cast<Scalar>(o.epilogue->alpha);
    const Element* z = static_cast<const Element*>(o.z);
    Element* y = static_cast<Element*>(o.y);
    // Column by column: a line of the bias serves all rows of a chunk.
    for (int64_t c = column; c < column + columns; c += kLanes) {
      const int64_t width = std::min(kLanes, column + columns - c);
      const Line b = bias == nullptr
                         ? Line{}
                         : BiasLine(bias, o.epilogue->channels, c, width);
      for (int64_t r = row; r < row + rows; ++r) {
        const int64_t at = r * o.units + c;
        if (width == kLanes) {
          Convert<Element>::Store(
              Activate<kActivation>(Convert<Element>::Load(z + at) + b, alpha),
              y + at);
        } else {
          StorePart(Activate<kActivation>(LoadPart(z + at, width) + b, alpha),
                    width, y + at);
        }
      }
    }
  }

  // Where the activations come from. `from` is what At's columns read, `y` has
  // the activations of a short line once BeginNarrow was called. From memory,
  struct Activations {
    const Element* from;
    const Element* y;

    void Begin(int64_t, int64_t) const {}
    void BeginNarrow(int64_t, int64_t, int64_t, int64_t) const {}
    FullColumns At(int64_t) const { return {from}; }
  };

  // or an epilogue, which makes and stores them, a chunk of rows at a time,
  // which then is read where it stays in the caches,
  template <Activation kActivation>
  struct MadeInMemory : Activations {
    const EpilogueOperands& operands;
    int64_t row;
    int64_t column;
    int64_t columns;

    void Begin(int64_t first, int64_t rows) const {
      MakeYWith<kActivation>(operands, row + first, rows, column, columns);
    }
  };

  // or line by line, on their way into the moments.
  template <Activation kActivation>
  struct MadeInRegisters : MadeInMemory<kActivation> {
    void Begin(int64_t, int64_t) const {}
    void BeginNarrow(int64_t first, int64_t rows, int64_t c,
                     int64_t width) const {
      MakeYWith<kActivation>(this->operands, this->row + first, rows,
                             this->column + c, width);
    }
    MadeColumns<kActivation> At(int64_t c) const {
      const Epilogue& epilogue = *this->operands.epilogue;
      const Element* bias = static_cast<const Element*>(epilogue.bias);
      return {this->from, const_cast<Element*>(this->y),
              bias == nullptr
                  ? Line{}
                  : BiasLine(bias, epilogue.channels, this->column + c, kLanes),
              static_cast<Scalar>(epilogue.alpha)};
    }
  };

  static void MomentsOf(const void* x, const EpilogueOperands* operands,
                        int64_t units, int64_t row, int64_t rows,
                        int64_t column, int64_t columns, void* mean, void* m2) {
    const int64_t first = row * units + column;
    const Element* y = static_cast<const Element*>(x) + first;
    if (operands == nullptr) {
      return MomentsFrom<kChunkRows>(Activations{y, y}, units, rows, columns,
                                     mean, m2);
    }
    const Element* z = static_cast<const Element*>(operands->z) + first;
    switch (operands->epilogue->activation) {
#define LBE_ACTIVATION(name, keras_name)                                       \
  case Activation::name:                                                       \
    if constexpr (IsCheap(Activation::name)) {                                 \
      using Made = MadeInRegisters<Activation::name>;                          \
      const Made made{{{z, y}, *operands, row, column, columns}};              \
      const auto run = units * sizeof(Element) % kSetBytes == 0                \
                           ? MomentsFrom<kLeafRows, Made>                      \
                           : MomentsFrom<kChunkRows, Made>;                    \
      return run(made, units, rows, columns, mean, m2);                        \
    } else {                                                                   \
      using Made = MadeInMemory<Activation::name>;                             \
      return MomentsFrom<kChunkRows>(                                          \
          Made{{y, y}, *operands, row, column, columns}, units, rows, columns, \
          mean, m2);                                                           \
    }
      LBE_FOR_EACH_ACTIVATION(LBE_ACTIVATION)
#undef LBE_ACTIVATION
    }
  }

  static constexpr int LogOfTwo(int64_t power) {
    return power == 1 ? 0 : 1 + LogOfTwo(power / 2);
  }

  // The tree, leaf by leaf, as a binary counter: level l of `stack` holds the
  // node over the latest 2^l full chunks, where bit l of the count of chunks is
  // set. A chunk merges with the nodes that it completes while it is in
  // registers, and the last one with all that are left.
  template <int kRows, typename Source>
  static void MomentsFrom(const Source& source, int64_t units, int64_t rows,
                          int64_t columns, void* mean, void* m2) {
    struct Node {
      Line mean[kTile / kLanes];
      Line m2[kTile / kLanes];
    };
    constexpr int kLevels = LogOfTwo(kPartRows / kRows);
    alignas(kLineBytes) Node stack[kLevels];
    for (int64_t chunk = 0; chunk * kRows < rows; ++chunk) {
      const int64_t at = chunk * kRows * units;
      const int64_t rest = rows - chunk * kRows;
      const bool last = rest <= kRows;
      const int chunk_rows = last ? static_cast<int>(rest) : kRows;
      int level = 0;
      int merges = 0;
      const Node* left[kLevels];
      MergeWeights<Scalar> weights[kLevels];
      for (int64_t merged = chunk_rows; chunk >> level != 0; ++level) {
        if ((chunk >> level & 1) == 0) {
          if (last) continue;
          break;
        }
        const int64_t left_rows = int64_t{kRows} << level;
        left[merges] = &stack[level];
        weights[merges++] = WeightsOf<Scalar>(left_rows, merged);
        merged += left_rows;
      }
      const auto merge_up = [&](Moments<Line> node,
                                int64_t line) __attribute__((always_inline)) {
        for (int m = 0; m < merges; ++m) {
          node = Merge(Moments<Line>{left[m]->mean[line], left[m]->m2[line]},
                       node, weights[m]);
        }
        if (last) {
          StoreResult(node.mean, line * kLanes, columns, mean);
          StoreResult(node.m2, line * kLanes, columns, m2);
        } else {
          stack[level].mean[line] = node.mean;
          stack[level].m2[line] = node.m2;
        }
      };
      source.Begin(chunk * kRows, chunk_rows);
      int64_t c = 0;
      if (chunk_rows == kRows) {
        for (; c + kLanes <= columns; c += kLanes) {
          if (columns >= kSegment) {
            Prefetch<kRows>(source.from + at, units, c, columns);
          }
          merge_up(Chunk(source.At(c), at + c, units, kRows), c / kLanes);
        }
      }
      for (; c + kLanes <= columns; c += kLanes) {
        merge_up(Chunk(source.At(c), at + c, units, chunk_rows), c / kLanes);
      }
      if (c < columns) {
        source.BeginNarrow(chunk * kRows, chunk_rows, c, columns - c);
        merge_up(NarrowChunk(source.y + at + c, units, chunk_rows, columns - c),
                 c / kLanes);
      }
    }
  }

  static void MergeInto(int64_t a_rows, int64_t b_rows, int64_t columns,
                        const void* b_mean, const void* b_m2, void* mean,
                        void* m2) {
    const auto weights = WeightsOf<Scalar>(a_rows, b_rows);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const auto merged = Merge<Scalar, Line>(
          {LoadResult(mean, c, columns), LoadResult(m2, c, columns)},
          {LoadResult(b_mean, c, columns), LoadResult(b_m2, c, columns)},
          weights);
      StoreResult(merged.mean, c, columns, mean);
      StoreResult(merged.m2, c, columns, m2);
    }
  }

  static void Finish(int64_t rows, int64_t columns, const Formula& formula,
                     void* m2, double* group_sums) {
    const auto factors = EntropyFactorsOf<Scalar>(formula);
    for (int64_t group = 0; group < columns; group += kGroupUnits) {
      double entropies[kGroupUnits] = {};
      for (int64_t i = 0; i < kGroupUnits && group + i < columns; i += kLanes) {
        const int64_t c = group + i;
        const Line variance =
            Variance<Scalar>(LoadResult(m2, c, columns), rows, formula);
        StoreResult(variance, c, columns, m2);
        const Line entropy = UnitEntropy<Scalar>(variance, factors);
        for (int64_t lane = 0; lane < kLanes && c + lane < columns; ++lane) {
          entropies[i + lane] = entropy[lane];
        }
      }
      group_sums[group / kGroupUnits] = SumHalves<kGroupUnits>(entropies);
    }
  }

  template <bool kStream, bool kOffset>
  static void GradientRows(const Element* x, int64_t stride, int64_t rows,
                           int64_t columns, const Line* mean, const Line* slope,
                           const Line* offset, Element* dx) {
    const auto gradient =
        [&](int64_t line, const Line& value) __attribute__((always_inline)) {
          if constexpr (kOffset) {
            return UnitGradient(value, mean[line], slope[line], offset[line]);
          } else {
            return UnitGradient(value, mean[line], slope[line]);
          }
        };
    // Elements that fill a cache line: two lines of accumulators for half
    // types.
    constexpr int64_t kStep = kStream ? kLineBytes / sizeof(Element) : kLanes;
    for (int64_t row = 0; row < rows; ++row, x += stride, dx += stride) {
      int64_t c = 0;
      for (; c + kStep <= columns; c += kStep) {
        if constexpr (kStream) {
          alignas(kLineBytes) Element out[kStep];
          for (int64_t part = 0; part < kStep; part += kLanes) {
            Convert<Element>::Store(
                gradient((c + part) / kLanes,
                         Convert<Element>::Load(x + c + part)),
                out + part);
          }
          StreamLine(out, dx + c);
        } else {
          Convert<Element>::Store(
              gradient(c / kLanes, Convert<Element>::Load(x + c)), dx + c);
        }
      }
      for (; c < columns; c += kLanes) {
        const int64_t rest = columns - c < kLanes ? columns - c : kLanes;
        StorePart(gradient(c / kLanes, LoadPart(x + c, rest)), rest, dx + c);
      }
    }
    if constexpr (kStream) _mm_sfence();
  }

  // Lines of mean, slope and, unless it is null, offset of columns [column,
  // column + columns).
  LBE_MATH void Slopes(const GradientOperands& operands, int64_t column,
                       int64_t columns, Line* mean, Line* slope, Line* offset) {
    const auto factors = GradientFactorsOf<Scalar>(
        operands.rows, operands.units, *operands.formula);
    const Scalar entropy_share = EntropyShare(
        *static_cast<const Scalar*>(operands.entropy_grad), factors);
    const int64_t end = column + columns;
    for (int64_t line = 0; line * kLanes < columns; ++line) {
      const int64_t c = column + line * kLanes;
      mean[line] = LoadResult(operands.mean, c, end);
      slope[line] = EntropySlope(LoadResult(operands.variance, c, end),
                                 entropy_share, factors);
      if (offset != nullptr) {
        slope[line] +=
            VarianceSlope(LoadResult(operands.variance_grad, c, end), factors);
        offset[line] =
            MeanOffset(LoadResult(operands.mean_grad, c, end), factors);
      }
    }
  }

  static void Gradient(const GradientOperands& operands, int64_t row,
                       int64_t rows, int64_t column, int64_t columns,
                       bool stream) {
    const bool has_offset = operands.mean_grad != nullptr;
    alignas(kLineBytes) Line mean[kGradientTile / kLanes];
    alignas(kLineBytes) Line slope[kGradientTile / kLanes];
    alignas(kLineBytes) Line offset[kGradientTile / kLanes];
    Slopes(operands, column, columns, mean, slope,
           has_offset ? offset : nullptr);
    const int64_t first = row * operands.units + column;
    const auto run =
        has_offset
            ? (stream ? GradientRows<true, true> : GradientRows<false, true>)
            : (stream ? GradientRows<true, false> : GradientRows<false, false>);
    run(static_cast<const Element*>(operands.x) + first, operands.units, rows,
        columns, mean, slope, offset,
        static_cast<Element*>(operands.dx) + first);
  }

  static void RoundAll(const void* from, int64_t count, void* to) {
    Element* elements = static_cast<Element*>(to);
    for (int64_t c = 0; c < count; c += kLanes) {
      const int64_t width = std::min(kLanes, count - c);
      StorePart(LoadResult(from, c, count), width, elements + c);
    }
  }

  // Rows of dz = activation'(y) * (dy + slope * (y - mean)), and their sums.
  template <Activation kActivation, bool kSums>
  static void EpilogueRows(const Element* dy, const Element* y, Element* dz,
                           int64_t stride, int64_t rows, int64_t columns,
                           Scalar alpha, const Line* mean, const Line* slope,
                           Line* sums) {
    const auto gradient =
        [&](int64_t line, const Line& dy_line, const Line& y_line)
            __attribute__((always_inline)) {
              const Line result =
                  Derivative<kActivation>(y_line, alpha) *
                  (dy_line + UnitGradient(y_line, mean[line], slope[line]));
              if constexpr (kSums) sums[line] += result;
              return result;
            };
    for (int64_t row = 0; row < rows;
         ++row, dy += stride, y += stride, dz += stride) {
      int64_t c = 0;
      for (; c + kLanes <= columns; c += kLanes) {
        Convert<Element>::Store(
            gradient(c / kLanes, Convert<Element>::Load(dy + c),
                     Convert<Element>::Load(y + c)),
            dz + c);
      }
      if (c < columns) {
        const int64_t width = columns - c;
        StorePart(gradient(c / kLanes, LoadPart(dy + c, width),
                           LoadPart(y + c, width)),
                  width, dz + c);
      }
    }
  }

  template <Activation kActivation>
  static void EpilogueGradientWith(const EpilogueOperands& o, int64_t first,
                                   int64_t rows, int64_t columns,
                                   const Line* mean, const Line* slope,
                                   Line* sums) {
    const auto run = sums == nullptr ? EpilogueRows<kActivation, false>
                                     : EpilogueRows<kActivation, true>;
    run(static_cast<const Element*>(o.z) + first,
        static_cast<const Element*>(o.y) + first,
        static_cast<Element*>(o.dz) + first, o.units, rows, columns,
        static_cast<Scalar>(o.epilogue->alpha), mean, slope, sums);
  }

  static void EpilogueGradient(const EpilogueOperands& o,
                               const GradientOperands& statistics, int64_t row,
                               int64_t rows, int64_t column, int64_t columns,
                               void* sums) {
    alignas(kLineBytes) Line mean[kGradientTile / kLanes];
    alignas(kLineBytes) Line slope[kGradientTile / kLanes];
    alignas(kLineBytes) Line leaf_sums[kLeafRows][kGradientTile / kLanes];
    Slopes(statistics, column, columns, mean, slope, nullptr);
    const auto run = [&](int64_t first_row, int64_t count, Line* to) {
      const int64_t first = first_row * o.units + column;
      switch (o.epilogue->activation) {
#define LBE_ACTIVATION(name, keras_name)                                   \
  case Activation::name:                                                   \
    EpilogueGradientWith<Activation::name>(o, first, count, columns, mean, \
                                           slope, to);                     \
    break;
        LBE_FOR_EACH_ACTIVATION(LBE_ACTIVATION)
#undef LBE_ACTIVATION
      }
    };
    if (sums == nullptr) return run(row, rows, nullptr);
    // In the order of activations.h; leaves without a row are 0.
    const int64_t end = row + rows;
    for (int64_t begin = row; begin < end; begin += kSumRows) {
      for (int64_t leaf = 0; leaf < kLeafRows; ++leaf) {
        const int64_t first = begin + leaf * kLeafRows;
        for (int64_t c = 0; c < columns; c += kLanes) {
          leaf_sums[leaf][c / kLanes] = Line{};
        }
        run(first, std::clamp<int64_t>(end - first, 0, kLeafRows),
            leaf_sums[leaf]);
      }
      Scalar* const row_sums =
          static_cast<Scalar*>(sums) + begin / kSumRows * o.units + column;
      for (int64_t c = 0; c < columns; c += kLanes) {
        Line of_leaves[kLeafRows];
        for (int64_t leaf = 0; leaf < kLeafRows; ++leaf) {
          of_leaves[leaf] = leaf_sums[leaf][c / kLanes];
        }
        StoreResult(PairwiseSum(of_leaves), c, columns, row_sums);
      }
    }
  }
};

}  // namespace

const CpuLoops* LBE_CPU_LOOPS() {
  static constexpr CpuLoops kLoops[] = {
#define LBE_DTYPE(name, element, result, tensorflow_name, numpy_name) \
  {                                                                   \
      sizeof(element),                                                \
      sizeof(result),                                                 \
      Loops<element>::MomentsOf,                                      \
      Loops<element>::MergeInto,                                      \
      Loops<element>::Finish,                                         \
      Loops<element>::Gradient,                                       \
      Loops<element>::EpilogueGradient,                               \
      Loops<element>::RoundAll,                                       \
  },
      LBE_FOR_EACH_DTYPE(LBE_DTYPE)
#undef LBE_DTYPE
  };
  return kLoops;
}

}  // namespace lbe
