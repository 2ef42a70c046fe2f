#!/usr/bin/env python3
"""Prints the README's speed table: one step of DeepSeek-V3 on 2048 GPUs, YAML to report.

    cmake --preset release && cmake --build build/release --target orrery step_bench
    tests/bench/speed_table.py build/release

Parts come from step_bench, whole processes from running orrery; everything in one go, so that the
ratios compare like with like. Each figure is the fastest of its repetitions: what others do on the
machine only ever adds. All ranks need 6 GB and half a minute.
"""

import json
import os
import re
import subprocess
import sys
import time

SCENARIO = "scenarios/deepseek_v3_2048_h800.yaml"
UNEVEN = "tests/bench/deepseek_v3_uneven.yaml"
LARGE = "tests/bench/deepseek_v3_131072_h100.yaml"


def run_process(arguments, repetitions):
    """Seconds of the fastest run, and the largest resident set in bytes."""
    seconds, largest = float("inf"), 0
    for _ in range(repetitions):
        begin = time.perf_counter()
        child = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = min(seconds, time.perf_counter() - begin)
        if status != 0:
            sys.exit(f"{' '.join(arguments)} failed")
        largest = max(largest, usage.ru_maxrss * 1024)
    return seconds, largest


def run_benchmarks(program, pattern, repetitions):
    """Fastest repetition of each benchmark, by its name without google-benchmark's suffixes."""
    output = subprocess.run(
        [program, f"--benchmark_filter={pattern}", "--benchmark_format=json",
         f"--benchmark_repetitions={repetitions}"],
        check=True, capture_output=True, text=True).stdout
    fastest = {}
    for row in json.loads(output)["benchmarks"]:
        if row["run_type"] != "iteration":
            continue
        name = re.sub(r"/(iterations:\d+|real_time|repeats:\d+)", "", row["name"])
        if name not in fastest or row["real_time"] < fastest[name]["real_time"]:
            fastest[name] = row
    return fastest


def time_text(milliseconds):
    if milliseconds < 1:
        return f"{milliseconds:.2f} ms"
    return f"{milliseconds:.1f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.2f} s"


def rate_text(row):
    return f"{time_text(row['real_time'])} ({row['items_per_second'] / 1e6:.0f} M ops/s)"


def machine_text():
    with open("/proc/cpuinfo") as file:
        models = re.findall(r"^model name\s*: (.*)$", file.read(), re.MULTILINE)
    return f"{len(models)} cores of {models[0]}" if models else f"{os.cpu_count()} cores"


def main():
    build = sys.argv[1] if len(sys.argv) > 1 else "build/release"
    os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
    orrery, bench = os.path.join(build, "orrery"), os.path.join(build, "tests", "step_bench")
    # The number of ranks does not matter to reading: it has one row for both.
    rows = run_benchmarks(bench, "read_scenario|representative", 7)
    rows.update(run_benchmarks(bench, "all_ranks", 2))
    one, every = (lambda part: rows["representative/" + part]), (lambda p: rows["all_ranks/" + p])
    one_s, one_bytes = run_process([orrery, "run", SCENARIO], 15)
    every_s, every_bytes = run_process([orrery, "run", SCENARIO, "--all-ranks"], 2)
    formula = ["--network", "formula"]
    one_formula_s, _ = run_process([orrery, "run", SCENARIO] + formula, 15)
    every_formula_s, _ = run_process([orrery, "run", SCENARIO, "--all-ranks"] + formula, 2)
    one_uneven_s, _ = run_process([orrery, "run", UNEVEN], 5)
    every_uneven_s, uneven_bytes = run_process([orrery, "run", UNEVEN, "--all-ranks"], 1)
    large_s, large_bytes = run_process([orrery, "run", LARGE], 3)

    def row(name, left, right):
        print(f"| {name} | {left} | {right} |")

    row("", "one rank per position (16)", "all ranks (2048)")
    row("---", "---:", "---:")
    row("operations", f"{one('sweep')['ops']:,.0f}", f"{every('sweep')['ops']:,.0f}")
    row("**whole process, YAML to report**", f"**{time_text(one_s * 1e3)}**",
        f"**{time_text(every_s * 1e3)}**")
    row("memory of the process", f"{one_bytes / 1e6:.0f} MB", f"{every_bytes / 1e9:.1f} GB")
    row("the same by formula, `--network formula`", time_text(one_formula_s * 1e3),
        time_text(every_formula_s * 1e3))
    row("the same with uneven experts", time_text(one_uneven_s * 1e3),
        f"{time_text(every_uneven_s * 1e3)}, {uneven_bytes / 1e9:.1f} GB")
    row("131,072 GPUs in a three-layer fat tree",
        f"{time_text(large_s * 1e3)}, {large_bytes / 1e6:.0f} MB", "")
    row("Program and timeline", *(f"{r('sweep')['bytes/op']:.0f} bytes/op" for r in (one, every)))
    reading = time_text(rows["read_scenario"]["real_time"])
    row("read and check the scenario", reading, reading)
    row("build the Program", rate_text(one("build_step")), rate_text(every("build_step")))
    row("price its shapes", *(time_text(r("price_all")["real_time"]) for r in (one, every)))
    row("sweep", rate_text(one("sweep")), rate_text(every("sweep")))
    row("summarise", rate_text(one("summarise")), rate_text(every("summarise")))
    row("event engine instead of the sweep", rate_text(one("simulate")), "")
    row("loads of all links, and those that can limit", time_text(one("traffic_of")["real_time"]),
        time_text(every("traffic_of")["real_time"]))
    row("prices, loads and event engine with flows", rate_text(one("run_flows")),
        rate_text(every("run_flows")))
    engine = one("simulate")["real_time"] / one("sweep")["real_time"]
    per_op = one("whole")["items_per_second"] / every("whole")["items_per_second"]
    print(f"\nThe event engine takes {engine:.0f} times as long as the sweep. Per operation, all "
          f"ranks take {per_op:.1f} times\nas long as one rank per position. ({machine_text()}; "
          "Release build.)")


if __name__ == "__main__":
    main()
