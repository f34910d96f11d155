// The Python module. It takes and gives numpy arrays; the GIL is released while an engine works.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "engine.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Images = nb::ndarray<nb::device::cpu, nb::ro, nb::ndim<4>>;

// A network that is put together node by node.
class Builder {
 public:
  Builder(std::vector<float> mean, std::vector<float> deviation) {
    network_.in_channels = static_cast<int>(mean.size());
    network_.mean = std::move(mean);
    network_.deviation = std::move(deviation);
    network_.nodes.push_back({rvgg::Kind::input, "input", {}, {}, 1, false});
  }

  int conv(const std::string& name, int input, const Floats& weight, const Floats& bias, int groups,
           int stride, int dilation, bool relu) {
    if (weight.ndim() != 4 || bias.ndim() != 1 || bias.shape(0) != weight.shape(0) ||
        weight.shape(2) != weight.shape(3)) {
      throw rvgg::Error(name + ": weight (out, in / groups, k, k) and bias (out,) needed");
    }
    rvgg::Node node{rvgg::Kind::conv, name, {input}, {}, 1, false};
    node.conv = {static_cast<int>(weight.shape(1)) * groups,
                 static_cast<int>(weight.shape(0)),
                 groups,
                 stride,
                 dilation,
                 static_cast<int>(weight.shape(2)),
                 relu,
                 false,
                 keep(weight),
                 keep(bias)};
    return add(std::move(node));
  }
  int other(int kind, const std::string& name, std::vector<int> inputs, int bins, bool corners) {
    return add({static_cast<rvgg::Kind>(kind), name, std::move(inputs), {}, bins, corners});
  }
  void class_names(std::vector<std::string> names) { network_.class_names = std::move(names); }

  rvgg::Network take() {
    network_.check();
    return network_;
  }

 private:
  int add(rvgg::Node node) {
    network_.nodes.push_back(std::move(node));
    return static_cast<int>(network_.nodes.size()) - 1;
  }
  const float* keep(const Floats& array) {
    auto copy = std::make_shared<std::vector<float>>(array.data(), array.data() + array.size());
    network_.storage.push_back(copy);
    return copy->data();
  }
  rvgg::Network network_;
};

rvgg::Options options(int threads, bool pin, const std::string& tune, const std::string& isa,
                      const std::string& weights, bool compact, const std::string& algorithm,
                      int band_rows) {
  rvgg::Options result;
  result.compact = compact;
  result.band_rows = band_rows;
  if (weights != "fp32" && weights != "fp16") {
    throw rvgg::Error("weights: 'fp32' or 'fp16' needed, found '" + weights + "'");
  }
  result.half = weights == "fp16";
  result.algorithm = algorithm;
  result.threads = threads;
  result.pin = pin;
  result.isa = isa;
  if (tune == "none") {
    result.tuning = rvgg::Tuning::none;
  } else if (tune == "full") {
    result.tuning = rvgg::Tuning::full;
  } else if (tune != "fast") {
    throw rvgg::Error("tune: 'fast', 'full' or None needed, found '" + tune + "'");
  }
  return result;
}

// images: uint8 (N, H, W, C) or fp32 (N, C, H, W), in any order of memory.
nb::ndarray<nb::numpy, float> run(rvgg::Engine& engine, const Images& images) {
  const bool bytes = images.dtype() == nb::dtype<std::uint8_t>();
  if (!bytes && images.dtype() != nb::dtype<float>()) {
    throw rvgg::Error("images: fp32 (N, C, H, W) or uint8 (N, H, W, C) needed");
  }
  const std::size_t channels = images.shape(bytes ? 3 : 1);
  const std::size_t height = images.shape(bytes ? 1 : 2), width = images.shape(bytes ? 2 : 3);
  if (channels != static_cast<std::size_t>(engine.network().in_channels)) {
    throw rvgg::Error("images: " + std::to_string(engine.network().in_channels) +
                      " channels needed, found " + std::to_string(channels));
  }
  if (height > INT32_MAX || width > INT32_MAX || images.shape(0) > INT32_MAX) {
    throw rvgg::Error("images: too large");
  }
  const std::size_t count = images.shape(0);
  const rvgg::Shape out = engine.output_shape(static_cast<int>(height), static_cast<int>(width));
  const auto size = [](int value) { return static_cast<std::size_t>(value); };
  const std::size_t per_image = size(out.channels) * size(out.height) * size(out.width);
  auto result = std::make_unique<float[]>(std::max<std::size_t>(count * per_image, 1));
  {
    const nb::gil_scoped_release release;
    engine.run({images.data(), bytes ? rvgg::Format::bytes : rvgg::Format::floats,
                static_cast<int>(count), static_cast<int>(height), static_cast<int>(width),
                images.stride(0), images.stride(bytes ? 3 : 1), images.stride(bytes ? 1 : 2),
                images.stride(bytes ? 2 : 3)},
               result.get());
  }
  float* data = result.release();
  const nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  if (out.height == 1 && out.width == 1) {
    return nb::ndarray<nb::numpy, float>(data, {count, size(out.channels)}, owner);
  }
  return nb::ndarray<nb::numpy, float>(
      data, {count, size(out.channels), size(out.height), size(out.width)}, owner);
}

nb::list profile(rvgg::Engine& engine, int count, int height, int width, int repeats) {
  std::vector<rvgg::Step> steps;
  {
    const nb::gil_scoped_release release;
    steps = engine.profile(count, height, width, repeats);
  }
  nb::list rows;
  for (const rvgg::Step& step : steps) {
    nb::dict row;
    row["layer"] = step.name;
    row["algorithm"] = step.algorithm;
    row["shape"] = nb::make_tuple(step.shape.channels, step.shape.height, step.shape.width);
    row["milliseconds"] = step.milliseconds;
    row["multiply_adds"] = step.multiply_adds;
    row["multiplications"] = step.multiplications;
    row["weight_bytes"] = step.weight_bytes;
    rows.append(row);
  }
  return rows;
}

}  // namespace

NB_MODULE(_native, m) {
  nb::exception<rvgg::Error>(m, "NativeError", PyExc_ValueError);
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const rvgg::Isa* const* isa = rvgg::isas(); *isa; ++isa) {
      if ((*isa)->supported()) names.emplace_back((*isa)->name);
    }
    return names;
  });

  nb::class_<Builder>(m, "Builder")
      .def(nb::init<std::vector<float>, std::vector<float>>(), "mean"_a, "deviation"_a)
      .def("conv", &Builder::conv, "name"_a, "input"_a, "weight"_a, "bias"_a, "groups"_a,
           "stride"_a, "dilation"_a, "relu"_a)
      .def("other", &Builder::other, "kind"_a, "name"_a, "inputs"_a, "bins"_a = 1,
           "align_corners"_a = false)
      .def("class_names", &Builder::class_names);

  nb::class_<rvgg::Engine>(m, "Engine")
      .def("__init__",
           [](rvgg::Engine* self, Builder& builder, int threads, bool pin, const std::string& tune,
              const std::string& isa, const std::string& weights, bool compact,
              const std::string& algorithm, int band_rows) {
             new (self) rvgg::Engine(
                 builder.take(), options(threads, pin, tune, isa, weights, compact, algorithm, band_rows));
           },
           "builder"_a, "threads"_a, "pin"_a, "tune"_a, "isa"_a, "weights"_a, "compact"_a = false, "algorithm"_a = "",
           "band_rows"_a = -1)
      .def_static(
          "load",
          [](const std::string& path, int threads, bool pin, const std::string& tune,
             const std::string& isa, const std::string& weights, bool compact) {
            return std::make_unique<rvgg::Engine>(rvgg::Network::load(path),
                                                  options(threads, pin, tune, isa, weights, compact, "", -1));
          },
          "path"_a, "threads"_a, "pin"_a, "tune"_a, "isa"_a, "weights"_a, "compact"_a = false)
      .def("save", [](const rvgg::Engine& engine,
                      const std::string& path) { engine.network().save(path); })
      .def("__call__", &run, "images"_a)
      .def("profile", &profile, "count"_a, "height"_a, "width"_a, "repeats"_a)
      .def("decisions", [](rvgg::Engine& engine) { return engine.tuner().decisions(); })
      .def("adopt", [](rvgg::Engine& engine, const std::map<std::string, std::string>& known) {
        engine.tuner().adopt(known);
      })
      .def("memory",
           [](rvgg::Engine& engine) {
             const rvgg::Engine::Memory memory = engine.memory();
             return std::make_tuple(memory.weights, memory.activations, memory.scratch);
           })
      .def_prop_ro("isa", [](const rvgg::Engine& engine) { return engine.isa().name; })
      .def_prop_ro("peak_flops", [](rvgg::Engine& engine) { return engine.tuner().peak(); })
      .def_prop_ro("threads", &rvgg::Engine::threads)
      .def_prop_ro("in_channels", [](const rvgg::Engine& engine) { return engine.network().in_channels; })
      .def_prop_ro("class_names", [](const rvgg::Engine& engine) { return engine.network().class_names; });
}
