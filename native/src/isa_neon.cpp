// NEON of 64-bit ARM: 32 registers of 4 floats.
#define RVGG_ISA neon
#define RVGG_NAME "neon"
#define RVGG_LANES 4
#define RVGG_ROWS 14, 12, 8
#include "kernels_body.hpp"

bool rvgg::neon::supported() { return true; }
