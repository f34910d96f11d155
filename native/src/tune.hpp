// Which algorithm is best for a layer: by a model of the costs, and then by measuring.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "conv.hpp"

namespace rvgg {

enum class Tuning {
  none,  // the model alone
  fast,  // the few that the model puts first are measured
  full,  // all are measured
};

class Tuner {
 public:
  // compact: only what keeps no transformed weights.
  Tuner(const Isa& isa, Pool& pool, Tuning tuning, bool compact = false)
      : isa_(isa), pool_(pool), tuning_(tuning), compact_(compact), flops_(12e9 * isa.lanes) {}

  Algorithm choose(const Conv& conv, int images, int height, int width);

  // Decisions so far, as text by text, to be kept from one run to the next.
  std::map<std::string, std::string> decisions() const;
  // Takes earlier ones; what cannot be read or used is left out.
  void adopt(const std::map<std::string, std::string>& decisions);

  // Always this one, where it is applicable; else directly. Throws std::invalid_argument.
  void force(const std::string& text);
  // Whether the first layers of `network`, at its size, are faster band by band: as decided
  // earlier, or measured, or, where the model is trusted, as expected.
  bool prefers_bands(const std::string& network, bool expected, const std::function<bool()>& measure);
  // Operations a second of one thread, measured.
  double peak() {
    calibrate();
    return peak_;
  }
  // Expected seconds.
  double model(const Conv& conv, const Algorithm& algorithm, int images, int height, int width);

 private:
  std::vector<Algorithm> candidates(const Conv& conv, int images, int height, int width) const;
  double measure(const Conv& conv, const Algorithm& algorithm, int images, int height, int width);
  void calibrate();

  const Isa& isa_;
  Pool& pool_;
  Tuning tuning_;
  bool compact_;
  double peak_ = 0;  // measured operations of one thread in a second
  // What the model reckons with. Without tuning these are usual values and not measured, so that
  // the same network always gets the same plan, and gives the same logits to the last bit.
  double flops_, bandwidth_ = 20e9;  // bytes a second from memory, all threads together
  Buffer sweep_;          // larger than the caches
  std::map<std::string, Algorithm> chosen_;
  std::map<std::string, bool> bands_;
  std::optional<Algorithm> forced_;
};

}  // namespace rvgg
