# Two libraries for other projects, and their installation:
#   lockstep::core      everything below the line: groups, the world, data, checkpoints; no libtorch
#   lockstep::lockstep  all of it: data_parallel and what comes with it
include(CMakePackageConfigHelpers)

set(core_layers base observe job data memory transport collective update checkpoint cluster)
add_library(lockstep_core INTERFACE)
set_target_properties(lockstep_core PROPERTIES EXPORT_NAME core)
list(TRANSFORM core_layers PREPEND lockstep_ OUTPUT_VARIABLE core_targets)
target_link_libraries(lockstep_core INTERFACE ${core_targets})
target_compile_features(lockstep_core INTERFACE cxx_std_20)
add_library(lockstep::core ALIAS lockstep_core)
install(TARGETS lockstep_core ${core_targets} EXPORT lockstepCoreTargets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})

set(package_folder "${CMAKE_INSTALL_LIBDIR}/cmake/lockstep")
if(LOCKSTEP_WITH_TORCH)
  add_library(lockstep_lockstep INTERFACE)
  set_target_properties(lockstep_lockstep PROPERTIES EXPORT_NAME lockstep)
  set(torch_targets lockstep_bridge lockstep_parallel lockstep_train)
  target_link_libraries(lockstep_lockstep INTERFACE lockstep_core ${torch_targets})
  add_library(lockstep::lockstep ALIAS lockstep_lockstep)
  install(TARGETS lockstep_lockstep lockstep_torch ${torch_targets} EXPORT lockstepTorchTargets
          ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
  install(EXPORT lockstepTorchTargets NAMESPACE lockstep:: DESTINATION ${package_folder})
endif()
install(EXPORT lockstepCoreTargets NAMESPACE lockstep:: DESTINATION ${package_folder})

configure_package_config_file(cmake/lockstepConfig.cmake.in lockstepConfig.cmake
                              INSTALL_DESTINATION ${package_folder})
write_basic_package_version_file(lockstepConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/lockstepConfig.cmake" cmake/find_libtorch.cmake
              "${PROJECT_BINARY_DIR}/lockstepConfigVersion.cmake"
        DESTINATION ${package_folder})
install(DIRECTORY lockstep DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h"
        PATTERN "*_test.h" EXCLUDE
        PATTERN tools EXCLUDE PATTERN recipes EXCLUDE)
install(FILES LICENSE README.md DESTINATION ${CMAKE_INSTALL_DOCDIR})
install(DIRECTORY deploy docs examples DESTINATION ${CMAKE_INSTALL_DOCDIR}
        PATTERN CMakeLists.txt EXCLUDE PATTERN key EXCLUDE)

# lockstep finds lockstep-worker beside itself, and that the libtorch it was built with.
if(TARGET lockstep-worker)
  set_target_properties(lockstep-worker PROPERTIES INSTALL_RPATH "${LOCKSTEP_TORCH_PREFIX}/lib")
endif()
foreach(program lockstep lockstep-worker)
  if(TARGET ${program})
    install(TARGETS ${program} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
  endif()
endforeach()
