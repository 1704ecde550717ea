// Every allocation of every kernel fails once: the n-th one throws std::bad_alloc, for each n until a call succeeds.
//
// The exception must come out of the call, on whatever thread it was thrown; nothing may be lost; and the same call, made again on
// the same threads, must give the same bits as in a process in which nothing ever failed.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <string>

#include "driver.h"

namespace {

std::atomic<int64_t> to_failure{0};  // allocations until one fails; 0 and below: none does
std::atomic<int64_t> alive{0};
std::atomic<bool> failed{false};
thread_local bool counted = false;  // whether this thread is inside a kernel

void* allocate(size_t size, size_t alignment) {
  if (counted && to_failure > 0 && --to_failure == 0) {
    failed = true;
    throw std::bad_alloc();
  }
  void* out = alignment <= alignof(std::max_align_t) ? std::malloc(size) : std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  if (!out) throw std::bad_alloc();
  ++alive;
  return out;
}

void release(void* p) {
  if (p) --alive;
  std::free(p);
}

}  // namespace

void* operator new(size_t size) { return allocate(size, 0); }
void* operator new[](size_t size) { return allocate(size, 0); }
void* operator new(size_t size, std::align_val_t alignment) { return allocate(size, static_cast<size_t>(alignment)); }
void* operator new[](size_t size, std::align_val_t alignment) { return allocate(size, static_cast<size_t>(alignment)); }
void* operator new(size_t size, const std::nothrow_t&) noexcept try { return allocate(size, 0); } catch (...) { return nullptr; }
void* operator new[](size_t size, const std::nothrow_t&) noexcept try { return allocate(size, 0); } catch (...) { return nullptr; }
void operator delete(void* p) noexcept { release(p); }
void operator delete[](void* p) noexcept { release(p); }
void operator delete(void* p, size_t) noexcept { release(p); }
void operator delete[](void* p, size_t) noexcept { release(p); }
void operator delete(void* p, std::align_val_t) noexcept { release(p); }
void operator delete[](void* p, std::align_val_t) noexcept { release(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { release(p); }
void operator delete[](void* p, size_t, std::align_val_t) noexcept { release(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { release(p); }
void operator delete[](void* p, const std::nothrow_t&) noexcept { release(p); }

namespace {

// As at::parallel_for: the first exception of any thread is thrown again in the calling one.
void on_threads(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  const bool inside = counted;
  counted = false;
  const int64_t step = std::max(grain, (n + 2) / 3);
  std::exception_ptr thrown;
  std::atomic_flag taken;
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < n; begin += step)
    threads.emplace_back([&, begin] {
      counted = inside;
      try {
        body(begin, std::min(n, begin + step));
      } catch (...) {
        counted = false;
        if (!taken.test_and_set()) thrown = std::current_exception();
      }
      counted = false;
    });
  for (std::thread& thread : threads) thread.join();
  counted = inside;
  if (thrown) std::rethrow_exception(thrown);
}

void in_one_piece(int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  if (n > 0) body(0, n);
}

struct Case {
  std::string name;
  std::function<void(const kmq::Parallel&)> call;
  std::vector<std::pair<void*, size_t>> outputs;  // and their bytes
};

uint64_t digest(const Case& one) {
  uint64_t hash = 14695981039346656037ull;
  for (const auto& [data, bytes] : one.outputs)
    for (size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211ull;
  return hash;
}

void poison(const Case& one) {
  for (const auto& [data, bytes] : one.outputs) std::memset(data, 0x5a, bytes);
}

// Whether a call in which the n-th allocation fails throws.
bool throws(const Case& one, const kmq::Parallel& parallel, int64_t n) {
  poison(one);
  failed = false;
  to_failure = n;
  counted = true;
  bool out = false;
  try {
    one.call(parallel);
  } catch (const std::bad_alloc&) {
    out = true;
  }
  counted = false;
  to_failure = 0;
  return out;
}

// Threads that end give back what they keep: each attempt has a thread of its own.
template <typename F>
void on_a_thread(const F& f) {
  std::thread(f).join();
}

template <typename T>
std::pair<void*, size_t> out(std::vector<T>& values) { return {values.data(), values.size() * sizeof(T)}; }

std::vector<Case> cases() {
  using namespace kmq;
  static std::mt19937 random(1);
  static std::normal_distribution<float> normal;
  static std::vector<std::function<void()>> kept;  // owners of what the cases point to
  std::vector<Case> all;
  const auto hold = [](auto owned) { kept.push_back([owned] {}); };
  const auto floats = [&](int64_t n) {
    auto values = std::make_shared<std::vector<float>>(n);
    for (float& x : *values) x = normal(random);
    hold(values);
    return values->data();
  };
  const auto room = [&](int64_t bytes) {
    auto values = std::make_shared<std::vector<uint8_t>>(bytes);
    hold(values);
    return values->data();
  };
  struct Shape { int64_t rows, cols, group_rows; int bits; };
  for (const Shape& shape : {Shape{70, 300, 70, 4}, Shape{33, 129, 8, 3}, Shape{65, 256, 65, 8}}) {
    const int64_t K = int64_t(1) << shape.bits, books = (shape.rows + shape.group_rows - 1) / shape.group_rows;
    const int64_t numel = shape.rows * shape.cols;
    uint8_t* const assignments = room(numel);
    for (int64_t i = 0; i < numel; ++i) assignments[i] = static_cast<uint8_t>(random() % K);
    const Packed layout{nullptr, shape.rows, shape.cols, shape.bits};
    uint8_t *const bytes = room(shape.rows * layout.row_bytes()), *const back = room(numel), *const again = room(shape.rows * layout.row_bytes());
    cpu::pack(assignments, shape.rows, shape.cols, shape.bits, bytes, in_one_piece);
    const Packed packed{bytes, shape.rows, shape.cols, shape.bits};
    const float* const codebook = floats(books * K);
    const std::string of = " of " + std::to_string(shape.bits) + " bits";
    all.push_back({"pack" + of, [=](const Parallel& p) { cpu::pack(assignments, shape.rows, shape.cols, shape.bits, again, p); },
                   {{again, shape.rows * layout.row_bytes()}}});
    all.push_back({"unpack" + of, [=](const Parallel& p) { cpu::unpack(packed, back, p); }, {{back, size_t(numel)}}});
    uint8_t* const weight = room(numel * 4);
    all.push_back({"dequantize" + of, [=](const Parallel& p) { cpu::dequantize(packed, codebook, Dtype::f32, shape.group_rows, weight, p); },
                   {{weight, size_t(numel) * 4}}});
    auto ids = std::make_shared<std::vector<int64_t>>(50);
    for (int64_t& id : *ids) id = static_cast<int64_t>(random() % shape.rows);
    uint8_t* const rows = room(50 * shape.cols * 4);
    all.push_back({"codebook_embedding" + of,
                   [=](const Parallel& p) { cpu::codebook_embedding(ids->data(), 50, packed, codebook, Dtype::f32, shape.group_rows, rows, p); },
                   {{rows, size_t(50 * shape.cols * 4)}}});
    const float* const embedded_grad = floats(50 * shape.cols);
    uint8_t* const sums = room(books * K * 4);
    const std::pair<void*, size_t> book_sums{sums, size_t(books * K * 4)};
    all.push_back({"codebook_embedding_grad" + of,
                   [=](const Parallel& p) {
                     cpu::codebook_embedding_grad(embedded_grad, Dtype::f32, ids->data(), 50, packed, books, shape.group_rows, 3, sums, p);
                   },
                   {book_sums}});
    const float* const weight_grad = floats(numel);
    all.push_back({"codebook_grad" + of,
                   [=](const Parallel& p) { cpu::codebook_grad(weight_grad, Dtype::f32, packed, books, shape.group_rows, sums, p); },
                   {book_sums}});
    for (const int64_t M : {1, 3, 12, 24, 50, 1100}) {  // fused, turned, few rows, panels, more than a strip
      const float *const input = floats(M * shape.cols), *const grad = floats(M * shape.rows), *const bias = floats(shape.rows);
      for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
        const int64_t size = dtype == Dtype::f32 ? 4 : 2;
        // The halves of floats: any of them is a 16-bit float, some of them Inf or NaN.
        uint8_t *const output = room(M * shape.rows * size), *const input_grad = room(M * shape.cols * size);
        const std::string rows_of = of + ", " + std::to_string(M) + " rows of " + std::to_string(size) + " bytes";
        all.push_back({"codebook_linear" + rows_of,
                       [=](const Parallel& p) { cpu::codebook_linear(input, dtype, M, packed, codebook, shape.group_rows, bias, output, p); },
                       {{output, size_t(M * shape.rows * size)}}});
        all.push_back({"codebook_linear_input_grad" + rows_of,
                       [=](const Parallel& p) { cpu::codebook_linear_input_grad(grad, dtype, M, packed, codebook, shape.group_rows, input_grad, p); },
                       {{input_grad, size_t(M * shape.cols * size)}}});
      }
      all.push_back({"codebook_linear_grad" + of + ", " + std::to_string(M) + " rows",
                     [=](const Parallel& p) { cpu::codebook_linear_grad(grad, input, Dtype::f32, M, packed, books, shape.group_rows, sums, p); },
                     {book_sums}});
    }
  }

  // Integers, and a whole encoder: two layers of it in integers, two in fp32, of texts that are shared out and of one that is not.
  struct Layer { Packed packed; const float* codebook; int8_t* table; float* scale; int32_t* offset; };
  const auto layer_of = [&](int64_t rows, int64_t cols) {
    const Packed layout{nullptr, rows, cols, 4};
    uint8_t *const indices = room(rows * cols), *const bytes = room(rows * layout.row_bytes());
    for (int64_t i = 0; i < rows * cols; ++i) indices[i] = static_cast<uint8_t>(random() % 16);
    cpu::pack(indices, rows, cols, 4, bytes, in_one_piece);
    Layer layer{{bytes, rows, cols, 4}, floats(16), reinterpret_cast<int8_t*>(room(16)), reinterpret_cast<float*>(room(4 * rows)),
                reinterpret_cast<int32_t*>(room(4 * rows))};
    cpu::int8_codebook(layer.packed, layer.codebook, rows, layer.table, layer.scale, layer.offset, in_one_piece);
    for (int64_t r = 1; r < rows; ++r) layer.scale[r] = layer.scale[0];
    return layer;
  };
  const auto weight_of = [&](const Layer& layer, bool integers) {
    return cpu::LinearWeight{layer.packed, layer.packed.rows, layer.codebook, integers ? layer.table : nullptr, layer.scale, layer.offset,
                             nullptr, nullptr, nullptr, nullptr, 0};
  };
  const Layer wide_layer = layer_of(96, 200);
  uint8_t* const integer_table = room(16 + 4 + 4 * 96);
  all.push_back({"int8_codebook",
                 [=](const Parallel& p) {
                   cpu::int8_codebook(wide_layer.packed, wide_layer.codebook, 96, reinterpret_cast<int8_t*>(integer_table),
                                      reinterpret_cast<float*>(integer_table + 16), reinterpret_cast<int32_t*>(integer_table + 20), p);
                 },
                 {{integer_table, 20 + 4 * 96}}});
  for (const int64_t M : {1, 40}) {
    const float* const input = floats(M * 200);
    uint8_t* const output = room(M * 96 * 4);
    const cpu::LinearWeight weight = weight_of(wide_layer, true);
    all.push_back({"int8_linear, " + std::to_string(M) + " rows",
                   [=](const Parallel& p) { cpu::int8_linear(input, Dtype::f32, M, weight, cpu::Activation::gelu, output, p); },
                   {{output, size_t(M * 96 * 4)}}});
  }
  const int64_t hidden = 32, length = 24;
  const float* const norm_weight = floats(hidden);
  auto encoder = std::make_shared<cpu::Encoder>();
  encoder->hidden = hidden;
  encoder->heads = 4;
  encoder->activation = cpu::Activation::gelu;
  encoder->norm_first = encoder->gated = false;
  encoder->embeddings = {{floats(50 * hidden), Packed{nullptr, 50, hidden, 4}, 50, nullptr, nullptr, nullptr, nullptr, 0, 50, hidden},
                         {floats(length * hidden), Packed{nullptr, length, hidden, 4}, length, nullptr, nullptr, nullptr, nullptr, 0, length, hidden}};
  encoder->ids = {cpu::TokenIds::given, cpu::TokenIds::columns};
  encoder->padding = 0;
  encoder->embedding_norm = {norm_weight, nullptr, 1e-5f};
  encoder->projection = {};
  for (const bool integers : {true, false}) {
    cpu::EncoderLayer layer{};
    for (int i = 0; i < 3; ++i) layer.qkv.push_back(weight_of(layer_of(hidden, hidden), integers));
    layer.out = weight_of(layer_of(hidden, hidden), integers);
    layer.up = weight_of(layer_of(4 * hidden, hidden), integers);
    layer.down = weight_of(layer_of(hidden, 4 * hidden), integers);
    layer.attention_norm = layer.output_norm = {norm_weight, nullptr, 1e-5f};
    encoder->layers.push_back(layer);
  }
  encoder->order = {0, 1, 0, 1};
  encoder->final_norm = {};
  encoder->relative_bias = nullptr;
  encoder->reach = 0;
  for (const int64_t texts : {1, 6}) {
    auto ids = std::make_shared<std::vector<int64_t>>(texts * length);
    for (int64_t& id : *ids) id = static_cast<int64_t>(random() % 50);
    uint8_t *const mask = room(texts * length), *const states = room(texts * length * hidden * 4);
    for (int64_t i = 0; i < texts * length; ++i) mask[i] = i % length < 20;
    all.push_back({"encode, " + std::to_string(texts) + " texts",
                   [=](const Parallel& p) {
                     cpu::encode(*encoder, {texts, length, {ids->data(), nullptr}, mask}, reinterpret_cast<float*>(states), 3, p);
                   },
                   {{states, size_t(texts * length * hidden * 4)}}});
  }

  const int64_t n = 40000;
  const float* const values = floats(n);
  auto wide = std::make_shared<std::vector<double>>(values, values + n);
  auto centroids = std::make_shared<std::vector<float>>(16);
  auto wide_centroids = std::make_shared<std::vector<double>>(16);
  for (int k = 0; k < 16; ++k) (*centroids)[k] = static_cast<float>((*wide_centroids)[k] = (k - 7.5) / 4);
  uint8_t* const labels = room(n);
  all.push_back({"assign", [=](const Parallel& p) { cpu::assign(values, Dtype::f32, centroids->data(), 2, n / 2, 8, labels, p); }, {{labels, size_t(n)}}});
  all.push_back({"assign of doubles", [=](const Parallel& p) { cpu::assign(wide->data(), Dtype::f64, wide_centroids->data(), 1, n, 16, labels, p); },
                 {{labels, size_t(n)}}});
  auto sums = std::make_shared<std::vector<double>>(16);
  uint8_t* const given = room(n);
  for (int64_t i = 0; i < n; ++i) given[i] = static_cast<uint8_t>(i % 8);
  all.push_back({"update", [=](const Parallel& p) { cpu::update(values, Dtype::f32, given, nullptr, Dtype::f32, 1, n, 8, sums->data(), sums->data() + 8, p); },
                 {out(*sums)}});

  // k-means: the shapes that take each of its ways. Weights of 30 decades are those that prefix sums do not resolve.
  const auto kmeans = [&](const char* name, const float* from, Dtype dtype, int64_t rows, int64_t cols, int64_t group_rows, int bits,
                          cpu::KmeansAlgorithm algorithm, cpu::KmeansInit init, const float* weight) {
    const int64_t K = int64_t(1) << bits, groups = (rows + group_rows - 1) / group_rows;
    const Packed layout{nullptr, rows, cols, bits};
    uint8_t *const packed = room(rows * layout.row_bytes()), *const books = room(groups * K * 4), *const facts = room(groups * 24);
    all.push_back({std::string("kmeans, ") + name + ", " + std::to_string(bits) + " bits",
                   [=](const Parallel& p) {
                     cpu::KmeansMatrix matrix{from, dtype, weight, rows, cols, group_rows, int(K), bits, packed, reinterpret_cast<float*>(books),
                                              reinterpret_cast<double*>(facts), reinterpret_cast<int64_t*>(facts + 8 * groups),
                                              reinterpret_cast<double*>(facts + 16 * groups), cpu::KmeansFault::none};
                     cpu::kmeans(&matrix, 1, {algorithm, init, 300, 0.0, 1}, p);
                     check(matrix.fault == cpu::KmeansFault::none, "a fault where there is none");
                   },
                   {{packed, size_t(rows * layout.row_bytes())}, {books, size_t(groups * K * 4)}, {facts, size_t(groups * 24)}}});
  };
  auto decades = std::make_shared<std::vector<float>>(n), decades_weight = std::make_shared<std::vector<float>>(n);
  for (int64_t i = 0; i < n; ++i) {
    (*decades)[i] = std::pow(10.0f, 5 * normal(random)) * (random() % 2 ? 1 : -1);
    (*decades_weight)[i] = 1 / std::fabs((*decades)[i]);
  }
  auto halves = std::make_shared<std::vector<uint16_t>>(n);
  for (int64_t i = 0; i < n; ++i) (*halves)[i] = static_cast<uint16_t>(0x3c00 + random() % 0x200 + (random() % 2 << 15));
  for (const auto& owned : {decades, decades_weight}) hold(owned);
  hold(halves);
  using enum cpu::KmeansAlgorithm;
  using cpu::KmeansInit::plus_plus;
  kmeans("rows", values, Dtype::f32, 40, 100, 1, 3, optimal, plus_plus, nullptr);
  kmeans("rows with weights", values, Dtype::f32, 40, 100, 4, 4, optimal, plus_plus, decades_weight->data());
  kmeans("large", values, Dtype::f32, 100, 400, 100, 2, optimal, plus_plus, nullptr);
  kmeans("large", values, Dtype::f32, 100, 400, 50, 8, optimal, plus_plus, nullptr);
  kmeans("large with weights", values, Dtype::f32, 100, 400, 100, 4, optimal, plus_plus, decades_weight->data());
  kmeans("decades", decades->data(), Dtype::f32, 50, 400, 50, 3, optimal, plus_plus, decades_weight->data());
  kmeans("halves", reinterpret_cast<const float*>(halves->data()), Dtype::f16, 100, 400, 100, 4, optimal, plus_plus, nullptr);
  kmeans("exact", values, Dtype::f32, 50, 400, 50, 4, exact, plus_plus, nullptr);
  kmeans("lloyd", values, Dtype::f32, 50, 400, 50, 4, lloyd, plus_plus, nullptr);
  kmeans("lloyd", values, Dtype::f32, 40, 100, 40, 4, lloyd, cpu::KmeansInit::random, nullptr);
  return all;
}

// What each case gives in a process in which nothing has failed.
std::vector<uint64_t> expected_digests(const std::vector<Case>& all) {
  int ends[2];
  check(pipe(ends) == 0, "pipe");
  const pid_t child = fork();
  if (child == 0) {
    for (const Case& one : all) {
      poison(one);
      one.call(in_one_piece);
      const uint64_t found = digest(one);
      check(write(ends[1], &found, sizeof found) == sizeof found, "write");
    }
    _exit(0);
  }
  close(ends[1]);
  std::vector<uint64_t> out(all.size());
  for (uint64_t& one : out) check(read(ends[0], &one, sizeof one) == sizeof one, "the child ended early");
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  check(status == 0, "the child failed");
  return out;
}

}  // namespace

int main() {
  if (!path_is_there()) return 0;
  const std::vector<Case> all = cases();
  const std::vector<uint64_t> expected = expected_digests(all);
  int64_t failures = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    const Case& one = all[i];
    const auto right = [&] {
      if (digest(one) == expected[i]) return;
      std::fprintf(stderr, "%s: another result after a failed allocation\n", one.name.c_str());
      std::abort();
    };
    // First without a success in between: what is made once in a process fails too.
    on_a_thread([&] {
      for (int64_t n = 1; throws(one, in_one_piece, n); ++n) ++failures;
      right();
    });
    for (const kmq::Parallel& parallel : {kmq::Parallel(in_one_piece), kmq::Parallel(on_threads)}) {
      bool reached = true;
      for (int64_t n = 1; reached; ++n) {
        const int64_t before = alive;
        on_a_thread([&] {
          const bool thrown = throws(one, parallel, n);
          reached = failed;
          failures += thrown;
          if (!thrown) right();  // some allocations can be done without
          check(!throws(one, parallel, 0), "bad_alloc where nothing failed");
          right();
        });
        if (alive != before) {
          std::fprintf(stderr, "%s: %ld allocations are lost when number %ld fails\n", one.name.c_str(), long(alive - before), long(n));
          std::abort();
        }
      }
    }
  }
  std::printf("%ld allocations of %zu calls failed on the %s path\n", static_cast<long>(failures), all.size(), kmq::cpu::path());
}
