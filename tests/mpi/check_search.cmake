cmake_minimum_required(VERSION 3.25)
# ORRERY search under MPIEXEC gives the answer of one process (WHAT same), also where a rank is killed:
# by the ranks that are left where MPI goes on without it (WHAT recover), else by those that go on from
# the store (WHAT resume). Files go to WORK.
file(REMOVE_RECURSE ${WORK})
file(MAKE_DIRECTORY ${WORK})
# Long enough for a rank to be killed in the middle.
set(search ${ORRERY} search ${ROOT}/scenarios/llama3_70b_64_h100.yaml --quiet --top 200 --threads 1 --timeout 5)

# run(NAME COMMAND...): its answer in NAME.json, its status in `result`, what it said in `said`.
macro(run name)
  execute_process(COMMAND ${ARGN} ${search} --json ${WORK}/${name}.json --store ${WORK}/${WHAT}_${name}.sqlite
                  OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE result TIMEOUT 200)
  message("${name}: ${result}\n${said}")
endmacro()

function(expect_same name)
  file(READ ${WORK}/one.json one)
  file(READ ${WORK}/${name}.json other)
  if(NOT one STREQUAL other)
    message(FATAL_ERROR "${name}: another answer than that of one process")
  endif()
endfunction()

run(one)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "one process: ${result}")
endif()

set(launch ${MPIEXEC} -np 3 --allow-run-as-root --oversubscribe)
if(WHAT STREQUAL "same")
  run(ranks ${launch})
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "three ranks: ${result}")
  endif()
  expect_same(ranks)
  # What they stored is what one process would have: nothing is left to compute.
  run(ranks)
  expect_same(ranks)
  return()
endif()

# The last of mpirun's children is killed once something is in the store.
if(WHAT STREQUAL "recover")
  list(APPEND launch --enable-recovery)
endif()
file(WRITE ${WORK}/kill.sh "
  \"$@\" & launcher=$!
  for ((i = 0; i < 200; ++i)); do [[ -s ${WORK}/${WHAT}_ranks.sqlite ]] && break; sleep 0.02; done
  sleep 0.4
  status=$(grep -l \"^PPid:[[:space:]]*$launcher\$\" /proc/[0-9]*/status | sort -V | tail -n 1)
  kill -9 \"$(basename \"$(dirname \"$status\")\")\" && echo 'killed a rank'
  wait \"$launcher\"
")
run(ranks bash ${WORK}/kill.sh ${launch})
if(NOT said MATCHES "killed a rank")
  message(FATAL_ERROR "no rank was killed")
endif()
if(WHAT STREQUAL "recover")
  # What mpirun's own status is, is its business; that it ends, is ours.
  if(result MATCHES "timeout")
    message(FATAL_ERROR "the ranks that were left did not come to an end")
  endif()
  expect_same(ranks)
  return()
endif()
if(result EQUAL 0)
  message(FATAL_ERROR "a rank was killed, and the launcher says that all is well")
endif()
if(EXISTS ${WORK}/ranks.json)
  message(FATAL_ERROR "an answer after a rank was killed")
endif()
if(NOT said MATCHES "orrery: stopped; .* keeps what was evaluated, and the same command goes on with it")
  message(FATAL_ERROR "nothing was said of how to go on")
endif()
run(ranks ${launch})
expect_same(ranks)
