// AVX-512: 32 registers of 16 floats.
#define RVGG_ISA avx512
#define RVGG_NAME "avx512"
#define RVGG_LANES 16
#define RVGG_ROWS 14, 12, 8
#include "kernels_body.hpp"

bool rvgg::avx512::supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
}
