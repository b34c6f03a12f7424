// See guard.cpp.
#pragma once

namespace simt {

void start_guarding();
void stop_guarding();
// Around whatever runs on the device.
void open_device_memory();
void close_device_memory();

}  // namespace simt
