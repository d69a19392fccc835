// NVML without a GPU, as much of it as torch calls: expandable segments ask for the fabric, and a message about a full
// card for other processes.
#include <cstdlib>
#define API extern "C" __attribute__((visibility("default")))
static const int not_supported = 3;
API int nvmlInit_v2() { return 0; }
API int nvmlInit() { return 0; }
API int nvmlShutdown() { return 0; }
API int nvmlDeviceGetCount_v2(int* n) {
  *n = getenv("SIMULATED_CARD_DEVICES") ? atoi(getenv("SIMULATED_CARD_DEVICES")) : 1;
  return 0;
}
API int nvmlDeviceGetHandleByIndex_v2(unsigned, void** d) {
  *d = (void*)0x10;
  return 0;
}
API int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** d) {
  *d = (void*)0x10;
  return 0;
}
API int nvmlDeviceGetUUID(void*, char*, unsigned) { return not_supported; }
API int nvmlDeviceGetNvLinkRemoteDeviceType(void*, unsigned, int*) { return not_supported; }
API int nvmlDeviceGetNvLinkRemotePciInfo_v2(void*, unsigned, void*) { return not_supported; }
API int nvmlDeviceGetComputeRunningProcesses(void*, unsigned* n, void*) {
  *n = 0;
  return 0;
}
API int nvmlSystemGetCudaDriverVersion_v2(int* v) {
  *v = 13000;
  return 0;
}
API int nvmlDeviceGetGpuFabricInfoV(void*, void*) { return not_supported; }
