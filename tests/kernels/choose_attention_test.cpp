#include "kernels/choose_attention.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

namespace orrery::kernels {
namespace {

AttentionShape deepseek_v3(std::int64_t length) {
  return {.batch = 1,
          .heads = 128,
          .kv_heads = 128,
          .q_len = length,
          .kv_len = length,
          .d_qk = 192,
          .d_v = 128};
}

/// No memory is read: any address will do.
Matrix at(std::uintptr_t address, std::int64_t rows, std::int64_t columns, Format format) {
  return {.data = reinterpret_cast<void*>(address),
          .rows = rows,
          .columns = columns,
          .pitch = columns,
          .format = format};
}
AttentionForward forward_of(const AttentionShape& s, Format format = Format::bf16) {
  AttentionForward call;
  call.shape = s;
  call.q = at(1 << 20, s.batch * s.q_len, s.heads * s.d_qk, format);
  call.k = at(2 << 20, s.batch * s.kv_len, s.kv_heads * s.d_qk, format);
  call.v = at(3 << 20, s.batch * s.kv_len, s.kv_heads * s.d_v, format);
  call.out = at(4 << 20, s.batch * s.q_len, s.heads * s.d_v, format);
  return call;
}
AttentionBackward backward_of(const AttentionShape& s, Format format = Format::bf16) {
  const AttentionForward forward = forward_of(s, format);
  AttentionBackward call;
  call.shape = s;
  call.q = call.d_q = forward.q;
  call.k = call.d_k = forward.k;
  call.v = call.d_v = forward.v;
  call.out = call.d_out = forward.out;
  return call;
}

TEST(ChooseAttention, TakesCudnnForDeepSeekV3WhereItIs) {
  for (const std::int64_t length : {1024, 4096, 8192}) {
    const AttentionShape shape = deepseek_v3(length);
    EXPECT_EQ(choose_attention(forward_of(shape), {}), AttentionKernel::cudnn);
    EXPECT_EQ(choose_attention(backward_of(shape), {}), AttentionKernel::cudnn);
    AttentionDevice without;
    without.cudnn = false;
    EXPECT_EQ(choose_attention(forward_of(shape), without), AttentionKernel::tensor_cores);
    EXPECT_EQ(choose_attention(backward_of(shape), without), AttentionKernel::tensor_cores);
  }
}

// Llama 3 8B: the gradients of the scores of the 4 query heads of a key-value head are 512 MiB, dQ
// in FP32 is 128 MiB.
TEST(ChooseAttention, LeavesABackwardPassToTheOwnKernelWhereCudnnWantsTooMuch) {
  AttentionShape llama = deepseek_v3(8192);
  llama.heads = 32;
  llama.kv_heads = 8;
  llama.d_qk = 128;
  EXPECT_EQ(choose_attention(forward_of(llama), {}), AttentionKernel::cudnn);
  EXPECT_EQ(choose_attention(backward_of(llama), {}), AttentionKernel::tensor_cores);
  AttentionDevice device;
  device.workspace_bytes = std::int64_t{600} << 20;
  EXPECT_EQ(choose_attention(backward_of(llama), device), AttentionKernel::cudnn);
}

TEST(ChooseAttention, KeepsToSomeOfTheSmsWithTheOwnKernel) {
  AttentionDevice device;
  device.sms = 112;
  EXPECT_EQ(choose_attention(forward_of(deepseek_v3(4096)), device), AttentionKernel::tensor_cores);
  EXPECT_EQ(why_not(AttentionKernel::cudnn, forward_of(deepseek_v3(4096)), device),
            "its engines cannot be kept to some of the SMs");
}

TEST(ChooseAttention, HasAKernelForFp32AndForTables) {
  EXPECT_EQ(choose_attention(forward_of(deepseek_v3(64), Format::fp32), {}),
            AttentionKernel::cuda_cores);
  EXPECT_EQ(why_not(AttentionKernel::tensor_cores, forward_of(deepseek_v3(64), Format::fp32), {}),
            "q is fp32, not bf16");
  const std::int32_t positions[1] = {0};
  AttentionShape split = deepseek_v3(64);
  split.query_positions = positions;
  EXPECT_EQ(why_not(AttentionKernel::cudnn, backward_of(split), {}),
            "query_positions: its mask has no table");
  AttentionDevice device;
  EXPECT_EQ(choose_attention(backward_of(split), device), AttentionKernel::cuda_cores);
  device.workspace_bytes = attention_table_bytes(split);
  EXPECT_EQ(choose_attention(backward_of(split), device), AttentionKernel::tensor_cores);
}

TEST(ChooseAttention, LooksAtAddressesAndPitches) {
  AttentionForward call = forward_of(deepseek_v3(256));
  call.v.data = static_cast<char*>(call.v.data) + 8;
  EXPECT_EQ(choose_attention(call, {}), AttentionKernel::cuda_cores);
  EXPECT_EQ(why_not(AttentionKernel::cudnn, call, {}),
            "rows of v do not begin at multiples of 16 bytes");
  call = forward_of(deepseek_v3(256));
  call.out.pitch += 4;
  EXPECT_EQ(why_not(AttentionKernel::tensor_cores, call, {}),
            "rows of out do not begin at multiples of 16 bytes");
}

TEST(ChooseAttention, LooksAtTheWorkspacesAddress) {
  AttentionBackward call = backward_of(deepseek_v3(1024));
  call.workspace = reinterpret_cast<void*>(std::uintptr_t{1 << 20} + 8);
  for (const AttentionKernel kernel : {AttentionKernel::cudnn, AttentionKernel::tensor_cores}) {
    EXPECT_EQ(why_not(kernel, call, {}), "the workspace does not begin at a multiple of 16 bytes");
  }
  EXPECT_EQ(choose_attention(call, {}), AttentionKernel::cuda_cores);
}

TEST(ChooseAttention, SaysWhyNoneCan) {
  AttentionShape wide = deepseek_v3(64);
  wide.d_qk = 264;
  try {
    choose_attention(forward_of(wide), {});
    FAIL() << "no error";
  } catch (const std::invalid_argument& e) {
    EXPECT_STREQ(e.what(),
                 "no attention kernel: cudnn: head dimensions beyond 256; tensor_cores: head "
                 "dimensions other than 192/128, 128/128 and 64/64; cuda_cores: head dimensions "
                 "beyond 256");
  }
}

TEST(ChooseAttention, NeedsNoMoreThanTheWorkspace) {
  // A GPU's 404 MB for 128 heads of 4096 tokens, 2 MB of them row sums: the gradients of the scores
  // of 11.99 heads, 4096^2 * 2 bytes each.
  const AttentionShape shape = deepseek_v3(4096);
  const std::int64_t bytes = attention_workspace_bytes(shape);
  EXPECT_EQ(bytes, 128LL * 4096 * 193 * 4);
  EXPECT_EQ(cudnn_rest_offset(shape), 128 * 4096 * 4);
  EXPECT_EQ(choose_piece(shape, bytes - cudnn_rest_offset(shape)).heads, 8);
  EXPECT_EQ(choose_piece(shape, std::int64_t{5} << 30).heads, 128);
  EXPECT_EQ(choose_piece(shape, 32 << 20).heads, 0);

  // 32 query heads read 8 of keys: pieces are of whole groups of 4. Two sequences come one by one.
  AttentionShape grouped = deepseek_v3(1024);
  grouped.batch = 2;
  grouped.heads = 32;
  grouped.kv_heads = 8;
  const AttentionPiece piece = choose_piece(grouped, 25 << 20);
  EXPECT_EQ(piece.batch, 1);
  EXPECT_EQ(piece.heads, 8);

  // One head of many tokens: its scores' gradients are more than dQ in FP32.
  AttentionShape longer = deepseek_v3(4096);
  longer.heads = longer.kv_heads = 1;
  EXPECT_EQ(choose_attention(backward_of(longer), {}), AttentionKernel::tensor_cores);
  EXPECT_LE(tensor_core_backward_bytes(longer), attention_workspace_bytes(longer));
  AttentionShape tiny = deepseek_v3(1);
  EXPECT_EQ(choose_attention(backward_of(tiny), {}), AttentionKernel::cuda_cores);
}

TEST(ChooseAttention, HandsOutEveryTileOnceLongestFirst) {
  for (const auto& [rows, heads, bytes] : std::vector<std::array<std::int64_t, 3>>{
           {4096, 128, 2'621'440}, {100, 7, 1}, {300, 5, 1 << 24}}) {
    for (const bool longest_last : {false, true}) {
      const AttentionWork work = choose_work(rows, heads, bytes, longest_last, {});
      ASSERT_EQ(work.tiles, (rows + 127) / 128);
      EXPECT_LE(work.grid, 132);
      EXPECT_GE(work.section, 1);
      EXPECT_TRUE(work.section == 1 || work.section * bytes <= AttentionDevice{}.l2_bytes / 2);
      std::set<std::pair<int, int>> seen;
      AttentionItem last = item_of(work, 0);
      for (std::int32_t i = 0; i < work.tiles * work.heads; ++i) {
        const AttentionItem item = item_of(work, i);
        EXPECT_TRUE(item.tile >= 0 && item.tile < work.tiles && item.head >= 0 &&
                    item.head < work.heads);
        EXPECT_TRUE(seen.insert({item.tile, item.head}).second);
        if (i % (work.section * work.tiles) != 0) {
          // Within a section no tile comes after a shorter one.
          EXPECT_TRUE(longest_last ? item.tile <= last.tile : item.tile >= last.tile);
          EXPECT_EQ(item.head / work.section, last.head / work.section);
        }
        last = item;
      }
      EXPECT_EQ(seen.size(),
                static_cast<std::size_t>(work.tiles) * static_cast<std::size_t>(heads));
    }
  }
}

TEST(ChooseAttention, KnowsWhatIsSeen) {
  const auto sees = [](int query, int key, int q_len, int kv_len, bool causal) {
    return !causal || key <= query + kv_len - q_len;
  };
  for (const auto& [q_len, kv_len] : std::vector<std::pair<int, int>>{{9, 9}, {5, 12}, {12, 5}}) {
    for (const bool causal : {false, true}) {
      for (int first = 0; first < q_len; first += 4) {
        int most = 0;
        for (int query = first; query < std::min(first + 4, q_len); ++query) {
          for (int key = 0; key < kv_len; ++key) {
            if (sees(query, key, q_len, kv_len, causal)) most = std::max(most, key + 1);
          }
        }
        EXPECT_EQ(keys_seen(first, 4, q_len, kv_len, causal), most);
      }
      for (int key = 0; key < kv_len; ++key) {
        int first = q_len;
        for (int query = q_len - 1; query >= 0; --query) {
          if (sees(query, key, q_len, kv_len, causal)) first = query;
        }
        EXPECT_EQ(first_query(key, q_len, kv_len, causal), first);
      }
    }
  }
}

}  // namespace
}  // namespace orrery::kernels
