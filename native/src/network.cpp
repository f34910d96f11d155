#include "network.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>

namespace rvgg {

namespace {

constexpr int kMaxNodes = 10000;
constexpr int kMaxChannels = 1 << 16;
constexpr int kMaxStride = 16;
constexpr int kMaxDilation = 1 << 10;
constexpr int kMaxSize = 1 << 15;
constexpr int kMaxBins = 64;
constexpr std::size_t kMaxName = 1000;

void need(bool condition, const std::string& message) {
  if (!condition) throw Error(message);
}

std::string range(const char* what, int value, int low, int high) {
  return std::string(what) + " from " + std::to_string(low) + " to " + std::to_string(high) +
         " needed, found " + std::to_string(value);
}
void within(const std::string& name, const char* what, int value, int low, int high) {
  need(value >= low && value <= high, name + ": " + range(what, value, low, high));
}

void check_conv(const std::string& name, const Conv& conv) {
  within(name, "in_channels", conv.in_channels, 1, kMaxChannels);
  within(name, "out_channels", conv.out_channels, 1, kMaxChannels);
  within(name, "groups", conv.groups, 1, kMaxChannels);
  within(name, "stride", conv.stride, 1, kMaxStride);
  within(name, "dilation", conv.dilation, 1, kMaxDilation);
  need(conv.kernel == 1 || conv.kernel == 3,
       name + ": a kernel of 1 or 3 needed, found " + std::to_string(conv.kernel));
  need(conv.in_channels % conv.groups == 0 && conv.out_channels % conv.groups == 0,
       name + ": the groups do not divide the channels");
  need(conv.weight && conv.bias, name + ": weights and bias needed");
}

std::size_t weight_count(const Conv& conv) {
  return static_cast<std::size_t>(conv.out_channels) *
         static_cast<std::size_t>(conv.in_channels / conv.groups) *
         static_cast<std::size_t>(conv.taps());
}

// Little-endian numbers, one after the other; the header is 32 bytes, the weights begin at
// multiples of 64.
constexpr char kMagic[8] = {'R', 'V', 'G', 'G', 'n', 'e', 't', '1'};
constexpr std::size_t kHeader = 32;  // magic, size of the file, checksum of the rest, weights' begin

class Writer {
 public:
  void number(std::uint32_t value) { raw(&value, sizeof value); }
  void real(float value) { raw(&value, sizeof value); }
  void text(const std::string& value) {
    number(static_cast<std::uint32_t>(value.size()));
    raw(value.data(), value.size());
  }
  void raw(const void* data, std::size_t size) {
    bytes.append(static_cast<const char*>(data), size);
  }
  void align() { bytes.resize((bytes.size() + 63) / 64 * 64); }
  std::string bytes;
};

class Reader {
 public:
  Reader(const std::string& path, const unsigned char* data, std::size_t size)
      : path_(path), data_(data), size_(size) {}
  std::uint32_t number() { return read<std::uint32_t>(); }
  int integer(const char* what, int low, int high) {
    const std::uint32_t value = number();
    need(value <= static_cast<std::uint32_t>(high) && value >= static_cast<std::uint32_t>(low),
         path_ + ": " + range(what, static_cast<int>(std::min<std::uint32_t>(value, INT32_MAX)),
                              low, high));
    return static_cast<int>(value);
  }
  float real() { return read<float>(); }
  std::string text() {
    const int size = integer("length of a name", 0, static_cast<int>(kMaxName));
    take(static_cast<std::size_t>(size));
    return {reinterpret_cast<const char*>(data_ + at_ - size), static_cast<std::size_t>(size)};
  }
  const float* floats(std::size_t count) {
    at_ = (at_ + 63) / 64 * 64;
    need(count <= size_ / sizeof(float), path_ + ": more weights stated than the file holds");
    const std::size_t begin = at_;
    take(count * sizeof(float));
    return reinterpret_cast<const float*>(data_ + begin);
  }
  std::size_t at() const { return at_; }
  void skip(std::size_t size) { take(size); }

 private:
  template <class Value>
  Value read() {
    Value value;
    take(sizeof value);
    std::memcpy(&value, data_ + at_ - sizeof value, sizeof value);
    return value;
  }
  void take(std::size_t size) {
    need(at_ <= size_ && size <= size_ - at_, path_ + ": ends in the middle of a record");
    at_ += size;
  }
  std::string path_;
  const unsigned char* data_;
  std::size_t size_, at_ = 0;
};

struct Mapping {
  void* data;
  std::size_t size;
  ~Mapping() { munmap(data, size); }
};

std::shared_ptr<Mapping> map_file(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  need(file >= 0, path + ": " + std::strerror(errno));
  struct stat status {};
  const bool regular = !fstat(file, &status) && S_ISREG(status.st_mode);
  const auto size = static_cast<std::size_t>(regular ? status.st_size : 0);
  void* data = size >= kHeader ? mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
  close(file);
  need(data != MAP_FAILED, path + ": no network file (" + std::to_string(size) + " bytes)");
  return std::make_shared<Mapping>(data, size);
}

Node read_node(Reader& reader, int index) {
  Node node;
  node.kind = static_cast<Kind>(reader.integer("kind of a node", 0, 4));
  node.name = reader.text();
  const int inputs = reader.integer("inputs of a node", 0, kMaxNodes);
  for (int i = 0; i < inputs; ++i) {
    node.inputs.push_back(reader.integer("input of a node", 0, std::max(index - 1, 0)));
  }
  node.bins = reader.integer("bins", 1, kMaxBins);
  node.align_corners = reader.integer("align_corners", 0, 1);
  if (node.kind == Kind::conv) {
    Conv& conv = node.conv;
    conv.in_channels = reader.integer("in_channels", 1, kMaxChannels);
    conv.out_channels = reader.integer("out_channels", 1, kMaxChannels);
    conv.groups = reader.integer("groups", 1, kMaxChannels);
    conv.stride = reader.integer("stride", 1, kMaxStride);
    conv.dilation = reader.integer("dilation", 1, kMaxDilation);
    conv.kernel = reader.integer("kernel", 1, 3);
    conv.relu = reader.integer("relu", 0, 1);
  }
  return node;
}

}  // namespace

// Four chains of multiplications, so that a gigabyte takes a fraction of a second.
std::uint64_t checksum(const unsigned char* data, std::size_t size) {
  constexpr std::uint64_t kPrime = 0x9E3779B185EBCA87u;
  std::uint64_t chain[4] = {1, 2, 3, 4};
  std::size_t at = 0;
  for (; at + 32 <= size; at += 32) {
    for (int i = 0; i < 4; ++i) {
      std::uint64_t word;
      std::memcpy(&word, data + at + 8 * i, 8);
      chain[i] = (chain[i] ^ word) * kPrime;
      chain[i] ^= chain[i] >> 29;
    }
  }
  std::uint64_t sum = size;
  for (std::uint64_t part : chain) sum = (sum ^ part) * kPrime, sum ^= sum >> 32;
  for (; at < size; ++at) sum = (sum ^ data[at]) * kPrime, sum ^= sum >> 29;
  return sum;
}

void Network::check() const {
  need(!nodes.empty() && nodes.size() <= kMaxNodes && nodes[0].kind == Kind::input,
       "network: 1 to " + std::to_string(kMaxNodes) + " nodes needed, the first of them the input");
  within("network", "in_channels", in_channels, 1, kMaxChannels);
  const auto channels = static_cast<std::size_t>(in_channels);
  need(mean.size() == channels && deviation.size() == channels,
       "network: mean and deviation of each input channel needed");
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    const Node& node = nodes[i];
    const std::string name = node.name.empty() ? "node " + std::to_string(i) : node.name;
    need(node.name.size() <= kMaxName, "node " + std::to_string(i) + ": its name is too long");
    need((node.kind == Kind::input) == (i == 0), name + ": one input needed");
    for (int input : node.inputs) {
      need(input >= 0 && static_cast<std::size_t>(input) < i, name + ": takes a later result");
    }
    const std::size_t inputs = node.inputs.size();
    const bool fits = node.kind == Kind::input      ? inputs == 0
                      : node.kind == Kind::upsample ? inputs == 2
                      : node.kind == Kind::concat   ? inputs >= 1
                                                    : inputs == 1;
    need(fits, name + ": has " + std::to_string(inputs) + " inputs");
    if (node.kind == Kind::conv) check_conv(name, node.conv);
    within(name, "bins", node.bins, 1, kMaxBins);
  }
  shapes(1, 1);  // the channels fit
}

std::vector<Shape> Network::shapes(int height, int width) const {
  within("images", "height", height, 1, kMaxSize);
  within("images", "width", width, 1, kMaxSize);
  std::vector<Shape> result;
  for (const Node& node : nodes) {
    const auto of = [&](std::size_t i) { return result[static_cast<std::size_t>(node.inputs[i])]; };
    Shape shape{height, width, in_channels};
    switch (node.kind) {
      case Kind::input: break;
      case Kind::conv:
        need(of(0).channels == node.conv.in_channels,
             node.name + ": takes " + std::to_string(node.conv.in_channels) +
                 " channels, is given " + std::to_string(of(0).channels));
        shape = {node.conv.out_size(of(0).height), node.conv.out_size(of(0).width),
                 node.conv.out_channels};
        break;
      case Kind::pool: shape = {node.bins, node.bins, of(0).channels}; break;
      case Kind::upsample: shape = {of(1).height, of(1).width, of(0).channels}; break;
      case Kind::concat:
        shape = {of(0).height, of(0).width, 0};
        for (std::size_t i = 0; i < node.inputs.size(); ++i) {
          need(of(i).height == shape.height && of(i).width == shape.width,
               node.name + ": maps of different sizes");
          shape.channels += of(i).channels;
        }
        within(node.name, "channels", shape.channels, 1, kMaxChannels);
        break;
    }
    result.push_back(shape);
  }
  return result;
}

void Network::save(const std::string& path) const {
  check();
  Writer writer;
  writer.bytes.resize(kHeader);
  writer.number(static_cast<std::uint32_t>(in_channels));
  for (float value : mean) writer.real(value);
  for (float value : deviation) writer.real(value);
  writer.number(static_cast<std::uint32_t>(class_names.size()));
  for (const std::string& name : class_names) writer.text(name.substr(0, kMaxName));
  writer.number(static_cast<std::uint32_t>(nodes.size()));
  for (const Node& node : nodes) {
    writer.number(static_cast<std::uint32_t>(node.kind));
    writer.text(node.name);
    writer.number(static_cast<std::uint32_t>(node.inputs.size()));
    for (int input : node.inputs) writer.number(static_cast<std::uint32_t>(input));
    writer.number(static_cast<std::uint32_t>(node.bins));
    writer.number(node.align_corners);
    if (node.kind != Kind::conv) continue;
    const Conv& conv = node.conv;
    for (int value : {conv.in_channels, conv.out_channels, conv.groups, conv.stride, conv.dilation,
                      conv.kernel, static_cast<int>(conv.relu)}) {
      writer.number(static_cast<std::uint32_t>(value));
    }
  }
  for (const Node& node : nodes) {
    if (node.kind != Kind::conv) continue;
    writer.align();
    writer.raw(node.conv.weight, weight_count(node.conv) * sizeof(float));
    writer.align();
    writer.raw(node.conv.bias, static_cast<std::size_t>(node.conv.out_channels) * sizeof(float));
  }
  const std::uint64_t size = writer.bytes.size();
  const std::uint64_t sum =
      checksum(reinterpret_cast<const unsigned char*>(writer.bytes.data()) + kHeader,
               writer.bytes.size() - kHeader);
  std::memcpy(writer.bytes.data(), kMagic, 8);
  std::memcpy(writer.bytes.data() + 8, &size, 8);
  std::memcpy(writer.bytes.data() + 16, &sum, 8);

  const std::string aside = path + ".part" + std::to_string(getpid());
  std::FILE* file = std::fopen(aside.c_str(), "wb");
  need(file, aside + ": " + std::strerror(errno));
  const bool written = std::fwrite(writer.bytes.data(), 1, writer.bytes.size(), file) == size;
  const bool closed = !std::fclose(file);
  if (!written || !closed || std::rename(aside.c_str(), path.c_str())) {
    const std::string reason = std::strerror(errno);
    std::remove(aside.c_str());
    throw Error(path + ": " + reason);
  }
}

Network Network::load(const std::string& path) {
  const std::shared_ptr<Mapping> mapping = map_file(path);
  const auto* data = static_cast<const unsigned char*>(mapping->data);
  std::uint64_t size, sum;
  std::memcpy(&size, data + 8, 8);
  std::memcpy(&sum, data + 16, 8);
  need(!std::memcmp(data, kMagic, 8), path + ": no network of this engine, or of another version");
  need(size == mapping->size, path + ": " + std::to_string(size) + " bytes needed, found " +
                                  std::to_string(mapping->size) + "; the file was cut or extended");
  need(sum == checksum(data + kHeader, mapping->size - kHeader),
       path + ": its checksum differs; the file was altered or damaged");
  Reader reader(path, data, mapping->size);
  reader.skip(kHeader);
  Network network;
  network.in_channels = reader.integer("in_channels", 1, kMaxChannels);
  for (int i = 0; i < network.in_channels; ++i) network.mean.push_back(reader.real());
  for (int i = 0; i < network.in_channels; ++i) network.deviation.push_back(reader.real());
  const int names = reader.integer("class names", 0, 10'000'000);
  for (int i = 0; i < names; ++i) network.class_names.push_back(reader.text());
  const int nodes = reader.integer("nodes", 1, kMaxNodes);
  for (int i = 0; i < nodes; ++i) network.nodes.push_back(read_node(reader, i));
  for (Node& node : network.nodes) {
    if (node.kind != Kind::conv) continue;
    need(node.conv.in_channels % node.conv.groups == 0 && node.conv.kernel != 2,
         path + ": " + node.name + " is no convolution of this engine");
    node.conv.weight = reader.floats(weight_count(node.conv));
    node.conv.bias = reader.floats(static_cast<std::size_t>(node.conv.out_channels));
  }
  network.storage.push_back(mapping);
  network.check();
  return network;
}

}  // namespace rvgg
