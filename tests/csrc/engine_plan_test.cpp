// What the plan makes of programs, for lanes of 8 and 16: widths, what no step changes, what is
// live, joined norms, narrow layers, and which layers are kept factored in which way.
#ifndef FASTMETA_ISA
#define FASTMETA_ISA engine_plan_test
#endif
#include <gtest/gtest.h>

#include <optional>

#include "engine/plan.h"
#include "engine/program_text.h"

namespace fastmeta::engine::FASTMETA_ISA {
namespace {

constexpr Grain kEight{8, 8}, kSixteen{16, 16};

// Keeps what a plan refers to.
struct Planned {
  Planned(const std::string& text, const Grain& grain, int64_t supports, int64_t queries,
          int64_t steps, bool each_number = false)
      : program(ProgramText::parse(text)), args(arguments(supports, queries, steps)) {
    if (each_number) args.rate_cols = 12345;
    plan.emplace(args, grain);
  }
  Adapt arguments(int64_t supports, int64_t queries, int64_t steps) const {
    Adapt a{};
    a.program = &program;
    const auto count = [](int64_t* most, const ParamRef& ref) {
      if (ref) *most = std::max<int64_t>(*most, ref.index + 1);
    };
    for (const Node& n : program.nodes) {
      for (const ParamRef& ref : {n.w, n.b, n.mean, n.var}) {
        count(ref.adapted ? &a.num_fast : &a.num_shared, ref);
      }
    }
    a.tasks = 4;
    a.supports = supports;
    a.queries = queries;
    a.steps = steps;
    a.rate_rows = a.rate_cols = 1;
    return a;
  }
  const Plan* operator->() const { return &*plan; }

  const Program program;
  Adapt args;
  std::optional<Plan> plan;
};

#define FASTMETA_CONCAT_(a, b) a##b
#define FASTMETA_CONCAT(a, b) FASTMETA_CONCAT_(a, b)
#define FASTMETA_TEST_(suite, name) TEST(suite, name)
#define FASTMETA_TEST(name) FASTMETA_TEST_(FASTMETA_CONCAT(EnginePlan_, FASTMETA_ISA), name)

FASTMETA_TEST(WidthsAndPlaces) {
  const std::string text =
      "fm1;in=5;linear(0,w=f0,b=f1,out=17);tanh(1);linear(2,w=f2,b=s0,out=9);loss=mse()";
  const Planned eight(text, kEight, 6, 6, 1), sixteen(text, kSixteen, 6, 6, 1);
  EXPECT_EQ(eight->shapes[0].ld, 8);
  EXPECT_EQ(eight->shapes[1].ld, 24);
  EXPECT_EQ(sixteen->shapes[0].ld, 16);
  EXPECT_EQ(sixteen->shapes[1].ld, 32);
  EXPECT_EQ(eight->fast.numel, 17 * 5 + 17 + 9 * 17);
  EXPECT_EQ(eight->shared.numel, 9);
  for (const Planned* p : {&eight, &sixteen}) {
    int64_t end = 0;
    for (const Param& param : (*p)->fast.params) {
      EXPECT_EQ(param.offset % 8, 0);
      EXPECT_GE(param.offset, end);
      EXPECT_GE(param.size, param.numel);
      end = param.offset + param.size;
    }
    EXPECT_LE(end, (*p)->fast.size);
  }
  // 9 outputs are few for 16 lanes (10 at most), not for 8 (5 at most).
  EXPECT_EQ(sixteen->fast.params[2].layout, Layout::kRows);
  EXPECT_EQ(sixteen->out().lanes, 16);
  EXPECT_EQ(eight->fast.params[2].layout, Layout::kMatrix);
  EXPECT_EQ(eight->out().lanes, 0);
}

FASTMETA_TEST(ImagesThatOnlyProductsReadStayAsTheyAre) {
  const std::string conv = "conv2d(0,w=f0,out=4,k=3x3,s=1x1,p=1x1,d=1x1,g=1)";
  const std::string rest = ";mean_pool(1);flatten(2);linear(3,w=f1,out=2);loss=mse()";
  EXPECT_EQ(Planned("fm1;in=3x5x5;" + conv + rest, kEight, 4, 4, 1)->shapes[0].ld, 3);
  EXPECT_EQ(Planned("fm1;in=3x5x5;tanh(0)" + rest, kEight, 4, 4, 1)->shapes[0].ld, 8);
}

FASTMETA_TEST(StaticAndLive) {
  // The frozen body is the same in all steps; value 4 is read by nobody.
  const Planned p(
      "fm1;in=4;linear(0,w=s0,out=6);tanh(1);dropout(2,p=0.5,id=0);linear(2,w=f0,out=16);"
      "linear(2,w=f1,out=3);loss=mse()",
      kEight, 4, 4, 2);
  EXPECT_EQ(p->is_static, (std::vector<bool>{true, true, true, false, false, false}));
  EXPECT_EQ(p->live, (std::vector<bool>{true, true, true, false, false, true}));
  EXPECT_EQ(p->readers, (std::vector<int>{1, 1, 1, 0, 0, 0}));
  EXPECT_EQ(p->last_use, (std::vector<int>{1, 2, 5, 0, 0, 0}));
}

FASTMETA_TEST(BatchNormTakesThePiecewiseLinearActivationBehindIt) {
  const std::string norm = "fm1;in=4;linear(0,w=f0,out=6);batch_norm(1,w=f1,b=f2);";
  const Planned joined(norm + "relu(2);linear(3,w=f3,out=3);loss=mse()", kEight, 4, 4, 1);
  EXPECT_EQ(joined->nodes[2].kind, Kind::kBatchNorm);
  EXPECT_EQ(joined->nodes[2].activation, Kind::kRelu);
  EXPECT_EQ(joined->nodes[2].input, 1);
  EXPECT_FALSE(joined->live[2]);
  const Planned smooth(norm + "tanh(2);linear(3,w=f3,out=3);loss=mse()", kEight, 4, 4, 1);
  EXPECT_EQ(smooth->nodes[2].kind, Kind::kTanh);
  const Planned twice(norm + "relu(2);add(2+3);linear(4,w=f3,out=3);loss=mse()", kEight, 4, 4, 1);
  EXPECT_EQ(twice->nodes[2].kind, Kind::kRelu);
}

FASTMETA_TEST(FactoredLayers) {
  const std::string wide =
      "fm1;in=300;linear(0,w=f0,b=f1,out=40);tanh(1);linear(2,w=f2,out=4);loss=mse()";
  const std::string head = "fm1;in=160;linear(0,w=f0,b=f1,out=5);loss=cross_entropy()";
  for (const Grain& grain : {kEight, kSixteen}) {
    const Planned products(wide, grain, 3, 4, 3);
    ASSERT_EQ(products->factored.size(), 1U);
    EXPECT_EQ(products->factored[0].value, 1);
    EXPECT_FALSE(products->factored[0].whole);
    EXPECT_EQ(products->fast.params[0].layout, Layout::kFactored);
    EXPECT_EQ(products->fast.params[0].rows, 3);  // as the layer's output: [supports, outputs]
    EXPECT_EQ(products->fast.params[0].cols, 40);

    const Planned whole(head, grain, 20, 60, 6);
    ASSERT_EQ(whole->factored.size(), 1U);
    EXPECT_TRUE(whole->factored[0].whole);
    EXPECT_EQ(whole->fast.params[0].rows, 5);  // of a narrow prediction: [outputs, supports]
    EXPECT_EQ(whole->fast.params[0].cols, 20);

    // With many supports, without steps, with a rate for each number, or of a weight used twice.
    EXPECT_TRUE(Planned(wide, grain, 200, 4, 1)->factored.empty());
    EXPECT_TRUE(Planned(wide, grain, 3, 4, 0)->factored.empty());
    EXPECT_TRUE(Planned(wide, grain, 3, 4, 3, true)->factored.empty());
    const std::string tied =
        "fm1;in=304;linear(0,w=f0,out=304);linear(1,w=f0,out=304);linear(2,w=f1,out=4);loss=mse()";
    EXPECT_TRUE(Planned(tied, grain, 3, 4, 3)->factored.empty());
    // Of a layer that nobody reads.
    const std::string dead =
        "fm1;in=300;linear(0,w=f0,out=40);linear(0,w=f1,out=4);loss=cross_entropy()";
    const Planned part(dead, grain, 8, 60, 6);
    ASSERT_EQ(part->factored.size(), 1U);
    EXPECT_EQ(part->factored[0].value, 2);
  }
}

}  // namespace
}  // namespace fastmeta::engine::FASTMETA_ISA
