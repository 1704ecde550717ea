// Tensors to pointers, registration with torch's dispatcher, and the Python module with its build facts.
// Arguments were checked, with sentences, in ops.py; here only what memory safety needs is checked again.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <tuple>
#ifdef KMQ_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "kmq.h"

namespace {

using at::Tensor;

kmq::Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return kmq::Dtype::f32;
    case at::kDouble: return kmq::Dtype::f64;
    case at::kBFloat16: return kmq::Dtype::bf16;
    case at::kHalf: return kmq::Dtype::f16;
    default: TORCH_CHECK(false, "expected a floating-point tensor, got ", tensor.scalar_type());
  }
}

at::ScalarType wide(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

kmq::Packed packed_of(const Tensor& packed, int64_t cols, int64_t num_centroids) {
  int bits = 0;
  while ((int64_t(1) << bits) < num_centroids) ++bits;
  TORCH_CHECK(bits >= 1 && bits <= 8 && (int64_t(1) << bits) == num_centroids, "num_centroids: got ", num_centroids);
  TORCH_CHECK(packed.dim() == 2 && packed.scalar_type() == at::kByte && packed.is_contiguous() && cols >= 0, "packed: does not fit");
  const kmq::Packed out{packed.const_data_ptr<uint8_t>(), packed.size(0), cols, bits};
  TORCH_CHECK(packed.size(1) == out.row_bytes(), "packed: expected ", out.row_bytes(), " bytes a row, got ", packed.size(1));
  return out;
}

void check_groups(int64_t rows, int64_t num_codebooks, int64_t group_rows) {
  TORCH_CHECK(group_rows >= 1 && (rows + group_rows - 1) / group_rows == num_codebooks, "group_rows: does not fit");
}

const kmq::Parallel parallel = [](int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  at::parallel_for(0, n, grain, body);
};

Tensor dequantize(const Tensor& packed_in, const Tensor& codebook_in, int64_t cols, int64_t group_rows) {
  const Tensor packed = packed_in.contiguous(), codebook = codebook_in.contiguous();
  const kmq::Packed matrix = packed_of(packed, cols, codebook.size(1));
  check_groups(matrix.rows, codebook.size(0), group_rows);
  Tensor weight = at::empty({matrix.rows, cols}, codebook.options());
  kmq::cpu::dequantize(matrix, codebook.const_data_ptr(), dtype_of(codebook), group_rows, weight.mutable_data_ptr(), parallel);
  return weight;
}

Tensor pack(const Tensor& assignments_in, int64_t bits) {
  const Tensor assignments = assignments_in.contiguous();
  TORCH_CHECK(bits >= 1 && bits <= 8 && assignments.dim() >= 1 && assignments.scalar_type() == at::kByte, "assignments: does not fit");
  const int64_t cols = assignments.size(-1);
  auto sizes = assignments.sizes().vec();
  sizes.back() = kmq::Packed{nullptr, 0, cols, int(bits)}.row_bytes();
  Tensor packed = at::empty(sizes, assignments.options());
  const int64_t rows = cols ? assignments.numel() / cols : 0;
  kmq::cpu::pack(assignments.const_data_ptr<uint8_t>(), rows, cols, int(bits), packed.mutable_data_ptr<uint8_t>(), parallel);
  return packed;
}

Tensor unpack(const Tensor& packed_in, int64_t bits, int64_t numel) {
  const Tensor packed = packed_in.contiguous();
  TORCH_CHECK(bits >= 1 && bits <= 8 && numel >= 0 && packed.dim() >= 1, "packed: does not fit");
  auto sizes = packed.sizes().vec();
  sizes.back() = numel;
  Tensor assignments = at::empty(sizes, packed.options());
  if (assignments.numel() == 0) return assignments;
  const kmq::Packed matrix = packed_of(packed.view({-1, packed.size(-1)}), numel, int64_t(1) << bits);
  kmq::cpu::unpack(matrix, assignments.mutable_data_ptr<uint8_t>(), parallel);
  return assignments;
}

Tensor codebook_linear(const Tensor& input_in, const Tensor& packed_in, const Tensor& codebook_in, const std::optional<Tensor>& bias_in,
                       int64_t group_rows) {
  const auto type = input_in.scalar_type();
  if (type == at::kDouble) {
    const auto bias = bias_in ? std::optional<Tensor>(bias_in->to(type)) : std::nullopt;
    return at::linear(input_in, dequantize(packed_in, codebook_in, input_in.size(-1), group_rows).to(type), bias);
  }
  const Tensor input = input_in.contiguous(), packed = packed_in.contiguous();
  const Tensor codebook = codebook_in.to(at::kFloat).contiguous();
  const kmq::Packed matrix = packed_of(packed, input.size(-1), codebook.size(1));
  check_groups(matrix.rows, codebook.size(0), group_rows);
  Tensor bias;
  if (bias_in) {
    bias = bias_in->to(at::kFloat).contiguous();
    TORCH_CHECK(bias.numel() == matrix.rows, "bias: does not fit");
  }
  auto sizes = input.sizes().vec();
  sizes.back() = matrix.rows;
  Tensor output = at::empty(sizes, input.options());
  if (output.numel() == 0) return output;
  kmq::cpu::codebook_linear(input.const_data_ptr(), dtype_of(input), output.numel() / matrix.rows, matrix,
                            codebook.const_data_ptr<float>(), group_rows, bias.defined() ? bias.const_data_ptr<float>() : nullptr,
                            output.mutable_data_ptr(), parallel);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> int8_codebook(const Tensor& packed_in, const Tensor& codebook_in, int64_t cols, int64_t group_rows) {
  const Tensor packed = packed_in.contiguous(), codebook = codebook_in.to(at::kFloat).contiguous();
  const kmq::Packed matrix = packed_of(packed, cols, codebook.size(1));
  check_groups(matrix.rows, codebook.size(0), group_rows);
  TORCH_CHECK(cols <= kmq::cpu::kInt8Cols, "cols: too many");
  Tensor table = at::empty(codebook.sizes(), codebook.options().dtype(at::kChar));
  Tensor scale = at::empty({codebook.size(0)}, codebook.options());
  Tensor row_sum = at::empty({matrix.rows}, codebook.options().dtype(at::kInt));
  kmq::cpu::int8_codebook(matrix, codebook.const_data_ptr<float>(), group_rows, table.mutable_data_ptr<int8_t>(),
                          scale.mutable_data_ptr<float>(), row_sum.mutable_data_ptr<int32_t>(), parallel);
  return {table, scale, row_sum};
}

kmq::cpu::Activation activation_of(const std::string& name) {
  using kmq::cpu::Activation;
  for (const auto& [known, activation] : {std::pair{"none", Activation::none}, {"gelu", Activation::gelu}, {"gelu_tanh", Activation::gelu_tanh},
                                          {"relu", Activation::relu}, {"silu", Activation::silu}})
    if (name == known) return activation;
  TORCH_CHECK(false, "activation: got ", name);
}

// Keeps what the pointers of a LinearWeight point to.
struct HeldWeight {
  Tensor packed, codebook, table, factor, row_sum, row_scale, bias, outlier_index, outlier_delta;
  kmq::cpu::LinearWeight weight;

  static Tensor kept(const std::optional<Tensor>& from, at::ScalarType type, int64_t numel, const char* name) {
    if (!from) return Tensor();
    Tensor out = from->to(type).contiguous();
    TORCH_CHECK(out.numel() == numel, name, ": does not fit");
    return out;
  }

  // Either a codebook, for fp32, or table, factor and row_sum, for integers.
  HeldWeight(const Tensor& packed_in, int64_t cols, int64_t group_rows, const std::optional<Tensor>& codebook_in,
             const std::optional<Tensor>& table_in, const std::optional<Tensor>& factor_in, const std::optional<Tensor>& row_sum_in,
             const std::optional<Tensor>& row_scale_in, const std::optional<Tensor>& bias_in,
             const std::optional<Tensor>& outlier_index_in, const std::optional<Tensor>& outlier_delta_in) {
    packed = packed_in.contiguous();
    const Tensor& book = table_in ? *table_in : codebook_in.value();
    const kmq::Packed matrix = packed_of(packed, cols, book.size(1));
    const int64_t rows = matrix.rows;
    check_groups(rows, book.size(0), group_rows);
    if (table_in) {
      TORCH_CHECK(table_in->scalar_type() == at::kChar && factor_in && row_sum_in && cols <= kmq::cpu::kInt8Cols, "table: does not fit");
      table = table_in->contiguous();
      const int8_t* entry = table.const_data_ptr<int8_t>();
      TORCH_CHECK_VALUE(std::find(entry, entry + table.numel(), -128) == entry + table.numel(), "table: expected entries of at least -127, got -128");
      factor = kept(factor_in, at::kFloat, rows, "factor");
      row_sum = kept(row_sum_in, at::kInt, rows, "row_sum");
    } else {
      codebook = codebook_in->to(at::kFloat).contiguous();
    }
    row_scale = kept(row_scale_in, at::kFloat, rows, "row_scale");
    bias = kept(bias_in, at::kFloat, rows, "bias");
    const int64_t outliers = outlier_index_in ? outlier_index_in->numel() : 0;
    outlier_index = kept(outlier_index_in, at::kInt, outliers, "outlier_index");
    outlier_delta = kept(outlier_delta_in, at::kFloat, outliers, "outlier_delta");
    TORCH_CHECK(outlier_index.defined() == outlier_delta.defined(), "outlier_delta: does not fit");
    if (outliers) {
      const int32_t* at = outlier_index.const_data_ptr<int32_t>();
      TORCH_CHECK_INDEX(at[0] >= 0 && at[outliers - 1] < rows * cols && std::is_sorted(at, at + outliers),
                        "outlier_index: expected ascending positions in [0, ", rows * cols, ")");
    }
    const auto floats = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; };
    const auto ints = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<int32_t>() : nullptr; };
    weight = {matrix, group_rows, floats(codebook), table.defined() ? table.const_data_ptr<int8_t>() : nullptr, floats(factor), ints(row_sum),
              floats(row_scale), floats(bias), ints(outlier_index), floats(outlier_delta), outliers};
  }
};

Tensor int8_linear(const Tensor& input_in, const Tensor& packed, const Tensor& table, const Tensor& factor, const Tensor& row_sum,
                   const std::optional<Tensor>& bias, int64_t group_rows, const std::optional<Tensor>& outlier_index,
                   const std::optional<Tensor>& outlier_delta, std::string activation) {
  const Tensor input = input_in.contiguous();
  TORCH_CHECK(input.dim() >= 1 && input.scalar_type() != at::kDouble, "input: does not fit");
  const HeldWeight held(packed, input.size(-1), group_rows, std::nullopt, table, factor, row_sum, std::nullopt, bias, outlier_index,
                        outlier_delta);
  auto sizes = input.sizes().vec();
  sizes.back() = held.weight.packed.rows;
  Tensor output = at::empty(sizes, input.options());
  if (output.numel() == 0) return output;
  kmq::cpu::int8_linear(input.const_data_ptr(), dtype_of(input), output.numel() / held.weight.packed.rows, held.weight,
                        activation_of(activation), output.mutable_data_ptr(), parallel);
  return output;
}

Tensor codebook_linear_input_grad(const Tensor& grad_in, const Tensor& packed_in, const Tensor& codebook_in, int64_t cols,
                                  int64_t group_rows) {
  const auto type = grad_in.scalar_type();
  if (type == at::kDouble) return at::matmul(grad_in, dequantize(packed_in, codebook_in, cols, group_rows).to(type));
  const Tensor grad = grad_in.contiguous(), packed = packed_in.contiguous();
  const Tensor codebook = codebook_in.to(at::kFloat).contiguous();
  const kmq::Packed matrix = packed_of(packed, cols, codebook.size(1));
  check_groups(matrix.rows, codebook.size(0), group_rows);
  TORCH_CHECK(grad.size(-1) == matrix.rows, "grad_output: does not fit");
  auto sizes = grad.sizes().vec();
  sizes.back() = cols;
  Tensor out = at::empty(sizes, grad.options());
  if (out.numel() == 0) return out;
  kmq::cpu::codebook_linear_input_grad(grad.const_data_ptr(), dtype_of(grad), out.numel() / cols, matrix,
                                       codebook.const_data_ptr<float>(), group_rows, out.mutable_data_ptr(), parallel);
  return out;
}

Tensor codebook_embedding(const Tensor& ids_in, const Tensor& packed_in, const Tensor& codebook_in, int64_t cols, int64_t group_rows,
                          int64_t padding_idx) {
  const Tensor ids = ids_in.to(at::kLong).contiguous(), packed = packed_in.contiguous(), codebook = codebook_in.contiguous();
  const kmq::Packed matrix = packed_of(packed, cols, codebook.size(1));
  check_groups(matrix.rows, codebook.size(0), group_rows);
  auto sizes = ids.sizes().vec();
  sizes.push_back(cols);
  Tensor out = at::empty(sizes, codebook.options());
  if (ids.numel() == 0) return out;
  const int64_t* first = ids.const_data_ptr<int64_t>();
  const auto [least, most] = std::minmax_element(first, first + ids.numel());
  TORCH_CHECK_INDEX(*least >= 0 && *most < matrix.rows, "ids: expected values in [0, ", matrix.rows, "), got ", *least, " to ", *most);
  kmq::cpu::codebook_embedding(first, ids.numel(), matrix, codebook.const_data_ptr(), dtype_of(codebook), group_rows,
                               out.mutable_data_ptr(), parallel);
  return out;
}

Tensor codebook_grad(const Tensor& grad_in, const Tensor& packed_in, int64_t num_codebooks, int64_t num_centroids, int64_t group_rows) {
  const Tensor grad = grad_in.contiguous(), packed = packed_in.contiguous();
  const kmq::Packed matrix = packed_of(packed, grad.size(1), num_centroids);
  check_groups(matrix.rows, num_codebooks, group_rows);
  TORCH_CHECK(grad.dim() == 2 && grad.size(0) == matrix.rows, "grad: does not fit");
  Tensor out = at::empty({num_codebooks, num_centroids}, grad.options().dtype(wide(grad.scalar_type())));
  kmq::cpu::codebook_grad(grad.const_data_ptr(), dtype_of(grad), matrix, num_codebooks, group_rows, out.mutable_data_ptr(), parallel);
  return out;
}

Tensor codebook_linear_grad(const Tensor& grad_output_in, const Tensor& input_in, const Tensor& packed_in, int64_t num_codebooks,
                            int64_t num_centroids, int64_t group_rows) {
  const at::ScalarType type = at::promote_types(grad_output_in.scalar_type(), input_in.scalar_type());
  const Tensor grad_output = grad_output_in.to(type).contiguous(), input = input_in.to(type).contiguous();
  const Tensor packed = packed_in.contiguous();
  TORCH_CHECK(grad_output.dim() >= 1 && input.dim() >= 1 && grad_output.size(-1) == packed.size(0), "grad_output: does not fit");
  const kmq::Packed matrix = packed_of(packed, input.size(-1), num_centroids);
  check_groups(matrix.rows, num_codebooks, group_rows);
  const int64_t M = c10::multiply_integers(input.sizes().slice(0, input.dim() - 1));
  TORCH_CHECK(M * matrix.rows == grad_output.numel(), "grad_output: does not fit input");
  Tensor out = at::empty({num_codebooks, num_centroids}, input.options().dtype(wide(type)));
  kmq::cpu::codebook_linear_grad(grad_output.const_data_ptr(), input.const_data_ptr(), dtype_of(input), M, matrix, num_codebooks,
                                 group_rows, out.mutable_data_ptr(), parallel);
  return out;
}

Tensor codebook_embedding_grad(const Tensor& grad_output_in, const Tensor& ids_in, const Tensor& packed_in, int64_t num_codebooks,
                               int64_t num_centroids, int64_t group_rows, int64_t padding_idx) {
  const Tensor grad_output = grad_output_in.contiguous(), ids = ids_in.to(at::kLong).contiguous(), packed = packed_in.contiguous();
  TORCH_CHECK(grad_output.dim() >= 1, "grad_output: does not fit");
  const kmq::Packed matrix = packed_of(packed, grad_output.size(-1), num_centroids);
  check_groups(matrix.rows, num_codebooks, group_rows);
  TORCH_CHECK(ids.numel() * matrix.cols == grad_output.numel(), "grad_output: does not fit ids");
  const int64_t* row = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i)
    TORCH_CHECK_INDEX(row[i] >= 0 && row[i] < matrix.rows, "ids: expected values in [0, ", matrix.rows, "), got ", row[i]);
  Tensor out = at::empty({num_codebooks, num_centroids}, grad_output.options().dtype(wide(grad_output.scalar_type())));
  kmq::cpu::codebook_embedding_grad(grad_output.const_data_ptr(), dtype_of(grad_output), row, ids.numel(), matrix, num_codebooks,
                                    group_rows, padding_idx, out.mutable_data_ptr(), parallel);
  return out;
}

Tensor assign(const Tensor& values_in, const Tensor& centroids_in) {
  const bool wide_values = values_in.scalar_type() == at::kDouble || centroids_in.scalar_type() == at::kDouble;
  const Tensor centroids = centroids_in.to(wide_values ? at::kDouble : at::kFloat).contiguous();
  const Tensor values = (wide_values ? values_in.to(at::kDouble) : values_in).contiguous();
  TORCH_CHECK(values.dim() == 2 && centroids.dim() == 2 && centroids.size(0) == values.size(0), "centroids: do not fit");
  TORCH_CHECK(centroids.size(1) >= 1 && centroids.size(1) <= 256, "num_centroids: got ", centroids.size(1));
  Tensor assignments = at::empty(values.sizes(), values.options().dtype(at::kByte));
  kmq::cpu::assign(values.const_data_ptr(), dtype_of(values), centroids.const_data_ptr(), values.size(0), values.size(1),
                   static_cast<int>(centroids.size(1)), assignments.mutable_data_ptr<uint8_t>(), parallel);
  return assignments;
}

std::tuple<Tensor, Tensor> update(const Tensor& values_in, const Tensor& assignments_in, int64_t num_centroids,
                                  const std::optional<Tensor>& sample_weight_in) {
  const Tensor values = values_in.contiguous(), assignments = assignments_in.contiguous();
  TORCH_CHECK(values.dim() == 2 && assignments.scalar_type() == at::kByte && assignments.sizes() == values.sizes() &&
                  num_centroids >= 1 && num_centroids <= 256,
              "assignments: do not fit");
  const Tensor weight = sample_weight_in ? sample_weight_in->contiguous() : Tensor();
  TORCH_CHECK(!weight.defined() || weight.sizes() == values.sizes(), "sample_weight: does not fit");
  Tensor sums = at::empty({values.size(0), num_centroids}, values.options().dtype(at::kDouble)), weights = at::empty_like(sums);
  kmq::cpu::update(values.const_data_ptr(), dtype_of(values), assignments.const_data_ptr<uint8_t>(),
                   weight.defined() ? weight.const_data_ptr() : nullptr, weight.defined() ? dtype_of(weight) : kmq::Dtype::f32,
                   values.size(0), values.size(1), static_cast<int>(num_centroids), sums.mutable_data_ptr<double>(),
                   weights.mutable_data_ptr<double>(), parallel);
  return {sums, weights};
}

using Tensors = std::vector<Tensor>;

std::tuple<Tensors, Tensors, Tensors, Tensors, Tensors, std::vector<int64_t>> kmeans(
    at::TensorList values, const c10::List<std::optional<Tensor>>& sample_weight, at::IntArrayRef num_centroids,
    at::IntArrayRef group_rows, bool packed, std::string_view algorithm, std::string_view init, int64_t max_iter, double tol,
    int64_t seed) {
  using kmq::cpu::KmeansAlgorithm, kmq::cpu::KmeansInit;
  const size_t count = values.size();
  TORCH_CHECK(sample_weight.size() == count && num_centroids.size() == count && group_rows.size() == count, "values: do not fit");
  const kmq::cpu::KmeansOptions options{
      algorithm == "exact" ? KmeansAlgorithm::exact : algorithm == "lloyd" ? KmeansAlgorithm::lloyd : KmeansAlgorithm::optimal,
      init == "linear"     ? KmeansInit::linear
      : init == "random"   ? KmeansInit::random
      : init == "quantile" ? KmeansInit::quantile
                           : KmeansInit::plus_plus,
      max_iter, tol, static_cast<uint64_t>(seed)};
  std::vector<kmq::cpu::KmeansMatrix> matrices;
  Tensors kept, labels, centroids, inertia, n_iter, bound;
  for (size_t i = 0; i < count; ++i) {
    const Tensor matrix = values[i].contiguous();
    const int64_t K = num_centroids[i];
    TORCH_CHECK(matrix.dim() == 2 && matrix.numel() > 0 && matrix.scalar_type() != at::kDouble, "values: do not fit");
    TORCH_CHECK(K >= 1 && K <= 256 && group_rows[i] >= 1, "num_centroids: got ", K);
    const int64_t rows = matrix.size(0), cols = matrix.size(1), groups = (rows + group_rows[i] - 1) / group_rows[i];
    int bits = 0;
    if (packed)
      while ((int64_t(1) << bits) < K) ++bits;
    TORCH_CHECK(!packed || (bits >= 1 && (int64_t(1) << bits) == K), "num_centroids: got ", K);
    const std::optional<Tensor> given = sample_weight.get(i);
    const Tensor weight = given ? given->to(at::kFloat).contiguous() : Tensor();
    TORCH_CHECK(!weight.defined() || weight.sizes() == matrix.sizes(), "sample_weight: does not fit");
    const auto options_of = [&](at::ScalarType type) { return matrix.options().dtype(type); };
    const kmq::Packed layout{nullptr, rows, cols, bits};
    labels.push_back(at::empty({rows, packed ? layout.row_bytes() : cols}, options_of(at::kByte)));
    centroids.push_back(at::empty({groups, K}, options_of(at::kFloat)));
    inertia.push_back(at::empty({groups}, options_of(at::kDouble)));
    n_iter.push_back(at::empty({groups}, options_of(at::kLong)));
    bound.push_back(at::empty({groups}, options_of(at::kDouble)));
    matrices.push_back({matrix.const_data_ptr(), dtype_of(matrix), weight.defined() ? weight.const_data_ptr<float>() : nullptr, rows, cols,
                        group_rows[i], static_cast<int>(K), bits, labels[i].mutable_data_ptr<uint8_t>(),
                        centroids[i].mutable_data_ptr<float>(), inertia[i].mutable_data_ptr<double>(), n_iter[i].mutable_data_ptr<int64_t>(),
                        bound[i].mutable_data_ptr<double>(), kmq::cpu::KmeansFault::none});
    kept.push_back(matrix);
    kept.push_back(weight);
  }
  kmq::cpu::kmeans(matrices.data(), static_cast<int64_t>(count), options, parallel);
  std::vector<int64_t> faults;
  for (const kmq::cpu::KmeansMatrix& matrix : matrices) faults.push_back(static_cast<int64_t>(matrix.fault));
  return {labels, centroids, inertia, n_iter, bound, faults};
}

// What Python describes an encoder with: see kmq_kernels/layers/encoder.py, which makes these.
class HeldEncoder {
 public:
  explicit HeldEncoder(const pybind11::dict& facts) {
    encoder_.hidden = facts["hidden"].cast<int64_t>();
    encoder_.heads = facts["heads"].cast<int64_t>();
    TORCH_CHECK(encoder_.heads > 0 && encoder_.hidden % encoder_.heads == 0, "heads: does not fit");
    encoder_.activation = activation_of(facts["activation"].cast<std::string>());
    encoder_.norm_first = facts["norm_first"].cast<bool>();
    encoder_.gated = facts["gated"].cast<bool>();
    encoder_.padding = facts["padding"].cast<int64_t>();
    for (const auto& item : facts["embeddings"]) {
      const auto parts = item.cast<pybind11::dict>();
      encoder_.embeddings.push_back(table(parts));
      TORCH_CHECK(encoder_.embeddings.back().cols == encoder_.embeddings[0].cols, "embeddings: do not fit");
      const auto ids = parts["ids"].cast<std::string>();
      encoder_.ids.push_back(ids == "columns" ? kmq::cpu::TokenIds::columns
                             : ids == "counted" ? kmq::cpu::TokenIds::counted
                                                : kmq::cpu::TokenIds::given);
    }
    const int64_t hidden = encoder_.hidden, width = encoder_.embeddings.at(0).cols;
    encoder_.embedding_norm = norm(facts["embedding_norm"], width);
    encoder_.projection = kmq::cpu::LinearWeight{};
    if (!facts["projection"].is_none()) encoder_.projection = weight(facts["projection"], width, hidden);
    else TORCH_CHECK(width == hidden, "embeddings: do not fit");
    for (const auto& item : facts["layers"]) encoder_.layers.push_back(layer(item.cast<pybind11::dict>()));
    encoder_.order = facts["order"].cast<std::vector<int64_t>>();
    for (const int64_t i : encoder_.order) TORCH_CHECK(i >= 0 && i < int64_t(encoder_.layers.size()), "order: does not fit");
    encoder_.final_norm = norm(facts["final_norm"], hidden);
    const auto bias = facts["relative_bias"].cast<std::optional<Tensor>>();
    encoder_.relative_bias = bias ? floats(*bias, bias->numel()) : nullptr;
    encoder_.reach = bias ? (bias->size(1) - 1) / 2 : 0;
    TORCH_CHECK(!bias || (bias->size(0) == encoder_.heads && bias->size(1) == 2 * encoder_.reach + 1), "relative_bias: does not fit");
  }

  // ids: int64 (batch, length) or None for each embedding; mask: bool (batch, length) or None. Returns fp32 (batch, length, hidden).
  Tensor run(const std::vector<std::optional<Tensor>>& ids, const std::optional<Tensor>& mask) const {
    TORCH_CHECK(ids.size() == encoder_.embeddings.size() && ids[0] && ids[0]->dim() == 2, "ids: do not fit");
    const int64_t batch = ids[0]->size(0), length = ids[0]->size(1);
    std::vector<Tensor> kept;
    kmq::cpu::EncoderInput input{batch, length, {}, nullptr};
    for (const auto& given : ids) {
      input.ids.push_back(nullptr);
      if (!given) continue;
      kept.push_back(given->to(at::kLong).expand({batch, length}).contiguous());
      input.ids.back() = kept.back().const_data_ptr<int64_t>();
    }
    if (mask) {
      TORCH_CHECK(mask->sizes() == ids[0]->sizes() && mask->scalar_type() == at::kBool, "mask: does not fit");
      kept.push_back(mask->contiguous());
      input.mask = reinterpret_cast<const uint8_t*>(kept.back().const_data_ptr<bool>());
    }
    Tensor out = at::empty({batch, length, encoder_.hidden}, at::kFloat);
    const pybind11::gil_scoped_release released;
    try {
      kmq::cpu::encode(encoder_, input, out.mutable_data_ptr<float>(), at::get_num_threads(), parallel);
    } catch (const std::out_of_range& error) {
      TORCH_CHECK_INDEX(false, error.what());
    }
    return out;
  }

 private:
  const float* floats(const Tensor& from, int64_t numel) {
    kept_.push_back(from.to(at::kFloat).contiguous());
    TORCH_CHECK(kept_.back().numel() == numel, "encoder: expected ", numel, " numbers, got ", kept_.back().numel());
    return kept_.back().const_data_ptr<float>();
  }

  kmq::cpu::Norm norm(const pybind11::handle& from, int64_t width) {
    if (from.is_none()) return {};
    const auto [weight, bias, eps] = from.cast<std::tuple<Tensor, std::optional<Tensor>, double>>();
    return {floats(weight, width), bias ? floats(*bias, width) : nullptr, float(eps)};
  }

  kmq::cpu::LinearWeight weight(const pybind11::handle& from, int64_t cols, int64_t rows) {
    const auto parts = from.cast<pybind11::dict>();
    const auto tensor = [&](const char* name) { return parts[name].cast<std::optional<Tensor>>(); };
    weights_.push_back(std::make_unique<HeldWeight>(*tensor("packed"), cols, parts["group_rows"].cast<int64_t>(), tensor("codebook"), tensor("table"),
                                                    tensor("factor"), tensor("row_sum"), tensor("row_scale"), tensor("bias"),
                                                    tensor("outlier_index"), tensor("outlier_delta")));
    const kmq::cpu::LinearWeight& made = weights_.back()->weight;
    TORCH_CHECK(made.packed.rows == rows, "encoder: expected a weight of ", rows, " rows, got ", made.packed.rows);
    return made;
  }

  kmq::cpu::EmbeddingTable table(const pybind11::dict& parts) {
    const auto tensor = [&](const char* name) { return parts[name].cast<std::optional<Tensor>>(); };
    if (const auto dense = tensor("dense")) {
      kmq::cpu::EmbeddingTable made{};
      made.rows = dense->size(0), made.cols = dense->size(1);
      made.dense = floats(*dense, dense->numel());
      return made;
    }
    weights_.push_back(std::make_unique<HeldWeight>(*tensor("packed"), parts["cols"].cast<int64_t>(), parts["group_rows"].cast<int64_t>(),
                                                    tensor("codebook"), std::nullopt, std::nullopt, std::nullopt, tensor("row_scale"),
                                                    std::nullopt, tensor("outlier_index"), tensor("outlier_values")));
    const kmq::cpu::LinearWeight& made = weights_.back()->weight;
    return {nullptr, made.packed, made.group_rows, made.codebook, made.row_scale, made.outlier_index, made.outlier_delta, made.outliers,
            made.packed.rows, made.packed.cols};
  }

  kmq::cpu::EncoderLayer layer(const pybind11::dict& parts) {
    const int64_t hidden = encoder_.hidden;
    kmq::cpu::EncoderLayer made{};
    const auto qkv = parts["qkv"].cast<std::vector<pybind11::dict>>();
    TORCH_CHECK(qkv.size() == 1 || qkv.size() == 3, "qkv: does not fit");
    for (const auto& one : qkv) made.qkv.push_back(weight(one, hidden, qkv.size() == 1 ? 3 * hidden : hidden));
    const int64_t middle = parts["middle"].cast<int64_t>();
    made.out = weight(parts["out"], hidden, hidden);
    made.up = weight(parts["up"], hidden, middle * (encoder_.gated ? 2 : 1));
    made.down = weight(parts["down"], middle, hidden);
    made.attention_norm = norm(parts["attention_norm"], hidden);
    made.output_norm = norm(parts["output_norm"], hidden);
    if (const auto rotary = parts["rotary"].cast<std::optional<Tensor>>()) {
      made.rotary_length = rotary->size(0);
      made.rotary = floats(*rotary, made.rotary_length * (hidden / encoder_.heads));
    }
    made.window = parts["window"].cast<int64_t>();
    return made;
  }

  kmq::cpu::Encoder encoder_{};
  std::vector<Tensor> kept_;
  std::vector<std::unique_ptr<HeldWeight>> weights_;
};

#ifdef KMQ_CUDA

Tensor codebook_grad_cuda(const Tensor& grad_in, const Tensor& packed_in, int64_t num_codebooks, int64_t num_centroids,
                          int64_t group_rows) {
  const c10::cuda::CUDAGuard guard(grad_in.device());
  const Tensor grad = grad_in.contiguous();
  Tensor packed = packed_in.contiguous();
  if (reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16) packed = packed.clone();
  const kmq::Packed matrix = packed_of(packed, grad.size(1), num_centroids);
  check_groups(matrix.rows, num_codebooks, group_rows);
  TORCH_CHECK(grad.dim() == 2 && grad.size(0) == matrix.rows && packed.device() == grad.device(), "grad: does not fit");
  Tensor out = at::empty({num_codebooks, num_centroids}, grad.options().dtype(wide(grad.scalar_type())));
  Tensor workspace = at::empty({kmq::cuda::codebook_grad_workspace(matrix, num_codebooks, group_rows)}, grad.options().dtype(at::kDouble));
  kmq::cuda::codebook_grad(grad.const_data_ptr(), dtype_of(grad), matrix, num_codebooks, group_rows,
                           workspace.mutable_data_ptr<double>(), out.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

#endif

pybind11::dict build_facts() {
  pybind11::dict facts;
  facts["cpu_path"] = kmq::cpu::path();
  facts["compiler"] = __VERSION__;
  facts["torch"] = TORCH_VERSION;
#ifdef KMQ_CUDA
  facts["cuda"] = KMQ_CUDA;
#else
  facts["cuda"] = pybind11::none();
#endif
  return facts;
}

}  // namespace

TORCH_LIBRARY_IMPL(kmq, CPU, m) {
  m.impl("pack", &pack);
  m.impl("unpack", &unpack);
  m.impl("dequantize", &dequantize);
  m.impl("codebook_linear", &codebook_linear);
  m.impl("codebook_linear_input_grad", &codebook_linear_input_grad);
  m.impl("int8_codebook", &int8_codebook);
  m.impl("int8_linear", &int8_linear);
  m.impl("codebook_embedding", &codebook_embedding);
  m.impl("assign", &assign);
  m.impl("update", &update);
  m.impl("kmeans", &kmeans);
  m.impl("codebook_grad", &codebook_grad);
  m.impl("codebook_linear_grad", &codebook_linear_grad);
  m.impl("codebook_embedding_grad", &codebook_embedding_grad);
}

#ifdef KMQ_CUDA
TORCH_LIBRARY_IMPL(kmq, CUDA, m) { m.impl("codebook_grad", &codebook_grad_cuda); }
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of kmq_kernels; importing it registers them with torch's dispatcher.";
  pybind11::class_<HeldEncoder>(m, "Encoder", "A whole encoder with its weights, run in one call; see layers/encoder.py.")
      .def(pybind11::init<pybind11::dict>())
      .def("run", &HeldEncoder::run);
  m.def("build_facts", &build_facts, "The instruction set in use, the compiler, torch and CUDA versions of the build.");
}
