# lockstep_layer(NAME [TORCH] [LAYERS lower layers …] [LIBRARIES packages …] [WITHOUT files …])
#
# One folder lockstep/NAME becomes the library lockstep_NAME (every .cc but the tests) and, where
# there are any *_test.cc, the test program NAME_test. Adding a file needs no edit here.
function(lockstep_layer NAME)
  cmake_parse_arguments(ARG "TORCH" "" "LAYERS;LIBRARIES;WITHOUT" ${ARGN})
  set(folder "${PROJECT_SOURCE_DIR}/lockstep/${NAME}")
  file(GLOB sources CONFIGURE_DEPENDS "${folder}/*.cc")
  list(TRANSFORM ARG_WITHOUT PREPEND "${folder}/")
  list(REMOVE_ITEM sources ${ARG_WITHOUT})
  set(tests ${sources})
  list(FILTER sources EXCLUDE REGEX "_test\\.cc$")
  list(FILTER tests INCLUDE REGEX "_test\\.cc$")

  add_library(lockstep_${NAME} STATIC ${sources})
  set_target_properties(lockstep_${NAME} PROPERTIES EXPORT_NAME ${NAME} LINKER_LANGUAGE CXX)
  target_compile_options(lockstep_${NAME} PRIVATE -Wall -Wextra -Werror -ffp-contract=off)
  target_include_directories(lockstep_${NAME} PUBLIC
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  list(TRANSFORM ARG_LAYERS PREPEND lockstep_)
  target_link_libraries(lockstep_${NAME} PUBLIC ${ARG_LAYERS} ${ARG_LIBRARIES})
  if(ARG_TORCH)
    target_link_libraries(lockstep_${NAME} PUBLIC lockstep_torch)
  endif()

  if(tests AND LOCKSTEP_TESTS)
    add_executable(${NAME}_test ${tests})
    target_compile_options(${NAME}_test PRIVATE -Wall -Wextra -Werror)
    target_link_libraries(${NAME}_test
                          PRIVATE lockstep_${NAME} GTest::gtest GTest::gmock GTest::gtest_main)
    add_test(NAME ${NAME} COMMAND ${NAME}_test --gtest_brief=1)
    set(timeout 240)
    if(LOCKSTEP_SANITIZE)
      set(timeout 900)
    endif()
    set_tests_properties(${NAME} PROPERTIES
      TIMEOUT ${timeout} LABELS unit ENVIRONMENT OMP_NUM_THREADS=1)
  endif()
endfunction()
