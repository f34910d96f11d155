// AVX-512: 32 registers of 16 floats.
#include <immintrin.h>

#define RVGG_ISA avx512
#define RVGG_NAME "avx512"
#define RVGG_LANES 16
#define RVGG_ROWS 14, 12, 8
#define RVGG_WIDEN(p) \
  (vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))
#include "kernels_body.hpp"

bool rvgg::avx512::supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
}
