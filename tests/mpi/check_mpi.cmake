cmake_minimum_required(VERSION 3.25)
# Runs RANKS, a program, on 4 ranks by MPIEXEC (with OPTIONS) with argument WHAT. It must end within
# WITHIN seconds, with exit code 0 if WHAT is check, another one if not, or any if ANY is set, and have
# said what matches SAYS.
execute_process(COMMAND ${MPIEXEC} -np 4 --allow-run-as-root --oversubscribe ${OPTIONS} ${RANKS} ${WHAT}
                OUTPUT_VARIABLE out ERROR_VARIABLE err RESULT_VARIABLE result TIMEOUT ${WITHIN})
set(all "${out}${err}")
message("${all}")
if(result MATCHES "timeout")
  message(FATAL_ERROR "${RANKS} ${WHAT} did not end within ${WITHIN} s")
endif()
if(ANY)
elseif(WHAT STREQUAL "check" AND NOT result EQUAL 0)
  message(FATAL_ERROR "exit code ${result}")
elseif(NOT WHAT STREQUAL "check" AND result EQUAL 0)
  message(FATAL_ERROR "exit code 0, and a rank failed")
endif()
if(NOT all MATCHES "${SAYS}")
  message(FATAL_ERROR "nothing of what was said matches: ${SAYS}")
endif()
