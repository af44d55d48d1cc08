// HostMemory
