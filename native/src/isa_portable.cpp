// Vectors of 4 floats, as the compiler makes them from what every processor of this kind has.
#include "half.hpp"

#define RVGG_ISA portable
#define RVGG_NAME "portable"
#define RVGG_LANES 4
#define RVGG_ROWS 12, 6, 4
#define RVGG_WIDEN(p) \
  vec { from_half(p[0]), from_half(p[1]), from_half(p[2]), from_half(p[3]) }
#include "kernels_body.hpp"

bool rvgg::portable::supported() { return true; }
