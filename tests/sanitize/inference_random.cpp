// Random shapes through the inference kernels, for AddressSanitizer and UndefinedBehaviorSanitizer; see `make sanitize`.
// Every buffer has exactly its size. Exits with 1 where a result is off.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "driver.h"

using namespace kmq;

int main() {
  if (!path_is_there()) return 0;
  const Parallel parallel = [](int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
    if (n > 1) body(0, n / 2), body(n / 2, n);
    else if (n) body(0, n);
  };
  std::mt19937 random(0);
  const auto upto = [&](int64_t n) { return int64_t(random() % (n + 1)); };
  std::normal_distribution<float> normal;
  double worst = 0;
  for (int round = 0; round < 160; ++round) {
    const int bits = 1 + round % 8;
    const int64_t rows = 1 + upto(70), cols = 1 + upto(400), M = 1 + upto(round % 3 ? 10 : 40), group_rows = 1 + upto(rows);
    const int64_t books = (rows + group_rows - 1) / group_rows, K = int64_t(1) << bits;
    std::vector<uint8_t> assignments(rows * cols), back(rows * cols);
    for (auto& a : assignments) a = uint8_t(random() % K);
    std::vector<float> codebook(books * K), bias(rows), input(M * cols), grad(M * rows), weight(rows * cols);
    for (auto* values : {&codebook, &bias, &input, &grad})
      for (float& x : *values) x = normal(random);
    std::vector<uint8_t> bytes(rows * Packed{nullptr, rows, cols, bits}.row_bytes());
    cpu::pack(assignments.data(), rows, cols, bits, bytes.data(), parallel);
    const Packed packed{bytes.data(), rows, cols, bits};
    cpu::unpack(packed, back.data(), parallel);
    if (back != assignments) return std::puts("unpack"), 1;
    cpu::dequantize(packed, codebook.data(), Dtype::f32, group_rows, weight.data(), parallel);
    for (int64_t i = 0; i < rows * cols; ++i)
      if (weight[i] != codebook[i / cols / group_rows * K + assignments[i]]) return std::puts("dequantize"), 1;

    std::vector<uint16_t> codebook16(books * K, 0x3f80), weight16(rows * cols), input16(M * cols, 0x3f80), output16(M * rows);
    cpu::dequantize(packed, codebook16.data(), Dtype::bf16, group_rows, weight16.data(), parallel);
    std::vector<double> codebook64(books * K, 1), weight64(rows * cols);
    cpu::dequantize(packed, codebook64.data(), Dtype::f64, group_rows, weight64.data(), parallel);
    std::vector<int64_t> ids(upto(20));
    for (auto& id : ids) id = upto(rows - 1);
    std::vector<float> gathered(ids.size() * cols);
    cpu::codebook_embedding(ids.data(), int64_t(ids.size()), packed, codebook.data(), Dtype::f32, group_rows, gathered.data(), parallel);
    for (size_t i = 0; i < gathered.size(); ++i)
      if (gathered[i] != weight[ids[i / cols] * cols + i % cols]) return std::puts("codebook_embedding"), 1;

    std::vector<float> output(M * rows), grad_input(M * cols);
    cpu::codebook_linear(input.data(), Dtype::f32, M, packed, codebook.data(), group_rows, bias.data(), output.data(), parallel);
    cpu::codebook_linear(input16.data(), Dtype::bf16, M, packed, codebook.data(), group_rows, nullptr, output16.data(), parallel);
    cpu::codebook_linear(input16.data(), Dtype::f16, M, packed, codebook.data(), group_rows, nullptr, output16.data(), parallel);
    cpu::codebook_linear_input_grad(grad.data(), Dtype::f32, M, packed, codebook.data(), group_rows, grad_input.data(), parallel);
    std::vector<uint16_t> grad16(M * rows, 0x3f80), grad_input16(M * cols);
    cpu::codebook_linear_input_grad(grad16.data(), Dtype::f16, M, packed, codebook.data(), group_rows, grad_input16.data(), parallel);
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t r = 0; r < rows; ++r) {
        double sum = bias[r];
        for (int64_t c = 0; c < cols; ++c) sum += double(input[m * cols + c]) * weight[r * cols + c];
        worst = std::fmax(worst, std::fabs(sum - output[m * rows + r]));
      }
      for (int64_t c = 0; c < cols; ++c) {
        double sum = 0;
        for (int64_t r = 0; r < rows; ++r) sum += double(grad[m * rows + r]) * weight[r * cols + c];
        worst = std::fmax(worst, std::fabs(sum - grad_input[m * cols + c]));
      }
    }
  }
  std::printf("%s, largest error %.1e\n", cpu::path(), worst);
  return worst < 1e-3 ? 0 : 1;
}
