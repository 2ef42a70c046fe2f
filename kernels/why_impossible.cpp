#include <cstdint>
#include <initializer_list>
#include <utility>

#include "kernels/call.hpp"

namespace orrery::kernels {
namespace {

constexpr std::int64_t kAnySize = -1;

/// What a matrix may be stored as.
enum class Kinds {
  fp32,
  plain,  ///< fp32 or bf16
  tiles,  ///< e4m3 or e5m6, any scales
  e4m3,   ///< any scales
  plain_or_e4m3_rows,
  plain_or_row_tiles,
  plain_or_e4m3,
};

bool allowed(const Matrix& m, Kinds kinds) {
  const bool plain = m.format == Format::fp32 || m.format == Format::bf16;
  const bool e4m3 = m.format == Format::e4m3;
  const bool rows = m.scaling == Scaling::rows;
  switch (kinds) {
    case Kinds::fp32:
      return m.format == Format::fp32;
    case Kinds::plain:
      return plain;
    case Kinds::tiles:
      return !plain;
    case Kinds::e4m3:
      return e4m3;
    case Kinds::plain_or_e4m3_rows:
      return plain || (e4m3 && rows);
    case Kinds::plain_or_row_tiles:
      return plain || rows;
    case Kinds::plain_or_e4m3:
      return plain || e4m3;
  }
  return false;
}

std::string_view name_of(Kinds kinds) {
  switch (kinds) {
    case Kinds::fp32:
      return "fp32";
    case Kinds::plain:
      return "fp32 or bf16";
    case Kinds::tiles:
      return "e4m3 or e5m6";
    case Kinds::e4m3:
      return "e4m3";
    case Kinds::plain_or_e4m3_rows:
      return "fp32, bf16 or e4m3 with scales of rows";
    case Kinds::plain_or_row_tiles:
      return "fp32, bf16, or e4m3 or e5m6 with scales of rows";
    case Kinds::plain_or_e4m3:
      return "fp32, bf16 or e4m3";
  }
  return "?";
}

std::string_view name_of(Scaling scaling) {
  switch (scaling) {
    case Scaling::none:
      return "no scales";
    case Scaling::rows:
      return "scales of rows";
    case Scaling::blocks:
      return "scales of blocks";
  }
  return "?";
}

/// Keeps the first problem.
class Checker {
 public:
  std::string problem() && { return std::move(problem_); }

  /// Whether all was well so far and is.
  bool need(bool condition, std::initializer_list<std::string_view> words) {
    if (!problem_.empty() || condition) return condition;
    for (const std::string_view word : words) problem_ += word;
    return false;
  }

  void equal(std::string_view a_name, std::int64_t a, std::string_view b_name, std::int64_t b) {
    need(a == b, {a_name, " is ", std::to_string(a), ", ", b_name, " ", std::to_string(b)});
  }

  void at_least(std::string_view name, std::int64_t value, std::int64_t least) {
    need(value >= least,
         {name, " is ", std::to_string(value), ", at least ", std::to_string(least), " needed"});
  }

  template <class Element>
  void array(std::string_view name, const Element* data) {
    need(data != nullptr, {name, " is missing"});
    optional_array(name, data);
  }
  template <class Element>
  void optional_array(std::string_view name, const Element* data) {
    need(reinterpret_cast<std::uintptr_t>(data) % alignof(Element) == 0, {name, " is not aligned"});
  }

  /// A matrix that has to be there. Sizes may be kAnySize.
  void matrix(std::string_view name, const Matrix& m, std::int64_t rows, std::int64_t columns,
              Kinds kinds) {
    if (!need(m.data != nullptr, {name, " is missing"})) return;
    need(allowed(m, kinds), {name, " is ", kernels::name_of(m.format), " with ", name_of(m.scaling),
                             ", ", name_of(kinds), " needed"});
    well_formed(name, m);
    const auto size = [&](std::string_view what, std::int64_t is, std::int64_t wanted) {
      need(wanted == kAnySize || is == wanted, {what, " of ", name, " are ", std::to_string(is),
                                                ", ", std::to_string(wanted), " needed"});
    };
    size("rows", m.rows, rows);
    size("columns", m.columns, columns);
  }
  void optional_matrix(std::string_view name, const Matrix& m, std::int64_t rows,
                       std::int64_t columns, Kinds kinds) {
    if (m) matrix(name, m, rows, columns, kinds);
  }

  void same_format(std::string_view a_name, const Matrix& a, std::string_view b_name,
                   const Matrix& b) {
    need(a.format == b.format, {a_name, " is ", kernels::name_of(a.format), ", ", b_name, " ",
                                kernels::name_of(b.format)});
    need(a.scaling == b.scaling,
         {a_name, " has ", name_of(a.scaling), ", ", b_name, " ", name_of(b.scaling)});
  }

 private:
  void well_formed(std::string_view name, const Matrix& m) {
    need(m.rows >= 0 && m.columns >= 0,
         {name, " is ", std::to_string(m.rows), "x", std::to_string(m.columns)});
    need(m.pitch >= m.columns, {"pitch of ", name, " is ", std::to_string(m.pitch), ", columns ",
                                std::to_string(m.columns)});
    if (m.format == Format::e5m6) {
      need(m.columns % 2 == 0 && m.pitch % 2 == 0,
           {"columns and pitch of ", name, " are e5m6 and have to be even"});
    } else {
      need(reinterpret_cast<std::uintptr_t>(m.data) %
                   static_cast<std::uintptr_t>(bits_of(m.format) / 8) ==
               0,
           {name, " is not aligned to its elements"});
    }
    const bool plain = m.format == Format::fp32 || m.format == Format::bf16;
    need(plain == (m.scaling == Scaling::none),
         {name, " is ", kernels::name_of(m.format), " with ", name_of(m.scaling)});
    if (plain) return;
    need(m.scales != nullptr, {"scales of ", name, " are missing"});
    const std::int64_t least = scale_pitch_of(m.rows, m.columns, m.scaling);
    need(m.scaling == Scaling::rows ? m.scale_pitch >= least : m.scale_pitch == least,
         {"scale_pitch of ", name, " is ", std::to_string(m.scale_pitch), ", ",
          std::to_string(least), " needed"});
  }

  std::string problem_;
};

// ---------------------------------------------------------------------------------------------

void check(const Gemm& c, Checker& is) {
  is.at_least("groups", c.groups, 1);
  is.matrix("A", c.a, kAnySize, kAnySize, Kinds::plain_or_e4m3_rows);
  is.matrix("B", c.b, kAnySize, kAnySize, Kinds::plain_or_e4m3);
  is.matrix("D", c.d, kAnySize, kAnySize, c.accumulate ? Kinds::fp32 : Kinds::plain);
  is.need(c.a.format == c.b.format, {"A is ", name_of(c.a.format), ", B ", name_of(c.b.format)});
  const bool fp8 = c.a.format == Format::e4m3;
  is.need(!fp8 || (!c.a_transposed && !c.b_transposed), {"e4m3 operands cannot be transposed"});

  const std::int64_t a_k = c.a_transposed ? c.a.rows : c.a.columns;
  const std::int64_t a_m = c.a_transposed ? c.a.columns : c.a.rows;
  const std::int64_t b_k = c.b_transposed ? c.b.rows : c.b.columns;
  const std::int64_t b_n = c.b_transposed ? c.b.columns : c.b.rows;
  switch (c.grouping) {
    case Grouping::none:
      is.equal("groups", c.groups, "grouping is none and has", 1);
      is.equal("k of A", a_k, "of B", b_k);
      is.equal("m of A", a_m, "of D", c.d.rows);
      is.equal("n of B", b_n, "of D", c.d.columns);
      return;
    case Grouping::rows:
      is.need(!c.a_transposed, {"A is split by rows and cannot be transposed"});
      if (c.b_transposed) {
        is.equal("k of A", a_k * c.groups, "times groups; rows of B", b_k);
        is.equal("n of B", b_n, "of D", c.d.columns);
      } else {
        is.equal("k of A", a_k, "of B", b_k);
        is.equal("n times groups of D", c.d.columns * c.groups, "rows of B", b_n);
      }
      is.equal("rows of A", a_m, "of D", c.d.rows);
      break;
    case Grouping::contraction:
      is.need(fp8 || (c.a_transposed && c.b_transposed),
              {"A and B are split by the contraction, along their rows: both are transposed"});
      is.equal("k of A", a_k, "of B", b_k);
      is.need(!fp8 || a_k % kTile == 0,
              {"k of A is ", std::to_string(a_k), ", a multiple of 128 needed"});
      is.equal("m times groups of A", a_m * c.groups, "rows of D", c.d.rows);
      is.equal("n of B", b_n, "of D", c.d.columns);
      break;
  }
  is.array("group_begin", c.group_begin);
  is.array("group_rows", c.group_rows);
}

/// Operands of both directions.
void check(const AttentionShape& s, const Matrix& q, const Matrix& k, const Matrix& v,
           const Matrix& out, Checker& is) {
  is.at_least("batch", s.batch, 1);
  is.at_least("heads", s.heads, 1);
  is.at_least("kv_heads", s.kv_heads, 1);
  is.at_least("q_len", s.q_len, 1);
  is.at_least("kv_len", s.kv_len, 1);
  is.at_least("d_qk", s.d_qk, 1);
  is.at_least("d_v", s.d_v, 1);
  if (!is.need(s.kv_heads >= 1 && s.heads % s.kv_heads == 0,
               {"heads are ", std::to_string(s.heads), ", not a multiple of kv_heads ",
                std::to_string(s.kv_heads)})) {
    return;
  }
  is.matrix("q", q, s.batch * s.q_len, s.heads * s.d_qk, Kinds::plain);
  is.matrix("k", k, s.batch * s.kv_len, s.kv_heads * s.d_qk, Kinds::plain);
  is.matrix("v", v, s.batch * s.kv_len, s.kv_heads * s.d_v, Kinds::plain);
  is.matrix("out", out, s.batch * s.q_len, s.heads * s.d_v, Kinds::plain);
  is.same_format("k", k, "q", q);
  is.same_format("v", v, "q", q);
  is.same_format("out", out, "q", q);
  is.optional_array("query_positions", s.query_positions);
}

void check(const AttentionForward& c, Checker& is) {
  check(c.shape, c.q, c.k, c.v, c.out, is);
  is.array("lse", c.lse);
}

void check(const AttentionBackward& c, Checker& is) {
  check(c.shape, c.q, c.k, c.v, c.out, is);
  is.matrix("d_out", c.d_out, c.out.rows, c.out.columns, Kinds::plain);
  is.matrix("d_q", c.d_q, c.q.rows, c.q.columns, Kinds::plain);
  is.matrix("d_k", c.d_k, c.k.rows, c.k.columns, Kinds::plain);
  is.matrix("d_v", c.d_v, c.v.rows, c.v.columns, Kinds::plain);
  is.same_format("d_out", c.d_out, "q", c.q);
  is.same_format("d_q", c.d_q, "q", c.q);
  is.same_format("d_k", c.d_k, "q", c.q);
  is.same_format("d_v", c.d_v, "q", c.q);
  is.array("lse", c.lse);
  is.array("workspace", static_cast<const float*>(c.workspace));
}

void check_terms(const std::array<Matrix, 4>& terms, const Matrix& like, Checker& is) {
  bool any = false;
  for (const Matrix& term : terms) {
    any = any || term;
    is.optional_matrix("a term", term, like.rows, like.columns, Kinds::plain);
  }
  is.need(any, {"there are no terms"});
}

/// Columns of a segment, 0 where they cannot be.
std::int64_t segment_of(const Matrix& m, std::int64_t segments, Checker& is) {
  is.at_least("segments", segments, 1);
  if (!is.need(segments >= 1 && m.columns % segments == 0,
               {"columns are ", std::to_string(m.columns), ", not a multiple of segments ",
                std::to_string(segments)})) {
    return 0;
  }
  return m.columns / segments;
}

void check(const NormForward& c, Checker& is) {
  is.matrix("y", c.y, kAnySize, kAnySize, Kinds::plain);
  check_terms(c.terms, c.y, is);
  is.optional_matrix("sum", c.sum, c.y.rows, c.y.columns, Kinds::plain);
  const std::int64_t width = segment_of(c.y, c.segments, is);
  is.matrix("gain", c.gain, 1, width, Kinds::plain);
  is.optional_matrix("bias", c.bias, 1, width, Kinds::plain);
  is.need(c.centred || !c.bias, {"bias is there, but the norm is not centred"});
}

void check(const NormBackward& c, Checker& is) {
  is.matrix("x", c.x, kAnySize, kAnySize, Kinds::plain);
  is.matrix("d_y", c.d_y, c.x.rows, c.x.columns, Kinds::plain);
  is.optional_matrix("add", c.add, c.x.rows, c.x.columns, Kinds::plain);
  is.matrix("d_x", c.d_x, c.x.rows, c.x.columns, Kinds::plain);
  is.matrix("gain", c.gain, 1, segment_of(c.x, c.segments, is), Kinds::plain);
  is.optional_array("d_gain", c.d_gain);
  is.optional_array("d_bias", c.d_bias);
  is.need(c.centred || c.d_bias == nullptr, {"d_bias is there, but the norm is not centred"});
}

void check(const Rope& c, Checker& is) {
  is.matrix("x", c.x, kAnySize, kAnySize, Kinds::plain);
  is.at_least("heads", c.heads, 1);
  is.at_least("offset", c.offset, 0);
  is.at_least("dim", c.dim, 0);
  is.need(c.dim % 2 == 0, {"dim is ", std::to_string(c.dim), ", an even number needed"});
  is.at_least("head_dim", c.head_dim, c.offset + c.dim);
  is.equal("columns of x", c.x.columns, "heads times head_dim", c.heads * c.head_dim);
  is.array("positions", c.positions);
  is.need(c.theta > 0, {"theta is not positive"});
}

void check(const HeadCopy& c, Checker& is) {
  is.at_least("heads", c.heads, 1);
  is.at_least("width", c.width, 0);
  is.matrix("from", c.from, kAnySize, kAnySize, Kinds::plain);
  is.matrix("to", c.to, c.from.rows, kAnySize, Kinds::plain);
  is.at_least("from_offset", c.from_offset, 0);
  is.at_least("from_stride", c.from_stride, 0);
  is.at_least("columns of from", c.from.columns,
              c.from_offset + (c.heads - 1) * c.from_stride + c.width);
  is.at_least("to_offset", c.to_offset, 0);
  const std::int64_t to_heads = c.sum_heads ? 1 : c.heads;
  if (to_heads > 1) is.at_least("to_stride", c.to_stride, c.width);
  is.at_least("columns of to", c.to.columns, c.to_offset + (to_heads - 1) * c.to_stride + c.width);
}

std::int64_t in_columns(Activation kind, std::int64_t out_columns) {
  return kind == Activation::swiglu ? 2 * out_columns : out_columns;
}

void check(const ActivationForward& c, Checker& is) {
  is.matrix("out", c.out, kAnySize, kAnySize, Kinds::plain_or_e4m3_rows);
  is.matrix("in", c.in, c.out.rows, in_columns(c.kind, c.out.columns), Kinds::plain);
  is.optional_array("row_weight", c.row_weight);
  is.optional_array("used_rows", c.used_rows);
}

void check(const ActivationBackward& c, Checker& is) {
  is.matrix("d_out", c.d_out, kAnySize, kAnySize, Kinds::plain);
  const std::int64_t columns = in_columns(c.kind, c.d_out.columns);
  is.matrix("in", c.in, c.d_out.rows, columns, Kinds::plain);
  is.matrix("d_in", c.d_in, c.d_out.rows, columns, Kinds::plain);
  is.optional_matrix("out_again", c.out_again, c.d_out.rows, c.d_out.columns,
                     Kinds::plain_or_e4m3_rows);
  is.optional_array("row_weight", c.row_weight);
  is.optional_array("used_rows", c.used_rows);
}

void check(const RowDot& c, Checker& is) {
  is.matrix("a", c.a, kAnySize, kAnySize, Kinds::plain);
  is.matrix("b", c.b, c.a.rows, c.a.columns, Kinds::plain);
  is.array("row_weight", c.row_weight);
  is.array("out", c.out);
  is.optional_array("used_rows", c.used_rows);
}

void check(const Quantize& c, Checker& is) {
  is.matrix("from", c.from, kAnySize, kAnySize, Kinds::plain);
  is.matrix("to", c.to, c.from.rows, c.from.columns, Kinds::tiles);
  is.optional_array("used_rows", c.used_rows);
}

void check(const Dequantize& c, Checker& is) {
  is.matrix("from", c.from, kAnySize, kAnySize, Kinds::tiles);
  is.matrix("to", c.to, c.from.rows, c.from.columns, Kinds::plain);
  is.optional_array("used_rows", c.used_rows);
}

void check(const Transpose& c, Checker& is) {
  is.matrix("from", c.from, kAnySize, kAnySize, Kinds::e4m3);
  is.matrix("to", c.to, c.from.columns, c.from.rows, Kinds::e4m3);
  is.same_format("to", c.to, "from", c.from);
  is.optional_array("used_rows", c.used_rows);
  is.need(c.used_rows == nullptr || c.from.scaling == Scaling::rows,
          {"used_rows is there, but the scales are of blocks"});
}

void check(const Add& c, Checker& is) {
  is.matrix("out", c.out, kAnySize, kAnySize, Kinds::plain);
  check_terms(c.terms, c.out, is);
}

void check(const Copy& c, Checker& is) {
  is.matrix("from", c.from, kAnySize, kAnySize, Kinds::plain_or_e4m3);
  is.matrix("to", c.to, c.from.rows, c.from.columns, Kinds::plain_or_e4m3);
  if (c.from.format == Format::e4m3 || c.to.format == Format::e4m3) {
    is.same_format("to", c.to, "from", c.from);
  }
}

void check(const Router& c, Checker& is) {
  is.matrix("logits", c.logits, kAnySize, kAnySize, Kinds::plain);
  const std::int64_t experts = c.logits.columns;
  is.at_least("groups", c.groups, 1);
  is.at_least("group_limit", c.group_limit, 1);
  is.at_least("groups", c.groups, c.group_limit);
  is.at_least("top_k", c.top_k, 1);
  if (is.need(c.groups >= 1 && experts % c.groups == 0,
              {"experts are ", std::to_string(experts), ", not a multiple of groups ",
               std::to_string(c.groups)})) {
    is.at_least("experts that group_limit leaves", experts / c.groups * c.group_limit, c.top_k);
  }
  is.optional_array("bias", c.bias);
  is.array("scores", c.scores);
  is.array("experts", c.experts);
  is.array("weights", c.weights);
}

void check(const RouterBackward& c, Checker& is) {
  is.matrix("d_logits", c.d_logits, kAnySize, kAnySize, Kinds::plain);
  is.at_least("top_k", c.top_k, 1);
  is.at_least("experts", c.d_logits.columns, c.top_k);
  is.array("scores", c.scores);
  is.array("experts", c.experts);
  is.array("d_weights", c.d_weights);
}

void check(const RoutingMap& c, Checker& is) {
  is.at_least("max_tokens", c.max_tokens, 0);
  is.at_least("top_k", c.top_k, 1);
  is.at_least("local_experts", c.local_experts, 1);
  is.at_least("alignment", c.alignment, 1);
  is.at_least("capacity", c.capacity, 0);
  is.array("experts", c.experts);
  is.array("weights", c.weights);
  is.optional_array("tokens", c.tokens);
  is.array("group_begin", c.group_begin);
  is.array("group_rows", c.group_rows);
  is.array("used_rows", c.used_rows);
  is.array("row_source", c.row_source);
  is.array("row_weight", c.row_weight);
  is.array("slot_row", c.slot_row);
  is.array("overflow", c.overflow);
}

void check(const Permute& c, Checker& is) {
  is.matrix("from", c.from, kAnySize, kAnySize, Kinds::plain_or_row_tiles);
  is.matrix("to", c.to, kAnySize, c.from.columns, Kinds::plain_or_row_tiles);
  is.same_format("to", c.to, "from", c.from);
  is.array("row_source", c.row_source);
  is.optional_array("used_rows", c.used_rows);
}

void check(const Unpermute& c, Checker& is) {
  is.matrix("from", c.from, kAnySize, kAnySize, Kinds::plain);
  is.matrix("to", c.to, kAnySize, c.from.columns, Kinds::plain);
  is.at_least("top_k", c.top_k, 1);
  is.array("slot_row", c.slot_row);
  is.optional_array("tokens", c.tokens);
  is.optional_array("row_values", c.row_values);
  is.optional_array("slot_values", c.slot_values);
  is.need((c.row_values == nullptr) == (c.slot_values == nullptr),
          {"of row_values and slot_values one is missing"});
}

void check(const Embedding& c, Checker& is) {
  is.matrix("table", c.table, kAnySize, kAnySize, Kinds::plain);
  is.matrix("out", c.out, kAnySize, c.table.columns, Kinds::plain);
  is.array("tokens", c.tokens);
}

void check(const EmbeddingBackward& c, Checker& is) {
  is.matrix("d_table", c.d_table, kAnySize, kAnySize, Kinds::fp32);
  is.matrix("d_out", c.d_out, kAnySize, c.d_table.columns, Kinds::plain);
  is.array("tokens", c.tokens);
}

void check(const CrossEntropyPartial& c, Checker& is) {
  is.matrix("logits", c.logits, kAnySize, kAnySize, Kinds::plain);
  is.at_least("columns of logits", c.logits.columns, 1);
  is.array("targets", c.targets);
  is.array("partial", c.partial);
}

void check(const CrossEntropyLoss& c, Checker& is) {
  is.at_least("parts", c.parts, 1);
  is.at_least("rows", c.rows, 0);
  is.array("partials", c.partials);
  is.array("targets", c.targets);
  is.array("lse", c.lse);
  is.array("loss", c.loss);
}

void check(const CrossEntropyBackward& c, Checker& is) {
  is.matrix("logits", c.logits, kAnySize, kAnySize, Kinds::plain);
  is.array("targets", c.targets);
  is.array("lse", c.lse);
}

void check(const AdamW& c, Checker& is) {
  const auto plain = [&](std::string_view name, const void* data, Format format) {
    is.need(format == Format::fp32 || format == Format::bf16,
            {name, " is ", name_of(format), ", fp32 or bf16 needed"});
    const auto size = static_cast<std::uintptr_t>(bits_of(format) / 8);
    is.need(reinterpret_cast<std::uintptr_t>(data) % size == 0, {name, " is not aligned"});
  };
  is.at_least("elements", c.elements, 0);
  is.array("gradient", c.gradient);
  is.array("master", c.master);
  is.need(c.first_moment != nullptr, {"first_moment is missing"});
  is.need(c.second_moment != nullptr, {"second_moment is missing"});
  plain("first_moment", c.first_moment, c.moments);
  plain("second_moment", c.second_moment, c.moments);
  plain("parameter", c.parameter, c.parameters);
  is.array("scalars", c.scalars);
  is.optional_array("square_sum", c.square_sum);
}

void check(const SquareSum& c, Checker& is) {
  is.at_least("elements", c.elements, 0);
  is.array("values", c.values);
  is.array("out", c.out);
}

void check(const Fill& c, Checker& is) {
  is.at_least("bytes", c.bytes, 0);
  is.need(c.data != nullptr, {"data is missing"});
}

void check(const Loopback& c, Checker& is) {
  is.at_least("bytes", c.bytes, 0);
  is.need(c.from != nullptr, {"from is missing"});
  is.need(c.to != nullptr, {"to is missing"});
}

}  // namespace

std::string why_impossible(const Call& call) {
  Checker checker;
  std::visit([&](const auto& c) { check(c, checker); }, call);
  return std::move(checker).problem();
}

}  // namespace orrery::kernels
