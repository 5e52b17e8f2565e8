# libtorch: from the folder LOCKSTEP_TORCH_PREFIX, else the environment's LOCKSTEP_TORCH, else the
# wheel in .deps that `./dev setup` installs.
include(cmake/find_libtorch.cmake)
set(LOCKSTEP_TORCH_PREFIX "$ENV{LOCKSTEP_TORCH}" CACHE PATH
    "A libtorch: the folder that holds include/ and lib/")
if(NOT LOCKSTEP_TORCH_PREFIX)
  file(GLOB LOCKSTEP_TORCH_PREFIX "${PROJECT_SOURCE_DIR}/.deps/lib/python3*/site-packages/torch")
endif()
lockstep_find_libtorch("${LOCKSTEP_TORCH_PREFIX}" torch_libraries LOCKSTEP_TORCH_VERSION)
if(NOT torch_libraries)
  message(FATAL_ERROR "no libtorch in '${LOCKSTEP_TORCH_PREFIX}': run ./dev setup, or set "
                      "LOCKSTEP_TORCH to the folder that holds its include/ and lib/")
endif()
message(STATUS "libtorch ${LOCKSTEP_TORCH_VERSION}: ${LOCKSTEP_TORCH_PREFIX}")

add_library(lockstep_torch INTERFACE)
set_target_properties(lockstep_torch PROPERTIES EXPORT_NAME libtorch)
lockstep_use_libtorch(lockstep_torch "${LOCKSTEP_TORCH_PREFIX}" "${torch_libraries}")
