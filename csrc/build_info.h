// Build settings that arrive as macros. Their values come without quotes, since torch's JIT build
// does not quote, and become text here; lists contain commas.
#pragma once

#define OE_EXT_TEXT_OF(...) #__VA_ARGS__
#define OE_EXT_TEXT(...) OE_EXT_TEXT_OF(__VA_ARGS__)

#ifndef OE_EXT_TORCH_VERSION
#error "the build must define OE_EXT_TORCH_VERSION"
#endif
#ifndef OE_EXT_CUDA_ARCH_LIST
#define OE_EXT_CUDA_ARCH_LIST
#endif

namespace oe_ext {

// The loader reads the part after '=' from the file before it loads the library: a library that was
// built with another torch may crash on load, or seem to work. Used: else link-time optimisation
// drops the part before.
[[gnu::used]] inline constexpr const char kTorchMarker[] =
    "oe_ext-built-with-torch=" OE_EXT_TEXT(OE_EXT_TORCH_VERSION);
inline constexpr const char* kBuiltWithTorch =
    kTorchMarker + sizeof("oe_ext-built-with-torch=") - 1;

#ifdef OE_EXT_WITH_CUDA
inline constexpr int kCudaVersion = OE_EXT_WITH_CUDA;
#else
inline constexpr int kCudaVersion = 0;
#endif
inline constexpr const char* kCudaArchList = OE_EXT_TEXT(OE_EXT_CUDA_ARCH_LIST);

#if defined(__clang__)
inline constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
inline constexpr const char* kCompiler = "g++ " __VERSION__;
#else
inline constexpr const char* kCompiler = "unknown";
#endif

}  // namespace oe_ext
