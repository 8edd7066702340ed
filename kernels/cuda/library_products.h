// Products of many rows by cuBLASLt: inputs rounded to the weights' type, fp32 sums. A step's rows are padded to a
// bucket, so that a product has one of few shapes; for each of them the library chooses an algorithm when the weight is
// loaded, which is kept. No algorithm splits a sum among blocks. So a row has the same bits beside any rows of its
// bucket, at any place among them; in another bucket it may have others, and law N1 holds no further.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "kernels/api/products.h"
#include "kernels/base/matrix.h"
#include "kernels/cuda/cublaslt.h"
#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/library_rows.h"

namespace rwkv::kernels::cuda {

class CudaStream;

constexpr int64_t kLibraryWorkspaceBytes = int64_t{32} << 20;  // What NVIDIA advises for Hopper.

class LibraryProducts {
 public:
  // Of the thread's device, which is called `name`; products of `least_rows` (>= 4, a multiple of two) and more.
  // kUnimplemented: the library finds no driver, or no algorithm.
  static absl::StatusOr<std::unique_ptr<LibraryProducts>> Create(const cublaslt::CublasLt& library,
                                                                 absl::string_view name, int64_t least_rows);
  ~LibraryProducts();
  LibraryProducts(const LibraryProducts&) = delete;
  LibraryProducts& operator=(const LibraryProducts&) = delete;

  // What bits depend on: the library's version, and a hash of the buckets and of what it chooses for published widths,
  // so that neither a model nor a stage's share of its layers changes it. "lt-130100-0123456789abcdef"
  const std::string& family() const { return family_; }

  // Whether products of so many rows with such a matrix are the library's.
  bool Takes(const MatrixView& matrix, int64_t rows) const;

  // Rows that a product of `rows`, at most kMostLibraryRows, is padded to.
  int64_t BucketOf(int64_t rows) const;

  // Chooses the algorithms of such a matrix, unless it has been done. kUnimplemented: there is none for a bucket.
  absl::Status Choose(const MatrixView& matrix) ABSL_LOCKS_EXCLUDED(mu_);

  // "96 outputs of 2048 inputs, 128 rows: algorithm 66, tile 20, stages 35", one a bucket: for a matrix that is known.
  std::vector<std::string> Choices(const MatrixView& matrix) const ABSL_LOCKS_EXCLUDED(mu_);

  // Of all matrices that are known, a line a shape: "96 outputs of 2048 inputs (bf16): 128 rows: algorithm 66, tile 20,
  // stages 35; 192 rows: ..."
  std::vector<std::string> AllChoices() const ABSL_LOCKS_EXCLUDED(mu_);

  // Enqueues one product that it takes, of a matrix that is known. An error of the library other than a lack of memory
  // breaks the stream.
  absl::Status Enqueue(const Product& product, int64_t rows, CudaStream& stream) const ABSL_LOCKS_EXCLUDED(mu_);

 private:
  // A product's shape: the padded number of inputs, as rows of weights have it in memory.
  struct Shape {
    DType dtype;
    int64_t outputs, inputs, rows;

    template <typename Hash>
    friend Hash AbslHashValue(Hash hash, const Shape& s) {
      return Hash::combine(std::move(hash), s.dtype, s.outputs, s.inputs, s.rows);
    }
    bool operator==(const Shape& s) const {
      return dtype == s.dtype && outputs == s.outputs && inputs == s.inputs && rows == s.rows;
    }
    std::string ToStringWithoutRows() const;
    std::string ToString() const;
  };
  using Configuration = std::array<uint32_t, cublaslt::kProperties>;
  // How a shape is multiplied, once that is chosen. Its descriptions are its own.
  struct Plan {
    explicit Plan(const cublaslt::CublasLt& table) : library(table) {}
    ~Plan();

    const cublaslt::CublasLt& library;
    cublaslt::MatrixLayout* weights = nullptr;
    cublaslt::MatrixLayout* inputs = nullptr;
    cublaslt::MatrixLayout* sums = nullptr;
    cublaslt::Algorithm algorithm = {};
    Configuration configuration = {};
  };

  LibraryProducts(const cublaslt::CublasLt& library, absl::string_view name, int64_t least_rows);

  static Shape ShapeOf(const MatrixView& matrix, int64_t rows);
  static std::string ToString(const Plan& plan);
  // Of one call.
  int64_t MostRows(int64_t outputs) const;
  absl::Status Check(absl::string_view what, cublaslt::Result result) const;
  absl::Status Describe();
  absl::Status NameFamily();
  absl::StatusOr<std::unique_ptr<Plan>> MakePlan(const Shape& shape) const;
  absl::Status Multiply(const Product& product, const Plan& plan, const Shape& shape, CudaStream& stream) const;

  const cublaslt::CublasLt library_;
  const std::string name_;
  const std::vector<int64_t> buckets_;
  cublaslt::Context* context_ = nullptr;
  cublaslt::MatmulDesc* desc_ = nullptr;
  cublaslt::Preference* preference_ = nullptr;
  std::string family_;
  mutable absl::Mutex mu_;
  absl::flat_hash_map<Shape, std::unique_ptr<const Plan>> plans_ ABSL_GUARDED_BY(mu_);
};

}  // namespace rwkv::kernels::cuda
