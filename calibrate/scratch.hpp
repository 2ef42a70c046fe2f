#pragma once
// Operands to time kernels on: random values of the right kind, in memory that is used in turns, so
// that each run of an op touches what no recent one has.
//
// Why in turns: between two executions of an op a training step touches the operands of hundreds of
// others, and an op that is repeated on the same operands would find all of them in the caches. Nor
// is what the op before has just written near: on a CPU it lies in other cores' caches, which takes
// as long as to get it from the last level; on a GPU it is as large as the caches are.

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "kernels/device.hpp"

namespace orrery {

class Scratch {
 public:
  /// What an operand holds. All but outputs are random: constant operands take less power, and so
  /// run at higher clocks, than a step's.
  enum class Content : std::uint8_t {
    activations,  ///< normal, mean 0, standard deviation 1
    weights,      ///< normal, 0.02
    updated,      ///< as activations, read and written (in place, accumulated to)
    positive,     ///< uniform from 0.001 to 0.01: scales, scores, second moments; may be updated
    outputs,      ///< anything
  };

  /// `rotation_bytes`: how much is used before the first of it comes again. At most
  /// `limit_bytes` are allocated in all (an operand beyond that is std::bad_alloc, as on a device
  /// that is full). Values follow from the seed. The device outlives it.
  Scratch(kernels::Device& device, std::int64_t rotation_bytes, std::int64_t limit_bytes,
          std::uint64_t seed);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  std::int64_t rotation_bytes() const { return rotation_bytes_; }

  /// A contiguous matrix. Scales are positive (of outputs: outputs).
  kernels::Matrix matrix(std::int64_t rows, std::int64_t columns, kernels::Format format,
                         Content content, kernels::Scaling scaling = kernels::Scaling::none);
  /// FP32 values.
  float* floats(std::int64_t count, Content content);
  void* bytes(std::int64_t count);  ///< outputs

  /// These values in device memory; equal requests of one shape get the same memory, since indices
  /// are small beside what they point into.
  const std::int32_t* indices(const std::vector<std::int32_t>& values);
  const void* constant(const void* data, std::size_t bytes);

  /// A new op: constants of the last are forgotten, and nothing handed out before is in use.
  void begin_op();
  /// Other operands for the same op: what is handed out until the next begin overlaps nothing of
  /// itself.
  void begin_slot();
  /// The slots to come use this op's weights again, in the same order. In a step forward and
  /// backward of a micro-batch each use a weight, so weights come again twice as soon as all else.
  void repeat_weights();
  /// Gives all memory back.
  void clear();
  /// Bytes handed out since begin_slot().
  std::int64_t slot_bytes() const { return slot_bytes_; }

 private:
  struct Pool {
    std::byte* memory = nullptr;
    std::int64_t bytes = 0;
    std::int64_t next = 0;
    std::int64_t slot_begin = 0;  ///< where this slot's operands begin ...
    bool wrapped = false;         ///< ... and whether they went on at the front
    std::int64_t op_begin = 0;    ///< where this op's operands begin
  };
  using Key = std::pair<Content, kernels::Format>;

  std::byte* take(Key key, std::int64_t bytes);
  void make(Pool& pool, Key key, std::int64_t bytes);
  void release_retired();
  std::byte* allocate(std::int64_t bytes);
  void release(std::byte* memory, std::int64_t bytes);

  kernels::Device& device_;
  std::int64_t rotation_bytes_;
  std::int64_t limit_bytes_;
  std::uint64_t seed_;
  std::int64_t allocated_bytes_ = 0;
  std::int64_t slot_bytes_ = 0;
  std::map<Key, Pool> pools_;
  std::map<Key, std::vector<std::byte>> blocks_;  ///< random values that pools are filled with
  std::vector<std::pair<std::byte*, std::int64_t>> retired_;  ///< pools that became too small
  std::map<std::string, std::byte*> constants_;               ///< by their bytes
};

}  // namespace orrery
