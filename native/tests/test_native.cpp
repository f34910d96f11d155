// The engine without Python: small enough to run under sanitizers and emulators.
//
//   test_native [rounds] [seed]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>

#include "engine.hpp"
#include "naive.hpp"
#include "rvgg.h"

using namespace rvgg;

namespace {

int failures = 0;
void expect(bool condition, const char* what, const std::string& detail) {
  if (condition) return;
  ++failures;
  std::printf("FAILED %s: %s\n", what, detail.c_str());
}

std::mt19937 random_bits;
int pick(int low, int high) {
  return low + static_cast<int>(random_bits() % static_cast<unsigned>(high - low + 1));
}
std::vector<float> normal(std::size_t count) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(count);
  for (float& value : values) value = distribution(random_bits);
  return values;
}

// The network keeps what its convolutions point to.
int add_conv(Network& network, int input, Conv conv) {
  const auto size = static_cast<std::size_t>(conv.out_channels * (conv.in_channels / conv.groups) * conv.taps());
  auto weight = std::make_shared<std::vector<float>>(normal(size));
  auto bias = std::make_shared<std::vector<float>>(normal(static_cast<std::size_t>(conv.out_channels)));
  conv.weight = weight->data();
  conv.bias = bias->data();
  network.storage.push_back(weight);
  network.storage.push_back(bias);
  network.nodes.push_back({Kind::conv, "conv" + std::to_string(network.nodes.size()), {input}, conv, 1, false});
  return static_cast<int>(network.nodes.size()) - 1;
}
Network start(int channels) {
  Network network;
  network.in_channels = channels;
  network.mean.assign(static_cast<std::size_t>(channels), 0.5f);
  network.deviation.assign(static_cast<std::size_t>(channels), 0.25f);
  network.nodes.push_back({Kind::input, "input", {}, {}, 1, false});
  return network;
}

void test_one_convolution(const char* isa) {
  Conv conv;
  conv.groups = pick(0, 2) ? 1 : 1 << pick(0, 2);
  conv.in_channels = conv.groups * pick(1, 40);
  conv.out_channels = conv.groups * pick(1, 40);
  conv.stride = pick(1, 3);
  conv.dilation = conv.stride == 1 ? pick(1, 3) : 1;
  conv.kernel = pick(0, 4) ? 3 : 1;
  conv.relu = pick(0, 1);
  const int images = pick(1, 3), height = pick(1, 30), width = pick(1, 30);
  Network network = start(conv.in_channels);
  add_conv(network, 0, conv);
  Options options;
  options.threads = pick(1, 4);
  options.tuning = Tuning::none;
  options.isa = isa;
  const int rows = pick(0, 3) ? pick(2, 7) : 0;
  const int columns = rows ? pick(2, 7) : 0;
  options.algorithm = std::to_string(rows) + " " + std::to_string(columns) + " " +
                      std::to_string(pick(1, 3)) + " " + std::to_string(pick(1, 50)) + " " +
                      std::to_string(pick(0, 4));
  const Conv whole = network.nodes[1].conv;
  const auto x = normal(static_cast<std::size_t>(images * conv.in_channels * height * width));
  const std::vector<double> truth = naive(whole, x.data(), images, height, width);
  Engine engine(std::move(network), options);
  std::vector<float> found(truth.size());
  engine.run(Images::contiguous(x.data(), Format::floats, images, height, width, whole.in_channels), found.data());
  double error = 0, largest = std::sqrt(conv.taps() * conv.in_channels / conv.groups);
  for (std::size_t i = 0; i < truth.size(); ++i) {
    error = std::max(error, std::abs(found[i] - truth[i]));
    largest = std::max(largest, std::abs(truth[i]));
  }
  expect(error <= (std::max(rows, columns) == 7 ? 3e-5 : 1e-5) * largest, "convolution",
         std::string(isa) + " algorithm " + options.algorithm + " error " + std::to_string(error / largest));
}

// The first layers band by band give what whole maps give, to the last bit.
void test_bands(const char* isa) {
  Network network = start(pick(1, 9));
  Conv first, second;
  first.in_channels = network.in_channels;
  first.out_channels = second.in_channels = 4 * pick(1, 10);
  second.out_channels = 4 * pick(1, 10);
  second.groups = 1 << pick(0, 2);
  first.stride = pick(1, 3);
  second.stride = pick(1, 2);
  second.kernel = pick(0, 4) ? 3 : 1;
  add_conv(network, add_conv(network, 0, first), second);
  const int images = pick(1, 3), height = pick(1, 60), width = pick(1, 60);
  const auto x = normal(static_cast<std::size_t>(images * network.in_channels * height * width));
  Options options;
  options.threads = pick(1, 4);
  options.tuning = Tuning::none;
  options.isa = isa;
  const int rows = pick(0, 2) ? pick(2, 7) : 0;
  options.algorithm = std::to_string(rows) + " " + std::to_string(rows ? pick(2, 7) : 0) + " 2 " +
                      std::to_string(pick(1, 30)) + " 0";
  std::vector<float> found[2];
  for (int banded : {0, 1}) {
    options.band_rows = banded * pick(1, 20);
    Engine engine(network, options);
    const Shape out = engine.output_shape(height, width);
    found[banded].resize(static_cast<std::size_t>(images * out.channels * out.height * out.width));
    const Images batch = Images::contiguous(x.data(), Format::floats, images, height, width, network.in_channels);
    for (int again = 0; again < 2; ++again) engine.run(batch, found[banded].data());
  }
  double error = 0, largest = 0;
  for (std::size_t i = 0; i < found[0].size(); ++i) {
    error = std::max(error, static_cast<double>(std::abs(found[0][i] - found[1][i])));
    largest = std::max(largest, static_cast<double>(std::abs(found[0][i])));
  }
  // Of whole maps the first layer may be computed by tiles, if its input fills vectors.
  const double bound = network.in_channels % 4 ? 0 : 1e-4;
  expect(error <= bound * largest, "bands", options.algorithm + " error " + std::to_string(error));
}

void test_pool() {
  for (int threads : {1, 3}) {
    Pool pool(threads);
    bool thrown = false;
    try {
      pool.each(20, [](int, std::int64_t item) {
        if (item == 7) throw Error("seven");
      });
    } catch (const Error&) {
      thrown = true;
    }
    std::atomic<int> sum{0};
    pool.each(5, [&](int, std::int64_t item) { sum += static_cast<int>(item); });
    expect(thrown && sum == 10, "pool", "an error in one of " + std::to_string(threads) + " threads");
  }
}

// Every kind of node; the same network on one thread and on several, loaded from a file too.
Network make_network() {
  Network network = start(3);
  Conv stem;
  stem.in_channels = 3;
  stem.out_channels = 24;
  stem.stride = 2;
  const int a = add_conv(network, 0, stem);
  Conv body;
  body.in_channels = body.out_channels = 24;
  const int b = add_conv(network, a, body);
  network.nodes.push_back({Kind::pool, "bins", {b}, {}, 2, false});
  const int bins = static_cast<int>(network.nodes.size()) - 1;
  network.nodes.push_back({Kind::upsample, "up", {bins, b}, {}, 1, true});
  network.nodes.push_back({Kind::concat, "cat", {b, bins + 1}, {}, 1, false});
  Conv out;
  out.in_channels = 48;
  out.out_channels = 5;
  out.kernel = 1;
  out.relu = false;
  add_conv(network, bins + 2, out);
  network.class_names = {"one", "two"};
  return network;
}

void test_network(const std::string& folder) {
  const Network network = make_network();
  Options options;
  options.threads = 1;
  Engine one(network, options);
  const std::string path = folder + "/test_native.rvgg";
  one.network().save(path);
  options.threads = 3;
  options.tuning = Tuning::none;
  Engine several(Network::load(path), options);
  for (int n : {1, 4, 40}) {
    const int height = pick(8, 40), width = pick(8, 40);
    const Shape out = one.output_shape(height, width);
    std::vector<unsigned char> images(static_cast<std::size_t>(n * height * width * 3));
    for (auto& byte : images) byte = static_cast<unsigned char>(pick(0, 255));
    std::vector<float> first(static_cast<std::size_t>(n * out.channels * out.height * out.width)), second(first);
    const Images batch = Images::contiguous(images.data(), Format::bytes, n, height, width, 3);
    one.run(batch, first.data());
    several.run(batch, second.data());
    double error = 0, largest = 0;
    for (std::size_t i = 0; i < first.size(); ++i) {
      error = std::max(error, static_cast<double>(std::abs(first[i] - second[i])));
      largest = std::max(largest, static_cast<double>(std::abs(first[i])));
    }
    expect(error <= 2e-5 * largest, "threads", std::to_string(error / largest));
  }
  std::vector<std::thread> callers;
  for (int t = 0; t < 3; ++t) {
    callers.emplace_back([&several] {
      std::vector<float> images(3u * 20 * 20), result(5u * 10 * 10);
      for (int i = 0; i < 5; ++i) {
        several.run(Images::contiguous(images.data(), Format::floats, 1, 20, 20, 3), result.data());
      }
    });
  }
  for (std::thread& caller : callers) caller.join();

  char error[200] = "";
  rvgg_engine* engine = rvgg_load(path.c_str(), 2, error, sizeof error);
  expect(engine != nullptr, "C interface", error);
  int shape[3];
  expect(!rvgg_output_shape(engine, 32, 32, shape) && shape[0] == 5, "C interface", "shape");
  expect(rvgg_output_shape(engine, 0, 32, shape) == -1, "C interface", "a height of 0");
  expect(!std::strcmp(rvgg_class_name(engine, 1), "two") && !rvgg_class_name(engine, 2),
         "C interface", "class names");
  rvgg_free(engine);
  expect(!rvgg_load("nowhere.rvgg", 1, error, sizeof error) && std::strstr(error, "nowhere.rvgg"),
         "C interface", error);
}

// Numbers changed at random and the checksum made right again: what a hostile file would be. It
// may load, but then it must run or say why not.
void test_hostile_files(const std::string& folder, int rounds) {
  const std::string path = folder + "/test_native.rvgg", bad = folder + "/hostile.rvgg";
  std::ifstream in(path, std::ios::binary);
  const std::vector<char> good((std::istreambuf_iterator<char>(in)), {});
  for (int round = 0; round < rounds; ++round) {
    std::vector<char> bytes = good;
    const int changes = pick(1, 4);
    for (int i = 0; i < changes; ++i) {
      bytes[static_cast<std::size_t>(pick(32, 500))] = static_cast<char>(pick(0, 3) ? pick(0, 8) : pick(-128, 127));
    }
    const std::uint64_t sum = checksum(reinterpret_cast<unsigned char*>(bytes.data()) + 32, bytes.size() - 32);
    std::memcpy(bytes.data() + 16, &sum, 8);
    std::ofstream(bad, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    try {
      Options options;
      options.threads = 1;
      options.tuning = Tuning::none;
      Engine engine(Network::load(bad), options);
      const Shape out = engine.output_shape(9, 9);
      if (engine.network().in_channels > 16 || out.channels * out.height * out.width > 100000) continue;
      std::vector<float> images(static_cast<std::size_t>(engine.network().in_channels) * 81);
      std::vector<float> result(static_cast<std::size_t>(out.channels * out.height * out.width));
      engine.run(Images::contiguous(images.data(), Format::floats, 1, 9, 9, engine.network().in_channels), result.data());
    } catch (const Error&) {
    }
  }
  std::remove(bad.c_str());
  std::remove(path.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 200;
  random_bits.seed(argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 0u);
  const char* folder = std::getenv("TMPDIR");
  for (const Isa* const* isa = isas(); *isa; ++isa) {
    if (!(*isa)->supported()) continue;
    for (int i = 0; i < rounds; ++i) test_one_convolution((*isa)->name);
    for (int i = 0; i < rounds; ++i) test_bands((*isa)->name);
  }
  test_pool();
  test_network(folder ? folder : "/tmp");
  test_hostile_files(folder ? folder : "/tmp", rounds * 5);
  std::printf("%s: %d failures\n", failures ? "FAILED" : "passed", failures);
  return failures != 0;
}
