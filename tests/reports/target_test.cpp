#include "reports/target.hpp"

#include <gtest/gtest.h>

namespace orrery {
namespace {

Target read(const std::string& text) {
  Problems problems;
  const auto target = parse_target(text, problems);
  EXPECT_TRUE(problems.empty()) << format_problems(problems.list());
  EXPECT_TRUE(target.has_value()) << text;
  return target.value_or(Target{});
}

std::string problems_of(const std::string& text) {
  Problems problems;
  EXPECT_FALSE(parse_target(text, problems).has_value()) << text;
  return format_problems(problems.list());
}

TEST(Target, IsReadAsItIsSaid) {
  const Target rate = read("tokens/day >= 250G");
  EXPECT_EQ(rate.quantity, TargetQuantity::tokens_per_day);
  EXPECT_TRUE(rate.at_least);
  EXPECT_EQ(rate.value, 250e9);
  const Target days = read("Days<=60 for 14.8T tokens");
  EXPECT_EQ(days.quantity, TargetQuantity::days);
  EXPECT_FALSE(days.at_least);
  EXPECT_EQ(days.value, 60);
  EXPECT_EQ(days.tokens, 14.8e12);
  const Target cost = read("cost <= $6M for 14.8 T at 2 USD/GPU-hour");
  EXPECT_EQ(cost.value, 6e6);
  EXPECT_EQ(cost.tokens, 14.8e12);
  EXPECT_EQ(cost.usd_per_gpu_hour, 2);
  const Target other_way = read("cost < 6e6 USD at $2 for 14.8T tokens");
  EXPECT_EQ(other_way.value, 6e6);
  EXPECT_EQ(other_way.tokens, 14.8e12);
  EXPECT_EQ(other_way.usd_per_gpu_hour, 2);
  EXPECT_EQ(read("step time <= 500 ms").value, 0.5);
  EXPECT_EQ(read("mfu > 40 %").value, 0.4);
  EXPECT_EQ(read("memory <= 70 GB").value, 70e9);
  EXPECT_EQ(read("gpu-hours <= 3M for 14.8T tokens").value, 3e6);
}

TEST(Target, SaysWhereItIsWrong) {
  EXPECT_EQ(problems_of("tokns/day >= 250G"),
            "--target:1:1: error: unknown quantity 'tokns/day'\n"
            "  tokns/day >= 250G\n"
            "  ^\n"
            "  hint: did you mean 'tokens/day'?\n");
  EXPECT_NE(problems_of("days <= sixty for 14.8T tokens")
                .find("--target:1:9: error: 'sixty' is no value of days"),
            std::string::npos);
  EXPECT_NE(problems_of("days = 60").find("--target:1:6: error: '=' says neither"),
            std::string::npos);
  EXPECT_NE(problems_of("fast enough").find("there is no >= or <="), std::string::npos);
  EXPECT_NE(problems_of("days <= 60 for many").find("'many' is no a number of tokens"),
            std::string::npos);
  EXPECT_NE(problems_of("memory <= 3 s").find("'3 s' is no value of memory"), std::string::npos);
  // Both at once.
  const std::string both = problems_of("dys <= 60 for many");
  EXPECT_NE(both.find("unknown quantity"), std::string::npos);
  EXPECT_NE(both.find("'many'"), std::string::npos);
}

Report report_of(double step_s) {
  Report r;
  r.step_time_s = step_s;
  r.gpus = 100;
  r.tokens_per_step = 1e6;
  r.tokens_per_s_per_gpu = 1e6 / step_s / 100;
  r.tokens_per_day = 86400 * 1e6 / step_s;
  r.gpu_hours_per_trillion_tokens = 100 * 24 * 1e12 / r.tokens_per_day;
  r.mfu_causal = 0.4;
  return r;
}

TEST(Judge, ValuesAreThoseOfTheRun) {
  // 1e12 tokens are 1e6 steps of 2 s on 100 GPUs.
  const Report r = report_of(2);
  EXPECT_DOUBLE_EQ(judge(read("days <= 30 for 1T tokens"), r, {}).value, 2e6 / 86400);
  EXPECT_DOUBLE_EQ(judge(read("gpu-hours <= 60K for 1T tokens"), r, {}).value, 2e8 / 3600);
  EXPECT_DOUBLE_EQ(judge(read("cost <= 1M for 1T tokens at 3"), r, {}).value, 3 * 2e8 / 3600);
  // Of a goodput of 80 %, all takes a quarter longer.
  TargetContext c;
  c.goodput = c.goodput_low = c.goodput_high = 0.8;
  c.tokens = 1e12;
  EXPECT_DOUBLE_EQ(judge(read("days <= 30"), r, c).value, 2e6 / 86400 / 0.8);
  EXPECT_DOUBLE_EQ(judge(read("tokens/day >= 1G"), r, c).value, 43200e6 * 0.8);
  EXPECT_DOUBLE_EQ(judge(read("step <= 3 s"), r, c).value, 2);
}

TEST(Judge, VerdictsKnowHowSureTheyAre) {
  TargetContext c;
  c.spread = 0.05;  // 1.8 to 2.2 s
  const Report r = report_of(2);
  EXPECT_EQ(judge(read("step <= 2.3 s"), r, c).verdict, Verdict::met);
  EXPECT_EQ(judge(read("step <= 2.1 s"), r, c).verdict, Verdict::met_closely);
  EXPECT_EQ(judge(read("step <= 1.9 s"), r, c).verdict, Verdict::missed_closely);
  EXPECT_EQ(judge(read("step <= 1.7 s"), r, c).verdict, Verdict::missed);
  const Judgement j = judge(read("step <= 2.5 s"), r, c);
  EXPECT_DOUBLE_EQ(j.low, 1.8);
  EXPECT_DOUBLE_EQ(j.high, 2.2);
  EXPECT_DOUBLE_EQ(j.margin, 0.2);
  // What a published step was longer by counts where it is more than the spread.
  c.published_most = 1 / (1 - 0.2);
  EXPECT_DOUBLE_EQ(judge(read("step <= 2.3 s"), r, c).high, 2.5);
  EXPECT_EQ(judge(read("step <= 2.3 s"), r, c).verdict, Verdict::met_closely);
  EXPECT_DOUBLE_EQ(judge(read("step <= 2.3 s"), r, c).low, 1.8);
}

TEST(Judge, AsksForWhatItNeeds) {
  const Report r = report_of(2);
  EXPECT_THROW(judge(read("days <= 60"), r, {}), InputError);
  EXPECT_THROW(judge(read("cost <= 1M for 1T tokens"), r, {}), InputError);
  TargetContext budget;
  budget.budget_gpu_hours = 1000;
  budget.budget_days = 10;
  EXPECT_EQ(judge(read("days <= 60"), r, budget).value, 10);
  EXPECT_EQ(judge(read("cost <= 1M at 2"), r, budget).value, 2000);
  EXPECT_THROW(judge(read("cost <= 1M"), r, budget), InputError);
  budget.budget_cost_usd = 3000;
  EXPECT_EQ(judge(read("cost <= 1M"), r, budget).value, 3000);
  // A budget without failures gets those that are known; one that has a goodput keeps it.
  budget.goodput = budget.goodput_low = budget.goodput_high = 0.8;
  EXPECT_EQ(judge(read("days <= 60"), r, budget).value, 12.5);
  budget.budget_has_goodput = true;
  EXPECT_EQ(judge(read("days <= 60"), r, budget).value, 10);
}

}  // namespace
}  // namespace orrery
