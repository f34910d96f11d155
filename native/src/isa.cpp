#include <cstring>

#include "kernels.hpp"

namespace rvgg {

#define RVGG_DECLARE(NAME) \
  namespace NAME {         \
  extern const Isa isa;    \
  }
#ifdef RVGG_HAS_X86
RVGG_DECLARE(avx512)
RVGG_DECLARE(avx2)
#endif
#ifdef RVGG_HAS_NEON
RVGG_DECLARE(neon)
#endif
RVGG_DECLARE(portable)

const Isa* const* isas() {
  static const Isa* const all[] = {
#ifdef RVGG_HAS_X86
      &avx512::isa, &avx2::isa,
#endif
#ifdef RVGG_HAS_NEON
      &neon::isa,
#endif
      &portable::isa, nullptr};
  return all;
}

const Isa* find_isa(const char* name) {
  for (const Isa* const* isa = isas(); *isa; ++isa) {
    if ((!name || !*name || !std::strcmp(name, (*isa)->name)) && (*isa)->supported()) return *isa;
  }
  return nullptr;
}

}  // namespace rvgg
