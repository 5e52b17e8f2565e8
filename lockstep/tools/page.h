// page.html, as the build put it into the program.
#pragma once

#include <string_view>

namespace lockstep {

extern const std::string_view kPage;

}  // namespace lockstep
