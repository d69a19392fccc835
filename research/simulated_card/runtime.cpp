// A CUDA runtime without a GPU: device memory is host memory, mapped where it is touched; kernels and matrix products
// do nothing (with values.cpp, ATen's kernels for processors run on the same memory).
//
// Preloaded under the ordinary CUDA build of torch it stands in for libcuda, libcudart and libcublas, as much of them
// as torch calls. The card is described by the environment: SIMULATED_CARD_TOTAL_BYTES, _TAKEN_BYTES
// (by other processes), _DEVICES, _NAME, _MULTIPROCESSORS, _THREADS (on a multiprocessor at once), _CAPABILITY (89 for
// 8.9). Each device has that much memory of its own.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>
#define API extern "C" __attribute__((visibility("default")))
namespace {
std::mutex mu;
std::map<uintptr_t, size_t> dev, host;
constexpr int kMostDevices = 16;
size_t used[kMostDevices] = {};                // bytes taken of each device
std::unordered_map<uintptr_t, int> device_of;  // the device of each start in `dev`
thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;
std::unordered_map<const void*, std::string>* names;
std::unordered_map<std::string, long>* launches_by;
std::atomic<long> n_launch{0}, n_gemm{0}, n_sync{0}, n_d2h{0}, n_h2d{0}, n_d2d{0}, n_memset{0}, n_malloc{0}, n_free{0},
    n_graph{0}, n_h2d_pageable{0}, n_hostalloc{0};
typedef void (*cb_t)(const char*);
std::atomic<cb_t> cb{nullptr};
std::atomic<int> capturing{0};
std::atomic<size_t> total_set{0};
long of_env(const char* name, long otherwise) {
  const char* v = getenv(name);
  return v ? atol(v) : otherwise;
}
size_t total() {
  if (total_set) return total_set;
  static size_t t = of_env("SIMULATED_CARD_TOTAL_BYTES", 141l << 30);
  return t;
}
int devices() { return of_env("SIMULATED_CARD_DEVICES", 1); }
size_t taken(int device) {  // by this process, and by others
  static size_t others = of_env("SIMULATED_CARD_TAKEN_BYTES", 0);
  return used[device] + others;
}
cudaError_t err(cudaError_t e) {
  last = e;
  return e;
}
bool inside(std::map<uintptr_t, size_t>& m, const void* p, uintptr_t* base = nullptr) {
  auto it = m.upper_bound((uintptr_t)p);
  if (it == m.begin()) return false;
  --it;
  bool in = (uintptr_t)p < it->first + it->second;
  if (in && base) *base = it->first;
  return in;
}
void note(const char* what) {
  if (auto f = cb.load()) f(what);
}
void* fresh() {
  static std::atomic<uintptr_t> next{0x1000};
  return (void*)(next += 16);
}
cudaError_t launched(const void* f) {
  n_launch++;
  std::lock_guard<std::mutex> g(mu);
  if (launches_by && names) {
    auto it = names->find(f);
    (*launches_by)[it == names->end() ? "?" : it->second]++;
  }
  return cudaSuccess;
}
size_t pages(size_t n) { return (n + 4095) / 4096 * 4096; }
}  // namespace
API void simulated_card_set_callback(cb_t f) { cb = f; }
API void simulated_card_set_total(size_t n) { total_set = n; }  // the card's memory from now on; 0: as it was
API void simulated_card_counts(long* out) {
  long v[] = {n_launch, n_gemm,   n_sync, n_d2h,   n_h2d,          n_d2d,
              n_memset, n_malloc, n_free, n_graph, n_h2d_pageable, n_hostalloc};
  memcpy(out, v, sizeof v);
}
API void simulated_card_reset() {
  n_launch = n_gemm = n_sync = n_d2h = n_h2d = n_d2d = n_memset = n_malloc = n_free = n_graph = n_h2d_pageable =
      n_hostalloc = 0;
  std::lock_guard<std::mutex> g(mu);
  if (!launches_by) launches_by = new std::unordered_map<std::string, long>;
  launches_by->clear();
}
API void simulated_card_dump(const char* path) {
  std::lock_guard<std::mutex> g(mu);
  FILE* f = fopen(path, "w");
  if (launches_by)
    for (auto& kv : *launches_by) fprintf(f, "%ld\t%s\n", kv.second, kv.first.c_str());
  fclose(f);
}
API void simulated_card_stall(const char* n) {
  n_sync++;
  note(n);
}
API void simulated_card_gemm(const char* n) { n_gemm++; }
// registration
API void** __cudaRegisterFatBinary(void* p) { return (void**)malloc(16); }
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterFunction(void**, const char* hostFun, char*, const char* deviceName, int, void*, void*, void*,
                                void*, int*) {
  std::lock_guard<std::mutex> g(mu);
  if (!names) names = new std::unordered_map<const void*, std::string>;
  (*names)[hostFun] = deviceName;
}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API char __cudaInitModule(void**) { return 1; }
struct Cfg {
  dim3 g, b;
  size_t sh;
  cudaStream_t s;
};
static thread_local std::vector<Cfg>* cfgs;
API unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t sh, cudaStream_t s) {
  if (!cfgs) cfgs = new std::vector<Cfg>;
  cfgs->push_back({g, b, sh, s});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* sh, void* s) {
  if (!cfgs || cfgs->empty()) return cudaErrorUnknown;
  auto c = cfgs->back();
  cfgs->pop_back();
  *g = c.g;
  *b = c.b;
  *sh = c.sh;
  *(cudaStream_t*)s = c.s;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) {
  *k = (cudaKernel_t)f;
  return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3, dim3, void**, size_t, cudaStream_t) {
  return launched((const void*)k);
}
API cudaError_t cudaLaunchKernel(const void* f, dim3, dim3, void**, size_t, cudaStream_t) { return launched(f); }
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* f, void**) { return launched(f); }
API cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3, dim3, void**, size_t, cudaStream_t) {
  return launched(f);
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t fn, void* d) {
  fn(d);
  return cudaSuccess;
}
API cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void* d, unsigned) {
  f(s, cudaSuccess, d);
  return cudaSuccess;
}
// errors
API cudaError_t cudaGetLastError() {
  auto e = last;
  last = cudaSuccess;
  return e;
}
API cudaError_t cudaPeekAtLastError() { return last; }
API const char* cudaGetErrorName(cudaError_t e) {
  return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError";
}
API const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorMemoryAllocation ? "out of memory"
         : e == cudaSuccess             ? "no error"
                                        : "an error of the simulated card";
}
// device
// Torch first asks for devices when its own kernels are registered: that is when values.cpp can take them over.
static void start_values() {
  static std::atomic<bool> started{false};
  if (started.exchange(true)) return;
  Dl_info info{};
  dladdr((void*)&start_values, &info);
  std::string path(info.dli_fname);
  path = path.substr(0, path.rfind('/') + 1) + "libsimulated_values.so";
  void* values = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  auto start = values ? (void (*)(const char*))dlsym(values, "simulated_values_start") : nullptr;
  if (start)
    start(getenv("SIMULATED_CARD_VALUES"));
  else
    fprintf(stderr, "simulated card: no values: %s\n", dlerror());
}
API cudaError_t cudaGetDeviceCount(int* n) {
  start_values();
  *n = devices();
  return cudaSuccess;
}
API cudaError_t cudaGetDevice(int* d) {
  *d = current;
  return cudaSuccess;
}
API cudaError_t cudaSetDevice(int d) {
  if (d < 0 || d >= devices()) return err(cudaErrorInvalidDevice);
  current = d;
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  const char* name = getenv("SIMULATED_CARD_NAME");
  strncpy(p->name, name ? name : "Simulated card", sizeof p->name - 1);
  p->totalGlobalMem = total();
  p->sharedMemPerBlock = 49152;
  p->regsPerBlock = 65536;
  p->warpSize = 32;
  p->memPitch = 2147483647;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = of_env("SIMULATED_CARD_CAPABILITY", 90) / 10;
  p->minor = of_env("SIMULATED_CARD_CAPABILITY", 90) % 10;
  p->textureAlignment = 512;
  p->multiProcessorCount = of_env("SIMULATED_CARD_MULTIPROCESSORS", 132);
  p->unifiedAddressing = 1;
  p->memoryBusWidth = 6144;
  p->l2CacheSize = 60 << 20;
  p->maxThreadsPerMultiProcessor = of_env("SIMULATED_CARD_THREADS", 2048);
  p->streamPrioritiesSupported = 1;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerMultiprocessor = 65536;
  p->managedMemory = 1;
  p->concurrentManagedAccess = 1;
  p->cooperativeLaunch = 1;
  p->sharedMemPerBlockOptin = 232448;
  p->maxBlocksPerMultiProcessor = 32;
  p->reservedSharedMemPerBlock = 1024;
  p->concurrentKernels = 1;
  p->canMapHostMemory = 1;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  switch (a) {
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *v = 49152;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *v = 232448;
      break;
    case cudaDevAttrMultiProcessorCount:
      *v = of_env("SIMULATED_CARD_MULTIPROCESSORS", 132);
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *v = of_env("SIMULATED_CARD_CAPABILITY", 90) / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *v = of_env("SIMULATED_CARD_CAPABILITY", 90) % 10;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *v = 1024;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *v = of_env("SIMULATED_CARD_THREADS", 2048);
      break;
    case cudaDevAttrWarpSize:
      *v = 32;
      break;
    case cudaDevAttrMaxGridDimX:
      *v = 2147483647;
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *v = 65535;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *v = 32;
      break;
    case cudaDevAttrL2CacheSize:
      *v = 60 << 20;
      break;
    case cudaDevAttrClockRate:
      *v = 1980000;
      break;
    default:
      *v = 1;
  }
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* c, int, int) {
  *c = 0;
  return cudaSuccess;
}
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* p, int) {
  *p = (cudaMemPool_t)fresh();
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetGraphMemAttribute(int, cudaGraphMemAttributeType, void*) { return cudaSuccess; }
API cudaError_t cudaDeviceSetGraphMemAttribute(int, cudaGraphMemAttributeType, void*) { return cudaSuccess; }
API cudaError_t cudaDeviceGetPCIBusId(char* b, int n, int) {
  snprintf(b, n, "0000:00:00.0");
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* l, int* g) {
  *l = 0;
  *g = -5;
  return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() {
  n_sync++;
  note("cudaDeviceSynchronize");
  return cudaSuccess;
}
// memory
static cudaError_t take(void** p, size_t n) {
  std::lock_guard<std::mutex> g(mu);
  if (taken(current) + n > total()) {
    *p = nullptr;
    return err(cudaErrorMemoryAllocation);
  }
  void* q = mmap(nullptr, pages(n ? n : 1), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (q == MAP_FAILED) return err(cudaErrorMemoryAllocation);
  dev[(uintptr_t)q] = n;
  device_of[(uintptr_t)q] = current;
  used[current] += n;
  n_malloc++;
  *p = q;
  return cudaSuccess;
}
API cudaError_t cudaMalloc(void** p, size_t n) { return take(p, n); }
API cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return take(p, n); }
API cudaError_t cudaFree(void* p) {
  if (!p) return cudaSuccess;
  n_free++;
  std::lock_guard<std::mutex> g(mu);
  auto it = dev.find((uintptr_t)p);
  if (it != dev.end()) {
    munmap(p, pages(it->second));
    used[device_of[it->first]] -= it->second;
    device_of.erase(it->first);
    dev.erase(it);
  }
  return cudaSuccess;
}
API cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
API cudaError_t cudaMemGetInfo(size_t* f, size_t* t) {
  std::lock_guard<std::mutex> g(mu);
  *t = total();
  *f = total() > taken(current) ? total() - taken(current) : 0;
  return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
  n_hostalloc++;
  std::lock_guard<std::mutex> g(mu);
  void* q = mmap(nullptr, pages(n ? n : 1), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (q == MAP_FAILED) return err(cudaErrorMemoryAllocation);
  host[(uintptr_t)q] = n;
  *p = q;
  return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* p) {
  std::lock_guard<std::mutex> g(mu);
  auto it = host.find((uintptr_t)p);
  if (it != host.end()) {
    munmap(p, pages(it->second));
    host.erase(it);
  }
  return cudaSuccess;
}
API cudaError_t cudaHostRegister(void* p, size_t n, unsigned) {
  std::lock_guard<std::mutex> g(mu);
  host[(uintptr_t)p] = n;
  return cudaSuccess;
}
API cudaError_t cudaHostUnregister(void* p) {
  std::lock_guard<std::mutex> g(mu);
  host.erase((uintptr_t)p);
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  std::lock_guard<std::mutex> g(mu);
  memset(a, 0, sizeof *a);
  uintptr_t start = 0;
  a->type = inside(dev, p, &start) ? cudaMemoryTypeDevice
            : inside(host, p)      ? cudaMemoryTypeHost
                                   : cudaMemoryTypeUnregistered;
  a->device = a->type == cudaMemoryTypeDevice ? device_of[start] : current;
  a->devicePointer = a->hostPointer = (void*)p;
  return cudaSuccess;
}
static void copied(const void* dst, const void* src, bool async) {
  bool d, s, ps;
  {
    std::lock_guard<std::mutex> g(mu);
    d = inside(dev, dst);
    s = inside(dev, src);
    ps = inside(host, src);
  }
  if (d && s)
    n_d2d++;
  else if (d) {
    n_h2d++;
    if (!ps) {
      n_h2d_pageable++;
      note("h2d pageable");
    }
  } else if (s) {
    n_d2h++;
    note("d2h");
  }
}
API cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) {
  copied(d, s, false);
  memcpy(d, s, n);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t) {
  copied(d, s, true);
  memmove(d, s, n);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyPeerAsync(void* d, int, const void* s, int, size_t n, cudaStream_t) {
  copied(d, s, true);
  memmove(d, s, n);
  return cudaSuccess;
}
API cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, cudaMemcpyKind,
                                  cudaStream_t) {
  copied(d, s, true);
  for (size_t i = 0; i < h; i++) memmove((char*)d + i * dp, (const char*)s + i * sp, w);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
API cudaError_t cudaGetSymbolAddress(void** p, const void*) {
  *p = nullptr;
  return cudaSuccess;
}
API cudaError_t cudaMemset(void* p, int v, size_t n) {
  n_memset++;
  memset(p, v, n);
  return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) {
  n_memset++;
  if (v == 0 && n > (8u << 20)) return cudaSuccess;
  memset(p, v, n);
  return cudaSuccess;
}
API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
API cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }
API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
API cudaError_t cudaIpcCloseMemHandle(void*) { return cudaSuccess; }
API cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t*, cudaEvent_t) { return cudaSuccess; }
API cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*) { return cudaSuccess; }
API cudaError_t cudaIpcOpenEventHandle(cudaEvent_t*, cudaIpcEventHandle_t) { return cudaErrorUnknown; }
API cudaError_t cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned) { return cudaErrorUnknown; }
// functions
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->ptxVersion = 90;
  a->binaryVersion = 90;
  a->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) { return cudaSuccess; }
API cudaError_t cudaLibraryLoadData(cudaLibrary_t* l, const void*, cudaJitOption*, void**, unsigned, cudaLibraryOption*,
                                    void**, unsigned) {
  *l = (cudaLibrary_t)fresh();
  return cudaSuccess;
}
API cudaError_t cudaLibraryGetKernel(cudaKernel_t* k, cudaLibrary_t, const char*) {
  *k = (cudaKernel_t)fresh();
  return cudaSuccess;
}
API cudaError_t cudaLibraryUnload(cudaLibrary_t) { return cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
  *n = 2;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  *n = 2;
  return cudaSuccess;
}
static int driver_stub() { return 0; }
static int driver_ctx(void*, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return 0;
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char* s, void** f, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* r) {
  // What this library has under that name, else one that says yes.
  static void* self = [] {
    Dl_info info{};
    dladdr((void*)&simulated_card_counts, &info);
    return dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  }();
  void* own = self ? dlsym(self, s) : nullptr;
  *f = strstr(s, "PrimaryCtxGetState") ? (void*)driver_ctx : own ? own : (void*)driver_stub;
  if (r) *r = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
// Virtual memory, as the driver has it: addresses are reserved, memory is made and mapped there. In units of 2 MiB.
static const size_t unit = 2ull << 20;
static std::map<uintptr_t, std::pair<void*, size_t>> reserved;               // aligned address -> what mmap gave
static std::unordered_map<unsigned long long, std::pair<size_t, int>> made;  // handle -> bytes, device
API int cuMemGetAllocationGranularity(size_t* n, const void*, int) {
  *n = unit;
  return 0;
}
API int cuMemAddressReserve(unsigned long long* p, size_t n, size_t, unsigned long long, unsigned long long) {
  void* q = mmap(nullptr, n + unit, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (q == MAP_FAILED) return 2;
  std::lock_guard<std::mutex> g(mu);
  *p = ((uintptr_t)q + unit - 1) / unit * unit;
  reserved[*p] = {q, n + unit};
  return 0;
}
API int cuMemAddressFree(unsigned long long p, size_t) {
  std::lock_guard<std::mutex> g(mu);
  auto it = reserved.find(p);
  if (it == reserved.end()) return 1;
  munmap(it->second.first, it->second.second);
  reserved.erase(it);
  return 0;
}
struct AllocationProp {  // the start of the driver's CUmemAllocationProp, whose header declares these calls otherwise
  int type, handle_types, location_type, location_id;
};
API int cuMemCreate(unsigned long long* h, size_t n, const AllocationProp* prop, unsigned long long) {
  std::lock_guard<std::mutex> g(mu);
  const int device = prop->location_id;
  if (n == 0 || n % unit || device < 0 || device >= kMostDevices) return 1;
  if (taken(device) + n > total()) return 2;  // CUDA_ERROR_OUT_OF_MEMORY
  *h = (unsigned long long)fresh();
  made[*h] = {n, device};
  used[device] += n;
  n_malloc++;
  return 0;
}
API int cuMemRelease(unsigned long long h) {
  std::lock_guard<std::mutex> g(mu);
  auto it = made.find(h);
  if (it == made.end()) return 1;
  used[it->second.second] -= it->second.first;
  made.erase(it);
  n_free++;
  return 0;
}
API int cuMemMap(unsigned long long p, size_t n, size_t, unsigned long long h, unsigned long long) {
  std::lock_guard<std::mutex> g(mu);
  auto it = made.find(h);
  if (it == made.end() || p % unit || n % unit) return 1;
  if (mprotect((void*)p, n, PROT_READ | PROT_WRITE)) return 1;
  dev[p] = n;
  device_of[p] = it->second.second;
  return 0;
}
API int cuMemUnmap(unsigned long long p, size_t n) {
  std::lock_guard<std::mutex> g(mu);
  dev.erase(p);
  device_of.erase(p);
  return mmap((void*)p, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED ? 1
                                                                                                                    : 0;
}
API int cuMemSetAccess(unsigned long long, size_t, const void*, size_t) { return 0; }
API int cuMemGetAddressRange(unsigned long long* base, size_t* n, unsigned long long p) {
  std::lock_guard<std::mutex> g(mu);
  uintptr_t b;
  if (!inside(dev, (void*)p, &b)) return 1;
  if (base) *base = b;
  if (n) *n = dev[b];
  return 0;
}
// streams and events
API cudaError_t cudaStreamCreate(cudaStream_t* s) {
  *s = (cudaStream_t)fresh();
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) {
  *s = (cudaStream_t)fresh();
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) {
  *s = (cudaStream_t)fresh();
  return cudaSuccess;
}
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t) {
  n_sync++;
  note("cudaStreamSynchronize");
  return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) {
  *p = 0;
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* e) {
  *e = (cudaEvent_t)fresh();
  return cudaSuccess;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
  *e = (cudaEvent_t)fresh();
  return cudaSuccess;
}
API cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  *ms = 1.0f;
  return cudaSuccess;
}
API cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
API cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaEventSynchronize(cudaEvent_t) {
  n_sync++;
  note("cudaEventSynchronize");
  return cudaSuccess;
}
// graphs: captured work is done nowhere
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) {
  *s = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* s, unsigned long long* id,
                                         cudaGraph_t* g, const cudaGraphNode_t** d, const cudaGraphEdgeData** e,
                                         size_t* n) {
  *s = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id) *id = 1;
  if (g) *g = (cudaGraph_t)0x10;
  if (d) *d = nullptr;
  if (e) *e = nullptr;
  if (n) *n = 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  capturing = 1;
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t, cudaGraph_t, const cudaGraphNode_t*,
                                              const cudaGraphEdgeData*, size_t, cudaStreamCaptureMode) {
  capturing = 1;
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* g) {
  capturing = 0;
  *g = (cudaGraph_t)fresh();
  return cudaSuccess;
}
API cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t, cudaGraphNode_t*, const cudaGraphEdgeData*, size_t,
                                                    unsigned) {
  return cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
API cudaError_t cudaGraphAddNode(cudaGraphNode_t*, cudaGraph_t, const cudaGraphNode_t*, const cudaGraphEdgeData*,
                                 size_t, cudaGraphNodeParams*) {
  return cudaSuccess;
}
API cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle*, cudaGraph_t, unsigned, unsigned) {
  return cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
API cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* n) {
  *n = 1;
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t, unsigned long long) {
  *e = (cudaGraphExec_t)fresh();
  return cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
  n_graph++;
  return cudaSuccess;
}
API cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* n) {
  *n = 0;
  return cudaSuccess;
}
API cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) { return cudaSuccess; }
API cudaError_t cudaUserObjectCreate(cudaUserObject_t* o, void*, cudaHostFn_t, unsigned, unsigned) {
  *o = (cudaUserObject_t)fresh();
  return cudaSuccess;
}
API cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }
// cuBLAS
API int cublasCreate_v2(void** h) {
  *h = fresh();
  return 0;
}
API int cublasDestroy_v2(void*) { return 0; }
API int cublasGetMathMode(void*, int* m) {
  *m = 0;
  return 0;
}
API int cublasGetPointerMode_v2(void*, int* m) {
  *m = 0;
  return 0;
}
API size_t cublasLtGetVersion() { return 130100; }
API int cublasLtCreate(void** h) {
  *h = fresh();
  return 0;
}
API int cublasLtMatmulDescCreate(void** h, int, int) {
  *h = fresh();
  return 0;
}
API int cublasLtMatmulPreferenceCreate(void** h) {
  *h = fresh();
  return 0;
}
API int cublasLtMatrixLayoutCreate(void** h, int, unsigned long, unsigned long, long) {
  *h = fresh();
  return 0;
}
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* r, int* n) {
  memset(r, 0, 64);
  *n = 1;
  return 0;
}
// Whatever multiplies is counted and does nothing.
#define COUNTED(NAME)      \
  API int cublas##NAME() { \
    n_gemm++;              \
    return 0;              \
  }
// clang-format off
COUNTED(Caxpy_v2) COUNTED(Ccopy_v2) COUNTED(Cdotc_v2) COUNTED(Cdotu_v2) COUNTED(CgelsBatched) COUNTED(CgemmBatched)
COUNTED(CgemmStridedBatched) COUNTED(Cgemm_v2) COUNTED(Cgemv_v2) COUNTED(CgeqrfBatched) COUNTED(Cgerc_v2)
COUNTED(Cgeru_v2) COUNTED(CgetrfBatched) COUNTED(CgetrsBatched) COUNTED(Chemm_v2) COUNTED(Chemv_v2) COUNTED(Cher2_v2)
COUNTED(Cher2k_v2) COUNTED(Cher_v2) COUNTED(Cherk_v2) COUNTED(Crot_v2) COUNTED(Crotg_v2) COUNTED(Cscal_v2)
COUNTED(Csrot_v2) COUNTED(Csscal_v2) COUNTED(Cswap_v2) COUNTED(Csymm_v2) COUNTED(Csymv_v2) COUNTED(Csyr2_v2)
COUNTED(Csyr2k_v2) COUNTED(Csyr_v2) COUNTED(Csyrk_v2) COUNTED(Ctrmm_v2) COUNTED(Ctrmv_v2) COUNTED(CtrsmBatched)
COUNTED(Ctrsm_v2) COUNTED(Ctrsv_v2) COUNTED(Dasum_v2) COUNTED(Daxpy_v2) COUNTED(Dcopy_v2) COUNTED(Ddot_v2)
COUNTED(DgelsBatched) COUNTED(DgemmBatched) COUNTED(DgemmStridedBatched) COUNTED(Dgemm_v2) COUNTED(Dgemv_v2)
COUNTED(DgeqrfBatched) COUNTED(Dger_v2) COUNTED(DgetrfBatched) COUNTED(DgetrsBatched) COUNTED(Dnrm2_v2) COUNTED(DotEx)
COUNTED(Drot_v2) COUNTED(Drotg_v2) COUNTED(Drotm_v2) COUNTED(Drotmg_v2) COUNTED(Dscal_v2) COUNTED(Dswap_v2)
COUNTED(Dsymm_v2) COUNTED(Dsymv_v2) COUNTED(Dsyr2_v2) COUNTED(Dsyr2k_v2) COUNTED(Dsyr_v2) COUNTED(Dsyrk_v2)
COUNTED(Dtrmm_v2) COUNTED(Dtrmv_v2) COUNTED(DtrsmBatched) COUNTED(Dtrsm_v2) COUNTED(Dtrsv_v2) COUNTED(Dzasum_v2)
COUNTED(Dznrm2_v2) COUNTED(GemmEx) COUNTED(GemmStridedBatchedEx) COUNTED(Icamax_v2) COUNTED(Icamin_v2)
COUNTED(Idamax_v2) COUNTED(Idamin_v2) COUNTED(Isamax_v2) COUNTED(Isamin_v2) COUNTED(Izamax_v2) COUNTED(Izamin_v2)
COUNTED(LtMatmul) COUNTED(Sasum_v2) COUNTED(Saxpy_v2) COUNTED(Scasum_v2) COUNTED(Scnrm2_v2) COUNTED(Scopy_v2)
COUNTED(Sdot_v2) COUNTED(SgelsBatched) COUNTED(SgemmBatched) COUNTED(SgemmEx) COUNTED(SgemmStridedBatched)
COUNTED(Sgemm_v2) COUNTED(Sgemv_v2) COUNTED(SgeqrfBatched) COUNTED(Sger_v2) COUNTED(SgetrfBatched)
COUNTED(SgetrsBatched) COUNTED(Snrm2_v2) COUNTED(Srot_v2) COUNTED(Srotg_v2) COUNTED(Srotm_v2) COUNTED(Srotmg_v2)
COUNTED(Sscal_v2) COUNTED(Sswap_v2) COUNTED(Ssymm_v2) COUNTED(Ssymv_v2) COUNTED(Ssyr2_v2) COUNTED(Ssyr2k_v2)
COUNTED(Ssyr_v2) COUNTED(Ssyrk_v2) COUNTED(Strmm_v2) COUNTED(Strmv_v2) COUNTED(StrsmBatched) COUNTED(Strsm_v2)
COUNTED(Strsv_v2) COUNTED(Zaxpy_v2) COUNTED(Zcopy_v2) COUNTED(Zdotc_v2) COUNTED(Zdotu_v2) COUNTED(Zdrot_v2)
COUNTED(Zdscal_v2) COUNTED(ZgelsBatched) COUNTED(ZgemmBatched) COUNTED(ZgemmStridedBatched) COUNTED(Zgemm_v2)
COUNTED(Zgemv_v2) COUNTED(ZgeqrfBatched) COUNTED(Zgerc_v2) COUNTED(Zgeru_v2) COUNTED(ZgetrfBatched)
COUNTED(ZgetrsBatched) COUNTED(Zhemm_v2) COUNTED(Zhemv_v2) COUNTED(Zher2_v2) COUNTED(Zher2k_v2) COUNTED(Zher_v2)
COUNTED(Zherk_v2) COUNTED(Zrot_v2) COUNTED(Zrotg_v2) COUNTED(Zscal_v2) COUNTED(Zswap_v2) COUNTED(Zsymm_v2)
COUNTED(Zsymv_v2) COUNTED(Zsyr2_v2) COUNTED(Zsyr2k_v2) COUNTED(Zsyr_v2) COUNTED(Zsyrk_v2) COUNTED(Ztrmm_v2)
COUNTED(Ztrmv_v2) COUNTED(ZtrsmBatched) COUNTED(Ztrsm_v2) COUNTED(Ztrsv_v2)
// clang-format on
#undef COUNTED
#define SILENT(NAME) \
  API int cublas##NAME() { return 0; }
    // clang-format off
SILENT(GetMatrixAsync) SILENT(GetVectorAsync) SILENT(LtMatmulAlgoCheck) SILENT(LtMatmulAlgoConfigGetAttribute)
SILENT(LtMatmulAlgoConfigSetAttribute) SILENT(LtMatmulAlgoInit) SILENT(LtMatmulDescDestroy)
SILENT(LtMatmulDescSetAttribute) SILENT(LtMatmulPreferenceDestroy) SILENT(LtMatmulPreferenceSetAttribute)
SILENT(LtMatrixLayoutDestroy) SILENT(LtMatrixLayoutSetAttribute) SILENT(SetMathMode) SILENT(SetMatrixAsync)
SILENT(SetPointerMode_v2) SILENT(SetSmCountTarget) SILENT(SetStream_v2) SILENT(SetVectorAsync) SILENT(SetWorkspace_v2)
// clang-format on
#undef SILENT
    // the driver
    API int cuInit(unsigned) {
  return 0;
}
API int cuDevicePrimaryCtxGetState(int d, unsigned* f, int* a) { return driver_ctx(nullptr, f, a); }
API int cuGetErrorString(int, const char** s) {
  *s = "an error of the simulated card";
  return 0;
}
API int cuCtxGetCurrent(void** c) {
  *c = (void*)0x10;
  return 0;
}
API int cuDeviceGet(int* d, int o) {
  *d = o;
  return 0;
}
API int cuDeviceGetAttribute(int* v, int a, int d) { return cudaDeviceGetAttribute(v, (cudaDeviceAttr)a, d); }
API int cuDevicePrimaryCtxRetain(void** c, int) {
  *c = (void*)0x10;
  return 0;
}
API int cuLaunchCooperativeKernel() {
  n_launch++;
  return 0;
}
API int cuLaunchKernel() {
  n_launch++;
  return 0;
}
#define SILENT(NAME) \
  API int cu##NAME() { return 0; }
// clang-format off
SILENT(CtxSetCurrent) SILENT(FuncGetAttribute) SILENT(FuncSetAttribute) SILENT(FuncSetCacheConfig)
SILENT(LinkAddData_v2) SILENT(LinkComplete) SILENT(LinkCreate_v2) SILENT(ModuleGetFunction) SILENT(ModuleLoad)
SILENT(ModuleLoadData) SILENT(ModuleLoadDataEx) SILENT(ModuleUnload) SILENT(OccupancyMaxActiveBlocksPerMultiprocessor)
SILENT(PointerGetAttribute) SILENT(TensorMapEncodeTiled)
// clang-format on
#undef SILENT
