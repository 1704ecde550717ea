// Tensors to pointers, registration with torch's dispatcher, and the Python module with its build facts.
// Arguments were checked, with sentences, in ops.py; here only what memory safety needs is checked again.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#ifdef KMQ_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
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
                           workspace.mutable_data_ptr<double>(), out.mutable_data_ptr(), at::cuda::getCurrentCUDAStream());
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
  m.impl("dequantize", &dequantize);
  m.impl("codebook_grad", &codebook_grad);
  m.impl("codebook_linear_grad", &codebook_linear_grad);
  m.impl("codebook_embedding_grad", &codebook_embedding_grad);
}

#ifdef KMQ_CUDA
TORCH_LIBRARY_IMPL(kmq, CUDA, m) { m.impl("codebook_grad", &codebook_grad_cuda); }
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of kmq_kernels; importing it registers them with torch's dispatcher.";
  m.def("build_facts", &build_facts, "The instruction set in use, the compiler, torch and CUDA versions of the build.");
}
