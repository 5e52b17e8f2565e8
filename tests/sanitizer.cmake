# Builds what needs no libtorch with the sanitizers of `preset` and runs its tests; under the thread
# sanitizer those where threads or processes share memory.
set(build "${folder}/${preset}")
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH source)
set(targets)
set(chosen)
if(preset STREQUAL "tsan")
  set(targets --target memory_test transport_test collective_test cluster_test cluster_worker
      lockstep)
  set(ENV{TSAN_OPTIONS} "suppressions=${CMAKE_CURRENT_LIST_DIR}/tsan.supp")
  set(chosen -R "^(memory|transport|collective|cluster|launch|agent)($|\\.)")
endif()
if(preset STREQUAL "asan")
  set(ENV{GTEST_FILTER} "-*ShmThreads*")  # ranks as threads are the thread sanitizer's
  set(chosen -E "^((transport|collective)_mpi|across\\.mpirun)$")  # Open MPI leaks
endif()
set(tests "${CMAKE_CTEST_COMMAND};--test-dir;${build};--output-on-failure;-LE;soak;-j;2")
foreach(command "${CMAKE_COMMAND};--preset;${preset};-S;${source};-B;${build}"
                "${CMAKE_COMMAND};--build;${build};-j;2;${targets}" "${tests};${chosen}")
  execute_process(COMMAND ${command} RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${preset}: '${command}' ended with ${result}")
  endif()
endforeach()
