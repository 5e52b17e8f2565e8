# NCCL, for groups of CUDA devices: where the toolkit and nccl.h are found, or
# -DLOCKSTEP_NCCL_PREFIX names NCCL's folder. Else lockstep/collective/no_nccl.cc says so when it
# is asked for.
#   LOCKSTEP_NCCL          what to link
#   LOCKSTEP_NCCL_WITHOUT  the files that are not for this build
find_path(LOCKSTEP_CUDA_HEADERS cuda_runtime.h PATHS /usr/local/cuda/include)
find_library(LOCKSTEP_CUDART cudart PATHS /usr/local/cuda/lib64)
find_path(LOCKSTEP_NCCL_HEADERS nccl.h HINTS "${LOCKSTEP_NCCL_PREFIX}/include")
find_library(LOCKSTEP_NCCL_LIBRARY NAMES nccl libnccl.so.2 HINTS "${LOCKSTEP_NCCL_PREFIX}/lib")
mark_as_advanced(LOCKSTEP_CUDA_HEADERS LOCKSTEP_CUDART LOCKSTEP_NCCL_HEADERS LOCKSTEP_NCCL_LIBRARY)
if(LOCKSTEP_CUDA_HEADERS AND LOCKSTEP_CUDART AND LOCKSTEP_NCCL_HEADERS AND LOCKSTEP_NCCL_LIBRARY)
  # Only who makes such a group loads them.
  set(LOCKSTEP_NCCL "-Wl,--push-state,--as-needed"
      "${LOCKSTEP_NCCL_LIBRARY}" "${LOCKSTEP_CUDART}" "-Wl,--pop-state")
  set(LOCKSTEP_NCCL_WITHOUT no_nccl.cc)
  set_source_files_properties(
    lockstep/collective/nccl_group.cc PROPERTIES
    INCLUDE_DIRECTORIES "${LOCKSTEP_CUDA_HEADERS};${LOCKSTEP_NCCL_HEADERS}")
else()
  set(LOCKSTEP_NCCL "")
  set(LOCKSTEP_NCCL_WITHOUT nccl_group.cc)
endif()
