// k-means of every max_iter from 1 to 30, where iterations may be used up at any of its stages, under AddressSanitizer and
// UndefinedBehaviorSanitizer. What a result promises is checked against sums in long double.
#include <algorithm>
#include <cmath>
#include <iterator>

#include "driver.h"

namespace {

const kmq::Parallel parallel = [](int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  for (int64_t i = 0; i < n; i += std::max<int64_t>(grain, n / 2 + 1)) body(i, std::min(n, i + std::max<int64_t>(grain, n / 2 + 1)));
};

std::vector<float> values_of(int kind, int64_t n) {
  std::mt19937 random(static_cast<unsigned>(kind));
  std::normal_distribution<float> normal;
  std::vector<float> out(n);
  for (float& x : out) {
    x = normal(random);
    if (kind == 1) x = x * x * x;
    if (kind == 2 && random() % 2) x = 2 + x * 0.01f;
    if (kind == 3) x = std::round(x * 40) / 40;
  }
  return out;
}

long double inertia_of(const std::vector<float>& values, const std::vector<float>& weight, const std::vector<float>& centroids,
                       const std::vector<uint8_t>& labels) {
  long double sum = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const long double off = static_cast<long double>(values[i]) - centroids[labels[i]];
    sum += off * off * (weight.empty() ? 1 : weight[i]);
  }
  return sum;
}

// Returns the inertia.
double run(const std::vector<float>& values, const std::vector<float>& weight, int K, kmq::cpu::KmeansAlgorithm algorithm, int64_t max_iter) {
  const int64_t n = static_cast<int64_t>(values.size());
  std::vector<uint8_t> labels(n, 0xa5);
  std::vector<float> centroids(K);
  double inertia = -1, bound = -1;
  int64_t n_iter = -1;
  kmq::cpu::KmeansMatrix matrix{values.data(), kmq::Dtype::f32, weight.empty() ? nullptr : weight.data(), 1, n, 1, K, 0, labels.data(),
                                centroids.data(), &inertia, &n_iter, &bound, kmq::cpu::KmeansFault::none};
  kmq::cpu::kmeans(&matrix, 1, {algorithm, kmq::cpu::KmeansInit::random, max_iter, 0.0, 7}, parallel);
  check(matrix.fault == kmq::cpu::KmeansFault::none, "a fault where there is none");
  check(n_iter >= 0 && n_iter <= max_iter, "more iterations than allowed");
  check(std::is_sorted(centroids.begin(), centroids.end()), "centroids do not ascend");
  std::vector<bool> used(K);
  for (const uint8_t label : labels) {
    check(label < K, "a label out of range");
    used[label] = true;
  }
  check(std::find(used.begin(), used.end(), false) == used.end(), "an empty cluster");
  const long double expected = inertia_of(values, weight, centroids, labels);
  check(std::fabs(inertia - expected) <= 1e-9 * expected && bound >= 1, "the inertia is not that of the result");
  return inertia;
}

}  // namespace

int main() {
  if (!path_is_there()) return 0;
  using kmq::cpu::KmeansAlgorithm;
  int64_t runs = 0;
  for (const int64_t n : {200, 16384, 16385, 40000})
    for (int kind = 0; kind < 4; ++kind) {
      const std::vector<float> values = values_of(kind, n);
      std::vector<float> weight(kind == 1 ? n : 0);
      for (int64_t i = 0; i < static_cast<int64_t>(weight.size()); ++i) weight[i] = std::pow(10.0f, -static_cast<float>(i % 7));
      for (int K = 2; K <= 64; ++K) {  // every K for one size, those that differ in kind for all
        constexpr int everywhere[] = {2, 3, 4, 7, 8, 16, 31, 32, 64};
        const bool listed = std::find(std::begin(everywhere), std::end(everywhere), K) != std::end(everywhere);
        if (!listed && (n != 16385 || kind != K % 4)) continue;
        const double best = run(values, weight, K, KmeansAlgorithm::optimal, 300);
        // Sizes up to kSmall have no iterations; of the others, few sizes take all of them.
        for (int64_t max_iter = 1; max_iter <= 30; max_iter += n <= 16384 && max_iter > 2 ? 9 : 1) {
          check(run(values, weight, K, KmeansAlgorithm::optimal, max_iter) <= 1.05 * best, "few iterations leave the optimum too far away");
          if (n <= 16385) run(values, weight, K, KmeansAlgorithm::lloyd, max_iter), ++runs;
          ++runs;
        }
      }
    }
  std::printf("kmeans, %ld runs of 1 to 30 iterations on the %s path\n", static_cast<long>(runs), kmq::cpu::path());
}
