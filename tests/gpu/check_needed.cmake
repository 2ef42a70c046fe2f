cmake_minimum_required(VERSION 3.25)
# The program starts on a machine without CUDA: it needs no library of CUDA. The module, which it
# loads when asked for a GPU, needs no CUDA runtime (it has one inside) and no driver (which may be
# missing, and is reported then).
# Run: cmake -DREADELF=<readelf> -DPROGRAM=<orrery> -DMODULE=<liborrery_cuda.so> -P check_needed.cmake
function(check_needed file pattern)
  execute_process(COMMAND ${READELF} -d ${file} OUTPUT_VARIABLE dynamic COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "\\(NEEDED\\)[^\n]*" needed "${dynamic}")
  if(NOT needed)
    message(FATAL_ERROR "${file} needs nothing at all: is that a program?\n${dynamic}")
  endif()
  foreach(library IN LISTS needed)
    if(library MATCHES "${pattern}")
      message(FATAL_ERROR "${file} must not need ${library}")
    endif()
  endforeach()
endfunction()

check_needed(${PROGRAM} "cuda|cublas|cudnn|cupti|nvrtc|nccl")
check_needed(${MODULE} "libcuda\\.|libcudart")
