#include "kernels/call.hpp"

#include <algorithm>
#include <cstddef>

namespace orrery::kernels {
namespace {

constexpr std::int64_t kScaleAlignment = 4;  // of the pitch of blocks scales

constexpr std::int64_t tiles_of(std::int64_t elements) {
  return (elements + kTile - 1) / kTile;
}

double as_double(std::int64_t value) {
  return static_cast<double>(value);
}

enum class Access { read, write, update };

/// What a call touches, and how many bytes of it have to move once.
struct Operands {
  std::vector<Touch> touches;
  double bytes = 0;

  /// `rows` pieces of `row_bytes`, `pitch_bytes` from one to the next.
  void piece(const void* begin, std::int64_t rows, std::int64_t row_bytes, std::int64_t pitch_bytes,
             Access access) {
    scratch(begin, rows, row_bytes, pitch_bytes, access);
    if (begin == nullptr) return;
    bytes += as_double(rows) * as_double(row_bytes) * (access == Access::update ? 2 : 1);
  }

  /// Touched, but it would not have to be.
  void scratch(const void* begin, std::int64_t rows, std::int64_t row_bytes,
               std::int64_t pitch_bytes, Access access) {
    if (begin == nullptr || rows <= 0 || row_bytes <= 0) return;
    const bool written = access != Access::read;
    if (rows == 1 || pitch_bytes == row_bytes) {
      touches.push_back({begin, 1, rows * row_bytes, rows * row_bytes, written});
    } else {
      touches.push_back({begin, rows, row_bytes, pitch_bytes, written});
    }
  }

  template <class Element>
  void array(const Element* begin, std::int64_t elements, Access access) {
    const auto size = static_cast<std::int64_t>(sizeof(Element));
    piece(begin, 1, elements * size, elements * size, access);
  }

  void elements(const Matrix& m, Access access) {
    piece(m.data, m.rows, element_bytes(1, m.columns, m.format),
          element_bytes(1, m.pitch, m.format), access);
  }

  void scales(const Matrix& m, Access access) {
    constexpr auto kSize = static_cast<std::int64_t>(sizeof(float));
    if (m.data == nullptr || m.scaling == Scaling::none) return;
    const bool by_rows = m.scaling == Scaling::rows;
    piece(m.scales, tiles_of(by_rows ? m.columns : m.rows),
          (by_rows ? m.rows : tiles_of(m.columns)) * kSize, m.scale_pitch * kSize, access);
  }

  void matrix(const Matrix& m, Access access) {
    elements(m, access);
    scales(m, access);
  }

  /// Rows that are looked up: any of them can be touched, as many as `rows` are.
  void looked_up(const Matrix& m, std::int64_t rows, Access access) {
    const double before = bytes;
    matrix(m, access);
    bytes = before + (access == Access::update ? 2 : 1) * as_double(std::min(rows, m.rows)) *
                         as_double(element_bytes(1, m.columns, m.format));
  }

  /// `width` columns at offset + h * stride for all h < heads.
  void head_columns(const Matrix& m, std::int64_t heads, std::int64_t offset, std::int64_t stride,
                    std::int64_t width, Access access) {
    const auto in_bytes = [&](std::int64_t columns) { return element_bytes(1, columns, m.format); };
    const auto* begin = static_cast<const std::byte*>(m.data);
    if (begin == nullptr) return;
    if (stride == 0) heads = 1;
    if (heads == 1 || stride == width) {
      piece(begin + in_bytes(offset), m.rows, in_bytes(heads * width), in_bytes(m.pitch), access);
    } else if (m.pitch == heads * stride) {  // evenly spaced across rows too
      piece(begin + in_bytes(offset), m.rows * heads, in_bytes(width), in_bytes(stride), access);
    } else {
      for (std::int64_t h = 0; h < heads; ++h) {
        piece(begin + in_bytes(offset + h * stride), m.rows, in_bytes(width), in_bytes(m.pitch),
              access);
      }
    }
  }
};

// One list a Call: all that it reads and writes.

void list(const Gemm& c, Operands& o) {
  o.matrix(c.a, Access::read);
  o.matrix(c.b, Access::read);
  o.matrix(c.d, c.accumulate ? Access::update : Access::write);
  if (c.grouping == Grouping::none) return;
  o.array(c.group_begin, c.groups, Access::read);
  o.array(c.group_rows, c.groups, Access::read);
}

void list(const AttentionForward& c, Operands& o) {
  for (const Matrix* m : {&c.q, &c.k, &c.v}) o.matrix(*m, Access::read);
  o.matrix(c.out, Access::write);
  o.array(c.lse, c.shape.batch * c.shape.heads * c.shape.q_len, Access::write);
  o.array(c.shape.query_positions, c.shape.q_len, Access::read);
}

void list(const AttentionBackward& c, Operands& o) {
  for (const Matrix* m : {&c.q, &c.k, &c.v, &c.out, &c.d_out}) o.matrix(*m, Access::read);
  for (const Matrix* m : {&c.d_q, &c.d_k, &c.d_v}) o.matrix(*m, Access::write);
  o.array(c.lse, c.shape.batch * c.shape.heads * c.shape.q_len, Access::read);
  o.array(c.shape.query_positions, c.shape.q_len, Access::read);
  const std::int64_t workspace = attention_workspace_bytes(c.shape);
  o.scratch(c.workspace, 1, workspace, workspace, Access::write);
}

void list(const NormForward& c, Operands& o) {
  for (const Matrix& term : c.terms) o.matrix(term, Access::read);
  o.matrix(c.gain, Access::read);
  o.matrix(c.bias, Access::read);
  o.matrix(c.sum, Access::write);
  o.matrix(c.y, Access::write);
}

void list(const NormBackward& c, Operands& o) {
  for (const Matrix* m : {&c.d_y, &c.x, &c.gain, &c.add}) o.matrix(*m, Access::read);
  o.matrix(c.d_x, Access::write);
  const std::int64_t width = c.x.columns / std::max<std::int64_t>(c.segments, 1);
  o.array(c.d_gain, width, Access::update);
  o.array(c.d_bias, width, Access::update);
}

void list(const Rope& c, Operands& o) {
  o.head_columns(c.x, c.heads, c.offset, c.head_dim, c.dim, Access::update);
  o.array(c.positions, c.x.rows, Access::read);
}

void list(const HeadCopy& c, Operands& o) {
  o.head_columns(c.from, c.heads, c.from_offset, c.from_stride, c.width, Access::read);
  o.head_columns(c.to, c.sum_heads ? 1 : c.heads, c.to_offset, c.to_stride, c.width, Access::write);
}

void list(const ActivationForward& c, Operands& o) {
  o.matrix(c.in, Access::read);
  o.array(c.row_weight, c.in.rows, Access::read);
  o.array(c.used_rows, 1, Access::read);
  o.matrix(c.out, Access::write);
}

void list(const ActivationBackward& c, Operands& o) {
  o.matrix(c.in, Access::read);
  o.matrix(c.d_out, Access::read);
  o.array(c.row_weight, c.in.rows, Access::read);
  o.array(c.used_rows, 1, Access::read);
  o.matrix(c.d_in, Access::write);
  o.matrix(c.out_again, Access::write);
}

void list(const RowDot& c, Operands& o) {
  o.matrix(c.a, Access::read);
  o.matrix(c.b, Access::read);
  o.array(c.row_weight, c.a.rows, Access::read);
  o.array(c.used_rows, 1, Access::read);
  o.array(c.out, c.a.rows, Access::write);
}

/// Quantize, Dequantize, Transpose.
template <class Conversion>
void list_conversion(const Conversion& c, Operands& o) {
  o.matrix(c.from, Access::read);
  o.array(c.used_rows, 1, Access::read);
  o.matrix(c.to, Access::write);
}
void list(const Quantize& c, Operands& o) {
  list_conversion(c, o);
}
void list(const Dequantize& c, Operands& o) {
  list_conversion(c, o);
}
void list(const Transpose& c, Operands& o) {
  list_conversion(c, o);
}

void list(const Add& c, Operands& o) {
  for (const Matrix& term : c.terms) o.matrix(term, Access::read);
  o.matrix(c.out, Access::write);
}

void list(const Copy& c, Operands& o) {
  o.matrix(c.from, Access::read);
  o.matrix(c.to, Access::write);
}

void list(const Router& c, Operands& o) {
  const std::int64_t tokens = c.logits.rows;
  o.matrix(c.logits, Access::read);
  o.array(c.bias, c.logits.columns, Access::read);
  o.array(c.scores, tokens * c.logits.columns, Access::write);
  o.array(c.experts, tokens * c.top_k, Access::write);
  o.array(c.weights, tokens * c.top_k, Access::write);
}

void list(const RouterBackward& c, Operands& o) {
  const std::int64_t tokens = c.d_logits.rows;
  o.array(c.scores, tokens * c.d_logits.columns, Access::read);
  o.array(c.experts, tokens * c.top_k, Access::read);
  o.array(c.d_weights, tokens * c.top_k, Access::read);
  o.matrix(c.d_logits, Access::write);
}

void list(const RoutingMap& c, Operands& o) {
  const std::int64_t choices = c.max_tokens * c.top_k;
  o.array(c.experts, choices, Access::read);
  o.array(c.weights, choices, Access::read);
  o.array(c.tokens, 1, Access::read);
  o.array(c.group_begin, c.local_experts + 1, Access::write);
  o.array(c.group_rows, c.local_experts, Access::write);
  o.array(c.used_rows, 1, Access::write);
  o.array(c.row_source, c.capacity, Access::write);
  o.array(c.row_weight, c.capacity, Access::write);
  o.array(c.slot_row, choices, Access::write);
  o.array(c.overflow, 1, Access::write);
}

void list(const Permute& c, Operands& o) {
  o.matrix(c.from, Access::read);
  o.array(c.row_source, c.to.rows, Access::read);
  o.array(c.used_rows, 1, Access::read);
  o.matrix(c.to, Access::write);
}

void list(const Unpermute& c, Operands& o) {
  const std::int64_t slots = c.to.rows * c.top_k;
  o.matrix(c.from, Access::read);
  o.array(c.slot_row, slots, Access::read);
  o.array(c.tokens, 1, Access::read);
  o.array(c.row_values, c.from.rows, Access::read);
  o.matrix(c.to, Access::write);
  o.array(c.slot_values, slots, Access::write);
}

void list(const Embedding& c, Operands& o) {
  o.looked_up(c.table, c.out.rows, Access::read);
  o.array(c.tokens, c.out.rows, Access::read);
  o.matrix(c.out, Access::write);
}

void list(const EmbeddingBackward& c, Operands& o) {
  o.matrix(c.d_out, Access::read);
  o.array(c.tokens, c.d_out.rows, Access::read);
  o.looked_up(c.d_table, c.d_out.rows, Access::update);
}

void list(const CrossEntropyPartial& c, Operands& o) {
  o.matrix(c.logits, Access::read);
  o.array(c.targets, c.logits.rows, Access::read);
  o.array(c.partial, 3 * c.logits.rows, Access::write);
}

void list(const CrossEntropyLoss& c, Operands& o) {
  o.array(c.partials, 3 * c.parts * c.rows, Access::read);
  o.array(c.targets, c.rows, Access::read);
  o.array(c.lse, c.rows, Access::write);
  o.array(c.loss, 1, Access::update);
}

void list(const CrossEntropyBackward& c, Operands& o) {
  o.array(c.targets, c.logits.rows, Access::read);
  o.array(c.lse, c.logits.rows, Access::read);
  o.matrix(c.logits, Access::update);
}

void list(const AdamW& c, Operands& o) {
  const auto flat = [&](const void* begin, Format format, Access access) {
    const std::int64_t size = element_bytes(1, c.elements, format);
    o.piece(begin, 1, size, size, access);
  };
  o.array(c.gradient, c.elements, Access::read);
  o.array(c.scalars, 1, Access::read);
  o.array(c.square_sum, 1, Access::read);
  o.array(c.master, c.elements, Access::update);
  flat(c.first_moment, c.moments, Access::update);
  flat(c.second_moment, c.moments, Access::update);
  if (c.parameter != nullptr) flat(c.parameter, c.parameters, Access::write);
}

void list(const SquareSum& c, Operands& o) {
  o.array(c.values, c.elements, Access::read);
  o.array(c.out, 1, c.accumulate ? Access::update : Access::write);
}

void list(const Fill& c, Operands& o) {
  o.piece(c.data, 1, c.bytes, c.bytes, Access::write);
}

void list(const Loopback& c, Operands& o) {
  o.piece(c.from, 1, c.bytes, c.bytes, Access::read);
  o.piece(c.to, 1, c.bytes, c.bytes, Access::write);
}

// ---------------------------------------------------------------------------------------------

/// m, n and k over all groups: the split one is the sum of the groups'.
struct GemmSize {
  std::int64_t m, n, k;
};
GemmSize size_of(const Gemm& c) {
  const std::int64_t groups = std::max<std::int64_t>(c.groups, 1);
  const std::int64_t k = c.a_transposed ? c.a.rows : c.a.columns;
  return {.m = c.grouping == Grouping::contraction ? c.d.rows / groups : c.d.rows,
          .n = c.d.columns,
          .k = k};
}

/// Key-query pairs that are not masked, per (sequence, head); all where positions decide.
double attended_pairs(const AttentionShape& s) {
  const double queries = as_double(s.q_len);
  const double keys = as_double(s.kv_len);
  if (!s.causal || s.query_positions != nullptr) return queries * keys;
  // Queries that come before the first key see nothing.
  const double rows = std::min(queries, keys);
  return rows * (keys - rows) + rows * (rows + 1) / 2;
}

double attention_flops(const AttentionShape& s, std::int64_t depth) {
  return 2 * attended_pairs(s) * as_double(s.batch) * as_double(s.heads) * as_double(depth);
}

double flops_of(const Call& call) {
  if (const auto* c = std::get_if<Gemm>(&call)) {
    const GemmSize size = size_of(*c);
    return 2 * as_double(size.m) * as_double(size.n) * as_double(size.k);
  }
  // Forward: S = Q K^T, O = P V. Backward: S again, dV, dP, dQ, dK.
  if (const auto* c = std::get_if<AttentionForward>(&call)) {
    return attention_flops(c->shape, c->shape.d_qk + c->shape.d_v);
  }
  if (const auto* c = std::get_if<AttentionBackward>(&call)) {
    return attention_flops(c->shape, 3 * c->shape.d_qk + 2 * c->shape.d_v);
  }
  return 0;
}

// ---------------------------------------------------------------------------------------------

std::string text_of(std::string_view text) {
  return std::string(text);
}

std::string by(std::int64_t a, std::int64_t b) {
  return std::to_string(a) + "x" + std::to_string(b);
}

std::string text_of(const Matrix& m) {
  return text_of(name_of(m.format)) + " " + by(m.rows, m.columns);
}

std::string text_of(const Matrix& from, const Matrix& to) {
  return text_of(name_of(from.format)) + " to " + text_of(name_of(to.format)) + " " +
         by(from.rows, from.columns);
}

std::string text_of(const AttentionShape& s, const Matrix& q) {
  return text_of(name_of(q.format)) + " " + std::to_string(s.batch) + "x" +
         std::to_string(s.heads) + "/" + std::to_string(s.kv_heads) + " heads, " +
         by(s.q_len, s.kv_len) + " tokens, " + std::to_string(s.d_qk) + "/" +
         std::to_string(s.d_v) + " wide" +
         (s.query_positions != nullptr ? ", by positions"
          : s.causal                   ? ", causal"
                                       : "");
}

std::string_view text_of(Activation kind) {
  return kind == Activation::swiglu ? "swiglu" : "gelu";
}

/// What follows the name.
struct Details {
  std::string operator()(const Gemm& c) const {
    const GemmSize size = size_of(c);
    std::string text = text_of(name_of(c.a.format)) + " ";
    if (c.grouping != Grouping::none) {
      text += std::to_string(c.groups) +
              (c.grouping == Grouping::rows ? " groups of m, " : " groups of k, ");
    }
    return text + by(size.m, size.n) + "x" + std::to_string(size.k) +
           (c.accumulate ? " accumulated" : "");
  }
  std::string operator()(const AttentionForward& c) const { return text_of(c.shape, c.q); }
  std::string operator()(const AttentionBackward& c) const { return text_of(c.shape, c.q); }
  std::string operator()(const NormForward& c) const { return text_of(c.y); }
  std::string operator()(const NormBackward& c) const { return text_of(c.x); }
  std::string operator()(const Rope& c) const {
    return text_of(name_of(c.x.format)) + " " + by(c.x.rows, c.heads) + " heads, " +
           std::to_string(c.dim) + " wide";
  }
  std::string operator()(const HeadCopy& c) const {
    return text_of(c.from, c.to) + ", " + std::to_string(c.heads) + " heads " +
           std::to_string(c.width) + " wide";
  }
  std::string operator()(const ActivationForward& c) const {
    return text_of(text_of(c.kind)) + " " + text_of(c.in, c.out);
  }
  std::string operator()(const ActivationBackward& c) const {
    return text_of(text_of(c.kind)) + " " + text_of(c.in);
  }
  std::string operator()(const RowDot& c) const { return text_of(c.a); }
  std::string operator()(const Quantize& c) const { return text_of(c.from, c.to); }
  std::string operator()(const Dequantize& c) const { return text_of(c.from, c.to); }
  std::string operator()(const Transpose& c) const { return text_of(c.from); }
  std::string operator()(const Add& c) const { return text_of(c.out); }
  std::string operator()(const Copy& c) const { return text_of(c.from, c.to); }
  std::string operator()(const Router& c) const {
    return text_of(c.logits) + ", top " + std::to_string(c.top_k);
  }
  std::string operator()(const RouterBackward& c) const {
    return text_of(c.d_logits) + ", top " + std::to_string(c.top_k);
  }
  std::string operator()(const RoutingMap& c) const {
    return std::to_string(c.max_tokens) + " tokens, top " + std::to_string(c.top_k) + ", " +
           std::to_string(c.local_experts) + " experts";
  }
  std::string operator()(const Permute& c) const { return text_of(c.to); }
  std::string operator()(const Unpermute& c) const {
    return text_of(c.to) + ", top " + std::to_string(c.top_k);
  }
  std::string operator()(const Embedding& c) const { return text_of(c.out); }
  std::string operator()(const EmbeddingBackward& c) const { return text_of(c.d_out); }
  std::string operator()(const CrossEntropyPartial& c) const { return text_of(c.logits); }
  std::string operator()(const CrossEntropyLoss& c) const {
    return std::to_string(c.parts) + " parts, " + std::to_string(c.rows) + " rows";
  }
  std::string operator()(const CrossEntropyBackward& c) const { return text_of(c.logits); }
  std::string operator()(const AdamW& c) const {
    return std::to_string(c.elements) + " elements, moments " + text_of(name_of(c.moments));
  }
  std::string operator()(const SquareSum& c) const {
    return std::to_string(c.elements) + " elements";
  }
  std::string operator()(const Fill& c) const { return std::to_string(c.bytes) + " bytes"; }
  std::string operator()(const Loopback& c) const { return std::to_string(c.bytes) + " bytes"; }
};

Operands operands_of(const Call& call) {
  Operands operands;
  std::visit([&](const auto& c) { list(c, operands); }, call);
  return operands;
}

}  // namespace

std::int64_t scale_pitch_of(std::int64_t rows, std::int64_t columns, Scaling scaling) {
  switch (scaling) {
    case Scaling::none:
      return 0;
    case Scaling::rows:
      return rows;
    case Scaling::blocks:
      return (tiles_of(columns) + kScaleAlignment - 1) / kScaleAlignment * kScaleAlignment;
  }
  return 0;
}

std::int64_t scale_elements(std::int64_t rows, std::int64_t columns, Scaling scaling) {
  return scale_pitch_of(rows, columns, scaling) *
         tiles_of(scaling == Scaling::rows ? columns : rows);
}

std::int64_t element_bytes(std::int64_t rows, std::int64_t columns, Format format) {
  return rows * columns * bits_of(format) / 8;
}

std::int64_t attention_workspace_bytes(const AttentionShape& s) {
  const std::int64_t queries = s.batch * s.heads * s.q_len;
  return static_cast<std::int64_t>(sizeof(float)) * (queries + queries * s.d_qk);
}

std::string_view name_of(const Call& call) {
  struct Names {
    std::string_view operator()(const Gemm&) const { return "gemm"; }
    std::string_view operator()(const AttentionForward&) const { return "attention_forward"; }
    std::string_view operator()(const AttentionBackward&) const { return "attention_backward"; }
    std::string_view operator()(const NormForward&) const { return "norm_forward"; }
    std::string_view operator()(const NormBackward&) const { return "norm_backward"; }
    std::string_view operator()(const Rope&) const { return "rope"; }
    std::string_view operator()(const HeadCopy&) const { return "head_copy"; }
    std::string_view operator()(const ActivationForward&) const { return "activation_forward"; }
    std::string_view operator()(const ActivationBackward&) const { return "activation_backward"; }
    std::string_view operator()(const RowDot&) const { return "row_dot"; }
    std::string_view operator()(const Quantize&) const { return "quantize"; }
    std::string_view operator()(const Dequantize&) const { return "dequantize"; }
    std::string_view operator()(const Transpose&) const { return "transpose"; }
    std::string_view operator()(const Add&) const { return "add"; }
    std::string_view operator()(const Copy&) const { return "copy"; }
    std::string_view operator()(const Router&) const { return "router"; }
    std::string_view operator()(const RouterBackward&) const { return "router_backward"; }
    std::string_view operator()(const RoutingMap&) const { return "routing_map"; }
    std::string_view operator()(const Permute&) const { return "permute"; }
    std::string_view operator()(const Unpermute&) const { return "unpermute"; }
    std::string_view operator()(const Embedding&) const { return "embedding"; }
    std::string_view operator()(const EmbeddingBackward&) const { return "embedding_backward"; }
    std::string_view operator()(const CrossEntropyPartial&) const {
      return "cross_entropy_partial";
    }
    std::string_view operator()(const CrossEntropyLoss&) const { return "cross_entropy_loss"; }
    std::string_view operator()(const CrossEntropyBackward&) const {
      return "cross_entropy_backward";
    }
    std::string_view operator()(const AdamW&) const { return "adamw"; }
    std::string_view operator()(const SquareSum&) const { return "square_sum"; }
    std::string_view operator()(const Fill&) const { return "fill"; }
    std::string_view operator()(const Loopback&) const { return "loopback"; }
  };
  return std::visit(Names{}, call);
}

std::string describe(const Call& call) {
  return std::string(name_of(call)) + " " + std::visit(Details{}, call);
}

Cost cost_of(const Call& call) {
  return {.flops = flops_of(call), .bytes = operands_of(call).bytes};
}

std::vector<Touch> touches_of(const Call& call) {
  return operands_of(call).touches;
}

}  // namespace orrery::kernels
