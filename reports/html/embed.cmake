# Turns the page's files into C++ (html/assets.hpp), and says what the page's policy may let run: the
# SHA-256 of style and scripts as Content-Security-Policy names them. Run at build time:
#   cmake -DOUT=assets.cpp -DHTML=<this folder> -DLIBRARY=<d3 modules> -DLICENCES=<files> -P embed.cmake
cmake_minimum_required(VERSION 3.25)

# Base64 of a string of hexadecimal digits.
function(base64_of_hex hex out)
  set(letters "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
  set(text "")
  string(LENGTH "${hex}" digits)
  math(EXPR padding "(3 - (${digits} / 2) % 3) % 3")
  string(REPEAT "00" ${padding} zeros)
  string(APPEND hex "${zeros}")
  string(LENGTH "${hex}" digits)
  math(EXPR last "${digits} - 1")
  foreach(at RANGE 0 ${last} 3)  # three digits are two letters
    string(SUBSTRING "${hex}" ${at} 3 group)
    math(EXPR first "(0x${group} >> 6) & 63")
    math(EXPR second "0x${group} & 63")
    string(SUBSTRING "${letters}" ${first} 1 a)
    string(SUBSTRING "${letters}" ${second} 1 b)
    string(APPEND text "${a}${b}")
  endforeach()
  string(LENGTH "${text}" length)
  math(EXPR kept "${length} - ${padding}")
  string(SUBSTRING "${text}" 0 ${kept} text)
  string(REPEAT "=" ${padding} equals)
  set(${out} "${text}${equals}" PARENT_SCOPE)
endfunction()

# As an array, since compilers limit the length of string literals.
function(array name file out)
  file(READ ${file} hex HEX)
  string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes "${hex}")
  set(${out} "const unsigned char k${name}[] = {${bytes}0};\n" PARENT_SCOPE)
endfunction()

# Each module between lines, so that one that ends without a semicolon cannot run into the next.
set(library "")
foreach(module IN LISTS LIBRARY)
  file(READ ${module} text)
  string(REGEX REPLACE "//# sourceMappingURL=[^\n]*" "" text "${text}")
  if(text MATCHES "</[sS][cC][rR][iI][pP][tT]")
    message(FATAL_ERROR "${module} would end the script that it is embedded in")
  endif()
  string(APPEND library "${text}\n;\n")
endforeach()
set(library_file ${OUT}.library.js)
file(WRITE ${library_file} "${library}")

set(licence "")
foreach(part IN LISTS LICENCES)
  file(READ ${part} text)
  string(APPEND licence "${text}\n")
endforeach()
set(licence_file ${OUT}.licence.txt)
file(WRITE ${licence_file} "${licence}")

set(arrays "")
set(views "")
foreach(asset Page:${HTML}/page.html Style:${HTML}/report.css Library:${library_file}
        Script:${HTML}/report.js Licence:${licence_file})
  string(REGEX MATCH "^([A-Za-z]+):(.*)$" ignored "${asset}")
  set(name ${CMAKE_MATCH_1})
  array(${name} ${CMAKE_MATCH_2} text)
  string(APPEND arrays "${text}")
  file(SHA256 ${CMAKE_MATCH_2} digest)
  base64_of_hex("${digest}" digest)
  string(APPEND views "    .${name} = {view(k${name}), \"sha256-${digest}\"},\n")
endforeach()
string(REGEX REPLACE "[.]Page" ".page" views "${views}")
string(REGEX REPLACE "[.]Style" ".style" views "${views}")
string(REGEX REPLACE "[.]Library" ".library" views "${views}")
string(REGEX REPLACE "[.]Script" ".script" views "${views}")
string(REGEX REPLACE "[.]Licence" ".licence" views "${views}")
file(WRITE ${OUT} "// Written by reports/html/embed.cmake.
#include \"reports/html/assets.hpp\"

namespace orrery {

namespace {

${arrays}
template <std::size_t N>
std::string_view view(const unsigned char (&bytes)[N]) {
  return {reinterpret_cast<const char*>(bytes), N - 1};
}

}  // namespace

const PageAssets& page_assets() {
  static const PageAssets assets = {
${views}  };
  return assets;
}

}  // namespace orrery
")
