#include "services/checkpoint/formats/pickle.h"

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/checkpoint/formats/tensor_record.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::checkpoint {
namespace {

using namespace std::string_literals;  // "...\0..."s keeps its zero bytes.
using testing::ElementsAre;
using testing::HasSubstr;
using testing::StatusIs;
using Kind = Pickle::Kind;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kLost = absl::StatusCode::kDataLoss;

// The bytes a pickle was parsed from, kept as long as it; exactly as long as the pickle, for the address sanitizer.
struct Parsed {
  explicit Parsed(const std::string& text) : bytes(text.begin(), text.end()), pickle(Pickle::Parse(bytes)) {}
  std::vector<uint8_t> bytes;
  absl::StatusOr<Pickle> pickle;
};

absl::Status ParseStatus(const std::string& text) { return Parsed(text).pickle.status(); }

std::string Repeated(const std::string& text, int count) {
  std::string out;
  out.reserve(text.size() * count);
  for (int i = 0; i < count; ++i) out += text;
  return out;
}

std::string Long1(int64_t value) {
  std::string out = "\x8a\x08";
  for (int i = 0; i < 8; ++i) out += static_cast<char>(static_cast<uint64_t>(value) >> (8 * i));
  return out;
}

const std::string kProto = "\x80\x02"s;
const std::string kStorageId = "(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0kX\3\0\0\0cpuK\x06tQ"s;

TEST(PickleTest, ReadsScalarsAndContainers) {
  const struct {
    const char* name;
    std::string text;
    Kind kind;
    int64_t payload;
  } kCases[] = {
      {"none", "N", Kind::kNone, 0},
      {"true", "\x88", Kind::kBool, 1},
      {"false", "\x89", Kind::kBool, 0},
      {"a float, which is not kept", "G\x3f\xf0\0\0\0\0\0\0"s, Kind::kNone, 0},
      {"one byte", "K\xff", Kind::kInt, 255},
      {"two bytes", "M\xff\xff", Kind::kInt, 65535},
      {"four bytes, negative", "J\xfe\xff\xff\xff", Kind::kInt, -2},
      {"an empty long", "\x8a\0"s, Kind::kInt, 0},
      {"a long of one byte, negative", "\x8a\x01\xff", Kind::kInt, -1},
      {"a long of five bytes", "\x8a\x05\0\0\0\0\1"s, Kind::kInt, int64_t{1} << 32},
      {"the largest long", Long1(INT64_MAX), Kind::kInt, INT64_MAX},
      {"the smallest long", Long1(INT64_MIN), Kind::kInt, INT64_MIN},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    const Parsed parsed(kProto + test.text + ".");
    ASSERT_OK(parsed.pickle);
    EXPECT_EQ(parsed.pickle->root().kind, test.kind);
    EXPECT_EQ(parsed.pickle->root().payload, test.payload);
    EXPECT_EQ(parsed.pickle->size_bytes(), static_cast<int64_t>(parsed.bytes.size()));
  }
}

TEST(PickleTest, BothSpellingsOfADictAreEqual) {
  const struct {
    const char* name;
    std::string text;
  } kCases[] = {
      {"protocol 2", "\x80\x02}q\0(X\1\0\0\0aq\1K\1X\1\0\0\0bK\2\x85u."s},
      {"protocol 4", "\x80\x04\x95\x0e\0\0\0\0\0\0\0}\x94\x8c\1aK\1s\x8c\1bK\2\x85s."s},
      {"an ordered dict", "\x80\x02"s + "ccollections\nOrderedDict\n)R(X\1\0\0\0aK\1X\1\0\0\0bK\2\x85u."s},
      {"a global from the stack",
       "\x80\x04\x8c\x0b"s + "collections\x8c\x0bOrderedDict\x93)R(\x8c\1aK\1\x8c\1bK\2\x85u."s},
      {"a built one", "\x80\x02}(X\1\0\0\0aK\1X\1\0\0\0bK\2\x85u}b."s},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    const Parsed parsed(test.text);
    ASSERT_OK(parsed.pickle);
    const Pickle& pickle = *parsed.pickle;
    ASSERT_EQ(pickle.root().kind, Kind::kDict);
    const auto entries = pickle.Entries(pickle.root());
    ASSERT_EQ(entries.size(), 2);
    EXPECT_EQ(pickle.AsString(entries[0].first), "a");
    EXPECT_EQ(entries[0].second.payload, 1);
    EXPECT_EQ(pickle.AsString(entries[1].first), "b");
    ASSERT_EQ(entries[1].second.kind, Kind::kTuple);
    EXPECT_EQ(pickle.Items(entries[1].second)[0].payload, 2);
  }
}

TEST(PickleTest, ReadsAStateDict) {
  const Parsed parsed(testing::StateDictPickle(std::vector<testing::TensorSpec>{
      {"emb.weight", ElementType::kBFloat16, {3, 2}}, {"big", ElementType::kFloat32, {1 << 20, 1 << 20}}}));
  ASSERT_OK(parsed.pickle);
  ASSERT_OK_AND_ASSIGN(const auto tensors, parsed.pickle->StateDict());
  ASSERT_EQ(tensors.size(), 2);
  EXPECT_EQ(tensors[0].first, "emb.weight");
  EXPECT_THAT(tensors[0].second->shape, ElementsAre(3, 2));
  EXPECT_THAT(tensors[0].second->strides, ElementsAre(2, 1));
  EXPECT_EQ(parsed.pickle->storages()[0].type, ElementType::kBFloat16);
  EXPECT_EQ(parsed.pickle->storages()[1].elements, int64_t{1} << 40);
}

TEST(PickleTest, FindsTensorsOneDictDeepAndSkipsOtherValues) {
  const std::string tensor = "ctorch._utils\n_rebuild_tensor_v2\n("s + kStorageId + "K\0K\x06\x85K\1\x85\x89}tR"s;
  const Parsed parsed(kProto + "}(X\5\0\0\0epochK\7X\5\0\0\0stateq\0}(X\1\0\0\0w"s + tensor +
                      "uX\5\0\0\0again}X\1\0\0\0v"s + "ctorch._utils\n_rebuild_parameter\n(" + tensor + "\x88}tRu.");
  ASSERT_OK(parsed.pickle);
  ASSERT_OK_AND_ASSIGN(const auto tensors, parsed.pickle->StateDict());
  ASSERT_EQ(tensors.size(), 2);
  EXPECT_EQ(tensors[0].first, "w");
  EXPECT_EQ(tensors[1].first, "v");
  EXPECT_EQ(parsed.pickle->storages().size(), 1) << "one key is one storage";
}

TEST(PickleTest, ADictInsideItselfIsReadOnce) {
  const Parsed parsed(kProto + "}q\0(X\1\0\0\0ah\0X\1\0\0\0bh\0u."s);
  ASSERT_OK(parsed.pickle);
  ASSERT_OK_AND_ASSIGN(const auto tensors, parsed.pickle->StateDict());
  EXPECT_TRUE(tensors.empty());
}

// What trainers leave beside the tensors.
TEST(PickleTest, ObjectsThatAreNotNeededAreSkippedAndNamed) {
  const std::string key = "X\1\0\0\0a"s;
  const struct {
    const char* name;
    std::string value;
    std::vector<std::string> opaque;
  } kCases[] = {
      {"argparse's settings", "cargparse\nNamespace\n)\x81}X\1\0\0\0bK\1sb"s, {"argparse Namespace"}},
      {"a call with arguments",
       "cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\2\0\0\0f8\x89\x88tRC\2abtR"s,
       {"numpy.core.multiarray scalar", "numpy dtype"}},
      {"a dict of a class of its own",
       "ccollections\ndefaultdict\n(cbuiltins\nlist\ntR(K\1K\2u"s,
       {"collections defaultdict", "builtins list"}},
      {"a list of a class of its own", "cmy.trainer\nHistory\n)R(K\1K\2e"s, {"my.trainer History"}},
      {"an object made with keywords", "cmy\nConfig\n)}\x92"s, {"my Config"}},
      {"a module", "ctorch.nn.modules.linear\nLinear\n)\x81}b"s, {"torch.nn.modules.linear Linear"}},
      {"a set", "\x8f(K\1K\2\x90"s, {}},
      {"bytes and a long integer",
       "(C\3abcB\2\0\0\0de\x8b\x09\0\0\0"
       "123456789t"s,
       {}},
      {"a text as Python 2 wrote it", "U\2ab"s, {}},
      {"a value that is thrown away",
       "K\1K\x02"
       "0"s,
       {}},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    const std::string text = kProto + "}" + key + test.value + "s.";
    const absl::StatusOr<Pickle> pickle =
        Pickle::Parse(absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(text.data()), text.size()));
    ASSERT_OK(pickle);
    EXPECT_THAT(std::vector<std::string>(pickle->opaque().begin(), pickle->opaque().end()),
                ::testing::ElementsAreArray(test.opaque));
    ASSERT_OK_AND_ASSIGN(const auto tensors, pickle->StateDict());
    EXPECT_TRUE(tensors.empty());
  }
}

TEST(PickleTest, AModelConvertedForAStrategyIsRefusedWithItsName) {
  const std::string text = kProto + "}X\x09\0\0\0_strategyX\x09\0\0\0cuda fp16s."s;
  const absl::StatusOr<Pickle> pickle =
      Pickle::Parse(absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(text.data()), text.size()));
  ASSERT_OK(pickle);
  EXPECT_THAT(pickle->StateDict(), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("cuda fp16")));
}

TEST(PickleTest, RefusesCode) {
  const std::string argument = "X\4\0\0\0id; \x85R."s;
  const struct {
    const char* name;
    std::string text;
    const char* message;
  } kCases[] = {
      {"os.system", kProto + "cos\nsystem\n" + argument, "global \"os system\""},
      {"posix.system", kProto + "cposix\nsystem\n" + argument, "global \"posix system\""},
      {"builtins.eval", kProto + "c__builtin__\neval\n" + argument, "__builtin__ eval"},
      {"builtins.exec from the stack", "\x80\x04\x8c\x08"s + "builtins\x8c\4exec\x93" + argument, "builtins exec"},
      {"getattr", kProto + "cbuiltins\ngetattr\n" + argument, "builtins getattr"},
      {"a dotted name", kProto + "ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "__globals__"},
      {"a name with an escape", kProto + "cos\nsys\x1btem\n.", "sys\\x1btem"},
      {"the right name in the wrong module", kProto + "cos\nOrderedDict\n.", "os OrderedDict"},
      {"a call of a storage type", kProto + "ctorch\nFloatStorage\n)R.", "FloatStorage"},
      {"a call of a string", kProto + "X\1\0\0\0a)R."s, "not a known constructor"},
      {"INST", kProto + "(ios\nsystem\n.", "opcode 0x69"},
      {"OBJ", kProto + "(cos\nsystem\no.", "os system"},
      {"NEWOBJ", kProto + "}}\x81.", "something else than a class"},
      {"NEWOBJ_EX", kProto + "}}}\x92.", "something else than a class"},
      {"subprocess in a submodule", kProto + "csubprocess.sub\nPopen\n" + argument, "subprocess.sub Popen"},
      {"an opaque storage", kProto + "(X\7\0\0\0storagectorch.storage\nFloatStorage\nX\1\0\0\0aX\1\0\0\0cK\1tQ."s,
       "not that of a storage"},
      {"EXT1", kProto + "\x82\1.", "opcode 0x82"},
      {"PERSID", kProto + "Pid\n.", "opcode 0x50"},
      {"REDUCE with a list", kProto + "ccollections\nOrderedDict\n]R.", "not a known constructor"},
      {"OrderedDict of pairs", kProto + "ccollections\nOrderedDict\n]\x85R.", "with 1 arguments"},
      {"BUILD on a tensor's storage", kProto + kStorageId + "}b.", "needs a dict"},
      {"BUILD on a global", kProto + "ccollections\nOrderedDict\n}b.", "needs a dict"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    EXPECT_THAT(ParseStatus(test.text), StatusIs(kInvalid, HasSubstr(test.message)));
  }
}

TEST(PickleTest, RefusesBrokenPickles) {
  const auto tensor = [](const std::string& arguments) {
    return kProto + "ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + "tR.";
  };
  const struct {
    const char* name;
    std::string text;
    absl::StatusCode code;
    const char* message;
  } kCases[] = {
      {"nothing", "", kLost, "ends inside"},
      {"no PROTO", "N.", kInvalid, "PROTO"},
      {"protocol 1", "\x80\x01N.", kInvalid, "protocol 1"},
      {"protocol 6", "\x80\x06N.", kInvalid, "protocol 6"},
      {"PROTO twice", kProto + kProto + "N.", kInvalid, "PROTO inside"},
      {"an unknown opcode", kProto + "\xff.", kInvalid, "0xff"},
      {"a long with a count beyond the end", kProto + "\x8b\5\0\0\0\1."s, kLost, "ends inside"},
      {"bytes beyond the end", kProto + "B\5\0\0\0\1."s, kLost, "ends inside"},
      {"no STOP", kProto + "N", kLost, "ends inside"},
      {"STOP on an empty stack", kProto + ".", kInvalid, "empty stack"},
      {"STOP with two values", kProto + "NN.", kInvalid, "more than one value"},
      {"STOP inside a mark", kProto + "(N.", kInvalid, "more than one value"},
      {"TUPLE without mark", kProto + "t.", kInvalid, "mark"},
      {"TUPLE2 of one", kProto + "N\x86.", kInvalid, "empty stack"},
      {"TUPLE1 across a mark", kProto + "N(\x85.", kInvalid, "empty stack"},
      {"REDUCE of one", kProto + "}R.", kInvalid, "empty stack"},
      {"REDUCE of nothing", kProto + "R.", kInvalid, "empty stack"},
      {"BUILD of one", kProto + "}b.", kInvalid, "needs a dict"},
      {"SETITEM on a list", kProto + "]NNs.", kInvalid, "needs a dict"},
      {"SETITEM of one", kProto + "}Ns.", kInvalid, "needs a dict"},
      {"SETITEMS of three", kProto + "}(NNNu.", kInvalid, "without a value"},
      {"SETITEMS without dict", kProto + "(NNu.", kInvalid, "needs a dict"},
      {"APPEND on a dict", kProto + "}Na.", kInvalid, "needs a list"},
      {"APPEND on a tuple", kProto + ")Na.", kInvalid, "needs a list"},
      {"APPENDS without list", kProto + "(Ne.", kInvalid, "needs a list"},
      {"BINPUT of nothing", kProto + "q\0N."s, kInvalid, "empty stack"},
      {"BINGET of the unknown", kProto + "h\7.", kInvalid, "memo entry 7"},
      {"LONG_BINGET of the unknown", kProto + "j\xff\xff\xff\xff.", kInvalid, "memo entry 4294967295"},
      {"a string longer than the file", kProto + "X\xff\xff\0\0ab."s, kLost, "ends inside"},
      {"a string of 4 GB", kProto + "X\xff\xff\xff\xff" + "ab.", kInvalid, "4294967295 bytes"},
      {"a short string longer than the file",
       "\x80\x04\x8c\xff"
       "a.",
       kLost, "ends inside"},
      {"a frame longer than the file", "\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xffN.", kLost, "ends inside"},
      {"a long of 9 bytes", kProto + "\x8a\x09\0\0\0\0\0\0\0\0\1."s, kInvalid, "9 bytes"},
      {"a long of 255 bytes", kProto + "\x8a\xff" + std::string(255, '\1') + ".", kInvalid, "255 bytes"},
      {"a long cut short", kProto + "\x8a\x08\1", kLost, "ends inside"},
      {"a global without end", kProto + "ccollections\nOrderedDict", kLost, "ends inside"},
      {"a global of 300 bytes", kProto + "c" + std::string(300, 'a') + "\n.", kInvalid, "256"},
      {"a global named by numbers", "\x80\x04K\1K\1\x93.", kInvalid, "not a string"},
      {"a persistent id that is a string", kProto + "X\1\0\0\0aQ."s, kInvalid, "not a tuple"},
      {"an empty persistent id", kProto + ")Q.", kInvalid, "not that of a storage"},
      {"a persistent id of another kind",
       kProto + "(X\6\0\0\0modulectorch\nFloatStorage\nX\1\0\0\0kX\3\0\0\0cpuK\6tQ."s, kInvalid,
       "not that of a storage"},
      {"a storage of a function", kProto + "(X\7\0\0\0storageccollections\nOrderedDict\nX\1\0\0\0kX\3\0\0\0cpuK\6tQ."s,
       kInvalid, "not that of a storage"},
      {"a storage of -1 elements",
       kProto + "(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0kX\3\0\0\0cpuJ\xff\xff\xff\xfftQ."s, kInvalid,
       "-1 elements"},
      {"a view of a storage", kProto + "(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0kX\3\0\0\0cpuK\6)tQ."s,
       kInvalid, "views of storages"},
      {"one storage, two sizes",
       kProto + kStorageId + "(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0kX\3\0\0\0cpuK\7tQ\x86."s, kInvalid,
       "7 of fp32 here and 6 of fp32 before"},
      {"one storage, two types",
       kProto + kStorageId + "(X\7\0\0\0storagectorch\nIntStorage\nX\1\0\0\0kX\3\0\0\0cpuK\6tQ\x86."s, kInvalid,
       "6 of int32 here"},
      {"a storage key of 65 bytes",
       kProto + "(X\7\0\0\0storagectorch\nFloatStorage\nX\x41\0\0\0"s + std::string(65, 'k') + "X\3\0\0\0cpuK\6tQ."s,
       kInvalid, "64 bytes"},
      {"a tensor without storage", tensor("K\0K\0K\6\x85K\1\x85\x89}"s), kInvalid, "something else than a storage"},
      {"a tensor of three arguments", tensor(kStorageId + "K\0)"s), kInvalid, "with 3 arguments"},
      {"a shape that is a number", tensor(kStorageId + "K\0K\6K\1\x85\x89}"s), kInvalid,
       "shape of a tensor is not a tuple"},
      {"a stride that is none", tensor(kStorageId + "K\0K\6\x85N\x85\x89}"s), kInvalid,
       "stride of a tensor is not made of integers"},
      {"an offset that is a string", tensor(kStorageId + "X\0\0\0\0K\6\x85K\1\x85\x89}"s), kInvalid, "offset"},
      {"nine dimensions", tensor(kStorageId + "K\0("s + Repeated("K\1", 9) + "t(" + Repeated("K\1", 9) + "t\x89}"),
       kInvalid, "9 dimensions"},
      {"a parameter of nothing", kProto + "ctorch._utils\n_rebuild_parameter\n(N\x88}tR.", kInvalid,
       "something else than a tensor"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    EXPECT_THAT(ParseStatus(test.text), StatusIs(test.code, HasSubstr(test.message)));
  }
}

TEST(PickleTest, RootsThatAreNoStateDictAreRefused) {
  for (const std::string& root : {"N"s, "K\1"s, "]"s, ")"s, kStorageId}) {
    const Parsed parsed(kProto + root + ".");
    ASSERT_OK(parsed.pickle);
    EXPECT_THAT(parsed.pickle->StateDict(), StatusIs(kInvalid, HasSubstr("not a dict")));
  }
  const Parsed parsed(kProto + "}(K\1ctorch._utils\n_rebuild_tensor_v2\n("s + kStorageId +
                      "K\0K\6\x85K\1\x85\x89}tRu."s);
  ASSERT_OK(parsed.pickle);
  EXPECT_THAT(parsed.pickle->StateDict(), StatusIs(kInvalid, HasSubstr("name is not a string")));
}

TEST(PickleTest, BombsMeetALimit) {
  const struct {
    const char* name;
    std::string text;
    const char* message;
  } kCases[] = {
      {"deep tuples", kProto + "N" + std::string(2 << 20, '\x85') + ".", "opcodes"},
      {"open marks", kProto + std::string(65, '(') + ".", "nested marks"},
      {"a stack of nones", kProto + std::string(200'000, 'N') + ".", "values on the stack"},
      {"a memo doubled again and again", kProto + "]q\0"s + Repeated("(h\0h\0t\x94"s, 300'000) + ".", "than the limit"},
      {"one list appended for ever", kProto + "]q\0"s + Repeated("h\0a"s, 700'000) + ".", "opcodes"},
      {"a memo of many", kProto + "N" + Repeated("\x94", 600'000) + ".", "memo entries"},
      {"many storages", "", "storages"},
      {"many tensors", "", "tensors"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    std::string text = test.text;
    if (text.empty()) {
      text = kProto;
      const std::string one_tensor = "ctorch._utils\n_rebuild_tensor_v2\n(h\0K\0K\6\x85K\1\x85\x89}tR"s;
      text += kStorageId + "q\0"s;
      for (int i = 0; i <= kMaxTensors; ++i) {
        const std::string key = absl::StrCat(100'000 + i);
        text += test.message == "tensors"s
                    ? one_tensor
                    : "(X\7\0\0\0storagectorch\nFloatStorage\nX\6\0\0\0"s + key + "X\3\0\0\0cpuK\6tQ"s;
      }
    }
    EXPECT_THAT(ParseStatus(text), StatusIs(kInvalid, HasSubstr(test.message)));
  }
}

TEST(PickleTest, EveryTruncationIsAnError) {
  const std::string text = testing::StateDictPickle(std::vector<testing::TensorSpec>{
      {"emb.weight", ElementType::kBFloat16, {3, 2}}, {"big", ElementType::kFloat32, {1 << 20, 1 << 20}}});
  ASSERT_OK(ParseStatus(text));
  for (size_t size = 0; size < text.size(); ++size) {
    EXPECT_THAT(ParseStatus(text.substr(0, size)), StatusIs(kLost)) << size << " bytes";
  }
}

TEST(PickleTest, BytesAfterStopAreLeftAlone) {
  const Parsed parsed(kProto + "N." + "rest");
  ASSERT_OK(parsed.pickle);
  EXPECT_EQ(parsed.pickle->size_bytes(), 4);
}

}  // namespace
}  // namespace rwkv::checkpoint
