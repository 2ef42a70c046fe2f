#include "sim/overrides.hpp"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace orrery {
namespace {

const char kText[] =
    "name: a\n"
    "plan:\n"
    "  layout: {pp: 4, tp: 2}\n"
    "  layers: [1, 2, 3]\n"
    "  schedule: 1f1b\n"
    "nvlink:\n"
    "  bandwidth: 160 GB/s\n"
    "  latency: 3.33 us\n"
    "  share: 40 %\n"
    "rows:\n"
    "  - {id: x, points: [[1, 2], [3, 4]]}\n";

Node base() {
  Problems problems;
  Node root = read_document_text(kText, "folder/base.yaml", problems);
  problems.throw_if_any();
  return root;
}

/// The tree as YAML's flow style, for comparing.
std::string flat(const Node& node) {
  std::string out;
  switch (node.kind()) {
    case Node::Kind::null:
      return "~";
    case Node::Kind::scalar:
      return node.text();
    case Node::Kind::sequence:
      for (std::size_t i = 0; i < node.size(); ++i) out += (i > 0 ? "," : "") + flat(node[i]);
      return "[" + out + "]";
    case Node::Kind::map:
      for (std::size_t i = 0; i < node.size(); ++i) {
        out += (i > 0 ? "," : "") + node.key(i).text() + ":" + flat(node[i]);
      }
      return "{" + out + "}";
  }
  return out;
}

Node after(const std::vector<std::string>& texts, Problems& problems) {
  return with_overrides(base(), overrides_of(texts, "--set"), problems);
}

std::string result(const std::vector<std::string>& texts, std::string_view key) {
  Problems problems;
  const Node root = after(texts, problems);
  problems.throw_if_any();
  return flat(root.find(key).value_or(Node()));
}

std::string problems_of(const std::vector<std::string>& texts) {
  Problems problems;
  const Node root = after(texts, problems);
  report_without_effect(root, problems);
  return format_problems(problems.list());
}

TEST(Overrides, PutsValues) {
  EXPECT_EQ(result({"name=b"}, "name"), "b");
  EXPECT_EQ(result({"plan.layout.pp=8"}, "plan"),
            "{layout:{pp:8,tp:2},layers:[1,2,3],schedule:1f1b}");
  EXPECT_EQ(result({"plan.layout={pp: 8, ep: 64}"}, "plan"),
            "{layout:{pp:8,ep:64},layers:[1,2,3],schedule:1f1b}");
  EXPECT_EQ(result({"plan.layers=[4, 4]"}, "plan"),
            "{layout:{pp:4,tp:2},layers:[4,4],schedule:1f1b}");
  EXPECT_EQ(result({"plan.layers[1]=7"}, "plan"),
            "{layout:{pp:4,tp:2},layers:[1,7,3],schedule:1f1b}");
  EXPECT_EQ(result({"plan.layers.2=7"}, "plan"),
            "{layout:{pp:4,tp:2},layers:[1,2,7],schedule:1f1b}");
  EXPECT_EQ(result({"rows[0].points[1][0]=9"}, "rows"), "[{id:x,points:[[1,2],[9,4]]}]");
}

TEST(Overrides, TheLastOneWinsAndTheBaseStaysAsItIs) {
  const Node root = base();
  const std::string before = flat(root);
  Problems problems;
  const Node changed = with_overrides(
      root,
      overrides_of(
          std::vector<std::string>{"plan.layout.pp=8", "plan.layout={pp: 2}", "plan.layout.pp=16"},
          "--set"),
      problems);
  EXPECT_TRUE(problems.empty());
  EXPECT_EQ(flat(*changed.find("plan")->find("layout")), "{pp:16}");
  EXPECT_EQ(flat(root), before);
}

TEST(Overrides, MultipliesWhatIsThere) {
  EXPECT_EQ(result({"nvlink.bandwidth=*2"}, "nvlink"),
            "{bandwidth:320 GB/s,latency:3.33 us,share:40 %}");
  EXPECT_EQ(result({"nvlink.latency=*0.1"}, "nvlink"),
            "{bandwidth:160 GB/s,latency:0.333 us,share:40 %}");
  EXPECT_EQ(result({"nvlink.share=*1"}, "nvlink"),
            "{bandwidth:160 GB/s,latency:3.33 us,share:40 %}");
  EXPECT_EQ(result({"plan.layout.pp=*0.5"}, "plan"),
            "{layout:{pp:2,tp:2},layers:[1,2,3],schedule:1f1b}");
  EXPECT_EQ(result({"nvlink.bandwidth=*2", "nvlink.bandwidth=* 2.5"}, "nvlink"),
            "{bandwidth:800 GB/s,latency:3.33 us,share:40 %}");
}

TEST(Overrides, RemovesAndMakesWhatIsMissing) {
  EXPECT_EQ(result({"plan.layers="}, "plan"), "{layout:{pp:4,tp:2},schedule:1f1b}");
  EXPECT_EQ(result({"plan.layers[0]="}, "plan"), "{layout:{pp:4,tp:2},layers:[2,3],schedule:1f1b}");
  EXPECT_EQ(result({"plan.nothing.here="}, "plan"),
            "{layout:{pp:4,tp:2},layers:[1,2,3],schedule:1f1b}");
  EXPECT_EQ(result({"routing.router.steps=3"}, "routing"), "{router:{steps:3}}");
}

TEST(Overrides, WhatAReaderFindsIsLocatedInTheOverride) {
  Problems problems;
  const Node root =
      after({"name=c", "plan.layout.pp=x", "plan.layuot.pp=3", "plan.layrs="}, problems);
  MapReader plan(*root.find("plan"), problems, "plan");
  MapReader layout(plan.at("layout"), problems, "plan.layout");
  layout.integer("pp", 1, 8);
  for (const char* key : {"layers", "schedule"}) plan.allow(key);
  plan.finish();
  EXPECT_EQ(format_problems(problems.list()),
            "--set:2:16: error: 'pp' must be a whole number from 1 to 8, got 'x'\n"
            "  plan.layout.pp=x\n"
            "                 ^\n"
            "--set:3:6: error: unknown key 'layuot' in plan\n"
            "  plan.layuot.pp=3\n"
            "       ^\n"
            "  hint: did you mean 'layout'?\n"
            "--set:4:6: error: unknown key 'layrs' in plan\n"
            "  plan.layrs=\n"
            "       ^\n"
            "  hint: did you mean 'layers'?\n");
}

TEST(Overrides, SaysWhatIsWrongWithThemselves) {
  EXPECT_EQ(problems_of({"nvlink.bandwith=*2"}),
            "--set:1:8: error: there is no 'bandwith' in 'nvlink' to multiply\n"
            "  nvlink.bandwith=*2\n"
            "         ^\n"
            "  hint: did you mean 'bandwidth'?\n");
  EXPECT_EQ(problems_of({"nvlink.q=*2"}),
            "--set:1:8: error: there is no 'q' in 'nvlink' to multiply\n"
            "  nvlink.q=*2\n"
            "         ^\n"
            "  hint: keys there: bandwidth, latency, share\n");
  EXPECT_EQ(problems_of({"plan.layers[3]=1"}),
            "--set:1:13: error: there is no element '3' in 'plan.layers', a list of 3\n"
            "  plan.layers[3]=1\n"
            "              ^\n"
            "  hint: elements are 0 to 2\n");
  EXPECT_EQ(problems_of({"plan[0]=1"}),
            "--set:1:6: error: [0] is an element of a list, and 'plan' is a map\n"
            "  plan[0]=1\n"
            "       ^\n");
  EXPECT_EQ(problems_of({"plan.layout=*2", "name=*2", "plan.layout.pp=*two"}),
            "--set:1:13: error: there is no number to multiply: 'plan.layout' is a map\n"
            "  plan.layout=*2\n"
            "              ^\n"
            "--set:2:6: error: there is no number to multiply: 'name' is 'a'\n"
            "  name=*2\n"
            "       ^\n"
            "--set:3:16: error: a factor stands after *, such as *2 or *0.5\n"
            "  plan.layout.pp=*two\n"
            "                 ^\n"
            "  hint: text that begins with * stands in quotes\n");
  EXPECT_EQ(problems_of({"plan.schedule.kind=gpipe"}),
            "--set:1:15: error: nothing is read below 'plan.schedule', which is '1f1b'\n"
            "  plan.schedule.kind=gpipe\n"
            "                ^\n");
  EXPECT_EQ(problems_of({"plan.layout={pp: 8"}),
            "--set:1:19: error: syntax error: end of map flow not found\n"
            "  plan.layout={pp: 8\n"
            "                    ^\n"
            "  hint: what was opened on line 1 is not closed\n");
  for (const char* broken : {"plan", "", "=3", "a..b=1", "a.=1", ".a=1", "a[x]=1", "a[1=2",
                             "a[0]b=1", "a=&b 1", "a=#", "a=1\nb=2"}) {
    EXPECT_NE(problems_of({broken}), "") << broken;
  }
}

TEST(Overrides, StandInFilesToo) {
  Problems problems;
  const Node list =
      read_document_text("set:\n  - plan.layout.pp=x\n  - \"name=[\"\n", "what_if.yaml", problems);
  const Node root = with_overrides(base(), read_overrides(*list.find("set"), problems), problems);
  MapReader layout(*root.find("plan")->find("layout"), problems, "layout");
  layout.integer("pp", 1, 8);
  const std::string text = format_problems(problems.list());
  EXPECT_NE(text.find("what_if.yaml:2:20: error: 'pp' must be a whole number from 1 to 8, got 'x'\n"
                      "    - plan.layout.pp=x\n"
                      "                     ^\n"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find("what_if.yaml:3:"), std::string::npos) << text;
}

class OverridesInFiles : public ::testing::Test {
 protected:
  OverridesInFiles() : folder_(std::filesystem::path(::testing::TempDir()) / "orrery_overrides") {
    std::filesystem::create_directories(folder_ / "parts");
    std::ofstream(folder_ / "root.yaml") << "part: parts/a.yaml\n";
    std::ofstream(folder_ / "parts/a.yaml") << "value: 3 us\nbelow: b.yaml\n";
    std::ofstream(folder_ / "parts/b.yaml") << "value: 5\n";
    std::ofstream(folder_ / "other.yaml") << "value: 7\n";
  }
  ~OverridesInFiles() override { std::filesystem::remove_all(folder_); }

  /// part.value and part.below.value, as read.
  std::string read(const std::vector<std::string>& texts) {
    const Node root =
        with_overrides(read_document((folder_ / "root.yaml").string(), problems_, cache_),
                       overrides_of(texts, "--set"), problems_);
    const Node part = open(*root.find("part"));
    const std::string below =
        part.find("below") ? flat(*open(*part.find("below")).find("value")) : "none";
    report_without_effect(root, problems_);
    return flat(*part.find("value")) + " " + below;
  }
  Node open(const Node& name) {
    return read_named_document(name, (std::filesystem::path(name.folder()) / name.text()).string(),
                               problems_);
  }

  std::filesystem::path folder_;
  std::shared_ptr<DocumentCache> cache_ = make_document_cache();
  Problems problems_;
};

TEST_F(OverridesInFiles, PathsGoOnInTheFilesThatAreNamed) {
  EXPECT_EQ(read({}), "3 us 5");
  EXPECT_EQ(read({"part.value=*2"}), "6 us 5");
  EXPECT_EQ(read({"part.below.value=6", "part.value=4"}), "4 6");
  EXPECT_EQ(read({"part.below="}), "3 us none");
  EXPECT_EQ(read({}), "3 us 5") << "the cached files stay as they are";
  problems_.throw_if_any();
}

TEST_F(OverridesInFiles, FilesInValuesAreRelativeToTheDocumentThatIsOverridden) {
  EXPECT_EQ(read({"part=other.yaml"}), "7 none");
  EXPECT_EQ(read({"part.below=other.yaml"}), "3 us 7");
  EXPECT_EQ(read({"part.below.value=1", "part.below=other.yaml"}), "3 us 7");
  EXPECT_EQ(read({"part.below=other.yaml", "part.below.value=1"}), "3 us 1");
  problems_.throw_if_any();
}

TEST_F(OverridesInFiles, WhatWaitsCanBeToldAndWritten) {
  const Node root = with_overrides(
      read_document((folder_ / "root.yaml").string(), problems_),
      overrides_of(std::vector<std::string>{"part.value=*2", "part.below.x[0]={a: b}"}, "--set"),
      problems_);
  EXPECT_EQ(overrides_below(*root.find("part")),
            (std::vector<std::string>{"value=*2", "below.x[0]={a: b}"}));
  report_without_effect(root, problems_);
  EXPECT_EQ(problems_.size(), 2u) << "nobody has opened the file";
}

}  // namespace
}  // namespace orrery
