// Random shapes through the integer linear layer and the encoder, for AddressSanitizer and UndefinedBehaviorSanitizer; see
// `make sanitize`. Every buffer has exactly its size. The integers are compared with a plain product, which must agree bit for bit.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <list>
#include <random>
#include <vector>

#include "kmq.h"

using namespace kmq;

namespace {

std::mt19937_64 random_bits;
int64_t upto(int64_t n) { return int64_t(random_bits() % uint64_t(n + 1)); }
float normal() { return std::normal_distribution<float>()(random_bits); }

const Parallel parallel = [](int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  if (n > 1) body(0, n / 2), body(n / 2, n);
  else if (n) body(0, n);
};

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "int8: %s\n", what);
  std::abort();
}

std::vector<float> normals(int64_t n) {
  std::vector<float> values(n);
  for (float& x : values) x = normal();
  return values;
}

// A random weight, and all that its pointers point to.
struct Weight {
  std::vector<uint8_t> assignments, bytes;
  std::vector<float> codebook, scale, factor, bias, row_scale, delta;
  std::vector<int8_t> table;
  std::vector<int32_t> row_sum, index;
  cpu::LinearWeight weight;

  Weight(int64_t rows, int64_t cols, int bits, bool integers) {
    const int64_t group_rows = 1 + upto(rows - 1), books = (rows + group_rows - 1) / group_rows, K = int64_t(1) << bits;
    assignments.resize(rows * cols);
    for (uint8_t& a : assignments) a = uint8_t(random_bits() % uint64_t(K));
    bytes.resize(rows * Packed{nullptr, rows, cols, bits}.row_bytes());
    cpu::pack(assignments.data(), rows, cols, bits, bytes.data(), parallel);
    codebook = normals(books * K);
    bias = normals(rows);
    const Packed packed{bytes.data(), rows, cols, bits};
    for (int64_t i = upto(30) - 10; i < rows * cols; i += 1 + upto(rows * cols / 3))
      if (i >= 0) index.push_back(int32_t(i)), delta.push_back(normal());
    weight = {packed, group_rows, codebook.data(), nullptr, nullptr, nullptr, nullptr, upto(1) ? bias.data() : nullptr,
              index.data(), delta.data(), int64_t(index.size())};
    if (!integers) {
      if (upto(1)) row_scale = normals(rows), weight.row_scale = row_scale.data();
      return;
    }
    table.resize(books * K), scale.resize(books), row_sum.resize(rows), factor.resize(rows);
    cpu::int8_codebook(packed, codebook.data(), group_rows, table.data(), scale.data(), row_sum.data(), parallel);
    for (int64_t r = 0; r < rows; ++r) {
      int64_t sum = 0;
      for (int64_t c = 0; c < cols; ++c) sum += entry(r, c);
      check(row_sum[r] == sum, "row_sum");
      factor[r] = scale[r / group_rows];
    }
    for (const int8_t t : table) check(std::abs(t) <= cpu::kInt8Limit, "table beyond its limit");
    weight.table = table.data(), weight.factor = factor.data(), weight.row_sum = row_sum.data();
  }

  int entry(int64_t r, int64_t c) const {
    return table[(r / weight.group_rows << weight.packed.bits) + assignments[r * weight.packed.cols + c]];
  }
};

// Integers of a row, and their step, by the rule of linear/int8.h.
float rounded(const float* x, int64_t cols, int64_t* q) {
  float high = 0, low = 0;
  for (int64_t c = 0; c < cols; ++c) high = std::fmax(high, x[c]), low = std::fmin(low, x[c]);
  const float step = high / 255.0f - low / 255.0f, inverse = 1.0f / step;
  if (!(step >= 1e-36f)) {
    std::fill(q, q + cols, 0);
    return 0;
  }
  float power = 1;
  for (int halvings = 1; halvings <= 4; ++halvings) {
    const float finer = inverse * power * 2;
    const int64_t first = std::max<int64_t>(std::lrint(low * finer), -128);
    std::vector<int64_t> cost((cols + 127) / 128 * 32 * 2);
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t at = (c / 128 * 32 + c / 16 % 2 * 16 + c % 16) * 2, value = std::lrint(x[c] * finer);
      cost[at] = std::max(cost[at], (std::max<int64_t>(0, value - first - 255) + 255) / 256);
      cost[at + 1] = std::max(cost[at + 1], (std::max<int64_t>(0, first - value) + 255) / 256);
    }
    int64_t total = 0;
    for (const int64_t n : cost) total += n;
    if (total > std::max<int64_t>(2, (cols + 127) / 128)) break;
    power *= 2;
  }
  const int64_t first = std::lrint(low * inverse);
  for (int64_t c = 0; c < cols; ++c) {
    q[c] = std::lrint(x[c] * (inverse * power));
    if (power == 1) q[c] = std::min(std::max(q[c], first), first + 255);
  }
  return step / power;
}

void fuzz_linear() {
  const int bits = 1 + int(upto(7));
  const int64_t rows = 1 + upto(70), cols = 1 + upto(upto(4) ? 300 : 1500), M = 1 + upto(upto(9) ? 11 : 600);
  const Weight made(rows, cols, bits, true);
  std::vector<float> input = normals(M * cols), output(M * rows, std::nanf(""));
  for (int64_t m = 0; m < M; ++m) {
    const int64_t kind = upto(16);
    for (int64_t n = kind < 13 ? 0 : upto(4); n > 0; --n) input[m * cols + upto(cols - 1)] *= 30 * std::fabs(normal());
    for (int64_t c = 0; c < cols && kind < 3; ++c) input[m * cols + c] *= kind == 0 ? 0.0f : kind == 1 ? 1e-40f : 1e30f;
    if (kind == 3) input[m * cols + upto(cols - 1)] = upto(1) ? HUGE_VALF : std::nanf("");
  }
  cpu::int8_linear(input.data(), Dtype::f32, M, made.weight, cpu::Activation::none, output.data(), parallel);
  std::vector<int64_t> q(cols);
  for (int64_t m = 0; m < M; ++m) {
    const float* const x = input.data() + m * cols;
    bool finite = true;
    for (int64_t c = 0; c < cols; ++c) finite = finite && std::isfinite(x[c]);
    const float step = finite ? rounded(x, cols, q.data()) : 0;
    for (int64_t r = 0; r < rows; ++r) {
      int64_t sum = 0;
      float added = 0;
      for (int64_t c = 0; c < cols && finite; ++c) sum += q[c] * made.entry(r, c);
      for (size_t i = 0; i < made.index.size(); ++i)
        if (made.index[i] / cols == r) added += x[made.index[i] % cols] * made.delta[i];
      const float expected = float(sum) * step * made.factor[r] + added + (made.weight.bias ? made.bias[r] : 0.0f);
      const float got = output[m * rows + r];
      check(finite ? got == expected : std::isnan(got), "integer product");
    }
  }
  std::vector<uint16_t> half(M * cols, 0x3c00), narrow(M * rows);
  for (const Dtype dtype : {Dtype::bf16, Dtype::f16})
    cpu::int8_linear(half.data(), dtype, M, made.weight, cpu::Activation(upto(4)), narrow.data(), parallel);
}

void fuzz_encoder() {
  const int64_t heads = 1 + upto(3), dim = 2 * (1 + upto(upto(5) ? 20 : 150)), hidden = heads * dim, middle = 1 + upto(90);
  const int64_t batch = 1 + upto(5), length = 1 + upto(upto(5) ? 20 : 300), vocabulary = 1 + upto(40);
  std::list<Weight> weights;
  std::list<std::vector<float>> floats;
  const int64_t kinds = upto(2);  // all in integers, all in fp32, mixed
  const auto weight = [&](int64_t rows, int64_t cols) {
    return weights.emplace_back(rows, cols, 1 + int(upto(7)), kinds == 0 || (kinds == 2 && upto(1))).weight;
  };
  const auto numbers = [&](int64_t n) { return floats.emplace_back(normals(n)).data(); };
  const auto norm = [&](int64_t n) { return cpu::Norm{numbers(n), upto(1) ? numbers(n) : nullptr, 1e-5f}; };
  cpu::Encoder encoder{};
  encoder.hidden = hidden, encoder.heads = heads, encoder.activation = cpu::Activation(upto(4));
  encoder.norm_first = upto(1), encoder.gated = upto(1), encoder.padding = upto(2) - 1;
  const bool projected = upto(1);
  const int64_t width = projected ? 1 + upto(60) : hidden;
  for (int e = 0; e < 3; ++e) {
    const int64_t rows = e == 0 ? vocabulary : length + 3;
    if (upto(1)) {
      encoder.embeddings.push_back({numbers(rows * width), {}, 0, nullptr, nullptr, nullptr, nullptr, 0, rows, width});
    } else {
      const cpu::LinearWeight& made = weights.emplace_back(rows, width, 1 + int(upto(7)), false).weight;
      encoder.embeddings.push_back({nullptr, made.packed, made.group_rows, made.codebook, made.row_scale, made.outlier_index,
                                    made.outlier_delta, made.outliers, rows, width});
    }
    encoder.ids.push_back(cpu::TokenIds(e));
  }
  encoder.embedding_norm = norm(width);
  if (projected) encoder.projection = weight(hidden, width);
  for (int64_t i = 0, layers = 1 + upto(2); i < layers; ++i) {
    cpu::EncoderLayer layer{};
    if (upto(1)) layer.qkv = {weight(3 * hidden, hidden)};
    else layer.qkv = {weight(hidden, hidden), weight(hidden, hidden), weight(hidden, hidden)};
    layer.out = weight(hidden, hidden), layer.up = weight(middle * (encoder.gated ? 2 : 1), hidden), layer.down = weight(hidden, middle);
    layer.attention_norm = norm(hidden), layer.output_norm = norm(hidden);
    if (upto(1)) layer.rotary = numbers(length * dim), layer.rotary_length = length;
    if (upto(1)) layer.window = 1 + upto(8);
    encoder.layers.push_back(layer);
    encoder.order.push_back(upto(i));
  }
  if (encoder.norm_first) encoder.final_norm = norm(hidden);
  if (upto(1)) encoder.reach = length - 1 + upto(3), encoder.relative_bias = numbers(heads * (2 * encoder.reach + 1));
  std::vector<int64_t> ids(batch * length);
  std::vector<uint8_t> mask(batch * length);
  for (int64_t& id : ids) id = upto(vocabulary - 1);
  for (uint8_t& m : mask) m = upto(3) > 0;
  std::vector<float> out(batch * length * hidden, std::nanf("")), alone(out.size(), std::nanf(""));
  const cpu::EncoderInput input{batch, length, {ids.data(), nullptr, nullptr}, upto(3) ? mask.data() : nullptr};
  cpu::encode(encoder, input, out.data(), 1 + int(upto(3)), parallel);
  cpu::encode(encoder, input, alone.data(), 1, parallel);
  for (int64_t place = 0; place < batch * length; ++place) {
    double distance = 0, norm = 0;
    for (int64_t i = place * hidden; i < (place + 1) * hidden; ++i)
      distance += std::pow(double(out[i]) - alone[i], 2), norm += std::pow(double(alone[i]), 2);
    // The order of sums in fp32 depends on how many rows there are; before an integer layer that can turn a rounding round.
    const double allowed = kinds == 0 ? 0 : kinds == 1 ? 1e-3 : 5e-2;
    check(std::sqrt(distance) <= allowed * std::sqrt(norm), "states depend on the threads");
  }
  for (size_t i = 0; i < out.size(); ++i) {
    if (input.mask && !mask[i / hidden]) check(out[i] == 0, "a place without a token is not zero");
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 120;
  for (int round = 0; round < rounds; ++round) {
    random_bits.seed(uint64_t(round));
    fuzz_linear();
    fuzz_encoder();
  }
  std::printf("%d rounds of int8 on the %s path\n", rounds, cpu::path());
}
