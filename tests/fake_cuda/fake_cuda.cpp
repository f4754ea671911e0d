// Enough of a CUDA device for torch's C++ side to believe in one: loaded into a CPU build of torch, it answers
// the questions that autograd, FakeTensorMode and scaled_dot_product_attention ask. It computes nothing.
// The counterpart in Python is fake_device.py.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {

// One device, with cuDNN. Found by name in torch's registry, as libtorch_cuda's own hooks would be.
struct FakeCUDAHooks final : public CUDAHooksInterface {
  explicit FakeCUDAHooks(CUDAHooksArgs /*unused*/) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCuDNN() const override { return true; }
  bool compiledWithCuDNN() const override { return true; }
  long versionRuntimeCuDNN() const { return 91900; } // NOLINT: older torch has no such question
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex /*unused*/) const override {}
  DeviceIndex exchangeDevice(DeviceIndex /*unused*/) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex /*unused*/) const override { return 0; }
  bool hasPrimaryContext(DeviceIndex /*unused*/) const override { return true; }
};

C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", FakeCUDAHooks)

} // namespace at

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

// Always device 0 and its default stream. Events have happened by the time anyone asks.
struct FakeGuard final : public c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::DeviceType type() const override { return kDevice.type(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device /*unused*/) const override {}
  void uncheckedSetDevice(c10::Device /*unused*/) const noexcept override {}
  c10::Device exchangeDevice(c10::Device /*unused*/) const override { return kDevice; }
  c10::Stream getStream(c10::Device /*unused*/) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device /*unused*/) const override { return stream(); }
  c10::Stream getNewStream(c10::Device /*unused*/, int /*unused*/) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream /*unused*/) const noexcept override { return stream(); }
  void record(void** /*unused*/, const c10::Stream& /*unused*/, const c10::DeviceIndex /*unused*/,
              const c10::EventFlag /*unused*/) const override {}
  void block(void* /*unused*/, const c10::Stream& /*unused*/) const override {}
  bool queryEvent(void* /*unused*/) const override { return true; }
  void destroyEvent(void* /*unused*/, const c10::DeviceIndex /*unused*/) const noexcept override {}
  bool queryStream(const c10::Stream& /*unused*/) const override { return true; }
  void synchronizeStream(const c10::Stream& /*unused*/) const override {}
};

const c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::CUDA, new FakeGuard());

// The kernel that torch picks on an A100: flash for 16 bits without a mask, else the memory-efficient one.
int64_t choose_attention(const at::Tensor& q, const at::Tensor& /*k*/, const at::Tensor& /*v*/,
                         const std::optional<at::Tensor>& mask, double /*dropout*/, bool /*causal*/,
                         std::optional<double> /*scale*/, bool /*gqa*/) {
  const bool half = q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16;
  const auto choice = half && !mask.has_value() ? sdp::SDPBackend::flash_attention
                                                : sdp::SDPBackend::efficient_attention;
  return static_cast<int64_t>(choice);
}

const bool chosen = [] {
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
  return true;
}();

} // namespace
