#include "kernels/cuda/cuda_device.h"

#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "kernels/api/op_table.h"
#include "kernels/base/choosing_device.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/cuda_stream.h"
#include "kernels/cuda/library_products.h"
#include "kernels/cuda/upload.h"

namespace rwkv::kernels::cuda {
namespace {

constexpr int kOldestMajor = 8;       // sm_80: Ampere
constexpr int kOverlappingMajor = 9;  // Programmatic dependent launch: from Hopper on.

// The table's functions: check, enqueue. Their stream is always one of this device.

template <typename Args>
absl::Status Run(absl::string_view op, int (*KernelSet::*kernel)(const Args&, LaunchStream), const Args& args,
                 Stream& stream) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  return static_cast<CudaStream&>(stream).Run(op, kernel, args);
}

absl::Status CheckHeadSize(absl::string_view op, int64_t head_size) {
  if (head_size <= kMaxHeadSize) return absl::OkStatus();
  return absl::UnimplementedError(
      absl::StrCat(op, ": head_size ", head_size, " is more than ", kMaxHeadSize, ", the largest on this device"));
}

absl::Status Embed(const EmbedArgs& args, Stream& stream) { return Run("embed", &KernelSet::embed, args, stream); }

absl::Status LayerNorm(const LayerNormArgs& args, Stream& stream) {
  return Run("layer_norm", &KernelSet::layer_norm, args, stream);
}

absl::Status MixInput(const MixInputArgs& args, Stream& stream) {
  return Run("mix_input", &KernelSet::mix_input, args, stream);
}

// The library's, one by one; and the others at once.
absl::Status ProductsOfLibrary(const ProductsArgs& args, CudaStream& stream) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  std::vector<Product> others;
  for (int64_t i = 0; i < args.count; ++i) {
    const Product& product = args.products[i];
    if (stream.library()->Takes(product.weight->matrix, args.rows)) {
      RWKV_RETURN_IF_ERROR(stream.library()->Enqueue(product, args.rows, stream));
    } else {
      others.push_back(product);
    }
  }
  if (others.empty()) return absl::OkStatus();
  return stream.Run("products", &KernelSet::rounded_products,
                    ProductsArgs{args.rows, others.data(), static_cast<int64_t>(others.size())});
}

absl::Status Products(const ProductsArgs& args, Stream& stream) {
  switch (static_cast<CudaStream&>(stream).products_by()) {
    case ProductsBy::kTensorCores:
      return Run("products", &KernelSet::tensor_products, args, stream);
    case ProductsBy::kNoTensorCores:
      return Run("products", &KernelSet::products, args, stream);
    case ProductsBy::kRounded:
      return Run("products", &KernelSet::rounded_products, args, stream);
    case ProductsBy::kLibrary:
      break;
  }
  return ProductsOfLibrary(args, static_cast<CudaStream&>(stream));
}

absl::Status Wkv4(const Wkv4Args& args, Stream& stream) { return Run("wkv4", &KernelSet::wkv4, args, stream); }

absl::Status Wkv6(const Wkv6Args& args, Stream& stream) {
  RWKV_RETURN_IF_ERROR(CheckHeadSize("wkv6", args.head_size));
  return Run("wkv6", &KernelSet::wkv6, args, stream);
}

absl::Status Wkv7(const Wkv7Args& args, Stream& stream) {
  RWKV_RETURN_IF_ERROR(CheckHeadSize("wkv7", args.head_size));
  return Run("wkv7", &KernelSet::wkv7, args, stream);
}

absl::Status DeepEmbed(const DeepEmbedArgs& args, Stream& stream) {
  return Run("deep_embed", &KernelSet::deep_embed, args, stream);
}

absl::Status DeepEmbedAttention(const DeepEmbedAttentionArgs& args, Stream& stream) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const int64_t channels = args.k2->matrix.rows + args.v2->matrix.rows;
  if (channels > kMaxAttentionChannels) {
    return absl::UnimplementedError(absl::StrCat("deep_embed_attention: ", args.k2->matrix.rows, " query channels and ",
                                                 args.v2->matrix.rows, " of the model are more than ",
                                                 kMaxAttentionChannels, ", the most on this device"));
  }
  return static_cast<CudaStream&>(stream).Run("deep_embed_attention", &KernelSet::deep_embed_attention, args);
}

absl::Status Sample(const SampleArgs& args, Stream& stream) { return Run("sample", &KernelSet::sample, args, stream); }

absl::Status CastState(const CastStateArgs& args, Stream& stream) {
  return Run("cast_state", &KernelSet::cast_state, args, stream);
}

constexpr OpTable Ops(bool half_states) {
  OpTable ops = {Embed, LayerNorm, MixInput, Products, Wkv4, Wkv6, Wkv7, DeepEmbed, DeepEmbedAttention, Sample};
  if (half_states) ops.cast_state = CastState;
  ops.max_head_size = kMaxHeadSize;
  ops.max_attention_channels = kMaxAttentionChannels;
  return ops;
}

class CudaDevice final : public ChoosingDevice {
 public:
  CudaDevice(const Runtime& runtime, const KernelSet& kernels, int ordinal, absl::string_view name,
             std::string identity, std::string family, const DeviceOptions& options,
             std::unique_ptr<LibraryProducts> library)
      : runtime_(runtime),
        kernels_(kernels),
        ordinal_(ordinal),
        name_(name),
        identity_(std::move(identity)),
        family_(std::move(family)),
        options_(options),
        library_(std::move(library)),
        uploader_(*this) {}

  absl::string_view name() const override { return name_; }
  std::string identity() const override { return identity_; }
  absl::Status MakeCurrent() override { return ToStatus(runtime_, runtime_.set_device(ordinal_), name_); }
  absl::string_view numeric_family() const override { return family_; }

  absl::StatusOr<Buffer> Allocate(int64_t bytes, MemoryKind kind) override {
    if (bytes < 0) return absl::InvalidArgumentError(absl::StrCat("buffer of ", bytes, " bytes"));
    if (bytes == 0) return Buffer();
    const bool pinned = kind == MemoryKind::kPinned;
    RWKV_RETURN_IF_ERROR(MakeCurrent());
    void* memory = nullptr;
    const auto size = static_cast<size_t>(bytes);
    const cudaError_t error =
        pinned ? runtime_.host_alloc(&memory, size, cudaHostAllocPortable) : runtime_.malloc(&memory, size);
    RWKV_RETURN_IF_ERROR(
        ToStatus(runtime_, error, absl::StrCat(name_, ": no memory for ", bytes, pinned ? " pinned bytes" : " bytes")));
    return Buffer(memory, bytes, pinned ? runtime_.free_host : runtime_.free);
  }

  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override {
    return CudaStream::Create(runtime_, kernels_, ordinal_, *this, options_, library_.get());
  }

  absl::StatusOr<std::unique_ptr<Event>> NewEvent() override {
    RWKV_RETURN_IF_ERROR(MakeCurrent());
    return CudaEvent::Create(runtime_, options_.hang_limit);
  }

  absl::StatusOr<Weight> Load(const MatrixView& matrix, WeightUse use) override {
    if (library_ != nullptr && use != WeightUse::kRows) {
      RWKV_RETURN_IF_ERROR(MakeCurrent());
      RWKV_RETURN_IF_ERROR(library_->Choose(matrix));
    }
    return uploader_.Load(matrix);
  }

  // Scratch memory of the largest step is there then.
  int64_t warm_up_rows() const override {
    return library_ != nullptr ? std::numeric_limits<int64_t>::max() : Device::warm_up_rows();
  }

  std::vector<std::string> Choices() const override {
    return library_ == nullptr ? std::vector<std::string>() : library_->AllChoices();
  }

  const OpTable& ops() const override {
    static constexpr OpTable kOps = Ops(/*half_states=*/false);
    static constexpr OpTable kHalfOps = Ops(/*half_states=*/true);
    return options_.half_states ? kHalfOps : kOps;
  }

 private:
  const Runtime& runtime_;
  const KernelSet& kernels_;
  const int ordinal_;
  const std::string name_;
  const std::string identity_;
  const std::string family_;
  const DeviceOptions options_;
  const std::unique_ptr<LibraryProducts> library_;  // Null: none is asked for.
  Uploader uploader_;
};

absl::StatusOr<std::unique_ptr<LibraryProducts>> OpenLibrary(absl::string_view name, const DeviceOptions& options) {
  absl::StatusOr<cublaslt::CublasLt> loaded =
      options.library != nullptr ? *options.library : cublaslt::Load(cublaslt::LibraryName());
  if (!loaded.ok()) {
    return absl::Status(loaded.status().code(), absl::StrCat(name, ": ", loaded.status().message()));
  }
  return LibraryProducts::Create(*loaded, name, options.library_rows);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Device>> OpenDevice(const Runtime& runtime, const KernelSet& kernels, int ordinal,
                                                   absl::string_view name, const DeviceOptions& options) {
  int count = 0;
  RWKV_RETURN_IF_ERROR(ToStatus(runtime, runtime.get_device_count(&count), name));
  if (ordinal < 0 || ordinal >= count) {
    return absl::UnimplementedError(absl::StrCat(name, ": this machine has ", count, " CUDA devices"));
  }
  cudaDeviceProp properties;
  std::memset(&properties, 0, sizeof(properties));
  RWKV_RETURN_IF_ERROR(ToStatus(runtime, runtime.get_device_properties(&properties, ordinal), name));
  if (properties.major < kOldestMajor) {
    return absl::UnimplementedError(absl::StrCat(name, ": ", properties.name, " has compute capability ",
                                                 properties.major, ".", properties.minor, ", older than ", kOldestMajor,
                                                 ".0"));
  }
  const absl::string_view uuid(properties.uuid.bytes, sizeof(properties.uuid.bytes));
  std::string family = absl::StrCat("cuda/tensor/sm_", properties.major, properties.minor);
  if (options.products_by == ProductsBy::kNoTensorCores) family = std::string(kFp32Family);
  if (options.products_by == ProductsBy::kRounded) absl::StrAppend(&family, "/rounded");
  std::unique_ptr<LibraryProducts> library;
  if (options.products_by == ProductsBy::kLibrary) {
    RWKV_RETURN_IF_ERROR(ToStatus(runtime, runtime.set_device(ordinal), name));
    RWKV_ASSIGN_OR_RETURN(library, OpenLibrary(name, options));
    absl::StrAppend(&family, "/", library->family());
  }
  if (options.half_states) absl::StrAppend(&family, "/half_states");
  DeviceOptions possible = options;
  possible.overlaps = options.overlaps && properties.major >= kOverlappingMajor;
  return std::make_unique<CudaDevice>(runtime, kernels, ordinal, name,
                                      absl::StrCat("cuda/", absl::BytesToHexString(uuid)), std::move(family), possible,
                                      std::move(library));
}

DeviceOptions TakeOptions(absl::string_view& name) {
  DeviceOptions options;
  options.graphs = !absl::ConsumeSuffix(&name, "/launches");
  if (absl::ConsumeSuffix(&name, "/fma")) {
    options.products_by = ProductsBy::kNoTensorCores;
  } else if (absl::ConsumeSuffix(&name, "/rounded")) {
    options.products_by = ProductsBy::kRounded;
  } else if (absl::ConsumeSuffix(&name, "/lt")) {
    options.products_by = ProductsBy::kLibrary;
  }
  options.overlaps = !absl::ConsumeSuffix(&name, "/serial");
  options.half_states = absl::ConsumeSuffix(&name, "/half");
  return options;
}

}  // namespace rwkv::kernels::cuda
