// AVX2 and FMA: 16 registers of 8 floats.
#include <immintrin.h>

#define RVGG_ISA avx2
#define RVGG_NAME "avx2"
#define RVGG_LANES 8
#define RVGG_ROWS 12, 6, 4
#define RVGG_WIDEN(p) \
  (vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))
#include "kernels_body.hpp"

bool rvgg::avx2::supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
