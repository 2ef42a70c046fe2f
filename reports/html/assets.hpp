#pragma once
// The files of this folder that the page is made of, as embed.cmake put them into the program.

#include <string_view>

namespace orrery {

struct PageAsset {
  std::string_view text;
  std::string_view hash;  ///< "sha256-...", as a Content-Security-Policy names it
};

struct PageAssets {
  PageAsset page;     ///< page.html, with {{placeholders}}
  PageAsset style;    ///< report.css
  PageAsset library;  ///< D3's modules
  PageAsset script;   ///< report.js
  PageAsset licence;  ///< of the library
};

const PageAssets& page_assets();

}  // namespace orrery
