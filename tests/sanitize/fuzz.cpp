// Drives the CPU kernels with random shapes and values under AddressSanitizer and UndefinedBehaviorSanitizer; see `make sanitize`.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "driver.h"

namespace {

std::mt19937_64 random_bits;
int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }
float normal() { return std::normal_distribution<float>()(random_bits); }

const kmq::Parallel parallel = [](int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  for (int64_t i = 0; i < n; i += grain) body(i, i + grain < n ? i + grain : n);
};

uint16_t half_of(float x, kmq::Dtype dtype) {
  uint32_t u;
  static_assert(sizeof u == sizeof x);
  __builtin_memcpy(&u, &x, 4);
  return static_cast<uint16_t>(dtype == kmq::Dtype::bf16 ? u >> 16 : random_bits() & 0x7bff);
}

// Values of many shapes: smooth, heavy tails, few distinct, shifted, tiny, huge, not finite.
float value(int kind) {
  switch (kind) {
    case 0: return normal();
    case 1: return normal() / std::fabs(normal());
    case 2: return static_cast<float>(below(5)) * 0.3f;
    case 3: return 1.0f + 1e-3f * normal();
    case 4: return below(2) ? 0.0f : normal();
    case 5: return 1e-38f * normal();
    case 6: return 1e37f * normal();
    case 7: return below(1000) ? normal() : 1e6f * normal();
    case 8: return below(5000) ? normal() : std::numeric_limits<float>::infinity();
    default: return 0.25f;
  }
}

void fuzz_kmeans() {
  using namespace kmq::cpu;
  const int64_t rows = 1 + below(40), cols = 1 + below(below(4) ? 600 : 4000), n = rows * cols;
  const kmq::Dtype dtype = below(2) ? kmq::Dtype::f32 : below(2) ? kmq::Dtype::bf16 : kmq::Dtype::f16;
  const int kind = static_cast<int>(below(10)), bits = static_cast<int>(below(9));
  const int K = bits ? 1 << bits : 1 + static_cast<int>(below(256));
  std::vector<float> wide(dtype == kmq::Dtype::f32 ? n : 0), weight(below(2) ? n : 0);
  std::vector<uint16_t> narrow(dtype == kmq::Dtype::f32 ? 0 : n);
  for (float& x : wide) x = value(kind);
  for (uint16_t& x : narrow) x = half_of(value(kind), dtype);
  const int64_t bad_weights = below(20);
  for (float& w : weight) w = below(4) ? std::pow(10.0f, -10 * std::fabs(normal())) : 0.0f;
  if (bad_weights == 0)
    for (float& w : weight) w = 0;
  if (bad_weights == 1 && !weight.empty()) weight[below(n)] = below(2) ? -1 : std::nanf("");
  const int64_t group_rows = 1 + below(rows), groups = (rows + group_rows - 1) / group_rows;
  const kmq::Packed layout{nullptr, rows, cols, bits};
  std::vector<uint8_t> labels(bits ? rows * layout.row_bytes() : n, 0xa5);
  std::vector<float> centroids(groups * K);
  std::vector<double> inertia(groups), bound(groups);
  std::vector<int64_t> n_iter(groups);
  KmeansMatrix matrix{wide.empty() ? static_cast<const void*>(narrow.data()) : wide.data(), dtype, weight.empty() ? nullptr : weight.data(),
                      rows, cols, group_rows, K, bits, labels.data(), centroids.data(), inertia.data(), n_iter.data(), bound.data(),
                      KmeansFault::none};
  const KmeansOptions options{static_cast<KmeansAlgorithm>(n * K > 400000 ? 2 * below(2) % 3 % 2 : below(3)), static_cast<KmeansInit>(below(4)),
                              1 + below(300), below(2) ? 0.0 : 1e-4, random_bits()};
  kmeans(&matrix, 1, options, parallel);
  if (matrix.fault != KmeansFault::none) return;
  for (int64_t g = 0; g < groups; ++g) {
    for (int k = 1; k < K; ++k) check(centroids[g * K + k] >= centroids[g * K + k - 1], "centroids do not ascend");
    check(std::isfinite(inertia[g]) && inertia[g] >= 0 && bound[g] >= 1, "inertia or bound");
  }
  if (bits == 0)
    for (const uint8_t label : labels) check(label < K, "label out of range");
  std::vector<double> sums(K), weights(K);
  if (bits == 0) update(matrix.values, dtype, labels.data(), nullptr, dtype, 1, n, K, sums.data(), weights.data(), parallel);
  std::vector<uint8_t> again(n);
  assign(matrix.values, dtype, centroids.data(), 1, n, K, again.data(), parallel);
  if (bits == 0 && groups == 1) check(again == labels, "assign and kmeans differ");
}

}  // namespace

int main(int count, char** arguments) {
  if (!path_is_there()) return 0;
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 400;
  for (int round = 0; round < rounds; ++round) {
    random_bits.seed(static_cast<uint64_t>(round));
    fuzz_kmeans();
  }
  std::printf("%d rounds on the %s path\n", rounds, kmq::cpu::path());
}
