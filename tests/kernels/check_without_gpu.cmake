cmake_minimum_required(VERSION 3.25)
# Without a GPU orrery_probe says so, exits 1, and writes nothing that could be taken for a result.
# Run: cmake -DPROBE=<orrery_probe> -P check_without_gpu.cmake
execute_process(COMMAND ${CMAKE_COMMAND} -E env CUDA_VISIBLE_DEVICES= ${PROBE}
                RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE errors)
if(NOT result EQUAL 1 OR NOT errors MATCHES "no CUDA device: driver" OR NOT output STREQUAL "")
  message(FATAL_ERROR "exit ${result}, standard output '${output}', standard error '${errors}'")
endif()
