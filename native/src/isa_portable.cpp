// Vectors of 4 floats, as the compiler makes them from what every processor of this kind has.
#define RVGG_ISA portable
#define RVGG_NAME "portable"
#define RVGG_LANES 4
#define RVGG_ROWS 12, 6, 4
#include "kernels_body.hpp"

bool rvgg::portable::supported() { return true; }
