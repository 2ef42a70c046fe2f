#include "sim/config.hpp"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

namespace orrery {
namespace {

/// All that is said about a text that cannot be read.
std::string problems_of(const std::string& text, const std::string& name = "f.yaml") {
  Problems problems;
  read_document_text(text, name, problems);
  return format_problems(problems.list());
}

Node good(const std::string& text, const std::string& name = "f.yaml") {
  Problems problems;
  Node node = read_document_text(text, name, problems);
  EXPECT_TRUE(problems.empty()) << format_problems(problems.list());
  return node;
}

/// What `read` reports about the map `text`.
template <class Read>
std::string report(const std::string& text, Read read) {
  Problems problems;
  MapReader reader(read_document_text(text, "f.yaml", problems), problems, "plan");
  read(reader);
  return format_problems(problems.list());
}

// ---------------------------------------------------------------------------------------------------
// Documents

TEST(Document, KnowsWhereEverythingIs) {
  const Node root = good("# plan\r\na: 1\r\nb:\r\n  - \"x\"\r\n  - {\xC3\xBC: 2, z: 3}\r\n");
  ASSERT_EQ(root.kind(), Node::Kind::map);
  ASSERT_EQ(root.size(), 2U);
  EXPECT_EQ(root.at().file, "f.yaml");
  EXPECT_EQ(root.key(0).text(), "a");
  EXPECT_EQ(root[0].text(), "1");
  EXPECT_FALSE(root[0].quoted());
  EXPECT_EQ(root[0].at().line, 2);
  EXPECT_EQ(root[0].at().column, 4);
  EXPECT_EQ(root[0].source_line(), "a: 1");
  const Node list = root.find("b").value();
  ASSERT_EQ(list.size(), 2U);
  EXPECT_TRUE(list[0].quoted());
  EXPECT_EQ(list[0].at().line, 4);
  EXPECT_EQ(list[0].at().column, 5);
  const Node z = list[1].find("z").value();
  EXPECT_EQ(z.text(), "3");
  EXPECT_EQ(z.at().column, 15) << "characters, not bytes";
  EXPECT_FALSE(root.find("c"));
  EXPECT_FALSE(list.find("x"));
}

TEST(Document, ReadsTabIndentedJson) {
  const std::string text =
      "{\n\t\"eps\": 1e-06,\n\t\"s\":\"\\/x\\u00e9\\t\",\t\"n\": null,\n"
      "\t\"t\": true, \"f\":false,\"m\":-12, \"l\":[1,2], \"e\": {}\n}\n";
  for (const char* name : {"config.json", "config"}) {
    const Node root = good(text, name);
    ASSERT_EQ(root.size(), 8U);
    EXPECT_EQ(root.find("s")->text(), "/x\xC3\xA9\t");
    EXPECT_EQ(root.find("s")->at().column, 6);
    EXPECT_EQ(root.find("n")->kind(), Node::Kind::null);
    EXPECT_EQ(root.find("l")->size(), 2U);
    EXPECT_EQ(root.find("e")->kind(), Node::Kind::map);
    Problems problems;
    MapReader reader(root, problems, "model");
    EXPECT_EQ(reader.number("eps", 0, 1), 1e-6);
    EXPECT_EQ(reader.integer("m", -100, 0), -12);
    EXPECT_TRUE(reader.flag_or("t", false));
    EXPECT_FALSE(reader.flag_or("f", true));
    EXPECT_TRUE(problems.empty());
  }
}

TEST(Document, AcceptsHarmlessForms) {
  const std::string byte_order_mark = "\xEF\xBB\xBF";
  EXPECT_EQ(good(byte_order_mark + "a: 1\n").find("a")->at().column, 4);
  EXPECT_EQ(good("%YAML 1.2\n---\na: 1\n...\n").find("a")->text(), "1");
  EXPECT_EQ(good("a:\t1\t\n\t# tab\n \t\nb: 'it''s'\t# c\n\t").find("b")->text(), "it's");
  EXPECT_EQ(good("a: 1\t\n").find("a")->text(), "1");
  EXPECT_EQ(good("").kind(), Node::Kind::null);
  EXPECT_EQ(good("# nothing\n").at().file, "f.yaml");
  EXPECT_EQ(good("a: \"\"\n").find("a")->text(), "");
}

TEST(Document, RefusesWhatItCannotMean) {
  EXPECT_EQ(problems_of("a: 1\nb: 2\na: 3\n"),
            "f.yaml:3:1: error: duplicate key 'a'\n"
            "  a: 3\n"
            "  ^\n"
            "  hint: it was first given on line 1\n");
  EXPECT_EQ(problems_of("p:\n  <<: {a: 1}\n"),
            "f.yaml:2:3: error: merge keys (<<) are not supported\n"
            "    <<: {a: 1}\n"
            "    ^\n"
            "  hint: write the keys out\n");
  EXPECT_EQ(problems_of("a: &x 1\nb: *x\n"),
            "f.yaml:1:4: error: anchors (&x) are not supported\n"
            "  a: &x 1\n"
            "     ^\n"
            "  hint: write the value out\n");
  EXPECT_EQ(problems_of("b: *x\n"),
            "f.yaml:1:4: error: aliases (*name) are not supported\n"
            "  b: *x\n"
            "     ^\n"
            "  hint: write the value out\n");
  EXPECT_EQ(problems_of("a: !!int 3\n"),
            "f.yaml:1:4: error: tags (!name) are not supported\n"
            "  a: !!int 3\n"
            "     ^\n"
            "  hint: remove the tag\n");
  EXPECT_EQ(problems_of("a:\n  ? [x]\n  : 1\n"),
            "f.yaml:2:5: error: a key must be text\n"
            "    ? [x]\n"
            "      ^\n");
  EXPECT_EQ(problems_of("a: 1\n---\nb: 2\n"),
            "f.yaml:2:1: error: a second document starts here\n"
            "  ---\n"
            "  ^\n"
            "  hint: a file holds one document; remove the '---' line\n");
  EXPECT_EQ(problems_of("{a: 1} x\n"),
            "f.yaml:1:8: error: text after the end of the document\n"
            "  {a: 1} x\n"
            "         ^\n");
}

TEST(Document, LocatesSyntaxErrors) {
  EXPECT_EQ(problems_of("a: b: c\n"),
            "f.yaml:1:5: error: syntax error: illegal map value\n"
            "  a: b: c\n"
            "      ^\n");
  EXPECT_EQ(problems_of("x: 1\na: [1, 2\n"),
            "f.yaml:3:1: error: syntax error: end of sequence flow not found\n"
            "  hint: what was opened on line 2 is not closed\n");
  EXPECT_EQ(problems_of("a: @x\n"),
            "f.yaml:1:4: error: syntax error: unknown token\n"
            "  a: @x\n"
            "     ^\n");
  // yaml-cpp 0.7 reads these as if the closing quote were there.
  for (const char* text : {"a: 'x\n", "a: 'x''\n", "a: \"x\\\"\n"}) {
    const std::string expected =
        "f.yaml:1:4: error: the quotes that open here are never closed\n  ";
    EXPECT_EQ(problems_of(text).substr(0, expected.size()), expected);
  }
}

TEST(Document, RefusesStrangeBytes) {
  EXPECT_EQ(problems_of("\xC3\xBC: 1\na: \xFF\n"),
            "f.yaml:2:4: error: the text is not valid UTF-8 (byte 0xff)\n"
            "  a: ?\n"
            "     ^\n"
            "  hint: save the file as UTF-8\n");
  // Overlong '/', a UTF-16 surrogate, above U+10FFFF, cut short.
  for (const char* text : {"\xC0\xAF", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xE2\x82"}) {
    EXPECT_NE(problems_of(text).find("not valid UTF-8"), std::string::npos);
  }
  EXPECT_EQ(problems_of(std::string("a: x\0y\n", 7)),
            "f.yaml:1:5: error: control character 0x00 in the text\n"
            "  a: x y\n"
            "      ^\n"
            "  hint: remove it\n");
  EXPECT_EQ(problems_of("a:\n\tb: 1\n"),
            "f.yaml:2:1: error: a tab in the indentation\n"
            "   b: 1\n"
            "  ^\n"
            "  hint: indent with blanks\n");
}

TEST(Document, HoldsItsLimits) {
  const auto nested = [](std::size_t depth) {
    return std::string(depth, '[') + std::string(depth, ']');
  };
  good(nested(200));
  const std::string expected =
      "f.yaml:1:201: error: lists and maps are nested more than 200 deep\n  [[[";
  EXPECT_EQ(problems_of(nested(201)).substr(0, expected.size()), expected);
  for (const char* opener : {"[", "{a: ", "- ", "? "}) {
    std::string text;
    for (int i = 0; i < 100'000; ++i) text += opener;
    EXPECT_NE(problems_of(text).find("nested more than 200 deep"), std::string::npos) << opener;
  }
  std::string many = "[";
  for (int i = 0; i < 1'000'001; ++i) many += "0,";
  EXPECT_NE(problems_of(many + "]").find("error: more than 1000000 values in one file\n"),
            std::string::npos);
  EXPECT_NE(problems_of("a: " + std::string(4'000'001, ',')).find("brackets and commas"),
            std::string::npos);
  EXPECT_EQ(problems_of(std::string((64U << 20) + 1, ' ')),
            "f.yaml: error: the file is larger than 64 MiB\n");
}

class Files : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::path(testing::TempDir()) / "orrery_config_test";
    std::filesystem::create_directories(folder_);
    std::ofstream(folder_ / "deepseek-v3.yaml") << "a: 1\n";
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string problems_reading(const std::string& name) const {
    Problems problems;
    EXPECT_EQ(read_document((folder_ / name).string(), problems).kind(), Node::Kind::null);
    return format_problems(problems.list());
  }

  std::filesystem::path folder_;
};

TEST_F(Files, AreReadOrExplained) {
  Problems problems;
  const Node root = read_document((folder_ / "deepseek-v3.yaml").string(), problems);
  ASSERT_TRUE(problems.empty());
  EXPECT_EQ(root.find("a")->at().file, (folder_ / "deepseek-v3.yaml").string());

  const std::string base = folder_.string() + "/";
  const std::string missing = ": error: cannot open the file: No such file or directory\n";
  EXPECT_EQ(
      problems_reading("deepsek-v3.yml"),
      base + "deepsek-v3.yml" + missing + "  hint: did you mean '" + base + "deepseek-v3.yaml'?\n");
  EXPECT_EQ(problems_reading("llama.yaml"), base + "llama.yaml" + missing);
  EXPECT_EQ(problems_reading("no/such.yaml"), base + "no/such.yaml" + missing);
  EXPECT_EQ(problems_reading(""), base + ": error: is a directory, not a file\n");
}

// ---------------------------------------------------------------------------------------------------
// Maps

enum class Kind { one_f_one_b, dualpipe };

TEST(MapReader, ReadsEveryType) {
  Problems problems;
  MapReader r(good("layers: 61\nbig: 15e3\nratio: 0.5\nbandwidth: 400 Gb/s\nquoted: '2 us'\n"
                   "name: v3\nnum: '671'\noverlap: true\ndims: [1, 4_096]\nkind: dualpipe\n"),
              problems, "plan");
  EXPECT_EQ(r.integer("layers", 1, 100), 61);
  EXPECT_EQ(r.integer_or("big", 1, 1, 100'000), 15'000);
  EXPECT_EQ(r.integer_or("absent", 7, 1, 100), 7);
  EXPECT_EQ(r.number("ratio", 0, 1), 0.5);
  EXPECT_EQ(r.number_or("absent", 0.25, 0, 1), 0.25);
  EXPECT_EQ(r.quantity("bandwidth", Dimension::bytes_per_s), 50e9);
  EXPECT_EQ(r.quantity("quoted", Dimension::seconds), 2e-6);
  EXPECT_EQ(r.quantity_or("absent", 3.0, Dimension::seconds), 3.0);
  EXPECT_EQ(r.text("name"), "v3");
  EXPECT_EQ(r.text("num"), "671");
  EXPECT_EQ(r.text_or("absent", "x"), "x");
  EXPECT_TRUE(r.flag_or("overlap", false));
  EXPECT_TRUE(r.flag_or("absent", true));
  EXPECT_EQ(r.integers("dims", 1, 10'000), (std::vector<std::int64_t>{1, 4096}));
  EXPECT_EQ(r.choice<Kind>("kind", {{"1f1b", Kind::one_f_one_b}, {"dualpipe", Kind::dualpipe}}),
            Kind::dualpipe);
  EXPECT_EQ(r.choice_or<Kind>("absent", Kind::dualpipe, {{"1f1b", Kind::one_f_one_b}}),
            Kind::dualpipe);
  r.finish();
  EXPECT_TRUE(problems.empty()) << format_problems(problems.list());
}

TEST(MapReader, ReportsUnknownAndMissingKeys) {
  EXPECT_EQ(report("pipline: 16\n",
                   [](MapReader& r) {
                     r.integer("pipeline", 1, 64);
                     r.finish();
                   }),
            "f.yaml:1:1: error: missing key 'pipeline' in plan\n"
            "  pipline: 16\n"
            "  ^\n"
            "f.yaml:1:1: error: unknown key 'pipline' in plan\n"
            "  pipline: 16\n"
            "  ^\n"
            "  hint: did you mean 'pipeline'?\n");
  EXPECT_EQ(report("pipeline: 1\nzebra: 1\n",
                   [](MapReader& r) {
                     r.integer("pipeline", 1, 64);
                     r.allow("expert");
                     r.finish();
                   }),
            "f.yaml:2:1: error: unknown key 'zebra' in plan\n"
            "  zebra: 1\n"
            "  ^\n"
            "  hint: known keys: expert, pipeline\n");
}

TEST(MapReader, ReportsWrongNumbers) {
  const auto layers = [](MapReader& r) { EXPECT_EQ(r.integer("layers", 1, 10'000), 1); };
  EXPECT_EQ(report("layers: 0\n", layers),
            "f.yaml:1:9: error: 'layers' must be a whole number from 1 to 10000, got 0\n"
            "  layers: 0\n"
            "          ^\n");
  const std::string must =
      "f.yaml:1:9: error: 'layers' must be a whole number from 1 to 10000, got ";
  const auto first_line = [&](const std::string& value) {
    const std::string all = report("layers: " + value + "\n", layers);
    return all.substr(0, all.find('\n'));
  };
  EXPECT_EQ(first_line("1.5"), must + "1.5");
  EXPECT_EQ(first_line("many"), must + "'many'");
  EXPECT_EQ(first_line("[1]"), must + "a list");
  EXPECT_EQ(first_line("{a: 1}"), must + "a map");
  EXPECT_EQ(first_line("'12'"), "f.yaml:1:9: error: 'layers' is text in quotes; remove the quotes");
  EXPECT_EQ(first_line("'many'"), must + "'many'");
  EXPECT_EQ(first_line(std::string(100, 'x')), must + "'" + std::string(57, 'x') + "...'");
  EXPECT_EQ(report("layers: 010\n", layers),
            must +
                "'010'\n"
                "  layers: 010\n"
                "          ^\n"
                "  hint: a leading zero is not accepted (is it octal?); write 10\n");
  EXPECT_EQ(report("layers: 0x1F\n", layers),
            must +
                "'0x1F'\n"
                "  layers: 0x1F\n"
                "          ^\n"
                "  hint: write the number in decimal; hexadecimal, octal and binary are not "
                "read\n");
  EXPECT_EQ(report("ratio: .inf\n", [](MapReader& r) { r.number("ratio", 0, 1); }),
            "f.yaml:1:8: error: 'ratio' must be a number from 0 to 1, got '.inf'\n"
            "  ratio: .inf\n"
            "         ^\n"
            "  hint: infinity and nan are not accepted; write a finite number\n");
  constexpr std::int64_t kAny = std::numeric_limits<std::int64_t>::max();
  EXPECT_EQ(report("seed: -1\n", [](MapReader& r) { r.integer("seed", 0, kAny); }),
            "f.yaml:1:7: error: 'seed' must be a whole number of at least 0, got -1\n"
            "  seed: -1\n"
            "        ^\n");
  EXPECT_EQ(report("dims: [1, x]\n", [](MapReader& r) { r.integers("dims", 1, 8); }),
            "f.yaml:1:11: error: element 2 of 'dims' must be a whole number from 1 to 8, got 'x'\n"
            "  dims: [1, x]\n"
            "            ^\n");
  EXPECT_EQ(report("dims: 3\n", [](MapReader& r) { r.integers("dims", 1, 8); }),
            "f.yaml:1:7: error: 'dims' must be a list of whole numbers, got 3\n"
            "  dims: 3\n"
            "        ^\n");
}

TEST(MapReader, ReportsWrongQuantities) {
  EXPECT_EQ(report("bandwidth: 400 GB\n",
                   [](MapReader& r) { r.quantity("bandwidth", Dimension::bytes_per_s); }),
            "f.yaml:1:12: error: 'bandwidth' must be a rate in bytes per second such as 400 GB/s, "
            "got '400 GB'\n"
            "  bandwidth: 400 GB\n"
            "             ^\n"
            "  hint: 'GB' measures bytes\n");
  EXPECT_EQ(report("latency: 0\n", [](MapReader& r) { r.quantity("latency", Dimension::seconds); }),
            "f.yaml:1:10: error: 'latency' must be a time such as 2 us, got 0\n"
            "  latency: 0\n"
            "           ^\n"
            "  hint: it must be above 0\n");
}

TEST(MapReader, ReportsWrongWords) {
  const auto kind = [](MapReader& r) {
    r.choice<Kind>("kind", {{"1f1b", Kind::one_f_one_b}, {"dualpipe", Kind::dualpipe}});
  };
  EXPECT_EQ(report("kind: DualPipe\n", kind),
            "f.yaml:1:7: error: 'kind' must be one of 1f1b, dualpipe, got 'DualPipe'\n"
            "  kind: DualPipe\n"
            "        ^\n"
            "  hint: did you mean 'dualpipe'?\n");
  EXPECT_EQ(report("kind: [zero]\n", kind),
            "f.yaml:1:7: error: 'kind' must be one of 1f1b, dualpipe, got a list\n"
            "  kind: [zero]\n"
            "        ^\n");
  EXPECT_EQ(report("overlap: yes\n", [](MapReader& r) { r.flag_or("overlap", false); }),
            "f.yaml:1:10: error: 'overlap' must be true or false, got 'yes'\n"
            "  overlap: yes\n"
            "           ^\n");
  EXPECT_EQ(report("overlap: 'true'\n", [](MapReader& r) { r.flag_or("overlap", false); }),
            "f.yaml:1:10: error: 'overlap' is text in quotes; remove the quotes\n"
            "  overlap: 'true'\n"
            "           ^\n");
  EXPECT_EQ(report("name: [x]\n", [](MapReader& r) { r.text("name"); }),
            "f.yaml:1:7: error: 'name' must be text, got a list\n"
            "  name: [x]\n"
            "        ^\n");
}

TEST(MapReader, ReportsKeysWithoutValue) {
  const std::string expected =
      "f.yaml:2:1: error: missing value of 'layers' in plan\n"
      "  layers:\n"
      "  ^\n";
  const std::string text = "a: 1\nlayers:\nb: 2\n";
  EXPECT_EQ(report(text, [](MapReader& r) { r.integer("layers", 1, 2); }), expected);
  EXPECT_EQ(report(text, [](MapReader& r) { r.integer_or("layers", 1, 1, 2); }), expected);
  EXPECT_EQ(report(text, [](MapReader& r) { r.flag_or("layers", true); }), expected);
  EXPECT_EQ(report(text, [](MapReader& r) { r.text_or("layers", ""); }), expected);
  EXPECT_EQ(report(text, [](MapReader& r) { r.require("layers"); }), expected);
  EXPECT_EQ(report(text,
                   [](MapReader& r) {
                     EXPECT_TRUE(r.has("layers"));
                     EXPECT_EQ(r.at("layers").kind(), Node::Kind::null);
                     EXPECT_EQ(r.unread(), (std::vector<std::string>{"a", "b"}));
                   }),
            "");
}

TEST(MapReader, SpeaksOnceOverWhatIsNoMap) {
  const auto everything = [](MapReader& r) {
    EXPECT_EQ(r.integer("a", 3, 9), 3);
    EXPECT_EQ(r.number("a", 0, 0.5), 0.5);
    EXPECT_EQ(r.quantity("a", Dimension::seconds), 1.0);
    EXPECT_EQ(r.text("a"), "");
    EXPECT_FALSE(r.flag_or("a", false));
    EXPECT_TRUE(r.integers("a", 1, 2).empty());
    EXPECT_EQ(r.choice<Kind>("a", {{"x", Kind::dualpipe}}), Kind::dualpipe);
    MapReader inner(r.require("a"), r.problems(), "plan.a");
    inner.integer("b", 1, 2);
    inner.finish();
    r.finish();
  };
  EXPECT_EQ(report("[a, b]\n", everything),
            "f.yaml:1:1: error: plan must be a map of keys to values, got a list\n"
            "  [a, b]\n"
            "  ^\n");
  EXPECT_EQ(report("a:1\n", everything),
            "f.yaml:1:1: error: plan must be a map of keys to values, got 'a:1'\n"
            "  a:1\n"
            "  ^\n"
            "  hint: put a blank after the colon\n");
  EXPECT_EQ(report("", everything),
            "f.yaml: error: plan must be a map of keys to values, got nothing\n");
  EXPECT_EQ(report("a: ]\n", everything),
            "f.yaml:1:4: error: syntax error: illegal flow end\n"
            "  a: ]\n"
            "     ^\n");
  // Nobody has said why there is no map: silence would pass for a good file.
  Problems problems;
  const MapReader reader(Node(), problems, "plan");
  EXPECT_EQ(format_problems(problems.list()),
            "error: plan must be a map of keys to values, got nothing\n");
}

TEST(MapReader, GoesOnAfterDuplicates) {
  EXPECT_EQ(report("layers: 3\nlayers: 4\n",
                   [](MapReader& r) {
                     EXPECT_EQ(r.integer("layers", 1, 9), 3);
                     r.integer("heads", 1, 9);
                   }),
            "f.yaml:1:1: error: missing key 'heads' in plan\n"
            "  layers: 3\n"
            "  ^\n"
            "f.yaml:2:1: error: duplicate key 'layers'\n"
            "  layers: 4\n"
            "  ^\n"
            "  hint: it was first given on line 1\n");
}

TEST(Scalars, ReadAlone) {
  Problems problems;
  const Node list = good("[12, 0.5, 2 us, x]");
  EXPECT_EQ(read_integer(list[0], problems, 1, 20), 12);
  EXPECT_EQ(read_number(list[1], problems, 0, 1), 0.5);
  EXPECT_EQ(read_quantity(list[2], problems, Dimension::seconds), 2e-6);
  EXPECT_TRUE(problems.empty());
  EXPECT_FALSE(read_integer(list[3], problems, 1, 20));
  EXPECT_EQ(problems.list()[0].message, "the value must be a whole number from 1 to 20, got 'x'");
  EXPECT_EQ(problems.list()[0].at.column, 17);
}

// ---------------------------------------------------------------------------------------------------
// Printing

Problem problem(const char* file, int line, int column, const char* message) {
  return {{file, line, column}, message, "", ""};
}

TEST(FormatProblems, SortsByFileOfFirstAppearanceThenPlace) {
  const std::vector<Problem> list = {
      problem("z.yaml", 9, 1, "third"), problem("a.yaml", 1, 1, "fourth"),
      problem("z.yaml", 2, 7, "second"), problem("z.yaml", 2, 7, "second"),
      problem("z.yaml", 0, 0, "first")};
  EXPECT_EQ(format_problems(list),
            "z.yaml: error: first\n"
            "z.yaml:2:7: error: second\n"
            "z.yaml:9:1: error: third\n"
            "a.yaml:1:1: error: fourth\n");
}

TEST(FormatProblems, StopsAtFifty) {
  std::vector<Problem> list;
  for (int i = 1; i <= 53; ++i) list.push_back(problem("f", i, 1, "x"));
  const std::string text = format_problems(list);
  EXPECT_NE(text.find("f:50:1: error: x\n... and 3 more\n"), std::string::npos) << text;
  list.resize(50);
  EXPECT_EQ(format_problems(list).find("more"), std::string::npos);
}

TEST(FormatProblems, CutsLongLinesAroundTheCaret) {
  for (const int column : {1, 20, 80, 81, 500, 919, 920, 921, 1000}) {
    Problem p = problem("f", 1, column, "m");
    p.source_line = std::string(1000, '.');
    p.source_line[static_cast<std::size_t>(column) - 1] = '!';
    const std::string text = format_problems(std::vector<Problem>{p});
    const std::size_t begin = text.find('\n') + 1;
    const std::size_t end = text.find('\n', begin);
    EXPECT_EQ(end - begin, 162U) << "two blanks and 160 columns";
    EXPECT_EQ(text.find('!') - begin, text.find('^') - (end + 1)) << column;
  }
}

TEST(FormatProblems, IsSafeOnATerminal) {
  Problem p = problem("f", 1, 3, "m\x1b[31m");
  p.source_line = "\ta\x1b[2J\xFF";
  EXPECT_EQ(format_problems(std::vector<Problem>{p}),
            "f:1:3: error: m [31m\n"
            "   a [2J?\n"
            "    ^\n");
}

TEST(Problems, ThrowAllAtOnce) {
  Problems problems;
  problems.throw_if_any();
  problems.add(Location{"f", 1, 2}, "one", "do this");
  problems.add(Location{"f", 3, 4}, "two");
  try {
    problems.throw_if_any();
    FAIL() << "nothing thrown";
  } catch (const InputError& e) {
    EXPECT_EQ(e.problems().size(), 2U);
    EXPECT_STREQ(e.what(), "f:1:2: error: one\n  hint: do this\nf:3:4: error: two\n");
  }
}

TEST(Nearest, FindsTyposOnly) {
  const std::vector<std::string> words = {"pipeline", "expert", "micro_batch", "tp", "pp"};
  EXPECT_EQ(nearest("pipline", words), "pipeline");
  EXPECT_EQ(nearest("piepline", words), "pipeline");
  EXPECT_EQ(nearest("PIPELINE", words), "pipeline");
  EXPECT_EQ(nearest("micro-batch", words), "micro_batch");
  EXPECT_EQ(nearest("TP", words), "tp");
  EXPECT_EQ(nearest("dp", words), std::nullopt);
  EXPECT_EQ(nearest("hidden", words), std::nullopt);
  EXPECT_EQ(nearest("", words), std::nullopt);
  EXPECT_EQ(nearest(std::string(1'000'000, 'p'), words), std::nullopt);
}

TEST(Nearest, UndoesOneSlip) {
  EXPECT_TRUE(rc::check("any one-letter slip in a long word is found", [] {
    const std::vector<std::string> words = {"moe_intermediate_size", "num_hidden_layers", "vocab"};
    const std::string original = words[*rc::gen::inRange<std::size_t>(0, 2)];
    std::string word = original;
    const auto at = *rc::gen::inRange<std::size_t>(0, word.size() - 1);
    switch (*rc::gen::inRange(0, 4)) {
      case 0:
        word.erase(at, 1);
        break;
      case 1:
        word.insert(at, 1, 'q');
        break;
      case 2:
        word[at] = 'q';
        break;
      default:
        std::swap(word[at], word[at + 1]);
    }
    RC_ASSERT(nearest(word, words) == std::optional<std::string>(original));
  }));
}

// ---------------------------------------------------------------------------------------------------
// A second implementation: a writer of JSON that notes where it puts everything.

struct Writer {
  std::string text;
  std::vector<Location> places;      // of each node, in document order
  std::vector<std::string> scalars;  // "" for lists and maps

  void note(const std::string& scalar) {
    const std::size_t newline = text.rfind('\n');
    const auto begin = newline == std::string::npos ? text.begin() : text.begin() + newline + 1;
    // Columns are characters; the only one of two bytes here is U+00E9, which ends in A9.
    const auto bytes = text.end() - begin;
    const auto column = bytes - std::count(begin, text.end(), '\xA9') + 1;
    const auto line = std::count(text.begin(), text.end(), '\n') + 1;
    places.push_back({"f.json", static_cast<int>(line), static_cast<int>(column)});
    scalars.push_back(scalar);
  }
  void space() {
    text += *rc::gen::elementOf(std::vector<std::string>{"", " ", "\t", "\n", "\r\n  ", "\n\t"});
  }
  void string(const std::string& value) {
    note(value);
    text += '"';
    for (const char c : value) {
      if (c == '"' || c == '\\') text += '\\';
      text += c;
    }
    text += '"';
  }
  void value(int depth) {
    const int kind = *rc::gen::inRange(0, depth > 3 ? 2 : 4);
    if (kind == 0) {
      string(*rc::gen::elementOf(
          std::vector<std::string>{"x", "", "a: b", "# c", "\xC3\xA9", "\"\\", "1"}));
    } else if (kind == 1) {
      const std::string number = std::to_string(*rc::gen::arbitrary<int>());
      note(number);
      text += number;
    } else {
      note("");
      text += kind == 2 ? '[' : '{';
      const int size = *rc::gen::inRange(0, 5);
      for (int i = 0; i < size; ++i) {
        space();
        if (kind == 3) {
          string("k" + std::to_string(i));
          text += *rc::gen::elementOf(std::vector<std::string>{":", ": ", ":\t"});
        }
        value(depth + 1);
        space();
        if (i + 1 < size) text += ',';
      }
      text += kind == 2 ? ']' : '}';
    }
  }
};

void flatten(const Node& node, std::vector<Node>& out) {
  out.push_back(node);
  for (std::size_t i = 0; i < node.size(); ++i) {
    if (node.kind() == Node::Kind::map) out.push_back(node.key(i));
    flatten(node[i], out);
  }
}

TEST(Document, ReadsBackGeneratedJsonWithItsPlaces) {
  EXPECT_TRUE(rc::check("JSON", [] {
    Writer w;
    w.value(0);
    Problems problems;
    const Node root = read_document_text(w.text, "f.json", problems);
    if (!problems.empty()) RC_FAIL(w.text + "\n" + format_problems(problems.list()));
    std::vector<Node> nodes;
    flatten(root, nodes);
    RC_ASSERT(nodes.size() == w.places.size());
    for (std::size_t i = 0; i < nodes.size(); ++i) {
      const bool scalar = nodes[i].kind() == Node::Kind::scalar;
      RC_ASSERT((scalar ? nodes[i].text() : "") == w.scalars[i]);
      RC_ASSERT(nodes[i].at().line == w.places[i].line);
      RC_ASSERT(nodes[i].at().column == w.places[i].column);
    }
  }));
}

}  // namespace
}  // namespace orrery
