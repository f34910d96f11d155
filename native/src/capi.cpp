#include <cstdio>
#include <exception>

#include "engine.hpp"
#include "rvgg.h"

struct rvgg_engine {
  rvgg::Engine engine;
};

namespace {

// No exception leaves the library.
template <class Work>
bool guarded(char* error, std::size_t size, const Work& work) {
  const char* reason = "unknown";
  try {
    work();
    return true;
  } catch (const std::exception& e) {
    if (error && size) std::snprintf(error, size, "%s", e.what());
    return false;
  } catch (...) {
    if (error && size) std::snprintf(error, size, "%s", reason);
    return false;
  }
}

}  // namespace

rvgg_engine* rvgg_load(const char* path, int threads, char* error, size_t error_size) {
  rvgg_engine* result = nullptr;
  guarded(error, error_size, [&] {
    rvgg::Options options;
    options.threads = threads;
    result = new rvgg_engine{{rvgg::Network::load(path ? path : ""), options}};
  });
  return result;
}

int rvgg_output_shape(const rvgg_engine* engine, int height, int width, int shape[3]) {
  return guarded(nullptr, 0, [&] {
           const rvgg::Shape out = engine->engine.output_shape(height, width);
           shape[0] = out.channels;
           shape[1] = out.height;
           shape[2] = out.width;
         })
             ? 0
             : -1;
}

int rvgg_run(rvgg_engine* engine, const void* images, rvgg_format format, int count, int height,
             int width, float* result, char* error, size_t error_size) {
  const rvgg::Format layout = format == RVGG_BYTES ? rvgg::Format::bytes : rvgg::Format::floats;
  const int channels = engine->engine.network().in_channels;
  const rvgg::Images batch =
      rvgg::Images::contiguous(images, layout, count, height, width, channels);
  return guarded(error, error_size, [&] { engine->engine.run(batch, result); }) ? 0 : -1;
}

int rvgg_in_channels(const rvgg_engine* engine) { return engine->engine.network().in_channels; }

const char* rvgg_class_name(const rvgg_engine* engine, int index) {
  const auto& names = engine->engine.network().class_names;
  const bool known = index >= 0 && static_cast<std::size_t>(index) < names.size();
  return known ? names[static_cast<std::size_t>(index)].c_str() : nullptr;
}

void rvgg_free(rvgg_engine* engine) { delete engine; }
