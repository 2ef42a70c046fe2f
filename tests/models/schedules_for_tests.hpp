#pragma once
// Every schedule with four pipeline ranks and few micro-batches.

#include "models/schedule.hpp"

namespace orrery::test {

struct SmallSchedule {
  ScheduleKind kind;
  int ranks, chunks, micro_batches;
};
inline constexpr SmallSchedule kSmallSchedules[] = {
    {ScheduleKind::gpipe, 4, 1, 6},
    {ScheduleKind::one_f_one_b, 4, 1, 8},
    {ScheduleKind::interleaved_1f1b, 4, 2, 8},
    {ScheduleKind::zb_h1, 4, 1, 8},
    {ScheduleKind::zb_v, 4, 2, 9},
    {ScheduleKind::dual_pipe, 4, 2, 12},
    {ScheduleKind::dual_pipe_v, 4, 2, 12},
};

}  // namespace orrery::test
