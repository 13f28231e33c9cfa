// A pretend CUDA device for tests on machines without a GPU. Its tensors say cuda:N; their memory is the CPU's.
//
// It replaces, in the torch that is installed:
//   * every CUDA kernel in the dispatcher, by one boxed function that calls the CPU's kernel on the same memory;
//   * the device guard, CUDA's hooks (by their virtual table), the allocators of device and pinned memory, DDP's timer.
// The rest is PyTorch's own code for CUDA: dispatch, autocast with its lists, GradScaler, autograd, DDP's reducer.
//
// It refuses, as CUDA does: tensors of two devices in one operation (a CPU scalar that is only read and CPU indices
// pass), NumPy on a device tensor, CPU generators, devices that are not there, more memory than the limit.
// New memory is filled with 0xFF, which is NaN, so that reading memory that nobody wrote shows.
//
// It counts kernels (views launch none), what a CPU has to wait for (values that it reads, shapes that depend on values,
// copies that are not asynchronous), and copies to the device from memory that is not pinned.
//
// It is no model of time: every operation is finished when it returns, so that no race can show. It has no cuDNN and no
// cuBLAS: a convolution in 16 bits is computed in float32 and rounded, as tensor cores accumulate. The limit counts
// what is allocated through the device's allocator, and not what the CPU's kernels return.
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <unordered_set>

namespace {
using namespace c10;
using at::Tensor;
constexpr auto CUDA = DeviceType::CUDA;
constexpr auto CPU = DeviceType::CPU;

int device_count = 0;
thread_local DeviceIndex current = 0;
std::atomic<long> kernels{0}, waits{0}, pageable{0}, pinnings{0}, held{0}, limit{0}, reserved{0};  // the last three in bytes
std::mutex pinned_lock;
std::unordered_set<const void*> pinned;

void* host_memory(size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, 64, bytes ? bytes : 1)) throw std::bad_alloc();
  return data;
}

struct DeviceBlock {
  void* data;
  long bytes;
};

void free_device_block(void* context) {
  auto* block = static_cast<DeviceBlock*>(context);
  held -= block->bytes;
  free(block->data);
  delete block;
}

struct DeviceAllocator : Allocator {
  DataPtr allocate(size_t bytes) override {
    if ((held += long(bytes)) > limit) {
      held -= long(bytes);
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes");
    }
    if (held > reserved) reserved = held.load();  // what is freed stays reserved, as by PyTorch's allocator
    void* data = memset(host_memory(bytes), 0xFF, bytes);
    return {data, new DeviceBlock{data, long(bytes)}, &free_device_block, Device(CUDA, current)};
  }
  DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
} device_allocator;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  return pinned.count(data);
}

void free_pinned(void* data) {
  {
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned.erase(data);
  }
  free(data);
}

struct PinnedAllocator : Allocator {
  DataPtr allocate(size_t bytes) override {
    void* data = host_memory(bytes);
    ++pinnings;
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned.insert(data);
    return {data, data, &free_pinned, Device(CPU)};
  }
  DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
} pinned_allocator;

DeviceIndex exchange(DeviceIndex index) {
  DeviceIndex before = current;
  if (index >= 0) current = index;
  return before;
}

struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return CUDA; }
  Device exchangeDevice(Device device) const override { return Device(CUDA, exchange(device.index())); }
  Device getDevice() const override { return Device(CUDA, current); }
  void setDevice(Device device) const override { exchange(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { exchange(device.index()); }
  DeviceIndex deviceCount() const noexcept override { return DeviceIndex(device_count); }
  Stream getStream(Device device) const override {
    return Stream(Stream::DEFAULT, Device(CUDA, device.index() < 0 ? current : device.index()));
  }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getStream(device); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return getStream(stream.device()); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void record(void** event, const Stream&, const DeviceIndex, const EventFlag) const override {
    static int recorded;
    *event = &recorded;
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 0; }
} guard;

struct Hooks final : at::CUDAHooksInterface {
  Hooks() = default;
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return device_count; }
  DeviceIndex deviceCount() const override { return DeviceIndex(device_count); }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { exchange(index); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return exchange(index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchange(index); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  at::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  Device getDeviceFromPtr(void*) const override { return Device(CUDA, current); }
  void deviceSynchronize(DeviceIndex) const override {}
};

DataPtr shared_memory(const Storage& storage, void* data, Device device) {
  return {data, new Storage(storage), [](void* keeper) { delete static_cast<Storage*>(keeper); }, device};
}

// The arguments of one operation as CPU tensors over the same memory, and its results as device tensors.
class MemoryViews {
 public:
  Device device{CUDA, current};

  Tensor on_host(const Tensor& tensor) {
    for (auto& pair : tensors_)
      if (pair.device.is_same(tensor)) return pair.host;
    if (tensors_.empty()) device = tensor.device();
    TORCH_CHECK(tensor.device() == device, "Expected all tensors to be on the same device, but found at least two ",
                "devices, ", device, " and ", tensor.device(), "!");
    Storage host;
    for (auto& pair : storages_)
      if (same(pair.device, tensor.storage())) host = pair.host;
    if (!host) {
      DataPtr data(tensor.storage().mutable_data(), Device(CPU));
      host = Storage(Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(data), GetCPUAllocator(), true);
      storages_.push_back({tensor.storage(), host});
    }
    tensors_.push_back({tensor, view(host, DispatchKey::CPU, tensor)});
    return tensors_.back().host;
  }

  Tensor on_device(const Tensor& tensor) {
    if (!tensor.defined() || tensor.is_cuda()) return tensor;
    for (auto& pair : tensors_)
      if (pair.host.is_same(tensor)) return pair.device;
    for (auto& pair : storages_)
      if (same(pair.host, tensor.storage())) return view(pair.device, DispatchKey::CUDA, tensor);
    DataPtr data = shared_memory(tensor.storage(), tensor.storage().mutable_data(), device);
    Storage storage(Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(data), &device_allocator, true);
    return view(storage, DispatchKey::CUDA, tensor);
  }

  // Hand on what the operation resized.
  void update_device() {
    for (auto& [device_storage, host] : storages_) {
      if (host.data() == device_storage.data() && host.nbytes() == device_storage.nbytes()) continue;
      auto* storage = device_storage.unsafeGetStorageImpl();
      storage->set_data_ptr_noswap(shared_memory(host, host.mutable_data(), device));
      storage->set_nbytes(host.nbytes());
    }
    for (auto& [tensor, host] : tensors_)
      if (tensor.sizes() != host.sizes() || tensor.strides() != host.strides())
        tensor.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }

 private:
  template <class T>
  struct Pair {
    T device, host;
  };
  std::vector<Pair<Tensor>> tensors_;
  std::vector<Pair<Storage>> storages_;

  static bool same(const Storage& a, const Storage& b) { return a.unsafeGetStorageImpl() == b.unsafeGetStorageImpl(); }

  static Tensor view(const Storage& storage, DispatchKey key, const Tensor& like) {
    auto tensor = at::detail::make_tensor<TensorImpl>(Storage(storage), DispatchKeySet(key), like.dtype());
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    return tensor;
  }
};

// Operators whose list of optional tensors holds indices, which may lie on the CPU.
const std::set<std::string> INDEXING = {"aten::index",      "aten::index_put",     "aten::index_put_",
                                        "aten::_index_put_impl_", "aten::_unsafe_index", "aten::_unsafe_index_put"};
const std::set<std::string> IN_FLOAT32 = {"aten::convolution", "aten::convolution_backward"};
// Composite operators with a part that asks CUDA outside of the dispatcher.
const std::set<std::string> WHOLE = {"aten::ldexp"};

// Operators whose result is a number or has a shape that depends on values; beside these, indices that are masks.
const std::set<std::string> WAITING = {"aten::_local_scalar_dense", "aten::nonzero",           "aten::masked_select",
                                       "aten::is_nonzero",          "aten::equal",             "aten::_unique2",
                                       "aten::unique_dim",          "aten::unique_consecutive", "aten::bincount",
                                       "aten::repeat_interleave",   "aten::histc",             "torchvision::nms"};

// Stands for the CUDA kernel of every operator.
void kernel(const OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  auto arguments = torch::jit::last(*stack, schema.arguments().size()).vec();
  torch::jit::drop(*stack, arguments.size());
  MemoryViews views;
  std::optional<at::ScalarType> narrow;
  bool waits_for_device = WAITING.count(name), recorded = false;
  const Tensor* foreign = nullptr;
  auto to_host = [&](const Tensor& tensor, bool scalar_passes) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {  // a Python number is wrapped, and at home everywhere
      if (!tensor.unsafeGetTensorImpl()->is_wrapped_number() && (tensor.dim() > 0 || !scalar_passes)) foreign = &tensor;
      return tensor;
    }
    recorded |= !tensor.is_inference();
    Tensor host = views.on_host(tensor);
    if (!IN_FLOAT32.count(name) || !at::isReducedFloatingType(host.scalar_type())) return host;
    narrow = host.scalar_type();
    return host.to(at::kFloat);
  };
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  impl::ExcludeDispatchKeyGuard below_autocast(c10::autocast_dispatch_keyset);
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto argument = arguments[i];
    const auto* alias = schema.arguments()[i].alias_info();
    const bool read_only = !alias || !alias->isWrite();
    if (argument.isTensor()) {
      argument = to_host(argument.toTensor(), read_only);
    } else if (argument.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : argument.toTensorList()) list.push_back(to_host(tensor, read_only));
      argument = list;
    } else if (argument.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> tensor : argument.toOptionalTensorList()) {
        waits_for_device |= tensor && tensor->defined() && tensor->is_cuda() && tensor->scalar_type() == at::kBool;
        const bool index = tensor && tensor->defined() && !tensor->is_cuda() && INDEXING.count(name);
        list.push_back(tensor && !index ? std::optional<Tensor>(to_host(*tensor, true)) : tensor);
      }
      argument = list;
    } else if (argument.isDevice()) {
      argument = Device(CPU);
    } else if (argument.isGenerator() && argument.toGenerator().defined()) {
      TORCH_CHECK(argument.toGenerator().device().type() == CUDA,
                  "Expected a 'cuda' device type for generator but found 'cpu'");
    }
    stack->push_back(std::move(argument));
  }
  TORCH_CHECK(!foreign, "Expected all tensors to be on the same device, but found at least two devices, ",
              views.device, " and cpu! (", name, ")");
  const auto* aliased = schema.returns().empty() ? nullptr : schema.returns()[0].alias_info();
  const bool is_view = aliased && !aliased->isWrite();
  kernels += !is_view;
  waits += waits_for_device;
  op.callBoxed(stack);
  views.update_device();
  InferenceMode mode(InferenceMode::is_enabled() && !(is_view && recorded));  // a view is what it is a view of
  auto to_device = [&](const Tensor& tensor) {
    const bool widened = narrow && tensor.defined() && tensor.scalar_type() == at::kFloat;
    return views.on_device(widened ? tensor.to(*narrow) : tensor);
  };
  for (auto& result : torch::jit::pop(*stack, schema.returns().size())) {
    if (result.isTensor()) {
      result = to_device(result.toTensor());
    } else if (result.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : result.toTensorList()) list.push_back(to_device(tensor));
      result = list;
    }
    stack->push_back(std::move(result));
  }
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  const bool to_device = self.is_cuda(), from_device = source.is_cuda();
  const bool pin = is_pinned((to_device ? source : self).storage().data());
  if (to_device && from_device) ++kernels;
  else waits += !(non_blocking && pin);
  pageable += to_device && !from_device && !pin;
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  impl::ExcludeDispatchKeyGuard below_autocast(c10::autocast_dispatch_keyset);
  MemoryViews to, from;
  Tensor target = self.is_cuda() ? to.on_host(self) : self;
  target.copy_(source.is_cuda() ? from.on_host(source) : source);
  return self;
}

struct OnDevice {
  DeviceIndex before;
  explicit OnDevice(std::optional<Device> device) : before(exchange(device ? device->index() : -1)) {
    TORCH_CHECK(current < device_count, "CUDA error: invalid device ordinal");
  }
  ~OnDevice() { current = before; }
};

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  OnDevice on_device(device);
  return at::detail::empty_generic(size, &device_allocator, DispatchKeySet(DispatchKey::CUDA),
                                   dtype.value_or(c10::get_default_dtype_as_scalartype()), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  OnDevice on_device(device);
  return at::detail::empty_strided_generic(size, stride, &device_allocator, DispatchKeySet(DispatchKey::CUDA),
                                           dtype.value_or(c10::get_default_dtype_as_scalartype()));
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  impl->set_storage_offset(offset);
  if (stride.empty()) impl->set_sizes_contiguous(size);
  else impl->set_sizes_and_strides(size, stride);
  return self;
}

Tensor& set_whole(Tensor& self, at::Storage source) {
  return set_storage(self, source, 0, {int64_t(source.nbytes() / self.itemsize())}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& other) {
  return set_storage(self, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

Tensor& set_empty(Tensor& self) { return set_tensor(self, empty({0}, self.scalar_type(), {}, self.device(), {}, {})); }

void record_stream(Tensor&, at::Stream) {}

struct NoTimer : c10d::Timer {
  std::optional<int64_t> measureDifference(Event, Event) override { return std::nullopt; }
};

// Whether the pretend kernel takes an operator's place on the device; composite ones fall apart into others.
bool takes(const OperatorHandle& op) {
  static const std::set<std::string> by_hand = {"aten::copy_", "aten::empty.memory_format", "aten::empty_strided",
                                                "aten::set_", "aten::record_stream"};
  const auto& name = op.operator_name().name;
  if (by_hand.count(name) || by_hand.count(name + "." + op.operator_name().overload_name)) return false;
  if (name.rfind("aten::", 0) && name.rfind("torchvision::", 0)) return false;
  const bool composite = op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd) ||
                         op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd);
  return op.hasKernelForDispatchKey(DispatchKey::CUDA) || IN_FLOAT32.count(name) || WHOLE.count(name) ||
         (op.hasKernelForDispatchKey(DispatchKey::CPU) && !composite);
}
}  // namespace

extern "C" {
void pretend_install(int devices) {
  static std::vector<RegistrationHandleRAII> registrations;
  static Hooks hooks;
  device_count = devices;
  c10::SetAllocator(CUDA, &device_allocator, 255);
  impl::device_guard_impl_registry[static_cast<size_t>(CUDA)].store(&guard);
  memcpy(const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks()), &hooks, sizeof(void*));  // virtual table
  c10d::TimerRegistry()->SetTerminate(false);
  c10d::TimerRegistry()->Register(
      CUDA, [](Device) -> std::unique_ptr<c10d::Timer> { return std::make_unique<NoTimer>(); }, "pretend",
      c10::REGISTRY_PREFERRED);
  auto& dispatcher = Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findOp(name);
    if (op && op->hasSchema() && takes(*op))
      registrations.push_back(dispatcher.registerImpl(
          name, DispatchKey::CUDA, KernelFunction::makeFromBoxedFunction<&kernel>(), std::nullopt, nullptr, "pretend"));
  }
  static torch::Library library(torch::Library::IMPL, "aten", DispatchKey::CUDA, __FILE__, __LINE__);
  library.impl("copy_", TORCH_FN(copy_));
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("set_", TORCH_FN(set_empty));
  library.impl("set_.source_Storage", TORCH_FN(set_whole));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  library.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  library.impl("record_stream", TORCH_FN(record_stream));
}
void pretend_limit(long bytes) { limit = bytes; }
void pretend_set_device(int index) { current = DeviceIndex(index); }
int pretend_get_device() { return current; }
long pretend_kernels() { return kernels; }
long pretend_waits() { return waits; }
long pretend_pageable() { return pageable; }
long pretend_pinnings() { return pinnings; }
long pretend_held() { return held; }
long pretend_memory() { return limit; }
long pretend_reserved() { return reserved; }
void pretend_release() { reserved = held.load(); }
}
