// As much of libcuda, libnvrtc and libcublas as the `cuda` backend calls, on the processor. For tests without a card.
//
// Kernels are compiled by g++ with `kernels.h` in place of CUDA. Memory is NaN where nothing was written, and kernels that
// write beyond it are found out. cuBLAS is the plain sums of its manual, with its checks of leading dimensions.
//
// Build: g++ -O2 -std=c++17 -shared -fPIC -DHEADER='"/path/to/kernels.h"' emulator.cpp -o libcuda.so -ldl

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fstream>
#include <map>
#include <mutex>
#include <regex>
#include <sstream>
#include <string>
#include <unistd.h>

namespace {

std::recursive_mutex lock;
using Locked = std::lock_guard<std::recursive_mutex>;

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500 };
// What the card pretends to have.
const size_t TOTAL = size_t(8) << 30;
const size_t GUARD = 4096;

struct Allocation {
    unsigned char* base;
    size_t bytes;
};
std::map<uint64_t, Allocation> allocations;
size_t allocated = 0;
unsigned int launches = 0;
bool has_context = false;
thread_local bool current = false;

[[noreturn]] void fail(const std::string& what) {
    fprintf(stderr, "CUDA emulator: %s\n", what.c_str());
    abort();
}

void check_guards(const std::string& after) {
    for (auto& [address, a] : allocations) {
        for (size_t i = 0; i < GUARD; i++) {
            if (a.base[i] != 0xff || a.base[GUARD + a.bytes + i] != 0xff) {
                fail(after + " wrote outside the memory it was given");
            }
        }
    }
}

// The allocation that holds these bytes.
void check_range(uint64_t address, size_t bytes, const char* what) {
    auto next = allocations.upper_bound(address);
    if (next == allocations.begin()) {
        fail(std::string(what) + ": no such memory");
    }
    auto& [first, a] = *--next;
    if (address - first + bytes > a.bytes) {
        fail(std::string(what) + ": beyond the memory");
    }
}

void check_context(const char* what) {
    if (!has_context || !current) {
        fail(std::string(what) + ": no context is current");
    }
}

struct Program {
    std::string source, log, image;
    bool machine = false;
};

struct Function {
    std::string name;
    void (*kernel)(void**);
    void (*launch)(void (*)(void**), void**, const unsigned int*, unsigned int, unsigned int);
};

// Folder of what was compiled, removed by the script that built this.
std::string folder() {
    const char* dir = getenv("CUDA_EMULATOR_DIR");
    return dir ? dir : "/tmp";
}

std::map<std::string, std::string>& compiled() {
    static std::map<std::string, std::string> known;
    return known;
}

// Path of a library with the kernels of a source, each with a function that takes its parameters by pointers.
bool compile(Program& program) {
    auto& path = compiled()[program.source];
    if (!path.empty()) {
        program.image = path;
        return true;
    }
    std::string base = folder() + "/kernels-" + std::to_string(getpid()) + "-" + std::to_string(compiled().size());
    std::ofstream file(base + ".cpp");
    file << "#include \"" HEADER "\"\n" << program.source << "\n";
    std::regex kernel("__global__\\s+void\\s+(?:__launch_bounds__\\(\\d+\\)\\s+)?(\\w+)\\s*\\(");
    auto begin = std::sregex_iterator(program.source.begin(), program.source.end(), kernel);
    for (auto i = begin; i != std::sregex_iterator(); ++i) {
        std::string name = (*i)[1];
        file << "extern \"C\" void " << name << "_call(void** p) { emulation::call(" << name << ", p); }\n";
    }
    file << "extern \"C\" void launch_kernel(void (*k)(void**), void** p, const unsigned int* g, unsigned int t, "
            "unsigned int s) { emulation::launch(k, p, g, t, s); }\n";
    file.close();
    std::string command = "g++ -O2 -std=c++17 -w -U_FORTIFY_SOURCE -ffp-contract=off -shared -fPIC -o " + base + ".so " +
                          base + ".cpp 2> " + base + ".log";
    if (system(command.c_str()) != 0) {
        std::ifstream log(base + ".log");
        std::stringstream text;
        text << log.rdbuf();
        program.log = text.str();
        return false;
    }
    path = base + ".so";
    program.image = path;
    return true;
}

float widened(const void* p, int type, int64_t i) {
    if (type == 0) {
        return ((const float*)p)[i];
    }
    uint32_t bits = (uint32_t)((const uint16_t*)p)[i] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

}  // namespace

extern "C" {

// libcuda

int cuInit(unsigned int) { return SUCCESS; }

int cuDriverGetVersion(int* version) {
    *version = 13000;
    return SUCCESS;
}

int cuGetErrorName(int error, const char** text) {
    *text = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR";
    return SUCCESS;
}

int cuGetErrorString(int error, const char** text) {
    *text = error == OUT_OF_MEMORY ? "out of memory" : "an error of the emulator";
    return SUCCESS;
}

int cuDeviceGetCount(int* count) {
    *count = 1;
    return SUCCESS;
}

int cuDeviceGet(int* device, int n) {
    *device = n;
    return n == 0 ? SUCCESS : 101;
}

int cuDeviceGetName(char* name, int bytes, int) {
    snprintf(name, bytes, "emulated");
    return SUCCESS;
}

int cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = TOTAL;
    return SUCCESS;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
    // Compute capability 9.0.
    *value = attribute == 75 ? 9 : 0;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
    has_context = true;
    *context = &has_context;
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }

int cuCtxSetCurrent(void* context) {
    current = context != nullptr;
    return SUCCESS;
}

int cuCtxSynchronize() {
    check_context("cuCtxSynchronize");
    return SUCCESS;
}

int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    Locked locked(lock);
    check_context("cuMemAlloc");
    if (bytes == 0) {
        return INVALID_VALUE;
    }
    if (bytes > TOTAL || allocated + bytes > TOTAL) {
        return OUT_OF_MEMORY;
    }
    auto base = (unsigned char*)aligned_alloc(256, (bytes + 2 * GUARD + 255) / 256 * 256);
    if (!base) {
        return OUT_OF_MEMORY;
    }
    memset(base, 0xff, GUARD);
    memset(base + GUARD, 0xff, bytes);
    memset(base + GUARD + bytes, 0xff, GUARD);
    *address = (uint64_t)(base + GUARD);
    allocations[*address] = {base, bytes};
    allocated += bytes;
    return SUCCESS;
}

int cuMemFree_v2(uint64_t address) {
    Locked locked(lock);
    check_context("cuMemFree");
    auto found = allocations.find(address);
    if (found == allocations.end()) {
        fail("cuMemFree: no such memory");
    }
    check_guards("something");
    allocated -= found->second.bytes;
    free(found->second.base);
    allocations.erase(found);
    return SUCCESS;
}

int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
    Locked locked(lock);
    check_context("cuMemcpyHtoD");
    check_range(to, bytes, "cuMemcpyHtoD");
    memcpy((void*)to, from, bytes);
    return SUCCESS;
}

int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
    Locked locked(lock);
    check_context("cuMemcpyDtoH");
    check_range(from, bytes, "cuMemcpyDtoH");
    memcpy(to, (void*)from, bytes);
    return SUCCESS;
}

int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void*) {
    Locked locked(lock);
    check_context("cuMemcpyDtoD");
    check_range(from, bytes, "cuMemcpyDtoD, from");
    check_range(to, bytes, "cuMemcpyDtoD, to");
    memmove((void*)to, (void*)from, bytes);
    return SUCCESS;
}

int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void*) {
    Locked locked(lock);
    check_context("cuMemsetD8");
    check_range(to, bytes, "cuMemsetD8");
    memset((void*)to, value, bytes);
    return SUCCESS;
}

int cuModuleLoadData(void** module, const void* image) {
    Locked locked(lock);
    check_context("cuModuleLoadData");
    // Into a table of symbols of its own: kernels of the same name are in several.
    *module = dlopen((const char*)image, RTLD_NOW | RTLD_LOCAL);
    if (!*module) {
        fail(dlerror());
    }
    return SUCCESS;
}

int cuModuleUnload(void*) { return SUCCESS; }

int cuModuleGetFunction(void** function, void* module, const char* name) {
    Locked locked(lock);
    auto kernel = dlsym(module, (std::string(name) + "_call").c_str());
    auto launch = dlsym(module, "launch_kernel");
    if (!kernel || !launch) {
        return NOT_FOUND;
    }
    *function = new Function{name, (void (*)(void**))kernel,
                             (void (*)(void (*)(void**), void**, const unsigned int*, unsigned int, unsigned int))launch};
    return SUCCESS;
}

int cuLaunchKernel(void* function, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx, unsigned int by,
                   unsigned int bz, unsigned int shared, void*, void** params, void** extra) {
    Locked locked(lock);
    check_context("cuLaunchKernel");
    if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || !bx || bx > 1024 || by != 1 || bz != 1 || shared || extra) {
        return INVALID_VALUE;
    }
    auto f = (Function*)function;
    unsigned int grid[3] = {gx, gy, gz};
    f->launch(f->kernel, params, grid, bx, launches++);
    check_guards(f->name);
    return SUCCESS;
}

// libnvrtc

int nvrtcGetNumSupportedArchs(int* count) {
    *count = 3;
    return SUCCESS;
}

int nvrtcGetSupportedArchs(int* archs) {
    archs[0] = 75;
    archs[1] = 80;
    archs[2] = 90;
    return SUCCESS;
}

int nvrtcCreateProgram(void** program, const char* source, const char*, int, const char* const*, const char* const*) {
    *program = new Program{source};
    return SUCCESS;
}

int nvrtcCompileProgram(void* program, int, const char* const*) {
    Locked locked(lock);
    // NVRTC_ERROR_COMPILATION
    return compile(*(Program*)program) ? SUCCESS : 6;
}

int nvrtcDestroyProgram(void** program) {
    delete (Program*)*program;
    return SUCCESS;
}

int nvrtcGetCUBINSize(void* program, size_t* bytes) {
    *bytes = ((Program*)program)->image.size() + 1;
    return SUCCESS;
}

int nvrtcGetCUBIN(void* program, char* image) {
    strcpy(image, ((Program*)program)->image.c_str());
    return SUCCESS;
}

int nvrtcGetPTXSize(void* program, size_t* bytes) { return nvrtcGetCUBINSize(program, bytes); }

int nvrtcGetPTX(void* program, char* image) { return nvrtcGetCUBIN(program, image); }

int nvrtcGetProgramLogSize(void* program, size_t* bytes) {
    *bytes = ((Program*)program)->log.size() + 1;
    return SUCCESS;
}

int nvrtcGetProgramLog(void* program, char* log) {
    strcpy(log, ((Program*)program)->log.c_str());
    return SUCCESS;
}

// libcublas

int cublasCreate_v2(void** handle) {
    check_context("cublasCreate");
    *handle = &launches;
    return SUCCESS;
}

int cublasDestroy_v2(void*) { return SUCCESS; }
int cublasSetMathMode(void*, int mode) { return mode == 0 ? SUCCESS : 7; }
int cublasSetAtomicsMode(void*, int mode) { return mode == 0 ? SUCCESS : 7; }

int cublasSetWorkspace_v2(void*, void* workspace, size_t bytes) {
    Locked locked(lock);
    check_range((uint64_t)workspace, bytes, "cublasSetWorkspace");
    return (uint64_t)workspace % 256 == 0 ? SUCCESS : 7;
}

int cublasGemmStridedBatchedEx(void*, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int at,
                               int lda, long long sa, const void* b, int bt, int ldb, long long sb, const void* beta,
                               void* c, int ct, int ldc, long long sc, int batches, int compute, int) {
    Locked locked(lock);
    check_context("cublasGemmStridedBatchedEx");
    // f32 results in true f32, of f32 or of bf16.
    if (ct != 0 || compute != 68 || at != bt || (at != 0 && at != 14)) {
        return 15;
    }
    if (m < 0 || n < 0 || k < 0 || batches < 0 || lda < std::max(1, ta ? k : m) || ldb < std::max(1, tb ? n : k) ||
        ldc < std::max(1, m)) {
        return 7;
    }
    if (m == 0 || n == 0 || batches == 0) {
        return SUCCESS;
    }
    size_t bytes = at == 0 ? 4 : 2;
    size_t last = batches - 1;
    check_range((uint64_t)a, (last * sa + (size_t)((ta ? m : k) - 1) * lda + (ta ? k : m)) * bytes, "cuBLAS, A");
    check_range((uint64_t)b, (last * sb + (size_t)((tb ? k : n) - 1) * ldb + (tb ? n : k)) * bytes, "cuBLAS, B");
    check_range((uint64_t)c, (last * sc + (size_t)(n - 1) * ldc + m) * 4, "cuBLAS, C");
    float al = *(const float*)alpha, be = *(const float*)beta;
    for (int64_t batch = 0; batch < batches; batch++) {
        for (int64_t j = 0; j < n; j++) {
            for (int64_t i = 0; i < m; i++) {
                float sum = 0;
                for (int64_t l = 0; l < k; l++) {
                    sum += widened(a, at, batch * sa + (ta ? l + i * lda : i + l * lda)) *
                           widened(b, bt, batch * sb + (tb ? j + l * ldb : l + j * ldb));
                }
                float& out = ((float*)c)[batch * sc + i + j * ldc];
                // As the manual says, C need not hold numbers where beta is 0.
                out = be == 0 ? al * sum : al * sum + be * out;
            }
        }
    }
    return SUCCESS;
}

}  // extern "C"
