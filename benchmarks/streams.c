// SPDX-License-Identifier: Apache-2.0
//
// Plain reads and copies, as fast as a processor of x86-64 has them: what a
// kernel is measured against. Compiled by machine.py when a benchmark starts.

#include <stddef.h>
#include <xmmintrin.h>

// All arrays have `count` floats, a multiple of 16, and start at multiples of
// 64 bytes. Writing goes around the caches where `around` says so: right for
// what fits none.

float stream_read(const float* x, size_t count) {
  __m128 sums[4] = {_mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps(),
                    _mm_setzero_ps()};
  for (size_t i = 0; i < count; i += 16) {
    for (int k = 0; k < 4; ++k) {
      sums[k] = _mm_max_ps(sums[k], _mm_load_ps(x + i + 4 * k));
    }
  }
  float values[4];
  _mm_storeu_ps(values, _mm_max_ps(_mm_max_ps(sums[0], sums[1]),
                                   _mm_max_ps(sums[2], sums[3])));
  return values[0] + values[1] + values[2] + values[3];
}

void stream_copy(const float* x, float* to, size_t count, int around) {
  for (size_t i = 0; i < count; i += 4) {
    const __m128 value = _mm_load_ps(x + i);
    if (around) {
      _mm_stream_ps(to + i, value);
    } else {
      _mm_store_ps(to + i, value);
    }
  }
  _mm_sfence();
}

void stream_triad(const float* x, const float* y, float* to, size_t count,
                  int around) {
  for (size_t i = 0; i < count; i += 4) {
    const __m128 value = _mm_add_ps(_mm_load_ps(x + i), _mm_load_ps(y + i));
    if (around) {
      _mm_stream_ps(to + i, value);
    } else {
      _mm_store_ps(to + i, value);
    }
  }
  _mm_sfence();
}
