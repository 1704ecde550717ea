// A whole encoder in one call.
//
// Places without a token are left out at the start, so that nothing below knows of padding: states are [tokens, hidden]. Texts are
// dealt out in shares of about kShareTokens tokens, one thread to a share, which then needs no other until the end; where the texts
// are too few or too unlike for that, all threads work on one share together, step by step.
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "../linear/int8.h"
#include "attention.h"

namespace kmq::cpu {
namespace {

constexpr int64_t kShareTokens = 512;
constexpr double kUneven = 1.15;  // the most that the busiest thread may have more than the mean
constexpr int64_t kGrainFloats = 1 << 14;  // of a step that reads and writes its rows once, worth a thread

struct Text {
  int64_t begin, count;  // of its tokens among all
};

// All tokens of the input.
struct Tokens {
  std::vector<int64_t> source;            // place in the input, flat
  std::vector<int64_t> place;             // in the text
  std::vector<std::vector<int64_t>> ids;  // of each embedding
  std::vector<Text> texts;
};

[[noreturn]] void out_of_range(const char* what, int64_t limit, int64_t got) {
  throw std::out_of_range(std::string(what) + ": expected values in [0, " + std::to_string(limit) + "), got " + std::to_string(got));
}

Tokens tokens_of(const Encoder& encoder, const EncoderInput& input) {
  Tokens tokens;
  tokens.ids.resize(encoder.embeddings.size());
  int64_t reach = encoder.relative_bias ? encoder.reach + 1 : input.length;
  for (const EncoderLayer& layer : encoder.layers)
    if (layer.rotary) reach = std::min(reach, layer.rotary_length);
  if (input.length > reach) out_of_range("length", reach + 1, input.length);
  for (int64_t b = 0; b < input.batch; ++b) {
    const int64_t begin = static_cast<int64_t>(tokens.source.size());
    int64_t counted = 0;
    for (int64_t l = 0; l < input.length; ++l) {
      const int64_t at = b * input.length + l, first = input.ids[0] ? input.ids[0][at] : 0;
      counted += first != encoder.padding;
      if (input.mask && !input.mask[at]) continue;
      tokens.source.push_back(at);
      tokens.place.push_back(l);
      for (size_t e = 0; e < encoder.embeddings.size(); ++e) {
        int64_t id = 0;
        if (input.ids[e]) id = input.ids[e][at];
        else if (encoder.ids[e] == TokenIds::columns) id = l;
        else if (encoder.ids[e] == TokenIds::counted) id = encoder.padding + (first != encoder.padding ? counted : 0);
        if (id < 0 || id >= encoder.embeddings[e].rows) out_of_range("ids", encoder.embeddings[e].rows, id);
        tokens.ids[e].push_back(id);
      }
    }
    tokens.texts.push_back({begin, static_cast<int64_t>(tokens.source.size()) - begin});
  }
  return tokens;
}

// Row ids[i] of the table to out [count, cols].
void look_up(const EmbeddingTable& table, const int64_t* ids, int64_t count, float* out, const Parallel& parallel) {
  const int64_t cols = table.cols;
  if (table.dense) {
    for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * cols, table.dense + ids[i] * cols, cols * sizeof(float));
    return;
  }
  codebook_embedding(ids, count, table.packed, table.codebook, Dtype::f32, table.group_rows, out, parallel);
  for (int64_t i = 0; i < count && table.row_scale; ++i)
    for (int64_t c = 0; c < cols; ++c) out[i * cols + c] *= table.row_scale[ids[i]];
  const int32_t *begin = table.outlier_index, *end = begin + table.outliers;
  for (int64_t i = 0; i < count && table.outliers; ++i) {
    const int32_t* at = std::lower_bound(begin, end, ids[i] * cols, [](int32_t a, int64_t b) { return a < b; });
    for (; at != end && *at < (ids[i] + 1) * cols; ++at) out[i * cols + *at % cols] = table.outlier_values[at - begin];
  }
}

// In fp32, what codebook_linear leaves to do.
void finish(const LinearWeight& weight, Activation activation, const float* input, int64_t begin, int64_t end, float* out) {
  const int64_t rows = weight.packed.rows, cols = weight.packed.cols;
  const bool plain = !weight.row_scale && !weight.outliers;
  for (int64_t m = begin; m < end; ++m) {
    float* const to = out + m * rows;
    for (int64_t r = 0; r < rows && weight.row_scale; ++r) to[r] *= weight.row_scale[r];
    for (int64_t i = 0; i < weight.outliers; ++i)
      to[weight.outlier_index[i] / cols] += input[m * cols + weight.outlier_index[i] % cols] * weight.outlier_delta[i];
    for (int64_t r = 0; r < rows && !plain && weight.bias; ++r) to[r] += weight.bias[r];
    activate(activation, to, rows);
  }
}

struct Target {
  const LinearWeight* weight;
  float* out;  // [tokens, weight rows]
};

// One share: its tokens, and the memory for their states.
class Share {
 public:
  Share(const Encoder& encoder, const Tokens& tokens, std::vector<int64_t> texts, const Parallel& parallel)
      : encoder_(encoder), tokens_(tokens), texts_(std::move(texts)), parallel_(parallel) {
    for (const int64_t t : texts_) count_ += tokens.texts[t].count;
    int64_t widest = encoder.hidden, middle = 0, bytes = 0;
    const auto see = [&](const LinearWeight& weight) {
      bytes = std::max(bytes, int8_stride(weight.packed.cols));
      widest = std::max(widest, weight.packed.cols);
    };
    for (const EmbeddingTable& table : encoder.embeddings) widest = std::max(widest, table.cols);
    if (encoder.projection.packed.rows) see(encoder.projection);
    for (const EncoderLayer& layer : encoder.layers) {
      for (const LinearWeight& weight : layer.qkv) see(weight);
      for (const LinearWeight* weight : {&layer.out, &layer.up, &layer.down}) see(*weight);
      middle = std::max(middle, layer.up.packed.rows);
    }
    const int64_t states = std::max(encoder.hidden, widest);
    memory_ = scratch(count_ * (4 * states + std::max(middle, 3 * encoder.hidden) + kInt8RowFloats) + ceil_div(count_ * bytes, 4) + 64);
    states_ = memory_.get();
    other_ = states_ + count_ * states;
    context_ = other_ + count_ * states;
    normed_ = context_ + count_ * states;
    middle_ = normed_ + count_ * states;
    quantized_rows_ = reinterpret_cast<Int8Row*>(middle_ + count_ * std::max(middle, 3 * encoder.hidden));
    quantized_ = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<intptr_t>(quantized_rows_ + count_), 64));
  }

  void run(float* out) {
    embed();
    for (const int64_t i : encoder_.order) layer(encoder_.layers[i]);
    if (encoder_.final_norm.weight) norm(states_, nullptr, encoder_.final_norm, encoder_.hidden, states_);
    int64_t at = 0;
    for (const int64_t t : texts_)
      for (int64_t i = 0; i < tokens_.texts[t].count; ++i, ++at)
        std::memcpy(out + tokens_.source[tokens_.texts[t].begin + i] * encoder_.hidden, states_ + at * encoder_.hidden,
                    encoder_.hidden * sizeof(float));
  }

 private:
  template <typename F>
  void rows(int64_t width, const F& f) {
    parallel_(count_, ceil_div(kGrainFloats, width), f);
  }

  void norm(const float* x, const float* add, const Norm& norm, int64_t width, float* to) {
    rows(width, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) normalize(x + m * width, add ? add + m * width : nullptr, width, norm, to + m * width);
    });
  }

  void embed() {
    const int64_t width = encoder_.embeddings[0].cols;
    float* const sum = encoder_.projection.packed.rows ? context_ : states_;
    for (size_t e = 0; e < encoder_.embeddings.size(); ++e) {
      std::vector<int64_t> ids;
      for (const int64_t t : texts_) {
        const auto first = tokens_.ids[e].begin() + tokens_.texts[t].begin;
        ids.insert(ids.end(), first, first + tokens_.texts[t].count);
      }
      look_up(encoder_.embeddings[e], ids.data(), count_, e ? other_ : sum, parallel_);
      if (e) norm(sum, other_, Norm{}, width, sum);
    }
    norm(sum, nullptr, encoder_.embedding_norm, width, sum);
    if (encoder_.projection.packed.rows) multiply(sum, {{&encoder_.projection, states_}}, Activation::none);
  }

  // input [tokens, cols of the weights] times each weight.
  void multiply(const float* input, const std::vector<Target>& targets, Activation activation) {
    std::vector<Int8Product<float>> products;
    for (const Target& target : targets)
      if (target.weight->table) products.push_back({target.weight, target.out, target.weight->packed.rows, activation});
    if (!products.empty()) {
      const int64_t cols = products[0].weight->packed.cols;
      const Int8Input quantized{quantized_, quantized_rows_, count_, cols};
      rows(cols, [&](int64_t begin, int64_t end) { int8_quantize(input, cols, begin, end, quantized); });
      int8_multiply<float, float>(quantized, input, products, parallel_);
    }
    for (const Target& target : targets) {
      const LinearWeight& weight = *target.weight;
      if (weight.table) continue;
      const bool plain = !weight.row_scale && !weight.outliers;
      codebook_linear(input, Dtype::f32, count_, weight.packed, weight.codebook, weight.group_rows, plain ? weight.bias : nullptr, target.out,
                      parallel_);
      if (plain && activation == Activation::none) continue;
      rows(weight.packed.rows, [&](int64_t begin, int64_t end) { finish(weight, activation, input, begin, end, target.out); });
    }
  }

  void layer(const EncoderLayer& layer) {
    const int64_t hidden = encoder_.hidden;
    const float* input = states_;
    if (encoder_.norm_first) {
      norm(states_, nullptr, layer.attention_norm, hidden, normed_);
      input = normed_;
    }
    attention(layer, input);
    multiply(context_, {{&layer.out, other_}}, Activation::none);
    if (encoder_.norm_first) {
      norm(states_, other_, Norm{}, hidden, states_);
      norm(states_, nullptr, layer.output_norm, hidden, normed_);
    } else {
      norm(states_, other_, layer.attention_norm, hidden, states_);
    }
    multiply(encoder_.norm_first ? normed_ : states_, {{&layer.up, middle_}}, encoder_.gated ? Activation::none : encoder_.activation);
    if (encoder_.gated) gate(layer.up.packed.rows / 2);
    multiply(middle_, {{&layer.down, other_}}, Activation::none);
    norm(states_, other_, encoder_.norm_first ? Norm{} : layer.output_norm, hidden, states_);
  }

  // middle [tokens, 2 * width] to activation(first half) * second half, [tokens, width]. In place, one row after the other.
  void gate(int64_t width) {
    for (int64_t m = 0; m < count_; ++m) {
      float *const from = middle_ + m * 2 * width, *const to = middle_ + m * width;
      activate(encoder_.activation, from, width);
      for (int64_t c = 0; c < width; ++c) to[c] = from[c] * from[width + c];
    }
  }

  void attention(const EncoderLayer& layer, const float* input) {
    const int64_t hidden = encoder_.hidden, dim = hidden / encoder_.heads;
    float *query = middle_, *key, *value;
    int64_t ld = hidden;
    if (layer.qkv.size() == 1) {
      multiply(input, {{&layer.qkv[0], middle_}}, Activation::none);
      key = query + hidden, value = key + hidden, ld = 3 * hidden;
    } else {
      key = query + count_ * hidden, value = key + count_ * hidden;
      multiply(input, {{&layer.qkv[0], query}, {&layer.qkv[1], key}, {&layer.qkv[2], value}}, Activation::none);
    }
    int64_t longest = 0, scores = 0, first = 0;
    std::vector<int64_t> begins;
    for (const int64_t t : texts_) {
      const int64_t count = tokens_.texts[t].count;
      begins.push_back(first);
      first += count;
      longest = std::max(longest, count);
      scores += count * count;
    }
    if (layer.rotary)
      rows(2 * hidden, [&](int64_t begin, int64_t end) { rotate(layer, begin, end, query, key, ld); });
    const int64_t heads = encoder_.heads, units = heads * static_cast<int64_t>(texts_.size());
    const int64_t work = std::max<int64_t>(1, (scores * dim * 2 + scores * 16) / std::max<int64_t>(1, static_cast<int64_t>(texts_.size())));
    parallel_(units, ceil_div(1 << 18, work), [&](int64_t begin, int64_t end) {
      with_gemm([&](auto path) {
        using Gemm = decltype(path);
        const Scratch owned = scratch(attention_scratch<Gemm>(longest, dim));
        for (int64_t unit = begin; unit < end; ++unit) {
          const Text& text = tokens_.texts[texts_[unit / heads]];
          if (text.count == 0) continue;
          const int64_t h = unit % heads, at = begins[unit / heads];
          Head head{query + at * ld + h * dim, key + at * ld + h * dim, value + at * ld + h * dim, ld, text.count, dim,
                    1.0f / std::sqrt(float(dim)), tokens_.place.data() + text.begin,
                    encoder_.relative_bias ? encoder_.relative_bias + h * (2 * encoder_.reach + 1) : nullptr, encoder_.reach, layer.window,
                    context_ + at * hidden + h * dim, hidden};
          attend<Gemm>(head, owned.get());
        }
      });
    });
  }

  // Turns pairs (c, c + half) of every head of query and key by the angles of the token's place.
  void rotate(const EncoderLayer& layer, int64_t begin, int64_t end, float* query, float* key, int64_t ld) {
    const int64_t dim = encoder_.hidden / encoder_.heads, half = dim / 2;
    int64_t at = 0;
    for (const int64_t t : texts_)
      for (int64_t i = 0; i < tokens_.texts[t].count; ++i, ++at) {
        if (at < begin || at >= end) continue;
        const float *const cosine = layer.rotary + tokens_.place[tokens_.texts[t].begin + i] * dim, *const sine = cosine + half;
        for (float* row : {query + at * ld, key + at * ld})
          for (int64_t h = 0; h < encoder_.heads; ++h, row += dim)
            for (int64_t c = 0; c < half; ++c) {
              const float a = row[c], b = row[c + half];
              row[c] = a * cosine[c] - b * sine[c];
              row[c + half] = b * cosine[c] + a * sine[c];
            }
      }
  }

  const Encoder& encoder_;
  const Tokens& tokens_;
  std::vector<int64_t> texts_;
  const Parallel& parallel_;
  int64_t count_ = 0;
  Scratch memory_;
  float *states_, *other_, *context_, *normed_, *middle_;
  Int8Row* quantized_rows_;
  uint8_t* quantized_;
};

// Shares of texts, the largest text first and always to the smallest share; empty where the threads would be too unevenly busy.
std::vector<std::vector<int64_t>> shares_of(const std::vector<Text>& texts, int64_t total, int threads) {
  const int64_t count = threads * std::max<int64_t>(1, ceil_div(total, threads * kShareTokens));
  std::vector<int64_t> order(texts.size()), load(count, 0);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return texts[a].count > texts[b].count; });
  std::vector<std::vector<int64_t>> shares(count);
  for (const int64_t t : order) {
    if (texts[t].count == 0) continue;
    const int64_t least = std::min_element(load.begin(), load.end()) - load.begin();
    shares[least].push_back(t);
    load[least] += texts[t].count;
  }
  const int64_t each = count / threads;
  for (int64_t begin = 0; begin < count; begin += each) {
    const int64_t busy = std::accumulate(load.begin() + begin, load.begin() + begin + each, int64_t(0));
    if (threads > 1 && double(busy) * threads > kUneven * double(total)) return {};
  }
  return shares;
}

}  // namespace

void encode(const Encoder& encoder, const EncoderInput& input, float* out, int threads, const Parallel& parallel) {
  const Tokens tokens = tokens_of(encoder, input);
  const int64_t total = static_cast<int64_t>(tokens.source.size()), places = input.batch * input.length, hidden = encoder.hidden;
  if (total < places)
    for (int64_t at = 0; at < places; ++at)
      if (!input.mask[at]) std::memset(out + at * hidden, 0, hidden * sizeof(float));
  if (total == 0) return;
  const std::vector<std::vector<int64_t>> shares = shares_of(tokens.texts, total, threads);
  if (shares.empty()) {
    std::vector<int64_t> all;
    for (size_t t = 0; t < tokens.texts.size(); ++t)
      if (tokens.texts[t].count) all.push_back(static_cast<int64_t>(t));
    Share(encoder, tokens, all, parallel).run(out);
    return;
  }
  const Parallel alone = [](int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
    if (n > 0) body(0, n);
  };
  parallel(static_cast<int64_t>(shares.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      if (!shares[s].empty()) Share(encoder, tokens, shares[s], alone).run(out);
  });
}

}  // namespace kmq::cpu
