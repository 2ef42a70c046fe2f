// Sums, copies, and the orders that routing gives rows.

#include <algorithm>

#include "kernels/cuda/device_code.cuh"

namespace orrery::kernels::cuda {
namespace {

// ---------------------------------------------------------------------------------------------
// Sums and conversions.

struct AddJob {
  View terms[4];
  View out;
  std::uint32_t tiles = 0;
};

template <Access kAccess>
__global__ void __launch_bounds__(kBlock, 1) add(const __grid_constant__ AddJob job) {
  const std::int64_t octets = octets_of(job.out.rows, job.tiles);
  for (std::int64_t index = first_thread(); index < octets; index += all_threads()) {
    const Place at = place_of(index, job.tiles);
    if (at.column >= job.out.columns) continue;
    const int count = octet_count(job.out.columns, at.column);
    Raw raw[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (job.terms[i].data != nullptr) {
        raw[i] = load_raw<kAccess, Formats::plain>(job.terms[i], at.row, at.column, count);
      }
    }
    float sum[kOctet] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (job.terms[i].data == nullptr) continue;
      float x[kOctet];
      decode<Formats::plain>(raw[i], job.terms[i].format, x);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) sum[j] += x[j];
    }
    store<kAccess, Formats::plain>(job.out, at.row, at.column, count, sum);
  }
}

struct ConvertJob {
  View from, to;
  std::uint32_t tiles = 0;
};

template <Access kAccess>
__global__ void __launch_bounds__(kBlock, 1) convert(const __grid_constant__ ConvertJob job) {
  constexpr int kBatch = 4;
  Raw raw[kBatch];
  stream<kBatch>(
      octets_of(job.from.rows, job.tiles),
      [&](int b, std::int64_t index) {
        const Place at = place_of(index, job.tiles);
        if (at.column >= job.from.columns) return;
        raw[b] = load_raw<kAccess, Formats::plain>(job.from, at.row, at.column,
                                                   octet_count(job.from.columns, at.column));
      },
      [&](int b, std::int64_t index, bool there) {
        const Place at = place_of(index, job.tiles);
        if (!there || at.column >= job.from.columns) return;
        float x[kOctet];
        decode<Formats::plain>(raw[b], job.from.format, x);
        store<kAccess, Formats::plain>(job.to, at.row, at.column,
                                       octet_count(job.from.columns, at.column), x);
      });
}

// ---------------------------------------------------------------------------------------------
// Rows of bytes, and their scales.

struct RowsJob {
  const unsigned char* from = nullptr;
  unsigned char* to = nullptr;
  std::int64_t rows = 0, row_bytes = 0, from_pitch = 0, to_pitch = 0;  ///< in bytes
  const std::int32_t* source = nullptr;  ///< row of `from`, or -1 for zeros; null: the same row
  const std::int32_t* used_rows = nullptr;
  const float* from_scales = nullptr;
  float* to_scales = nullptr;
  std::int64_t scale_rows = 0, scale_columns = 0, from_scale_pitch = 0, to_scale_pitch = 0;
  bool scale_of_row = false;  ///< column c of the scales belongs to row c
};

/// Word: uint4, or unsigned char where rows are not aligned.
template <class Word>
__global__ void __launch_bounds__(kBlock, 1) copy_rows(const __grid_constant__ RowsJob job) {
  constexpr int kBatch = 8;
  const std::int64_t rows = rows_in_use(job.used_rows, job.rows);
  const auto words = static_cast<std::uint32_t>(job.row_bytes / static_cast<int>(sizeof(Word)));
  struct WordPlace {
    std::int64_t row, word;
  };
  const auto place = [&](std::int64_t index) {
    if (index <= 0xffffffff) {
      const auto row = static_cast<std::uint32_t>(index) / words;
      return WordPlace{row, static_cast<std::uint32_t>(index) - row * words};
    }
    return WordPlace{index / words, index % words};
  };
  Word held[kBatch];
  stream<kBatch>(
      rows * words,
      [&](int b, std::int64_t index) {
        const WordPlace at = place(index);
        const std::int64_t row = job.source == nullptr ? at.row : job.source[at.row];
        held[b] = Word{};
        if (row >= 0) {
          held[b] = reinterpret_cast<const Word*>(job.from + row * job.from_pitch)[at.word];
        }
      },
      [&](int b, std::int64_t index, bool there) {
        if (!there) return;
        const WordPlace at = place(index);
        reinterpret_cast<Word*>(job.to + at.row * job.to_pitch)[at.word] = held[b];
      });
  if (job.to_scales == nullptr) return;
  const std::int64_t columns = job.scale_of_row ? min(rows, job.scale_columns) : job.scale_columns;
  for (std::int64_t index = first_thread(); index < job.scale_rows * columns;
       index += all_threads()) {
    const std::int64_t row = index / columns;
    const std::int64_t column = index - row * columns;
    const std::int64_t from =
        job.scale_of_row && job.source != nullptr ? job.source[column] : column;
    job.to_scales[row * job.to_scale_pitch + column] =
        from < 0 ? 1.0F : job.from_scales[row * job.from_scale_pitch + from];
  }
}

RowsJob rows_job(const Matrix& from, const Matrix& to) {
  const auto bytes = [&](std::int64_t elements) { return elements * bits_of(to.format) / 8; };
  RowsJob job{.from = static_cast<const unsigned char*>(from.data),
              .to = static_cast<unsigned char*>(to.data),
              .rows = to.rows,
              .row_bytes = bytes(to.columns),
              .from_pitch = bytes(from.pitch),
              .to_pitch = bytes(to.pitch)};
  if (to.scaling != Scaling::none) {
    job.from_scales = from.scales;
    job.to_scales = to.scales;
    job.from_scale_pitch = from.scale_pitch;
    job.to_scale_pitch = to.scale_pitch;
    job.scale_of_row = to.scaling == Scaling::rows;
    const std::int64_t tiles = tiles_of(to.columns);
    job.scale_rows = job.scale_of_row ? tiles : (to.rows + kTile - 1) / kTile;
    job.scale_columns = job.scale_of_row ? to.rows : tiles;
  }
  return job;
}

void start_copy(const RowsJob& job, const LaunchContext& context, const char* name) {
  if (job.rows == 0 || job.row_bytes == 0) return;
  const auto addresses = reinterpret_cast<std::uintptr_t>(job.from) |
                         reinterpret_cast<std::uintptr_t>(job.to) |
                         static_cast<std::uintptr_t>(job.row_bytes | job.from_pitch | job.to_pitch);
  const bool whole_words = addresses % sizeof(uint4) == 0;
  const std::int64_t words = job.rows * job.row_bytes / (whole_words ? 16 : 1);
  start(context, name, pick(whole_words, copy_rows<uint4>, copy_rows<unsigned char>),
        choose_grid(words, context.sms, kBlock), kBlock, 0, job);
}

// ---------------------------------------------------------------------------------------------
// Sums of the rows that came back.

struct UnpermuteJob {
  View from, to;
  const std::int32_t* slot_row = nullptr;
  const std::int32_t* tokens = nullptr;
  std::int64_t top_k = 1;
  const float* row_values = nullptr;
  float* slot_values = nullptr;
  std::uint32_t tiles = 0;
};

template <Access kAccess>
__global__ void __launch_bounds__(kBlock, 1) unpermute(const __grid_constant__ UnpermuteJob job) {
  const std::int64_t rows = rows_in_use(job.tokens, job.to.rows);
  const std::int64_t octets = octets_of(rows, job.tiles);
  for (std::int64_t index = first_thread(); index < octets; index += all_threads()) {
    const Place at = place_of(index, job.tiles);
    if (at.column >= job.to.columns) continue;
    const int count = octet_count(job.to.columns, at.column);
    const std::int32_t* const slots = job.slot_row + at.row * job.top_k;
    float sum[kOctet] = {};
    constexpr int kBatch = 4;  // rows on their way
    for (std::int64_t first = 0; first < job.top_k; first += kBatch) {
      std::int32_t row[kBatch];
      Raw raw[kBatch] = {};
#pragma unroll
      for (int i = 0; i < kBatch; ++i) row[i] = first + i < job.top_k ? slots[first + i] : -1;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (row[i] < 0) continue;
        raw[i] = load_raw<kAccess, Formats::plain>(job.from, row[i], at.column, count);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (row[i] < 0) continue;
        float x[kOctet];
        decode<Formats::plain>(raw[i], job.from.format, x);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) sum[j] += x[j];
      }
    }
    store<kAccess, Formats::plain>(job.to, at.row, at.column, count, sum);
  }
  if (job.slot_values == nullptr) return;
  for (std::int64_t i = first_thread(); i < rows * job.top_k; i += all_threads()) {
    const std::int32_t row = job.slot_row[i];
    job.slot_values[i] = row < 0 ? 0.0F : job.row_values[row];
  }
}

// ---------------------------------------------------------------------------------------------
// Bytes.

__global__ void __launch_bounds__(kBlock, 1) fill_zero(unsigned char* data, std::int64_t bytes) {
  const auto to_word = static_cast<std::int64_t>(-reinterpret_cast<std::intptr_t>(data) & 15);
  const std::int64_t head = min(to_word, bytes);
  const std::int64_t words = (bytes - head) / 16;
  auto* const aligned = reinterpret_cast<uint4*>(data + head);
#pragma unroll 4
  for (std::int64_t i = first_thread(); i < words; i += all_threads()) {
    aligned[i] = make_uint4(0, 0, 0, 0);
  }
  if (first_thread() < head) data[first_thread()] = 0;
  const std::int64_t tail = head + words * 16 + first_thread();
  if (tail < bytes) data[tail] = 0;
}

/// Eight loads of 16 bytes in flight a thread: 128 KiB an SM. Each block copies pieces of 128 KiB
/// in turn.
template <class Word>
__global__ void __launch_bounds__(kBlock, 1)
    copy_bytes(const Word* from, Word* to, std::int64_t words) {
  constexpr int kBatch = 8;
  constexpr std::int64_t kPiece = std::int64_t{kBatch} * kBlock;
  for (std::int64_t base = blockIdx.x * kPiece + threadIdx.x; base < words;
       base += gridDim.x * kPiece) {
    Word held[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (base + b * kBlock < words) held[b] = from[base + b * kBlock];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (base + b * kBlock < words) to[base + b * kBlock] = held[b];
    }
  }
}

}  // namespace

void launch(const Add& call, const LaunchContext& context) {
  AddJob job;
  job.out = view_of(call.out);
  job.tiles = tiles_of(call.out.columns);
  bool vectors = job.out.vectors && call.out.columns % kOctet == 0;
  for (int i = 0; i < 4; ++i) {
    job.terms[i] = view_of(call.terms[static_cast<std::size_t>(i)]);
    vectors = vectors && job.terms[i].vectors;
  }
  const std::int64_t octets = octets_of(call.out.rows, job.tiles);
  if (octets == 0) return;
  start(context, "add", pick(vectors, add<Access::vectors>, add<Access::elements>),
        choose_grid(octets, context.sms, kBlock), kBlock, 0, job);
}

void launch(const Copy& call, const LaunchContext& context) {
  if (call.from.format == call.to.format) {
    start_copy(rows_job(call.from, call.to), context, "copy");
    return;
  }
  const ConvertJob job{
      .from = view_of(call.from), .to = view_of(call.to), .tiles = tiles_of(call.to.columns)};
  const std::int64_t octets = octets_of(call.to.rows, job.tiles);
  if (octets == 0) return;
  const bool vectors = job.from.vectors && job.to.vectors && call.to.columns % kOctet == 0;
  start(context, "convert", pick(vectors, convert<Access::vectors>, convert<Access::elements>),
        choose_grid(octets, context.sms, kBlock), kBlock, 0, job);
}

void launch(const Permute& call, const LaunchContext& context) {
  RowsJob job = rows_job(call.from, call.to);
  job.source = call.row_source;
  job.used_rows = call.used_rows;
  start_copy(job, context, "permute");
}

void launch(const Unpermute& call, const LaunchContext& context) {
  const UnpermuteJob job{.from = view_of(call.from),
                         .to = view_of(call.to),
                         .slot_row = call.slot_row,
                         .tokens = call.tokens,
                         .top_k = call.top_k,
                         .row_values = call.row_values,
                         .slot_values = call.slot_values,
                         .tiles = tiles_of(call.to.columns)};
  const std::int64_t octets = octets_of(call.to.rows, job.tiles);
  if (octets == 0) return;
  const bool vectors = job.from.vectors && job.to.vectors && call.to.columns % kOctet == 0;
  start(context, "unpermute",
        pick(vectors, unpermute<Access::vectors>, unpermute<Access::elements>),
        choose_grid(octets, context.sms, kBlock), kBlock, 0, job);
}

void launch(const Fill& call, const LaunchContext& context) {
  if (call.bytes == 0) return;
  start(context, "fill", fill_zero, choose_grid(call.bytes / 16, context.sms, kBlock), kBlock, 0,
        static_cast<unsigned char*>(call.data), call.bytes);
}

void launch(const Loopback& call, const LaunchContext& context) {
  if (call.bytes == 0) return;
  // All of an SM's shared memory, so that it holds nothing else: as many SMs as blocks.
  const auto shared_bytes = static_cast<std::size_t>(context.limits.shared_bytes_per_block);
  const auto addresses = reinterpret_cast<std::uintptr_t>(call.from) |
                         reinterpret_cast<std::uintptr_t>(call.to) |
                         static_cast<std::uintptr_t>(call.bytes);
  if (addresses % sizeof(uint4) == 0) {
    start(context, "loopback", copy_bytes<uint4>, context.sms, kBlock, shared_bytes,
          static_cast<const uint4*>(call.from), static_cast<uint4*>(call.to), call.bytes / 16);
  } else {
    start(context, "loopback", copy_bytes<unsigned char>, context.sms, kBlock, shared_bytes,
          static_cast<const unsigned char*>(call.from), static_cast<unsigned char*>(call.to),
          call.bytes);
  }
}

}  // namespace orrery::kernels::cuda
