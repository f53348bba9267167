# The shared library exports exactly what EXPECTED lists: nothing less (programs would not start), nothing more (a host
# with another copy of one of our libraries would mix them).
execute_process(COMMAND ${NM} -D --defined-only ${LIBRARY} OUTPUT_VARIABLE output COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[ ]([^ \n]+)\n" lines "${output}")
list(TRANSFORM lines STRIP)
list(SORT lines)
file(STRINGS ${EXPECTED} expected)
list(SORT expected)
if(NOT "${lines}" STREQUAL "${expected}")
  message(FATAL_ERROR "exported: ${lines}\nexpected: ${expected}")
endif()
