// An accelerator made of the host: torch's PrivateUse1 device with memory and kernels of the CPU, for tests.
//
// Its tensors have a device type of their own, so that torch refuses to mix them with the host's and a generator,
// an autocast or a stream of the wrong device shows. A kernel runs on CPU tensors that share the arguments'
// memory: nothing is copied, so what is copied between host and device, what the host reads and what is
// allocated is what the program asked for, and is counted.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/set_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>
#if __has_include(<ATen/core/GraphImplInterface.h>)
#include <ATen/core/GraphImplInterface.h>
#define HAS_GRAPHS
#endif

#include <map>
#include <mutex>
#include <set>
#include <string>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::IValue;
using torch::jit::Stack;

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr DeviceIndex kCount = 2;
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);
const c10::DispatchKeySet kHostKeys(c10::DispatchKey::CPU);

thread_local DeviceIndex current_device = 0;

// ---- counting ---------------------------------------------------------------------------------------------

struct Counters {
  std::mutex mutex;
  std::map<std::string, int64_t> counts;  // by kind, and by "kind operation"
  std::vector<int64_t> allocations;       // bytes of each
  int64_t limit = int64_t(16) << 30;      // bytes of a device
  c10::CachingDeviceAllocator::DeviceStats stats[kCount];

  void add(const std::string& kind, int64_t bytes = 0) {
    std::lock_guard<std::mutex> guard(mutex);
    ++counts[kind];
    if (bytes) counts[kind + "_bytes"] += bytes;
  }

  void allocated(DeviceIndex device, int64_t bytes) {
    std::lock_guard<std::mutex> guard(mutex);
    auto& used = stats[device].allocated_bytes[0];
    TORCH_CHECK_WITH(
        OutOfMemoryError,
        used.current + bytes <= limit,
        "the stand-in is out of memory. Tried to allocate ", bytes, " bytes; ", limit - used.current,
        " of ", limit, " are free");
    used.increase(bytes);
    stats[device].reserved_bytes[0].increase(bytes);
    stats[device].allocation[0].increase(1);
    allocations.push_back(bytes);
  }

  void freed(DeviceIndex device, int64_t bytes) {
    std::lock_guard<std::mutex> guard(mutex);
    stats[device].allocated_bytes[0].decrease(bytes);
    stats[device].reserved_bytes[0].decrease(bytes);
    stats[device].allocation[0].decrease(1);
  }
};

Counters& counters() {
  static auto* value = new Counters();  // outlives the tensors
  return *value;
}

// ---- memory -----------------------------------------------------------------------------------------------

struct Block {
  c10::DataPtr memory;  // of the host's allocator, or of what a CPU kernel returned
  c10::Storage owner;
  DeviceIndex device;
  int64_t bytes;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  counters().freed(block->device, block->bytes);
  delete block;
}

c10::DataPtr on_device(c10::DataPtr memory, c10::Storage owner, int64_t bytes, DeviceIndex device) {
  counters().allocated(device, bytes);
  void* data = owner ? owner.mutable_data() : memory.get();
  auto* block = new Block{std::move(memory), std::move(owner), device, bytes};
  return {data, block, &release, Device(kDevice, device)};
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    return on_device(c10::GetCPUAllocator()->allocate(bytes), {}, int64_t(bytes), current_device);
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  bool initialized() override {
    return true;
  }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> guard(counters().mutex);
    return counters().stats[device];
  }
  void resetAccumulatedStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> guard(counters().mutex);
    counters().stats[device].allocated_bytes[0].reset_accumulated();
  }
  void resetPeakStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> guard(counters().mutex);
    counters().stats[device].allocated_bytes[0].reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    std::lock_guard<std::mutex> guard(counters().mutex);
    auto limit = counters().limit;
    return {size_t(limit - counters().stats[device].allocated_bytes[0].current), size_t(limit)};
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(kDevice, &allocator)

// Pinned memory is the host's, remembered.
std::mutex pinned_mutex;
std::set<const void*> pinned;

void unpin(void* context) {
  {
    std::lock_guard<std::mutex> guard(pinned_mutex);
    pinned.erase(static_cast<c10::DataPtr*>(context)->get());
  }
  delete static_cast<c10::DataPtr*>(context);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* memory = new c10::DataPtr(c10::GetCPUAllocator()->allocate(bytes));
    std::lock_guard<std::mutex> guard(pinned_mutex);
    pinned.insert(memory->get());
    return {memory->get(), memory, &unpin, Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

PinnedAllocator pinned_allocator;

// ---- device, streams, generator ---------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kDevice;
  }
  Device exchangeDevice(Device device) const override {
    Device old = getDevice();
    setDevice(device);
    return old;
  }
  Device getDevice() const override {
    return {kDevice, current_device};
  }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < kCount, "there is no device ", device);
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  c10::Stream getStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getDefaultStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getNewStream(Device device, int) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return c10::Stream(c10::Stream::DEFAULT, stream.device());
  }
  DeviceIndex deviceCount() const noexcept override {
    return kCount;
  }
  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {
    counters().add("synchronize");
  }
  void synchronizeStream(const c10::Stream&) const override {
    counters().add("synchronize");
  }
  void synchronizeDevice(const DeviceIndex) const override {
    counters().add("synchronize");
  }
  double elapsedTime(void*, void*, const DeviceIndex) const override {
    return 0.0;
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(DeviceIndex device) {
    device_ = Device(kDevice, device);
    key_set_ = kKeys;
  }
};

at::Generator& default_generator(DeviceIndex device) {
  static auto* generators =
      new std::vector<at::Generator>{at::make_generator<Generator>(0), at::make_generator<Generator>(1)};
  return (*generators)[device < 0 ? current_device : device];
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(DeviceIndex) const override {
    return true;
  }
  DeviceIndex deviceCount() const override {
    return kCount;
  }
  DeviceIndex getCurrentDevice() const override {
    return current_device;
  }
  void setCurrentDevice(DeviceIndex device) const override {
    Guard().setDevice({kDevice, device});
  }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return Guard().exchangeDevice({kDevice, device}).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return device < 0 ? current_device : exchangeDevice(device);
  }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override {
    return default_generator(device);
  }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    return at::make_generator<Generator>(device < 0 ? current_device : device);
  }
  Device getDeviceFromPtr(void*) const override {
    return {kDevice, current_device};
  }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> guard(pinned_mutex);
    return pinned.count(data) > 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned_allocator;
  }
};

// Draws from the device's generator inside; the host's default one is as before afterwards.
struct DrawsOnDevice {
  explicit DrawsOnDevice(at::Generator& generator)
      : device(generator), host(at::detail::getDefaultCPUGenerator()), before(host.get_state()) {
    host.set_state(device.get_state());
  }
  ~DrawsOnDevice() {
    device.set_state(host.get_state());
    host.set_state(before);
  }
  at::Generator& device;
  at::Generator host;
  Tensor before;
};

// ---- kernels ----------------------------------------------------------------------------------------------

// One call's tensors of the device, seen as tensors of the host that share their memory, and back.
struct Views {
  std::map<const c10::StorageImpl*, c10::Storage> device_of;  // by the host's
  std::map<const c10::StorageImpl*, c10::Storage> host_of;    // by the device's
  std::vector<std::pair<Tensor, Tensor>> pairs;               // device, host
  DeviceIndex device = -1;

  Tensor host(const Tensor& t) {
    for (auto& [ours, theirs] : pairs)
      if (ours.is_same(t)) return theirs;
    device = t.device().index();
    auto& storage = host_of[t.storage().unsafeGetStorageImpl()];
    if (!storage) {
      auto owner = std::make_unique<c10::Storage>(t.storage());
      void* data = owner->mutable_data();
      c10::DataPtr memory(
          data, owner.release(), [](void* s) { delete static_cast<c10::Storage*>(s); },
          Device(c10::DeviceType::CPU));
      storage = c10::Storage(
          c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(memory), c10::GetCPUAllocator(), true);
      device_of[storage.unsafeGetStorageImpl()] = t.storage();
    }
    auto view = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), kHostKeys, t.dtype());
    view.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    pairs.emplace_back(t, view);
    return view;
  }

  Tensor back(const Tensor& t) {
    if (!t.defined() || !t.device().is_cpu()) return t;
    for (auto& [ours, theirs] : pairs)
      if (theirs.is_same(t)) return ours;
    auto& storage = device_of[t.storage().unsafeGetStorageImpl()];
    if (!storage) {
      auto bytes = int64_t(t.storage().nbytes());
      storage = c10::Storage(
          c10::Storage::use_byte_size_t(), bytes, on_device({}, t.storage(), bytes, device), &allocator, true);
    }
    auto ours = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), kKeys, t.dtype());
    ours.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    return ours;
  }

  // A kernel may have resized what it was to write into.
  void take_over_resized() {
    for (auto& [ours, theirs] : pairs) {
      auto& storage = theirs.storage();
      if (storage.data() != ours.storage().data() || storage.nbytes() != ours.storage().nbytes()) {
        auto bytes = int64_t(storage.nbytes());
        auto owner = c10::Storage(
            c10::Storage::use_byte_size_t(), bytes,
            storage.set_data_ptr(c10::DataPtr(nullptr, Device(c10::DeviceType::CPU))), nullptr, false);
        auto index = ours.device().index();
        ours.storage().set_data_ptr_noswap(on_device({}, owner, bytes, index));
        ours.storage().set_nbytes(bytes);
      }
      if (ours.sizes() != theirs.sizes() || ours.strides() != theirs.strides())
        ours.unsafeGetTensorImpl()->set_sizes_and_strides(
            theirs.sizes(), theirs.strides(), theirs.storage_offset());
    }
  }
};

// ---- graphs -----------------------------------------------------------------------------------------------

// A kernel, or a copy within the device, as it was captured: its tensors stay, and a replay fills them again.
struct Recorded {
  std::optional<c10::OperatorHandle> op, as;  // none: a copy
  std::vector<IValue> arguments, results;
};

struct Recording {
  std::vector<Recorded> calls;
};

// Of all threads: a backward pass runs in one of the device's own.
Recording* capturing = nullptr;
bool replaying = false;

void refuse_when_capturing(const std::string& what) {
  TORCH_CHECK(!capturing, "operation not permitted when a graph is captured: ", what);
}

void run_on_host(const c10::OperatorHandle& op, const c10::OperatorHandle& as, Stack* stack);

void fill_again(const Tensor& captured, const Tensor& now) {
  if (!captured.defined() || captured.device().type() != kDevice) return;
  if (captured.storage().data() == now.storage().data()) return;  // written in place, or a view
  Views views;
  views.host(captured).copy_(views.host(now));
}

void replay(const Recording& recording) {
  struct Replaying {
    Replaying() { replaying = true; }
    ~Replaying() { replaying = false; }
  } now;
  for (const auto& call : recording.calls) {
    if (!call.op) {
      Views views;
      views.host(call.arguments[1].toTensor()).copy_(views.host(call.arguments[0].toTensor()));
      continue;
    }
    Stack stack(call.arguments.begin(), call.arguments.end());
    run_on_host(*call.op, *call.as, &stack);
    for (size_t k = 0; k < call.results.size(); ++k) {
      const auto& then = call.results[k];
      const auto& again = stack[stack.size() - call.results.size() + k];
      if (then.isTensor()) {
        fill_again(then.toTensor(), again.toTensor());
      } else if (then.isTensorList()) {
        const auto tensors = then.toTensorVector(), filled = again.toTensorVector();
        for (size_t i = 0; i < tensors.size(); ++i) fill_again(tensors[i], filled[i]);
      }
    }
  }
}

#ifdef HAS_GRAPHS
struct Graph final : at::GraphImplInterface {
  explicit Graph(const at::GraphImplArgs&) {}
  ~Graph() override {
    if (capturing == &recording) capturing = nullptr;
  }
  void capture_begin(c10::MempoolId_t, at::GraphCaptureMode) override {
    refuse_when_capturing("a capture");
    capturing = &recording;
  }
  void capture_end() override {
    capturing = nullptr;
  }
  void instantiate() override {}
  void replay() override {
    counters().add("replay");
    ::replay(recording);
  }
  void reset() override {
    recording.calls.clear();
  }
  c10::MempoolId_t pool() const override {
    return {0, 0};
  }
  void enable_debug_mode() override {}
  void debug_dump(const std::string&) override {}
  Recording recording;
};
#endif

// Their results have shapes that depend on values, or go to the host: a device would have to be waited for.
const std::set<std::string> kWaits = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::histc"};
// Arguments that belong on the host.
const std::set<std::string> kTakesHost = {"aten::_pack_padded_sequence"};

bool is_mask(const IValue& value) {
  if (!value.isList()) return false;
  for (const auto& item : value.toListRef())
    if (item.isTensor() && item.toTensor().defined() &&
        (item.toTensor().scalar_type() == at::kBool || item.toTensor().scalar_type() == at::kByte))
      return true;
  return false;
}

void run_on_host(const c10::OperatorHandle& op, const c10::OperatorHandle& as, Stack* stack) {
  const auto& schema = op.schema();
  const auto num_arguments = as.schema().arguments().size();
  const auto begin = stack->size() - num_arguments;
  const auto& name = schema.name();
  Views views;
  const Tensor* foreign = nullptr;
  std::optional<at::Generator> generator;

  auto convert = [&](const Tensor& t) -> Tensor {
    if (!t.defined()) return t;
    if (t.device().type() == kDevice) {
      TORCH_CHECK(
          views.device < 0 || views.device == t.device().index(),
          name, ": tensors of two devices, ", views.device, " and ", t.device().index());
      return views.host(t);
    }
    if (t.dim() > 0) foreign = &t;
    return t;
  };
  // The arguments stay alive, and where they are, until the end.
  std::vector<IValue> arguments(stack->begin() + begin, stack->end());
  for (size_t k = 0; k < num_arguments; ++k) {
    auto& slot = (*stack)[begin + k];
    const auto& given = arguments[k];
    if (given.isTensor()) {
      const auto& t = given.toTensor();
      slot = convert(t);
      const auto* alias = k < schema.arguments().size() ? schema.arguments()[k].alias_info() : nullptr;
      if (alias && alias->isWrite() && t.defined() && t.device().type() != kDevice) foreign = &t;
    } else if (given.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : given.toTensorVector()) list.push_back(convert(t));
      slot = list;
    } else if (given.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& t : given.toOptionalTensorList())
        list.push_back(t ? std::optional<Tensor>(convert(*t)) : std::nullopt);
      slot = list;
    } else if (given.isGenerator()) {
      generator = given.toGenerator();
      slot = IValue();
    } else if (given.isDevice()) {
      if (views.device < 0) views.device = std::max<DeviceIndex>(given.toDevice().index(), 0);
      slot = Device(c10::DeviceType::CPU);
    }
  }
  TORCH_CHECK(
      !foreign || kTakesHost.count(name),
      "Expected all tensors to be on the same device: ", name, " has one on the host and others on the stand-in");
  if (views.device < 0) views.device = current_device;
  if (kWaits.count(name)) {
    refuse_when_capturing(name);
    counters().add("host_read");
  }
  if ((name == "aten::index" || name == "aten::_unsafe_index") && is_mask(arguments[1])) {
    refuse_when_capturing(name + " with a mask");
    counters().add("host_read");
  }
  if (!replaying) counters().add("kernel");

  const bool draws = schema.name() != "aten::_fused_sdp_choice" && op.hasTag(at::Tag::nondeterministic_seeded);
  std::optional<DrawsOnDevice> drawing;
  if (draws) {
    if (!generator) generator = default_generator(views.device);
    TORCH_CHECK(generator->device().type() == kDevice, name, ": a generator of ", generator->device());
    drawing.emplace(*generator);
  }
  as.redispatchBoxed(kHostKeys, stack);
  drawing.reset();
  views.take_over_resized();

  const auto num_returns = schema.returns().size();
  for (size_t k = 0; k < num_returns; ++k) {
    auto& slot = (*stack)[stack->size() - num_returns + k];
    if (slot.isTensor()) {
      slot = views.back(slot.toTensor());
    } else if (slot.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : slot.toTensorVector()) list.push_back(views.back(t));
      slot = list;
    }
  }
  if (capturing)
    capturing->calls.push_back({op, as, arguments, {stack->end() - num_returns, stack->end()}});
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  run_on_host(op, op, stack);
}

c10::OperatorHandle find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

void convolution(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  static const auto as = find("aten::convolution");
  run_on_host(op, as, stack);
}

void convolution_backward(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  static const auto as = find("aten::convolution_backward");
  // It has the bias's sizes beside the weight.
  const auto begin = stack->size() - op.schema().arguments().size();
  const auto& weight = (*stack)[begin + 2].toTensor();
  const bool transposed = (*stack)[begin + 6].toBool();
  const int64_t groups = (*stack)[begin + 8].toInt();
  c10::List<int64_t> bias{transposed ? weight.size(1) * groups : weight.size(0)};
  stack->insert(stack->begin() + begin + 3, IValue(bias));
  run_on_host(op, as, stack);
}

Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(Device(kDevice)));
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &allocator, kKeys, dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(Device(kDevice)));
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator, kKeys,
      dtype.value_or(at::get_default_dtype_as_scalartype()));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  Views views;
  auto is_ours = [](const Tensor& t) { return t.device().type() == kDevice; };
  if (capturing && is_ours(from) && is_ours(to))
    capturing->calls.push_back({std::nullopt, std::nullopt, {from, to}, {}});
  else
    refuse_when_capturing("a copy between host and device");
  if (is_ours(from) && !is_ours(to)) {
    counters().add("to_host", int64_t(from.nbytes()));
    if (!non_blocking) counters().add("host_read");
  } else if (!is_ours(from) && is_ours(to)) {
    // From memory that is not pinned the host waits, unless it is little (CUDA programming guide, "Concurrent
    // execution between host and device").
    const bool waits = !non_blocking || (from.nbytes() > (64 << 10) && !from.is_pinned());
    counters().add(waits ? "to_device" : "to_device_in_background", int64_t(from.nbytes()));
  }
  Tensor target = is_ours(to) ? views.host(to) : to;
  target.copy_(is_ours(from) ? views.host(from) : from);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

int64_t sdp_choice(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;  // by its definition, in small steps
}

Tensor& set_source(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, source, offset, size, stride);
}

// ---- what Python asks for ---------------------------------------------------------------------------------

c10::Dict<std::string, int64_t> counts() {
  std::lock_guard<std::mutex> guard(counters().mutex);
  c10::Dict<std::string, int64_t> found;
  for (const auto& [kind, count] : counters().counts) found.insert(kind, count);
  return found;
}

std::vector<int64_t> allocations() {
  std::lock_guard<std::mutex> guard(counters().mutex);
  return counters().allocations;
}

void reset() {
  std::lock_guard<std::mutex> guard(counters().mutex);
  counters().counts.clear();
  counters().allocations.clear();
}

void set_memory(int64_t bytes) {
  std::lock_guard<std::mutex> guard(counters().mutex);
  counters().limit = bytes;
}

} // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &sdp_choice)
} // namespace at::native

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  // Kernels of the CPU before torch's ways to do without one, which differ from every real device's.
  const std::set<std::string> own = {
      "aten::empty.memory_format", "aten::empty_strided", "aten::_fused_sdp_choice", "aten::set_.source_Tensor",
      "aten::set_.source_Storage_storage_offset", "aten::_copy_from_and_resize"};
  for (const auto& name : c10::Dispatcher::singleton().getRegistrationsForDispatchKey(c10::DispatchKey::CPU)) {
    const auto full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
    if (name.name.rfind("aten::", 0) == 0 && !own.count(full))
      m.impl(full.substr(6).c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_fused_sdp_choice", &sdp_choice);
  // A parameter that moves between host and device stays the same object: tied ones stay tied.
  m.impl("_has_compatible_shallow_copy_type", [](const Tensor&, const Tensor&) { return true; });
  m.impl("record_stream", [](Tensor&, c10::Stream) {});
  m.impl("set_.source_Storage_storage_offset", &set_source);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
}

TORCH_LIBRARY(standin, m) {
  m.def("install", [] {
    at::RegisterPrivateUse1HooksInterface(new Hooks());
#ifdef HAS_GRAPHS
    at::GraphImplRegistry()->Register(
        c10::DeviceTypeName(kDevice, false),
        [](const at::GraphImplArgs& args) -> std::unique_ptr<at::GraphImplInterface> {
          return std::make_unique<Graph>(args);
        });
#endif
  });
  m.def("default_generator", [](int64_t device) { return default_generator(device); });
  m.def("current_device", []() -> int64_t { return current_device; });
  m.def("set_device", [](int64_t device) { Guard().setDevice({kDevice, DeviceIndex(device)}); });
  m.def("counts", &counts);
  m.def("allocations", &allocations);
  m.def("reset", &reset);
  m.def("set_memory", &set_memory);
}
