#pragma once
// The capacity report as one HTML file that needs nothing else: no request leaves it, and its
// Content-Security-Policy allows only the style and the scripts that this program put in.

#include <string>

#include "reports/capacity.hpp"

namespace orrery {

/// Equal reports give equal bytes. Names of users' files are data of the page, never its text.
std::string html_page(const CapacityReport& report);

/// JSON without spaces, in which no text can end the script element that holds it: '<' is \u003c.
/// Numbers keep their digits.
std::string json_for_page(const std::string& json);

/// Text for an element or a quoted attribute.
std::string in_html(std::string_view text);

}  // namespace orrery
