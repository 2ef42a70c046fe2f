cmake_minimum_required(VERSION 3.25)
# The checker must fail on a tree in which sim/ includes models/.
set(tree ${WORK}/bad_tree)
file(REMOVE_RECURSE ${tree})
file(WRITE ${tree}/sim/clock.cpp "#include \"models/model.hpp\"\n")
execute_process(COMMAND ${CMAKE_COMMAND} -DROOT=${tree} -P ${CMAKE_CURRENT_LIST_DIR}/check_includes.cmake RESULT_VARIABLE result
                ERROR_VARIABLE text OUTPUT_QUIET)
if(result EQUAL 0)
  message(FATAL_ERROR "a forbidden include passed")
endif()
if(NOT text MATCHES "sim/clock.cpp")
  message(FATAL_ERROR "the message does not name the file: ${text}")
endif()
