import LinuxKVM
