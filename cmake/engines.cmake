# The engines of lockstep/transport: what this machine has of them. One that is missing is a file
# no_ENGINE.cc, which says so when it is asked for.
#   LOCKSTEP_ENGINES          what to link, for the linker, with commas
#   LOCKSTEP_ENGINES_WITHOUT  the files that are not for this build
set(LOCKSTEP_ENGINES -lzmq)
find_library(LOCKSTEP_UCP ucp)
find_library(LOCKSTEP_UCS ucs)
find_path(LOCKSTEP_UCX_HEADERS ucp/api/ucp.h)
mark_as_advanced(LOCKSTEP_UCP LOCKSTEP_UCS LOCKSTEP_UCX_HEADERS)
if(LOCKSTEP_UCP AND LOCKSTEP_UCS AND LOCKSTEP_UCX_HEADERS)
  string(APPEND LOCKSTEP_ENGINES ",${LOCKSTEP_UCP},${LOCKSTEP_UCS}")
  set(LOCKSTEP_ENGINES_WITHOUT no_ucx.cc)
else()
  message(STATUS "no engine ucx: install libucx-dev for it")
  set(LOCKSTEP_ENGINES_WITHOUT ucx.cc)
endif()
