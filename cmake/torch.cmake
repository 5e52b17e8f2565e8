# libtorch: from the folder LOCKSTEP_TORCH_PREFIX, else the environment's LOCKSTEP_TORCH, else the wheel in .deps that
# `./dev setup` installs. Its headers come after the system's (-idirafter): the wheel also ships fmt and others.
set(LOCKSTEP_TORCH_PREFIX "$ENV{LOCKSTEP_TORCH}" CACHE PATH "A libtorch: the folder that holds include/ and lib/")
if(NOT LOCKSTEP_TORCH_PREFIX)
  file(GLOB wheel "${PROJECT_SOURCE_DIR}/.deps/lib/python3*/site-packages/torch")
  set(LOCKSTEP_TORCH_PREFIX "${wheel}")
endif()
find_library(TORCH_CPU torch_cpu PATHS "${LOCKSTEP_TORCH_PREFIX}/lib" NO_DEFAULT_PATH NO_CACHE)
find_library(TORCH_C10 c10 PATHS "${LOCKSTEP_TORCH_PREFIX}/lib" NO_DEFAULT_PATH NO_CACHE)
find_library(TORCH_ALL torch PATHS "${LOCKSTEP_TORCH_PREFIX}/lib" NO_DEFAULT_PATH NO_CACHE)
if(NOT TORCH_CPU OR NOT TORCH_C10 OR NOT TORCH_ALL)
  message(FATAL_ERROR "no libtorch in '${LOCKSTEP_TORCH_PREFIX}': run ./dev setup, or set LOCKSTEP_TORCH to a libtorch")
endif()
message(STATUS "libtorch: ${LOCKSTEP_TORCH_PREFIX}")

add_library(lockstep_torch INTERFACE)
set_target_properties(lockstep_torch PROPERTIES EXPORT_NAME torch_found)
target_compile_options(lockstep_torch INTERFACE
  "$<BUILD_INTERFACE:SHELL:-idirafter ${LOCKSTEP_TORCH_PREFIX}/include>"
  "$<BUILD_INTERFACE:SHELL:-idirafter ${LOCKSTEP_TORCH_PREFIX}/include/torch/csrc/api/include>")
target_link_libraries(lockstep_torch INTERFACE
  "$<BUILD_INTERFACE:${TORCH_ALL}>" "$<BUILD_INTERFACE:${TORCH_CPU}>" "$<BUILD_INTERFACE:${TORCH_C10}>")
target_link_options(lockstep_torch INTERFACE "$<BUILD_INTERFACE:-Wl,-rpath,${LOCKSTEP_TORCH_PREFIX}/lib>")
