/* A driver without a GPU, for tests of the launcher: answers as configured and writes down every call.
   The sizes of a kernel's parameters, which a real driver reads from the machine code, are told by the test. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static int g_major = 9, g_minor = 0, g_devices = 1, g_optin = 232448, g_init = 0, g_load = 0;
static int g_sizes[64], g_count;
static char g_log[1 << 16];

void stub_reset(int major, int minor, int devices, int optin, int init, int load) {
  g_major = major, g_minor = minor, g_devices = devices, g_optin = optin, g_init = init, g_load = load;
  g_count = 0, g_log[0] = 0;
}
void stub_parameters(const int* sizes, int count) {
  memcpy(g_sizes, sizes, count * sizeof(int));
  g_count = count;
}
const char* stub_log(void) { return g_log; }

static void note(const char* format, ...) {
  size_t used = strlen(g_log);
  va_list list;
  va_start(list, format);
  vsnprintf(g_log + used, sizeof g_log - used, format, list);
  va_end(list);
}

int cuInit(unsigned flags) { return flags ? 1 : g_init; }
int cuGetErrorName(int code, const char** name) {
  *name = code == 100 ? "CUDA_ERROR_NO_DEVICE" : code == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : 0;
  return *name ? 0 : 1;
}
int cuDeviceGetCount(int* count) { return *count = g_devices, 0; }
int cuDeviceGet(int* device, int index) { return *device = index + 40, 0; }
int cuDeviceGetAttribute(int* value, int which, int device) {
  if (device < 40) return 101;
  *value = which == 75 ? g_major : which == 76 ? g_minor : which == 97 ? g_optin : -1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  note("retain %d\n", device);
  return *context = (void*)0xc0, 0;
}
int cuDevicePrimaryCtxRelease_v2(int device) { return note("release %d\n", device), 0; }
int cuCtxPushCurrent_v2(void* context) { return note("push %p\n", context), 0; }
int cuCtxPopCurrent_v2(void** context) { return note("pop\n"), *context = 0, 0; }
int cuModuleLoadData(void** module, const void* image) {
  note("load %.3s\n", (const char*)image + 1); /* past the 0x7f of an ELF file */
  return *module = (void*)0x60d, g_load;
}
int cuModuleUnload(void* module) { return note("unload %p\n", module), 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  note("function %p %s\n", module, name);
  return *function = (void*)0xf0, 0;
}
int cuFuncSetAttribute(void* function, int which, int value) {
  return note("attribute %p %d %d\n", function, which, value), 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  note("launch %p grid %u %u %u block %u %u %u shared %u stream %p extra %p\n", function, gx, gy, gz, bx, by, bz,
       shared, stream, (void*)extra);
  for (int i = 0; i < g_count; ++i) {
    note("parameter %d at %ld:", i, (long)((char*)parameters[i] - (char*)parameters[0]));
    for (int byte = 0; byte < g_sizes[i]; ++byte) note(" %02x", ((unsigned char*)parameters[i])[byte]);
    note("\n");
  }
  return 0;
}
