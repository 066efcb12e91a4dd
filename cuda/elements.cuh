// SPDX-License-Identifier: Apache-2.0
//
// What all kernels share: elements and their conversion, reads and writes of
// 16 bytes, how x [rows, units] is cut into blocks, and the place of a thread
// in such a cut. Included by launch.cu.

#ifndef LBE_OPS_CUDA_ELEMENTS_CUH_
#define LBE_OPS_CUDA_ELEMENTS_CUH_

#ifndef LBE_CUDA_EMULATION
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// tests/cuda_emulation.h has its own, to run the kernels on the CPU.
#define LBE_SHARED(type, name, size) __shared__ type name[size]
#define LBE_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

#include <type_traits>

#include "kernels.h"

namespace lbe {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;  // of a warp
constexpr int kWarps = kThreads / kLanes;
constexpr unsigned kAllLanes = 0xffffffff;

// A thread reads 16 bytes of a row, which are so many columns.
template <typename Element>
constexpr int kColumns = 16 / sizeof(Element);

// Elements widened to the type of accumulators, and rounded from it to nearest,
// ties to even. Two 16-bit elements are rounded by one instruction.
template <typename Element>
struct Convert {
  using Scalar = Element;
  static __device__ Element Load(Element x) { return x; }
  static __device__ Element Round(Element x) { return x; }
  static __device__ void RoundTwo(const Element* from, Element* to) {
    to[0] = from[0];
    to[1] = from[1];
  }
};
template <>
struct Convert<Half> {
  using Scalar = float;
  static __device__ float Load(Half x) {
    return __half2float(__ushort_as_half(x.bits));
  }
  static __device__ Half Round(float x) {
    return {__half_as_ushort(__float2half_rn(x))};
  }
  static __device__ void RoundTwo(const float* from, Half* to) {
    const __half2 both = __floats2half2_rn(from[0], from[1]);
    to[0] = {__half_as_ushort(both.x)};
    to[1] = {__half_as_ushort(both.y)};
  }
};
template <>
struct Convert<BFloat16> {
  using Scalar = float;
  static __device__ float Load(BFloat16 x) {
    return BitCast<float>(static_cast<uint32_t>(x.bits) << 16);
  }
  static __device__ BFloat16 Round(float x) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  }
  static __device__ void RoundTwo(const float* from, BFloat16* to) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(from[0], from[1]);
    to[0] = {__bfloat16_as_ushort(both.x)};
    to[1] = {__bfloat16_as_ushort(both.y)};
  }
};

template <typename Element>
using ScalarOf = typename Convert<Element>::Scalar;

// Elements that are read or written at once.
template <typename Element, int kVector>
struct Vector {
  Element elements[kVector];
};

// The words that they are in memory and while they wait in registers, where two
// 16-bit elements share one. CUDA's own types, since only for these is a load
// or a store a single instruction whatever the compiler does around it.
template <int kBytes>
struct WordsOf;
template <>
struct WordsOf<2> {
  using type = unsigned short;
};
template <>
struct WordsOf<4> {
  using type = unsigned;
};
template <>
struct WordsOf<8> {
  using type = uint2;
};
template <>
struct WordsOf<16> {
  using type = uint4;
};
template <typename Element, int kVector>
using Words = typename WordsOf<sizeof(Vector<Element, kVector>)>::type;

template <typename Element, int kVector>
__device__ __forceinline__ Words<Element, kVector> ReadWords(
    const Element* from) {
  return *reinterpret_cast<const Words<Element, kVector>*>(from);
}

// One store for each row: assignments through a pointer become four or eight
// narrow stores in kernels that choose among activations. Written back, not
// streamed: the next operation reads y or dx soon.
template <typename Element, int kVector>
__device__ __forceinline__ void WriteWords(const Words<Element, kVector>& words,
                                           Element* to) {
  __stwb(reinterpret_cast<Words<Element, kVector>*>(to), words);
}

template <typename Element, int kVector>
__device__ __forceinline__ Words<Element, kVector> RoundToWords(
    const ScalarOf<Element> (&values)[kVector]) {
  Vector<Element, kVector> rounded;
  if constexpr (kVector == 1) {
    rounded.elements[0] = Convert<Element>::Round(values[0]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; i += 2) {
      Convert<Element>::RoundTwo(&values[i], &rounded.elements[i]);
    }
  }
  return BitCast<Words<Element, kVector>>(rounded);
}

// Reads so many contiguous results; `wide` says that they start at a multiple
// of 16 bytes, as do those of a thread in kernels for whole vectors.
template <bool wide, int kCount, typename Scalar>
__device__ __forceinline__ void ReadScalars(const Scalar* from,
                                            Scalar (&to)[kCount]) {
  constexpr int kVector = 16 / sizeof(Scalar);
  if constexpr (wide && kCount % kVector == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += kVector) {
      const auto read = BitCast<Vector<Scalar, kVector>>(
          ReadWords<Scalar, kVector>(from + i));
#pragma unroll
      for (int j = 0; j < kVector; ++j) to[i + j] = read.elements[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = from[i];
  }
}

// Calls body(r, &rows[r]) for each row, one after the other, kUnroll of them in
// the code. The rows move up in between, so that they stay in registers
// wherever the loop is.
template <int kUnroll, int kRows, typename Row, typename Body>
__device__ __forceinline__ void ForEachRow(Row (&rows)[kRows],
                                           const Body& body) {
#pragma unroll kUnroll
  for (int r = 0; r < kRows; ++r) {
    Row row = rows[0];
#pragma unroll
    for (int i = 1; i < kRows; ++i) rows[i - 1] = rows[i];
    body(r, &row);
    rows[kRows - 1] = row;
  }
}

// Calls `body` with the activation as a constant. All threads branch alike.
template <typename Body>
__device__ __forceinline__ void WithActivation(Activation activation,
                                               const Body& body) {
  switch (activation) {
#define LBE_ACTIVATION(name, keras_name) \
  case Activation::name:                 \
    return body(std::integral_constant<Activation, Activation::name>());
    LBE_FOR_EACH_ACTIVATION(LBE_ACTIVATION)
#undef LBE_ACTIVATION
  }
}

__host__ __device__ constexpr int64_t CeilDiv(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The rows of [first, first + count) that there are.
template <typename Int>
__host__ __device__ Int RowsOf(Int first, Int count, Int rows) {
  const Int rest = rows - first;
  return rest < 0 ? 0 : rest < count ? rest : count;
}

// How x [rows, units] is cut. A block has `lanes` threads side by side, each
// with so many columns, and kThreads / lanes groups of such threads one below
// the other, each with `run_rows` rows.
struct Cut {
  int64_t rows;
  int64_t units;
  int lanes;
  int groups;        // kThreads / lanes
  int tile_columns;  // of a block
  int tile_bits;     // of which there are 2^tile_bits
  int run_rows;
  int64_t tiles;   // blocks side by side
  int64_t splits;  // blocks one below the other

  __host__ __device__ int block_rows() const { return groups * run_rows; }
};

__device__ int Thread() { return static_cast<int>(threadIdx.x); }

// The place of a thread in its block, and of its block in x.
struct Place {
  int lane;   // of the threads side by side
  int group;  // of those one below the other
  int tile;
  int split;

  __device__ explicit Place(const Cut& cut) {
    const unsigned lanes = cut.lanes,
                   tiles = cut.tiles;  // 32 bits divide faster
    lane = threadIdx.x % lanes;
    group = threadIdx.x / lanes;
    tile = blockIdx.x % tiles;
    split = blockIdx.x / tiles;
  }

  __device__ int64_t first_column(const Cut& cut) const {
    return int64_t{tile} * cut.tile_columns;
  }
  __device__ int64_t first_row(const Cut& cut) const {
    return int64_t{split} * cut.block_rows();
  }
  // Of this block.
  __device__ int rows(const Cut& cut) const {
    return static_cast<int>(
        RowsOf<int64_t>(first_row(cut), cut.block_rows(), cut.rows));
  }
};

// The vectors of a thread in each row: where they start in the tile, and
// whether x goes so far. Those of threads side by side are contiguous.
template <int kVector>
struct Pieces {
  int first;
  int step;
  int columns;  // of the tile that x has

  __device__ Pieces(const Cut& cut, const Place& place)
      : first(place.lane * kVector),
        step(cut.lanes * kVector),
        columns(static_cast<int>(RowsOf<int64_t>(
            place.first_column(cut), cut.tile_columns, cut.units))) {}
  __device__ int column(int piece) const { return first + piece * step; }
  __device__ bool inside(int piece) const { return column(piece) < columns; }
};

// The sum of the values of each kWidth threads, by halves as SumHalves has it,
// for the first of them. Has barriers: all threads must call it.
template <int kWidth>
__device__ double SumHalvesInBlock(double value) {
  LBE_SHARED(double, values, kThreads);
  const int place = Thread() % kWidth;
#pragma unroll
  for (int half = kWidth / 2; half >= kLanes; half /= 2) {
    // Nobody reads these any more: the last step read from 2 * half on.
    if (place < 2 * half) values[Thread()] = value;
    __syncthreads();
    if (place < half) value += values[Thread() + half];
  }
#pragma unroll
  for (int half = kLanes / 2; half > 0; half /= 2) {
    value += __shfl_down_sync(kAllLanes, value, half);
  }
  return value;
}

}  // namespace
}  // namespace lbe

#endif  // LBE_OPS_CUDA_ELEMENTS_CUH_
