// NEON of 64-bit ARM: 32 registers of 4 floats.
#include <arm_neon.h>

#define RVGG_ISA neon
#define RVGG_NAME "neon"
#define RVGG_LANES 4
#define RVGG_ROWS 14, 12, 8
#define RVGG_WIDEN(p) (vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))
#include "kernels_body.hpp"

bool rvgg::neon::supported() { return true; }
