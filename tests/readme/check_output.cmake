cmake_minimum_required(VERSION 3.25)
# What README.md shows between <!-- NAME:begin --> and <!-- NAME:end --> is what the program prints.
# Where results were meant to move, rewrite the blocks (build/release/orrery must be up to date) and
# read the diff:
#   cmake -DUPDATE=ON -P tests/readme/check_output.cmake
if(NOT ROOT)
  cmake_path(SET ROOT NORMALIZE ${CMAKE_CURRENT_LIST_DIR}/../..)
endif()
if(NOT ORRERY)
  set(ORRERY ${ROOT}/build/release/orrery)
endif()
set(run_command run scenarios/deepseek_v3_2048_h800.yaml)
set(validation_command validate)
set(what_if_command compare --what-ifs scenarios/what_if/deepseek_v3.yaml)
set(scaled_command compare scenarios/profiles/h100.yaml scenarios/profiles/h100_from_h200.yaml
                   scenarios/profiles/h200.yaml)
set(search_command search scenarios/mixtral_8x7b_64_h100.yaml --top 5)

file(READ ${ROOT}/README.md readme)
foreach(name run validation what_if scaled search)
  execute_process(COMMAND ${ORRERY} ${${name}_command} WORKING_DIRECTORY ${ROOT}
                  OUTPUT_VARIABLE output ERROR_QUIET COMMAND_ERROR_IS_FATAL ANY)
  string(STRIP "${output}" output)
  set(wanted "<!-- ${name}:begin -->\n```\n${output}\n```\n")
  string(FIND "${readme}" "<!-- ${name}:begin -->\n" begin)
  string(FIND "${readme}" "<!-- ${name}:end -->" end)
  if(begin EQUAL -1 OR end LESS begin)
    message(FATAL_ERROR "README.md has no block ${name}")
  endif()
  math(EXPR length "${end} - ${begin}")
  string(SUBSTRING "${readme}" ${begin} ${length} shown)
  if(UPDATE)
    string(SUBSTRING "${readme}" 0 ${begin} before)
    string(SUBSTRING "${readme}" ${end} -1 after)
    set(readme "${before}${wanted}${after}")
  elseif(NOT shown STREQUAL wanted)
    message(FATAL_ERROR "README.md shows other numbers than `orrery ${${name}_command}` prints; "
                        "cmake -DUPDATE=ON -P tests/readme/check_output.cmake rewrites them.\n${output}")
  endif()
endforeach()
if(UPDATE)
  file(WRITE ${ROOT}/README.md "${readme}")
endif()
